"""No input ends in a traceback, a hang or a swollen memory: files and command lines changed at random by a
seed, and files made to do harm.

    python -m pytest tests/test_fuzz.py              # the first random cases, and the harmful files
    python -m pytest -m soak tests/test_fuzz.py      # random cases for five minutes
    python tests/test_fuzz.py 1234                   # case 1234 alone, with all that it says
"""

import argparse
import collections
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import conftest  # noqa: E402, F401

import data  # noqa: E402
import fid  # noqa: E402
import finetune  # noqa: E402
import model  # noqa: E402
import mutual_info  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

SCRIPTS = {'train.py': train, 'finetune.py': finetune, 'sample.py': sample, 'fid.py': fid,
           'mutual_info.py': mutual_info, 'data.py': data}
REFUSALS = model.BadInput, data.BadInput, fid.BadInput
FIRST_CASES, SOAK_SECONDS = 80, 300
PATIENCE, MEMORY = 60, 4 << 30                # of one case: seconds on a busy computer, bytes

# ------------------------------------------------------------------------------------- what cases start from


@contextlib.contextmanager
def chdir(folder):
    """contextlib.chdir, which Python 3.10 does not have."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Blind(torch.nn.Module):
    """In place of Inception: the fuzz is after what reads files, not after convolutions."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2048, 8)

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None].expand(-1, 2048), x.mean((1, 2, 3))[:, None].expand(-1, 2023)

    def logits(self, pool):
        return pool[:, :8]


def no_weights():
    raise fid.BadInput('no weights are looked for in a test')


def make_small():
    """Networks of one narrow block and little calibration. For good, so only in processes of our own."""
    model.SIZES.update(dict.fromkeys(model.SIZES, (1, 32, 2)), T=(3, 32, 2))       # MDT takes two for itself
    model.DECODER = model.TINY_DECODER = (1, 32, 2)
    model.PROTOTYPES, train.PREVIEW_STEPS, mutual_info.CALIBRATIONS = 16, 2, 2
    fid.load_weights = lambda path, sha256: (Blind(), sha256 or 'none')
    fid.find_weights = lambda: 'none'
    fid.frechet = lambda a, b: 0.0
    torch.set_num_threads(1)


TINY = ['--model', 'T/4', '--batch', '4', '--precision', 'fp32', '--log-every', '1', '--preview', '1']


def make_base(folder):
    """A folder with one of everything that can be read: data, checkpoints, a log, statistics, pictures."""
    with chdir(folder):
        data.make_shapes('images', size=8, count=60)
        rng = np.random.default_rng(0)
        for kind, shape, dtype in (('moments', (8, 8, 8), 'float16'), ('latents', (4, 8, 8), 'float32')):
            rows = ((rng.standard_normal(shape), i % 3) for i in range(60))
            data.save_folder(kind, rows, dtype, shape, {'kind': kind, 'classes': 3, 'scale': 0.2})
        for method, source in (('mcdit', 'images'), ('mdt', 'moments')):
            train.main([*TINY, '--method', method, '--data', source, '--out', method, '--steps', '1'])
        train.main([*TINY, '--method', 'maskdit', '--data', 'images', '--out', 'maskdit', '--steps', '1',
                    '--export', 'official.pt', '--official-names'])
        pixels = rng.integers(256, size=(12, 8, 8, 3)).astype(np.uint8)
        np.savez('pixels.npz', arr_0=pixels, arr_1=np.zeros(12, np.int64))
        np.savez('features.npz', features=rng.standard_normal((5, 2048)).astype(np.float16), weights='none')
        np.savez_compressed('statistics.npz', mu=np.zeros(2048, np.float16), arr_0=pixels,
                            sigma=np.eye(2048, dtype=np.float16))
        sample.main(['mcdit/0000001.pt', '-n', '2', '--steps', '2', '--png', 'png', '--out', 'grid.png'])

        weights = {'encoder.conv_in.weight': [128, 3, 3, 3], 'encoder.conv_in.bias': [128], 'x': []}
        header, at = {'__metadata__': {'format': 'pt'}}, 0
        for name, shape in weights.items():
            size = 2 * math.prod(shape)
            header[name] = {'dtype': 'F16', 'shape': shape, 'data_offsets': [at, at + size]}
            at += size
        write_safetensors('vae.safetensors', header, rng.bytes(at))
        with tarfile.open('cifar.tar.gz', 'w:gz') as archive:
            for k in range(1, 6):
                member = tarfile.TarInfo(f'cifar-10-batches-bin/data_batch_{k}.bin')
                member.size = 3073 * 4
                archive.addfile(member, io.BytesIO(bytes(member.size)))
        with zipfile.ZipFile('edm.zip', 'w') as archive:
            names = sorted(os.listdir('png')) * 2
            names = [f'{i}/{name}' for i, name in enumerate(names)]
            for name in names:
                archive.write('png/' + name.split('/')[1], name)
            archive.writestr('dataset.json', json.dumps({'labels': [[name, 1] for name in names]}))
        os.makedirs('fast/a_features')
        os.makedirs('fast/a_labels')
        for i in range(3):
            np.save(f'fast/a_features/{i}.npy', rng.standard_normal((1, 4, 8, 8)).astype(np.float32))
            np.save(f'fast/a_labels/{i}.npy', np.array([i]))
        with zipfile.ZipFile('celeba.zip', 'w') as archive:
            for i in range(3):
                held = io.BytesIO()
                Image.fromarray(rng.integers(256, size=(218, 178, 3)).astype(np.uint8)).save(held, 'JPEG')
                archive.writestr(f'img_align_celeba/00000{i}.jpg', held.getvalue())
        some = [f'00000{i}.jpg ' + ' '.join('-1' if (i + k) % 2 else '1' for k in range(3)) for i in range(3)]
        pathlib.Path('list_attr_celeba.txt').write_text('\n'.join(['3', 'Smiling Young Bald', *some]))


def write_safetensors(path, header, content):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    pathlib.Path(path).write_bytes(len(text).to_bytes(8, 'little') + text + content)


# ------------------------------------------------------------------------------------------------- mutations

NUMBERS = [None, True, False, -1, 0, 1, 2, 3, 7, 2 ** 31, 2 ** 63, 10 ** 30, -(10 ** 30), 10 ** 400, 0.5,
           -0.5, math.nan, math.inf, -math.inf, 1e308, 1e-308, 1e99]
WEIRD = [*NUMBERS, '', 'x', 'a\nb', 'ü', '\ud800', 'T/4', 'XL/2', 'images', 'tune', 'x' * 10 ** 5, '../..',
         '[]', [], {}, [[]], [None], ['a'], ['a\nb'] * 10, [1] * 10, {'a': 1}]
TYPED = ['nan', 'inf', '-inf', '-1', '0', '1', '2', '3', '-0.5', '0.5', '1e30', '1e-320', '1e308', '9' * 20,
         '9' * 5000, '', ' ', 'x', 'ü', '٣', '1_0', '../..', 'images', 'no/such/folder', '/dev/null', '-',
         '--', 'a' * 300, '0x10', 'grid.png', 'mcdit/0000001.pt', 'pixels.npz', 'T/٢', 'XL/2', 'T/', '/']


def change_bytes(rng, content):
    """Bytes flipped, set, cut out, put in, doubled, or the end missing: one to eight of these."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 4, 16, 200])
        how = rng.randrange(6)
        if how == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif how == 1:
            content[at:at + n] = bytes([rng.choice([0, 1, 127, 128, 255])]) * len(content[at:at + n])
        elif how == 2:
            del content[at:at + n]
        elif how == 3:
            content[at:at] = rng.randbytes(n)
        elif how == 4:
            content[at:at] = content[at:at + n]
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def change_structure(rng, value, depth=0):
    """A JSON value with something in it missing, doubled, wrapped or of another type."""
    if isinstance(value, dict) and value and depth < 4 and rng.random() < 0.85:
        value, key = dict(value), rng.choice(sorted(value))
        how = rng.randrange(6)
        if how == 0:
            del value[key]
        elif how == 1:
            value[rng.choice(['', 'x', key + ' '])] = value.pop(key)
        else:
            value[key] = change_structure(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and depth < 4 and rng.random() < 0.6:
        value, at = list(value), rng.randrange(len(value))
        value[at:at + 1] = rng.choice([[], [value[at]] * 2, [change_structure(rng, value[at], depth + 1)]])
        return value
    return rng.choice([[value], {'x': value}]) if rng.random() < 0.1 else rng.choice(WEIRD)


def change_json(rng, text):
    how = rng.randrange(8)
    if how == 0:
        return change_bytes(rng, text.encode('utf-8', 'surrogateescape'))
    if how == 1:
        return rng.choice([b'[' * 10 ** 5, b'{"a":' * 10 ** 5, b'', b'\xff\xfe', b'null', b'9' * 10 ** 5,
                           b'{"kind": "images", "kind": []}', text.encode('utf-16', 'replace'), b'\0' * 100])
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):                                      # spoiled before
        return change_bytes(rng, text.encode('utf-8', 'surrogateescape'))
    for _ in range(rng.randint(1, 2)):
        value = change_structure(rng, value)
    return json.dumps(value).encode('utf-8')


def npy(rng, content):
    """A .npy file whose header lies about what follows."""
    body = content[content.index(b'\n') + 1:]
    if rng.random() < 0.2:
        return change_bytes(rng, content[:200]) + content[200:]
    descr = rng.choice(["'|u1'", "'<f2'", "'<f4'", "'<i8'", "'>i8'", "'|O'", "'<U9'", "'<c16'", "'<M8[s]'",
                        "[('a', '<f4'), ('b', '|u1')]", "[('a', '|O')]", "('|u1', (3, 8))", "'x'", '7', '[]',
                        "'|V0'", "'|S0'", "'|V999999999999'", '[' * 99, "'<f4'" * 9])
    shape = rng.choice(['(60,)', '(60, 3, 8, 8)', '(60, 8, 8, 8)', '(-60, 3, 8, 8)', '(0, 3, 8, 8)',
                        '(60, 3, 8, 0)', f'({10 ** 12}, 3, 8, 8)', f'({10 ** 30}, 3, 8, 8)', '()', '(1,)',
                        f'({2 ** 62}, 4)', '(60, 3, 8.0, 8)', '(True, 3, 8, 8)', '[60, 3, 8, 8]', '(60', '60',
                        '(2, 3, 44, 44)', '(45, 4, 8, 8)', '(60, 0, 8, 8)', '(11520,)', '(1, 3, 8, 8)'])
    order = rng.choice(['True', 'False', 'False', 'False', '0', "'x'"])
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {rng.choice(['', '1: 2'])}}}"
    header += rng.choice([' \n', '', '\n' * 9, '(' * 300, '\0'])
    version = rng.choice([1, 1, 1, 2, 3, 9])
    length = struct.pack('<H' if version == 1 else '<I', rng.choice([len(header)] * 5 + [0, 9, 60000]))
    return b'\x93NUMPY' + bytes([version, 0]) + length + header.encode() + body


def change_zip(rng, content, change_member):
    """An archive with members missing, renamed, doubled, packed, changed, or a directory that lies."""
    how = rng.randrange(7)
    if how == 0:
        return change_bytes(rng, content)
    if how == 1:                                                              # sizes in the directory
        content = bytearray(content)
        at = rng.choice([m.start() for m in re.finditer(b'PK\1\2', content)])
        offset, kind = rng.choice([(8, '<H'), (10, '<H'), (16, '<I'), (20, '<I'), (24, '<I'), (28, '<H'),
                                   (42, '<I')])
        values = [0, 1, 8, 9, 65535] + [2 ** 31, 2 ** 32 - 1] * (kind == '<I')
        struct.pack_into(kind, content, at + offset, rng.choice(values))
        return bytes(content)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, 'w') as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            member, packing, names_now = old.read(name), old.getinfo(name).compress_type, [name]
            if name == chosen and how == 2:
                names_now = []
            elif name == chosen and how == 3:
                names_now = [rng.choice(['x', '../' + name, '/' + name, name + '/', name.upper(), 'ü'])]
            elif name == chosen and how == 4:
                names_now = [name, name]
            elif name == chosen and how == 5:
                packing = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            elif name == chosen or how == 6 and rng.random() < 0.3:
                member = change_member(rng, member)
            for name in names_now:
                new.writestr(name, member, packing)
    return out.getvalue()


def change_tensor(rng, value):
    return rng.choice([
        lambda: value.flatten(), lambda: value[..., :-1], lambda: value[None], lambda: value.new_zeros(0),
        lambda: value.to(rng.choice([torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16,
                                     torch.uint8])),
        lambda: value.float() * math.nan, lambda: value.float() + math.inf, lambda: value.float() * 1e30,
        lambda: value.new_zeros(()).expand(value.shape), lambda: value.new_zeros(()).expand(10 ** 12),
        lambda: value.t() if value.ndim == 2 else value[::2] if value.ndim else value,
        lambda: value.to_sparse() if value.ndim else value, lambda: torch.nn.Parameter(value.float()),
        lambda: torch.empty(value.shape, device='meta'), lambda: rng.choice(WEIRD), lambda: [value]])()


def change_state(rng, state):
    """A checkpoint's content with one to three things in it changed."""
    plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    for _ in range(rng.randint(1, 3)):
        tables = [name for name in ('model', 'ema', 'teacher') if isinstance(state.get(name), dict)]
        how = rng.randrange(9)
        if how < 3 and isinstance(state.get('config'), dict):
            config = state['config']
            key = rng.choice(sorted(config))
            config[key] = rng.choice(WEIRD)
            if how == 0:
                del config[key]
        elif how == 3:
            state[rng.choice(sorted(plain, key=str))] = rng.choice(WEIRD)
        elif how == 4:
            state.pop(rng.choice(sorted(state, key=str)), None)
            state = state or {'x': 1}
        elif how == 5 and isinstance(state.get('opt'), dict):
            opt = state['opt']
            of = rng.choice([opt, opt['param_groups'][0], opt['state'], opt['state'].get(0, {})]) \
                if {'state', 'param_groups'} <= opt.keys() and isinstance(opt['state'], dict) \
                and isinstance(opt['param_groups'], list) and opt['state'] else opt
            of = of if isinstance(of, dict) and of else opt
            key = rng.choice(sorted(of, key=str)) if of else 'x'
            tensor = isinstance(of.get(key), torch.Tensor)
            of[key] = change_tensor(rng, of[key]) if tensor else rng.choice(WEIRD)
        elif tables:
            weights = state[rng.choice(tables)]
            key = rng.choice(sorted(weights, key=str)) if weights else 'x'
            if how == 6:
                weights[rng.choice(['x', 7, None, ('a', 1), '', 'blocks.x'])] = weights.pop(key, 0)
            elif how == 7:
                weights.pop(key, None)
            elif isinstance(weights.get(key), torch.Tensor):
                weights[key] = change_tensor(rng, weights[key])
    return state


def change_checkpoint(rng, path):
    if rng.random() < 0.65:
        state = change_state(rng, torch.load(path, weights_only=True))
        if rng.random() < 0.03:
            state = rng.choice(WEIRD)
        with contextlib.suppress(RuntimeError, AttributeError, TypeError):                 # cannot be written
            torch.save(state, path)
    else:
        path.write_bytes(change_zip(rng, path.read_bytes(), change_bytes))


# --------------------------------------------------------------------------------------------------- targets
#
# Each changes files of the folder it runs in and returns a command line: script, then arguments.

COMMANDS = [
    ('train.py', *TINY, '--data', 'images', '--out', 'out', '--steps', '1'),
    ('train.py', *TINY, '--data', 'images', '--out', 'mcdit', '--steps', '2'),
    ('finetune.py', 'mcdit/0000001.pt', *TINY[2:], '--out', 'out', '--steps', '1'),
    ('sample.py', 'mcdit/0000001.pt', '-n', '2', '--steps', '2', '--out', 'out.png'),
    ('sample.py', 'mdt/0000001.pt', '-n', '2', '--steps', '2', '--npz', 'out.npz', '--out', 'out.png'),
    ('sample.py', 'mcdit/0000001.pt', '-n', '1', '--steps', '2', '--inpaint', 'grid.png', '--mask',
     'grid.png'),
    ('fid.py', 'pixels.npz', 'png'), ('fid.py', 'images', 'features.npz'),
    ('mutual_info.py', 'mcdit/0000001.pt', '--data', 'images', '--dims', '1', '--seeds', '1'),
    ('mutual_info.py', '--data', 'images', '--dims', '1', '--proposition-2'),
    ('mutual_info.py', '--data', 'images', '--attention', 'out.png', 'mcdit/0000001.pt'),
    ('mutual_info.py', '--curves', 'out.png', 'mcdit'),
    ('data.py', 'shapes', '--n', '4', '--size', '8', '--out', 'out'),
    ('data.py', 'folder', 'png', '--size', '8', '--workers', '1', '--out', 'out'),
    ('data.py', 'folder', 'png', '--size', '8', '--workers', '1', '--out', 'out', '--vae', 'vae.safetensors'),
    ('data.py', 'cifar10', 'cifar.tar.gz', '--out', 'out'),
    ('data.py', 'celeba', 'celeba.zip', '--size', '8', '--workers', '1', '--attribute', 'Young', '--out',
     'out'),
    ('data.py', 'import', 'edm.zip', '--workers', '1', '--out', 'out'),
    ('data.py', 'import', 'fast', '--out', 'out'),
    ('data.py', 'import', 'pixels.npz', '--out', 'out'),
    ('data.py', 'import', 'moments/data.npy', '--out', 'out'),
]
LEFT_OUT = '--compile', '--help', '--size', '--n', '--workers'     # minutes; pages of text; size of the job


def flags_of(script, *first):
    told = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(told):
        SCRIPTS[script].main([*first, '--help'])
    return sorted(set(re.findall(r'--[\w-]+', told.getvalue())) - set(LEFT_OUT))


def read_by(rng, kind):
    """A command that reads the data folder `kind`."""
    if kind == 'images' and rng.random() < 0.3:
        return rng.choice([('fid.py', 'images', 'pixels.npz'), COMMANDS[8], COMMANDS[9]])
    return ('train.py', *TINY, '--data', kind, '--out', 'out', '--steps', '1')


def a_meta(rng):
    kind = rng.choice(['images', 'moments', 'latents'])
    path = pathlib.Path(kind, 'meta.json')
    path.write_bytes(change_json(rng, path.read_text()))
    return read_by(rng, kind)


def an_array(rng):
    kind = rng.choice(['images', 'moments', 'latents'])
    path = pathlib.Path(kind, rng.choice(['data.npy', 'data.npy', 'labels.npy']))
    path.write_bytes(npy(rng, path.read_bytes()))
    if rng.random() < 0.05:
        shutil.copy('pixels.npz', path)
    return read_by(rng, kind)


def a_checkpoint(rng):
    name = rng.choice(['mcdit', 'mcdit', 'mdt'])
    path = pathlib.Path(name, '0000001.pt')
    change_checkpoint(rng, path)
    source = 'images' if name == 'mcdit' else 'moments'
    return rng.choice([
        ('sample.py', str(path), '-n', '2', '--steps', '2'),
        ('finetune.py', str(path), *TINY[2:], '--out', 'out', '--steps', '1'),
        ('train.py', *TINY, '--method', name, '--data', source, '--out', name, '--steps', '2'),
        ('mutual_info.py', str(path), '--data', source, '--attention', 'out.png')])


def a_published_file(rng):
    change_checkpoint(rng, pathlib.Path('official.pt'))
    return rng.choice([('sample.py', 'official.pt', '-n', '1', '--steps', '2'),
                       ('finetune.py', 'official.pt', *TINY[2:], '--data', 'images', '--out', 'out',
                        '--steps', '1')])


def an_npz(rng):
    path = pathlib.Path(rng.choice(['pixels.npz', 'features.npz', 'statistics.npz']))
    path.write_bytes(change_zip(rng, path.read_bytes(), npy))
    return rng.choice([('fid.py', str(path), 'png'), ('fid.py', 'images', str(path))])


def a_log(rng):
    path = pathlib.Path('mcdit/log.jsonl')
    lines = path.read_text().splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        lines[at] = change_json(rng, lines[at]).decode('utf-8', 'surrogateescape')
        if not lines[at].lstrip().startswith('{'):
            break
    path.write_bytes('\n'.join(lines).encode('utf-8', 'surrogateescape'))
    return rng.choice([COMMANDS[11], COMMANDS[11], COMMANDS[1]])


def a_picture(rng):
    path = pathlib.Path(rng.choice(['grid.png', 'png/000000.png']))
    path.write_bytes(change_bytes(rng, path.read_bytes()))
    return rng.choice([('fid.py', 'pixels.npz', 'png'), COMMANDS[5], COMMANDS[13]])


def a_safetensors(rng):
    content = pathlib.Path('vae.safetensors').read_bytes()
    length = int.from_bytes(content[:8], 'little')
    if rng.random() < 0.5:
        header = change_json(rng, content[8:8 + length].decode())
        write_safetensors('vae.safetensors', header, content[8 + length:])
    else:
        pathlib.Path('vae.safetensors').write_bytes(change_bytes(rng, content[:length]) + content[length:])
    return COMMANDS[14]


def a_source(rng):
    """What data.py prepares from: an archive or one file of a folder."""
    command = rng.choice(COMMANDS[15:])
    path = pathlib.Path(command[2])
    if path.suffix in ('.zip', '.npz'):
        change = lambda content: change_zip(rng, content, npy if path.suffix == '.npz' else change_bytes)
        if command[1] == 'celeba' and rng.random() < 0.3:
            path, change = pathlib.Path('list_attr_celeba.txt'), lambda content: change_bytes(rng, content)
    elif path.suffix == '.gz':
        def change(content):
            if rng.random() < 0.2:
                return change_bytes(rng, content)
            return gzip.compress(change_tar(rng, gzip.decompress(content)), 1)
    else:
        path = rng.choice(sorted(path.rglob('*.npy'))) if path.is_dir() else path
        change = lambda content: npy(rng, content)
    path.write_bytes(change(path.read_bytes()))
    return command


def change_tar(rng, content):
    """A tar archive, one of whose headers says something else, with its checksum right."""
    content = bytearray(change_bytes(rng, content) if rng.random() < 0.3 else content)
    heads = [at for at in range(0, len(content) - 511, 512) if content[at + 257:at + 262] == b'ustar']
    at = rng.choice(heads or [0])
    head = content[at:at + 512]
    begin, value = rng.choice([
        (0, b'../../x'), (0, b'/etc/passwd'), (0, b''), (0, b'\xff\n\0'), (0, b'x' * 100), (156, b'1'),
        (156, b'2'), (156, b'3'), (156, b'L'), (156, b'x'), (156, b'S'), (156, b'g'), (156, b'?'),
        (124, b'77777777777\0'), (124, b'-0000000001\0'), (124, b'\x80' + b'\0' * 3 + b'\xff' * 8),
        (124, b'\xff' * 12), (124, b'0' * 12), (124, b'zzzz\0'), (157, b'../../x')])
    head[begin:begin + len(value)] = value
    head[148:156] = b' ' * 8
    head[148:156] = b'%06o\0 ' % sum(head)
    content[at:at + 512] = head
    return bytes(content)


FLAGS = {}


def a_command_line(rng):
    script, *argv = rng.choice(COMMANDS)
    first = argv[:1] if script == 'data.py' else []
    flags = FLAGS.get((script, *first)) or FLAGS.setdefault((script, *first), flags_of(script, *first))
    for _ in range(rng.randint(1, 2)):
        how = rng.randrange(12)
        if how < 9:
            argv += [rng.choice(flags), rng.choice(TYPED[:14] if how < 7 else TYPED)]
        elif how == 9:
            argv.insert(rng.randrange(len(argv) + 1), rng.choice([*flags, *TYPED]))
        elif how == 10 and len(argv) > 1:
            del argv[rng.randrange(len(argv))]
        else:
            places = [i for i, word in enumerate(argv) if i and argv[i - 1] not in LEFT_OUT]
            argv[rng.choice(places or [0])] = rng.choice(TYPED)
    if script in ('train.py', 'finetune.py') and '--steps' not in argv:
        argv += ['--steps', '1']                                              # the default is hours
    return script, *argv


TARGETS = [a_meta, an_array, a_checkpoint, a_checkpoint, a_published_file, an_npz, a_log, a_picture,
           a_safetensors, a_source, a_source, a_command_line, a_command_line, a_command_line]


# ------------------------------------------------------------------------------------------------- one case


def attempt(script, argv):
    """How main(argv) of a script ends: 'done', 'refused', or 'usage'; anything else is raised."""
    told = io.TextIOWrapper(io.BytesIO(), 'utf-8')
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            SCRIPTS[script].main(list(argv))
    except REFUSALS as mistake:
        sentence = str(mistake).replace('a\nb', '')                           # what was typed may be told
        assert sentence and '\n' not in sentence, f'not one sentence: {mistake!r}'
        return 'refused'
    except SystemExit as stop:
        assert stop.code in (0, 2), f'exit {stop.code}'
        return 'usage'
    return 'done'


def one(number, base):
    """Case `number` in a folder of its own: (script, how it ended)."""
    rng = random.Random(number)
    with tempfile.TemporaryDirectory() as place:
        inside = pathlib.Path(place, 'one', 'two')                            # for ../..
        shutil.copytree(base, inside)
        with chdir(inside):
            target = TARGETS[number % len(TARGETS)]
            script, *argv = target(rng)
            print(json.dumps([number, target.__name__, script, *argv]), flush=True)
            return target.__name__, attempt(script, argv)


def beside(function, *args):
    """function(*args) in a forked child, whose output is yielded line by line; then its exit status."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        sys.stdout = os.fdopen(send, 'w', 1)
        try:
            function(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(send)
    with os.fdopen(receive) as lines:
        yield from lines
    yield os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def some_cases(base, numbers, end):
    make_small()
    warnings.simplefilter('ignore')
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for number in itertools.takewhile(lambda _: time.monotonic() < end, numbers):
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)                        # kills this process
        try:
            ended = one(number, base)
        except BaseException:
            ended = 'failed', f'case {number}: {traceback.format_exc()}'
        print(json.dumps(ended), flush=True)


def fuzz(base, first, last, seconds):
    """({(target, end): how many}, [(case, why)]) of the cases first, .., last - 1, while there is time."""
    end, counts, failures = time.monotonic() + seconds, collections.Counter(), []
    while first < last and time.monotonic() < end and len(failures) < 20:
        case = None
        for line in beside(some_cases, base, range(first, min(last, first + 200)), end):
            if isinstance(line, int):
                if line:                                                      # it hung, or died of memory
                    failures.append((case, f'the process ended with {line}'))
                continue
            line = json.loads(line)
            if isinstance(line[0], int):
                case, first = line, line[0] + 1
            elif line[0] == 'failed':
                failures.append((case, line[1]))
            else:
                counts[tuple(line)] += 1
    return counts, failures


# -------------------------------------------------------------------------------------------- files that harm


class Payload:
    """What runs code where a pickle is loaded without care: it makes the folder `ran` beside the files."""

    def __reduce__(self):
        return os.mkdir, ('ran',)


class Promise:
    """A tensor of 10^12 numbers, of which the file has one."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Placeholder(), 0, (10 ** 12,), (1,), False, {})


class Placeholder:
    pass


class WithStorages(pickle.Pickler):
    def persistent_id(self, thing):
        if isinstance(thing, Placeholder):
            return 'storage', torch.FloatStorage, '0', 'cpu', 10 ** 12
        return None


def pickled(thing, pickler=pickle.Pickler):
    held = io.BytesIO()
    pickler(held, 2).dump(thing)
    return held.getvalue()


def zeros(size):
    """(zlib's raw stream of `size` zeros, a multiple of a million): one part of it again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = packer.compress(bytes(1_000_000)) + packer.flush(zlib.Z_FULL_FLUSH)
    return part * (size // 1_000_000) + packer.flush()


def packed(*members):
    """A zip archive of (name, content, packing, size that the directory claims or None), nothing checked."""
    body, directory = b'', b''
    for name, content, packing, size in members:
        name, size = name.encode(), len(content) if size is None else size
        rest = struct.pack('<HHHHHIIIHH', 20, 0, packing, 0, 33, zlib.crc32(content), len(content), size,
                           len(name), 0)
        directory += b'PK\1\2\x14\0' + rest + struct.pack('<HHHII', 0, 0, 0, 0, len(body)) + name
        body += b'PK\3\4' + rest + name + content
    return body + directory + b'PK\5\6' + struct.pack('<HHHHIIH', 0, 0, len(members), len(members),
                                                      len(directory), len(body), 0)


def array_header(descr, shape):
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(held, {'descr': descr, 'fortran_order': False, 'shape': shape})
    return held.getvalue()


def tarred(*members, before=b''):
    """A gzipped tar of (name, type, link, size)."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode='w') as archive:
        for name, kind, link, size in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, size
            archive.addfile(member, io.BytesIO(bytes(size)) if size else None)
    return gzip.compress(held.getvalue(), 1)


def saved(thing, legacy=False):
    held = io.BytesIO()
    torch.save(thing, held, _use_new_zipfile_serialization=not legacy)
    return held.getvalue()


def huge_picture(side):
    """A PNG of side x side black pixels, in some kilobytes."""
    def chunk(kind, content):
        check = struct.pack('>I', zlib.crc32(kind + content))
        return struct.pack('>I', len(content)) + kind + content + check
    rows = zlib.compress(bytes(10 ** 6), 9)                                   # cut short: never read so far
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', rows) + chunk(b'IEND', b''))


GB4 = 4_000_000_000


def harmful(state):
    """{file name: (content, commands that read it)}; `state` is that of a good checkpoint."""
    reads = [('sample.py', 'FILE'), ('finetune.py', 'FILE', '--out', 'out'),
             ('mutual_info.py', 'FILE', '--data', 'images')]
    weights = [('fid.py', 'images', 'images', '--weights', 'FILE', '--sha256', 'HASH'),
               ('fid.py', 'images', 'images', '--weights', 'FILE')]
    npz, folder = [('fid.py', 'FILE', 'images')], [('train.py', '--data', 'FOLDER')]
    vae = [('data.py', 'folder', 'png', '--size', '8', '--out', 'out', '--vae', 'FILE')]
    cifar = [('data.py', 'cifar10', 'FILE', '--out', 'out')]
    source = [('data.py', 'import', 'FILE', '--out', 'out'), ('data.py', 'celeba', 'FILE', '--out', 'out')]
    inpaint = [('sample.py', 'good.pt', '--inpaint', 'FILE', '--mask', 'FILE')]
    resume = [('train.py', '--model', 'T/4', '--data', 'images', '--out', 'FOLDER')]
    huge = [('fid.py', 'FOLDER', 'images'), ('data.py', 'folder', 'FOLDER', '--out', 'out', '--size', '8')]
    cfg, storage = state['config'], '1/data/0'
    table = {'y_embed.weight': torch.zeros(()).expand(1_000_001, 128)}
    objects = io.BytesIO()
    np.save(objects, np.array([Payload()] * 3, object), allow_pickle=True)
    header = {'a': {'dtype': 'F32', 'shape': [10 ** 12], 'data_offsets': [0, 4 * 10 ** 12]}}
    header = json.dumps(header).encode()
    black = array_header('|u1', (20_345, 256, 256, 3))
    bomb = zeros(GB4)
    mu, stored, deflated = ('mu.npy', 'sigma.npy'), zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    plain = lambda name, content: packed((name, content, stored, None))
    return {
        'payload.pt': (saved(state | {'config': Payload()}), reads),
        'legacy.pt': (saved(state | {'config': Payload()}, legacy=True), reads[:1]),
        'pickle.pt': (pickled(Payload()), reads[:1]),
        'inside.pt': (packed(('1/data.pkl', pickled({'ema': Payload()}), stored, None),
                             ('1/version', b'3', stored, None)), reads[:1]),
        'bomb.pt': (packed(('1/data.pkl', bomb, deflated, GB4), ('1/version', b'3', stored, None)),
                    reads[:1] + vae),
        'lies.pt': (packed(('1/data.pkl', b'x', stored, GB4)), reads[:1]),
        'promise.pt': (packed(('1/data.pkl', pickled({'ema': {'x': Promise()}, 'step': 1, 'config': cfg},
                                                     WithStorages), stored, None),
                              ('1/byteorder', b'little', stored, None), (storage, bytes(4), stored, None),
                              ('1/version', b'3\n', stored, None)), reads[:1]),
        'classes.pt': (saved(state | {'config': cfg | {'classes': 1_000_000, 'class_names': []},
                                      'ema': state['ema'] | table}), reads[:1]),
        'pixels.pt': (saved(state | {'config': cfg | {'resolution': 10_000}}), reads[:1]),
        'resume/0000001.pt': (saved(state | {'config': Payload()}), resume),
        'payload.pth': (saved({'fc.weight': Payload()}), weights),
        'legacy.pth': (saved({'fc.weight': Payload()}, legacy=True), weights[:1]),
        'bomb.pth': (packed(('1/data.pkl', bomb, deflated, GB4), ('1/version', b'3', stored, None)),
                     weights[:1]),
        'expanded.pth': (saved({'fc.weight': torch.zeros((), dtype=torch.float64).expand(10 ** 12)}),
                         weights[:1]),
        'sparse.pth': (10 ** 10, weights[1:]),
        'objects.npz': (plain('arr_0.npy', objects.getvalue()), npz + source[:1]),
        'object mu.npz': (packed(*((name, objects.getvalue(), stored, None) for name in mu)), npz),
        'claims.npz': (plain('arr_0.npy', array_header('|u1', (10 ** 12, 256, 256, 3))), npz + source[:1]),
        'claims too.npz': (packed(('arr_0.npy', black, stored, len(black) + 20_345 * 256 * 256 * 3)), npz),
        'claims mu.npz': (packed(*((name, array_header('<f8', (10 ** 12,)), stored, None) for name in mu)),
                          npz),
        'bomb.npz': (packed(('arr_0.npy', bomb_of(black), deflated, len(black) + 20_345 * 196_608)),
                     npz + source[:1]),
        'features.npz': (packed(('features.npy', bomb_of(array_header('<f4', (488_281, 2048))), deflated,
                                 488_281 * 8192 + 128), ('weights.npy', b'', stored, None)), npz),
        'above.npz': (plain('../arr_0.npy', array_header('|u1', (2, 8, 8, 3)) + bytes(384)),
                      npz + source[:1]),
        'row.npz': (packed(('arr_0.npy', bomb_of(array_header('|u1', (2, 25_000, 25_000, 3))), deflated,
                            2 * 25_000 ** 2 * 3 + 128)), npz),
        'objects/data.npy': (objects.getvalue(), folder),
        'objects/labels.npy': (objects.getvalue(), folder),
        'claims/labels.npy': (array_header('<i8', (10 ** 12,)), folder),
        'long/meta.json': (2 * 10 ** 9, folder + [('fid.py', 'FOLDER', 'images')]),
        'deep/meta.json': (b'[' * 10 ** 6, folder),
        'vae.pt': (saved({'state_dict': Payload()}), vae),
        'length.safetensors': ((2 ** 63 - 1).to_bytes(8, 'little') + b'{}', vae),
        'claims.safetensors': (len(header).to_bytes(8, 'little') + header, vae),
        'sparse.safetensors': (len(header).to_bytes(8, 'little') + header[:1], vae),
        'above.tgz': (tarred(('../data_batch_1.bin', tarfile.REGTYPE, '', 3073)), cifar),
        'absolute.tgz': (tarred(('/data_batch_1.bin', tarfile.REGTYPE, '', 3073)), cifar),
        'link.tgz': (tarred(('data_batch_1.bin', tarfile.SYMTYPE, '/etc/passwd', 0)), cifar),
        'hard.tgz': (tarred(('data_batch_1.bin', tarfile.LNKTYPE, '../x', 0)), cifar),
        'device.tgz': (tarred(('data_batch_1.bin', tarfile.CHRTYPE, '', 0)), cifar),
        'bomb.tgz': (tarred(('x', tarfile.REGTYPE, '', 60_000_000)), cifar),
        **{f'cifar/data_batch_{k}': (pickled({'data': Payload(), 'labels': [1]}), []) for k in range(2, 6)},
        'cifar/data_batch_1': (pickled({'data': Payload(), 'labels': [1]}),
                               [('data.py', 'cifar10', 'FOLDER', '--out', 'out')]),
        'above.zip': (plain('../a.jpg', b'x'), source),
        'absolute.zip': (plain('/a.jpg', b'x'), source),
        'bomb.zip': (packed(('a.jpg', bomb, deflated, GB4), ('dataset.json', b'{}', stored, None)), source),
        'labels.zip': (packed(('a.png', b'x', stored, None), ('dataset.json', bomb, deflated, GB4)),
                       source[:1]),
        'objects.npy': (objects.getvalue(), source[:1] + inpaint),
        'claims.npy': (array_header('<f4', (10 ** 12, 4, 8, 8)), source[:1] + inpaint),
        'huge.png': (huge_picture(12_000), inpaint),
        'huge/a.png': (huge_picture(12_000), huge),
    }


def bomb_of(head):
    """The raw stream of a header and then four thousand million zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + zeros(GB4)


def as_typed(script, *argv):
    """In a child: what `python script ...` does, torch being imported already. What it says goes to files."""
    sys.argv = [script, *argv]
    for number, name in ((1, 'told'), (2, 'complained')):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, 'w', 1, closefd=False) for number in (1, 2))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    status = 0
    try:
        runpy.run_path(str(conftest.ROOT / script), run_name='__main__')
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def harm():
    """Run every command on every harmful file in this folder; a line of JSON for each. Alone in a process, so
    that memory is that of torch and of the command."""
    for name, (_, commands) in harmful(torch.load('good.pt', weights_only=True)).items():
        for script, *argv in commands:
            path = pathlib.Path(name)
            words = {'FILE': name, 'FOLDER': str(path.parent), 'HASH': ''}
            if 'HASH' in argv:
                words['HASH'] = hashlib.sha256(path.read_bytes()).hexdigest()
            child = os.fork()
            if child == 0:
                as_typed(script, *[words.get(word, word) for word in argv])
            _, status, used = os.wait4(child, 0)
            shutil.rmtree('out', ignore_errors=True)
            seconds, memory = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
            words = pathlib.Path('complained').read_text(errors='replace')
            ended = os.waitstatus_to_exitcode(status)
            print(json.dumps([name, script, ended, seconds, memory, words]), flush=True)


def test_harmful_files_are_refused_in_a_sentence_and_run_nothing(base, tmp_path):
    """By the scripts as they are typed: exit status 2, below 2 seconds of computing and 1 GB of memory."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    with chdir(tmp_path):
        assert [*beside(good_checkpoint)] == [0]
        for name, (content, _) in harmful(torch.load('good.pt', weights_only=True)).items():
            path = pathlib.Path(name)
            if len(path.parts) == 2 and path.suffix in ('.npy', '.json'):
                shutil.copytree('images', path.parent, dirs_exist_ok=True)
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, int):
                path.touch()
                os.truncate(path, content)
            else:
                path.write_bytes(content)
        (tmp_path / 'huge' / 'b.png').write_bytes((tmp_path / 'huge' / 'a.png').read_bytes())
        done = subprocess.run([sys.executable, __file__, 'harm'], capture_output=True, text=True)
    wrong = [done.stderr] * bool(done.returncode)
    for name, script, status, seconds, memory, told in map(json.loads, done.stdout.splitlines()):
        lines = [line for line in told.splitlines() if 'Warning' not in line and not line.startswith('  ')]
        good = status == 2 and len(lines) == 1 and lines[0].startswith(f'{script}: ')
        if not (good and seconds < 2 and memory < 1e9):
            numbers = f'exit {status}, {seconds:.1f} s, {memory / 1e6:.0f} MB'
            wrong.append(f'{name}, {script}: {numbers}, {told[-600:]}')
    assert not wrong, '\n'.join(wrong)
    assert not (tmp_path / 'ran').exists() and len(done.stdout.splitlines()) > 50


def interrupted(script):
    def wait(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)
    argparse.ArgumentParser.parse_args = wait
    as_typed(script)


@pytest.mark.parametrize('script', SCRIPTS)
def test_ctrl_c_is_answered_by_a_word(tmp_path, script):
    with chdir(tmp_path):
        assert [*beside(interrupted, script)] == [128 + signal.SIGINT]
        assert re.fullmatch(rf'{script}: interrupted.*\n', pathlib.Path('complained').read_text())


def good_checkpoint():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*TINY, '--data', 'images', '--out', 'good', '--steps', '1'])
    os.replace('good/0000001.pt', 'good.pt')


def prepare(folder):
    make_small()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_base(folder)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('base')
    assert [*beside(prepare, folder)] == [0]
    return folder


def told(counts, failures):
    """How many cases of each target ended how; and the failures, each with what repeats it."""
    lines = [f'{target:20} {end:8} {n}' for (target, end), n in sorted(counts.items())]
    lines += [f'\n{case}\nrepeat it: python tests/test_fuzz.py {case[0]}\n{why}' for case, why in failures]
    return '\n'.join(lines)


def test_no_random_case_ends_in_a_traceback(base):
    counts, failures = fuzz(base, 0, FIRST_CASES, math.inf)
    assert not failures, told(counts, failures)
    assert sum(counts.values()) == FIRST_CASES
    assert {end for _, end in counts} == {'done', 'refused', 'usage'}         # neither all good nor all bad


@pytest.mark.soak
def test_five_minutes_of_random_cases(base):
    counts, failures = fuzz(base, FIRST_CASES, sys.maxsize, SOAK_SECONDS)
    print(told(counts, failures))
    assert not failures and sum(counts.values()) > 100


if __name__ == '__main__' and sys.argv[1] == 'harm':
    harm()
elif __name__ == '__main__':
    with tempfile.TemporaryDirectory() as base:
        assert [*beside(prepare, base)] == [0]
        make_small()
        print(*one(int(sys.argv[1]), base))
