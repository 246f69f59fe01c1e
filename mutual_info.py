"""Is the paper's reason true? How much do the visible and the masked patches of an image tell of each other?

    python mutual_info.py --data shapes a/0010000.pt b/0010000.pt   # table, mutual_info.csv, mutual_info.png
    python mutual_info.py --data shapes --proposition-2             # both sides of equations 5 and 6
    python mutual_info.py --data shapes --attention maps.png a/0010000.pt b/0010000.pt      # Figure 6
    python mutual_info.py --curves curves.png a b                   # Figure 3, from the log.jsonl of two runs

MC-DiT (NeurIPS 2024) argues with its Figure 1(a) and Proposition 2 that noisy visible patches tell the less
of noisy masked patches the more noise there is, and that clean ones do not suffer. The first command measures
that in nats, at several noise levels, with the same images, masks and noise in every row:

    clean images            I(x1_0; x2_0)  1: masked patches, 2: visible ones, as in Proposition 2
    mixed, clean / noisy    I(x1_0; x2_t)
    noisy images            I(x1_t; x2_t)
    CKPT, masked path       what the network makes in masked slots, and what it makes of visible patches
    CKPT, inference path    what it makes where nothing is hidden, split by the same masks

Information between whole images cannot be measured with thousands of them. Each side is reduced to its first
--dims principal components, fitted on clean images once a mask and used in every row: less information than
there is, but Proposition 2 holds for it as well. What the estimator is worth is printed first, from Gaussians
whose information is known, and each number gets a * where it is more than 10 % off. With default settings:

    true            0.00    0.10    0.25    0.50    1.00    2.00    3.00    4.00    5.00    6.00    8.00
    estimated      -0.00    0.10    0.25    0.50    0.99    1.95    2.84    3.64    4.30    4.78    5.32
    deviation       0.02    0.03    0.03    0.04    0.04    0.04    0.04    0.04    0.03    0.02    0.01
    error             4%      0%      2%      0%      1%      2%      5%      9%     14%*    20%*    33%*

so it is trusted up to 4 nats; with --dims 8 it misses half. Images are no Gaussians, and nothing calibrates
that: the .csv has beside each number the information of Gaussians with the same covariance.

Letters: n images    C, H, W channels, height, width    d = --dims    N tokens    x, y the sides, (n, d) each
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import os
import pathlib
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree
from scipy.special import digamma
from tqdm import tqdm

import data
import model
from data import BadInput

# ---------------------------------------------------------------------------------------------- estimators

NEIGHBOURS = 3                                # k: more of them scatter less and fall shorter
JITTER = 1e-10                                # of a standard deviation: breaks ties, as KSG advise


def gaussian(S, d):
    """I(x; y) of Gaussians with covariance S, x the first d coordinates: -1/2 sum ln(1 - rho^2) over the
    canonical correlations rho, the singular values of the whitened cross-covariance. Exact."""
    Lx, Ly = np.linalg.cholesky(S[:d, :d]), np.linalg.cholesky(S[d:, d:])
    rho = np.linalg.svd(np.linalg.solve(Ly, np.linalg.solve(Lx, S[:d, d:]).T), compute_uv=False)
    return -0.5 * np.log1p(-np.minimum(rho ** 2, 1 - 1e-15)).sum()


def standardise(x):
    """Each coordinate with mean 0 and deviation 1, which keeps all information. BadInput for constants."""
    deviation = x.std(0)
    if not (deviation > 1e-9 * abs(x).max(0)).all():
        raise BadInput('one side of a mask is the same in every image, so there is nothing to measure')
    return (x - x.mean(0)) / deviation


def ksg(x, y):
    """I(x; y) from samples, by nearest neighbours: Kraskov, Stoegbauer and Grassberger 2004, algorithm 1."""
    n, rng, threads = len(x), np.random.default_rng(0), torch.get_num_threads()
    x, y = (standardise(side) + JITTER * rng.standard_normal(side.shape) for side in (x, y))
    both = np.hstack([x, y])
    reach = cKDTree(both).query(both, NEIGHBOURS + 1, p=np.inf, workers=threads)[0][:, -1]   # + 1: itself
    nearer = np.nextafter(reach, 0)                                           # strictly, than the k-th one
    n_x, n_y = (cKDTree(side).query_ball_point(side, nearer, p=np.inf, return_length=True, workers=threads)
                for side in (x, y))                                           # KSG's n_x + 1: with itself
    return digamma(NEIGHBOURS) + digamma(n) - (digamma(n_x) + digamma(n_y)).mean()           # KSG eq. 8


# --------------------------------------------------------------------------------------------- calibration

TRUE = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)               # nats
CALIBRATIONS = 40                             # samples of Gaussians for each
TOO_FAR, SMALL = 0.1, 0.1                     # marked: 10 % off, and of 0.1 nats where the truth is less


def calibrate(d, n):
    """What `ksg` makes of n pairs of d equally correlated Gaussian numbers: means, deviations for TRUE."""
    rng, found = np.random.default_rng(0), np.empty((len(TRUE), CALIBRATIONS))
    for i, information in enumerate(tqdm(TRUE, 'calibrating', leave=False, disable=None)):
        rho = math.sqrt(1 - math.exp(-2 * information / d))                   # -d/2 ln(1 - rho^2) nats
        for j in range(CALIBRATIONS):
            x, z = rng.standard_normal((2, n, d))
            found[i, j] = ksg(x, rho * x + math.sqrt(1 - rho ** 2) * z)
    return found.mean(1), found.std(1, ddof=1)


def off(truth, estimate):
    return abs(estimate - truth) / max(truth, SMALL)


def distrust(value, calibrated):
    """How far `off` the estimator is on Gaussians where it says `value`; inf above all that it ever said."""
    curve = np.maximum.accumulate(calibrated)
    truth = np.interp(value, curve, TRUE)
    return off(truth, np.interp(truth, TRUE, curve)) if value <= curve[-1] else math.inf


# ------------------------------------------------------------------------------------ images, masks, sides

def choose(dataset, images, seed):
    """Rows of the data set, drawn by `seed`. A second copy of an image is left out: it would be the nearest
    neighbour of the first on both sides, and look like information."""
    rows = np.sort(np.random.default_rng([seed, 0]).permutation(dataset.count)[:images])     # as on the disk
    return rows[sorted({row.numpy().tobytes(): i for i, row in enumerate(dataset.rows(rows)[0])}.values())]


def read(dataset, rows, seed):
    """x0, labels, and noise of unit variance (n, C, H, W)."""
    raw, y = dataset.rows(rows)
    shape = (len(rows), dataset.channels, dataset.resolution, dataset.resolution)
    latent, noise = (torch.randn(shape, generator=model.generator('cpu', seed, purpose))
                     for purpose in ('latent', 'noise'))
    x0 = dataset.to_input(raw, latent)
    broken = rows[(~torch.isfinite(x0)).flatten(1).any(1).numpy()]
    if len(broken):
        raise BadInput(f'{dataset.path}/data.npy has numbers that are not finite, first in image {broken[0]}')
    return x0, y, noise


def draw_mask(resolution, square, ratio, seed, number):
    """(H, W) bool, True where visible, in squares of so many pixels a side."""
    g = resolution // square
    K = model.visible_count(g * g, ratio)
    if K == g * g:
        raise BadInput(f'--mask-ratio {ratio} masks none of {K} squares: use a larger one')
    order = np.random.default_rng([seed, number, 1]).permutation(g * g)
    return torch.from_numpy((order < K).reshape(g, g).repeat(square, 0).repeat(square, 1))


def fit(x0, where, d):
    """A side of a mask: its pixels, the mean of clean images there, and d principal components."""
    values = x0[:, :, where].flatten(1).double().numpy()                      # (n, C * pixels)
    mean = values.mean(0)
    _, size, axes = np.linalg.svd(values - mean, full_matrices=False)
    varying = int((size > 1e-6 * max(size[0], abs(values).max())).sum())
    if varying < d:
        raise BadInput(f'these images vary in {varying} directions on one side of a mask, are they constant? '
                       f'--dims {d} needs as many')
    return where, mean, axes[:d].T


def project(x, side):
    where, mean, axes = side
    return (x[:, :, where].flatten(1).double().numpy() - mean) @ axes         # (n, d)


# ------------------------------------------------------------------------------------ what a network makes

BATCH = 50                                    # of small networks, what a processor's caches hold


def masked_path(cfg):
    """Whether the network can fill masked slots beside visible ones: dit never could, a tuned one has
    lost what did, and --tokens noisy or clean (MC-DiT Table 10) trains on one of the two kinds alone."""
    return cfg['method'] != 'dit' and cfg['stage'] == 'train' and cfg.get('tokens', 'both') == 'both'


@torch.no_grad()
def look(net, cfg, x0, xt, sigma, y, seen=None):
    """D (n, C, H, W), what a network makes of noisy images: its masked path, with the pixels `seen` (H, W)
    visible and the rest filled as in training, or without them its inference path."""
    p, sd, device, made = net.patch, cfg['sigma_data'], net.pos.device, []
    for rows in torch.arange(len(xt)).split(BATCH):
        x, clean = xt[rows].to(device), x0[rows].to(device)
        levels, visible, patches = torch.full((len(x),), sigma, device=device), None, None
        if seen is not None:
            visible = seen[::p, ::p].flatten().nonzero().T.expand(len(x), -1).to(device)     # (n, K)
            if cfg['method'] == 'sddit':
                patches = model.patchify(model.precondition(levels, sd)[2] * x, p)           # c_in xt
            elif cfg['method'] == 'mcdit':
                x = torch.where(seen.to(device), x, clean)                    # x_in: clean where masked
                patches = model.patchify(clean / sd, p)
        made.append(model.denoise(net, x, levels, y[rows].to(device), cfg, visible, patches).cpu())
    return torch.cat(made)


def title(cfg):
    return f'{cfg["method"]} {cfg["model"]}' + ', tuned' * (cfg['stage'] == 'tune')


def open_networks(paths, dataset):
    """[(name, path, net, cfg)] of checkpoints that fit the data. Raises BadInput."""
    device, networks = torch.device('cuda' if torch.cuda.is_available() else 'cpu'), []
    for path in paths:
        net, cfg = model.load_net(path, device)
        C, H = cfg['channels'], cfg['resolution']
        if (C, H) != (dataset.channels, dataset.resolution):
            raise BadInput(f'{path} was made for {C} x {H} x {H}, and {dataset.path} holds '
                           f'{dataset.channels} x {dataset.resolution} x {dataset.resolution}')
        if cfg['classes'] not in (0, dataset.classes):
            raise BadInput(f'{path} knows {cfg["classes"]} classes, and {dataset.path} has {dataset.classes}')
        if hasattr(net, 'head'):
            del net.head                                                      # SD-DiT's loss alone uses it
        name = title(cfg)
        if any(name == other for other, *_ in networks):
            name += f', {path}'
        networks.append((name, path, net, cfg))
    return networks


# --------------------------------------------------------------------------------------------- measurement

CLEAN, MIXED, NOISY = 'clean images', 'mixed, clean / noisy', 'noisy images'
MASKED, INFERENCE = ', masked path', ', inference path'


def measure(samples, splits, sigmas, networks):
    """{(row, sigma): [(seed, mask, ksg, gaussian), ..]}. For each seed `samples` has x0, y, noise, and
    `splits` a list of visible pixels (H, W), masked side, visible side."""
    found = {}
    total = sum(map(len, splits)) * len(sigmas) * (3 + sum(1 + masked_path(cfg) for *_, cfg in networks))
    with tqdm(total=total, desc='measuring', disable=None) as bar:
        def add(row, sigma, seed, mask, x1, x2):
            if not (torch.isfinite(x1).all() and torch.isfinite(x2).all()):
                raise BadInput(f'{row}: not finite numbers at sigma {sigma:g}, so this network has diverged')
            _, masked, visible = splits[seed][mask]
            x, y = standardise(project(x1, masked)), standardise(project(x2, visible))
            S = np.cov(np.hstack([x, y]).T) + JITTER * np.eye(2 * x.shape[1])                # never singular
            found.setdefault((row, sigma), []).append((seed, mask, ksg(x, y), gaussian(S, x.shape[1])))
            bar.update()

        for (seed, (x0, y, noise)), sigma in itertools.product(enumerate(samples), sigmas):
            xt = x0 + sigma * noise
            made = {name: look(net, cfg, x0, xt, sigma, y) for name, _, net, cfg in networks}
            for mask, (visible, *_) in enumerate(splits[seed]):
                add(CLEAN, sigma, seed, mask, x0, x0)
                add(MIXED, sigma, seed, mask, x0, xt)
                add(NOISY, sigma, seed, mask, xt, xt)
                for name, _, net, cfg in networks:
                    add(name + INFERENCE, sigma, seed, mask, made[name], made[name])
                    if masked_path(cfg):
                        D = look(net, cfg, x0, xt, sigma, y, visible)
                        add(name + MASKED, sigma, seed, mask, D, D)
    return found


def summarise(found, calibrated):
    """{row: [(sigma, mean, deviation, how far off), ..]}"""
    table = {}
    for (row, sigma), numbers in sorted(found.items(), key=lambda item: item[0][1]):
        values = [value for _, _, value, _ in numbers]
        mean = np.mean(values)
        table.setdefault(row, []).append((sigma, mean, np.std(values, ddof=1), distrust(mean, calibrated)))
    return table


def write_csv(path, found, table, calibration, settings, networks):
    """Every number with every setting, a line a mask; before them the calibration."""
    paths = {name + way: path for name, path, *_ in networks for way in (MASKED, INFERENCE)}
    with data.whole_file(path) as file:
        text = io.TextIOWrapper(file, 'utf-8', newline='', write_through=True)
        lines = csv.writer(text)
        lines.writerow(['row', 'checkpoint', 'sigma', 'seed', 'mask', 'true', 'ksg', 'gaussian', 'mean',
                        'deviation', 'off', *settings])
        for true, mean, deviation in zip(TRUE, *calibration):
            lines.writerow(['calibration', '', '', '', '', true, '', '', mean, deviation, off(true, mean),
                            *settings.values()])
        for row, cells in table.items():
            for sigma, mean, deviation, far in cells:
                for seed, mask, value, linear in found[row, sigma]:
                    lines.writerow([row, paths.get(row), sigma, seed, mask, '', value, linear, mean,
                                    deviation, far, *settings.values()])
        text.detach()                                                         # whole_file closes it


# -------------------------------------------------------------------------------------------- Proposition 2

def proposition_2(S, d, sigma):
    """Left and right of MC-DiT eq. 5, then of eq. 6, for Gaussian patches with covariance S, x1_0 the first d
    coordinates and x2_0 the rest, under white noise of deviation sigma. Every term is a closed form."""
    T = np.block([[S, S], [S, S + sigma ** 2 * np.eye(len(S))]])              # of (x1_0, x2_0, x1_t, x2_t)
    x1_0, x2_0, x1_t, x2_t = np.split(np.arange(len(T)), [d, len(S), len(S) + d])

    def information(a, b):
        return gaussian(T[np.ix_([*a, *b], [*a, *b])], len(a))

    def given(a, b):                                                          # p(a | b) = N(A b, P)
        A = np.linalg.solve(T[np.ix_(b, b)], T[np.ix_(b, a)]).T
        return A, T[np.ix_(a, a)] - A @ T[np.ix_(b, a)]

    def kl(a, b, c):                                                          # E KL(p(a | b) || p(a | c))
        (A, P), (B, Q) = given(a, b), given(a, c)
        M = np.hstack([A, -B])                                                # A b - B c, between the means
        P_and_distance = P + M @ T[np.ix_([*b, *c], [*b, *c])] @ M.T
        return 0.5 * (np.trace(np.linalg.solve(Q, P_and_distance)) - len(a)
                      + np.linalg.slogdet(Q)[1] - np.linalg.slogdet(P)[1])

    mixed = information(x1_0, x2_0) - kl(x1_0, x2_0, x2_t)                    # eq. 5
    return information(x1_0, x2_t), mixed, information(x1_t, x2_t), mixed - kl(x2_t, x1_0, x1_t)      # eq. 6


def print_proposition_2(S, d, sigmas):
    print(f'Gaussians with the covariance of the data, {d} components a side, clean: {gaussian(S, d):.6f}')
    print('   sigma   I(x1_0; x2_t)  right of eq. 5   I(x1_t; x2_t)  right of eq. 6  difference')
    for sigma in sigmas:
        a, b, c, e = proposition_2(S, d, sigma)
        print(f'{sigma:8.3g}{a:16.6f}{b:16.6f}{c:16.6f}{e:16.6f}{max(abs(a - b), abs(c - e)):12.0e}')
    print('x1_t - x1_0 - x2_0 - x2_t is a Markov chain, so the "approximately" of the paper is "equals".')


# ------------------------------------------------------------------------------------------------- charts

MARGIN, WIDTH, HEIGHT, LETTERS, LINE = 130, 1000, 700, 24, 4     # drawn twice as large as saved: smooth lines
GREYS = {CLEAN: (0, 0, 0), MIXED: (120, 120, 120), NOISY: (180, 180, 180)}
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))


def ticks(low, high, log):
    """Round numbers from low to high; on a logarithmic axis 1 and 3 times powers of ten."""
    if log:
        some = (m * 10.0 ** e for e in range(-9, 10) for m in (1, 3))
        return [x for x in some if low * 0.999 < x < high * 1.001]
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(step * m for m in (0.1, 0.2, 0.5, 1, 2) if step * m * 8 >= high - low)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def polyline(pen, points, colour, dashed):
    for (x, y), (u, v) in itertools.pairwise(points):
        pieces = 2 * round(math.dist((x, y), (u, v)) / 24) + 1 if dashed else 1
        for a, b in ((i / pieces, (i + 1) / pieces) for i in range(0, pieces, 2)):
            pen.line([x + a * (u - x), y + a * (v - y), x + b * (u - x), y + b * (v - y)], colour, LINE)


def panel(pen, left, title, across, curves, log):
    """Axes with `curves`, {name: (colour, dashed, [(x, y, error bar, hollow), ..])}; `log` is for x."""
    font, top, right, bottom = ImageFont.load_default(LETTERS), 80, left + WIDTH, 80 + HEIGHT
    points = [point for _, _, some in curves.values() for point in some]
    bend = math.log if log else float
    x_low, x_high = min(x for x, *_ in points), max(x for x, *_ in points)
    x_high = x_high if x_high > x_low else x_low + 1
    y_low, y_high = min(0, *(y - e for _, y, e, _ in points)), max(y + e for _, y, e, _ in points)
    y_low, y_high = y_low - 0.02 * abs(y_high), y_high + 0.05 * abs(y_high) + 1e-6

    def at(x, y):
        u, v = (bend(x) - bend(x_low)) / (bend(x_high) - bend(x_low)), (y - y_low) / (y_high - y_low)
        return left + 40 + u * (WIDTH - 80), bottom - v * HEIGHT

    for y in ticks(y_low, y_high, False):
        v = at(x_low, y)[1]
        pen.line([left, v, right, v], (225, 225, 225), LINE // 2)
        pen.text((left - 12, v), f'{y:g}', 'black', font, anchor='rm')
    for x in ticks(x_low, x_high, log):
        u = at(x, y_low)[0]
        pen.line([u, bottom, u, bottom + 10], 'black', LINE // 2)
        pen.text((u, bottom + 30), f'{x:g}', 'black', font, anchor='mm')
    pen.rectangle([left, top, right, bottom], outline='black', width=LINE // 2)
    pen.text((left, top - 40), title, 'black', font)
    pen.text(((left + right) / 2, bottom + 66), across, 'black', font, anchor='mm')
    for i, (colour, dashed, some) in enumerate(curves.values()):
        aside = (i - len(curves) / 2) * min(2, 30 / len(curves)) if some[0][2] else 0        # bars in a row
        spots = [[(u + aside, v) for u, v in (at(x, y), at(x, y - e), at(x, y + e))] for x, y, e, _ in some]
        polyline(pen, [spot for spot, _, _ in spots], colour, dashed)
        for ((u, v), low, high), (_, _, e, hollow) in zip(spots, some):
            if e:
                pen.line([low, high], colour, LINE // 2)
                for _, end in (low, high):
                    pen.line([u - 6, end, u + 6, end], colour, LINE // 2)
            if e or len(some) == 1:                                           # a lone point has no line
                pen.ellipse([u - 6, v - 6, u + 6, v + 6], 'white' if hollow else colour, colour, LINE // 2)


def chart(path, panels, caption):
    """A PNG of panels (title, across, curves, log) side by side, one legend for all, and lines below."""
    names = {name: curve for _, _, curves, _ in panels for name, curve in curves.items()}
    font, right = ImageFont.load_default(LETTERS), len(panels) * (MARGIN + WIDTH) + 30
    width = int(max([right + 110 + font.getlength(name) for name in names]
                    + [MARGIN + 30 + font.getlength(words) for words in caption]))
    sheet = Image.new('RGB', (width, max(80 + 40 * len(names), HEIGHT + 180 + 34 * len(caption))), 'white')
    pen = ImageDraw.Draw(sheet)
    for i, one in enumerate(panels):
        panel(pen, MARGIN + i * (MARGIN + WIDTH), *one)
    for i, (name, (colour, dashed, _)) in enumerate(names.items()):
        polyline(pen, [(right, 100 + 40 * i), (right + 72, 100 + 40 * i)], colour, dashed)
        pen.text((right + 84, 100 + 40 * i), name, 'black', font, anchor='lm')
    for i, words in enumerate(caption):
        pen.text((MARGIN, HEIGHT + 175 + 34 * i), words, 'black', font)
    with data.whole_file(path) as file:
        sheet.reduce(2).save(file, 'PNG')


def draw_information(path, table, networks, settings):
    """In the manner of Figure 1(a)."""
    colours = dict(GREYS)
    for i, (name, *_) in enumerate(networks):
        colours[name + MASKED] = colours[name + INFERENCE] = COLOURS[i % len(COLOURS)]
    curves = {row: (colours[row], row.endswith(MASKED), [(*cell[:3], cell[3] > TOO_FAR) for cell in cells])
              for row, cells in table.items()}
    words = ('{data}: {images} images, {dims} principal components a side, {mask_ratio:.0%} masked; '
             'bars: deviation over {seeds} seeds x {masks} masks; hollow: off by 10 %').format(**settings)
    leaks = 'dashed, masked paths: the skip connection leaks the input; mcdit is given clean masked patches'
    title = 'information between visible and masked patches, nats'
    chart(path, [(title, 'noise level sigma', curves, True)], [words, leaks])


# ----------------------------------------------------------------------------- attention: MC-DiT Figure 6

def attention(block, qkv, index):
    """softmax(q k^T / sqrt(n) + bias), (B, heads, N, N): what the network's fused attention never shows."""
    q, k, _ = qkv.unflatten(2, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)   # (B, heads, N, n)
    bias = 0 if block.bias is None else block.bias[index].movedim(-1, 0)      # (heads, N, N)
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)


@torch.no_grad()
def attended(net, cfg, xt, sigma, y):
    """(B, g, g): the attention each token gets in the encoder's last block, a mean over heads and tokens."""
    seen = []
    hook = net.blocks[-1].qkv.register_forward_hook(lambda layer, inputs, qkv: seen.append(qkv))
    model.denoise(net, xt, torch.full((len(xt),), sigma, device=xt.device), y, cfg)
    hook.remove()
    maps = attention(net.blocks[-1], seen[0], net.relative).mean((1, 2))      # (B, N)
    return maps[:, -net.grid ** 2:].unflatten(1, (net.grid, net.grid))        # SD-DiT's [CLS] comes first


def draw_attention(path, dataset, show, sigmas, networks):
    """For each image a row of its noisy versions, and a row a network: black where it looks least, then red,
    yellow, and white where it looks most."""
    x0, y, noise = read(dataset, np.array(show), 0)
    noisy = [x0] + [(x0 + sigma * noise) / math.sqrt(1 + sigma ** 2) for sigma in sigmas]
    noisy = [x if x.shape[1] in (1, 3) else x[:, :1] / 3 for x in noisy]      # of latents, one channel
    rows = {'clean': [data.to_uint8(x).expand(-1, 3, -1, -1) for x in noisy]}
    for name, _, net, cfg in networks:
        rows[name] = [torch.full_like(rows['clean'][0], 255)]
        for sigma in sigmas:
            xt, labels = (x0 + sigma * noise).to(net.pos.device), y.to(net.pos.device)
            maps = attended(net, cfg, xt, sigma, labels).cpu()
            if not torch.isfinite(maps).all():
                raise BadInput(f'{name}: attention that is not finite at sigma {sigma:g}, so it has diverged')
            low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
            v = (maps - low) / (high - low).clamp(min=1e-12) * 3
            v = v.repeat_interleave(net.patch, 1).repeat_interleave(net.patch, 2)            # (B, H, W)
            rows[name].append((torch.stack([v, v - 1, v - 2], 1).clamp(0, 1) * 255).to(torch.uint8))
    tiles = [tile[i] for i in range(len(show)) for row in rows.values() for tile in row]
    levels = [f'sigma {sigma:g}' for sigma in sigmas]
    titles = [title for _ in show for name in rows for title in (name, *levels)]
    data.save_grid(path, torch.stack(tiles).numpy(), titles, columns=1 + len(sigmas))


# ----------------------------------------------------------------------- losses of runs: MC-DiT Figure 3

ON_CLEAN = ('clean', 'denoise', 'full', 'generate')       # the part of each method's loss that aims at x0


def read_losses(folder):
    """name, [(step, training loss), ..], [(step, held-out loss), ..] of a run. Raises BadInput."""
    path, lines = pathlib.Path(folder) / 'log.jsonl', []
    try:
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):                   # a kill cut the last line short
                lines.append(json.loads(text))
        cfg = lines[0]['config']
        name = title(cfg)
        trained = [(at['step'], [at[part]]) for at in lines for part in ON_CLEAN if part in at]
        held_out = [(at['step'], at['held_out']) for at in lines if 'held_out' in at]
        trained, held_out = ([(int(step), float(np.mean(losses))) for step, losses in some
                              if None not in losses] for some in (trained, held_out))    # null: not finite
    except OSError as problem:
        raise BadInput(f'{path} cannot be read, give the --out folders of runs: {problem.strerror}') from None
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise BadInput(f'{path} is not the log of a run of train.py or finetune.py') from None
    trained, held_out = ([(step, loss) for step, loss in some if abs(loss) < 1e9 and 0 <= step < 1e12]
                         for some in (trained, held_out))
    if not trained or not held_out:
        raise BadInput(f'{path} has no finite losses yet: let the run go on to its first --eval-every')
    return name, trained, held_out


def draw_losses(path, folders):
    curves = {}, {}                                                           # training, held out
    for i, folder in enumerate(folders):
        name, *both = read_losses(folder)
        name += f', {folder}' if name in curves[0] else ''
        for some, points in zip(curves, both):
            some[name] = COLOURS[i % len(COLOURS)], False, [(step, loss, 0, False) for step, loss in points]
    chart(path, [('training loss, clean targets', 'step', curves[0], False),
                 ('held-out loss, mean over noise levels', 'step', curves[1], False)],
          ['training: of visible patches for maskdit and mcdit (MC-DiT eq. 8), of all patches for the rest'])


# ------------------------------------------------------------------------------------------- command line

DEFAULTS = {'dims': 2, 'masks': 2, 'seeds': 2, 'mask_ratio': 0.5, 'sigmas': [0.1, 0.3, 1.0, 3.0, 10.0],
            'out': 'mutual_info'}
IMAGES, ENOUGH = 1000, 50                     # for each seed; at least, for each of --dims
READS = {'measure': {'CKPT', 'data', 'images', *DEFAULTS},
         'proposition_2': {'data', 'images', 'dims', 'mask_ratio', 'sigmas'},
         'attention': {'CKPT', 'data', 'sigmas', 'show'}, 'curves': set()}
NOTES = """\
* more than 10 % off on Gaussians (or 0.01 nats), or beyond the calibration: believe no more than the order
masked paths show leaks: at low noise the skip connection copies the input, and mcdit is given the clean
masked patches; conclusions rest on the inference paths"""


def parse(argv):
    parser = argparse.ArgumentParser(description='Information between visible and masked patches.',
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument('CKPT', nargs='*', default=[], help='files of train.py or finetune.py')
    parser.add_argument('--data', help='data folder (default: data/ if there, else shapes)')
    parser.add_argument('--images', type=int, help='for each seed (1000, or all there are)')
    parser.add_argument('--dims', type=int, help='principal components on each side of a mask (2)')
    parser.add_argument('--masks', type=int, help='for each seed (2)')
    parser.add_argument('--seeds', type=int, help='of images, noise and masks: 0, 1, .. (2)')
    parser.add_argument('--mask-ratio', type=float, help='masked part of the image, in every row (0.5)')
    parser.add_argument('--sigmas', type=float, nargs='+', metavar='S', help='noise levels (0.1 0.3 1 3 10)')
    parser.add_argument('--out', help='the .csv and .png to write, without their endings (mutual_info)')
    parser.add_argument('--show', type=int, nargs='+', metavar='I', help='images of --attention (3 held out)')
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument('--proposition-2', action='store_true', help='instead: both sides of MC-DiT eq. 5, 6')
    modes.add_argument('--attention', metavar='PNG', help='instead: attention of the checkpoints, Figure 6')
    modes.add_argument('--curves', nargs='+', metavar=('PNG', 'OUT'), help='instead: losses, Figure 3')
    return vars(parser.parse_args(argv))


def check(given):
    """(mode, every setting) of a command line. Raises BadInput."""
    mode = next((name for name in ('proposition_2', 'attention', 'curves') if name in given), 'measure')
    flag = {name: '--' + name.replace('_', '-') for name in given} | {'CKPT': 'a checkpoint'}
    for name in sorted(given.keys() - READS[mode] - {mode}):
        if given[name]:
            where = 'without --attention' if mode == 'measure' else f'to {flag[mode]}'
            raise BadInput(f'{flag[name]} means nothing {where}: leave it out')
    args = DEFAULTS | {'data': data.default_data()} | given
    picture, *of = args['curves'] if mode == 'curves' else (args.get('attention', '.png'), *args['CKPT'])
    if not picture.endswith('.png'):
        raise BadInput(f'{flag[mode]} {picture}: first comes the picture to write, a name that ends in .png')
    if mode in ('attention', 'curves') and not of:
        raise BadInput(f'{flag[mode]} needs something to draw: checkpoints, or the --out folders of runs')
    if min(args.get('images', 1), args['dims'], args['masks'], args['seeds']) < 1 \
            or max(args['masks'], args['seeds']) > 1000:
        raise BadInput('--images, --dims, --masks and --seeds must be at least 1, the last two at most 1000')
    if args['masks'] * args['seeds'] < 2:
        raise BadInput('--masks times --seeds must be at least 2, or there is no deviation')
    if not 0 < args['mask_ratio'] < 1 or not all(1e-3 <= sigma <= 1e4 for sigma in args['sigmas']):
        raise BadInput('--mask-ratio must lie between 0 and 1, and --sigmas from 0.001 to 10,000')
    table = [f'{args["out"]}.csv', f'{args["out"]}.png']
    for file in {'measure': table, 'proposition_2': []}.get(mode, [picture]):
        if os.path.exists(file) or not os.path.isdir(os.path.dirname(file) or '.'):
            raise BadInput(f'{file} exists already, or its folder does not: choose another '
                           f'{flag.get(mode, "--out")}')
    return mode, args | {'sigmas': sorted(set(args['sigmas']))}


def main(argv=None):
    mode, args = check(parse(argv))
    d, sigmas = args['dims'], args['sigmas']
    try:
        if mode == 'curves':
            draw_losses(args['curves'][0], args['curves'][1:])
            return print(f'losses of {len(args["curves"]) - 1} runs in {args["curves"][0]}')

        # data and networks
        dataset = data.open_data(args['data'])
        networks = open_networks(args['CKPT'], dataset)
        if mode == 'attention':
            show = args.get('show', list(range(dataset.trained, dataset.count))[:3])
            if not all(0 <= i < dataset.count for i in show):
                raise BadInput(f'--show {show}: {args["data"]} holds the images 0 to {dataset.count - 1}')
            draw_attention(args['attention'], dataset, show, sigmas, networks)
            return print(f'attention on {len(show)} images in {args["attention"]}')

        # images, and masks in squares of the largest patch, so that they are the same for every network
        images = args.get('images', min(IMAGES, dataset.count))
        if images > dataset.count:
            raise BadInput(f'--images {images}: {args["data"]} holds {dataset.count}')
        square = max([net.patch for *_, net, _ in networks], default=math.gcd(2, dataset.resolution))
        seeds, masks = (1, 1) if mode == 'proposition_2' else (args['seeds'], args['masks'])
        chosen = [choose(dataset, images, seed) for seed in range(seeds)]
        n = min(map(len, chosen))
        if n < ENOUGH * d:
            raise BadInput(f'{n} different images are too few for --dims {d}: at least {ENOUGH * d}')
        samples = [read(dataset, rows[:n], seed) for seed, rows in enumerate(chosen)]
        splits = []
        for seed, (x0, _, _) in enumerate(samples):
            seen = [draw_mask(dataset.resolution, square, args['mask_ratio'], seed, k) for k in range(masks)]
            if len({visible.numpy().tobytes() for visible in seen}) < masks:
                raise BadInput(f'two masks came out the same, as squares of {square} pixels make few: '
                               f'use --masks 1 and more --seeds')
            splits.append([(visible, fit(x0, ~visible, d), fit(x0, visible, d)) for visible in seen])
        if mode == 'proposition_2':
            _, *sides = splits[0][0]
            return print_proposition_2(np.cov(np.hstack([project(x0, side) for side in sides]).T), d, sigmas)

        # header and calibration
        settings = {'data': args['data'], 'images': n, 'dims': d, 'seeds': seeds, 'masks': masks,
                    'mask_ratio': args['mask_ratio'], 'square': square, 'neighbours': NEIGHBOURS}
        print(f'{args["data"]}: {seeds} seeds x {masks} masks, {n} different images a seed '
              f'({images - n} left out as duplicates),\n{d} principal components a side, '
              f'{args["mask_ratio"]:.0%} masked in squares of {square} x {square} pixels')
        for name, path, _, cfg in networks:
            why = '' if masked_path(cfg) else ', which cannot fill masked slots: inference path alone'
            print(f'{name}: {path}{why}')
        calibration = calibrate(d, n)
        print(f'\ncalibration: what the estimator makes of {n} Gaussian pairs of {d} coordinates (nats)')
        for title, row in (('true', TRUE), ('estimated', calibration[0]), ('deviation', calibration[1])):
            print(f'{title:12}' + ''.join(f'{value:8.2f}' for value in row))
        print(f'{"error":12}' + ''.join(f'{off(*pair):7.0%}{"*" if off(*pair) > TOO_FAR else " "}'
                                        for pair in zip(TRUE, calibration[0])))

        # measurement, table, files
        found = measure(samples, splits, sigmas, networks)
        table = summarise(found, calibration[0])
        wide = max(map(len, table)) + 2
        print(f'\n{"nats at sigma":{wide}}' + ''.join(f'{sigma:<14g}' for sigma in sigmas))
        for row, cells in table.items():
            print(f'{row:{wide}}' + ''.join(f'{mean:5.2f} +-{deviation:5.2f}{"*" if far > TOO_FAR else " "}'
                                            for _, mean, deviation, far in cells))
        print(NOTES)
        write_csv(f'{args["out"]}.csv', found, table, calibration, settings, networks)
        draw_information(f'{args["out"]}.png', table, networks, settings)
        print(f'every number in {args["out"]}.csv, the picture in {args["out"]}.png')
    except OSError as problem:
        raise BadInput(f'cannot write {problem.filename or "there"}: {problem.strerror or problem}') from None


if __name__ == '__main__':
    try:
        main()
    except (BadInput, model.BadInput) as mistake:
        print(f'mutual_info.py: {mistake}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('mutual_info.py: interrupted', file=sys.stderr)
        sys.exit(130)
