"""Which pixels or latents does step n see, and how did they get there?

    python data.py shapes                                  # 10 classes of drawn shapes -> shapes/, in seconds
    python data.py folder ~/pictures --out data --size 64               # a tree of pictures -> data/
    python data.py folder ~/imagenet/train --out imagenet256 --size 256 --vae vae.safetensors
    python data.py cifar10 cifar-10-python.tar.gz                       # or -binary, or unpacked -> cifar10/
    python data.py celeba img_align_celeba.zip --attribute Smiling      # 64 x 64, two classes -> celeba/
    python data.py import fast-DiT/features --out imagenet256           # what others have prepared

Every script of this repository reads a folder with three files:

    data.npy     memory-mapped; one of three kinds, and the kind is in meta.json
                   images     uint8   (N, C, H, W)     pixels, used as x/127.5 - 1
                   moments    float16 (N, 2C, h, w)    a VAE's mean, then log-variance: sampled at each use
                   latents    float   (N, C, h, w)     already sampled and scaled, as other repositories write
    labels.npy   int64 (N,)
    meta.json    {"kind", "classes"}; for moments and latents "scale"; and, where known, "class_names", and
                 "vae", the autoencoder's file that made the moments, with its hash "vae_sha256"

`classes` is 0 for data without labels. The last 2 % of a data set, at most 1,000 images, are held out from
training, so rows must be in no order, such as one class after the other: everything here shuffles as it
writes. Mean and standard deviation of each channel, as the network sees it, are told and go into
meta.json.

`folder` numbers the classes as ImageNet does, by the sorted names of the folders in SRC; an empty one
keeps its number. Pictures are cut and scaled as ADM does, but first turned upright as their EXIF says and
laid on white where they are transparent. What cannot be read is left out, counted, and named in
skipped.txt. With --vae, pictures become moments of Stable Diffusion's VAE. Under torchrun, processes and
GPUs share the work. Killed, by whatever and whenever, the same command goes on from the last 256 pictures,
and ends with the same bytes; moments are taken up on the same kind of device alone.

`celeba` takes all 202,599 pictures, cuts 128 pixels around (89, 121) and halves them with a triangle
filter (Pillow's and torchvision's "bilinear"); --crop cuts elsewhere. `import` copies arrays .npy or .npz
(ADM's, ours), fast-DiT's folder around NAME_features and NAME_labels, and folders or zip files in the
layout of EDM, EDM2 and REPA: pictures, or mean and standard deviation, beside a dataset.json. It tells
which layout latents have, and how it knows. MaskDiT's LMDB, tar shards and LightningDiT's files are not
read: they need a library or a reader of their own. Archives are never unpacked to disk, and no pickle is
loaded. After a kill, `shapes`, `cifar10` and the import of arrays begin anew.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import pickletools
import re
import shutil
import stat
import struct
import sys
import tarfile
import threading
import time
import uuid
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import nn
from torch.nn import functional
from tqdm import tqdm


class BadInput(ValueError):
    """A user's mistake, told in one sentence. The scripts print the sentence and exit with status 2."""


# ---------------------------------------------------------------------------------------- reading a folder

LATENT_SCALE = 0.18215                        # Stable Diffusion's, and so DiT's and MaskDiT's
MOST_CLASSES = 1_000_000
MOST_SIDE = 10_000                            # pixels, or numbers of a latent
KINDS = {'images': ('uint8',), 'moments': ('float16',), 'latents': ('float16', 'float32')}


class Data:
    """A data folder, opened and checked. Nothing is read into memory but the labels.

    kind, scale, classes, class_names    from meta.json
    vae, vae_sha256                      from meta.json, or None
    channels, resolution                 of what the network sees: moments have half the channels of the file
    count = trained + held_out           the first `trained` images are for training
    Raises BadInput, with what is wrong and what to type.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        make = 'make one with `python data.py shapes` or `python data.py folder SRC --out data`'
        if not os.path.isdir(self.path):
            raise BadInput(f'there is no data folder {path}: {make}')
        try:
            if os.path.getsize(self.path / 'meta.json') > 10 ** 7:
                raise ValueError('meta.json has more than ten megabytes')
            meta = json.loads((self.path / 'meta.json').read_text())
            self.array, self.labels = (np.lib.format.open_memmap(self.path / f'{name}.npy', mode='r')
                                       for name in ('data', 'labels'))        # never a pickle
        except FileNotFoundError as error:
            lacks = os.path.basename(error.filename)
            raise BadInput(f'{path} is not a data folder, it has no {lacks}: {make}') from None
        except Exception as error:                                            # a broken file raises anything
            why = ' '.join(str(error).split())[:200]
            raise BadInput(f'{path} has a file that is truncated or cannot be read: {why}') from None
        self.kind = meta.get('kind') if isinstance(meta, dict) else None
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise BadInput(f'{path}/meta.json says kind {str(self.kind)[:50]!r}: expected one of '
                           f'{", ".join(KINDS)}')
        self.classes, self.scale = meta.get('classes'), meta.get('scale', LATENT_SCALE)
        if type(self.classes) is not int or not 0 <= self.classes <= MOST_CLASSES \
                or type(self.scale) not in (int, float) or not 0 < self.scale < 1e6:
            raise BadInput(f'{path}/meta.json needs "classes", a number from 0 to a million, and "scale" is '
                           f'one above 0 and below a million')
        self.class_names = meta.get('class_names') or [str(i) for i in range(self.classes)]
        self.vae, self.vae_sha256 = meta.get('vae'), meta.get('vae_sha256')
        if not all(value is None or isinstance(value, str) for value in (self.vae, self.vae_sha256)):
            raise BadInput(f'{path}/meta.json needs text in "vae" and "vae_sha256", a file and its hash')

        shape, dtype = self.array.shape, self.array.dtype
        if len(shape) != 4 or shape[2] != shape[3] or not 0 < min(shape[1:]) <= max(shape[1:]) <= MOST_SIDE \
                or dtype not in KINDS[self.kind]:
            raise BadInput(f'{path}/data.npy holds {dtype} {shape}: {self.kind} are '
                           f'{" or ".join(KINDS[self.kind])} (N, C, H, H), with pictures as high as wide')
        if self.kind == 'moments' and shape[1] % 2:
            raise BadInput(f'{path}/data.npy holds moments of {shape[1]} channels: expected means, then as '
                           f'many log-variances')
        self.count, self.resolution = shape[0], shape[2]
        self.channels = shape[1] // 2 if self.kind == 'moments' else shape[1]
        if self.count < 2:
            raise BadInput(f'{path}/data.npy holds {self.count} images: at least 2 are needed, one to '
                           f'train on and one held out')
        if self.labels.shape != (self.count,) or self.labels.dtype != np.int64:
            raise BadInput(f'{path}/labels.npy holds {self.labels.dtype} {self.labels.shape}: expected int64 '
                           f'({self.count},), one label an image')
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= max(self.classes, 1):
            raise BadInput(f'{path}/labels.npy holds labels from {low} to {high}, but meta.json says '
                           f'{self.classes} classes, so labels from 0 to {max(self.classes, 1) - 1}')
        if not isinstance(self.class_names, list) or len(self.class_names) != self.classes \
                or not all(isinstance(name, str) and name.isprintable() for name in self.class_names):
            raise BadInput(f'{path}/meta.json must name {self.classes} classes in "class_names" or lack it')
        self.labels = np.array(self.labels)                                   # now that its size is known
        self.held_out = min(1000, max(1, self.count // 50))
        self.trained = self.count - self.held_out

    def rows(self, indices):
        """What the file holds at `indices`, and the labels: two tensors. `to_input` takes the first."""
        return torch.from_numpy(self.array[indices]), torch.from_numpy(self.labels[indices])

    def to_input(self, raw, normal):
        """Rows as stored -> x (B, C, H, W) float32 for the network.

        `normal` (B, C, H, W), unit Gaussian numbers, samples moments; the other kinds ignore it.
        """
        raw = raw.float()
        if self.kind == 'images':
            return raw / 127.5 - 1
        if self.kind == 'moments':
            mean, logvar = raw.chunk(2, dim=1)
            return self.scale * (mean + (logvar.clamp(-30, 20) / 2).exp() * normal)
        return raw


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    """The order (n,) in which `epoch` goes through the images."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(seed, step, batch, n):
    """Which of n images the global batch of `step` holds: (batch,). A function of its arguments alone.

    Epoch after epoch, each in an order of its own, every image is used once an epoch; a batch may span two.
    """
    position = np.arange(step * batch, (step + 1) * batch)
    epochs = position // n
    parts = [permutation(seed, int(e), n)[position[epochs == e] % n] for e in np.unique(epochs)]
    return np.concatenate(parts)


# --------------------------------------------------------------------------------------- writing a folder

def save_folder(out, rows, dtype, shape, meta, count=0):
    """Write a data folder from an iterator of (pixels or latents, label), complete or not at all.

    The rows stream to disk under a temporary name beside `out`, which is renamed when all is there: of
    several processes that make the same folder at once, the first wins. What killed ones left is removed.
    `count` is how many rows will come, if known: room for them is looked for before the first. Returns what
    `describe` wrote.
    """
    out = pathlib.Path(out)
    hidden = str(out.parent / f'.{out.name}.partial-')
    partial = pathlib.Path(hidden + uuid.uuid4().hex)
    labels, needed = [], count * math.prod(shape) * np.dtype(dtype).itemsize
    for litter in glob.glob(glob.escape(hidden) + '[0-9a-f]' * 32):
        with contextlib.suppress(OSError), open(f'{litter}/data.npy', 'r+b') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                  # fails while its writer lives
            if file.read(1):                                                  # else it is about to lock it
                shutil.rmtree(litter)
    check_room(out, needed)
    try:
        partial.mkdir(parents=True)
        with open(partial / 'data.npy', 'wb') as file:
            with contextlib.suppress(OSError):                                # there are disks without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(npy_header(dtype, (0, *shape)))
            for row, label in rows:
                file.write(np.ascontiguousarray(row, dtype).tobytes())
                labels.append(label)
            file.seek(0)
            file.write(npy_header(dtype, (len(labels), *shape)))
            file.flush()
            os.fsync(file.fileno())
            stored = np.load(partial / 'data.npy', mmap_mode='r')
            sums = sum(channel_sums(stored[at:at + 100], meta) for at in range(0, len(stored), 100))
            meta = describe(partial, labels, sums, meta)
            try:
                os.rename(partial, out)
            except OSError:
                if not (out / 'meta.json').exists():                          # else somebody was faster
                    raise
    except OSError as error:
        raise cannot_write(out, error, needed) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def npy_header(dtype, shape):
    """The first bytes of an .npy file; as many for any number of rows, because numpy pads for that."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {
        'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': shape})
    return header.getvalue()


def describe(folder, labels, sums, meta):
    """Write what stands beside data.npy: labels, preview.png and, last, meta.json, which is returned.

    meta gains "count" and, from the `channel_sums` of all rows, the "mean" and "std" of each channel. The
    preview shows 50 rows; of latents, as sample.py does, the first three channels.
    """
    with whole_file(folder / 'labels.npy') as file:
        np.save(file, np.array(labels, np.int64))
    array = np.load(folder / 'data.npy', mmap_mode='r')
    mean, square = sums / array[:, 0].size
    with np.errstate(invalid='ignore'):                                       # rows may be infinite
        std = np.sqrt(np.maximum(square - mean ** 2, 0))
    meta = meta | {'count': len(labels), 'mean': mean.tolist(), 'std': std.tolist()}
    some = np.sort(np.random.default_rng(0).permutation(len(labels))[:50])
    names = meta.get('class_names') or [str(k) for k in range(meta['classes'])] or ['']
    images = array[some]
    if array.dtype != np.uint8:
        scale = meta.get('scale', LATENT_SCALE) if meta['kind'] == 'moments' else 1
        images = to_uint8((torch.from_numpy(images[:, :3]).float() * scale / 3).nan_to_num()).numpy()
    save_grid(folder / 'preview.png', images, [names[labels[i]] for i in some], columns=10)
    with whole_file(folder / 'meta.json') as file:
        file.write((json.dumps(meta, indent=1) + '\n').encode())
    return meta


def channel_sums(rows, meta):
    """(2, C): of what the network sees of each channel of rows as stored, the sum, and the sum of squares.

    Of moments, that is over all samples that could be drawn: squares of scaled means, plus scaled variances.
    """
    if meta['kind'] == 'images':                                              # exact, and fast: in integers
        total = rows.sum((0, 2, 3), dtype=np.int64)
        square = (rows.astype(np.uint16) ** 2).sum((0, 2, 3), dtype=np.int64)
        n = rows[:, 0].size
        return np.stack([total / 127.5 - n, square / 127.5 ** 2 - 2 * total / 127.5 + n])
    x, variance = rows.astype(np.float64), 0
    if meta['kind'] == 'moments':
        mean, logvar = np.split(x, 2, axis=1)
        scale = meta.get('scale', LATENT_SCALE)
        x, variance = scale * mean, scale ** 2 * np.exp(logvar.clip(-30, 20))
    return np.stack([x.sum((0, 2, 3)), (x ** 2 + variance).sum((0, 2, 3))])


@contextlib.contextmanager
def whole_file(path):
    """A file to write, which gets its name when all of it is on the disk: under `path` is nothing torn."""
    temporary = pathlib.Path(f'{path}.tmp{os.getpid()}')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_room(out, needed):
    """Refuse to begin what the disk cannot hold."""
    place = next((place for place in pathlib.Path(out).absolute().parents if os.path.isdir(place)), '/')
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BadInput(f'{out} needs {needed / 1e6:,.1f} MB and its disk has {free / 1e6:,.1f} MB free: make '
                       f'room, or choose another place')


def cannot_write(out, error, needed, kept=''):
    """The sentence for an OSError; of a full disk it tells how many bytes were needed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return BadInput(f'cannot write the data folder {out}: {error.strerror or error}'
                    + f'; {needed / 1e6:,.1f} MB were needed' * full + kept)


def to_uint8(x):
    """(n, C, H, W) about [-1, 1] -> uint8, the nearest of 256 levels. Raises BadInput unless finite."""
    if not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
        raise BadInput(f'pictures {bad} of a batch are not finite numbers: the network has diverged')
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(path, images, titles, columns):
    """A PNG of pictures uint8 (n, C, H, W) in rows of `columns`, each under its title."""
    n, C, H, W = images.shape
    zoom = max(1, 64 // H)
    cell_w, cell_h, title_h = W * zoom + 6, H * zoom + 20, 14
    sheet = Image.new('RGB', (columns * cell_w + 6, -(-n // columns) * cell_h + 6), 'white')
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (image, title) in enumerate(zip(np.asarray(images), titles)):
        left, top = i % columns * cell_w + 6, i // columns * cell_h + 4
        rgb = np.broadcast_to(image, (3, H, W)) if C == 1 else image[:3]
        tile = Image.fromarray(np.ascontiguousarray(rgb.transpose(1, 2, 0)))
        sheet.paste(tile.resize((W * zoom, H * zoom), Image.Resampling.NEAREST), (left, top + title_h))
        while title and pen.textlength(title, font) > W * zoom:
            title = title[:-1]
        pen.text((left, top), title, 'black', font)
    with whole_file(path) as file:
        sheet.save(file, 'PNG')


# ------------------------------------------------------------------------------------------------- shapes
#
# Ten classes of drawn shapes whose parts belong together: bars are equally long, a face has two matching
# eyes. Colours, background, size and position say nothing of the class. A shape is a formula over x, y in
# [-1, 1], y downwards, so the pictures depend on no drawing library.

def disc(x, y, r, cx=0.0, cy=0.0):
    return (x - cx) ** 2 + (y - cy) ** 2 < r ** 2


def box(x, y, half_width, half_height, cx=0.0, cy=0.0):
    return (abs(x - cx) < half_width) & (abs(y - cy) < half_height)


SHAPES = {
    'disc': lambda x, y: disc(x, y, 0.9),
    'square': lambda x, y: box(x, y, 0.8, 0.8),
    'triangle': lambda x, y: (y < 0.8) & (y > 2 * abs(x) - 0.95),
    'ring': lambda x, y: disc(x, y, 0.95) & ~disc(x, y, 0.5),
    'plus': lambda x, y: box(x, y, 0.95, 0.32) | box(x, y, 0.32, 0.95),
    'bars': lambda x, y: box(x, y, 0.9, 0.2, 0, -0.7) | box(x, y, 0.9, 0.2) | box(x, y, 0.9, 0.2, 0, 0.7),
    'dots': lambda x, y: disc(abs(x), abs(y), 0.42, 0.55, 0.55),
    'dumbbell': lambda x, y: disc(abs(x), y, 0.45, 0.55) | box(x, y, 0.5, 0.15),
    'moon': lambda x, y: disc(x, y, 0.95) & ~disc(x, y, 0.75, 0.45),
    'face': lambda x, y: (disc(x, y, 0.98) & ~disc(abs(x), y, 0.2, 0.38, -0.28)
                          & ~box(x, y, 0.45, 0.14, 0, 0.42)),
}
SHAPES_SIZE, SHAPES_COUNT = 16, 20_000
SUPERSAMPLE = 4                               # a pixel is the mean of 4 x 4 points


def draw_shapes(labels, size, rng):
    """Pictures uint8 (n, 3, size, size) of the shapes `labels` (n,)."""
    n, fine = len(labels), size * SUPERSAMPLE
    at = ((np.arange(fine) + 0.5) / fine * 2 - 1).astype(np.float32)
    radius = rng.uniform(0.55, 0.85, (n, 1, 1)).astype(np.float32)            # of half the picture
    shift = rng.uniform(-1, 1, (2, n, 1, 1)).astype(np.float32) * (0.95 - radius)
    x, y = (at[None, None, :] - shift[0]) / radius, (at[None, :, None] - shift[1]) / radius

    paint = np.empty((n, 3), np.float32)                                      # far enough from the background
    ground = rng.uniform(0, 1, (n, 3)).astype(np.float32)
    wrong = np.arange(n)
    while len(wrong):
        paint[wrong] = rng.uniform(0, 1, (len(wrong), 3))
        wrong = wrong[np.linalg.norm(paint[wrong] - ground[wrong], axis=1) < 0.6]
    slope = rng.uniform(-0.12, 0.12, (n, 3, 2, 1, 1)).astype(np.float32)      # the background's colour drifts
    line = at.reshape(size, SUPERSAMPLE).mean(1)
    paint, ground = paint[:, :, None, None], ground[:, :, None, None]
    pictures = np.empty((n, 3, size, size), np.uint8)
    for k, shape in enumerate(SHAPES.values()):                               # in turn, for the memory's sake
        i = np.flatnonzero(labels == k)
        points = shape(x[i], y[i]).reshape(len(i), 1, size, SUPERSAMPLE, size, SUPERSAMPLE)
        inside = points.mean((3, 5), np.float32)                              # (len(i), 1, size, size)
        back = ground[i] + slope[i, :, 0] * line + slope[i, :, 1] * line[:, None]
        pictures[i] = np.rint((inside * paint[i] + (1 - inside) * back).clip(0, 1) * 255)
    return pictures


def make_shapes(out, size=SHAPES_SIZE, count=SHAPES_COUNT, seed=0):
    """The data set `shapes` in the folder `out`. Deterministic; several processes may call it at once."""
    def rows():
        rng = np.random.default_rng(seed)
        for start in range(0, count, 500):
            labels = rng.integers(len(SHAPES), size=min(500, count - start))
            yield from zip(draw_shapes(labels, size, rng), labels.tolist())

    meta = {'kind': 'images', 'classes': len(SHAPES), 'class_names': list(SHAPES),
            'source': f'shapes, seed {seed}'}
    return save_folder(out, rows(), 'uint8', (3, size, size), meta, count)


def default_data():
    """The value of --data where none is typed: data/ if it is a data folder, else shapes/."""
    return 'data' if os.path.exists('data/meta.json') else 'shapes'


def open_data(path):
    """`Data(path)`; the folder `shapes`, if that is what is asked for, is made where it does not exist."""
    if str(path) == 'shapes' and not os.path.exists('shapes'):
        make_shapes('shapes')
    return Data(path)


# --------------------------------------------------------------------------------------- names, zip files

UNPACKED = 50                                 # a zip file's members may unpack to 50 times its size


def printable(name):
    """A file's name for a terminal or a text file: bytes that are no UTF-8 and control characters escaped."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def points_out(name):
    """Whether a member of an archive, unpacked carelessly, would land outside. Ours are never unpacked."""
    return name.startswith(('/', '\\')) or '..' in re.split(r'[/\\]', name)


def open_zip(path):
    """A zip file whose members are where and as long as they say. Raises BadInput; nothing is unpacked."""
    try:
        archive = zipfile.ZipFile(path)
        size, members = os.path.getsize(path), archive.infolist()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        why = getattr(error, 'strerror', None) or error
        raise BadInput(f'{path} is cut short or no zip file: {why}') from None
    for member in members:
        stored = member.compress_type == zipfile.ZIP_STORED
        odd = 'points out of it' if points_out(member.filename) else \
              'is a link' if stat.S_ISLNK(member.external_attr >> 16) else \
              'is encrypted' if member.flag_bits & 1 else \
              'lies about its length' if stored and member.file_size != member.compress_size else ''
        if odd:
            raise BadInput(f'{path} has a member {printable(member.filename)} that {odd}')
    if sum(member.compress_size for member in members) > size:
        raise BadInput(f'{path} has members that overlap or reach beyond its end')
    if (unpacked := sum(member.file_size for member in members)) > UNPACKED * size:
        raise BadInput(f'{path}, {size / 1e6:,.1f} MB, would unpack to {unpacked / 1e6:,.1f} MB: a bomb')
    return archive


# ---------------------------------------------------------------------------------------------------- VAE
#
# The KL autoencoder of Stable Diffusion (Rombach et al. 2022, "f8"): 83,653,863 parameters in 248 tensors,
# under the names of diffusers, so that loading is a renaming at most. Between pixels and latents lie three
# halvings; both ways, widths 128, 256, 512, 512 and one attention in the middle.
#
# Letters: B pictures    H = W their side in pixels    h = w = H/8    n, m channels before and after

VAE_FACTOR = 8                                # pixels a side of a latent


def group_norm(n):
    return nn.GroupNorm(32, n, eps=1e-6)


def conv(n, m):
    return nn.Conv2d(n, m, 3, padding=1)


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut; n -> m channels."""

    def __init__(self, n, m):
        super().__init__()
        self.norm1, self.conv1 = group_norm(n), conv(n, m)
        self.norm2, self.conv2 = group_norm(m), conv(m, m)
        self.conv_shortcut = nn.Conv2d(n, m, 1) if n != m else nn.Identity()

    def forward(self, x):
        inner = self.conv1(functional.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(functional.silu(self.norm2(inner)))


class PixelAttention(nn.Module):
    """Every pixel attends to all, in one head as wide as its n channels."""

    def __init__(self, n):
        super().__init__()
        self.group_norm = group_norm(n)
        self.to_q, self.to_k, self.to_v = nn.Linear(n, n), nn.Linear(n, n), nn.Linear(n, n)
        self.to_out = nn.Sequential(nn.Linear(n, n))

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).mT[:, None]                    # (B, 1, hw, n): a single head
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        seen = self.to_out(functional.scaled_dot_product_attention(q, k, v))
        return x + seen[:, 0].mT.unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """(B, n, H, W) -> (B, n, H/2, W/2) by a convolution of stride 2."""

    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride=2)

    def forward(self, x):
        return self.conv(functional.pad(x, (0, 1, 0, 1)))                     # right and below, no more


class Upsample(nn.Module):
    """(B, n, H, W) -> (B, n, 2H, 2W): pixels are doubled, then convolved."""

    def __init__(self, n):
        super().__init__()
        self.conv = conv(n, n)

    def forward(self, x):
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode='nearest'))


class Stage(nn.Sequential):
    """Residual blocks at one resolution, n -> m channels, then half or twice that resolution or neither."""

    def __init__(self, n, m, blocks, **resize):
        resnets = nn.Sequential(Residual(n, m), *(Residual(m, m) for _ in range(blocks - 1)))
        super().__init__(collections.OrderedDict(
            resnets=resnets, **{name: nn.Sequential(layer(m)) for name, layer in resize.items()}))


class Middle(nn.Module):
    """The only attention, between two residual blocks."""

    def __init__(self, n):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(n)])
        self.resnets = nn.ModuleList([Residual(n, n), Residual(n, n)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = conv(3, 128)
        self.down_blocks = nn.Sequential(
            Stage(128, 128, 2, downsamplers=Downsample), Stage(128, 256, 2, downsamplers=Downsample),
            Stage(256, 512, 2, downsamplers=Downsample), Stage(512, 512, 2))
        self.mid_block = Middle(512)
        self.conv_norm_out, self.conv_out = group_norm(512), conv(512, 8)

    def forward(self, x):                                                     # (B, 3, H, W)
        x = self.conv_in(x)                                                   # (B, 128, H, W)
        x = self.down_blocks(x)                                               # (B, 512, h, w)
        x = self.mid_block(x)                                                 # (B, 512, h, w)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))          # (B, 8, h, w)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = conv(4, 512)
        self.mid_block = Middle(512)
        self.up_blocks = nn.Sequential(
            Stage(512, 512, 3, upsamplers=Upsample), Stage(512, 512, 3, upsamplers=Upsample),
            Stage(512, 256, 3, upsamplers=Upsample), Stage(256, 128, 3))
        self.conv_norm_out, self.conv_out = group_norm(128), conv(128, 3)

    def forward(self, z):                                                     # (B, 4, h, w)
        x = self.conv_in(z)                                                   # (B, 512, h, w)
        x = self.mid_block(x)                                                 # (B, 512, h, w)
        x = self.up_blocks(x)                                                 # (B, 128, H, W)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))          # (B, 3, H, W)


class VAE(nn.Module):
    """Pictures to moments and latents to pictures, in float32 even where autocast says another.

    `LATENT_SCALE` is not in here: moments and latents are as the autoencoder has them, unscaled.
    """

    def __init__(self):
        super().__init__()
        self.encoder, self.quant_conv = Encoder(), nn.Conv2d(8, 8, 1)
        self.decoder, self.post_quant_conv = Decoder(), nn.Conv2d(4, 4, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> moments (B, 8, h, w): the mean, then the log-variance.

        Raises BadInput unless x is square and its side a multiple of 8.
        """
        if x.shape[1] != 3 or x.shape[2] != x.shape[3] or x.shape[2] % VAE_FACTOR or not x.shape[2]:
            raise BadInput(f'the VAE encodes (B, 3, H, H) with H a multiple of 8, not {tuple(x.shape)}: crop '
                           f'the pictures, as `python data.py folder` does')
        with torch.autocast(self.quant_conv.weight.device.type, enabled=False):
            return self.quant_conv(self.encoder(x.to(self.quant_conv.weight)))      # its device, float32

    def decode(self, z):
        """z (B, 4, h, h) -> x (B, 3, H, H), about [-1, 1]. Raises BadInput for another shape.

        One latent at a time: 512 pixels take about 1 GiB each, and so picture i depends on no batch.
        """
        if z.shape[1] != 4 or z.shape[2] != z.shape[3]:
            raise BadInput(f'the VAE decodes latents (B, 4, h, h), not {tuple(z.shape)}')
        with torch.autocast(self.quant_conv.weight.device.type, enabled=False):
            z = self.post_quant_conv(z.to(self.quant_conv.weight))            # its device, float32
            return torch.cat([self.decoder(one) for one in z.split(1)])


PUBLISHED_VAE = ('diffusion_pytorch_model.safetensors (334,643,276 bytes) of '
                 'https://huggingface.co/stabilityai/sd-vae-ft-ema or sd-vae-ft-mse (SHA-256 of -mse: '
                 'a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815)')
OTHER_NAMES = (                               # of the LDM files, of older diffusers files; today's
    *((f'.up.{i}.', f'.up_blocks.{3 - i}.') for i in range(4)),               # LDM counts from the pixels
    ('.down.', '.down_blocks.'),
    ('.block.', '.resnets.'),
    ('.upsample.', '.upsamplers.0.'),
    ('.downsample.', '.downsamplers.0.'),
    ('.mid.block_1.', '.mid_block.resnets.0.'),
    ('.mid.block_2.', '.mid_block.resnets.1.'),
    ('.mid.attn_1.', '.mid_block.attentions.0.'),
    ('.nin_shortcut.', '.conv_shortcut.'),
    ('.norm_out.', '.conv_norm_out.'),
    ('.norm.', '.group_norm.'),
    ('.q.', '.to_q.'), ('.k.', '.to_k.'), ('.v.', '.to_v.'), ('.proj_out.', '.to_out.0.'),
    ('.query.', '.to_q.'), ('.key.', '.to_k.'), ('.value.', '.to_v.'), ('.proj_attn.', '.to_out.0.'))


def read_vae(path, device='cpu'):
    """(VAE for inference in float32, SHA-256 of the file) from any of the published files.

    diffusers' (today's and older names) or LDM's, alone or within a Stable Diffusion checkpoint; safetensors
    or a torch file. Convolutions on a GPU are set to float32 proper, not TF32. Raises BadInput.
    """
    try:
        content = np.memmap(path, np.uint8, 'r') if os.path.getsize(path) else np.zeros(0, np.uint8)
    except FileNotFoundError:
        raise BadInput(f'there is no VAE {path}: name one with --vae, such as {PUBLISHED_VAE}') from None
    except OSError as error:
        raise BadInput(f'the VAE {path} cannot be read: {error.strerror or error}') from None
    head = content[:16].tobytes()
    if head.startswith(b'PK'):
        weights = read_torch(path)
    elif head[8:9] == b'{':
        weights = read_safetensors(path)
    else:
        raise BadInput(f'{path} is neither a safetensors nor a torch file, it begins with {head!r}: get '
                       f'{PUBLISHED_VAE}')
    with torch.device('meta'):
        vae = VAE()
    vae.load_state_dict(to_vae_names(weights, vae.state_dict(), path), assign=True)
    torch.backends.cudnn.conv.fp32_precision = 'ieee'
    return vae.to(device).eval().requires_grad_(False), hashlib.sha256(content).hexdigest()


def read_torch(path):
    """The dictionary in a file of torch.save, of which no code is run. Raises BadInput."""
    try:
        with open_zip(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise BadInput(f'{path} is packed, and torch packs nothing: get its .safetensors twin')
            if broken := archive.testzip():      # torch.load sees no flipped byte; the archive's CRC-32s do
                raise BadInput(f'{path} is damaged: its part {broken} does not match its checksum')
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except BadInput:
        raise
    except pickle.UnpicklingError:
        raise BadInput(f'{path} holds more than tensors, and opening the rest would run code from the file: '
                       f'get its .safetensors twin') from None
    except Exception as error:                                         # what torch raises here has many types
        raise BadInput(f'{path} is truncated or no torch file ({type(error).__name__})') from None


def to_vae_names(weights, wanted, path):
    """The tensors of a published file under our names, in float32, copied. Raises BadInput if they differ
    from `wanted` in names or shapes."""
    if isinstance(weights, dict):
        weights = weights.get('state_dict', weights)
    theirs = {name: value for name, value in (weights.items() if isinstance(weights, dict) else ())
              if isinstance(name, str) and isinstance(value, torch.Tensor)}
    inside = 'first_stage_model.' * any(name.startswith('first_stage_model.') for name in theirs)
    ours = {}
    for name, value in theirs.items():
        if not name.startswith(inside) or name.startswith(('loss.', 'model_ema.'), len(inside)):
            continue                                          # the rest of Stable Diffusion, or of a training
        name = name.removeprefix(inside)
        for old, new in OTHER_NAMES:
            name = name.replace(old, new)
        if '.attentions.0.to_' in name and value.ndim == 4:
            value = value.squeeze((2, 3))                                     # LDM's are convolutions, 1 x 1
        ours[name] = value
    lacks, more = [name for name in wanted if name not in ours], [name for name in ours if name not in wanted]
    odd = [name for name in wanted if name in ours and ours[name].shape != wanted[name].shape]
    if lacks or more or odd:
        differ = '; '.join(f'{len(names)} {what}, such as {names[0]}' for what, names in
                           (('missing', lacks), ('too many', more), ('of other shapes', odd)) if names)
        raise BadInput(f'{path} is not the f8 KL autoencoder of Stable Diffusion with its {len(wanted)} '
                       f'tensors, there are {differ} (in the names of diffusers): get {PUBLISHED_VAE}')
    ours = {name: value.to(torch.float32, copy=True) for name, value in ours.items()}    # off the mapped file
    wrong = [name for name, value in ours.items() if not value.isfinite().all()]
    if wrong:
        raise BadInput(f'{path} holds numbers that are not finite, {wrong[0]} and {len(wrong) - 1} more')
    return ours


SAFE_DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
               'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8,
               'U8': torch.uint8, 'BOOL': torch.bool}
SAFE_HEADER = 2_000_000                       # bytes at most; a whole Stable Diffusion has a tenth


def read_safetensors(path):
    """{name: tensor} of a safetensors file: the header's length, a JSON header, raw bytes.

    The tensors lie in the file, mapped and not read until they are used. What the header promises is held
    against the file's size before anything is mapped or made. Raises BadInput.
    """
    def refuse(why):
        raise BadInput(f'{path} is no whole safetensors file: {why}')

    def once(pairs):                                                          # JSON lets the last one win
        entries = dict(pairs)
        if len(entries) < len(pairs):
            refuse(f'its header says the same twice, {pairs[0][0][:60]!r} or another')
        return entries

    try:
        size = os.path.getsize(path)
        with open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            if length > min(size - 8, SAFE_HEADER):
                refuse(f'it says that its header has {length:,} bytes, of {size:,} in the file (at most '
                       f'{SAFE_HEADER:,} are read)')
            header = json.loads(file.read(length).decode(), object_pairs_hook=once)
            header.pop('__metadata__', None)
        content = np.memmap(path, np.uint8, 'c', offset=8 + length, shape=size - 8 - length) \
            if size > 8 + length else np.zeros(0, np.uint8)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f'{path} cannot be read: {error.strerror or error}') from None
    except (ValueError, RecursionError, AttributeError, TypeError):
        refuse('its header is not a JSON object')

    places = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = SAFE_DTYPES[entry['dtype']], entry['shape'], entry['data_offsets']
            sound = type(shape) is list and len(shape) <= 8 and all(
                type(n) is int and 0 <= n <= size for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound or end - begin != math.prod(shape) * dtype.itemsize:
            refuse(f'of {name[:60]!r} its header says {str(entry)[:100]}, where type, shape and bytes do not '
                   f'agree')
        places[name] = begin, end, dtype, shape
    tensors, at = {}, 0
    for name, (begin, end, dtype, shape) in sorted(places.items(), key=lambda item: item[1][:2]):
        if begin != at or end > len(content):
            refuse(f'the bytes of {name[:60]!r} are {begin:,} to {end:,}, those before it end at {at:,}, and '
                   f'all at {len(content):,}')
        raw, at = torch.from_numpy(content[begin:end]), end
        raw = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()    # the format aligns nothing
        tensors[name] = raw.view(dtype).reshape(shape)
    if at != len(content):
        refuse(f'its header tells of {at:,} bytes, and there are {len(content):,}')
    return tensors


# ------------------------------------------------------------------------------------------------ pictures
#
# One file -> RGB as a viewer shows it. ADM's preparation, by which FID references were made, differs for a
# few files: it turns nothing upright and drops transparency. How many were changed is counted and told.

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp')
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')       # what a file holds counts, not its name; no PostScript
MAX_PIXELS = 90_000_000                       # more is taken for a decompression bomb
LARGE_PIXELS = 16_000_000                     # of which one is read at a time, for the memory's sake
LARGE = threading.Lock()
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,      # EXIF's tag 274
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
           7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def center_crop(image, size):
    """ADM's crop: halve by box filter while twice too large, then bicubic to `size`, then cut the centre."""
    if max(image.size) > 16 * min(image.size):                     # else a line of 1 x 30,000 would grow huge
        half = 8 * min(image.size)
        x, y = image.width // 2, image.height // 2
        image = image.crop((max(x - half, 0), max(y - half, 0),
                            min(x + half, image.width), min(y + half, image.height)))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def central_square(array):
    """What `center_crop` leaves of a picture (H, W) before it is scaled."""
    side = min(array.shape)
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top:top + side, left:left + side]


def to_rgb(image):
    """(RGB picture, what had to be done to it as a list of words)."""
    done = ['of several frames: the first is taken'] * getattr(image, 'is_animated', False)
    image.load()                       # or getexif would, and what it swallows would be a picture with holes
    try:
        turn = UPRIGHT.get(image.getexif().get(274))
    except Exception:                                                         # broken EXIF costs no picture
        turn = None
    if image.mode.startswith('I'):                                            # 16 bits of grey
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        done.append('reduced from 16 bits to 8')
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        alpha = image.getchannel('A')
        if alpha.getextrema()[0] < 255:
            white = Image.new('RGB', image.size, 'white')
            white.paste(image, mask=alpha)
            image = white
            done.append('transparent: laid on white')
    elif image.mode == 'CMYK':
        done.append('turned from CMYK to RGB')
    image = image.convert('RGB')
    if turn is not None:
        image = image.transpose(turn)
        done.append('turned upright as EXIF says')
    return image, done


def read_picture(file, size, crop=center_crop):
    """(uint8 (3, size, size), what had to be done), or the reason why there is no picture, as a string.

    `file` is a path or a function that gives the bytes, `crop(image, size)` what is wanted of an RGB image.
    """
    try:
        with Image.open(io.BytesIO(file()) if callable(file) else file, formats=FORMATS) as image:
            pixels = image.width * image.height                               # none of which is read yet
            if pixels > MAX_PIXELS:
                return f'a decompression bomb: {pixels:,} pixels'
            with LARGE if pixels > LARGE_PIXELS else contextlib.nullcontext():
                rgb, done = to_rgb(image)
                if min(rgb.size) < size:
                    done.append(f'enlarged, being smaller than {size} pixels')
                return np.asarray(crop(rgb, size)).transpose(2, 0, 1), done
    except UnidentifiedImageError:
        return f'not a picture: {", ".join(FORMATS)} are read'
    except Image.DecompressionBombError as error:
        return f'a decompression bomb: {error}'
    except BadInput as error:
        return str(error)
    except Exception as error:                                                # a broken file raises anything
        return f'damaged or not to be read: {getattr(error, "strerror", None) or error}'


# ------------------------------------------------------------------------------------------------- prepare
#
# OUT.partial/chunks/plan.json      what is made; a restart must want the same
# OUT.partial/chunks/000007.chunk   256 pictures, done: a line of JSON (labels, what was skipped), then rows
# OUT.partial/data.npy              once all chunks are there, their rows; a moved chunk keeps its line
# OUT.partial/meta.json             last: all is there but the name
#
# Chunk files appear by renaming, so whatever is killed, what is there is whole. A picture's chunk and its
# place in a batch of the encoder are the same for any number of processes and restarts: so are its bytes.

CHUNK = 256                                   # pictures; at 256 pixels 4 MB of moments
BATCH = {'cpu': 4, 'cuda': 32}                # pictures that a VAE encodes at a time; of 512 pixels a quarter


def where_am_i(gpu=False):
    """(rank, world, device), with the process group set up if torchrun started us.

    Only with `gpu` does a process take its GPU, if there are any. Raises BadInput if that is one too many.
    """
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = torch.device('cpu')
    if gpu and torch.cuda.is_available():
        local, gpus = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
        if local >= gpus:
            raise BadInput(f'process {local} of this machine, counted from 0, has no GPU, for there are '
                           f'{gpus}: type --nproc_per_node {gpus}')
        device = torch.device('cuda', local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():                       # processes wait a day for the slowest
        dist.init_process_group('gloo', timeout=datetime.timedelta(days=1))
    return rank, world, device


def agree(mistake, world):
    """All processes stop where one has made a mistake."""
    failed = torch.tensor([mistake is not None], dtype=torch.int64)
    if world > 1:
        dist.all_reduce(failed)
    if failed:
        raise mistake or BadInput('another process has found a mistake, see there')


def from_first(make, rank, world):
    """What `make()` returns on process 0, for all."""
    made, mistake = [None], None
    if rank == 0:
        try:
            made = [make()]
        except BadInput as error:
            mistake = error
    agree(mistake, world)
    if world > 1:
        dist.broadcast_object_list(made, 0)
    return made[0]


def prepare(out, found, read, meta, size, workers, encode=None, passed_over=(), remarks=()):
    """Write the data folder `out` from pictures, by all processes together, restartable.

    found        [(name, label)], shuffled here, so that the held-out end is a fair sample
    read         read(name) -> `read_picture`'s answer
    meta         of the folder; a restart must agree with its source and VAE, and with `found`
    encode       uint8 (n, 3, size, size) -> float16 (n, 8, size / 8, size / 8); None keeps the pixels
    passed_over  [(name, reason)] that were not even read, `remarks` sentences: for the closing summary
    Raises BadInput; where the disk fails, what is done is kept for the next try.
    """
    rank, world, device = where_am_i(gpu=encode)
    out = pathlib.Path(out)                                                   # without a slash at its end
    partial = pathlib.Path(f'{out}.partial')
    side = size // VAE_FACTOR
    shape, dtype = ((8, side, side), 'float16') if encode else ((3, size, size), 'uint8')
    row = math.prod(shape) * np.dtype(dtype).itemsize
    batch = max(1, min(BATCH[device.type], BATCH[device.type] * 256 ** 2 // size ** 2))
    order = np.random.default_rng(0).permutation(len(found))
    chunks = [[found[i] for i in order[at:at + CHUNK]] for at in range(0, len(found), CHUNK)]
    listing = hashlib.sha256(os.fsencode('\0'.join(f'{name}\0{label}' for name, label in found)))
    plan = {'source': meta['source'], 'pictures': len(found), 'listing': listing.hexdigest(),
            'vae_sha256': meta.get('vae_sha256'), 'device': device.type if encode else None, 'chunk': CHUNK}
    clock, mistake = time.perf_counter(), None
    with contextlib.ExitStack() as hold:
        todo = from_first(lambda: begin(out, partial, plan, len(chunks), row, hold), rank, world)
        count = sum(len(chunks[k]) for k in todo)
        failed = functools.partial(cannot_write, out, needed=count * row, kept=f'; what is done is kept in '
                                   f'{partial}, and the same command goes on from there')
        mine = {k: chunks[k] for k in todo[rank::world]}
        bar = hold.enter_context(tqdm(desc='pictures' if world == 1 else f'pictures of process 0 of {world}',
                                      total=sum(map(len, mine.values())), disable=rank > 0 or None, unit=''))
        hold.enter_context(warnings.catch_warnings())
        warnings.simplefilter('ignore')                                       # Pillow's: the summary tells
        try:
            work(partial / 'chunks', mine, read, encode, batch, shape, dtype, meta, workers, bar)
        except (OSError, BadInput) as error:
            mistake = error if isinstance(error, BadInput) else failed(error)
        bar.close()
        agree(mistake, world)
        if rank:
            return
        rate = count / (time.perf_counter() - clock)
        try:
            meta, done = gather(partial, len(chunks), dtype, shape, meta, passed_over)
            os.rename(partial, out)
            shutil.rmtree(out / 'chunks')
        except OSError as error:
            raise failed(error) from None
    for sentence in [*remarks, *(f'{n:,} picture{"s" * (n > 1)} {what}' for what, n in sorted(done.items()))]:
        print(sentence)
    tell(out, meta, f'{size} x {size} pixels')
    print(f'{rate:,.1f} pictures/s, {world} x {workers} threads' if count else 'nothing was left to read')


def begin(out, partial, plan, count, row, hold):
    """Process 0: make or check the working folder; the numbers of the chunks that are still to be made."""
    chunks = partial / 'chunks'
    try:
        chunks.mkdir(parents=True, exist_ok=True)
        lock = hold.enter_context(open(chunks / 'lock', 'w'))
        with contextlib.suppress(OSError):                                    # there are disks without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)              # free when its holder dies
            except BlockingIOError:
                raise BadInput(f'another program is preparing {out} at this moment') from None
        for litter in partial.rglob('*.tmp*'):
            litter.unlink()
        done = {int(path.stem) for path in chunks.glob('*.chunk')}
        old = json.loads((chunks / 'plan.json').read_text()) if done else plan
        other = [f'{name} was {old.get(name)} and is now {plan[name]}'
                 for name in plan if plan[name] != old.get(name)]
        if other:
            raise BadInput(f'{partial} was begun for something else ({"; ".join(other)}): type the command '
                           f'as it was to go on, or remove {partial} to begin anew')
        todo = [k for k in range(count) if k not in done]
        check_room(out, min(plan['pictures'], len(todo) * CHUNK) * row)
        with whole_file(chunks / 'plan.json') as file:
            file.write(json.dumps(plan).encode())
    except OSError as error:
        raise cannot_write(out, error, plan['pictures'] * row) from None
    if done:
        print(f'{printable(partial)} has {len(done)} of {count} chunks: going on from there', flush=True)
    return todo


def work(folder, chunks, read, encode, batch, shape, dtype, meta, workers, bar):
    """Make `chunks`, {number: [(name, label)]}: one is read by threads while the one before is encoded."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)         # Pillow decodes and resizes without the GIL
    queue = lambda k: [pool.submit(read, name) for name, _ in chunks[k]]
    try:
        numbers = list(chunks)
        coming = queue(numbers[0]) if numbers else ()
        for k, after in zip(numbers, [*numbers[1:], None]):
            answers, coming = coming, queue(after) if after else ()
            labels, skipped, done, pictures = [], [], collections.Counter(), []
            for (name, label), answer in zip(chunks[k], (future.result() for future in answers)):
                if isinstance(answer, str):
                    skipped.append((name, answer))
                else:
                    labels.append(label)
                    pictures.append(answer[0])
                    done.update(answer[1])
            bar.update(len(skipped))
            rows = np.empty((len(pictures), *shape), dtype)
            for at in range(0, len(rows), batch):
                some = np.stack(pictures[at:at + batch])
                rows[at:at + batch] = encode(some) if encode else some
                bar.update(len(some))
            line = {'labels': labels, 'skipped': skipped, 'done': done,
                    'sums': channel_sums(rows, meta).tolist()}
            with whole_file(folder / f'{k:06d}.chunk') as file:
                file.write(json.dumps(line).encode() + b'\n' + rows.tobytes())
    finally:
        pool.shutdown(cancel_futures=True)


def gather(partial, count, dtype, shape, meta, skipped):
    """Move the rows of all chunks into data.npy and describe it: (meta, what was done to how many)."""
    parts = [partial / 'chunks' / f'{k:06d}.chunk' for k in range(count)]
    labels, skipped, done, spans, sums = [], list(skipped), collections.Counter(), [], 0
    row = math.prod(shape) * np.dtype(dtype).itemsize
    for part in parts:
        with open(part, 'rb') as file:
            line = file.readline()
        record = json.loads(line)
        spans.append((part, len(line), len(labels) * row))
        labels += record['labels']
        skipped += record['skipped']
        done.update(record['done'])
        sums = sums + np.array(record['sums'])
    if skipped:
        with whole_file(partial / 'skipped.txt') as file:
            file.writelines(f'{printable(name)}\t{reason}\n'.encode() for name, reason in skipped)
    for name, reason in skipped[:10]:
        print(f'skipped {printable(name)}: {reason}')
    if len(skipped) > 10:
        print(f'... and {len(skipped) - 10:,} more, which skipped.txt names')
    done.update(f'skipped: {reason.split(":")[0]}' for _, reason in skipped)
    if len(labels) < 2:
        shutil.rmtree(partial)                                                # nothing in it is worth keeping
        why = f'; the first that is not: {printable(skipped[0][0])}, {skipped[0][1]}' if skipped else ''
        raise BadInput(f'there are fewer than 2 readable pictures{why}')

    header = npy_header(dtype, (len(labels), *shape))
    with open(os.open(partial / 'data.npy', os.O_RDWR | os.O_CREAT, 0o666), 'r+b') as whole:
        whole.write(header)
        for part, begin, to in spans:
            with open(part, 'r+b') as file:
                file.seek(begin)
                rows = file.read()
                if rows:                                                      # else they were moved before
                    whole.seek(len(header) + to)
                    whole.write(rows)
                    whole.flush()
                    os.fsync(whole.fileno())
                    file.truncate(begin)
    return describe(partial, labels, sums, meta | {'skipped': len(skipped)}), done


def already_there(out):
    """Refuse an `out` that exists; True for one that was killed while it tidied up, which this does now."""
    if not os.path.lexists(out):
        return False
    chunks = pathlib.Path(out, 'chunks')
    ours = os.path.isdir(chunks) and os.path.exists(f'{out}/meta.json') and all(
        re.fullmatch(r'\d{6,}\.chunk|plan\.json|lock', path.name) for path in chunks.iterdir())
    if not ours:
        raise BadInput(f'{out} exists already: remove it, or choose another --out')
    shutil.rmtree(chunks)
    print(f'{printable(out)} was complete')
    return True


def tell(out, meta, each):
    """The closing lines: what there is now, of what size, and the numbers of its channels."""
    kind = 'pictures' if meta['kind'] == 'images' else meta['kind']
    skipped = f', {meta["skipped"]:,} skipped' if 'skipped' in meta else ''
    print(f'{printable(out)}: {meta["count"]:,} {kind} of {each}, {meta["classes"] or "no"} classes'
          f'{skipped}; a look at them: preview.png in it')
    mean, std = (', '.join(f'{value:.3f}' for value in meta[name]) for name in ('mean', 'std'))
    print(f'mean of the channels: {mean}')
    print(f'standard deviation of the channels: {std} (train.py takes 0.5, unless --sigma-data says another)')


# ------------------------------------------------------------------------------------------------- folder

def files_under(source):
    """The names under `source` of all its files, in sorted order, and of the folders in it.

    Links are followed, but not back into where they lie; what begins with a dot is left out.
    Raises BadInput for a folder that cannot be listed.
    """
    def stop(error):
        raise BadInput(f'cannot list {printable(error.filename)}: {error.strerror}')

    names, places = [], []
    for folder, folders, files in os.walk(source, followlinks=True, onerror=stop):
        above = [os.path.realpath(place) for place in pathlib.Path(folder).parents]
        if os.path.realpath(folder) in above:                                 # a link into what it lies in
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        inside = os.path.relpath(folder, source)
        places.append(inside)
        names += [os.path.normpath(os.path.join(inside, name)) for name in sorted(files)
                  if not name.startswith('.')]
    return names, places


def find_pictures(source):
    """([(name under `source`, label)], class names, [(name, why passed over)], sentences).

    A class is a folder directly under `source`, with or without pictures: class numbers are ImageNet's, those
    of the sorted folders. Without pictures in folders there are no classes. Raises BadInput.
    """
    if not os.path.isdir(source):
        raise BadInput(f'there is no folder {source} with pictures')
    names, places = files_under(source)
    pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not pictures:
        raise BadInput(f'{source} holds no picture: expected {", ".join(SUFFIXES)} files, in one sub-folder '
                       f'a class or in none')
    others = collections.Counter(os.path.splitext(name)[1].lower() or 'without a suffix'
                                 for name in names if not name.lower().endswith(SUFFIXES))
    sentences = [f'{n:,} file{"s" * (n > 1)} left out, by name no picture: {printable(suffix)}'
                 for suffix, n in sorted(others.items())]
    if not any(os.sep in name for name in pictures):
        return [(name, 0) for name in pictures], [], [], sentences
    classes = sorted(place for place in places if os.sep not in place and place != os.curdir)
    number = {name: k for k, name in enumerate(classes)}
    found = [(name, number[name.split(os.sep)[0]]) for name in pictures if os.sep in name]
    used = {label for _, label in found}
    sentences += [f'class {k}, {printable(name)}, has no pictures: it keeps its number'
                  for name, k in number.items() if k not in used]
    passed_over = [(name, 'lies beside the class folders') for name in pictures if os.sep not in name]
    return found, [printable(name) for name in classes], passed_over, sentences


def make_folder(source, out, size, workers, vae=None):
    """Prepare a tree of pictures, as pixels or, with the file of a VAE, as moments. Raises BadInput."""
    rank, world, device = where_am_i(gpu=vae)
    if vae and size % VAE_FACTOR:
        raise BadInput(f'--size {size} must be a multiple of {VAE_FACTOR} for the VAE')
    meta = {'kind': 'moments' if vae else 'images', 'source': f'folder, {size} pixels'}
    found, classes, passed_over, sentences = from_first(lambda: find_pictures(source), rank, world)
    meta |= {'classes': len(classes)} | ({'class_names': classes} if classes else {})
    encode = None
    if vae:
        network, sha256 = read_vae(vae, device)
        torch.backends.cudnn.deterministic = True                             # a restart makes the same bytes
        meta |= {'scale': LATENT_SCALE, 'vae': printable(os.path.abspath(vae)), 'vae_sha256': sha256}
        encode = functools.partial(encode_pictures, network, device)
    read = lambda name: read_picture(os.path.join(source, name), size)
    prepare(out, found, read, meta, size, workers, encode, passed_over, sentences)


@torch.no_grad()
def encode_pictures(vae, device, pictures):
    """uint8 (n, 3, S, S) -> moments float16 (n, 8, S/8, S/8). Raises BadInput if float16 cannot hold them."""
    moments = vae.encode(torch.from_numpy(pictures).to(device) / 127.5 - 1).half().cpu()
    if not moments.isfinite().all():
        raise BadInput('the VAE makes numbers that are not finite in float16: is its file the published one?')
    return moments.numpy()


# ------------------------------------------------------------------------------------------ CIFAR-10, CelebA

CIFAR_CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
CIFAR_MD5 = {'c58f30108f718f92721af3b95e74349a': 'python', 'c32a1d4ab5d03f1284b67883e8d87530': 'binary'}
CIFAR_BYTES = 250_000_000                     # the archives hold 186 MB


class Bounded(io.RawIOBase):
    """A file that gives `limit` bytes at most, then BadInput: what kilobytes unpack to may be endless."""

    def __init__(self, file, limit, path):
        self.file, self.left, self.path = file, limit, path

    def read(self, n):
        content = self.file.read(min(n, self.left + 1) if n >= 0 else self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            raise BadInput(f'{self.path} unpacks to more than CIFAR-10 holds')
        return content


def cifar_batches(source):
    """{file name: content} of the training batches in an archive or a folder. Nothing is unpacked to disk."""
    wanted = re.compile(r'data_batch_[1-5](\.bin)?')
    batches = {}
    try:
        if os.path.isdir(source):
            for name in files_under(source)[0]:
                if wanted.fullmatch(os.path.basename(name)):
                    with open(os.path.join(source, name), 'rb') as file:
                        batches[os.path.basename(name)] = Bounded(file, CIFAR_BYTES // 5, name).read(-1)
            return batches
        with open(source, 'rb') as file:
            if os.path.getsize(source) > CIFAR_BYTES:
                raise BadInput(f'{source} is larger than CIFAR-10')
            content = file.read()
            md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
            packed = content.startswith(b'\x1f\x8b')
            file.seek(0)
            plain = gzip.GzipFile(fileobj=file) if packed else file
            with tarfile.open(fileobj=Bounded(plain, CIFAR_BYTES, source), mode='r|') as archive:
                for k, member in enumerate(archive):
                    name = printable(member.name)
                    odd = 'is one of more than 100' if k >= 100 else \
                          'points out of it' if points_out(member.name) else \
                          'is a link or a device' if not (member.isfile() or member.isdir()) else \
                          f'has {member.size:,} bytes' if member.size > CIFAR_BYTES // 5 else ''
                    if odd:
                        raise BadInput(f'{source} has a member {name} that {odd}: this is not CIFAR-10')
                    if member.isfile() and wanted.fullmatch(os.path.basename(member.name)):
                        batches[os.path.basename(member.name)] = archive.extractfile(member).read()
    except FileNotFoundError:
        raise BadInput(f'there is no {source}: expected cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or '
                       f'what is in them') from None
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise BadInput(f'{source} is cut short or no tar archive: {error}') from None
    known = f'the published one, {CIFAR_MD5[md5]} version' if md5 in CIFAR_MD5 else 'of no published archive'
    print(f'{printable(source)}: its MD5 {md5} is {known}')
    return batches


def read_cifar_batch(name, content):
    """(pictures uint8 (n, 3, 32, 32), labels) of a batch, binary or python version. Raises BadInput.

    A record of the binary version is a label and 3 x 32 x 32 bytes. The python version is a pickle, which is
    not loaded: its operations are looked through for the one long string of bytes, the pictures, and for the
    numbers after the word "labels".
    """
    if name.endswith('.bin'):
        if not content or len(content) % 3073:
            raise BadInput(f'{name} has {len(content):,} bytes, not a multiple of 3,073: it is cut short')
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        labels, pixels = records[:, 0], records[:, 1:].tobytes()
    else:
        labels, pixels, key = [], b'', None
        try:
            for k, (operation, value, _) in enumerate(pickletools.genops(content)):
                if k > 1_000_000:                                             # a published one has 30,000
                    raise ValueError('more than 1,000,000 operations')
                if isinstance(value, str) and operation.name in ('BINSTRING', 'SHORT_BINSTRING', 'STRING'):
                    value = value.encode('latin-1')
                if isinstance(value, bytes) and len(value) >= 3072:
                    pixels = value
                elif isinstance(value, bytes | str) and operation.name != 'GLOBAL':
                    key = value if isinstance(value, str) else value.decode('latin-1')
                elif operation.name.startswith('BININT') and key == 'labels':
                    labels.append(value)
        except (ValueError, struct.error) as error:
            raise BadInput(f'{name} is cut short or no pickle: {error}') from None
        if not labels or len(pixels) != 3072 * len(labels):
            raise BadInput(f'{name} holds {len(labels):,} labels and {len(pixels):,} bytes of pictures, '
                           f'expected 3,072 bytes a label: is this CIFAR-10?')
    labels = np.asarray(labels)
    if labels.min() < 0 or labels.max() > 9:
        raise BadInput(f'{name} holds labels from {labels.min()} to {labels.max()}, expected 0 to 9')
    return np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32), labels


def make_cifar(source, out):
    """The 50,000 training pictures of CIFAR-10, 32 x 32, shuffled. Raises BadInput."""
    batches = cifar_batches(source)
    version = '.bin' * any(name.endswith('.bin') for name in batches)
    names = [f'data_batch_{k}{version}' for k in range(1, 6)]
    if missing := [name for name in names if name not in batches]:
        raise BadInput(f'{source} has no {", ".join(missing)}: it is not CIFAR-10, or cut short')
    pictures, labels = map(np.concatenate, zip(*(read_cifar_batch(name, batches[name]) for name in names)))
    order = np.random.default_rng(0).permutation(len(labels))
    rows = ((pictures[i], int(labels[i])) for i in order)
    meta = {'kind': 'images', 'classes': 10, 'class_names': CIFAR_CLASSES, 'source': 'CIFAR-10, training set'}
    tell(out, save_folder(out, rows, 'uint8', (3, 32, 32), meta, len(order)), '32 x 32')


MAX_BYTES = 2 ** 27                           # of a picture in a zip file


def open_tree(source):
    """(names of the files in a folder or a zip file, name -> what `read_picture` takes, that zip or None)."""
    if os.path.isdir(source):
        return files_under(source)[0], functools.partial(os.path.join, source), None
    if not os.path.exists(source):
        raise BadInput(f'there is no {source}')
    archive = open_zip(source)

    def read(name):
        if archive.getinfo(name).file_size > MAX_BYTES:
            raise BadInput(f'too large for a picture: {archive.getinfo(name).file_size:,} bytes')
        return archive.read(name)
    names = sorted(name for name in archive.namelist() if not name.endswith('/'))
    return names, lambda name: functools.partial(read, name), archive


def celeba_crop(image, size, side, x, y):
    """`side` pixels around (x, y) of an aligned picture, scaled by a triangle filter, as others scale it."""
    if image.size != (178, 218):
        raise BadInput(f'not aligned, 178 x 218: {image.width} x {image.height}')
    left, top = x - side // 2, y - side // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)


def read_attribute(source, attribute):
    """{picture name: 0 or 1} from list_attr_celeba.txt in or beside `source`. Raises BadInput.

    The file holds a count, 40 names, then a line a picture with its name and 40 times -1 or 1.
    """
    folder = source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))
    places = [os.path.join(folder, *way, 'list_attr_celeba.txt') for way in
              ((), ('Anno',), ('..',), ('..', 'Anno'), ('..', '..', 'Anno'))]
    path = next((place for place in places if os.path.isfile(place)), None)
    if path is None:
        raise BadInput(f'--attribute needs list_attr_celeba.txt in or beside {source}')
    try:
        if os.path.getsize(path) > 100_000_000:                               # the published one has 27 MB
            raise BadInput(f'{path} is larger than the attributes of CelebA')
        with open(path, encoding='utf-8') as file:
            file.readline()
            names = file.readline().split()
            if attribute not in names:
                raise BadInput(f'--attribute {attribute} is none of {", ".join(names)[:1000]}')
            column = names.index(attribute) + 1
            lines = [line.split() for line in file]
            return {words[0]: {'1': 1, '-1': 0}[words[column]] for words in lines if words}
    except (OSError, UnicodeDecodeError, KeyError, IndexError) as error:
        raise BadInput(f'{path} cannot be read as the attributes of CelebA: {error!r}') from None


def make_celeba(source, out, size, crop, attribute, workers):
    """The aligned pictures of CelebA, all 202,599, from their folder or zip. Raises BadInput."""
    side, x, y = crop
    if not (1 <= side and 0 <= x - side // 2 <= 178 - side and 0 <= y - side // 2 <= 218 - side):
        raise BadInput(f'--crop {side} {x} {y} reaches out of the 178 x 218 pixels')
    rank, world, _ = where_am_i()
    files, opened, _ = open_tree(source)

    def find():
        names = [name for name in files
                 if name.lower().endswith('.jpg') and not os.path.basename(name).startswith('.')]
        if not names:
            raise BadInput(f'{source} holds no .jpg: expected img_align_celeba.zip, or the folder in it')
        if not attribute:
            return [(name, 0) for name in names]
        labels = read_attribute(source, attribute)
        if lost := [name for name in names if os.path.basename(name) not in labels]:
            raise BadInput(f'list_attr_celeba.txt lacks {printable(lost[0])} and {len(lost) - 1} more')
        return [(name, labels[os.path.basename(name)]) for name in names]

    found = from_first(find, rank, world)
    cut = functools.partial(celeba_crop, side=side, x=x, y=y)
    meta = {'kind': 'images', 'classes': 2 if attribute else 0,
            'source': f'CelebA, {side} pixels around ({x}, {y}) to {size}, classes by {attribute}'}
    meta |= {'class_names': [f'not {attribute}', attribute]} if attribute else {}
    prepare(out, found, lambda name: read_picture(opened(name), size, cut), meta, size, workers)


# ------------------------------------------------------------------------------------------------- import

def map_array(path, begin=0, length=None):
    """The array of the .npy file that lies at `begin` in the file `path`, mapped. Raises BadInput."""
    try:
        length = os.path.getsize(path) - begin if length is None else length
        with open(path, 'rb') as file:
            file.seek(begin)
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError('its version is not 1.0')
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            header = file.tell() - begin
        if dtype.kind not in 'fiu':
            raise ValueError(f'it holds {dtype}, no plain numbers')
        if min(shape, default=1) < 1 or header + math.prod(shape) * dtype.itemsize != length:
            raise ValueError(f'{dtype} {shape} do not fill its {length:,} bytes')
        return np.memmap(path, dtype, 'r', begin + header, shape, 'F' if fortran else 'C')
    except Exception as error:                                               # a broken header raises anything
        raise BadInput(f'{printable(path)} has an array that is cut short or cannot be read: '
                       f'{printable(getattr(error, "strerror", None) or error)[:300]}') from None


def place_of(archive, name):
    """(path, begin, length) of a member of a zip file, for `map_array`. Raises BadInput."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise BadInput(f'{archive.filename} is compressed: type `python -m zipfile -e {archive.filename} '
                       f'FOLDER` and import what is in FOLDER')
    with open(archive.filename, 'rb') as file:
        file.seek(max(member.header_offset, 0))                               # a lying directory goes below
        head = file.read(30)
    if len(head) < 30 or head[:4] != b'PK\3\4':
        raise BadInput(f'{archive.filename} has no member where it says that {printable(name)} is')
    begin = member.header_offset + 30 + sum(struct.unpack('<HH', head[26:]))
    return archive.filename, begin, member.file_size


def dataset_labels(source, archive, names):
    """Labels (N,) of the files `names`, or None, by EDM's dataset.json: {"labels": [[name, class], ...]}."""
    most = 1000 + 200 * len(names)                                            # bytes; an entry has about 50
    try:
        with archive.open('dataset.json') if archive else open(f'{source}/dataset.json', 'rb') as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f'more than {most:,} bytes')
        pairs = json.loads(content)['labels']
        if pairs is None:
            return None
        labels = {name: label for name, label in pairs}
        found = [labels[name] for name in names]
        if not all(type(label) is int and 0 <= label < MOST_CLASSES for label in found):
            raise TypeError('labels must be class numbers')
        return np.array(found)
    except Exception as error:                                                # JSON and zip raise many things
        raise BadInput(f'{source} needs a dataset.json with {{"labels": [[name, class], ...]}} for its '
                       f'{len(names):,} files: {type(error).__name__} {printable(error)[:100]}') from None


def open_arrays(source, names, archive):
    """(what it is, number of rows, row(i) -> array, labels (N,) or None) of others' arrays, or BadInput."""
    path = pathlib.Path(source)
    if features := sorted(path.glob('*_features')):
        inside = features[0].name + os.sep
        order = [name.removeprefix(inside) for name in names if name.startswith(inside)]
        beside = pathlib.Path(str(features[0]).removesuffix('_features') + '_labels')
        if len(features) > 1 or not order or not all(re.fullmatch(r'\d{1,9}\.npy', name) for name in order):
            raise BadInput(f'{source} should hold one folder NAME_features of 0.npy, 1.npy, ...')
        if lost := [name for name in order if not (beside / name).is_file()]:
            raise BadInput(f'{beside} lacks {lost[0]} and {len(lost) - 1} more: each feature needs its label')
        labels = [map_array(beside / name).reshape(-1)[0] for name in order]
        row = lambda i: map_array(features[0] / order[i])
        return "fast-DiT's features", len(order), row, np.array(labels)
    if path.is_dir() or archive:
        order = [name for name in names if name.endswith('.npy')]
        if not order:
            raise BadInput(f'{source} holds neither dataset.json with .png or .npy files, nor a folder '
                           f'NAME_features: type the folder or the zip file that does')
        labels = dataset_labels(source, archive, order)
        row = lambda i: map_array(*(place_of(archive, order[i]) if archive else (path / order[i],)))
        return "EDM's layout of arrays", len(order), row, labels
    if path.suffix == '.npz':
        archive = open_zip(source)
        arrays = {name: map_array(*place_of(archive, f'{name}.npy')) for name in
                  ('arr_0', 'latents', 'arr_1', 'labels') if f'{name}.npy' in archive.namelist()}
    else:
        arrays = {'array': map_array(source)}
    labels = arrays.pop('arr_1', arrays.pop('labels', None))
    if len(arrays) != 1 or any(array.ndim != 4 for array in arrays.values()):
        told = ', '.join(f'{name} {array.dtype} {array.shape}' for name, array in arrays.items())
        raise BadInput(f'{source} holds {told or "no arr_0 or latents"}: expected one array (N, C, h, h)')
    (name, array), = arrays.items()
    if array.dtype == np.uint8 and array.shape[3] in (1, 3):                  # ADM's (N, H, W, C)
        return f'{name} of pictures', len(array), lambda i: array[i].transpose(2, 0, 1), labels
    return name, len(array), array.__getitem__, labels


def find_layout(look, layout):
    """(layout, how it is known) of rows: pixels, mean-logvar, mean-std or sampled. Raises BadInput."""
    C = look.shape[1]
    if look.dtype == np.uint8:
        return 'pixels', 'uint8'
    if layout and layout != 'sampled' and C % 2:
        raise BadInput(f'--layout {layout} needs an even number of channels, and there are {C}')
    if layout:
        return layout, 'as --layout says'
    if C == 4:
        return 'sampled', '4 channels'
    if C != 8:
        raise BadInput(f'rows of {C} channels are neither 4 sampled latents nor 8 moments: type --layout')
    low = look[:, 4:].min()
    if low < 0:
        return 'mean-logvar', f'channels 4 to 7 go down to {low:.3g}, and a standard deviation does not'
    return 'mean-std', f'channels 4 to 7 of {len(look)} rows are never below 0, as log-variances would be'


def make_import(source, out, layout, scale, workers):
    """Copy what another repository has prepared; see the docstring of this file. Raises BadInput."""
    def pictures_take_no_flags():
        if layout or scale is not None:
            raise BadInput('--layout and --scale are for latents, and these are pictures')

    path = pathlib.Path(source)
    if not os.path.exists(path):
        raise BadInput(f'there is no {source}')
    tree = path.is_dir() or path.suffix == '.zip'
    names, opened, archive = open_tree(source) if tree else ((), None, None)
    pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
    if pictures and 'dataset.json' in names:
        pictures_take_no_flags()
        return import_pictures(source, pictures, opened, archive, out, workers)
    if int(os.environ.get('RANK', 0)):
        return None
    what, count, row, labels = open_arrays(source, names, archive)
    if count < 2:
        raise BadInput(f'{source} holds 1 row: at least 2 are needed, one to train on and one held out')
    order = np.random.default_rng(0).permutation(count)
    first = row(order[0])
    shape = first.shape[first.ndim == 4:]                                     # fast-DiT's are (1, C, h, w)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise BadInput(f'{source} holds rows {first.shape}: expected (C, h, h)')
    if first.dtype == np.uint8:
        pictures_take_no_flags()

    def get(i):
        found = row(i)
        if found.dtype != first.dtype or found.size != math.prod(shape) or found.shape[-3:] != shape:
            raise BadInput(f'{source} holds rows {first.dtype} {first.shape} and {found.dtype} '
                           f'{found.shape}: all must be alike')
        return np.asarray(found).reshape(shape)

    layout, why = find_layout(np.stack([get(i) for i in order[:100]]), layout)
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in 'iu' or labels.min() < 0
                               or labels.max() >= MOST_CLASSES):
        raise BadInput(f'{source} holds labels {labels.dtype} {labels.shape}: expected {count:,} class '
                       f'numbers from 0 and below a million')
    classes = 0 if labels is None else int(labels.max()) + 1
    print(f'{printable(source)}: {what}, {count:,} rows of {first.dtype} {shape}, {classes or "no"} classes')
    print(f'layout {layout}: {why}')
    moments = layout.startswith('mean')
    kind = 'images' if layout == 'pixels' else 'moments' if moments else 'latents'
    dtype = 'uint8' if kind == 'images' else 'float16' if moments or first.dtype == np.float16 else 'float32'

    def rows():
        for i in tqdm(order, 'rows', unit='', disable=None):
            x = get(i)
            if layout == 'mean-std':
                mean, std = np.split(x.astype(np.float32), 2)
                if std.min() < 0:
                    raise BadInput(f'{source}: row {i} has a deviation below 0: type --layout mean-logvar')
                x = np.concatenate([mean, 2 * np.log(std.clip(1e-7))])
            elif kind == 'latents' and scale is not None:
                x = scale * x.astype(np.float32)
            with np.errstate(over='ignore'):
                x = x.astype(dtype)
            if not np.isfinite(x).all():
                raise BadInput(f'{source}: row {i} holds numbers that are not finite in {dtype}')
            yield x, 0 if labels is None else int(labels[i])

    meta = {'kind': kind, 'classes': classes, 'source': f'import of {what}, {layout}'}
    if kind != 'images':
        meta['scale'] = LATENT_SCALE if scale is None else scale
    meta = save_folder(out, rows(), dtype, shape, meta, count)
    tell(out, meta, ' x '.join(map(str, shape)))
    std = np.mean(meta['std'])
    if kind != 'images' and not 0.3 < std < 2.5:
        print(f'note: what a network sees usually deviates by 0.5 to 1.2, and this by {std:.2f}: --scale is '
              f'what it is multiplied by')


def as_it_is(image, size):
    """The crop of pictures that others have prepared: none. Raises BadInput for another size."""
    if image.size != (size, size):
        raise BadInput(f'not {size} x {size} like the first: {image.width} x {image.height}')
    return image


def import_pictures(source, names, opened, archive, out, workers):
    """EDM's layout of pictures: a folder or zip file of them, all as large as the first, and dataset.json."""
    rank, world, _ = where_am_i()

    def find():
        labels = dataset_labels(source, archive, names)
        first = read_picture(opened(names[0]), 1, lambda image, _: image)
        if isinstance(first, str) or first[0].shape[1] != first[0].shape[2]:
            raise BadInput(f'{source}: its first picture cannot be read, or is not as high as wide')
        size, classes = first[0].shape[1], 0 if labels is None else int(labels.max()) + 1
        return size, classes, [*zip(names, [0] * len(names) if labels is None else labels.tolist())]

    size, classes, found = from_first(find, rank, world)
    if rank == 0:
        print(f"{printable(source)}: EDM's layout, {len(found):,} pictures {size} x {size}, "
              f'{classes or "no"} classes')
    meta = {'kind': 'images', 'classes': classes, 'source': f"import of EDM's layout, {size} pixels"}
    read = lambda name: read_picture(opened(name), size, as_it_is)
    prepare(out, found, read, meta, size, workers)


# ------------------------------------------------------------------------------------------- command line

def parse(argv):
    parser = argparse.ArgumentParser(description='Prepare a data folder.', allow_abbrev=False,
                                     epilog='`data.py folder --help` tells the flags of `folder`, and so on.')
    sub = parser.add_subparsers(dest='what', required=True)
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))

    def command(name, about, out, source=None, workers=True):
        made = sub.add_parser(name, help=about, description=f'Prepare {about}.', allow_abbrev=False)
        if source:
            made.add_argument('source', help=source)
        made.add_argument('--out', type=pathlib.Path, default=out, help=f'folder to make ({out})')
        if workers:
            made.add_argument('--workers', type=int, default=threads,
                              help=f'threads that read pictures, each process ({threads})')
        return made.add_argument
    flag = command('shapes', '10 classes of drawn shapes', 'shapes', workers=False)
    flag('--size', type=int, default=SHAPES_SIZE, help=f'pixels a side ({SHAPES_SIZE})')
    flag('--n', type=int, default=SHAPES_COUNT, help=f'number of pictures ({SHAPES_COUNT})')
    flag('--seed', type=int, default=0, help='another one draws other shapes (0)')
    flag = command('folder', 'a tree of pictures', 'data', 'one sub-folder a class, or none')
    flag('--size', type=int, required=True, help='pixels a side, to which pictures are cut and scaled')
    flag('--vae', metavar='FILE', help="store moments of this file, Stable Diffusion's VAE, and no pixels")
    command('cifar10', 'CIFAR-10', 'cifar10', 'archive, python or binary version, or what is in it', False)
    flag = command('celeba', 'CelebA, aligned', 'celeba', 'img_align_celeba.zip, or the folder in it')
    flag('--size', type=int, default=64, help='pixels a side (64)')
    flag('--crop', type=int, nargs=3, default=(128, 89, 121), metavar=('SIDE', 'X', 'Y'),
         help='square around a centre, in pixels (128 89 121)')
    flag('--attribute', help='one of list_attr_celeba.txt, as the class (none: no classes)')
    flag = command('import', 'what another repository has prepared', 'data', 'folder, .zip, .npz or .npy')
    flag('--layout', choices=('mean-logvar', 'mean-std', 'sampled'),
         help='what the channels of latents are (told by a look at some)')
    flag('--scale', type=float, help=f'what latents are multiplied by ({LATENT_SCALE}, as sampled ones are '
         f'taken to have been)')
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if not 1 <= getattr(args, 'size', 1) <= MOST_SIDE or getattr(args, 'workers', 1) < 1 \
            or getattr(args, 'n', 2) < 2:
        raise BadInput(f'--size must be from 1 to {MOST_SIDE:,}, --workers at least 1, --n at least 2')
    scale = getattr(args, 'scale', None)
    if getattr(args, 'seed', 0) < 0 or scale is not None and not 0 < scale < 1e6:
        raise BadInput('--seed must be at least 0, --scale above 0 and below a million')
    rank, world, _ = where_am_i()
    if from_first(lambda: already_there(args.out), rank, world):
        return
    if args.what == 'folder':
        make_folder(args.source, args.out, args.size, args.workers, args.vae)
    elif args.what == 'celeba':
        make_celeba(args.source, args.out, args.size, args.crop, args.attribute, args.workers)
    elif args.what == 'import':
        make_import(args.source, args.out, args.layout, args.scale, args.workers)
    elif rank == 0 and args.what == 'cifar10':                                # quick: no work for several
        make_cifar(args.source, args.out)
    elif rank == 0:
        meta = make_shapes(args.out, args.size, args.n, args.seed)
        tell(args.out, meta, f'{args.size} x {args.size} pixels')


if __name__ == '__main__':
    try:
        main()
    except BadInput as mistake:
        print(f'data.py: {mistake}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('data.py: interrupted; of pictures, what is done is kept for the same command', file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
