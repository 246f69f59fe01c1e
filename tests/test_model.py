"""model.py against METHOD's equations, written a second time in the plainest way."""

import math

import pytest
import torch
from conftest import build, config, draws, images, randomise

import model

METHODS = list(model.METHODS)


def run_loss(method='mcdit', n=4, **changes):
    cfg = config(method, **changes)
    net, teacher = build(cfg)
    x, y = images(cfg, n)
    return model.METHODS[method]['loss'](net, teacher, x, y, draws(cfg, n), cfg)


# ------------------------------------------------------------------------------------------------ counting


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    'method, size, parameters',
    [
        ('dit', 'S', 32_957_200),
        ('dit', 'B', 130_500_112),
        ('dit', 'L', 458_086_416),
        ('dit', 'XL', 675_111_184),
        ('maskdit', 'XL', 730_542_352),
        ('mcdit', 'XL', 730_550_544),
        ('mdt', 'S', 35_790_814),
        ('mdt', 'B', 141_475_756),
        ('mdt', 'XL', 699_758_304),
    ],
)
def test_parameter_counts(method, size, parameters):
    cfg = config(method, model=f'{size}/2', resolution=32, channels=4, classes=1000)
    with torch.device('meta'):
        net = model.Net(cfg)
        teacher = model.make_teacher(net, cfg)
    assert count(net) == parameters
    if teacher is not None:
        assert count(teacher) == 54_736_400
        assert count(net) + count(teacher) == 785_286_944  # the paper: 786 M


def test_official_dit_has_eight_output_channels():
    """DiT-XL/2 of the paper predicts a variance as well: 16 more rows in the final layer."""
    with torch.device('meta'):
        net = model.Net(config('dit', model='XL/2', resolution=32, channels=4, classes=1000))
    assert count(net) + 16 * (1152 + 1) == 675_129_632


@pytest.mark.parametrize('patch', [2, 4, 8])
@pytest.mark.parametrize('size', model.SIZES)
def test_every_size_and_patch_builds(size, patch):
    with torch.device('meta'):
        cfg = config(model=f'{size}/{patch}', resolution=16)
        net = model.Net(cfg)
        F, *_ = net(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert F.shape == (1, 3, 16, 16)


@pytest.mark.parametrize('name', ['XL', 'XL/3', 'M/2', 'XL/', '/2', 'XL/2/2'])
def test_unknown_size_is_refused(name):
    with pytest.raises(model.BadInput, match='--model'):
        model.parse_size(name)


def test_patch_must_divide():
    with pytest.raises(model.BadInput, match='do not divide'):
        model.Net(config(model='T/8', resolution=12))


# ------------------------------------------------------------------------------------- patches and positions


def test_a_patch_is_read_by_row_column_channel():
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    patches = model.patchify(x, 2)
    for b in range(2):
        for row in range(2):
            for column in range(2):
                values = [
                    x[b, c, 2 * row + i, 2 * column + j] for i in range(2) for j in range(2) for c in range(3)
                ]
                assert patches[b, 2 * row + column].tolist() == values
    assert torch.equal(model.unpatchify(patches, 2, 3), x)


def test_position_table():
    table = model.position_table(4, 8)[0]
    for row in range(4):
        for column in range(4):
            half = lambda v: [f(v / 10000 ** (k / 2)) for f in (math.sin, math.cos) for k in range(2)]
            assert table[4 * row + column].tolist() == pytest.approx(half(column) + half(row), abs=1e-6)


@pytest.mark.parametrize('N, ratio, K', [(256, 0.3, 179), (256, 0.2, 204), (256, 0.5, 128), (10, 0.9, 1)])
def test_visible_count(N, ratio, K):
    assert model.visible_count(N, ratio) == K


def test_nothing_visible_is_refused():
    with pytest.raises(model.BadInput, match='none of the 4 tokens'):
        model.visible_count(4, 0.9)


def test_noise_embedding_has_cosines_first_and_no_factor_1000():
    embed = model.NoiseEmbedding(256).double()
    embed.fc1.weight.data = torch.eye(256, dtype=torch.float64)
    embed.fc1.bias.data.fill_(10.0)  # far right of SiLU's bend
    embed.fc2.weight.data = torch.eye(256, dtype=torch.float64)
    embed.fc2.bias.data.zero_()
    wave = embed(torch.tensor([0.7], dtype=torch.float64))[0] - 10
    k = torch.arange(128)
    angle = 0.7 * 10000.0 ** (-k / 128)
    assert torch.allclose(wave, torch.cat([angle.cos(), angle.sin()]).double(), atol=2e-3)


# ---------------------------------------------------------------------------------------------------- EDM


def test_lambda_times_c_out_squared_is_one():
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    _, c_out, _, c_noise = model.precondition(sigma, 0.5)
    assert torch.allclose(
        model.loss_weight(sigma, 0.5) * c_out**2, torch.ones(50, 1, 1, 1, dtype=torch.float64), rtol=1e-12
    )
    assert torch.allclose(c_noise, sigma.log() / 4)


@pytest.mark.parametrize('sd', [0.5, 1.0])
def test_preconditioning_keeps_unit_variance(sd):
    """EDM's reasons: the network's input and its target have variance 1 for data of variance sd^2."""
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    c_skip, c_out, c_in, _ = (c.flatten() for c in model.precondition(sigma, sd))
    assert torch.allclose(c_in**2 * (sd**2 + sigma**2), torch.ones(9, dtype=torch.float64))
    target = ((1 - c_skip) ** 2 * sd**2 + c_skip**2 * sigma**2) / c_out**2
    assert torch.allclose(target, torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize('method', METHODS)
def test_initially_D_is_the_skip(method):
    cfg = config(method)
    net = model.Net(cfg)
    x, y = images(cfg, dtype=torch.float32)
    sigma = torch.tensor([0.01, 0.3, 1.0, 50.0])
    c_skip = model.precondition(sigma, 0.5)[0]
    assert torch.equal(model.denoise(net, x, sigma, y, cfg), c_skip * x)
    if method == 'mcdit':
        made = draws(cfg, dtype=torch.float32)
        D, xt, (visible, _) = model.mcdit_student(net, x, y, made, cfg, (1.0, 1.0))
        x_in = x.clone()
        mask = torch.ones(4, 16).scatter(1, visible, 0.0)  # 1 = masked
        picture_mask = mask.reshape(4, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        x_in = xt * (1 - picture_mask) + x * picture_mask
        assert torch.allclose(D, model.precondition(made['sigma'], 0.5)[0] * x_in)


# ---------------------------------------------------------------------------------- the network, said twice


def plain_net(net, x, c_noise, y, visible=None, patches=None):
    """Net.forward as a loop over images, heads and tokens, with nothing but matrices."""

    def linear(layer, v):
        return layer.weight @ v + layer.bias

    def norm(v):
        return (v - v.mean()) / (v.var(correction=0) + 1e-6).sqrt()

    def silu(v):
        return v * torch.sigmoid(v)

    def gelu(v):
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def run(block, tokens, c, slots):
        sa, ca, ga, sm, cm, gm = linear(block.modulation, silu(c)).chunk(6)
        width = len(tokens[0])
        size = width // block.heads
        qkv = [linear(block.qkv, norm(t) * (1 + ca) + sa) for t in tokens]
        mixed = []
        for i in range(len(tokens)):
            heads = []
            for h in range(block.heads):
                part = lambda j, what: qkv[j][what * width + h * size : what * width + (h + 1) * size]
                scores = torch.stack([part(i, 0) @ part(j, 1) / math.sqrt(size) for j in range(len(tokens))])
                if block.bias is not None:  # by offset in rows and columns, query minus key
                    offset = lambda a, b: (a // g - b // g + g - 1) * (2 * g - 1) + a % g - b % g + g - 1
                    scores = scores + torch.stack(
                        [block.bias[offset(slots[i], slots[j]), h] for j in range(len(tokens))]
                    )
                heads.append(sum(a * part(j, 2) for j, a in enumerate(scores.softmax(0))))
            mixed.append(torch.cat(heads))
        tokens = [t + ga * linear(block.proj, m) for t, m in zip(tokens, mixed)]
        return [t + gm * linear(block.fc2, gelu(linear(block.fc1, norm(t) * (1 + cm) + sm))) for t in tokens]

    def last(layer, t, c):
        shift, scale = linear(layer.modulation, silu(c)).chunk(2)
        return linear(layer.linear, norm(t) * (1 + scale) + shift)

    p, C, g = net.patch, net.channels, net.grid
    F = torch.zeros_like(x)
    for b in range(len(x)):
        angles = [c_noise[b] * math.exp(-math.log(10000) * k / 128) for k in range(128)]
        wave = torch.stack([a.cos() for a in angles] + [a.sin() for a in angles])
        c = linear(net.t_embed.fc2, silu(linear(net.t_embed.fc1, wave))) + net.y_embed.weight[y[b]]
        slots = range(g * g) if visible is None else visible[b].tolist()
        tokens = []
        for s in slots:
            i, j = s // g * p, s % g * p
            values = torch.stack(
                [x[b, ch, i + u, j + v] for u in range(p) for v in range(p) for ch in range(C)]
            )
            tokens.append(linear(net.patch_embed, values) + net.pos[0, s])
        if net.cls is not None:
            tokens = [net.cls[0, 0], *tokens]
        for block in net.blocks:
            tokens = run(block, tokens, c, slots)
        if net.cls is not None:
            tokens = tokens[1:]
        if net.bridge is not None:
            tokens = [last(net.bridge, t, c) for t in tokens]
        if hasattr(net, 'decoder_blocks'):
            full = dict(zip(slots, tokens))
            for s in range(g * g):
                if s not in full:
                    full[s] = (
                        net.mask_token[0, 0]
                        if hasattr(net, 'mask_token')
                        else linear(net.fill_embed, patches[b, s])
                    )
            tokens = [full[s] + net.decoder_pos[0, s] for s in range(g * g)]
            if hasattr(net, 'side_block') and visible is not None:
                made = run(net.side_block, tokens, c, range(g * g))
                tokens = [tokens[s] if s in slots else made[s] for s in range(g * g)]
            for block in net.decoder_blocks:
                tokens = run(block, tokens, c, range(g * g))
        for s, t in enumerate(tokens):
            i, j = s // g * p, s % g * p
            values = last(net.final, t, c)
            for n, (u, v, ch) in enumerate((u, v, ch) for u in range(p) for v in range(p) for ch in range(C)):
                F[b, ch, i + u, j + v] = values[n]
    return F


@pytest.mark.parametrize('method', METHODS)
def test_network_equals_its_plain_version(method):
    cfg = config(method)
    net, _ = build(cfg)
    net.requires_grad_(False)
    x, y = images(cfg, 2)
    c_noise = torch.tensor([0.3, -1.2], dtype=torch.float64)
    assert torch.allclose(net(x, c_noise, y)[0], plain_net(net, x, c_noise, y), rtol=1e-9, atol=1e-9)
    if method != 'dit':
        visible, _ = model.split_tokens(draws(cfg, 2), cfg)
        patches = model.patchify(x.flip(0), 2)
        assert torch.allclose(
            net(x, c_noise, y, visible, patches)[0],
            plain_net(net, x, c_noise, y, visible, patches),
            rtol=1e-9,
            atol=1e-9,
        )


# --------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize('method', METHODS)
def test_all_tokens_visible_in_any_order_is_the_unmasked_path(method):
    cfg = config(method)
    net, _ = build(cfg)
    x, y = images(cfg)
    c_noise = torch.randn(4, dtype=torch.float64)
    whole, *_ = net(x, c_noise, y)
    if method == 'dit':
        return
    order = draws(cfg)['order']
    masked, *_ = net(x, c_noise, y, order, model.patchify(x, 2))
    assert whole.abs().max() > 0.1
    assert (whole - masked).abs().max() < 1e-10


def test_what_fills_a_slot_matters_where_it_is_a_patch():
    for method, changes in (('maskdit', False), ('mdt', False), ('sddit', True), ('mcdit', True)):
        cfg = config(method, mask_ratio=0.5)
        net, _ = build(cfg)
        x, y = images(cfg)
        visible, masked = model.split_tokens(draws(cfg), cfg)
        other = model.unpatchify(
            model.put(model.patchify(x, 2), masked, torch.randn(4, 8, 12, dtype=torch.float64)), 2, 3
        )
        outputs = [
            model.take(
                model.patchify(net(v, torch.zeros(4), y, visible, model.patchify(v, 2))[0], 2), visible
            )
            for v in (x, other)
        ]
        difference = (outputs[0] - outputs[1]).abs().max()
        assert difference > 1e-4 if changes else difference == 0


def test_the_encoder_never_sees_masked_patches():
    cfg = config('mcdit')
    net, _ = build(cfg)
    x, y = images(cfg)
    visible, masked = model.split_tokens(draws(cfg), cfg)
    other = model.put(model.patchify(x, 2), masked, torch.randn(4, 8, 12, dtype=torch.float64))
    c = net.condition(torch.zeros(4, dtype=torch.float64), y)
    assert torch.equal(net.encode(model.patchify(x, 2), c, visible), net.encode(other, c, visible))


def test_draws_split_every_token_once():
    cfg = config(mask_ratio=0.3)
    made = model.draw(cfg, 7, 64)
    visible, masked = model.split_tokens(made, cfg)
    assert visible.shape == (64, 11) and masked.shape == (64, 5)
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(16).expand(64, -1))
    assert len({tuple(row) for row in made['order'].tolist()}) == 64  # each image has a mask of its own


def test_draws_are_a_function_of_seed_and_step():
    a, b = model.draw(config(), 5, 8), model.draw(config(), 5, 8)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for other in (model.draw(config(), 6, 8), model.draw(config(seed=1), 5, 8)):
        assert not any(torch.equal(a[name], other[name]) for name in ('sigma', 'noise', 'order'))


def test_draws_have_the_distributions_of_the_method():
    made = model.draw(config(resolution=2), 0, 100_000)
    log = made['sigma'].log()
    assert abs(log.mean() + 1.2) < 0.02 and abs(log.std() - 1.2) < 0.02
    assert abs(made['drop'].float().mean() - 0.1) < 0.005
    assert abs(made['noise'].std() - 1) < 0.01


# ---------------------------------------------------------------------------------------- losses, said twice


def slow_terms(method, cfg, net, teacher, x, y, made):
    """Every term of METHOD section 4, one image and one token at a time."""
    sd, p = cfg['sigma_data'], 2
    terms = {}

    def add(name, value):
        terms[name] = terms.get(name, 0) + value / len(x)

    K = int(16 * (1 - cfg['mask_ratio']) + 1e-9)
    for b in range(len(x)):
        s, x0 = made['sigma'][b], x[b : b + 1]
        label = torch.tensor([10 if made['drop'][b] else y[b]])
        n = s * made['noise'][b : b + 1]
        xt = x0 + n
        c_skip, c_out, c_in = (
            sd**2 / (s**2 + sd**2),
            s * sd / (s**2 + sd**2).sqrt(),
            1 / (s**2 + sd**2).sqrt(),
        )
        c_noise, w = (s.log() / 4)[None], (s**2 + sd**2) / (s * sd) ** 2
        visible = made['order'][b : b + 1, :K]
        tiles = lambda v: [v[0, :, i : i + p, j : j + p] for i in range(0, 8, p) for j in range(0, 8, p)]
        mean = lambda e, tokens: sum(tiles(e)[k].mean() for k in tokens) / len(tokens)
        seen = visible[0].tolist()
        hidden = [k for k in range(16) if k not in seen]
        if method == 'dit':
            D = c_skip * xt + c_out * net(c_in * xt, c_noise, label)[0]
            add('loss', (w * (D - x0) ** 2).mean())
        elif method == 'mdt':
            for name, again, seen_by in (('full', '', None), ('masked', '2', visible)):
                xt = x0 + s * made['noise' + again][b : b + 1]
                label = torch.tensor([10 if made['drop' + again][b] else y[b]])
                D = c_skip * xt + c_out * net(c_in * xt, c_noise, label, seen_by)[0]
                add(name, (w * (D - x0) ** 2).mean())
        elif method == 'sddit':
            F, _, logits = net(c_in * xt, c_noise, label, visible, model.patchify(c_in * xt, p))
            add('generate', (w * (c_skip * xt + c_out * F - x0) ** 2).mean())
            clear = (x0 + 0.002 * made['noise2'][b : b + 1]) / math.sqrt(0.002**2 + sd**2)
            said = teacher(clear, torch.tensor([math.log(0.002) / 4], dtype=torch.float64), label)
            temperature = 0.04 + 0.03 * min(1, made['progress'][b].item() / 0.1)
            for name, student, guide in [('cls', 0, said[0, 0] - teacher.centers[0])] + [
                ('patches', 1 + k, said[0, 1 + token] - teacher.centers[1]) for k, token in enumerate(seen)
            ]:
                P = (guide / temperature).softmax(0)
                share = 1 if name == 'cls' else 1 / len(seen)
                add(name, -share * (P * (logits[0, student] / 0.1).log_softmax(0)).sum())
        elif method == 'maskdit':
            D = c_skip * xt + c_out * net(c_in * xt, c_noise, label, visible)[0]
            target = torch.zeros_like(xt)
            for k, tile in enumerate(tiles(xt)):
                i, j = k // 4 * p, k % 4 * p
                target[0, :, i : i + p, j : j + p] = (tile - tile.mean()) / (
                    tile.var(correction=1) + 1e-6
                ).sqrt()
            add('denoise', mean(w * (D - x0) ** 2, seen))
            add('reconstruct', mean((D - target) ** 2, hidden))
        else:
            x_in = xt.clone()
            for k in hidden:
                i, j = k // 4 * p, k % 4 * p
                x_in[0, :, i : i + p, j : j + p] = x0[0, :, i : i + p, j : j + p]
            gains = {'both': (1, 1), 'noisy': (1, 0), 'clean': (0, 1)}[cfg['tokens']]
            F, c, _ = net(c_in * xt, c_noise, label, visible, model.patchify(x0 / sd, p), gains)
            D = c_skip * x_in + c_out * F
            if cfg['teacher_encoder']:
                F_noisy, F_clean = teacher(c_in * xt, c_noise, label)[0], teacher(x0 / sd, c_noise, label)[0]
            elif teacher is not None:
                F_noisy, F_clean = teacher(c_in * xt, c), teacher(x0 / sd, c)
            add('clean', mean(w * (D - x0) ** 2, seen))
            add('all', (w * (D - x0) ** 2).mean())
            add('noise', mean((D - xt) ** 2, hidden))
            add('floor', mean(n**2, hidden))
            if teacher is not None:
                add('con1', mean(w * (D - c_skip * xt - c_out * F_noisy) ** 2, seen))
                add('con2', mean(w * (D - c_skip * x0 - c_out * F_clean) ** 2, seen))
                add('F_difference', mean((F - F_noisy) ** 2, seen))
    return terms


@pytest.mark.parametrize(
    'changes, total',
    [
        ({}, lambda t: t['clean'] + 0.1 * t['noise'] + 0.1 * t['con1'] + 0.05 * t['con2']),
        ({'mask_ratio': 0.25}, lambda t: t['clean'] + 0.1 * t['noise'] + 0.1 * t['con1'] + 0.05 * t['con2']),
        ({'sigma_data': 0.8}, lambda t: t['clean'] + 0.1 * t['noise'] + 0.1 * t['con1'] + 0.05 * t['con2']),
        ({'lambda_noise': 0.0}, lambda t: t['clean'] + 0.1 * t['con1'] + 0.05 * t['con2']),
        ({'lambda_con1': 0.0}, lambda t: t['clean'] + 0.1 * t['noise'] + 0.05 * t['con2']),
        ({'lambda_con2': 0.0}, lambda t: t['clean'] + 0.1 * t['noise'] + 0.1 * t['con1']),
        ({'lambda_con1': 0.0, 'lambda_con2': 0.0}, lambda t: t['clean'] + 0.1 * t['noise']),
        (
            {'lambda_noise': 0.3, 'lambda_con1': 0.7, 'lambda_con2': 0.9},
            lambda t: t['clean'] + 0.3 * t['noise'] + 0.7 * t['con1'] + 0.9 * t['con2'],
        ),
        ({'all_clean': True}, lambda t: t['all'] + 0.1 * t['con1'] + 0.05 * t['con2']),
        ({'tokens': 'noisy'}, lambda t: t['clean'] + 0.1 * t['noise'] + 0.1 * t['con1'] + 0.05 * t['con2']),
        ({'tokens': 'clean'}, lambda t: t['clean'] + 0.1 * t['noise'] + 0.1 * t['con1'] + 0.05 * t['con2']),
        (
            {'teacher_encoder': True},
            lambda t: t['clean'] + 0.1 * t['noise'] + 0.1 * t['con1'] + 0.05 * t['con2'],
        ),
    ],
)
def test_mcdit_loss(changes, total):
    cfg = config('mcdit', **changes)
    net, teacher = build(cfg)
    x, y = images(cfg)
    made = draws(cfg)
    loss, parts = model.mcdit_loss(net, teacher, x, y, made, cfg)
    terms = slow_terms('mcdit', cfg, net, teacher, x, y, made)
    assert loss.item() == pytest.approx(total(terms).item(), rel=1e-10)
    for name in parts.keys() - {'noise_above_floor'}:
        assert parts[name].item() == pytest.approx(terms[name].item(), rel=1e-10)
    if 'noise' in parts:
        assert parts['noise_above_floor'].item() == pytest.approx(
            (terms['noise'] - terms['floor']).item(), rel=1e-8
        )
    expected = {'clean', 'noise', 'noise_above_floor', 'con1', 'con2'}
    expected -= {'noise', 'noise_above_floor'} if not cfg['lambda_noise'] or cfg['all_clean'] else set()
    assert parts.keys() == expected - {n for n in ('con1', 'con2') if not cfg['lambda_' + n]}


@pytest.mark.parametrize(
    'method, total',
    [
        ('dit', lambda t: t['loss']),
        ('maskdit', lambda t: t['denoise'] + 0.1 * t['reconstruct']),
        ('mdt', lambda t: t['full'] + t['masked']),
        ('sddit', lambda t: t['generate'] + t['cls'] + t['patches']),
    ],
)
def test_other_losses(method, total):
    cfg = config(method, steps=100)  # draws() is of step 3: warm-up not over
    net, teacher = build(cfg)
    if method == 'sddit':
        teacher.centers.normal_(generator=torch.Generator().manual_seed(0))
    x, y = images(cfg)
    made = draws(cfg)
    loss, _ = model.METHODS[method]['loss'](net, teacher, x, y, made, cfg)
    assert loss.item() == pytest.approx(
        total(slow_terms(method, cfg, net, teacher, x, y, made)).item(), rel=1e-9
    )


def test_weighted_con1_is_the_mean_squared_difference_of_F():
    cfg = config()
    net, teacher = build(cfg)
    x, y = images(cfg)
    made = draws(cfg)
    _, parts = model.mcdit_loss(net, teacher, x, y, made, cfg)
    terms = slow_terms('mcdit', cfg, net, teacher, x, y, made)
    assert parts['con1'].item() == pytest.approx(terms['F_difference'].item(), rel=1e-10)


def test_expected_noise_loss_of_a_perfect_answer_is_the_mean_of_n_squared():
    """At D = x0 nothing is left in L_noise but the noise that nobody sees: its floor."""
    cfg = config()
    x, y = images(cfg, 4)
    made = draws(cfg, 4)

    def oracle(scaled, c_noise, label, visible, patches, gains):  # the F that makes D = x0
        c_skip, c_out, _, _ = model.precondition(made['sigma'], 0.5)
        xt = x + made['sigma'].view(-1, 1, 1, 1) * made['noise']
        x_in = model.unpatchify(
            model.put(model.patchify(x, 2), visible, model.take(model.patchify(xt, 2), visible)), 2, 3
        )
        return (x - c_skip * x_in) / c_out, torch.zeros(4, 192, dtype=torch.float64), None

    cfg |= {'lambda_con1': 0.0, 'lambda_con2': 0.0}
    _, parts = model.mcdit_loss(oracle, None, x, y, made, cfg)
    _, masked = model.split_tokens(made, cfg)
    n = made['sigma'].view(-1, 1, 1, 1) * made['noise']
    assert parts['clean'] < 1e-20
    assert parts['noise'].item() == pytest.approx(model.mean_over(n**2, masked, 2).item(), rel=1e-10)
    assert abs(parts['noise_above_floor']) < 1e-12
    made = model.draw(config(resolution=2, channels=1), 0, 400_000)
    assert (made['sigma'] ** 2).mean().item() == pytest.approx(
        math.exp(2 * -1.2 + 2 * 1.2**2), rel=0.1
    )  # 1.616


def test_step_zero_loss_is_the_variance_of_the_data_over_sd_squared():
    """F = 0, so w (D - x0)^2 has mean 1 for data of standard deviation 0.5."""
    cfg = config('dit', resolution=16)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(256, 3, 16, 16, generator=rng) / 2
    loss, _ = model.dit_loss(
        model.Net(cfg), None, x, torch.zeros(256, dtype=torch.long), model.draw(cfg, 0, 256), cfg
    )
    assert loss.item() == pytest.approx(1.0, rel=0.02)


# ------------------------------------------------------------------------------------------ gradients, EMA


@pytest.mark.parametrize(
    'method, changes',
    [(m, {}) for m in METHODS]
    + [
        ('mcdit', {'tokens': 'noisy'}),
        ('mcdit', {'tokens': 'clean'}),
        ('mcdit', {'teacher_encoder': True}),
        ('mcdit', {'all_clean': True}),
        ('mcdit', {'lambda_noise': 0.0}),
        ('mcdit', {'classes': 0}),
    ],
)
def test_every_parameter_gets_a_gradient(method, changes):
    cfg = config(method, **changes)
    net, teacher = build(cfg)
    x, y = images(cfg)
    loss, _ = model.METHODS[method]['loss'](net, teacher, x, y, draws(cfg), cfg)
    loss.backward()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    zero = {name for name, p in trained.items() if not p.grad.any()}
    hidden = {
        'noisy': {n for n in trained if n.startswith('fill_embed')},  # multiplied by 0, yet in the graph
        'clean': {n for n in trained if n.startswith(('blocks', 'patch_embed', 'bridge'))},
    }
    assert zero == hidden.get(cfg.get('tokens'), set())


def test_tuning_builds_no_fill_and_every_parameter_gets_a_gradient():
    for method in METHODS:
        cfg = config(method, stage='tune', mask_ratio=0.0)
        net, teacher = build(cfg)
        assert teacher is None and not any(
            n.startswith(model.TRAINING_ONLY) for n, _ in net.named_parameters()
        )
        x, y = images(cfg)
        loss, _ = model.dit_loss(net, None, x, y, draws(cfg), cfg)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.requires_grad)


def test_only_what_the_method_uses_is_built():
    names = {m: {n.split('.')[0] for n, _ in model.Net(config(m)).named_parameters()} for m in METHODS}
    assert names['maskdit'] - names['dit'] == {'bridge', 'decoder_pos', 'decoder_blocks', 'mask_token'}
    assert names['mdt'] - names['dit'] == {'decoder_pos', 'decoder_blocks', 'mask_token', 'side_block'}
    assert names['sddit'] - names['dit'] == {
        'bridge',
        'decoder_pos',
        'decoder_blocks',
        'fill_embed',
        'cls',
        'head',
    }
    assert names['mcdit'] - names['dit'] == {'bridge', 'decoder_pos', 'decoder_blocks', 'fill_embed'}
    assert 'y_embed' not in {n.split('.')[0] for n, _ in model.Net(config(classes=0)).named_parameters()}


def storages(module):
    return {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}


@pytest.mark.parametrize(
    'method, changes', [('mcdit', {}), ('mcdit', {'teacher_encoder': True}), ('sddit', {})]
)
def test_teacher_has_no_gradient_and_no_alias(method, changes):
    cfg = config(method, **changes)
    net = randomise(model.Net(cfg).double())
    teacher = model.make_teacher(net, cfg)
    for name, p in teacher.named_parameters():
        assert torch.equal(p, dict(net.named_parameters())[name])  # started as a copy
        assert not p.requires_grad
    assert not storages(net) & storages(teacher)
    x, y = images(cfg)
    loss, _ = model.METHODS[method]['loss'](net, teacher, x, y, draws(cfg), cfg)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_parts():
    """Patch embedding, decoder blocks, final layer, not the bridge. Table 12: everything but the fill."""
    net = model.Net(config())
    parts = lambda m: {n.split('.')[0] for n, _ in m.named_parameters()}
    assert parts(model.make_teacher(net, config())) == {'fill_embed', 'decoder_blocks', 'final'}
    assert parts(model.make_teacher(net, config(teacher_encoder=True))) == parts(net) - {'fill_embed'}
    assert model.make_teacher(net, config(lambda_con1=0.0, lambda_con2=0.0)) is None
    net = model.Net(config('sddit'))
    encoder = {'t_embed', 'y_embed', 'patch_embed', 'pos', 'cls', 'blocks', 'head'}
    assert parts(model.make_teacher(net, config('sddit'))) == encoder


def test_the_two_branches_are_one_network_run_once(monkeypatch):
    cfg = config()
    net, teacher = build(cfg)
    x, y = images(cfg)
    calls = []
    forward = teacher.forward
    monkeypatch.setattr(
        teacher, 'forward', lambda *a: calls.append((a, torch.is_grad_enabled())) or forward(*a)
    )
    model.mcdit_loss(net, teacher, x, y, draws(cfg), cfg)
    (((inputs, c), graph),) = calls
    assert inputs.shape[0] == c.shape[0] == 2 * len(x) and not graph
    assert torch.equal(c[:4], c[4:])


def test_two_branches_kept_apart_would_stay_equal():
    """Why one copy is enough: started equal and updated alike, for ever."""
    cfg = config()
    net = randomise(model.Net(cfg))
    first, second = model.make_teacher(net, cfg), model.make_teacher(net, cfg)
    for step in range(3):
        randomise(net, seed=step)
        model.update_ema(first, net, 0.999)
        model.update_ema(second, net, 0.999)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize('method, decay', [('mcdit', 0.999), ('sddit', 0.9975)])
def test_teacher_update_is_exact(method, decay):
    cfg = config(method)
    net = randomise(model.Net(cfg).double())
    teacher = model.make_teacher(net, cfg)
    x, y = images(cfg)
    model.METHODS[method]['loss'](net, teacher, x, y, draws(cfg), cfg)
    old = {n: p.clone() for n, p in teacher.named_parameters()}
    randomise(net, seed=9)
    model.update_teacher(teacher, net, 5, cfg)  # half way through 10 steps
    new = dict(net.named_parameters())
    for name, p in teacher.named_parameters():
        assert torch.allclose(p, decay * old[name] + (1 - decay) * new[name], rtol=0, atol=1e-15)
        assert name.endswith('pos') or not torch.equal(p, old[name])


def test_ema_warm_up():
    assert model.ema_decay(0) == 0.1
    assert model.ema_decay(90) == 0.91
    assert model.ema_decay(10**6) == 0.9999


def test_unconditional_net_ignores_labels():
    cfg = config(classes=0)
    net, _ = build(cfg)
    x, _ = images(cfg)
    c_noise = torch.zeros(4)
    assert torch.equal(
        net(x, c_noise, torch.zeros(4, dtype=torch.long))[0],
        net(x, c_noise, torch.ones(4, dtype=torch.long))[0],
    )


def test_a_dropped_label_is_the_last_row():
    cfg = config('dit')
    net, _ = build(cfg)
    x, y = images(cfg)
    made = draws(cfg)
    made['drop'][:] = True
    losses = [model.dit_loss(net, None, x, labels, made, cfg)[0] for labels in (y, (y + 1) % 10)]
    assert losses[0] == losses[1]
    made['drop'][:] = False
    losses = [model.dit_loss(net, None, x, labels, made, cfg)[0] for labels in (y, (y + 1) % 10)]
    assert losses[0] != losses[1]


# ----------------------------------------------------------------------------------------------------- MDT


def test_relative_index():
    assert model.relative_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    for g in (2, 5, 16):
        index = model.relative_index(g)
        assert (index + index.T == 2 * (2 * g - 1) * (g - 1) + 2 * (g - 1)).all()
        assert (
            index.min() == 0
            and index.max() == (2 * g - 1) ** 2 - 1
            and len(index.unique()) == (2 * g - 1) ** 2
        )
    assert (index + index.T == 960).all() and (index.diagonal() == 480).all()


def test_masked_shortcut():
    """Visible slots keep the encoder's output plus the second table, to the bit; masked ones do not."""
    cfg = config('mdt')
    net, _ = build(cfg)
    visible, masked = model.split_tokens(draws(cfg), cfg)
    tokens, c = (
        torch.randn(4, visible.shape[1], 128, dtype=torch.float64),
        torch.randn(4, 128, dtype=torch.float64),
    )
    slots = net.fill(tokens, visible, None, c)
    assert torch.equal(model.take(slots, visible), tokens + net.decoder_pos[0][visible])
    assert (model.take(slots, masked) - net.mask_token - net.decoder_pos[0][masked]).abs().amin() > 0


def test_mdt_positions_and_biases_are_learned():
    cfg = config('mdt')
    net, _ = build(cfg)
    x, y = images(cfg)
    model.mdt_loss(net, None, x, y, draws(cfg), cfg)[0].backward()
    assert net.pos.grad.any() and net.decoder_pos.grad.any()
    blocks = [*net.blocks, *net.decoder_blocks, net.side_block]
    assert len(blocks) == 5 and all(
        block.bias.shape == (49, 4) and block.bias.grad.any(0).all() for block in blocks
    )


def test_the_full_pass_leaves_the_side_block_alone():
    cfg = config('mdt')
    net, _ = build(cfg)
    x, y = images(cfg)
    model.dit_loss(net, None, x, y, draws(cfg), cfg)[0].backward()  # what a full pass minimises
    assert net.mask_token.grad is None and all(p.grad is None for p in net.side_block.parameters())


# -------------------------------------------------------------------------------------------------- SD-DiT


def test_teacher_momentum_at_quarters():
    quarters = [model.teacher_momentum(k / 4) for k in range(5)]
    assert quarters == pytest.approx([0.996, 0.99643934, 0.9975, 0.99856066, 0.999], abs=1e-8)


def test_teacher_temperature():
    assert model.teacher_temperature(torch.tensor([0.0, 0.05, 0.1, 1.0])).tolist() == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )


def test_zero_logits_give_ln_K():
    zero = torch.zeros(2, 3, 8192, dtype=torch.float64)
    crossed, entropy = model.cross_entropy(zero, zero, 0.04)
    assert torch.allclose(crossed, torch.full((2, 3), math.log(8192), dtype=torch.float64))
    assert torch.allclose(entropy, crossed)


def test_gradient_of_the_cross_entropy():
    rng = torch.Generator().manual_seed(0)
    said = torch.randn(5, 8192, generator=rng, dtype=torch.float64) / 10
    logits = (torch.randn(5, 8192, generator=rng, dtype=torch.float64) / 10).requires_grad_()
    model.cross_entropy(logits, said, 0.05)[0].sum().backward()
    assert torch.allclose(
        logits.grad, ((logits / 0.1).softmax(1) - (said / 0.05).softmax(1)) / 0.1, atol=1e-12
    )


def test_head_gives_cosines():
    head = randomise(model.Head(192).double(), scale=0.5)
    logits = head(torch.randn(2, 5, 192, dtype=torch.float64))
    assert logits.shape == (2, 5, 8192) and 0.1 < logits.abs().max() <= 1


def test_head_stays_in_float32_under_autocast():
    cfg = config('sddit')
    net, _ = build(cfg, torch.float32)
    x, y = images(cfg, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        _, _, logits = net(x, torch.zeros(4), y, model.split_tokens(draws(cfg), cfg)[0], model.patchify(x, 2))
    assert logits.dtype == torch.float32 and logits.shape == (4, 13, 8192)


def test_centers_follow_the_teachers_mean():
    """After three equal batches they are 1 - 0.9^3 = 0.271 of it; micro-batches count as one batch."""
    cfg = config('sddit')
    net, teacher = build(cfg)
    x, y = images(cfg)
    c_noise = torch.zeros(4, dtype=torch.float64)
    logits = teacher(x, c_noise, y)
    mean = torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))]).float()
    assert teacher.centers.abs().max() == 0  # not before the step is over
    teacher.update_centers()
    assert torch.allclose(teacher.centers, 0.1 * mean, atol=1e-6)
    for _ in range(2):
        teacher(x[:2], c_noise[:2], y[:2])
        teacher(x[2:], c_noise[2:], y[2:])
        teacher.update_centers()
    assert torch.allclose(teacher.centers, 0.271 * mean, atol=1e-6)


def test_discrimination_alone_leaves_the_decoder_without_gradient():
    cfg = config('sddit')
    net, teacher = build(cfg)
    x, y = images(cfg)
    visible, _ = model.split_tokens(draws(cfg), cfg)
    _, _, logits = net(x, torch.zeros(4), y, visible, model.patchify(x, 2))
    model.cross_entropy(logits, torch.randn_like(logits), 0.05)[0].mean().backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            decoder = name.startswith(('bridge', 'decoder_blocks', 'fill_embed', 'final'))
            assert (p.grad is None) == decoder, name


def test_tokens_are_compared_with_their_own():
    """Student equal to teacher, one noise level, nothing masked, no centers: a shift by a token costs."""
    cfg = config('sddit')
    net = randomise(model.Net(cfg).double(), scale=0.5)
    teacher = model.make_teacher(net, cfg)
    x, y = images(cfg)
    c_noise = torch.zeros(4, dtype=torch.float64)
    everything = torch.arange(16).expand(4, -1)
    with torch.no_grad():
        _, _, logits = net(x, c_noise, y, everything, model.patchify(x, 2))
        said = teacher(x, c_noise, y)
    assert torch.allclose(logits, said)
    aligned = model.cross_entropy(logits[:, 1:], said[:, 1:], 0.07)[0].mean()
    shifted = model.cross_entropy(logits[:, 1:].roll(1, dims=1), said[:, 1:], 0.07)[0].mean()
    assert shifted > aligned + 0.01


def test_cls_is_seen_by_the_encoder_alone():
    cfg = config('sddit')
    net, _ = build(cfg)
    x, y = images(cfg)
    visible, _ = model.split_tokens(draws(cfg), cfg)
    c = net.condition(torch.zeros(4, dtype=torch.float64), y)
    assert net.encode(model.patchify(x, 2), c, visible).shape == (4, 1 + visible.shape[1], 128)
    assert net(x, torch.zeros(4), y)[0].shape == x.shape


# ------------------------------------------------------------------------------------------------ collapse


def test_collapse_measure():
    cfg = config()
    net, _ = build(cfg)
    x, y = images(cfg)
    made = draws(cfg)
    sums = model.collapse(net, x, y, made, cfg)
    D, _, (visible, _) = model.mcdit_student(net, x, y, made, cfg, (1.0, 1.0))
    for name, gains in (('encoder', (0.0, 1.0)), ('patches', (1.0, 0.0))):
        D0 = model.mcdit_student(net, x, y, made, cfg, gains)[0]
        assert sums[name] == model.take(model.patchify((D - D0) ** 2, 2), visible).sum() > 0
    with torch.no_grad():
        net.bridge.linear.weight.zero_()
        net.bridge.linear.bias.zero_()  # a decoder that cannot see the encoder
    assert model.collapse(net, x, y, made, cfg)['encoder'] == 0
    assert model.collapse(net, x, y, made, cfg)['patches'] > 0


# --------------------------------------------------------------------------------------------- checkpoints


def saved(tmp_path, cfg, **changes):
    net = randomise(model.Net(cfg))
    path = tmp_path / 'x.pt'
    torch.save({'ema': net.state_dict(), 'step': 1, 'config': cfg} | changes, path)
    return path


def test_checkpoint_round_trip(tmp_path):
    cfg = config()
    path = saved(tmp_path, cfg)
    net, read = model.load_net(path)
    assert read == cfg
    assert (
        all(torch.equal(a, b) for a, b in zip(net.parameters(), randomise(model.Net(cfg)).parameters()))
        is False
    )
    state = torch.load(path, weights_only=True)['ema']
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_reading_a_checkpoint_draws_nothing(tmp_path):
    """Random weights to be overwritten take seconds at XL/2."""
    path = saved(tmp_path, config())
    before = torch.get_rng_state()
    model.load_net(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    'spoil', ['missing', 'folder', 'text', 'empty', 'truncated', 'flipped', 'other', 'misfit', 'code']
)
def test_bad_checkpoints_are_refused(tmp_path, spoil):
    path = saved(tmp_path, config(model='T/4'))
    canary = tmp_path / 'canary'
    content = bytearray(path.read_bytes())
    if spoil == 'missing':
        path = tmp_path / 'none.pt'
    elif spoil == 'folder':
        path = tmp_path
    elif spoil == 'text':
        path.write_text('<html>not found</html>')
    elif spoil == 'empty':
        path.write_bytes(b'')
    elif spoil == 'truncated':
        path.write_bytes(content[: len(content) // 2])
    elif spoil == 'flipped':
        content[len(content) // 2] ^= 1  # torch.load would not notice
        path.write_bytes(content)
    elif spoil == 'other':
        torch.save({'weights': torch.zeros(3)}, path)
    elif spoil == 'misfit':
        path = saved(tmp_path, config(model='T/4'), config=config(model='T/2'))
    elif spoil == 'code':

        class Payload:
            def __reduce__(self):
                return open, (str(canary), 'w')

        torch.save({'ema': Payload(), 'step': 1, 'config': {}}, path)
    with pytest.raises(model.BadInput) as refusal:
        model.load_net(path)
    assert '\n' not in str(refusal.value) and str(path) in str(refusal.value)
    assert not canary.exists()
