"""What every test shares: one thread, the project on the path, a tiny data set, and a tiny configuration."""

import os
import pathlib
import shutil
import signal
import sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it, for children too
os.environ['OMP_NUM_THREADS'] = '1'  # two OpenMP threads on two busy cores spin against each other

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model  # noqa: E402

torch.set_num_threads(1)

MARKS = {'slow': 'takes minutes', 'soak': 'throws chance at it for minutes', 'gpu': 'needs a GPU'}


def pytest_configure(config):
    for name, why in MARKS.items():
        config.addinivalue_line('markers', f'{name}: {why}; run with -m {name}')


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr or config.option.keyword:
        return
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in MARKS)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_makereport(item, call):
    """What a test that passed has written is removed: all of it together would be 20 GB."""
    if call.when == 'call':
        item.passed = call.excinfo is None
    if call.when == 'teardown' and getattr(item, 'passed', False) and 'tmp_path' in item.funcargs:
        shutil.rmtree(item.funcargs['tmp_path'], ignore_errors=True)


RUNS = ('test_train', 'test_survive', 'test_readme')                          # of scripts, not of equations


@pytest.fixture(autouse=True, scope='module')
def few_prototypes(request):
    """SD-DiT's head has 64 prototypes, not 8192, where whole runs are tested: most of such a network."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ in RUNS:
            patch.setattr(model, 'PROTOTYPES', 64)
        yield


def config(method='mcdit', **changes):
    """A configuration as train.py makes it: T/2 on 3 x 8 x 8 pictures, so N = 16 tokens."""
    return (
        model.METHODS[method]['defaults']
        | {
            'stage': 'train',
            'method': method,
            'model': 'T/2',
            'data': 'none',
            'kind': 'images',
            'count': 100,
            'resolution': 8,
            'channels': 3,
            'classes': 10,
            'class_names': [str(k) for k in range(10)],
            'steps': 10,
            'batch': 8,
            'lr_decay': 0.0,
            'seed': 0,
            'sigma_data': 0.5,
            'ema_step': 0,
            'diffusion': 'edm',
        }
        | changes
    )


def randomise(module, seed=0, scale=0.1):
    """Random numbers in every parameter, the zero-initialised ones too; most tests would pass without."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
    return module


def build(cfg, dtype=torch.float64, seed=0):
    """(net, teacher) with random weights; the teacher's differ from the net's."""
    net = randomise(model.Net(cfg).to(dtype), seed)
    teacher = model.make_teacher(net, cfg)
    if teacher is not None:
        randomise(teacher.requires_grad_(True), seed + 1).requires_grad_(False)
    return net, teacher


def images(cfg, n=4, dtype=torch.float64, seed=5):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, cfg['channels'], cfg['resolution'], cfg['resolution'], generator=rng, dtype=dtype) / 2
    return x, torch.randint(cfg['classes'], (n,), generator=rng) if cfg['classes'] else torch.zeros(
        n, dtype=torch.long
    )


def draws(cfg, n=4, step=3, dtype=torch.float64):
    made = model.draw(cfg, step, n)
    made['drop'][0] = True  # at least one label is dropped
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A folder of 200 drawn shapes, 8 x 8."""
    folder = tmp_path_factory.mktemp('data') / 'small'
    data.make_shapes(folder, size=8, count=200)
    return folder


@pytest.fixture(scope='session')
def moments(tmp_path_factory):
    """A folder of 60 random latent moments, 4 x 8 x 8, of 3 classes."""
    import numpy as np

    folder = tmp_path_factory.mktemp('data') / 'moments'
    rng = np.random.default_rng(0)
    rows = ((rng.standard_normal((8, 8, 8)) * 3, int(rng.integers(3))) for _ in range(60))
    data.save_folder(
        folder, rows, 'float16', (8, 8, 8), {'kind': 'moments', 'classes': 3, 'scale': 0.18215}
    )
    return folder
