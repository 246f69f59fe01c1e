"""Do samples show the class they were asked for? A small network that was trained on real images answers.

    python sample.py out/0400000.pt -n 500 --balanced --npz out/samples.npz
    python tests/bench/classifier.py out/samples.npz                        # half a minute on two cores

The shape classifier is trained on freshly drawn shapes of the samples' size and tested on others; then it
prints, for each class, the share of the samples that it assigns to the class they were asked for.
`evidence.py` trains the same network on digits, and computes Frechet distances in its features, which are not
Inception's.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')                           # see train.py
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import data

FEATURES = 512
EPOCHS, BATCH = 4, 100


def network(channels, classes):
    """Images (n, C, H, W) of any size from 8 pixels -> logits (n, classes)."""
    def layer(n, m):
        return nn.Sequential(nn.Conv2d(n, m, 3, padding=1), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(layer(channels, 32), layer(32, 64), layer(64, 128), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(FEATURES, classes))


def train(images, labels, epochs=EPOCHS):
    """The network, trained on uint8 (n, C, H, W) and labels (n,). The same bits each time on one machine."""
    n, y = len(images), torch.as_tensor(labels).long()
    x, steps = to_input(images), epochs * n // BATCH
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = network(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        rows = data.batch_indices(0, step, BATCH, n)
        optimizer.zero_grad()
        functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def to_input(images):
    return torch.as_tensor(images).float() / 127.5 - 1


def predict(net, images):
    """Classes (n,) of images uint8 (n, C, H, W)."""
    return torch.cat([net(to_input(some)).argmax(1) for some in torch.as_tensor(images).split(500)])


def features(net, images):
    """What the last layer sees of images uint8 (n, C, H, W): float32 (n, 512)."""
    return torch.cat([net[:-1](to_input(some)) for some in torch.as_tensor(images).split(500)])


def accuracy(net, images, labels):
    return (predict(net, images) == torch.as_tensor(labels)).double().mean().item()


def draw(size, count, seed):
    """Freshly drawn shapes: uint8 (count, 3, size, size), labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(data.SHAPES), size=count)
    return data.draw_shapes(labels, size, rng), labels


def shape_classifier(size, count=12_000):
    """(network, its accuracy on shapes it has not seen)"""
    net = train(*draw(size, count, seed=1001))                                # the data sets have seed 0
    return net, accuracy(net, *draw(size, 2000, seed=1002))


def main(argv=None):
    parser = argparse.ArgumentParser(description='Classify samples of shapes.', allow_abbrev=False)
    parser.add_argument('npz', help='file of sample.py')
    parser.add_argument('--json', help='file to write the numbers to')
    args = parser.parse_args(argv)
    with data.reading(args.npz), np.load(args.npz) as file:
        images, labels = file['arr_0'].transpose(0, 3, 1, 2), torch.from_numpy(file['arr_1'])
    net, on_real = shape_classifier(images.shape[-1])
    right = (predict(net, images) == labels).double()
    result = {'samples': len(labels), 'accuracy_on_real_shapes': on_real, 'accuracy': right.mean().item(),
              'by_class': {name: right[labels == k].mean().item() for k, name in enumerate(data.SHAPES)
                           if (labels == k).any()}}
    print(f'shape classifier on real shapes it has not seen   {on_real:.1%}')
    print(f'{len(labels)} samples assigned to the class asked for   {result["accuracy"]:.1%}')
    for name, share in result['by_class'].items():
        print(f'    {name:10} {share:.0%}')
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    data.script('classifier.py', main)
