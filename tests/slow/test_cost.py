"""What a training step costs, in FLOPs: forward and backward of the network, forward of the teacher.

    python tests/slow/test_cost.py              prints the table of GFLOPs per image and their ratios

Counted by torch's FlopCounterMode on `meta` tensors, which have shapes and no content, and computed in closed
form. A multiplication and an addition are 2 FLOPs, as there; LayerNorm, softmax and the like are not counted.
"""

import pathlib
import sys

if __name__ == '__main__':
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import pytest
import torch
from conftest import config
from torch.utils.flop_counter import FlopCounterMode

import model

pytestmark = pytest.mark.slow                 # XL/2 takes a second per method

NETWORKS = {                                  # size, and C x H x H of an image or latent; patches of 2
    'T/2, 64 tokens': ('T', 3, 16),
    'S/2': ('S', 4, 32),
    'B/2': ('B', 4, 32),
    'XL/2': ('XL', 4, 32),
    'XL/2, 1024 tokens': ('XL', 4, 64),
}


def counted(method, size, C, H):
    """FLOPs of one training image."""
    cfg = config(method, model=f'{size}/2', channels=C, resolution=H, classes=1000, batch=1)
    r = {name: value.to('meta') for name, value in model.random_numbers(cfg, 0).items()}
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        net = model.Net(cfg)
        teacher = model.make_teacher(net, cfg)
        x0, y = torch.empty(1, cfg.N, 4 * C), torch.empty(1, dtype=torch.long)
        terms = model.METHODS[method].loss(net, teacher, x0, y, r, cfg)
        sum(weight * value for weight, value in terms.values()).backward()
    return counter.get_total_flops()


# Multiplications of the parts: n tokens of width w, conditioning of width c, P values per patch. Backward
# costs two forwards, and one where a layer's input needs no gradient: patches and sinusoids.

def blocks(depth, n, w, c):
    return depth * (12 * n * w * w + 2 * n * n * w + 6 * c * w)               # qkv, proj, MLP; scores; adaLN


def modulated(n, w, out, c):
    return n * w * out + 2 * c * w


def closed_form(method, size, C, H):
    """What `counted` finds, to the last FLOP."""
    depth, d, _ = model.SIZES[size]
    narrow, e, _ = model.TINY_DECODER if size == 'T' else model.DECODER
    N, P = (H // 2) ** 2, 4 * C
    K = int(N * (1 - model.METHODS[method].mask_ratio) + 1e-9)
    embed, sinusoids, stem = N * P * d, 256 * d, d * d                        # stem: its second layer
    seen = embed * K // N
    if method == 'dit':
        return 2 * (3 * (stem + blocks(depth, N, d, d) + modulated(N, d, P, d)) + 2 * (embed + sinusoids))
    if method == 'mdt':
        full = stem + blocks(depth, N, d, d) + modulated(N, d, P, d)
        masked = stem + blocks(depth - 2, K, d, d) + blocks(3, N, d, d) + modulated(N, d, P, d)
        recomputed = (depth - 2) * K * K * d                                  # scores: biases are not stored
        return 2 * (3 * (full + masked) + 2 * (embed + seen + 2 * sinusoids) + recomputed)
    bridged = K if method == 'maskdit' else N                                 # tokens through the bridge
    decoder = lambda n: modulated(n, d, e, d) + blocks(narrow, N, e, d) + modulated(N, e, P, d)
    tokens = K + (method == 'sddit')                                          # [CLS]
    gradient = stem + blocks(depth, tokens, d, d) + decoder(bridged)
    first, once = seen + sinusoids, 0
    if method == 'mcdit':
        first += embed
        once = 2 * (embed + decoder(N))                                       # two branches, no encoder
    if method == 'sddit':
        head = d * 2048 + 2048 * 2048 + 2048 * 256 + 256 * model.PROTOTYPES
        first += embed
        gradient += tokens * head
        once = embed + sinusoids + stem + blocks(depth, N + 1, d, d) + (N + 1) * head
    return 2 * (3 * gradient + 2 * first + once)


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('method', model.METHODS)
def test_the_counter_and_the_closed_form_agree(method, network):
    assert counted(method, *NETWORKS[network]) == closed_form(method, *NETWORKS[network])


@pytest.mark.parametrize('network, ratio', [
    ('S/2', 1.477), ('B/2', 1.262), ('XL/2', 1.074), ('XL/2, 1024 tokens', 1.085)])
def test_mcdit_beside_maskdit(network, ratio):
    mcdit, maskdit = (closed_form(method, *NETWORKS[network]) for method in ('mcdit', 'maskdit'))
    assert mcdit / maskdit == pytest.approx(ratio, abs=0.0006)


@pytest.mark.parametrize('method, other', [('mcdit', 'dit'), ('maskdit', 'dit'), ('mcdit', 'maskdit')])
def test_the_laptops_size_has_the_proportions_of_xl(method, other):
    ratios = [closed_form(method, *NETWORKS[name]) / closed_form(other, *NETWORKS[name])
              for name in ('T/2, 64 tokens', 'XL/2')]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.03)


def main():
    print(f'{"GFLOPs per training image":26}' + ''.join(f'{m:>10}' for m in model.METHODS)
          + f'{"mcdit:dit":>12}{"maskdit:dit":>13}{"mcdit:maskdit":>15}')
    for name, network in NETWORKS.items():
        cost = {method: counted(method, *network) for method in model.METHODS}
        print(f'{name:26}' + ''.join(f'{cost[m] / 1e9:10.3f}' for m in model.METHODS)
              + f'{cost["mcdit"] / cost["dit"]:12.4f}{cost["maskdit"] / cost["dit"]:13.4f}'
              + f'{cost["mcdit"] / cost["maskdit"]:15.4f}')


if __name__ == '__main__':
    main()
