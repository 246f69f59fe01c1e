"""Every command that README.md and the docstrings print runs, shortened to two steps of a tiny network."""

import pathlib
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_prepare import cifar_files, noise, random_moments, save_fast_dit, tar_of, zip_of
from test_published import official
from test_vae import write_safetensors

import data
import finetune
import model
import sample
import train

SHORT = {
    'train': ['--model', 'T/4', '--steps', '2', '--batch', '4', '--preview', '2'],
    'finetune': ['--steps', '2', '--batch', '2', '--preview', '0'],
    'sample': ['--steps', '2', '-n', '2'],
    'data': [],
}
MAIN = {'train': train.main, 'finetune': finetune.main, 'sample': sample.main, 'data': data.main}


def commands(text):
    """(script, arguments) of every command for our scripts in a text: after `torchrun ...` or `python`."""
    text = text.replace('\\\n', ' ')
    for line in text.splitlines():
        for part in line.split('&&'):
            found = re.match(r'\s*(?:python|torchrun [-\w ]*?) ?(train|finetune|sample|data)\.py(.*)', part)
            if found:
                yield found[1], shlex.split(found[2], comments=True)


README = list(
    commands('\n'.join(re.findall(r'^```\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S)))
)
DOCSTRINGS = [command for module in (train, finetune, sample, data) for command in commands(module.__doc__)]


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with everything that the commands name."""
    desk = tmp_path_factory.mktemp('desk')
    rng = np.random.default_rng(0)
    for name, size, channels, classes, kind in (
        ('imagenet256', 8, 8, 1000, 'moments'),
        ('flowers', 16, 4, 5, 'latents'),
    ):
        rows = ((rng.standard_normal((channels, size, size)), int(rng.integers(classes))) for _ in range(8))
        data.save_folder(
            desk / name, rows, 'float16', (channels, size, size), {'kind': kind, 'classes': classes}
        )
    data.make_shapes(desk / 'shapes', size=8, count=60)
    (desk / 'pictures' / 'one').mkdir(parents=True)
    for k in range(4):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(
            desk / 'pictures' / 'one' / f'{k}.png'
        )
    (desk / 'imagenet').mkdir()
    (desk / 'imagenet' / 'train').symlink_to(desk / 'pictures')
    tar_of(desk / 'cifar-10-python.tar.gz', cifar_files('py', 9)[0])
    save_fast_dit(desk / 'fast-DiT' / 'features', random_moments()[0], np.zeros(40, int))
    (desk / 'celeba').mkdir()
    for k in range(2):
        noise(rng, 218, 178, 3).save(desk / 'celeba' / f'{k}.jpg')
    zip_of(desk / 'img_align_celeba.zip', desk / 'celeba')
    (desk / 'list_attr_celeba.txt').write_text('2\nSmiling\n0.jpg 1\n1.jpg -1\n')
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(desk / 'photo.png')
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(desk / 'mask.png')
    torch.save(official('dit', 'S', g=8), desk / 'DiT-XL-2-256x256.pt')
    write_safetensors(desk / 'vae.safetensors', data.VAE().state_dict())
    made = train.main([*SHORT['train'], '--data', str(desk / 'shapes'), '--out', str(desk / 'made')])
    for name in {
        word for _, words in README + DOCSTRINGS for word in words if re.fullmatch(r'\w+/\d{7}\.pt', word)
    }:
        (desk / name).parent.mkdir(exist_ok=True)
        (desk / name).write_bytes(made.read_bytes())
    return desk


@pytest.mark.parametrize(
    'script, arguments',
    [command for k, command in enumerate(README + DOCSTRINGS) if command not in (README + DOCSTRINGS)[:k]],
    ids=lambda part: part if isinstance(part, str) else ' '.join(part),
)
def test_command(script, arguments, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for entry in desk.iterdir():  # a desk of its own, for what it writes
        pathlib.Path(entry.name).symlink_to(entry)
    arguments = [word.replace('~', '.') for word in arguments] + SHORT[script]
    arguments += ['--size', '8'] * (script == 'data' and '--vae' in arguments)
    arguments += ['--out', 'new.png' if script == 'sample' else 'new'] + ['--npz', 'new.npz'] * (
        '--npz' in arguments
    )
    MAIN[script](arguments)
    assert list(tmp_path.glob('new*'))


def test_there_are_commands():
    assert {script for script, _ in README} == {script for script, _ in DOCSTRINGS} == set(MAIN)
    assert all(script in MAIN for script, _ in README + DOCSTRINGS) and len(README) >= 10


def test_the_table_of_methods_is_the_programs():
    text = (ROOT / 'README.md').read_text()
    for method, row in model.METHODS.items():
        (line,) = re.findall(rf'^\| `{method}` \| .*', text, re.M)[:1]
        assert f'| {row["defaults"]["mask_ratio"]:g} |' in line
