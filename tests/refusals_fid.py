"""Mistakes that people make with fid.py, one per row: the sentence they get, and that nothing is written.

    pytest tests/refusals_fid.py
"""

import json
import pathlib
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent


def desk(folder):
    """The files that the rows name."""
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    mu, sigma = np.zeros(2048), np.eye(2048)
    for name, arrays in {'ok': {'arr_0': x}, 'first': {'arr_0': x.transpose(0, 3, 1, 2).copy()},
                         'floats': {'arr_0': x / np.float32(127.5) - 1}, 'one': {'arr_0': x[:1]},
                         'other': {'images': x},
                         'clip': {'mu': mu[:512], 'sigma': sigma[:512, :512]},
                         'negative': {'mu': mu, 'sigma': -sigma}}.items():
        np.savez(folder / f'{name}.npz', **arrays)
    np.save(folder / 'array.npy', x)
    (folder / 'short.npz').write_bytes((folder / 'ok.npz').read_bytes()[:-100])
    (folder / 'page.npz').write_text('<!DOCTYPE html>\n<html>Not found</html>')
    for name in ('mixed', 'deep', 'broken', 'webp', 'latents'):
        (folder / name).mkdir()
    for name in ('mixed', 'broken', 'deep'):
        Image.fromarray(x[0]).save(folder / name / '0.png')
    Image.new('RGB', (9, 8)).save(folder / 'mixed' / '1.png')
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / 'deep' / '1.png')
    (folder / 'broken' / '1.png').write_bytes(b'not an image')
    for i in range(3):
        Image.fromarray(x[i]).save(folder / 'webp' / f'{i}.webp')
    np.save(folder / 'latents' / 'data.npy', np.zeros((4, 4, 8, 8), np.float32))
    (folder / 'latents' / 'meta.json').write_text(json.dumps({'kind': 'latents', 'classes': 0}))


ROWS = [
    ('fid.py', '{desk}/ok.npz', 'type python fid.py REF SAMPLES'),
    ('fid.py', '{desk}/ok.npz {desk}/ok.npz --js', 'unrecognized arguments: --js'),
    ('fid.py', '{desk}/nowhere {desk}/ok.npz', 'there is no'),
    ('fid.py', '{desk}/ok.npz {desk}/page.npz', 'np.savez(FILE, arr_0=images): File is not a zip file'),
    ('fid.py', '{desk}/ok.npz {desk}/array.npy', 'np.savez(FILE, arr_0=images): File is not a zip file'),
    ('fid.py', '{desk}/ok.npz {desk}/short.npz', 'short.npz cannot be read as an .npz file'),
    ('fid.py', '{desk}/ok.npz {desk}/other.npz', 'holds images, expected arr_0 with images, or mu and sigma'),
    ('fid.py', '{desk}/ok.npz {desk}/first.npz', 'expected images uint8 (n, H, W, 3): save `x.transpose(0'),
    ('fid.py', '{desk}/ok.npz {desk}/floats.npz', 'holds float32 (4, 8, 8, 3), expected images uint8'),
    ('fid.py', '{desk}/ok.npz {desk}/one.npz', 'too few images for a covariance: 1, expected at least 2'),
    ('fid.py', '{desk}/clip.npz {desk}/ok.npz', '(512,) and float64 (512, 512), expected floats (2048,)'),
    ('fid.py', '{desk}/negative.npz {desk}/ok.npz', 'not positive semidefinite'),
    ('fid.py', '{desk}/ok.npz {desk}/mixed', '1.png is 9 x 8, but'),
    ('fid.py', '{desk}/ok.npz {desk}/deep', '1.png has 16 bits per channel, expected 8'),
    ('fid.py', '{desk}/ok.npz {desk}/broken', '1.png cannot be read as an image'),
    ('fid.py', '{desk}/ok.npz {desk}/webp', '0 PNG or JPEG files, expected at least 2, and others: .webp'),
    ('fid.py', '{desk}/ok.npz {desk}/latents', 'latents, expected images: prepare the same images without'),
    ('fid.py', '{desk}/ok.npz {desk}/ok.npz --weights {desk}/ok.npz', 'expected 6726825d'),
    ('fid.py', '{desk}/ok.npz {desk}/ok.npz --save-stats {desk}/ok.npz', 'exists already'),
    ('fid.py', '{desk}/ok.npz {desk}/ok.npz --save-stats {desk}/no/s.npz', 'No such file or directory'),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('desk')
    desk(folder)
    return folder


@pytest.mark.parametrize('script, line, words', ROWS)
def test_a_mistake_is_one_sentence_and_writes_nothing(script, line, words, folder, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    monkeypatch.setattr(sys, 'argv', [script, *line.format(desk=folder).split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    out, err = capsys.readouterr()
    assert stop.value.code not in (0, None) and out == '' and words in err and err.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before
