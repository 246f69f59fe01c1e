"""Mistakes that people make with train.py and finetune.py, one per row: each gets a sentence, none writes.

    pytest tests/refusals_train.py
"""

import json
import pathlib
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch

import data
import finetune
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = '--model T/4 --batch 8 --steps 2 --preview 0 --data {desk}/shapes --out {desk}/new'
TUNE = '{desk}/run/0000002.pt --batch 8 --steps 1 --preview 0 --out {desk}/new'


def desk(folder):
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


ROWS = [
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
    ('finetune.py', f'{TUNE} --data {{desk}}/large', 'holds 3 x 16 x 16, and'),
    ('finetune.py', f'{TUNE} --data {{desk}}/nameless', 'has no labels, and'),
    ('finetune.py', TUNE.replace('run/0000002', 'none'), 'there is no checkpoint'),
    ('finetune.py', TUNE.replace('run/0000002', 'half'), 'is not a checkpoint, or is truncated'),
    ('finetune.py', TUNE.replace('run/0000002', 'ema'), 'holds EMA weights only'),
    ('finetune.py', TUNE.replace('run/0000002', 'future'), 'was written by a later version of this code'),
    ('finetune.py', f'{TUNE} --mask-ratio 0.5', 'unrecognized arguments: --mask-ratio 0.5'),
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
    err = capsys.readouterr().err
    sentence = err[err.index(f'{script}: error'):] if 'usage: ' in err else err          # argparse's
    assert stop.value.code == 2 and words in sentence and sentence.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before
