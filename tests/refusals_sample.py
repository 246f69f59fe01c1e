"""Command lines of sample.py that end in one sentence: `python -m pytest tests/refusals_sample.py`."""

import dataclasses
import json
import runpy
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import model
import sample


def desk(folder):
    """The files that the rows name."""
    for name, changes in (('x', {}), ('dit', dict(method='dit', mask_ratio=0.0, classes=0)),
                          ('tuned', dict(stage='tune')), ('latents', dict(channels=4, kind='moments'))):
        cfg = model.Config(**dict(model='T/2', resolution=8, channels=3, classes=10) | changes)
        state = {'ema': model.Net(cfg).state_dict(), 'step': 1, 'config': dataclasses.asdict(cfg)}
        torch.save(state, folder / f'{name}.pt')
    rng = np.random.default_rng(0)
    for name, shape in (('photo', (8, 8, 3)), ('mask', (8, 8)), ('wide', (8, 16))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f'{name}.png')
    Image.new('L', (8, 8)).save(folder / 'black.png')
    (folder / 'saved.html').write_text('<html>')
    (folder / 'half.png.partial').mkdir()
    np.savez(folder / 'half.png.partial/000001.npz', settings=np.array(json.dumps({'checkpoint': 'y.pt'})))


PAIR = '--inpaint {desk}/photo.png --mask {desk}/mask.png'
ROWS = [
    ('sample.py', '{desk}/gone.pt', 'there is no checkpoint'),
    ('sample.py', '{desk}/saved.html', 'not a checkpoint'),
    ('sample.py', '{desk}/x.pt --steps 1', 'at least 2 steps'),
    ('sample.py', '{desk}/x.pt --class 3 10', '10 classes, numbered from 0'),
    ('sample.py', '{desk}/dit.pt --cfg 2', 'trained without'),
    ('sample.py', '{desk}/x.pt --cfg-power 4', 'type its scale'),
    ('sample.py', '{desk}/x.pt --cfg 4 --cfg-interval 2 0.2', 'a low and a high noise level'),
    ('sample.py', '{desk}/x.pt --inpaint {desk}/photo.png', 'go together'),
    ('sample.py', '{desk}/dit.pt ' + PAIR, 'maskdit or mdt or mcdit and --tokens both: this one is dit'),
    ('sample.py', '{desk}/tuned.pt ' + PAIR, 'this one is mcdit, stage tune'),
    ('sample.py', '{desk}/x.pt --inpaint {desk}/saved.html --mask {desk}/mask.png', 'html cannot be read'),
    ('sample.py', '{desk}/x.pt --inpaint {desk}/photo.png --mask {desk}/black.png', 'all black on the 16'),
    ('sample.py', '{desk}/x.pt --inpaint {desk}/photo.png --mask {desk}/wide.png', 'the same proportions'),
    ('sample.py', '{desk}/x.pt --fill-steps 2 ' + PAIR, 'known tokens are visible: maskdit or mdt'),
    ('sample.py', '{desk}/latents.pt', 'name the VAE that decodes them with --vae, such as'),
    ('sample.py', '{desk}/latents.pt --vae {desk}/gone.safetensors', 'there is no VAE'),
    ('sample.py', '{desk}/latents.pt --vae {desk}/x.pt', 'not the f8 autoencoder of Stable Diffusion'),
    ('sample.py', '{desk}/latents.pt --latents --png {desk}/png', '--latents makes none'),
    ('sample.py', '{desk}/x.pt --latents', 'this one makes images'),
    ('sample.py', '{desk}/x.pt --npz {desk}/photo.png', 'exists already: remove it, or choose another'),
    ('sample.py', '{desk}/x.pt --out {desk}/grid.jpg', 'must end in .png'),
    ('sample.py', '{desk}/x.pt --steps 20 --out {desk}/half.png', 'begun with other settings'),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('desk')
    desk(folder)
    return folder


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.mark.parametrize('script, line, words', ROWS, ids=[line for _, line, _ in ROWS])
def test_one_sentence_and_nothing_written(script, line, words, folder, monkeypatch, capsys):
    before = content(folder)
    monkeypatch.setattr('sys.argv', [script, *shlex.split(line.format(desk=folder))])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sample.__file__, run_name='__main__')
    error = capsys.readouterr().err
    assert stop.value.code and error.count('\n') == 1 and words in error
    assert content(folder) == before
