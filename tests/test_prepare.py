"""Preparing data: pictures good and bad, kills, moments, CIFAR-10, CelebA, imports, hostile files."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train import torchrun
from test_vae import vae_file, weights  # noqa: F401

import data


def prepare(*argv):
    data.main([str(word) for word in argv])
    return data.Data(argv[argv.index('--out') + 1])


def refused(*argv):
    """The sentence with which a command line is refused."""
    with pytest.raises(data.BadInput) as refusal:
        data.main([str(word) for word in argv])
    assert '\n' not in str(refusal.value)
    return str(refusal.value)


def contents(folder):
    """{name: bytes} of everything under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def noise(rng, *shape):
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


# -------------------------------------------------------------------------------------------------- folder


@pytest.fixture
def tree(tmp_path):
    """Two classes of PNG, JPEG and WebP files, two of them broken, and one beside the class folders."""
    rng = np.random.default_rng(0)
    for name, count in (('cat', 5), ('dog', 4)):
        (tmp_path / 'src' / name / 'deeper').mkdir(parents=True)
        for i in range(count):
            place = tmp_path / 'src' / name / ('deeper' if i % 2 else '.')
            noise(rng, 40 + i, 70 - i, 3).save(place / f'{i}.{("png", "jpg", "webp")[i % 3]}')
    (tmp_path / 'src' / 'dog' / 'empty.png').write_bytes(b'')
    whole = (tmp_path / 'src' / 'cat' / 'deeper' / '1.jpg').read_bytes()
    (tmp_path / 'src' / 'cat' / 'half.jpg').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'src' / 'cat' / 'notes.txt').write_text('no picture')
    Image.new('RGB', (9, 9)).save(tmp_path / 'src' / 'stray.png')
    return tmp_path / 'src'


def test_folder(tree, tmp_path, capsys):
    out = tmp_path / 'made'
    dataset = prepare('folder', tree, '--out', out, '--size', 16, '--workers', 2)
    told = capsys.readouterr().out
    assert '9 pictures' in told and '3 skipped' in told and '1 picture skipped: not a picture' in told
    assert '1 file left out, by name no picture: .txt' in told
    assert 'mean of the channels: ' in told and 'standard deviation of the channels: 0.' in told
    assert 'pictures/s' in told
    for name in ('empty.png', 'half.jpg', 'stray.png'):
        assert f'{name}: ' in told and f'{name}\t' in (out / 'skipped.txt').read_text()
    assert dataset.array.shape == (9, 3, 16, 16) and dataset.class_names == ['cat', 'dog']
    assert json.loads((out / 'meta.json').read_text())['skipped'] == 3
    expected = {
        (data.read_picture(path, 16)[0].tobytes(), 'cat dog'.split().index(path.relative_to(tree).parts[0]))
        for path in tree.rglob('*.*')
        if path.name in ('0.png', '1.jpg', '2.webp', '3.png', '4.jpg')
    }
    assert {(row.tobytes(), label) for row, label in zip(dataset.array, dataset.labels)} == expected
    assert sorted(path.name for path in out.iterdir()) == [
        'data.npy', 'labels.npy', 'meta.json', 'preview.png', 'skipped.txt'
    ]
    assert not (tmp_path / 'made.partial').exists()


def test_folder_without_classes(tmp_path):
    (tmp_path / 'src' / 'empty').mkdir(parents=True)
    for i in range(3):
        Image.new('L', (20, 30), i).save(tmp_path / 'src' / f'{i}.png')
    dataset = prepare('folder', tmp_path / 'src', '--out', tmp_path / 'made', '--size', '8', '--workers', '1')
    assert dataset.classes == 0 and dataset.count == 3 and dataset.channels == 3


def test_rows_are_in_no_order_of_the_source(tmp_path):
    for k in range(2):
        (tmp_path / 'src' / str(k)).mkdir(parents=True)
        for i in range(100):
            Image.new('L', (1, 1), i).save(tmp_path / 'src' / str(k) / f'{i:03d}.png')
    dataset = prepare('folder', tmp_path / 'src', '--out', tmp_path / 'made', '--size', 1, '--workers', 1)
    assert 20 < np.sum(dataset.labels[:100]) < 80 and np.bincount(dataset.labels).tolist() == [100, 100]


def test_linked_class_folders_count_and_loops_end(tree, tmp_path):
    (tree.parent / 'linked').mkdir()
    for name in ('cat', 'dog'):
        (tree.parent / 'linked' / name).symlink_to(tree / name)
    (tree.parent / 'linked' / 'back').symlink_to(tree.parent / 'linked')
    (tree / 'cat' / 'loop').symlink_to(tree / 'cat')
    (tree / 'cat' / 'self.png').symlink_to('self.png')
    found, classes, _, _ = data.find_pictures(tree.parent / 'linked')
    assert classes == ['cat', 'dog']
    assert sorted(label for _, label in found) == [0] * 7 + [1] * 5
    dataset = prepare('folder', tree.parent / 'linked', '--out', tmp_path / 'made', '--size', 8)
    assert dataset.count == 9
    assert 'self.png\tdamaged or not to be read: Too many levels of symbolic links' in (
        tmp_path / 'made' / 'skipped.txt'
    ).read_text()


def test_a_class_without_pictures_keeps_its_number(tree, tmp_path, capsys):
    """ImageNet's numbers are those of the sorted folders; a folder with a dot is hidden and is no class."""
    for name in ('bird', 'cow', '.hidden'):
        (tree / name).mkdir()
    Image.new('RGB', (9, 9)).save(tree / '.hidden' / 'a.png')
    dataset = prepare('folder', tree, '--out', tmp_path / 'made', '--size', '8')
    assert dataset.class_names == ['bird', 'cat', 'cow', 'dog']
    assert np.bincount(dataset.labels).tolist() == [0, 5, 0, 4]
    told = capsys.readouterr().out
    assert 'class 0, bird, has no pictures' in told and 'class 2, cow, has no pictures' in told


def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = os.fsencode(tmp_path / 'src') + b'/caf\xe9'
    os.makedirs(folder)
    out = tmp_path / os.fsdecode(b'm\xe4de')
    for k in range(2):
        with open(folder + b'/\xff\x1b%d.png' % k, 'wb') as file:
            Image.new('RGB', (9, 9), (k, k, k)).save(file, 'PNG')
    with open(folder + b'/\xfe.png', 'wb') as file:
        file.write(b'broken')
    dataset = prepare('folder', tmp_path / 'src', '--out', out, '--size', '8')
    assert dataset.class_names == ['caf\\udce9'] and dataset.count == 2
    told = capsys.readouterr().out
    assert 'skipped caf\\udce9/\\udcfe.png: not a picture' in told
    told.encode(), (out / 'skipped.txt').read_text(encoding='utf-8')  # raise on what is no UTF-8
    assert data.printable('a\x1b[2J\n') == 'a\\x1b[2J\\n'


def test_a_folder_that_cannot_be_listed_is_told(tree, tmp_path, monkeypatch):
    """Else a class would vanish without a word. (Root may list everything, hence the patch.)"""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('dog'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert 'dog: Permission denied' in refused('folder', tree, '--out', tmp_path / 'made', '--size', 8)


# ---------------------------------------------------------------------------------------------- one picture


def test_center_crop_is_adms():
    """Box-halved while twice too large, bicubic to size, centre cut: said again for one picture."""
    image = noise(np.random.default_rng(1), 150, 90, 3)
    halved = image.resize((45, 75), Image.Resampling.BOX)
    scaled = halved.resize((32, round(75 * 32 / 45)), Image.Resampling.BICUBIC)
    top = (scaled.height - 32) // 2
    expected = np.asarray(scaled)[top : top + 32]
    assert np.array_equal(np.asarray(data.center_crop(image, 32)), expected)


def test_a_long_line_does_not_grow_huge(monkeypatch):
    """1 x 3,000 pixels, 64 high, would be 64 x 192,000; pictures up to 16 times as long stay as they are."""
    resize, areas = Image.Image.resize, []

    def watched(image, size, *args):
        areas.append(size[0] * size[1])
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, 'resize', watched)
    image = Image.new('RGB', (3000, 1))
    image.paste((200, 100, 50), (1490, 0, 1510, 1))
    assert data.center_crop(image, 64).getcolors() == [(64 * 64, (200, 100, 50))]
    assert data.center_crop(image.transpose(Image.Transpose.ROTATE_90), 8).getpixel((4, 4)) == (200, 100, 50)
    assert max(areas) == 16 * 64 * 64
    data.center_crop(Image.new('RGB', (160, 10)), 10)
    assert areas[-1] == 160 * 10


STORED = {  # how a camera that was held otherwise stores the upright picture: EXIF 2.32, tag 274
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize('orientation', STORED)
def test_pictures_are_upright(orientation, tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(tmp_path / 'a.png', exif=exif)
    picture, done = data.read_picture(tmp_path / 'a.png', 8)
    assert np.array_equal(picture.transpose(1, 2, 0), upright)
    assert done == ['turned upright as EXIF says'] * (orientation > 1)


def test_broken_exif_costs_no_picture(tmp_path):
    exif = b'Exif\0\0II*\0\xff\xff\xff\x7f' + b'\1' * 40
    Image.new('RGB', (9, 9), 'red').save(tmp_path / 'a.jpg', exif=exif)
    picture, done = data.read_picture(tmp_path / 'a.jpg', 8)
    assert picture[0].min() > 250 and done == []


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 128, 129, 40_000], [257, 513, 65_406, 65_535]] * 2, np.uint16)
    Image.fromarray(levels).save(tmp_path / 'a.png')
    picture, done = data.read_picture(tmp_path / 'a.png', 4)
    assert picture[1].tolist() == np.rint(levels / 257).astype(int).tolist()
    assert done == ['reduced from 16 bits to 8']


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, np.arange(16).reshape(4, 4) * 17
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    picture, done = data.read_picture(tmp_path / 'a.png', 4)
    alpha = pixels[..., 3] / 255
    expected = alpha * pixels[..., :3].transpose(2, 0, 1) + (1 - alpha) * 255
    assert np.abs(picture - expected).max() <= 1 and 'laid on white' in done[0]
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / 'b.png')  # an alpha channel that hides nothing is not told
    assert data.read_picture(tmp_path / 'b.png', 4)[1] == []
    palette = Image.new('P', (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    palette.save(tmp_path / 'c.png', transparency=1)
    picture, done = data.read_picture(tmp_path / 'c.png', 4)
    assert picture[:, 0, 0].tolist() == [255, 255, 255] and picture[:, 2, 2].tolist() == [10, 20, 30]
    assert 'laid on white' in done[0]


def test_other_pictures(tmp_path):
    """CMYK; an animation, of which the first frame is taken, whatever the file's name; one pixel; grey."""
    Image.new('CMYK', (32, 32), (0, 255, 255, 0)).save(tmp_path / 'a.jpg')
    picture, done = data.read_picture(tmp_path / 'a.jpg', 8)
    assert picture[0].min() > 250 and picture[1:].max() < 5 and done == ['turned from CMYK to RGB']
    frames = [Image.new('RGB', (9, 9), colour) for colour in ('red', 'lime')]
    frames[0].save(tmp_path / 'b.jpg', 'GIF', save_all=True, append_images=frames[1:])
    picture, done = data.read_picture(tmp_path / 'b.jpg', 8)
    assert picture[:, 0, 0].tolist() == [255, 0, 0] and done == ['of several frames: the first is taken']
    Image.new('RGB', (1, 1), (9, 8, 7)).save(tmp_path / 'c.png')
    picture, done = data.read_picture(tmp_path / 'c.png', 8)
    assert (picture == np.array([9, 8, 7])[:, None, None]).all() and 'smaller than 8 pixels' in done[0]
    Image.new('1', (9, 9), 1).save(tmp_path / 'd.png')
    assert (data.read_picture(tmp_path / 'd.png', 8)[0] == 255).all()


def test_what_is_no_picture_has_a_reason(tmp_path):
    Image.new('1', (12_000, 12_000)).save(tmp_path / 'bomb.png')
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'larger.png')
    whole = io.BytesIO()
    noise(np.random.default_rng(0), 40, 40, 3).save(whole, 'JPEG')
    (tmp_path / 'half.jpg').write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    noise(np.random.default_rng(0), 40, 40, 3).save(tmp_path / 'flipped.png')
    content = bytearray((tmp_path / 'flipped.png').read_bytes())
    content[len(content) // 2] ^= 255  # no pixel of what lies behind it can be read
    (tmp_path / 'flipped.png').write_bytes(content)
    (tmp_path / 'text.png').write_text('no picture')
    (tmp_path / 'script.png').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n')
    (tmp_path / 'empty.png').write_bytes(b'')
    reasons = {path.name: data.read_picture(path, 8) for path in tmp_path.iterdir()}
    reasons['nowhere.png'] = data.read_picture(tmp_path / 'nowhere.png', 8)
    assert reasons.pop('bomb.png') == 'a decompression bomb: 144,000,000 pixels'
    assert reasons.pop('larger.png').startswith('a decompression bomb: ')
    assert 'image file is truncated' in reasons.pop('half.jpg')
    assert 'damaged or not to be read' in reasons.pop('flipped.png')
    assert reasons.pop('nowhere.png') == 'damaged or not to be read: No such file or directory'
    assert all(reason.startswith('not a picture: ') for reason in reasons.values()) and len(reasons) == 3


# ----------------------------------------------------------------------------------------- kills, restarts


def free_port():
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]


def child(argv, environment):
    os.environ.update(environment)
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            data.main(argv)
        except data.BadInput as mistake:
            os.write(2, f'{mistake}\n'.encode())
            os._exit(2)
    os._exit(0)


def begin(argv, world):
    """Processes of one preparation, forked: torch is imported once for all of them."""
    port, made = free_port(), []
    for rank in range(world):
        environment = {'RANK': rank, 'WORLD_SIZE': world, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        environment = {name: str(value) for name, value in environment.items()}
        made.append(multiprocessing.get_context('fork').Process(target=child, args=(argv, environment)))
        made[-1].start()
    return made


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """13 chunks of small pictures in 3 classes, some of them broken, and what an uninterrupted run makes."""
    folder = tmp_path_factory.mktemp('many')
    rng = np.random.default_rng(0)
    for k in range(3):
        (folder / 'src' / str(k)).mkdir(parents=True)
        for i in range(1050):
            noise(rng, 3, 4, 3).save(folder / 'src' / str(k) / f'{i}.bmp')
        (folder / 'src' / str(k) / 'broken.png').write_bytes(b'broken')
    dataset = prepare('folder', folder / 'src', '--out', folder / 'whole', '--size', 4, '--workers', 1)
    assert dataset.count == 3150
    return folder


def kill_and_restart(argv, out, worlds, chunks, rng):
    """Kill all processes with SIGKILL at ten random moments, each seen by what has been written; `worlds` are
    the numbers of processes of the tries, in turn. How many chunks each left behind."""
    partial = pathlib.Path(f'{out}.partial')
    done = lambda: len(list((partial / 'chunks').glob('*.chunk')))
    files = [partial / 'data.npy', partial / 'labels.npy', partial / 'meta.json', out]
    seen = []
    for k, stage in enumerate(sorted(rng.sample(range(chunks + 1), 6)) + files):
        processes = begin(argv, worlds[k % len(worlds)])
        reached = (lambda: done() >= stage) if type(stage) is int else stage.exists
        while not reached():
            assert processes[0].is_alive(), 'it ended before it was killed'
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02 * (type(stage) is int))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        assert processes[0].exitcode == -signal.SIGKILL
        assert stage is out or not out.exists()
        seen.append(done())
    processes = begin(argv, worlds[-1])
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * worlds[-1]
    return seen


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing takes 10 ms more, and the last renaming 300, so that kills land in the middle of them."""
    for module, name, wait in ((os, 'fsync', 0.01), (os, 'rename', 0.3), (shutil, 'rmtree', 0.01)):
        quick = getattr(module, name)
        slow = lambda *args, quick=quick, wait=wait: (time.sleep(wait), quick(*args))
        monkeypatch.setattr(module, name, slow)


@pytest.mark.parametrize('worlds', [[1], pytest.param([2], marks=pytest.mark.slow), [3, 1, 2]], ids=str)
def test_ten_kills_change_no_byte(many, tmp_path, worlds, slow_disk):
    argv = ['folder', str(many / 'src'), '--out', str(tmp_path / 'out'), '--size', '4', '--workers', '1']
    seen = kill_and_restart(argv, tmp_path / 'out', worlds, 13, random.Random(0))
    assert len(set(seen[:6])) >= 4  # at different moments
    assert contents(tmp_path / 'out') == contents(many / 'whole')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_files_appear_whole(tmp_path, monkeypatch):
    """Under its name a file is there when all of it is on the disk, and not before; else nothing is."""
    did = []
    for name in ('fsync', 'replace'):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, true=true: (did.append(name), true(*args)))
    with data.whole_file(tmp_path / 'a') as file:
        file.write(b'half')
        file.flush()
        assert not (tmp_path / 'a').exists()
        file.write(b' more')
    assert did == ['fsync', 'replace'] and contents(tmp_path) == {'a': b'half more'}
    with pytest.raises(OSError), data.whole_file(tmp_path / 'a') as file:
        file.write(b'other')
        raise OSError(28, 'No space left on device')
    assert contents(tmp_path) == {'a': b'half more'}


def test_a_finished_folder_is_not_touched(many, tmp_path):
    shutil.copytree(many / 'whole', tmp_path / 'out')
    before = contents(tmp_path)
    assert 'exists already' in refused('folder', many / 'src', '--out', tmp_path / 'out', '--size', 4)
    assert contents(tmp_path) == before
    (tmp_path / 'out' / 'chunks').mkdir()  # of another program, that has its own meta.json too
    (tmp_path / 'out' / 'chunks' / 'mine.txt').write_text('precious')
    before = contents(tmp_path)
    assert 'exists already' in refused('folder', many / 'src', '--out', tmp_path / 'out', '--size', 4)
    assert contents(tmp_path) == before


def test_a_slash_after_the_folder_changes_nothing(tree, tmp_path, monkeypatch):
    """With it, OUT.partial would lie within OUT, which could then never get its name."""
    monkeypatch.chdir(tmp_path)
    assert prepare('folder', tree, '--out', 'made/', '--size', 8).count == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ['made', 'src']
    assert ' exists already' in refused('folder', tree, '--out', '', '--size', 8)


@pytest.fixture
def half_done(many, tmp_path, monkeypatch):
    """A preparation that stopped after 3 chunks."""
    whole_file = data.whole_file

    def stop(path):
        if path.name == '000003.chunk':
            raise KeyboardInterrupt
        return whole_file(path)

    monkeypatch.setattr(data, 'whole_file', stop)
    with pytest.raises(KeyboardInterrupt):
        data.main(['folder', str(many / 'src'), '--out', str(tmp_path / 'out'), '--size', '4'])
    monkeypatch.undo()
    assert len(list((tmp_path / 'out.partial' / 'chunks').glob('*.chunk'))) == 3
    return many, tmp_path


def test_a_restart_makes_only_what_is_missing(half_done, monkeypatch, capsys):
    many, tmp_path = half_done
    read, seen = data.read_picture, []
    monkeypatch.setattr(data, 'read_picture', lambda name, size: (seen.append(name), read(name, size))[1])
    monkeypatch.setattr(data, 'where_am_i',              # pixels are the same there
                        lambda gpu=False: (0, 1, torch.device('cuda')))
    prepare('folder', many / 'src', '--out', tmp_path / 'out', '--size', 4)
    assert len(seen) == len(set(seen)) == 3153 - 3 * data.CHUNK
    assert 'has 3 of 13 chunks' in capsys.readouterr().out
    assert contents(tmp_path / 'out') == contents(many / 'whole')


def test_a_restart_that_wants_something_else_is_refused(half_done):
    many, tmp_path = half_done
    before = contents(tmp_path)
    told = refused('folder', many / 'src', '--out', tmp_path / 'out', '--size', 8)
    assert 'source was folder, 4 pixels and is now folder, 8 pixels' in told and 'out.partial' in told
    shutil.copytree(many / 'src', tmp_path / 'src', copy_function=os.link)
    os.rename(tmp_path / 'src' / '1' / '7.bmp', tmp_path / 'src' / '1' / '7000.bmp')
    told = refused('folder', tmp_path / 'src', '--out', tmp_path / 'out', '--size', 4)
    assert 'listing was ' in told and 'pictures was' not in told
    shutil.rmtree(tmp_path / 'src')
    assert contents(tmp_path) == before


def test_two_programs_do_not_prepare_one_folder(half_done, monkeypatch):
    many, tmp_path = half_done
    told = []
    read = data.read_picture

    def meanwhile(name, size):
        if not told:
            told.append('')
            told.append(refused('folder', many / 'src', '--out', tmp_path / 'out', '--size', 4))
        return read(name, size)

    monkeypatch.setattr(data, 'read_picture', meanwhile)
    prepare('folder', many / 'src', '--out', tmp_path / 'out', '--size', 4, '--workers', 1)
    assert 'another program is preparing' in told[1]
    assert contents(tmp_path / 'out') == contents(many / 'whole')


@contextlib.contextmanager
def small_disk(most):
    """No file may grow beyond `most` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_loses_nothing(many, tmp_path):
    """Chunks fit, all together do not; 13 x 256 pictures of 48 bytes, the last chunk of 81."""
    argv = 'folder', many / 'src', '--out', tmp_path / 'out', '--size', 4
    with small_disk(100):
        told = refused(*argv)
    assert told.endswith('File too large; 0.2 MB were needed')
    with small_disk(1000):
        told = refused(*argv)
    assert 'File too large; 0.2 MB were needed; what is done is kept in' in told
    with small_disk(100_000):
        told = refused(*argv)
    assert 'File too large; 0.2 MB were needed; what is done is kept in' in told
    assert len(list((tmp_path / 'out.partial' / 'chunks').glob('*.chunk'))) == 13
    assert not list(tmp_path.rglob('*.tmp*'))
    prepare(*argv)
    assert contents(tmp_path / 'out') == contents(many / 'whole')


def test_what_cannot_fit_is_not_begun(many, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda place: shutil._ntuple_diskusage(9, 9, 100_000))
    argv = 'folder', many / 'src', '--out', tmp_path / 'out', '--size'
    assert f'needs {3153 * 3 * 64 / 1e6:.1f} MB and its disk has 0.1 MB free' in refused(*argv, 8)
    assert 'needs 15.4 MB and its disk has 0.1 MB free' in refused('shapes', '--out', tmp_path / 'shapes')
    monkeypatch.undo()
    prepare(*argv, 4)  # nothing of the other plan is left that would be in the way


def test_a_target_that_cannot_be_written(many, tmp_path):
    (tmp_path / 'file').write_text('')
    for out in (tmp_path / 'file' / 'out', '/proc/out'):
        told = refused('folder', many / 'src', '--out', out, '--size', 4)
        assert f'cannot write the data folder {out}: ' in told


def test_torchrun_shares_the_work(many, tmp_path):
    flags = '--out', tmp_path / 'out', '--size', 4, '--workers', 1
    done = torchrun(ROOT / 'data.py', 'folder', many / 'src', *flags)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'out') == contents(many / 'whole')
    assert 'pictures/s, 2 x 1 threads' in done.stdout and done.stdout.count('3,150 pictures of') == 1


def test_more_processes_than_gpus_are_refused_where_a_gpu_is_used(tree, tmp_path, monkeypatch):
    """Pixels need none: any number of processes may make them."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    argv = 'folder', tree, '--out', tmp_path / 'out', '--size', 8
    assert 'has no GPU, for there are 2: type --nproc' in refused(*argv, '--vae', 'vae.safetensors')
    assert prepare(*argv).count == 9


@pytest.mark.parametrize('spoil', ['out', 'source', 'full'])
def test_a_mistake_of_one_process_stops_all_in_a_sentence(spoil, many, tmp_path, monkeypatch, capfd):
    argv = ['folder', str(many / 'src'), '--out', str(tmp_path / 'out'), '--size', '4']
    whole_file = data.whole_file
    if spoil == 'out':
        (tmp_path / 'out').write_text('')
    elif spoil == 'source':
        argv[1] = str(tmp_path / 'nowhere')
    else:
        def full(path):
            if path.name == '000011.chunk':  # process 1's
                raise OSError(28, 'No space left on device')
            return whole_file(path)

        monkeypatch.setattr(data, 'whole_file', full)
    processes = begin(argv, 2)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [2, 2]
    told = capfd.readouterr().err
    assert 'another process has found a mistake' in told and 'Traceback' not in told
    words = {'out': 'exists already', 'source': 'no folder', 'full': 'No space left on device; '}
    assert words[spoil] in told


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / '.out.partial-mine').mkdir()                                  # a name of somebody else's
    argv = ['shapes', '--out', str(tmp_path / 'out'), '--size', '64']
    process, = begin(argv, 1)
    while not (rows := [path for path in tmp_path.glob('.out.partial-*/data.npy') if path.stat().st_size]):
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert rows[0].exists() and not (tmp_path / 'out').exists()
    assert prepare('shapes', '--out', tmp_path / 'out', '--n', 20).count == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.out.partial-mine', 'out']


@pytest.mark.slow
def test_an_interrupt_ends_in_a_sentence(many, tmp_path):
    command = [sys.executable, ROOT / 'data.py', 'folder', many / 'src', '--out', 'out', '--size', '256']
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob('out.partial/chunks/*.chunk')):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[1]
    assert process.returncode == 130 and 'data.py: interrupted' in told and 'Traceback' not in told


# ------------------------------------------------------------------------------------------------- moments


def test_folder_with_a_vae(tree, tmp_path, vae_file, capsys):  # noqa: F811
    """Moments of the encoder in float16, and the statistics of 20,000 latents drawn from them."""
    dataset = prepare('folder', tree, '--out', tmp_path / 'made', '--size', 16, '--vae', vae_file)
    pixels = prepare('folder', tree, '--out', tmp_path / 'pixels', '--size', 16)
    meta = json.loads((tmp_path / 'made' / 'meta.json').read_text())
    assert (dataset.kind, dataset.array.shape, dataset.array.dtype) == ('moments', (9, 8, 2, 2), np.float16)
    vae, sha256 = data.read_vae(vae_file)
    assert (meta['scale'], meta['vae'], meta['vae_sha256']) == (0.18215, str(vae_file), sha256)
    with torch.no_grad():
        x = torch.from_numpy(np.array(pixels.array)).double() / 127.5 - 1
        expected = vae.encode(x)
    assert np.allclose(dataset.array, expected, rtol=2e-3, atol=2e-3) and expected.std() > 0.1
    assert dataset.labels.tolist() == pixels.labels.tolist()
    raw, _ = dataset.rows(np.arange(9).repeat(20_000))
    drawn = dataset.to_input(raw, torch.randn(180_000, 4, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert np.allclose(meta['std'], drawn.std((0, 2, 3)), rtol=0.01)
    assert np.allclose(meta['mean'], drawn.mean((0, 2, 3)), atol=0.01 * max(meta['std']))
    told = capsys.readouterr().out
    assert 'mean of the channels: ' + ', '.join(f'{value:.3f}' for value in meta['mean']) in told
    assert ', '.join(f'{value:.3f}' for value in meta['std']) in told


def test_the_next_pictures_are_read_while_some_are_encoded(tmp_path):
    """Encoding waits here for a picture of the chunk after; and no more than that chunk is read ahead."""
    names = [(str(k), 0) for k in range(4 * data.CHUNK)]
    read, lead, going_on = [], [], threading.Condition()

    def read_one(name):
        with going_on:
            read.append(name)
            going_on.notify_all()
        return np.zeros((3, 8, 8), np.uint8), []

    def encode(pictures):
        encoded.append(len(pictures))
        ahead = min(sum(encoded[:-1]) // data.CHUNK * data.CHUNK + data.CHUNK, len(names) - 1)
        with going_on:
            assert going_on.wait_for(lambda: len(read) > ahead, timeout=20)
        lead.append(len(read) - sum(encoded))
        return np.zeros((len(pictures), 8, 1, 1), np.float16)

    encoded = []
    meta = {'kind': 'moments', 'classes': 0, 'scale': 1, 'source': 'test'}
    data.prepare(tmp_path / 'made', names, read_one, meta, 8, 2, encode)
    assert sum(encoded) == len(read) == len(names) and max(lead) <= 2 * data.CHUNK


def test_moments_are_begun_and_ended_on_one_kind_of_device(tmp_path, monkeypatch):
    """A GPU's differ from a CPU's in the last bits."""
    def encode(pictures):
        if list(tmp_path.rglob('*.chunk')):
            raise RuntimeError('stopped')
        return np.zeros((len(pictures), 8, 1, 1), np.float16)

    meta = {'kind': 'moments', 'classes': 0, 'scale': 1, 'source': 'test'}
    arguments = (tmp_path / 'made', [(str(k), 0) for k in range(2 * data.CHUNK)],
                 lambda name: (np.zeros((3, 8, 8), np.uint8), []), meta, 8, 1, encode)
    with pytest.raises(RuntimeError, match='stopped'):
        data.prepare(*arguments)
    monkeypatch.setattr(data, 'where_am_i', lambda gpu=False: (0, 1, torch.device('cuda')))
    with pytest.raises(data.BadInput, match='device was cpu and is now cuda'):
        data.prepare(*arguments)


def test_refusals_with_a_vae(tree, tmp_path, vae_file, monkeypatch):  # noqa: F811
    argv = 'folder', tree, '--out', tmp_path / 'made', '--vae'
    assert 'multiple of 8' in refused(*argv, vae_file, '--size', 12)
    assert 'there is no VAE' in refused(*argv, 'nowhere', '--size', 16)
    assert not (tmp_path / 'made.partial').exists()
    monkeypatch.setattr(data.VAE, 'encode', lambda self, x: torch.full((len(x), 8, 2, 2), 1e5))
    assert 'not finite in float16' in refused(*argv, vae_file, '--size', 16)


@pytest.mark.slow
@pytest.mark.parametrize('worlds', [[1], [2]], ids=str)
def test_ten_kills_change_no_byte_of_moments(worlds, many, tmp_path, vae_file, slow_disk):  # noqa: F811
    """5 chunks, encoded 4 pictures at a time: their floats depend on which meet in a batch."""
    argv = ['folder', str(many / 'src' / '0'), '--size', '8', '--vae', str(vae_file), '--out']
    data.main([*argv, str(tmp_path / 'whole')])
    kill_and_restart([*argv, str(tmp_path / 'out')], tmp_path / 'out', worlds, 5, random.Random(0))
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


@pytest.mark.parametrize('kind', ['images', 'moments', 'latents'])
def test_statistics_of_the_channels(kind, tmp_path):
    """Channel c of what the network sees has mean c / 10 and deviation (c + 1) / 10, by construction."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((250, 3, 4, 4))
    normal = (normal - normal.mean((0, 2, 3), keepdims=True)) / normal.std((0, 2, 3), keepdims=True)
    mean, std = np.arange(3) / 10, (np.arange(3) + 1) / 10
    x, dtype, tolerance = mean[:, None, None] + std[:, None, None] * normal, 'float32', 1e-6
    if kind == 'images':
        x, dtype, tolerance = np.rint((x + 1) * 127.5).clip(0, 255), 'uint8', 2e-3
    if kind == 'moments':  # of the variance, 0.36 is the mean's and 0.64 the samples' around it
        x, dtype, tolerance = mean[:, None, None] + 0.6 * std[:, None, None] * normal, 'float16', 2e-4
        logvar = np.broadcast_to(2 * np.log(0.8 * std / 0.25)[:, None, None], x.shape)
        x = np.concatenate([x / 0.25, logvar], 1)
    meta = {'kind': kind, 'classes': 0, 'scale': 0.25}
    meta = data.save_folder(tmp_path / 'made', ((row, 0) for row in x), dtype, x.shape[1:], meta)
    assert np.allclose(meta['mean'], mean, atol=tolerance) and np.allclose(meta['std'], std, atol=tolerance)
    if kind == 'images':  # and exactly, whatever the rounding to 256 levels did
        assert np.allclose(meta['mean'], (x / 127.5 - 1).mean((0, 2, 3)), atol=1e-12)
        assert np.allclose(meta['std'], (x / 127.5 - 1).std((0, 2, 3)), atol=1e-12)


# ------------------------------------------------------------------------------------------------ CIFAR-10


def cifar_pickle(pictures, labels, k, key=b'labels'):
    """A python batch, operation for operation as cPickle of Python 2 wrote the published ones: protocol 2, a
    dictionary of batch_label, labels, data (a numpy array) and filenames, every string a BINSTRING."""

    def string(text):
        short = len(text) < 256
        return (b'U' + bytes([len(text)]) if short else b'T' + struct.pack('<i', len(text))) + text

    def numbers(values):  # at most 1000 between a MARK and its APPENDS
        parts = [values[at : at + 1000] for at in range(0, len(values), 1000)]
        return b']q\x05' + b''.join(b'(' + b''.join(b'K' + bytes([v]) for v in part) + b'e' for part in parts)

    array = b'cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87R'
    array += b'q\x09(K\x01M' + struct.pack('<H', len(labels)) + b'M\x00\x0c\x86'
    array += b'cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b'
    array += b'(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89'
    names = b']q\x0c(' + b''.join(string(b'leptodactylus_s_%06d.png' % i) for i in range(len(labels))) + b'e'
    return (
        b'\x80\x02}q\x01(' + string(b'batch_label') + string(b'training batch %d of 5' % k)
        + string(key) + numbers(list(labels)) + string(b'data') + array + string(pictures.tobytes())
        + b'tb' + string(b'filenames') + names + b'u.'
    )


def test_the_pickles_are_pickles():
    """The control: what the tests write, a real unpickler of Python 2's pickles reads."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    loaded = pickle.loads(cifar_pickle(pictures, [7, 0, 9], 1), encoding='bytes')
    assert loaded[b'labels'] == [7, 0, 9] and np.array_equal(loaded[b'data'], pictures)
    assert list(loaded) == [b'batch_label', b'labels', b'data', b'filenames']


def cifar_files(version, n=300):
    """{member name: content} of a small archive, and its pictures and labels."""
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (6 * n, 3072), dtype=np.uint8), rng.integers(10, size=6 * n)
    folder, files = f'cifar-10-batches-{version}', {}
    for k in range(6):
        x, y = pictures[k * n : (k + 1) * n], labels[k * n : (k + 1) * n]
        name = 'test_batch' if k == 5 else f'data_batch_{k + 1}'
        if version == 'py':
            files[f'{folder}/{name}'] = cifar_pickle(x, y, k + 1)
        else:
            files[f'{folder}/{name}.bin'] = np.concatenate([y[:, None].astype(np.uint8), x], 1).tobytes()
    files[f'{folder}/readme.html'] = b'<meta HTTP-EQUIV="REFRESH" content="0; url=...">'
    return files, pictures[: 5 * n].reshape(-1, 3, 32, 32), labels[: 5 * n]


def tar_of(path, files, mode='w:gz'):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize('form', ['tar.gz', 'tar', 'unpacked', 'folder around'])
@pytest.mark.parametrize('version', ['py', 'bin'])
def test_cifar10(version, form, tmp_path, capsys):
    """The five training batches, every picture with its label, in no order; the test batch stays out."""
    files, pictures, labels = cifar_files(version)
    if 'tar' in form:
        source = tar_of(tmp_path / f'cifar.{form}', files, 'w:gz' if form == 'tar.gz' else 'w')
    else:
        for name, content in files.items():
            (tmp_path / 'src' / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / 'src' / name).write_bytes(content)
        source = tmp_path / 'src' / (f'cifar-10-batches-{version}' if form == 'unpacked' else '.')
    dataset = prepare('cifar10', source, '--out', tmp_path / 'made')
    assert dataset.class_names[3] == 'cat' and len(dataset.class_names) == 10 and dataset.kind == 'images'
    row_of = {row.tobytes(): label for row, label in zip(pictures, labels)}
    assert len(row_of) == dataset.count == 1500
    assert all(row_of[row.tobytes()] == label for row, label in zip(dataset.array, dataset.labels))
    assert not np.array_equal(dataset.labels, labels)
    assert ('is of no published archive' in capsys.readouterr().out) == ('tar' in form)


def spoil_cifar(what, tmp_path):
    """A bad archive of CIFAR-10, and words of the sentence that refuses it."""
    files, _, _ = cifar_files('bin' if 'bin' in what else 'py', n=20)
    source, first = tmp_path / 'bad.tar.gz', 'cifar-10-batches-py/data_batch_1'
    if what == 'missing':
        return tmp_path / 'nowhere', 'there is no'
    if what == 'no archive':
        source.write_bytes(b'x' * 5000)
        return source, 'no tar archive'
    if what == 'cut short':
        tar_of(source, files)
        source.write_bytes(source.read_bytes()[:-20_000])
        return source, 'cut short'
    if what == 'a batch less':
        del files[first]
        return tar_of(source, files), 'has no data_batch_1'
    if what == 'a batch of bin cut':
        files['cifar-10-batches-bin/data_batch_2.bin'] = files['cifar-10-batches-bin/data_batch_2.bin'][:-1]
        return tar_of(source, files), 'data_batch_2.bin has 61,459 bytes'
    if what == 'a label of bin too high':
        files['cifar-10-batches-bin/data_batch_2.bin'] = b'\x0a' + bytes(3072)
        return tar_of(source, files), 'labels from 10 to 10'
    if what == 'cifar-100':
        files[first] = cifar_pickle(np.zeros((2, 3072), np.uint8), [1, 2], 1, b'fine_labels')
        return tar_of(source, files), '0 labels and 6,144 bytes'
    if what == 'a pickle cut':
        files[first] = files[first][:-50_000]
        return tar_of(source, files), 'data_batch_1 is cut short or no pickle'
    if what == 'a pickle of operations':
        files[first] = b'0' * 3_000_000 + b'.'
        return tar_of(source, files), 'more than 1,000,000 operations'
    if what == 'a thousand members':
        return tar_of(source, {f'{k}': b'' for k in range(1000)} | files), 'one of more than 100'
    if what == 'a pickle that runs code':
        files[first] = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / 'canary') + b"'\ntR."
        return tar_of(source, files), '0 labels and 0 bytes'
    if what == 'a member up':
        return tar_of(source, {'../../data_batch_1': b''} | files), '../../data_batch_1 that points out of it'
    if what == 'an absolute member':
        return tar_of(source, {'/etc/data_batch_1': b''} | files), '/etc/data_batch_1 that points out of it'
    if what in ('a link', 'a device'):
        with tarfile.open(source, 'w:gz') as archive:
            member = tarfile.TarInfo(first)
            member.type = tarfile.SYMTYPE if what == 'a link' else tarfile.CHRTYPE
            member.linkname = '/etc/passwd'
            archive.addfile(member)
        return source, 'is a link or a device'
    if what == 'a large file':
        with open(source, 'wb') as file:
            file.truncate(10**10)
        return source, 'larger than CIFAR-10'
    member = tarfile.TarInfo(first if what == 'a bomb' else 'readme.html')
    member.size = 8 * 10**9 if what == 'a lying length' else 10**9
    if what == 'a bomb of headers':
        member.type = tarfile.XHDTYPE  # a header of its own, which tarfile would read into memory
    with open(tmp_path / 'raw', 'wb') as file:  # sparse: nothing but zeros follow
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + (300 if 'of headers' in what else 1) * 1_000_000)
    with open(tmp_path / 'raw', 'rb') as raw, open(source, 'wb') as file:
        with gzip.open(file, 'wb', 1) as packed:
            shutil.copyfileobj(raw, packed)
    os.remove(tmp_path / 'raw')
    return source, 'unpacks to more' if what == 'a bomb of headers' else 'bytes: this is not CIFAR-10'


CIFAR_SPOILS = [
    'missing', 'no archive', 'cut short', 'a batch less', 'a batch of bin cut', 'a label of bin too high',
    'cifar-100', 'a pickle cut', 'a pickle that runs code', 'a pickle of operations', 'a thousand members',
    'a member up', 'an absolute member', 'a link',
    'a device', 'a large file', 'a lying length', 'a bomb', 'a bomb of headers',
]


@pytest.mark.parametrize('what', CIFAR_SPOILS)
def test_a_bad_cifar_archive_is_refused(what, tmp_path):
    source, words = spoil_cifar(what, tmp_path)
    before = sorted(tmp_path.rglob('*'))
    assert words in refused('cifar10', source, '--out', tmp_path / 'made')
    assert sorted(tmp_path.rglob('*')) == before


# -------------------------------------------------------------------------------------------------- CelebA


@pytest.fixture
def celeba(tmp_path):
    """Twelve aligned pictures, of other formats than JPEG within so that pixels are exact, and the list."""
    rng = np.random.default_rng(0)
    (tmp_path / 'src' / 'img_align_celeba').mkdir(parents=True)
    lines = ['12', 'Bald Smiling Young']
    for k in range(1, 13):
        noise(rng, 218, 178, 3).save(tmp_path / 'src' / 'img_align_celeba' / f'{k:06d}.jpg', 'PNG')
        lines.append(f'{k:06d}.jpg -1 {1 if k % 3 else -1:2d}  1')
    (tmp_path / 'src' / 'list_attr_celeba.txt').write_text('\n'.join(lines) + '\n')
    return tmp_path / 'src'


def zip_of(path, folder, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for file in sorted(folder.rglob('*')):
            archive.write(file, file.relative_to(folder.parent))
    return path


@pytest.mark.parametrize('packed', [False, True])
def test_celeba(celeba, packed, tmp_path):
    """128 pixels around (89, 121): rows 57 to 184, columns 25 to 152, to half by a triangle filter."""
    source = celeba / 'img_align_celeba'
    if packed:
        source = zip_of(celeba / 'img_align_celeba.zip', source, zipfile.ZIP_DEFLATED)
    dataset = prepare('celeba', source, '--out', tmp_path / 'made')
    assert (dataset.classes, dataset.count, dataset.resolution) == (0, 12, 64)
    taps = np.zeros((64, 128))
    for i in range(64):  # the triangle is 4 pixels wide: 1/8, 3/8, 3/8, 1/8, less what lies outside
        for j, weight in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1)):
            if 0 <= j < 128:
                taps[i, j] = weight
    taps /= taps.sum(1, keepdims=True)
    rows = {row[0].tobytes(): row for row in dataset.array}
    for path in (celeba / 'img_align_celeba').iterdir():
        cut = np.asarray(Image.open(path)).astype(float)[57:185, 25:153]
        expected = taps @ cut.transpose(2, 0, 1) @ taps.T
        assert min(np.abs(row - expected).max() for row in rows.values()) < 1.5


def test_celeba_with_an_attribute_and_another_crop(celeba, tmp_path, capsys):
    Image.new('RGB', (178, 217)).save(celeba / 'img_align_celeba' / '000013.jpg')
    with open(celeba / 'list_attr_celeba.txt', 'a') as file:
        file.write('000013.jpg -1 1 1\n')
    flags = '--attribute', 'Smiling', '--crop', 20, 10, 208, '--size', 20
    dataset = prepare('celeba', celeba, '--out', tmp_path / 'made', *flags)
    assert dataset.class_names == ['not Smiling', 'Smiling']
    assert 'not aligned, 178 x 218: 178 x 217' in capsys.readouterr().out
    label_of = {row.tobytes(): label for row, label in zip(dataset.array, dataset.labels)}
    for k in range(1, 13):
        cut = np.asarray(Image.open(celeba / 'img_align_celeba' / f'{k:06d}.jpg'))[198:218, 0:20]
        assert label_of[cut.transpose(2, 0, 1).tobytes()] == (k % 3 > 0)


def test_bad_celeba_is_refused(celeba, tmp_path):
    flags = 'celeba', celeba, '--out', tmp_path / 'made'
    assert 'reaches out of the 178 x 218' in refused(*flags, '--crop', 128, 60, 121)
    assert 'reaches out of the 178 x 218' in refused(*flags, '--crop', 128, 89, 155)
    assert 'Blond is none of Bald, Smiling, Young' in refused(*flags, '--attribute', 'Blond')
    text = (celeba / 'list_attr_celeba.txt').read_text()
    (celeba / 'list_attr_celeba.txt').write_text(text.replace('000004.jpg -1', '000004.jpg 0'))
    assert 'cannot be read' in refused(*flags, '--attribute', 'Bald')
    (celeba / 'list_attr_celeba.txt').write_text(text.replace('000004.jpg', '000044.jpg'))
    assert 'lacks img_align_celeba/000004.jpg and 0 more' in refused(*flags, '--attribute', 'Bald')
    with open(celeba / 'list_attr_celeba.txt', 'ab') as file:
        file.truncate(10**9)
    assert 'is larger than' in refused(*flags, '--attribute', 'Bald')
    (celeba / 'list_attr_celeba.txt').unlink()
    assert 'needs list_attr_celeba.txt' in refused(*flags, '--attribute', 'Bald')
    assert 'there is no' in refused('celeba', tmp_path / 'nowhere', '--out', tmp_path / 'made')
    shutil.rmtree(celeba / 'img_align_celeba')
    assert 'holds no .jpg' in refused(*flags)


# -------------------------------------------------------------------------------------------------- import


def random_moments(n=40, seed=0):
    """(mean, log-variance) (n, 4, 8, 8), of which scaled samples deviate by about 0.9."""
    rng = np.random.default_rng(seed)
    return 4.8 * rng.standard_normal((n, 4, 8, 8)), rng.uniform(-9, 1, (n, 4, 8, 8))


def labels_of(n=40):
    return np.random.default_rng(7).integers(5, size=n)


def save_fast_dit(folder, rows, labels):
    for name, values in (('features', rows[:, None]), ('labels', labels[:, None])):
        (folder / f'imagenet256_{name}').mkdir(parents=True)
        for i, value in enumerate(values):
            np.save(folder / f'imagenet256_{name}' / f'{i}.npy', value)
    return folder


def save_edm(folder, rows, labels, suffix='npy'):
    """EDM's layout: 00000/img-mean-std-00000000.npy or 00000/img00000000.png, and dataset.json."""
    pairs = []
    for i, row in enumerate(rows):
        name = f'{i // 10:05d}/img{"-mean-std-" * (suffix == "npy")}{i:08d}.{suffix}'
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if suffix == 'npy':
            np.save(folder / name, row)
        else:
            Image.fromarray(row).save(folder / name)
        pairs.append([name, int(labels[i])] if labels is not None else None)
    (folder / 'dataset.json').write_text(json.dumps({'labels': pairs if labels is not None else None}))
    return folder


def zip_inside(path, folder, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for file in sorted(folder.rglob('*')):
            archive.write(file, file.relative_to(folder))
    return path


def same_rows(dataset, rows, labels):
    """Every row came over with its label, in an order of its own."""
    place = {row.tobytes(): i for i, row in enumerate(rows)}
    order = [place[row.tobytes()] for row in dataset.array]
    assert sorted(order) == list(range(len(rows))) != order
    assert np.array_equal(dataset.labels, np.zeros(len(rows)) if labels is None else labels[order])
    return True


def test_import_of_fast_dit(tmp_path, capsys):
    """Samples, already scaled, (1, 4, 32, 32) each, and a label each."""
    rows, labels = random_moments()[0].astype(np.float32) * 0.18215, labels_of()
    save_fast_dit(tmp_path / 'src', rows, labels)
    dataset = prepare('import', tmp_path / 'src', '--out', tmp_path / 'made')
    assert (dataset.kind, dataset.classes, dataset.array.dtype) == ('latents', 5, np.float32)
    assert dataset.scale == 0.18215
    assert same_rows(dataset, rows, labels)
    told = capsys.readouterr().out
    assert "fast-DiT's features, 40 rows of float32 (4, 8, 8)" in told
    assert 'layout sampled: 4 channels' in told


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('labelled', [False, True])
def test_import_of_means_and_deviations(packed, labelled, tmp_path, capsys):
    """REPA's and EDM2's: the deviation becomes a log-variance, once; one of 0 becomes a very small one."""
    mean, logvar = random_moments()
    labels = labels_of() if labelled else None
    std = np.exp(logvar / 2)
    std[3, 1, 2, 2] = 0
    rows = np.concatenate([mean, std], 1).astype(np.float32)
    source = save_edm(tmp_path / 'src', rows, labels)
    source = zip_inside(tmp_path / 'src.zip', source) if packed else source
    dataset = prepare('import', source, '--out', tmp_path / 'made')
    assert (dataset.kind, dataset.scale, dataset.classes) == ('moments', 0.18215, 5 if labelled else 0)
    place = {row[:4].astype(np.float16).tobytes(): i for i, row in enumerate(rows)}
    order = [place[row[:4].tobytes()] for row in dataset.array]
    found = dataset.array[:, 4:]
    assert sorted(order) == list(range(40))
    assert found[order.index(3), 1, 2, 2] < -30 and np.isfinite(found).all()
    logvar[3, 1, 2, 2] = found[order.index(3), 1, 2, 2]
    assert np.allclose(found, logvar[order], atol=6e-3)
    assert np.array_equal(dataset.labels, labels[order] if labelled else np.zeros(40))
    assert 'layout mean-std: channels 4 to 7 of 40 rows are never below 0' in capsys.readouterr().out


@pytest.mark.parametrize('form', ['npy', 'npz', 'fortran'])
def test_import_of_means_and_log_variances(form, tmp_path, capsys):
    rows, labels = np.concatenate(random_moments(), 1).astype(np.float16), labels_of()
    if form == 'npz':
        np.savez(tmp_path / 'src.npz', arr_0=rows, arr_1=labels)
    else:
        np.save(tmp_path / 'src.npy', np.asfortranarray(rows) if form == 'fortran' else rows)
    source = tmp_path / ('src.npz' if form == 'npz' else 'src.npy')
    dataset = prepare('import', source, '--out', tmp_path / 'made', '--scale', 0.13025)
    assert (dataset.kind, dataset.scale, dataset.channels) == ('moments', 0.13025, 4)
    assert same_rows(dataset, rows, labels if form == 'npz' else None)
    assert 'layout mean-logvar: channels 4 to 7 go down to -9, and' in capsys.readouterr().out


def test_import_of_samples_that_are_to_be_scaled(tmp_path, capsys):
    rows = random_moments()[0].astype(np.float32)
    np.savez(tmp_path / 'src.npz', latents=rows, arr_1=labels_of(), settings=np.array('{"seed": 0}'))
    dataset = prepare('import', tmp_path / 'src.npz', '--out', tmp_path / 'as it is')
    assert same_rows(dataset, rows, labels_of())
    assert 'and this by 4.79' in capsys.readouterr().out  # unscaled latents are noticed
    dataset = prepare('import', tmp_path / 'src.npz', '--out', tmp_path / 'made', '--scale', 0.25)
    assert same_rows(dataset, rows / 4, labels_of()) and dataset.scale == 0.25
    assert 'note: ' not in capsys.readouterr().out


def test_a_layout_can_be_asked_for(tmp_path, capsys):
    """8 channels of samples; deviations where a look at some would have said log-variances is refused."""
    rows = np.concatenate(random_moments(), 1).astype(np.float32)
    np.save(tmp_path / 'src.npy', rows)
    flags = 'import', tmp_path / 'src.npy', '--out', tmp_path / 'made', '--layout'
    assert 'has a deviation below 0: type --layout mean-logvar' in refused(*flags, 'mean-std')
    dataset = prepare(*flags, 'sampled')
    assert (dataset.kind, dataset.channels) == ('latents', 8) and same_rows(dataset, rows, None)
    assert 'layout sampled: as --layout says' in capsys.readouterr().out
    np.save(tmp_path / 'odd.npy', rows[:, :5])
    odd = 'import', tmp_path / 'odd.npy', '--out', tmp_path / 'odd'
    assert 'type --layout' in refused(*odd)
    assert 'an even number of channels, and there are 5' in refused(*odd, '--layout', 'mean-std')


def test_import_of_adms_pictures(tmp_path, capsys):
    pictures, labels = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8), labels_of()
    np.savez(tmp_path / 'src.npz', arr_0=pictures, arr_1=labels)
    dataset = prepare('import', tmp_path / 'src.npz', '--out', tmp_path / 'made')
    assert (dataset.kind, dataset.classes) == ('images', 5)
    assert same_rows(dataset, np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)), labels)
    assert 'layout pixels: uint8' in capsys.readouterr().out
    told = refused('import', tmp_path / 'src.npz', '--out', tmp_path / 'no', '--layout', 'sampled')
    assert 'for latents, and these are pictures' in told
    told = refused('import', tmp_path / 'src.npz', '--out', tmp_path / 'no', '--scale', 0.5)
    assert 'for latents, and these are pictures' in told


@pytest.mark.parametrize('packed', [False, True])
def test_import_of_edms_pictures(packed, tmp_path, capsys):
    """As they are; one of another size is no picture of this data set."""
    pictures, labels = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8), labels_of()
    source = save_edm(tmp_path / 'src', pictures, labels, 'png')
    Image.new('RGB', (7, 6)).save(source / '00002' / 'img00000020.png')
    source = zip_inside(tmp_path / 'src.zip', source) if packed else source
    dataset = prepare('import', source, '--out', tmp_path / 'made')
    assert (dataset.kind, dataset.classes) == ('images', 5)
    keep = np.arange(40) != 20
    assert same_rows(dataset, np.ascontiguousarray(pictures[keep].transpose(0, 3, 1, 2)), labels[keep])
    told = capsys.readouterr().out
    assert 'img00000020.png: not 6 x 6 like the first: 7 x 6' in told
    assert '40 pictures 6 x 6, 5 classes' in told
    for flags in (('--layout', 'sampled'), ('--scale', 0.5)):
        assert 'for latents' in refused('import', source, '--out', tmp_path / 'no', *flags)


def test_the_first_of_edms_pictures_must_be_square(tmp_path):
    source = save_edm(tmp_path / 'src', np.zeros((4, 6, 6, 3), np.uint8), None, 'png')
    first = source / '00000' / 'img00000000.png'
    for spoil in (lambda: Image.new('RGB', (6, 7)).save(first), lambda: first.write_bytes(b'x')):
        spoil()
        told = refused('import', source, '--out', tmp_path / 'made')
        assert told.endswith('its first picture cannot be read, or is not as high as wide')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['src']


def test_a_source_is_listed_once(celeba, tmp_path, monkeypatch):
    listed = []
    for name in ('files_under', 'open_zip'):
        true = getattr(data, name)
        monkeypatch.setattr(data, name, lambda path, true=true: (listed.append(path), true(path))[1])
    prepare('celeba', celeba, '--out', tmp_path / 'faces')
    source = str(zip_inside(tmp_path / 'edm.zip', save_edm(tmp_path / 'edm', np.zeros((4, 8, 1, 1)), None)))
    prepare('import', source, '--out', tmp_path / 'arrays')
    assert listed == [str(celeba), source]


# ------------------------------------------------------------------------------------------- hostile files


def header_of(shape, dtype='<f4', version=(1, 0)):
    text = repr({'descr': dtype, 'fortran_order': False, 'shape': shape}).encode() + b'\n'
    return b'\x93NUMPY' + bytes(version) + struct.pack('<H' if version == (1, 0) else '<I', len(text)) + text


def raw_zip(path, members, **changes):
    """A zip file written by hand: `members` are {name: (content, size it claims to unpack to)}."""
    body, directory = b'', b''
    for name, (content, size) in members.items():
        name, at = name.encode(), changes.get('at', len(body))
        common = struct.pack('<HHHHHIIIHH', 20, changes.get('flags', 0), changes.get('method', 0), 0, 0, 0,
                             len(content), size, len(name), 0)
        body += (b'PK\3\4' + common + name + content) * (not body or 'at' not in changes)
        directory += b'PK\1\2' + struct.pack('<H', 3 << 8 | 20) + common + struct.pack(
            '<HHHII', 0, 0, 0, changes.get('attributes', 0) << 16, at) + name
    end = struct.pack('<HHHHIIH', 0, 0, len(members), len(members), len(directory), len(body), 0)
    path.write_bytes(body + directory + b'PK\5\6' + end)
    return path


GOOD = header_of((2, 4, 1, 1)) + np.arange(8, dtype='<f4').tobytes()


def hostile(what, folder):
    """A file that lies, and words of the sentence that refuses it."""
    path = folder / ('bad.npy' if 'npy' in what else 'bad.npz' if 'npz' in what else 'bad.zip')
    if what == 'nowhere':
        return path, 'there is no'
    members = {'arr_0.npy': (GOOD, len(GOOD))}
    if what == 'a zip cut short':
        path.write_bytes(raw_zip(path, members).read_bytes()[:-30])
        return path, 'cut short or no zip'
    if what in ('npz up', 'zip up', 'npz absolute', 'zip absolute'):
        name = '../../arr_0.npy' if 'up' in what else '/tmp/arr_0.npy'
        return raw_zip(path, members | {name: (GOOD, len(GOOD))}), f'{name} that points out of it'
    if what in ('npz link', 'zip link'):
        return raw_zip(path, members, attributes=0o120777), 'is a link'
    if what == 'npz encrypted':
        return raw_zip(path, members, flags=1), 'is encrypted'
    if what == 'npz lying length':
        return raw_zip(path, {'arr_0.npy': (GOOD, 10**9)}), 'lies about its length'
    if what == 'npz overlapping':
        return raw_zip(path, {f'{k}.npy': (GOOD, len(GOOD)) for k in range(9)} | members, at=0), 'overlap'
    if what == 'npz bomb':
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('arr_0.npy', bytes(100_000_000))
        return path, 'would unpack to 100.0 MB: a bomb'
    if what == 'npz compressed':
        np.savez_compressed(path, arr_0=np.random.default_rng(0).random((4, 4, 2, 2)))
        return path, 'is compressed: type `python -m zipfile -e'
    if what == 'npz elsewhere':
        return raw_zip(path, members, at=3), 'no member where it says'
    contents = {
        'npy of objects': header_of((2, 4, 1, 1), '|O') + pickle.dumps([0]),
        'npy of text': header_of((2, 4, 1, 1), '<U3') + bytes(96),
        'npy too long': GOOD + b'more',
        'npy cut short': GOOD[:-1],
        'npy header cut short': GOOD[:30],
        'npy of terabytes': header_of((10**9, 4, 64, 64)) + GOOD,
        'npy of negative sizes': header_of((-2, -4, 1, 1)) + bytes(32),
        'npy with a long header': b'\x93NUMPY\2\0' + struct.pack('<I', 2**32 - 1) + bytes(1000),
        'npy with deep brackets': b'\x93NUMPY\1\0' + struct.pack('<H', 9000) + b'(' * 9000,
        'npy that calls': b'\x93NUMPY\1\0\x28\0' + b"__import__('os').system('touch hacked')\n",
        'npy empty': b'',
        'npy of a web page': b'<!DOCTYPE html>' + bytes(100),
        'npy with NaN': GOOD[:-4] + np.array([np.nan], '<f4').tobytes(),
        'npy of one': header_of((1, 4, 1, 1)) + bytes(16),
        'npy of 2 dimensions': header_of((2, 4)) + bytes(32),
        'npy not square': header_of((2, 4, 1, 2)) + bytes(64),
    }
    words = {'npy with NaN': 'row 1 holds numbers that are not finite',
             'npy not square': 'expected (C, h, h)', 'npy with a long header': 'its version is not 1.0',
             'npy of 2 dimensions': 'expected one array (N, C, h, h)', 'npy of one': 'holds 1 row: '}
    if what in contents:
        path.write_bytes(contents[what])
        return path, words.get(what, 'cut short or cannot be read')
    if what == 'npz of other things':
        np.savez(path, mu=np.zeros(3))
        return path, 'holds no arr_0 or latents'
    labels = {'npz with labels below 0': [-1, 0], 'npz with too few labels': [0],
              'npz with odd labels': [0.5, 1], 'npz with labels of NaN': [np.nan, 1],
              'npz with a label of a million': [0, 10**6]}
    if what in labels:
        np.savez(path, arr_0=np.zeros((2, 4, 1, 1)), arr_1=np.array(labels[what]))
        return path, 'holds labels'
    if what == 'folder of others':
        (folder / 'some').mkdir()
        np.save(folder / 'some' / 'a.npy', np.zeros(3))
        return folder / 'some', 'needs a dataset.json'
    if what == 'features with a label less':
        source = save_fast_dit(folder / 'some', np.zeros((5, 4, 1, 1)), np.zeros(5, int))
        os.remove(source / 'imagenet256_labels' / '3.npy')
        return source, 'imagenet256_labels lacks 3.npy'
    if what == 'features of two sizes':
        source = save_fast_dit(folder / 'some', np.zeros((5, 4, 1, 1)), np.zeros(5, int))
        np.save(source / 'imagenet256_features' / '3.npy', np.zeros((1, 4, 2, 2)))
        return source, 'all must be alike'
    if what == 'features of two types':  # as bytes, the others would wrap around
        source = save_fast_dit(folder / 'some', np.zeros((5, 4, 1, 1), np.uint8), np.zeros(5, int))
        np.save(source / 'imagenet256_features' / '3.npy', np.full((1, 4, 1, 1), 300.5))
        return source, 'all must be alike'
    source = save_edm(folder / 'some', np.zeros((3, 8, 1, 1)), [0, 1, 2])
    pairs = json.loads((source / 'dataset.json').read_text())['labels']
    texts = {
        'json of vectors': json.dumps({'labels': [[name, [0, 1]] for name, _ in pairs]}),
        'json that lacks one': json.dumps({'labels': pairs[1:]}),
        'json too long': json.dumps({'labels': pairs * 20}),
        'json of brackets': '[' * 1400,
        'json of a list': '[]',
        'json below 0': json.dumps({'labels': [[name, -1] for name, _ in pairs]}),
    }
    (source / 'dataset.json').write_text(texts[what])
    words = 'more than 1,600 bytes' if what == 'json too long' else 'needs a dataset.json with {"labels"'
    return zip_inside(folder / 'some.zip', source), words


HOSTILE = [
    'nowhere', 'a zip cut short', 'npz up', 'zip up', 'npz absolute', 'zip absolute', 'npz link', 'zip link',
    'npz encrypted', 'npz lying length', 'npz overlapping', 'npz bomb', 'npz compressed', 'npz elsewhere',
    'npy of objects', 'npy of text', 'npy too long', 'npy cut short', 'npy header cut short',
    'npy of terabytes', 'npy of negative sizes', 'npy with a long header', 'npy with deep brackets',
    'npy that calls', 'npy empty', 'npy of a web page', 'npy with NaN', 'npy of one', 'npy of 2 dimensions',
    'npy not square', 'npz of other things', 'npz with labels below 0', 'npz with too few labels',
    'npz with odd labels', 'npz with labels of NaN', 'npz with a label of a million',
    'folder of others', 'features with a label less', 'features of two sizes',
    'features of two types',
    'json of vectors', 'json that lacks one', 'json too long', 'json of brackets', 'json of a list',
    'json below 0',
]


@pytest.mark.parametrize('what', HOSTILE)
def test_hostile_files_are_refused(what, tmp_path):
    source, words = hostile(what, tmp_path)
    before = sorted(tmp_path.rglob('*'))
    assert words in refused('import', source, '--out', tmp_path / 'made')
    assert sorted(tmp_path.rglob('*')) == before


def refuse_all(folder):
    """Meets every hostile file; ends with 0 if they were refused within 600 MB more than it began with."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = peak()
    for make, spoils in ((spoil_cifar, CIFAR_SPOILS), (hostile, HOSTILE)):
        for k, what in enumerate(spoils):
            (folder / f'{make.__name__} {k}').mkdir()
            source, _ = make(what, folder / f'{make.__name__} {k}')
            refused('cifar10' if make is spoil_cifar else 'import', source, '--out', folder / 'made')
    os._exit(0 if peak() - before < 600_000 else 1)


def test_hostile_files_take_little_memory(tmp_path):
    """With what torch takes, 300 MB, that is less than 1 GB; the controls below ask for 1 GB and more."""
    process = multiprocessing.get_context('fork').Process(target=refuse_all, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_picture_in_a_zip_may_not_be_huge(tmp_path, monkeypatch, capsys):
    source = save_edm(tmp_path / 'src', np.zeros((4, 6, 6, 3), np.uint8), None, 'png')
    noise(np.random.default_rng(0), 6, 6, 3).save(source / '00000' / 'img00000002.png')
    monkeypatch.setattr(data, 'MAX_BYTES', 100)
    dataset = prepare('import', zip_inside(tmp_path / 'src.zip', source), '--out', tmp_path / 'made')
    assert dataset.count == 3 and dataset.classes == 0
    assert 'img00000002.png: too large for a picture: ' in capsys.readouterr().out
