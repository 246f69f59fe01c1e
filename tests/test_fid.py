"""fid.py: every piece against a closed form or a slow, plain second implementation; every refusal.

No pretrained weights are needed: the networks here are random, of the right names, shapes and file layouts.
"""

import hashlib
import json
import math
import os
import pathlib
import queue
import re
import runpy
import shutil
import struct
import subprocess
import sys
import threading
import types
import urllib.error
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from PIL import Image
from torch.nn import functional

import fid


def generator(seed=0):
    return np.random.default_rng(seed)


def pictures(n, height=24, width=32, seed=0):
    """Smooth random pictures uint8 (n, height, width, 3), no two alike."""
    coarse = torch.from_numpy(generator(seed).uniform(0, 255, (n, 3, 4, 4)))
    smooth = functional.interpolate(coarse, (height, width), mode='bicubic').clamp(0, 255)
    return smooth.byte().permute(0, 2, 3, 1).numpy()


def random_state(seed=0):
    """A state dict of the network: He's scale, and batch norms that do something."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in fid.Inception().state_dict().items():
        if name.endswith('tracked'):
            state[name] = value
        elif name.endswith('conv.weight'):
            state[name] = torch.randn(value.shape, generator=rng) * math.sqrt(2 / value[0].numel())
        elif name.endswith(('bn.weight', 'running_var')):
            state[name] = torch.rand(value.shape, generator=rng) + 0.5
        elif name == 'fc.weight':
            state[name] = torch.randn(value.shape, generator=rng) / 20
        else:
            state[name] = torch.randn(value.shape, generator=rng) * 0.5
    return state


@pytest.fixture(scope='session')
def state():
    return random_state()


@pytest.fixture(scope='session')
def weights(state, tmp_path_factory):
    """(path, SHA-256) of a random network, saved in the old format, as the published file is."""
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope='session')
def net(weights):
    return fid.load_weights(*weights)[0]


# ------------------------------------------------------------------------------------------- preprocessing


def tf1_resize(image, size=299):
    """One picture, pixel by pixel, as TensorFlow's kernel does without align_corners: float32 all the way."""
    f = np.float32

    def weights(n):
        scale = f(n) / f(size)
        at = [f(i) * scale for i in range(size)]
        return [(math.floor(a), min(math.ceil(a), n - 1), a - f(math.floor(a))) for a in at]

    image, rows, columns = image.astype(f), weights(image.shape[0]), weights(image.shape[1])
    out = np.empty((size, size, image.shape[2]), f)
    for y, (top, bottom, dy) in enumerate(rows):
        for x, (left, right, dx) in enumerate(columns):
            above = image[top, left] + (image[top, right] - image[top, left]) * dx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[y, x] = above + (below - above) * dy
    return out


@pytest.mark.parametrize('height, width', [(5, 7), (32, 32), (64, 100), (512, 300), (256, 256)])
def test_resize_is_bit_equal_to_tensorflow_1(height, width):
    image = generator().integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = fid.resize(torch.from_numpy(image[None]).float())[0].numpy()
    assert found.dtype == np.float32 and np.array_equal(found, tf1_resize(image))


def test_resize_in_closed_form():
    """Of a ramp, pixel i is i * n / 299, up to the last source pixel, and 299 pixels are left alone."""
    ramp = torch.arange(64.0).repeat(64, 1)[None, :, :, None]
    want = (torch.arange(299, dtype=torch.float64) * 64 / 299).clamp(max=63)
    assert (fid.resize(ramp)[0, 5, :, 0] - want).abs().max() < 1e-5
    assert (fid.resize(ramp.transpose(1, 2))[0, :, 5, 0] - want).abs().max() < 1e-5
    same = torch.rand(1, 299, 299, 3)
    assert torch.equal(fid.resize(same), same)


def test_range_is_minus_one_to_127_128ths():
    x = fid.preprocess(np.arange(256, dtype=np.uint8).repeat(3 * 4).reshape(256, 2, 2, 3))
    assert x.shape == (256, 3, 299, 299) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x[:, 0, 7, 9], (torch.arange(256.0) - 128) / 128)


# ------------------------------------------------------------------------------------------------- network


def test_names_and_shapes_are_those_of_the_published_file():
    """566 tensors; the hash is of the list `name shape` of pytorch-fid's network, in its order."""
    state = fid.Inception().state_dict()
    lines = [f'{name} {list(value.shape)}' for name, value in state.items()]
    assert len(lines) == 566
    assert sum(value.numel() for name, value in state.items() if not name.endswith('tracked')) == 23_885_392
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest() == (
        '8ca497103391675d239b6cbe936a080934f935dfd57b70343674200035f2c5e8'
    )


def test_tensorflow_names():
    """472 tensors; the hash is of the list `our name, TensorFlow's name`."""
    names = [name for name in fid.Inception().state_dict() if not name.endswith('tracked')]
    ours = {mine: theirs for theirs, mine in fid.tf_names(names).items()}
    assert ours['Conv2d_2b_3x3.bn.bias'] == 'conv_2/batchnorm/beta'
    assert ours['Mixed_6d.branch1x1.conv.weight'] == 'mixed_6/conv/conv2d_params'
    assert ours['Mixed_7c.branch3x3dbl_3b.bn.weight'] == 'mixed_10/tower_1/mixed/conv_1/batchnorm/gamma'
    lines = [f'{name} {ours[name]}' for name in names]
    assert len(lines) == 472
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest() == (
        'c116707fcce1288594f3169afcd177f6f586c1eaf2e8b3718e26fa727d02cfa8'
    )


def plain_inception(state, x):
    """The network once more, from its tensors, in float64: pools by shifting, batch norm by its formula.

    Returns pooled features, spatial features, logits.
    """
    state = {name: value.double() for name, value in state.items()}

    def conv(x, name, stride=1, same=True):
        w = state[f'{name}.conv.weight']
        x = functional.conv2d(x, w, stride=stride, padding=[k // 2 if same else 0 for k in w.shape[2:]])
        gamma, beta, mean, var = (
            state[f'{name}.bn.{part}'][None, :, None, None]
            for part in ('weight', 'bias', 'running_mean', 'running_var')
        )
        return ((x - mean) / (var + 0.001).sqrt() * gamma + beta).clamp(min=0)

    def chain(x, block, *names, stride=1):
        for name in names[:-1]:
            x = conv(x, f'{block}.{name}')
        return conv(x, f'{block}.{names[-1]}', stride, same=stride == 1)

    def shifts(x, outside):
        """The nine neighbours of every pixel: (9, B, C, H, W)."""
        H, W = x.shape[2:]
        x = functional.pad(x, (1, 1, 1, 1), value=outside)
        return torch.stack([x[:, :, i : i + H, j : j + W] for i in range(3) for j in range(3)])

    def mean_of_those_inside(x):
        return shifts(x, 0.0).sum(0) / shifts(torch.ones_like(x), 0.0).sum(0)

    def largest_of_9(x):
        return shifts(x, -math.inf).amax(0)

    def halved(x):
        return largest_of_9(x)[:, :, 1:-1:2, 1:-1:2]

    def numbered(stem, *last):
        return [f'{stem}_{i}' for i in last]

    x = conv(conv(conv(x, 'Conv2d_1a_3x3', 2, False), 'Conv2d_2a_3x3', 1, False), 'Conv2d_2b_3x3')
    x = conv(conv(halved(x), 'Conv2d_3b_1x1'), 'Conv2d_4a_3x3', 1, False)
    x = halved(x)
    for block in ('Mixed_5b', 'Mixed_5c', 'Mixed_5d'):
        x = torch.cat(
            [
                chain(x, block, 'branch1x1'),
                chain(x, block, *numbered('branch5x5', 1, 2)),
                chain(x, block, *numbered('branch3x3dbl', 1, 2, 3)),
                chain(mean_of_those_inside(x), block, 'branch_pool'),
            ],
            1,
        )
    x = torch.cat(
        [
            chain(x, 'Mixed_6a', 'branch3x3', stride=2),
            chain(x, 'Mixed_6a', *numbered('branch3x3dbl', 1, 2, 3), stride=2),
            halved(x),
        ],
        1,
    )
    for block in ('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'):
        first = chain(x, block, 'branch1x1')
        if block == 'Mixed_6d':
            spatial = np.stack([first[:, c, h, w] for h in range(17) for w in range(17) for c in range(7)], 1)
        x = torch.cat(
            [
                first,
                chain(x, block, *numbered('branch7x7', 1, 2, 3)),
                chain(x, block, *numbered('branch7x7dbl', 1, 2, 3, 4, 5)),
                chain(mean_of_those_inside(x), block, 'branch_pool'),
            ],
            1,
        )
    x = torch.cat(
        [
            chain(x, 'Mixed_7a', *numbered('branch3x3', 1, 2), stride=2),
            chain(x, 'Mixed_7a', *numbered('branch7x7x3', 1, 2, 3, 4), stride=2),
            halved(x),
        ],
        1,
    )
    for block, pool in (('Mixed_7b', mean_of_those_inside), ('Mixed_7c', largest_of_9)):
        one, two = chain(x, block, 'branch3x3_1'), chain(x, block, *numbered('branch3x3dbl', 1, 2))
        x = torch.cat(
            [
                chain(x, block, 'branch1x1'),
                chain(one, block, 'branch3x3_2a'),
                chain(one, block, 'branch3x3_2b'),
                chain(two, block, 'branch3x3dbl_3a'),
                chain(two, block, 'branch3x3dbl_3b'),
                chain(pool(x), block, 'branch_pool'),
            ],
            1,
        )
    pool = x.sum((2, 3)) / 64
    return pool.numpy(), spatial, pool.numpy() @ state['fc.weight'].numpy().T


@pytest.fixture(scope='session')
def plain(state):
    return plain_inception(state, fid.preprocess(pictures(2)).double())


def relative(found, want):
    return np.abs(np.asarray(found) - want).max() / np.abs(want).max()


def test_features_against_a_second_implementation(net, plain):
    with torch.no_grad():
        pool, spatial = net(fid.preprocess(pictures(2)))
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and pool.dtype == torch.float32
    assert (pool > 0).double().mean() > 0.5 and (spatial > 0).double().mean() > 0.2  # alive
    assert relative(pool, plain[0]) < 1e-5 and relative(spatial, plain[1]) < 1e-5


def test_logits_have_no_bias(net, plain, state):
    assert state['fc.bias'].abs().max() > 0.5
    assert relative(net.logits(torch.from_numpy(plain[0]).float()), plain[2]) < 1e-5


def test_features_do_not_depend_on_the_batch_and_are_in_ieee_float32(net):
    x = fid.preprocess(pictures(5))
    with torch.no_grad():
        whole, parts = net(x), [net(part) for part in x.split(2)]
        for i in range(2):
            assert relative(torch.cat([part[i] for part in parts]), whole[i].numpy()) < 1e-5
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == 'ieee'


# ------------------------------------------------------------------------------------------------- weights


def protobuf(*fields):
    """A protobuf message of (number, value): an int, bytes, or floats, which go out one by one."""

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    out = []
    for number, value in fields:
        if isinstance(value, int):
            out += [varint(number << 3), varint(value)]
        elif isinstance(value, bytes):
            out += [varint(number << 3 | 2), varint(len(value)), value]
        else:
            out += [varint(number << 3 | 5), struct.pack('<f', value)]
    return b''.join(out)


def constant(name, array, dtype=1, shape=None):
    """A node of a GraphDef with everything a real one has around what is read."""
    dims = [(2, protobuf((1, n))) for n in (array.shape if shape is None else shape)]
    if array.size > 1 and (array == array.flat[0]).all():
        content = (5, float(array.flat[0]))  # one value stands for all
    elif name.endswith('gamma'):
        content = (5, array.astype('<f4').tobytes())  # packed float_val
    elif name.endswith('beta'):
        content = [(5, float(x)) for x in array.flat]  # float_val, one by one
    else:
        content = (4, array.astype('<f4').tobytes())
    tensor = protobuf(
        (1, dtype), (2, protobuf(*dims)), *(content if isinstance(content, list) else [content])
    )
    return (
        1,
        protobuf(
            (1, name.encode()),
            (2, b'Const'),
            (5, protobuf((1, b'dtype'), (2, protobuf((6, 1))))),
            (5, protobuf((1, b'value'), (2, protobuf((8, tensor))))),
        ),
    )


def graph(state, change=lambda name, array: (name, array), **kwargs):
    names = fid.tf_names(list(fid.Inception().state_dict())).items()
    nodes = [(1, protobuf((1, b'DecodeJpeg'), (2, b'DecodeJpeg'), (3, b'contents')))]
    for theirs, ours in (pair for pair in names if pair[1] in state):
        array = state[ours].numpy()
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        nodes.append(constant(*change(theirs, array), **kwargs))
    return protobuf(*nodes, (2, protobuf((1, 21))))


def test_tensorflow_graph_gives_the_same_tensors(state, tmp_path):
    state = state | {'Mixed_5b.branch1x1.bn.running_mean': torch.full((64,), 0.25)}
    (tmp_path / 'graph.pb').write_bytes(graph(state))
    net, found = fid.load_weights(tmp_path / 'graph.pb')
    assert found == hashlib.sha256((tmp_path / 'graph.pb').read_bytes()).hexdigest()
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_zip_format_and_absent_counters(state, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({name: value for name, value in state.items() if not name.endswith('tracked')}, path)
    net, _ = fid.load_weights(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


class Harm:
    def __reduce__(self):
        return (os.mkdir, ('harm',))


def spoiled_weights(state, tmp_path):
    """{name: (content, words of the refusal)}"""

    def saved(thing):
        torch.save(thing, tmp_path / 'spoiled', _use_new_zipfile_serialization=False)
        return (tmp_path / 'spoiled').read_bytes()

    narrow = lambda name, array: (name, array[..., :1000] if name.startswith('softmax') else array)
    wide = lambda name, array: (name, array[..., :7] if name == 'mixed_6/conv/conv2d_params' else array)
    nameless = lambda name, array: (name.replace('mixed_3', 'other'), array)
    state = {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}  # one number on disk
    kept = ('fc', 'Mixed_6d.branch1x1', 'Mixed_6a.branch3x3.')
    few = {name: value for name, value in state.items() if name.startswith(kept)}
    whole = graph(few)
    return {
        'lfs': (
            b'version https://git-lfs.github.com/spec/v1\noid sha256:67\nsize 95628359\n',
            'Git LFS pointer',
        ),
        'html': (b'\n<!DOCTYPE html><html>Not found</html>', 'HTML page'),
        'classes.pth': (
            saved(state | {'fc.weight': torch.zeros(1000, 2048)}),
            'know 1000 classes, expected 1008',
        ),
        'shape.pth': (
            saved(state | {'fc.weight': torch.zeros(1008, 2047)}),
            'of shape [1008, 2047], expected [1008, 2048]',
        ),
        'names.pth': (
            saved({'module.' + name: value for name, value in state.items()}),
            '944 tensors are missing or too many',
        ),
        'list.pth': (saved([1, 2]), 'cut short or of another kind'),
        'harm.pth': (saved({'fc.weight': Harm()}), 'cut short or of another kind'),
        'short.pth': (saved(state)[:-9_000], 'cut short or of another kind'),
        'classes.pb': (graph(few, narrow), 'know 1000 classes, expected 1008'),
        'shape.pb': (graph(few, wide), 'expected [192, 768, 1, 1]'),
        'names.pb': (graph(few, nameless), 'tensors are missing'),
        'half.pb': (graph(few, dtype=19), 'cut short or of another kind'),
        'huge.pb': (
            protobuf(constant('softmax/biases', np.ones(3), shape=(1 << 60,))),
            'classes, expected 1008',
        ),
        'short.pb': (whole[: len(whole) // 2], 'cut short or of another kind'),
        'empty.pb': (b'\n', 'cut short or of another kind'),
        'varint.pb': (b'\n' + b'\xff' * 20, 'cut short or of another kind'),
        'nothing.pth': (b'', 'cut short or of another kind'),
    }


def test_spoiled_weights_are_refused_in_a_sentence(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (content, words) in spoiled_weights(state, tmp_path).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(fid.BadInput) as refusal:
            fid.load_weights(name, hashlib.sha256(content).hexdigest())
        sentence = str(refusal.value)
        assert words in sentence and name in sentence and '\n' not in sentence
    assert not pathlib.Path('harm').exists()
    with pytest.raises(fid.BadInput, match='No such file'):
        fid.load_weights('nowhere.pth')


def test_a_pth_must_be_the_published_one(weights):
    size = weights[0].stat().st_size
    with pytest.raises(fid.BadInput, match=f'{size} bytes and SHA-256 {weights[1]}, expected {fid.SHA256}'):
        fid.load_weights(weights[0])
    assert len(fid.SHA256) == 64 and fid.SHA256.startswith('6726825d') and '6726825d' in fid.URL


def test_weights_are_found_in_the_cache_or_downloaded_there(weights, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    target = tmp_path / 'hub' / 'checkpoints' / fid.NAME
    monkeypatch.setattr(fid, 'URL', weights[0].as_uri())
    with pytest.raises(fid.BadInput, match='invalid hash'):  # the address gives another file
        fid.find_weights()
    assert not list(target.parent.iterdir())
    monkeypatch.setattr(fid, 'SHA256', weights[1])
    assert fid.find_weights() == target and target.read_bytes() == weights[0].read_bytes()
    monkeypatch.setattr(fid, 'URL', 'file:///nowhere')  # and from now on no network is needed
    assert fid.find_weights() == target


def test_offline_says_what_to_put_where(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError('Name or service not known')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(fid.BadInput) as refusal:
        fid.find_weights()
    target = str(tmp_path / 'hub' / 'checkpoints' / fid.NAME)
    for words in (fid.URL, '95,628,359 bytes', fid.SHA256, target, '--weights'):
        assert words in str(refusal.value)


# ---------------------------------------------------------------------------------------- Frechet distance


def features(n, D, seed=0):
    """Correlated rows float32 (n, D) with an offset."""
    rng = generator(seed)
    rows = rng.standard_normal((n, D)) @ rng.standard_normal((D, D)) / math.sqrt(D)
    return (rows + 3 * rng.standard_normal(D)).astype(np.float32)


def test_moments_are_numpys():
    x = features(3000, 20)
    moments = fid.Moments(20)
    for part in torch.from_numpy(x).split(7):
        moments.add(part)
    found = moments.gaussian()
    assert relative(found.mean, x.astype(np.float64).mean(0)) < 1e-12
    assert relative(found.cov, np.cov(x.astype(np.float64), rowvar=False)) < 1e-12


def test_merged_moments_and_a_large_offset():
    """Sums of squares would lose eight digits here; parts may be empty."""
    x = features(1000, 8).astype(np.float64) + 1e4
    parts = [fid.Moments(8) for _ in range(4)]
    for part, rows in zip(parts, np.split(x, [1, 400, 1000])):
        if len(rows):
            part.add(torch.from_numpy(rows))
    total = fid.Moments(8)
    for part in parts:
        total.merge(part)
    assert total.n == 1000 and parts[3].n == 0
    assert relative(total.gaussian().mean, x.mean(0)) < 1e-12
    assert relative(total.gaussian().cov, np.cov(x, rowvar=False)) < 1e-10
    two = fid.Moments(8).add(torch.from_numpy(x[:300])).merge(fid.Moments(8).add(torch.from_numpy(x[300:])))
    one = fid.Moments(8).add(torch.from_numpy(x))
    assert relative(two.scatter, one.scatter.numpy()) < 1e-12


def spd(values, seed=0):
    """A symmetric matrix with these eigenvalues; the same seed gives the same eigenvectors."""
    q, _ = np.linalg.qr(generator(seed).standard_normal((len(values), len(values))))
    return q * values @ q.T


def test_frechet_distance_in_closed_form():
    """Commuting covariances: sum (sqrt a - sqrt b)^2. Not commuting: S2 = S1^-1/2 M^2 S1^-1/2: tr M."""
    rng = generator()
    a, b, m = (10.0 ** rng.uniform(-4, 1, 200) for _ in range(3))
    mu, nu = rng.standard_normal((2, 200))
    between = ((mu - nu) ** 2).sum()
    found = fid.frechet_distance(mu, spd(a), nu, spd(b))
    assert found == pytest.approx(between + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-8)
    a, m = rng.uniform(0.5, 2, 200), rng.uniform(0.5, 2, 200)
    half, M = spd(a**-0.5), spd(m, seed=1)
    second = half @ M @ M @ half
    want = between + a.sum() + np.trace(second) - 2 * m.sum()
    assert fid.frechet_distance(mu, spd(a), nu, second) == pytest.approx(want, rel=1e-8)
    assert fid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(5, rel=1e-12)
    assert fid.frechet_distance(mu, spd(a), mu, spd(a)) == pytest.approx(0, abs=1e-8 * a.sum())


def test_singular_covariances():
    a = np.concatenate([generator().uniform(0.1, 1, 150), np.zeros(250)])
    b = np.concatenate([np.zeros(100), generator(1).uniform(0.1, 1, 300)])
    want = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid.frechet_distance(np.zeros(400), spd(a), np.zeros(400), spd(b)) == pytest.approx(want, rel=1e-5)
    assert 0 <= fid.frechet_distance(np.zeros(400), spd(a), np.zeros(400), spd(a)) < 1e-5 * a.sum()


@pytest.mark.parametrize('n, m', [(500, 400), (30, 500), (500, 30), (40, 30)])
def test_frechet_from_features_against_the_matrix_root(n, m):
    x, y = features(n, 60), features(m, 60, 1)
    S, T = np.cov(x.astype(np.float64), rowvar=False), np.cov(y.astype(np.float64), rowvar=False)
    cross = np.trace(scipy.linalg.sqrtm(S @ T + 1e-14 * np.eye(60))).real
    d = x.astype(np.float64).mean(0) - y.astype(np.float64).mean(0)
    want = d @ d + np.trace(S) + np.trace(T) - 2 * cross
    assert fid.frechet_from_features(x, y) == pytest.approx(want, rel=1e-8 if min(n, m) > 60 else 1e-5)
    with_moments = fid.frechet_distance(x.astype(np.float64).mean(0), S, y.astype(np.float64).mean(0), T)
    assert fid.frechet_from_features(x, y) == pytest.approx(with_moments, rel=1e-5)


def test_few_rows_use_their_factor():
    """In that form the distance of a set from itself is zero to rounding."""
    x = torch.from_numpy(features(50, 200))
    found = fid.gaussian(x)
    assert found.factor.shape == (50, 200)
    assert relative(found.cov, np.cov(x.double().numpy(), rowvar=False)) < 1e-12
    assert (
        fid.frechet(found, found) < 1e-6 and fid.gaussian(torch.from_numpy(features(200, 50))).factor is None
    )


# ----------------------------------------------------------------------------------------- Inception Score


def certain(classes, n=10, of=1008):
    """Logits of a network sure of `classes`: other classes' probabilities are zero in any precision."""
    return torch.nn.functional.one_hot(torch.as_tensor(classes), of)[: n * len(classes)] * 2000.0


def test_known_inception_scores():
    assert fid.inception_score(certain(np.arange(100) % 10)) == pytest.approx(10, rel=1e-12)
    assert fid.inception_score(torch.randn(1, 1008).repeat(9, 1)) == pytest.approx(1, abs=1e-12)
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    want = math.exp(np.mean([sum(row * np.log(row / p.mean(0))) for row in p]))
    assert fid.inception_score(torch.from_numpy(np.log(p) + 5)) == pytest.approx(want, rel=1e-12)


def test_splits_are_consecutive_and_a_short_one_weighs_as_much():
    sorted_ = certain(np.arange(10_000) // 5000, of=8)  # class 0, then class 1
    assert fid.inception_score(sorted_) == pytest.approx(1, rel=1e-12)
    assert fid.inception_score(fid.interleaved(sorted_)) == pytest.approx(2, rel=1e-12)
    assert fid.inception_score(certain([0, 1, 2, 3, 5], of=8), split=4) == pytest.approx(
        (4 + 1) / 2, rel=1e-12
    )
    assert sorted(fid.interleaved(torch.arange(23), 5).tolist()) == list(range(23))


# ---------------------------------------------------------------------------------------- precision, recall


def plain_precision_recall(real, fake, k, distance):
    """Pair by pair."""

    def radii(rows):
        return [sorted(distance(a, b) for b in rows)[k] for a in rows]

    def share(rows, others, radii):
        return np.mean(
            [any(distance(*pair(row, other)) <= r for other, r in zip(others, radii)) for row in rows]
        )

    pair = lambda row, other: (other, row)  # the first argument is the real one
    precision = share(fake, real, radii(real))
    pair = lambda row, other: (row, other)
    return precision, share(real, fake, radii(fake))


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


def test_precision_and_recall_are_what_they_say():
    """Reals around 0 and 100, fakes around 0 only, and one outlier: precision 4/5, recall 1/2."""
    real = column(0, 1, 2, 3, 100, 101, 102, 103)
    fake = column(0.5, 1.5, 2.5, 3.5, 50)
    for mode in ('exact', 'adm'):
        precision, recall = fid.precision_recall(real, fake, mode=mode)
        assert (precision, recall) == (4 / 5, 1 / 2)
    assert fid.precision_recall(real, real) == (1, 1)
    assert fid.precision_recall(real, real + 1000) == (0, 0)


def test_three_neighbours_and_a_closed_ball():
    """Real 0 has neighbours at 1, 2, 4: a fake at -4 is on the rim of its ball at k = 3, outside at k = 2."""
    real, fake = column(0, 1, 2, 4), column(-4, 1000, 2000, 3000)
    assert fid.precision_recall(real, fake, mode='exact')[0] == 1 / 4
    assert fid.precision_recall(real, fake, k=2, mode='exact')[0] == 0
    assert fid.precision_recall(real, column(-4.001, 1000, 2000, 3000), mode='exact')[0] == 0


@pytest.mark.parametrize('block', [1, 7, 2000])
@pytest.mark.parametrize('mode', ['exact', 'adm'])
def test_against_pair_by_pair(mode, block):
    real, fake = grid(40, 100), grid(33, 100, 1, 60)
    distance = half_distance if mode == 'adm' else lambda a, b: ((a.astype(np.float64) - b) ** 2).sum()
    for k in (3, 5):
        want = plain_precision_recall(real, fake, k, distance)
        assert fid.precision_recall(real, fake, k, mode, block) == pytest.approx(want, abs=1e-15)
        assert 0 < want[0] < 1 and 0 < want[1] < 1


def test_float16_distances_bit_for_bit():
    a, b = grid(20, 100), grid(25, 100, 1)
    want = np.array([[half_distance(u, v) for v in b] for u in a])
    found = fid.adm_distances(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert found.dtype == np.float32 and np.array_equal(found, want)
    exact = ((a[:, None].astype(np.float64) - b) ** 2).sum(2)
    assert (found != exact).mean() > 0.5  # it does round


def test_ties_by_rounding_pass():
    """20 and 23 are 3 apart, so radii^2 are 9 at the ends. 26.02 is 3.02 from 23, but in float16
    26.02^2 = 677, 23 x 26.02 = 598.5, and 529 - 1197 + 677 = 9."""
    real, fake = column(20, 21, 22, 23), column(26.02, 100, 101, 102)
    assert fid.precision_recall(real, fake, mode='adm')[0] == 1 / 4
    assert fid.precision_recall(real, fake, mode='exact')[0] == 0


def test_float16_overflow_is_redone_in_float32():
    real, fake = grid(30, 20) * 100, grid(30, 20, 1) * 100  # |f|^2 about 1e6, above 65504
    assert ((real**2).sum(1) > 65504).all()
    assert fid.precision_recall(real, fake, mode='adm') == fid.precision_recall(real, fake, mode='exact')


def test_exact_mode_knows_copies_and_bears_an_offset():
    x = features(30, 64)
    copies = np.repeat(x, 5, 0)  # radii of zero
    assert fid.precision_recall(copies, x, mode='exact')[0] == 1
    assert fid.precision_recall(copies, x + 0.01, mode='exact')[0] == 0
    real, fake = grid(40, 100), grid(33, 100, 1)
    shifted = fid.precision_recall(real + 4096, fake + 4096, mode='exact')  # exact in float32: 1/16 of 4096
    assert shifted == fid.precision_recall(real, fake, mode='exact')


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
        (path / 'readme.txt').write_text('not a picture')
    else:
        path.mkdir(parents=True)
        np.save(path / 'data.npy', images.transpose(0, 3, 1, 2))
        np.save(path / 'labels.npy', np.zeros(len(images), np.int64))
        (path / 'meta.json').write_text('{"kind": "images", "classes": 0}')
    return path


@pytest.mark.parametrize('kind', ['npz', 'compressed', 'png', 'data'])
def test_every_input_gives_the_same_pixels_in_any_portions(kind, tmp_path):
    images = pictures(11)
    side = fid.open_side(write(kind, tmp_path / ('x.npz' if kind in ('npz', 'compressed') else 'x'), images))
    order = [*range(4), *range(4, 11)]
    assert (side.count, side.size, side.stored, side.converted, side.jpeg) == (11, (24, 32), False, 0, 0)
    for start, stop, step in ((0, 11, 4), (3, 9, 5), (8, 11, 100), (4, 4, 3)):
        batches = list(side.read(start, stop, step))
        assert [len(b) for b in batches] == [min(step, stop - at) for at in range(start, stop, step)]
        if batches:
            assert np.array_equal(np.concatenate(batches), images[order][start:stop])


def test_pictures_that_are_not_rgb_are_converted_and_counted(tmp_path):
    image = Image.fromarray(pictures(1)[0])
    image.save(tmp_path / '0.png')
    for i, mode in enumerate(('L', 'LA', 'RGBA', 'P', '1')):
        image.convert('L' if mode == 'LA' else mode).convert(mode).save(tmp_path / f'{i + 1}.png')
    image.save(tmp_path / '6.JPG', quality=95)
    side = fid.open_side(tmp_path)
    images = np.concatenate(list(side.read(0, 7, 3)))
    assert (side.count, side.converted, side.jpeg) == (7, 5, 1) and images.shape == (7, 24, 32, 3)
    grey = np.asarray(image.convert('L'))
    assert all(np.array_equal(images[1][..., c], grey) for c in range(3)) and np.array_equal(
        images[3], images[0]
    )
    grey_folder = write('data', tmp_path / 'grey', pictures(3)[..., :1])
    side = fid.open_side(grey_folder)
    assert side.converted == 3 and next(side.read(0, 3, 3)).shape == (3, 24, 32, 3)


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope='session')
def case(weights, tmp_path_factory):
    """A folder with real.npz, 12 images, fake, 13 images, and the evaluation of the one against the other."""
    folder = tmp_path_factory.mktemp('case')
    write('npz', folder / 'real.npz', pictures(12))
    write('png', folder / 'fake', pictures(13, seed=1))
    (folder / 'result.json').write_text(
        json.dumps(
            fid.evaluate(folder / 'real.npz', folder / 'fake', *weights, save_stats=folder / 'real-stats.npz')
        )
    )
    return folder


def test_the_whole_evaluation_is_its_pieces(case, net, weights):
    result = json.loads((case / 'result.json').read_text())
    with torch.no_grad():
        real, fake = net(fid.preprocess(pictures(12))), net(fid.preprocess(pictures(13, seed=1)))
    p, q = np.float64(real[0]), np.float64(fake[0])
    d, S, T = p.mean(0) - q.mean(0), p - p.mean(0), q - q.mean(0)
    root = scipy.linalg.svdvals(S @ T.T).sum() / math.sqrt(11 * 12)
    assert result['fid'] == pytest.approx(d @ d + (S**2).sum() / 11 + (T**2).sum() / 12 - 2 * root, rel=1e-5)
    assert result['sfid'] == pytest.approx(fid.frechet_from_features(real[1], fake[1]), rel=1e-5)
    assert result['inception_score'] == pytest.approx(fid.inception_score(net.logits(fake[0])), rel=1e-5)
    assert (result['precision'], result['recall']) == fid.precision_recall(real[0], fake[0])
    assert (
        result['reference']['images'] == 12 and result['samples']['images'] == 13 and result['left_out'] == {}
    )
    assert (
        result['sha256'] == weights[1] and not result['published_weights'] and result['images_per_second'] > 0
    )
    assert result['fifths']['images'] == 2 and len(result['fifths']['fid']) == 5
    assert result['fifths']['fid'][1] == pytest.approx(
        fid.frechet_from_features(real[0], fake[0][1::5]), rel=1e-5
    )
    assert any('13 samples' in note for note in result['notes'])


THREE = ('fid', 'sfid', 'inception_score')


@pytest.fixture
def loaded(net, weights, monkeypatch):
    """The random network, loaded once for many evaluations."""
    monkeypatch.setattr(fid, 'load_weights', lambda *args: (net, weights[1]))


@pytest.mark.slow
def test_saved_statistics_give_the_same_numbers(case, weights, loaded, net):
    """All five on the reference's side. Statistics alone give FID and sFID, and the rest is named."""
    result = json.loads((case / 'result.json').read_text())
    again = fid.evaluate(case / 'real-stats.npz', case / 'fake', *weights, pr='exact')
    assert [again[m] for m in THREE] == pytest.approx([result[m] for m in THREE], rel=1e-6)
    assert again['pr'] == 'exact' and again['reference']['stored'] and again['reference']['images'] == 12
    with np.load(case / 'real-stats.npz') as file:
        arrays = dict(file)
    np.savez(case / 'bare.npz', mu=arrays['mu'], sigma=arrays['sigma'])
    np.savez(case / 'half.npz', **{name: arrays[name] * 0.5 for name in ('mu', 'sigma')}, arr_0=pictures(12))
    bare = fid.evaluate(case / 'bare.npz', case / 'fake', *weights)
    assert bare['fid'] == pytest.approx(result['fid'], rel=1e-6)
    assert set(bare['left_out']) == {'sfid', 'precision', 'recall'}
    assert 'mu_s' in bare['left_out']['sfid'] and 'bare.npz' in bare['left_out']['recall']
    half = fid.evaluate(case / 'half.npz', case / 'fake', *weights)  # as ADM's reference: both
    assert half['fid'] == pytest.approx(
        fid.frechet(
            fid.Gaussian(torch.from_numpy(arrays['mu'] / 2), torch.from_numpy(arrays['sigma'] / 2)),
            fid.gaussian(features_of(case / 'fake', net)),
        ),
        rel=1e-6,
    )
    assert half['precision'] == result['precision'] and 'sfid' in half['left_out']


def features_of(path, net):
    side = fid.open_side(path)
    fid.extract(net, side)
    return side.pool


def test_two_processes_equal_one(case, weights):
    """From the command line, with torchrun; JSON on standard output, everything else on standard error."""
    found = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            str(ROOT / 'fid.py'),
            'real.npz',
            'fake',
            '--weights',
            weights[0],
            '--sha256',
            weights[1],
            '--json',
        ],
        cwd=case,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert found.returncode == 0, found.stderr
    two, one = json.loads(found.stdout), json.loads((case / 'result.json').read_text())
    assert two['processes'] == 2 and 'note: 13 samples' in found.stderr
    assert [two[m] for m in fid.MEASURES] == pytest.approx([one[m] for m in fid.MEASURES], rel=1e-12)
    assert two['fifths'] == one['fifths']


class Small(torch.nn.Module):
    """In place of the network: linear maps of 4 x 4 pictures, so that thousands of images take a second."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2048, 8)
        rng = torch.Generator().manual_seed(0)
        self.pool, self.spatial = (torch.randn(48, n, generator=rng) for n in (2048, 2023))

    def forward(self, x):
        return x.flatten(1) @ self.pool, x.flatten(1) @ self.spatial


@pytest.mark.parametrize('count', [50, 2500])
def test_images_are_split_and_gathered_in_file_order(count, tmp_path, monkeypatch):
    """Three processes, played by threads: few images travel as features, many as moments that are merged."""
    images = generator().integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / 'x.npz', arr_0=images)
    monkeypatch.setattr(fid, 'preprocess', lambda images, device: torch.from_numpy(np.array(images)).float())
    net, me, boxes = Small(), threading.local(), {1: queue.Queue(), 2: queue.Queue()}
    monkeypatch.setattr(
        fid,
        'dist',
        types.SimpleNamespace(
            send=lambda rows, target: boxes[me.rank].put(rows),
            recv=lambda part, source: part.copy_(boxes[source].get(timeout=60)),
            all_reduce=lambda flag: None,
        ),
    )
    sides = [fid.open_side(tmp_path / 'x.npz') for _ in range(3)]

    def play(rank):
        me.rank = rank
        torch.set_num_threads(1)
        fid.extract(net, sides[rank], rank, 3)

    threads = [threading.Thread(target=play, args=[rank]) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    play(0)
    for thread in threads:
        thread.join()
    alone = fid.open_side(tmp_path / 'x.npz')
    fid.extract(net, alone)
    with torch.no_grad():
        pool, spatial = net(torch.from_numpy(images).float())
    assert torch.equal(sides[0].pool, alone.pool) and relative(alone.pool, pool.numpy()) < 1e-5
    for side in (alone, sides[0]):
        assert (side.sfid.factor is None) == (count == 2500)
        assert relative(side.sfid.cov, np.cov(np.float64(spatial), rowvar=False)) < 1e-5
        assert relative(side.sfid.cov, alone.sfid.cov.numpy()) < 1e-12
        assert relative(side.sfid.mean, alone.sfid.mean.numpy()) < 1e-12


@pytest.mark.slow
def test_all_processes_stop_when_one_cannot_download(tmp_path):
    """Offline, from the command line: a sentence from each of two processes, and no traceback of fid.py."""
    write('npz', tmp_path / 'x.npz', pictures(4, 4, 4))
    found = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            str(ROOT / 'fid.py'),
            'x.npz',
            'x.npz',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ
        | {'OMP_NUM_THREADS': '1', 'TORCH_HOME': str(tmp_path), 'https_proxy': 'http://127.0.0.1:9'},
    )
    assert found.returncode != 0 and 'fid.py: no Inception weights here' in found.stderr
    assert (
        'fid.py: another process could not read the weights' in found.stderr and '[rank' not in found.stderr
    )


def test_all_processes_stop_when_one_cannot_read(tmp_path, monkeypatch):
    side = fid.open_side(write('npz', tmp_path / 'x.npz', pictures(4, 4, 4)))
    monkeypatch.setattr(fid, 'preprocess', lambda images, device: torch.from_numpy(np.array(images)).float())
    monkeypatch.setattr(fid, 'dist', types.SimpleNamespace(all_reduce=lambda flag: flag.add_(1)))
    with pytest.raises(fid.BadInput, match='another process could not read its part of .*x.npz'):
        fid.extract(Small(), side, 0, 2)
    side.path, side.read = 'y', fid.open_side(tmp_path / 'x.npz').read
    (tmp_path / 'x.npz').unlink()
    with pytest.raises(fid.BadInput, match='x.npz is damaged'):  # its own reason, where it knows it
        fid.extract(Small(), side, 0, 2)


@pytest.mark.parametrize('count, world', [(50_000, 1), (50_000, 7), (3, 4), (17, 2)])
def test_every_image_is_some_process_s(count, world):
    spans = [fid.share(count, 8, rank, world) for rank in range(world)]
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(count))
    assert all(
        start % 8 == 0 or start == count for start, _ in spans
    )  # whole batches, the same for any world


def stored(path, n, mean=0.0, **arrays):
    """A file as --save-stats writes it, of random features."""
    rng = generator(n)
    pool = rng.standard_normal((n, 2048)).astype(np.float32) + mean
    np.savez(
        path,
        features=pool,
        weights=arrays.pop('weights', ''),
        mu=np.zeros(2048),
        sigma=np.eye(2048),
        **arrays,
    )
    return path


def notes_of(*args, **kwargs):
    return ' '.join(fid.evaluate(*args, **kwargs)['notes'])


def test_notes(weights, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, 'precision_recall', lambda *args, **kwargs: (0.5, 0.5))
    monkeypatch.setattr(fid, 'gaussian', lambda rows: fid.Gaussian(torch.zeros(2), torch.eye(2)))
    monkeypatch.setattr(fid, 'frechet', lambda a, b: 1.0)
    ref, other = stored(tmp_path / 'ref.npz', 4), stored(tmp_path / 'other.npz', 5, weights='f' * 64)
    assert 'made with other weights, SHA-256 ffffffff' in notes_of(ref, other, *weights)
    write('npz', tmp_path / 'a.npz', pictures(4))
    write('npz', tmp_path / 'b.npz', pictures(4, 8, 8))
    assert 'sides swapped?' in notes_of(tmp_path / 'a.npz', other, *weights)
    assert '32 x 24 and 8 x 8' in notes_of(tmp_path / 'a.npz', tmp_path / 'b.npz', *weights)
    (tmp_path / 'p').mkdir()
    for i in range(3):
        Image.fromarray(pictures(3)[i]).convert('L').save(tmp_path / 'p' / f'{i}.jpg')
    result = fid.evaluate(ref, tmp_path / 'p', *weights)
    assert '3 pictures were grey' in ' '.join(result['notes']) and '3 pictures are JPEG' in ' '.join(
        result['notes']
    )
    assert result['left_out'] == {'sfid': f'no mu_s and sigma_s in {ref}'} | {
        name: f'fewer than 4 images in {tmp_path / "p"}' for name in ('precision', 'recall')
    }

    monkeypatch.setattr(fid, 'FULL', 6000)  # 50,000 would take longer
    many = stored(tmp_path / 'many.npz', 6000)
    classes = torch.arange(6000) // 1200
    for order, sorted_ in ((classes, True), (classes[torch.randperm(6000)], False)):
        monkeypatch.setattr(
            fid.Inception, 'logits', lambda net, pool, order=order: certain(order, of=8)[: len(pool)]
        )
        notes = notes_of(ref, many, *weights)
        assert ('looks sorted by class' in notes) == sorted_ and 'samples:' not in notes
    assert '4 samples' in notes_of(many, ref, *weights)


# ------------------------------------------------------------------------------------------------- command


def run(argv, capsys, monkeypatch):
    """(exit status, standard output, standard error) of `python fid.py ARGV`."""
    monkeypatch.setattr('sys.argv', ['fid.py', *map(str, argv)])
    status = 0
    try:
        runpy.run_path(fid.__file__, run_name='__main__')
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(fid.BadInput, match='process 2 .* type --nproc_per_node 2'):
        fid.main(['REF', 'SAMPLES'])


def test_report(case, weights, capsys, monkeypatch):
    monkeypatch.chdir(case)
    known = ['--weights', weights[0], '--sha256', weights[1]]
    status, out, err = run(['real-stats.npz', 'fake', *known], capsys, monkeypatch)
    result = json.loads((case / 'result.json').read_text())
    lines = [line.split() for line in out.splitlines()]
    assert status == 0 and 'note: 13 samples' in err
    assert ['reference', 'real-stats.npz:', '12', 'images,', 'with', 'stored', 'statistics'] in lines
    assert ['samples', 'fake:', '13', 'images', 'of', '32', 'x', '24'] in lines
    assert f'SHA-256 {weights[1][:8]}..., not the published file' in out and 'images/s' in out
    assert ['FID', f'{result["fid"]:.4f}'] in lines and ['recall', f'{result["recall"]:.4f}'] in lines
    assert 'float16 distances' in out and 'FID of disjoint fifths, 2 images each' in out
    np.savez('only.npz', mu=np.zeros(2048), sigma=np.eye(2048))
    assert 'network' in dict(fid.report(result))
    assert 'network' not in dict(fid.report(result | {'images_per_second': 0.0}))  # no image was looked at
    status, out, err = run(['only.npz', 'only.npz'], capsys, monkeypatch)
    assert status == 0 and 'weights' not in out
    assert ['FID', '0.0000'] in [line.split() for line in out.splitlines()]
    for words in ('no mu_s and sigma_s in', 'no images in', 'fewer than 4 images in'):
        assert f'left out: {words} only.npz' in out
    status, out, err = run(['real.npz', '--save-stats', 'new.npz', *known], capsys, monkeypatch)
    assert status == 0 and 'new.npz' in err
    with np.load('new.npz') as new, np.load('real-stats.npz') as old:
        assert all(np.array_equal(new[name], old[name]) for name in old)


REFUSED = [
    (['ok.npz'], 'SAMPLES is missing'),
    (['nowhere', 'ok.npz'], 'there is no nowhere'),
    (['ok.npz', 'lfs.npz'], 'Git LFS pointer'),
    (['html.npz', 'ok.npz'], 'HTML page'),
    (['ok.npz', 'ok.npz', '--weights', 'lfs.npz'], 'Git LFS pointer'),
    (['ok.npz', 'ok.npz', '--weights', 'html.npz'], 'HTML page'),
    (['ok.npz', 'ok.npz', '--weights', 'ok.npz'], 'expected 6726825d'),
    (['ok.npz', 'ok.npz', '--weights', 'ok.npz', '--sha256', 'abc'], 'expected abc'),
    (['ok.npz', 'ok.npz', '--sha256', 'abc'], 'belongs to --weights'),
    (['ok.npz', 'int.npz'], 'holds int64 (4, 8, 8, 3), expected images uint8'),
    (['ok.npz', 'first.npz'], 'holds uint8 (4, 3, 8, 8), expected images uint8 (n, H, W, 3)'),
    (['unit.npz', 'ok.npz'], 'float32 from 0 to 1, expected uint8 from 0 to 255: save `(x * 255)'),
    (['signed.npz', 'ok.npz'], 'float64 from -1 to 1, expected uint8 from 0 to 255: save `((x + 1) * 127.5)'),
    (['levels.npz', 'ok.npz'], 'float32 from 0 to 255, expected uint8'),
    (['ok.npz', 'scalar.npz'], 'holds uint8 (), expected images'),
    (['ok.npz', 'fortran.npz'], 'Fortran order'),
    (['ok.npz', 'object.npz'], 'object array'),
    (['object-stats.npz', 'ok.npz'], 'holds an object array mu'),
    (['ok.npz', 'short.npz'], 'cut short'),
    (['ok.npz', 'header.npz'], 'cut short'),
    (['ok.npz', 'other.npz'], 'holds images, expected images arr_0, or statistics'),
    (['ok.npz', 'one.npz'], 'holds 1 images, expected at least 2'),
    (['nan.npz', 'ok.npz'], 'not finite numbers'),
    (['clip.npz', 'ok.npz'], 'those of another network?'),
    (['rows.npz', 'ok.npz'], 'has features [3, 512]'),
    (['words.npz', 'ok.npz'], 'has features [2] of <U1'),
    (['none.npz', 'ok.npz'], 'has features [0, 2048]'),
    (['ok.npz', 'stats.npz'], 'type `python fid.py stats.npz ok.npz`'),
    (['stats.npz', '--save-stats', 'new.npz'], 'nothing to compute'),
    (['ok.npz', 'ok.npz', '--save-stats', 'ok.npz'], 'exists already'),
    (['ok.npz', 'ok.npz', '--save-stats', 'nowhere/new.npz'], 'no such folder'),
    (['ok.npz', 'mixed'], '1.png is 9 x 8, but mixed/0.png is 8 x 8'),
    (['ok.npz', 'deep'], 'more than 8 bits'),
    (['ok.npz', 'broken'], 'broken/1.png cannot be read as a picture'),
    (['ok.npz', 'empty'], 'holds 0 PNG or JPEG files'),
    (['ok.npz', 'latents'], 'latents, expected images: prepare the same pictures without --vae'),
    (['ok.npz', 'floats'], 'floats/data.npy holds float32'),
    (['ok.npz', 'planes'], 'expected uint8 (n, 1 or 3, H, W)'),
    (['ok.npz', 'unreadable'], 'no readable data folder'),
    (['ok.npz', 'ok.npz', '--pr', 'fp8'], 'invalid choice'),
    (['ok.npz', 'ok.npz', '--js'], 'unrecognized arguments'),
]


@pytest.fixture(scope='module')
def mistakes(tmp_path_factory):
    """A folder of everything that can be wrong with an input."""
    folder = tmp_path_factory.mktemp('mistakes')
    os.chdir(folder)
    x = generator().integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    unit = (x / np.float32(255)).astype(np.float32)
    unit[0, 0, 0, :2] = 0, 1
    for name, array in {
        'ok': x,
        'int': x.astype(int),
        'first': x.transpose(0, 3, 1, 2).copy(),
        'unit': unit,
        'signed': unit.astype(float) * 2 - 1,
        'levels': (unit * 255).round(),
        'one': x[:1],
        'scalar': x[0, 0, 0, 0],
        'fortran': np.asfortranarray(x),
        'object': np.array([None, 'x'], object),
    }.items():
        np.savez(f'{name}.npz', arr_0=array)
    np.savez('other.npz', images=x)
    mu, sigma = np.zeros(2048), np.eye(2048)
    np.savez('stats.npz', mu=mu, sigma=sigma)
    np.savez('nan.npz', mu=mu, sigma=sigma * np.nan)
    np.savez('clip.npz', mu=mu[:512], sigma=sigma[:512, :512])
    np.savez('rows.npz', features=np.zeros((3, 512)), weights='')
    np.savez('words.npz', features=np.array(['a', 'b']), weights='')
    np.savez('none.npz', features=np.zeros((0, 2048)), weights='')
    np.savez('object-stats.npz', mu=mu.astype(object), sigma=sigma)
    pathlib.Path('short.npz').write_bytes(pathlib.Path('ok.npz').read_bytes()[:-100])
    with zipfile.ZipFile('ok.npz') as ok, zipfile.ZipFile('header.npz', 'w') as cut:
        cut.writestr('arr_0.npy', ok.read('arr_0.npy')[:-50])
    pathlib.Path('lfs.npz').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    pathlib.Path('html.npz').write_text('<!DOCTYPE html>\n<html></html>')
    for name in ('mixed', 'deep', 'broken', 'empty'):
        pathlib.Path(name).mkdir()
    for name in ('mixed', 'broken'):
        Image.fromarray(x[0]).save(f'{name}/0.png')
    Image.new('RGB', (9, 8)).save('mixed/1.png')
    pathlib.Path('broken/1.png').write_bytes(b'not a picture')
    for i in range(2):
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(f'deep/{i}.png')
    for name, kind, array in (
        ('latents', 'latents', np.zeros((4, 4, 8, 8), np.float32)),
        ('floats', 'images', np.zeros((4, 3, 8, 8), np.float32)),
        ('planes', 'images', np.zeros((4, 4, 8, 8), np.uint8)),
        ('unreadable', 'images', None),
    ):
        pathlib.Path(name).mkdir()
        pathlib.Path(name, 'meta.json').write_text(json.dumps({'kind': kind, 'classes': 0}))
        if array is not None:
            np.save(f'{name}/data.npy', array)
    os.chdir(ROOT)
    return folder


@pytest.mark.parametrize('argv, words', REFUSED)
def test_refusals_exit_with_2_and_write_nothing(argv, words, mistakes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(mistakes)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in mistakes.rglob('*')}
    status, out, err = run(argv, capsys, monkeypatch)
    assert status == 2 and words in err and out == '' and 'Traceback' not in err
    assert 'usage' in err or err.count('\n') == 1  # one sentence
    assert {path: path.stat().st_mtime_ns for path in mistakes.rglob('*')} == before and not list(
        tmp_path.iterdir()
    )


def test_damage_found_while_reading(tmp_path):
    """A picture cut in the middle, and pixels whose checksum is wrong: the headers are fine."""
    write('png', tmp_path / 'cut', pictures(6))
    content = (tmp_path / 'cut' / 'b' / '000005.png').read_bytes()
    (tmp_path / 'cut' / 'b' / '000005.png').write_bytes(content[: len(content) // 2])
    with pytest.raises(fid.BadInput, match='000005.png cannot be read'):
        list(fid.open_side(tmp_path / 'cut').read(0, 6, 4))
    np.savez(tmp_path / 'flipped.npz', arr_0=pictures(40, 64, 64))
    content = bytearray((tmp_path / 'flipped.npz').read_bytes())
    content[400_000] ^= 255
    (tmp_path / 'flipped.npz').write_bytes(content)
    with pytest.raises(fid.BadInput, match='flipped.npz is damaged'):
        list(fid.open_side(tmp_path / 'flipped.npz').read(0, 40, 3))


# ------------------------------------------------------------------------ mistakes, each made once on purpose

MISTAKES = {
    'half-pixel resize': (
        'torch.arange(SIZE, dtype=torch.float32) * (torch.tensor(length, dtype=torch.float32) / SIZE)',
        '((torch.arange(SIZE) + 0.5) * length / SIZE - 0.5).clamp(min=0)',
        'resize',
    ),
    '2 x / 255 - 1': ('(resize(x) - 128) / 128', '(2 * resize(x) / 255 - 1)', 'range'),
    'spatial features of the next block': (
        'x = self.Mixed_6d(x) ',
        'x = self.Mixed_6e(self.Mixed_6d(x)) ',
        'second_impl',
    ),
    'channels first': ('x[:, :7].permute(0, 2, 3, 1).flatten(1)', 'x[:, :7].flatten(1)', 'second_impl'),
    'softmax with bias': ('functional.linear(part, self.fc.weight)', 'self.fc(part)', 'logits'),
    'shuffled splits': (
        'in torch.as_tensor(logits)',
        'in interleaved(torch.as_tensor(logits), split)',
        'splits',
    ),
    'ddof 0': ('self.scatter / (self.n - 1)', 'self.scatter / self.n', 'moments'),
    'ddof 0 of few': ('/ math.sqrt(n - 1)', '/ math.sqrt(n)', 'few_rows'),
    'average in Mixed_7c': ('if self.last:', 'if False:', 'second_impl'),
    'padding counted in A': (
        'average(x, count_include_pad=False))], 1)  # departure 1',
        'average(x))], 1)#',
        'second_impl',
    ),
    'padding counted in C': (
        'average(x, count_include_pad=False))], 1)  # departure 2',
        'average(x))], 1)#',
        'second_impl',
    ),
    'padding counted in E': (
        'average(x, count_include_pad=False)  # departure 3',
        'average(x)  #',
        'second_impl',
    ),
    'k = 2': ('min(k + 1, near', 'min(k, near', 'three_neighbours'),
    'precision and recall swapped': (
        'return fake_in.double().mean().item(), real_in.double().mean().item()',
        'return real_in.double().mean().item(), fake_in.double().mean().item()',
        'what_they_say',
    ),
    'a ball without its rim': ('(d <= real_radii', '(d < real_radii', 'closed_ball'),
    'no float16': ('return x.half().float()', 'return x', 'float16_distances'),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_made_on_purpose_is_found(name, tmp_path):
    right, wrong, test = MISTAKES[name]
    text = re.sub(' {2,}# ', '  # ', pathlib.Path(fid.__file__).read_text())
    assert text.count(right) == 1
    shutil.copytree(ROOT / 'tests', tmp_path / 'tests', ignore=shutil.ignore_patterns('__pycache__'))
    for other in ROOT.glob('*.py'):
        shutil.copy(other, tmp_path)
    (tmp_path / 'fid.py').write_text(text.replace(right, wrong))
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', 'tests/test_fid.py']
    found = subprocess.run(
        [*command, '-k', f'{test} and not mistake'], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 1 and 'FAILED' in found.stdout, found.stdout[-2000:]
