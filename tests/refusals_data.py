"""Mistakes that people make with data.py: each ends in one sentence, and nothing is written."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent


def desk(folder):
    """The files that the rows need."""
    for name in ('empty', 'one', 'broken', 'two/a', 'fast/x_features', 'fast/x_labels', 'edm', 'faces'):
        (folder / name).mkdir(parents=True)
    Image.new('RGB', (9, 9)).save(folder / 'one' / 'a.png')
    for name in ('a', 'b'):
        (folder / 'broken' / f'{name}.png').write_bytes(b'<!doctype html>')
        Image.new('RGB', (9, 9)).save(folder / 'two' / 'a' / f'{name}.png')
        Image.new('RGB', (178, 218)).save(folder / 'faces' / f'{name}.jpg')
    (folder / 'faces' / 'list_attr_celeba.txt').write_text('2\nBald Smiling\na.jpg 1 1\nb.jpg 1 -1\n')
    (folder / 'page.zip').write_bytes(b'<!doctype html>')
    (folder / 'vae.safetensors').write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
    with tarfile.open(folder / 'python.tar.gz', 'w:gz') as archive:
        archive.addfile(tarfile.TarInfo('cifar-10-batches-py/data_batch_1'))
    (folder / 'half.tar.gz').write_bytes((folder / 'python.tar.gz').read_bytes()[:60])
    for k in range(3):
        np.save(folder / 'fast' / 'x_features' / f'{k}.npy', np.zeros((1, 5, 2, 2), np.float32))
        np.save(folder / 'fast' / 'x_labels' / f'{k}.npy', np.zeros(1, int))
        np.save(folder / 'edm' / f'{k}.npy', np.zeros((8, 2, 2), np.float32))
    (folder / 'edm' / 'dataset.json').write_text(json.dumps({'labels': [['0.npy', 0], ['1.npy', 0]]}))
    np.savez(folder / 'stats.npz', mu=np.zeros(3))
    np.savez(folder / 'lacks.npz', arr_0=np.zeros((3, 4, 4, 3), np.uint8), arr_1=np.zeros(2, int))
    with zipfile.ZipFile(folder / 'others.zip', 'w') as archive:
        archive.writestr('a.txt', 'no image')


ROWS = [
    ('data.py', 'folder {desk}/nowhere --size 8', 'there is no'),
    ('data.py', 'folder {desk}/empty --size 8', 'holds no image: expected .png'),
    ('data.py', 'folder {desk}/others.zip --size 8', 'holds no image: expected .png'),
    ('data.py', 'folder {desk}/page.zip --size 8', 'page.zip cannot be read'),
    ('data.py', 'folder {desk}/two --size 0', '--size must be at least 1'),
    ('data.py', 'folder {desk}/two --size 8 --workers 0', '--workers must be at least 1'),
    ('data.py', 'folder {desk}/two --size 8 --out {desk}/one', 'exists already: remove it'),
    ('data.py', 'folder {desk}/two --size 8 --out {desk}/page.zip/out', 'Not a directory'),
    ('data.py', 'folder {desk}/two --size 12 --vae {desk}/vae.safetensors', 'must be a multiple of 8'),
    ('data.py', 'folder {desk}/two --size 8 --vae {desk}/nowhere', 'such as diffusion_pytorch_model'),
    ('data.py', 'folder {desk}/two --size 8 --vae {desk}/vae.safetensors', 'neither a safetensors nor'),
    ('data.py', 'folder {desk}/two --size 8 --scale 0.13', '--scale is for moments, which need --vae'),
    ('data.py', 'shapes --n 1', '--n must be at least 2'),
    ('data.py', 'shapes --colour red', 'unrecognized arguments: --colour red'),
    ('data.py', 'cifar10 {desk}/python.tar.gz', 'get cifar-10-binary.tar.gz from https://www.cs.toronto.edu'),
    ('data.py', 'cifar10 {desk}/half.tar.gz', 'half.tar.gz cannot be read'),
    ('data.py', 'celeba {desk}/empty', 'holds no .jpg: expected img_align_celeba.zip'),
    ('data.py', 'celeba {desk}/faces --attribute Blond', '--attribute Blond is none of Bald, Smiling'),
    ('data.py', 'celeba {desk}/faces --crop 200 89 121', 'reaches out of the 178 x 218'),
    ('data.py', 'import {desk}/nowhere', 'there is no'),
    ('data.py', 'import {desk}/two', 'is in no known layout: expected an .npz file'),
    ('data.py', 'import {desk}/fast', '(5, 2, 2): expected'),
    ('data.py', 'import {desk}/edm', 'dataset.json cannot be read, it is truncated, damaged'),
    ('data.py', 'import {desk}/stats.npz', 'arr_0 is not a file in the archive'),
    ('data.py', 'import {desk}/lacks.npz', 'lacks.npz has 3 rows and 2 labels'),
    ('data.py', 'import {desk}/edm --scale 0', '--scale must be above 0'),
]


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp('desk')
    desk(folder)
    return folder


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[1])
def test_refusal(row, ready, monkeypatch, capfd):
    """In this process, to import torch once; the door's exit status is that of the script."""
    script, line, words = row
    before = {path: path.stat().st_mtime_ns for path in ready.rglob('*')}
    monkeypatch.chdir(ready)
    monkeypatch.setattr(sys, 'argv', [script, *shlex.split(line.format(desk=ready))])
    import data
    with pytest.raises(SystemExit) as stop:
        data.script(script, data.main)
    printed = capfd.readouterr().err.splitlines()
    printed = [text for text in printed if not text.startswith(('usage:', '   '))]
    assert stop.value.code and len(printed) == 1 and words in printed[0], printed
    assert {path: path.stat().st_mtime_ns for path in ready.rglob('*')} == before


@pytest.mark.slow
def test_the_script_itself(ready):
    done = subprocess.run([sys.executable, ROOT / 'data.py', 'import', 'nowhere'], cwd=ready, text=True,
                          capture_output=True, env=os.environ)
    assert (done.returncode, done.stderr) == (2, 'data.py: there is no nowhere\n')
