"""How fast are images prepared here? Run by hand; a few minutes on two cores.

    python tests/bench/bench_data.py [VAE]

Makes 768 JPEG files of 500 x 375 pixels and prints images per second: read by one thread and by one per core;
prepared as pixels; and prepared as moments, with VAE or random weights, beside encoding alone. One chunk is
read while the one before is encoded, so at best the slower of the two counts.
"""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402

COUNT = 3 * data.CHUNK
cores = len(os.sched_getaffinity(0))
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
size = 256 if device.type == 'cuda' else 32   # pixels a side that are encoded


def show(what, function):
    """Call `function`, print and return images per second."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        function()
    rate = COUNT / (time.perf_counter() - start)
    print(f'{what:50}{rate:9.1f} images/s', flush=True)
    return rate


with tempfile.TemporaryDirectory() as desk:
    desk, rng = pathlib.Path(desk), np.random.default_rng(0)
    (desk / 'src').mkdir()
    for k in range(COUNT):
        blobs = Image.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        blobs.resize((500, 375), Image.Resampling.BICUBIC).save(desk / 'src' / f'{k}.jpg', quality=90)
    files = sorted((desk / 'src').iterdir())
    argv = ['folder', str(desk / 'src'), '--out']

    for side in (64, 256):
        read = lambda path, side=side: data.read_image(path, 3, side)
        show(f'reading, {side} pixels, 1 thread', lambda read=read: [read(path) for path in files])
        with ThreadPoolExecutor(cores) as pool:
            show(f'reading, {side} pixels, {cores} threads', lambda read=read: list(pool.map(read, files)))
        flags = [str(desk / f'{side}'), '--size', str(side)]
        show(f'prepared, {side} pixels, {cores} threads', lambda flags=flags: data.main(argv + flags))

    path = sys.argv[1] if len(sys.argv) > 1 else desk / 'vae.pt'
    if len(sys.argv) == 1:
        torch.manual_seed(0)
        torch.save(data.VAE().state_dict(), path)
    vae, batch = data.read_vae(path, device)[0], data.BATCH[device.type]
    images = np.stack([data.read_image(file, 3, size) for file in files])
    show(f'encoding, {size} pixels, {device}, batches of {batch}',
         lambda: [data.encode_images(vae, device, images[at:at + batch]) for at in range(0, COUNT, batch)])
    flags = [str(desk / 'moments'), '--vae', str(path), '--size', str(size)]
    show(f'prepared as moments, {size} pixels', lambda: data.main(argv + flags))
