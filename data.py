"""Which pixels or latents does step n see, and how did they get there?

    python data.py shapes                                  # 10 classes of drawn shapes -> shapes/, in seconds
    python data.py folder ~/pictures --out data --size 64     # a tree of PNG, JPEG or WebP files -> data/

Every script of this repository reads a folder with three files:

    data.npy     memory-mapped; one of three kinds, and the kind is in meta.json
                   images     uint8   (N, C, H, W)     pixels, used as x/127.5 - 1
                   moments    float16 (N, 2C, h, w)    a VAE's mean, then log-variance: sampled at each use
                   latents    float   (N, C, h, w)     already sampled and scaled, as other repositories write
    labels.npy   int64 (N,)
    meta.json    {"kind", "classes"}; for moments and latents "scale"; and, where known, "class_names", and
                 "vae", the autoencoder's file that made the moments, with its hash "vae_sha256"

`classes` is 0 for data without labels. The last 2 % of a data set, at most 1,000 images, are held out from
training, so rows must be in no order, such as one class after the other: `folder` shuffles while it writes.
"""

import argparse
import collections
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import shutil
import sys
import uuid
import warnings
import zipfile

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional
from tqdm import tqdm


class BadInput(ValueError):
    """A user's mistake, told in one sentence. The scripts print the sentence and exit with status 2."""


# ---------------------------------------------------------------------------------------- reading a folder

LATENT_SCALE = 0.18215                        # Stable Diffusion's, and so DiT's and MaskDiT's
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
        if not self.path.is_dir():
            raise BadInput(f'there is no data folder {path}: {make}')
        try:
            meta = json.loads((self.path / 'meta.json').read_text())
            self.array = np.load(self.path / 'data.npy', mmap_mode='r')     # numpy refuses pickles by default
            self.labels = np.load(self.path / 'labels.npy')
        except FileNotFoundError as error:
            lacks = os.path.basename(error.filename)
            raise BadInput(f'{path} is not a data folder, it has no {lacks}: {make}') from None
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise BadInput(f'{path} has a file that is truncated or cannot be read: {error}') from None
        self.kind = meta.get('kind') if isinstance(meta, dict) else None
        if self.kind not in KINDS:
            raise BadInput(f'{path}/meta.json says kind {self.kind!r}: expected one of {", ".join(KINDS)}')
        self.classes, self.scale = meta.get('classes'), meta.get('scale', LATENT_SCALE)
        if type(self.classes) is not int or self.classes < 0 or type(self.scale) not in (int, float):
            raise BadInput(f'{path}/meta.json needs "classes", a number from 0 up, and "scale" is a number')
        self.class_names = meta.get('class_names') or [str(i) for i in range(self.classes)]
        self.vae, self.vae_sha256 = meta.get('vae'), meta.get('vae_sha256')
        if not all(value is None or isinstance(value, str) for value in (self.vae, self.vae_sha256)):
            raise BadInput(f'{path}/meta.json needs text in "vae" and "vae_sha256", a file and its hash')

        shape, dtype = self.array.shape, self.array.dtype
        if len(shape) != 4 or shape[2] != shape[3] or dtype not in KINDS[self.kind]:
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
        if not isinstance(self.class_names, list) or len(self.class_names) != self.classes:
            raise BadInput(f'{path}/meta.json must name {self.classes} classes in "class_names" or lack it')
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
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(seed, step, batch, n):
    """Which of n images the global batch of `step` holds: (batch,). A function of its arguments alone.

    Epoch after epoch, each in an order of its own, every image is used once an epoch; a batch may span two.
    """
    position = np.arange(step * batch, (step + 1) * batch)
    epochs = position // n
    parts = [permutation(seed, int(e), n)[position[epochs == e] % n] for e in np.unique(epochs)]
    return np.concatenate(parts)


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
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride=2)

    def forward(self, x):
        return self.conv(functional.pad(x, (0, 1, 0, 1)))                     # right and below, no more


class Upsample(nn.Module):
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
        with zipfile.ZipFile(path) as archive:                              # torch.load sees no flipped byte;
            broken = archive.testzip()                                        # the archive's CRC-32s do
        if broken:
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
        content = np.memmap(path, np.uint8, 'c', offset=8 + length, shape=size - 8 - length) \
            if size > 8 + length else np.zeros(0, np.uint8)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f'{path} cannot be read: {error.strerror or error}') from None
    except (ValueError, RecursionError):
        refuse('its header is not JSON')
    if not isinstance(header, dict):
        refuse('its header is not a JSON object')
    header.pop('__metadata__', None)

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
    at = 0
    for name, (begin, end, _, _) in sorted(places.items(), key=lambda item: item[1][:2]):
        if begin != at:
            refuse(f'the bytes of {name[:60]!r} begin at {begin:,}, and those before it end at {at:,}')
        at = end
    if at != len(content):
        refuse(f'its header tells of {at:,} bytes, and there are {len(content):,}')

    tensors = {}
    for name, (begin, end, dtype, shape) in places.items():
        raw = torch.from_numpy(content[begin:end])
        raw = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()    # the format aligns nothing
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


# --------------------------------------------------------------------------------------- writing a folder

def save_folder(out, rows, dtype, shape, meta, seed):
    """Write a data folder from an iterator of (pixels or latents, label), complete or not at all.

    The rows stream to disk under a temporary name beside `out`, which is renamed when all is there: of
    several processes that make the same folder at once, the first wins. Of pixels, the mean and the standard
    deviation of each channel, on the scale of the network's input, go into meta.json. Returns what is there.
    """
    out = pathlib.Path(out)
    partial = out.parent / f'.{out.name}.partial-{uuid.uuid4().hex}'
    labels = []
    try:
        partial.mkdir(parents=True)
        with open(partial / 'data.npy', 'wb') as file:
            def write_header():
                np.lib.format.write_array_header_1_0(file, {
                    'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': (len(labels), *shape)})
            write_header()
            for row, label in rows:
                file.write(np.ascontiguousarray(row, dtype).tobytes())
                labels.append(label)
            file.seek(0)
            write_header()                                                  # numpy pads for this: same length
        np.save(partial / 'labels.npy', np.array(labels, np.int64))
        meta = meta | {'count': len(labels)}
        if labels and dtype == 'uint8':
            data = np.load(partial / 'data.npy', mmap_mode='r')
            sums = np.zeros((2, shape[0]))
            for at in range(0, len(data), 100):
                x = data[at:at + 100] / 127.5 - 1
                sums += x.sum((0, 2, 3)), (x ** 2).sum((0, 2, 3))
            mean, square = sums / data[:, 0].size
            meta |= {'mean': mean.tolist(), 'std': np.sqrt(square - mean ** 2).tolist()}
            some = np.sort(np.random.default_rng(seed).permutation(len(labels))[:50])
            names = meta.get('class_names') or ['']
            save_grid(partial / 'preview.png', data[some], [names[labels[i]] for i in some], columns=10)
        (partial / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
        try:
            os.rename(partial, out)
        except OSError:
            if not (out / 'meta.json').exists():                              # else somebody was faster
                raise
    except OSError as error:
        raise BadInput(f'cannot write the data folder {out}: {error.strerror or error}') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def to_uint8(x):
    """(n, C, H, W) floats about [-1, 1] -> uint8, the nearest of 256 levels. Raises BadInput if infinite."""
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
    temporary = pathlib.Path(f'{path}.tmp{os.getpid()}')
    try:
        sheet.save(temporary, 'PNG')
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    inside = np.empty((n, fine, fine), np.float32)
    for k, shape in enumerate(SHAPES.values()):
        inside[labels == k] = shape(x[labels == k], y[labels == k])
    inside = inside.reshape(n, 1, size, SUPERSAMPLE, size, SUPERSAMPLE).mean((3, 5))     # (n, 1, size, size)

    paint = np.empty((n, 3), np.float32)                                      # far enough from the background
    ground = rng.uniform(0, 1, (n, 3)).astype(np.float32)
    wrong = np.arange(n)
    while len(wrong):
        paint[wrong] = rng.uniform(0, 1, (len(wrong), 3))
        wrong = wrong[np.linalg.norm(paint[wrong] - ground[wrong], axis=1) < 0.6]
    slope = rng.uniform(-0.12, 0.12, (n, 3, 2, 1, 1)).astype(np.float32)      # the background's colour drifts
    line = at.reshape(size, SUPERSAMPLE).mean(1)
    back = ground[:, :, None, None] + slope[:, :, 0] * line + slope[:, :, 1] * line[:, None]
    pictures = inside * paint[:, :, None, None] + (1 - inside) * back
    return np.rint(pictures.clip(0, 1) * 255).astype(np.uint8)


def make_shapes(out, size=SHAPES_SIZE, count=SHAPES_COUNT, seed=0):
    """The data set `shapes` in the folder `out`. Deterministic; several processes may call it at once."""
    def rows():
        rng = np.random.default_rng(seed)
        for start in range(0, count, 500):
            labels = rng.integers(len(SHAPES), size=min(500, count - start))
            yield from zip(draw_shapes(labels, size, rng), labels.tolist())

    meta = {'kind': 'images', 'classes': len(SHAPES), 'class_names': list(SHAPES),
            'source': f'shapes, seed {seed}'}
    return save_folder(out, rows(), 'uint8', (3, size, size), meta, seed)


def default_data():
    """The value of --data where none is typed: data/ if it is a data folder, else shapes/."""
    return 'data' if os.path.exists('data/meta.json') else 'shapes'


def open_data(path):
    """`Data(path)`; the folder `shapes`, if that is what is asked for, is made where it does not exist."""
    if str(path) == 'shapes' and not os.path.exists('shapes'):
        make_shapes('shapes')
    return Data(path)


# ------------------------------------------------------------------------------------------------- folder

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
NO_CLASS = '.'


def center_crop(image, size):
    """ADM's crop: halve by box filter while twice too large, then bicubic to `size`, then cut the centre."""
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


def read_picture(path, size):
    """uint8 (3, size, size), or the reason why there is none, as a string."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)    # 90 megapixels and more
            with Image.open(path) as image:
                return np.asarray(center_crop(image.convert('RGB'), size)).transpose(2, 0, 1)
    except Exception as error:                                                # a broken file raises anything
        return f'{type(error).__name__}: {error}'


def find_pictures(source):
    """[(path, class name)] in sorted order; the class is the first folder under `source`."""
    found = []
    for folder, folders, files in os.walk(source, followlinks=True):          # class folders are often links
        above = [os.path.realpath(place) for place in pathlib.Path(folder).parents]
        if os.path.realpath(folder) in above:                                 # a link into what it lies in
            folders[:], files = [], []
        folders.sort()
        inside = os.path.relpath(folder, source)
        found += [(os.path.join(folder, name), inside.split(os.sep)[0])
                  for name in sorted(files) if name.lower().endswith(SUFFIXES)]
    return found


def make_folder(source, out, size, workers, seed=0):
    """Prepare a tree of pictures; see the docstring of this file. Prints what was skipped and why."""
    if not os.path.isdir(source):
        raise BadInput(f'there is no folder {source} with pictures')
    found = find_pictures(source)
    counts = collections.Counter(name for _, name in found)
    names = sorted(counts.keys() - {NO_CLASS})
    skipped = []
    if names and counts[NO_CLASS]:                                            # beside class folders: no class
        skipped = [(path, 'lies beside the class folders') for path, name in found if name == NO_CLASS]
        found = [(path, name) for path, name in found if name != NO_CLASS]
    if not found:
        raise BadInput(f'{source} holds no picture: expected {", ".join(SUFFIXES)} files, in one sub-folder '
                       f'a class or in none')
    order = np.random.default_rng(seed).permutation(len(found))            # the held-out end is a fair sample
    found = [found[i] for i in order]

    def rows():
        good = 0
        with multiprocessing.get_context('spawn').Pool(workers) as pool:
            read = functools.partial(read_picture, size=size)
            pictures = pool.imap(read, [path for path, _ in found], chunksize=16)
            for (path, name), picture in tqdm(zip(found, pictures), 'pictures', len(found), unit=''):
                if isinstance(picture, str):
                    skipped.append((path, picture))
                else:
                    good += 1
                    yield picture, names.index(name) if names else 0
        if good < 2:
            why = f'; the first that is not: {skipped[0][0]}, {skipped[0][1]}' if skipped else ''
            raise BadInput(f'{source} holds fewer than 2 readable pictures{why}')

    meta = {'kind': 'images', 'classes': len(names), 'source': f'folder, {size} pixels'}
    meta |= {'class_names': names} if names else {}
    meta = save_folder(out, rows(), 'uint8', (3, size, size), meta, seed)
    for path, reason in skipped:
        print(f'skipped {path}: {reason}')
    print(f'{out}: {meta["count"]} pictures of {size} x {size}, {len(names) or "no"} classes, '
          f'{len(skipped)} skipped; a look at them: {out}/preview.png')
    tell_deviation(meta)


def tell_deviation(meta):
    print('standard deviation of the channels: ' + ', '.join(f'{std:.3f}' for std in meta['std'])
          + ' (train.py takes 0.5, unless --sigma-data says another)')


# ------------------------------------------------------------------------------------------- command line

def main(argv=None):
    parser = argparse.ArgumentParser(description='Prepare a data folder.', allow_abbrev=False)
    sub = parser.add_subparsers(dest='what', required=True)
    shapes = sub.add_parser('shapes', help='10 classes of drawn shapes', allow_abbrev=False)
    shapes.add_argument('--out', default='shapes', help='folder to make')
    shapes.add_argument('--size', type=int, default=SHAPES_SIZE, help='pixels a side')
    shapes.add_argument('--n', type=int, default=SHAPES_COUNT, help='number of pictures')
    shapes.add_argument('--seed', type=int, default=0)
    folder = sub.add_parser('folder', help='a tree of PNG, JPEG or WebP files', allow_abbrev=False)
    folder.add_argument('source', help='one sub-folder a class, or none')
    folder.add_argument('--out', default='data', help='folder to make')
    folder.add_argument('--size', type=int, required=True, help='pixels a side')
    folder.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    args = parser.parse_args(argv)
    if args.size < 1 or getattr(args, 'n', 2) < 2 or getattr(args, 'workers', 1) < 1:
        raise BadInput('--size and --workers must be at least 1, --n at least 2')
    if os.path.exists(args.out):
        raise BadInput(f'{args.out} exists already: remove it, or choose another --out')
    if args.what == 'shapes':
        meta = make_shapes(args.out, args.size, args.n, args.seed)
        print(f'{args.out}: {args.n} pictures of {args.size} x {args.size}, {len(SHAPES)} classes; '
              f'a look at them: {args.out}/preview.png')
        tell_deviation(meta)
    else:
        make_folder(args.source, args.out, args.size, args.workers)


if __name__ == '__main__':
    try:
        main()
    except BadInput as mistake:
        print(f'data.py: {mistake}', file=sys.stderr)
        sys.exit(2)
