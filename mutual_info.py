"""Is the paper's reason true: do noisy patches say less about each other than clean ones?

    python mutual_info.py --data shapes a/0010000.pt b/0010000.pt   # table, mutual_info.csv, mutual_info.png
    python mutual_info.py --data shapes --attention maps.png a/0010000.pt b/0010000.pt      # Figure 6
    python mutual_info.py --data shapes --proposition-2             # both sides of equations 5 and 6

MC-DiT (NeurIPS 2024) argues with its Figure 1(a) and Proposition 2 that noisy visible patches have less and
less information about noisy masked patches as the noise grows, while clean ones lose none. The first command
measures it in nats. The rows of its table share images, masks and noise:

    clean images            I(x1_0; x2_0)    1: masked patches, 2: visible ones, as in Proposition 2
    mixed, clean / noisy    I(x1_0; x2_t)
    noisy images            I(x1_t; x2_t)
    CKPT, inference path    I(D1; D2)        D: the network's output where nothing is masked
    CKPT, masked path       I(D1; D2)        D: its output where 1 is masked, and filled as in training

The chart shows inference paths only, and conclusions rest on them. Masked paths leak: at low noise the skip
connection copies the input, and mcdit is given the clean masked patches.

Thousands of images are too few to measure information between whole images. So each side is reduced to its
first --dims principal components, fitted on clean images once per mask and used in every row. They have less
information, but Proposition 2 holds for them too. The estimator's error is printed first, from Gaussians of
known information; numbers that are more than 10 % off get a *. With default settings:

    true            0.00    0.10    0.25    0.50    1.00    2.00    3.00    4.00    5.00    6.00    8.00
    estimated      -0.00    0.10    0.25    0.50    0.99    1.95    2.84    3.64    4.30    4.78    5.32
    std             0.02    0.03    0.03    0.04    0.04    0.04    0.04    0.04    0.03    0.02    0.01
    error             4%      0%      2%      0%      1%      2%      5%      9%     14%*    20%*    33%*

So it can be trusted up to 4 nats; with --dims 8 it misses half. Images are no Gaussians, and nothing
calibrates that. The .csv has beside each number the information of Gaussians with the same correlations.

Letters: n images    C, H, W channels, height, width    d = --dims    N tokens    x, y the two sides, (n, d)
"""

import argparse
import collections
import csv
import io
import itertools
import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree
from scipy.special import digamma

import data
import model
from model import METHODS, check

# ---------------------------------------------------------------------------------------------- estimators

NEIGHBOURS = 3                                # KSG's k: a larger one scatters less and falls shorter
JITTER = 1e-10                                # of a standard deviation: breaks ties, as KSG advise


def ksg(x, y):
    """I(x; y) from samples, by nearest neighbours: Kraskov, Stoegbauer and Grassberger 2004, algorithm 1."""
    n, rng, threads = len(x), np.random.default_rng(0), torch.get_num_threads()
    sides = []
    for side in (x, y):                                                       # scaling keeps all information
        std = side.std(0)
        check((std > 1e-9 * abs(side).max(0)).all(),
              'one side of a mask is the same in every image, so there is nothing to measure')
        sides.append((side - side.mean(0)) / std + JITTER * rng.standard_normal(side.shape))
    both = np.hstack(sides)
    distance = cKDTree(both).query(both, NEIGHBOURS + 1, p=np.inf, workers=threads)[0][:, -1]   # + 1: itself
    nearer = np.nextafter(distance, 0)                                        # strictly nearer than the k-th
    n_x, n_y = (cKDTree(side).query_ball_point(side, nearer, p=np.inf, return_length=True, workers=threads)
                for side in sides)                                            # KSG's n_x + 1: with itself
    return digamma(NEIGHBOURS) + digamma(n) - (digamma(n_x) + digamma(n_y)).mean()           # KSG eq. 8


def gaussian(S, d):
    """I(x; y) of Gaussians with covariance S, x the first d coordinates: -1/2 sum ln(1 - rho^2) over the
    canonical correlations rho, the singular values of the whitened cross-covariance. Exact."""
    Lx, Ly = np.linalg.cholesky(S[:d, :d]), np.linalg.cholesky(S[d:, d:])
    rho = np.linalg.svd(np.linalg.solve(Ly, np.linalg.solve(Lx, S[:d, d:]).T), compute_uv=False)
    return -0.5 * np.log1p(-np.minimum(rho ** 2, 1 - 1e-15)).sum()


def estimate(x, y):
    """I(x; y) from samples, and that of Gaussians with the same correlations."""
    nats, S = ksg(x, y), np.corrcoef(np.hstack([x, y]).T)
    return nats, gaussian(S + JITTER * np.eye(len(S)), x.shape[1])            # never singular


# --------------------------------------------------------------------------------------------- calibration

TRUE = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)               # nats
CALIBRATIONS = 40                             # data sets per true value
MARK = 0.1                                    # relative error above which a number gets a *
SMALL = 0.1                                   # nats: below, errors are relative to this


def calibrate(d, n):
    """Mean and standard deviation of `ksg` for TRUE, on n pairs of d equally correlated Gaussian numbers."""
    rng, found = np.random.default_rng(0), np.empty((len(TRUE), CALIBRATIONS))
    for i, information in enumerate(data.progress(TRUE, desc='calibrating', leave=False)):
        rho = math.sqrt(1 - math.exp(-2 * information / d))                   # -d/2 ln(1 - rho^2) nats
        for j in range(CALIBRATIONS):
            x, z = rng.standard_normal((2, n, d))
            found[i, j] = ksg(x, rho * x + math.sqrt(1 - rho ** 2) * z)
    return found.mean(1), found.std(1, ddof=1)


def relative_error(true, estimated):
    return abs(estimated - true) / max(true, SMALL)


def expected_error(value, calibrated):
    """Relative error of `ksg` on Gaussians for which it gives `value`; inf above all that it ever gave."""
    curve = np.maximum.accumulate(calibrated)
    true = np.interp(value, curve, TRUE)
    return relative_error(true, np.interp(true, TRUE, curve)) if value <= curve[-1] else math.inf


# ------------------------------------------------------------------------------------ images, masks, sides

def choose(dataset, images, seed):
    """Rows of the data set, drawn by `seed`, without second copies of an image: a copy would be the nearest
    neighbour of the first on both sides, and look like information."""
    rows = np.sort(np.random.default_rng([seed, 0]).permutation(dataset.count)[:images])    # in file order
    return rows[sorted({row.numpy().tobytes(): i for i, row in enumerate(dataset.rows(rows)[0])}.values())]


def read(dataset, rows, seed):
    """x0 (n, C, H, W), labels (n,), and noise of unit variance (n, C, H, W)."""
    raw, y = dataset.rows(rows)
    shape = (len(rows), dataset.channels, dataset.resolution, dataset.resolution)
    latent, noise = (torch.randn(shape, generator=model.generator('cpu', seed, purpose))
                     for purpose in ('latent', 'noise'))
    x0 = dataset.to_input(raw, latent)
    broken = rows[(~x0.isfinite()).flatten(1).any(1).numpy()]
    check(not len(broken), f'{dataset.path}/data.npy has numbers that are not finite, in images {broken[:5]}')
    return x0, y, noise


def draw_mask(resolution, square, ratio, seed, number):
    """(H, W) bool, True where visible, in squares of `square` pixels a side."""
    g = resolution // square
    K = int(g * g * (1 - ratio) + 1e-9)                                       # as Config.K
    check(0 < K < g * g, f'--mask-ratio {ratio} leaves {K} of {g * g} squares visible: choose another one')
    order = np.random.default_rng([seed, number, 1]).permutation(g * g)
    return torch.from_numpy((order < K).reshape(g, g).repeat(square, 0).repeat(square, 1))


def principal_components(x0, pixels, d):
    """A function from images (n, C, H, W) to one side of a mask, (n, d): the first d principal components of
    the clean images x0 at `pixels`, (H, W) bool."""
    def values(x):
        return x[:, :, pixels].flatten(1).double().numpy()                    # (n, C * pixels)

    mean = values(x0).mean(0)
    axes = np.linalg.svd(values(x0) - mean, full_matrices=False)[2][:d].T     # (C * pixels, d)
    return lambda x: (values(x) - mean) @ axes


# ------------------------------------------------------------------------------------------------ networks

BATCH = 50                                    # images at a time: of small networks, what CPU caches hold
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def open_networks(paths, dataset):
    """{name: (net, cfg)} of checkpoints that fit the data. Raises BadInput."""
    networks, C, H = {}, dataset.channels, dataset.resolution
    for path in paths:
        net, cfg = model.load_net(path, DEVICE)
        check((cfg.channels, cfg.resolution) == (C, H), f'{path} was made for {cfg.channels} x '
              f'{cfg.resolution} x {cfg.resolution}, and {dataset.path} holds {C} x {H} x {H}')
        check(cfg.classes in (0, dataset.classes),
              f'{path} has {cfg.classes} classes, and {dataset.path} has {dataset.classes}')
        name = f'{cfg.method} {cfg.model}' + ', tuned' * (cfg.stage == 'tune')
        networks[name if name not in networks else f'{name}, {path}'] = net, cfg
    return networks


def has_masked_path(cfg):
    """Whether the network was trained to fill masked positions beside visible ones: a tuned one was not, nor
    one that was given the noisy or the clean tokens alone (MC-DiT Table 10)."""
    return METHODS[cfg.method].fill is not None and cfg.stage == 'train' and cfg.tokens == 'both'


@torch.no_grad()
def denoised(net, cfg, x0, xt, sigma, y, seen=None):
    """D (n, C, H, W) of the noisy images xt. With `seen`, (H, W) bool, by the masked path: these pixels are
    visible, and the rest is filled as in training. Without, by the inference path."""
    p, context, D = cfg.patch, METHODS[cfg.method].context, []
    for rows in torch.arange(len(xt)).split(BATCH):
        visible, clean = None, None
        if seen is not None:
            visible = seen[::p, ::p].flatten().nonzero().T.expand(len(rows), -1).to(DEVICE)      # (n, K)
            if context is not None:
                clean = context(model.patchify(x0[rows].to(DEVICE), p), cfg)       # (n, N, P)
                clean = model.unpatchify(clean, p, cfg.channels)              # (n, C, H, W)
        x, levels = xt[rows].to(DEVICE), torch.full((len(rows),), sigma, device=DEVICE)
        D.append(model.denoise_images(net, x, levels, y[rows].to(DEVICE), cfg, visible, clean).cpu())
    return torch.cat(D)


# --------------------------------------------------------------------------------------------- measurement

CLEAN, MIXED, NOISY = 'clean images', 'mixed, clean / noisy', 'noisy images'
INFERENCE, MASKED = ', inference path', ', masked path'


def measure(samples, splits, sigmas, networks):
    """{(row, sigma): [(seed, mask, ksg, gaussian), ...]}. For each seed, `samples` has x0, y, noise, and
    `splits` a list of masks: pixels seen (H, W), and functions to masked side 1 and visible side 2."""
    found = collections.defaultdict(list)
    for seed, (x0, _, noise) in enumerate(samples):
        for mask, (_, side1, side2) in enumerate(splits[seed]):
            clean = estimate(side1(x0), side2(x0))                            # the same at any noise level
            for sigma in sigmas:
                xt = x0 + sigma * noise
                found[CLEAN, sigma].append((seed, mask, *clean))
                found[MIXED, sigma].append((seed, mask, *estimate(side1(x0), side2(xt))))
                found[NOISY, sigma].append((seed, mask, *estimate(side1(xt), side2(xt))))

    jobs = list(itertools.product(networks, range(len(samples)), sigmas))
    for name, seed, sigma in data.progress(jobs, desc='measuring'):
        (net, cfg), (x0, y, noise) = networks[name], samples[seed]
        xt = x0 + sigma * noise
        D = denoised(net, cfg, x0, xt, sigma, y)
        check(D.isfinite().all(), f'{name} gives numbers that are not finite at sigma {sigma:g}: it diverged')
        for mask, (seen, side1, side2) in enumerate(splits[seed]):
            found[name + INFERENCE, sigma].append((seed, mask, *estimate(side1(D), side2(D))))
            if has_masked_path(cfg):
                D_masked = denoised(net, cfg, x0, xt, sigma, y, seen)
                found[name + MASKED, sigma].append((seed, mask, *estimate(side1(D_masked), side2(D_masked))))
    return found


def summarise(found, calibrated):
    """{row: [(sigma, mean, standard deviation, expected error), ...]}"""
    table = collections.defaultdict(list)
    for (row, sigma), numbers in found.items():
        nats = [value for _, _, value, _ in numbers]
        mean, std = np.mean(nats), np.std(nats, ddof=1)
        table[row].append((sigma, mean, std, expected_error(mean, calibrated)))
    return table


def print_table(table):
    wide = max(map(len, table)) + 2
    print(f'\n{"nats at sigma":{wide}}' + ''.join(f'{sigma:<14g}' for sigma, *_ in table[CLEAN]))
    for row, cells in table.items():
        print(f'{row:{wide}}' + ''.join(f'{mean:5.2f} +-{std:5.2f}{"*" if error > MARK else " "}'
                                        for _, mean, std, error in cells))
    print('* more than 10 % off on Gaussians (or 0.01 nats), or beyond the calibration: trust only the order')


def write_csv(path, found, table, settings, paths):
    """One line per row, noise level, seed and mask, with the mean over seeds and masks and every setting."""
    text = io.StringIO(newline='')
    lines = csv.writer(text)
    lines.writerow(['row', 'checkpoint', 'sigma', 'seed', 'mask', 'ksg', 'gaussian', 'mean', 'std', 'error',
                    *settings])
    for row, cells in table.items():
        checkpoint = paths.get(row.removesuffix(INFERENCE).removesuffix(MASKED), '')
        for sigma, *summary in cells:
            for numbers in found[row, sigma]:
                lines.writerow([row, checkpoint, sigma, *numbers, *summary, *settings.values()])
    with data.whole_file(path) as file:
        file.write(text.getvalue().encode())


def draw_chart(path, table, networks, settings):
    """In the manner of MC-DiT Figure 1(a): the images, and the inference path of each network."""
    colours = {CLEAN: (0, 0, 0), MIXED: (110, 110, 110), NOISY: (175, 175, 175)}
    for name, (_, cfg) in networks.items():
        colours[name + INFERENCE] = data.COLOURS[list(METHODS).index(cfg.method) % 6]
    series = [(row.removesuffix(INFERENCE), colour, *list(zip(*table[row]))[:3])         # sigma, mean, std
              for row, colour in colours.items()]
    title = 'information between masked and visible patches; bars: std over {seeds} seeds x {masks} masks'
    data.chart(path, title.format(**settings), series, 'noise level sigma', 'nats, networks: inference paths',
               log_x=True)


# -------------------------------------------------------------------------------------------- Proposition 2

def proposition_2(S, d, sigma):
    """Left and right side of MC-DiT eq. 5, then of eq. 6, for Gaussians with covariance S whose first d
    coordinates are x1_0 and the rest x2_0, under white noise. Each term is a closed form of its own."""
    T = np.block([[S, S], [S, S + sigma ** 2 * np.eye(len(S))]])              # of (x1_0, x2_0, x1_t, x2_t)
    x1_0, x2_0, x1_t, x2_t = np.split(np.arange(len(T)), [d, len(S), len(S) + d])
    information = lambda a, b: gaussian(T[np.ix_([*a, *b], [*a, *b])], len(a))

    def kl(a, b, c):                          # E KL(p(a|b) || p(a|c)), of N(A b, P) and N(B c, Q)
        A, B = (np.linalg.solve(T[np.ix_(z, z)], T[np.ix_(z, a)]).T for z in (b, c))
        P, Q = (T[np.ix_(a, a)] - M @ T[np.ix_(z, a)] for M, z in ((A, b), (B, c)))
        M = np.hstack([A, -B])
        apart = M @ T[np.ix_([*b, *c], [*b, *c])] @ M.T                       # covariance of A b - B c
        log_ratio = np.linalg.slogdet(Q)[1] - np.linalg.slogdet(P)[1]
        return 0.5 * (np.trace(np.linalg.solve(Q, P + apart)) - len(a) + log_ratio)

    mixed = information(x1_0, x2_0) - kl(x1_0, x2_0, x2_t)                    # eq. 5
    return information(x1_0, x2_t), mixed, information(x1_t, x2_t), mixed - kl(x2_t, x1_0, x1_t)      # eq. 6


# ----------------------------------------------------------------------------- attention: MC-DiT Figure 6

@torch.no_grad()
def attention_received(net, cfg, xt, sigma, y):
    """(n, g, g): the attention each token receives in the encoder's last block, a mean over heads and
    queries, in multiples of 1/N. From q and k, because the fused attention never shows its weights."""
    block, made = net.encoder.blocks[-1], []
    hook = block.qkv.register_forward_hook(lambda layer, inputs, qkv: made.append(qkv))
    model.denoise_images(net, xt, torch.full((len(xt),), sigma, device=xt.device), y, cfg)
    hook.remove()
    q, k, _ = made[0].unflatten(2, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)    # (n, heads, N, ..)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])                 # (n, heads, N, N)
    if block.bias is not None:                                                # MDT
        logits = logits + block.bias[model.relative_positions(cfg.grid, xt.device)].movedim(-1, 0)
    received = logits.softmax(-1).mean((1, 2))[:, -cfg.N:]                    # SD-DiT's [CLS] comes first
    return cfg.N * received.unflatten(1, (cfg.grid, cfg.grid))


def heat(v):
    """(H, W) in [0, 1] -> an image: black, red, yellow, white."""
    rgb = torch.stack([3 * v, 3 * v - 1, 3 * v - 2], -1).clamp(0, 1)
    return Image.fromarray((rgb * 255).to(torch.uint8).numpy())


def draw_attention(path, dataset, show, sigmas, networks):
    """A PNG: per image a row of its noisy versions and a row of maps per network, all maps on one scale."""
    x0, y, noise = read(dataset, np.array(show), seed=0)
    noisy, maps = [], {name: [] for name in networks}
    for sigma in sigmas:
        xt = x0 + sigma * noise
        x = xt / math.sqrt(1 + sigma ** 2)
        noisy.append(data.to_uint8(x if x.shape[1] in (1, 3) else x[:, :1] / 3))             # latents: grey
        for name, (net, cfg) in networks.items():
            maps[name].append(attention_received(net, cfg, xt.to(DEVICE), sigma, y.to(DEVICE)).cpu())
    most = max(one.max().item() for some in maps.values() for one in some)
    rows = []                                                                 # (label, one tile per sigma)
    for i, number in enumerate(show):
        tiles = [x[i].expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy() for x in noisy]
        rows.append((f'image {number}', [Image.fromarray(tile) for tile in tiles]))
        rows += [(name, [heat(one[i] / most) for one in some]) for name, some in maps.items()]

    font, side = ImageFont.load_default(12), dataset.resolution * max(1, 96 // dataset.resolution)
    left, top, cell = 10 + int(max(font.getlength(label) for label, _ in rows)), 44, side + 6
    bottom, bar = top + len(rows) * cell, max(len(sigmas) * cell - 6, 480)
    sheet = Image.new('RGB', (left + bar + 20, bottom + 40), 'white')
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 6), 'attention each token receives in the last block of the encoder, in multiples of 1/N',
             'black', font)
    for row, (label, tiles) in enumerate(rows):
        pen.text((left - 6, top + row * cell + side // 2), label, 'black', font, anchor='rm')
        for column, tile in enumerate(tiles):
            tile = tile.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * cell, top + row * cell))
    for column, sigma in enumerate(sigmas):
        pen.text((left + column * cell, top - 4), f'sigma {sigma:g}', 'black', font, anchor='lb')
    sheet.paste(heat(torch.linspace(0, 1, bar).expand(12, -1)), (left, bottom))              # the colour bar
    for share in (0, 0.25, 0.5, 0.75, 1):
        pen.text((left + share * bar, bottom + 16), f'{share * most:.2f}', 'black', font, anchor='ma')
    with data.whole_file(path) as file:
        sheet.save(file, 'PNG')


# ------------------------------------------------------------------------------------------- command line

PER_DIM = 50                                  # images needed, at least, for each of --dims
IGNORED = {'--attention': ('images', 'dims', 'masks', 'seeds', 'mask_ratio', 'out'),
           '--proposition-2': ('masks', 'seeds', 'out', 'show'), 'the table': ('show',)}


def parse(argv):
    parser = argparse.ArgumentParser(
        description='Measure the information between visible and masked patches.', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag('checkpoints', nargs='*', default=[], metavar='CKPT', help='files of train.py or finetune.py')
    flag('--data', default='shapes', help='data folder')
    flag('--images', type=int, default=1000, help='images per seed, or all there are')
    flag('--dims', type=int, default=2, help='principal components on each side of a mask')
    flag('--masks', type=int, default=2, help='masks per seed')
    flag('--seeds', type=int, default=2, help='number of seeds, 0, 1, .., of images, noise and masks')
    flag('--mask-ratio', type=float, default=0.5, help='share of the image that is masked, in every row')
    flag('--sigmas', type=float, nargs='+', default=[0.1, 0.3, 1.0, 3.0, 10.0], metavar='S',
         help='noise levels')
    flag('--out', default='mutual_info', help='the .csv and .png to write, without their endings')
    flag('--show', type=int, nargs='+', metavar='I', help='images of --attention; None: the first 3 held out')
    flag = parser.add_mutually_exclusive_group().add_argument
    flag('--attention', metavar='PNG', help='draw attention maps of the checkpoints, Figure 6, instead')
    flag('--proposition-2', action='store_true', help='print both sides of MC-DiT eq. 5 and 6 instead')
    args = parser.parse_args(argv)

    what = '--attention' if args.attention else '--proposition-2' if args.proposition_2 else 'the table'
    for name in IGNORED[what]:
        check(getattr(args, name) == parser.get_default(name),
              f'--{name.replace("_", "-")} means nothing to {what}: leave it out')
    check(args.checkpoints or not args.attention, '--attention needs checkpoints: type their names')
    check(min(args.images, args.dims, args.masks, args.seeds) > 0 and args.masks * args.seeds > 1,
          '--images, --dims, --masks and --seeds must be at least 1, and --masks or --seeds at least 2')
    check(all(1e-3 <= sigma <= 1e4 for sigma in args.sigmas), '--sigmas must lie between 0.001 and 10,000')
    args.sigmas = sorted(set(args.sigmas))
    outputs = {'--attention': [args.attention], 'the table': [f'{args.out}.csv', f'{args.out}.png']}
    for path in outputs.get(what, []):
        check(os.path.isdir(os.path.dirname(path) or '.') and not os.path.exists(path),
              f'{path} exists already, or its folder does not: choose another name')
    return args


def main(argv=None):
    args = parse(argv)
    d, sigmas = args.dims, args.sigmas

    # data and networks
    dataset = data.open_data(args.data)
    networks = open_networks(args.checkpoints, dataset)
    if args.attention:
        show = args.show or list(range(dataset.trained, dataset.count))[:3]
        check(all(0 <= i < dataset.count for i in show),
              f'--show {show}: {args.data} holds the images 0 to {dataset.count - 1}')
        draw_attention(args.attention, dataset, show, sigmas, networks)
        return print(f'attention on {len(show)} images in {args.attention}')

    # images, and masks in squares of the largest patch: the same for every network
    seeds, masks = (1, 1) if args.proposition_2 else (args.seeds, args.masks)
    square = max([cfg.patch for _, cfg in networks.values()], default=math.gcd(2, dataset.resolution))
    chosen = [choose(dataset, args.images, seed) for seed in range(seeds)]
    n = min(map(len, chosen))
    check(n >= PER_DIM * d, f'{n} different images are too few for --dims {d}: at least {PER_DIM * d}')
    samples = [read(dataset, rows[:n], seed) for seed, rows in enumerate(chosen)]
    splits = []
    for seed, (x0, _, _) in enumerate(samples):
        drawn = [draw_mask(dataset.resolution, square, args.mask_ratio, seed, i) for i in range(masks)]
        splits.append([(seen, principal_components(x0, ~seen, d), principal_components(x0, seen, d))
                       for seen in drawn])

    if args.proposition_2:
        (x0, _, _), (_, side1, side2) = samples[0], splits[0][0]
        S = np.cov(np.hstack([side1(x0), side2(x0)]).T)
        print(f'Gaussians with the covariance of the data, {d} dims per side; clean: {gaussian(S, d):.6f}')
        print('   sigma   I(x1_0; x2_t)  right of eq. 5   I(x1_t; x2_t)  right of eq. 6  difference')
        for sigma in sigmas:
            a, b, c, e = proposition_2(S, d, sigma)
            print(f'{sigma:8.3g}{a:16.6f}{b:16.6f}{c:16.6f}{e:16.6f}{max(abs(a - b), abs(c - e)):12.0e}')
        return print('x1_t - x1_0 - x2_0 - x2_t is a Markov chain: the paper\'s "approximately" is "equals"')

    # header and calibration
    settings = {'data': args.data, 'images': n, 'dims': d, 'seeds': seeds, 'masks': masks,
                'mask_ratio': args.mask_ratio, 'square': square, 'neighbours': NEIGHBOURS}
    print(f'{args.data}: {seeds} seeds x {masks} masks, {n} different images per seed,\n{d} principal '
          f'components per side, {args.mask_ratio:.0%} masked in squares of {square} x {square} pixels')
    paths = dict(zip(networks, args.checkpoints))
    for name, (_, cfg) in networks.items():
        print(f'{name}: {paths[name]}' + ', which has no masked path' * (not has_masked_path(cfg)))
    calibrated, spread = calibrate(d, n)
    print(f'\ncalibration: estimates from {n} Gaussian pairs of {d} coordinates (nats)')
    for label, row in (('true', TRUE), ('estimated', calibrated), ('std', spread)):
        print(f'{label:12}' + ''.join(f'{value:8.2f}' for value in row))
    errors = [relative_error(*pair) for pair in zip(TRUE, calibrated)]
    print(f'{"error":12}' + ''.join(f'{error:7.0%}{"*" if error > MARK else " "}' for error in errors))

    # measurement, table, files
    found = measure(samples, splits, sigmas, networks)
    table = summarise(found, calibrated)
    print_table(table)
    write_csv(f'{args.out}.csv', found, table, settings, paths)
    draw_chart(f'{args.out}.png', table, networks, settings)
    print(f'every number in {args.out}.csv, the chart in {args.out}.png')


if __name__ == '__main__':
    data.script('mutual_info.py', main)
