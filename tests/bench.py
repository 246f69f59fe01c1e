"""How fast is training and sampling here, and how much of the machine's speed is that?

    python tests/bench.py                                   # on a CPU: S/2, batches of 8, one thread
    python tests/bench.py --model XL/2 --methods dit maskdit mcdit --batch 256 --sampling
    python tests/bench.py --gpu --json assets/bench-gpu.json    # every GPU row of the README in ten minutes

Each row is the trainer's own step, `train.backward` and `train.update`, on random latents. Layers that start
at zero are randomised first: products of zeros are faster than real ones. Rows take turns, there and back,
and are compared by the ratio of medians; the row `again` times the first method a second time, so it shows
the noise. On a CPU: one thread, processor time.

    TFLOP/s     of the model: forward, backward and EMA network, counted on tensors without content
    MFU         that, over the published peak of the device (none where it is not known to this file) and
                over a matrix product timed in the same run
    overhead    (time / time of dit) / (FLOPs / FLOPs of dit): 1 where every FLOP costs what dit's costs

--json is written row by row, so a run that is cut short keeps what it has.
"""

import argparse
import gc
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

PEAKS = {  # dense 16-bit TFLOP/s as published
    'H200': 989,
    'H100 80GB HBM3': 989,
    'H100 PCIe': 756,
    'A100': 312,
    'V100': 125,
}
GPU_PLAN = (  # in order of interest, since time may run out; with dit, 256 images of XL/2 are too many
    ['--methods', 'dit', 'maskdit', 'mcdit', '--batch', '128'],
    ['--methods', 'maskdit', 'mcdit', '--batch', '256'],
    ['--methods', 'mcdit', '--batch', '256', '--sampling', '--rounds', '0'],
    ['--methods', 'dit', 'mdt', 'sddit', '--batch', '64'],
)
GPU_SECONDS = 540  # no round begins after these, and no section in the last SECTION_SECONDS of them
SECTION_SECONDS = 120
SAMPLING_STEPS, INTERVAL = 40, (0.19, 1.61)


def parse(argv):
    parser = argparse.ArgumentParser(description='Benchmark.', allow_abbrev=False)
    flag = parser.add_argument
    cuda = torch.cuda.is_available()
    flag('--model', default='XL/2' if cuda else 'S/2')
    flag('--methods', nargs='+', choices=model.METHODS, default=list(model.METHODS))
    flag('--batch', type=int, default=64 if cuda else 8, help='images a step')
    flag('--tokens', type=int, choices=(256, 1024), default=256, help='latents of 32 x 32 or 64 x 64')
    flag('--precision', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto' if cuda else 'fp32')
    flag('--compile', action=argparse.BooleanOptionalAction, default=cuda)
    flag('--rounds', type=int, default=4 if cuda else 12, help='times that every row has its turn')
    flag('--steps', type=int, default=10 if cuda else 1, help='steps a turn')
    flag('--sampling', action='store_true', help='50,000 images too, extrapolated from --images')
    flag('--images', type=int, default=512, help='images to sample, in batches of --batch')
    flag('--gpu', action='store_true', help='all rows for a GPU, in place of the flags above')
    flag('--json', help='file to write the numbers to')
    return parser.parse_args(argv)


def configuration(method, args):
    """As train.py makes it for ImageNet's latents."""
    side = {256: 16, 1024: 32}[args.tokens] * model.parse_size(args.model)[2]
    cfg = dict(stage='train', method=method, model=args.model, resolution=side, channels=4, classes=1000)
    cfg |= dict(diffusion='edm', sigma_data=0.5, seed=0, steps=400_000, ema_step=0)
    return model.METHODS[method]['defaults'] | cfg


def training_flops(cfg):
    """FLOPs of one training image: forward, backward, EMA network."""
    with torch.device('meta'):
        net = model.Net(cfg)
        teacher = model.make_teacher(net, cfg)
        x = torch.empty(1, cfg['channels'], cfg['resolution'], cfg['resolution'])
        y = torch.empty(1, dtype=torch.long)
    draws = {name: value.to('meta') for name, value in model.draw(cfg, 0, 1).items()}
    with FlopCounterMode(display=False) as counter:
        model.METHODS[cfg['method']]['loss'](net, teacher, x, y, draws, cfg)[0].backward()
    return counter.get_total_flops()


def network(cfg, device):
    """Random weights, drawn on the device, the zero-initialised ones too."""
    torch.manual_seed(0)
    with torch.device(device):
        net = model.Net(cfg)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter) * parameter.requires_grad
    return net


def stepper(cfg, args, device, precision):
    """A function that does step after step, as train.py would with `args.batch` images at hand."""
    net = network(cfg, device)
    with torch.device(device):
        ema = model.Net(cfg).requires_grad_(False)
    ema.load_state_dict(net.state_dict())
    teacher = model.make_teacher(net, cfg)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)
    loss_scale = torch.tensor([2.0**16, 0.0], device=device) if precision == torch.float16 else None
    if args.compile:
        model.compile_blocks(net)
        if teacher is not None:
            model.compile_blocks(teacher)
    shape = (args.batch, cfg['channels'], cfg['resolution'], cfg['resolution'])
    x, y = 0.5 * torch.randn(shape, device=device), torch.randint(1000, shape[:1], device=device)
    number = 0

    def step():
        nonlocal number
        draws = model.draw(cfg, number, args.batch, device)
        weight = 1.0 if loss_scale is None else loss_scale[0]
        train.backward(net, teacher, x, y, draws, cfg, precision, weight)
        train.update(net, ema, teacher, optimizer, loss_scale, number, cfg)
        number += 1

    return step


def seconds(function, device, times=1):
    """What one of `times` calls takes: of the GPU between two events, or of the processor."""
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


def product(device, precision):
    """FLOP/s of a product of square matrices of random numbers."""
    n = 8192 if device.type == 'cuda' else 1024
    a, b = (torch.randn(n, n, device=device).to(precision) for _ in range(2))
    took = [seconds(lambda: a @ b, device, 10) for _ in range(6)]
    return 2 * n**3 / statistics.median(took[1:])


def fetch(cfg):
    """Processor seconds to fetch 256 images' moments, at random, from a memory map that the cache holds."""
    rng = np.random.default_rng(0)
    n, shape = 2048, (2 * cfg['channels'], cfg['resolution'], cfg['resolution'])
    with tempfile.TemporaryDirectory() as folder:
        rows = ((rng.standard_normal(shape, np.float32), 0) for _ in range(n))
        data.save_folder(f'{folder}/m', rows, 'float16', shape, {'kind': 'moments', 'classes': 1000})
        dataset = data.Data(f'{folder}/m')
        took = []
        for step in range(20):
            indices = data.batch_indices(0, step, 256, dataset.trained)
            start = time.process_time()
            dataset.rows(indices)
            took.append(time.process_time() - start)
    return statistics.median(took)


def peak_flops(device, precision):
    """FLOP/s as published, or None where this file does not know."""
    if device.type == 'cpu' or precision == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def train_rows(args, device, precision, deadline, rows, save):
    """Time steps of all methods in turns, and `save` the rows after each."""
    steppers = {}
    for method in args.methods:
        cfg = configuration(method, args)
        rows[method] = {'flops': training_flops(cfg)}
        try:
            before = torch.cuda.memory_allocated() if device.type == 'cuda' else 0
            step = stepper(cfg, args, device, precision)
            for _ in range(3):  # compiles, and fills caches
                step()
            if device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats()
                step()
                rows[method]['memory'] = torch.cuda.max_memory_allocated() - before
            steppers[method] = step
        except torch.OutOfMemoryError:
            rows[method]['failed'] = 'out of memory'
    if not steppers:
        return
    first = next(iter(steppers))
    steppers['again'], rows['again'] = steppers[first], {'flops': rows[first]['flops']}
    times = {name: [] for name in steppers}
    for k in range(args.rounds):
        if time.monotonic() > deadline:
            break
        for name in list(steppers) if k % 2 else reversed(steppers):
            times[name].append(seconds(steppers[name], device, args.steps))
        for name in steppers:
            rows[name] |= figures(rows[name]['flops'], rows[first]['flops'], times[name], times[first], args)
        save()


def figures(flops, flops_first, times, times_first, args):
    took = statistics.median(times)
    relative, ideal = took / statistics.median(times_first), flops / flops_first
    return {
        'seconds': took,
        'images_per_s': args.batch / took,
        'flops_per_s': args.batch * flops / took,
        'time_ratio': relative,
        'flop_ratio': ideal,
        'overhead': relative / ideal,
        'times': times,
    }


def sampling_rows(args, device, precision, rows, save):
    """Minutes for 50,000 images without their files: no guidance, guidance in an interval, everywhere."""
    cfg = configuration(args.methods[-1], args) | {'stage': 'tune'}
    net = network(cfg, device).eval().requires_grad_(False)
    sample.make_ready(net, precision, args.compile)
    plans = {
        'no guidance': sample.guidance(1.0, cfg),
        'guidance in an interval': sample.guidance(1.5, cfg, INTERVAL),
        'guidance': sample.guidance(1.5, cfg),
    }
    for name, w in plans.items():

        def make(first, steps=SAMPLING_STEPS):
            labels = [i % 1000 for i in range(args.batch)]
            sample.generate(net, cfg, 0, range(first, first + args.batch), labels, steps, w, precision)

        make(0, 8)  # 8 levels reach into the interval, so both sizes of batches are compiled
        batches = range(0, args.images, args.batch)
        took = seconds(lambda: [make(first) for first in batches], device) / (len(batches) * args.batch)
        rows[name] = {'images': len(batches) * args.batch, 'minutes_for_50000': took * 50_000 / 60}
        save()


def show(section):
    """The section's table, as the README has it, and what follows from it."""
    rows, flags = section['rows'], section['flags']
    timed = {name: row for name, row in rows.items() if 'seconds' in row}
    print(f'\n{flags}')
    if rows:
        print('| | it/s | images/s | TFLOP/s | MFU | of a product | GB | time | FLOPs | overhead |')
        print('|---' * 10 + '|')
    for name, row in rows.items():
        if name not in timed:
            print(f'| {name} | {row.get("failed", "not measured")} |' + ' |' * 8)
            continue
        of_peak = f'{row["flops_per_s"] / section["peak"]:.1%}' if section['peak'] else ''
        memory = f'{row["memory"] / 1e9:.1f}' if 'memory' in row else ''
        print(
            f'| {name} | {1 / row["seconds"]:.3g} | {row["images_per_s"]:.4g} '
            f'| {row["flops_per_s"] / 1e12:.4g} | {of_peak} | {row["flops_per_s"] / section["product"]:.1%} '
            f'| {memory} | {row["time_ratio"]:.3f} | {row["flop_ratio"]:.3f} | {row["overhead"]:.3f} |'
        )
    if timed and abs(timed['again']['time_ratio'] - 1) > 0.02:
        print('noisy: the row `again` is off by more than 2 %')
    if {'mcdit', 'maskdit'} <= timed.keys():
        mcdit, maskdit = timed['mcdit'], timed['maskdit']
        print(
            f'mcdit : maskdit  time {mcdit["seconds"] / maskdit["seconds"]:.3f}, '
            f'FLOPs {mcdit["flops"] / maskdit["flops"]:.4f}'
        )
    if timed:
        fastest = 256 * min(row['seconds'] for row in timed.values()) / flags['batch']
        print(
            f'256 latents fetched in {1000 * section["fetch_seconds"]:.2g} ms, '
            f'{section["fetch_seconds"] / fastest:.2g} of the fastest step of 256'
        )
    for name, row in section['sampling'].items():
        print(
            f'50,000 images at {SAMPLING_STEPS} steps, {name}: {row["minutes_for_50000"]:.3g} minutes, '
            f'extrapolated from {row["images"]}'
        )


def main(argv=None):
    began = time.monotonic()
    args = parse(argv)
    _, _, device = train.where_am_i(10)
    if args.gpu and device.type != 'cuda':
        sys.exit('bench.py: --gpu needs a GPU, and there is none here: not measured on a GPU')
    if device.type == 'cpu':
        torch.set_num_threads(1)
    else:
        torch._dynamo.config.recompile_limit = 64  # the rows share the code of a block, not its shapes
    report = {
        'command': 'python tests/bench.py ' + ' '.join(sys.argv[1:] if argv is None else argv),
        'torch': torch.__version__,
        'device': torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, 1 thread, processor time',
        'sections': [],
    }

    def save():
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + '\n')

    for section_args in [parse(plan) for plan in GPU_PLAN] if args.gpu else [args]:
        if args.gpu and time.monotonic() - began > GPU_SECONDS - SECTION_SECONDS:
            print(f'\nnot measured, for want of time: {section_args}')
            continue
        precision = sample.pick_precision(section_args.precision, device)
        if device.type == 'cpu':
            torch.backends.cuda.enable_flash_sdp(precision != torch.bfloat16)  # as train.py does
        flags = {name: value for name, value in vars(section_args).items() if name not in ('gpu', 'json')}
        section = {'flags': flags | {'precision': str(precision)}, 'rows': {}, 'sampling': {}}
        section |= {'peak': peak_flops(device, precision), 'product': product(device, precision)}
        report['sections'].append(section)

        if section_args.rounds:
            deadline = began + GPU_SECONDS if args.gpu else float('inf')
            section['fetch_seconds'] = fetch(configuration('dit', section_args))
            train_rows(section_args, device, precision, deadline, section['rows'], save)
        if section_args.sampling:
            sampling_rows(section_args, device, precision, section['sampling'], save)
        save()
        show(section)
        gc.collect()
        if device.type == 'cuda':
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    return report


if __name__ == '__main__':
    main()
