"""Which method makes better images for the same training, and why? Nine questions, their runs, the answers.

    python tests/bench/evidence.py run --set digits --seeds 5 --jobs 2 --list       # what it will cost
    python tests/bench/evidence.py run --set digits --seeds 5 --jobs 2              # Ctrl-C; again resumes
    python tests/bench/evidence.py report --set digits                              # at any time

A run is a command line of train.py, then finetune.py, then sample.py, and a measurement of its samples
(measures.py). Each of these stages has a folder, named by the hash of its command line and of the code that
it runs (comments and docstrings do not count), and a finished stage is never repeated. `report` writes
results.csv, one line per run and seed, and from it report.md and a figure per question; with --results it
reads a results.csv that was kept. Run it from a clone that nobody edits: a stage is a process of its own, and
reads the code as it is when it starts.

Rows and comparisons were fixed before the first run. A comparison is the paired difference over seeds: two
runs of one seed share noise, masks and the order of data. Question 7, the learning rate, is run first, and
every other run of a method uses the rate that was best there; --rate takes one rate for all instead.

Data sets, each of 10 classes:
    digits   1,797 handwritten digits of 8 x 8 pixels, 1,500 to train on and 297 that no run sees. From
             "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
             Repository (doi.org/10.24432/C50P49), the test part, in the copy of scikit-learn; licence CC BY
             4.0 (creativecommons.org/licenses/by/4.0). digits.npz has its levels 0 to 16 scaled to 0 to 255.
    shapes   the drawn shapes of data.py, of 12 pixels and for question 8 of 16 and 24
    large    the same of 32 pixels, for a GPU

Equal compute is equal FLOPs of training and tuning together, as counted by bench.py; mcdit's are the budget.
SD-DiT's head is narrowed: it weighs against T about what 2048, 2048, 256 and 8192 weigh against XL/2.
Frechet distances in the shape classifier's features are not FIDs.
"""

import argparse
import ast
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')                           # see train.py
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests/bench')]

import numpy as np
import scipy.stats
import torch
from torch import nn

import bench
import data
import finetune
import model
import sample
import train
from measures import SETS, WAYS, folder_of, measure, prepare
from model import check

# -------------------------------------------------------------------------------------- data sets, questions

SIZES = (12, 16, 24)                          # pixels of the shapes in question 8
SAMPLER_STEPS = 18
ALL = ('dit', 'half', 'maskdit', 'mdt', 'sddit', 'mcdit')       # half: dit whose loss sees half of the tokens


def run(name, method, flags='', masked=1.0, tuned=1.0, equal=False, rate=None, size=None):
    """masked, tuned: lengths in units of the data set's, tuned is masked or 0; equal: as many masked steps as
    the compute of mcdit, masked and tuned, allows; rate: number of the learning rate, None for the best;
    size: pixels, None for the data set's."""
    return {name: dict(method=method, flags=flags, masked=masked, tuned=tuned, equal=equal, rate=rate,
                       size=size)}


def both(name, method, flags, equal=False):
    """The run tuned, and untuned."""
    return (run(name, method, flags, equal=equal)
            | run(f'{name}, untuned', method, flags, tuned=0, equal=equal))


FIVE, BOTH = tuple(m for m in ALL if m != 'half'), ('mcdit', 'maskdit')
UNMASKED, RATIOS, THIRD = (0.05, 0.1, 0.25), (0.25, 0.75), 1 / 3
ROWS = collections.ChainMap(
    *(both(m, m, '') for m in ALL),
    *(both(f'{m}, equal compute', m, '', equal=True) for m in ALL),
    *(both(f'mcdit unmasked {u}', 'mcdit', f'--unmasked {u}', equal=True) for u in UNMASKED),
    both('maskdit unmasked 0.1', 'maskdit', '--unmasked 0.1', equal=True),
    *(both(name, 'mcdit', flags, equal=True) for name, flags in (
        ('no branch', '--lambda-con1 0 --lambda-con2 0'), ('noisy branch', '--lambda-con2 0'),
        ('clean branch', '--lambda-con1 0'), ('EMA encoder', '--teacher-encoder'))),
    *(run(f'{m} ratio {r}', m, f'--mask-ratio {r}', equal=True) for m in BOTH for r in RATIOS),
    *(run(f'{m} rate {k}', m, masked=THIRD, tuned=THIRD, rate=k) for m in FIVE for k in range(3)),
    *(run(f'{name}, {size} pixels', name.split()[0], flags, equal=True, size=size)
      for name, flags in (('dit', ''), ('maskdit', ''), ('mcdit', ''), ('mcdit 0.25', '--mask-ratio 0.25'))
      for size in SIZES),
    *(run(f'{m} {bridge} x {length}', m, flags, masked=length, tuned=length) for m in BOTH
      for bridge, flags in (('zero', ''), ('xavier', '--bridge xavier')) for length in (1, 3)),
    run('dit, equal compute x 3', 'dit', masked=3, tuned=3, equal=True))

QUALITY = ('frechet', 'frechet_pixels', 'fidelity', 'precision', 'recall', 'nearest', 'loss@0.14', 'loss@2.8')
TITLES = {'frechet': 'Fréchet', 'frechet_pixels': 'in pixels', 'untuned': 'Fréchet, untuned',
          'loss@0.14': 'loss at 0.14', 'loss@2.8': 'loss at 2.8'}
SHORT = ('frechet', 'frechet_pixels', 'fidelity', 'loss@0.14', 'loss@2.8')


def against(base, *names):
    """Rows of a table, each compared with `base`."""
    return [(name, base) for name in (base, *names)]


# Tables are (caption, [(row, the row it is compared with)], metrics), figures (kind, ...): see `table`, `draw`.
# A question without tables has one that is made of its figure. untuned: its rows are run untuned as well.
SMALL = ('digits', 'shapes')
QUESTIONS = {
    'Q1': dict(
        title='Which method is best, at equal compute and at equal images?', seeds=5, sets=SETS,
        tables=[('equal compute', against(*(f'{m}, equal compute' for m in ALL[::-1])), QUALITY),
                ('equal images', against(*ALL[::-1]), QUALITY)],
        figure=('compute', 'training compute, PFLOP', ALL)),
    'Q2': dict(
        title='What does tuning do, and what does its absence cost?', seeds=5, sets=SMALL,
        tables=[('differences of untuned from tuned', [(f'{m}, untuned', m) for m in ALL], QUALITY)],
        figure=('noise', 'loss untuned against tuned', 0), probe=('mcdit, untuned', 'mcdit')),
    'Q3': dict(
        title='Is tuning still needed where a share of the steps masks nothing (--unmasked)?', seeds=5,
        sets=SMALL, untuned=True, tables=[('equal compute', against(
            'mcdit, equal compute', *(f'mcdit unmasked {u}' for u in UNMASKED), 'maskdit, equal compute',
            'maskdit unmasked 0.1'), ('untuned', *SHORT))],
        figure=('x', 'share of the steps that mask nothing', {
            f'{m}{kind}': [(0, f'{m}, equal compute{kind}'), *((u, f'{m} unmasked {u}{kind}') for u in shares)]
            for m, shares in (('mcdit', UNMASKED), ('maskdit', (0.1,))) for kind in ('', ', untuned')})),
    'Q4': dict(
        title='What do the two EMA branches do?', seeds=3, sets=SMALL, untuned=True,
        tables=[('equal compute', against('no branch', 'noisy branch', 'clean branch', 'mcdit, equal compute',
                                          'EMA encoder'), ('untuned', *SHORT))],
        figure=('noise', 'loss against that without a branch', 0)),
    'Q5': dict(
        title='Which mask ratio is best?', seeds=3, sets=SMALL,
        tables=[('equal compute, differences from ratio 0.5', [
            pair for m in BOTH for pair in against(f'{m}, equal compute', *(
                f'{m} ratio {r}' for r in RATIOS))], SHORT)],
        figure=('x', 'mask ratio', {
            m: [(0.25, f'{m} ratio 0.25'), (0.5, f'{m}, equal compute'), (0.75, f'{m} ratio 0.75')]
            for m in BOTH})),
    'Q6': dict(
        title='Does the clean context teach context: equal eyes, equal bars, closed rings?', seeds=3,
        sets=('shapes',), tables=[('equal images', against(
            'maskdit', 'dit', 'half', 'mdt', 'sddit', 'mcdit'), ('eyes', 'bars', 'ring', 'fidelity'))],
        figure=('metrics', 'share of the images with equal eyes (1), equal bars (2), a closed ring (3)',
                ('eyes', 'bars', 'ring'))),
    'Q7': dict(
        title='Which learning rate suits each method, at a third of the length?', seeds=3, sets=SETS, tables=[],
        figure=('x', 'learning rate', {m: [(k, f'{m} rate {k}') for k in range(3)] for m in FIVE})),
    'Q8': dict(
        title='Does the order change with the number of tokens, at equal compute?', seeds=1, sets=('shapes',),
        tables=[], figure=('x', 'tokens', {m: [(size * size // 4, f'{m}, {size} pixels') for size in SIZES]
                                           for m in ('dit', 'maskdit', 'mcdit', 'mcdit 0.25')})),
    'Q9': dict(
        title='How should the bridge start, and does length change that?', seeds=3, sets=('digits',),
        tables=[(f'{m}, differences of xavier from zero', [
            (f'{m} {bridge} x {n}', f'{m} zero x {n}') for n in (1, 3) for bridge in ('zero', 'xavier')], SHORT)
                for m in BOTH] + [('three times the length, added when question 1 had been answered', against(
                    'mcdit zero x 3', 'dit, equal compute x 3'), SHORT)],
        figure=('x', 'length of masked training and tuning', {
            f'{m} {bridge}': [(n, f'{m} {bridge} x {n}') for n in (1, 3)]
            for m in BOTH for bridge in ('zero', 'xavier')}))}

# settings of mcdit at equal compute, and what each is held against
SETTINGS = ('mcdit, equal compute', *(f'mcdit unmasked {u}' for u in UNMASKED), 'no branch', 'noisy branch',
            'clean branch', 'EMA encoder', *(f'mcdit ratio {r}' for r in RATIOS))
RIVALS = ('maskdit, equal compute', 'dit, equal compute')


def groups_of(question):
    """Lists of names of its runs, in the order in which they are run."""
    groups = [[name for pair in rows for name in pair] for _, rows, _ in question['tables']]
    if question.get('untuned'):
        groups += [[f'{name}, untuned' for name in groups[0]]]
    if not question['tables']:
        groups = [[name for _, name in points] for points in question['figure'][2].values()]
    return [list(dict.fromkeys(group)) for group in groups]


def rows_of(question):
    return list(dict.fromkeys(name for group in groups_of(question) for name in group))


# -------------------------------------------------------------------- what the runner adds to the methods

def half_loss(net, teacher, x0, y, r, cfg):
    """dit's on a random half of the tokens: nothing is masked, but half of the targets are gone."""
    xt, y = model.corrupt(x0, y, r, cfg)
    D, *_ = model.denoise(net, xt, r['sigma'], y, cfg)
    w = model.loss_weight(r['sigma'], cfg.sigma_data)
    return {'denoise': (1.0, model.take(w * (D - x0) ** 2, r['visible']).mean())}


def narrow_head(self, width):
    nn.Module.__init__(self)
    self.fc1, self.fc2, self.fc3 = nn.Linear(width, 128), nn.Linear(128, 128), nn.Linear(128, 64)
    self.prototypes = nn.Parameter(torch.zeros(model.PROTOTYPES, 64))


def register():
    """Add the row `half`, narrow SD-DiT's head, and give S, for `large`, a decoder in XL/2's proportions."""
    model.METHODS['half'] = model.METHODS['dit']._replace(loss=half_loss, mask_ratio=0.5)
    model.PROTOTYPES, model.Head.__init__, model.DECODER = 512, narrow_head, (4, 160, 5)


@functools.lru_cache(maxsize=None)
def flops(model_name, method, flags, size, channels, stage='train'):
    """FLOPs of one step per image: of masked training, or of tuning."""
    given, columns = vars(train.parse(['--method', method, *flags.split()])), model.METHODS[method]
    fields = {'mask_ratio': columns.mask_ratio} | {k: given[k] for k in columns.flags if k in given}
    cfg = model.Config(method=method, model=model_name, resolution=size, channels=channels, classes=10,
                       batch=1, **fields)
    if stage == 'tune':
        cfg = dataclasses.replace(cfg, stage='tune', mask_ratio=0.0)
        return bench.training_flops(cfg, model.dit_loss)
    return ((1 - cfg.unmasked) * bench.training_flops(cfg, columns.loss)
            + (cfg.unmasked * bench.training_flops(cfg, model.dit_loss) if cfg.unmasked else 0))


def steps_of(name, s):
    """(masked steps, tuning steps, FLOPs of all of them) of a run in the data set s."""
    row, size = ROWS[name], ROWS[name]['size'] or s['size']
    M, T = round(row['masked'] * s['masked']), round(row['tuned'] * s['tuned'])
    count = lambda method, flags: [flops(s['model'], method, flags, size, s['channels'], stage)
                                   for stage in ('train', 'tune')]
    mine = count(row['method'], row['flags'])
    if row['equal']:
        step, tune = count('mcdit', '')
        M = round((M * step + round(row['masked'] * s['tuned']) * (tune - mine[1])) / mine[0])
    return M, T, s['batch'] * (M * mine[0] + T * mine[1])


# -------------------------------------------------------------------------------------------------- stages

COST = {'start': 3.5, 'step': 0.05, 'speed': 300e9, 'measure': 5}   # core-seconds; FLOP/s of a core, bfloat16
PASSES = {'mdt': 2, 'sddit': 1.6, 'mcdit': 1.3}                     # networks run per masked step; others 1

RESULT = {'train': 'weights.pt', 'tune': 'weights.pt', 'sample': 'samples.npz', 'measure': 'result.json'}
FILES = {'train': ('model', 'data', 'sample', 'train'),
         'tune': ('model', 'data', 'sample', 'train', 'finetune'),
         'sample': ('model', 'data', 'sample'),
         'measure': ('model', 'data', 'train', 'fid', 'tests/bench/classifier', 'tests/bench/measures')}


def without_docs(text):
    """The code of a file or function, in which comments, docstrings and layout do not count."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


@functools.lru_cache(maxsize=None)
def code(kind):
    """The hash of the code that a stage runs."""
    texts = [(ROOT / f'{name}.py').read_text() for name in FILES[kind]]
    texts += [inspect.getsource(one) for one in (half_loss, narrow_head, register)]
    return hashlib.sha256('\n'.join(map(without_docs, texts)).encode()).hexdigest()[:12]


class Stage(NamedTuple):
    kind: str
    folder: str
    argv: tuple
    needs: str | None                         # folder of the stage before it
    seconds: float                            # estimated, of one core

    result = property(lambda self: pathlib.Path(self.folder) / RESULT[self.kind])


def stages(set_name, name, seed, rates):
    """The stages of a run, in order."""
    s, row = SETS[set_name], ROWS[name]
    size, rate = row['size'] or s['size'], rates.get(row['method'])
    if row['rate'] is not None:
        rate = s['rates'][row['rate']]
    dataset, (M, T, _) = folder_of(set_name, size), steps_of(name, s)
    masked, tuning = (flops(s['model'], row['method'], row['flags'], size, s['channels'], stage)
                      for stage in ('train', 'tune'))
    chain = []

    def add(kind, seconds, *argv, out=()):
        argv, needs = [str(part) for part in argv], chain[-1].folder if chain else None
        key = hashlib.sha256(json.dumps([code(kind), *argv]).encode()).hexdigest()[:12]
        folder = f'runs/{row["method"]}-s{seed}-{kind}-{key}'
        argv += [part.format(folder) for part in out]
        chain.append(Stage(kind, folder, tuple(argv), needs, COST['start'] + seconds))
        return chain[-1]

    def steps(count, flops_of_step, passes=1):
        return count * (passes * COST['step'] + s['batch'] * flops_of_step / COST['speed'])

    common = ['--data', dataset, '--batch', s['batch'], '--log-every', 100, '--eval-every', 10 ** 6,
              '--save-every', 1000, '--preview', 0]
    last = add('train', steps(M, masked, PASSES.get(row['method'], 1)), '--method', row['method'],
               '--model', s['model'], '--seed', seed, '--steps', M, '--lr', rate, *common,
               *row['flags'].split(), out=('--out', '{}'))
    if T:
        last = add('tune', steps(T, tuning), last.result, '--steps', T, '--lr', rate / 2, '--lr-decay', 0.5,
                   *common, out=('--out', '{}'))
    weights = last.result
    images = s['samples'] * (2 * SAMPLER_STEPS - 1) * tuning / 3
    last = add('sample', images / COST['speed'], weights, '-n', s['samples'], '--balanced',
               '--steps', SAMPLER_STEPS, '--seed', seed, '--batch', 100,
               out=('--npz', '{}/samples.npz', '--out', '{}/samples.png'))
    add('measure', COST['measure'], set_name, size, weights, last.result, out=('{}',))
    return chain


def do_stage(kind, folder, *argv):
    """In a process of its own: one stage. Of a checkpoint, what the next stages read is kept."""
    torch.set_num_threads(1)
    register()
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        if kind == 'measure':
            return measure(code('measure'), *argv)
        path = {'train': train, 'tune': finetune, 'sample': sample}[kind].main(list(argv))
        if kind != 'sample':
            state = model.read_checkpoint(path)
            kept = {part: state[part] for part in ('ema', 'step', *['model'] * (kind == 'train'))}
            with data.whole_file(f'{folder}/weights.pt') as file:
                torch.save(kept | {'config': dataclasses.asdict(state['config'])}, file)
            for old in train.checkpoints(pathlib.Path(folder)):
                old.unlink()
    finally:
        with open(f'{folder}/core-seconds', 'a') as file:                     # a line per sitting
            file.write(f'{time.process_time():.1f}\n')


def carry_out(todo, jobs):
    """Run stages in `jobs` processes, each when the stage it needs is done. Returns those that failed."""
    todo = [stage for stage in dict.fromkeys(todo) if not stage.result.exists()]
    results = {stage.folder: stage.result for stage in todo}
    turn, running, failed, children = threading.Condition(), set(), [], set()
    bar = data.progress(total=len(todo), desc='stages', unit='stage')

    def worker():
        while True:
            with turn:
                while True:
                    ready = [stage for stage in todo
                             if stage.needs not in results or results[stage.needs].exists()]
                    if ready or not running:
                        break
                    turn.wait()
                if not ready:
                    return
                stage = ready[0]
                todo.remove(stage)
                running.add(stage)
                os.makedirs(stage.folder, exist_ok=True)
                log = open(f'{stage.folder}/output.txt', 'ab')
                child = subprocess.Popen(
                    [sys.executable, __file__, 'stage', stage.kind, stage.folder, *stage.argv], stdout=log,
                    stderr=log, env=os.environ | {'OMP_NUM_THREADS': '1'})
                children.add(child)
            child.wait()
            log.close()
            with turn:
                running.remove(stage)
                if not stage.result.exists():
                    failed.append(stage)
                bar.update()
                turn.notify_all()

    threads = [threading.Thread(target=worker) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:                                                 # train.py writes a checkpoint
        todo.clear()
        for child in children:
            child.terminate()
        for thread in threads:
            thread.join()
        raise
    bar.close()
    return failed


# ------------------------------------------------------------------------------------------------- results

KEPT = {}                                     # {folder of the last stage: metrics}, from --results


def result(chain):
    """Metrics of a run that is finished, here or in --results, or None. Core-hours: of its masked training,
    which it may share with other runs, and of its other stages."""
    with contextlib.suppress(OSError):
        hours = [sum(map(float, (pathlib.Path(stage.folder) / 'core-seconds').read_text().split())) / 3600
                 for stage in chain]
        return json.loads(chain[-1].result.read_text()) | {
            'trained': chain[0].folder, 'measured': chain[-1].folder, 'training_hours': hours[0],
            'other_hours': sum(hours[1:])}
    return KEPT.get(chain[-1].folder)


def best_rates(set_name, seeds, given=None):
    """{method: learning rate}: the best of question 7 by mean Frechet distance, None until it is finished."""
    s, rates = SETS[set_name], {}
    for method in ALL:
        key = 'dit' if method == 'half' else method                           # the control shares dit's
        means = []
        for k in range(3) if given is None else ():
            found = [result(stages(set_name, f'{key} rate {k}', seed, {})) for seed in range(seeds)]
            means.append(np.mean([one['frechet'] for one in found]) if all(found) else None)
        rates[method] = given or (None if None in means else s['rates'][int(np.argmin(means))])
    return rates


def collect(set_name, names, seeds, rates):
    """{run: {seed: {metric: value}}} of what is finished."""
    found = collections.defaultdict(dict)
    for name in names:
        row, (M, T, total) = ROWS[name], steps_of(name, SETS[set_name])
        rate = rates[row['method']] if row['rate'] is None else SETS[set_name]['rates'][row['rate']]
        for seed in range(seeds) if rate else ():
            one = result(stages(set_name, name, seed, rates))
            if one:
                found[name][seed] = one | {'masked_steps': M, 'tuning_steps': T, 'lr': rate,
                                           'petaflops': total / 1e15}
    return found


def write_csv(path, found):
    """A line per run and seed, a column per metric."""
    lines = [{'run': name, 'seed': seed} | {metric: value if isinstance(value, str) else f'{value:.6g}'
                                            for metric, value in metrics.items()}
             for name, of_seeds in found.items() for seed, metrics in of_seeds.items()]
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)


def read_csv(path):
    """{run: {seed: {metric: value}}}"""
    found = collections.defaultdict(dict)
    with open(path, newline='') as file:
        for line in csv.DictReader(file):
            name, seed = line.pop('run'), int(line.pop('seed'))
            found[name][seed] = {metric: value if metric in ('trained', 'measured') else float(value)
                                 for metric, value in line.items() if value}
    return found


def paired(a, b):
    """Mean of a - b over the seeds of both, and the half-width of its 95 % t-interval: {seed: value} each."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    if n < 2:
        return (differences[0] if n else math.nan), math.nan
    return np.mean(differences), scipy.stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / math.sqrt(n)


def column(found, name, metric):
    """{seed: value}; `untuned` is the Frechet distance of the run untuned."""
    if metric == 'untuned':
        name, metric = f'{name}, untuned', 'frechet'
    values = {seed: metrics.get(metric, math.nan) for seed, metrics in found.get(name, {}).items()}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def number(value):
    return f'{value:.3g}' if abs(value) < 1000 else f'{value:,.0f}'


def interval(found, name, base, metric):
    """'difference [95 % interval]', '' where there is none."""
    mean, width = paired(column(found, name, metric), column(found, base, metric))
    if name == base or math.isnan(mean):
        return ''
    return f'{mean:+.2g}' + ('' if math.isnan(width) else f' [{mean - width:+.2g}, {mean + width:+.2g}]')


def spread(found, name, metric):
    """'mean ± standard deviation' over seeds, '' where there is none."""
    values = list(column(found, name, metric).values())
    if not values:
        return ''
    return number(np.mean(values)) + (f' ± {np.std(values, ddof=1):.2g}' if len(values) > 1 else '')


def markdown(caption, titles, lines):
    return '\n'.join([f'*{caption}*\n', *(f'| {" | ".join(cells)} |'
                                          for cells in (titles, ['---'] * len(titles), *lines))]) + '\n'


def table(found, caption, rows, metrics):
    """Mean and standard deviation of each metric; paired differences in Frechet distances, or where the table
    has none, in its first three metrics."""
    rows = [(name, base) for name, base in rows if found.get(name)]
    if not rows:
        return f'*{caption.strip(", ")}: not run yet*\n'
    metrics = [m for m in metrics if any(column(found, name, m) for name, _ in rows)]
    compared = [m for m in metrics if m in ('untuned', 'frechet')] or metrics[:3]
    bases = list(dict.fromkeys(base for _, base in rows))
    seeds = {len(found[name]) for name, _ in rows}
    caption = caption.strip(', ') + f'; seeds: {" to ".join(map(str, sorted({min(seeds), max(seeds)})))}'
    caption += f'; differences from {bases[0]}' * (len(bases) == 1)
    lines = []
    for name, base in rows:
        one = next(iter(found[name].values()))
        lines.append([name, f'{one["masked_steps"]:.0f} + {one["tuning_steps"]:.0f}',
                      *(spread(found, name, metric) for metric in metrics),
                      *(interval(found, name, base, metric) for metric in compared)])
    return markdown(caption, ['run', 'steps', *(TITLES.get(m, m) for m in metrics),
                              *(f'{TITLES.get(m, m)}: difference [95 %]' for m in compared)], lines)


def figure_table(found, question, rates):
    """Fréchet distance: a row per series of the figure, a column per x."""
    _, label, about = question['figure']
    xs = [rates[x] if label == 'learning rate' else x for x, _ in next(iter(about.values()))]
    return markdown('Fréchet distance', [label, *map(str, xs)],
                    [[name, *(spread(found, run, 'frechet') for _, run in points)]
                     for name, points in about.items()])


def settings_table(found):
    """Is any setting of mcdit ahead of maskdit and dit at equal compute? The best six of those tried."""
    tried = sorted((name for name in SETTINGS if found.get(name)),
                   key=lambda name: np.mean(list(column(found, name, 'frechet').values())))
    ahead = [name for name in tried if all(sum(paired(
        column(found, name, 'frechet'), column(found, rival, 'frechet'))) < 0 for rival in RIVALS)]
    lines = [[name, ROWS[name]['flags'], spread(found, name, 'frechet'),
              *(interval(found, name, rival, 'frechet') for rival in RIVALS)] for name in tried[:6]]
    return markdown(f'settings of mcdit at equal compute: {len(tried)} tried, ahead of maskdit and dit beyond '
                    f'the interval: {", ".join(ahead) or "none"}', ['setting', 'flags', 'Fréchet', *(
                        f'difference from {rival.split(",")[0]} [95 %]' for rival in RIVALS)], lines)


def probe_table(found, name):
    """The loss of one run's weights in six ways, mean over seeds."""
    levels = [f'{level:.2g}' for level in train.EVAL_SIGMAS]
    return markdown(f'loss on visible tokens of the same weights, run in six ways: {name}',
                    ['the decoder is given', *levels],
                    [[way, *(number(np.mean(list(column(found, name, f'{way}@{level}').values())))
                             for level in levels)] for way in WAYS])


def draw(path, title, question, found, rates):
    """The figure of a question: ('noise', y label, table), ('x', x label, {series: [(x, run)]}), ('compute',
    x label, methods) or ('metrics', x label, metrics). Bars are 95 % intervals."""
    kind, label, about = question['figure']
    series, levels = [], train.EVAL_SIGMAS

    def point(values):
        values = [value for value in values if not math.isnan(value)]
        return (np.mean(values) if values else None), (paired(dict(enumerate(values)), dict.fromkeys(
            range(len(values)), 0.0))[1] if len(values) > 1 else 0)

    def add(name, xs, points):
        series.append((name, data.COLOURS[len(series) % 8], xs, *map(list, zip(*points))))

    if kind == 'noise':
        for name, base in question['tables'][about][1]:
            ratios = [[column(found, name, f'loss@{x:.2g}')[seed] / column(found, base, f'loss@{x:.2g}')[seed]
                       for seed in found.get(name, {}).keys() & found.get(base, {}).keys()] for x in levels]
            add(name, levels, [point(values) for values in ratios])
        return data.chart(path, title, series, 'noise level sigma', label, log_x=True)
    if kind == 'compute':                     # a third of the length, equal compute, equal images
        for method in about:
            mine = [*(f'{method} rate {k}' for k in range(3)), f'{method}, equal compute', method]
            first = lambda name, metric: next(iter(column(found, name, metric).values()), None)
            best = {first(name, 'lr') for name in mine[3:]}
            spots = {first(name, 'petaflops'): column(found, name, 'frechet').values() for name in mine
                     if found.get(name) and first(name, 'lr') in best}
            if spots:
                add(method, sorted(spots), [point(spots[x]) for x in sorted(spots)])
        return data.chart(path, title, series, label, 'Frechet distance', log_x=True, log_y=True)
    if kind == 'x':
        for name, points in about.items():
            xs = [rates[x] if label == 'learning rate' else x for x, _ in points]
            add(name, xs, [point(column(found, run, 'frechet').values()) for _, run in points])
        return data.chart(path, title, series, label, 'Frechet distance',
                          log_x=label in ('learning rate', 'tokens'), log_y=True)
    for name, _ in question['tables'][0][1]:
        add(name, list(range(1, len(about) + 1)), [point(column(found, name, m).values()) for m in about])
    return data.chart(path, title, series, label, 'share')


def write_report(set_name, questions, found):
    """report.md and the figures, in the current folder."""
    rates = {m: next(iter(column(found, f'{m}, equal compute', 'lr').values()), '-') for m in ALL}
    text = [f'# {set_name}\n', 'Mean ± standard deviation over seeds; paired differences over seeds with their '
            '95 % interval. Learning rates: ' + ', '.join(f'{m} {rate}' for m, rate in rates.items()) + '.\n']
    runs = [metrics for name in found if name in ROWS for metrics in found[name].values()]
    hours = {metrics[key]: metrics[hours] for metrics in runs
             for key, hours in (('trained', 'training_hours'), ('measured', 'other_hours'))}
    text.append(f'{len({metrics["measured"] for metrics in runs})} runs, {sum(hours.values()):.1f} core-hours.\n')
    for name, of_seeds in found.items():
        if name not in ROWS:                                                  # real images
            text.append(f'{name}: ' + ', '.join(f'{m} {number(v)}' for m, v in of_seeds[0].items()) + '\n')
    for key in questions:
        question = QUESTIONS[key]
        if not any(found.get(name) for name in rows_of(question)):
            text.append(f'## {key}. {question["title"]}\n\nNot run yet.\n')
            continue
        text += [f'## {key}. {question["title"]}\n', *(table(found, *one) for one in question['tables'])]
        if not question['tables']:
            text.append(figure_table(found, question, SETS[set_name]['rates']))
        text += [probe_table(found, name) for name in question.get('probe', ()) if found.get(name)]
        draw(f'{key}.png', f'{key}. {question["title"]}', question, found, SETS[set_name]['rates'])
        text.append(f'![]({set_name}-{key}.png)\n')
    if {'Q3', 'Q4', 'Q5'} <= set(questions):
        text.append(settings_table(found))
    pathlib.Path('report.md').write_text('\n'.join(text))
    print('\n'.join(text))


# ------------------------------------------------------------------------------------------------- command

def parse(argv):
    parser = argparse.ArgumentParser(description='Compare the methods.', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag('what', choices=('run', 'report'))
    flag('--set', choices=SETS, default='digits', help='data set')
    flag('--only', help='questions, such as Q1,Q3; None: all')
    flag('--seeds', type=int, default=5, help='at most as many seeds as this; most questions have 3')
    flag('--jobs', type=int, default=2, help='processes of one thread each')
    flag('--rate', type=float, help='one learning rate for all methods; None: the best of question 7')
    flag('--out', default='evidence', help='folder for everything that is written')
    flag('--results', help='a results.csv: its runs are not repeated by the same code; report reads it alone')
    flag('--list', action='store_true', help='print questions, runs and estimated core-minutes')
    flag('--dirty', action='store_true', help='run although the working tree has uncommitted changes')
    flag('--shorten', type=float, default=1.0, help='factor of all lengths and samples, for a trial')
    return parser.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['stage']:
        return do_stage(*argv[1:])
    args = parse(argv)
    register()
    s = SETS[args.set]
    for name in ('masked', 'tuned', 'samples'):
        s[name] = max({'samples': 20}.get(name, 2), round(s[name] * args.shorten))
    questions = [key for key, question in QUESTIONS.items() if args.set in question['sets']]
    asked = args.only.split(',') if args.only else questions
    check(set(asked) <= set(questions),
          f'--only {args.only}: the questions of {args.set} are {", ".join(questions)}')
    count = {key: min(args.seeds, QUESTIONS[key]['seeds']) for key in questions}
    if args.list:
        known, any_rate = set(), dict.fromkeys(ALL, args.rate or s['rates'][1])
        for key in sorted(asked, key=lambda key: key != 'Q7'):
            todo = {stage for seed in range(count[key]) for name in rows_of(QUESTIONS[key])
                    for stage in stages(args.set, name, seed, any_rate)} - known
            known |= todo
            minutes = sum(stage.seconds for stage in todo) / 60
            print(f'{key}  {minutes:6.0f} core-minutes, {count[key]} seeds  {QUESTIONS[key]["title"]}')
            for name in rows_of(QUESTIONS[key]):
                M, T, total = steps_of(name, s)
                print(f'      {name:28} {M:6} + {T:5} steps {total / 1e15:8.3f} PFLOP')
        return

    out = pathlib.Path(args.out) / args.set
    out.mkdir(parents=True, exist_ok=True)
    if args.what == 'report':
        kept = args.results and os.path.abspath(args.results)
        os.chdir(out)
        if not kept:
            names = dict.fromkeys(name for key in questions for name in rows_of(QUESTIONS[key]))
            found = collect(args.set, names, args.seeds, best_rates(args.set, count['Q7'], args.rate))
            for path in sorted(pathlib.Path('.').glob(f'real*-{code("measure")}.json')):
                size = path.stem.split('-')[0][4:]
                found[f'unseen images, {size} pixels'][0] = json.loads(path.read_text())
            write_csv('results.csv', found)
        return write_report(args.set, asked, read_csv(kept or 'results.csv'))
    changed = subprocess.run(['git', 'status', '--porcelain', '--untracked-files=no'], cwd=ROOT, text=True,
                             capture_output=True).stdout.splitlines()
    check(args.dirty or not changed, f'the working tree has {len(changed)} uncommitted changes: commit them, '
          f'so that the results name code that exists, or add --dirty for a trial')
    if args.results:
        KEPT.update((metrics['measured'], metrics) for of_seeds in read_csv(args.results).values()
                    for metrics in of_seeds.values() if 'measured' in metrics)
    os.chdir(out)
    with open('sittings.jsonl', 'a') as file:
        about = {'time': time.strftime('%F %T'), 'commit': train.git_commit(), 'argv': argv}
        file.write(json.dumps(about) + '\n')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for size in {ROWS[name]['size'] or s['size'] for key in asked for name in rows_of(QUESTIONS[key])}:
        prepare(args.set, size, code('measure'))

    def carry_out_all(keys, rates):
        chains = [stages(args.set, name, seed, rates) for key in keys
                  for group in groups_of(QUESTIONS[key]) for seed in range(count[key]) for name in group
                  if ROWS[name]['rate'] is not None or rates[ROWS[name]['method']]]
        return carry_out([stage for chain in chains if not result(chain) for stage in chain], args.jobs)

    failed = carry_out_all(['Q7'], {}) if args.rate is None else []
    rates = best_rates(args.set, count['Q7'], args.rate)
    print('learning rates: ' + ', '.join(f'{method} {rate}' for method, rate in rates.items()), flush=True)
    failed += carry_out_all([key for key in asked if key != 'Q7'], rates)
    check(not failed, f'{len(failed)} stages failed, see output.txt in '
          + ', '.join(f'{out}/{stage.folder}' for stage in failed[:3]))


if __name__ == '__main__':
    data.script('evidence.py', main)
