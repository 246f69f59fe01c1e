"""What every test shares: one thread, the project on the path, tiny data, a tiny configuration, tiny runs.

    python -m pytest                            the default suite
    python -m pytest -m slow                    what takes longer
    python -m pytest tests/test_model.py        one file
"""

import os
import pathlib
import signal
import subprocess
import sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it, for children too
os.environ['OMP_NUM_THREADS'] = '1'           # two OpenMP threads on two busy cores spin against each other

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import finetune  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)


# ------------------------------------------------------------------------ a configuration, a network, a batch

def config(method='mcdit', **changes):
    """A Config as train.py makes it: T/2 on 8 images of 3 x 8 x 8, so N = 16 tokens of 12 values."""
    row = model.METHODS[method]
    defaults = {'model': 'T/2', 'resolution': 8, 'channels': 3, 'classes': 10, 'count': 100, 'steps': 10,
                'batch': 8, 'mask_ratio': row.mask_ratio, 'lr': row.lr}
    return model.Config(method=method, **(defaults | changes))


def randomise(module, seed=0, scale=0.1):
    """`module` with noise on every trained parameter; with zero gates half of the tests would be vacuous."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=rng)
    return module


def build(cfg, dtype=torch.float64, seed=0):
    """(net, teacher or None) with random weights; the teacher's differ from the net's."""
    torch.manual_seed(seed)
    net = randomise(model.Net(cfg).to(dtype), seed)
    teacher = model.make_teacher(net, cfg)
    if teacher is not None:
        randomise(teacher.requires_grad_(True), seed + 1).requires_grad_(False)
    return net, teacher


def batch(cfg, dtype=torch.float64, seed=5):
    """Clean patches x0 (B, N, P) of standard deviation 0.5, and labels y (B,)."""
    rng = torch.Generator().manual_seed(seed)
    x0 = torch.randn(cfg.batch, cfg.N, cfg.patch ** 2 * cfg.channels, generator=rng, dtype=dtype) / 2
    return x0, torch.randint(max(cfg.classes, 1), (cfg.batch,), generator=rng)


def numbers(cfg, step=3, dtype=torch.float64):
    """The random numbers of a step, in `dtype`; the first label is dropped, the second kept."""
    r = {name: value.to(dtype) if value.is_floating_point() else value
         for name, value in model.random_numbers(cfg, step).items()}
    r['drop'][:2] = torch.tensor([True, False])
    return r


def same(a, b):
    """Whether two checkpoints, or parts of them, hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Payload:
    """Makes the file `canary` where it is unpickled: the code in a harmful checkpoint."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, 'w')


# ---------------------------------------------------------------------------------------------- data and runs

@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A data folder of 200 drawn shapes, 3 x 8 x 8."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    data.make_shapes(folder, size=8, count=200)
    return folder


@pytest.fixture(scope='session')
def moments(tmp_path_factory):
    """A data folder of 60 random latent moments, 4 x 8 x 8, of 3 classes."""
    folder = tmp_path_factory.mktemp('data') / 'moments'
    rng = np.random.default_rng(0)
    rows = ((rng.standard_normal((8, 8, 8)) * 3, int(rng.integers(3))) for _ in range(60))
    data.save_folder(folder, rows, 'float16', (8, 8, 8), {'kind': 'moments', 'classes': 3, 'scale': 0.18215})
    return folder


OF_THE_LOOP = ('test_train', 'test_resume', 'test_readme', 'test_refusals', 'test_compile')    # see `shrink`
FULL_HEAD = ('test_model', 'test_published', 'test_cost')                    # of equations, not of whole runs


class SmallHead(model.Head):
    def __init__(self, width):
        torch.nn.Module.__init__(self)
        self.fc1, self.fc2, self.fc3 = (torch.nn.Linear(m, n) for m, n in ((width, 32), (32, 32), (32, 16)))
        self.prototypes = torch.nn.Parameter(torch.zeros(64, 16))


def shrink(patch):
    """Make T a network of three narrow blocks, which takes a step and saves in milliseconds."""
    patch.setitem(model.SIZES, 'T', (3, 32, 2))
    patch.setattr(model, 'TINY_DECODER', (1, 32, 2))
    patch.setattr(model, 'Head', SmallHead)
    patch.setattr(model, 'PROTOTYPES', 64)


@pytest.fixture(autouse=True, scope='module')
def few_prototypes(request):
    """SD-DiT's head has 64 prototypes where whole runs are tested: 8192 are most of a tiny network."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in FULL_HEAD:
            patch.setattr(model, 'PROTOTYPES', 64)
        if request.module.__name__ in OF_THE_LOOP:
            shrink(patch)
        yield


@pytest.fixture(scope='session')
def trained(shapes, tmp_path_factory):
    """trained(method, *flags) -> the folder of a run of 4 steps, made once; copy it before changing it."""
    runs = {}

    def run(method, *flags):
        if (method, *flags) not in runs:
            out = tmp_path_factory.mktemp(method) / 'out'
            train.main(['--method', method, '--model', 'T/2', '--data', str(shapes), '--out', str(out),
                        '--steps', '4', '--batch', '8', *flags])
            runs[method, *flags] = out
        return runs[method, *flags]
    return run


# ----------------------------------------------------------------------------------- commands, and their logs

TINY = '--batch 8 --log-every 1 --preview 0 --precision fp32'
FOUR = f'--model T/4 --save-every 2 {TINY}'.split()      # of `trained`: checkpoints of steps 2 and 4


def run(folder, out, flags=''):
    """`train.py` on the data in `folder`: the path of the last checkpoint."""
    return train.main(f'--model T/4 {TINY} --data {folder} --out {out} {flags}'.split())


def tune(checkpoint, out, flags=''):
    """`finetune.py`: the path of the last checkpoint."""
    return finetune.main(f'{checkpoint} {TINY} --out {out} {flags}'.split())


def lines(out, key='loss'):
    """The lines of a run's log that have `key`."""
    return [line for line in train.read_log(pathlib.Path(out)) if key in line]


def at_steps(patch, happenings):
    """Call happenings[step]() as that step, counted from 0, begins."""
    drawn = model.random_numbers

    def draw(cfg, step, *rest):
        happenings.get(step, lambda: None)()
        return drawn(cfg, step, *rest)
    patch.setattr(model, 'random_numbers', draw)


def torchrun(*argv, flags=()):
    """A script in two processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *flags]
    return subprocess.run([*command, *map(str, argv)], capture_output=True, text=True, timeout=300)
