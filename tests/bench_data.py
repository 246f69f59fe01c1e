"""How fast are pictures prepared here? Run by hand; a few minutes on two cores.

    python tests/bench_data.py [VAE]

Makes 768 JPEG files of 500 x 375 pixels and prints pictures a second: read by 1 thread and by one a core;
prepared as pixels; and prepared as moments, by VAE or by random weights, beside reading alone, encoding alone
and one after the other. While one chunk is encoded the next is read, so at best the slower of the two counts.
"""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402

COUNT, SMALL = 3 * data.CHUNK, 32  # pictures; pixels a side where a CPU encodes
cores = os.cpu_count()
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
size = 256 if device.type == 'cuda' else SMALL


def rate(function):
    """Calls `function`: pictures a second."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        function()
    return COUNT / (time.perf_counter() - start)


def tell(what, speed, of=None):
    print(f'{what:50}{speed:9.1f} pictures/s' + (f'{speed / of:8.2f} x' if of else ''), flush=True)


with tempfile.TemporaryDirectory() as desk:
    desk = pathlib.Path(desk)
    (desk / 'src').mkdir()
    rng = np.random.default_rng(0)
    for k in range(COUNT):
        blobs = Image.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        blobs.resize((500, 375), Image.Resampling.BICUBIC).save(desk / 'src' / f'{k}.jpg', quality=90)
    files = sorted((desk / 'src').iterdir())

    for side in (64, 256):
        read = lambda path, side=side: data.read_picture(path, side)
        one = rate(lambda read=read: [read(path) for path in files])
        tell(f'reading, {side} pixels, 1 thread', one)
        with ThreadPoolExecutor(cores) as pool:
            tell(f'reading, {side} pixels, {cores} threads', rate(lambda: list(pool.map(read, files))), one)
        argv = ['folder', str(desk / 'src'), '--out', str(desk / f'{side}'), '--size', str(side)]
        tell(f'prepared, {side} pixels, {cores} threads', rate(lambda argv=argv: data.main(argv)), one)

    path = sys.argv[1] if len(sys.argv) > 1 else desk / 'vae.pt'
    if len(sys.argv) == 1:
        torch.manual_seed(0)
        torch.save(data.VAE().state_dict(), path)
    vae = data.read_vae(path, device)[0]
    pictures = [data.read_picture(file, size)[0] for file in files]

    def encode():
        for at in range(0, COUNT, data.BATCH[device.type]):
            data.encode_pictures(vae, device, np.stack(pictures[at : at + data.BATCH[device.type]]))

    read = rate(lambda: [data.read_picture(file, size) for file in files])
    alone = rate(encode)
    argv = ['folder', str(desk / 'src'), '--out', str(desk / 'moments'), '--vae', str(path), '--workers', '1']
    both = rate(lambda: data.main([*argv, '--size', str(size)]))
    print(f'{size} pixels, {device}, 1 thread that reads')
    tell('reading alone', read)
    tell('encoding alone', alone)
    tell('one after the other', after := 1 / (1 / read + 1 / alone))
    tell('prepared as moments', both, after)
