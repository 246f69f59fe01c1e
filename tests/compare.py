"""The five methods beside each other on `shapes`: masked training alone, the laptop's but that the learning
rate falls to 0 over the second half.

    python tests/compare.py --steps 600 --json assets/compare.json

Counts, times and trains each method; prints the table of the README. The data set, the order of images, noise
levels, noise and the learning rate are the same for all. Time is processor time of one thread, in interleaved
rounds, and the ratio of medians; the row `dit again` shows how far two equal rows are apart. Runs are kept in
--out, and the same command again continues them.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

LAPTOP = ['--model', 'T/2', '--batch', '64', '--lr', '2e-3', '--lr-decay', '0.5']
ROUNDS = 12


def configuration(method, dataset):
    return train.configuration(train.parse([*LAPTOP, '--method', method, '--data', 'shapes']), dataset)


def gigaflops(cfg):
    """Forward FLOPs of the loss of one image, EMA network included, counted on tensors without content."""
    with torch.device('meta'):
        net = model.Net(cfg)
        teacher = model.make_teacher(net, cfg)
        x = torch.empty(1, cfg['channels'], cfg['resolution'], cfg['resolution'])
        y = torch.empty(1, dtype=torch.long)
        draws = {name: value.to('meta') for name, value in model.draw(cfg, 0, 1, 'cpu').items()}
        with FlopCounterMode(display=False) as counter:
            model.METHODS[cfg['method']]['loss'](net, teacher, x, y, draws, cfg)
    return counter.get_total_flops() / 1e9


def stepper(cfg, dataset, batch=64):
    """A function that does one whole step in bfloat16 or float32, whichever train.py would pick."""
    torch.manual_seed(0)
    net = model.Net(cfg)
    with torch.no_grad():
        for parameter in net.parameters():  # gradients of zero are faster than real
            parameter += 0.02 * torch.randn_like(parameter) * parameter.requires_grad
    teacher = model.make_teacher(net, cfg)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg['lr'], weight_decay=0, fused=True)
    precision = train.sample.pick_precision('auto', torch.device('cpu'))
    if precision == torch.bfloat16:
        torch.backends.cuda.enable_flash_sdp(False)  # as train.py does
    raw, y = dataset.rows(data.batch_indices(0, 0, batch, dataset.trained))
    x = dataset.to_input(raw, None)

    def step():
        start = time.process_time()
        draws = model.draw(cfg, 0, batch)
        with torch.autocast('cpu', precision, enabled=precision != torch.float32):
            loss, _ = model.METHODS[cfg['method']]['loss'](net, teacher, x, y, draws, cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if teacher is not None:
            model.update_teacher(teacher, net, 0, cfg)
        return time.process_time() - start

    return step


def main():
    parser = argparse.ArgumentParser(description='Compare the five methods.', allow_abbrev=False)
    parser.add_argument('--steps', type=int, default=600, help='training steps, of 64 images each')
    parser.add_argument('--out', default='out-compare', help='folder for the runs')
    parser.add_argument('--json', help='file to write the numbers to')
    args = parser.parse_args()
    threads = torch.get_num_threads()
    dataset = data.open_data('shapes')
    configurations = {method: configuration(method, dataset) for method in model.METHODS}
    rows = {name: {} for name in [*configurations, 'dit again']}

    torch.set_num_threads(1)
    steppers = {name: stepper(configurations[name.split()[0]], dataset) for name in rows}
    times = {name: [] for name in rows}
    for k in range(ROUNDS):
        for name in list(rows) if k % 2 else reversed(rows):
            times[name].append(steppers[name]())
    for name, row in rows.items():
        cfg = configurations[name.split()[0]]
        net = model.Net(cfg)
        teacher = model.make_teacher(net, cfg)
        row['parameters'] = sum(p.numel() for p in net.parameters())
        row['parameters of the EMA network'] = (
            sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
        )
        row['visible tokens'] = model.visible_count(net.grid**2, cfg['mask_ratio'])
        row['forward GFLOPs an image'] = gigaflops(cfg)
        row['time a step'] = statistics.median(times[name][2:]) / statistics.median(times['dit'][2:])
    del steppers
    torch.set_num_threads(threads)

    for method in configurations:
        out = pathlib.Path(args.out) / method
        train.main(
            [
                *LAPTOP,
                '--method',
                method,
                '--data',
                'shapes',
                '--steps',
                str(args.steps),
                '--out',
                str(out),
                '--eval-every',
                str(args.steps),
                '--save-every',
                '500',
                '--preview',
                '100',
            ]
        )
        rows[method]['held-out loss'] = [line for line in train.read_log(out) if 'held_out' in line][-1][
            'held_out'
        ]

    sigmas = train.EVAL_SIGMAS
    print(
        '\n| method | parameters | + EMA | visible tokens | forward GF | time | '
        + ' | '.join(f'{s:.2g}' for s in sigmas)
        + ' |\n'
        + '|---' * (6 + len(sigmas))
        + '|'
    )
    for name, row in rows.items():
        print(
            f'| `{name}` | {row["parameters"]:,} | {row["parameters of the EMA network"]:,} | '
            f'{row["visible tokens"]} | '
            f'{row["forward GFLOPs an image"]:.3f} | {row["time a step"]:.2f} | '
            + ' | '.join(f'{value:.3f}' for value in row.get('held-out loss', []))
            + ' |'
        )
    if args.json:
        about = {
            'steps': args.steps,
            'flags': LAPTOP,
            'seed': 0,
            'sigma': sigmas,
            'torch': torch.__version__,
            'precision': str(train.sample.pick_precision('auto', torch.device('cpu'))),
        }
        pathlib.Path(args.json).write_text(json.dumps(about | {'methods': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
