"""data.py: the format and its errors, the order of images, the drawn shapes, grids and charts, the door.

How other data get into the format is in test_prepare.py.
"""

import json
import os
import threading

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
    assert torch.equal(data.to_uint8(x).flatten(), torch.arange(256, dtype=torch.uint8))   # and back, exactly


def test_moments_are_sampled_and_scaled(tmp_path):
    """scale (mean + exp(clamp(logvar, -30, 20) / 2) eps), within 5 standard errors."""
    mean, logvar = np.array([1.0, -2.0, 0.5, 3.0]), np.array([-1.0, 0.0, 1.0, -50.0])
    small(tmp_path, 'moments', (4, 8, 2, 2), 'float16', classes=0, scale=0.18215)
    array = np.tile(np.concatenate([mean, logvar])[None, :, None, None], (4, 1, 2, 2))
    np.save(tmp_path / 'data.npy', array.astype(np.float16))
    dataset = data.Data(tmp_path)
    assert (dataset.channels, dataset.resolution) == (4, 2)
    raw, _ = dataset.rows(np.zeros(10_000, int))
    normal = torch.randn(10_000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x, n = dataset.to_input(raw, normal).double(), 40_000
    std = 0.18215 * np.exp(np.clip(logvar, -30, 20) / 2)
    for c in range(4):
        assert x[:, c].mean().item() == pytest.approx(0.18215 * mean[c], abs=5 * std[c] / n ** 0.5 + 1e-6)
        assert x[:, c].std().item() == pytest.approx(std[c], rel=5 / (2 * n) ** 0.5, abs=1e-6)


def test_latents_are_used_as_they_are(tmp_path):
    dataset = data.Data(small(tmp_path, 'latents', (10, 4, 8, 8), 'float32'))
    raw, _ = dataset.rows(np.arange(10))
    assert torch.equal(dataset.to_input(raw, None), torch.from_numpy(np.load(tmp_path / 'data.npy')))


@pytest.mark.parametrize('count, held_out', [(2, 1), (100, 2), (60_000, 1000)])
def test_the_last_two_percent_are_held_out(tmp_path, count, held_out):
    dataset = data.Data(small(tmp_path, shape=(count, 1, 1, 1), classes=0))
    assert dataset.held_out == held_out and dataset.trained == count - held_out


def test_fingerprint_tells_data_of_the_same_count_apart(tmp_path):
    """Resume must reject other labels, and other images: moments of another VAE differ in every row."""
    names = 'same', 'again', 'labels', 'rows'
    for name in names:
        small(tmp_path / name)
    np.save(tmp_path / 'labels' / 'labels.npy', np.arange(10)[::-1] % 2)
    np.save(tmp_path / 'rows' / 'data.npy', np.load(tmp_path / 'rows' / 'data.npy') + 1)
    same, again, *others = (data.Data(tmp_path / name).fingerprint for name in names)
    assert same == again and len({same, *others}) == 3 and len(bytes.fromhex(same)) == 32


def test_every_image_once_an_epoch_in_an_order_of_its_own():
    n, batch = 10, 4
    seen = np.concatenate([data.batch_indices(7, step, batch, n) for step in range(10)])
    for epoch in range(4):
        assert sorted(seen[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert seen[:n].tolist() != seen[n:2 * n].tolist()
    assert np.array_equal(data.batch_indices(7, 3, batch, n), seen[12:16])    # without a state
    assert not np.array_equal(data.batch_indices(8, 3, batch, n), seen[12:16])
    assert len(data.batch_indices(0, 2, 25, n)) == 25                         # more than an epoch in a batch


def test_read_ahead_keeps_the_order_and_reads_in_four_threads():
    meeting, started = threading.Barrier(4), []

    def read(place):
        started.append(place)
        if place < 4:
            meeting.wait(timeout=20)                                          # raises unless four are reading
        return -place

    reader = data.read_ahead(read, iter(range(30)))
    assert next(reader) == 0 and max(started) <= 8                            # no further ahead
    assert list(reader) == [-place for place in range(1, 30)]
    with pytest.raises(ZeroDivisionError):
        list(data.read_ahead(lambda place: 1 / (place - 3), range(9)))


SPOILS = {
    'nothing there': lambda folder: folder.rename(f'{folder}.gone'),
    'no labels': lambda folder: (folder / 'labels.npy').unlink(),
    'truncated': lambda folder: os.truncate(folder / 'data.npy', 1000),
    'half a JSON': lambda folder: (folder / 'meta.json').write_text('{"kind":'),
    'another kind': lambda folder: (folder / 'meta.json').write_text('{"kind": "movies", "classes": 2}'),
    'no classes': lambda folder: (folder / 'meta.json').write_text('{"kind": "images"}'),
    'names': lambda folder: small(folder, class_names=['one']),
    'moments without scale': lambda folder: small(folder, 'moments', (10, 8, 2, 2), 'float16'),
    'not as high as wide': lambda folder: small(folder, shape=(10, 3, 8, 16)),
    'another type': lambda folder: small(folder, dtype='float64'),
    'one image': lambda folder: small(folder, shape=(1, 3, 8, 8)),
    'a label too high': lambda folder: np.save(folder / 'labels.npy', np.full(10, 2)),
    'a label less': lambda folder: np.save(folder / 'labels.npy', np.zeros(9, int)),
    'a pickle': lambda folder: np.save(folder / 'data.npy', np.array([object()] * 10)),
}


@pytest.mark.parametrize('what', SPOILS)
def test_a_bad_folder_is_one_sentence(tmp_path, what):
    folder = small(tmp_path / 'd')
    SPOILS[what](folder)
    with pytest.raises(data.BadInput) as error:
        data.Data(folder)
    assert str(folder) in str(error.value) and '\n' not in str(error.value)


# ------------------------------------------------------------------------------------------------- writing

def test_files_appear_whole(tmp_path, monkeypatch):
    """A file gets its name when all of it is on disk; a disk that fills leaves the old one."""
    did = []
    for name in ('fsync', 'replace'):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, true=true: (did.append(name), true(*args)))
    with data.whole_file(tmp_path / 'a') as file:
        file.write(b'new')
        assert not (tmp_path / 'a').exists()
    assert did == ['fsync', 'replace']
    with pytest.raises(OSError), data.whole_file(tmp_path / 'a') as file:
        file.write(b'newer')
        raise OSError('No space left on device')
    assert [path.name for path in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_bytes() == b'new'


def test_the_first_of_two_processes_wins(tmp_path):
    """Ranks that draw the shapes at once."""
    def rows(label):
        yield from [(np.zeros((3, 8, 8)), label)] * 4
        if label == 0:
            data.save_folder(tmp_path / 'd', rows(1), 'uint8', (3, 8, 8), {'kind': 'images', 'classes': 3})

    data.save_folder(tmp_path / 'd', rows(0), 'uint8', (3, 8, 8), {'kind': 'images', 'classes': 3})
    assert [path.name for path in tmp_path.iterdir()] == ['d']
    assert data.Data(tmp_path / 'd').labels.tolist() == [1] * 4


def test_images_that_are_not_finite_are_named():
    with pytest.raises(data.BadInput, match=r'\[1\]'):
        data.to_uint8(torch.tensor([0.0, torch.nan, 1.0]).reshape(3, 1, 1, 1))


# -------------------------------------------------------------------------------------------------- charts

def ink(path, colour):
    """(rows, columns) of the pixels of a colour in a PNG."""
    return (np.asarray(Image.open(path)) == colour).all(2).nonzero()


def test_ticks_are_round_numbers():
    assert data.ticks(0.0, 1.05, False) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert data.ticks(-3, 190_000, False) == [0, 50_000, 100_000, 150_000]
    assert data.ticks(0.0019, 84, True) == pytest.approx([0.01, 0.1, 1, 10])
    assert data.ticks(0.9, 40, True) == [1, 3, 10, 30] and data.ticks(2.1, 3.9, True) == [2.5, 3, 3.5]
    for span in (1e-6, 0.3, 7.0, 5e8):
        assert 3 <= len(data.ticks(0.17 * span, 1.17 * span, False)) <= 9


def test_chart_draws_points_where_they_are_and_gaps_where_there_are_none(tmp_path):
    """A parabola is straight in log-log; its middle third is NaN or missing."""
    x = np.geomspace(1, 1e4, 301)
    y = [None if 100 <= i < 150 else np.nan if 150 <= i < 200 else value for i, value in enumerate(x ** 2)]
    data.chart(tmp_path / 'a.png', 'title', [('line', data.COLOURS[0], x, y)], 'x', 'y', True, True)
    rows, columns = ink(tmp_path / 'a.png', data.COLOURS[0])
    rows, columns = rows[columns < 670], columns[columns < 670]               # right of these is the label
    slope, offset = np.polyfit(columns, rows, 1)
    assert np.abs(slope * columns + offset - rows).max() < 4
    share = np.histogram(columns, bins=12)[0]
    assert share[:3].min() > 20 and share[5:7].max() == 0 and share[9:].min() > 20


def test_labels_do_not_overlap_and_a_colour_that_comes_again_is_lighter(tmp_path, monkeypatch):
    """Twelve lines with error bars end in one point, one series has a single point, one has none."""
    written, true = {}, data.ImageDraw.ImageDraw.text
    monkeypatch.setattr(data.ImageDraw.ImageDraw, 'text', lambda pen, place, text, colour, *rest, **keys: (
        written.update({text: (place[1], colour)}), true(pen, place, text, colour, *rest, **keys))[1])
    series = [(f'name {k}', data.COLOURS[k % 6], [0, 1, 2], [k, k, 1.0], [0.1 * k] * 3) for k in range(12)]
    series += [('name lone', data.COLOURS[6], [1], [2]), ('name none', data.COLOURS[7], [], [])]
    data.chart(tmp_path / 'a.png', 'title', series, 'x', 'y')
    heights, colours = zip(*(value for text, value in written.items() if text.startswith('name')))
    assert len(set(colours)) == 14 and min(np.diff(sorted(heights))) >= 36 and max(heights) <= 850
    for colour in colours[:5]:
        assert len(ink(tmp_path / 'a.png', colour)[0]) > 20


# -------------------------------------------------------------------------------------------------- shapes

def test_shapes_are_a_function_of_the_seed(tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        data.make_shapes(tmp_path / name, size=16, count=600, seed=seed)
    a, b, c = (np.load(tmp_path / name / 'data.npy') for name in 'abc')
    assert a.shape == (600, 3, 16, 16) and np.array_equal(a, b) and not np.array_equal(a, c)
    dataset = data.Data(tmp_path / 'a')
    assert dataset.classes == 10 and set(dataset.labels) == set(range(10))
    assert dataset.class_names == list(data.SHAPES)
    assert Image.open(tmp_path / 'a' / 'preview.png').size[0] > 300


def test_the_folder_shapes_is_drawn_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'make_shapes', lambda out: small(tmp_path / out))
    assert data.open_data('shapes').count == 10
    with pytest.raises(data.BadInput, match='no data folder other'):
        data.open_data('other')


def test_colours_do_not_give_the_class_away():
    """Least squares on colour histograms, means and standard deviations stays under 30 % on unseen images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=6000)
    images = data.draw_shapes(labels, 16, rng)
    levels = images.astype(int) // 64
    bins = ((levels[:, 0] * 4 + levels[:, 1]) * 4 + levels[:, 2]).reshape(6000, -1)
    counts = np.stack([np.bincount(one, minlength=64) for one in bins]) / 256
    flat = images.reshape(6000, 3, -1) / 255
    features = np.concatenate([counts, flat.mean(2), flat.std(2), np.ones((6000, 1))], 1)
    weights = np.linalg.lstsq(features[:5000], np.eye(10)[labels[:5000]], rcond=None)[0]
    accuracy = ((features[5000:] @ weights).argmax(1) == labels[5000:]).mean()
    assert 0.1 < accuracy < 0.3                                               # area and edges say a little


# ------------------------------------------------------------------------------- the door, ranks, progress

@pytest.mark.parametrize('error, status, words', [
    (data.BadInput('what to type'), 2, 'x.py: what to type\n'),
    (OSError(28, 'No space left on device'), 2, 'x.py: [Errno 28] No space left on device\n'),
    (KeyboardInterrupt(), 130, 'x.py: interrupted\n'), (KeyError('a bug'), 1, "KeyError: 'a bug'\n\n")])
@pytest.mark.parametrize('ranks', [False, True])
def test_the_door(error, status, words, ranks, monkeypatch, capsys):
    """One of several ranks leaves at once: NCCL's farewell would wait for ranks that are not coming."""
    did = []
    monkeypatch.setattr(data.dist, 'is_initialized', lambda: ranks)
    monkeypatch.setattr(data.dist, 'destroy_process_group', lambda: did.append('farewell'))
    data.script('x.py', lambda: None)
    assert did == ['farewell'] * ranks

    def leave(status):
        did.append('left')
        raise SystemExit(status)

    monkeypatch.setattr(os, '_exit', leave)
    with pytest.raises(SystemExit) as stop:
        data.script('x.py', lambda: exec('raise error', {'error': error}))
    assert stop.value.code == status and capsys.readouterr().err.endswith(words)
    assert did == ['farewell', 'left'] * ranks


def test_a_rank_without_a_gpu_reads_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(data.BadInput, match='type --nproc_per_node 2'):
        data.rank_world_device()


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch, capsys):
    assert list(data.progress(range(5), desc='steps', mininterval=0)) == list(range(5))
    lines = capsys.readouterr().err.split('\n')
    assert len(lines) >= 6 and '\r' not in ''.join(lines)
    assert 'steps: 100%' in lines[-2] and '5/5' in lines[-2]
    assert data.progress(range(5)).mininterval == 60
    capsys.readouterr()
    monkeypatch.setenv('RANK', '1')
    assert list(data.progress(range(5))) == list(range(5)) and capsys.readouterr().err == ''
