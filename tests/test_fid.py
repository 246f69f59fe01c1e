"""fid.py: every piece against a closed form or a slow, plain second implementation, then the command.

No pretrained weights are needed: the network here is random, in the real one's names, shapes and file layout.
"""

import hashlib
import math
import os
import pathlib
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch.nn import functional

import fid

torch.set_num_threads(1)


def generator(seed=0):
    return np.random.default_rng(seed)


def smooth_images(n, height=24, width=32, seed=0):
    """Random images uint8 (n, height, width, 3), no two alike."""
    coarse = torch.from_numpy(generator(seed).uniform(0, 255, (n, 3, 4, 4)))
    smooth = functional.interpolate(coarse, (height, width), mode='bicubic').clamp(0, 255)
    return smooth.byte().permute(0, 2, 3, 1).numpy()


def relative(found, want):
    return np.abs(np.asarray(found) - np.asarray(want)).max() / np.abs(np.asarray(want)).max()


@pytest.fixture(scope='module')
def state():
    """A state dict of the network: He's scale, and batch norms that do something."""
    rng, state = torch.Generator().manual_seed(0), {}
    for name, value in fid.Inception().state_dict().items():
        normal, uniform = (draw(value.shape, generator=rng) for draw in (torch.randn, torch.rand))
        state[name] = (value if name.endswith('tracked')
                       else normal * math.sqrt(2 / value[0].numel()) if name.endswith('conv.weight')
                       else uniform + 0.5 if name.endswith(('bn.weight', 'running_var'))
                       else normal / 20 if name == 'fc.weight' else normal / 2)
    return state


@pytest.fixture(scope='module')
def weights(state, tmp_path_factory):
    """(path, SHA-256) of a random network, in the published file's old format, without optional counters."""
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    needed = {name: value for name, value in state.items() if not name.endswith('tracked')}
    torch.save(needed, path, _use_new_zipfile_serialization=False)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope='module')
def net(weights):
    return fid.load_weights(*weights)


# ------------------------------------------------------------------------------------------- preprocessing

def tf1_resize(image, size=299):
    """One image, pixel by pixel, as TensorFlow's kernel does without align_corners: float32 all the way."""
    f = np.float32

    def neighbours(n):
        at = [f(i) * (f(n) / f(size)) for i in range(size)]
        return [(math.floor(a), min(math.ceil(a), n - 1), a - f(math.floor(a))) for a in at]

    image, rows, columns = image.astype(f), neighbours(image.shape[0]), neighbours(image.shape[1])
    out = np.empty((size, size, image.shape[2]), f)
    for y, (top, bottom, dy) in enumerate(rows):
        for x, (left, right, dx) in enumerate(columns):
            above = image[top, left] + (image[top, right] - image[top, left]) * dx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[y, x] = above + (below - above) * dy
    return out


@pytest.mark.parametrize('height, width', [(64, 100), (512, 300)])
def test_resize_is_bit_equal_to_tensorflow_1(height, width):
    image = generator().integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = fid.resize(torch.from_numpy(image[None]).float())[0].numpy()
    assert found.dtype == np.float32 and np.array_equal(found, tf1_resize(image))


def test_range_is_minus_one_to_127_128ths():
    x = fid.preprocess(np.arange(256, dtype=np.uint8)[::15].repeat(3 * 4).reshape(18, 2, 2, 3))
    assert x.shape == (18, 3, 299, 299) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x[:, 0, 7, 9], (torch.arange(256.0)[::15] - 128) / 128)


# ------------------------------------------------------------------------------------------------- network

def test_names_and_shapes_are_those_of_the_published_file():
    """566 tensors; the hash is of the list `name shape` of pytorch-fid's network, in its order."""
    state = fid.Inception().state_dict()
    lines = [f'{name} {list(value.shape)}' for name, value in state.items()]
    assert len(lines) == 566
    assert sum(value.numel() for name, value in state.items() if not name.endswith('tracked')) == 23_885_392
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest() == (
        '8ca497103391675d239b6cbe936a080934f935dfd57b70343674200035f2c5e8')


def plain_inception(state, x):
    """The network once more, from its tensors, in float64: pools by shifting, batch norm by its formula.

    Returns pooled features, spatial features, logits.
    """
    state = {name: value.double() for name, value in state.items()}

    def conv(x, name, stride=1, same=True):
        w = state[f'{name}.conv.weight']
        x = functional.conv2d(x, w, stride=stride, padding=[k // 2 if same else 0 for k in w.shape[2:]])
        gamma, beta, mean, var = (state[f'{name}.bn.{part}'][None, :, None, None]
                                  for part in ('weight', 'bias', 'running_mean', 'running_var'))
        return ((x - mean) / (var + 0.001).sqrt() * gamma + beta).clamp(min=0)

    def chain(x, block, *names, stride=1):
        for name in names[:-1]:
            x = conv(x, f'{block}.{name}')
        return conv(x, f'{block}.{names[-1]}', stride, same=stride == 1)

    def shifts(x, outside):
        """The nine neighbours of every pixel: (9, B, C, H, W)."""
        H, W = x.shape[2:]
        x = functional.pad(x, (1, 1, 1, 1), value=outside)
        return torch.stack([x[:, :, i:i + H, j:j + W] for i in range(3) for j in range(3)])

    def mean_of_those_inside(x):
        return shifts(x, 0.0).sum(0) / shifts(torch.ones_like(x[:1, :1]), 0.0).sum(0)

    def largest_of_9(x):
        return shifts(x, -math.inf).amax(0)

    def halved(x):
        return largest_of_9(x)[:, :, 1:-1:2, 1:-1:2]

    def numbered(stem, last):
        return [f'{stem}_{i}' for i in range(1, last + 1)]

    x = conv(conv(conv(x, 'Conv2d_1a_3x3', 2, False), 'Conv2d_2a_3x3', 1, False), 'Conv2d_2b_3x3')
    x = halved(conv(conv(halved(x), 'Conv2d_3b_1x1'), 'Conv2d_4a_3x3', 1, False))
    for block in ('Mixed_5b', 'Mixed_5c', 'Mixed_5d'):
        x = torch.cat([chain(x, block, 'branch1x1'),
                       chain(x, block, *numbered('branch5x5', 2)),
                       chain(x, block, *numbered('branch3x3dbl', 3)),
                       chain(mean_of_those_inside(x), block, 'branch_pool')], 1)
    x = torch.cat([chain(x, 'Mixed_6a', 'branch3x3', stride=2),
                   chain(x, 'Mixed_6a', *numbered('branch3x3dbl', 3), stride=2),
                   halved(x)], 1)
    for block in ('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'):
        first = chain(x, block, 'branch1x1')
        if block == 'Mixed_6d':
            spatial = np.stack([first[:, c, h, w] for h in range(17) for w in range(17) for c in range(7)], 1)
        x = torch.cat([first,
                       chain(x, block, *numbered('branch7x7', 3)),
                       chain(x, block, *numbered('branch7x7dbl', 5)),
                       chain(mean_of_those_inside(x), block, 'branch_pool')], 1)
    x = torch.cat([chain(x, 'Mixed_7a', *numbered('branch3x3', 2), stride=2),
                   chain(x, 'Mixed_7a', *numbered('branch7x7x3', 4), stride=2),
                   halved(x)], 1)
    for block, pool in (('Mixed_7b', mean_of_those_inside), ('Mixed_7c', largest_of_9)):
        one, two = chain(x, block, 'branch3x3_1'), chain(x, block, *numbered('branch3x3dbl', 2))
        x = torch.cat([chain(x, block, 'branch1x1'),
                       chain(one, block, 'branch3x3_2a'), chain(one, block, 'branch3x3_2b'),
                       chain(two, block, 'branch3x3dbl_3a'), chain(two, block, 'branch3x3dbl_3b'),
                       chain(pool(x), block, 'branch_pool')], 1)
    pool = x.sum((2, 3)) / 64
    return pool.numpy(), spatial, pool.numpy() @ state['fc.weight'].numpy().T


def test_features_and_logits_against_a_second_implementation(net, state):
    """The logits have no bias, though the file has one. An image alone gives what it gives beside another."""
    x = fid.preprocess(smooth_images(2))
    plain_pool, plain_spatial, plain_logits = plain_inception(state, x.double())
    with torch.no_grad():
        (pool, spatial), (alone, _) = net(x), net(x[:1])
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and pool.dtype == torch.float32
    assert (pool > 0).double().mean() > 0.5 and (spatial > 0).double().mean() > 0.2          # alive
    assert relative(pool, plain_pool) < 1e-5 and relative(spatial, plain_spatial) < 1e-5
    assert relative(alone, plain_pool[:1]) < 1e-5 and state['fc.bias'].abs().max() > 0.5
    assert relative(net.logits(torch.from_numpy(plain_pool).float()), plain_logits) < 1e-5
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == 'ieee'


# ------------------------------------------------------------------------------------------------- weights

class Harm:
    def __reduce__(self):
        return os.mkdir, ('harm',)


@pytest.mark.parametrize('spoiled, words', [
    ({'fc.bias': torch.full((1008,), math.nan)}, 'not finite, in fc.bias'),
    ({'module.fc.bias': torch.zeros(1008)}, 'Unexpected key(s) in state_dict: "module.fc.bias"'),
    ({'fc.bias': Harm()}, 'cannot be read as weights')])
def test_other_weights_are_rejected(spoiled, words, state, tmp_path, monkeypatch):
    """NaN: hours later the eigenvalues would not converge. Harm: a file must not run code."""
    monkeypatch.chdir(tmp_path)
    torch.save({name: torch.zeros(()).expand(x.shape) for name, x in state.items()} | spoiled, 'x.pth')
    with pytest.raises(fid.BadInput) as error:
        fid.load_weights('x.pth', hashlib.sha256(pathlib.Path('x.pth').read_bytes()).hexdigest())
    assert words in str(error.value) and 'x.pth' in str(error.value) and '\n' not in str(error.value)
    assert not pathlib.Path('harm').exists()


def test_weights_are_downloaded_or_the_sentence_says_what_to_put_where(weights, tmp_path, monkeypatch):
    path = tmp_path / 'hub' / 'checkpoints' / fid.NAME
    monkeypatch.setattr(fid, 'URL', 'file:///nowhere')                       # as where there is no network
    with pytest.raises(fid.BadInput) as error:
        fid.download_weights(path)
    for words in ('file:///nowhere', '95,628,359 bytes', fid.SHA256, str(path), '--weights'):
        assert words in str(error.value)
    monkeypatch.setattr(fid, 'URL', weights[0].as_uri())
    with pytest.raises(fid.BadInput, match='invalid hash'):                  # the address gives another file
        fid.download_weights(path)
    assert not list(path.parent.iterdir())
    monkeypatch.setattr(fid, 'SHA256', weights[1])
    fid.download_weights(path)
    assert path.read_bytes() == weights[0].read_bytes()


# ---------------------------------------------------------------------------------------- Frechet distance

def features(n, D, seed=0):
    """Correlated rows float32 (n, D) with an offset."""
    rng = generator(seed)
    rows = rng.standard_normal((n, D)) @ rng.standard_normal((D, D)) / math.sqrt(D)
    return (rows + 3 * rng.standard_normal(D)).astype(np.float32)


def spd(values, seed=0):
    """A symmetric matrix with these eigenvalues; the same seed gives the same eigenvectors."""
    q, _ = np.linalg.qr(generator(seed).standard_normal((len(values), len(values))))
    return torch.from_numpy(q * values @ q.T)


def distance(mu, S, nu, T):
    mu, nu = (torch.as_tensor(mean) for mean in (mu, nu))
    return fid.frechet_distance(fid.Gaussian(mu, S), fid.Gaussian(nu, T))


def test_moments_are_numpys_and_add_up():
    x = features(3000, 20)
    found = fid.gaussian(sum(fid.moments(rows) for rows in torch.from_numpy(x).split(7)))
    assert found.n == 3000 and relative(found.mean, x.astype(np.float64).mean(0)) < 1e-12
    assert relative(found.cov, np.cov(x.astype(np.float64), rowvar=False)) < 1e-12


def test_frechet_distance_in_closed_form():
    """Of S1 and S2 = S1^-1/2 M^2 S1^-1/2, which do not commute: tr (S1 S2)^1/2 = tr M."""
    rng = generator()
    mu, nu = rng.standard_normal((2, 200))
    a, m = rng.uniform(0.5, 2, 200), rng.uniform(0.5, 2, 200)
    half, M = spd(a**-0.5), spd(m, seed=1)
    second = half @ M @ M @ half
    want = ((mu - nu) ** 2).sum() + a.sum() + second.trace().item() - 2 * m.sum()
    assert distance(mu, spd(a), nu, second) == pytest.approx(want, rel=1e-8)
    assert distance(mu, spd(a), mu, spd(a)) == pytest.approx(0, abs=1e-8 * a.sum())


@pytest.mark.parametrize('n, m', [(500, 400), (30, 500), (500, 30), (40, 30)])
def test_frechet_from_features_against_the_roots_of_the_data(n, m):
    """tr (S T)^1/2 is the sum of the singular values of A B' for centred rows A'A = S and B'B = T: without a
    covariance and its eigenvalues it is exact for few rows too, where a noise of 1e-16 has roots of 1e-8."""
    x, y = features(n, 60).astype(np.float64), features(m, 60, 1).astype(np.float64)
    A, B = (x - x.mean(0)) / math.sqrt(n - 1), (y - y.mean(0)) / math.sqrt(m - 1)
    d = x.mean(0) - y.mean(0)
    want = d @ d + (A**2).sum() + (B**2).sum() - 2 * scipy.linalg.svdvals(A @ B.T).sum()
    assert fid.frechet_from_features(x, y) == pytest.approx(want, rel=1e-8)
    assert fid.frechet_from_features(x, x) < 1e-6


def test_a_negative_distance_is_an_error_beyond_rounding():
    """A wrong covariance once printed FID 0.0000, the best there is."""
    zero, eye = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    with pytest.raises(fid.BadInput, match='a covariance is wrong'):
        distance(zero, -eye, zero, -eye)


def test_stored_covariances_must_be_symmetric_and_positive_semidefinite():
    def stored(cov, dtype=np.float64):
        return fid.stored_gaussian('x', np.zeros(60), np.asarray(cov).astype(dtype), 60)

    few = np.cov(features(30, 60).astype(np.float64), rowvar=False)           # singular, and rightly so
    assert relative(stored(few).cov, few) == 0 and relative(stored(few, np.float32).cov, few) < 1e-6
    assert stored(np.zeros((60, 60))).n == math.inf
    for wrong, words in ((-few, 'semidefinite'), (few - 0.01 * np.eye(60), 'semidefinite'),
                         (np.tril(few), 'symmetric'), (few * np.nan, 'not finite'), (few[:9], 'expected')):
        with pytest.raises(fid.BadInput, match=words):
            stored(wrong)


# ----------------------------------------------------------------------------------------- Inception Score

def certain(classes, of=1008):
    """Logits of a network sure of `classes`: other classes' probabilities are zero in any precision."""
    return functional.one_hot(torch.as_tensor(classes), of) * 2000.0


def test_known_inception_scores():
    assert fid.inception_score(certain(np.arange(100) % 10)) == pytest.approx(10, rel=1e-12)
    assert fid.inception_score(torch.randn(1, 1008).repeat(9, 1)) == pytest.approx(1, abs=1e-12)
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    want = math.exp(np.mean([sum(row * np.log(row / p.mean(0))) for row in p]))
    assert fid.inception_score(torch.from_numpy(np.log(p) + 5)) == pytest.approx(want, rel=1e-12)


def test_splits_are_consecutive_and_a_short_one_weighs_as_much():
    by_class = certain(np.arange(10_000) // 5000, of=8)                       # class 0, then class 1
    assert fid.inception_score(by_class) == pytest.approx(1, rel=1e-12)
    assert fid.inception_score(certain([0, 1, 2, 3, 5], of=8), split=4) == pytest.approx((4 + 1) / 2)


# ---------------------------------------------------------------------------------------- precision, recall

def plain_precision_recall(real, fake, k, distance):
    """Pair by pair; the first argument of `distance` is the real one."""
    def radii(rows):
        return [sorted(distance(a, b) for b in rows)[k] for a in rows]

    pairs, reals, fakes = [[distance(a, b) for b in fake] for a in real], range(len(real)), range(len(fake))
    real_radii, fake_radii = radii(real), radii(fake)
    return (np.mean([any(pairs[i][j] <= real_radii[i] for i in reals) for j in fakes]),
            np.mean([any(pairs[i][j] <= fake_radii[j] for j in fakes) for i in reals]))


def half_distance(a, b):
    """One pair, rounded to float16 after each step; the sums are float32, exact for `grid`'s features."""
    h = np.float16
    a, b = a.astype(h), b.astype(h)
    norm = lambda x: h((x * x).astype(np.float32).sum())
    product = h((a.astype(np.float32) * b.astype(np.float32)).sum())
    return max(np.float32(h(h(norm(a) - h(2) * product) + norm(b))), np.float32(0))


def grid(n, D, seed=0, levels=64):
    """Features in steps of 1/16, so that float32 sums are exact in any order; |f|^2 about 480 at D = 100."""
    return (generator(seed).integers(0, levels, (n, D)) / 16).astype(np.float32)


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_three_neighbours_and_a_closed_ball():
    """Real 0 has neighbours at 1, 2, 4: a fake at -4 is on the rim of its ball at k = 3, outside at k = 2."""
    real, fake = column(0, 1, 2, 4), column(-4, 1000, 2000, 3000)
    assert fid.precision_recall(real, fake, mode='exact')[0] == 1 / 4
    assert fid.precision_recall(real, fake, k=2, mode='exact')[0] == 0
    assert fid.precision_recall(real, column(-4.001, 1000, 2000, 3000), mode='exact')[0] == 0


@pytest.mark.parametrize('mode', ['exact', 'adm'])
def test_precision_and_recall_pair_by_pair(mode):
    real, fake = grid(40, 100), grid(33, 100, 1, 60)
    plain = half_distance if mode == 'adm' else lambda a, b: ((a.astype(np.float64) - b) ** 2).sum()
    for k in (3, 5):
        want = plain_precision_recall(real, fake, k, plain)
        assert 0 < want[0] < 1 and 0 < want[1] < 1
        for block in (1, 7, 2000):
            assert fid.precision_recall(real, fake, k, mode, block) == pytest.approx(want, abs=1e-15)


def test_float16_distances_bit_for_bit():
    a, b = grid(20, 100), grid(25, 100, 1)
    want = np.array([[half_distance(u, v) for v in b] for u in a])
    assert np.array_equal(fid.adm_distances(torch.from_numpy(a), torch.from_numpy(b)).numpy(), want)


def test_float16_overflow_is_computed_again_in_float32():
    real, fake = grid(30, 20) * 100, grid(30, 20, 1) * 100                    # |f|^2 about 1e6, above 65504
    assert ((real**2).sum(1) > 65504).all()
    assert fid.precision_recall(real, fake, mode='adm') == fid.precision_recall(real, fake, mode='exact')


def test_exact_mode_recognises_copies():
    x = features(30, 64)
    copies = np.repeat(x, 5, 0)                                               # radii of zero
    assert fid.precision_recall(copies, x, mode='exact')[0] == 1
    assert fid.precision_recall(copies, x + 0.01, mode='exact')[0] == 0


# -------------------------------------------------------------------------------------------------- inputs

def write(kind, path, images):
    if kind == 'npz':
        np.savez(path, arr_0=images, arr_1=np.arange(len(images)))
    elif kind == 'compressed':
        np.savez_compressed(path, images)
    elif kind == 'png':
        (path / 'b').mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(path / ('b' if i > 3 else '') / f'{i:06d}.png')
        (path / 'readme.txt').write_text('not an image')
    else:
        path.mkdir(parents=True)
        np.save(path / 'data.npy', images.transpose(0, 3, 1, 2))
        (path / 'meta.json').write_text('{"kind": "images", "classes": 0}')
    return path


@pytest.mark.parametrize('kind', ['npz', 'compressed', 'png', 'data'])
def test_every_input_gives_the_same_pixels_in_any_portions(kind, tmp_path):
    images = smooth_images(11)
    side = fid.open_side(write(kind, tmp_path / ('x.npz' if kind in ('npz', 'compressed') else 'x'), images))
    skipped = ', 1 other files skipped (.txt)' * (kind == 'png')
    assert (side.count, str(side)) == (11, f'{side.path}: 11 images of 32 x 24{skipped}')
    for i, j in ((0, 11), (0, 4), (4, 8), (9, 11), (2, 3)):                  # forwards and back
        assert np.array_equal(side.read(i, j), images[i:j])


def test_images_that_are_not_rgb_are_converted(tmp_path):
    image = Image.fromarray(smooth_images(1)[0])
    for i, mode in enumerate(('RGB', 'L', 'LA', 'RGBA', 'P', '1')):
        image.convert('L' if mode == 'LA' else mode).convert(mode).save(tmp_path / f'{i}.png')
    image.save(tmp_path / '6.JPG', quality=95)
    side = fid.open_side(tmp_path)
    images, grey = side.read(0, 7), np.asarray(image.convert('L'))
    assert all(np.array_equal(images[1][..., c], grey) for c in range(3))
    assert np.array_equal(images[3], images[0]) and len(images) == side.count == 7
    side = fid.open_side(write('data', tmp_path / 'grey', smooth_images(3)[..., :1]))
    assert side.read(0, 3).shape == (3, 24, 32, 3)


def test_damage_is_found_while_reading(tmp_path):
    """An image cut in the middle, and pixels whose checksum is wrong: the headers are fine."""
    write('png', tmp_path / 'cut', smooth_images(6))
    content = (tmp_path / 'cut' / 'b' / '000005.png').read_bytes()
    (tmp_path / 'cut' / 'b' / '000005.png').write_bytes(content[:len(content) // 2])
    np.savez(tmp_path / 'flipped.npz', arr_0=smooth_images(40, 64, 64))
    content = bytearray((tmp_path / 'flipped.npz').read_bytes())
    content[400_000] ^= 255
    (tmp_path / 'flipped.npz').write_bytes(content)
    for name, count, words in (('cut', 6, '000005.png cannot be read'), ('flipped.npz', 40, 'is damaged')):
        with pytest.raises(fid.BadInput, match=words):
            fid.open_side(tmp_path / name).read(0, count)


# ---------------------------------------------------------------------------------------------- evaluation

def evaluate(*argv, capsys):
    """{first word of a printed line: the rest} of `python fid.py ARGV`."""
    capsys.readouterr()
    fid.main([str(word) for word in argv])
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_the_whole_evaluation_is_its_pieces(net, weights, tmp_path, capsys):
    """Two batches on one side, one on the other; and the saved statistics stand for their images."""
    write('npz', tmp_path / 'real.npz', smooth_images(9))
    write('png', tmp_path / 'fake', smooth_images(5, seed=1))
    found = evaluate(tmp_path / 'real.npz', tmp_path / 'fake', '--save-stats', tmp_path / 'stats.npz',
                     '--weights', weights[0], '--sha256', weights[1], capsys=capsys)
    with torch.no_grad():
        real, fake = net(fid.preprocess(smooth_images(9))), net(fid.preprocess(smooth_images(5, seed=1)))
    stored = fid.open_side(tmp_path / 'stats.npz')
    for i, name in enumerate(('FID', 'sFID')):
        p, q = np.float64(real[i]), np.float64(fake[i])
        d, S, T = p.mean(0) - q.mean(0), p - p.mean(0), q - q.mean(0)
        root = scipy.linalg.svdvals(S @ T.T).sum() / math.sqrt(8 * 4)
        want = d @ d + (S**2).sum() / 8 + (T**2).sum() / 4 - 2 * root
        assert float(found[name]) == pytest.approx(want, rel=1e-5)
        assert relative(stored.stored[name].mean, p.mean(0)) < 1e-5
        assert relative(stored.stored[name].cov, np.cov(p, rowvar=False)) < 1e-5
    score = fid.inception_score(net.logits(fake[0]))
    assert float(found['Inception'].removeprefix('Score')) == pytest.approx(score, abs=1e-4)
    found = float(found['precision']), float(found['recall'])
    assert found == pytest.approx(fid.precision_recall(real[0], fake[0]), abs=1e-4)


class Linear(torch.nn.Module):
    """In place of the network: linear maps of 4 x 4 images, so that thousands take a second."""

    def __init__(self):
        super().__init__()
        self.fc, rng = torch.nn.Linear(2048, 8), torch.Generator().manual_seed(0)
        self.pool, self.spatial = (torch.randn(48, n, generator=rng) for n in (2048, 2023))
        self.logits = lambda pool: pool[:, :8]

    def forward(self, x):
        return x.flatten(1) @ self.pool, x.flatten(1) @ self.spatial


@pytest.fixture
def linear(tmp_path, monkeypatch):
    """(network, path of 37 images) with which an evaluation takes no time."""
    net, path = Linear(), tmp_path / 'x.npz'
    np.savez(path, arr_0=generator().integers(0, 256, (37, 4, 4, 3), dtype=np.uint8))
    monkeypatch.setattr(fid, 'preprocess', lambda images, device: torch.from_numpy(np.array(images)).float())
    monkeypatch.setattr(fid, 'download_weights', lambda path: None)
    monkeypatch.setattr(fid, 'load_weights', lambda path, sha256: net)
    monkeypatch.setattr(fid, 'frechet_distance', lambda a, b: 1.25)
    return net, path


def test_ranks_divide_the_images_and_add_up(linear, monkeypatch):
    """Three ranks, one after another: their parts are the file in its order, their sums those of one rank."""
    net, path = linear
    parts, sums = [], []
    alone, rows = fid.extract(net, fid.open_side(path), keep=True)
    dist = types.SimpleNamespace(gather_object=lambda rows, out: out or parts.append(rows),
                                 all_reduce=lambda rows: sums.append(rows.clone()),
                                 all_gather_object=lambda out, mine: None)
    monkeypatch.setattr(fid, 'dist', dist)
    for rank in (1, 2, 0):
        monkeypatch.setattr(fid, 'ranks', lambda rank=rank: (rank, 3))
        if rank == 0:
            dist.gather_object = lambda rows, out: out.__setitem__(slice(None), [rows, *parts])
        _, found = fid.extract(net, fid.open_side(path), keep=True)
    assert torch.equal(found, rows) and found.shape == (37, 2048)
    assert [len(part) for part in parts] == [16, 13]                          # whole batches of 8, 5 are left
    for i, name in enumerate(('FID', 'sFID')):
        total = fid.gaussian(sum(sums[i::2]))
        assert relative(total.cov, alone[name].cov) < 1e-12 and total.n == alone[name].n == 37


def test_an_error_of_one_rank_is_the_error_of_all(monkeypatch):
    monkeypatch.setattr(fid, 'ranks', lambda: (0, 3))
    def gather(out, mine):
        out[:] = mine, 'b', 'c'

    monkeypatch.setattr(fid.dist, 'all_gather_object', gather)
    for mine, want in ((None, 'b'), ('a', 'a')):
        with pytest.raises(fid.BadInput, match=want), fid.one_error_for_all_ranks():
            fid.check(mine is None, mine)


def test_features_that_are_not_finite_are_rejected(linear):
    net, path = linear
    net.spatial[3, 5] = math.nan
    with pytest.raises(fid.BadInput, match='x.npz: the network computes features that are not finite'):
        fid.extract(net, fid.open_side(path), keep=True)


def test_what_the_files_do_not_allow_is_left_out_and_named(linear, capsys):
    """Statistics alone, without those for sFID: no images are there, so neither precision nor recall."""
    np.savez(linear[1].parent / 'stats.npz', mu=np.zeros(2048), sigma=np.eye(2048))
    found = evaluate(linear[1].parent / 'stats.npz', linear[1], capsys=capsys)
    assert found['reference'].endswith('stats.npz: stored statistics for FID') and found['FID'] == '1.2500'
    assert found['sFID'] == 'left out: needs images, or mu_s and sigma_s, on both sides'
    assert found['precision'] == found['recall'] == 'left out: needs 4 images on both sides'


STORED = {'FID': fid.Gaussian(torch.zeros(2).double(), torch.eye(2).double())}


@pytest.mark.parametrize('ref, gen, words', [
    (fid.Side('a', stored=STORED), fid.Side('b', 50_000), ''),
    (fid.Side('a', 50_000), fid.Side('b', 50_000, stored=STORED), 'are the sides swapped?'),
    (fid.Side('a', 60_000, '32 x 24'), fid.Side('b', 50_000, '8 x 8'), 'sizes differ, 32 x 24 and 8 x 8'),
    (fid.Side('a', 8), fid.Side('b', 50_000), '8 images in a: fewer raise FID')])
def test_notes(ref, gen, words, monkeypatch, capsys):
    monkeypatch.setattr(fid, 'precision_recall', lambda *pools, mode: (1, 1))
    for order, by_class in ((torch.arange(6000) // 1200, True), (torch.arange(6000) % 5, False)):
        net = types.SimpleNamespace(logits=lambda pool: certain(order, of=8))
        fid.measure(net, (ref, gen), [STORED, STORED], [None, None], 'adm')
        notes = capsys.readouterr().err
        assert words in notes and notes.count('note: ') == bool(words) + by_class
        assert ('b looks sorted by class' in notes) == by_class


# ------------------------------------------------------------------------------------------------- command

def test_rank_0_alone_prints_the_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['fid.py', 'nowhere', 'x'])
    for rank, words in (('0', 'fid.py: there is no nowhere'), ('1', '')):
        monkeypatch.setenv('RANK', rank)
        with pytest.raises(SystemExit, match='2'):
            runpy.run_path(fid.__file__, run_name='__main__')
        out, err = capsys.readouterr()
        assert out == '' and err.startswith(words) and err.count('\n') == bool(words)


def test_statistics_that_cannot_be_written(linear, tmp_path, monkeypatch, capsys):
    """A folder that is missing is found before the work. A disk that fills up costs no number."""
    argv = [str(linear[1])] * 2 + ['--save-stats']
    with pytest.raises(fid.BadInput, match='cannot write .*No such file'):
        fid.main([*argv, str(tmp_path / 'nowhere' / 's.npz')])
    assert capsys.readouterr() == ('', '')

    def full_disk(file, **arrays):
        if arrays:
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np, 'savez', full_disk)
    with pytest.raises(fid.BadInput, match='cannot write .*No space left on device'):
        fid.main([*argv, str(tmp_path / 's.npz')])
    assert 'FID                 1.2500' in capsys.readouterr().out


def test_where_stderr_is_no_terminal_progress_is_a_line_a_minute(capsys):
    bar = fid.progress(range(10), 'x.npz', unit=' images', unit_scale=8)
    clock = [bar.start_t]
    bar._time = lambda: clock[0]
    for _ in bar:
        clock[0] += 25
    lines = [line for line in capsys.readouterr().err.split('\n') if line]
    assert len(lines) == 4 and '24/80 [01:15<02:55,  3.13s/ images]' in lines[0]             # of 250 s


@pytest.mark.slow
def test_two_ranks_equal_one_and_fail_as_one(weights, tmp_path, capsys):
    write('npz', tmp_path / 'real.npz', smooth_images(9))
    write('png', tmp_path / 'fake', smooth_images(5, seed=1))

    def torchrun(*argv):
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                   fid.__file__]
        offline = {'OMP_NUM_THREADS': '1', 'TORCH_HOME': str(tmp_path), 'https_proxy': 'http://127.0.0.1:9'}
        return subprocess.run([*command, *map(str, argv)], capture_output=True, text=True, timeout=300,
                              env=os.environ | offline)

    sides = tmp_path / 'real.npz', tmp_path / 'fake'
    argv = *sides, '--weights', weights[0], '--sha256', weights[1]
    one, two = evaluate(*argv, capsys=capsys), torchrun(*argv)
    assert two.returncode == 0, two.stderr
    two = dict(line.split(maxsplit=1) for line in two.stdout.splitlines())
    assert '1 ranks' in one.pop('computed') and '2 ranks' in two.pop('computed') and one == two

    found = torchrun(*sides)                                                  # no weights, and no network
    assert found.returncode != 0 and found.stderr.count('fid.py: there are no Inception weights at') == 1
    assert '[rank' not in found.stderr                                        # no traceback of fid.py
