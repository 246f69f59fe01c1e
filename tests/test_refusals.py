"""Mistakes that people make, one per row: each ends in one sentence and status 2, and writes nothing.

A row is the script, its command line, where {desk} is a folder with the files that `desk_*` makes, and words
that the sentence must hold.
"""

import dataclasses
import json
import pathlib
import re
import runpy
import shlex
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import finetune
import model
import mutual_info
import sample
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------- the files that the rows name

TRAIN = '--model T/4 --batch 8 --steps 2 --preview 0 --data {desk}/shapes --out {desk}/new'
TUNE = '{desk}/run/0000002.pt --batch 8 --steps 1 --preview 0 --out {desk}/new'


def desk_data(folder):
    """The files that the rows need."""
    for name in ('empty', 'one', 'two/a', 'fast/x_features', 'fast/x_labels', 'edm', 'faces'):
        (folder / name).mkdir(parents=True)
    Image.new('RGB', (9, 9)).save(folder / 'one' / 'a.png')
    for name in ('a', 'b'):
        Image.new('RGB', (9, 9)).save(folder / 'two' / 'a' / f'{name}.png')
        Image.new('RGB', (178, 218)).save(folder / 'faces' / f'{name}.jpg')
    (folder / 'list_attr_celeba.txt').write_text('2\nBald Smiling\na.jpg 1 1\nb.jpg 1 -1\n')
    (folder / 'page.zip').write_bytes(b'<!doctype html>')
    (folder / 'vae.safetensors').write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
    with tarfile.open(folder / 'python.tar.gz', 'w:gz') as archive:
        archive.addfile(tarfile.TarInfo('cifar-10-batches-py/data_batch_1'))
    for k in range(3):
        np.save(folder / 'fast' / 'x_features' / f'{k}.npy', np.zeros((1, 5, 2, 2), np.float32))
        np.save(folder / 'fast' / 'x_labels' / f'{k}.npy', np.zeros(1, int))
        np.save(folder / 'edm' / f'{k}.npy', np.zeros((8, 2, 2), np.float32))
    (folder / 'edm' / 'dataset.json').write_text(json.dumps({'labels': [['0.npy', 0], ['1.npy', 0]]}))
    np.savez(folder / 'adm.npz', arr_0=np.zeros((3, 4, 4, 3), np.uint8))


def desk_train(folder):
    """The files that the rows name."""
    for name, size in (('shapes', 8), ('large', 16), ('short', 8)):
        data.make_shapes(folder / name, size=size, count=60)
    shutil.copytree(folder / 'shapes', folder / 'nameless')
    (folder / 'nameless' / 'meta.json').write_text(json.dumps({'kind': 'images', 'classes': 0}))
    np.save(folder / 'nameless' / 'labels.npy', np.zeros(60, np.int64))
    array = (folder / 'short' / 'data.npy').read_bytes()
    (folder / 'short' / 'data.npy').write_bytes(array[:len(array) // 2])
    train.main(f'{TRAIN} --method dit --out {{desk}}/run'.format(desk=folder).split())
    finetune.main(f'{TUNE} --out {{desk}}/tuned'.format(desk=folder).split())
    state = torch.load(folder / 'run' / '0000002.pt', weights_only=True)
    torch.save({name: state[name] for name in ('ema', 'step', 'config')}, folder / 'ema.pt')
    torch.save(state | {'config': state['config'] | {'future': 1}}, folder / 'future.pt')
    (folder / 'half.pt').write_bytes((folder / 'run' / '0000002.pt').read_bytes()[:5000])
    (folder / 'file').write_text('')
    (folder / 'foreign').mkdir()
    (folder / 'foreign' / 'log.jsonl').write_text('{"epoch": 1}\n')


def desk_sample(folder):
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


def desk_mutual_info(folder):
    """200 shapes of 8 x 8, 200 equal images, networks of dit that fit or not, and files in the way."""
    data.make_shapes(folder / 'shapes', size=8, count=200)
    equal = ((np.zeros((3, 8, 8), np.uint8), 0) for _ in range(200))
    data.save_folder(folder / 'equal', equal, 'uint8', (3, 8, 8), {'kind': 'images', 'classes': 0})
    for name, changes in (('fits', {}), ('big', {'resolution': 16}), ('three', {'classes': 3})):
        cfg = model.Config(**{'method': 'dit', 'model': 'T/2', 'resolution': 8, 'channels': 3, 'classes': 10,
                              'mask_ratio': 0.0} | changes)
        state = {'ema': model.Net(cfg).state_dict(), 'step': 1, 'config': dataclasses.asdict(cfg)}
        torch.save(state, folder / f'{name}.pt')
    (folder / 'there.csv').write_text('precious')
    (folder / 'there.png').write_text('precious')


def desk_fid(folder):
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


# -------------------------------------------------------------------------------------------------- the rows

PAIR = '--inpaint {desk}/photo.png --mask {desk}/mask.png'
SHAPES = '--data {desk}/shapes --out {desk}/new'
ROWS = [
    ('data.py', 'folder {desk}/nowhere --size 8', 'there is no'),
    ('data.py', 'folder {desk}/empty --size 8', 'holds no image: expected .png'),
    ('data.py', 'folder {desk}/page.zip --size 8', 'page.zip cannot be read'),
    ('data.py', 'folder {desk}/two --size 0', '--size must be at least 1'),
    ('data.py', 'folder {desk}/two --size 8 --out {desk}/one', 'exists already: remove it'),
    ('data.py', 'folder {desk}/two --size 12 --vae {desk}/vae.safetensors', 'must be a multiple of 8'),
    ('data.py', 'folder {desk}/two --size 8 --vae {desk}/vae.safetensors', 'neither a safetensors nor'),
    ('data.py', 'folder {desk}/two --size 8 --scale 0.13', '--scale is for moments, which need --vae'),
    ('data.py', 'shapes --n 1', '--n must be at least 2'),
    ('data.py', 'cifar10 {desk}/python.tar.gz', 'get cifar-10-binary.tar.gz from https://www.cs.toronto.edu'),
    ('data.py', 'celeba {desk}/faces --attribute Blond', '--attribute Blond is none of Bald, Smiling'),
    ('data.py', 'celeba {desk}/faces --crop 200 89 121', 'reaches out of the 178 x 218'),
    ('data.py', 'import {desk}/two', 'is in no known layout: expected an .npz file'),
    ('data.py', 'import {desk}/fast', '(5, 2, 2): expected'),
    ('data.py', 'import {desk}/adm.npz --scale 1', '--scale is for latents, and these are images'),
    ('data.py', 'import {desk}/edm', 'dataset.json cannot be read, it is truncated, damaged'),
    ('train.py', f'{TRAIN} --data {{desk}}/nowhere', 'nowhere: make one with `python data.py'),
    ('train.py', f'{TRAIN} --data {{desk}}/run', 'is not a data folder, it has no meta.json'),
    ('train.py', f'{TRAIN} --data {{desk}}/short', 'short cannot be read, it is truncated'),
    ('train.py', f'{TRAIN} --model T/3', '--model T/3 is not known: type one of T, S, B, L, XL'),
    ('train.py', f'{TRAIN} --batch 7 --accumulate 2', '--batch 7 cannot be split over 1 ranks x --acc'),
    ('train.py', f'{TRAIN} --steps 0', 'must be at least 1'),
    ('train.py', f'{TRAIN} --lr 0', '--lr above 0'),
    ('train.py', f'{TRAIN} --lr-decay 2', '--lr-decay from 0 to 1'),
    ('train.py', f'{TRAIN} --mask-ratio 0', '--mask-ratio 0.0: expected a number above 0 and below 1'),
    ('train.py', f'{TRAIN} --mask-ratio 0.9', '--mask-ratio 0.9 leaves none of the 4 tokens visible'),
    ('train.py', f'{TRAIN} --method dit --mask-ratio 0.5', '--mask-ratio does not apply to --method dit'),
    ('train.py', f'{TRAIN} --all-clean --lambda-noise 0.1', 'does not apply with --all-clean'),
    ('train.py', f'{TRAIN} --teacher-encoder --lambda-con1 0 --lambda-con2 0', 'needs a branch'),
    ('train.py', f'{TRAIN} --method vae', 'invalid choice'),
    ('train.py', f'{TRAIN} --lambda-noise', 'expected one argument'),
    ('train.py', f'{TRAIN} --out {{desk}}/run', "method was 'dit' and is now 'mcdit'"),
    ('train.py', f'{TRAIN} --method dit --steps 1 --out {{desk}}/run', 'beyond --steps 1'),
    ('train.py', f'{TRAIN} --out {{desk}}/foreign', 'log.jsonl is not a log of train.py'),
    ('train.py', f'{TRAIN} --out {{desk}}/file/new', 'Not a directory'),
    ('finetune.py', f'{TUNE} --out {{desk}}/run', 'holds a run of train.py: choose another --out'),
    ('finetune.py', f'{TUNE} --lr 1 --out {{desk}}/tuned', 'lr was 5e-05 and is now 1.0'),
    ('finetune.py', f'{TUNE} --data {{desk}}/large', 'holds 3 channels of 16 pixels a side, and'),
    ('finetune.py', f'{TUNE} --data {{desk}}/nameless', 'has no labels, and'),
    ('finetune.py', TUNE.replace('run/0000002', 'none'), 'there is no checkpoint'),
    ('finetune.py', TUNE.replace('run/0000002', 'half'), 'is not a checkpoint, or is truncated'),
    ('finetune.py', TUNE.replace('run/0000002', 'ema'), 'holds EMA weights only'),
    ('finetune.py', TUNE.replace('run/0000002', 'future'), 'was written by a later version of this code'),
    ('finetune.py', f'{TUNE} --mask-ratio 0.5', 'unrecognized arguments: --mask-ratio 0.5'),
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
    ('mutual_info.py', '--data {desk}/nowhere', 'there is no data folder'),
    ('mutual_info.py', f'{SHAPES} {{desk}}/none.pt', 'there is no checkpoint'),
    ('mutual_info.py', f'{SHAPES} {{desk}}/big.pt', 'big.pt was made for 3 x 16 x 16'),
    ('mutual_info.py', f'{SHAPES} {{desk}}/three.pt', 'three.pt has 3 classes'),
    ('mutual_info.py', f'{SHAPES} --dims 5', '200 different images are too few for --dims 5: at least 250'),
    ('mutual_info.py', '--data {desk}/equal --out {desk}/new', '1 different images are too few'),
    ('mutual_info.py', f'{SHAPES} --mask-ratio 1', '--mask-ratio 1.0 leaves 0 of 16 squares visible'),
    ('mutual_info.py', f'{SHAPES} --sigmas 0', '--sigmas must lie between'),
    ('mutual_info.py', f'{SHAPES} --masks 1 --seeds 1', 'at least 2'),
    ('mutual_info.py', f'{SHAPES} --show 1', '--show means nothing to the table'),
    ('mutual_info.py', '--data {desk}/shapes --out {desk}/there', 'there.csv exists already'),
    ('mutual_info.py', '--data {desk}/shapes --attention {desk}/there.png {desk}/fits.pt',
     'there.png exists already'),
    ('mutual_info.py', '--data {desk}/shapes --attention {desk}/new.png', '--attention needs checkpoints'),
    ('mutual_info.py', '--data {desk}/shapes --attention {desk}/new.png --dims 1 {desk}/fits.pt',
     '--dims means nothing to'),
    ('mutual_info.py', '--data {desk}/shapes --attention {desk}/new.png {desk}/fits.pt --show 200',
     'the images 0 to 199'),
    ('fid.py', '{desk}/ok.npz', 'type python fid.py REF SAMPLES'),
    ('fid.py', '{desk}/ok.npz {desk}/ok.npz --js', 'unrecognized arguments: --js'),
    ('fid.py', '{desk}/nowhere {desk}/ok.npz', 'there is no'),
    ('fid.py', '{desk}/ok.npz {desk}/page.npz', 'np.savez(FILE, arr_0=images): File is not a zip file'),
    ('fid.py', '{desk}/ok.npz {desk}/array.npy', 'np.savez(FILE, arr_0=images): File is not a zip file'),
    ('fid.py', '{desk}/ok.npz {desk}/short.npz', 'short.npz cannot be read as an .npz file'),
    ('fid.py', '{desk}/ok.npz {desk}/other.npz', 'holds images, expected arr_0 with images, or mu and sigma'),
    ('fid.py', '{desk}/ok.npz {desk}/first.npz', 'expected images uint8 (2 or more, H, W, 3): save `x.tran'),
    ('fid.py', '{desk}/ok.npz {desk}/floats.npz', 'holds float32 (4, 8, 8, 3), expected images uint8'),
    ('fid.py', '{desk}/ok.npz {desk}/one.npz', 'holds uint8 (1, 8, 8, 3), expected images uint8 (2 or more'),
    ('fid.py', '{desk}/clip.npz {desk}/ok.npz', '(512,) and float64 (512, 512), expected floats (2048,)'),
    ('fid.py', '{desk}/negative.npz {desk}/ok.npz', 'not positive semidefinite'),
    ('fid.py', '{desk}/ok.npz {desk}/mixed', '1.png is 9 x 8, but'),
    ('fid.py', '{desk}/ok.npz {desk}/deep', '1.png has 16 bits per channel, expected 8'),
    ('fid.py', '{desk}/ok.npz {desk}/broken', '1.png cannot be read as an image'),
    ('fid.py', '{desk}/ok.npz {desk}/webp', '0 PNG or JPEG files, 3 other files skipped (.webp), exp'),
    ('fid.py', '{desk}/ok.npz {desk}/latents', 'latents, expected images: prepare the same images without'),
    ('fid.py', '{desk}/ok.npz {desk}/ok.npz --weights {desk}/ok.npz', 'expected 6726825d'),
    ('fid.py', '{desk}/ok.npz {desk}/ok.npz --save-stats {desk}/ok.npz', 'File exists'),
    ('fid.py', '{desk}/ok.npz {desk}/ok.npz --save-stats {desk}/no/s.npz', 'No such file or directory'),
]


# ------------------------------------------------------------------------------------------------- the check

DESKS = {'data.py': desk_data, 'train.py': desk_train, 'finetune.py': desk_train, 'sample.py': desk_sample,
         'mutual_info.py': desk_mutual_info, 'fid.py': desk_fid}
made = {}


@pytest.fixture
def desk(script, tmp_path_factory):
    """The folder of a script's files, made for its first row."""
    make = DESKS[script]
    if make not in made:
        made[make] = tmp_path_factory.mktemp('desk')
        make(made[make])
    return made[make]


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.parametrize('script, line, words', ROWS, ids=[f'{script} {line}' for script, line, _ in ROWS])
def test_a_mistake_is_one_sentence_and_writes_nothing(script, line, words, desk, monkeypatch, capsys):
    before = contents(desk)
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, 'argv', [script, *shlex.split(line.format(desk=desk))])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    error = capsys.readouterr().err
    sentence = error[error.index(f'{script}: error'):] if 'usage: ' in error else error    # argparse's
    assert stop.value.code == 2 and words in sentence and sentence.count('\n') == 1, error
    assert contents(desk) == before


@pytest.mark.parametrize('module', [train, finetune, sample, mutual_info, fid], ids=lambda one: one.__name__)
def test_help_shows_every_default(module, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '1000')
    with pytest.raises(SystemExit):
        module.parse(['--help'])
    flags = re.split(r'\n  (?=-)', capsys.readouterr().out)[1:]               # each with its help
    without = {re.findall(r'--[\w-]+', flag)[0] for flag in flags if '(default: ' not in flag}
    required = {'--out'} if module is finetune else set()
    assert len(flags) >= 5 and without <= {'--help', '--all-clean', '--teacher-encoder'} | required
