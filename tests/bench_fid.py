"""How fast is fid.py here, and how much memory does it want? Run by hand; a few minutes on one core.

    python tests/bench_fid.py

Prints the network's images a second on one thread; the Frechet distance at 2048 dimensions beside
`scipy.linalg.sqrtm`, in CPU seconds, with the error of each where the answer is known; and the time and the
memory beyond the features of precision and recall, 10,000 against 10,000.
"""

import os
import pathlib
import resource
import sys
import time

os.environ['OMP_NUM_THREADS'] = os.environ['OPENBLAS_NUM_THREADS'] = '1'
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402

import fid  # noqa: E402

torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)


def timed(function, *args, **kwargs):
    """(result, CPU seconds, seconds)"""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.process_time() - cpu, time.perf_counter() - wall


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB; Linux counts in KB


# precision and recall, before anything else needs memory
real, fake = (torch.rand(10_000, 2048, generator=rng) for _ in range(2))
fid.precision_recall(real[:10], fake[:10])
for mode in fid.DISTANCES:
    before = peak()
    (precision, recall), cpu, wall = timed(fid.precision_recall, real, fake, mode=mode)
    print(
        f'precision, recall, {mode:5}   10,000 x 10,000 x 2048: {cpu:6.1f} CPU s, {wall:6.1f} s, '
        f'{peak() - before:4.0f} MB more at the peak',
        flush=True,
    )
del real, fake

# the network
net = fid.Inception().train(False).requires_grad_(False).to(memory_format=torch.channels_last)
images = torch.randint(256, (8, 256, 256, 3), generator=rng, dtype=torch.uint8).numpy()
for batch in (4, 8):
    with torch.no_grad():
        net(fid.preprocess(images[:batch]))
        part = images[:batch]
        _, cpu, wall = timed(lambda part=part: [net(fid.preprocess(part)) for _ in range(24 // len(part))])
    print(f'network, batch {batch}: {24 / cpu:5.1f} images a CPU second, {24 / wall:5.1f} a second')

# Frechet distance: S2 = S1^-1/2 M^2 S1^-1/2, so that tr (S1 S2)^1/2 = tr M
D = 2048
values, more = (torch.rand(D, generator=rng, dtype=torch.float64) + 0.05 for _ in range(2))
Q, P = (torch.linalg.qr(torch.randn(D, D, generator=rng, dtype=torch.float64))[0] for _ in range(2))
S1, half, M = (Q * values) @ Q.T, (Q * values**-0.5) @ Q.T, (P * more) @ P.T
S2 = half @ M @ M @ half
S2 = (S2 + S2.T) / 2
mean = torch.zeros(D, dtype=torch.float64)
want = (S1.trace() + S2.trace() - 2 * more.sum()).item()
ours, cpu, wall = timed(fid.frechet_distance, mean, S1, mean, S2)
print(f'eigenvalues, 2048: {cpu:6.2f} CPU s, {wall:6.2f} s, relative error {abs(ours - want) / want:.1e}')
root, slow, wall = timed(scipy.linalg.sqrtm, S1.numpy() @ S2.numpy())
theirs = (S1.trace() + S2.trace()).item() - 2 * np.trace(root).real
print(f'scipy sqrtm, 2048: {slow:6.2f} CPU s, {wall:6.2f} s, relative error {abs(theirs - want) / want:.1e}')
print(f'eigenvalues are {slow / cpu:.1f} times faster')
