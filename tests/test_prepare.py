"""Preparing data: images good and bad, kills and ranks, moments, CIFAR-10, CelebA, imports."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
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


def test_folder(tree, tmp_path, capsys):
    """Every readable image with its class, as `center_crop` makes it, zipped or not; others are listed."""
    for source in (tree, zip_of(tmp_path / 'src.zip', tree, tree)):
        out = tmp_path / f'made {source.name}'
        dataset = prepare('folder', source, '--out', out, '--size', 16, '--workers', 2)
        printed = capsys.readouterr().out
        assert '9 images of 3 x 16 x 16, 2 classes' in printed
        assert "'.txt': 1" in printed and "'.png': 1" in printed
        for name in ('empty.png', 'half.jpg'):
            assert f'{name}: ' in printed and f'{name}\t' in (out / 'skipped.txt').read_text()
        good = [path for path in tree.rglob('*.*') if path.name[0] in '01234']
        expected = {(data.read_image(path, 3, 16).tobytes(), int('dog' in path.parts)) for path in good}
        assert {(row.tobytes(), label) for row, label in zip(dataset.array, dataset.labels)} == expected
        assert sorted(contents(out)) == ['data.npy', 'labels.npy', 'meta.json', 'preview.png', 'skipped.txt']
        assert not out.with_name(f'{out.name}.partial').exists()


def test_too_few_readable_images_leave_nothing(tmp_path):
    (tmp_path / 'src').mkdir()
    for k in range(2):
        (tmp_path / 'src' / f'{k}.png').write_bytes(b'broken')
    words = rejected('folder', tmp_path / 'src', '--out', tmp_path / 'made', '--size', 8)
    assert '0 images could be read and 2 could not' in words and len(list(tmp_path.iterdir())) == 1


def test_classes_are_numbered_as_imagenet_s(tree, tmp_path):
    """By the sorted folders, linked ones too; an empty one keeps its number, a hidden one has none."""
    for name in ('bird', '.hidden'):
        (tree / name).mkdir()
    Image.new('RGB', (9, 9)).save(tree / '.hidden' / 'a.png')
    (tree / 'emu').symlink_to(tree / 'cat')
    dataset = prepare('folder', tree, '--out', tmp_path / 'made', '--size', 8)
    assert dataset.class_names == ['bird', 'cat', 'dog', 'emu']
    assert np.bincount(dataset.labels).tolist() == [0, 5, 4, 5]


def test_out_inside_the_source_and_macosx_are_no_classes(tree):
    """F5. A second preparation, and one that was killed, must number the classes as the first did."""
    for left in ('__MACOSX', 'adata.partial/made'):
        (tree / left).mkdir(parents=True)
        Image.new('RGB', (9, 9)).save(tree / left / 'preview.png')
    dataset = prepare('folder', tree, '--out', tree / 'adata', '--size', 8)
    assert dataset.class_names == ['cat', 'dog'] and dataset.count == 9
    assert not any('data' in name or 'MAC' in name for name in data.list_files(tree, f'{tree}/adata/')[0])


def test_without_folders_there_are_no_classes(tree, tmp_path):
    dataset = prepare('folder', tree / 'cat' / 'deeper', '--out', tmp_path / 'made', '--size', 8)
    assert (dataset.classes, dataset.count) == (0, 2)


# ----------------------------------------------------------------------------------------------- one image

def test_center_crop_is_adms():
    """Box-halved while twice too large, bicubic to size, centre cut: written again for one image."""
    image = noise(np.random.default_rng(1), 150, 90, 3)
    halved = image.resize((45, 75), Image.Resampling.BOX)
    scaled = halved.resize((32, round(75 * 32 / 45)), Image.Resampling.BICUBIC)
    top = (scaled.height - 32) // 2
    assert np.array_equal(data.center_crop(image, 32), np.asarray(scaled)[top:top + 32])


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


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_other_images(tmp_path):
    """16 bits, scaled and not clipped; CMYK; broken EXIF."""
    levels = np.array([[0, 128, 129, 40_000], [257, 513, 65_406, 65_535]] * 2, np.uint16)
    Image.fromarray(levels).save(tmp_path / 'a.png')
    assert data.read_image(tmp_path / 'a.png', 3, 4)[1].tolist() == np.rint(levels / 257).astype(int).tolist()
    Image.new('CMYK', (32, 32), (0, 255, 255, 0)).save(tmp_path / 'b.jpg')
    image = data.read_image(tmp_path / 'b.jpg', 3, 8)
    assert image[0].min() > 250 and image[1:].max() < 5
    exif = b'Exif\0\0II*\0\xff\xff\xff\x7f' + b'\1' * 40
    Image.new('RGB', (9, 9), 'red').save(tmp_path / 'd.jpg', exif=exif)
    assert data.read_image(tmp_path / 'd.jpg', 3, 8)[0].min() > 250

# --------------------------------------------------------------------------------- kills, restarts, ranks

def child(argv, rank, world):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    data.tqdm.set_lock(threading.RLock())     # forks share the default one, and a kill would keep it
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        data.main(argv)
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


def test_nine_kills_change_no_byte(many, tmp_path, monkeypatch):
    """SIGKILL for all ranks at nine moments, each seen by what is written: during the chunks and the joining.
    The numbers of ranks take turns. Writing takes longer, so that kills hit the middle of it."""
    for name, wait in (('fsync', 0.02), ('rename', 0.2)):
        quick = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, do=quick, wait=wait: (time.sleep(wait), do(*args))[1])
    out, partial = tmp_path / 'out', tmp_path / 'out.partial'
    argv = ['folder', str(many / 'src'), '--out', str(out), '--size', '4', '--workers', '1']
    made, chunks = partial / 'made', lambda: len(list(partial.glob('0*.json')))
    joined = lambda: (made / 'data.npy').exists() and not (partial / '000004.rows').exists()
    stages = [*(lambda n=n: chunks() >= n for n in (0, 2, 3, 5, 8, 9)),
              joined, (made / 'labels.npy').exists, (made / 'meta.json').exists]
    for k, reached in enumerate(stages):
        ranks = begin(argv, (3, 1, 2)[k % 3])
        while not reached():
            assert ranks[0].is_alive(), 'it ended before it was killed'
            time.sleep(0.001)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        assert ranks[0].exitcode == -signal.SIGKILL and not out.exists()
    ranks = begin(argv, 2)
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert contents(out) == contents(many / 'whole')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.slow
def test_torchrun_shares_the_work_and_a_failing_rank_ends_the_others(many, tmp_path):
    """F11. Rank 1's disk fails: torchrun ends rank 0, which waits for its chunks; the next start resumes."""
    (tmp_path / 'fails.py').write_text(f"""import os, sys
import data
def fails(file, true=data.load_image):
    if os.environ['RANK'] == '1' and '/2/' in file.name:
        raise OSError(5, 'Input/output error')
    return true(file)
data.load_image = fails
data.script('data.py', data.main)""")
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    path = os.path.dirname(data.__file__)
    settings = {'env': os.environ | {'PYTHONPATH': path}, 'timeout': 60, 'text': True}
    argv = ['folder', many / 'src', '--out', tmp_path / 'out', '--size', '4']
    start = lambda path: subprocess.run([*command, path, *argv], capture_output=True, **settings)
    done = start(tmp_path / 'fails.py')
    assert done.returncode and 'data.py: [Errno 5] Input/output error' in done.stderr
    assert not (tmp_path / 'out').exists()
    done = start(data.__file__)
    assert done.returncode == 0 and done.stdout.count('2,250 images of') == 1, done.stderr
    assert contents(tmp_path / 'out') == contents(many / 'whole')


def test_an_io_error_stops_the_run_and_is_tried_again(tree, tmp_path, monkeypatch):
    """F11. A file that is no image is skipped for good; one that the disk does not give is not."""
    true = Image.open

    def disk(file, **keys):
        if file.name.endswith('4.jpg'):
            raise OSError(errno.ESTALE, 'Stale file handle')
        return true(file, **keys)

    argv = 'folder', tree, '--out', tmp_path / 'made', '--size', 8
    monkeypatch.setattr(Image, 'open', disk)
    with pytest.raises(OSError, match='Stale file handle') as error:
        prepare(*argv)
    assert error.value.filename == 'cat/4.jpg' and not (tmp_path / 'made').exists()
    monkeypatch.undo()
    assert prepare(*argv).count == 9


def test_a_restart_makes_only_what_is_missing(many, tmp_path, monkeypatch, capsys):
    """Stopped after 3 chunks. Another command on the same OUT is rejected, and changes nothing."""
    argv = 'folder', many / 'src', '--out', tmp_path / 'out', '--size', 4
    whole_file, load_image, seen = data.whole_file, data.load_image, []

    def stop(path):
        if path.name == '000003.rows':
            raise KeyboardInterrupt
        return whole_file(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, 'whole_file', stop)
        prepare(*argv)
    before = contents(tmp_path)
    assert 'begun with another shape: to resume' in rejected(*argv[:-1], 8)
    assert 'images, names: to resume' in rejected('folder', many / 'src' / '1', *argv[2:])
    assert contents(tmp_path) == before
    monkeypatch.setattr(data, 'load_image', lambda file: (seen.append(file), load_image(file))[1])
    capsys.readouterr()
    prepare(*argv)
    assert len(seen) == 2253 - 3 * data.CHUNK and contents(tmp_path / 'out') == contents(many / 'whole')
    error = capsys.readouterr().err
    assert 'joining: 100%' in error and '9/9' in error and f'images: 100%|##########| {len(seen)}' in error
    assert 'exists already' in rejected(*argv)


# ------------------------------------------------------------------------------------------------- moments

class Stub:
    """An encoder whose moments are known: the means of 8 x 8 pixels, twice, then these less 5."""

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8)[:, [0, 1, 2, 0]]
        return torch.cat([mean, mean - 5], 1)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(data, 'read_vae', lambda path, device: (Stub(), f'hash of {path}'))


def test_moments_are_the_encoder_s_and_the_scale_is_the_users(stub, tree, tmp_path, capsys, monkeypatch):
    """F12. A VAE of an unknown hash gets a note, because SDXL's looks the same and has another scale."""
    argv = 'folder', tree, '--size', 16, '--out'
    pixels = prepare(*argv, tmp_path / 'pixels')
    dataset = prepare(*argv, tmp_path / 'made', '--vae', 'sdxl.safetensors', '--scale', 0.13025)
    assert (dataset.kind, dataset.scale, dataset.channels) == ('moments', 0.13025, 4)
    assert dataset.vae == os.path.abspath('sdxl.safetensors')
    assert dataset.vae_sha256 == 'hash of sdxl.safetensors'
    expected = Stub().encode(torch.from_numpy(np.array(pixels.array)) / 127.5 - 1)
    assert np.allclose(dataset.array, expected, rtol=1e-3, atol=1e-3)
    assert dataset.labels.tolist() == pixels.labels.tolist()
    assert 'is not sd-vae-ft-mse by its SHA-256: is its scale 0.13025?' in capsys.readouterr().out
    monkeypatch.setattr(data, 'read_vae', lambda path, device: (Stub(), data.MSE_SHA256))
    prepare(*argv, tmp_path / 'known', '--vae', 'mse.safetensors')
    assert 'is not sd-vae-ft-mse' not in capsys.readouterr().out


def test_moments_resume_with_the_same_vae_on_the_same_kind_of_device(stub, tree, tmp_path, monkeypatch):
    """The VAE's hash and the device are in the plan; its path is not, so the file may move."""
    argv = 'folder', tree, '--size', 16, '--out', tmp_path / 'made', '--vae', 'a'
    with monkeypatch.context() as patch:
        patch.setattr(data, 'join', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(*argv)
        patch.setattr(data, 'rank_world_device', lambda: (0, 1, torch.device('cuda')))
        assert 'another device' in rejected(*argv)
    with monkeypatch.context() as patch:
        patch.setattr(data, 'read_vae', lambda path, device: (Stub(), 'another'))
        assert 'another vae_sha256' in rejected(*argv)
        patch.setattr(data, 'read_vae', lambda path, device: (Stub(), 'hash of a'))
        assert prepare(*argv[:-1], 'b').vae == os.path.abspath('b')


def test_statistics_are_of_what_the_network_sees(tmp_path, capsys):
    """Samples of moments of mean 2 and log-variance -2, scaled by 0.25: mean 0.5, deviation 0.25 / e."""
    rows, meta = [(np.repeat([2, -2], 4 * 64).reshape(8, 8, 8), 0)] * 100, {'kind': 'moments', 'classes': 0}
    data.save_folder(tmp_path / 'made', rows, 'float16', (8, 8, 8), meta | {'scale': 0.25})
    data.report(tmp_path / 'made')
    printed = capsys.readouterr().out
    assert 'mean of the channels: 0.50, 0.50, 0.50, 0.50\n' in printed
    assert 'deviation of the channels: 0.09, 0.09, 0.09, 0.09 ' in printed and 'is --scale right?' in printed


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


def test_celeba(tmp_path, capsys):
    """128 pixels around (89, 121), rows 57 to 184 and columns 25 to 152, to 64; or another crop and classes.

    PNG inside, so that pixels are exact; the list of attributes is beside them. One file is not aligned."""
    rng, folder, lines = np.random.default_rng(0), tmp_path / 'img_align_celeba', ['12', 'Bald Smiling Young']
    folder.mkdir()
    for k in range(1, 13):
        noise(rng, 217 + (k < 12), 178, 3).save(folder / f'{k:06d}.jpg', 'PNG')
        lines.append(f'{k:06d}.jpg -1 {1 if k % 3 else -1:2d}  1')
    (tmp_path / 'list_attr_celeba.txt').write_text('\n'.join(lines) + '\n')
    images = [Image.open(folder / f'{k:06d}.jpg') for k in range(1, 12)]

    def expected(image, box, size):
        image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1).tobytes()

    source = zip_of(tmp_path / 'img_align_celeba.zip', folder, tmp_path)
    dataset = prepare('celeba', source, '--out', tmp_path / 'made')
    assert (dataset.classes, dataset.count, dataset.resolution) == (0, 11, 64)
    assert 'not aligned, 178 x 218: 178 x 217' in capsys.readouterr().out
    halved = {expected(image, (25, 57, 153, 185), 64) for image in images}
    assert {row.tobytes() for row in dataset.array} == halved
    flags = '--attribute', 'Smiling', '--crop', 20, 10, 208, '--size', 20
    dataset = prepare('celeba', folder, '--out', tmp_path / 'smiling', *flags)
    assert dataset.class_names == ['not Smiling', 'Smiling'] and dataset.count == 11
    label_of = {row.tobytes(): label for row, label in zip(dataset.array, dataset.labels)}
    for k, image in enumerate(images, 1):
        assert label_of[expected(image, (0, 198, 20, 218), 20)] == (k % 3 > 0)


# -------------------------------------------------------------------------------------------------- import

@pytest.fixture
def moments40():
    """(mean, log-variance) (40, 4, 8, 8) and labels."""
    rng = np.random.default_rng(0)
    mean, logvar = 4.8 * rng.standard_normal((40, 4, 8, 8)), rng.uniform(-9, -1, (40, 4, 8, 8))
    return mean.astype(np.float32), logvar.astype(np.float32), rng.integers(5, size=40)


def save_edm(folder, rows, labels, suffix):
    """EDM's layout: 00000/img-mean-std-00000000.npy or 00000/img00000000.png, and dataset.json."""
    names = [f'{i // 10:05d}/img{"-mean-std-" * (suffix == "npy")}{i:08d}.{suffix}' for i in range(len(rows))]
    for name, row in zip(names, rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, row) if suffix == 'npy' else Image.fromarray(row).save(folder / name)
    pairs = None if labels is None else [[name, int(label)] for name, label in zip(names, labels)]
    (folder / 'dataset.json').write_text(json.dumps({'labels': pairs}))
    return folder


def order_of(found, rows):
    """Which of `rows` each of `found` is: all of them, in an order of their own."""
    place = {np.ascontiguousarray(row).tobytes(): i for i, row in enumerate(rows)}
    order = [place[row.tobytes()] for row in found]
    assert sorted(order) == list(range(len(rows))) != order
    return order


def test_import_of_fast_dit(moments40, tmp_path, capsys):
    """Samples, already scaled, (1, 4, 32, 32) each, and a label each. Three are damaged, and skipped."""
    rows, _, labels = moments40
    rows[5, 0, 0, 0] = np.nan
    for name, values in (('features', rows[:, None]), ('labels', labels[:, None])):
        (tmp_path / 'src' / f'imagenet256_{name}').mkdir(parents=True)
        for i, value in enumerate(values):
            np.save(tmp_path / 'src' / f'imagenet256_{name}' / f'{i}.npy', value)
    np.save(tmp_path / 'src' / 'imagenet256_features' / '7.npy', np.zeros((1, 4, 2, 2), np.float32))
    (tmp_path / 'src' / 'imagenet256_labels' / '9.npy').unlink()
    keep = [i for i in range(40) if i not in (5, 7, 9)]
    for scale, flags in ((1, ()), (0.25, ('--scale', 0.25))):
        dataset = prepare('import', tmp_path / 'src', '--out', tmp_path / f'{scale}', *flags)
        assert (dataset.kind, dataset.classes) == ('latents', labels.max() + 1)
        assert np.array_equal(dataset.labels, labels[keep][order_of(dataset.array, scale * rows[keep])])
        printed = capsys.readouterr().out
        assert all(f'skipped imagenet256_features/{k}.npy' in printed for k in (5, 7, 9))
        assert ('is --scale right?' in printed) == (scale == 1)               # for a deviation of 4.8


def test_import_of_means_and_standard_deviations(moments40, tmp_path):
    """EDM2's and REPA's: the standard deviation becomes a log-variance; one of 0 becomes a very small one."""
    mean, logvar, labels = moments40
    std = np.exp(logvar / 2)
    std[3, 1, 2, 2], logvar[3, 1, 2, 2] = 0, 2 * np.log(1e-7)
    source = save_edm(tmp_path / 'src', np.concatenate([mean, std], 1), labels, 'npy')
    dataset = prepare('import', zip_of(tmp_path / 'src.zip', source, source), '--out', tmp_path / 'made')
    assert (dataset.kind, dataset.scale, dataset.classes) == ('moments', 0.18215, labels.max() + 1)
    order = order_of(dataset.array[:, :4], mean.astype(np.float16))
    assert np.array_equal(dataset.labels, labels[order])
    assert np.allclose(dataset.array[:, 4:], logvar[order], atol=0.02)        # float16


def test_import_of_edms_images(tmp_path, capsys):
    """As they are; one of another size is skipped; null as labels means no classes."""
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    source = save_edm(tmp_path / 'src', images, None, 'png')
    Image.new('RGB', (7, 7)).save(source / '00002' / 'img00000020.png')
    dataset = prepare('import', source, '--out', source / 'made')
    assert (dataset.kind, dataset.classes) == ('images', 0)
    order_of(dataset.array, images[np.arange(40) != 20].transpose(0, 3, 1, 2))
    assert 'img00000020.png: cannot be read: uint8 (3, 7, 7) is not' in capsys.readouterr().out


def test_import_of_npz(moments40, tmp_path):
    """ADM's images, without labels; and means with log-variances, which are known by their sign."""
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / 'a.npz', arr_0=images)
    dataset = prepare('import', tmp_path / 'a.npz', '--out', tmp_path / 'made a')
    assert (dataset.kind, dataset.classes) == ('images', 0)
    order_of(dataset.array, images.transpose(0, 3, 1, 2))
    rows, labels = np.concatenate(moments40[:2], 1).astype(np.float16), moments40[2]
    np.savez(tmp_path / 'b.npz', arr_0=rows, arr_1=labels)
    dataset = prepare('import', tmp_path / 'b.npz', '--out', tmp_path / 'made b')
    assert dataset.kind == 'moments' and np.array_equal(dataset.labels, labels[order_of(dataset.array, rows)])
