"""data.py: the format and its errors, the order of images, the drawn shapes, grids and charts, the door.

How other data get into the format is in test_prepare.py.
"""

import errno
import io
import json
import os
import threading
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


@pytest.mark.parametrize('count, held_out', [(2, 1), (49, 1), (100, 2), (20_000, 400), (60_000, 1000)])
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
    'half a header': lambda folder: os.truncate(folder / 'data.npy', 50),
    'half a JSON': lambda folder: (folder / 'meta.json').write_text('{"kind":'),
    'a JSON list': lambda folder: (folder / 'meta.json').write_text('[1]'),
    'another kind': lambda folder: (folder / 'meta.json').write_text('{"kind": "movies", "classes": 2}'),
    'classes in words': lambda folder: (folder / 'meta.json').write_text(
        '{"kind": "images", "classes": "two"}'),
    'names': lambda folder: small(folder, class_names=['one']),
    'moments without scale': lambda folder: small(folder, 'moments', (10, 8, 2, 2), 'float16'),
    'not as high as wide': lambda folder: small(folder, shape=(10, 3, 8, 16)),
    'another type': lambda folder: small(folder, dtype='float64'),
    'one image': lambda folder: small(folder, shape=(1, 3, 8, 8)),
    'a label too high': lambda folder: np.save(folder / 'labels.npy', np.full(10, 2)),
    'a label below 0': lambda folder: np.save(folder / 'labels.npy', np.full(10, -1)),
    'a label less': lambda folder: np.save(folder / 'labels.npy', np.zeros(9, int)),
    'labels that are no integers': lambda folder: np.save(folder / 'labels.npy', np.zeros(10)),
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
    """A file gets its name when all of it is on disk; a disk that fills leaves the old one, and is named."""
    did = []
    for name in ('fsync', 'replace'):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, true=true: (did.append(name), true(*args)))
    with data.whole_file(tmp_path / 'a') as file:
        file.write(b'new')
        assert not (tmp_path / 'a').exists()
    assert did == ['fsync', 'replace'] and (tmp_path / 'a').read_bytes() == b'new'
    with pytest.raises(OSError) as error, data.whole_file(tmp_path / 'a') as file:
        file.write(b'newer')
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert error.value.filename == str(tmp_path / 'a')
    assert [path.name for path in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_bytes() == b'new'


def test_a_failed_folder_leaves_nothing_and_the_first_of_two_wins(tmp_path):
    def rows(label):
        for k in range(4):
            yield np.zeros((3, 8, 8)), label
            if k == 2 and label == 0:
                data.save_folder(tmp_path / 'd', rows(1), 'uint8', (3, 8, 8), meta)
            if label == 2:
                raise OSError(errno.ENOSPC, 'No space left on device')

    meta = {'kind': 'images', 'classes': 3}
    with pytest.raises(OSError):
        data.save_folder(tmp_path / 'd', rows(2), 'uint8', (3, 8, 8), meta)
    assert list(tmp_path.iterdir()) == []
    data.save_folder(tmp_path / 'd', rows(0), 'uint8', (3, 8, 8), meta)
    assert [path.name for path in tmp_path.iterdir()] == ['d']
    assert data.Data(tmp_path / 'd').labels.tolist() == [1] * 4


def test_levels_are_the_nearest_and_finite():
    levels = torch.tensor([-2.0, -1.0, -0.9971, -0.9970 + 2 / 255, 1.0, 1.5]).reshape(1, 1, 1, 6)
    assert data.to_uint8(levels).flatten().tolist() == [0, 0, 0, 1, 255, 255]
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
    """A straight line in log-log is straight; its middle third is NaN or missing."""
    x = np.geomspace(1, 1e4, 301)
    y = [None if i < 150 else np.nan if i < 200 else value for i, value in enumerate(x ** 2)]
    y[:100] = x[:100] ** 2
    series = [('line', data.COLOURS[0], x, y)]
    data.chart(tmp_path / 'a.png', 'title', series, 'x', 'y', log_x=True, log_y=True)
    rows, columns = ink(tmp_path / 'a.png', data.COLOURS[0])
    low, high = columns.min(), np.percentile(columns[columns < 660], 99.9)
    line = columns < high + 1
    slope, offset = np.polyfit(columns[line], rows[line], 1)
    assert np.abs(slope * columns[line] + offset - rows[line]).max() < 4
    inside = columns[line] - low
    share = np.histogram(inside, bins=12, range=(0, high - low))[0]
    assert share[:3].min() > 20 and share[5:7].max() == 0 and share[9:].min() > 20


def test_no_two_series_look_alike_and_labels_do_not_overlap(tmp_path, monkeypatch):
    """Five lines end in one point. Two are of one colour: the second of these has gaps. Labels have room."""
    written = []
    true = data.ImageDraw.ImageDraw.text
    monkeypatch.setattr(data.ImageDraw.ImageDraw, 'text', lambda pen, place, text, *args, **keys: (
        written.append((text, place[1], args[1].size)), true(pen, place, text, *args, **keys))[1])
    colours = data.COLOURS[0], data.COLOURS[1], data.COLOURS[1], data.COLOURS[2], data.COLOURS[3]
    series = [(f'name {k}', colour, [0, 1, 2], [k, k, 1.0]) for k, colour in enumerate(colours)]
    data.chart(tmp_path / 'a.png', 'title', series, 'x', 'y')
    heights = sorted(height for text, height, _ in written if text.startswith('name'))
    assert len(heights) == 5 and min(np.diff(heights)) >= 30 and min(size for *_, size in written) >= 24
    rows, columns = ink(tmp_path / 'a.png', data.COLOURS[1])
    for lower, gaps in ((True, 0), (False, 5)):                               # the flat parts of these two
        height = np.median(rows[rows > np.median(rows)] if lower else rows[rows < np.median(rows)])
        there = np.unique(columns[(abs(rows - height) < 2) & (columns < 340)])
        assert (np.diff(there) > 3).sum() >= gaps and (gaps or np.diff(there).max() == 1)
    assert len(set(data.COLOURS)) == len(data.COLOURS) >= 7


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


def test_a_shape_depends_on_no_other():
    """With the same random numbers, an image among others is what it is among those of its class."""
    labels = np.random.default_rng(1).integers(8, size=30)                    # two classes are not there
    alike = [data.draw_shapes(np.full(30, k), 8, np.random.default_rng(0)) for k in range(8)]
    images = data.draw_shapes(labels, 8, np.random.default_rng(0))
    assert all(np.array_equal(image, alike[k][i]) for i, (k, image) in enumerate(zip(labels, images)))


def test_large_shapes_take_little_memory():
    """The 4 x 4 points per pixel of all images, in float32, would be twice as much as is allowed here."""
    tracemalloc.start()
    data.draw_shapes(np.arange(50) % 10, 64, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 256 ** 2 * 4 / 2


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


def test_parts_of_a_shape_belong_together():
    """Every shape but the moon is its own mirror image, eyes and dots included."""
    at = (np.arange(64) + 0.5) / 32 - 1
    x, y = np.meshgrid(at, at)
    for name, shape in data.SHAPES.items():
        inside = shape(x, y)
        assert 0.1 < inside.mean() < 0.85
        assert np.array_equal(inside, inside[:, ::-1]) == (name != 'moon')


# ------------------------------------------------------------------------------- the door, ranks, progress

@pytest.mark.parametrize('error, status, words', [
    (data.BadInput('what to type'), 2, 'x.py: what to type'),
    (OSError(28, 'No space left on device', 'out/1.pt'), 2, 'x.py: out/1.pt: No space left on device'),
    (KeyboardInterrupt(), 130, 'x.py: interrupted')])
@pytest.mark.parametrize('ranks', [False, True])
def test_the_door_prints_one_sentence(error, status, words, ranks, monkeypatch, capsys):
    """One of several ranks leaves at once: NCCL's farewell would wait for ranks that are not coming."""
    did = []
    monkeypatch.setattr(data.dist, 'is_initialized', lambda: ranks)
    monkeypatch.setattr(data.dist, 'destroy_process_group', lambda: did.append('farewell'))

    def leave(status):
        did.append('left')
        raise SystemExit(status)

    monkeypatch.setattr(os, '_exit', leave)
    with pytest.raises(SystemExit) as stop:
        data.script('x.py', lambda: exec('raise error', {'error': error}))
    assert stop.value.code == status and capsys.readouterr().err == words + '\n'
    assert did[:1] == ['left'] * ranks


def test_the_door_shows_bugs_and_says_farewell(monkeypatch):
    with pytest.raises(KeyError):
        data.script('x.py', lambda: {}['a bug'])
    did = []
    monkeypatch.setattr(data.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(data.dist, 'destroy_process_group', lambda: did.append('farewell'))
    data.script('x.py', lambda: None)
    assert did == ['farewell']


def test_reading_never_advises_to_run_code(tmp_path):
    torch.save({'a': torch.zeros(2), 'b': io.StringIO}, tmp_path / 'a.pt')
    with pytest.raises(data.BadInput, match='would run code') as error, data.reading(tmp_path / 'a.pt'):
        torch.load(tmp_path / 'a.pt', weights_only=True)
    assert 'weights_only' not in str(error.value) and '\n' not in str(error.value)
    with pytest.raises(data.BadInput, match='there is no .*nowhere'), data.reading(tmp_path):
        open(tmp_path / 'nowhere')


def test_a_rank_without_a_gpu_reads_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(data.BadInput, match='no GPU, for there are 2: type --nproc_per_node 2'):
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
