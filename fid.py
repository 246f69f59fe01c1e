"""How far from real? FID, sFID, Inception Score, precision and recall, as ADM's evaluation computes them.

    python fid.py VIRTUAL_imagenet256_labeled.npz out/50k.npz   # ADM's reference, samples of sample.py --npz
    python fid.py data out/png --pr exact --json                # data folder, folder of PNG; one line of JSON
    python fid.py data --save-stats data-stats.npz              # compute a reference once, and type it as REF
    torchrun --nproc_per_node 2 fid.py REF SAMPLES              # the same numbers; on CPUs one rank per core

prints what it read and the five numbers, a line each, and on stderr what makes them hard to compare.
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
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import socket
import sys
import typing
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional
from tqdm import tqdm


# ------------------------------------------------------------------------------------------- preprocessing

SIZE = 299                                    # pixels per side that the network sees


def resize(x):
    """float32 (B, H, W, C) -> (B, 299, 299, C), bit for bit TensorFlow 1's ResizeBilinear.

    Pixel i of the result lies at i H / 299 of the input: no half-pixel centres, no smoothing when shrinking.
    """
    def neighbours(length):
        at = torch.arange(SIZE, dtype=torch.float32) * (torch.tensor(length, dtype=torch.float32) / SIZE)
        low, high = at.floor().long(), at.ceil().long().clamp(max=length - 1)
        return low.to(x.device), high.to(x.device), (at - at.floor()).to(x.device)[:, None]

    low, high, weight = neighbours(x.shape[2])                                # W first, as the kernel
    x = x[:, :, low] + (x[:, :, high] - x[:, :, low]) * weight                # (B,   H, 299, C)
    low, high, weight = neighbours(x.shape[1])
    return x[:, low] + (x[:, high] - x[:, low]) * weight[:, None]             # (B, 299, 299, C)


def preprocess(images, device='cpu'):
    """uint8 (B, H, W, 3) -> float32 (B, 3, 299, 299) from -1 to 127/128, in channels-last memory."""
    x = torch.from_numpy(np.array(images)).to(device).float()
    return ((resize(x) - 128) / 128).permute(0, 3, 1, 2)                      # not 2 x / 255 - 1


# ------------------------------------------------------------------------------------------------- network
#
# Inception as released in December 2015. From the usual Inception-v3 it departs in four pools, marked below,
# and in its 1008 outputs, of which 8 mean nothing. Names are those of the weight file.

class Conv(nn.Module):
    """Convolution, batch norm with its stored statistics, ReLU."""

    def __init__(self, n, m, kernel, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(n, m, kernel, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(m, eps=1e-3)

    def forward(self, x):
        return functional.relu(self.bn(self.conv(x)), inplace=True)


halve = functools.partial(functional.max_pool2d, kernel_size=3, stride=2)
maximum = functools.partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
average = functools.partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1,
                            count_include_pad=False)                          # see Inception: departures


class Block(nn.Module):
    """Branches side by side, concatenated. A table says what they are: {branch: [convolution, ...]}.

    A convolution is (channels, kernel), which keeps the size, or (channels, kernel, stride), without padding.
    A list of two kernels, last in a branch, is two convolutions of the same input, a and b. The branch
    `branch_pool` starts with the pool.
    """

    def __init__(self, n, pool, table):
        super().__init__()
        self.pool, self.branches = pool, []                                   # of (branch, [[name], ...])
        for branch, convolutions in table.items():
            inputs, steps = n, []
            for i, (channels, kernels, *stride) in enumerate(convolutions, 1):
                name = f'{branch}_{i}' if len(convolutions) > 1 else branch
                kernels = kernels if isinstance(kernels, list) else [kernels]
                steps.append([name] if len(kernels) == 1 else [f'{name}a', f'{name}b'])
                for name, (h, w) in zip(steps[-1], kernels):
                    how = {'stride': stride[0]} if stride else {'padding': (h // 2, w // 2)}
                    self.add_module(name, Conv(inputs, channels, (h, w), **how))
                inputs = channels
            self.branches.append((branch, steps))

    def forward(self, x):
        outputs = []
        for branch, steps in self.branches:
            parts = [self.pool(x) if branch == 'branch_pool' else x]
            for names in steps:
                parts = [getattr(self, name)(parts[0]) for name in names]     # two parts after a pair
            outputs += parts
        return torch.cat(outputs, 1)


ONE, THREE, FIVE, WIDE, TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)         # kernels: height, width


def mixed_5(m):                                                               # 35 x 35: n -> 224 + m
    return {'branch1x1': [(64, ONE)],
            'branch5x5': [(48, ONE), (64, FIVE)],
            'branch3x3dbl': [(64, ONE), (96, THREE), (96, THREE)],
            'branch_pool': [(m, ONE)]}


MIXED_6A = {'branch3x3': [(384, THREE, 2)],                                   # 35 x 35 -> 17 x 17: 288 -> 768
            'branch3x3dbl': [(64, ONE), (96, THREE), (96, THREE, 2)],
            'branch_pool': []}


def mixed_6(m):                                                               # 17 x 17: 768 -> 768, m inside
    return {'branch1x1': [(192, ONE)],                                   # first: sFID reads 7 of its channels
            'branch7x7': [(m, ONE), (m, WIDE), (192, TALL)],
            'branch7x7dbl': [(m, ONE), (m, TALL), (m, WIDE), (m, TALL), (192, WIDE)],
            'branch_pool': [(192, ONE)]}


MIXED_7A = {'branch3x3': [(192, ONE), (320, THREE, 2)],                       # 17 x 17 -> 8 x 8: 768 -> 1280
            'branch7x7x3': [(192, ONE), (192, WIDE), (192, TALL), (192, THREE, 2)],
            'branch_pool': []}
MIXED_7 = {'branch1x1': [(320, ONE)],                                         # 8 x 8: n -> 2048
           'branch3x3': [(384, ONE), (384, [(1, 3), (3, 1)])],
           'branch3x3dbl': [(448, ONE), (384, THREE), (384, [(1, 3), (3, 1)])],
           'branch_pool': [(192, ONE)]}


class Inception(nn.Module):
    """Preprocessed images -> pooled (B, 2048) and spatial (B, 2023) features. `logits` start from pooled."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = Block(192, average, mixed_5(32))           # departures 1, 2, 3: the averages of 5b to
        self.Mixed_5c = Block(256, average, mixed_5(64))           # 5d, 6b to 6e and 7b leave out the padding
        self.Mixed_5d = Block(288, average, mixed_5(64))
        self.Mixed_6a = Block(288, halve, MIXED_6A)
        self.Mixed_6b = Block(768, average, mixed_6(128))
        self.Mixed_6c = Block(768, average, mixed_6(160))
        self.Mixed_6d = Block(768, average, mixed_6(160))
        self.Mixed_6e = Block(768, average, mixed_6(192))
        self.Mixed_7a = Block(768, halve, MIXED_7A)
        self.Mixed_7b = Block(1280, average, MIXED_7)
        self.Mixed_7c = Block(2048, maximum, MIXED_7)              # departure 4: no average, a maximum
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):                                                     # (B,    3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))     # (B,   64, 147, 147)
        x = halve(x)                                                          # (B,   64,  73,  73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                         # (B,  192,  71,  71)
        x = halve(x)                                                          # (B,  192,  35,  35)
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


# -------------------------------------------------------------------------------------------------- errors

class BadInput(ValueError):
    """A mistake in a command or a file, in one sentence. The script prints it and exits with status 2."""


def check(condition, sentence):
    if not condition:
        raise BadInput(sentence)


@contextlib.contextmanager
def explain(what):
    """A library's error inside the block becomes one sentence: `what`, then the first of the library's."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:                                                # a broken file raises anything
        raise BadInput(f'{what}: {" ".join(str(error).split()).split(". ")[0][:300]}') from None


# ------------------------------------------------------------------------------------------------- weights

NAME = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}'
SHA256, BYTES = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2', 95_628_359


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


def load_weights(path, sha256=SHA256):
    """Inception in evaluation mode, with the weights of a .pth file of this SHA-256."""
    net = Inception()
    with explain(f'{path} cannot be read as weights'):
        content = pathlib.Path(path).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        check(found == sha256.lower(),
              f'{path} has {len(content):,} bytes and SHA-256 {found}, expected {sha256}: it is incomplete '
              f'or another file (the 2015 Inception, {BYTES:,} bytes, is at {URL})')
        state = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
        expected = net.state_dict()
        odd = [name for name in state.keys() ^ expected.keys() if not name.endswith('tracked')]
        check(not odd, f'{path}: {len(odd)} tensors are missing or unknown, such as {min(odd, default="")}; '
                       f'expected the 2015 Inception, from Conv2d_1a_3x3.conv.weight to fc.bias')
        net.load_state_dict(state, strict=False)                              # BN's counters may be absent
    broken = [name for name, value in net.state_dict().items() if not value.isfinite().all()]
    check(not broken, f'{path} holds numbers that are not finite, in {", ".join(broken[:3])}')
    torch.backends.cudnn.conv.fp32_precision = 'ieee'                         # not TF32: that moves FID 1e-3
    torch.backends.cuda.matmul.fp32_precision = 'ieee'
    torch.backends.cudnn.deterministic = True
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------- Frechet distance

class Gaussian(typing.NamedTuple):
    mean: torch.Tensor                        # (D,) float64
    cov: torch.Tensor                         # (D, D) float64
    n: float = math.inf                       # rows that it was computed from, where known


class Moments:
    """Sums over rows x of (1, x)'(1, x): n, sum x and sum x'x in one matrix. Batches and ranks add up.

    In float64 the difference in `gaussian` loses no digit that counts: means of features are not large.
    """

    def __init__(self, dimensions, device='cpu'):
        self.sums = torch.zeros(1 + dimensions, 1 + dimensions, dtype=torch.float64, device=device)

    def add(self, rows):
        rows = functional.pad(rows.double(), (1, 0), value=1.0)               # (B, 1 + D)
        self.sums.addmm_(rows.T, rows)
        return self

    def gaussian(self):
        n, mean = self.sums[0, 0], self.sums[0, 1:] / self.sums[0, 0]
        cov = (self.sums[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)    # numpy.cov's ddof 1
        return Gaussian(mean, cov, n.item())


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^1/2 of two Gaussians.

    With S_a = R'R, the eigenvalues of S_a S_b are those of R S_b R', which is symmetric: real and, up to
    rounding, not negative. n rows give a covariance of rank n - 1 at most, so R has no more rows: the
    other eigenvalues are rounding errors of 1e-16, whose roots would be 1e-8.
    """
    a, b = sorted((a, b), key=lambda side: side.n)
    values, vectors = torch.linalg.eigh(a.cov)                                # in ascending order
    R = (vectors * values.clamp(min=0).sqrt()).T[-int(min(a.n - 1, len(values))):]
    cross = torch.linalg.eigvalsh(R @ b.cov @ R.T).clamp(min=0).sqrt().sum()
    traces = a.cov.trace() + b.cov.trace()
    distance = ((a.mean - b.mean).square().sum() + traces - 2 * cross).item()
    check(distance >= -1e-3 * traces, f'the Frechet distance is {distance:g}: a covariance is wrong')
    return max(distance, 0.0)                                                 # rounding may make it negative


def frechet_from_features(x, y):
    """From features (n, D) and (m, D)."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return frechet_distance(*(Moments(rows.shape[1], rows.device).add(rows).gaussian() for rows in (x, y)))


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


def radii(x, k, distances, block, bar):
    """The squared distance of every row to its k-th neighbour, itself not counted: (n,)."""
    result = []
    for rows in x.split(block):
        near = distances(rows, rows[:0])
        for columns in x.split(block):
            near = torch.cat([near, distances(rows, columns)], 1)
            near = near.topk(min(k + 1, near.shape[1]), largest=False).values  # k + 1: each row meets itself
            bar.update()
        result.append(near[:, -1])
    return torch.cat(result)


def ranks():
    """(this rank, number of ranks)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def progress(total, what, unit):
    """A bar on rank 0 for work that has taken 5 s; where stderr is no terminal, a line every 50 s."""
    lines = {} if sys.stderr.isatty() else {
        'mininterval': 50, 'miniters': 1,
        'bar_format': '{desc}: {n_fmt} of {total_fmt}' + unit + ', {rate_noinv_fmt}, {remaining} left\n'}
    return tqdm(total=total, desc=what, unit=unit, delay=5, disable=ranks()[0] > 0, **lines)


def precision_recall(real, fake, k=3, mode='adm', block=2000):
    """(precision, recall) of features float32 (n, D), at least k + 1 on each side.

    Precision: the share of fakes in the ball of some real, whose radius reaches to its k-th nearest real.
    Recall: the same with the roles exchanged. Distances are of `block` x `block` pairs at a time.
    """
    distances = DISTANCES[mode]
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    n, m = -(-len(real) // block), -(-len(fake) // block)
    with progress(n * n + m * m + n * m, 'precision, recall', ' blocks') as bar:
        real_radii, fake_radii = (radii(rows, k, distances, block, bar) for rows in (real, fake))
        real_in, fake_in = (torch.zeros_like(r, dtype=torch.bool) for r in (real_radii, fake_radii))
        for i in range(0, len(real), block):
            for j in range(0, len(fake), block):
                d = distances(real[i:i + block], fake[j:j + block])
                fake_in[j:j + block] |= (d <= real_radii[i:i + block, None]).any(0)
                real_in[i:i + block] |= (d <= fake_radii[None, j:j + block]).any(1)
                bar.update()
    return fake_in.double().mean().item(), real_in.double().mean().item()


# -------------------------------------------------------------------------------------------------- inputs

@dataclasses.dataclass
class Side:
    """REF or SAMPLES: what the file gives, and then what was computed from it."""
    path: str
    count: int = 0                            # images
    size: tuple = ()                          # H, W
    read: typing.Callable | None = None       # read(i, j) gives images i to j - 1, uint8 (j - i, H, W, 3)
    stored: bool = False                      # the file holds statistics
    notes: list = dataclasses.field(default_factory=list)                    # sentences about the file
    statistics: dict = dataclasses.field(default_factory=dict)               # 'fid', 'sfid': Gaussian
    pool: torch.Tensor | None = None          # (n, 2048) float32, in file order, on rank 0

    def __str__(self):
        images = [f'{self.count:,} images of {pixels(self.size)}'] if self.count else []
        return f'{self.path}: ' + ', with '.join(images + ['stored statistics'] * self.stored)


def pixels(size):
    return ' x '.join(str(n) for n in reversed(size))                         # width first, as usual


def check_images(path, shape, dtype):
    advice = ''
    if dtype.kind == 'f':
        advice = ': save `(x * 127.5 + 127.5).round().clip(0, 255).astype("uint8")` of x from -1 to 1'
    elif shape[1:2] == (3,):
        advice = ': save `x.transpose(0, 2, 3, 1)`'
    check(dtype == np.uint8 and len(shape) == 4 and shape[3] == 3,
          f'{path} holds {dtype} {tuple(shape)}, expected images uint8 (n, H, W, 3){advice}')
    check(shape[0] > 1, f'{path} holds too few images for a covariance: {shape[0]}, expected at least 2')


def open_npz(path):
    side = Side(str(path))
    with explain(f'{path} cannot be read as an .npz file, made with np.savez(FILE, arr_0=images)'), \
            zipfile.ZipFile(path), np.load(path) as arrays:                   # by default without pickles
        if 'arr_0' in arrays:
            side.count, side.size, side.read = open_array(path)
        for name, mean, cov, D in (('fid', 'mu', 'sigma', 2048), ('sfid', 'mu_s', 'sigma_s', 2023)):
            if mean in arrays and cov in arrays:
                what = f'{path}: {mean} and {cov}'
                side.statistics[name] = stored_gaussian(what, arrays[mean], arrays[cov], D)
        side.stored = bool(side.statistics)
        check(side.count or side.stored, f'{path} holds {", ".join(list(arrays)[:9]) or "nothing"}, expected '
              f'arr_0 with images, or mu and sigma (a zip of image files: unpack it, and type the folder)')
    return side


def open_array(path):
    """(count, size, read) of `arr_0` in an .npz, which is read in batches: ADM's of 512 pixels is 8 GB."""
    file, npy = zipfile.ZipFile(path).open('arr_0.npy'), np.lib.format
    header = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}[npy.read_magic(file)[0]]
    (shape, fortran, dtype), begin = header(file), file.tell()
    check_images(path, shape, dtype)
    check(not fortran, f'{path} holds arr_0 in Fortran order: save `np.ascontiguousarray(images)`')

    def read(i, j):
        with explain(f'{path} is damaged'):
            file.seek(begin + i * math.prod(shape[1:]))
            content = file.read((j - i) * math.prod(shape[1:]))
            return np.frombuffer(content, np.uint8).reshape(j - i, *shape[1:])
    return shape[0], shape[1:3], read


def stored_gaussian(what, mean, cov, D):
    check(mean.shape == (D,) and cov.shape == (D, D) and mean.dtype.kind == cov.dtype.kind == 'f',
          f'{what} are {mean.dtype} {mean.shape} and {cov.dtype} {cov.shape}, expected floats ({D},) and '
          f'({D}, {D}): they may be of another network')
    mean, cov = (torch.from_numpy(x.astype(np.float64)) for x in (mean, cov))
    check(mean.isfinite().all() and cov.isfinite().all(), f'{what} are not finite numbers')
    rounding = 1e-6 * cov.trace().abs() + 1e-30                               # of files in float32
    check((cov - cov.T).abs().max() <= rounding, f'{what}: this covariance is not symmetric')
    failed = torch.linalg.cholesky_ex(cov + rounding * torch.eye(D, dtype=torch.float64)).info
    check(failed == 0, f'{what}: this covariance is not positive semidefinite')
    return Gaussian(mean, cov)


def open_data(path):
    """A data folder: data.npy uint8 (n, C, H, W) and meta.json with the kind images."""
    with explain(f'{path} cannot be read as a data folder'):
        kind = json.loads((path / 'meta.json').read_text())['kind']
        check(kind == 'images', f'{path} is a data folder of {kind}, expected images: prepare the same '
                                f'images without --vae (python data.py folder SRC --out DIR --size 256)')
        array = np.load(path / 'data.npy', mmap_mode='r')
        n, C, H, W = array.shape
        channels = 3 if C == 1 else C                                         # grey is repeated
        check_images(path / 'data.npy', (n, H, W, channels), array.dtype)
    return Side(str(path), n, (H, W),
                lambda i, j: np.broadcast_to(array[i:j].transpose(0, 2, 3, 1), (j - i, H, W, 3)))


def open_folder(path):
    """PNG and JPEG files, also in folders inside. All headers are read now, to find a mixed size at once."""
    found = sorted((file for file in path.rglob('*') if file.is_file()), key=str)
    files = [file for file in found if file.suffix.lower() in ('.png', '.jpg', '.jpeg')]
    others = set(found) - set(files)
    kinds = ', '.join(sorted({file.suffix or file.name for file in others})[:5])
    check(len(files) > 1, f'{path} holds {len(files)} PNG or JPEG files, expected at least 2'
                          f'{", and others: " * bool(others)}{kinds}')
    side, converted = Side(str(path), len(files)), 0
    for file in files:
        with explain(f'{file} cannot be read as an image'), open(file, 'rb') as stream:
            image = Image.open(stream)
            stream.seek(24)                                                   # a PNG's bits per channel
            check(image.format != 'PNG' or stream.read(1) != b'\x10',
                  f'{file} has 16 bits per channel, expected 8')
        side.size = side.size or image.size[::-1]
        check(image.size[::-1] == side.size, f'{file} is {pixels(image.size[::-1])}, but {files[0]} is '
                                             f'{pixels(side.size)} pixels: expected a single size')
        converted += image.mode != 'RGB'
    jpeg = sum(file.suffix.lower() != '.png' for file in files)
    side.notes = [f'{path}: {what}: {n:,}' for what, n in (
        ('images converted to RGB, from grey, alpha or a palette', converted),
        ('JPEG images, whose losses move FID', jpeg),
        (f'files skipped, neither PNG nor JPEG ({kinds})', len(others))) if n]

    def read(i, j):
        images = []
        for file in files[i:j]:
            with explain(f'{file} cannot be read as an image'), Image.open(file) as image:
                images.append(np.asarray(image.convert('RGB')))
        return np.stack(images)
    side.read = read
    return side


def open_side(path):
    path = pathlib.Path(path)
    check(path.exists(), f'there is no {path}: expected an .npz file, a folder of images, or a data folder')
    if path.is_dir():
        return open_data(path) if (path / 'meta.json').exists() else open_folder(path)
    return open_npz(path)


# ---------------------------------------------------------------------------------------------- evaluation

BATCH = {'cpu': 8, 'cuda': 64}                # images at a time; on a CPU more is slower
FULL = 50_000                                 # samples behind the published numbers


@contextlib.contextmanager
def one_error_for_all_ranks():
    """All ranks meet at the end of the block. Where one has raised BadInput, all raise the same one there."""
    sentence = None
    try:
        yield
    except BadInput as error:
        sentence = str(error)
    sentences = [sentence] * ranks()[1]
    if len(sentences) > 1:
        dist.all_gather_object(sentences, sentence)
    sentence = next(filter(None, sentences), None)
    check(sentence is None, sentence)


@torch.no_grad()
def extract(net, side, keep):
    """Compute what a side's images give: statistics, where none are stored, and, if `keep`, pooled features.

    Each rank takes consecutive whole batches, so that an image meets the same images in its batch, and is
    rounded alike, for any number of ranks.
    """
    device, (rank, world) = net.fc.weight.device, ranks()
    step = BATCH[device.type]
    batches = -(-side.count // step)
    start, stop = (min(side.count, batches * r // world * step) for r in (rank, rank + 1))
    pools, moments = [torch.empty(0, 2048)], {'fid': Moments(2048, device), 'sfid': Moments(2023, device)}
    with one_error_for_all_ranks(), progress(stop - start, side.path, ' images') as bar:
        for i in range(start, stop, step):
            j = min(i + step, stop)
            pool, spatial = net(preprocess(side.read(i, j), device))
            check(pool.isfinite().all() and spatial.isfinite().all(),
                  f'{side.path}: the network computes features that are not finite, try another machine')
            if not side.stored:
                moments['fid'].add(pool)
                moments['sfid'].add(spatial)
            if keep:
                pools.append(pool.cpu())
            bar.update(j - i)
    side.pool = torch.cat(pools)
    if world > 1:
        pools = [None] * world if rank == 0 else None
        dist.gather_object(side.pool, pools)                                  # in the order of the file
        side.pool = torch.cat(pools) if rank == 0 else None
    for name, part in () if side.stored else moments.items():
        part.sums = part.sums.cpu()
        if world > 1:
            dist.all_reduce(part.sums)
        side.statistics[name] = part.gaussian()


def measure(net, ref, gen, pr):
    """(measures, notes): a number each, or the reason why it is left out; and sentences about them."""
    result, notes, sides = {}, [*ref.notes, *gen.notes, *cautions(ref, gen)], (ref, gen)
    for name, arrays in (('fid', 'mu and sigma'), ('sfid', 'mu_s and sigma_s')):
        without = [side.path for side in sides if name not in side.statistics]
        if without:
            result[name] = f'left out: no {arrays} in {" and ".join(without)}'
        else:
            result[name] = frechet_distance(ref.statistics[name], gen.statistics[name])
    if gen.count:
        logits = net.logits(gen.pool.to(net.fc.weight.device)).cpu()
        score, mixed = inception_score(logits), inception_score(interleaved(logits))
        result['inception_score'] = score
        if mixed > 1.05 * score:
            notes.append(f'{gen.path} looks sorted by class: the Inception Score of consecutive 5,000s is '
                         f'{score:.2f}, of mixed ones {mixed:.2f}; ADM does not shuffle')
    else:
        result['inception_score'] = f'left out: no images in {gen.path}'
    few = [f'{"fewer than 4" if side.count else "no"} images in {side.path}'
           for side in sides if side.count < 4]
    if few:
        result['precision'] = result['recall'] = f'left out: {" and ".join(few)}'
    else:
        pools = (side.pool.to(net.fc.weight.device) for side in sides)
        result['precision'], result['recall'] = precision_recall(*pools, mode=pr)
    return result, notes


def cautions(ref, gen):
    """What should make a reader of the numbers think twice."""
    if ref.size and gen.size and ref.size != gen.size:
        yield f'the sizes differ, {pixels(ref.size)} and {pixels(gen.size)} pixels'
    if gen.stored and not ref.stored:
        yield f'{gen.path} brings stored statistics and {ref.path} none: are the sides swapped?'
    if gen.count and abs(gen.count - FULL) > FULL / 100:
        yield (f'{gen.count:,} samples: the fewer, the higher FID and sFID, so compare only with numbers of '
               f'as many; published ones have {FULL:,}')
    if not ref.stored and ref.count <= 2048:
        yield (f'{ref.count:,} reference images: their covariance has rank {ref.count - 1:,} of 2,048, so '
               f'FID and sFID are much too high')


def save_statistics(path, statistics):
    """{'fid': Gaussian, 'sfid': Gaussian} in ADM's names. What cannot be written whole is removed."""
    names = {'fid': ('mu', 'sigma'), 'sfid': ('mu_s', 'sigma_s')}
    arrays = {array: values.numpy() for name, gaussian in statistics.items()
              for array, values in zip(names[name], gaussian)}
    with explain(f'cannot write {path}'), open(path, 'xb') as file:
        try:
            np.savez(file, **arrays)
        except OSError:
            os.unlink(path)
            raise


# -------------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):                                                 # one sentence, on rank 0 alone
        raise BadInput(f'{message}; `python fid.py --help` shows what there is')


def parse(argv):
    parser = Parser(description='How far from real?', allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('reference', metavar='REF', help='.npz, folder of PNG or JPEG files, or data folder')
    add('samples', metavar='SAMPLES', nargs='?', help='the same; with --save-stats, it may be absent')
    add('--weights', metavar='FILE', help="the .pth (None: from torch's hub cache, or downloaded)")
    add('--sha256', metavar='HEX', default=SHA256, help='hash that the weights must have')
    add('--pr', choices=DISTANCES, default='adm', help='distances of precision and recall')
    add('--save-stats', metavar='FILE', help="write REF's mu, sigma, mu_s, sigma_s to an .npz")
    add('--json', action='store_true', help='print one line of JSON')
    args = parser.parse_args(argv)
    check(args.samples or args.save_stats, 'SAMPLES are missing: type python fid.py REF SAMPLES')
    return args


def print_result(result, pr):
    names = {'fid': 'FID', 'sfid': 'sFID', 'inception_score': 'Inception Score'}
    about = {'adm': "float16 distances as ADM's", 'exact': 'exact distances, not those of papers'}[pr]
    for key, value in result.items():
        if isinstance(value, float):
            value = f'{value:8.4f}' + f'   k = 3, {about}' * (key == 'precision')
        print(f'{names.get(key, key):18}{value}')


def main(argv=None):
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:                                                             # what travels is in main memory
        dist.init_process_group('gloo', timeout=datetime.timedelta(days=1))

    # arguments and inputs
    with one_error_for_all_ranks():
        args, device = parse(argv), torch.device('cpu')
        if torch.cuda.is_available():
            local, gpus = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
            check(local < gpus, f'rank {local} of this machine, counted from 0, has no GPU, for there are '
                                f'{gpus}: type --nproc_per_node {gpus}')
            device = torch.device('cuda', local)
        ref = open_side(args.reference)
        gen = open_side(args.samples) if args.samples else None
        if args.save_stats and rank == 0:                                     # now, not after hours of work
            check(not os.path.exists(args.save_stats),
                  f'{args.save_stats} exists already: remove it, or choose another --save-stats')
            save_statistics(args.save_stats, {})
            os.unlink(args.save_stats)
    sides = {'reference': ref} | ({'samples': gen} if gen else {})
    result = {name: str(side) for name, side in sides.items()}

    # features, where there are images
    net = None
    if any(side.count for side in sides.values()):
        with one_error_for_all_ranks():
            weights = args.weights or (rank == 0 and find_weights())          # rank 0 downloads
        with one_error_for_all_ranks():
            weights = weights or find_weights()
            net = load_weights(weights, args.sha256).to(device)
        published = 'not ' * (args.sha256.lower() != SHA256) + 'the published file'
        result |= {'weights': f'{os.path.basename(weights)}, SHA-256 {args.sha256[:8]}..., {published}',
                   'network': f'float32 (no TF32), {device.type}, {world} rank{"s" * (world > 1)}'}
        for side in sides.values():
            if side.count:
                extract(net, side, keep=gen is not None)

    # measures
    with one_error_for_all_ranks():
        if rank == 0:
            measures, notes = measure(net, ref, gen, args.pr) if gen else ({}, ref.notes)
            result |= measures
            if args.json:
                print(json.dumps(result | {'pr': args.pr, 'notes': notes}))
            else:
                print_result(result, args.pr)
            for note in notes:
                print(f'note: {note}', file=sys.stderr)
            if args.save_stats:                                               # last: the numbers are safe
                save_statistics(args.save_stats, ref.statistics)
                print(f'statistics of {ref.path} in {args.save_stats}', file=sys.stderr)


if __name__ == '__main__':
    try:
        main()
    except BadInput as mistake:                                               # the same one on all ranks
        if int(os.environ.get('RANK', 0)) == 0:
            print(f'fid.py: {mistake}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('fid.py: interrupted', file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
