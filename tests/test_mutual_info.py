"""mutual_info.py: estimators against closed forms and brute force, Proposition 2, the rows, refusals."""

import csv
import errno
import io
import json
import math
import runpy

import numpy as np
import pytest
import torch
from conftest import build, config, draws, images, randomise
from PIL import Image
from scipy.special import digamma

import data
import model
import mutual_info

LN2 = math.log(2)


def pairs(n, d, rho, seed=0):
    """n pairs of d equally correlated Gaussian coordinates, and their information."""
    x, z = np.random.default_rng(seed).standard_normal((2, n, d))
    return x, rho * x + math.sqrt(1 - rho ** 2) * z, -d / 2 * math.log(1 - rho ** 2)


# ---------------------------------------------------------------------------------------------- estimators

@pytest.mark.parametrize('a, b', [(1, 1), (3, 3), (2, 5)])
def test_information_of_gaussians(a, b):
    """Twice: from correlations that are known before each side is mixed, and from determinants."""
    rng = np.random.default_rng(0)
    rho = rng.uniform(0.1, 0.95, min(a, b))
    S = np.eye(a + b)
    S[np.arange(len(rho)), a + np.arange(len(rho))] = S[a + np.arange(len(rho)), np.arange(len(rho))] = rho
    M = np.zeros_like(S)
    M[:a, :a], M[a:, a:] = rng.standard_normal((a, a)), rng.standard_normal((b, b))
    S = M @ S @ M.T
    assert mutual_info.gaussian(S, a) == pytest.approx(-0.5 * np.log(1 - rho ** 2).sum(), rel=1e-9)
    determinants = 0.5 * np.log(np.linalg.det(S[:a, :a]) * np.linalg.det(S[a:, a:]) / np.linalg.det(S))
    assert mutual_info.gaussian(S, a) == pytest.approx(determinants, rel=1e-9)


@pytest.mark.parametrize('d', [1, 2])
@pytest.mark.parametrize('rho', [0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
def test_ksg_in_one_and_two_dimensions(d, rho):
    x, y, true = pairs(10_000, d, rho)
    assert abs(mutual_info.ksg(x, y) - true) <= max(0.05 * true, 0.04)


@pytest.mark.slow
@pytest.mark.parametrize('d', [4, 8])
def test_ksg_in_more_dimensions(d):
    """Known to fall short, which is why the default is 2: seen with -s."""
    for rho in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
        x, y, true = pairs(10_000, d, rho)
        found = mutual_info.ksg(x, y)
        print(f'd {d}  rho {rho:4}  true {true:6.3f}  estimated {found:6.3f}  error {found / true - 1:+.0%}')
        assert found < 1.05 * true + 0.04
    assert 0.05 < 1 - found / true < 0.65


def test_eight_dimensions_fall_short():
    x, y, true = pairs(2000, 8, 0.7)
    assert 0.3 < 1 - mutual_info.ksg(x, y) / true < 0.65


@pytest.mark.parametrize('d', [1, 2, 4])
def test_independent_sides(d):
    found = [mutual_info.ksg(*np.random.default_rng(seed).standard_normal((2, 500, d))) for seed in range(30)]
    assert abs(np.mean(found)) < 2 * np.std(found, ddof=1) / math.sqrt(30)


def test_no_unit_matters():
    """Scaling and shifting each coordinate changes nothing; nor does changing sides."""
    x, y, _ = pairs(1000, 3, 0.8)
    plain = mutual_info.ksg(x, y)
    assert mutual_info.ksg(x * [1e-6, 1.0, -300.0] + 2, y * [5.0, 1e5, 0.1]) == pytest.approx(plain, abs=1e-9)
    assert mutual_info.ksg(y, x) == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize('d', [1, 2, 3])
def test_brute_force(d):
    """KSG algorithm 1 as written in the paper, with all distances in a table."""
    x, y, _ = pairs(500, d, 0.6)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean(0)) / y.std(0)
    dx, dy = abs(x[:, None] - x[None]).max(2), abs(y[:, None] - y[None]).max(2)
    total = 0.0
    for i in range(500):
        eps = np.sort(np.delete(np.maximum(dx[i], dy[i]), i))[mutual_info.NEIGHBOURS - 1]
        n_x, n_y = ((np.delete(distance[i], i) < eps).sum() for distance in (dx, dy))
        total += digamma(n_x + 1) + digamma(n_y + 1)
    expected = digamma(mutual_info.NEIGHBOURS) + digamma(500) - total / 500
    assert mutual_info.ksg(x, y) == pytest.approx(expected, abs=1e-12)


def test_ties():
    """Fair bits have ln 2 nats of each other where they are equal, and none where they are independent."""
    bits = np.random.default_rng(0).integers(0, 2, (2, 4000, 1)).astype(float)
    assert mutual_info.ksg(bits[0], bits[0]) == pytest.approx(LN2, abs=0.05)
    assert mutual_info.ksg(*bits) == pytest.approx(0, abs=0.05)


# --------------------------------------------------------------------------------------------- calibration

def test_default_dimensions_are_trusted(monkeypatch):
    """2 components, 1,000 images: at most 10 % off up to 4 nats, and never above the truth; 8 fall short."""
    monkeypatch.setattr(mutual_info, 'CALIBRATIONS', 10)
    mean, deviation = mutual_info.calibrate(mutual_info.DEFAULTS['dims'], mutual_info.IMAGES)
    for true, found, spread in zip(mutual_info.TRUE, mean, deviation):
        assert found < true + 3 * spread
        assert true > 4 or mutual_info.off(true, found) < 0.1
    monkeypatch.setattr(mutual_info, 'CALIBRATIONS', 2)
    monkeypatch.setattr(mutual_info, 'TRUE', (0.0, 1.0, 4.0))
    mean, _ = mutual_info.calibrate(8, 1000)
    assert mutual_info.distrust(mean[2] - 0.1, mean) > 0.3


def test_distrust():
    """Known errors: none up to 1 nat, a quarter at 4, and nothing known above what was ever estimated."""
    calibrated = np.interp(mutual_info.TRUE, [0, 1, 4, 8], [0, 1, 3, 3.5])
    assert mutual_info.distrust(0.7, calibrated) == pytest.approx(0, abs=1e-12)
    assert mutual_info.distrust(-0.02, calibrated) == pytest.approx(0, abs=1e-12)            # mere scatter
    assert mutual_info.distrust(3.0, calibrated) == pytest.approx(0.25)
    assert mutual_info.distrust(3.6, calibrated) == math.inf
    assert mutual_info.off(0.0, 0.02) == pytest.approx(0.2)                   # of 0.1 nats: 0 has no 10 %
    assert mutual_info.off(2.0, 1.9) == pytest.approx(0.05)


# -------------------------------------------------------------------------------------------- Proposition 2

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('a, b', [(1, 1), (2, 2), (4, 3), (8, 8)])
def test_proposition_2_is_an_identity(seed, a, b):
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((a + b, a + b))
    S, last = M @ M.T, math.inf
    for sigma in (0.01, 0.1, 1.0, 10.0):
        left_5, right_5, left_6, right_6 = mutual_info.proposition_2(S, a, sigma)
        assert left_5 == pytest.approx(right_5, abs=1e-8) and left_6 == pytest.approx(right_6, abs=1e-8)
        assert left_6 <= left_5 <= mutual_info.gaussian(S, a) and left_6 < last
        last = left_6
        N = S.copy()
        N[a:, a:] += sigma ** 2 * np.eye(b)                                   # only x2 is noisy
        det = np.linalg.slogdet
        assert left_5 == pytest.approx(0.5 * (det(N[:a, :a])[1] + det(N[a:, a:])[1] - det(N)[1]), abs=1e-8)


def test_terms_of_equation_5_by_sampling():
    """E KL(p(x1_0 | x2_0) || p(x1_0 | x2_t)) of two numbers: the mean of a log-ratio of densities."""
    rng, r, sigma = np.random.default_rng(0), 0.8, 0.7
    x2 = rng.standard_normal(400_000)
    x1, x2_t = r * x2 + 0.6 * rng.standard_normal(400_000), x2 + sigma * rng.standard_normal(400_000)
    v = 1 + sigma ** 2
    log = lambda x, mean, variance: -0.5 * np.log(variance) - (x - mean) ** 2 / 2 / variance
    kl = (log(x1, r * x2, 1 - r ** 2) - log(x1, r * x2_t / v, 1 - r ** 2 / v)).mean()
    S = np.array([[1, r], [r, 1]])
    term = mutual_info.gaussian(S, 1) - mutual_info.proposition_2(S, 1, sigma)[1]
    assert term == pytest.approx(kl, abs=0.005)


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    """1,000 shapes of 16 x 16, the default size."""
    folder = tmp_path_factory.mktemp('data') / 'pictures'
    data.make_shapes(folder, count=1000)
    return folder


def test_order_of_proposition_2_on_shapes(pictures):
    """I(x1_t; x2_t) <= I(x1_0; x2_t) <= I(x1_0; x2_0) at every noise level, within deviations."""
    dataset, sigmas = data.open_data(pictures), mutual_info.DEFAULTS['sigmas']
    sample = mutual_info.read(dataset, mutual_info.choose(dataset, 1000, 0), 0)
    masks = [mutual_info.draw_mask(16, 2, 0.5, 0, number) for number in range(3)]
    x0 = sample[0]
    splits = [(seen, mutual_info.fit(x0, ~seen, 2), mutual_info.fit(x0, seen, 2)) for seen in masks]
    found = mutual_info.measure([sample], [splits], sigmas, [])
    for sigma in sigmas:
        clean, mixed, noisy = (np.array([value for _, _, value, _ in found[row, sigma]])
                               for row in (mutual_info.CLEAN, mutual_info.MIXED, mutual_info.NOISY))
        for more, less in ((clean, mixed), (mixed, noisy)):
            assert less.mean() <= more.mean() + max(less.std(ddof=1), 0.03)
        if sigma == 3:
            assert (clean - mixed > 0.5).all() and (mixed - noisy > 0.2).all()
    assert found[mutual_info.CLEAN, 0.1] == found[mutual_info.CLEAN, 10.0]
    assert abs(noisy.mean()) < 0.1                                            # at 10 next to nothing is left


# ------------------------------------------------------------------------------------- images, masks, sides

def test_second_copies_are_left_out(shapes, tmp_path):
    original = data.open_data(shapes)
    twice = ((row, 0) for row in [*original.array[:120], *original.array[:30]])
    data.save_folder(tmp_path / 'twice', twice, 'uint8', (3, 8, 8), {'kind': 'images', 'classes': 0})
    dataset = data.open_data(tmp_path / 'twice')
    rows = mutual_info.choose(dataset, 150, 0)
    assert len(rows) == 120 == len({row.tobytes() for row in dataset.array[rows]})
    assert set(rows.tolist()) <= set(range(150)) and (np.diff(rows) > 0).all()
    few = mutual_info.choose(original, 50, 1)
    assert len(few) == 50 and few.tolist() != mutual_info.choose(original, 50, 2).tolist()


def test_masks():
    seen = mutual_info.draw_mask(16, 4, 0.75, 0, 0)
    assert seen.shape == (16, 16) and seen.sum() == 4 * 16
    assert set(model.patchify(seen[None, None].float(), 4).mean(2).flatten().tolist()) == {0.0, 1.0}
    assert not torch.equal(seen, mutual_info.draw_mask(16, 4, 0.75, 0, 1))
    assert torch.equal(seen, mutual_info.draw_mask(16, 4, 0.75, 0, 0))


def test_components():
    """Data along two known axes: they are found, in order, and clean images are centred by them."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((24, 24)))[0][:, :2]
    scores = rng.standard_normal((500, 2)) * [3.0, 1.0]
    scores = np.linalg.qr(scores - scores.mean(0))[0] * [3.0, 1.0]            # orthogonal: the components
    x0 = torch.zeros(500, 3, 4, 4, dtype=torch.float64)
    where = torch.arange(16).reshape(4, 4) % 2 == 0
    x0[:, :, where] = torch.from_numpy(scores @ axes.T + 0.5).reshape(500, 3, 8)
    side = mutual_info.fit(x0, where, 2)
    assert np.allclose(abs(mutual_info.project(x0, side)), abs(scores), atol=1e-9)
    with pytest.raises(data.BadInput, match='vary in 2 directions'):
        mutual_info.fit(x0, where, 3)


# ----------------------------------------------------------------------------------- what each network makes

def one_mask(cfg, n=4):
    seen = mutual_info.draw_mask(8, 2, 0.5, 0, 0)
    order = torch.cat([seen[::2, ::2].flatten().nonzero()[:, 0], (~seen[::2, ::2]).flatten().nonzero()[:, 0]])
    return seen, order.expand(n, -1)


@pytest.mark.parametrize('method', ['maskdit', 'mdt', 'sddit', 'mcdit'])
def test_masked_path(method, monkeypatch):
    """The D that each loss is made of, for the same mask; in batches."""
    cfg = config(method, mask_ratio=0.5)
    net, _ = build(cfg)
    x0, y = images(cfg)
    seen, order = one_mask(cfg)
    noise, sigma = draws(cfg)['noise'], 0.7
    xt, levels = x0 + sigma * noise, torch.full((4,), sigma, dtype=torch.float64)
    monkeypatch.setattr(mutual_info, 'BATCH', 3)
    found = mutual_info.look(net, cfg, x0, xt, sigma, y, seen)
    if method == 'mcdit':
        step = {'sigma': levels, 'noise': noise, 'order': order, 'drop': torch.zeros(4, dtype=torch.bool)}
        with torch.no_grad():
            expected = model.mcdit_student(net, x0, y, step, cfg, (1.0, 1.0))[0]
    else:
        c_skip, c_out, c_in, c_noise = model.precondition(levels, 0.5)
        with torch.no_grad():
            F = net(c_in * xt, c_noise, y, order[:, :8], model.patchify(c_in * xt, 2))[0]
        expected = c_skip * xt + c_out * F
    assert torch.allclose(found, expected, atol=1e-5)                         # `levels` there are float32
    with torch.no_grad():
        inference = model.denoise(net, xt, levels, y, cfg)
    assert torch.allclose(mutual_info.look(net, cfg, x0, xt, sigma, y), inference, atol=1e-5)
    assert (found - inference).abs().max() > 1e-2


def test_who_has_a_masked_path():
    """Not who has lost or never trained a part of it."""
    assert {m for m in model.METHODS if not mutual_info.masked_path(config(m))} == {'dit'}
    for changes in ({'stage': 'tune'}, {'tokens': 'noisy'}, {'tokens': 'clean'}):
        assert not mutual_info.masked_path(config('mcdit', **changes))


@pytest.fixture
def checkpoint(tmp_path):
    """A random network of T/2 on 3 x 8 x 8, 10 classes, saved as train.py does."""
    def make(name, method='mcdit', **changes):
        cfg = config(method, **changes)
        net = randomise(model.Net(cfg))
        torch.save({'ema': net.state_dict(), 'step': 1, 'config': cfg}, tmp_path / name)
        return str(tmp_path / name)
    return make


def test_the_head_of_sddit_is_not_run(checkpoint, shapes):
    path = checkpoint('s.pt', 'sddit')
    dataset = data.open_data(shapes)
    (name, _, net, cfg), = mutual_info.open_networks([path], dataset)
    assert name == 'sddit T/2' and not hasattr(net, 'head')
    x0, y, noise = mutual_info.read(dataset, np.arange(3), 0)
    seen, _ = one_mask(cfg)
    whole, _ = model.load_net(path)
    args = (cfg, x0, x0 + noise, 1.0, y, seen)
    assert torch.equal(mutual_info.look(net, *args), mutual_info.look(whole, *args))


FAST = ['--images', '60', '--dims', '1', '--masks', '1', '--seeds', '2', '--sigmas', '0.3', '3']


def test_table_csv_and_picture(checkpoint, shapes, tmp_path, capsys, monkeypatch):
    """Five methods, two patch sizes, a tuned one and the same method twice in one call; numbers that do not
    depend on the other checkpoints; every number in the file."""
    monkeypatch.setattr(mutual_info, 'CALIBRATIONS', 3)
    paths = [checkpoint(f'{method}.pt', method) for method in model.METHODS]
    paths += [checkpoint('four.pt', 'mcdit', model='T/4'), checkpoint('tuned.pt', 'mcdit', stage='tune'),
              checkpoint('again.pt', 'mdt', classes=0, class_names=[])]
    command = ['--data', str(shapes), *FAST, '--out']
    mutual_info.main([*command, str(tmp_path / 'a'), *paths])
    screen = capsys.readouterr().out
    mutual_info.main([*command, str(tmp_path / 'b'), paths[0], paths[5]])
    some, all_ = (set((tmp_path / name).read_text().splitlines()) for name in ('b.csv', 'a.csv'))
    assert some <= all_

    with open(tmp_path / 'a.csv') as file:
        lines = list(csv.DictReader(file))
    names = ['maskdit T/2', 'mdt T/2', 'sddit T/2', 'mcdit T/2', 'mcdit T/4', f'mdt T/2, {paths[-1]}']
    plain = {'clean images', 'mixed, clean / noisy', 'noisy images'}
    assert {line['row'] for line in lines} == plain | {
        'calibration', 'dit T/2, inference path', 'mcdit T/2, tuned, inference path',
        *(f'{name}, {way} path' for name in names for way in ('masked', 'inference'))}
    for line in lines:
        assert [line[name] for name in ('images', 'square', 'mask_ratio', 'dims')] == ['60', '4', '0.5', '1']
        mean, deviation = float(line['mean']), float(line['deviation'])
        if line['row'] == 'calibration':
            assert float(line['off']) == pytest.approx(mutual_info.off(float(line['true']), mean))
            continue
        same = [float(other['ksg']) for other in lines
                if (other['row'], other['sigma']) == (line['row'], line['sigma'])]
        assert len(same) == 2
        assert (mean, deviation) == (pytest.approx(np.mean(same)), pytest.approx(np.std(same, ddof=1)))
        assert math.isfinite(float(line['gaussian'])) and (line['checkpoint'] == '') == (line['row'] in plain)
        assert f'{mean:5.2f} +-{deviation:5.2f}' in screen
    assert screen.count('inference path alone') == 2 and '0 left out as duplicates' in screen
    assert 'mcdit is given the clean' in screen and 'rest on the inference paths' in screen

    pixels = np.asarray(Image.open(tmp_path / 'a.png')).reshape(-1, 3)
    assert {*mutual_info.COLOURS, *mutual_info.GREYS.values()} <= set(map(tuple, pixels.tolist()))
    assert {path.name for path in tmp_path.iterdir()} - {path.rpartition('/')[2] for path in paths} == {
        'a.csv', 'a.png', 'b.csv', 'b.png'}


def test_latents(checkpoint, moments, tmp_path, monkeypatch):
    monkeypatch.setattr(mutual_info, 'CALIBRATIONS', 3)
    path = checkpoint('l.pt', 'mcdit', channels=4, classes=3, class_names=list('abc'))
    command = ['--data', str(moments), path, '--sigmas', '1']
    mutual_info.main([*command, '--dims', '1', '--out', str(tmp_path / 'l')])
    assert (tmp_path / 'l.csv').exists()
    mutual_info.main([*command, '--attention', str(tmp_path / 'm.png')])
    assert (tmp_path / 'm.png').exists()


def test_proposition_2_on_the_screen(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mutual_info.main(['--data', str(shapes), '--proposition-2', '--dims', '2', '--sigmas', '2', '0.5'])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ['0.5', '2'] and 'Markov' in lines[-1]
    for line in lines[2:4]:
        _, a, b, c, e, difference = line.split()
        assert a == b and c == e and float(difference) < 1e-8
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- attention maps

@pytest.mark.parametrize('method', ['dit', 'mdt', 'sddit'])
def test_attention_is_the_networks_own(method):
    """With these weights on the values, the block's fused attention comes out."""
    cfg = config(method)
    net, _ = build(cfg)
    block, index = net.blocks[0], getattr(net, 'relative', None)
    x = torch.randn(2, 16, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        qkv = block.qkv(x)
        weights = mutual_info.attention(block, qkv, index)
        values = qkv[..., 2 * 128:].unflatten(2, (block.heads, -1)).transpose(1, 2)
        made = block.proj((weights @ values).transpose(1, 2).flatten(2))
        assert torch.allclose(made, block.attention(x, index), atol=1e-12)
    assert torch.allclose(weights.sum(-1), torch.ones(2, block.heads, 16, dtype=torch.float64))


@pytest.mark.parametrize('method', model.METHODS)
def test_attended(method):
    """Shares of all attention; [CLS] takes its own; and the network is left without a hook."""
    cfg = config(method)
    net, _ = build(cfg)
    x, y = images(cfg)
    maps = mutual_info.attended(net, cfg, x, 1.0, y)
    assert maps.shape == (4, 4, 4) and (maps > 0).all()
    total = maps.sum((1, 2))
    assert (total < 1 - 1e-6).all() if method == 'sddit' else torch.allclose(total, torch.ones_like(total))
    assert not net.blocks[-1].qkv._forward_hooks


def test_attention_picture(checkpoint, shapes, tmp_path, capsys):
    paths = [checkpoint(f'{method}.pt', method) for method in model.METHODS]
    mutual_info.main(['--data', str(shapes), '--attention', str(tmp_path / 'm.png'), *paths,
                      '--show', '3', '9', '--sigmas', '0.1', '1'])
    sheet = Image.open(tmp_path / 'm.png')
    assert sheet.size == (3 * 70 + 6, 2 * 6 * 84 + 6)                         # 2 images: itself, 5 networks
    first = np.asarray(sheet)[18:82, 6:70]
    assert (first[4::8, 4::8].transpose(2, 0, 1) == data.open_data(shapes).array[3]).all()


# ---------------------------------------------------------------------------------------- charts, and losses

def test_ticks():
    assert mutual_info.ticks(0.1, 30, True) == pytest.approx([0.1, 0.3, 1, 3, 10, 30])
    assert mutual_info.ticks(-0.02, 3.6, False) == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5])
    for low, high in ((0, 400_000), (0, 0.07), (-1.3, 12), (5, 20)):
        found = mutual_info.ticks(low, high, False)
        assert 3 <= len(found) <= 11 and low <= found[0] and found[-1] <= high * (1 + 1e-9)


def log(folder, losses, held_out, **changes):
    folder.mkdir(exist_ok=True)
    cfg = config(**changes)
    part = {'mcdit': 'clean', 'mdt': 'full', 'sddit': 'generate'}.get(cfg['method'], 'denoise')
    lines = [{'method': 'x', 'config': cfg}]
    lines += [{'step': 10 * i, 'loss': 9.0, part: loss} for i, loss in enumerate(losses)]
    lines += [{'step': 20 * i, 'sigma': [1, 2], 'held_out': pair} for i, pair in enumerate(held_out)]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


@pytest.mark.parametrize('method', model.METHODS)
def test_losses(method, tmp_path):
    """The part of each loss that aims at x0, and the mean held-out loss; a line cut short is passed over."""
    folder = log(tmp_path / 'run', [1.0, math.nan, 0.5], [[1.0, 3.0], [0.5, 0.7]], method=method)
    with open(folder / 'log.jsonl', 'a') as file:
        file.write('{"step": 30, "den')
    name, trained, held_out = mutual_info.read_losses(folder)
    assert name == f'{method} T/2' and trained == [(0, 1.0), (20, 0.5)]
    assert held_out == [(0, 2.0), (20, pytest.approx(0.6))]


def test_losses_of_real_steps_have_these_names():
    for method in model.METHODS:
        cfg = config(method)
        net, teacher = build(cfg)
        x, y = images(cfg)
        _, parts = model.METHODS[method]['loss'](net, teacher, x, y, draws(cfg), cfg)
        assert len(parts.keys() & set(mutual_info.ON_CLEAN)) == 1


def test_picture_of_losses(tmp_path):
    """A falling straight line is drawn where the axes say: from the upper left to the lower right."""
    a = log(tmp_path / 'a', [1.0, 0.5, 0.0], [[1.0, 1.0], [0.0, 0.0]])
    b = log(tmp_path / 'b', [0.0, 0.5, 1.0], [[0.5, 0.5]], method='dit')
    mutual_info.main(['--curves', str(tmp_path / 'c.png'), str(a), str(b)])
    pixels = np.asarray(Image.open(tmp_path / 'c.png')).astype(int)
    rows, columns = np.nonzero(abs(pixels - mutual_info.COLOURS[0]).sum(2) == 0)
    left = columns < (mutual_info.MARGIN + mutual_info.WIDTH) // 2
    slope, _ = np.polyfit(columns[left], rows[left], 1)
    assert slope == pytest.approx((mutual_info.HEIGHT / 1.07) / (mutual_info.WIDTH - 80), rel=0.02)
    assert np.corrcoef(columns[left], rows[left])[0, 1] > 0.999
    assert (~left).sum() > 100 and not list(tmp_path.glob('*tmp*'))


def test_dashes_and_hollow_marks(tmp_path):
    points = [(1.0, 1.0, 0.2, False), (10.0, 2.0, 0.2, False)]
    def ink(dashed, hollow):
        curve = (200, 0, 0), dashed, [(*point[:3], hollow) for point in points]
        mutual_info.chart(tmp_path / 'x.png', [('y', 'x', {'a': curve}, True)], ['words'])
        return (np.asarray(Image.open(tmp_path / 'x.png')) == (200, 0, 0)).all(2).sum()
    assert 0.4 < ink(True, False) / ink(False, False) < 0.75
    assert ink(False, True) < ink(False, False)


# ------------------------------------------------------------------------------------------------- command

@pytest.fixture
def place(checkpoint, shapes, tmp_path, monkeypatch):
    """A folder of files that are wrong, each in one way."""
    monkeypatch.chdir(tmp_path)
    checkpoint('x.pt')
    checkpoint('big.pt', resolution=16)
    checkpoint('four.pt', channels=4)
    checkpoint('c.pt', classes=3, class_names=list('abc'))
    checkpoint('free.pt', classes=0, class_names=[])
    checkpoint('nan.pt', 'dit')
    state = torch.load('nan.pt', weights_only=True)
    state['ema']['final.linear.bias'][:] = torch.nan
    torch.save(state, 'nan.pt')
    state['ema']['t_embed.fc2.bias'][:] = torch.nan
    torch.save(state, 'lost.pt')
    checkpoint('wide.pt', 'dit', model='T/4')
    (tmp_path / 'shapes8').symlink_to(shapes)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((200, 3, 8, 8)).astype(np.float32)
    broken = noise.copy()
    broken[7, 1, 2, 3] = np.inf
    grey = np.broadcast_to(noise[:, :1, :1, :1], noise.shape)
    for name, array in (('same', np.ones_like(noise)), ('grey', grey), ('broken', broken)):
        meta = {'kind': 'latents', 'classes': 0}
        data.save_folder(name, zip(array, [0] * 200), 'float32', (3, 8, 8), meta)
    log(tmp_path / 'run', [1.0], [[1.0]])
    log(tmp_path / 'young', [], [])
    (tmp_path / 'odd').mkdir()
    (tmp_path / 'odd' / 'log.jsonl').write_text('[1]\n')
    for name in ('there.csv', 'there.png'):
        (tmp_path / name).write_text('precious')
    (tmp_path / 'file').write_text('')
    return tmp_path


@pytest.mark.parametrize('argv, words', [
    (['--data', 'shapes8', '--dims', '5'], '200 different images are too few for --dims 5: at least 250'),
    (['--data', 'shapes8', '--images', '80'], 'too few for --dims 2'),
    (['--data', 'shapes8', '--images', '300'], 'holds 200'),
    (['--data', 'same'], '1 different images'),
    (['--data', 'grey'], 'vary in 1 directions on one side of a mask, are they constant'),
    (['--data', 'broken'], 'not finite, first in image 7'),
    (['--data', 'shapes8', 'none.pt'], 'no checkpoint'),
    (['--data', 'broken', '--attention', 'm.png', 'free.pt', '--show', '7'], 'not finite, first in image 7'),
    (['--data', 'shapes8', 'big.pt'], 'big.pt was made for 3 x 16 x 16, and shapes8 holds 3 x 8 x 8'),
    (['--data', 'shapes8', 'four.pt'], 'made for 4 x 8 x 8'),
    (['--data', 'shapes8', 'c.pt'], 'knows 3 classes'),
    (['--data', 'shapes8', 'file'], 'not a checkpoint'),
    (['--data', 'shapes8', 'nan.pt', *FAST], 'this network has diverged'),
    (['--data', 'nowhere'], 'no data folder'),
    (['--data', 'shapes8', '--mask-ratio', '1'], 'between 0 and 1'),
    (['--data', 'shapes8', '--mask-ratio', '0.99'], 'leaves none'),
    (['--data', 'shapes8', '--mask-ratio', '1e-12'], 'masks none'),
    (['--data', 'shapes8', '--sigmas', '0'], 'from 0.001'),
    (['--data', 'shapes8', '--dims', '0'], 'at least 1'),
    (['--data', 'shapes8', '--masks', '1', '--seeds', '1'], 'at least 2'),
    (['--data', 'shapes8', '--out', 'there'], 'there.csv exists already'),
    (['--data', 'shapes8', '--out', 'none/a'], 'its folder does not'),
    (['--data', 'shapes8', '--show', '1'], '--show means nothing without --attention'),
    (['--data', 'shapes8', '--proposition-2', 'x.pt'], 'a checkpoint means nothing to --proposition-2'),
    (['--data', 'shapes8', '--proposition-2', '--out', 'a'], '--out means nothing to --proposition-2'),
    (['--data', 'shapes8', '--attention', 'x.pt'], 'ends in .png'),
    (['--data', 'shapes8', '--attention', 'm.png'], 'needs something to draw'),
    (['--data', 'shapes8', '--attention', 'm.png', 'x.pt', '--dims', '2'], '--dims means nothing to --att'),
    (['--data', 'shapes8', '--attention', 'm.png', 'lost.pt'], 'dit T/2: attention that is not finite'),
    (['--data', 'shapes8', 'wide.pt', '--masks', '7'], 'use --masks 1 and more --seeds'),
    (['--data', 'shapes8', '--attention', 'm.png', 'x.pt', '--show', '200'], 'the images 0 to 199'),
    (['--data', 'shapes8', '--attention', 'none/m.png', 'x.pt'], 'does not: choose another --atten'),
    (['--data', 'shapes8', '--attention', 'there.png', 'nan.pt'], 'there.png exists already'),
    (['--curves', 'run', 'young'], 'ends in .png'),
    (['--curves', 'c.png'], 'needs something to draw'),
    (['--curves', 'c.png', 'nowhere'], 'nowhere/log.jsonl cannot be read'),
    (['--curves', 'c.png', 'run', 'young'], 'young/log.jsonl has no finite losses yet'),
    (['--curves', 'c.png', 'odd'], 'is not the log of a run'),
    (['--curves', 'there.png', 'run'], 'already, or its folder does not: choose another --cur'),
    (['--curves', '/proc/c.png', 'run'], 'cannot write /proc/c.png'),
    (['--data', 'shapes8', '--curves', 'c.png', 'run'], '--data means nothing to --curves'),
    (['--proposition-2', '--curves', 'c.png', 'run'], 'not allowed with'),
    (['--dim', '2'], 'unrecognized arguments')])
def test_refusals_exit_with_2_and_write_nothing(argv, words, place, monkeypatch, capsys):
    before = sorted(place.rglob('*'))
    monkeypatch.setattr('sys.argv', ['mutual_info.py', *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(mutual_info.__file__, run_name='__main__')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and 'Traceback' not in error
    assert sorted(place.rglob('*')) == before
    assert [(place / name).read_text() for name in ('there.csv', 'there.png')] == ['precious'] * 2


def test_a_full_disk_leaves_no_half_of_a_table(tmp_path, monkeypatch):
    class Full(io.TextIOWrapper):
        def write(self, text):
            if self.tell() > 60:
                raise OSError(errno.ENOSPC, 'No space left on device')
            return super().write(text)

    def write():
        found = {('noisy images', 1.0): [(0, 0, 0.5, 0.4), (0, 1, 0.7, 0.6)]}
        mutual_info.write_csv(tmp_path / 'a.csv', found, mutual_info.summarise(found, mutual_info.TRUE),
                              [mutual_info.TRUE] * 2, {'dims': 2}, [])
    with monkeypatch.context() as patch:
        patch.setattr(io, 'TextIOWrapper', Full)
        with pytest.raises(OSError, match='No space'):
            write()
    assert not list(tmp_path.iterdir())
    write()
    assert (tmp_path / 'a.csv').read_text().splitlines()[-1].startswith('noisy images,,1.0,0,1,,0.7,0.6,0.6,')
