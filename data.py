"""Which pixels or latents does step n see, and how did they get there?

    python data.py shapes                                  # 10 classes of drawn shapes -> shapes/, in seconds
    python data.py folder ~/photos --out data --size 64                 # a tree of images -> data/
    python data.py folder ~/imagenet/train --out imagenet256 --size 256 --vae vae.safetensors    # -> moments
    python data.py cifar10 cifar-10-binary.tar.gz                       # -> cifar10/
    python data.py celeba img_align_celeba.zip --attribute Smiling      # 64 x 64, two classes -> celeba/
    python data.py import fast-DiT/features --out imagenet256           # what other repositories prepared

Every script of this repository reads a data folder of three files:

    data.npy     memory-mapped, of one of three kinds
                   images     uint8   (N, C, H, H)     pixels, used as x/127.5 - 1
                   moments    float16 (N, 2C, h, h)    a VAE's mean, then log-variance: sampled at each use
                   latents    float   (N, C, h, h)     sampled and scaled by another program, used as they are
    labels.npy   integers (N,)
    meta.json    "kind"; "classes", 0 without labels; of moments "scale"; where known "class_names", and
                 "vae", the file that made the moments, with its hash "vae_sha256"

The last 2 % of the images, at most 1,000, are held out from training, so rows must be in no order: every
command here shuffles. It also prints mean and standard deviation of each channel as the network sees it.

`folder` numbers classes as ImageNet does, by the sorted names of the folders in SRC; an empty one keeps its
number. Images are cropped and resized as in ADM, after they are rotated as EXIF says and composited on white
where transparent. Unreadable files are skipped and listed in skipped.txt. `import` reads ADM's .npz,
fast-DiT's folder of NAME_features and NAME_labels, and EDM's folder or zip file with dataset.json, of images
or (EDM2, REPA) of mean and standard deviation.

Under torchrun, ranks and their GPUs share the work of `folder`, `celeba` and `import`. After a kill, run the
same command again: it resumes at the last finished chunk of 256 images and ends with identical files.
Archives are not unpacked to disk, and no pickle is loaded: CIFAR-10's python version is rejected.
"""

import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import time
import traceback
import types
import uuid
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from model import BadInput, check

# ------------------------------------------------------------------------- mistakes, ranks, progress bars

@contextlib.contextmanager
def reading(path):
    """Whatever a library raises inside, because `path` is damaged or something else, becomes one sentence."""
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f'there is no {error.filename or path}') from None
    except pickle.UnpicklingError:                                            # whose text gives bad advice
        raise BadInput(f'{path} is no file of plain tensors: it is something else, such as a saved web page, '
                       f'or it would run code when read') from None
    except Exception as error:
        why = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:200]
        raise BadInput(f'{path} cannot be read, it is truncated, damaged or of another kind: '
                       f'{type(error).__name__}: {why}') from None


def script(name, main):
    """Run main() as the script `name`: a user's mistake or the disk's ends it with one sentence on stderr."""
    sys.stdout.reconfigure(errors='backslashreplace')                         # file names need not be UTF-8
    sentence, status = '', 0
    try:
        main()
    except (BadInput, OSError) as error:                                      # such as a full disk
        sentence, status = f'{name}: {error}', 2
    except KeyboardInterrupt:
        sentence, status = f'{name}: interrupted', 130
    except Exception:                                                         # a bug needs its traceback
        sentence, status = traceback.format_exc(), 1
    if status:
        print(sentence, file=sys.stderr)
    if dist.is_initialized():
        if status:                            # of this rank alone: NCCL's farewell would wait for all others,
            sys.stdout.flush()
            os._exit(status)                  # which torchrun ends when this one is gone
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def rank_and_world():
    """This process's number and how many there are, from torchrun's environment variables."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def rank_world_device():
    """(rank, world, torch.device): each rank takes the GPU of its local rank, if there are any."""
    device = torch.device('cpu')
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
        check(local < gpus, f'process {local} of this machine, counted from 0, has no GPU, for there are '
                            f'{gpus}: type --nproc_per_node {gpus}')
        device = torch.device('cuda', local)
        torch.cuda.set_device(device)
    return *rank_and_world(), device


def progress(iterable=None, **settings):
    """tqdm on rank 0 only. Where stderr is no terminal, it prints a plain line once a minute."""
    if not sys.stderr.isatty():
        lines = types.SimpleNamespace(write=lambda text: sys.stderr.write(text.replace('\r', '\n')))
        settings = {'file': lines, 'ascii': True, 'mininterval': 60, 'miniters': 1} | settings
    return tqdm(iterable, disable=rank_and_world()[0] > 0, **settings)


# ---------------------------------------------------------------------------------------- reading a folder

LATENT_SCALE = 0.18215                        # of Stable Diffusion 1 and 2, and so of DiT and MaskDiT
KINDS = {'images': ('uint8',), 'moments': ('float16',), 'latents': ('float16', 'float32')}


class Data:
    """A data folder. Nothing is read into memory but the labels.

    kind, scale, classes, class_names    from meta.json; `scale` is None if meta.json has none
    vae, vae_sha256                      from meta.json, or None
    channels, resolution                 of what the network sees: moments have half the channels of the file
    count = trained + held_out           the first `trained` images are for training
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        make = 'make one with `python data.py shapes` or `python data.py folder SRC --out data`'
        check(self.path.is_dir(), f'there is no data folder {path}: {make}')
        for name in ('meta.json', 'data.npy', 'labels.npy'):
            check((self.path / name).exists(), f'{path} is not a data folder, it has no {name}: {make}')
        with reading(path):
            meta = dict(json.loads((self.path / 'meta.json').read_text()))
            self.array = np.lib.format.open_memmap(self.path / 'data.npy', mode='r')       # never a pickle
            self.labels = np.load(self.path / 'labels.npy')
        self.kind, self.classes, self.scale = meta.get('kind'), meta.get('classes'), meta.get('scale')
        self.vae, self.vae_sha256 = meta.get('vae'), meta.get('vae_sha256')
        check(self.kind in KINDS, f'{path}/meta.json has kind {self.kind!r}: expected {", ".join(KINDS)}')
        check(isinstance(self.classes, int) and self.classes >= 0,
              f'{path}/meta.json has classes {self.classes!r}: expected a number, 0 for data without labels')
        check(self.scale or self.kind != 'moments', f'{path}/meta.json needs "scale", what samples of its '
              f'moments are multiplied by: {LATENT_SCALE} for the VAE of Stable Diffusion 1 and 2')
        self.class_names = meta.get('class_names') or [str(k) for k in range(self.classes)]
        check(len(self.class_names) == self.classes,
              f'{path}/meta.json has {len(self.class_names)} class_names for {self.classes} classes')

        shape, dtype = self.array.shape, self.array.dtype
        check(len(shape) == 4 and shape[2] == shape[3] and dtype in KINDS[self.kind],
              f'{path}/data.npy holds {dtype} {shape}: {self.kind} are {" or ".join(KINDS[self.kind])} '
              f'(N, C, H, H), as high as wide')
        self.count, self.resolution = shape[0], shape[2]
        self.channels = shape[1] // 2 if self.kind == 'moments' else shape[1]
        check(self.count >= 2, f'{path} holds {self.count} images: at least 2 are needed, one is held out')
        labels, last = self.labels, max(self.classes, 1) - 1
        check(labels.shape == (self.count,) and labels.dtype.kind in 'iu'
              and 0 <= labels.min() and labels.max() <= last,
              f'{path}/labels.npy must hold {self.count} integers from 0 to {last}, one per image')
        self.labels = labels.astype(np.int64)
        self.held_out = min(1000, max(1, self.count // 50))
        self.trained = self.count - self.held_out

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 of the labels and 16 rows: enough to tell data sets apart, without reading them whole."""
        some = self.array[np.linspace(0, self.count - 1, 16).astype(int)]
        return hashlib.sha256(self.labels.tobytes() + some.tobytes()).hexdigest()

    def rows(self, indices):
        """What the file holds at `indices`, and the labels: two tensors. `to_input` takes the first."""
        return torch.from_numpy(self.array[indices]), torch.from_numpy(self.labels[indices])

    def to_input(self, raw, normal):
        """Rows as stored -> x (B, C, H, W) float32 for the network.

        `normal` (B, C, H, W), standard Gaussian noise, samples moments; the other kinds ignore it.
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

    Every epoch has its own order and uses every image once; a batch may span two epochs.
    """
    position = np.arange(step * batch, (step + 1) * batch)
    epochs = position // n
    parts = [permutation(seed, int(e), n)[position[epochs == e] % n] for e in np.unique(epochs)]
    return np.concatenate(parts)


def read_ahead(read, places, threads=4, ahead=8):
    """read(place) for each of `places`, in order, by threads that are up to `ahead` places ahead."""
    pool, waiting = ThreadPoolExecutor(threads), collections.deque()
    try:
        for place in places:
            waiting.append(pool.submit(read, place))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------- writing a folder

@contextlib.contextmanager
def whole_file(path):
    """A file to write, which gets its name when all of it is on disk: `path` is never half a file."""
    temporary = pathlib.Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_uint8(x):
    """(n, C, H, W) in about [-1, 1] -> uint8, the nearest of 256 levels."""
    broken = [i for i, image in enumerate(x) if not torch.isfinite(image).all()]
    check(not broken, f'images {broken} of a batch are not finite numbers: the network has diverged')
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(path, images, titles, columns):
    """A PNG of images uint8 (n, C, H, W) in rows of `columns`, each under its title."""
    n, C, H, W = images.shape
    zoom = max(1, 64 // H)
    cell_w, cell_h, title_h = W * zoom + 6, H * zoom + 22, 16
    sheet = Image.new('RGB', (columns * cell_w + 6, -(-n // columns) * cell_h + 6), 'white')
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
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


def finish(folder, labels, meta):
    """Write what stands beside data.npy: labels.npy, meta.json and preview.png, the first 50 images.

    Of moments and latents the preview shows three channels of the mean, divided by 3.
    """
    np.save(folder / 'labels.npy', np.array(labels, np.int64))
    (folder / 'meta.json').write_text(json.dumps(meta | {'count': len(labels)}, indent=1) + '\n')
    made = Data(folder)
    raw, some = made.rows(np.arange(min(50, made.count)))
    x = made.to_input(raw, 0)
    names = made.class_names or ['']
    save_grid(folder / 'preview.png', to_uint8(x if made.kind == 'images' else x[:, :3] / 3),
              [names[label] for label in some], columns=10)


def save_folder(out, rows, dtype, shape, meta):
    """Write a data folder from an iterable of (pixels or latents, label), complete or not at all.

    It is written under another name beside `out` and renamed: if several processes make the same folder at
    once, the first one wins.
    """
    out = pathlib.Path(out)
    partial = out.parent / f'.{out.name}.{uuid.uuid4().hex}'
    partial.mkdir(parents=True)
    try:
        rows, labels = zip(*rows)
        np.save(partial / 'data.npy', np.array(rows, dtype).reshape(-1, *shape))
        finish(partial, labels, meta)
        try:
            os.rename(partial, out)
        except OSError:
            if not (out / 'meta.json').exists():                              # or another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def report(out):
    """Print what there is now, and statistics of the first 100 images as the network sees them."""
    made = Data(out)
    raw, _ = made.rows(np.arange(min(100, made.count)))
    x = made.to_input(raw, torch.randn(len(raw), made.channels, made.resolution, made.resolution))
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    print(f'{out}: {made.count:,} {made.kind} of {" x ".join(map(str, made.array.shape[1:]))}, '
          f'{made.classes or "no"} classes; preview.png shows some')
    print('mean of the channels: ' + ', '.join(f'{value:.2f}' for value in mean))
    print('standard deviation of the channels: ' + ', '.join(f'{value:.2f}' for value in std)
          + ' (train.py assumes 0.5, unless --sigma-data says another)')
    if made.kind != 'images' and not 0.3 < std.mean() < 2.5:
        print('note: scaled latents usually have 0.5 to 1.2: is --scale right?')


# ------------------------------------------------------------------------------------------------- charts

COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233),
           (0, 0, 0), (128, 128, 128))        # Okabe and Ito's, distinguishable by the colour-blind; and grey


def ticks(low, high, log):
    """About six round numbers from low to high."""
    for digits in ((1,), (1, 3), (1, 2, 5)) if log else ():
        found = [m * 10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
                 for m in digits if low <= m * 10.0 ** e <= high]
        if len(found) >= 3:
            return found[::-(-len(found) // 9)]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 8)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(path, title, series, x_label, y_label, log_x=False, log_y=False):
    """A PNG with a labelled line per series, (label, colour, xs, ys[, half-widths of error bars]).

    None, NaN and, on a logarithmic axis, numbers up to 0 are gaps. A colour is lighter when it comes again.
    """
    font, line_h = ImageFont.load_default(28), 36                             # it is saved at half the size
    left, top, width, height = 150, 130, 1200, max(720, line_h * len(series))
    right, bottom = left + width, top + height
    longest = int(max(font.getlength(label) for label, *_ in series))
    sheet = Image.new('RGB', (right + 40 + longest, bottom + 130), 'white')
    pen = ImageDraw.Draw(sheet)

    def bend(values, log):
        values = np.where(np.isfinite(values), values, np.nan)
        return np.log10(np.where(values > 0, values, np.nan)) if log else values

    def span(bent):
        bent = bent[np.isfinite(bent)] if np.isfinite(bent).any() else np.zeros(1)
        margin = 0.04 * np.ptp(bent) or 0.5 * abs(bent.max()) or 0.5          # inside the frame
        return bent.min() - margin, bent.max() + margin

    lines = []                                # of each series x, y and the ends of its error bars, all bent
    for _, _, xs, ys, *bars in series:
        x, y = np.array(xs, float), np.array(ys, float)
        e = np.array(bars[0] if bars else 0 * x, float)
        lines.append(np.stack([bend(x, log_x), bend(y, log_y), bend(y - e, log_y), bend(y + e, log_y)]))
    points = np.concatenate(lines, 1)                                         # (4, points of all series)
    (x_low, x_high), (y_low, y_high) = span(points[0]), span(points[1:])
    across = lambda x: left + (x - x_low) / (x_high - x_low) * width          # of bent numbers
    down = lambda y: bottom - (y - y_low) / (y_high - y_low) * height

    # the axes
    for y in ticks(*((10 ** y_low, 10 ** y_high) if log_y else (y_low, y_high)), log_y):
        v = down(bend(y, log_y))
        pen.line([left, v, right, v], (225, 225, 225), 2)
        pen.text((left - 14, v), f'{y:,.10g}', 'black', font, anchor='rm')
    for x in ticks(*((10 ** x_low, 10 ** x_high) if log_x else (x_low, x_high)), log_x):
        u = across(bend(x, log_x))
        pen.line([u, bottom, u, bottom + 12], 'black', 2)
        pen.text((u, bottom + 34), f'{x:,.10g}', 'black', font, anchor='mm')
    pen.line([left, top, left, bottom, right, bottom], 'black', 2)
    pen.text((left, 36), title, 'black', font, anchor='lm')
    pen.text((left, 94), y_label, 'black', font, anchor='lm')
    pen.text(((left + right) / 2, bottom + 84), x_label, 'black', font, anchor='mm')

    # the lines
    ends, used = [], collections.Counter()
    for (label, colour, *_), (x, y, low, high) in zip(series, lines):
        used[colour] += 1
        colour = tuple(round(255 - (255 - c) * 0.6 ** (used[colour] - 1)) for c in colour)
        u, v = across(x), down(y)
        there = np.flatnonzero(np.isfinite(u + v))
        for piece in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1):
            spots = [*zip(u[piece], v[piece])]
            if len(spots) > 1:
                pen.line(spots, colour, 5, joint='curve')
            for spot in spots if len(spots) == 1 else ():
                pen.circle(spot, 7, colour)
        for i in there[low[there] < high[there]]:
            pen.line([u[i], down(low[i]), u[i], down(high[i])], colour, 3)
        ends.append((v[there[-1]] if len(there) else bottom, label, colour))

    # their labels, a line apart at least and all above the lower edge
    w = top - line_h
    for i, (v, label, colour) in enumerate(sorted(ends)):
        w = min(max(v, w + line_h), bottom - line_h * (len(ends) - 1 - i))
        pen.text((right + 20, w), label, colour, font, anchor='lm')
    with whole_file(path) as file:
        sheet.reduce(2).save(file, 'PNG')


# ------------------------------------------------------------------------------------------------- shapes
#
# Ten classes of drawn shapes whose parts belong together: bars are equally long, a face has two matching
# eyes. Colours, background, size and position do not depend on the class. A shape is a formula over x, y in
# [-1, 1], y downwards, so the images depend on no drawing library.

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
SUPERSAMPLE = 4                               # a pixel is the mean of 4 x 4 points


def draw_shapes(labels, size, rng):
    """Images uint8 (n, 3, size, size) of the shapes `labels` (n,)."""
    n, fine = len(labels), size * SUPERSAMPLE
    at = ((np.arange(fine) + 0.5) / fine * 2 - 1).astype(np.float32)
    radius = rng.uniform(0.55, 0.85, (n, 1, 1)).astype(np.float32)            # of half the image
    shift = rng.uniform(-1, 1, (2, n, 1, 1)).astype(np.float32) * (0.95 - radius)
    x, y = (at[None, None, :] - shift[0]) / radius, (at[None, :, None] - shift[1]) / radius

    paint = np.empty((n, 3), np.float32)
    ground = rng.uniform(0, 1, (n, 3)).astype(np.float32)
    near = np.arange(n)                                                       # paint too like the background
    while len(near):
        paint[near] = rng.uniform(0, 1, (len(near), 3))
        near = near[np.linalg.norm(paint[near] - ground[near], axis=1) < 0.6]
    slope = rng.uniform(-0.12, 0.12, (n, 3, 2, 1, 1)).astype(np.float32)      # of the background's colour
    line = at.reshape(size, SUPERSAMPLE).mean(1)
    paint, ground = paint[:, :, None, None], ground[:, :, None, None]
    images = np.empty((n, 3, size, size), np.uint8)
    for k, shape in enumerate(SHAPES.values()):                               # class by class: less memory
        i = np.flatnonzero(labels == k)
        points = shape(x[i], y[i]).reshape(len(i), 1, size, SUPERSAMPLE, size, SUPERSAMPLE)
        inside = points.mean((3, 5), np.float32)                              # (len(i), 1, size, size)
        back = ground[i] + slope[i, :, 0] * line + slope[i, :, 1] * line[:, None]
        images[i] = np.rint((inside * paint[i] + (1 - inside) * back).clip(0, 1) * 255)
    return images


def make_shapes(out, size=16, count=20_000, seed=0):
    """The drawn shapes in the folder `out`. Deterministic; several processes may call it at once."""
    def rows():
        rng = np.random.default_rng(seed)
        for start in range(0, count, 500):
            labels = rng.integers(len(SHAPES), size=min(500, count - start))
            yield from zip(draw_shapes(labels, size, rng), labels.tolist())

    meta = {'kind': 'images', 'classes': len(SHAPES), 'class_names': list(SHAPES)}
    save_folder(out, rows(), 'uint8', (3, size, size), meta)


def open_data(path):
    """`Data(path)`; if `path` is shapes and there is no such folder, it is made first."""
    if str(path) == 'shapes' and not os.path.exists('shapes'):
        make_shapes('shapes')
    return Data(path)


# ---------------------------------------------------------------------------------------------------- VAE
#
# The KL autoencoder of Stable Diffusion (Rombach et al. 2022, "f8"): 83,653,863 parameters in 248 tensors,
# under LDM's names. Three halvings between pixels and latents; widths 128, 256, 512, 512; attention at h x w.
#
# Letters: B images    H = W pixels a side    h = w = H/8    n, m channels before and after

VAE_FACTOR = 8                                # pixels a side of a latent


norm = functools.partial(nn.GroupNorm, 32, eps=1e-6)
conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
chain = lambda **layers: nn.Sequential(collections.OrderedDict(layers))


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut; n -> m channels."""

    def __init__(self, n, m):
        super().__init__()
        self.norm1, self.conv1 = norm(n), conv(n, m)
        self.norm2, self.conv2 = norm(m), conv(m, m)
        self.nin_shortcut = nn.Conv2d(n, m, 1) if n != m else nn.Identity()

    def forward(self, x):
        inner = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(inner)))


class Attention(nn.Module):
    """Every pixel attends to all, in one head as wide as its n channels."""

    def __init__(self, n):
        super().__init__()
        self.norm = norm(n)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):
        inner = self.norm(x)
        q, k, v = (layer(inner).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))
        seen = functional.scaled_dot_product_attention(q, k, v)               # (B, 1, hw, n)
        return x + self.proj_out(seen[:, 0].mT.unflatten(2, x.shape[2:]))


def stage(n, m, blocks, resize=None):
    """Residual blocks at one resolution, n -> m channels, then half or twice that resolution or neither."""
    layers = {'block': nn.Sequential(Residual(n, m), *(Residual(m, m) for _ in range(blocks - 1)))}
    if resize == 'downsample':                                                # padded on the right and below
        layers[resize] = chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(m, m, 3, stride=2))
    if resize == 'upsample':
        layers[resize] = chain(nearest=nn.Upsample(scale_factor=2.0), conv=conv(m, m))
    return chain(**layers)


def middle(n):
    return chain(block_1=Residual(n, n), attn_1=Attention(n), block_2=Residual(n, n))


class VAE(nn.Module):
    """Images to moments and latents to images, unscaled (LATENT_SCALE is not applied here).

    In float32. On GPUs convolutions run in TF32, torch's default and DiT's and MaskDiT's: its 10 bits of
    mantissa are those of float16, in which moments are kept.
    """

    def __init__(self):
        super().__init__()
        self.encoder = chain(                                                 # (B, 3, H, W)
            conv_in=conv(3, 128),                                             # (B, 128, H, W)
            down=nn.Sequential(stage(128, 128, 2, 'downsample'), stage(128, 256, 2, 'downsample'),
                               stage(256, 512, 2, 'downsample'), stage(512, 512, 2)),
            mid=middle(512),                                                  # (B, 512, h, w)
            norm_out=norm(512), act=nn.SiLU(), conv_out=conv(512, 8))         # (B, 8, h, w)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)
        self.decoder = chain(                                                 # (B, 4, h, w)
            conv_in=conv(4, 512),
            mid=middle(512),                                                  # (B, 512, h, w)
            up=chain(**{'3': stage(512, 512, 3, 'upsample'),                  # LDM counts from the pixels
                        '2': stage(512, 512, 3, 'upsample'),
                        '1': stage(512, 256, 3, 'upsample'),
                        '0': stage(256, 128, 3)}),                            # (B, 128, H, W)
            norm_out=norm(128), act=nn.SiLU(), conv_out=conv(128, 3))         # (B, 3, H, W)

    def encode(self, x):
        """x (B, 3, H, H) in [-1, 1] -> moments (B, 8, h, h): the mean, then the log-variance."""
        return self.quant_conv(self.encoder(x.to(self.quant_conv.weight)))    # its device, float32

    def decode(self, z):
        """z (B, 4, h, h) -> x (B, 3, H, H), about [-1, 1].

        One latent at a time: 512 pixels take about 1 GiB each, and image i does not depend on its batch.
        """
        check(z.shape[1] == 4, f'the VAE decodes latents (B, 4, h, h), not {tuple(z.shape)}')
        z = self.post_quant_conv(z.to(self.quant_conv.weight))                # its device, float32
        return torch.cat([self.decoder(one) for one in z.split(1)])


MSE_SHA256 = 'a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815'
PUBLISHED_VAE = ('diffusion_pytorch_model.safetensors (334,643,276 bytes) of '
                 'https://huggingface.co/stabilityai/sd-vae-ft-ema or sd-vae-ft-mse (SHA-256 of -mse: '
                 f'{MSE_SHA256})')
LDM_NAMES = (                                 # diffusers' names, of today and older, and LDM's
    *((f'.up_blocks.{i}.', f'.up.{3 - i}.') for i in range(4)), ('.down_blocks.', '.down.'),
    ('.mid_block.resnets.0.', '.mid.block_1.'), ('.mid_block.resnets.1.', '.mid.block_2.'),
    ('.mid_block.attentions.0.', '.mid.attn_1.'), ('.resnets.', '.block.'),
    ('.upsamplers.0.', '.upsample.'), ('.downsamplers.0.', '.downsample.'),
    ('.conv_shortcut.', '.nin_shortcut.'), ('.conv_norm_out.', '.norm_out.'), ('.group_norm.', '.norm.'),
    ('.to_q.', '.q.'), ('.to_k.', '.k.'), ('.to_v.', '.v.'), ('.to_out.0.', '.proj_out.'),
    ('.query.', '.q.'), ('.key.', '.k.'), ('.value.', '.v.'), ('.proj_attn.', '.proj_out.'))
SAFETENSORS = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64}


def read_safetensors(path):
    """{name: tensor}. The format is the header's length in 8 bytes, a JSON header, then raw bytes."""
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
    content, tensors = np.memmap(path, np.uint8, 'r')[8 + length:], {}
    header.pop('__metadata__', None)
    for name, entry in header.items():
        raw = content[slice(*entry['data_offsets'])].copy()                   # off the file, and aligned
        tensors[name] = torch.from_numpy(raw).view(SAFETENSORS[entry['dtype']]).reshape(entry['shape'])
    return tensors


def read_vae(path, device='cpu'):
    """(VAE for inference, SHA-256 of the file) from any of the published files.

    diffusers' or LDM's, alone or within a Stable Diffusion checkpoint, as safetensors or a torch file.
    """
    check(os.path.exists(path), f'there is no VAE {path}: name one with --vae, such as {PUBLISHED_VAE}')
    with reading(path):
        with open(path, 'rb') as file:
            head = file.read(40)
            file.seek(0)
            sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
        safe = head[8:9] == b'{'                                              # torch: a zip file or a pickle
        check(safe or head[:2] == b'PK' or head[:1] == b'\x80',
              f'{path} is neither a safetensors nor a torch file, it begins {head!r}: get {PUBLISHED_VAE}')
        weights = read_safetensors(path) if safe else torch.load(path, 'cpu', weights_only=True)
        weights = weights.get('state_dict', weights)
        inside = 'first_stage_model.' * any(name.startswith('first_stage_model.') for name in weights)
        found = {}
        for name in weights:
            if name.startswith(inside):
                ours = name.removeprefix(inside)
                for old, new in LDM_NAMES:
                    ours = ours.replace(old, new)
                found[ours] = weights[name]
    with torch.device('meta'):
        vae = VAE()
    wanted = vae.state_dict()                                                 # diffusers' attention is linear
    wrong = [name for name in wanted if name not in found or found[name].numel() != wanted[name].numel()]
    check(not wrong, f'{path} is not the f8 autoencoder of Stable Diffusion: of its {len(wanted)} tensors '
          f'{len(wrong)} are missing or of another shape, such as {wrong[:1]}: get {PUBLISHED_VAE}')
    vae.load_state_dict({name: found[name].to(torch.float32, copy=True).reshape(value.shape)
                         for name, value in wanted.items()}, assign=True)
    return vae.to(device).eval().requires_grad_(False), sha256


# ------------------------------------------------------------------------------------------------- images
#
# One file -> RGB as a viewer shows it. ADM's preparation, by which FID references were made, ignores EXIF and
# drops transparency; the summary says how many images that concerns.

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp')
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')       # the content counts, not the name; no PostScript


def load_image(file):
    """(RGB image, upright and opaque; what was done to it, as a list of words) of a path or a binary file."""
    with Image.open(file, formats=FORMATS) as image:
        image.load()                                                          # a truncated file fails here
        turned, done = image, []
        with contextlib.suppress(Exception):                                  # broken EXIF costs no image
            turned = ImageOps.exif_transpose(image)
            done += ['rotated as EXIF says'] * (image.getexif().get(274) in range(2, 9))
        if turned.mode.startswith('I'):                                       # 16 bits of grey
            levels = np.rint(np.asarray(turned) / 257).clip(0, 255)
            turned = Image.fromarray(levels.astype(np.uint8))
        elif turned.has_transparency_data:
            turned = turned.convert('RGBA')
            alpha = turned.getchannel('A')
            if alpha.getextrema()[0] < 255:
                done.append('transparent: composited on white')
            white = Image.new('RGB', turned.size, 'white')
            white.paste(turned, mask=alpha)
            turned = white
        return turned.convert('RGB'), done


def center_crop(image, size):
    """ADM's crop: halve by box filter while twice too large, then bicubic to `size`, then cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, channels, size):
    """uint8 array (channels, size, size) of one image, prepared exactly as `folder` prepares a data set."""
    with reading(path):
        image = center_crop(load_image(path)[0], size)
    return np.array(image.convert('L' if channels == 1 else 'RGB')).reshape(size, size, -1).transpose(2, 0, 1)


def list_files(source, out):
    """(names in a folder or zip file, folders with a / at the end; function: name -> opened file).

    Hidden names, the __MACOSX of zip files from a Mac, and `out` and what is begun of it are not listed.
    """
    check(os.path.exists(source), f'there is no {source}')
    shown = lambda name: not name.startswith('.') and name != '__MACOSX'
    if os.path.isdir(source):
        def stop(error):                                                      # a class would be lost
            raise error

        names, opened = [], lambda name: open(os.path.join(source, name), 'rb')
        for folder, folders, files in os.walk(source, onerror=stop, followlinks=True):
            folders[:] = sorted(filter(shown, folders))
            inside = f'{os.path.relpath(folder, source)}/'.removeprefix('./')
            names += [inside + name for name in (*sorted(files), *(f'{name}/' for name in folders))]
    else:
        with reading(source):
            archive = zipfile.ZipFile(source)
        names, opened = sorted(archive.namelist()), archive.open
    ours = os.path.relpath(os.path.realpath(out), os.path.realpath(source))
    return [name for name in names if all(map(shown, name.split('/')))
            and not name.startswith((f'{ours}/', f'{ours}.partial/'))], opened


# ------------------------------------------------------------------------------------------------- prepare
#
# OUT.partial/plan.json      what is made: a resumed run must have the same plan
# OUT.partial/000007.rows    256 rows of data.npy
# OUT.partial/000007.json    their labels and what was skipped; written last, it marks a finished chunk
# OUT.partial/made/          becomes OUT when all rows are in it
#
# Plan, chunks and OUT appear by renaming, so a kill leaves whole files. Rank r makes chunks r, r + world, ..;
# rank 0 joins them. An image's chunk and its place in a batch of the encoder do not depend on the number of
# ranks or restarts, so its bytes do not either.

CHUNK = 256                                   # images; at 256 pixels 4 MB of moments
BATCH = {'cpu': 4, 'cuda': 32}                # images of 256 pixels that the VAE encodes at once


def attempt(read, item):
    """(row, label, [what was done to it]) or, as a string, why this item is skipped.

    An error of the disk or the network is raised, not skipped: the next start tries this chunk again.
    """
    try:
        return read(*item)
    except Exception as error:
        number = getattr(error, 'errno', None)                                # Pillow's OSErrors have none
        if number in (None, errno.ENOENT, errno.EACCES, errno.ELOOP):
            return f'cannot be read: {os.strerror(number) if number else error}'
        error.filename = error.filename or item[0]
        raise


def make_chunks(partial, chunks, read, workers, encode):
    """Write the files of `chunks`, {number: items}. Threads read a chunk while the one before is encoded."""
    items = [item for chunk in chunks.values() for item in chunk]
    answers = read_ahead(functools.partial(attempt, read), items, workers, CHUNK)
    with progress(total=len(items), desc='images', unit='') as bar:
        for k, chunk in chunks.items():
            made, labels, skipped, notes = [], [], [], collections.Counter()
            for (name, _), answer in zip(chunk, answers):
                if isinstance(answer, str):
                    skipped.append((name, answer))
                else:
                    made.append(answer[0])
                    labels.append(answer[1])
                    notes.update(answer[2])
            with whole_file(partial / f'{k:06d}.rows') as file:
                file.write(encode(np.stack(made)).tobytes() if made else b'')
            with whole_file(partial / f'{k:06d}.json') as file:
                file.write(json.dumps({'labels': labels, 'skipped': skipped, 'notes': notes}).encode())
            bar.update(len(chunk))


def join(partial, count, dtype, shape, meta):
    """Move the rows of all chunks into made/data.npy and finish that folder.

    A chunk's rows are removed once they are in data.npy; the numbers of labels say where they are there.
    """
    made, labels, skipped, notes = partial / 'made', [], [], collections.Counter()
    records = [json.loads((partial / f'{k:06d}.json').read_text()) for k in range(count)]
    for record in records:
        labels += record['labels']
        skipped += record['skipped']
        notes.update(record['notes'])
    for name, reason in skipped[:10]:
        print(f'skipped {name}: {reason}')
    if len(labels) < 2:
        shutil.rmtree(partial)                                                # nothing in it is worth keeping
        raise BadInput(f'{len(labels)} images could be read and {len(skipped):,} could not: 2 are needed')
    if skipped:
        print(f'skipped in all: {len(skipped):,}, listed in skipped.txt')
        text = ''.join(f'{name}\t{reason}\n' for name, reason in skipped)
        (made / 'skipped.txt').write_text(text, 'utf-8', 'backslashreplace')
    for what, number in notes.items():
        print(f'{number:,} {what}')

    (made / 'data.npy').touch()
    with open(made / 'data.npy', 'r+b') as file:
        header = {'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': (len(labels), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for k in progress(range(count), desc='joining', unit=' chunks'):
            size = len(records[k]['labels']) * math.prod(shape) * np.dtype(dtype).itemsize
            rows = partial / f'{k:06d}.rows'
            if not rows.exists():
                file.seek(size, os.SEEK_CUR)                                  # moved before a kill
                continue
            check(rows.stat().st_size == size, f'{rows} is damaged: remove {partial} and start again')
            file.write(rows.read_bytes())
            file.flush()
            os.fsync(file.fileno())
            rows.unlink()
    finish(made, np.maximum(labels, 0), {'classes': max(labels) + 1} | meta)


def prepare(out, items, read, dtype, shape, meta, workers, encode=lambda rows: rows):
    """Write the data folder `out`, all ranks together, restartable.

    items     [(name, label)], shuffled here, so that the held-out end is a fair sample
    read      read(name, label) -> (row, label, [what was done to it]), called in threads
    encode    what was read of a chunk (n, ...) -> rows (n, *shape) of `dtype`
    meta      contents of meta.json; without "classes" they are counted from the labels
    """
    (rank, world), partial = rank_and_world(), pathlib.Path(f'{out}.partial')
    order = np.random.default_rng(0).permutation(len(items))
    chunks = [[items[i] for i in order[at:at + CHUNK]] for at in range(0, len(items), CHUNK)]
    names = hashlib.sha256(os.fsencode('\0'.join(f'{name}\0{label}' for name, label in items))).hexdigest()
    plan = meta | {'vae': None, 'images': len(items), 'names': names, 'shape': list(shape), 'chunk': CHUNK}
    begun = partial / 'plan.json'
    if rank == 0 and not begun.exists():
        (partial / 'made').mkdir(parents=True, exist_ok=True)
        with whole_file(begun) as file:
            file.write(json.dumps(plan).encode())
    while not begun.exists():
        if os.path.lexists(out):
            return                                                            # rank 0 is finished, without us
        time.sleep(0.1)
    old = json.loads(begun.read_text())
    differ = [key for key in plan if old.get(key) != plan[key]]
    check(not differ, f'{partial} was begun with another {", ".join(differ)}: to resume, type the command '
          f'as it was; to start again, remove {partial}')

    missing = lambda numbers: [k for k in numbers if not (partial / f'{k:06d}.json').exists()]
    todo = {k: chunks[k] for k in missing(range(rank, len(chunks), world))}
    make_chunks(partial, todo, read, workers, encode)
    if rank:
        return
    while missing(range(len(chunks))):        # the other ranks'; if one fails, torchrun ends this one too
        time.sleep(0.2)
    join(partial, len(chunks), dtype, shape, meta)
    os.rename(partial / 'made', out)
    shutil.rmtree(partial)


# ------------------------------------------------------------------------------------------------- folder

def make_folder(source, out, size, workers, vae=None, scale=LATENT_SCALE):
    """Prepare a tree of images as pixels or, with the file of a VAE, as moments.

    A class is a folder directly in `source`, even an empty one. Without images in folders there are none.
    """
    check(not vae or size % VAE_FACTOR == 0, f'--size {size} must be a multiple of {VAE_FACTOR} for the VAE')
    check(vae or scale == LATENT_SCALE, '--scale is for moments, which need --vae')
    listed, opened = list_files(source, out)
    names, classes = [name for name in listed if name.lower().endswith(SUFFIXES)], []
    check(names, f'{source} holds no image: expected {", ".join(SUFFIXES)}, in one sub-folder per class')
    if any('/' in name for name in names):
        classes = sorted({name.split('/')[0] for name in listed if '/' in name})
        names = [name for name in names if '/' in name]
    label = {name: k for k, name in enumerate(classes)}
    items = [(name, label.get(name.split('/')[0], 0)) for name in names]
    others = {name for name in listed if not name.endswith('/')}.difference(names)
    others = collections.Counter(pathlib.Path(name).suffix for name in others)
    if others and rank_and_world()[0] == 0:
        print(f'not used, as no images or beside the class folders, by suffix: {dict(others)}')
    meta = {'kind': 'moments' if vae else 'images', 'classes': len(classes)}
    if classes:
        meta['class_names'] = [name.encode(errors='backslashreplace').decode() for name in classes]

    def read(name, label):
        image, done = load_image(opened(name))
        return np.asarray(center_crop(image, size)).transpose(2, 0, 1), label, done

    if not vae:
        return prepare(out, items, read, 'uint8', (3, size, size), meta, workers)
    device = rank_world_device()[2]
    network, sha256 = read_vae(vae, device)
    torch.backends.cudnn.deterministic = True                                 # the same bytes after a resume
    if sha256 != MSE_SHA256 and rank_and_world()[0] == 0:
        print(f'note: {vae} is not sd-vae-ft-mse by its SHA-256: is its scale {scale:g}? That of '
              f'Stable Diffusion 1 and 2 is 0.18215, that of SDXL --scale 0.13025')
    meta |= {'scale': scale, 'vae': os.path.abspath(vae), 'vae_sha256': sha256, 'device': device.type}
    side, encode = size // VAE_FACTOR, functools.partial(encode_images, network, device)
    prepare(out, items, read, 'float16', (8, side, side), meta, workers, encode)


def encode_images(vae, device, images):
    """uint8 (n, 3, S, S) -> moments float16 (n, 8, S/8, S/8), in batches of as many pixels for any S."""
    batch = max(1, min(BATCH[device.type], BATCH[device.type] * 256 ** 2 // images.shape[2] ** 2))
    moments = torch.cat([vae.encode(some.to(device) / 127.5 - 1).half().cpu()
                         for some in torch.from_numpy(images).split(batch)])
    check(moments.isfinite().all(), 'the VAE makes moments that are not finite in float16: is it damaged?')
    return moments.numpy()


# ------------------------------------------------------------------------------------------ CIFAR-10, CelebA

CIFAR_CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


def make_cifar(source, out):
    """The 50,000 training images of CIFAR-10, 32 x 32. A record is a label and 3 x 32 x 32 bytes."""
    wanted, batches = [f'data_batch_{k}.bin' for k in range(1, 6)], {}
    with reading(source), tarfile.open(source) as archive:
        for member in archive:
            name = os.path.basename(member.name)
            if name in wanted:
                batches[name] = np.frombuffer(archive.extractfile(member).read(), np.uint8).reshape(-1, 3073)
            check(name != 'data_batch_1', f"{source} is CIFAR-10's python version, of pickles, which are not "
                  f'loaded: get cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html')
    check(len(batches) == 5, f'{source} is not cifar-10-binary.tar.gz, it has {len(batches)} of {wanted}')
    records = np.concatenate([batches[name] for name in wanted])
    order = np.random.default_rng(0).permutation(len(records))
    rows = ((records[i, 1:].reshape(3, 32, 32), int(records[i, 0])) for i in order)
    meta = {'kind': 'images', 'classes': 10, 'class_names': CIFAR_CLASSES}
    save_folder(out, rows, 'uint8', (3, 32, 32), meta)


def make_celeba(source, out, size, crop, attribute, workers):
    """The aligned images of CelebA, all 202,599: `side` pixels around (x, y), bilinear with antialiasing."""
    side, x, y = crop
    left, top = x - side // 2, y - side // 2
    check(side > 0 and 0 <= left <= 178 - side and 0 <= top <= 218 - side,
          f'--crop {side} {x} {y} reaches out of the 178 x 218 pixels')
    listed, opened = list_files(source, out)
    names = [name for name in listed if name.lower().endswith('.jpg')]
    check(names, f'{source} holds no .jpg: expected img_align_celeba.zip, or the folder in it')
    items, meta = [(name, 0) for name in names], {'kind': 'images', 'classes': 0, 'crop': list(crop)}
    if attribute:
        path = pathlib.Path(source).absolute().parent / 'list_attr_celeba.txt'
        with reading(path):                   # a count, 40 names, then lines of an image and 40 times -1 or 1
            _, attributes, *lines = [line.split() for line in path.read_text().splitlines()]
            check(attribute in attributes, f'--attribute {attribute} is none of {", ".join(attributes)}')
            column = attributes.index(attribute) + 1
            label_of = {words[0]: int(words[column] == '1') for words in lines}
            items = [(name, label_of[os.path.basename(name)]) for name in names]
        meta |= {'classes': 2, 'class_names': [f'not {attribute}', attribute]}

    def read(name, label):
        image, done = load_image(opened(name))
        check(image.size == (178, 218), f'not aligned, 178 x 218: {image.width} x {image.height}')
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1), label, done

    prepare(out, items, read, 'uint8', (3, size, size), meta, workers)


# ------------------------------------------------------------------------------------------------- import

def open_layout(source, out):
    """([(name, label)], function (name, label) -> (row, label)) of what others prepared; -1 is no label."""
    if str(source).endswith('.npz'):          # ADM: arr_0 (N, H, W, 3), arr_1 (N,)
        with reading(source), np.load(source) as file:
            rows = file['arr_0'].transpose(0, 3, 1, 2) if file['arr_0'].dtype == np.uint8 else file['arr_0']
            labels = file['arr_1'] if 'arr_1' in file else np.full(len(rows), -1)
            items = [(str(i), int(labels[i])) for i in range(len(rows))]
        return items, lambda name, label: (rows[int(name)], label)

    listed, opened = list_files(source, out)
    features = [name for name in listed if '_features/' in name and name.endswith('.npy')]
    if features:                              # fast-DiT: (1, C, h, h), (1,)
        return [(name, -1) for name in features], lambda name, _: (
            np.load(opened(name))[0], int(np.load(opened(name.replace('_features/', '_labels/')))[0]))

    check('dataset.json' in listed, f'{source} is in no known layout: expected an .npz file, a folder with '
          f'NAME_features in it, or a folder or zip file with dataset.json in it')
    with reading(f'{source}/dataset.json'):   # EDM: "labels": [[name, class], ...], or null
        pairs = json.load(opened('dataset.json'))['labels']
        label_of = dict(pairs or [])
        items = [(name, int(label_of[name]) if pairs else -1) for name in listed
                 if name.lower().endswith(('.npy', *SUFFIXES))]
    pixels = lambda name: np.asarray(load_image(opened(name))[0]).transpose(2, 0, 1)
    return items, lambda name, label: (
        np.load(opened(name)) if name.endswith('.npy') else pixels(name), label)


def make_import(source, out, scale, workers):
    """Copy what another repository has prepared; see the docstring of this file."""
    items, fetch = open_layout(source, out)
    check(len(items) > 1, f'{source} holds {len(items)} rows: at least 2 are needed')
    answers = [attempt(fetch, item) for item in items[::-(-len(items) // 16)]]
    some = [answer[0] for answer in answers if not isinstance(answer, str)]
    check(some, f'{source}: {items[0][0]} {answers[0]}')
    shape, given = some[0].shape, some[0].dtype
    check(len(shape) == 3 and shape[1] == shape[2] and (given == np.uint8 or shape[0] in (4, 8)),
          f'{source} holds {given} {shape}: expected uint8 (C, H, H), latents (4, h, h), moments (8, h, h)')
    kind = 'images' if given == np.uint8 else 'latents' if shape[0] == 4 else 'moments'
    latents = 'float16' if given == np.float16 else 'float32'
    dtype = {'images': 'uint8', 'moments': 'float16', 'latents': latents}[kind]
    check(kind != 'images' or scale is None, '--scale is for latents, and these are images')
    # Stable Diffusion's log-variances are far below 0, and standard deviations never are
    deviations = kind == 'moments' and min(row[4:].min() for row in some) >= 0
    if rank_and_world()[0] == 0:
        print(f'{source}: {len(items):,} rows of {given} {shape}: '
              f'{"means and standard deviations" if deviations else kind}')

    def read(name, label):
        row, label = fetch(name, label)
        check(row.shape == shape and row.dtype == given, f'{row.dtype} {row.shape} is not {given} {shape}')
        if deviations:
            mean, std = np.split(row.astype(np.float32), 2)
            row = np.concatenate([mean, 2 * np.log(std.clip(1e-7))])
        elif kind == 'latents' and scale is not None:
            row = scale * row.astype(np.float32)
        row = row.astype(dtype)
        check(np.isfinite(row).all(), f'numbers are not finite in {dtype}')
        return row, label, []

    meta = {'kind': kind}
    if kind != 'images':
        meta['scale'] = LATENT_SCALE if scale is None else scale
    prepare(out, items, read, dtype, shape, meta, workers)


# ------------------------------------------------------------------------------------------- command line

def parse(argv):
    about = 'Prepare a data folder. `data.py folder --help` shows the flags of `folder`, and so on.'
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest='what', required=True)
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))

    def command(name, about, out, source=None, workers=True):
        made = commands.add_parser(name, help=about, description=f'Prepare {about}.', allow_abbrev=False,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if source:
            made.add_argument('source', help=source)
        made.add_argument('--out', type=pathlib.Path, default=out, help='folder to make')
        if workers:
            made.add_argument('--workers', type=int, default=max(1, cores), help='threads per rank that read')
        return made.add_argument

    flag = command('shapes', '10 classes of drawn shapes', 'shapes', workers=False)
    flag('--size', type=int, default=16, help='pixels a side')
    flag('--n', type=int, default=20_000, help='number of images')
    flag('--seed', type=int, default=0, help='another seed draws other shapes')
    flag = command('folder', 'a tree of images', 'data', 'folder or zip file, with a sub-folder per class')
    flag('--size', type=int, required=True, help='pixels a side, to which images are cropped and resized')
    flag('--vae', metavar='FILE', help="store moments of Stable Diffusion's VAE in FILE instead of pixels")
    flag('--scale', type=float, default=LATENT_SCALE, help='what samples of the moments are multiplied by')
    command('cifar10', 'CIFAR-10', 'cifar10', 'cifar-10-binary.tar.gz', workers=False)
    flag = command('celeba', 'CelebA, aligned', 'celeba', 'img_align_celeba.zip, or the folder in it')
    flag('--size', type=int, default=64, help='pixels a side')
    flag('--crop', type=int, nargs=3, default=(128, 89, 121), metavar=('SIDE', 'X', 'Y'),
         help='square around a centre, in pixels')
    flag('--attribute', help='one of list_attr_celeba.txt beside the source, as the class; none: no classes')
    flag = command('import', 'what another repository has prepared', 'data', 'folder, .zip or .npz')
    flag('--scale', type=float, help=f'what latents or samples of moments are multiplied by; none: 1 for '
         f'latents, {LATENT_SCALE} for moments')
    return parser.parse_args(argv)


MAKE = {'folder': make_folder, 'celeba': make_celeba, 'import': make_import, 'cifar10': make_cifar,
        'shapes': lambda out, size, n, seed: make_shapes(out, size, n, seed)}


def main(argv=None):
    flags = vars(parse(argv))
    what, out, rank = flags.pop('what'), flags['out'], rank_and_world()[0]
    for name, least in (('size', 1), ('workers', 1), ('n', 2), ('seed', 0)):
        check(flags.get(name, least) >= least, f'--{name} must be at least {least}')
    check(flags.get('scale') is None or flags['scale'] > 0, '--scale must be above 0')
    check(rank or not os.path.lexists(out), f'{out} exists already: remove it, or choose another --out')
    warnings.filterwarnings('ignore', module='PIL')                           # the summary has what matters
    if not os.path.lexists(out) and (rank == 0 or what not in ('cifar10', 'shapes')):     # these are quick
        MAKE[what](**flags)
    if rank == 0:
        report(out)


if __name__ == '__main__':
    script('data.py', main)
