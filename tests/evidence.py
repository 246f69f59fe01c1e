"""Do the papers' orderings hold, in miniature?

    python tests/evidence.py --only methods tuning --seeds 0      # the first answers
    python tests/evidence.py                                      # the whole matrix: 3 to 4 hours, two cores
    python tests/evidence.py --gpu --out evidence-gpu --hours 0.15            # a larger size, on one GPU
    python tests/evidence.py --quick --out evidence-quick         # does it run: the numbers mean nothing

Trains on drawn shapes, tunes, samples, and measures; prints a plan before and tables after. Writes in --out:
    evidence.json, evidence.md         every number of every seed; the tables
    curves.png, samples.png            unmasked loss against steps; what the judge says of the samples
    runs/NAME-sSEED-HASH/STAGE/        a stage of a run: finished when its result.json is there, not repeated
    output/                            what the runs printed

Run the same command again to go on. Seed 0 comes first, and in every seed the first questions first, so that
a stopped matrix is of use; the tables say how many seeds each number has. A finished stage is known by its
configuration, not by the code that ran: after a change to what is computed, begin in another --out. The JSON
has the commits that the runs were started from. The matrix fills about 8 GB.

Fréchet distance, precision and recall are fid.py's own functions on the features of the judge
(tests/judge.py, a classifier of shapes): these are NOT Inception numbers, and compare with nothing but each
other. The row `real shapes` is what as many more real ones score. No guidance anywhere.

The laptop's network, T/2, is trained on pictures of 12 pixels here, 36 tokens, and not on README's 16: what
this budget buys at 16, 45,000 images, left one sample in eight taken for its class, about chance.

What differs from the papers beside the size: every method is tuned alike, DiT, MDT and SD-DiT too, and short
tuning is two steps in seven; the learning rate of masked training is constant, so that each point of a curve
is the end of a run of that length, and tuning's falls to 0, so that tuned rows gain from that alone; one
learning rate serves all; and SD-DiT's head is narrow (NARROW, PROTOTYPES), or it would cost twenty times the
network. `Equal time` is that of masked training, by the cost of a step; tuning is as many steps for all.

All losses before and after tuning are held-out ones on the same noise. Those of `curve`, in the logs of
masked training, are on another. Seeds share the data, the judge and the 200 held-out images: the deviation is
that of training and sampling alone. Tuning draws with the next seed, as finetune.py does: the noise of seed
0's tuning is that of seed 1's masked training.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import compare  # noqa: E402
import data  # noqa: E402
import fid  # noqa: E402
import finetune  # noqa: E402
import judge as judging  # noqa: E402
import model  # noqa: E402
import mutual_info  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import BadInput  # noqa: E402

# ------------------------------------------------------------------------------------------- the matrix

SIGMAS = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]                     # of held-out losses; train.py has eight others
AT = SIGMAS.index(0.1)
NARROW, PROTOTYPES = 256, 512                                 # SD-DiT's head here; in the paper 2048 and 8192

SETTINGS = {
    'laptop': dict(
        model='T/2', size=12, images=10_000, batch=32, lr=2e-3, tune_lr=1e-3, masked=2000, long=6000,
        short_tune=800, long_tune=2400, eval_every=500, samples=2000, sampler=12, real=10_000,
        information=500, timing=12, seeds=[0, 1, 2], jobs=2),
    'quick': dict(
        model='T/4', size=8, images=300, batch=4, lr=2e-3, tune_lr=1e-3, masked=4, long=8,
        short_tune=2, long_tune=4, eval_every=2, samples=20, sampler=2, real=60, information=100,
        timing=3, seeds=[0, 1], jobs=2),
    'gpu': dict(
        model='S/4', size=32, images=20_000, batch=256, lr=5e-4, tune_lr=2.5e-4, masked=600, long=1800,
        short_tune=200, long_tune=600, eval_every=200, samples=2000, sampler=18, real=5_000,
        information=1000, timing=0, seeds=[0], jobs=4)}

# Core-seconds on a server CPU that does nothing else, for the plan's estimate alone: a masked training step
# of each method, a tuning step, an evaluation of one image by the sampler, and a held-out evaluation
COST = {'dit': 0.042, 'maskdit': 0.047, 'mdt': 0.096, 'sddit': 0.104, 'mcdit': 0.064, 'tune': 0.072,
        'image': 0.0007, 'held_out': 3.7, 'judge': 15, 'timing': 10, 'information': 40, 'start': 4}

# The core time that mcdit's masked training takes, in steps of each method: from the measured cost of a step.
# The report prints what a step cost where the matrix ran.
EQUAL_TIME = {'dit': 1.5, 'maskdit': 1.35, 'mdt': 0.65, 'sddit': 0.6, 'mcdit': 1.0}

MAIN = ['--lambda-con1', '0', '--lambda-con2', '0']           # no EMA branch
READINGS = ('skip', 'scale', 'normalised', 'zero bridge')
FAST = 0.98                                                   # decay of the EMA decoder in `fast branches`
RUNS = {                                                      # name: method, flags of train.py, reading
    **{method: (method, [], None) for method in model.METHODS},
    'main branch': ('mcdit', MAIN, None),
    'noisy branch': ('mcdit', ['--lambda-con2', '0'], None),
    'clean branch': ('mcdit', ['--lambda-con1', '0'], None),
    'fast branches': ('mcdit', [], f'decay {FAST}'),
    'only clean': ('mcdit', [*MAIN, '--lambda-noise', '0'], None),
    'all clean': ('mcdit', [*MAIN, '--all-clean'], None),
    'noisy tokens': ('mcdit', [*MAIN, '--tokens', 'noisy'], None),
    'clean tokens': ('mcdit', [*MAIN, '--tokens', 'clean'], None),
    'ratio 0.25': ('mcdit', ['--mask-ratio', '0.25'], None),
    'ratio 0.75': ('mcdit', ['--mask-ratio', '0.75'], None),
    **{reading: ('mcdit', [], reading) for reading in READINGS},
    'maskdit 0.25': ('maskdit', ['--mask-ratio', '0.25'], None),
    'maskdit 0.75': ('maskdit', ['--mask-ratio', '0.75'], None),
    'maskdit zero bridge': ('maskdit', [], 'zero bridge')}

# What a run of mcdit is divided by where it is compared with maskdit: the one that differs in nothing else
LIKE = {'ratio 0.25': 'maskdit 0.25', 'ratio 0.75': 'maskdit 0.75', 'zero bridge': 'maskdit zero bridge'}


BOTH = ('maskdit', 'mcdit')


def tuned(**rows):
    """Rows of a question, as many masked and tuning steps in each: label=run."""
    return [(label.replace('_', ' '), run, 'masked', 'short_tune') for label, run in rows.items()]


def untuned(**rows):
    """The same before tuning."""
    return [(f'{label}, no tuning', run, 'masked', None) for label, run, *_ in tuned(**rows)]


READ = {'as here': 'mcdit', **dict(zip(READINGS, READINGS)), 'maskdit, zero bridge': 'maskdit zero bridge'}
RATIOS = {'0.25': 'ratio 0.25', '0.5': 'mcdit', '0.75': 'ratio 0.75',
          'maskdit, 0.25': 'maskdit 0.25', 'maskdit, 0.5': 'maskdit', 'maskdit, 0.75': 'maskdit 0.75'}
QUESTIONS = {                                         # title, source, rows: label, run, masked, tuning steps
    'methods': ('The five methods', 'MC-DiT Table 3, Figure 3',
                [(f'{name}, equal images', name, 'masked', 'short_tune') for name in model.METHODS]
                + [(f'{name}, equal time', name, 'time', 'short_tune')
                   for name in model.METHODS if name != 'mcdit']),
    'tuning': ('Tuning', 'MC-DiT Table 7',
               [(f'{name}, no tuning', name, 'masked', None) for name in model.METHODS]
               + [(f'{name}, short tuning', name, 'masked', 'short_tune') for name in model.METHODS]
               + [(f'{name}, long tuning', name, 'masked', 'long_tune') for name in BOTH]
               + [(f'{name}, long training, no tuning', name, 'long', None) for name in BOTH]
               + [(f'{name}, long training, long tuning', name, 'long', 'long_tune') for name in BOTH]),
    'branches': ('EMA branches', 'MC-DiT Table 5',
                 tuned(none='main branch', noisy='noisy branch', clean='clean branch', both='mcdit',
                       both_fast='fast branches')
                 + untuned(none='main branch', both='mcdit', both_fast='fast branches')),
    'readings': ('Other readings of the paper', "README's table of choices",
                 tuned(**READ) + untuned(**READ)),
    'targets': ('Targets of the main branch', 'MC-DiT Table 6, no EMA branch',
                tuned(all_clean='all clean', only_clean='only clean', clean_and_noise='main branch')),
    'tokens': ('Tokens of the main branch', 'MC-DiT Table 10, no EMA branch',
               tuned(both='main branch', noisy_only='noisy tokens', clean_only='clean tokens')),
    'ratio': ('Mask ratio', 'MC-DiT Figure 5',
              tuned(**RATIOS) + untuned(**RATIOS)),
    'information': ('Mutual information, inference paths', 'MC-DiT Figure 1(a)',
                    [(name, name, 'masked', 'short_tune') for name in model.METHODS]
                    + [(f'{name}, no tuning', name, 'masked', None) for name in model.METHODS])}

# What the papers claim, "<" being better: the claim, the paper's FIDs in that order, or that it has a PICTURE
# alone, or that the question is OURS; then question, number compared (small is better), rows in that order,
# and whether each row is compared with the next, CHAIN, or the first one with each of the others, FIRST.
CHAIN, FIRST = 'chain', 'first'
PICTURE, OURS = 'a picture', 'not asked'
CLAIMS = [
    ('`mcdit` < `sddit` < `mdt` < `dit` (Table 3, B/2)', (18.88, 28.62, 34.33, 43.47), 'methods', 'frechet',
     [f'{name}, equal images' for name in ('mcdit', 'sddit', 'mdt', 'dit')], CHAIN),
    ('`mcdit` < `sddit` < `mdt` < `maskdit` (Table 3, XL/2)', (7.92, 9.01, 9.60, 12.15), 'methods', 'frechet',
     [f'{name}, equal images' for name in ('mcdit', 'sddit', 'mdt', 'maskdit')], CHAIN),
    ('`mcdit` < `dit`, `maskdit`, `mdt`, `sddit`, at equal time of masked training', OURS, 'methods',
     'frechet',
     ['mcdit, equal images', *(f'{name}, equal time' for name in ('dit', 'maskdit', 'mdt', 'sddit'))], FIRST),
    ('training loss on clean targets, last 50 masked steps: `mcdit` < `maskdit`, `dit` (Figure 3a)', PICTURE,
     'methods', 'on_clean', [f'{name}, equal images' for name in ('mcdit', 'maskdit', 'dit')], FIRST),
    ('tuned `mcdit` < untuned `mcdit` < tuned `maskdit` (Table 7)', (7.92, 8.33, 12.15), 'tuning', 'frechet',
     ['mcdit, short tuning', 'mcdit, no tuning', 'maskdit, short tuning'], CHAIN),
    ('`mcdit` < `maskdit`, three times the tuning', OURS, 'tuning', 'frechet',
     ['mcdit, long tuning', 'maskdit, long tuning'], CHAIN),
    ('`mcdit` < `maskdit`, three times the masked training and the tuning', OURS, 'tuning', 'frechet',
     ['mcdit, long training, long tuning', 'maskdit, long training, long tuning'], CHAIN),
    ('both EMA branches < the noisy one < none (Table 5)', (18.88, 19.26, 22.10), 'branches', 'frechet',
     ['both', 'noisy', 'none'], CHAIN),
    (f'both, of decay {FAST} for 0.999, < none', OURS, 'branches', 'frechet', ['both fast', 'none'], CHAIN),
    ('targets: clean and noise < clean alone < all clean (Table 6)', (22.10, 25.88, 34.53), 'targets',
     'frechet', ['clean and noise', 'only clean', 'all clean'], CHAIN),
    ('tokens: both < clean alone < noisy alone (Table 10)', (22.10, 23.69, 25.72), 'tokens', 'frechet',
     ['both', 'clean only', 'noisy only'], CHAIN),
    ('mask ratio 0.5 < 0.25, 0.75 (Figure 5)', PICTURE, 'ratio', 'frechet', ['0.5', '0.25', '0.75'], FIRST),
    ('nats away from clean images, tuned: `mcdit` < `maskdit`, `mdt` (Figure 1a)', PICTURE, 'information',
     'away', ['mcdit', 'maskdit', 'mdt'], FIRST),
    ('the same, untuned', OURS, 'information', 'away',
     [f'{name}, no tuning' for name in ('mcdit', 'maskdit', 'mdt')], FIRST)]

# ------------------------------------------------ other readings of the paper, by README's table of choices

def student(net, x0, y, draws, cfg, gains, skip=False, scale=False):
    """model.mcdit_student, written a second time, with two choices turned.

    skip   "skip connection at masked slots: from the mixed image": here from the noisy one
    scale  "scale of the clean patches: x0 / sigma_data": here c_in(sigma) x0, as for the noisy ones
    """
    sigma, sd, p = draws['sigma'], cfg['sigma_data'], model.parse_size(cfg['model'])[2]
    visible, masked = model.split_tokens(draws, cfg)
    c_skip, c_out, c_in, c_noise = model.precondition(sigma, sd)
    y = model.drop_labels(y, draws, cfg)
    xt = x0 + sigma.view(-1, 1, 1, 1) * draws['noise']
    noisy = model.take(model.patchify(xt, p), visible)
    x_in = model.unpatchify(model.put(model.patchify(x0, p), visible, noisy), p, x0.shape[1])
    F, *_ = net(c_in * xt, c_noise, y, visible, model.patchify(c_in * x0 if scale else x0 / sd, p), gains)
    return c_skip * (xt if skip else x_in) + c_out * F, xt, (visible, masked)


def mcdit_loss(net, teacher, x0, y, draws, cfg, scale=False, normalised=False):
    """model.mcdit_loss with both branches, written a second time.

    scale       as for `student`, in the clean branch
    normalised  "L_noise: raw target": here zero mean and unit variance in each patch, as in MaskDiT's code
    """
    sigma, sd, p = draws['sigma'], cfg['sigma_data'], model.parse_size(cfg['model'])[2]
    c_skip, c_out, c_in, c_noise = model.precondition(sigma, sd)
    w, gains = model.loss_weight(sigma, sd), model.TOKEN_GAINS[cfg['tokens']]
    c = net(None, c_noise, model.drop_labels(y, draws, cfg))[1].detach()
    D, xt, (visible, masked) = model.mcdit_student(net, x0, y, draws, cfg, gains)
    target = model.patch_norm(xt, p) if normalised else xt
    parts = {'clean': model.mean_over(w * (D - x0) ** 2, visible, p),
             'noise': model.mean_over((D - target) ** 2, masked, p)}
    for name, x, scaled in (('con1', xt, c_in * xt), ('con2', x0, c_in * x0 if scale else x0 / sd)):
        with torch.no_grad():
            D_ema = c_skip * x + c_out * teacher(scaled, c)
        parts[name] = model.mean_over(w * (D - D_ema) ** 2, visible, p)
    loss = parts['clean'] + sum(cfg[f'lambda_{name}'] * parts[name] for name in ('noise', 'con1', 'con2'))
    return loss, {name: part.detach() for name, part in parts.items()}


def zero_bridge(net, initialise=model.initialise):
    """"Initialisation of the bridge: Xavier": here zero, as in MaskDiT's code."""
    initialise(net)
    if net.bridge is not None:
        torch.nn.init.zeros_(net.bridge.linear.weight)


def narrow_head(self, width):
    torch.nn.Module.__init__(self)
    self.fc1, self.fc2 = torch.nn.Linear(width, NARROW), torch.nn.Linear(NARROW, NARROW)
    self.fc3 = torch.nn.Linear(NARROW, 256)
    self.prototypes = torch.nn.Parameter(torch.zeros(PROTOTYPES, 256))


def prepare(reading):
    """Turn this process's model.py and train.py into what a run of the matrix needs."""
    train.EVAL_SIGMAS[:] = SIGMAS
    model.PROTOTYPES, model.Head.__init__ = PROTOTYPES, narrow_head
    if reading in ('skip', 'scale'):
        model.mcdit_student = functools.partial(student, **{reading: True})
    if reading in ('scale', 'normalised'):
        model.METHODS['mcdit']['loss'] = functools.partial(mcdit_loss, **{reading: True})
    if reading == 'zero bridge':
        model.initialise = zero_bridge
    if reading == f'decay {FAST}':            # 0.999 remembers half of 2,000 steps, of the paper's 1 in 400
        model.BRANCH_DECAY = FAST


# ----------------------------------------------------------------------------------- stages and their folders
#
# A stage is (kind, masked steps M, tuning steps T). Those of a run, `train`, `tune` and `sample`, lie in the
# folder of the run; `judge`, `timing` and `information` belong to no run.

def rows_of(settings, question):
    """Its rows. At equal time there are some only at the size whose steps EQUAL_TIME was measured at."""
    return [row for row in QUESTIONS[question][2] if row[2] != 'time' or settings['timing']]


def stages(settings, run, masked, tuned):
    """What a row of a question needs, in order."""
    M = round(settings['masked'] * EQUAL_TIME[RUNS[run][0]]) if masked == 'time' else settings[masked]
    T = settings[tuned] if tuned else 0
    return [('train', M, 0), *[('tune', M, T)] * bool(T), ('sample', M, T)]


def folder_of(out, settings, run, seed, kind, M, T):
    """Where a stage writes: named from all that its numbers depend on."""
    def digest(*about):
        return hashlib.sha256(json.dumps([*about, SIGMAS, NARROW, PROTOTYPES]).encode()).hexdigest()[:8]

    if run not in RUNS:
        every = {part: value for part, value in settings.items() if part not in ('seeds', 'jobs')}
        return out / f'{kind}{"" if seed is None else f"-s{seed}"}-{digest(every)}'
    name = f'{kind}-{M}' + f'+{T}' * bool(T)
    if kind == 'sample':
        name += f'-{settings["samples"]}x{settings["sampler"]}-{settings["real"]}'
    keep = [settings[part] for part in ('model', 'size', 'images', 'batch', 'lr', 'tune_lr', 'eval_every')]
    return out / 'runs' / f'{run.replace(" ", "-")}-s{seed}-{digest(keep, RUNS[run], seed)}' / name


def judge_of(out, settings):
    return folder_of(out, settings, 'judge', None, 'judge', 0, 0)


def data_of(out, settings):
    return out / f'shapes-{settings["size"]}-{settings["images"]}'


def result_of(folder):
    """The content of result.json, or None: the stage is not finished."""
    with contextlib.suppress(OSError):
        return json.loads((folder / 'result.json').read_text())


def write(path, text):
    """Complete or not at all."""
    temporary = pathlib.Path(f'{path}.tmp{os.getpid()}')
    temporary.write_text(text)
    os.replace(temporary, path)


def newest(folder):
    found = train.checkpoints(folder)
    if not found:
        raise BadInput(f'{folder.name} has no checkpoint, see why above')
    return found[-1]


def arguments_of(settings, folder, steps, lr):
    return ['--out', str(folder), '--steps', str(steps), '--batch', str(settings['batch']), '--lr', str(lr),
            '--eval-every', str(settings['eval_every']), '--save-every', '500', '--preview', '0',
            '--no-compile']


# ------------------------------------------------------------------------------- what a child process does

CURVE = ('step', 'held_out', 'collapse_encoder', 'collapse_patches')


def run_train(out, settings, run, seed, M, T, folder):
    """Masked training. A longer one goes on from a shorter one; SD-DiT's has a schedule, and starts anew."""
    method, flags, _ = RUNS[run]

    def steps(path):
        return int(path.name.split('-')[1])

    shorter = [path for path in folder.parent.glob('train-*') if result_of(path) and steps(path) < M]
    if shorter and method != 'sddit' and not train.checkpoints(folder):
        before = max(shorter, key=steps)
        shutil.copy(before / 'log.jsonl', folder)
        shutil.copy(newest(before), folder / 'copy.tmp')
        os.replace(folder / 'copy.tmp', folder / newest(before).name)
    arguments = ['--method', method, '--model', settings['model'], '--data', str(data_of(out, settings)),
                 '--seed', str(seed), *flags, *arguments_of(settings, folder, M, settings['lr'])]
    last = train.main(arguments)
    for path in train.checkpoints(folder):
        if path != last:
            path.unlink()
    log = train.read_log(folder)
    trained = [line for line in log if 'loss' in line][-1]
    return {'arguments': arguments,
            'on_clean': next(trained[name] for name in mutual_info.ON_CLEAN if name in trained),
            'curve': [{name: line[name] for name in CURVE if name in line}
                      for line in log if 'held_out' in line]}


def run_tune(out, settings, run, seed, M, T, folder):
    trained = newest(folder_of(out, settings, run, seed, 'train', M, 0))
    arguments = [str(trained), '--data', str(data_of(out, settings)), '--lr-decay', '0.5',
                 *arguments_of(settings, folder, T, settings['tune_lr'])]
    finetune.main(arguments)
    held_out = [line['held_out'] for line in train.read_log(folder) if 'held_out' in line]
    return {'arguments': arguments, 'before': held_out[0], 'after': held_out[-1]}


def run_sample(out, settings, run, seed, M, T, folder):
    trained = newest(folder_of(out, settings, run, seed, 'tune' if T else 'train', M, T))
    net, cfg = model.load_net(trained, 'cuda' if torch.cuda.is_available() else 'cpu')
    precision = sample.pick_precision('auto', net.pos.device)
    sample.make_ready(net, precision)
    labels = [i % cfg['classes'] for i in range(settings['samples'])]
    pictures, batch = [], 500 if net.pos.device.type == 'cuda' else 50
    for first in range(0, len(labels), batch):
        some = labels[first:first + batch]
        x = sample.generate(net, cfg, seed, range(first, first + len(some)), some, settings['sampler'],
                            precision=precision)
        pictures.append(sample.picture(x))
    pictures = torch.cat(pictures)
    np.savez_compressed(folder / 'samples.npz', arr_0=pictures.permute(0, 2, 3, 1).numpy(), arr_1=labels)
    names = [cfg['class_names'][k] for k in labels[:50]]
    data.save_grid(folder / 'samples.png', pictures[:50].numpy(), names, columns=10)
    return judged(judge_of(out, settings), pictures, torch.tensor(labels))


def judged(folder, pictures, labels):
    """What the judge makes of pictures uint8 (n, 3, H, W) asked to be `labels` (n,), and how far its features
    of them are from those of real shapes. Precision and recall look at as many real ones as pictures."""
    judge = judging.network()
    judge.load_state_dict(torch.load(folder / 'judge.pt', weights_only=True))
    x = pictures.float() / 127.5 - 1
    right = (judging.verdicts(judge.eval(), x) == labels).double()
    real, fake = torch.from_numpy(np.load(folder / 'reference.npy')), judging.features(judge, x)
    precision, recall = fid.precision_recall(real[:len(fake)], fake, mode='exact')
    return {'fidelity': right.mean().item(), 'frechet': fid.frechet_from_features(real, fake),
            'precision': precision, 'recall': recall,
            'by class': {name: right[labels == k].mean().item() for k, name in enumerate(data.SHAPES)
                         if (labels == k).any()}}


def run_judge(out, settings, run, seed, M, T, folder):
    """The judge, its features of real shapes that nobody has seen, and what more of them score."""
    judge, accuracy = judging.train_judge(settings['size'])
    torch.save(judge.state_dict(), folder / 'judge.pt')
    x, _ = judging.real(settings['size'], settings['real'], 1003)
    np.save(folder / 'reference.npy', judging.features(judge, x).numpy())
    x, y = judging.real(settings['size'], settings['samples'], 1004)
    return {'accuracy': accuracy, 'real shapes': judged(folder, data.to_uint8(x), y)}


def run_timing(out, settings, run, seed, M, T, folder):
    """Core-seconds of a masked training step of each method: one thread, interleaved rounds, medians."""
    dataset, steppers = data.open_data(data_of(out, settings)), {}
    for method in model.METHODS:
        args = train.parse(['--method', method, '--model', settings['model'], '--data', str(dataset.path)])
        steppers[method] = compare.stepper(train.configuration(args, dataset), dataset, settings['batch'])
    rounds = [{method: step() for method, step in steppers.items()} for _ in range(settings['timing'])]
    return {method: statistics.median(times[method] for times in rounds[1:]) for method in steppers}


def run_information(out, settings, run, seed, M, T, folder):
    """Nats between visible and masked patches of images, and of what the networks of one seed make of them
    where nothing is masked: {row: a number for each noise level}."""
    dataset, sigmas = data.open_data(data_of(out, settings)), mutual_info.DEFAULTS['sigmas']
    d, masks, networks = 2, 2, []
    for label, name, *how in rows_of(settings, 'information'):
        kind, *steps = stages(settings, name, *how)[-2]
        path = newest(folder_of(out, settings, name, seed, kind, *steps))
        (_, _, net, cfg), = mutual_info.open_networks([path], dataset)
        networks.append((label, path, net, cfg | {'stage': 'tune'}))          # no masked paths: those leak
    x0, *rest = mutual_info.read(dataset, mutual_info.choose(dataset, settings['information'], seed), seed)
    square = networks[0][2].patch
    seen = [mutual_info.draw_mask(dataset.resolution, square, 0.5, seed, k) for k in range(masks)]
    splits = [[(at, mutual_info.fit(x0, ~at, d), mutual_info.fit(x0, at, d)) for at in seen]]
    found = mutual_info.measure([(x0, *rest)], splits, sigmas, networks)
    return {row: [statistics.mean(nats for _, _, nats, _ in found[row, sigma]) for sigma in sigmas]
            for row, _ in found}


WORK = {'train': run_train, 'tune': run_tune, 'sample': run_sample, 'judge': run_judge, 'timing': run_timing,
        'information': run_information}


def child(out, settings, run, seed, todo):
    """Do the stages `todo` of a run. After one that fails only samples of others are worth a try."""
    prepare(RUNS[run][2] if run in RUNS else None)
    failed = False
    for kind, M, T in todo:
        folder = folder_of(out, settings, run, seed, kind, M, T)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = WORK[kind](out, settings, run, seed, M, T, folder)
            write(folder / 'result.json', json.dumps(result, indent=1) + '\n')
        except (BadInput, data.BadInput) as mistake:
            print(f'{folder.name}: {mistake}', flush=True)
            if kind != 'sample':
                return 1
            failed = True
    return int(failed)


# ----------------------------------------------------------------------------- the plan, and its carrying out

def plan(out, settings, questions, seeds):
    """Units in order: {'run', 'seed', 'stages': {folder: stage}, 'needs': folders}. Each is a child process
    that starts when what it needs is finished. Questions share stages: whoever is later finds them done."""
    def unit(run, seed, todo, needs):
        folders = {folder_of(out, settings, run, seed, *stage): stage for stage in todo}
        return {'run': run, 'seed': seed, 'stages': folders, 'needs': needs}

    units = [unit('judge', None, [('judge', 0, 0)], [])]
    judge = list(units[0]['stages'])
    if settings['timing'] and 'methods' in questions:
        units.append(unit('timing', None, [('timing', 0, 0)], judge))
    for seed in seeds:
        for question in questions:
            rows, ends = rows_of(settings, question), []
            for run in dict.fromkeys(run for _, run, *_ in rows):
                todo = {stage for _, name, *how in rows if name == run
                        for stage in stages(settings, run, *how)}
                units.append(unit(run, seed, sorted(todo, key=in_order), judge))
                ends += units[-1]['stages']
            if question == 'information':
                units.append(unit('information', seed, [('information', 0, 0)], ends))
    return units


def in_order(stage):
    kind, M, T = stage
    return M, T, kind == 'sample'


def estimate(settings, units):
    """Core-seconds that unfinished stages take at the laptop size."""
    todo = {folder: (unit['run'], stage) for unit in units for folder, stage in unit['stages'].items()
            if not result_of(folder)}
    total, trained = 0.0, {}
    for folder, (run, (kind, M, T)) in todo.items():
        if kind == 'train':
            method = RUNS[run][0]
            look = COST['held_out'] * (1 if method == 'mcdit' else 0.3) / settings['eval_every']
            once = folder if method == 'sddit' else folder.parent             # they go on from each other
            trained[once] = max(trained.get(once, 0), M * (COST[method] + look))
        elif kind == 'tune':
            total += T * COST['tune'] + COST['held_out']
        elif kind == 'sample':
            total += settings['samples'] * (2 * settings['sampler'] - 1) * COST['image'] + 5
        else:
            total += COST[kind]
    return total + sum(trained.values()) + COST['start'] * len({folder.parent for folder in todo})


def tell(words):
    print(f'{time.strftime("%H:%M:%S")}  {words}', flush=True)


ROOM = 2e9                                                    # bytes; a stage without them is not begun


def carry_out(out, name, units, jobs, deadline):
    """Start units, `jobs` at a time, until all are done or `deadline`, a time.time(), is there. Two of the
    same run and seed never run at once. Returns {folder of a stage: why it has no result}."""
    failed, active, why, env = {}, {}, 'no time left', dict(os.environ)
    if name != 'gpu':
        env |= {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}

    def left(unit):
        return {folder: stage for folder, stage in unit['stages'].items()
                if folder not in failed and not result_of(folder)}

    def start(unit):
        label = unit['run'] if unit['seed'] is None else f'{unit["run"]}, seed {unit["seed"]}'
        output = out / 'output' / f'{label.replace(",", "").replace(" ", "-")}.txt'
        output.parent.mkdir(exist_ok=True)
        todo = json.dumps([unit['run'], unit['seed'], list(left(unit).values())])
        tell(f'{label}: {", ".join(folder.name for folder in left(unit))}')
        with open(output, 'a') as file:                       # a session of its own: we pass Ctrl-C on, once
            process = subprocess.Popen([sys.executable, __file__, '--child', str(out), name, todo], env=env,
                                       stdout=file, stderr=file, start_new_session=True)
        active[process] = unit, label, output

    try:
        while time.time() < deadline:
            for process in [process for process in active if process.poll() is not None]:
                unit, label, output = active.pop(process)
                if process.returncode:
                    said = (output.read_text().strip().splitlines() or ['it said nothing'])[-1]
                    tell(f'{label} failed: {said}')
                    failed |= dict.fromkeys(left(unit), said)
            busy = [(unit['run'], unit['seed']) for unit, *_ in active.values()]
            ready = [unit for unit in units if left(unit) and (unit['run'], unit['seed']) not in busy
                     and all(map(result_of, unit['needs']))]
            roomy = shutil.disk_usage(out).free > ROOM
            if ready and len(active) < jobs and roomy:
                start(ready[0])
            elif not active:
                why = 'what it needs failed' if roomy else \
                      f'the disk has less than {ROOM / 1e9:.0f} GB of room'
                break
            else:
                time.sleep(0.2)
    except KeyboardInterrupt:
        why = 'stopped'
    if active:
        tell(f'{why}, stopping; training runs write a checkpoint first')
    for process in active:
        process.terminate()
    for process in active:
        process.wait()
    return failed | {folder: why for unit in units for folder in left(unit)}


# ----------------------------------------------------------------------------------------- numbers and tables

SCORE = ('fidelity', 'frechet', 'precision', 'recall')
COLLAPSE = ('collapse_encoder', 'collapse_patches')
DIGITS = {'frechet': 0}                                       # of a number in a table; three of all others


def summary(values):
    """(mean, deviation with ddof 1, how many) of the numbers there are; None if they are too few."""
    values = [value for value in values if value is not None]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.mean(values) if values else None, deviation, len(values)


def cell(values, digits=3):
    mean, deviation, n = summary(values)
    return '-' if not n else f'{mean:.{digits}f}' + (f' ± {deviation:.{digits}f}' if n > 1 else '')


def collect(out, settings, questions, seeds):
    """{question: [{'label', 'run', 'masked', 'tuned', 'seeds': {seed: numbers}}]}, of what there is."""
    def result(run, seed, kind, M=0, T=0):
        return result_of(folder_of(out, settings, run, seed, kind, M, T)) or {}

    def numbers_of(run, seed, M, T):
        trained = result(run, seed, 'train', M)
        tunings = {some: result(run, seed, 'tune', M, some)
                   for some in (settings['short_tune'], settings['long_tune'])}
        numbers = {'on_clean': trained.get('on_clean'), 'after': tunings.get(T, {}).get('after'),
                   'before': next((some['before'] for some in tunings.values() if some), None)}
        numbers |= {name: result(run, seed, 'sample', M, T).get(name) for name in SCORE}
        if trained:
            last = trained['curve'][-1]
            numbers |= {'curve': trained['curve'], **{name: last.get(name) for name in COLLAPSE}}
        return numbers

    def information(label, seed):
        """And their mean distance from those of clean images: Figure 1(a) has these as the aim."""
        found = result('information', seed, 'information')
        nats, clean = found.get(label), found.get(mutual_info.CLEAN)
        if not nats:
            return {}
        return {'nats': nats, 'away': statistics.mean(abs(a - b) for a, b in zip(nats, clean))}

    collected = {}
    for question in questions:
        collected[question] = rows = []
        for label, run, *how in rows_of(settings, question):
            _, M, T = stages(settings, run, *how)[-1]
            numbers = {seed: information(label + mutual_info.INFERENCE, seed) if question == 'information'
                       else numbers_of(run, seed, M, T) for seed in seeds}
            rows.append({'label': label, 'run': run, 'masked': M, 'tuned': T, 'seeds': {
                seed: {name: value for name, value in some.items() if value is not None}
                for seed, some in numbers.items()}})
        if question == 'information':
            rows += [{'label': label, 'run': None, 'masked': 0, 'tuned': 0,
                      'seeds': {seed: information(label, seed) for seed in seeds}}
                     for label in (mutual_info.CLEAN, mutual_info.MIXED, mutual_info.NOISY)]
    return collected


def column(row, name, at=None):
    """One number of a row for each seed, None where it is missing. Of a list: its entry `at`, or its mean."""
    values = [numbers.get(name) for numbers in row['seeds'].values()]
    return [(statistics.mean(value) if at is None else value[at]) if isinstance(value, list) else value
            for value in values]


def some(row, name):
    return any(value is not None for value in column(row, name))


def table(header, body):
    return ['', *('| ' + ' | '.join(cells) + ' |' for cells in [header, ['---'] * len(header), *body])]


def in_seeds(better, worse):
    """In how many seeds the first is the smaller, of those that have both."""
    pairs = [(a, b) for a, b in zip(better, worse) if None not in (a, b)]
    return f'{sum(a < b for a, b in pairs)} of {len(pairs)}' if pairs else '-'


def verdict(claim, collected):
    """A line of the table of claims; None where the question was not asked, or not of these rows. Its numbers
    are of the seeds that all of its rows have."""
    words, published, question, metric, labels, how = claim
    rows = {row['label']: row for row in collected.get(question, ())}
    if not set(labels) <= rows.keys():
        return None
    pairs = list(zip(labels, labels[1:])) if how == CHAIN else [(labels[0], other) for other in labels[1:]]

    def held(numbers):
        return ', '.join(in_seeds(numbers[a], numbers[b]) for a, b in pairs)

    found = {label: column(rows[label], metric) for label in labels}
    complete = [values for values in zip(*found.values()) if None not in values]        # a seed each
    cells = [cell([values[i] for values in complete], DIGITS.get(metric, 3)) for i in range(len(labels))]
    if type(published) is tuple:
        published = ', '.join(f'{number:.2f}' for number in published)
    line = [words, published, ', '.join(cells), held(found), '-', '-']
    if metric == 'frechet':                                                   # large fidelity is good
        line[4] = held({label: [value and -value for value in column(rows[label], 'fidelity')]
                        for label in labels})
        line[5] = held({label: column(rows[label], 'after' if rows[label]['tuned'] else 'before')
                        for label in labels})
    return line


def by_steps(collected):
    """{(run, masked steps, tuning steps): row}: rows of several questions may be of one network."""
    return {(row['run'], row['masked'], row['tuned']): row for question, rows in collected.items()
            for row in rows if question != 'information'}


def curves_of(rows, run):
    """For each seed {masked steps: held-out losses}. `rows` as from `by_steps`."""
    curves = {}
    for row in (row for key, row in rows.items() if key[0] == run):
        for seed, numbers in row['seeds'].items():
            curve = curves.setdefault(seed, {})
            curve.update((at['step'], at['held_out']) for at in numbers.get('curve', ()))
    return curves


def quotients(above, below):
    """Seed by seed; None where one is missing or it makes no sense."""
    return [a / b if a is not None and b else None for a, b in zip(above, below)]


def gap(rows, run, M, T, j):
    """Seed by seed, the unmasked held-out loss of a run of mcdit at noise level j after M masked and T tuning
    steps, divided by that of the run of maskdit it is like. `rows` as from `by_steps`."""
    def losses(run):
        if T:
            return column(rows[run, M, T], 'after', j) if (run, M, T) in rows else []
        return [curve[M][j] if M in curve else None for curve in curves_of(rows, run).values()]
    return quotients(losses(run), losses(LIKE.get(run, 'maskdit')))


def puzzle(collected, settings):
    """Lines of markdown: what it costs not to tune, and how far mcdit's unmasked loss is above maskdit's."""
    rows, lines, body = by_steps(collected), [], []
    for (run, M, T), row in rows.items():
        before = rows.get((run, M, 0))
        if T and before and some(before, 'frechet'):
            body.append([run, f'{M} + {T}', *(cell(quotients(column(before, name), column(row, name)), 2)
                                              for name in ('frechet', 'fidelity')),
                         *(cell(quotients(column(row, 'before', j), column(row, 'after', j)), 2)
                           for j in range(len(SIGMAS)))])
    levels = [f'loss at sigma {sigma:g}' for sigma in SIGMAS]
    if body:
        lines += ['', '## Without tuning over with tuning (MC-DiT Table 7: Fréchet 1.05 for mcdit)',
                  *table(['', 'masked + tuning steps', 'Fréchet', 'fidelity', *levels], body)]

    keys = {(run, M, T) for run, M, T in rows if RUNS[run][0] == 'mcdit'}
    for every, end in ((settings['eval_every'], settings['masked']),
                       (settings['masked'], max((M for run, M, _ in keys if run == 'mcdit'), default=0))):
        keys |= {('mcdit', M, 0) for M in range(every, end + 1, every)}
    keys |= {(run, M, 0) for run, M, _ in keys}
    body = []
    for run, M, T in sorted(keys, key=lambda key: (key[2], list(RUNS).index(key[0]), key[1])):
        found = [gap(rows, run, M, T, j) for j in range(len(SIGMAS))]
        if any(value is not None for values in found for value in values):
            body.append([run, f'{M} + {T}', *(cell(values, 2) for values in found)])
    if body:
        lines += ['', "## Unmasked held-out loss over maskdit's of as many steps, ratio and bridge alike",
                  *table(['', 'masked + tuning steps', *levels], body)]
    return lines


WORDS = {                                                     # runs as README calls them
    'mcdit': 'as here', 'main branch': 'no EMA branch', 'noisy branch': 'the noisy branch alone',
    'clean branch': 'the clean branch alone', 'fast branches': f'both branches, of decay {FAST}',
    'skip': 'skip connection from the noisy image', 'normalised': 'L_noise normalised for each patch',
    'scale': 'clean patches scaled by c_in', 'zero bridge': 'bridge from zero',
    'ratio 0.25': 'mask ratio 0.25', 'ratio 0.75': 'mask ratio 0.75',
    'only clean': 'clean targets alone, no branch', 'all clean': 'all targets clean, no branch',
    'noisy tokens': 'noisy tokens alone, no branch', 'clean tokens': 'clean tokens alone, no branch',
    'maskdit': '`maskdit`', 'maskdit zero bridge': '`maskdit`, bridge from zero',
    'maskdit 0.25': '`maskdit`, mask ratio 0.25', 'maskdit 0.75': '`maskdit`, mask ratio 0.75'}
SHOWN = [SIGMAS.index(sigma) for sigma in (0.1, 1.0, 3.0, 10.0)]


def gap_tables(collected, settings):
    """README's two tables of the puzzle, lines of markdown: by steps, and by the way of masked training."""
    rows, levels = by_steps(collected), [f'{SIGMAS[j]:g}' for j in SHOWN]
    masked, long, short_tune, long_tune = (settings[name] for name in
                                           ('masked', 'long', 'short_tune', 'long_tune'))

    def gaps(run, M, T):
        return [cell(gap(rows, run, M, T, j), 2) if RUNS[run][0] == 'mcdit' else '-' for j in SHOWN]

    def distance(run, M, T):
        return cell(column(rows[run, M, T], 'frechet'), 0) if (run, M, T) in rows else '-'

    lengths = [(M, 0) for M in sorted({settings['eval_every'], masked // 2, masked, 2 * masked, long})]
    lengths += [(masked, short_tune), (masked, long_tune), (long, long_tune)]
    loss = f"loss over `maskdit`'s at sigma {levels[0]}"
    lines = table(['masked + tuning steps', loss, *levels[1:], 'distance of `mcdit`', 'of `maskdit`'], [
        [f'{M:,}' + f' + {T:,}' * bool(T), *gaps('mcdit', M, T),
         *(distance(run, M, T) for run in ('mcdit', 'maskdit'))] for M, T in lengths])
    return lines + table(
        [f'{masked:,} masked steps', loss, *levels[1:], 'distance, untuned', 'tuned',
         'collapse: encoder at 0.1', 'at 1', 'clean patches at 1'],
        [[words, *gaps(run, masked, 0), distance(run, masked, 0), distance(run, masked, short_tune),
          *(cell(column(rows[run, masked, short_tune], name, SIGMAS.index(sigma)), 2) for name, sigma in
            (('collapse_encoder', 0.1), ('collapse_encoder', 1.0), ('collapse_patches', 1.0)))]
         for run, words in WORDS.items() if (run, masked, short_tune) in rows])


def write_tables(collected, settings, judge, timing, missing):
    """Lines of markdown."""
    lines = [
        f'{settings["model"]} on {settings["images"]:,} drawn shapes of {settings["size"]} x '
        f'{settings["size"]} pixels, batch {settings["batch"]}; masked training at lr {settings["lr"]:g}; '
        f'tuning at {settings["tune_lr"]:g}, falling to 0 over its second half; '
        f'{settings["samples"]:,} samples of {settings["sampler"]} steps, no guidance. Losses are held-'
        f'out, of the EMA weights, with nothing masked. Fidelity is the share of samples that the judge, a '
        f'classifier of shapes ({judge["accuracy"]:.2%} right on unseen real ones), takes for what they were '
        f'asked to be. Fréchet distance, precision and recall are in the features of that judge, not '
        f'Inception. Mean ± deviation over seeds.']
    for question, rows in collected.items():
        title, source, _ = QUESTIONS[question]
        lines += ['', f'## {title} ({source})']
        if question == 'information':
            sigmas = mutual_info.DEFAULTS['sigmas']
            lines += table(['nats at sigma', 'seeds', *map('{:g}'.format, sigmas), 'from clean, mean'], [
                [row['label'], str(summary(column(row, 'away'))[2]),
                 *(cell(column(row, 'nats', j), 2) for j in range(len(sigmas))), cell(column(row, 'away'), 2)]
                for row in rows])
            continue
        real = [f'real shapes, {settings["samples"]:,} more', *[''] * 6]
        real += [f'{judge["real shapes"][name]:.{DIGITS.get(name, 3)}f}' for name in SCORE]
        lines += table(
            ['', 'seeds', 'masked + tuning steps', 'loss at sigma 0.1, untuned', 'tuned',
             'mean of all levels, untuned', 'tuned', 'fidelity', 'Fréchet', 'precision', 'recall'],
            [[row['label'], str(summary(column(row, 'frechet'))[2]), f'{row["masked"]} + {row["tuned"]}',
              *(cell(column(row, name, at)) for at in (AT, None) for name in ('before', 'after')),
              *(cell(column(row, name), DIGITS.get(name, 3)) for name in SCORE)] for row in rows] + [real])
        body = {}                                             # an untuned network may stand in several rows
        for row in rows:
            for T, name in ((0, 'before'), (row['tuned'], 'after')):
                if some(row, name):
                    cells = (cell(column(row, name, j)) for j in range(len(SIGMAS)))
                    body[row['run'], row['masked'], T] = [row['run'], f'{row["masked"]} + {T}', *cells]
        if body:
            lines += table(['loss at sigma', 'steps', *map('{:g}'.format, SIGMAS)], list(body.values()))

    shown = {(row['run'], row['masked']): row for rows in collected.values() for row in rows
             if row['masked'] in (settings['masked'], settings['long']) and some(row, 'collapse_encoder')}
    if shown:
        which = [SIGMAS.index(sigma) for sigma in (0.1, 1.0, 10.0)]
        lines += ['', '## Collapse: rms(D - D_zeroed) / rms(D) on visible patches after masked training']
        lines += table(
            ['', 'masked steps',
             *(f'{part}, sigma {SIGMAS[j]:g}' for part in ('encoder', 'clean patches') for j in which)],
            [[run, str(M), *(cell(column(row, name, j)) for name in COLLAPSE for j in which)]
             for (run, M), row in shown.items()])
    lines += puzzle(collected, settings)
    if {'maskdit', 'mcdit'} <= {run for run, *_ in by_steps(collected)}:
        lines += ['', '## What README shows of the two', *gap_tables(collected, settings)]
    claims = [line for claim in CLAIMS if (line := verdict(claim, collected))]
    if claims:
        lines += ['', '## Claims', '', 'Found are Fréchet distances, where no other number is named. A coin '
                  'holds in half of the seeds.', *table(
                      ['claim, < is better', "paper's FID", 'found', 'holds in seeds', 'by fidelity',
                       'by mean held-out loss'], claims)]
    if timing:
        steps = {name: round(settings['masked'] * EQUAL_TIME[name]) for name in timing}
        lines += ['', '## Core-seconds of masked training', *table(
            ['', 'a step', 'steps at equal time', 'seconds'],
            [[name, f'{cost:.4f}', str(steps[name]), f'{cost * steps[name]:.0f}']
             for name, cost in timing.items()])]
    if missing:
        lines += ['', f'## Not run: {len(missing)} stages', '']
        lines += [f'- {folder.parent.name}/{folder.name}: {why}' for folder, why in missing.items()]
    return lines


# ------------------------------------------------------------------------------------------------- pictures

PALETTE = [*mutual_info.COLOURS, (0, 0, 0), (130, 130, 130), (148, 103, 189), (140, 86, 75), (150, 150, 0),
           (200, 0, 0), (0, 0, 160)]
DRAWN = ['maskdit', 'mcdit', 'main branch', 'fast branches', 'ratio 0.25', 'ratio 0.75', 'noisy tokens',
         *READINGS]


def draw_curves(path, collected, settings):
    """Unmasked held-out loss at two noise levels against masked steps; dashed is what tuning makes of it."""
    def spot(step, values):
        mean, deviation, _ = summary(values)
        return step, mean, deviation or 0, False

    rows, panels = by_steps(collected), []
    for sigma in (0.1, 1.0):
        j, curves = SIGMAS.index(sigma), {}
        for run, colour in zip(DRAWN, PALETTE):
            points = {}
            for curve in curves_of(rows, run).values():
                for step, losses in curve.items():
                    points.setdefault(step, []).append(losses[j])
            if points:
                curves[run] = colour, False, [spot(step, points[step]) for step in sorted(points)]
            for (name, M, T), row in rows.items():
                if (name, T) == (run, settings['long_tune']) and some(row, 'after'):
                    ends = [spot(M, column(row, 'before', j)), spot(M + T, column(row, 'after', j))]
                    curves[f'{run}, tuned from {M}'] = colour, True, ends
        if curves:
            panels.append((f'unmasked held-out loss at sigma {sigma:g}', 'steps', curves, True))
    if panels:
        mutual_info.chart(path, panels, ['bars: deviation over seeds; dashed: unmasked tuning, with held-out '
                                         'noise of its own'])


def draw_samples(path, collected):
    """Fidelity and Fréchet distance: a line a row, a ring a seed, a bar of a deviation to either side."""
    rows = [(question, row) for question, rows in collected.items() for row in rows if some(row, 'frechet')]
    if not rows:
        return
    font, line, wide, left, gap = ImageFont.load_default(22), 34, 520, 480, 60
    sheet = Image.new('RGB', (left + 2 * (wide + gap), 110 + line * len(rows)), 'white')
    pen = ImageDraw.Draw(sheet)
    for start, name, title in ((left, 'fidelity', 'share that the judge takes for their class'),
                               (left + wide + gap, 'frechet', 'Frechet distance, judge features')):
        spots = [[value for value in column(row, name) if value is not None] for _, row in rows]
        spans = [(mean, deviation or 0) for mean, deviation, _ in map(summary, spots)]
        high = 1.02 * max(max(*values, sum(span)) for values, span in zip(spots, spans)) + 1e-9
        pen.text((start, 16), title, 'black', font)
        for value in mutual_info.ticks(0, high, False):
            u = start + wide * value / high
            pen.line([u, 80, u, sheet.height - 20], (225, 225, 225), 2)
            pen.text((u, 62), f'{value:g}', 'black', font, anchor='mm')
        for i, (question, row) in enumerate(rows):
            y, colour, (mean, deviation) = 96 + line * i, PALETTE[list(collected).index(question)], spans[i]
            pen.line([start + wide * (mean + sign * deviation) / high if axis == 0 else y
                      for sign in (-1, 1) for axis in (0, 1)], colour, 4)
            for u in (start + wide * value / high for value in spots[i]):
                pen.ellipse([u - 6, y - 6, u + 6, y + 6], outline=colour, width=3)
            if name == 'fidelity':
                pen.text((left - 20, y), f'{question}: {row["label"]}', colour, font, anchor='rm')
    temporary = f'{path}.tmp{os.getpid()}'
    sheet.reduce(2).save(temporary, 'PNG')                                    # smooth rings
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- command line

def shortened(value):
    """Five digits are more than is known, and the file is committed."""
    if isinstance(value, float):
        return float(f'{value:.5g}') if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): shortened(part) for name, part in value.items()}
    return [shortened(part) for part in value] if isinstance(value, (list, tuple)) else value


def commits(folders):
    """{commit: how many of the logs of training in `folders` have a start from it}."""
    return collections.Counter(commit for folder in folders for commit in
                               {line['commit'] for line in train.read_log(folder) if 'commit' in line})


def report(out, settings, questions, seeds, missing):
    """Write evidence.json, evidence.md and the pictures from what is finished. Returns the tables' lines."""
    judge = result_of(judge_of(out, settings))
    timing = result_of(folder_of(out, settings, 'timing', None, 'timing', 0, 0))
    if not judge:
        raise BadInput(f'nothing to report yet: the judge has no result, see {out}/output/judge.txt')
    collected = shortened(collect(out, settings, questions, seeds))           # tables are of what is written
    lines = write_tables(collected, settings, judge, timing, missing)
    units = plan(out, settings, questions, seeds)
    finished = {folder for unit in units for folder in unit['stages'] if result_of(folder)}
    everything = {
        'settings': settings | {'sigma': SIGMAS, 'head of sddit': [NARROW, PROTOTYPES]}, 'seeds': seeds,
        'commit': train.git_commit(), 'commits of the runs': commits(finished), 'torch': torch.__version__,
        'judge': judge,
        'core-seconds a masked step': timing,
        'runs': {name: dict(zip(('method', 'flags', 'reading'), run)) for name, run in RUNS.items()},
        'questions': collected,
        'missing': {f'{at.parent.name}/{at.name}': why for at, why in missing.items()}}
    write(out / 'evidence.json', json.dumps(shortened(everything), separators=(',', ':')) + '\n')
    write(out / 'evidence.md', '\n'.join(lines) + '\n')
    draw_curves(out / 'curves.png', collected, settings)
    draw_samples(out / 'samples.png', collected)
    return lines


def parse(argv):
    parser = argparse.ArgumentParser(description='The papers in miniature.', allow_abbrev=False)
    flag = parser.add_argument
    flag('--out', default='evidence', help='folder for everything')
    flag('--seeds', type=int, nargs='+', help='(default: 0 1 2)')
    flag('--only', nargs='+', choices=QUESTIONS, metavar='QUESTION', help=', '.join(QUESTIONS))
    flag('--jobs', type=int, help='child processes at a time (2, of one thread each)')
    flag('--hours', type=float, default=math.inf, help='after which it stops and reports what there is')
    size = parser.add_mutually_exclusive_group().add_argument
    size('--gpu', action='store_true', help='a larger size, on one GPU')
    size('--quick', action='store_true', help='a few steps of a tiny network')
    return parser.parse_args(argv)


def main(argv=None):
    begun, args = time.time(), parse(argv)
    name = 'gpu' if args.gpu else 'quick' if args.quick else 'laptop'
    settings, out = SETTINGS[name], pathlib.Path(args.out)
    if args.gpu and not torch.cuda.is_available():
        raise BadInput('--gpu: torch sees no GPU here; leave it out for the laptop size')
    asked = args.only or (['methods', 'tuning'] if args.gpu else QUESTIONS)
    questions = [question for question in QUESTIONS if question in asked]
    seeds, jobs = args.seeds or settings['seeds'], settings['jobs'] if args.jobs is None else args.jobs
    if jobs < 1 or min(seeds) < 0 or not args.hours > 0:
        raise BadInput('--jobs must be at least 1, --seeds at least 0, --hours above 0')
    out.mkdir(parents=True, exist_ok=True)
    if not data_of(out, settings).exists():
        data.make_shapes(data_of(out, settings), settings['size'], settings['images'])
    units = plan(out, settings, questions, seeds)
    every = {folder for unit in units for folder in unit['stages']}
    print(f'{len({(unit["run"], unit["seed"]) for unit in units})} runs in {len(every)} stages, '
          f'{sum(map(bool, map(result_of, every)))} of them finished')
    if name == 'laptop':
        hours = estimate(settings, units) / 3600
        print(f'about {hours:.1f} core-hours to go, {hours / jobs:.1f} hours where {jobs} cores are free')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    missing = carry_out(out, name, units, jobs, begun + 3600 * args.hours)
    print('\n'.join(report(out, settings, questions, seeds, missing)))
    print(f'\nevery number in {out}/evidence.json, the tables in {out}/evidence.md')
    return int(bool(missing))


if __name__ == '__main__':
    try:
        if sys.argv[1:2] == ['--child']:
            out, name, todo = sys.argv[2:]
            if name != 'gpu':
                torch.set_num_threads(1)
            sys.exit(child(pathlib.Path(out), SETTINGS[name], *json.loads(todo)))
        sys.exit(main())
    except (BadInput, data.BadInput) as mistake:
        print(f'evidence.py: {mistake}', file=sys.stderr)
        sys.exit(2)
    except OSError as problem:
        print(f'evidence.py: cannot write {problem.filename}: {problem.strerror}', file=sys.stderr)
        sys.exit(2)
