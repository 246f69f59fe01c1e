"""How far from real? FID, sFID, Inception Score, precision and recall, as ADM's evaluation computes them.

    python fid.py VIRTUAL_imagenet256_labeled.npz out/50k.npz   # ADM's reference, samples of sample.py --npz
    python fid.py data out/png --pr exact                       # data folder, folder of PNG; exact distances
    python fid.py data --save-stats data-stats.npz              # compute a reference once, and type it as REF
    torchrun --nproc_per_node 2 fid.py REF SAMPLES              # the same numbers; on CPUs one rank per core

prints what it read and the five numbers, a line each, and on stderr what makes them hard to compare.
REF and SAMPLES are each an .npz with `arr_0` uint8 (n, H, W, 3), or with statistics (mu, sigma and, for sFID,
mu_s, sigma_s), or with both; a folder of PNG or JPEG files, read in order of their names; or a data folder of
`data.py` with images. Stored statistics stand for their side in FID and sFID, the images beside them serve
precision and recall. What the given files do not allow is left out and named. Numbers to set beside a
published table need its REF, 50,000 samples that were never JPEG, and `--pr adm`, the default.

References: FID, Heusel et al. 2017; sFID, Nash et al. 2021; Inception Score, Salimans et al. 2016; precision
and recall, Kynkaanniemi et al. 2019; the protocol, ADM (Dhariwal & Nichol 2021), whose TensorFlow program is
meant by "ADM" below.

Letters: n images    B a batch    H, W height, width    D dimensions: 2048 pooled, 17 x 17 x 7 = 2023 spatial
"""

import argparse
import contextlib
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


def download_weights(path):
    socket.setdefaulttimeout(30)
    with explain(f'there are no Inception weights at {path}: put {URL} ({BYTES:,} bytes, SHA-256 {SHA256}) '
                 f'there, or name the file with --weights, for the download failed'):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)


def load_weights(path, sha256=SHA256):
    """Inception in evaluation mode, with the weights of a .pth file of this SHA-256."""
    net = Inception()
    with explain(f'{path} cannot be read as weights'):
        content = pathlib.Path(path).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        check(found == sha256.lower(),
              f'{path} has {len(content):,} bytes and SHA-256 {found}, expected {sha256}: it is incomplete '
              f'or another file (the 2015 Inception, {BYTES:,} bytes, is at {URL})')
        net.load_state_dict(torch.load(io.BytesIO(content), map_location='cpu', weights_only=True))
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


def moments(rows):
    """Of rows x: n, sum x and sum x'x in one matrix, float64 (1 + D, 1 + D). Batches and ranks add up."""
    rows = functional.pad(rows.double(), (1, 0), value=1.0)                   # (B, 1 + D)
    return rows.T @ rows


def gaussian(sums):
    """From `moments`. The difference loses no digit that counts: means of features are not large."""
    n, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    cov = (sums[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)              # numpy.cov's ddof 1
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
    return frechet_distance(*(gaussian(moments(torch.as_tensor(rows))) for rows in (x, y)))


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


# ---------------------------------------------------------------------------------------- precision, recall

def adm_distances(u, v):
    """|u - v|^2 for all pairs of rows, (m, n) float32, rounded to float16 after every step as in ADM's graph.

    A pooled feature's square is a few hundred, so distances come in steps of 1/8 or 1/4, and ties pass `<=`:
    both measures are about 0.001 to 0.002 higher than the exact ones, and so is every published number.
    """
    half = lambda x: x.half().float()
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


def ranks():
    """(this rank, number of ranks), from torchrun"""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def progress(iterable, what, **settings):
    """A bar on rank 0 for work that has taken 5 s; where stderr is no terminal, a line every minute."""
    if not sys.stderr.isatty():
        settings |= {'mininterval': 60, 'miniters': 1, 'bar_format': '{l_bar}{r_bar}\n'}
    return tqdm(iterable, desc=str(what), delay=5, disable=ranks()[0] > 0, **settings)


def radii(x, k, distances, block):
    """The squared distance of every row to its k-th neighbour, itself not counted: (n,)."""
    result = []
    for rows in progress(x.split(block), 'neighbours'):
        near = [distances(rows, columns).topk(min(k + 1, len(columns)), largest=False).values
                for columns in x.split(block)]                                # k + 1: each row meets itself
        result.append(torch.cat(near, 1).topk(k + 1, largest=False).values[:, -1])
    return torch.cat(result)


def precision_recall(real, fake, k=3, mode='adm', block=2000):
    """(precision, recall) of features float32 (n, D), at least k + 1 on each side.

    Precision: the share of fakes in the ball of some real, whose radius reaches to its k-th nearest real.
    Recall: the same with the roles exchanged. Distances are of `block` x `block` pairs at a time.
    """
    distances = DISTANCES[mode]
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    real_radii, fake_radii = (radii(rows, k, distances, block) for rows in (real, fake))
    real_in, fake_in = (torch.zeros_like(r, dtype=torch.bool) for r in (real_radii, fake_radii))
    for i in progress(range(0, len(real), block), 'precision, recall'):
        for j in range(0, len(fake), block):
            d = distances(real[i:i + block], fake[j:j + block])
            fake_in[j:j + block] |= (d <= real_radii[i:i + block, None]).any(0)
            real_in[i:i + block] |= (d <= fake_radii[None, j:j + block]).any(1)
    return fake_in.double().mean().item(), real_in.double().mean().item()


# -------------------------------------------------------------------------------------------------- inputs

STATISTICS = {'FID': ('mu', 'sigma', 2048), 'sFID': ('mu_s', 'sigma_s', 2023)}        # ADM's arrays, and D


class Side(typing.NamedTuple):
    """REF or SAMPLES: what the file or folder gives."""
    path: pathlib.Path
    count: int = 0                            # images
    pixels: str = ''                          # W x H
    read: typing.Callable | None = None       # read(i, j) gives images i to j - 1, uint8 (j - i, H, W, 3)
    stored: dict = {}                         # name in STATISTICS: Gaussian
    skipped: str = ''                         # files of the folder that are neither PNG nor JPEG

    def __str__(self):
        images = [f'{self.count:,} images of {self.pixels}{self.skipped}'] if self.count else []
        stored = [f'stored statistics for {" and ".join(self.stored)}'] if self.stored else []
        return f'{self.path}: {", ".join(images + stored)}'


def check_images(path, shape, dtype):
    advice = ''
    if dtype.kind == 'f':
        advice = ': save `(x * 127.5 + 127.5).round().clip(0, 255).astype("uint8")` of x from -1 to 1'
    elif shape[1:2] == (3,):
        advice = ': save `x.transpose(0, 2, 3, 1)`'
    check(dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and shape[0] > 1,
          f'{path} holds {dtype} {tuple(shape)}, expected images uint8 (2 or more, H, W, 3){advice}')


def open_npz(path):
    images, stored = (), {}
    with explain(f'{path} cannot be read as an .npz file, made with np.savez(FILE, arr_0=images)'), \
            zipfile.ZipFile(path), np.load(path) as arrays:                   # by default without pickles
        if 'arr_0' in arrays:
            images = open_array(path)
        for name, (mean, cov, D) in STATISTICS.items():
            if mean in arrays and cov in arrays:
                stored[name] = stored_gaussian(f'{path}: {mean} and {cov}', arrays[mean], arrays[cov], D)
        check(images or stored, f'{path} holds {", ".join(list(arrays)[:9]) or "nothing"}, expected arr_0 '
              f'with images, or mu and sigma (a zip of image files: unpack it, and type the folder)')
    return Side(path, *images, stored=stored)


def open_array(path):
    """(count, pixels, read) of `arr_0` in an .npz, which is read in batches: ADM's of 512 pixels is 8 GB."""
    file = zipfile.ZipFile(path).open('arr_0.npy')
    np.lib.format.read_magic(file)
    (shape, fortran, dtype), begin = np.lib.format.read_array_header_1_0(file), file.tell()
    check_images(path, shape, dtype)
    check(not fortran, f'{path} holds arr_0 in Fortran order: save `np.ascontiguousarray(images)`')

    def read(i, j):
        with explain(f'{path} is damaged'):
            file.seek(begin + i * math.prod(shape[1:]))
            content = file.read((j - i) * math.prod(shape[1:]))
            return np.frombuffer(content, np.uint8).reshape(j - i, *shape[1:])
    return shape[0], f'{shape[2]} x {shape[1]}', read


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
        array = np.load(path / 'data.npy', mmap_mode='r').transpose(0, 2, 3, 1)
        if array.shape[3] == 1:                                               # grey
            array = np.broadcast_to(array, (*array.shape[:3], 3))
        check_images(path / 'data.npy', array.shape, array.dtype)
    return Side(path, len(array), f'{array.shape[2]} x {array.shape[1]}', lambda i, j: array[i:j])


def open_folder(path):
    """PNG and JPEG files, also in folders inside. All headers are read now, to find a mixed size at once."""
    files, others, size = [], [], None
    for file in sorted((file for file in path.rglob('*') if file.is_file()), key=str):
        (files if file.suffix.lower() in ('.png', '.jpg', '.jpeg') else others).append(file)
    kinds = ', '.join(sorted({file.suffix or file.name for file in others})[:5])
    skipped = f', {len(others):,} other files skipped ({kinds})' * bool(others)
    check(len(files) > 1, f'{path} holds {len(files)} PNG or JPEG files{skipped}, expected at least 2')
    for file in files:
        with explain(f'{file} cannot be read as an image'), Image.open(file) as image:
            size = size or image.size
            check(image.size == size, f'{file} is {image.width} x {image.height}, but {files[0]} is '
                                      f'{size[0]} x {size[1]} pixels: expected a single size')
            check(';16' not in str(image.tile), f'{file} has 16 bits per channel, expected 8')

    def read(i, j):
        images = []
        for file in files[i:j]:
            with explain(f'{file} cannot be read as an image'), Image.open(file) as image:
                images.append(np.asarray(image.convert('RGB')))
        return np.stack(images)
    return Side(path, len(files), f'{size[0]} x {size[1]}', read, skipped=skipped)


def open_side(path):
    path = pathlib.Path(path)
    check(path.exists(), f'there is no {path}: expected an .npz file, a folder of images, or a data folder')
    if path.is_dir():
        return open_data(path) if (path / 'meta.json').exists() else open_folder(path)
    return open_npz(path)


# ---------------------------------------------------------------------------------------------- evaluation

BATCH = {'cpu': 8, 'cuda': 64}                # images at a time; on a CPU more is slower
NEEDS = {'FID': 'images, or mu and sigma, on both sides',
         'sFID': 'images, or mu_s and sigma_s, on both sides',
         'Inception Score': 'images in SAMPLES',
         'precision': '4 images on both sides',
         'recall': '4 images on both sides'}


@contextlib.contextmanager
def one_error_for_all_ranks():
    """All ranks meet at the end of the block. Where one has raised BadInput, all raise the same one there."""
    mine = None
    try:
        yield
    except BadInput as error:
        mine = str(error)
    sentences = [mine] * ranks()[1]
    if len(sentences) > 1:
        dist.all_gather_object(sentences, mine)
    for sentence in filter(None, sentences):
        raise BadInput(sentence)


@torch.no_grad()
def extract(net, side, keep):
    """(statistics, pooled features) of a side: the stored statistics, or those of its images; the features
    of its images if `keep`, (n, 2048) float32 in file order, on rank 0.

    Each rank takes consecutive whole batches, so that an image meets the same images in its batch, and is
    rounded alike, for any number of ranks.
    """
    if not side.count:
        return side.stored, None
    device, (rank, world) = net.fc.weight.device, ranks()
    step = BATCH[device.type]
    batches = -(-side.count // step)
    start, stop = (min(side.count, batches * r // world * step) for r in (rank, rank + 1))
    sums = {name: moments(torch.empty(0, D, device=device)) for name, (_, _, D) in STATISTICS.items()}
    pools = [torch.empty(0, 2048)]
    with one_error_for_all_ranks():
        for i in progress(range(start, stop, step), side.path, unit=' images', unit_scale=step):
            pool, spatial = net(preprocess(side.read(i, min(i + step, stop)), device))
            check(pool.isfinite().all() and spatial.isfinite().all(),
                  f'{side.path}: the network computes features that are not finite, try another machine')
            sums['FID'] += moments(pool)
            sums['sFID'] += moments(spatial)
            if keep:
                pools.append(pool.cpu())
    pool, sums = torch.cat(pools), {name: total.cpu() for name, total in sums.items()}
    if world > 1:
        pools = [None] * world if rank == 0 else None
        dist.gather_object(pool, pools)                                       # in the order of the file
        pool = torch.cat(pools) if rank == 0 else pool
        for total in sums.values():
            dist.all_reduce(total)
    return side.stored or {name: gaussian(total) for name, total in sums.items()}, pool.to(device)


def note(sentence):
    print(f'note: {sentence}', file=sys.stderr)


def measure(net, sides, statistics, pools, pr):
    """{name: number} of what the sides allow. Notes what should make a reader of the numbers think twice."""
    ref, gen = sides
    for side in sides:
        if not side.stored and side.count < 50_000:
            note(f'{side.count:,} images in {side.path}: fewer raise FID and sFID (published: 50,000)')
    if ref.count and gen.count and ref.pixels != gen.pixels:
        note(f'the sizes differ, {ref.pixels} and {gen.pixels} pixels')
    if gen.stored and not ref.stored:
        note(f'{gen.path} brings stored statistics and {ref.path} none: are the sides swapped?')
    measures = {name: frechet_distance(*(found[name] for found in statistics))
                for name in STATISTICS if all(name in found for found in statistics)}
    if gen.count:
        logits = net.logits(pools[1]).cpu()
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
        score, shuffled = inception_score(logits), inception_score(logits[order])
        measures['Inception Score'] = score
        if shuffled > 1.05 * score:
            note(f'{gen.path} looks sorted by class: shuffled, which ADM does not do, its Inception Score is '
                 f'{shuffled:.2f}')
    if min(ref.count, gen.count) > 3:
        measures['precision'], measures['recall'] = precision_recall(*pools, mode=pr)
    return measures


def save_statistics(path, statistics):
    """{'FID': Gaussian, 'sFID': Gaussian} in ADM's four arrays."""
    arrays = {array: values.numpy() for name, gaussian in statistics.items()
              for array, values in zip(STATISTICS[name], gaussian[:2])}
    with explain(f'cannot write {path}'), open(path, 'xb') as file:
        np.savez(file, **arrays)


# -------------------------------------------------------------------------------------------- command line

def parse(argv):
    parser = argparse.ArgumentParser(description='How far from real?', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: check(False, f'{message}: see python fid.py --help')      # on rank 0 alone
    add = parser.add_argument
    add('reference', metavar='REF', help='.npz, folder of PNG or JPEG files, or data folder')
    add('samples', metavar='SAMPLES', nargs='?', help='the same; with --save-stats, it may be absent')
    add('--weights', metavar='FILE', type=pathlib.Path, help='the .pth, which is downloaded if it is absent',
        default=pathlib.Path(torch.hub.get_dir()) / 'checkpoints' / NAME)
    add('--sha256', metavar='HEX', default=SHA256, help='hash that the weights must have')
    add('--pr', choices=DISTANCES, default='adm', help='distances of precision and recall')
    add('--save-stats', metavar='FILE', help="write REF's mu, sigma, mu_s, sigma_s to an .npz")
    args = parser.parse_args(argv)
    check(args.samples or args.save_stats, 'SAMPLES are missing: type python fid.py REF SAMPLES')
    return args


def main(argv=None):
    (rank, world), local = ranks(), int(os.environ.get('LOCAL_RANK', 0))
    device = torch.device('cuda', local) if torch.cuda.is_available() else torch.device('cpu')
    if world > 1:                                                             # what travels is in main memory
        dist.init_process_group('gloo', timeout=datetime.timedelta(days=1))

    # arguments, inputs, network
    with one_error_for_all_ranks():
        args = parse(argv)
        sides = [open_side(path) for path in (args.reference, args.samples) if path]
        if args.save_stats and rank == 0:                                     # now, not after hours of work
            save_statistics(args.save_stats, {})
            os.unlink(args.save_stats)
        images = any(side.count for side in sides)
        if images and local == 0 and not args.weights.exists():
            download_weights(args.weights)
    with one_error_for_all_ranks():
        net = load_weights(args.weights, args.sha256).to(device) if images else None
    if rank == 0:
        for role, side in zip(('reference', 'samples'), sides):
            print(f'{role:18}{side}')
        if images:
            print(f'{"computed with":18}{args.weights.name}, SHA-256 {args.sha256[:8]}..., float32, no TF32, '
                  f'{device.type}, {world} ranks, --pr {args.pr}', flush=True)

    # features, then measures
    statistics, pools = zip(*(extract(net, side, keep=len(sides) > 1) for side in sides))
    if rank == 0 and args.samples:
        measures = measure(net, sides, statistics, pools, args.pr)
        for name, needs in NEEDS.items():
            value = f'{measures[name]:8.4f}' if name in measures else f'left out: needs {needs}'
            print(f'{name:18}{value}')
    if rank == 0 and args.save_stats:                                         # last: the numbers are safe
        save_statistics(args.save_stats, statistics[0])


if __name__ == '__main__':
    try:
        main()
    except BadInput as mistake:                                               # the same one on all ranks
        if ranks()[0] == 0:
            print(f'fid.py: {mistake}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('fid.py: interrupted', file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
