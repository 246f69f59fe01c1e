"""What mutual_info.py rejects: (script, command line, words of its one sentence). Run it to check them."""

import contextlib
import dataclasses
import io
import pathlib
import runpy
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402


def desk(folder):
    """200 shapes of 8 x 8, 200 equal images, networks of dit that fit or not, and files in the way."""
    data.make_shapes(folder / 'shapes', size=8, count=200)
    equal = ((np.zeros((3, 8, 8), np.uint8), 0) for _ in range(200))
    data.save_folder(folder / 'equal', equal, 'uint8', (3, 8, 8), {'kind': 'images', 'classes': 0})
    for name, changes in (('fits', {}), ('big', {'resolution': 16}), ('three', {'classes': 3})):
        cfg = model.Config(**{'method': 'dit', 'model': 'T/2', 'resolution': 8, 'channels': 3, 'classes': 10,
                              'mask_ratio': 0.0} | changes)
        state = {'ema': model.Net(cfg).state_dict(), 'step': 1, 'config': dataclasses.asdict(cfg)}
        torch.save(state, folder / f'{name}.pt')
    (folder / 'there.csv').write_text('precious')
    (folder / 'there.png').write_text('precious')


SHAPES = '--data {desk}/shapes --out {desk}/new'
ROWS = [('mutual_info.py', command, words) for command, words in (
    ('--data {desk}/nowhere', 'there is no data folder'),
    (f'{SHAPES} {{desk}}/none.pt', 'there is no checkpoint'),
    (f'{SHAPES} {{desk}}/big.pt', 'big.pt was made for 3 x 16 x 16'),
    (f'{SHAPES} {{desk}}/three.pt', 'three.pt has 3 classes'),
    (f'{SHAPES} --dims 5', '200 different images are too few for --dims 5: at least 250'),
    ('--data {desk}/equal --out {desk}/new', '1 different images are too few'),
    (f'{SHAPES} --mask-ratio 1', '--mask-ratio 1.0 leaves 0 of 16 squares visible'),
    (f'{SHAPES} --sigmas 0', '--sigmas must lie between'),
    (f'{SHAPES} --masks 1 --seeds 1', 'at least 2'),
    (f'{SHAPES} --show 1', '--show means nothing to the table'),
    ('--data {desk}/shapes --out {desk}/there', 'there.csv exists already'),
    ('--data {desk}/shapes --attention {desk}/there.png {desk}/fits.pt', 'there.png exists already'),
    ('--data {desk}/shapes --attention {desk}/new.png', '--attention needs checkpoints'),
    ('--data {desk}/shapes --attention {desk}/new.png --dims 1 {desk}/fits.pt', '--dims means nothing to'),
    ('--data {desk}/shapes --attention {desk}/new.png {desk}/fits.pt --show 200', 'the images 0 to 199'))]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def rejected(script, command, words, folder):
    """Assert a non-zero status, one line on stderr with `words` in it, and an unchanged folder."""
    before, argv, errors = contents(folder), sys.argv, io.StringIO()
    output = io.TextIOWrapper(io.BytesIO())                                  # data.script reconfigures stdout
    sys.argv = [script, *command.format(desk=folder).split()]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            runpy.run_path(str(ROOT / script), run_name='__main__')
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    lines = errors.getvalue().splitlines()
    assert status and len(lines) == 1 and words in lines[0], (command, status, lines)
    assert contents(folder) == before, f'{command}: files were changed or added'


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as place:
        desk(pathlib.Path(place))
        for row in ROWS:
            rejected(*row, pathlib.Path(place))
            print('rejected:', row[1])
