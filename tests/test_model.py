"""model.py against the papers' equations, written a second time: loops over images, one vector per token.

The first part is that second version: the network, the EMA networks, the five losses. None of it calls
model.py; the networks it is given have random numbers in all their weights.
"""

import dataclasses
import math
import re

import plain
import pytest
import torch
from conftest import Payload, batch, build, config, numbers, randomise, same

import model

METHODS = list(model.METHODS)
LAMBDAS = {'clean': 1, 'noise': 0.1, 'con1': 0.1, 'con2': 0.05}              # MC-DiT eq. 12


def close(a, b, tolerance=1e-9):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * (1 + b.abs().max())


# ------------------------------------------------------------------------------ the network, a second time

def layers(module):
    """What plain.py asks for: the weight and bias of a layer by its name."""
    return lambda name: (getattr(module, name).weight, getattr(module, name).bias)


def plain_blocks(blocks, tokens, c, slots, g):
    for block in blocks:
        bias = None if block.bias is None else plain.offset_bias(block.bias, slots, g)
        tokens = plain.block(layers(block), tokens, c, block.heads, bias)
    return tokens


def plain_embed(embedding, patches, slots):
    """The tokens of the patches at `slots`: linear layer, plus each slot's own position."""
    return torch.stack([plain.linear((embedding.linear.weight, embedding.linear.bias), patches[s])
                        + embedding.pos[0, s] for s in slots])


def plain_condition(encoder, c_noise, y):
    hidden = plain.silu(plain.linear(layers(encoder.t_embed)('fc1'), plain.waves(c_noise)))
    c = plain.linear(layers(encoder.t_embed)('fc2'), hidden)
    return c if encoder.y_embed is None else c + encoder.y_embed.weight[y]


def plain_encode(encoder, patches, c, slots, g):
    """(tokens at `slots`, [CLS] or None)."""
    tokens = plain_embed(encoder.embed, patches, slots)
    if encoder.cls is None:
        return plain_blocks(encoder.blocks, tokens, c, slots, g), None
    tokens = plain_blocks(encoder.blocks, torch.cat([encoder.cls[0], tokens]), c, slots, g)
    return tokens[1:], tokens[:1]


def plain_decode(decoder, tokens, c, g, masked, gains=(1, 1)):
    """`tokens` {position: vector}, all of width d. The one way into the decoder: bridge, mask token where
    a position has no vector, positions, side block for the masked ones, blocks, final layer."""
    if decoder.bridge is not None:
        tokens = {s: plain.modulated_linear(layers(decoder.bridge), v, c) * gains[s in masked]
                  for s, v in tokens.items()}
    everything = range(g * g)
    x = torch.stack([tokens[s] if s in tokens else decoder.mask_token[0, 0] for s in everything])
    if decoder.pos is not None:
        x = x + decoder.pos[0]
    if decoder.side_block is not None and masked:
        made = plain_blocks([decoder.side_block], x, c, everything, g)
        x = torch.stack([made[s] if s in masked else x[s] for s in everything])
    x = plain_blocks(decoder.blocks, x, c, everything, g)
    return plain.modulated_linear(layers(decoder.final), x, c)


def plain_net(net, x, c_noise, y, visible=None, fill=None, gains=(1, 1)):
    """F (N, P), c (d,) and the encoder's tokens, [CLS] first, of one image: patches x (N, P), the positions
    `visible`, and `fill` (N, P), the patches that sddit and mcdit put at the others."""
    N, g = len(x), math.isqrt(len(x))
    c = plain_condition(net.encoder, c_noise, y)
    seen = list(range(N)) if visible is None else visible
    masked = [s for s in range(N) if s not in seen]
    encoded, cls = plain_encode(net.encoder, x, c, seen, g)
    tokens = dict(zip(seen, encoded))
    if fill is not None:
        tokens |= dict(zip(masked, plain_embed(net.encoder.embed, fill, masked))) if masked else {}
    F = plain_decode(net.decoder, tokens, c, g, masked, gains)
    return F, c, encoded if cls is None else torch.cat([cls, encoded])


def plain_branch(teacher, x, c, c_noise, y, whole):
    """F_ema (N, P) of MC-DiT's EMA network: the patch embedding with positions, then the decoder, with the
    student's c; no encoder. `whole` (Table 12): an entire network, with its own c."""
    if whole:
        return plain_net(teacher, x, c_noise, y)[0]
    tokens = plain_embed(teacher.encoder, x, range(len(x)))
    return plain_decode(teacher.decoder, dict(enumerate(tokens)), c, math.isqrt(len(x)), [])


def plain_head(head, tokens):
    """SD-DiT: LayerNorm, Linear-GELU-Linear-GELU-Linear, L2-normalise, cosines with the prototypes."""
    gelu = lambda v: 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))
    v = gelu(plain.linear(layers(head)('fc1'), plain.norm(tokens)))
    v = plain.linear(layers(head)('fc3'), gelu(plain.linear(layers(head)('fc2'), v)))
    unit = lambda w: w / (w ** 2).sum(-1, keepdim=True).sqrt()
    return unit(v) @ unit(head.prototypes).T


# ---------------------------------------------------------------------------- the five losses, a second time

def plain_loss(cfg, net, teacher, x0_batch, y, r):
    """{name: value} as METHOD writes the losses: one image after the other, one token after the other."""
    terms, sd, N = {}, cfg.sigma_data, cfg.N

    def add(name, value):
        terms[name] = terms.get(name, 0) + value / len(x0_batch)

    for b, x0 in enumerate(x0_batch):                                         # x0 (N, P)
        s = r['sigma'][b]
        c_skip, c_in = sd ** 2 / (s ** 2 + sd ** 2), 1 / (s ** 2 + sd ** 2).sqrt()
        c_out, c_noise = s * sd / (s ** 2 + sd ** 2).sqrt(), s.log() / 4
        w = 1 / c_out ** 2
        label = cfg.classes if r['drop'][b] else y[b]
        xt = x0 + s * r['noise'][b]
        visible = r['visible'][b].tolist()
        masked = [k for k in range(N) if k not in visible]
        mean = lambda e, tokens: sum(e[k].mean() for k in tokens) / len(tokens)

        if cfg.method == 'dit':
            F, *_ = plain_net(net, c_in * xt, c_noise, label)
            add('denoise', (w * (c_skip * xt + c_out * F - x0) ** 2).mean())

        if cfg.method == 'maskdit':
            F, *_ = plain_net(net, c_in * xt, c_noise, label, visible)
            D = c_skip * xt + c_out * F
            add('denoise', mean(w * (D - x0) ** 2, visible))
            target = torch.stack([(patch - patch.mean()) / (patch.var(correction=1) + 1e-6).sqrt()
                                  for patch in xt])
            add('reconstruct', mean((D - target) ** 2, masked))

        if cfg.method == 'mdt':
            for name, again, seen in (('full', '', None), ('masked', '2', visible)):
                xt = x0 + s * r['noise' + again][b]
                label = cfg.classes if r['drop' + again][b] else y[b]
                F, *_ = plain_net(net, c_in * xt, c_noise, label, seen)
                add(name, (w * (c_skip * xt + c_out * F - x0) ** 2).mean())

        if cfg.method == 'sddit':
            F, _, tokens = plain_net(net, c_in * xt, c_noise, label, visible, c_in * xt)
            add('generate', (w * (c_skip * xt + c_out * F - x0) ** 2).mean())
            student = plain_head(net.head, tokens)                            # (1 + K, prototypes)
            clear = (x0 + 0.002 * r['noise2'][b]) / math.sqrt(0.002 ** 2 + sd ** 2)
            c_noise = torch.tensor(math.log(0.002) / 4, dtype=torch.float64)
            c = plain_condition(teacher.encoder, c_noise, label)
            tokens, cls = plain_encode(teacher.encoder, clear, c, range(N), cfg.grid)
            says = plain_head(teacher.head, torch.cat([cls, tokens]))         # (1 + N, prototypes)
            temperature = 0.04 + 0.03 * min(1, r['progress'][b].item() / 0.1)
            pairs = [(0, 0, 0)] + [(1 + i, 1 + k, 1) for i, k in enumerate(visible)]
            for mine, its, kind in pairs:                                     # kind 0: [CLS], 1: a patch
                P = ((says[its] - teacher.centers[kind]) / temperature).softmax(0)
                cross, entropy = -(P * (student[mine] / 0.1).log_softmax(0)).sum(), -(P * P.log()).sum()
                share = 1 / len(visible) if kind else 1
                add('discriminate', share * cross)
                if kind:
                    add('teacher_entropy', share * entropy)
                    add('kl', share * (cross - entropy))

        if cfg.method == 'mcdit':
            x_in = torch.stack([xt[k] if k in visible else x0[k] for k in range(N)])
            gains = {'both': (1, 1), 'noisy': (1, 0), 'clean': (0, 1)}[cfg.tokens]
            F, c, _ = plain_net(net, c_in * xt, c_noise, label, visible, x0 / sd, gains)
            D = c_skip * x_in + c_out * F
            add('clean', mean(w * (D - x0) ** 2, visible))                    # eq. 8
            add('all_clean', (w * (D - x0) ** 2).mean())
            add('noise', mean((D - xt) ** 2, masked))                         # eq. 9
            add('noise_above_floor', mean((D - xt) ** 2, masked) - mean((xt - x0) ** 2, masked))
            for name, seen, skip in (('con1', c_in * xt, xt), ('con2', x0 / sd, x0)):        # eq. 10, eq. 11
                if teacher is not None:
                    F_ema = plain_branch(teacher, seen, c, c_noise, label, cfg.teacher_encoder)
                    add(name, mean(w * (D - (c_skip * skip + c_out * F_ema)) ** 2, visible))
                    if name == 'con1':                                        # weighted, it is plain in F
                        assert close(mean(w * (D - c_skip * skip - c_out * F_ema) ** 2, visible),
                                     mean((F - F_ema) ** 2, visible))
    return terms


LOSSES = [                                    # method, changes of the configuration, weights of the terms
    ('mcdit', {}, LAMBDAS),
    ('mcdit', {'mask_ratio': 0.25, 'sigma_data': 0.8}, LAMBDAS),
    ('mcdit', {'lambda_noise': 0.0}, LAMBDAS | {'noise': None}),
    ('mcdit', {'lambda_con1': 0.0}, LAMBDAS | {'con1': 0}),
    ('mcdit', {'lambda_con2': 0.0}, LAMBDAS | {'con2': 0}),
    ('mcdit', {'lambda_con1': 0.0, 'lambda_con2': 0.0}, LAMBDAS | {'con1': None, 'con2': None}),
    ('mcdit', {'lambda_noise': 0.3, 'lambda_con1': 0.7, 'lambda_con2': 0.9},
     {'clean': 1, 'noise': 0.3, 'con1': 0.7, 'con2': 0.9}),
    ('mcdit', {'all_clean': True}, LAMBDAS | {'clean': 0, 'all_clean': 1, 'noise': None}),
    ('mcdit', {'tokens': 'noisy'}, LAMBDAS),
    ('mcdit', {'tokens': 'clean'}, LAMBDAS),
    ('mcdit', {'teacher_encoder': True}, LAMBDAS),
    ('dit', {}, {'denoise': 1}),
    ('dit', {'classes': 0}, {'denoise': 1}),
    ('maskdit', {}, {'denoise': 1, 'reconstruct': 0.1}),
    ('mdt', {}, {'full': 1, 'masked': 1}),
    ('sddit', {'steps': 100}, {'generate': 1, 'discriminate': 1, 'teacher_entropy': 0, 'kl': 0}),
]


@pytest.mark.parametrize('method, changes, weights', LOSSES, ids=['-'.join((m, *c)) for m, c, _ in LOSSES])
@torch.no_grad()
def test_loss(method, changes, weights):
    """Every term and its weight. sddit is at step 3 of 100, where the teacher's temperature still rises, and
    one image far beyond."""
    cfg = config(method, batch=3, **changes)
    net, teacher = build(cfg)
    if method == 'sddit':
        teacher.centers.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    x0, y = batch(cfg)
    r = numbers(cfg)
    r['progress'][2] = 0.7
    terms = model.loss_of_step(cfg, 3)(net, teacher, x0, y, r, cfg)
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    if weights.get('noise'):
        weights['noise_above_floor'] = 0
    assert {name: weight for name, (weight, _) in terms.items()} == weights
    expected = plain_loss(cfg, net, teacher, x0, y, r)
    for name, (_, value) in terms.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-9), name


# ------------------------------------------------------------------------------------- the network's promises

def test_the_numbers_of_the_papers():
    """Depth, width, heads; masked share and learning rate."""
    assert model.SIZES == {'T': (6, 160, 5), 'S': (12, 384, 6), 'B': (12, 768, 12), 'L': (24, 1024, 16),
                           'XL': (28, 1152, 16)}
    assert model.DECODER == (8, 512, 16) and model.TINY_DECODER == (2, 64, 2) and model.OWN_DECODER == 2
    assert {name: (row.mask_ratio, row.lr) for name, row in list(model.METHODS.items())[:5]} == {
        'dit': (0, 1e-4), 'maskdit': (0.5, 1e-4), 'mdt': (0.3, 3e-4), 'sddit': (0.2, 1e-4),
        'mcdit': (0.5, 1e-4)}


@pytest.mark.parametrize('method', METHODS)
@torch.no_grad()
def test_inference_is_the_plain_network(method):
    """Nothing masked, nothing filled; images in, images out, through EDM's preconditioning."""
    cfg = config(method, batch=2)
    net, _ = build(cfg)
    x, y = batch(cfg)
    images, sigma = model.unpatchify(x, 2, 3), torch.tensor([0.3, 20.0], dtype=torch.float64)
    D = model.patchify(model.denoise_images(net, images, sigma, y, cfg), 2)
    for b, s in enumerate(sigma):
        F, *_ = plain_net(net, x[b] / (s ** 2 + 0.25).sqrt(), s.log() / 4, y[b])
        assert close(D[b], 0.25 / (s ** 2 + 0.25) * x[b] + 0.5 * s / (s ** 2 + 0.25).sqrt() * F)


@torch.no_grad()
def test_denoising_images_with_a_clean_context():
    """What inpainting and the mutual information call: `denoise`, with images for patches."""
    cfg = config(batch=2)
    net, _ = build(cfg)
    x, y = batch(cfg)
    clean, r = x.flip(0), numbers(cfg)
    image = lambda patches: model.unpatchify(patches, 2, 3)
    D = model.denoise_images(net, image(x), r['sigma'], y, cfg, r['visible'], image(clean))
    assert torch.equal(D, image(model.denoise(net, x, r['sigma'], y, cfg, r['visible'], clean)[0]))


@pytest.mark.parametrize('method', METHODS[1:])
@torch.no_grad()
def test_all_tokens_visible_in_any_order_is_the_unmasked_path(method):
    cfg = config(method, mask_ratio=0.0)
    net, _ = build(cfg)
    x, y = batch(cfg)
    r = numbers(cfg)
    whole, masked = (net(x, r['sigma'], y, visible, x)[0] for visible in (None, r['visible']))
    assert whole.abs().max() > 0.1 and close(whole, masked, 1e-12)


@pytest.mark.parametrize('method, sees', [('maskdit', 0), ('mdt', 0), ('sddit', 1), ('mcdit', 1)])
@torch.no_grad()
def test_masked_patches_matter_only_where_they_fill(method, sees):
    """The encoder never sees them; the decoder of sddit and mcdit does."""
    cfg = config(method, mask_ratio=0.5)
    net, _ = build(cfg)
    x, y = batch(cfg)
    r = numbers(cfg)
    other = model.put(x, r['masked'], torch.randn(8, 8, 12, dtype=torch.float64))
    c = net.encoder.condition(r['sigma'], y)
    assert torch.equal(net.encoder(x, c, r['visible']), net.encoder(other, c, r['visible']))
    F = [model.take(net(v, r['sigma'], y, r['visible'], v)[0], r['visible']) for v in (x, other)]
    assert ((F[0] - F[1]).abs().max() > 1e-4) == sees


def test_only_what_the_method_uses_is_built():
    parts = lambda cfg: {'.'.join(name.split('.')[:2]) for name, _ in model.Net(cfg).named_parameters()}
    names = {method: parts(config(method)) for method in METHODS}
    narrow = {'decoder.bridge', 'decoder.pos', 'decoder.blocks'}
    assert names['dit'] == {'encoder.t_embed', 'encoder.y_embed', 'encoder.embed', 'encoder.blocks',
                            'decoder.final'}
    assert names['maskdit'] - names['dit'] == narrow | {'decoder.mask_token'}
    assert names['mdt'] - names['dit'] == {'decoder.pos', 'decoder.blocks', 'decoder.mask_token',
                                           'decoder.side_block'}
    assert names['mcdit'] - names['dit'] == narrow
    assert names['sddit'] - names['mcdit'] == {'encoder.cls', 'head.fc1', 'head.fc2', 'head.fc3',
                                               'head.prototypes'}
    assert names['dit'] - parts(config('dit', classes=0)) == {'encoder.y_embed'}


@pytest.mark.parametrize('method', METHODS)
def test_tuning_keeps_every_parameter_but_those_of_masked_positions(method):
    """METHOD: the dit loss with nothing masked; every remaining parameter gets a gradient."""
    cfg = config(method, stage='tune', mask_ratio=0.0)
    before, (net, teacher) = model.Net(config(method)).state_dict(), build(cfg)
    assert teacher is None
    assert net.state_dict().keys() == {n for n in before if not n.startswith(model.TRAINING_ONLY)}
    loss = model.loss_of_step(cfg, 3)
    assert loss is model.dit_loss
    loss(net, None, *batch(cfg), numbers(cfg), cfg)['denoise'][1].backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.requires_grad)


def official(method, size, **changes):
    return config(method, model=f'{size}/2', resolution=32, channels=4, classes=1000, **changes)


def count(module):
    return sum(p.numel() for p in module.parameters())


def count_tables(module):
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith('pos'))


@pytest.mark.parametrize('method, size, changes, parameters', [
    ('dit', 'S', {}, 32_957_200),
    ('dit', 'B', {}, 130_500_112),
    ('dit', 'L', {}, 458_086_416),
    ('dit', 'XL', {}, 675_111_184),
    ('dit', 'S', {'diffusion': 'ddpm'}, 32_963_360),                          # as published: a variance too
    ('dit', 'XL', {'diffusion': 'ddpm'}, 675_129_632),
    ('maskdit', 'XL', {}, 730_541_200 + 1_152),                               # and a learned null label
    ('mcdit', 'XL', {}, 730_541_840),
    ('mdt', 'S', {}, 35_790_814),
    ('mdt', 'B', {}, 141_475_756),
    ('mdt', 'XL', {}, 699_758_304),
])
def test_parameter_counts(method, size, changes, parameters):
    with torch.device('meta'):
        assert count(model.Net(official(method, size, **changes))) == parameters


def test_parameter_counts_of_the_ema_networks():
    """MC-DiT: the paper's 786 M have room for one decoder, not two; the fixed position tables, copied with
    it, are not counted. SD-DiT's head is DINO's without the 8192 gains, which are fixed at 1."""
    with torch.device('meta'):
        net, cfg = model.Net(official('mcdit', 'XL')), official('mcdit', 'XL')
        teacher = model.make_teacher(net, cfg)
        assert count(teacher) - count_tables(teacher) == 57_994_128
        assert count(net) + count(teacher) - count_tables(teacher) == 788_535_968
        assert [count(model.Head(d)) + 8192 for d in (384, 768, 1152)] == [7_614_720, 8_401_152, 9_187_584]


# ------------------------------------------------------------------------------------- patches and positions

def test_a_patch_is_read_by_row_column_channel():
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    patches = model.patchify(x, 2)
    for b in range(2):
        for row in range(2):
            for column in range(2):
                values = [x[b, c, 2 * row + i, 2 * column + j]
                          for i in range(2) for j in range(2) for c in range(3)]
                assert patches[b, 2 * row + column].tolist() == values
    assert torch.equal(model.unpatchify(patches, 2, 3), x)


def test_position_table():
    """The column's half first, then the row's; sines before cosines."""
    table = model.sincos_positions(4, 8)[0]
    half = lambda v: [f(v / 10000 ** (k / 2)) for f in (math.sin, math.cos) for k in range(2)]
    for row in range(4):
        for column in range(4):
            assert table[4 * row + column].tolist() == pytest.approx(half(column) + half(row), abs=1e-6)


def test_relative_positions():
    """MDT: the row of the bias table for query minus key; a pair and its reverse add up to the last row."""
    small, index = model.relative_positions(2, 'cpu'), model.relative_positions(16, 'cpu')
    assert small.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert (index + index.T == 960).all() and (index.diagonal() == 480).all()
    assert index[0, 1] == 479 and index[0, 16] == 449 and index[0, 255] == 0 and len(index.unique()) == 961


# ---------------------------------------------------------------------------------- EDM, and DDPM's schedule

def test_preconditioning():
    """EDM Table 1: numbers at sigma = 0.5 and 80; lambda c_out^2 = 1."""
    sigma = torch.tensor([0.5, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = model.precondition(sigma, 0.5)
    assert [c.shape for c in (c_skip, c_out, c_in, c_noise)] == [(2, 1, 1)] * 3 + [(2,)]
    assert [c.flatten()[0].item() for c in (c_skip, c_out, c_in, c_noise)] == pytest.approx(
        [0.5, 0.35355339, 1.41421356, -0.17328680])
    assert c_out[1].item() == pytest.approx(0.49999023)
    assert model.loss_weight(sigma, 0.5)[0].item() == pytest.approx(8)
    assert close(model.loss_weight(sigma, 0.5) * c_out ** 2, torch.ones(2, 1, 1).double())


@pytest.mark.parametrize('sd', [0.5, 1.0])
def test_preconditioning_keeps_unit_variance(sd):
    """EDM's reasons: the network's input and its target have variance 1 for data of variance sd^2."""
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    c_skip, c_out, c_in, _ = (c.flatten() for c in model.precondition(sigma, sd))
    assert close(c_in ** 2 * (sd ** 2 + sigma ** 2), torch.ones(9).double())
    target = ((1 - c_skip) ** 2 * sd ** 2 + c_skip ** 2 * sigma ** 2) / c_out ** 2
    assert close(target, torch.ones(9).double())


def test_ddpm_schedule():
    """Linear betas 1e-4 to 0.02; t is linear in ln sigma between the steps and ends at 0 and 999."""
    sigmas = model.ddpm_sigmas()
    assert sigmas[999].item() == pytest.approx(157.407, abs=5e-4)
    assert sigmas[0].item() == pytest.approx(0.0100005, abs=5e-8)
    assert close(model.ddpm_time(sigmas), torch.arange(1000.0).double())
    assert model.ddpm_time((sigmas[10] * sigmas[11]).sqrt()[None]).item() == pytest.approx(10.5)
    assert model.ddpm_time(torch.tensor([1e-9, 1e9])).tolist() == [0, 999]
    assert model.sigma_range(config()) == (0.002, 80)
    assert model.sigma_range(config(diffusion='ddpm')) == (sigmas[0], sigmas[999])


# ---------------------------------------------------------------------------------------- initialisation

XAVIER = None
INITIAL = [                                   # the end of a name, its standard deviation; the first that fits
    (r'modulation\.(weight|bias)', 0), (r'decoder\.final\.linear\.(weight|bias)', 0),
    (r'decoder\.bridge\.linear\.(weight|bias)', 0),
    (r't_embed\.fc[12]\.weight', 0.02), (r'y_embed\.weight', 0.02), (r'mask_token', 0.02),
    (r'encoder\.cls', 0.02), (r'prototypes', 0.02), (r'(blocks\.\d+|side_block)\.bias', 0.02),
    (r'(qkv|proj|fc1|fc2|fc3|linear)\.weight', XAVIER), (r'\.bias', 0),
]


@pytest.mark.parametrize('method, bridge', [*((method, 'zero') for method in METHODS), ('mcdit', 'xavier')])
def test_initialisation(method, bridge):
    """DiT's and MaskDiT's: the mean and standard deviation of every tensor, within 4.5 standard errors."""
    torch.manual_seed(0)
    for name, p in model.Net(config(method, bridge=bridge, classes=100)).named_parameters():
        if name.endswith('pos'):
            continue
        std = next(std for ending, std in INITIAL if re.search(ending + '$', name))
        if name == 'decoder.bridge.linear.weight' and bridge == 'xavier':
            std = XAVIER
        if std is XAVIER:
            out, into = p.shape
            assert p.abs().max() <= math.sqrt(6 / (into + out)), name         # uniform
            std = math.sqrt(2 / (into + out))
        assert abs(p.std(correction=0).item() - std) <= 4.5 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean().item()) <= 4.5 * std / math.sqrt(p.numel()), name


@pytest.mark.parametrize('method', METHODS)
def test_at_first_D_is_the_skip_and_the_denoising_losses_reach_the_last_layer_alone(method):
    """F = 0 exactly, whatever the input; as in MaskDiT's program, the zero weights in front wait a step."""
    cfg = config(method)
    net = model.Net(cfg)
    x0, y = batch(cfg, torch.float32)
    r = numbers(cfg, dtype=torch.float32)
    xt, y = model.corrupt(x0, y, r, cfg)
    c_skip = model.precondition(r['sigma'], 0.5)[0]
    D, *_ = model.denoise(net, xt, r['sigma'], y, cfg)
    assert torch.equal(D, c_skip * xt)
    ((D - x0) ** 2).mean().backward()
    touched = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {'decoder.final.linear.weight', 'decoder.final.linear.bias'}
    if method == 'mcdit':                                                     # the skip is of the mixed image
        D, *_ = model.denoise(net, xt, r['sigma'], y, cfg, r['visible'], clean=x0)
        at = torch.zeros(8, 16, 1).scatter(1, r['visible'][..., None], 1.0)   # 1: visible
        assert close(D, c_skip * (xt * at + x0 * (1 - at)), 1e-6)


# ------------------------------------------------------------------------------- the random numbers of a step

@pytest.mark.parametrize('resolution, ratio, K', [
    (32, 0.3, 179), (32, 0.2, 204), (32, 0.5, 128), (64, 0.3, 716), (20, 0.9, 10), (8, 0.9, 1)])
def test_visible_count(resolution, ratio, K):
    """20: a hundred tokens, and int(100 * (1 - 0.9)) is 9."""
    assert config(resolution=resolution, mask_ratio=ratio).K == K


def test_every_token_is_visible_or_masked_and_each_image_has_its_own_mask():
    cfg = config(mask_ratio=0.3, batch=64)
    r = model.random_numbers(cfg, 7)
    assert r['visible'].shape == (64, 11) and r['masked'].shape == (64, 5)
    everything = torch.cat([r['visible'], r['masked']], 1)
    assert torch.equal(everything.sort(1).values, torch.arange(16).expand(64, -1))
    assert len({tuple(sorted(row)) for row in r['visible'].tolist()}) > 60
    often = torch.bincount(r['visible'].flatten(), minlength=16) / 64         # every position alike
    assert (often - 11 / 16).abs().max() < 0.25


@pytest.mark.parametrize('method', METHODS)
def test_random_numbers_are_functions_of_seed_step_and_purpose(method, monkeypatch):
    cfg, keys, generator = config(method, kind='moments', batch=16, mask_ratio=0.5), [], model.generator
    monkeypatch.setattr(model, 'generator', lambda *key: keys.append(key) or generator(*key))
    r = model.random_numbers(cfg, 5)
    assert len(keys) == len(set(keys)) and {key[:3] for key in keys} == {('cpu', 0, 5)}    # a purpose each
    again = model.random_numbers(cfg, 5)
    second = {'mdt': {'noise2', 'drop2'}, 'sddit': {'noise2'}}.get(method, set())
    assert r.keys() == {'sigma', 'visible', 'masked', 'drop', 'noise', 'latent', 'progress'} | second
    assert all(len(value) == 16 for value in r.values()) and same(r, again)
    many = [name for name in r if name not in ('drop', 'drop2', 'progress')]
    for other in (model.random_numbers(cfg, 6), model.random_numbers(dataclasses.replace(cfg, seed=1), 5)):
        assert not any(torch.equal(r[name], other[name]) for name in many)
    assert not any(torch.equal(r['noise'], r[name]) for name in second & {'noise2'})
    assert not torch.equal(r['noise'], model.patchify(r['latent'], 2))
    fewer = model.random_numbers(dataclasses.replace(cfg, mask_ratio=0.25), 5)
    assert all(torch.equal(r[name], fewer[name]) for name in r.keys() - {'visible', 'masked'})
    assert torch.equal(r['progress'], torch.full((16,), 0.5))                 # step 5 of 10
    assert 'latent' not in model.random_numbers(config(method), 5)


def test_random_numbers_have_their_distributions():
    """ln sigma ~ N(-1.2, 1.2^2), so E[sigma^2] = exp(0.48) = 1.616; a tenth of the labels dropped."""
    r = model.random_numbers(config('mdt', resolution=2, batch=100_000, mask_ratio=0.0), 0)
    log = r['sigma'].log()
    assert abs(log.mean() + 1.2) < 0.02 and abs(log.std() - 1.2) < 0.02
    for name in ('drop', 'drop2'):
        assert abs(r[name].float().mean() - 0.1) < 0.005
    assert abs((r['drop'] & r['drop2']).float().mean() - 0.01) < 0.002        # independent
    for name in ('noise', 'noise2'):
        assert abs(r[name].std() - 1) < 0.01 and abs(r[name].mean()) < 0.01
    assert abs((r['noise'] * r['noise2']).mean()) < 0.01


# -------------------------------------------------------------------------------------------- unmasked steps

@pytest.mark.parametrize('share', [0.0, 0.25, 1.0])
def test_the_share_of_unmasked_steps(share):
    """A function of (seed, step); 2,000 steps are within 4 standard errors of the share."""
    plan = lambda **changes: [model.loss_of_step(config(unmasked=share, **changes), step) is model.dit_loss
                              for step in range(2000)]
    chosen = plan()
    assert abs(sum(chosen) / 2000 - share) <= 4 * math.sqrt(share * (1 - share) / 2000)
    assert chosen == plan(lr=1.0) and (chosen != plan(seed=1) or share in (0, 1))
    assert model.loss_of_step(config(unmasked=0.0), 0) is model.mcdit_loss


@pytest.mark.parametrize('method', ['maskdit', 'mcdit'])
def test_an_unmasked_step_is_dits_and_leaves_no_parameter_without_gradient(method):
    """A parameter without gradient would stop DistributedDataParallel: the mask token's is zero instead."""
    cfg = config(method, unmasked=1.0, batch=2)
    net, teacher = build(cfg)
    x0, y = batch(cfg)
    r = numbers(cfg)
    terms = model.loss_of_step(cfg, 3)(net, teacher, x0, y, r, cfg)
    assert terms.keys() == {'denoise'} and terms['denoise'][0] == 1
    as_dit = dataclasses.replace(cfg, method='dit')
    assert terms['denoise'][1].item() == pytest.approx(
        plain_loss(as_dit, net, None, x0, y, r)['denoise'].item(), rel=1e-9)
    terms['denoise'][1].backward()
    trained = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values())
    assert {name for name, grad in trained.items() if not grad.any()} \
        == ({'decoder.mask_token'} if method == 'maskdit' else set())


# ------------------------------------------------------------------------------------- gradients and teachers

def total(terms):
    return sum(weight * value for weight, value in terms.values())


@pytest.mark.parametrize('method, changes, untouched', [
    *((method, {}, None) for method in METHODS),
    ('mcdit', {'tokens': 'noisy'}, None),
    ('mcdit', {'tokens': 'clean'}, 'encoder.blocks.'),                        # multiplied by 0, in the graph
    ('mcdit', {'teacher_encoder': True}, None),
    ('mcdit', {'all_clean': True}, None),
    ('mcdit', {'lambda_con1': 0.0, 'lambda_con2': 0.0}, None),
    ('mcdit', {'classes': 0}, None),
])
def test_every_parameter_gets_a_gradient(method, changes, untouched):
    cfg = config(method, batch=2, **changes)
    net, teacher = build(cfg, torch.float32)
    total(model.loss_of_step(cfg, 3)(net, teacher, *batch(cfg, torch.float32),
                                     numbers(cfg, dtype=torch.float32), cfg)).backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.any() != bool(untouched and name.startswith(untouched)), name
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == \
        (set() if method == 'mdt' else {n for n in net.state_dict() if n.endswith('.pos')})
    assert teacher is None or all(p.grad is None for p in teacher.parameters())


def test_discrimination_reaches_encoder_and_head_only():
    """SD-DiT's L_D gives the decoder no gradient, L_G gives none to the head."""
    cfg = config('sddit', batch=2)
    for term, without in (('discriminate', 'decoder.'), ('generate', 'head.')):
        net, teacher = build(cfg, torch.float32)
        terms = model.sddit_loss(net, teacher, *batch(cfg, torch.float32), numbers(cfg, dtype=torch.float32),
                                 cfg)
        terms[term][1].backward()
        for name, p in net.named_parameters():
            assert not p.requires_grad or (p.grad is None) == name.startswith(without), name


def storages(module):
    return {t.untyped_storage().data_ptr() for t in module.state_dict().values()}


@pytest.mark.parametrize('method, changes, parts', [
    ('mcdit', {}, {'encoder.linear': 'encoder.embed.linear', 'encoder.pos': 'encoder.embed.pos',
                   'decoder': 'decoder'}),
    ('mcdit', {'teacher_encoder': True}, {'encoder': 'encoder', 'decoder': 'decoder'}),
    ('sddit', {}, {'encoder': 'encoder', 'head': 'head'}),
])
def test_a_teacher_starts_as_a_copy_of_its_parts(method, changes, parts):
    """Equal to the network's, no gradient, no shared memory. MC-DiT's has no encoder blocks by default."""
    cfg = config(method, **changes)
    net = randomise(model.Net(cfg))
    teacher, mine = model.make_teacher(net, cfg), net.state_dict()
    expected = {copied + name.removeprefix(own): value for name, value in mine.items()
                for copied, own in parts.items() if name == own or name.startswith(own + '.')}
    buffers = {'centers': torch.zeros(2, model.PROTOTYPES)} if method == 'sddit' else {}
    assert same(dict(teacher.state_dict()), expected | buffers)
    assert not any(p.requires_grad for p in teacher.parameters()) and not storages(net) & storages(teacher)


def test_both_branches_are_one_pass_of_one_network():
    """On 2B images, without a graph; without constraints there is no EMA network at all."""
    cfg = config()
    net, teacher = build(cfg)
    calls = []
    teacher.register_forward_hook(lambda _, inputs, F: calls.append((inputs, F.requires_grad)))
    model.mcdit_loss(net, teacher, *batch(cfg), numbers(cfg), cfg)
    (((x, c, c_noise, y), graph),) = calls
    assert len(x) == len(c) == len(c_noise) == len(y) == 16 and not graph
    assert torch.equal(c[:8], c[8:]) and torch.equal(y[:8], y[8:])
    assert model.make_teacher(net, config(lambda_con1=0.0, lambda_con2=0.0)) is None


@pytest.mark.parametrize('changes, decays', [
    ({'method': 'mcdit'}, {0.0: 0.999, 1.0: 0.999}),
    ({'method': 'mcdit', 'teacher_encoder': True}, {0.5: 0.999}),
    ({'method': 'sddit'}, {0.0: 0.996, 0.25: 0.9964393398, 1.0: 0.999}),
])
def test_teacher_update(changes, decays, monkeypatch):
    """decay * teacher + (1 - decay) * network, parameter by parameter. MC-DiT section 4.1; SD-DiT's decay
    follows a cosine over training."""
    monkeypatch.setattr(model, 'PROTOTYPES', 16)
    cfg = config(**changes)
    net, teacher = build(cfg)
    mine = {name.replace('encoder.embed.', 'encoder.'): p for name, p in net.named_parameters()}
    mine |= dict(net.named_parameters())
    for progress, decay in decays.items():
        old = {name: p.clone() for name, p in teacher.named_parameters()}
        teacher.calls = 1                                                     # SD-DiT's has seen a batch
        teacher.update(net, progress, skipped=False)
        for name, p in teacher.named_parameters():
            assert close(p, decay * old[name] + (1 - decay) * mine[name], 1e-10), name
            assert name.endswith('pos') or not torch.equal(p, old[name]), name


def test_centers_follow_the_teachers_mean(monkeypatch):
    """SD-DiT: momentum 0.9, once per optimizer step, micro-batches and ranks together, of [CLS] and of all
    patches."""
    monkeypatch.setattr(model, 'PROTOTYPES', 16)
    cfg = config('sddit')
    net, teacher = build(cfg)
    x, y = batch(cfg)
    c_noise = torch.zeros(8, dtype=torch.float64)
    logits = teacher(x, c_noise, y)
    mean = torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))]).float()
    assert not teacher.centers.any()                                          # not before the step's end
    teacher.update(teacher, 0.0, skipped=False)                               # towards itself: same logits
    assert close(teacher.centers, 0.1 * mean, 1e-6)
    for _ in range(2):
        teacher(x[:4], c_noise[:4], y[:4])
        teacher(x[4:], c_noise[4:], y[4:])
        teacher.update(teacher, 0.0, skipped=False)
    assert close(teacher.centers, (1 - 0.9 ** 3) * mean, 1e-6)
    for name, stand_in in (('is_initialized', lambda: True), ('get_world_size', lambda: 2),
                           ('all_reduce', lambda mean: mean.add_(3.0))):      # the other rank's mean is 3
        monkeypatch.setattr(model.dist, name, stand_in)
    before = teacher.centers.clone()
    teacher(x, c_noise, y)
    teacher.update(teacher, 0.0, skipped=False)
    assert close(teacher.centers, 0.9 * before + 0.1 * (mean + 3) / 2, 1e-6)


@pytest.mark.parametrize('method', ['mcdit', 'sddit'])
def test_a_skipped_step_leaves_the_teacher_to_the_bit(method, monkeypatch):
    """Also where the teacher's own logits were not finite; the step after starts with nothing seen."""
    monkeypatch.setattr(model, 'PROTOTYPES', 16)
    net, teacher = build(config(method))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    if method == 'sddit':
        teacher.seen += torch.nan
        teacher.calls = 1
    teacher.update(net, 0.5, skipped=True)
    assert same(dict(teacher.state_dict()), before)
    if method == 'sddit':
        assert teacher.calls == 0 and not teacher.seen.any()


def test_ema():
    """shadow <- decay shadow + (1 - decay) net, for every parameter; the decay min(0.9999, (1+s)/(10+s))."""
    net, shadow = (randomise(model.Net(config('dit')).double(), seed) for seed in (0, 1))
    old, new = dict(shadow.named_parameters()), dict(net.named_parameters())
    old = {name: p.clone() for name, p in old.items()}
    model.update_ema(shadow, net, 0.9)
    assert all(close(p, 0.9 * old[name] + 0.1 * new[name], 1e-12) for name, p in shadow.named_parameters())
    assert [model.ema_decay(step) for step in (0, 90, 10 ** 6)] == pytest.approx([0.1, 0.91, 0.9999])


# ------------------------------------------------------------------------------------------------- collapse

@pytest.mark.parametrize('tokens', ['both', 'noisy'])
@torch.no_grad()
def test_collapse(tokens):
    """Sums of squares over visible tokens: of D, and of its change with encoder or patches at zero."""
    cfg = config(batch=2, tokens=tokens)
    net, _ = build(cfg)
    x0, y = batch(cfg)
    r = numbers(cfg)
    xt = x0 + r['sigma'].view(-1, 1, 1) * r['noise']
    found = model.collapse(net, x0, xt, r['sigma'], y, r['visible'], cfg)
    expected = {'output': 0, 'encoder': 0, 'patches': 0}
    patches_on = tokens == 'both'
    for b in range(2):
        s, seen = r['sigma'][b], r['visible'][b].tolist()
        scale, c_out = (s ** 2 + 0.25).sqrt(), 0.5 * s / (s ** 2 + 0.25).sqrt()
        F = {gains: plain_net(net, xt[b] / scale, s.log() / 4, y[b], seen, x0[b] / 0.5, gains)[0][seen]
             for gains in ((1, patches_on), (0, patches_on), (1, 0))}
        D = 0.25 / (s ** 2 + 0.25) * xt[b][seen] + c_out * F[1, patches_on]
        expected['output'] += (D ** 2).sum()
        expected['encoder'] += ((c_out * (F[1, patches_on] - F[0, patches_on])) ** 2).sum()
        expected['patches'] += ((c_out * (F[1, patches_on] - F[1, 0])) ** 2).sum()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-9)
    assert found['encoder'] > 0 and (found['patches'] > 0) == patches_on


# --------------------------------------------------------------------------- configurations and checkpoints

@pytest.mark.parametrize('changes, words', [
    *(({'model': name}, '--model') for name in ('XL', 'XL/3', 'M/2', '/2', 'XL/2/2')),
    ({'model': 'T/8', 'resolution': 12}, 'do not divide'),
    ({'mask_ratio': 0.95}, '--mask-ratio 0.95 leaves none of the 16 tokens'),
])
def test_wrong_configurations(changes, words):
    with pytest.raises(model.BadInput, match=words):
        config(**changes)


def saved(path, cfg, **changes):
    """A checkpoint as train.py writes it, without what only training needs."""
    torch.save({'ema': randomise(model.Net(cfg)).state_dict(), 'step': 7,
                'config': dataclasses.asdict(cfg)} | changes, path)
    return path


def test_checkpoint_round_trip(tmp_path):
    """The same bits and the same configuration; a network to be overwritten draws no random numbers."""
    cfg = config(class_names=('a', 'b'), tuned_from='x.pt')
    path, before = saved(tmp_path / 'x.pt', cfg), torch.get_rng_state()
    net, read = model.load_net(path)
    assert torch.equal(torch.get_rng_state(), before) and read == cfg and not net.training
    assert same(dict(net.state_dict()), dict(torch.load(path, weights_only=True)['ema']))
    assert not any(p.requires_grad for p in net.parameters())
    assert model.read_checkpoint(path)['step'] == 7


def test_a_field_that_an_older_file_lacks_takes_its_default(tmp_path):
    cfg = dataclasses.asdict(config(unmasked=0.5))
    path = saved(tmp_path / 'x.pt', config(), config={k: v for k, v in cfg.items() if k != 'unmasked'})
    assert model.load_net(path)[1].unmasked == 0


BAD_FILES = {                                 # what is done to a good file, words of the sentence
    'missing': (lambda path: path.unlink(), 'there is no checkpoint'),
    'text': (lambda path: path.write_text('<html>not found</html>'), 'is not a checkpoint'),
    'truncated': (lambda path: path.write_bytes(path.read_bytes()[:99_999]), 'or is truncated'),
    'other': (lambda path: torch.save({'weights': torch.zeros(3)}, path), 'is no checkpoint of'),
    'misfit': (lambda path: saved(path, config(model='T/4'), config=dataclasses.asdict(config())),
               'does not fit a mcdit T/2'),
    'first edition': (lambda path: torch.save({'ema': {'patch_embed.weight': torch.zeros(2)}, 'step': 1,
                                               'config': {'method': 'mcdit'}}, path), 'first edition'),
    'newer': (lambda path: saved(path, config(), config=dataclasses.asdict(config()) | {'warmth': 3}),
              'later version.*warmth'),
    'code': (lambda path: torch.save({'ema': Payload(path.parent / 'canary'), 'step': 1}, path),
             'more than tensors'),
}


@pytest.mark.parametrize('spoil', BAD_FILES)
def test_bad_checkpoints(tmp_path, spoil):
    path = saved(tmp_path / 'x.pt', config('dit', model='T/4'))
    change, words = BAD_FILES[spoil]
    change(path)
    with pytest.raises(model.BadInput, match=words) as error:
        model.load_net(path)
    assert '\n' not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / 'canary').exists()
