"""Compiled blocks compute what eager ones do, for every method: some steps on a CPU, with a C compiler.

    python -m pytest -m slow tests/slow/test_compile.py
"""

import pytest
from conftest import lines, run

import model
import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('method', model.METHODS)
def test_compiled_blocks_train_as_eager_ones_do(shapes, tmp_path, method):
    for name in ('--compile', '--no-compile'):
        run(shapes, tmp_path / name, f'--method {method} --steps 4 --lr 1e-3 {name}')
    assert train.read_log(tmp_path / '--compile')[0]['device'].endswith(', compiled')
    one, two = ([line['loss'] for line in lines(tmp_path / name)] for name in ('--compile', '--no-compile'))
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-5)
