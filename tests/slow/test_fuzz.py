"""No accident ends in a traceback or a hang: files damaged and flags mistyped at random, by a seed.

    python -m pytest -m slow tests/slow/test_fuzz.py
    PYTHONPATH=tests python tests/slow/test_fuzz.py 1234      # case 1234 alone, with all that it prints

A case takes a folder with one of everything, may damage a file in it, and runs a command that reads it. It
may end well, or in one sentence and a non-zero status.
"""

import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback

import conftest
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import data
import finetune
import model
import mutual_info
import sample
import train

pytestmark = pytest.mark.slow
CASES, SECONDS = 300, 60                      # of all, and of patience with one

# ---------------------------------------------------------------------------------------------- what there is

def make_desk(folder):
    """One of everything that a command reads, in the current folder."""
    os.chdir(folder)
    data.make_shapes('images', size=8, count=120)
    data.make_shapes('large', size=16, count=60)
    rng = np.random.default_rng(0)
    rows = ((rng.standard_normal((8, 8, 8)), i % 3) for i in range(60))
    data.save_folder('moments', rows, 'float16', (8, 8, 8), {'kind': 'moments', 'classes': 3, 'scale': 0.2})
    for method, source in (('mcdit', 'images'), ('mdt', 'moments'), ('sddit', 'images')):
        flags = f'--method {method} --data {source} --out {method} --steps 2 --save-every 1'
        train.main(f'{TINY} --model T/4 {flags}'.split())
    finetune.main(f'mcdit/0000002.pt {TINY} --out tuned --steps 1'.split())
    for name in ('one/a', 'one/b', 'two/c'):
        pathlib.Path('tree', name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(9, 9, 3)).astype(np.uint8)).save(f'tree/{name}.png')
    Image.fromarray(rng.integers(256, size=(8, 8, 3)).astype(np.uint8)).save('photo.png')
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save('mask.png')
    pixels = rng.integers(256, size=(12, 8, 8, 3)).astype(np.uint8)
    np.savez('others.npz', arr_0=pixels, arr_1=np.zeros(12, np.int64))
    pathlib.Path('notes.txt').write_text('notes\n')


def files():
    return sorted(str(path) for path in pathlib.Path('.').rglob('*') if path.is_file())


# -------------------------------------------------------------------------------------------- what goes wrong

def cut(rng, path):
    """A copy that did not finish, most often near its beginning or its end."""
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 1, size // 2, max(size - 1, 0), rng.randrange(size + 1)]))


def zero(rng, path):
    """A block that the disk lost."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) + 1)
    content[start:start + 512] = bytes(len(content[start:start + 512]))
    path.write_bytes(content)


def flip(rng, path):
    """A bit that the disk or a cable turned."""
    content = bytearray(path.read_bytes() or b'0')
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def page(rng, path):
    """What a download saves when the server says no."""
    path.write_text('<!DOCTYPE html>\n<html>404: not found</html>\n')


def swap(rng, path):
    """Another file under this name."""
    shutil.copy(rng.choice(files()), f'{path}.other')
    os.replace(f'{path}.other', path)


def remove(rng, path):
    path.unlink()


def folder_instead(rng, path):
    path.unlink()
    path.mkdir()


def repeat(rng, path):
    """Lines or bytes written twice."""
    path.write_bytes(path.read_bytes() * 2)


def edit(rng, path):
    """A word replaced by hand, in files that are text."""
    try:
        words = path.read_text().split(' ')
    except UnicodeDecodeError:
        return
    words[rng.randrange(len(words))] = rng.choice(['', '0', '-1', '3.5', '"shapes"', 'null', '{}', '999'])
    path.write_text(' '.join(words))


DAMAGE = [cut, cut, zero, flip, flip, page, swap, swap, remove, folder_instead, repeat, edit, edit]

NUMBERS = ['0', '1', '2', '3', '-1', '0.5', '1e9', '', 'two', '1,5', '50%']
PLACES = ['images', 'moments', 'large', 'tree', 'mcdit', 'mcdit/0000002.pt', 'mdt/0000002.pt', 'nowhere', '',
          'tuned/0000001.pt', 'sddit/0000001.pt', 'photo.png', 'mask.png', 'others.npz', 'notes.txt', '.',
          'mask.png/x']
SOME = ['1', '2', '3', '0', '-1', 'x']
LOOP = {'--steps': SOME, '--batch': ['4', '8', '3', '0', '7.5'], '--accumulate': SOME, '--lr': NUMBERS,
        '--lr-decay': NUMBERS, '--precision': ['bf16', 'fp16', 'fp64'], '--seed': SOME,
        '--checkpoint-blocks': [], '--log-every': SOME, '--eval-every': SOME, '--save-every': SOME,
        '--keep-every': SOME, '--preview': ['1', '-1'], '--data': PLACES, '--out': PLACES}
COMMANDS = {                                  # script: main, what every command line has, flags
    'train.py': (train.main, [
        f'{TINY} --model T/4 --data images --out mcdit --steps 3',
        f'{TINY} --model T/4 --data moments --out mdt --method mdt --steps 2',
        f'{TINY} --model T/4 --data images --out new --steps 1'], LOOP | {
        '--method': [*model.METHODS, 'vae'], '--model': ['T/2', 'T/8', 'T', 'Q/2', 'T/3'], '--unlabelled': [],
        '--sigma-data': NUMBERS, '--mask-ratio': NUMBERS, '--bridge': ['xavier', 'no'], '--unmasked': NUMBERS,
        '--lambda-noise': NUMBERS, '--lambda-con1': NUMBERS, '--all-clean': [], '--tokens': ['noisy', 'x'],
        '--teacher-encoder': []}),
    'finetune.py': (finetune.main, [
        f'mcdit/0000002.pt {TINY} --out tuned --steps 2', f'mdt/0000002.pt {TINY} --out new --steps 1',
        f'sddit/0000002.pt {TINY} --out new --data images --steps 1'], LOOP),
    'sample.py': (sample.main, [
        'mcdit/0000002.pt -n 2 --steps 2', 'mdt/0000002.pt -n 2 --steps 2 --npz new.npz',
        'mcdit/0000002.pt -n 1 --steps 2 --inpaint photo.png --mask mask.png'], {
        '-n': SOME, '--steps': SOME, '--seed': SOME, '--class': ['0', '11', '-1'], '--cfg': NUMBERS,
        '--batch': SOME, '--inpaint': PLACES, '--mask': PLACES, '--fill-steps': NUMBERS, '--npz': PLACES,
        '--png': PLACES, '--out': PLACES, '--precision': ['bf16', 'fp64'], '--balanced': []}),
    'data.py': (data.main, [
        'folder tree --out new --size 8 --workers 1', 'import others.npz --out new --workers 1'], {
        '--size': ['9', '0', '-1', 'x'], '--out': PLACES, '--workers': SOME, '--scale': NUMBERS,
        '--vae': PLACES}),
    'mutual_info.py': (mutual_info.main, [
        'mcdit/0000002.pt --data images --images 100 --seeds 1 --masks 2 --sigmas 1 --out new'], {
        '--data': PLACES, '--images': ['20', *SOME], '--dims': ['1', '0', '99'], '--masks': SOME,
        '--mask-ratio': NUMBERS, '--sigmas': NUMBERS, '--out': PLACES}),
}


def command_line(rng):
    """(script, arguments): one that works, with up to two flags more and now and then another file first."""
    script = rng.choice(list(COMMANDS))
    _, lines, flags = COMMANDS[script]
    words = rng.choice(lines).split()
    if rng.random() < 0.2:
        at = next((i for i, word in enumerate(words) if '/' in word and not word.startswith('T/')), 0)
        words[at] = rng.choice(PLACES)
    for flag in rng.sample(list(flags), rng.randrange(3)):
        words += [flag, *([rng.choice(flags[flag])] if flags[flag] else [])]
    return script, words


# --------------------------------------------------------------------------------------------------- one case

def attempt(number, desk):
    """Run case `number` in a copy of the desk. Returns None, or the traceback it must not end in."""
    rng = random.Random(number)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(desk, folder, dirs_exist_ok=True)
        os.chdir(folder)
        script, words = command_line(rng)
        title = f'case {number}: {script} {" ".join(words)}'
        if rng.random() < 0.6:
            tops = tuple(word.split('/')[0] for word in words if word)
            near = [name for name in files() if name.startswith(tops)]
            path, harm = pathlib.Path(rng.choice(near or files())), rng.choice(DAMAGE)
            harm(rng, path)
            title += f' with {path}: {harm.__name__}'
        print(f'\n{title}', flush=True)
        signal.alarm(SECONDS)
        try:
            COMMANDS[script][0](words)
        except (model.BadInput, OSError) as error:                            # in `data.script` a sentence
            print(error)
        except SystemExit as stop:                                            # argparse
            assert stop.code, title
        except BaseException:
            return f'{title}\n{traceback.format_exc()}'
        finally:
            signal.alarm(0)
            os.chdir(desk)


def prepare():
    conftest.shrink(pytest.MonkeyPatch())
    torch.set_num_threads(1)


def work(first, last, results):
    """The cases from first up to last, in a process of its own, which a hang ends too."""
    prepare()
    with tempfile.TemporaryDirectory() as desk, open(os.devnull, 'w') as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
        make_desk(desk)
        for number in range(first, last):
            results.put((number, attempt(number, desk)))
    results.close()
    results.join_thread()


@pytest.mark.parametrize('first', range(0, CASES, 50))
def test_no_accident_ends_in_a_traceback(first):
    fork = multiprocessing.get_context('fork')
    results = fork.Queue()
    child = fork.Process(target=work, args=(first, first + 50, results))
    child.start()
    found = [results.get(timeout=4 * SECONDS) for _ in range(50)]
    child.join()
    failures = [failure for _, failure in found if failure]
    assert not failures, '\n'.join(failures)


if __name__ == '__main__':
    prepare()
    with tempfile.TemporaryDirectory() as desk:
        make_desk(desk)
        print(attempt(int(sys.argv[1]), desk) or 'it ended well, or in a sentence')
