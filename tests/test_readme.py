"""Every command in README.md, assets/*.md and docstrings runs, shortened to a tiny network and two steps."""

import dataclasses
import io
import pathlib
import re
import shlex
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import data
import fid
import finetune
import model
import mutual_info
import sample
import train

MODULES = {module.__name__: module for module in (train, finetune, sample, data, fid, mutual_info)}
SHORT = {'train': '--model T/4 --steps 2 --batch 4 --accumulate 1 --preview 1 --out new',
         'finetune': '--steps 1 --batch 4 --accumulate 1 --preview 0 --out new',
         'sample': '--steps 2 -n 2 --out new.png', 'data': '--out new', 'fid': '',
         'mutual_info': '--images 100 --seeds 1 --masks 2 --out new'}


def commands(text):
    """'train --method dit ...' for every command line of our scripts, after `python` or torchrun."""
    found = re.findall(r'(?:python|torchrun [-\w ]*?) ?(\w+)\.py((?: [^&;#\n]*)?)', text.replace('\\\n', ' '))
    return [f'{script} {words}'.strip() for script, words in found if script in MODULES]


README = (ROOT / 'README.md').read_text()
PAGES = '\n'.join([README, *(page.read_text() for page in sorted((ROOT / 'assets').glob('*.md')))])
FENCED = '\n'.join(re.findall(r'^```(?:sh)?\n(.*?)^```', PAGES, re.M | re.S))
COMMANDS = [*commands(FENCED), *(line for module in MODULES.values() for line in commands(module.__doc__))]


class Small(torch.nn.Module):
    """In place of the VAE, and of Inception: no test here is of their numbers."""

    fc = torch.nn.Linear(1, 1)
    encode = staticmethod(lambda x: torch.zeros(len(x), 8, x.shape[2] // 8, x.shape[3] // 8))
    decode = staticmethod(lambda z: torch.zeros(len(z), 3, 8 * z.shape[2], 8 * z.shape[3]))
    logits = staticmethod(lambda pool: pool[:, :8])

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None].repeat(1, 2048), x.mean((1, 2, 3))[:, None].repeat(1, 2023)


@pytest.fixture(scope='module')
def desk(shapes, tmp_path_factory):
    """A folder with everything that the commands name."""
    desk, rng = tmp_path_factory.mktemp('desk'), np.random.default_rng(0)
    for name, C, classes, kind in (('imagenet256', 8, 10, 'moments'), ('flowers', 4, 5, 'latents')):
        rows = ((rng.standard_normal((C, 8, 8)), k % classes) for k in range(60))
        meta = {'kind': kind, 'classes': classes, 'scale': 0.2}
        data.save_folder(desk / name, rows, 'float16', (C, 8, 8), meta)
    photo = rng.integers(256, size=(218, 178, 3)).astype(np.uint8)
    for name in ('tree/one/a.png', 'tree/two/b.png', 'celeba/0.jpg', 'celeba/1.jpg', 'photo.png',
                 'pngs/a.png', 'pngs/b.png'):
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[:8, :8] if name == 'photo.png' else photo).save(desk / name)
    Image.fromarray(np.kron([[0, 255], [0, 0]], np.ones((4, 4))).astype(np.uint8)).save(desk / 'mask.png')
    with zipfile.ZipFile(desk / 'img_align_celeba.zip', 'w') as archive:
        for k in (0, 1):
            archive.write(desk / 'celeba' / f'{k}.jpg', f'img_align_celeba/{k}.jpg')
    (desk / 'list_attr_celeba.txt').write_text('2\nSmiling\n0.jpg 1\n1.jpg -1\n')
    with tarfile.open(desk / 'cifar-10-binary.tar.gz', 'w:gz') as archive:
        for k in range(1, 6):
            member = tarfile.TarInfo(f'cifar-10-batches-bin/data_batch_{k}.bin')
            member.size = 2 * 3073
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    for name, value in (('features', rng.standard_normal((1, 4, 8, 8))), ('labels', np.zeros(1, int))):
        (desk / 'fast-DiT' / 'features' / f'imagenet256_{name}').mkdir(parents=True)
        for k in range(3):
            np.save(desk / 'fast-DiT' / 'features' / f'imagenet256_{name}' / f'{k}.npy', value)
    cfg = model.Config(method='dit', model='T/4', diffusion='ddpm', resolution=8, classes=7, mask_ratio=0.0)
    weights = model.Net(cfg).state_dict()
    torch.save({'model': weights, 'ema': weights, 'step': 0, 'config': dataclasses.asdict(cfg)},
               desk / 'DiT-XL-2-256x256.pt')
    made = run(shapes, tmp_path_factory.mktemp('made'), '--steps 1')
    words = {word for line in COMMANDS for word in shlex.split(line)}
    for name in words - {'REF', 'SAMPLES', 'new'} | {'REF.npz', 'SAMPLES.npz'}:
        path = desk / name.removeprefix('~/')
        path.parent.mkdir(parents=True, exist_ok=True)
        if re.fullmatch(r'\d{7}\.pt', path.name):
            path.symlink_to(made)
        elif path.name == 'png':
            path.symlink_to(desk / 'pngs')
        elif path.suffix == '.npz':
            np.savez(path, arr_0=photo[:64].reshape(-1, 8, 8, 3)[:4])
    for name in ('shapes', 'data'):
        (desk / name).symlink_to(shapes)
    for name in ('photos', 'imagenet/train'):
        (desk / name).parent.mkdir(exist_ok=True)
        (desk / name).symlink_to(desk / 'tree')
    (desk / 'vae.safetensors').touch()
    return desk


@pytest.mark.parametrize('line', dict.fromkeys(COMMANDS))
def test_command(line, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'read_vae', lambda path, device='cpu': (Small(), '0' * 64))
    monkeypatch.setattr(fid, 'load_weights', lambda *args: Small())
    monkeypatch.setattr(fid, 'download_weights', lambda path: None)
    monkeypatch.setattr(fid, 'frechet_distance', lambda a, b: 0.0)
    for entry in desk.iterdir():
        pathlib.Path(entry.name).symlink_to(entry)
    script, *words = shlex.split(line.replace('~/', ''))
    words = [f'{word}.npz' if word in ('REF', 'SAMPLES') else word for word in words]
    words += [] if {'--attention', '--proposition-2'} & {*words} else SHORT[script].split()
    words += ['--n', '50'] * (words[0] == 'shapes') if script == 'data' else []
    for flag in ('--npz', '--png', '--save-stats'):
        words += [flag, f'new{flag}'] * (flag in words)
    MODULES[script].main(words)
    assert script in ('fid', 'mutual_info') or list(tmp_path.glob('new*'))


def test_the_pages_have_commands_and_their_limits():
    assert {line.split()[0] for line in commands(FENCED)} == set(MODULES) and len(README.splitlines()) <= 180
    assert '<!-- laptop -->\n```' in README and '<!-- tests -->\n```' in README
    named = re.findall(r'python3? ([\w/]+\.py)', FENCED) + re.findall(r'\]\(([\w/.]+)\)', README)
    assert [path for path in named if not (ROOT / path).exists()] == []
