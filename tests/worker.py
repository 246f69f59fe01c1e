"""Runs command lines of train.py and finetune.py in one group of ranks, and compares the replicas.

    torchrun --standalone --nproc_per_node 2 tests/worker.py '[["train", "--method", "dit", ...], ...]' FILE

FILE gets a JSON list, per command: `difference`, the largest one between any two ranks' weights of network,
EMA and teacher; `modules`, how many were compared; `verified`, how often each rank read a checkpoint's
checksums. A first word `stop=3` sends SIGTERM to rank 1 alone in step 3, counted from 0; `die=3` kills it
there, unless torchrun has restarted the group.
"""

import gc
import json
import os
import pathlib
import signal
import sys
import zipfile

import conftest                                                               # first: one thread, the path
import torch
import torch.distributed as dist

import data
import finetune
import model
import train

results, modules, verified, fault = [], {}, [0], ''
update_ema, make_teacher = model.update_ema, model.make_teacher
random_numbers, testzip = model.random_numbers, zipfile.ZipFile.testzip


def remember(*those):
    modules.update({id(module): module for module in those if module is not None})
    return those[-1]


def strike(cfg, step, *rest):
    if dist.get_rank() == 1 and fault == f'stop={step}':
        os.kill(os.getpid(), signal.SIGTERM)
    if dist.get_rank() == 1 and fault == f'die={step}' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        os.kill(os.getpid(), signal.SIGKILL)
    return random_numbers(cfg, step, *rest)


def count(archive):
    verified[0] += 1
    return testzip(archive)


def main():
    global fault
    for script, *argv in json.loads(sys.argv[1]):
        modules.clear()
        fault, verified[0] = '', 0
        if '=' in script:
            fault, (script, *argv) = script, argv
        try:
            {'train': train, 'finetune': finetune}[script].main(argv)
            assert not fault.startswith('stop'), 'nothing stopped it'
        except SystemExit as stop:
            assert fault.startswith('stop') and stop.code == 128 + signal.SIGTERM, stop.code
        widest = 0.0
        for module in modules.values():
            for tensor in [*module.parameters(), *module.buffers()]:
                low, high = tensor.detach().clone(), tensor.detach().clone()
                dist.all_reduce(low, dist.ReduceOp.MIN)
                dist.all_reduce(high, dist.ReduceOp.MAX)
                widest = max(widest, (high - low).max().item())
        reads = torch.zeros(dist.get_world_size())
        reads[dist.get_rank()] = verified[0]
        dist.all_reduce(reads)
        results.append({'modules': len(modules), 'difference': widest, 'verified': reads.int().tolist()})
    if dist.get_rank() == 0:
        pathlib.Path(sys.argv[2]).write_text(json.dumps(results))
    modules.clear()                                                       # before Python's end, and gloo's
    gc.collect()


model.update_ema = lambda shadow, net, decay: update_ema(remember(net, shadow), net, decay)
model.make_teacher = lambda net, cfg: remember(net, make_teacher(net, cfg))
model.random_numbers, zipfile.ZipFile.testzip = strike, count
conftest.shrink(conftest.pytest.MonkeyPatch())                                # as tests/test_resume.py has it
data.script('worker.py', main)
