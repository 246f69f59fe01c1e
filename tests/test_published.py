"""Published weights of MaskDiT, DiT and MDT: files of their names and shapes, filled with random numbers,
against a second implementation that knows nothing of model.py."""

import argparse
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional

import data
import finetune
import model
import sample
import train

SIZES = {'S': (12, 384, 6), 'XL': (28, 1152, 16)}
NULL = 1000


def official(method, size, g=16, seed=0):
    """Names and shapes of an official file, patch 2 and 4 channels: MaskDiT-XL/2 has 378 tensors, DiT-XL/2
    292, MDT-XL/2 362."""
    depth, D, heads = SIZES[size]

    def linear(name, m, n):
        return {f'{name}.weight': (m, n), f'{name}.bias': (m,)}

    def block(name, width):
        shapes = linear(f'{name}.attn.qkv', 3 * width, width) | linear(f'{name}.attn.proj', width, width)
        shapes |= linear(f'{name}.mlp.fc1', 4 * width, width) | linear(f'{name}.mlp.fc2', width, 4 * width)
        shapes |= linear(f'{name}.adaLN_modulation.1', 6 * width, D)
        if method == 'mdt':
            shapes |= {
                f'{name}.attn.rel_pos_bias.relative_position_bias_table': ((2 * g - 1) ** 2 + 3, heads),
                f'{name}.attn.rel_pos_bias.relative_position_index': (g * g, g * g),
            }
        return shapes

    shapes = {
        'pos_embed': (1, g * g, D),
        'x_embedder.proj.weight': (D, 4, 2, 2),
        'x_embedder.proj.bias': (D,),
    }
    shapes |= linear('t_embedder.mlp.0', D, 256) | linear('t_embedder.mlp.2', D, D)
    shapes |= {'y_embedder.embedding_table.weight': (D, 1000) if method == 'maskdit' else (1001, D)}
    for i in range(depth):
        shapes |= block(f'blocks.{i}', D)
    if method == 'maskdit':
        shapes |= {'decoder_pos_embed': (1, g * g, 512), 'mask_token': (1, 1, 512)}
        shapes |= linear('decoder_layer.linear', 512, D) | linear(
            'decoder_layer.adaLN_modulation.1', 2 * D, D
        )
        for i in range(8):
            block_shapes = block(f'decoder_blocks.{i}', 512)
            shapes |= block_shapes
    if method == 'mdt':
        shapes |= {'decoder_pos_embed': (1, g * g, D), 'mask_token': (1, 1, D)} | block('sideblocks.0', D)
    width, outputs = (512, 16) if method == 'maskdit' else (D, 32)
    shapes |= linear('final_layer.linear', outputs, width) | linear(
        'final_layer.adaLN_modulation.1', 2 * width, D
    )
    rng = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=rng) * (0.3 if len(shape) == 3 else 0.5 / shape[-1] ** 0.5)
        for name, shape in shapes.items()
    }
    at = torch.arange(g * g)
    index = (at[:, None] // g - at // g + g - 1) * (2 * g - 1) + at[:, None] % g - at % g + g - 1
    return {
        name: index.clone() if name.endswith('relative_position_index') else value
        for name, value in weights.items()
    }


def plain(w, method, size, x, t, y, mask=None):
    """The official programs' network in the plainest way, straight from a file's tensors. `mask` (N,) bool,
    True = masked, the same for all images."""
    depth, D, heads = SIZES[size]
    B, C, H, _ = x.shape

    def linear(name, v):
        return v @ w[f'{name}.weight'].T + w[f'{name}.bias']

    def norm(v):
        return functional.layer_norm(v, v.shape[-1:], eps=1e-6)

    def block(name, v, heads, keep):
        s = linear(f'{name}.adaLN_modulation.1', functional.silu(c)).chunk(6, 1)
        s = [part[:, None] for part in s]
        n, width = v.shape[1:]
        q, k, value = linear(f'{name}.attn.qkv', norm(v) * (1 + s[1]) + s[0]).chunk(3, 2)
        split = lambda u: u.reshape(B, n, heads, width // heads).transpose(1, 2)
        scores = split(q) @ split(k).transpose(2, 3) / math.sqrt(width // heads)
        if method == 'mdt':
            table = w[f'{name}.attn.rel_pos_bias.relative_position_bias_table']
            index = w[f'{name}.attn.rel_pos_bias.relative_position_index'].long()[keep][:, keep]
            scores = scores + table[index].permute(2, 0, 1)
        v = v + s[2] * linear(
            f'{name}.attn.proj', (scores.softmax(3) @ split(value)).transpose(1, 2).reshape(B, n, width)
        )
        hidden = functional.gelu(linear(f'{name}.mlp.fc1', norm(v) * (1 + s[4]) + s[3]), approximate='tanh')
        return v + s[5] * linear(f'{name}.mlp.fc2', hidden)

    def modulated(name, v):
        shift, scale = linear(f'{name}.adaLN_modulation.1', functional.silu(c)).chunk(2, 1)
        return linear(f'{name}.linear', norm(v) * (1 + scale[:, None]) + shift[:, None])

    angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear(
        't_embedder.mlp.2',
        functional.silu(linear('t_embedder.mlp.0', torch.cat([angle.cos(), angle.sin()], 1))),
    )
    table = w['y_embedder.embedding_table.weight']
    c = c + (functional.one_hot(y, NULL + 1)[:, :NULL].float() @ table.T if method == 'maskdit' else table[y])
    v = (
        functional.conv2d(x, w['x_embedder.proj.weight'], w['x_embedder.proj.bias'], stride=2)
        .flatten(2)
        .transpose(1, 2)
    )
    v = v + w['pos_embed']
    every = torch.arange(v.shape[1])
    keep = every if mask is None else every[~mask]
    v = v[:, keep]
    own = depth - 2 if method == 'mdt' else depth
    for i in range(own):
        v = block(f'blocks.{i}', v, heads, keep)
    if method == 'maskdit':
        v = modulated('decoder_layer', v)
    if method in ('maskdit', 'mdt'):
        if mask is not None:
            full = w['mask_token'].repeat(B, len(every), 1)
            full[:, keep] = v
            v = full
        v = v + w['decoder_pos_embed']
        if method == 'mdt' and mask is not None:
            v = torch.where(mask[None, :, None], block('sideblocks.0', v, heads, every), v)
    for i in range(own, depth):
        v = block(f'blocks.{i}', v, heads, every)
    if method == 'maskdit':
        for i in range(8):
            v = block(f'decoder_blocks.{i}', v, 16, every)
    v = modulated('final_layer', v)  # (B, N, p q C)
    g = H // 2
    return v.reshape(B, g, g, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, H)


def inputs(n=2):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 32, 32, generator=rng), torch.tensor([207, NULL])[:n]


def close(a, b):
    """Within 1e-5 of the largest number: the sums run in another order."""
    return b.abs().max() > 0.05 and (a - b).abs().max() < 1e-5 * b.abs().max()


# ------------------------------------------------------------------------------------------ names and shapes


@pytest.mark.parametrize(
    'method, count, g',
    [('maskdit', 378, 16), ('maskdit', 378, 32), ('dit', 292, 16), ('dit', 292, 32), ('mdt', 362, 16)],
)
def test_official_xl_names_and_shapes_are_recognised(method, count, g, monkeypatch):
    monkeypatch.setattr(torch, 'randn', lambda shape, generator: torch.empty(shape, device='meta'))
    weights = official(method, 'XL', g)
    assert len(weights) == count
    state = model.translate(weights)
    cfg = state['config']
    assert (cfg['method'], cfg['model'], cfg['resolution'], cfg['classes']) == (method, 'XL/2', 2 * g, 1000)
    assert cfg['diffusion'] == ('edm' if method == 'maskdit' else 'ddpm')
    with torch.device('meta'):
        wanted = model.Net(cfg).state_dict()
    assert {name: value.shape for name, value in state['ema'].items()} == {
        name: v.shape for name, v in wanted.items()
    }
    total = sum(math.prod(w.shape) for name, w in weights.items() if not name.endswith('index'))
    assert total == {
        ('maskdit', 16): 730_541_200,
        ('maskdit', 32): 731_819_152,
        ('dit', 16): 675_129_632,
        ('mdt', 16): 699_778_144,
    }.get((method, g), total)  # the known official counts


WRAPPERS = {
    'flat': lambda w: w,
    'ema': lambda w: {
        'model': {k: v + 1 for k, v in w.items()},
        'ema': w,
        'opt': {},
        'args': argparse.Namespace(lr=1e-4),
    },
    'module': lambda w: {'module.' + k: v for k, v in w.items()},
    'compiled': lambda w: {
        'ema': {'_orig_mod.model.' + k: v for k, v in w.items()},
        'args': argparse.Namespace(),
    },
    'precond': lambda w: {'model.' + k: v for k, v in w.items()},
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrappers_and_prefixes(wrapper, tmp_path):
    weights = official('dit', 'S')
    torch.save(WRAPPERS[wrapper](weights), tmp_path / 'x.pt')
    state = model.read_checkpoint(tmp_path / 'x.pt')
    assert torch.equal(state['ema']['t_embed.fc1.bias'], weights['t_embedder.mlp.0.bias'])
    if wrapper == 'ema':
        assert torch.equal(state['model']['t_embed.fc1.bias'], weights['t_embedder.mlp.0.bias'] + 1)


# ------------------------------------------------------------------------------------------- the same output


@pytest.fixture(scope='module', params=['maskdit', 'dit', 'mdt'])
def loaded(request, tmp_path_factory):
    """(method, official tensors, our network, its configuration, the file) at S/2."""
    weights = official(request.param, 'S')
    path = tmp_path_factory.mktemp('official') / f'{request.param}.pt'
    torch.save(weights, path)
    return request.param, weights, *model.load_net(path), path


def test_network_agrees(loaded):
    method, weights, net, cfg, _ = loaded
    x, y = inputs()
    t = torch.tensor([0.3, -1.1] if method == 'maskdit' else [3.0, 712.0])
    assert close(net(x, t, y)[0], plain(weights, method, 'S', x, t, y))
    if method != 'dit':
        mask = torch.rand(256, generator=torch.Generator().manual_seed(2)) < 0.3
        visible = (~mask).nonzero().T.expand(2, -1)
        assert close(net(x, t, y, visible)[0], plain(weights, method, 'S', x, t, y, mask))


def test_denoiser_agrees(loaded):
    """METHOD section 5: through EDM's preconditioning, or DDPM wrapped as a denoiser."""
    method, weights, net, cfg, _ = loaded
    x, y = inputs()
    sigma = torch.tensor([0.05, 30.0])
    s = sigma.view(-1, 1, 1, 1)
    D = model.denoise(net, x * s, sigma, y, cfg)
    if method == 'maskdit':
        F = plain(weights, method, 'S', x * s / (s**2 + 0.25).sqrt(), sigma.log() / 4, y)
        assert close(D, 0.25 / (s**2 + 0.25) * x * s + s * 0.5 / (s**2 + 0.25).sqrt() * F)
    else:
        abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        t = np.interp(np.log(sigma.numpy()), np.log(np.sqrt((1 - abar) / abar)), np.arange(1000))
        F = plain(weights, method, 'S', x * s / (s**2 + 1).sqrt(), torch.tensor(t), y)
        assert close(D, x * s - s * F[:, :4])


def test_sampling_from_official_files(loaded, tmp_path):
    *_, cfg, path = loaded
    flags = ['-n', '1', '--steps', '2', '--cfg', '2', '--latents']
    sample.main([str(path), *flags, '--out', str(tmp_path / 'x.png')])
    assert sample.noise_levels(5, *model.sigma_range(cfg))[0] == pytest.approx(
        80 if cfg['diffusion'] == 'edm' else 157.407, rel=1e-5
    )


def test_ddpm_schedule():
    sigmas = model.ddpm_sigmas()
    assert sigmas[999].item() == pytest.approx(157.407, abs=5e-4) and sigmas[0].item() == pytest.approx(
        0.0100005, abs=5e-8
    )
    assert torch.allclose(model.ddpm_time(sigmas), torch.arange(1000.0, dtype=torch.float64), atol=1e-9)
    middle = (sigmas[10].log() / 2 + sigmas[11].log() / 2).exp()
    assert model.ddpm_time(middle[None]).item() == pytest.approx(10.5)
    assert model.ddpm_time(torch.tensor([1e-9, 1e9])).tolist() == [0, 999]


# --------------------------------------------------------------------------------- tuning, and the way back


@pytest.fixture
def flowers(tmp_path):
    """A data folder of latents, 4 x 32 x 32, of 5 classes."""
    rng = np.random.default_rng(0)
    rows = ((rng.standard_normal((4, 32, 32)), k % 5) for k in range(10))
    data.save_folder(tmp_path / 'flowers', rows, 'float32', (4, 32, 32), {'kind': 'latents', 'classes': 5})
    return tmp_path / 'flowers'


@pytest.mark.slow
def test_tuning_official_weights_to_other_classes(loaded, flowers, tmp_path, capsys, monkeypatch):
    method, weights, net, cfg, path = loaded
    monkeypatch.setattr(train, 'EVAL_SIGMAS', [1.0])  # of the 8, whose evaluation is slow
    tuned = finetune.main(
        [
            str(path),
            '--data',
            str(flowers),
            '--out',
            str(tmp_path / 'out'),
            '--steps',
            '1',
            '--batch',
            '2',
            '--preview',
            '0',
            '--lr',
            '1e-12',
        ]
    )
    assert 'label table is new' in capsys.readouterr().out
    state = model.read_checkpoint(tuned)
    assert (
        state['ema']['y_embed.weight'].shape == (6, 384) and state['config']['diffusion'] == cfg['diffusion']
    )
    assert torch.allclose(state['model']['y_embed.weight'][5], net.y_embed.weight[NULL], atol=1e-6)
    other, cfg = model.load_net(tuned)  # without a label it is the same network
    x, _ = inputs()
    t = torch.tensor([1.0, 2.0])
    assert close(other(x, t, torch.tensor([5, 5]))[0], net(x, t, torch.tensor([NULL, NULL]))[0])


def test_tuning_official_weights_needs_data(loaded, tmp_path):
    with pytest.raises(model.BadInput, match='--data'):
        finetune.main([str(loaded[-1]), '--out', str(tmp_path / 'out')])


def test_our_maskdit_under_official_names(tmp_path):
    """Exported, it has MaskDiT's names and shapes; their network gives what ours gives, null label too"""
    cfg = train.configuration(train.parse(['--method', 'maskdit', '--model', 'S/2']), FakeData())
    net = model.Net(cfg)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.03 * torch.randn(p.shape, generator=rng)
    theirs = model.to_maskdit_names(net.state_dict(), cfg)
    wanted = official('maskdit', 'S')
    assert {name: value.shape for name, value in theirs.items()} == {
        'model.' + n: v.shape for n, v in wanted.items()
    }
    x, y = inputs()
    t = torch.tensor([0.3, -1.1])
    with torch.no_grad():
        expected = net(x, t, y)[0]
        bare = {name.removeprefix('model.'): value for name, value in theirs.items()}
        assert close(plain(bare, 'maskdit', 'S', x, t, y), expected)
        torch.save({'ema': theirs, 'args': argparse.Namespace()}, tmp_path / 'x.pt')
        assert close(model.load_net(tmp_path / 'x.pt')[0](x, t, y)[0], expected)


def test_a_tuned_maskdit_is_exported_with_a_mask_token_of_zeros():
    """Tuning has dropped the token, which MaskDiT's strict loading asks for and its sampling never uses."""
    cfg = train.configuration(train.parse(['--method', 'maskdit', '--model', 'S/2']), FakeData())
    theirs = model.to_maskdit_names(model.Net(cfg | {'stage': 'tune'}).state_dict(), cfg)
    wanted = official('maskdit', 'S')
    found = {name.removeprefix('model.'): value.shape for name, value in theirs.items()}
    assert found == {name: value.shape for name, value in wanted.items()}
    assert not theirs['model.mask_token'].any()


class FakeData:
    kind, count, resolution, channels, classes, class_names = 'latents', 10, 32, 4, 1000, []
    scale, vae, vae_sha256 = data.LATENT_SCALE, None, None


def test_export_under_official_names(tmp_path, flowers):
    train.main(
        [
            '--method',
            'maskdit',
            '--model',
            'S/2',
            '--data',
            str(flowers),
            '--out',
            str(tmp_path / 'out'),
            '--steps',
            '1',
            '--batch',
            '2',
            '--preview',
            '0',
            '--export',
            str(tmp_path / 'x.pt'),
            '--official-names',
        ]
    )
    state = model.read_checkpoint(tmp_path / 'x.pt')
    assert state['config']['method'] == 'maskdit' and state['config']['classes'] == 5
    with pytest.raises(model.BadInput, match='--official-names'):
        train.main(
            [
                '--method',
                'mcdit',
                '--model',
                'S/2',
                '--data',
                str(flowers),
                '--out',
                str(tmp_path / 'out2'),
                '--export',
                'x.pt',
                '--official-names',
            ]
        )


# ------------------------------------------------------------------------------------------------ refusals


def renamed(w):
    return {name.replace('blocks.3.mlp', 'blocks.3.ffn'): value for name, value in w.items()}


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda w: {'weights': torch.zeros(2)}, 'x_embedder.proj.weight'),
        (lambda w: [1, 2], 'found none'),
        (
            lambda w: {k: v for k, v in w.items() if k != 'final_layer.linear.bias'},
            'nearest match is dit S/2.*1 missing, such as final.linear.bias',
        ),
        (renamed, 'nearest match is dit S/2.*4 missing, such as blocks.3.fc1.weight.*4 too many'),
        (lambda w: w | {'blocks.0.attn.q_norm.weight': torch.zeros(64)}, '1 too many'),
        (
            lambda w: w | {'blocks.0.attn.qkv.bias': torch.zeros(7)},
            '1 of other shapes, such as blocks.0.qkv.bias',
        ),
        (
            lambda w: {k: v for k, v in w.items() if not k.startswith('blocks.11')},
            'it has 11 blocks of width 384',
        ),
        (lambda w: w | {'en_inblocks.0.x': torch.zeros(1)}, 'MDT version 2'),
    ],
)
def test_files_that_fit_nothing_are_refused(tmp_path, spoil, words):
    torch.save(spoil(official('dit', 'S')), tmp_path / 'x.pt')
    with pytest.raises(model.BadInput, match=words) as refusal:
        model.load_net(tmp_path / 'x.pt')
    assert '\n' not in str(refusal.value)


def test_no_code_runs_from_a_namespace(tmp_path):
    canary = tmp_path / 'canary'

    class Payload:
        def __reduce__(self):
            return open, (str(canary), 'w')

    torch.save(official('dit', 'S') | {'args': argparse.Namespace(x=Payload())}, tmp_path / 'x.pt')
    with pytest.raises(model.BadInput):
        model.read_checkpoint(tmp_path / 'x.pt')
    assert not canary.exists()
    assert 'weights_only=False' not in (ROOT / 'model.py').read_text()
