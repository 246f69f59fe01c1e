"""Runs command lines of train.py and finetune.py in one group of processes, and looks at every replica.

    torchrun --standalone --nproc_per_node 2 tests/worker.py '[["train", "--method", "dit", ...], ...]' FILE

FILE gets a JSON list: for each command the largest difference between any two processes' weights, of the
network and of its shadows. A first word `stop=3` asks process 1 alone to stop in step number 3, as a
scheduler would; `die=3` kills it there without a word, unless torchrun has already started the group anew.
"""

import json
import os
import pathlib
import signal
import sys

os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import finetune  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)
spread, modules, fault = [], {}, ''
update_ema, draw = model.update_ema, model.draw


def remember(shadow, net, *how):
    modules.update({id(shadow): shadow, id(net): net})
    update_ema(shadow, net, *how)


def struck(cfg, step, *rest):
    first_try = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
    if dist.get_rank() == 1 and fault == f'stop={step}':
        os.kill(os.getpid(), signal.SIGTERM)
    if dist.get_rank() == 1 and fault == f'die={step}' and first_try:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(cfg, step, *rest)


model.update_ema, model.draw, model.PROTOTYPES = remember, struck, 64         # as tests/conftest.py has it
for script, *argv in json.loads(sys.argv[1]):
    modules.clear()
    fault = ''
    if '=' in script:
        fault, (script, *argv) = script, argv
    try:
        {'train': train, 'finetune': finetune}[script].main(argv)
        assert not fault.startswith('stop'), 'nothing stopped it'
    except SystemExit as stop:
        assert fault.startswith('stop') and stop.code == 128 + signal.SIGTERM, stop.code
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
