"""Preparing data: images good and bad, kills and ranks, moments, CIFAR-10, CelebA, imports."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data


def prepare(*argv):
    data.main([str(word) for word in argv])
    return data.Data(argv[argv.index('--out') + 1])


def rejected(*argv):
    """The sentence with which a command line is rejected."""
    with pytest.raises(data.BadInput) as error:
        data.main([str(word) for word in argv])
    assert '\n' not in str(error.value)
    return str(error.value)


def contents(folder):
    """{name: bytes} of everything under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def noise(rng, *shape):
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def zip_of(path, folder, inside):
    with zipfile.ZipFile(path, 'w') as archive:
        for file in sorted(folder.rglob('*')):
            archive.write(file, file.relative_to(inside))
    return path


# -------------------------------------------------------------------------------------------------- folder

@pytest.fixture
def tree(tmp_path):
    """Two classes of PNG, JPEG and WebP files, two of them broken, and one beside the class folders."""
    rng, src = np.random.default_rng(0), tmp_path / 'src'
    for name, count in (('cat', 5), ('dog', 4)):
        (src / name / 'deeper').mkdir(parents=True)
        for i in range(count):
            place = src / name / ('deeper' if i % 2 else '.')
            noise(rng, 40 + i, 70 - i, 3).save(place / f'{i}.{("png", "jpg", "webp")[i % 3]}')
    (src / 'dog' / 'empty.png').write_bytes(b'')
    whole = (src / 'cat' / 'deeper' / '1.jpg').read_bytes()
    (src / 'cat' / 'half.jpg').write_bytes(whole[:len(whole) // 2])
    (src / 'cat' / 'notes.txt').write_text('no image')
    Image.new('RGB', (9, 9)).save(src / 'stray.png')
    return src


@pytest.mark.parametrize('packed', [False, True])
def test_folder(packed, tree, tmp_path, capsys):
    """Every readable image with its class, as `center_crop` makes it; the others are listed."""
    source, out = zip_of(tmp_path / 'src.zip', tree, tree) if packed else tree, tmp_path / 'made'
    dataset = prepare('folder', source, '--out', out, '--size', 16, '--workers', 2)
    printed = capsys.readouterr().out
    assert '9 images of 3 x 16 x 16, 2 classes, 3 skipped' in printed and "{'.txt': 1}" in printed
    assert 'mean of the channels: ' in printed and ' images/s with 2 threads' in printed
    for name in ('empty.png', 'half.jpg', 'stray.png'):
        assert f'{name}: ' in printed and f'{name}\t' in (out / 'skipped.txt').read_text()
    assert dataset.class_names == ['cat', 'dog'] and not (tmp_path / 'made.partial').exists()
    expected = {(data.read_image(path, 3, 16).tobytes(), int('dog' in path.parts))
                for path in tree.rglob('*.*') if path.name in ('0.png', '1.jpg', '2.webp', '3.png', '4.jpg')}
    assert {(row.tobytes(), label) for row, label in zip(dataset.array, dataset.labels)} == expected
    assert sorted(contents(out)) == ['data.npy', 'labels.npy', 'meta.json', 'preview.png', 'skipped.txt']


def test_classes_are_numbered_as_imagenet_s(tree, tmp_path, capsys):
    """By the sorted folders, linked ones too; an empty one keeps its number, a hidden one has none."""
    for name in ('bird', 'cow', '.hidden'):
        (tree / name).mkdir()
    Image.new('RGB', (9, 9)).save(tree / '.hidden' / 'a.png')
    (tree / 'emu').symlink_to(tree / 'cat')
    (tree / 'dog' / 'loop').symlink_to(tree / 'dog')
    dataset = prepare('folder', tree, '--out', tmp_path / 'made', '--size', 8)
    assert dataset.class_names == ['bird', 'cat', 'cow', 'dog', 'emu']
    assert np.bincount(dataset.labels).tolist() == [0, 5, 0, 4, 5]
    printed = capsys.readouterr().out
    assert 'class 0, bird, has no images' in printed and 'class 2, cow, has no images' in printed


def test_out_inside_the_source_and_macosx_are_no_classes(tree):
    """A second preparation, and one that was killed, must number the classes as the first did."""
    (tree / '__MACOSX').mkdir()
    Image.new('RGB', (9, 9)).save(tree / '__MACOSX' / '._a.png')
    dataset = prepare('folder', tree, '--out', tree / 'adata', '--size', 8)
    assert dataset.class_names == ['cat', 'dog'] and dataset.count == 9
    shutil.rmtree(tree / 'adata')
    (tree / 'adata.partial' / 'made').mkdir(parents=True)
    Image.new('RGB', (9, 9)).save(tree / 'adata.partial' / 'made' / 'preview.png')
    dataset = prepare('folder', tree, '--out', tree / 'adata', '--size', 8)
    assert dataset.class_names == ['cat', 'dog'] and dataset.count == 9


def test_rows_are_in_no_order_of_the_source(tmp_path):
    for k in range(2):
        (tmp_path / 'src' / str(k)).mkdir(parents=True)
        for i in range(100):
            Image.new('L', (1, 1), i).save(tmp_path / 'src' / str(k) / f'{i:03d}.png')
    dataset = prepare('folder', tmp_path / 'src', '--out', tmp_path / 'made', '--size', 1, '--workers', 1)
    assert 20 < np.sum(dataset.labels[:100]) < 80 and np.bincount(dataset.labels).tolist() == [100, 100]
    dataset = prepare('folder', tmp_path / 'src' / '0', '--out', tmp_path / 'one', '--size', 1)
    assert dataset.classes == 0 and dataset.count == 100                      # without folders no classes


def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = os.fsencode(tmp_path / 'src') + b'/caf\xe9'
    os.makedirs(folder)
    for k in range(3):
        with open(folder + b'/\xff%d.png' % k, 'wb') as file:
            Image.new('RGB', (9, 9), (k, k, k)).save(file, 'PNG') if k else file.write(b'broken')
    argv = ['folder', str(tmp_path / 'src'), '--out', str(tmp_path / 'made'), '--size', '8']
    data.script('data.py', lambda: data.main(argv))
    dataset = data.Data(tmp_path / 'made')
    assert dataset.class_names == ['caf\\udce9'] and dataset.count == 2
    skipped = (tmp_path / 'made' / 'skipped.txt').read_text(encoding='utf-8')
    assert skipped.startswith('caf\\udce9/\\udcff0.png\t')


def test_a_folder_that_cannot_be_listed_stops_the_run(tree, tmp_path, monkeypatch):
    """Otherwise a class would be lost without a word. (Root may list everything, hence the patch.)"""
    scandir = os.scandir

    def deny(path):
        if str(path).endswith('dog'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', deny)
    with pytest.raises(PermissionError, match='dog'):
        data.main(['folder', str(tree), '--out', str(tmp_path / 'made'), '--size', '8'])


def test_workers_are_the_cores_that_we_may_use(monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 128)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 5, 7, 9})
    assert data.parse(['folder', 'src', '--size', '8']).workers == 4
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert data.parse(['folder', 'src', '--size', '8']).workers == 2


# ----------------------------------------------------------------------------------------------- one image

def test_center_crop_is_adms():
    """Box-halved while twice too large, bicubic to size, centre cut: written again for one image."""
    image = noise(np.random.default_rng(1), 150, 90, 3)
    halved = image.resize((45, 75), Image.Resampling.BOX)
    scaled = halved.resize((32, round(75 * 32 / 45)), Image.Resampling.BICUBIC)
    top = (scaled.height - 32) // 2
    assert np.array_equal(data.center_crop(image, 32), np.asarray(scaled)[top:top + 32])
    with pytest.raises(data.BadInput, match='too long for a square: 3000 x 1'):
        data.center_crop(Image.new('RGB', (3000, 1)), 64)                     # else 192,000 x 64 pixels


STORED = {                                    # how a rotated camera stores the upright image: EXIF, tag 274
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: lambda x: np.rot90(x, -1)}


@pytest.mark.parametrize('orientation', STORED)
def test_images_are_upright(orientation, tmp_path):
    """In a data set and in inpainting alike: both read images with `load_image`."""
    upright = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(tmp_path / 'a.png', exif=exif)
    image, done = data.load_image(tmp_path / 'a.png')
    assert np.array_equal(image, upright) and done == ['rotated as EXIF says'] * (orientation > 1)
    assert np.array_equal(data.read_image(tmp_path / 'a.png', 3, 8), upright.transpose(2, 0, 1))


def test_transparency_is_composited_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, np.arange(16).reshape(4, 4) * 17
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    alpha = pixels[..., 3] / 255
    expected = alpha * pixels[..., :3].transpose(2, 0, 1) + (1 - alpha) * 255
    found = data.read_image(tmp_path / 'a.png', 3, 4)
    assert np.abs(found - expected).max() <= 1 and 'transparent' in data.load_image(tmp_path / 'a.png')[1][0]
    grey = data.read_image(tmp_path / 'a.png', 1, 4)
    assert grey.shape == (1, 4, 4) and np.abs(grey[0] - found.T.dot([0.299, 0.587, 0.114]).T).max() <= 1
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / 'b.png')                          # its alpha hides nothing
    assert data.load_image(tmp_path / 'b.png')[1] == []


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_other_images(tmp_path):
    """16 bits, scaled and not clipped; CMYK; an animation's first frame; broken EXIF; a palette; 1 bit."""
    levels = np.array([[0, 128, 129, 40_000], [257, 513, 65_406, 65_535]] * 2, np.uint16)
    Image.fromarray(levels).save(tmp_path / 'a.png')
    assert data.read_image(tmp_path / 'a.png', 3, 4)[1].tolist() == np.rint(levels / 257).astype(int).tolist()
    assert data.load_image(tmp_path / 'a.png')[1] == ['reduced from 16 bits to 8']
    Image.new('CMYK', (32, 32), (0, 255, 255, 0)).save(tmp_path / 'b.jpg')
    image = data.read_image(tmp_path / 'b.jpg', 3, 8)
    assert image[0].min() > 250 and image[1:].max() < 5
    frames = [Image.new('RGB', (9, 9), colour) for colour in ('red', 'lime')]
    frames[0].save(tmp_path / 'c.jpg', 'GIF', save_all=True, append_images=frames[1:])
    assert data.read_image(tmp_path / 'c.jpg', 3, 8)[:, 0, 0].tolist() == [255, 0, 0]
    assert data.load_image(tmp_path / 'c.jpg')[1] == ['had several frames: the first is used']
    exif = b'Exif\0\0II*\0\xff\xff\xff\x7f' + b'\1' * 40
    Image.new('RGB', (9, 9), 'red').save(tmp_path / 'd.jpg', exif=exif)
    assert data.read_image(tmp_path / 'd.jpg', 3, 8)[0].min() > 250
    palette = Image.new('P', (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    palette.save(tmp_path / 'e.png', transparency=1)
    image = data.read_image(tmp_path / 'e.png', 3, 4)
    assert image[:, 0, 0].tolist() == [255, 255, 255] and image[:, 2, 2].tolist() == [10, 20, 30]
    Image.new('1', (9, 9), 1).save(tmp_path / 'f.png')
    assert (data.read_image(tmp_path / 'f.png', 3, 8) == 255).all()


# --------------------------------------------------------------------------------- kills, restarts, ranks

def child(argv, rank, world):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    data.tqdm.set_lock(threading.RLock())     # forks share the default one, and a kill would keep it
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            data.main(argv)
        except data.BadInput as mistake:
            os.write(2, f'{mistake}\n'.encode())
            os._exit(2)
        except OSError as error:
            os.write(2, f'{error}\n'.encode())
            os._exit(3)
    os._exit(0)


def begin(argv, world):
    """Ranks of one preparation, forked: torch is imported once for all of them."""
    context = multiprocessing.get_context('fork')
    ranks = [context.Process(target=child, args=(argv, rank, world), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """9 chunks of small images in 3 classes, some of them broken, and what an uninterrupted run makes."""
    folder, rng = tmp_path_factory.mktemp('many'), np.random.default_rng(0)
    for k in range(3):
        (folder / 'src' / str(k)).mkdir(parents=True)
        for i in range(750):
            noise(rng, 3, 4, 3).save(folder / 'src' / str(k) / f'{i}.bmp')
        (folder / 'src' / str(k) / 'broken.png').write_bytes(b'broken')
    dataset = prepare('folder', folder / 'src', '--out', folder / 'whole', '--size', 4, '--workers', 1)
    assert dataset.count == 2250
    return folder


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing takes 20 ms more, renaming and removing 200, so that kills hit the middle of them."""
    for module, name, wait in ((os, 'fsync', 0.02), (os, 'rename', 0.2), (shutil, 'rmtree', 0.2)):
        quick = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, quick=quick, wait=wait, **keys: (
            time.sleep(wait), quick(*args, **keys))[1])


@pytest.mark.parametrize('worlds', [[3, 1, 2], *(pytest.param([n], marks=pytest.mark.slow) for n in (1, 2))])
def test_ten_kills_change_no_byte(worlds, many, tmp_path, slow_disk):
    """SIGKILL for all ranks at ten moments, each seen by what is written: during the chunks, the joining and
    the last renaming. The numbers of ranks take turns."""
    out, partial = tmp_path / 'out', tmp_path / 'out.partial'
    argv = ['folder', str(many / 'src'), '--out', str(out), '--size', '4', '--workers', '1']
    rng, seen = random.Random(0), []
    made, chunks = partial / 'made', lambda: len(list(partial.glob('0*.json')))
    joined = lambda: (made / 'data.npy').exists() and not (partial / '000004.rows').exists()
    stages = [lambda n=n: chunks() >= n for n in sorted(rng.sample(range(10), 6))]
    stages += [joined, (made / 'labels.npy').exists, (made / 'meta.json').exists, out.exists]
    for k, reached in enumerate(stages):
        ranks = begin(argv, worlds[k % len(worlds)])
        while not reached():
            assert ranks[0].is_alive(), 'it ended before it was killed'
            time.sleep(0.001)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        assert ranks[0].exitcode == -signal.SIGKILL and (k == 9 or not out.exists())
        seen.append(chunks())
    ranks = begin(argv, worlds[-1])
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * worlds[-1] and len(set(seen[:6])) >= 3
    assert contents(out) == contents(many / 'whole')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_a_failing_rank_ends_the_others(many, tmp_path, monkeypatch):
    """Rank 1's disk fails: it and rank 0, which waits for its chunks, end with its sentence. What is finished
    is left for the next start, in which this disk works again."""
    def fails(name):
        if os.environ.get('RANK') == '1' and 'src/2' in str(name):
            time.sleep(1)                     # rank 0 has made its chunks by then
            raise OSError(errno.EIO, 'Input/output error')
        return load_image(name)

    load_image = data.load_image
    monkeypatch.setattr(data, 'load_image', fails)
    argv = ['folder', str(many / 'src'), '--out', str(tmp_path / 'out'), '--size', '4', '--workers', '1']
    ranks = begin(argv, 2)
    for process in ranks:
        process.join(timeout=50)
    assert [process.exitcode for process in ranks] == [2, 3] and not (tmp_path / 'out').exists()
    assert 'Input/output error' in (tmp_path / 'out.partial' / 'failed').read_text()
    monkeypatch.undo()
    data.main(argv)
    assert contents(tmp_path / 'out') == contents(many / 'whole')


def test_an_io_error_stops_the_run_and_is_tried_again(tree, tmp_path, monkeypatch):
    """A file that is no image is skipped for good; one that the disk does not give may be good tomorrow."""
    true = Image.open

    def disk(file, **keys):
        if str(file).endswith('4.jpg'):
            raise OSError(errno.ESTALE, 'Stale file handle')
        return true(file, **keys)

    argv = 'folder', tree, '--out', tmp_path / 'made', '--size', 8
    monkeypatch.setattr(Image, 'open', disk)
    with pytest.raises(OSError, match='Stale file handle') as error:
        prepare(*argv)
    assert error.value.filename == 'cat/4.jpg' and not (tmp_path / 'made').exists()
    monkeypatch.undo()
    assert prepare(*argv).count == 9


@pytest.fixture
def half_done(many, tmp_path, monkeypatch):
    """A preparation that stopped after 3 chunks."""
    true = data.whole_file

    def stop(path):
        if path.name == '000003.rows':
            raise KeyboardInterrupt
        return true(path)

    monkeypatch.setattr(data, 'whole_file', stop)
    with pytest.raises(KeyboardInterrupt):
        data.main(['folder', str(many / 'src'), '--out', str(tmp_path / 'out'), '--size', '4'])
    monkeypatch.undo()
    assert len(list((tmp_path / 'out.partial').glob('0*.json'))) == 3
    return many, tmp_path


def test_a_restart_makes_only_what_is_missing(half_done, monkeypatch, capsys):
    """And joining the chunks shows how far it is, where there is no terminal too."""
    many, tmp_path = half_done
    true, seen = data.load_image, []
    monkeypatch.setattr(data, 'load_image', lambda name: (seen.append(name), true(name))[1])
    capsys.readouterr()
    prepare('folder', many / 'src', '--out', tmp_path / 'out', '--size', 4)
    assert len(seen) == len(set(seen)) == 2253 - 3 * data.CHUNK
    error = capsys.readouterr().err
    assert 'joining: 100%' in error and '9/9' in error and f'images: 100%|##########| {len(seen)}' in error
    assert contents(tmp_path / 'out') == contents(many / 'whole')
    before = contents(tmp_path)
    assert 'exists already' in rejected('folder', many / 'src', '--out', tmp_path / 'out/', '--size', 4)
    assert contents(tmp_path) == before


def test_a_restart_that_wants_something_else_is_rejected(half_done):
    many, tmp_path = half_done
    before = contents(tmp_path)
    words = rejected('folder', many / 'src', '--out', tmp_path / 'out', '--size', 8)
    assert 'source was folder, 4 pixels and is now folder, 8 pixels' in words and 'out.partial' in words
    shutil.copytree(many / 'src', tmp_path / 'src', copy_function=os.link)
    os.rename(tmp_path / 'src' / '1' / '7.bmp', tmp_path / 'src' / '1' / '7000.bmp')
    words = rejected('folder', tmp_path / 'src', '--out', tmp_path / 'out', '--size', 4)
    assert 'names was ' in words and 'images was' not in words
    shutil.rmtree(tmp_path / 'src')
    assert contents(tmp_path) == before


def test_two_programs_do_not_prepare_one_folder(half_done, monkeypatch):
    many, tmp_path = half_done
    argv, words, true = ('folder', many / 'src', '--out', tmp_path / 'out', '--size', 4), [], data.load_image

    def meanwhile(name):
        if not words:
            words.append('')
            words.append(rejected(*argv))
        return true(name)

    monkeypatch.setattr(data, 'load_image', meanwhile)
    prepare(*argv, '--workers', 1)
    assert 'another program is preparing' in words[1]
    assert contents(tmp_path / 'out') == contents(many / 'whole')


def test_a_disk_that_fills_loses_nothing(many, tmp_path, monkeypatch):
    """Chunks fit, all together do not: 256 and 2,250 images of 48 bytes. What cannot fit is not begun."""
    argv = 'folder', many / 'src', '--out', tmp_path / 'out', '--size'
    monkeypatch.setattr(shutil, 'disk_usage', lambda place: shutil._ntuple_diskusage(9, 9, 50_000))
    assert 'has 0.0 GB: make room' in rejected(*argv, 8) and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most, name, done in ((1000, 'rows', 0), (50_000, 'data.npy', 9)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            with pytest.raises(OSError, match='File too large') as error:
                prepare(*argv, 4)
            assert error.value.filename.endswith(name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(list((tmp_path / 'out.partial').glob('0*.json'))) == done
    prepare(*argv, 4)
    assert contents(tmp_path / 'out') == contents(many / 'whole')


@pytest.mark.slow
def test_torchrun_shares_the_work_and_ends_all_ranks(many, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
               data.__file__, 'folder', many / 'src', '--out', tmp_path / 'out', '--size', '4']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'out') == contents(many / 'whole')
    assert done.stdout.count('2,250 images of') == 1
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode and 'exists already' in done.stderr


# ------------------------------------------------------------------------------------------------- moments

class Stub:
    """An encoder whose moments are known: the means of 8 x 8 pixels, twice, then these less 5."""

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8)[:, [0, 1, 2, 0]]
        return torch.cat([mean, mean - 5], 1)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(data, 'read_vae', lambda path, device: (Stub(), f'hash of {path}'))


def test_moments_are_the_encoder_s_and_the_scale_is_the_users(stub, tree, tmp_path, capsys):
    """A VAE of an unknown hash gets a note, because SDXL's looks the same and has another scale."""
    argv = 'folder', tree, '--size', 16, '--out'
    pixels = prepare(*argv, tmp_path / 'pixels')
    capsys.readouterr()
    dataset = prepare(*argv, tmp_path / 'made', '--vae', 'sdxl.safetensors', '--scale', 0.13025)
    assert (dataset.kind, dataset.scale, dataset.channels) == ('moments', 0.13025, 4)
    assert dataset.vae == os.path.abspath('sdxl.safetensors')
    assert dataset.vae_sha256 == 'hash of sdxl.safetensors'
    expected = Stub().encode(torch.from_numpy(np.array(pixels.array)) / 127.5 - 1)
    assert np.allclose(dataset.array, expected, rtol=1e-3, atol=1e-3)
    assert dataset.labels.tolist() == pixels.labels.tolist()
    assert 'sdxl.safetensors is not sd-vae-ft-mse' in (printed := capsys.readouterr().out)
    assert 'is its scale 0.13025?' in printed and '--scale 0.13025' in printed
    assert 'multiple of 8' in rejected('folder', tree, '--size', 12, '--out', tmp_path / 'no', '--vae', 'a')


def test_a_known_vae_gets_no_note_and_may_move(stub, tree, tmp_path, capsys, monkeypatch):
    """Its hash is in the plan, its path is not; and moments are begun and ended on one kind of device."""
    monkeypatch.setattr(data, 'read_vae', lambda path, device: (Stub(), data.MSE_SHA256))
    argv = 'folder', tree, '--size', 16, '--out', tmp_path / 'made', '--vae'
    true = data.join
    monkeypatch.setattr(data, 'join', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(*argv, 'a')
    monkeypatch.setattr(data, 'join', true)
    monkeypatch.setattr(data, 'rank_world_device', lambda: (0, 1, torch.device('cuda')))
    assert 'device was cpu and is now cuda' in rejected(*argv, 'a')
    monkeypatch.setattr(data, 'rank_world_device', lambda: (0, 1, torch.device('cpu')))
    monkeypatch.setattr(data, 'read_vae', lambda path, device: (Stub(), 'another'))
    assert 'vae_sha256 was ' in rejected(*argv, 'a')
    monkeypatch.setattr(data, 'read_vae', lambda path, device: (Stub(), data.MSE_SHA256))
    assert prepare(*argv, 'b').vae == os.path.abspath('b') and 'is not sd-vae' not in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['images', 'moments', 'latents'])
def test_statistics_of_the_channels(kind, tmp_path):
    """By construction, channel c as the network sees it has mean c / 10, standard deviation (c + 1) / 10."""
    normal = np.random.default_rng(0).standard_normal((250, 3, 4, 4))
    normal = (normal - normal.mean((0, 2, 3), keepdims=True)) / normal.std((0, 2, 3), keepdims=True)
    mean, std = np.arange(3) / 10, (np.arange(3) + 1) / 10
    x, dtype, tolerance = mean[:, None, None] + std[:, None, None] * normal, 'float32', 1e-6
    if kind == 'images':
        x, dtype, tolerance = np.rint((x + 1) * 127.5).clip(0, 255), 'uint8', 2e-3
    if kind == 'moments':                     # of the variance, 0.36 is the means', 0.64 the samples'
        x, dtype, tolerance = mean[:, None, None] + 0.6 * std[:, None, None] * normal, 'float16', 2e-4
        logvar = np.broadcast_to(2 * np.log(0.8 * std / 0.25)[:, None, None], x.shape)
        x = np.concatenate([x / 0.25, logvar], 1)
    meta = {'kind': kind, 'classes': 0, 'scale': 0.25}
    meta = data.save_folder(tmp_path / 'made', ((row, 0) for row in x), dtype, x.shape[1:], meta)
    assert np.allclose(meta['mean'], mean, atol=tolerance) and np.allclose(meta['std'], std, atol=tolerance)


# -------------------------------------------------------------------------------------- CIFAR-10 and CelebA

def test_cifar10(tmp_path):
    """The five training batches of the binary archive, every image with its label, in no order."""
    records = np.random.default_rng(0).integers(0, 256, (300, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    source = tmp_path / 'cifar-10-binary.tar.gz'
    with tarfile.open(source, 'w:gz') as archive:
        for k in range(6):
            name = 'test_batch' if k == 5 else f'data_batch_{5 - k}'          # members need not be in order
            member, content = tarfile.TarInfo(f'cifar-10-batches-bin/{name}.bin'), records[50 * k:50 * k + 50]
            member.size = content.nbytes
            archive.addfile(member, io.BytesIO(content.tobytes()))
    dataset = prepare('cifar10', source, '--out', tmp_path / 'made')
    assert dataset.class_names[3] == 'cat' and len(dataset.class_names) == 10
    label_of = {record[1:].tobytes(): record[0] for record in records[:250]}
    assert len(label_of) == dataset.count == 250
    assert all(label_of[row.tobytes()] == label for row, label in zip(dataset.array, dataset.labels))
    assert not np.array_equal(dataset.labels, records[:250, 0])


@pytest.fixture
def celeba(tmp_path):
    """Twelve aligned images, PNG inside so that pixels are exact, and the list of attributes in Anno."""
    rng, src, lines = np.random.default_rng(0), tmp_path / 'src', ['12', 'Bald Smiling Young']
    (src / 'img_align_celeba').mkdir(parents=True)
    (src / 'Anno').mkdir()
    for k in range(1, 13):
        noise(rng, 218, 178, 3).save(src / 'img_align_celeba' / f'{k:06d}.jpg', 'PNG')
        lines.append(f'{k:06d}.jpg -1 {1 if k % 3 else -1:2d}  1')
    (src / 'Anno' / 'list_attr_celeba.txt').write_text('\n'.join(lines) + '\n')
    return src


@pytest.mark.parametrize('packed', [False, True])
def test_celeba(celeba, packed, tmp_path):
    """128 pixels around (89, 121), rows 57 to 184 and columns 25 to 152, to half by a triangle filter."""
    source = celeba / 'img_align_celeba'
    source = zip_of(celeba / 'img_align_celeba.zip', source, celeba) if packed else source
    dataset = prepare('celeba', source, '--out', tmp_path / 'made')
    assert (dataset.classes, dataset.count, dataset.resolution) == (0, 12, 64)
    taps = np.zeros((64, 130))                # 4 pixels wide: 1/8, 3/8, 3/8, 1/8, less what is outside
    for i in range(64):
        taps[i, 2 * i:2 * i + 4] = 1, 3, 3, 1
    taps = taps[:, 1:-1] / taps[:, 1:-1].sum(1, keepdims=True)
    for path in (celeba / 'img_align_celeba').iterdir():
        cut = np.asarray(Image.open(path)).astype(float)[57:185, 25:153]
        assert min(np.abs(row - taps @ cut.transpose(2, 0, 1) @ taps.T).max() for row in dataset.array) < 1.5


def test_celeba_with_an_attribute_and_another_crop(celeba, tmp_path, capsys):
    Image.new('RGB', (178, 217)).save(celeba / 'img_align_celeba' / '000012.jpg')
    flags = '--attribute', 'Smiling', '--crop', 20, 10, 208, '--size', 20
    dataset = prepare('celeba', celeba, '--out', tmp_path / 'made', *flags)
    assert dataset.class_names == ['not Smiling', 'Smiling'] and dataset.count == 11
    assert 'not aligned, 178 x 218: 178 x 217' in capsys.readouterr().out
    label_of = {row.tobytes(): label for row, label in zip(dataset.array, dataset.labels)}
    for k in range(1, 12):
        cut = np.asarray(Image.open(celeba / 'img_align_celeba' / f'{k:06d}.jpg'))[198:218, 0:20]
        assert label_of[cut.transpose(2, 0, 1).tobytes()] == (k % 3 > 0)


# -------------------------------------------------------------------------------------------------- import

@pytest.fixture
def moments40():
    """(mean, log-variance) (40, 4, 8, 8) and labels."""
    rng = np.random.default_rng(0)
    mean, logvar = 4.8 * rng.standard_normal((40, 4, 8, 8)), rng.uniform(-9, -1, (40, 4, 8, 8))
    return mean, logvar, rng.integers(5, size=40)


def save_edm(folder, rows, labels, suffix='npy'):
    """EDM's layout: 00000/img-mean-std-00000000.npy or 00000/img00000000.png, and dataset.json."""
    names = [f'{i // 10:05d}/img{"-mean-std-" * (suffix == "npy")}{i:08d}.{suffix}' for i in range(len(rows))]
    for name, row in zip(names, rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, row) if suffix == 'npy' else Image.fromarray(row).save(folder / name)
    pairs = None if labels is None else [[name, int(label)] for name, label in zip(names, labels)]
    (folder / 'dataset.json').write_text(json.dumps({'labels': pairs}))
    return folder


def same_rows(dataset, rows, labels):
    """Every row has come with its label, in an order of its own."""
    place = {np.ascontiguousarray(row).tobytes(): i for i, row in enumerate(rows)}
    order = [place[row.tobytes()] for row in dataset.array]
    return sorted(order) == list(range(len(rows))) != order and np.array_equal(dataset.labels, labels[order])


def save_fast_dit(folder, rows, labels):
    for name, values in (('features', rows[:, None]), ('labels', labels[:, None])):
        (folder / f'imagenet256_{name}').mkdir(parents=True)
        for i, value in enumerate(values):
            np.save(folder / f'imagenet256_{name}' / f'{i}.npy', value)
    return folder


def test_import_of_fast_dit(moments40, tmp_path, capsys):
    """Samples, already scaled, (1, 4, 32, 32) each, and a label each."""
    rows, labels = moments40[0].astype(np.float32), moments40[2]
    argv = 'import', save_fast_dit(tmp_path / 'src', rows, labels), '--out'
    dataset = prepare(*argv, tmp_path / 'made')
    assert (dataset.kind, dataset.classes) == ('latents', labels.max() + 1)
    assert same_rows(dataset, rows, labels)
    printed = capsys.readouterr().out
    assert 'note: scaled latents usually have 0.5 to 1.2' in printed          # and these have 4.8
    assert "fast-DiT's features, 40 rows of float32 4 x 8 x 8: latents" in printed
    dataset = prepare(*argv, tmp_path / 'scaled', '--scale', 0.25)
    assert same_rows(dataset, rows / 4, labels) and dataset.scale == 0.25


def test_an_import_resumes_and_skips_what_is_damaged(moments40, tmp_path, monkeypatch, capsys):
    """With chunks of 8: stopped after one of them, it reads the others alone."""
    rows, labels = moments40[0].astype(np.float32), moments40[2]
    rows[5, 0, 0, 0] = np.nan
    source = save_fast_dit(tmp_path / 'src', rows, labels)
    np.save(source / 'imagenet256_features' / '7.npy', np.zeros((1, 4, 2, 2), np.float32))
    (source / 'imagenet256_labels' / '9.npy').unlink()
    monkeypatch.setattr(data, 'CHUNK', 8)
    true_file, true_attempt, seen = data.whole_file, data.attempt, []
    argv = 'import', source, '--out', tmp_path / 'made', '--workers', 1

    def stop(path):
        if path.name == '000001.rows':
            raise KeyboardInterrupt
        return true_file(path)

    monkeypatch.setattr(data, 'whole_file', stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(*argv)
    monkeypatch.setattr(data, 'whole_file', true_file)
    monkeypatch.setattr(data, 'attempt', lambda read, item: (seen.append(item), true_attempt(read, item))[1])
    dataset = prepare(*argv)
    keep = [i for i in range(40) if i not in (5, 7, 9)]
    looks = len(range(0, 40, 3))              # at some rows, to find out what they are
    assert len(seen) == looks + 32 and same_rows(dataset, rows[keep], labels[keep])
    printed = capsys.readouterr().out
    for words in ('5.npy: cannot be read: numbers are not finite',
                  '7.npy: cannot be read: float32 (4, 2, 2) is not', '9.npy: cannot be read: No such file'):
        assert words in printed


@pytest.mark.parametrize('packed', [False, True])
def test_import_of_means_and_standard_deviations(packed, moments40, tmp_path, capsys):
    """EDM2's and REPA's: the standard deviation becomes a log-variance; one of 0 becomes a very small one."""
    mean, logvar, labels = moments40
    std = np.exp(logvar / 2)
    std[3, 1, 2, 2] = 0
    rows = np.concatenate([mean, std], 1).astype(np.float32)
    source = save_edm(tmp_path / 'src', rows, labels)
    source = zip_of(tmp_path / 'src.zip', source, source) if packed else source
    dataset = prepare('import', source, '--out', tmp_path / 'made')
    assert (dataset.kind, dataset.scale, dataset.classes) == ('moments', 0.18215, labels.max() + 1)
    place = {row[:4].astype(np.float16).tobytes(): i for i, row in enumerate(rows)}
    order = [place[row[:4].tobytes()] for row in dataset.array]
    found = dataset.array[:, 4:].astype(float)
    assert sorted(order) == list(range(40)) and found[order.index(3), 1, 2, 2] < -30
    logvar[3, 1, 2, 2] = found[order.index(3), 1, 2, 2]
    assert np.allclose(found, logvar[order], atol=6e-3) and np.array_equal(dataset.labels, labels[order])
    assert 'moments, mean and standard deviation' in capsys.readouterr().out


def test_import_of_npz(moments40, tmp_path, capsys):
    """ADM's images, with labels or without; and means with log-variances, which are known by their sign."""
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / 'a.npz', arr_0=images)
    dataset = prepare('import', tmp_path / 'a.npz', '--out', tmp_path / 'made a')
    assert (dataset.kind, dataset.classes) == ('images', 0)
    assert same_rows(dataset, images.transpose(0, 3, 1, 2), np.zeros(40))
    words = rejected('import', tmp_path / 'a.npz', '--out', tmp_path / 'b', '--scale', 1)
    assert '--scale is for latents' in words
    rows, labels = np.concatenate(moments40[:2], 1).astype(np.float16), moments40[2]
    np.savez(tmp_path / 'c.npz', arr_0=rows, arr_1=labels)
    dataset = prepare('import', tmp_path / 'c.npz', '--out', tmp_path / 'made c')
    assert dataset.kind == 'moments' and same_rows(dataset, rows, labels)


@pytest.mark.parametrize('packed', [False, True])
def test_import_of_edms_images(packed, tmp_path, capsys):
    """As they are; one of another size is skipped; null as labels means no classes."""
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    labels = None if packed else np.arange(40) % 5
    source = save_edm(tmp_path / 'src', images, labels, 'png')
    Image.new('RGB', (7, 7)).save(source / '00002' / 'img00000020.png')
    source = zip_of(tmp_path / 'src.zip', source, source) if packed else source
    (tmp_path / 'src' / 'made.partial' / 'made').mkdir(parents=True)          # as a killed run left it
    Image.new('RGB', (7, 7)).save(tmp_path / 'src' / 'made.partial' / 'made' / 'preview.png')
    dataset = prepare('import', source, '--out', tmp_path / 'src' / 'made')
    keep = np.arange(40) != 20
    assert (dataset.kind, dataset.classes) == ('images', 0 if packed else 5)
    assert same_rows(dataset, images[keep].transpose(0, 3, 1, 2), np.zeros(39) if packed else labels[keep])
    assert 'img00000020.png: cannot be read: uint8 (3, 7, 7) is not' in capsys.readouterr().out
