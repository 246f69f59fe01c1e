"""Runs command lines of train.py and finetune.py in one group of processes, and looks at every replica.

    torchrun --standalone --nproc_per_node 2 tests/worker.py '[["train", "--method", "dit", ...], ...]' FILE

FILE gets a JSON list: for each command the largest difference between any two processes' weights, of the
network and of its shadows.
"""

import json
import os
import pathlib
import sys

os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import finetune  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)
spread, modules = [], {}
update_ema = model.update_ema


def remember(shadow, net, decay):
    modules.update({id(shadow): shadow, id(net): net})
    update_ema(shadow, net, decay)


model.update_ema = remember
for script, *argv in json.loads(sys.argv[1]):
    modules.clear()
    {'train': train, 'finetune': finetune}[script].main(argv)
    widest = 0.0
    for module in modules.values():
        for parameter in [*module.parameters(), *module.buffers()]:
            low, high = parameter.detach().clone(), parameter.detach().clone()
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
            widest = max(widest, (high - low).max().item())
    spread.append({'modules': len(modules), 'difference': widest})
if dist.get_rank() == 0:
    pathlib.Path(sys.argv[2]).write_text(json.dumps(spread))
dist.destroy_process_group()
