"""Weights published for MaskDiT, DiT and MDT version 1: files of their names and shapes, filled with random
numbers, against the official networks in plain code that reads the published names."""

import argparse
import math

import numpy as np
import plain
import pytest
import torch
from conftest import Payload
from torch.nn import functional

import model

NULL = 1000                                   # the label that means dropped
SIZES = {'T': (6, 160, 5, 2, 64, 2), 'XL': (28, 1152, 16, 8, 512, 16)}        # with MaskDiT's decoder


def official(method, size='T', g=4, device='cpu'):
    """{name: tensor} of an official file, patch 2 and 4 channels, for latents of 2g x 2g."""
    depth, D, heads, narrow_depth, e, _ = SIZES[size]
    shapes = {'pos_embed': (1, g * g, D),
              'x_embedder.proj.weight': (D, 4, 2, 2), 'x_embedder.proj.bias': (D,),
              'y_embedder.embedding_table.weight': (D, 1000) if method == 'maskdit' else (1001, D)}

    def linear(name, out, into):
        shapes.update({f'{name}.weight': (out, into), f'{name}.bias': (out,)})

    def block(name, width):
        linear(f'{name}.attn.qkv', 3 * width, width)
        linear(f'{name}.attn.proj', width, width)
        linear(f'{name}.mlp.fc1', 4 * width, width)
        linear(f'{name}.mlp.fc2', width, 4 * width)
        linear(f'{name}.adaLN_modulation.1', 6 * width, D)
        if method == 'mdt':
            table = f'{name}.attn.rel_pos_bias.relative_position_bias_table'
            shapes.update({table: ((2 * g - 1) ** 2 + 3, heads)})             # 3 rows that nothing reaches

    linear('t_embedder.mlp.0', D, 256)
    linear('t_embedder.mlp.2', D, D)
    for i in range(depth):
        block(f'blocks.{i}', D)
    if method == 'maskdit':
        shapes |= {'decoder_pos_embed': (1, g * g, e), 'mask_token': (1, 1, e)}
        linear('decoder_layer.linear', e, D)
        linear('decoder_layer.adaLN_modulation.1', 2 * D, D)
        for i in range(narrow_depth):
            block(f'decoder_blocks.{i}', e)
    if method == 'mdt':
        shapes |= {'decoder_pos_embed': (1, g * g, D), 'mask_token': (1, 1, D)}
        block('sideblocks.0', D)
    width, outputs = (e, 16) if method == 'maskdit' else (D, 32)              # 32: eps and a variance
    linear('final_layer.linear', outputs, width)
    linear('final_layer.adaLN_modulation.1', 2 * width, D)

    rng = torch.Generator().manual_seed(0)
    weights = {name: torch.empty(shape, device='meta') if device == 'meta' else
               torch.randn(shape, generator=rng) * 0.5 / shape[-1] ** 0.5 for name, shape in shapes.items()}
    at = torch.arange(g * g)
    index = (at[:, None] // g - at // g + g - 1) * (2 * g - 1) + at[:, None] % g - at % g + g - 1
    return weights | {name.replace('bias_table', 'index'): index.clone() for name in shapes
                      if name.endswith('relative_position_bias_table')}


PUBLISHED = {'qkv': 'attn.qkv', 'proj': 'attn.proj', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2', 'linear': 'linear',
             'modulation': 'adaLN_modulation.1'}


def plain_official(w, method, x, t, y, masked=()):
    """The official network of size T for one image x (4, H, H): (4 or 8, H, H). `masked`: positions."""
    depth, D, heads, narrow_depth, e, narrow_heads = SIZES['T']
    N, g = w['pos_embed'].shape[1], x.shape[1] // 2
    part = lambda prefix: lambda layer: (w[f'{prefix}.{PUBLISHED[layer]}.weight'],
                                         w[f'{prefix}.{PUBLISHED[layer]}.bias'])

    def block(name, v, heads, at):
        bias = None
        if method == 'mdt':
            prefix = f'{name}.attn.rel_pos_bias.relative_position'
            bias = w[f'{prefix}_bias_table'][w[f'{prefix}_index'][at][:, at]]
        return plain.block(part(name), v, c, heads, bias)

    layer = lambda name, v: plain.linear((w[f'{name}.weight'], w[f'{name}.bias']), v)
    c = layer('t_embedder.mlp.2', plain.silu(layer('t_embedder.mlp.0', plain.waves(t))))
    table = w['y_embedder.embedding_table.weight']
    if method == 'maskdit':                                                   # Linear of a one-hot vector
        c = c + (table @ functional.one_hot(y, 1000).to(x.dtype) if y < NULL else 0)
    else:
        c = c + table[y]
    everything = list(range(N))
    seen = [s for s in everything if s not in masked]
    v = functional.conv2d(x[None], w['x_embedder.proj.weight'], w['x_embedder.proj.bias'], stride=2)
    v = (v[0].flatten(1).T + w['pos_embed'][0])[seen]
    own = depth - 2 if method == 'mdt' else depth
    for i in range(own):
        v = block(f'blocks.{i}', v, heads, seen)
    if method == 'maskdit':
        v = plain.modulated_linear(part('decoder_layer'), v, c)
    if method != 'dit':
        full = w['mask_token'][0].repeat(N, 1)
        full[seen] = v
        v = full + w['decoder_pos_embed'][0]
        if method == 'mdt' and masked:
            side = block('sideblocks.0', v, heads, everything)
            v = torch.stack([side[s] if s in masked else v[s] for s in everything])
    for i in range(own, depth):
        v = block(f'blocks.{i}', v, heads, everything)
    if method == 'maskdit':
        for i in range(narrow_depth):
            v = block(f'decoder_blocks.{i}', v, narrow_heads, everything)
    v = plain.modulated_linear(part('final_layer'), v, c)                     # (N, 2 * 2 * outputs)
    return torch.einsum('hwpqc->chpwq', v.reshape(g, g, 2, 2, -1)).reshape(-1, 2 * g, 2 * g)


def close(a, b):
    """Within 1e-5 of the largest number: float32, and the sums run in another order."""
    return a.shape == b.shape and b.abs().max() > 0.05 and (a - b).abs().max() < 1e-5 * b.abs().max()


# ------------------------------------------------------------------------------------------ names and shapes

@pytest.mark.parametrize('method, g, tensors, parameters', [
    ('maskdit', 16, 378, 730_541_200), ('maskdit', 32, 378, 731_819_152),
    ('dit', 16, 292, 675_129_632), ('dit', 32, 292, None), ('mdt', 16, 362, 699_778_144)])
def test_official_xl_names_and_shapes_are_recognised(method, g, tensors, parameters):
    """MaskDiT-XL/2, DiT-XL/2 and MDT-XL/2, for images of 256 and 512 pixels."""
    weights = official(method, 'XL', g, 'meta')
    assert len(weights) == tensors
    total = sum(math.prod(value.shape) for name, value in weights.items() if not name.endswith('index'))
    assert parameters in (total, None)
    state = model.translate(weights, 'x.pt')
    cfg = state['config']
    assert (cfg.method, cfg.model, cfg.resolution, cfg.classes) == (method, 'XL/2', 2 * g, 1000)
    assert cfg.diffusion == ('edm' if method == 'maskdit' else 'ddpm')
    with torch.device('meta'):
        wanted = model.Net(cfg).state_dict()
    assert {n: v.shape for n, v in state['ema'].items()} == {n: v.shape for n, v in wanted.items()}


WRAPPERS = {
    'the weights alone': lambda w: w,
    'a training file': lambda w: {'model': {k: v + 1 for k, v in w.items()}, 'ema': w, 'opt': {},
                                  'args': argparse.Namespace(lr=1e-4)},
    'DistributedDataParallel': lambda w: {'module.' + k: v for k, v in w.items()},
    'compiled': lambda w: {'ema': {'_orig_mod.model.' + k: v for k, v in w.items()}, 'args': None},
    'EDMPrecond': lambda w: {'model.' + k: v for k, v in w.items()},
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrappers_and_prefixes(wrapper, tmp_path):
    weights = official('dit')
    torch.save(WRAPPERS[wrapper](weights), tmp_path / 'x.pt')
    state = model.read_checkpoint(tmp_path / 'x.pt')
    assert torch.equal(state['ema']['encoder.t_embed.fc1.bias'], weights['t_embedder.mlp.0.bias'])
    raw = weights['t_embedder.mlp.0.bias'] + (wrapper == 'a training file')
    assert torch.equal(state['model']['encoder.t_embed.fc1.bias'], raw)
    assert model.ema_decay(state['step']) == 0.9999                           # tuning counts on from there


# ------------------------------------------------------------------------------------------- the same output

@pytest.fixture(scope='module', params=['maskdit', 'dit', 'mdt'])
def loaded(request, tmp_path_factory):
    """(method, official tensors, our network, its configuration)."""
    weights = official(request.param)
    path = tmp_path_factory.mktemp('official') / f'{request.param}.pt'
    torch.save(weights, path)
    return request.param, weights, *model.load_net(path)


def inputs():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([207, NULL])


def test_network_agrees(loaded):
    method, weights, net, cfg = loaded
    x, y = inputs()
    t = torch.tensor([0.3, -1.1] if method == 'maskdit' else [3.0, 712.0])
    for masked in ([],) if method == 'dit' else ([], [1, 2, 7, 8, 15]):
        visible = torch.tensor([[s for s in range(16) if s not in masked]] * 2) if masked else None
        F = model.unpatchify(net(model.patchify(x, 2), t, y, visible)[0], 2, 4 if method == 'maskdit' else 8)
        for b in range(2):
            assert close(F[b], plain_official(weights, method, x[b], t[b], y[b], masked))


def test_denoiser_agrees(loaded):
    """EDM Table 1: through its own preconditioning, or DDPM's eps-prediction wrapped as a denoiser."""
    method, weights, net, cfg = loaded
    x, y = inputs()
    sigma = torch.tensor([0.05, 30.0])
    D = model.denoise_images(net, x * sigma.view(-1, 1, 1, 1), sigma, y, cfg)
    for b, s in enumerate(sigma):
        xt = x[b] * s
        if method == 'maskdit':
            F = plain_official(weights, method, xt / (s ** 2 + 0.25).sqrt(), s.log() / 4, y[b])
            expected = 0.25 / (s ** 2 + 0.25) * xt + 0.5 * s / (s ** 2 + 0.25).sqrt() * F
        else:
            abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
            t = np.interp(math.log(s), np.log(np.sqrt((1 - abar) / abar)), np.arange(1000))
            F = plain_official(weights, method, xt / (s ** 2 + 1).sqrt(), torch.tensor(t).float(), y[b])
            expected = xt - s * F[:4]
        assert close(D[b], expected)


# ------------------------------------------------------------------------------------- files that fit nothing

@pytest.mark.parametrize('spoil, words', [
    (lambda w: [1, 2], 'it has tensors none'),
    (lambda w: {'weights': torch.zeros(2)}, 'is no checkpoint of train.py or finetune.py, nor of MaskDiT'),
    (lambda w: {k: v for k, v in w.items() if k != 'final_layer.linear.bias'},
     'does not fit a dit T/2.*Missing.*decoder.final.linear.bias'),
    (lambda w: w | {'blocks.0.attn.q_norm.weight': torch.zeros(64)}, 'does not fit.*Unexpected.*q_norm'),
    (lambda w: w | {'blocks.0.attn.qkv.bias': torch.zeros(7)}, 'does not fit.*mismatch for encoder.blocks.0'),
    (lambda w: {k: v for k, v in w.items() if not k.startswith('blocks.5')}, 'has 5 blocks of width 160'),
    (lambda w: w | {'en_inblocks.0.attn.qkv.weight': torch.zeros(1)}, 'MDT version 2'),
])
def test_files_that_fit_nothing(tmp_path, spoil, words):
    torch.save(spoil(official('dit')), tmp_path / 'x.pt')
    with pytest.raises(model.BadInput, match=words) as error:
        model.load_net(tmp_path / 'x.pt')
    assert '\n' not in str(error.value) and str(tmp_path / 'x.pt') in str(error.value)


def test_no_code_runs_from_a_namespace(tmp_path):
    """The one class that is let through, for files of DiT and MaskDiT, lets no other through."""
    args = argparse.Namespace(x=Payload(tmp_path / 'canary'))
    torch.save(official('dit') | {'args': args}, tmp_path / 'x.pt')
    with pytest.raises(model.BadInput, match='more than tensors'):
        model.read_checkpoint(tmp_path / 'x.pt')
    assert not (tmp_path / 'canary').exists()
