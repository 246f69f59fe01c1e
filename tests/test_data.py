"""data.py: the format, its refusals, the drawn shapes, and the order of images.

How other data get there is in test_prepare.py.
"""

import json
import multiprocessing
import runpy
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import data


def small(folder, kind='images', shape=(10, 3, 8, 8), dtype='uint8', classes=2, **meta):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / 'data.npy', np.random.default_rng(0).integers(0, 200, shape).astype(dtype))
    np.save(folder / 'labels.npy', np.arange(shape[0]) % max(classes, 1))
    (folder / 'meta.json').write_text(json.dumps({'kind': kind, 'classes': classes} | meta))
    return folder


# ------------------------------------------------------------------------------------------------- reading


def test_pixels_run_from_minus_one_to_one(tmp_path):
    dataset = data.Data(small(tmp_path))
    raw, labels = dataset.rows(np.array([3, 0, 7]))
    assert raw.dtype == torch.uint8 and labels.tolist() == [1, 0, 1]
    x = dataset.to_input(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16), None)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(data.to_uint8(x).flatten(), torch.arange(256, dtype=torch.uint8))  # and back, exactly


def test_moments_are_sampled_and_scaled(tmp_path):
    """0.18215 (mean + exp(clamp(logvar, -30, 20) / 2) eps), within 5 standard errors."""
    folder = tmp_path / 'moments'
    folder.mkdir()
    mean, logvar = np.array([1.0, -2.0, 0.5, 3.0]), np.array([-1.0, 0.0, 1.0, -50.0])
    array = np.tile(np.concatenate([mean, logvar])[None, :, None, None], (4, 1, 2, 2)).astype(np.float16)
    np.save(folder / 'data.npy', array)
    np.save(folder / 'labels.npy', np.zeros(4, np.int64))
    (folder / 'meta.json').write_text('{"kind": "moments", "classes": 0, "scale": 0.18215}')
    dataset = data.Data(folder)
    assert (dataset.channels, dataset.resolution) == (4, 2)
    raw, _ = dataset.rows(np.zeros(10_000, int))
    x = dataset.to_input(
        raw, torch.randn(10_000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    ).double()
    std = 0.18215 * np.exp(np.clip(logvar, -30, 20) / 2)
    n = 40_000
    for c in range(4):
        assert x[:, c].mean().item() == pytest.approx(0.18215 * mean[c], abs=5 * std[c] / n**0.5 + 1e-6)
        assert x[:, c].std().item() == pytest.approx(std[c], rel=5 / (2 * n) ** 0.5, abs=1e-6)


def test_latents_are_used_as_they_are(tmp_path):
    dataset = data.Data(small(tmp_path, 'latents', (10, 4, 8, 8), 'float32'))
    raw, _ = dataset.rows(np.arange(10))
    assert torch.equal(dataset.to_input(raw, None), torch.from_numpy(np.load(tmp_path / 'data.npy')))


@pytest.mark.parametrize('count, held_out', [(2, 1), (49, 1), (100, 2), (20_000, 400), (60_000, 1000)])
def test_the_last_two_percent_are_held_out(tmp_path, count, held_out):
    dataset = data.Data(small(tmp_path, shape=(count, 1, 1, 1), classes=0))
    assert dataset.held_out == held_out and dataset.trained == count - held_out


def test_every_image_once_an_epoch_in_an_order_of_its_own():
    n, batch = 10, 4
    seen = np.concatenate([data.batch_indices(7, step, batch, n) for step in range(10)])
    for epoch in range(4):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert seen[:n].tolist() != seen[n : 2 * n].tolist()
    assert np.array_equal(
        data.batch_indices(7, 3, batch, n), seen[12:16]
    )  # no state: any step can be asked for
    assert not np.array_equal(data.batch_indices(8, 3, batch, n), seen[12:16])
    assert len(data.batch_indices(0, 2, 25, n)) == 25  # more than an epoch in a batch


# ------------------------------------------------------------------------------------------------ refusals


def spoil_missing(folder):
    return folder / 'nowhere'


def spoil_empty(folder):
    for file in folder.iterdir():
        file.unlink()


def spoil_truncated(folder):
    content = (folder / 'data.npy').read_bytes()
    (folder / 'data.npy').write_bytes(content[:-100])


def spoil_header(folder):
    (folder / 'data.npy').write_bytes((folder / 'data.npy').read_bytes()[:50])


def spoil_json(folder):
    (folder / 'meta.json').write_text('{"kind":')


def spoil_list(folder):
    (folder / 'meta.json').write_text('[]')


def spoil_kind(folder):
    (folder / 'meta.json').write_text('{"kind": "movies", "classes": 2}')


def spoil_classes(folder):
    (folder / 'meta.json').write_text('{"kind": "images", "classes": "two"}')


def spoil_shape(folder):
    np.save(folder / 'data.npy', np.zeros((10, 8, 8), np.uint8))


def spoil_oblong(folder):
    np.save(folder / 'data.npy', np.zeros((10, 3, 8, 16), np.uint8))


def spoil_dtype(folder):
    np.save(folder / 'data.npy', np.zeros((10, 3, 8, 8), np.float64))


def spoil_label_range(folder):
    np.save(folder / 'labels.npy', np.full(10, 2))


def spoil_label_negative(folder):
    np.save(folder / 'labels.npy', np.full(10, -1))


def spoil_label_count(folder):
    np.save(folder / 'labels.npy', np.zeros(9, np.int64))


def spoil_label_dtype(folder):
    np.save(folder / 'labels.npy', np.zeros(10))


def spoil_one(folder):
    np.save(folder / 'data.npy', np.zeros((1, 3, 8, 8), np.uint8))
    np.save(folder / 'labels.npy', np.zeros(1, np.int64))


def spoil_names(folder):
    (folder / 'meta.json').write_text('{"kind": "images", "classes": 2, "class_names": ["one"]}')


def spoil_vae(folder):
    (folder / 'meta.json').write_text('{"kind": "images", "classes": 2, "vae": ["a file"]}')


def spoil_pickle(folder):
    np.save(folder / 'data.npy', np.array([object()] * 10, dtype=object))


def spoil_odd_moments(folder):
    np.save(folder / 'data.npy', np.zeros((10, 3, 8, 8), np.float16))
    (folder / 'meta.json').write_text('{"kind": "moments", "classes": 2}')


SPOILS = [value for name, value in sorted(globals().items()) if name.startswith('spoil_')]


@pytest.mark.parametrize('spoil', SPOILS, ids=lambda spoil: spoil.__name__[6:])
def test_bad_folders_are_refused(tmp_path, spoil):
    folder = small(tmp_path / 'd')
    folder = spoil(folder) or folder
    with pytest.raises(data.BadInput) as refusal:
        data.Data(folder)
    assert str(folder) in str(refusal.value) and '\n' not in str(refusal.value)


# ------------------------------------------------------------------------------------------------- writing


def test_a_failed_write_leaves_nothing(tmp_path):
    def rows():
        yield np.zeros((3, 8, 8)), 0
        raise OSError(28, 'No space left on device')

    with pytest.raises(data.BadInput, match='No space left'):
        data.save_folder(tmp_path / 'd', rows(), 'uint8', (3, 8, 8), {})
    assert list(tmp_path.iterdir()) == []


def test_a_living_writer_is_left_alone(tmp_path):
    """Of two that make one folder the first wins, and neither takes the other's beginnings for litter."""

    def rows(inner):
        for k in range(4):
            yield np.zeros((3, 64, 64)), int(inner)
            if k == 2 and not inner:
                data.save_folder(tmp_path / 'd', rows(True), 'uint8', (3, 64, 64), meta)
                assert len(list(tmp_path.iterdir())) == 2

    meta = {'kind': 'images', 'classes': 2}
    data.save_folder(tmp_path / 'd', rows(False), 'uint8', (3, 64, 64), meta)
    assert [path.name for path in tmp_path.iterdir()] == ['d']
    assert data.Data(tmp_path / 'd').labels.tolist() == [1] * 4


def test_not_finite_pictures_are_refused():
    x = torch.zeros(3, 3, 2, 2)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(data.BadInput, match=r'\[1\]'):
        data.to_uint8(x)


def test_rounding_is_to_the_nearest_level():
    levels = torch.tensor([-2.0, -1.0, -0.9971, -0.9970 + 2 / 255, 1.0, 1.5]).reshape(1, 1, 1, 6)
    assert data.to_uint8(levels).flatten().tolist() == [0, 0, 0, 1, 255, 255]


# -------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_a_function_of_the_seed(tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        data.make_shapes(tmp_path / name, size=16, count=600, seed=seed)
    a, b, c = (np.load(tmp_path / name / 'data.npy') for name in 'abc')
    assert a.shape == (600, 3, 16, 16) and np.array_equal(a, b) and not np.array_equal(a, c)
    dataset = data.Data(tmp_path / 'a')
    assert (
        dataset.classes == 10
        and set(dataset.labels) == set(range(10))
        and dataset.class_names == list(data.SHAPES)
    )
    assert Image.open(tmp_path / 'a' / 'preview.png').size[0] > 300


def test_a_shape_depends_on_no_other():
    """Of the same random numbers, a picture among others is what it is among those of its class."""
    labels = np.random.default_rng(1).integers(8, size=30)                    # two classes are not there
    alike = [data.draw_shapes(np.full(30, k), 8, np.random.default_rng(0)) for k in range(8)]
    pictures = data.draw_shapes(labels, 8, np.random.default_rng(0))
    assert all(np.array_equal(picture, alike[k][i]) for i, (k, picture) in enumerate(zip(labels, pictures)))


def test_large_shapes_take_little_memory():
    """The 4 x 4 points a pixel of all pictures, in float32, would be twice as much as is allowed here."""
    labels = np.arange(100) % 10
    tracemalloc.start()
    data.draw_shapes(labels, 64, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 256 ** 2 * 4 / 2


def test_colours_do_not_give_the_class_away():
    """A linear classifier on colour histograms, means and deviations stays under 35 % on unseen pictures."""
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=6000)
    pictures = data.draw_shapes(labels, 16, rng)
    levels = pictures.astype(int) // 64
    bins = ((levels[:, 0] * 4 + levels[:, 1]) * 4 + levels[:, 2]).reshape(6000, -1)
    features = np.zeros((6000, 64), np.float32)
    np.add.at(features, (np.arange(6000)[:, None], bins), 1 / 256)
    flat = pictures.reshape(6000, 3, -1) / 255
    features = torch.from_numpy(np.concatenate([features, flat.mean(2), flat.std(2)], 1)).float()
    y = torch.from_numpy(labels)
    linear = torch.nn.Linear(70, 10)
    optimizer = torch.optim.Adam(linear.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(features[:5000]), y[:5000]).backward()
        optimizer.step()
    accuracy = (linear(features[5000:]).argmax(1) == y[5000:]).float().mean()
    assert accuracy < 0.35


def test_the_face_has_matching_eyes():
    """Parts belong together: every shape but the moon is its own mirror image, eyes and dots included."""
    at = (np.arange(64) + 0.5) / 32 - 1
    x, y = np.meshgrid(at, at)
    for name, shape in data.SHAPES.items():
        inside = shape(x, y)
        assert 0.1 < inside.mean() < 0.85
        assert np.array_equal(inside, inside[:, ::-1]) == (name != 'moon')


def make_at_once(folder):
    data.make_shapes(folder, size=8, count=2000)


@pytest.mark.slow
def test_several_processes_may_make_one_folder(tmp_path):
    context = multiprocessing.get_context('spawn')
    processes = [context.Process(target=make_at_once, args=(tmp_path / 'd',)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ['d']
    data.make_shapes(tmp_path / 'alone', size=8, count=2000)
    assert np.array_equal(data.Data(tmp_path / 'd').array, data.Data(tmp_path / 'alone').array)


def test_default_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.default_data() == 'shapes'
    small(tmp_path / 'data')
    assert data.default_data() == 'data'


# -------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    'argv, words',
    [
        (['folder', 'nowhere', '--size', '8'], 'no folder nowhere'),
        (['folder', 'empty', '--size', '8'], 'holds no picture'),
        (['folder', 'broken', '--size', '8', '--workers', '1'], 'fewer than 2 readable'),
        (['folder', 'single', '--size', '8', '--workers', '1'], 'fewer than 2 readable pictures\n'),
        (['folder', 'empty', '--size', '0'], 'at least 1'),
        (['folder', 'empty', '--size', '8', '--workers', '0'], 'at least 1'),
        (['celeba', 'empty', '--size', '0'], 'at least 1'),
        (['cifar10', 'nowhere'], 'there is no nowhere'),
        (['import', 'nowhere'], 'there is no nowhere'),
        (['import', 'single', '--scale', '0'], 'above 0'),
        (['import', 'single', '--scale', 'nan'], 'above 0'),
        (['import', 'single', '--scale', '1e308'], 'below a million'),
        (['import', 'x' * 5000], 'there is no xxx'),
        (['shapes', '--seed', '-1'], '--seed must be at least 0'),
        (['shapes', '--out', 'empty'], 'exists already'),
        (['shapes', '--n', '1'], 'at least 2'),
        (['shapes', '--size', '10001'], 'from 1 to 10,000'),
        (['folder', 'single', '--size', '12000'], 'from 1 to 10,000'),
        (['shapes', '--out', 'a' * 300 + '/b'], 'File name too long'),
        (['shapes', '--out', 'file/inside'], 'cannot write'),
        (['shapes', '--colour', 'red'], 'unrecognized arguments'),
    ],
)
def test_refusals_exit_with_2_and_write_nothing(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'single').mkdir()
    Image.new('RGB', (9, 9)).save(tmp_path / 'single' / 'a.png')
    (tmp_path / 'broken' / 'a.png').write_bytes(b'x')
    (tmp_path / 'file').write_text('')
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.setattr('sys.argv', ['data.py', *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(data.__file__, run_name='__main__')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and 'Traceback' not in error
    assert sorted(tmp_path.rglob('*')) == before
