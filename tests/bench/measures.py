"""What is measured of a run of evidence.py, and against which images? Imported by it, no command.

    frechet, precision, recall    fid.py's, in the features of a shape classifier trained on the same data set
    frechet_pixels                the same distance of the pixels themselves, from 0 to 1: digits only
    fidelity                      share of the samples that the classifier assigns to the class asked for
    nearest                       root mean square distance to the nearest training image, mean over samples:
                                  far below that of unseen images, the network has memorised
    eyes, bars, ring              context: share of the faces with equal eyes, of the bars with equal lengths,
                                  of the rings that are closed, among samples that show their class
    loss@SIGMA                    loss at a noise level on unseen images, through the inference path
"""

import dataclasses
import functools
import json
import math
import os
import pathlib

import numpy as np
import scipy.ndimage
import torch

import classifier
import data
import fid
import model
import sample
import train

ROOT = pathlib.Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------ data sets

SETS = {
    'digits': dict(model='T/2', size=8, channels=1, batch=64, masked=3000, tuned=1000,
                   rates=(1e-3, 2e-3, 4e-3), samples=1500, reference=1500, unseen=297),
    'shapes': dict(model='T/2', size=12, channels=3, batch=64, masked=4000, tuned=1000,
                   rates=(1e-3, 2e-3, 4e-3), samples=2000, reference=5000, unseen=500, images=20_000),
    'large': dict(model='S/2', size=32, channels=3, batch=256, masked=2000, tuned=500,
                  rates=(2e-4, 4e-4, 8e-4), samples=2000, reference=5000, unseen=500, images=50_000)}


def digits():
    """(images uint8 (1797, 1, 8, 8), labels) in an order that mixes the writers: 1,500 to train on."""
    with np.load(ROOT / 'tests/bench/digits.npz') as file:
        order = np.random.default_rng(0).permutation(len(file['labels']))
        return file['images'][order][:, None], file['labels'][order].astype(np.int64)


def images_of(name, size, part):
    """(images, labels) of a data set: to 'train' on, 'reference' of distances, or 'unseen'."""
    s = SETS[name]
    if name == 'digits':
        images, labels = digits()
        rows = slice(s['reference'], None) if part == 'unseen' else slice(s['reference'])
        return images[rows], labels[rows]
    if part == 'train':
        folder = data.Data(f'shapes{size}')
        return np.array(folder.array[:folder.trained]), folder.labels[:folder.trained]
    return classifier.draw(size, s[part], seed={'reference': 1003, 'unseen': 1004}[part])


# -------------------------------------------------------------------------------------------------- context

def coverage(image):
    """How much of each pixel (H, W) the shape covers: its colour is one, the background's is a plane."""
    _, H, W = image.shape
    c = image.reshape(3, -1).T.astype(np.float64)                             # (H W, 3)
    y, x = np.mgrid[:H, :W].reshape(2, -1)
    plane = np.stack([np.ones(H * W), x, y], 1)
    back = (x == 0) | (y == 0) | (x == W - 1) | (y == H - 1)
    for _ in range(5):
        ground = plane @ np.linalg.lstsq(plane[back], c[back], rcond=None)[0]
        away = np.linalg.norm(c - ground, axis=1)
        paint = c[away >= 0.9 * np.sort(away)[-max(3, H * W // 20)]].mean(0) - ground
        a = ((c - ground) * paint).sum(1) / (paint ** 2).sum(1).clip(1)
        back = a < 0.15
    return a.clip(0, 1).reshape(H, W)


def box(a):
    """(left, right, top, bottom) of what is covered, to fractions of a pixel."""
    ends = []
    for line in (a.max(0), a.max(1)):
        at = np.flatnonzero(line > 0.2)
        first, last = (at[0], at[-1]) if len(at) else (0, len(line) - 1)
        ends += [first + 1 - line[first], last + line[last]]
    return ends


def mass(a, left, right, top, bottom):
    """The integral of a (H, W) over a rectangle."""
    def overlap(n, low, high):                                                # of pixel i, (n,)
        return (np.minimum(np.arange(n) + 1, high) - np.maximum(np.arange(n), low)).clip(0, 1)
    return overlap(a.shape[0], top, bottom) @ a @ overlap(a.shape[1], left, right)


def eyes(a):
    """Area of the smaller eye by that of the larger."""
    left, right, top, bottom = box(a)
    x, y, r = (left + right) / 2, (top + bottom) / 2, (right - left + bottom - top) / 4 / 0.98
    areas = [mass(1 - a, x + (k - 0.3) * r, x + (k + 0.3) * r, y - 0.58 * r, y + 0.02 * r)
             for k in (-0.38, 0.38)]
    return min(areas) / max(*areas, 1e-9)


def bars(a):
    """Area of the smallest bar by that of the largest."""
    left, right, top, bottom = box(a)
    y, r = (top + bottom) / 2, (bottom - top) / 2 / 0.9
    areas = [mass(a, left - 1, right + 1, y + (k - 0.35) * r, y + (k + 0.35) * r) for k in (-0.7, 0, 0.7)]
    return min(areas) / max(*areas, 1e-9)


def ring(a):
    """Coverage where the ring is thinnest."""
    left, right, top, bottom = box(a)
    x, y, r = (left + right) / 2, (top + bottom) / 2, (right - left + bottom - top) / 4 / 0.95
    angle = np.arange(48) * math.pi / 24
    path = [y - 0.5 + 0.72 * r * np.sin(angle), x - 0.5 + 0.72 * r * np.cos(angle)]
    return scipy.ndimage.map_coordinates(a, path, order=1, mode='nearest').min()


PARTS = {'eyes': ('face', eyes), 'bars': ('bars', bars), 'ring': ('ring', ring)}
BROKEN = {                                    # the same shapes with one part exchanged
    'face': lambda x, y: (data.disc(x, y, 0.98) & ~data.disc(x, y, 0.2, 0.38, -0.28)
                          & ~data.disc(x, y, 0.33, -0.38, -0.28) & ~data.box(x, y, 0.45, 0.14, 0, 0.42)),
    'bars': lambda x, y: (data.box(x, y, 0.9, 0.2, 0, -0.7) | data.box(x, y, 0.5, 0.2, -0.4)
                          | data.box(x, y, 0.9, 0.2, 0, 0.7)),
    'ring': lambda x, y: (data.disc(x, y, 0.95) & ~data.disc(x, y, 0.5)
                          & ~((abs(y - x) < 0.3) & (x + y > 0)))}


def draw_class(label, size, count, seed, broken=False):
    """`count` drawn shapes of one class, uint8 (n, 3, size, size)."""
    whole = data.SHAPES[label]
    data.SHAPES[label] = BROKEN[label] if broken else whole
    try:
        labels = np.full(count, list(data.SHAPES).index(label))
        return data.draw_shapes(labels, size, np.random.default_rng(seed))
    finally:
        data.SHAPES[label] = whole


@functools.lru_cache(maxsize=None)
def threshold(part, size):
    """Half-way between the medians of real shapes and of those with one part exchanged."""
    label, score = PARTS[part]
    medians = [np.median([score(coverage(image)) for image in draw_class(label, size, 200, 1005, broken)])
               for broken in (False, True)]
    return sum(medians) / 2


def context(images, labels, predicted):
    """The share of the images of a class, among those that show it, whose parts belong together."""
    found, names = {}, list(data.SHAPES)
    for part, (label, score) in PARTS.items():
        mine = images[(labels == names.index(label)) & (predicted == names.index(label))]
        reached = [score(coverage(image)) > threshold(part, images.shape[-1]) for image in mine]
        found[part] = float(np.mean(reached)) if reached else math.nan
    return found


# --------------------------------------------------------------------------------------------- all measures

def folder_of(name, size):
    return f'{"digits" if name == "digits" else "shapes"}{size}'


def prepare(name, size, key):
    """Data folders and the classifier in the current folder, and what unseen real images score. The name of
    the classifier has `key`, the hash of the code behind it."""
    s, meta, folder = SETS[name], {'kind': 'images', 'classes': 10}, folder_of(name, size)
    if not os.path.exists(folder) and name == 'digits':                       # the last 2 % are held out: 30
        images, labels = (part[:1530] for part in digits())
        data.save_folder(folder, zip(images, labels), 'uint8', (1, size, size), meta)
    elif not os.path.exists(folder):
        data.make_shapes(folder, size, s['images'])
    if not os.path.exists(f'{folder}-unseen'):
        images, labels = images_of(name, size, 'unseen')
        data.save_folder(f'{folder}-unseen', zip(images, labels), 'uint8', images.shape[1:], meta)
    if not os.path.exists(f'classifier{size}-{key}.pt'):
        net = (classifier.train(*images_of(name, size, 'train'), epochs=20) if name == 'digits'
               else classifier.shape_classifier(size)[0])
        with data.whole_file(f'classifier{size}-{key}.pt') as file:
            torch.save(net.state_dict(), file)
    if not os.path.exists(f'real{size}-{key}.json'):
        real = images_of(name, size, 'unseen')
        if name != 'digits':                                                  # as many as there are samples
            real = classifier.draw(size, s['samples'], seed=1006)
        text = json.dumps(score(key, name, size, *real))
        with data.whole_file(f'real{size}-{key}.json') as file:
            file.write(text.encode())


def score(key, name, size, images, labels):
    """Every metric of images uint8 (n, C, H, W) that were asked to be `labels`."""
    net = classifier.network(images.shape[1], 10)
    net.load_state_dict(torch.load(f'classifier{size}-{key}.pt', weights_only=True))
    net.eval().requires_grad_(False)
    real, _ = images_of(name, size, 'reference')
    seen, mine = classifier.features(net, real), classifier.features(net, images)
    predicted = classifier.predict(net, images).numpy()
    precision, recall = fid.precision_recall(seen, mine, mode='exact')
    found = {'frechet': fid.frechet_from_features(seen, mine), 'precision': precision, 'recall': recall,
             'fidelity': float((predicted == labels).mean())}
    flat = lambda images: torch.from_numpy(np.array(images)).flatten(1).double() / 255
    if name == 'digits':
        found['frechet_pixels'] = fid.frechet_from_features(flat(real), flat(images))
    else:
        found |= context(images, labels, predicted)
    nearest = torch.full((len(images),), math.inf, dtype=torch.float64)
    for some in flat(images_of(name, size, 'train')[0]).split(5000):
        nearest = torch.minimum(nearest, torch.cdist(flat(images), some).min(1).values)
    return found | {'nearest': nearest.mean().item() / math.sqrt(images[0].size)}


WAYS = ('clean patches fill, as in training', 'the same, all tokens encoded', 'noisy patches fill',
        'two halves encoded apart', 'own estimate fills', 'inference')


@torch.no_grad()
def probe(net, cfg, dataset, K):
    """Where does the gap of untuned mcdit sit? Loss on visible tokens of the same weights, run in six ways:
    {way: a number per noise level}."""
    sums, sd = torch.zeros(len(WAYS), len(train.EVAL_SIGMAS)), cfg.sigma_data
    device = next(net.parameters()).device
    raw, y = dataset.rows(np.arange(dataset.held_out))
    x0 = model.patchify(dataset.to_input(raw, None), cfg.patch)
    rng = model.generator('cpu', 'probe')
    order, noise = torch.rand(len(x0), cfg.N, generator=rng).argsort(1), torch.randn(x0.shape, generator=rng)
    x0, y, noise, order = (tensor.to(device) for tensor in (x0, y, noise, order))
    visible, masked = order[:, :K], order[:, K:]
    for j, level in enumerate(train.EVAL_SIGMAS):
        sigma, xt = torch.full((len(x0),), level, device=device), x0 + level * noise
        c_skip, c_out, c_in, c_noise = model.precondition(sigma, sd)
        c, embed = net.encoder.condition(c_noise, y), net.encoder.embed
        half, whole = net.encoder(c_in * xt, c, visible), net.encoder(c_in * xt, c)
        clean, noisy = embed(x0 / sd), embed(c_in * xt)
        own = embed((c_skip * xt + c_out * net.decoder(whole, c)) / sd)
        tokens = (model.put(clean, visible, half), model.put(clean, visible, model.take(whole, visible)),
                  model.put(noisy, visible, half), model.put(
                      model.put(noisy, visible, half), masked, net.encoder(c_in * xt, c, masked)),
                  model.put(own, visible, half), whole)
        for i, given in enumerate(tokens):
            D = c_skip * xt + c_out * net.decoder(given, c)
            sums[i, j] = model.take(model.loss_weight(sigma, sd) * (D - x0) ** 2, visible).mean()
    return dict(zip(WAYS, sums.tolist()))


def measure(key, name, size, weights, samples, folder):
    """result.json of a run: metrics of its samples, held-out loss by noise level, and the probe for mcdit."""
    with np.load(samples) as file:
        images, labels = file['arr_0'].transpose(0, 3, 1, 2), file['arr_1']
    found = score(key, name, int(size), images[:, :SETS[name]['channels']], labels)
    device = data.rank_world_device()[2]
    net, cfg = model.load_net(weights, device)
    unseen = data.Data(f'{folder_of(name, size)}-unseen')
    unseen.trained, unseen.held_out = 0, unseen.count                         # none of it was trained on
    K = model.Config(resolution=cfg.resolution, model=cfg.model).K            # at ratio 0.5
    same = dataclasses.replace(cfg, seed=0, stage='tune')                     # the same noise for every run
    losses = train.evaluate(net, same, unseen, 100, 0, 1, sample.pick_precision('auto', device))
    for level, value in zip(train.EVAL_SIGMAS, losses['held_out']):
        found[f'loss@{level:.2g}'] = value
    if cfg.method == 'mcdit':
        for way, values in probe(net, cfg, unseen, K).items():
            found |= {f'{way}@{level:.2g}': value for level, value in zip(train.EVAL_SIGMAS, values)}
    with data.whole_file(f'{folder}/result.json') as file:
        file.write(json.dumps(found, indent=1).encode())
