"""A transformer block in the plainest way, for one image: matrices (tokens, width), loops over heads.

`part(name)` gives the (weight, bias) of a layer: of our modules in test_model.py, of published files in
test_published.py. Peebles & Xie 2022, Figure 3, "DiT block with adaLN-Zero".
"""

import math

import torch


def linear(layer, v):
    weight, bias = layer
    return v @ weight.T + bias


def norm(v):
    v = v - v.mean(-1, keepdim=True)
    return v / ((v ** 2).mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(v):
    return v / (1 + (-v).exp())


def gelu_tanh(v):
    return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3)))


def attention(qkv, heads, bias=None):
    """(n, 3 width) -> (n, width); `bias` (n, n, heads) is added to the scores."""
    n, width = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = qkv[:, :width], qkv[:, width:2 * width], qkv[:, 2 * width:]
    out = []
    for h in range(heads):
        mine = slice(h * width // heads, (h + 1) * width // heads)
        scores = q[:, mine] @ k[:, mine].T / math.sqrt(width // heads)
        if bias is not None:
            scores = scores + bias[:, :, h]
        weights = (scores - scores.max()).exp()
        out.append(weights / weights.sum(1, keepdim=True) @ v[:, mine])
    return torch.cat(out, 1)


def block(part, v, c, heads, bias=None):
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(part('modulation'), silu(c)).chunk(6)
    qkv = linear(part('qkv'), norm(v) * (1 + scale_a) + shift_a)
    v = v + gate_a * linear(part('proj'), attention(qkv, heads, bias))
    hidden = gelu_tanh(linear(part('fc1'), norm(v) * (1 + scale_m) + shift_m))
    return v + gate_m * linear(part('fc2'), hidden)


def modulated_linear(part, v, c):
    """The bridge and the final layer."""
    shift, scale = linear(part('modulation'), silu(c)).chunk(2)
    return linear(part('linear'), norm(v) * (1 + scale) + shift)


def waves(t):
    """256 sinusoids of a number: cosines first, periods 2 pi to 2 pi 10000."""
    angles = [t * 10000.0 ** (-k / 128) for k in range(128)]
    return torch.stack([a.cos() for a in angles] + [a.sin() for a in angles])


def offset_bias(table, slots, g):
    """MDT: the bias (n, n, heads) of the tokens at `slots` of a g x g grid, by offset of query from key."""
    row = lambda i, j: (i // g - j // g + g - 1) * (2 * g - 1) + i % g - j % g + g - 1
    return table[torch.tensor([[row(i, j) for j in slots] for i in slots])]
