"""How far from real? FID, sFID, Inception Score, precision and recall, as ADM's evaluation computes them.

    python fid.py VIRTUAL_imagenet256_labeled.npz out/50k.npz   # ADM's reference, samples of sample.py --npz
    python fid.py data out/png --pr exact --json              # a data folder, a folder of PNG; a line of JSON
    python fid.py data --save-stats data-stats.npz             # prepare a reference once, use it as REF later
    torchrun --nproc_per_node 2 fid.py REF SAMPLES              # the same numbers; on CPUs one process a core

The first prints, with the numbers of the files at hand in place of the dots,

    reference         VIRTUAL_imagenet256_labeled.npz: 10,000 images of 256 x 256, with stored statistics
    samples           out/50k.npz: 50,000 images of 256 x 256
    weights           pt_inception-2015-12-05-6726825d.pth, SHA-256 6726825d..., the published file
    network           float32 (no TF32), cuda, 1 process, ... images/s
    FID               ...
    sFID              ...
    Inception Score   ...
    precision         ...      k = 3, float16 distances as ADM's
    recall            ...

REF and SAMPLES are each an .npz with `arr_0` uint8 (n, H, W, 3), or with statistics (mu, sigma and, for sFID,
mu_s, sigma_s), or with both; a folder of PNG or JPEG files, read in order of their names; or a data folder of
`data.py` with images. Stored statistics stand for their side in FID and sFID, the images beside them serve
precision and recall. What the given files do not allow is left out and named. Numbers to set beside a
published table need its REF, 50,000 samples, and `--pr adm`, the default.

References: FID, Heusel et al. 2017; sFID, Nash et al. 2021; Inception Score, Salimans et al. 2016; precision
and recall, Kynkaanniemi et al. 2019; the protocol, ADM (Dhariwal & Nichol 2021), whose TensorFlow program is
meant by "ADM" below.

Letters: n images    B a batch    H, W height, width    D dimensions: 2048 pooled, 17 x 17 x 7 = 2023 spatial
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import socket
import sys
import time
import typing
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional
from tqdm import tqdm


class BadInput(ValueError):
    """A user's mistake, told in one sentence. The script prints the sentence and exits with status 2."""


# ------------------------------------------------------------------------------------------- preprocessing

SIZE = 299                                    # pixels a side that the network sees


def resize(x):
    """float32 (B, H, W, C) -> (B, 299, 299, C), bit for bit TensorFlow 1's ResizeBilinear.

    Pixel i of the result lies at i H / 299 of the input: no half-pixel centres, no smoothing when shrinking.
    """
    def neighbours(length):
        at = torch.arange(SIZE, dtype=torch.float32) * (torch.tensor(length, dtype=torch.float32) / SIZE)
        low, high = at.floor().long(), at.ceil().long().clamp(max=length - 1)
        return low.to(x.device), high.to(x.device), (at - at.floor()).to(x.device)[:, None]

    low, high, share = neighbours(x.shape[2])                                 # rows first, as the kernel
    x = x[:, :, low] + (x[:, :, high] - x[:, :, low]) * share                 # (B, H, 299, C)
    low, high, share = neighbours(x.shape[1])
    return x[:, low] + (x[:, high] - x[:, low]) * share[:, None]              # (B, 299, 299, C)


def preprocess(images, device='cpu'):
    """uint8 (B, H, W, 3) -> float32 (B, 3, 299, 299) from -1 to 127/128, in channels-last memory."""
    x = torch.from_numpy(np.array(images)).to(device).float()
    return ((resize(x) - 128) / 128).permute(0, 3, 1, 2)                      # not 2 x / 255 - 1


# ------------------------------------------------------------------------------------------------- network
#
# Inception as released in December 2015. From the usual Inception-v3 it departs in four pools: the averages
# of blocks A, C and the first E leave the padding out of the count, and the last E takes a maximum. It also
# has 1008 outputs, of which 8 mean nothing. Names are those of the weight file.

class Conv(nn.Module):
    """Convolution, batch norm with its stored statistics, ReLU."""

    def __init__(self, n, m, size, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(n, m, size, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(m, eps=1e-3)

    def forward(self, x):
        return functional.relu(self.bn(self.conv(x)), inplace=True)


def average(x, **kwargs):
    return functional.avg_pool2d(x, 3, stride=1, padding=1, **kwargs)


class A(nn.Module):                                                        # 35 x 35: n -> 224 + pool channels
    def __init__(self, n, pool):
        super().__init__()
        self.branch1x1 = Conv(n, 64, 1)
        self.branch5x5_1 = Conv(n, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(n, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(n, pool, 1)

    def forward(self, x):
        return torch.cat([
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average(x, count_include_pad=False))], 1)      # departure 1: padding not counted


class B(nn.Module):                                                         # 35 x 35 -> 17 x 17: n -> 480 + n
    def __init__(self, n):
        super().__init__()
        self.branch3x3 = Conv(n, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(n, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            functional.max_pool2d(x, 3, stride=2)], 1)


class C(nn.Module):                                                           # 17 x 17: 768 -> 768, m inside
    def __init__(self, m):
        super().__init__()
        wide, tall = {'padding': (0, 3)}, {'padding': (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, m, 1)
        self.branch7x7_2 = Conv(m, m, (1, 7), **wide)
        self.branch7x7_3 = Conv(m, 192, (7, 1), **tall)
        self.branch7x7dbl_1 = Conv(768, m, 1)
        self.branch7x7dbl_2 = Conv(m, m, (7, 1), **tall)
        self.branch7x7dbl_3 = Conv(m, m, (1, 7), **wide)
        self.branch7x7dbl_4 = Conv(m, m, (7, 1), **tall)
        self.branch7x7dbl_5 = Conv(m, 192, (1, 7), **wide)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([
            self.branch1x1(x),                                           # first: sFID reads 7 of its channels
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average(x, count_include_pad=False))], 1)      # departure 2: padding not counted


class D(nn.Module):                                                           # 17 x 17 -> 8 x 8: 768 -> 1280
    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
            functional.max_pool2d(x, 3, stride=2)], 1)


class E(nn.Module):                                                           # 8 x 8: n -> 2048
    def __init__(self, n, last):
        super().__init__()
        self.last = last
        self.branch1x1 = Conv(n, 320, 1)
        self.branch3x3_1 = Conv(n, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(n, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(n, 192, 1)

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        if self.last:
            pooled = functional.max_pool2d(x, 3, stride=1, padding=1)    # departure 4: a maximum, in Mixed_7c
        else:
            pooled = average(x, count_include_pad=False)                    # departure 3: padding not counted
        return torch.cat([
            self.branch1x1(x),
            self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
            self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Preprocessed images -> pooled (B, 2048) and spatial (B, 2023) features. `logits` start from pooled."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = D()
        self.Mixed_7b, self.Mixed_7c = E(1280, last=False), E(2048, last=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):                                                     # (B,    3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))     # (B,   64, 147, 147)
        x = functional.max_pool2d(x, 3, stride=2)                             # (B,   64,  73,  73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                         # (B,  192,  71,  71)
        x = functional.max_pool2d(x, 3, stride=2)                             # (B,  192,  35,  35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                    # (B,  288,  35,  35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                    # (B,  768,  17,  17)
        x = self.Mixed_6d(x)                                    # 7 channels of its 1 x 1 branch: mixed_6/conv
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)              # (B, 2023), in the order h, w, channel
        x = self.Mixed_7a(self.Mixed_6e(x))                                   # (B, 1280,   8,   8)
        x = self.Mixed_7c(self.Mixed_7b(x))                                   # (B, 2048,   8,   8)
        return x.mean((2, 3)), spatial

    def logits(self, pool):
        """(n, 1008) from pooled features, without the bias: ADM multiplies by the matrix and stops there."""
        return torch.cat([functional.linear(part, self.fc.weight) for part in pool.split(512)])


# ------------------------------------------------------------------------------------------------- weights

NAME = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}'
SHA256, BYTES = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2', 95_628_359


def tf_names(names):
    """{TensorFlow's name: ours} for the names of `Inception().state_dict()`, in their order.

    In a block a lone convolution is `conv`; longer branches and the pool's are `tower`, `tower_1`, ... of
    `conv`, `conv_1`, ...; a pair side by side, a and b, is `conv` and `conv_1` of a scope `mixed`.
    """
    def nth(word, i):
        return f'{word}_{i}' if i else word

    convs = [name.removesuffix('.conv.weight') for name in names if name.endswith('.conv.weight')]
    scopes = {name: nth('conv', i) for i, name in enumerate(name for name in convs if '.' not in name)}
    blocks = itertools.groupby((name for name in convs if '.' in name), lambda name: name.split('.')[0])
    for i, (_, block) in enumerate(blocks):
        stems = itertools.groupby(block, lambda name: name.rsplit('_', 1)[0])
        branches = [list(branch) for _, branch in stems]
        towers = [branch for branch in branches if len(branch) > 1 or branch[0].endswith('pool')]
        for branch in branches:
            tower = nth('tower', towers.index(branch)) + '/' if branch in towers else ''
            pair = [name for name in branch if name[-1] in 'ab']
            for inner, row in (('', [name for name in branch if name not in pair]), ('mixed/', pair)):
                scope = f'{nth("mixed", i)}/{tower}{inner}'
                scopes |= {name: scope + nth('conv', j) for j, name in enumerate(row)}
    parts = {'conv.weight': 'conv2d_params', 'bn.weight': 'batchnorm/gamma', 'bn.bias': 'batchnorm/beta',
             'bn.running_mean': 'batchnorm/moving_mean', 'bn.running_var': 'batchnorm/moving_variance'}
    pairs = itertools.product(scopes.items(), parts.items())
    found = {f'{scope}/{theirs}': f'{name}.{ours}' for (name, scope), (ours, theirs) in pairs}
    return found | {'softmax/weights': 'fc.weight', 'softmax/biases': 'fc.bias'}


def varint(message, at):
    """(value, next place) of a protobuf integer: 7 bits a byte, lowest first, and 1 that says more follow."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
    raise ValueError('an integer of more than ten bytes')


def fields(message):
    """Every (number, value) of a protobuf message: integers, or for the other types a view of their bytes."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        if key & 7 == 0:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value = message[at:at + size]
            at += size
            if len(value) < size:
                raise IndexError('a field runs past the end')
        yield key >> 3, value


def read_graph(graph, expected):
    """TensorFlow's GraphDef -> {our name: float32 tensor}. `expected` maps our names to their shapes.

    GraphDef.node = 1; NodeDef.name = 1, .attr = 5, a map: key = 1, value = 2; AttrValue.tensor = 8;
    TensorProto.dtype = 1, .tensor_shape = 2, .tensor_content = 4, .float_val = 5; TensorShapeProto.dim = 2;
    Dim.size = 1.
    """
    names, state = tf_names(expected), {}
    for number, node in fields(graph):
        node = list(fields(node)) if number == 1 else []
        name = names.get(next((bytes(value).decode() for number, value in node if number == 1), None))
        for attribute in (dict(fields(value)) for number, value in node if number == 5 and name):
            if bytes(attribute[1]) == b'value':
                state[name] = read_tensor(name, dict(fields(attribute[2]))[8], expected[name])
    return state


def read_tensor(name, message, expected):
    parts = collections.defaultdict(list)
    for number, value in fields(message):
        parts[number].append(value)
    if parts[1] != [1]:
        raise ValueError('not float32')
    shape = [dict(fields(dim)).get(1, 0) for number, dim in fields(parts[2][0]) if number == 2]
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}.get(len(shape), ())            # ours is out, in, H, W
    check_shape(name, [shape[i] for i in order], expected)                  # before anything so large is made
    values = np.frombuffer(b''.join(parts[4] or parts[5]), '<f4')
    values = np.broadcast_to(values, math.prod(shape)) if len(values) == 1 else values    # one stands for all
    return torch.from_numpy(values.reshape(shape).transpose(order).copy())


def check_shape(name, found, expected):
    found, expected = list(found), list(expected)
    if name.startswith('fc.') and found[:1] != expected[:1]:
        raise BadInput(f'the weights know {found[0] if found else 0} classes, expected {expected[0]}')
    if found != expected:
        raise BadInput(f'the weights hold {name} of shape {found}, expected {expected}')


def refuse_pretender(path, head):
    """What a failed download leaves in place of a file."""
    if head.startswith(b'version https://git-lfs'):
        raise BadInput(f'{path} is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`')
    if head.lstrip()[:5].lower() in (b'<!doc', b'<html'):
        raise BadInput(f'{path} is an HTML page, not the file that was to be downloaded: fetch it again')


def load_weights(path, sha256=None):
    """(Inception in evaluation mode, the file's SHA-256).

    `sha256` is what the file must have; by default a .pth that of the published one. None is known of
    TensorFlow's .pb: its names, shapes and types are checked, its numbers only if `sha256` is given.
    """
    try:
        if os.path.getsize(path) > 4 * BYTES or pathlib.Path(path).is_char_device():
            raise BadInput(f'{path} is too large for Inception, whose weights are {BYTES:,} bytes')
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f'cannot read the weights {path}: {error.strerror}') from None
    refuse_pretender(path, content[:100])
    graph = content[:1] == b'\n'                                         # GraphDef begins with field 1, bytes
    found, wanted = hashlib.sha256(content).hexdigest(), sha256 or (None if graph else SHA256)
    if wanted and found != wanted.lower():
        raise BadInput(f'{path} has {len(content)} bytes and SHA-256 {found}, expected {wanted}: it is '
                       f'incomplete or another file (the 2015 Inception is at {URL})')
    net = Inception()
    expected = {name: value.shape for name, value in net.state_dict().items() if not name.endswith('tracked')}
    try:
        if zipfile.is_zipfile(io.BytesIO(content)) and any(part.compress_type for part in
                                                           zipfile.ZipFile(io.BytesIO(content)).infolist()):
            raise BadInput('it is packed, and torch packs nothing: it may be made to fill the memory')
        state = (read_graph(memoryview(content), expected) if graph
                 else torch.load(io.BytesIO(content), map_location='cpu', weights_only=True))
        state = {name: value for name, value in state.items() if not name.endswith('tracked')}
        odd = sorted(state.keys() ^ expected.keys())
        if odd:
            raise BadInput(f'not the 2015 Inception, {len(odd)} tensors are missing or too many: {odd[0]}')
        for name, shape in expected.items():
            check_shape(name, state[name].shape, shape)
            state[name] = state[name].float()
    except BadInput as mistake:
        raise BadInput(f'{path}: {mistake}') from None
    except Exception as error:                                                # a broken file raises anything
        raise BadInput(f'{path} cannot be read as weights, it is cut short or of another kind '
                       f'({type(error).__name__})') from None
    net.load_state_dict(state, strict=False)                                  # BN's counters may be absent
    torch.backends.cudnn.conv.fp32_precision = 'ieee'                         # not TF32: that moves FID 1e-3
    torch.backends.cuda.matmul.fp32_precision = 'ieee'
    torch.backends.cudnn.deterministic = True
    return net.train(False).requires_grad_(False).to(memory_format=torch.channels_last), found


def find_weights():
    """The path of the weights in torch's hub cache; they are downloaded there if it does not hold them."""
    target = pathlib.Path(torch.hub.get_dir()) / 'checkpoints' / NAME
    if not target.exists():
        socket.setdefaulttimeout(30)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(target), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:
            raise BadInput(f'no Inception weights here, and the download failed ({error}): put {URL} '
                           f'({BYTES:,} bytes, SHA-256 {SHA256}) at {target}, '
                           f'or name the file with --weights') from None
    return target


# ---------------------------------------------------------------------------------------- Frechet distance

Gaussian = collections.namedtuple('Gaussian', 'mean cov factor', defaults=[None])
Gaussian.__doc__ = "mean (D,), cov (D, D), float64; and where n < D, factor (n, D) with factor' factor = cov."


class Moments:
    """Mean and covariance of rows that come in any portions, in one pass and float64 (Chan et al. 1979)."""

    def __init__(self, dimensions):
        self.n = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)    # sum (x - mean)(x - mean)'

    def add(self, rows):
        part = Moments(0)                                                    # the moments of these rows alone
        rows = rows.double()
        part.n, part.mean = len(rows), rows.mean(0)
        rows = rows - part.mean
        part.scatter = rows.T @ rows
        return self.merge(part)

    def merge(self, other):
        if other.n:
            total, step = self.n + other.n, other.mean - self.mean
            self.scatter += other.scatter + torch.outer(step, step) * (self.n * other.n / total)
            self.mean += step * (other.n / total)
            self.n = total
        return self

    def gaussian(self):
        return Gaussian(self.mean, self.scatter / (self.n - 1))               # numpy.cov's ddof 1


def gaussian(rows):
    """The Gaussian of features (n, D)."""
    n, dimensions = rows.shape
    if n < dimensions:
        mean = rows.double().mean(0)
        factor = (rows.double() - mean) / math.sqrt(n - 1)
        return Gaussian(mean, factor.T @ factor, factor)
    moments = Moments(dimensions)
    for part in rows.split(1000):
        moments.add(part)
    return moments.gaussian()


def root(cov):
    """R (D, D) with R'R = cov."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()).T


def frechet(a, b):
    """|mean_a - mean_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^1/2 of two Gaussians.

    With S_a = R'R, the eigenvalues of S_a S_b are those of R S_b R', which is symmetric: real and, up to
    rounding, not negative. R has as few rows as either side allows.
    """
    a, b = sorted((a, b), key=lambda side: len(side.mean) if side.factor is None else len(side.factor))
    R = root(a.cov) if a.factor is None else a.factor
    cross = torch.linalg.eigvalsh(R @ b.cov @ R.T).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(distance.item(), 0.0)


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """From moments, numpy or torch."""
    a, b = (Gaussian(*(torch.as_tensor(part, dtype=torch.float64) for part in side))
            for side in ((mean_1, cov_1), (mean_2, cov_2)))
    return frechet(a, b)


def frechet_from_features(x, y):
    """From features (n, D) and (m, D)."""
    return frechet(gaussian(torch.as_tensor(x)), gaussian(torch.as_tensor(y)))


# ----------------------------------------------------------------------------------------- Inception Score

def inception_score(logits, split=5000):
    """exp of the mean KL(p(y | x) || p(y)) of `split` consecutive rows, then the mean over the splits.

    In the order of the file, a short last split weighing as much as the others: ADM does not shuffle.
    """
    scores = []
    for part in torch.as_tensor(logits).double().split(split):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def interleaved(rows, split=5000):
    """The same rows so ordered that every split gets a share of all parts of the file."""
    return rows[torch.argsort(torch.arange(len(rows)) % -(-len(rows) // split), stable=True)]


# ---------------------------------------------------------------------------------------- precision, recall

def half(x):
    return x.half().float()


def adm_distances(u, v):
    """|u - v|^2 for all pairs of rows, (m, n) float32, rounded to float16 after every step as in ADM's graph.

    A pooled feature's square is a few hundred, so distances come in steps of 1/8 or 1/4, and ties pass `<=`:
    both measures are about 0.001 to 0.002 higher than the exact ones, and so is every published number.
    """
    a, b = half(u), half(v)
    norm_a, norm_b = half(half(a * a).sum(1))[:, None], half(half(b * b).sum(1))
    d = half(half(norm_a - half(2 * half(a @ b.T))) + norm_b).clamp(min=0)
    if not d.isfinite().all():            # ADM asks it of 10,000 x 10,000 pairs; real features never get here
        d = (u * u).sum(1)[:, None] - 2 * (u @ v.T) + (v * v).sum(1)
    return d.clamp(min=0)


def exact_distances(u, v):
    """|u - v|^2 for all pairs of rows, (m, n) float64; 0 where float32 features cannot tell u from v."""
    u, v = u.double(), v.double()
    norms = (u * u).sum(1)[:, None] + (v * v).sum(1)
    d = norms - 2 * (u @ v.T)
    return d.masked_fill_(d < 1e-12 * norms, 0)


DISTANCES = {'adm': adm_distances, 'exact': exact_distances}


def radii(x, k, distances, block):
    """The squared distance of every row to its k-th neighbour, itself not counted: (n,)."""
    result = []
    for rows in x.split(block):
        near = distances(rows, rows[:0])
        for columns in x.split(block):
            near = torch.cat([near, distances(rows, columns)], 1)
            near = near.topk(min(k + 1, near.shape[1]), largest=False).values  # k + 1: each row meets itself
        result.append(near[:, -1])
    return torch.cat(result)


def precision_recall(real, fake, k=3, mode='adm', block=2000):
    """(precision, recall) of features float32 (n, D), at least k + 1 on each side.

    Precision: the share of fakes in the ball of some real, whose radius reaches to its k-th nearest real.
    Recall: the same with the roles exchanged. Distances are of `block` x `block` pairs at a time.
    """
    distances = DISTANCES[mode]
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    real_radii, fake_radii = radii(real, k, distances, block), radii(fake, k, distances, block)
    real_in, fake_in = (torch.zeros_like(r, dtype=torch.bool) for r in (real_radii, fake_radii))
    for i in range(0, len(real), block):
        for j in range(0, len(fake), block):
            d = distances(real[i:i + block], fake[j:j + block])
            fake_in[j:j + block] |= (d <= real_radii[i:i + block, None]).any(0)
            real_in[i:i + block] |= (d <= fake_radii[None, j:j + block]).any(1)
    return fake_in.double().mean().item(), real_in.double().mean().item()


# -------------------------------------------------------------------------------------------------- inputs

@dataclasses.dataclass
class Side:
    """REF or SAMPLES: what the file gives, and then what was computed from it."""
    path: str
    count: int = 0                            # images, or rows of stored features
    size: tuple = ()                          # H, W
    read: typing.Callable | None = None       # read(start, stop, step) gives batches uint8 (B, H, W, 3)
    converted: int = 0                        # pictures that were not RGB
    jpeg: int = 0
    stored: bool = False                      # the file holds statistics
    weights: str = ''                         # SHA-256 of the network they were computed with, where known
    pool: torch.Tensor | None = None          # (n, 2048) float32, in file order
    fid: Gaussian | None = None               # of the pooled features
    sfid: Gaussian | None = None              # of the spatial features


LARGEST = 4096                                # pixels a side
UNPACKED = 200                                # times its size: as much as any pictures were ever packed


def check_pixels(path, shape, dtype, some):
    """Refuse what is not uint8 (n, H, W, 3) with at least 2 images; `some` holds the first pixels."""
    if dtype.kind == 'f' and some.size:
        low, high = some.min(), some.max()
        how = '(x + 1) * 127.5' if low < 0 else 'x * 255' if high <= 1 else 'x'
        raise BadInput(f'{path} holds {dtype} from {low:g} to {high:g}, expected uint8 from 0 to 255: save '
                       f'`({how}).round().clip(0, 255).astype("uint8")`')
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:] or max(shape[1:]) > LARGEST:
        raise BadInput(f'{path} holds {dtype} {tuple(shape)}, expected images uint8 (n, H, W, 3) of at most '
                       f'{LARGEST} pixels a side')
    if shape[0] < 2:
        raise BadInput(f'{path} holds {shape[0]} images, expected at least 2 for a covariance')


HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_header(archive, path, name, unpacked=math.inf):
    """(shape, whether in Fortran order, dtype, where the numbers begin) of an array in an .npz, of which no
    more is read: the header and the archive's directory may say anything, and must agree. What is packed may
    have `unpacked` times the file's size."""
    with archive.open(f'{name}.npy') as file:
        shape, fortran, dtype = HEADERS[np.lib.format.read_magic(file)](file)
        begin, part = file.tell(), archive.getinfo(f'{name}.npy')
    if dtype.hasobject:
        raise BadInput(f'{path} holds an object array {name}, expected numbers')
    if part.file_size != begin + math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise BadInput(f'{path} is cut short: {name} is smaller than its {dtype} {shape}')
    if part.file_size > os.path.getsize(path) * (unpacked if part.compress_type else 1):
        raise BadInput(f'{path} says that {name} has {part.file_size:,} bytes, which do not fit into its '
                       f'{os.path.getsize(path):,}: it is damaged, or made to fill the memory')
    return shape, fortran, dtype, begin


def open_images(archive, path):
    """`arr_0` of an .npz, as (count, size, read). It streams: a reference of 512 pixels is 8 GB."""
    shape, fortran, dtype, begin = read_header(archive, path, 'arr_0', UNPACKED)
    row = math.prod(shape[1:]) * dtype.itemsize
    with archive.open('arr_0.npy') as file:
        file.seek(begin)
        some = file.read(min(8 * row, dtype.itemsize << 20))                  # a row may claim to be huge
        check_pixels(path, shape, dtype, np.frombuffer(some, dtype if some else 'u1'))
    if fortran:
        raise BadInput(f'{path} holds arr_0 in Fortran order: save `np.ascontiguousarray(images)`')

    def read(start, stop, step):
        try:
            with zipfile.ZipFile(path) as again, again.open('arr_0.npy') as file:
                file.seek(begin + start * row)
                for at in range(start, stop, step):
                    content = file.read(min(step, stop - at) * row)
                    yield np.frombuffer(content, np.uint8).reshape(-1, *shape[1:])
        except Exception as error:                                            # a broken file raises anything
            raise BadInput(f'{path} is damaged: {" ".join(str(error).split())[:200]}') from None
    return shape[0], shape[1:3], read


def open_npz(path):
    side = Side(str(path))
    try:
        with open(path, 'rb') as file:
            refuse_pretender(path, file.read(100))
        with zipfile.ZipFile(path) as archive, np.load(path) as arrays:     # numpy refuses objects by default
            for name, mean, cov, D in (('fid', 'mu', 'sigma', 2048), ('sfid', 'mu_s', 'sigma_s', 2023)):
                if mean not in arrays or cov not in arrays:
                    continue
                shapes, _, dtypes, _ = zip(*(read_header(archive, path, part) for part in (mean, cov)))
                if shapes != ((D,), (D, D)) or [dtype.kind for dtype in dtypes] != ['f', 'f']:
                    raise BadInput(f'{path} holds {name} statistics of shape {shapes[0]} and {shapes[1]}, '
                                   f'expected floats ({D},) and ({D}, {D}): those of another network?')
                mean, cov = arrays[mean], arrays[cov]
                if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
                    raise BadInput(f'{path} holds {name} statistics that are not finite numbers: remake them')
                mean, cov = (torch.from_numpy(part.astype(np.float64)) for part in (mean, cov))
                setattr(side, name, Gaussian(mean, cov))
                side.stored = True
            if 'features' in arrays and 'weights' in arrays:                  # written by --save-stats
                shape, _, dtype, _ = read_header(archive, path, 'features', 1)
                if len(shape) != 2 or shape[0] < 2 or shape[1] != 2048 or dtype.kind != 'f' \
                        or read_header(archive, path, 'weights', 1)[0] != ():
                    raise BadInput(f'{path} has features {list(shape)} of {dtype}, expected floats [n, 2048]')
                side.pool, side.weights = torch.from_numpy(arrays['features']).float(), str(arrays['weights'])
                side.count = len(side.pool)
                if not side.pool.isfinite().all():
                    raise BadInput(f'{path} has features that are not finite numbers: remake them')
            elif 'arr_0' in arrays:
                side.count, side.size, side.read = open_images(archive, path)
            elif not side.stored:
                raise BadInput(f'{path} holds {", ".join(list(arrays)[:9]) or "nothing"}, expected images '
                               f'arr_0, or statistics mu and sigma')
    except BadInput:
        raise
    except Exception as error:                                                # a broken file raises anything
        raise BadInput(f'{path} cannot be read as an .npz file, it is cut short or of another kind: '
                       f'{" ".join(str(error).split())[:200]}') from None
    return side


def open_data(path):
    """A data folder: data.npy uint8 (n, C, H, W) and meta.json with the kind images."""
    try:
        if os.path.getsize(pathlib.Path(path) / 'meta.json') > 10 ** 7:
            raise ValueError('meta.json has more than ten megabytes')
        kind = json.loads((pathlib.Path(path) / 'meta.json').read_text()).get('kind')
        array = np.lib.format.open_memmap(pathlib.Path(path) / 'data.npy', mode='r')
    except Exception as error:                                                # a broken file raises anything
        why = ' '.join(str(error).split())[:200]
        raise BadInput(f'{path} is no readable data folder: {why}') from None
    if kind != 'images':
        found = ' '.join(str(kind)[:50].split())
        raise BadInput(f'{path} is a data folder of {found}, expected images: prepare the same '
                       f'pictures without --vae (python data.py folder SRC --out DIR --size 256)')
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise BadInput(f'{path}/data.npy holds {array.dtype} {array.shape}, expected uint8 (n, 1 or 3, H, W)')
    n, C, H, W = array.shape
    check_pixels(f'{path}/data.npy', (n, H, W, 3), array.dtype, array[:8])

    def read(start, stop, step):
        for at in range(start, stop, step):
            batch = array[at:min(at + step, stop)].transpose(0, 2, 3, 1)
            yield np.broadcast_to(batch, (len(batch), H, W, 3))
    return Side(str(path), n, (H, W), read, converted=n if C == 1 else 0)


@contextlib.contextmanager
def picture(file):
    try:
        with Image.open(file) as image:
            yield image
    except BadInput:
        raise
    except Exception as error:                                                # a broken file raises anything
        raise BadInput(f'{file} cannot be read as a picture: {error}') from None


SUFFIXES = ('.png', '.jpg', '.jpeg')


def open_folder(path):
    """A folder of PNG and JPEG files, and of folders of them. Their headers are all read first."""
    files = sorted(str(file) for file in pathlib.Path(path).rglob('*') if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise BadInput(f'{path} holds {len(files)} PNG or JPEG files, expected at least 2')
    side = Side(str(path), len(files))
    for file in files:
        with picture(file) as image:
            side.size = side.size or image.size[::-1]
            if image.size[::-1] != side.size:
                raise BadInput(f'{file} is {" x ".join(map(str, image.size))}, but {files[0]} is '
                               f'{" x ".join(map(str, side.size[::-1]))} pixels: expected a single size')
            if max(image.size) > LARGEST:
                raise BadInput(f'{file} is {" x ".join(map(str, image.size))} pixels: expected at most '
                               f'{LARGEST} a side')
            if image.mode[0] in 'IF':
                raise BadInput(f'{file} has more than 8 bits a channel ({image.mode}): expected 8')
            side.converted += image.mode != 'RGB'
            side.jpeg += image.format == 'JPEG'

    def read(start, stop, step):
        for at in range(start, stop, step):
            batch = []
            for file in files[at:min(at + step, stop)]:
                with picture(file) as image:
                    batch.append(np.asarray(image.convert('RGB')))
            yield np.stack(batch)
    side.read = read
    return side


def pixels(side):
    return ' x '.join(str(n) for n in reversed(side.size))


def open_side(path):
    path = pathlib.Path(path)
    if os.path.isdir(path):                               # pathlib's raises where a name is too long
        return open_data(path) if (path / 'meta.json').exists() else open_folder(path)
    if not os.path.exists(path):
        raise BadInput(f'there is no {path}: expected an .npz file, a folder of pictures, or a data folder')
    return open_npz(path)


# ---------------------------------------------------------------------------------------------- evaluation

BATCH = {'cpu': 8, 'cuda': 64}                # images at a time; on a CPU more is slower
FULL = 50_000                                 # samples behind the published numbers


def share(count, step, rank, world):
    """(start, stop) of a process. Whole batches: an image meets the same ones, and is rounded alike, for any
    number of processes."""
    batches = -(-count // step)
    return tuple(min(count, batches * r // world * step) for r in (rank, rank + 1))


def gather(rows, counts, rank):
    """The rows of all processes, in their order, on process 0; the others keep their own."""
    for source, count in enumerate(counts):
        if source and count and rank == source:
            dist.send(rows.contiguous(), 0)
        elif source and count and rank == 0:
            part = rows.new_empty(count, *rows.shape[1:])
            dist.recv(part, source)
            rows = torch.cat([rows, part])
    return rows


def agree(mistake, world, what):
    """All processes stop where one has made a mistake, or none."""
    failed = torch.tensor([mistake is not None], dtype=torch.int64)
    if world > 1:
        dist.all_reduce(failed)
    if failed:
        raise mistake or BadInput(f'another process could not read {what}')


@torch.no_grad()
def extract(net, side, rank=0, world=1):
    """Fill in, on process 0, what a side's images give: features and, if none is stored, statistics."""
    device = net.fc.weight.device
    step = BATCH[device.type]
    spans = [share(side.count, step, r, world) for r in range(world)]
    counts = [stop - start for start, stop in spans]
    pool, spatial, moments = [torch.empty(0, 2048)], [torch.empty(0, 2023)], Moments(2023)
    mistake = None
    with tqdm(total=counts[rank], desc=side.path, unit=' images', disable=rank > 0 or None) as bar:
        try:
            for images in side.read(*spans[rank], step):
                features, map_ = net(preprocess(images, device))
                pool.append(features.cpu())
                if not side.stored:
                    spatial.append(map_.cpu())
                if side.count >= 2023 and len(spatial) * step > 1000:         # of many, only the moments
                    moments.add(torch.cat(spatial))
                    spatial = spatial[:1]
                bar.update(len(images))
        except BadInput as error:
            mistake = error
    agree(mistake, world, f'its part of {side.path}')
    side.pool, spatial = gather(torch.cat(pool), counts, rank), torch.cat(spatial)
    if side.stored:
        return
    if side.count < 2023:
        spatial = gather(spatial, counts, rank)
    else:
        if len(spatial):
            moments.add(spatial)
        packed = torch.cat([torch.tensor([moments.n]), moments.mean, moments.scatter.flatten()])
        everyone = gather(packed[None], [1] * world, rank)
    if rank == 0:
        side.fid = gaussian(side.pool)
        side.sfid = gaussian(spatial) if side.count < 2023 else merged(everyone)


def merged(packed):
    """The Gaussian of moments that several processes sent: rows of n, mean, scatter."""
    total = Moments(2023)
    for row in packed:
        part = Moments(0)
        part.n, part.mean, part.scatter = int(row[0]), row[1:2024], row[2024:].reshape(2023, 2023)
        total.merge(part)
    return total.gaussian()


def save_statistics(path, side, sha256):
    arrays = {'features': side.pool.numpy(), 'weights': np.array(sha256)}
    for mean, cov, stats in (('mu', 'sigma', side.fid), ('mu_s', 'sigma_s', side.sfid)):
        if stats is not None:
            arrays |= {mean: stats.mean.numpy(), cov: stats.cov.numpy()}
    temporary = f'{path}.tmp{os.getpid()}'
    try:
        with open(temporary, 'wb') as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise BadInput(f'cannot write {path}: {error.strerror or error}') from None


def cautions(ref, gen, sha256):
    """Sentences: what should make a reader of the numbers think twice."""
    for side in filter(None, (ref, gen)):
        if side.converted:
            yield f'{side.path}: {side.converted} pictures were grey or had alpha or a palette, made RGB'
        if side.jpeg:
            yield f'{side.path}: {side.jpeg} pictures are JPEG; its losses move FID, PNG has none'
        if side.weights and side.weights != sha256:
            yield f'{side.path}: made with other weights, SHA-256 {side.weights[:8]}..., than this run'
    if gen and ref.size and gen.size and ref.size != gen.size:
        yield f'the sizes differ, {pixels(ref)} and {pixels(gen)} pixels'
    if gen and gen.stored and not ref.stored:
        yield f'{gen.path} brings stored statistics and {ref.path} none: are the sides swapped?'
    if gen and gen.count and abs(gen.count - FULL) > FULL / 100:
        yield (f'{gen.count:,} samples: the fewer, the higher FID and sFID, so compare only with numbers of '
               f'as many; published ones have {FULL:,}')


def evaluate(reference, samples=None, weights=None, sha256=None, pr='adm', save_stats=None,
             device='cpu', rank=0, world=1):
    """A dictionary of the five measures, and of what one must know to compare them; None but on process 0.

    fid, sfid, inception_score, precision, recall    numbers; `left_out` says why one is absent
    fifths                                           FID, Inception Score of fifths, unless n is 50,000 +- 1 %
    notes                                            sentences, see `cautions`
    Without `samples` there is nothing to measure, but the reference's statistics go to the file `save_stats`.
    """
    ref = open_side(reference)
    gen = open_side(samples) if samples is not None else None
    sides = [ref] if gen is None else [ref, gen]
    if save_stats and not ref.read:
        raise BadInput(f'--save-stats: {ref.path} holds no images, so there is nothing to compute')
    if gen and not gen.count and ref.count:
        raise BadInput(f'{gen.path} holds only statistics, and the images are in {ref.path}: if the sides '
                       f'are swapped, type `python fid.py {gen.path} {ref.path}`')

    # features
    result = {name: {'path': side.path, 'images': side.count, 'pixels': pixels(side), 'stored': side.stored}
              for name, side in zip(('reference', 'samples'), sides)}
    result |= {'pr': pr, 'device': torch.device(device).type, 'processes': world}
    net = None
    if any(side.count for side in sides):
        mistake = None
        try:
            weights = weights or (find_weights() if rank == 0 else None)
        except BadInput as error:
            mistake = error
        agree(mistake, world, 'the weights')                                  # the first process downloads
        weights = weights or find_weights()
        net, result['sha256'] = load_weights(weights, sha256)
        net.to(device)
        result |= {'weights': str(weights), 'published_weights': result['sha256'] == SHA256}
        start = time.perf_counter()
        for side in sides:
            if side.read:
                extract(net, side, rank, world)
        seen = sum(side.count for side in sides if side.read)
        result |= {'images_per_second': seen / (time.perf_counter() - start)}
    if rank > 0:
        return None
    if save_stats:
        save_statistics(save_stats, ref, result['sha256'])
    result['notes'] = list(cautions(ref, gen, result.get('sha256')))
    if gen is None:
        return result

    # the five measures
    left_out = result['left_out'] = {}
    for measure, arrays in (('fid', 'mu and sigma'), ('sfid', 'mu_s and sigma_s')):
        without = [side.path for side in sides if getattr(side, measure) is None]
        if without:
            left_out[measure] = f'no {arrays} in {" and ".join(without)}'
        else:
            result[measure] = frechet(getattr(ref, measure), getattr(gen, measure))
    few = [side.path for side in sides if side.count < 4]
    if few:
        left_out['precision'] = left_out['recall'] = f'fewer than 4 images in {" and ".join(few)}'
    else:
        pools = (side.pool.to(device) for side in sides)
        result['precision'], result['recall'] = precision_recall(*pools, mode=pr)
    if gen.pool is None:
        left_out['inception_score'] = f'no images in {gen.path}'
        return result
    logits = net.logits(gen.pool.to(device)).cpu()
    score, mixed = inception_score(logits), inception_score(interleaved(logits))
    result['inception_score'] = score
    if mixed > 1.05 * score:
        result['notes'].append(f'{gen.path} looks sorted by class: the Inception Score of consecutive 5,000s '
                               f'is {score:.2f}, of mixed ones {mixed:.2f}; ADM does not shuffle')
    if gen.count >= 10 and ref.fid is not None and abs(gen.count - FULL) > FULL / 100:
        parts = [torch.arange(i, gen.count, 5) for i in range(5)]
        result['fifths'] = {'images': gen.count // 5,
                            'fid': [frechet(ref.fid, gaussian(gen.pool[part])) for part in parts],
                            'inception_score': [inception_score(logits[part]) for part in parts]}
    return result


# -------------------------------------------------------------------------------------------- command line

MEASURES = {'fid': 'FID', 'sfid': 'sFID', 'inception_score': 'Inception Score', 'precision': 'precision',
            'recall': 'recall'}
MODES = {'adm': "k = 3, float16 distances as ADM's", 'exact': 'k = 3, exact distances, not those of papers'}


def report(result):
    """The lines of the docstring above: (what, about it)."""
    for name in ('reference', 'samples'):
        if side := result.get(name):
            images = f'{side["images"]:,} images' + f' of {side["pixels"]}' * bool(side['pixels'])
            yield name, side['path'] + ': ' + ', with '.join(
                [images] * bool(side['images']) + ['stored statistics'] * side['stored'])
    if 'weights' in result:
        yield 'weights', (f'{os.path.basename(result["weights"])}, SHA-256 {result["sha256"][:8]}..., '
                          f'{"" if result["published_weights"] else "not "}the published file')
    if result.get('images_per_second'):
        yield 'network', (f'float32 (no TF32), {result["device"]}, {result["processes"]} process'
                          f'{"es" * (result["processes"] > 1)}, {result["images_per_second"]:.1f} images/s')
    for key, name in MEASURES.items():
        if key in result:
            yield name, f'{result[key]:8.4f}' + f'   {MODES[result["pr"]]}' * (key == 'precision')
        elif key in result.get('left_out', {}):
            yield name, f'left out: {result["left_out"][key]}'
    for key in ('fid', 'inception_score') * ('fifths' in result):
        values = result['fifths'][key]
        yield '', (f'{MEASURES[key]} of disjoint fifths, {result["fifths"]["images"]:,} images each: '
                   f'{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}')


def parse(argv):
    parser = argparse.ArgumentParser(description='How far from real?', allow_abbrev=False)
    parser.add_argument('reference', metavar='REF', help='.npz, folder of PNG or JPEG files, or data folder')
    parser.add_argument('samples', metavar='SAMPLES', nargs='?', help='the same; --save-stats can do without')
    parser.add_argument('--weights', metavar='FILE', help=f"{NAME} or TensorFlow's "
                        "classify_image_graph_def.pb (default: from torch's hub cache, or downloaded there)")
    parser.add_argument('--sha256', metavar='HEX', help="hash that --weights must have (default: a .pth the "
                        "published file's; a .pb any)")
    parser.add_argument('--pr', choices=DISTANCES, default='adm', help='distances of precision and recall')
    parser.add_argument('--save-stats', metavar='FILE', help="write REF's statistics and features, .npz")
    parser.add_argument('--json', action='store_true', help='print one line of JSON')
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.samples is None and not args.save_stats:
        raise BadInput('SAMPLES is missing: type `python fid.py REF SAMPLES`, or --save-stats FILE')
    if args.sha256 and not args.weights:
        raise BadInput('--sha256 belongs to --weights: the file of the hub cache is the published one')
    if args.save_stats and os.path.exists(args.save_stats):
        raise BadInput(f'{args.save_stats} exists already: remove it, or choose another --save-stats')
    if args.save_stats and not os.path.isdir(os.path.dirname(args.save_stats) or '.'):
        raise BadInput(f'cannot write {args.save_stats}: there is no such folder')

    # where am I
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = torch.device('cpu')
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
        if local >= gpus:
            raise BadInput(f'process {local} of this machine, counted from 0, has no GPU, for there are '
                           f'{gpus}: type --nproc_per_node {gpus}')
        device = torch.device('cuda', local)
    if world > 1 and not dist.is_initialized():                             # what travels is in main memory
        dist.init_process_group('gloo', timeout=datetime.timedelta(days=1))

    result = evaluate(args.reference, args.samples, args.weights, args.sha256, args.pr, args.save_stats,
                      device, rank, world)
    if rank == 0:
        for what, text in [] if args.json else report(result):
            print(f'{what:18}{text}')
        if args.json:
            print(json.dumps(result))
        for note in result['notes']:
            print(f'note: {note}', file=sys.stderr)
        if args.save_stats:
            print(f'statistics of {args.reference} in {args.save_stats}', file=sys.stderr)


if __name__ == '__main__':
    try:
        main()
    except BadInput as mistake:
        print(f'fid.py: {mistake}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('fid.py: interrupted', file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
