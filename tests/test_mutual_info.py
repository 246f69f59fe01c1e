"""mutual_info.py: estimators, Proposition 2, rows and attention a second time in plain code; the command."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import digamma

import data
import model
import mutual_info

SD = 0.5


def config(method='mcdit', **changes):
    """T/2 on 3 x 8 x 8 images: N = 16 tokens, of which half are masked."""
    return model.Config(**dict(method=method, model='T/2', resolution=8, channels=3, classes=10) | changes)


def random_net(cfg):
    """Random numbers in every parameter: the gates that start at zero would hide most mistakes."""
    net, rng = model.Net(cfg), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return net.requires_grad_(False)


@pytest.fixture(autouse=True)
def small_head(monkeypatch):
    monkeypatch.setattr(model, 'PROTOTYPES', 16)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('information') / 'small'
    data.make_shapes(folder, size=8, count=200)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    def save(name, method, **changes):
        cfg = config(method, **changes)
        torch.save({'ema': random_net(cfg).state_dict(), 'step': 1, 'config': dataclasses.asdict(cfg)},
                   tmp_path / name)
        return str(tmp_path / name)
    return save


def pairs(n, d, rho):
    """n pairs of d equally correlated Gaussian coordinates, and their information."""
    x, z = np.random.default_rng(0).standard_normal((2, n, d))
    return x, rho * x + math.sqrt(1 - rho ** 2) * z, -d / 2 * math.log(1 - rho ** 2)


# ---------------------------------------------------------------------------------------------- estimators

@pytest.mark.parametrize('d', [1, 2])
def test_ksg_by_brute_force(d):
    """Algorithm 1 as the paper writes it, in plain loops."""
    n = 150
    x, y, _ = pairs(n, d, 0.6)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean(0)) / y.std(0)
    far = lambda z, i, j: max(abs(z[i][k] - z[j][k]) for k in range(d))
    total = 0.0
    for i in range(n):
        others = [(far(x, i, j), far(y, i, j)) for j in range(n) if j != i]
        epsilon = sorted(max(pair) for pair in others)[3 - 1]
        n_x, n_y = (sum(pair[side] < epsilon for pair in others) for side in (0, 1))
        total += digamma(n_x + 1) + digamma(n_y + 1)
    assert mutual_info.ksg(x, y) == pytest.approx(digamma(3) + digamma(n) - total / n, abs=1e-12)


@pytest.mark.parametrize('d, rho', [(1, 0.3), (1, 0.95), (2, 0.0), (2, 0.7)])
def test_ksg_on_gaussians(d, rho):
    x, y, true = pairs(5000, d, rho)
    found = mutual_info.ksg(x, y)
    assert abs(found - true) <= max(0.05 * true, 0.04)
    assert mutual_info.ksg(y * 1e5 - 3, x * 1e-6 + 2) == pytest.approx(found, abs=1e-9)      # sides and units


def test_ksg_on_ties():
    """Fair bits have ln 2 nats about each other where they are equal, and none where they are independent."""
    bits = np.random.default_rng(0).integers(0, 2, (2, 4000, 1)).astype(float)
    assert mutual_info.ksg(bits[0], bits[0]) == pytest.approx(math.log(2), abs=0.05)
    assert mutual_info.ksg(*bits) == pytest.approx(0, abs=0.05)


# --------------------------------------------------------------------------------------------- calibration

def test_calibration(monkeypatch):
    """2 components and 1,000 images are at most 10 % off at 2 and 4 nats. 8 components miss much more."""
    monkeypatch.setattr(mutual_info, 'CALIBRATIONS', 3)
    monkeypatch.setattr(mutual_info, 'TRUE', (0.0, 2.0, 4.0))
    mean, std = mutual_info.calibrate(2, 1000)
    assert abs(mean[0]) < 0.1 and 1.8 < mean[1] < 2.1 and 3.6 < mean[2] < 4.1
    assert (0 < std).all() and (std < 0.1).all()
    assert mutual_info.calibrate(8, 300)[0][2] < 2.8


def test_expected_error():
    """With known errors: none up to 1 nat, a quarter at 4, unknown above all that was ever estimated."""
    calibrated = np.interp(mutual_info.TRUE, [0, 1, 4, 8], [0, 1, 3, 3.5])
    for value, error in ((-0.02, 0), (0.7, 0), (3.0, 0.25), (3.6, math.inf)):
        assert mutual_info.expected_error(value, calibrated) == pytest.approx(error, abs=1e-12)
    assert mutual_info.relative_error(0.0, 0.02) == pytest.approx(0.2)        # of 0.1 nats: 0 has no 10 %


# -------------------------------------------------------------------------------------------- Proposition 2

def information(S, a):
    """Of Gaussians, from determinants: 1/2 ln |S_xx| |S_yy| / |S|."""
    det = lambda M: np.linalg.slogdet(M)[1]
    return 0.5 * (det(S[:a, :a]) + det(S[a:, a:]) - det(S))


@pytest.mark.parametrize('a, b', [(1, 1), (2, 2), (4, 3), (8, 8)])
def test_proposition_2(a, b):
    """Both equations are identities; their left sides are informations under noise, and fall with it."""
    M, last = np.random.default_rng(a).standard_normal((a + b, a + b)), math.inf
    S = M @ M.T
    assert mutual_info.gaussian(S, a) == pytest.approx(information(S, a), rel=1e-9)
    for sigma in (0.01, 0.1, 1.0, 10.0):
        left_5, right_5, left_6, right_6 = mutual_info.proposition_2(S, a, sigma)
        mixed = S + sigma ** 2 * np.diag([0.0] * a + [1.0] * b)
        assert left_5 == pytest.approx(information(mixed, a), abs=1e-8) == pytest.approx(right_5, abs=1e-8)
        noisy = S + sigma ** 2 * np.eye(a + b)
        assert left_6 == pytest.approx(information(noisy, a), abs=1e-8) == pytest.approx(right_6, abs=1e-8)
        assert left_6 <= left_5 <= information(S, a) and left_6 < last
        last = left_6


# ------------------------------------------------------------------------------------- images, masks, rows

def test_second_copies_are_left_out(shapes, tmp_path):
    array = data.open_data(shapes).array
    rows = ((row, 0) for row in [*array[:60], *array[:30]])
    data.save_folder(tmp_path / 'twice', rows, 'uint8', (3, 8, 8), {'kind': 'images', 'classes': 0})
    dataset = data.open_data(tmp_path / 'twice')
    rows = mutual_info.choose(dataset, 90, 0)
    assert len({row.tobytes() for row in dataset.array[rows]}) == len(rows) == 60
    assert (np.diff(rows) > 0).all()


def test_masks():
    seen = mutual_info.draw_mask(16, 4, 0.75, 0, 0)
    squares = seen.reshape(4, 4, 4, 4).float().mean((1, 3))
    assert squares.sum() == 4 and set(squares.flatten().tolist()) == {0.0, 1.0}
    assert not torch.equal(seen, mutual_info.draw_mask(16, 4, 0.75, 0, 1))


IMAGE_ROWS = ('clean images', 'mixed, clean / noisy', 'noisy images')


def test_rows_of_images(shapes):
    """Each row a second time, with components from eigenvectors; and in the order of Proposition 2."""
    dataset, sigmas = data.open_data(shapes), [0.3, 3.0]
    x0, y, noise = sample = mutual_info.read(dataset, np.arange(200), 0)
    assert torch.equal(x0, torch.from_numpy(dataset.array[:200] / np.float32(127.5) - np.float32(1)))
    assert noise.mean().abs() < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    seen = mutual_info.draw_mask(8, 2, 0.5, 0, 0)
    sides = [mutual_info.principal_components(x0, one, 2) for one in (~seen, seen)]
    found = mutual_info.measure([sample], [[(seen, *sides)]], sigmas, {})

    def component(x, where):
        pixels, values = (z.double().numpy()[:, :, where.numpy()].reshape(200, -1) for z in (x0, x))
        axes = np.linalg.eigh(np.cov(pixels.T))[1][:, :-3:-1]                 # of the two largest eigenvalues
        return values @ axes

    for sigma in sigmas:
        xt, nats = x0 + sigma * noise, []
        for row, x1, x2 in zip(IMAGE_ROWS, (x0, x0, xt), (x0, xt, xt)):
            (seed, mask, value, linear), = found[row, sigma]
            x, y = component(x1, ~seen), component(x2, seen)
            assert (seed, mask, value) == (0, 0, pytest.approx(mutual_info.ksg(x, y), abs=1e-6))
            assert linear == pytest.approx(information(np.cov(np.hstack([x, y]).T), 2), abs=1e-6)
            nats.append(value)
        assert nats[0] >= nats[1] - 0.1 and nats[1] >= nats[2] - 0.1
    assert nats[0] > nats[1] + 0.5 and nats[1] > nats[2] + 0.1                # at sigma 3


# ------------------------------------------------------------------------------------ what a network makes

@pytest.mark.parametrize('method', [m for m in model.METHODS if m != 'dit'])
def test_masked_path(method, monkeypatch):
    """The denoiser of each loss, with what fills the masked positions written out; in batches."""
    cfg = config(method)
    net, rng = random_net(cfg), torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=rng) / 2
    y, seen, sigma = torch.arange(4), mutual_info.draw_mask(8, 2, 0.5, 0, 0), 0.7
    xt = x0 + sigma * noise
    monkeypatch.setattr(mutual_info, 'BATCH', 3)

    c_in, c_skip = 1 / math.hypot(sigma, SD), SD ** 2 / (sigma ** 2 + SD ** 2)
    c_out, c_noise = sigma * SD * c_in, torch.full((4,), math.log(sigma) / 4)
    tokens = [(i, j) for i in range(4) for j in range(4)]                     # row by row
    patches = lambda x: torch.stack([x[:, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].permute(0, 2, 3, 1).flatten(1)
                                     for i, j in tokens], 1)
    visible = torch.tensor([n for n, (i, j) in enumerate(tokens) if seen[2 * i, 2 * j]]).expand(4, -1)
    clean = model.METHODS[method].fill == 'clean'
    fill = patches(x0 / SD) if clean else patches(c_in * xt)                  # of sddit; others ignore it
    x_in = torch.where(seen, xt, x0) if clean else xt
    F, *_ = net(patches(c_in * xt), c_noise, y, visible, fill)
    expected = c_skip * patches(x_in) + c_out * F
    masked = mutual_info.denoised(net, cfg, x0, xt, sigma, y, seen)
    assert torch.allclose(patches(masked), expected, atol=1e-4)

    F, *_ = net(patches(c_in * xt), c_noise, y)
    inference = mutual_info.denoised(net, cfg, x0, xt, sigma, y)
    assert torch.allclose(patches(inference), c_skip * patches(xt) + c_out * F, atol=1e-4)
    assert (masked - inference).abs().max() > 1e-2


def test_who_has_a_masked_path():
    assert [m for m in model.METHODS if not mutual_info.has_masked_path(config(m))] == ['dit']
    for changes in ({'stage': 'tune'}, {'tokens': 'noisy'}, {'tokens': 'clean'}):
        assert not mutual_info.has_masked_path(config('mcdit', **changes))


# ------------------------------------------------------------------------------------------ attention maps

@pytest.mark.parametrize('method', ['dit', 'mdt', 'sddit'])
def test_attention_received(method):
    """Head by head. With the values, the same weights give the block's own output."""
    cfg, rng = config(method), torch.Generator().manual_seed(2)
    net, x, y = random_net(cfg), torch.randn(2, 3, 8, 8, generator=rng), torch.arange(2)
    block, inputs = net.encoder.blocks[-1], []
    block.qkv.register_forward_hook(lambda layer, tokens, qkv: inputs.append(tokens[0]))
    maps = mutual_info.attention_received(net, cfg, x, 1.0, y)
    (_, width, heads), at = model.SIZES['T'], [(i, j) for i in range(4) for j in range(4)]
    q, k, v = (part.split(width // heads, 2) for part in block.qkv(inputs[0]).split(width, 2))
    received, outputs = 0, []
    for h in range(heads):
        logits = q[h] @ k[h].mT / math.sqrt(width // heads)
        if method == 'mdt':
            bias = block.bias[:, h]
            logits += torch.tensor([[bias[7 * (a - c + 3) + b - d + 3] for c, d in at] for a, b in at])
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        outputs.append(weights @ v[h])
        received = received + weights.mean(1)[:, -16:] / heads                # SD-DiT: without [CLS]
    index = model.relative_positions(4, 'cpu') if method == 'mdt' else None
    assert torch.allclose(block.proj(torch.cat(outputs, 2)), block.attention(inputs[0], index), atol=1e-4)
    assert torch.allclose(maps.flatten(1), 16 * received, atol=1e-4)


def test_attention_is_drawn_on_one_scale(checkpoint, shapes, tmp_path, monkeypatch):
    """A map of 1/N everywhere, and one of 3/N: dark red beside white, the end of the colour bar."""
    strengths = {'dit': 1.0, 'mdt': 3.0}
    monkeypatch.setattr(mutual_info, 'attention_received',
                        lambda net, cfg, *_: torch.full((1, 4, 4), strengths[cfg.method]))
    mutual_info.main(['--data', str(shapes), '--attention', str(tmp_path / 'm.png'), '--sigmas', '0.001',
                      '--show', '7', '--', checkpoint('d.pt', 'dit'), checkpoint('m.pt', 'mdt')])
    sheet = np.asarray(Image.open(tmp_path / 'm.png')).astype(int)
    left = 10 + int(mutual_info.ImageFont.load_default(12).getlength('image 7'))
    tile = lambda row: sheet[44 + 102 * row:44 + 102 * row + 96, left:left + 96]
    image = tile(0)[6::12, 6::12].transpose(2, 0, 1)
    assert abs(image - data.open_data(shapes).array[7]).max() <= 1
    assert (tile(1) == (255, 0, 0)).all() and (tile(2) == 255).all()
    bar = sheet[44 + 3 * 102 + 6, left:left + 480]
    assert bar[0].sum() == 0 and (bar[-1] == 255).all() and (np.diff(bar.sum(1)) >= 0).all()


# ------------------------------------------------------------------------------------------------- command

def test_command(checkpoint, shapes, tmp_path, capsys, monkeypatch):
    """Two patch sizes, a tuned network, one method twice: table, CSV and chart agree."""
    monkeypatch.setattr(mutual_info, 'CALIBRATIONS', 2)
    paths = [checkpoint('a.pt', 'dit'), checkpoint('mdt.pt', 'mdt'), checkpoint('free.pt', 'mdt', classes=0),
             checkpoint('four.pt', 'mcdit', model='T/4'), checkpoint('tuned.pt', 'mcdit', stage='tune')]
    mutual_info.main(['--data', str(shapes), '--images', '55', '--dims', '1', '--masks', '1',
                      '--sigmas', '3', '0.3', '--out', str(tmp_path / 'a'), *paths])
    screen = capsys.readouterr().out.splitlines()
    with open(tmp_path / 'a.csv') as file:
        lines = list(csv.DictReader(file))

    names = {*IMAGE_ROWS, 'dit T/2, inference path', 'mcdit T/2, tuned, inference path',
             *(f'{name}, {way} path' for name in ('mdt T/2', 'mcdit T/4', f'mdt T/2, {paths[2]}')
               for way in ('masked', 'inference'))}
    assert {line['row'] for line in lines} == names and len(lines) == len(names) * 2 * 2
    assert [line['checkpoint'] for line in lines if line['row'].startswith('mcdit T/4')] == 8 * [paths[3]]
    for name in names:
        printed = next(line for line in screen if line.startswith(f'{name}  '))
        for sigma in ('0.3', '3.0'):
            same = [line for line in lines if (line['row'], line['sigma']) == (name, sigma)]
            a, b = (float(line['ksg']) for line in same)
            mean, std = float(same[0]['mean']), float(same[0]['std'])
            assert (mean, std) == (pytest.approx((a + b) / 2), pytest.approx(abs(a - b) / math.sqrt(2)))
            assert f'{mean:5.2f} +-{std:5.2f}' in printed and same[0]['square'] == '4'
    assert sum('no masked path' in line for line in screen) == 2
    colours = set(map(tuple, np.asarray(Image.open(tmp_path / 'a.png')).reshape(-1, 3).tolist()))
    assert {(0, 0, 0), data.COLOURS[0], data.COLOURS[2], data.COLOURS[4]} <= colours


def test_proposition_2_on_the_screen(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mutual_info.main(['--data', str(shapes), '--proposition-2', '--sigmas', '2', '0.5'])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[2:4]] == ['0.5', '2'] and not list(tmp_path.iterdir())
    for _, left_5, right_5, left_6, right_6, difference in lines[2:4]:
        assert left_5 == right_5 and left_6 == right_6 and float(difference) < 1e-8
