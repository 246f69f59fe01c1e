"""Do samples show the class they were asked for? A small classifier of real `shapes` says.

    python sample.py CKPT --n 500 --balanced --cfg 4 --npz out/judged.npz
    python tests/judge.py out/judged.npz

Trains the classifier on drawn shapes of the samples' size (half a minute on two cores), tests it on unseen
ones, and prints for each class how many samples it takes for what they were asked to be. With --json FILE the
numbers are written as well.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402  (the project is no package)

TRAIN, TEST, TRAIN_SEED, TEST_SEED = 12_000, 2_000, 1001, 1002  # not the seed of the data set


def real(size, count, seed):
    """Freshly drawn shapes: float32 (count, 3, size, size) about [-1, 1], and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(data.SHAPES), size=count)
    return torch.from_numpy(data.draw_shapes(labels, size, rng)) / 127.5 - 1, torch.from_numpy(labels)


def network():
    """The classifier, untrained: images (n, 3, H, W) -> logits."""

    def layer(n, m):
        return nn.Sequential(nn.Conv2d(n, m, 3, padding=1), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2))

    return nn.Sequential(
        layer(3, 32),
        layer(32, 64),
        layer(64, 128),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(512, len(data.SHAPES)),
    )


def train_judge(size):
    """(classifier, its accuracy on unseen real shapes)."""
    torch.manual_seed(0)
    judge = network()
    x, y = real(size, TRAIN, TRAIN_SEED)
    epochs, batch = 4, 100
    steps = epochs * TRAIN // batch
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        rows = data.batch_indices(0, step, batch, TRAIN)
        optimizer.zero_grad()
        functional.cross_entropy(judge(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    x, y = real(size, TEST, TEST_SEED)
    return judge.eval(), (verdicts(judge.eval(), x) == y).double().mean().item()


@torch.no_grad()
def verdicts(judge, x):
    return torch.cat([judge(part).argmax(1) for part in x.split(500)])


@torch.no_grad()
def features(judge, x):
    """What the last layer decides by: (n, 512), nothing of Inception."""
    return torch.cat([judge[:-1](part) for part in x.split(500)])


def main():
    parser = argparse.ArgumentParser(description='Judge samples of shapes.', allow_abbrev=False)
    parser.add_argument('npz', help='file of sample.py')
    parser.add_argument('--json', help='file to write the numbers to')
    args = parser.parse_args()
    with np.load(args.npz) as file:
        images, labels, settings = (
            file['arr_0'],
            torch.from_numpy(file['arr_1']),
            json.loads(str(file['settings'])),
        )
    judge, on_real = train_judge(images.shape[1])
    right = verdicts(judge, torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1) == labels
    result = {
        'samples': len(labels),
        'settings': settings,
        'judge on unseen real shapes': on_real,
        'accuracy': right.double().mean().item(),
        'by class': {name: right[labels == k].double().mean().item() for k, name in enumerate(data.SHAPES)},
    }
    print(f'judge on unseen real shapes   {on_real:.1%}')
    print(f'{len(labels)} samples taken for their class   {result["accuracy"]:.1%}')
    for name, share in result['by class'].items():
        print(f'    {name:10} {share:.0%}')
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
