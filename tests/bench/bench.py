"""How fast are training, sampling and evaluation here, and how much of the machine is that?

    python tests/bench/bench.py --json bench.json                    # S/2 on a CPU; XL/2 where there is a GPU
    python tests/bench/bench.py --gpu --json assets/bench-gpu.json   # all of it on a GPU, in about 40 minutes
    python tests/bench/bench.py --tiny --json tiny.json              # the same plan, tiny: does it run?

The plan is a list of items, and each is a process of its own with a time limit: an item that fails or takes
too long costs no other. A number is written to --json as soon as it is there; to resume, run the same command
again. Training is timed in train.py's own loop, on random latents of 1000 classes, between its calls of
`model.loss_of_step`, one per step. No checkpoint is written and nothing is evaluated meanwhile.

    train METHOD    compiled and eager: seconds per step (median), images/s, share of the GPU's peak FLOP/s as
                    published, peak memory; with as few accumulated micro-batches as fit into memory
    profile         mcdit: kernels and waits for the device per step, time in which the GPU is idle
    wait            the one wait of the loop: a step with it, and one whose two flags are not read
    lerp            the EMA of all weights by torch._foreach_lerp_, and by a multiplication and an addition
    sample          images/s without guidance, guided within an interval, guided everywhere
    vae, fid        images/s of 256 pixels: encoded and decoded with and without TF32; features of Inception
    resume          train.py under torchrun, killed (-9) or stopped (SIGTERM) and resumed, and uninterrupted
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')                           # see train.py
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import fid
import model
import sample
import train

PEAK = {'H200': 989e12, 'H100 80GB': 989e12, 'A100': 312e12, 'V100': 125e12}  # dense 16-bit FLOP/s
SCALES = {                                    # steps are (not timed, timed)
    'gpu': dict(model='XL/2', batch=256, side=32, steps=(8, 30), sampled=256, pixels=256, vae=32, fid=256),
    'cpu': dict(model='S/2', batch=8, side=32, steps=(2, 6), sampled=8, pixels=256, vae=1, fid=8),
    'tiny': dict(model='T/8', batch=4, side=16, steps=(2, 3), sampled=2, pixels=16, vae=1, fid=1)}
METHODS = ('dit', 'maskdit', 'mcdit', 'mdt', 'sddit')
PLAN = {**{f'train {method}': 420 for method in METHODS}, 'profile': 300, 'wait': 300, 'lerp': 120,
        'sample': 420, 'vae': 240, 'fid': 120, 'resume': 420}                 # item: time limit in seconds
cuda = torch.cuda.is_available()
device = torch.device('cuda' if cuda else 'cpu')
COMPILED = ['--compile' if cuda else '--no-compile']


def training_flops(cfg, loss_fn):
    """FLOPs of one step with cfg.batch images: forward, backward and teacher, without the optimizer."""
    r = {name: value.to('meta') for name, value in model.random_numbers(cfg, 0).items()}
    no_autocast = unittest.mock.patch('torch.autocast', lambda *_, **__: contextlib.nullcontext())
    with torch.device('meta'), no_autocast:                                   # tensors without memory
        net = model.Net(cfg)
        teacher = model.make_teacher(net, cfg)
        x0, y = torch.empty_like(r['noise']), torch.zeros(cfg.batch, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            sum(weight * value for weight, value in loss_fn(net, teacher, x0, y, r, cfg).values()).backward()
    return counter.get_total_flops()


def synchronize():
    if cuda:
        torch.cuda.synchronize()


def timed(function, times=1):
    """Seconds per call, after one call that is not timed."""
    function()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    synchronize()
    return (time.perf_counter() - start) / times


def latents(s, folder):
    """A data folder of random latents of 1000 classes."""
    rng, shape = np.random.default_rng(0), (4, s['side'], s['side'])
    rows = ((rng.standard_normal(shape, np.float32), i % 1000) for i in range(8 * s['batch']))
    data.save_folder(folder, rows, 'float16', shape, {'kind': 'latents', 'classes': 1000})
    return folder


# ------------------------------------------------------------------------------------------------- training

def run_loop(s, folder, method, flags, on_step, steps):
    """train.py for some steps; calls `on_step(step)` as each of them starts. Returns its configuration."""
    seen, loss_of_step = [], model.loss_of_step

    def hook(cfg, step):
        seen.append(cfg)
        on_step(step)
        return loss_of_step(cfg, step)
    argv = ['--method', method, '--model', s['model'], '--batch', s['batch'], '--data', folder, '--out',
            f'{folder}-out', '--steps', steps, '--log-every', 10 ** 6, '--preview', 0, *flags]
    with unittest.mock.patch('model.loss_of_step', hook), unittest.mock.patch('train.report'), \
            unittest.mock.patch('torch.save'):
        train.main([str(part) for part in argv])
    return seen[0]


def time_steps(s, method, record):
    """Compiled, then eager, with as few accumulated micro-batches as fit into memory."""
    first, count = s['steps']
    for way in ('compiled', 'eager'):
        for accumulate in (1, 2, 4, 8):
            with tempfile.TemporaryDirectory() as folder:
                times = []

                def on_step(step):
                    if step == first and cuda:
                        torch.cuda.reset_peak_memory_stats()
                    times.append(time.perf_counter())
                try:
                    cfg = run_loop(s, latents(s, f'{folder}/latents'), method, [
                        '--compile' if way == 'compiled' else '--no-compile', '--accumulate', accumulate],
                        on_step, first + count + 1)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    continue
            seconds = statistics.median(np.diff(times[first:]))
            one = dataclasses.replace(cfg, batch=1)
            flops = s['batch'] * training_flops(one, model.METHODS[method].loss)
            name = torch.cuda.get_device_name() if cuda else ''
            peak = next((peak for part, peak in PEAK.items() if part in name), None)
            record(way, {'seconds': seconds, 'images_per_s': s['batch'] / seconds, 'accumulate': accumulate,
                         'teraflops_per_step': flops / 1e12, 'share_of_peak': peak and flops / seconds / peak,
                         'peak_GiB': torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else None})
            break


def profile(s, record):
    """Ten steps of mcdit: kernels and waits per step, and how long the device is idle."""
    first, steps = s['steps'][0], 10
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    profiler, clock = torch.profiler.profile(activities=activities), []

    def on_step(step):
        if step in (first, first + steps):
            synchronize()
            clock.append(time.perf_counter())
            profiler.start() if step == first else profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        run_loop(s, latents(s, f'{folder}/latents'), 'mcdit', COMPILED, on_step, first + steps + 1)
    events = [e for e in profiler.events() if not getattr(e, 'is_user_annotation', False)]
    on_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    on_host = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    spans = sorted((e.time_range.start, e.time_range.end) for e in on_device)   # microseconds
    idle, at = [], spans[0][0] if spans else 0
    for start, end in spans:
        if start > at:
            idle.append(start - at)
        at = max(at, end)
    waits = [name for name in on_host if 'Synchronize' in name]               # two are `on_step`'s own
    kernels = [e for e in on_device if not e.name.startswith(('Memcpy', 'Memset'))]
    record('steps', {'seconds': (clock[1] - clock[0]) / steps, 'kernels': len(kernels) / steps,
                     'copies': (len(on_device) - len(kernels)) / steps,
                     'host_operations': len(on_host) / steps,
                     'waits': {name: waits.count(name) / steps for name in sorted(set(waits))},
                     'idle_ms': sum(idle) / 1e3 / steps, 'longest_idle_ms': max(idle, default=0) / 1e3})


def wait(s, record):
    """The cost of reading the two flags of a step: blocks of steps that do and that do not, in turns."""
    block, rounds, first = max(2, s['steps'][1] // 3), 3, s['steps'][0]
    read, clock = torch.Tensor.tolist, []

    def unread(tensor):                                                       # the loop's [skip, stop]
        return [0, 0] if tensor.shape == (2,) and tensor.dtype == torch.int32 else read(tensor)

    def on_step(step):
        if step >= first and (step - first) % block == 0:
            synchronize()
            clock.append(time.perf_counter())
            torch.Tensor.tolist = read if len(clock) % 2 else unread
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_loop(s, latents(s, f'{folder}/latents'), 'mcdit', COMPILED, on_step,
                     first + 2 * rounds * block + 1)
    finally:
        torch.Tensor.tolist = read
    took = np.diff(clock) / block
    with_wait, without = float(np.median(took[0::2])), float(np.median(took[1::2]))
    record('step', {'seconds': with_wait, 'seconds_without': without, 'share': with_wait / without - 1})


def network(s):
    """mcdit as it is sampled from, with 1000 classes; weights that start at zero are random."""
    torch.manual_seed(0)
    cfg = model.Config(method='mcdit', model=s['model'], stage='tune', mask_ratio=0.0, resolution=s['side'],
                       classes=1000)
    with torch.device(device):
        net = model.Net(cfg)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter) * parameter.requires_grad
    return net.requires_grad_(False).eval(), cfg


def lerp(s, record):
    net, _ = network(s)
    shadow = [parameter.clone() for parameter in net.parameters()]
    weights = list(net.parameters())

    def two_passes():
        torch._foreach_mul_(shadow, 0.9999)
        torch._foreach_add_(shadow, weights, alpha=0.0001)
    record('lerp', {'seconds': timed(lambda: torch._foreach_lerp_(shadow, weights, 0.0001), 20),
                    'seconds_of_two_passes': timed(two_passes, 20),
                    'parameters': sum(p.numel() for p in shadow)})


# ---------------------------------------------------------------------------------- sampling and evaluation

def sampling(s, record):
    net, cfg = network(s)
    precision = sample.pick_precision('auto', device)
    sample.cast_weights(net, precision)
    if cuda:
        model.compile_blocks(net)
    steps, n = (4 if s['model'] == 'T/8' else 40), s['sampled']
    labels = [i % 1000 for i in range(n)]
    for name, w in (('without', lambda sigma: 1.0), ('interval', sample.guidance(1.5, cfg, (0.19, 1.61))),
                    ('everywhere', sample.guidance(1.5, cfg))):
        took = timed(lambda: sample.generate(net, cfg, 0, range(n), labels, steps, w, precision))
        record(name, {'images_per_s': n / took, 'minutes_for_50000': 50_000 / n * took / 60, 'steps': steps})


def vae(s, record):
    with torch.device(device):
        net = data.VAE().eval().requires_grad_(False)
    side, n = s['pixels'], s['vae']
    x = torch.randn(n, 3, side, side, device=device)
    z = torch.randn(n, 4, side // 8, side // 8, device=device)
    for precision in ('tf32', 'ieee'):
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = precision
        record(precision, {'encoded_per_s': n / timed(lambda: net.encode(x)),
                           'decoded_per_s': n / timed(lambda: net.decode(z))})


def features(s, record):
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = 'ieee'
    net = fid.Inception().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    shape = (s['fid'], s['pixels'], s['pixels'], 3)
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    record('features', {'images_per_s': len(images) / timed(lambda: net(fid.preprocess(images, device)))})


def resume(s, record):
    """The last checkpoints of three runs: uninterrupted, killed and resumed, stopped and resumed."""
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    steps, size = 40, ['--model', 'T/4' if s['model'] == 'T/8' else 'S/2']
    with tempfile.TemporaryDirectory() as desk:
        folder, weights = latents(s | {'batch': 16}, f'{desk}/latents'), {}
        for how in ('uninterrupted', 'SIGKILL', 'SIGTERM'):
            out = pathlib.Path(desk) / how
            argv = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '1',
                    str(ROOT / 'train.py'), '--data', folder, '--out', str(out), '--steps', str(steps),
                    '--batch', '16', '--save-every', '8', '--eval-every', '1000000', '--log-every', '1',
                    '--preview', '0', *size]
            start = time.perf_counter()
            if how != 'uninterrupted':
                run = subprocess.Popen(argv, **quiet, start_new_session=True)
                while run.poll() is None and not any(line.get('step') == 20 for line in train.read_log(out)):
                    time.sleep(0.02)
                os.killpg(run.pid, getattr(signal, how))
                run.wait()
                reached = [line['step'] for line in train.read_log(out) if 'loss' in line][-1]
            subprocess.run(argv, **quiet, check=True)
            state = model.read_checkpoint(out / f'{steps:07d}.pt')
            weights[how] = {name: value.clone() for name, value in state['model'].items()}
            difference = max((value - weights['uninterrupted'][name]).abs().max().item()
                             for name, value in weights[how].items())
            record(how, {'seconds': time.perf_counter() - start, 'largest_difference': difference}
                   | ({} if how == 'uninterrupted' else {'interrupted_after_step': reached}))


ITEMS = {'profile': profile, 'wait': wait, 'lerp': lerp, 'sample': sampling, 'vae': vae, 'fid': features,
         'resume': resume}


# -------------------------------------------------------------------------------------------------- command

def read(path):
    with contextlib.suppress(OSError):
        return json.loads(pathlib.Path(path).read_text())
    return {}


def main(argv=None):
    parser = argparse.ArgumentParser(description='Benchmark.', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument('--gpu', action='store_const', const='gpu', dest='scale', help='XL/2, batch 256')
    scale.add_argument('--tiny', action='store_const', const='tiny', dest='scale', help='does it run?')
    flag('--items', nargs='+', metavar='ITEM', help=f'some of: {", ".join(PLAN)}; None: all')
    flag('--model', help='size and patch; None: XL/2 on a GPU, else S/2')
    flag('--batch', type=int, help='images per step; None: 256 on a GPU, else 8')
    flag('--json', default='bench.json', help='file for the numbers')
    flag('--item', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    name = args.scale or ('gpu' if cuda else 'cpu')
    model.check(name != 'gpu' or cuda, '--gpu needs a GPU, and there is none here')
    s = SCALES[name] | {key: getattr(args, key) for key in ('model', 'batch') if getattr(args, key)}

    def record(part, numbers):
        found = read(args.json)
        found.setdefault(args.item, {})[part] = numbers
        if part != 'failed':
            found[args.item].pop('failed', None)
        with data.whole_file(args.json) as file:
            file.write((json.dumps(found, indent=1) + '\n').encode())
        words = [f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}'
                 for key, value in numbers.items()]
        print(f'{args.item:14} {part:13} ' + '  '.join(words), flush=True)

    if args.item:                                                             # in a process of its own
        if not cuda:
            torch.set_num_threads(1)
        torch._dynamo.config.recompile_limit = 64                             # methods share a block's code
        kind, _, method = args.item.partition(' ')
        return time_steps(s, method, record) if kind == 'train' else ITEMS[kind](s, record)

    about = {'device': torch.cuda.get_device_name() if cuda else 'CPU, 1 thread', 'torch': torch.__version__,
             'commit': train.git_commit(), 'scale': s, 'flags': sys.argv[1:] if argv is None else argv}
    args.item, failed = 'about', []
    record(name, about)
    for item in args.items or PLAN:
        model.check(item in PLAN, f'--items {item}: the items are {", ".join(PLAN)}')
        if item in read(args.json) and 'failed' not in read(args.json)[item]:
            continue
        command = [sys.executable, __file__, '--item', item, '--json', args.json, '--model', s['model'],
                   '--batch', str(s['batch']), *(['--' + name] if name != 'cpu' else [])]
        tiny = {'TORCHDYNAMO_DISABLE': '1', 'OMP_NUM_THREADS': '1'} if name == 'tiny' else {}    # no compiler
        try:
            child = subprocess.run(command, timeout=PLAN[item], env=os.environ | tiny, stderr=subprocess.PIPE,
                                   text=True)
            why = child.stderr.strip().splitlines()[-1:] if child.returncode else None
        except subprocess.TimeoutExpired:
            why = [f'more than {PLAN[item]} s']
        if why is not None:
            failed.append(item)
            args.item = item
            record('failed', {'why': ' '.join(why)})
    model.check(not failed, f'failed: {", ".join(failed)}; see {args.json}')


if __name__ == '__main__':
    data.script('bench.py', main)
