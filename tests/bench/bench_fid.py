"""How fast is fid.py here, in CPU seconds of one thread? Run by hand; about two minutes.

    python tests/bench/bench_fid.py

Prints the network's images per second, the seconds of one Frechet distance at 2048 dimensions and its
relative error where the answer is known, and the seconds of precision and recall, 10,000 against 10,000.
"""

import os
import pathlib
import sys
import time

os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import fid  # noqa: E402

torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)


def timed(function, *args, **kwargs):
    start = time.process_time()
    return function(*args, **kwargs), time.process_time() - start


net = fid.Inception().eval().requires_grad_(False).to(memory_format=torch.channels_last)
images = torch.randint(256, (8, 256, 256, 3), generator=rng, dtype=torch.uint8).numpy()
net(fid.preprocess(images))
_, seconds = timed(lambda: [net(fid.preprocess(images)) for _ in range(3)])
print(f'network                      {24 / seconds:6.1f} images per CPU second')

D = 2048                                                    # S2 = S1^-1/2 M^2 S1^-1/2: tr (S1 S2)^1/2 = tr M
values, roots = (torch.rand(D, generator=rng, dtype=torch.float64) + 0.05 for _ in range(2))
Q, P = (torch.linalg.qr(torch.randn(D, D, generator=rng, dtype=torch.float64))[0] for _ in range(2))
S1, half, M = (Q * values) @ Q.T, (Q * values**-0.5) @ Q.T, (P * roots) @ P.T
S2, mean = half @ M @ M @ half, torch.zeros(D, dtype=torch.float64)
want = (S1.trace() + S2.trace() - 2 * roots.sum()).item()
found, seconds = timed(fid.frechet_distance, fid.Gaussian(mean, S1), fid.Gaussian(mean, S2))
print(f'Frechet distance             {seconds:6.1f} CPU s, relative error {abs(found - want) / want:.1e}')

real, fake = (torch.rand(10_000, D, generator=rng) for _ in range(2))
for mode in fid.DISTANCES:
    _, seconds = timed(fid.precision_recall, real, fake, mode=mode)
    print(f'precision and recall, {mode:5}  {seconds:6.1f} CPU s')
