"""The loop: train a diffusion transformer on masked images.

    python train.py                                                          # mcdit B/2 on drawn shapes
    torchrun --nproc_per_node 4 train.py --model XL/2 --data imagenet256     # XL/2 on 4 GPUs
    torchrun --nproc_per_node 4 train.py --model XL/2 --data imagenet256 --method maskdit --out out-maskdit

Several nodes: the same on each, with torchrun's --nnodes, --rdzv_backend c10d and --rdzv_endpoint HOST:PORT,
and with --out and --data on a disk that all nodes see. Without GPUs it trains on the CPU.

Writes, all in --out:
    0010000.pt             `model`, `ema`, `teacher`, `opt`, `loss_scale`, `step`, `config`; two are kept
    log.jsonl              the header, then a line every --log-every steps and one every --eval-every
    samples-0010000.png    what the EMA weights make of the same noise, each time
Run the same command again to resume: all randomness is a function of (seed, step, purpose), and no
generator's state is stored. SIGTERM or Ctrl-C finishes the step, writes a checkpoint and exits with 128 + the
signal's number; another one, a second later or more, exits at once. torchrun itself answers 1, and leaves its
processes 30 seconds (newer ones: --shutdown-timeout): give it as long as a checkpoint takes to write. On one
node, with torchrun's --max-restarts, a process that dies costs the steps since the last checkpoint.
"""

import argparse
import collections
import contextlib
import copy
import datetime
import errno
import fcntl
import json
import math
import os
import pathlib
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent import futures

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')     # before torch: threads that spin on a busy CPU were
                                                        # seen to make a step 30 times slower

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import model
import sample
from model import BadInput

MAX_GRAD_NORM = 1.0
MAX_SKIPPED = 10                              # steps in a row that are not finite: no accident any more
EVAL_SIGMAS = np.geomspace(0.02, 20, 8).tolist()
PREVIEW_STEPS = 20                            # of the sampler, for the picture now and then


# --------------------------------------------------------------------------------------------------- flags

def shared_flags(parser, steps, batch):
    """The flags of train.py and finetune.py alike: how the run is done, and not which network it makes."""
    flag = parser.add_argument
    flag('--steps', type=int, default=steps, help='optimizer steps')
    flag('--batch', type=int, default=batch, help='images a step, over processes and accumulation')
    flag('--accumulate', type=int, default=1, help='backward passes a step')
    flag('--lr-decay', type=float, default=0.0, help='last part of the steps, 0 to 1, where --lr falls to 0')
    flag('--precision', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto', help='of the network')
    flag('--compile', action=argparse.BooleanOptionalAction, default=None,
         help='compile each block: a minute, and then faster steps (default: on GPUs from Volta on)')
    flag('--checkpoint-blocks', action='store_true', default=False, help='compute each block again for its '
         'gradient instead of keeping what it made: a third of the memory, four thirds of the time')
    flag('--log-every', type=int, default=50, help='steps between lines of the log')
    flag('--eval-every', type=int, default=5000, help='steps between held-out losses and pictures')
    flag('--save-every', type=int, default=10000, help='steps between checkpoints')
    flag('--keep-every', type=int, default=0, help='keep checkpoints at multiples of this many steps too')
    flag('--preview', type=int, default=20, help='images in a picture; 0 for none')
    flag('--export', default=None, help='file for the EMA weights alone, written at the end')
    flag('--official-names', action='store_true', default=False, help="export under MaskDiT's names")
    flag('--timeout', type=float, default=10.0, help='minutes that processes wait for one that hangs')


def parse(argv):
    parser = argparse.ArgumentParser(description='Train.', allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)      # what is not typed is not there
    flag = parser.add_argument
    flag('--method', choices=model.METHODS, default='mcdit')
    flag('--model', default='B/2', help='T, S, B, L or XL, and a patch of 2, 4 or 8')
    flag('--data', default=data.default_data(), help='data folder (default: data/ if made, or shapes)')
    flag('--classes', type=int, help="0: without labels (default: the data's classes)")
    flag('--out', default='out', help='folder for all that is written')
    flag('--seed', type=int, default=0)
    flag('--sigma-data', type=float, default=0.5, help='standard deviation of the data, for EDM')
    flag('--lr', type=float, help="(default: the method's)")
    flag('--mask-ratio', type=float, help="masked part of the tokens (default: the method's)")
    flag('--bridge', choices=('zero', 'xavier'))
    flag('--unmasked', type=float)
    shared_flags(parser, steps=400_000, batch=256)
    ablation = parser.add_argument_group('ablations of mcdit').add_argument
    ablation('--lambda-noise', type=float, help='weight of L_noise (0.1; Tables 4, 6, 13)')
    ablation('--lambda-con1', type=float, help='weight of the noisy branch (0.1; Tables 5, 14)')
    ablation('--lambda-con2', type=float, help='weight of the clean branch (0.05; Tables 5, 15)')
    ablation('--all-clean', action='store_true', help='clean targets for all tokens (Table 6)')
    ablation('--tokens', choices=model.TOKEN_GAINS, help='what the main branch is given (Table 10)')
    ablation('--teacher-encoder', action='store_true', help='EMA of the encoder too (Table 12)')
    return parser.parse_args(argv)


def configuration(args, dataset):
    """What the run is, the plain dictionary that checkpoints carry: default < method's row < command line."""
    given = vars(args)
    row = model.METHODS[args.method]['defaults']
    every = {name for method in model.METHODS.values() for name in method['defaults']}
    for name in sorted(given.keys() & every - row.keys()):
        raise BadInput(f'--{name.replace("_", "-")} means nothing to --method {args.method}: leave it out')
    cfg = row | {name: given[name] for name in row if name in given}

    if args.method == 'dit' and 'mask_ratio' in given:
        raise BadInput('--mask-ratio means nothing to --method dit, which masks nothing: leave it out')
    if args.method != 'dit' and not 0 < cfg['mask_ratio'] < 1:
        raise BadInput(f'--mask-ratio {cfg["mask_ratio"]}: expected a number above 0 and below 1')
    if cfg.get('all_clean') and 'lambda_noise' in given:
        raise BadInput('--lambda-noise means nothing with --all-clean, which replaces L_noise: leave one out')
    if cfg.get('teacher_encoder') and not cfg['lambda_con1'] and not cfg['lambda_con2']:
        raise BadInput('--teacher-encoder means nothing without a branch: --lambda-con1 or --lambda-con2')
    lambdas = [cfg.get(name, 0) for name in ('lambda_noise', 'lambda_con1', 'lambda_con2')]
    low, high = model.SIGMA_DATA
    if not all(0 <= value < math.inf for value in lambdas) or not low <= args.sigma_data <= high:
        raise BadInput(f'the --lambda weights must be at least 0, and --sigma-data from {low} to {high:g}')
    classes = given.get('classes', dataset.classes)
    if classes not in (0, dataset.classes):
        raise BadInput(f'--classes {classes}: {args.data} has {dataset.classes} classes; 0 ignores them')
    return {
        'stage': 'train', 'method': args.method, 'model': args.model, 'diffusion': 'edm',
        'data': str(args.data), 'kind': dataset.kind, 'count': dataset.count,
        'resolution': dataset.resolution, 'channels': dataset.channels, 'classes': classes,
        'class_names': dataset.class_names if classes else [],
        'steps': args.steps, 'batch': args.batch, 'lr_decay': args.lr_decay, 'seed': args.seed,
        'sigma_data': args.sigma_data, 'ema_step': 0,
        'scale': dataset.scale, 'vae': dataset.vae, 'vae_sha256': dataset.vae_sha256} | cfg


# ----------------------------------------------------------------------------- checkpoints, written and found

def may_differ(cfg):
    """What may differ between a run and its continuation; one without a schedule may grow."""
    steps = set() if cfg['lr_decay'] or cfg['method'] == 'sddit' else {'steps'}
    return {'data', 'class_names', 'vae', 'vae_sha256'} | steps


def size_of(state):
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size_of, parts))


def save(path, state):
    """Write a file complete or not at all: under another name, flushed, then renamed. Raises BadInput."""
    folder, need, free = pathlib.Path(path).parent, size_of(state), 0
    try:
        free = shutil.disk_usage(folder).free
        if need > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with data.whole_file(path) as file:
            torch.save(state, file)
        entry = os.open(folder, os.O_RDONLY)
        os.fsync(entry)                                                       # the name outlives a power cut
        os.close(entry)
    except (OSError, RuntimeError) as error:                              # torch hides an OSError in it
        error = error if isinstance(error, OSError) else error.__context__
        if not isinstance(error, OSError):                                    # a GPU's error is no full disk
            raise
        raise BadInput(f'cannot write {path}: {error.strerror} ({need / 1e6:,.1f} MB are '
                       f'needed and {free / 1e6:,.1f} MB were free); make room, what was written before is '
                       f'whole') from None


def checkpoints(out):
    """Those that training wrote into `out`, oldest first."""
    ours = [path for path in out.glob('*.pt') if re.fullmatch(r'\d{7,}', path.stem)]
    return sorted(ours, key=lambda path: int(path.stem))


def newest_checkpoint(out, cfg):
    """(path, state) of the newest checkpoint in `out` that is whole; (None, None) if there is none at all.

    Raises BadInput if all are damaged, or if it is another run's.
    """
    found = checkpoints(out)
    for path in reversed(found):
        try:
            state = model.read_checkpoint(path)
            if 'opt' not in state:
                raise BadInput(f'{path} holds the EMA weights alone')
            if state['step'] != int(path.stem):
                raise BadInput(f'{path} holds step {state["step"]}')
        except BadInput as mistake:
            print(f'passed over: {mistake}')
            continue
        theirs = state['config']
        differ = [f'{name} was {theirs.get(name)!r} and is now {cfg.get(name)!r}' for name in theirs | cfg
                  if name not in may_differ(cfg) and theirs.get(name) != cfg.get(name)]
        if differ:
            raise BadInput(f'{path} is of another configuration ({"; ".join(differ[:3])}): choose another '
                           f'--out, or type the command it was made with')
        return path, state
    if found:
        raise BadInput(f'none of the {len(found)} checkpoints in {out} is whole: remove them to start anew')
    return None, None


def of_this_run(theirs, cfg):
    """Whether the configuration in an export, or in the header of a log, is this run's as far as it goes."""
    return isinstance(theirs, dict) and all(
        theirs[name] == cfg[name] for name in theirs.keys() & cfg.keys() - may_differ(cfg))


def exported(file, cfg):
    """Whether this run has exported `file`, which it then may write anew."""
    try:
        return of_this_run(model.read_checkpoint(file)['config'], cfg)
    except BadInput:
        return False


# ------------------------------------------------------------------------------------------- now and then

@torch.no_grad()
def evaluate(net, cfg, dataset, batch, rank, world, precision):
    """Held-out loss by noise level, through the inference path, and MC-DiT's collapse measure if it has one.

    {'held_out': 8 numbers}, one for each of EVAL_SIGMAS, and for mcdit in training `collapse_encoder` and
    `collapse_patches`: rms(D - D_zeroed) / rms(D). Noise and masks are the same each time; images are shared
    out over the processes.
    """
    device, n = net.pos.device, dataset.held_out
    shape = (n, cfg['channels'], cfg['resolution'], cfg['resolution'])
    shares = cfg['stage'] == 'train' and cfg['method'] == 'mcdit'
    def normal(*purpose):
        rng = model.generator(device, cfg['seed'], 'held-out', *purpose)
        return torch.randn(shape, generator=rng, device=device)
    mine = np.arange(n)[rank::world]
    raw, y = dataset.rows(dataset.trained + mine)
    x0 = dataset.to_input(raw.to(device), normal('latent')[mine])
    y = y.to(device)
    rng = model.generator(device, cfg['seed'], 'held-out', 'order')
    order = torch.rand(n, net.grid ** 2, generator=rng, device=device).argsort(1)[mine]
    sums = torch.zeros(len(EVAL_SIGMAS), 4, dtype=torch.float64, device=device)   # loss; 3 squares
    for j, level in enumerate(EVAL_SIGMAS):
        noise = normal(j)[mine]
        for first in range(0, len(mine), batch):
            rows = slice(first, first + batch)
            x, labels = x0[rows], y[rows]
            sigma = torch.full((len(x),), level, device=device)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                D = model.denoise(net, x + level * noise[rows], sigma, labels, cfg)
                sums[j, 0] += (model.loss_weight(sigma, cfg['sigma_data']) * (D - x) ** 2).sum()
                if shares:
                    draws = {'sigma': sigma, 'noise': noise[rows], 'order': order[rows],
                             'drop': torch.zeros_like(labels, dtype=torch.bool)}
                    parts = model.collapse(net, x, labels, draws, cfg)
                    sums[j, 1:] += torch.stack([parts['output'], parts['encoder'], parts['patches']])
    if world > 1:
        dist.all_reduce(sums)
    result = {'held_out': (sums[:, 0] / math.prod(shape)).tolist()}
    if shares:
        result['collapse_encoder'] = (sums[:, 2] / sums[:, 1]).sqrt().tolist()
        result['collapse_patches'] = (sums[:, 3] / sums[:, 1]).sqrt().tolist()
    return result


def preview(net, cfg, path, n, precision):
    """A picture of what `net` makes of fixed noise."""
    allowed = list(range(max(cfg['classes'], 1)))
    labels = [sample.label_of(cfg['seed'], i, allowed, balanced=True) for i in range(n)]
    x = sample.generate(net, cfg, cfg['seed'], range(n), labels, PREVIEW_STEPS, precision=precision)
    names = cfg['class_names'] or [''] * len(allowed)
    data.save_grid(path, sample.picture(x), [names[k] for k in labels], columns=min(n, 10))


TITLES = {'held_out': 'held-out loss', 'collapse_encoder': 'rests on encoder',
          'collapse_patches': 'rests on patches'}


def show(rows):
    """A table for the screen: {title: a number for each of EVAL_SIGMAS}."""
    lines = ['  sigma            ' + ''.join(f'{sigma:9.3g}' for sigma in EVAL_SIGMAS)]
    lines += [f'  {title:17}' + ''.join(f'{math.nan if value is None else value:9.4f}' for value in values)
              for title, values in rows.items()]
    return '\n'.join(lines)


# ------------------------------------------------------------------------------- processes, signals, the log

def where_am_i(minutes):
    """(rank, world, device), with the process group set up if torchrun started us."""
    env = os.environ
    rank, world = int(env.get('RANK', 0)), int(env.get('WORLD_SIZE', 1))
    device = torch.device('cpu')
    if torch.cuda.is_available():
        local, gpus = int(env.get('LOCAL_RANK', 0)), torch.cuda.device_count()
        if local >= gpus:
            raise BadInput(f'process {local} of this machine, counted from 0, has no GPU, for there are '
                           f'{gpus}: type --nproc_per_node {gpus}')
        device = torch.device('cuda', local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        store, wait = None, datetime.timedelta(minutes=minutes)
        if env.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # torchrun's store outlives the processes and keeps the addresses of dead ones: a prefix a try
            store = dist.TCPStore(env['MASTER_ADDR'], int(env['MASTER_PORT']), is_master=False, timeout=wait)
            store = dist.PrefixStore(f'try {env["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', store=store, rank=rank,
                                world_size=world, timeout=wait)
    return rank, world, device


def can_compile(device):
    """Whether the compiler, whose kernels are Triton's, knows the device, a GPU from Volta on, and has a C
    compiler to call."""
    c_compiler = os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (7, 0) and bool(c_compiler)


def git_commit():
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=pathlib.Path(__file__).parent,
                              capture_output=True, text=True).stdout.strip() or 'unknown'
    except OSError:                                                           # no git on this machine
        return 'unknown'


def agree(mistake, world, device):
    """The mistake that process 0 has found, or None, as all processes know it."""
    if world > 1:
        wrong = torch.tensor([mistake is not None], dtype=torch.int64, device=device)
        dist.broadcast(wrong, 0)
        if wrong and mistake is None:
            mistake = BadInput('process 0 has found a mistake, see there')
    return mistake


@contextlib.contextmanager
def alone_in(out):
    """Keep a second run out of the folder. The lock ends with the process, however that ends."""
    folder = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):                                    # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f'another run is writing into {out}: wait for its end, or choose another '
                               f'--out') from None
        yield
    finally:
        os.close(folder)


SAME_SIGNAL = 1.0                             # seconds: a scheduler signals torchrun and its processes, and
                                              # torchrun passes its own on to them, so they get two for one


@contextlib.contextmanager
def heed_signals(world, minutes):
    """A function that says which signal asked to stop, 0 for none: the same answer on all processes."""
    asked = []                                                                # (signal, when)

    def on_signal(number, frame):
        now = time.monotonic()
        if asked and now - asked[0][1] > SAME_SIGNAL:
            os._exit(128 + number)
        asked.append((number, now))
    group = None
    if world > 1:                                                             # gloo: never waits for a GPU
        group = dist.new_group(backend='gloo', timeout=datetime.timedelta(minutes=minutes))

    def agreed():
        number = torch.tensor(asked[0][0] if asked else 0)
        if group:
            dist.all_reduce(number, dist.ReduceOp.MAX, group)
        return number.item()
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield agreed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_log(out):
    """The lines of `out`/log.jsonl as dictionaries; a last line that a kill cut short is left out."""
    lines, path = [], out / 'log.jsonl'
    for text in path.read_text('utf-8', errors='replace').splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get('step', 0), int):
                lines.append(line)
    return lines


def append(path, lines):
    """Add dictionaries to a log, all or none: half a line would spoil the next. Raises OSError.

    What is not a finite number is written as null, for JSON has no word for it.
    """
    lines = json.loads(json.dumps(lines), parse_constant=lambda name: None)
    text = ''.join(json.dumps(line) + '\n' for line in lines).encode()
    with open(path, 'ab', buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


# ------------------------------------------------------------------------------------------------ one step

def read_ahead(read, places):
    """read(place) for each of `places`, in turn, by a thread that is two ahead: no GPU waits for a disk."""
    ahead = collections.deque()
    with futures.ThreadPoolExecutor(1) as reader:
        for place in places:
            ahead.append(reader.submit(read, place))
            if len(ahead) > 2:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def backward(student, teacher, x, y, draws, cfg, precision, weight, unmasked=False):
    """Add `weight` times the gradient of the method's loss. Returns the loss and its parts, by name.

    A loss that is not finite makes its gradient NaN, and so, once gradients are averaged, every process's.
    """
    method_loss = model.dit_loss if cfg['stage'] == 'tune' or unmasked else model.METHODS[cfg['method']]['loss']
    with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
        loss, parts = method_loss(student, teacher, x, y, draws, cfg)
    loss.backward(torch.where(loss.detach().isfinite(), weight, math.nan))
    return {'loss': loss.detach()} | parts


GROW_EVERY = 2000                             # steps after which float16's loss scale is tried doubled


def update(net, ema, teacher, optimizer, loss_scale, step, cfg):
    """What follows the backward passes of step number `step`, counted from 0: clip, AdamW, the shadows.

    Returns the gradient's norm, the same on all processes. Where it is not finite nothing changes but
    `loss_scale` (2,), float16's factor of the loss and how many steps it has gone well; nothing waits for
    the device to know.
    """
    scale = 1.0 if loss_scale is None else loss_scale[0]
    grads = [p.grad for p in optimizer.param_groups[0]['params']]
    grad_norm = torch.nn.utils.get_total_norm(grads) / scale
    ok = grad_norm.isfinite()
    torch._foreach_mul_(grads, (MAX_GRAD_NORM / (grad_norm + 1e-6)).clamp(max=1) / scale)
    optimizer.found_inf = (~ok).float()                                       # the fused kernel's own switch
    optimizer.step()
    optimizer.zero_grad()
    model.update_ema(ema, net, model.ema_decay(cfg['ema_step'] + step), ok)
    if teacher is not None:
        model.update_teacher(teacher, net, step, cfg, ok)
    if loss_scale is not None:
        well = (loss_scale[1] + 1) * ok
        grown = well == GROW_EVERY
        loss_scale.copy_(torch.stack([scale * torch.where(ok, 1.0 + grown, 0.5), well * ~grown]))
    return grad_norm


# ---------------------------------------------------------------------------------------------------- loop

def check(args, cfg, world):
    """What does not depend on files. Raises BadInput."""
    with torch.device('meta'):                                                # nothing but shapes
        net = model.Net(cfg)
    if cfg['mask_ratio']:
        model.visible_count(net.grid ** 2, cfg['mask_ratio'])
    share = world * args.accumulate
    if min(args.batch, args.accumulate, args.steps, args.log_every, args.eval_every, args.save_every) < 1 \
            or min(args.preview, args.keep_every, cfg['seed']) < 0 or not 0 < args.timeout < 1e6:
        raise BadInput('--steps, --batch, --accumulate, --log-every, --eval-every and --save-every must be '
                       'at least 1, --preview, --keep-every and --seed at least 0, --timeout above 0')
    if args.steps > 10 ** 9 or args.batch > 10 ** 6 or args.preview > 1000 or cfg['seed'] >= 2 ** 63:
        raise BadInput('--steps goes to a thousand millions, --batch to a million, --preview to 1,000 and '
                       '--seed to 2^63 - 1')
    if args.batch % share:
        raise BadInput(f'--batch {args.batch} cannot be shared by {world} processes times --accumulate '
                       f'{args.accumulate}: type a multiple of {share}, such as '
                       f'{args.batch // share * share + share}')
    if args.export and re.fullmatch(r'\d{7,}\.pt', os.path.basename(args.export)):
        raise BadInput(f'--export {args.export} is the name of a checkpoint: choose another')
    if args.official_names and not (args.export and cfg['method'] == 'maskdit' and cfg['classes']):
        raise BadInput('--official-names needs --export and a maskdit of some classes: MaskDiT has no '
                       'names for the rest')
    if not 0 <= args.lr_decay <= 1 or not 0 < cfg['lr'] < math.inf:
        raise BadInput('--lr-decay must be between 0 and 1, and --lr above 0')


def train(args, cfg, dataset, start=None):
    """Train what `cfg` says until args.steps; the same for train.py and finetune.py.

    `start` (model weights, EMA weights) replaces the initialisation where args.out has no checkpoint yet.
    Returns the path of the last checkpoint. Raises BadInput.
    """
    check(args, cfg, int(os.environ.get('WORLD_SIZE', 1)))                    # --timeout too: before its use
    rank, world, device = where_am_i(args.timeout)
    out = pathlib.Path(args.out)
    try:
        if args.export:
            tempfile.TemporaryFile(dir=pathlib.Path(args.export).parent).close()          # found out now, not
        out.mkdir(parents=True, exist_ok=True)                                            # after days
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise BadInput(f'cannot write to {error.filename}, which --out or --export names: '
                       f'{error.strerror}') from None
    with contextlib.ExitStack() as held:
        path = state = mistake = None
        if rank == 0:                                                         # it chooses for all
            try:
                held.enter_context(alone_in(out))
                for stale in out.iterdir():                                   # what a killed run was writing
                    if re.fullmatch(r'(\d{7,}\.pt|samples-\d{7,}\.png|log\.jsonl)\.tmp\d*', stale.name):
                        stale.unlink()
                path, state = newest_checkpoint(out, cfg)
                if args.export and os.path.exists(args.export) and not (path and exported(args.export, cfg)):
                    raise BadInput(f'{args.export} exists already: remove it, or choose another --export')
                header = [] if path else read_log(out)[:1]
                if header and not of_this_run(header[0].get('config'), cfg):
                    raise BadInput(f'{out}/log.jsonl is of another run, whose checkpoints are gone: choose '
                                   f'another --out, or move the log away')
            except BadInput as error:
                mistake = error
        mistake = agree(mistake, world, device)
        if mistake:
            raise mistake
        stopped_by = held.enter_context(heed_signals(world, args.timeout))
        return loop(args, cfg, dataset, start, state, rank, world, device, stopped_by)


def loop(args, cfg, dataset, start, state, rank, world, device, stopped_by):
    """`train`, once it is alone in args.out. `state` is the checkpoint that process 0 has chosen, or None."""
    precision = sample.pick_precision(args.precision, device)
    slow = device.type == 'cpu' and precision == torch.bfloat16
    torch.backends.cuda.enable_flash_sdp(not slow)        # on a CPU its bfloat16 backward takes half a step
    micro = args.batch // world // args.accumulate
    out = pathlib.Path(args.out)

    # the network, its two shadows (ema: what is sampled from; teacher: what the loss consults), the optimizer
    torch.manual_seed(cfg['seed'])
    net = model.Net(cfg)
    ema = copy.deepcopy(net)
    if start:
        net.load_state_dict(start[0])
        ema.load_state_dict(start[1])
    net, ema = net.to(device), ema.to(device).eval().requires_grad_(False)
    teacher = model.make_teacher(net, cfg)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg['lr'], betas=(0.9, 0.999), weight_decay=0, fused=True)
    loss_scale = torch.tensor([2.0 ** 16, 0.0], device=device) if precision == torch.float16 else None

    # resume
    step = torch.tensor([state['step'] if state else 0], device=device)
    if world > 1:
        dist.broadcast(step, 0)
    step = step.item()
    if step:
        path = out / f'{step:07d}.pt'
        state = state or model.read_checkpoint(path)
        try:
            net.load_state_dict(state['model'])
            ema.load_state_dict(state['ema'])
            if teacher is not None:
                teacher.load_state_dict(state['teacher'])
            moments = state['opt']['state']
            optimizer.load_state_dict(optimizer.state_dict() | {'state': moments})
            if not all(moments[i][name].shape == p.shape and moments[i]['step'].shape == ()
                       for i, p in enumerate(trained) for name in ('exp_avg', 'exp_avg_sq')):
                raise ValueError('AdamW moments of other shapes')
            if loss_scale is not None and state['loss_scale'] is not None:
                loss_scale.copy_(state['loss_scale'])
        except Exception as error:                                            # a strange file raises anything
            why = str(error).strip().splitlines()[-1:]
            raise BadInput(f'{path} does not fit its own configuration ({type(error).__name__}: '
                           f'{"".join(why).strip()[:200]}): remove it to go on from the one before') from None
        if device.type == 'cpu':                     # AdamW would keep these, and with them the file mapped
            for entry in optimizer.state.values():
                entry.update({name: value.clone() for name, value in entry.items()})
        moments = None
        state.clear()                                # a file still mapped takes room on the disk when removed
    net.checkpoint_blocks = args.checkpoint_blocks
    if args.compile is None:
        args.compile = can_compile(device)
    if args.compile:
        model.compile_blocks(net)
        if teacher is not None:
            model.compile_blocks(teacher)
    student = net
    if world > 1:
        student = DistributedDataParallel(net, [device] if device.type == 'cuda' else None,
                                          gradient_as_bucket_view=True)

    # the header, which is the first line of the log as well
    hardware = f'CPU, {torch.get_num_threads()} threads'
    if device.type == 'cuda':
        hardware = torch.cuda.get_device_name(device)
    count = sum(p.numel() for p in net.parameters())
    branch = sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    waiting = []                                                              # lines that a full disk refused

    def log(line):
        waiting.append(line)
        try:
            append(out / 'log.jsonl', waiting)
            waiting.clear()
        except OSError as error:
            tqdm.write(f'cannot write {out}/log.jsonl: {error.strerror}; its last {len(waiting)} lines wait')

    mistake = None
    if rank == 0:
        header = {
            'method': f'{cfg["method"]}, {cfg["mask_ratio"]:.0%} masked',
            'network': f'{cfg["model"]}, {count:,} parameters, {branch:,} in the EMA network',
            'data': f'{cfg["data"]}: {dataset.trained:,} {cfg["kind"]} and {dataset.held_out:,} held out, '
                    f'{cfg["channels"]} x {cfg["resolution"]} x {cfg["resolution"]}, '
                    f'{cfg["classes"] or "no"} classes',
            'device': f'{world} x {hardware}, {precision}' + ', compiled' * args.compile,
            'batch': f'{args.batch} = {world} processes x {micro} images x {args.accumulate} accumulated',
            'steps': f'{step} to {args.steps}',
            'versions': f'torch {torch.__version__}, numpy {np.__version__}, '
                        f'python {platform.python_version()}',
            'commit': git_commit(), 'seed': cfg['seed'], 'config': cfg}
        for name in list(header)[:-1]:                                        # all but the configuration
            print(f'{name:10}{header[name]}', flush=True)
        if step:
            print(f'resumes   {out / f"{step:07d}.pt"}', flush=True)
        keep = [line for line in read_log(out) if line.get('step', 0) <= step] if step else [header]
        try:
            append(out / 'log.jsonl.tmp', keep)
            os.replace(out / 'log.jsonl.tmp', out / 'log.jsonl')
        except OSError as error:
            mistake = BadInput(f'cannot write {out}/log.jsonl: {error.strerror}; make room and type the same '
                               f'command again')
    mistake = agree(mistake, world, device)
    if mistake:
        raise mistake

    # the loop
    def now_and_then(step):
        result = evaluate(ema, cfg, dataset, micro, rank, world, precision)
        if rank == 0:
            log({'step': step, 'sigma': EVAL_SIGMAS} | result)
            tqdm.write(show({TITLES[name]: values for name, values in result.items()}))
            if args.preview:
                try:
                    preview(ema, cfg, out / f'samples-{step:07d}.png', args.preview, precision)
                except (OSError, data.BadInput, torch.OutOfMemoryError) as error:      # not worth a run
                    tqdm.write(f'no picture at step {step}: {error}')

    def checkpoint(step):
        mistake = None
        if rank == 0:
            try:
                save(out / f'{step:07d}.pt', {
                    'model': net.state_dict(), 'ema': ema.state_dict(),
                    'teacher': teacher.state_dict() if teacher is not None else None,
                    'opt': optimizer.state_dict(), 'loss_scale': loss_scale, 'step': step, 'config': cfg})
                for old in checkpoints(out)[:-2]:
                    if not args.keep_every or int(old.stem) % args.keep_every:
                        with contextlib.suppress(OSError):                    # it may stay, or be gone
                            old.unlink()
            except BadInput as error:
                mistake = error
        return agree(mistake, world, device)

    def tell_skipped(step, in_a_row):
        if rank == 0:
            sigma = model.draw(cfg, step, args.batch, device)['sigma']
            log({'step': step + 1, 'skipped_in_a_row': in_a_row, 'indices': images_of(step).tolist(),
                 'noise_levels': sigma.tolist()})
            tqdm.write(f'step {step + 1} skipped: its loss or gradient is not finite')
        if in_a_row == MAX_SKIPPED:
            sys.exit(f'stopped: {MAX_SKIPPED} steps in a row, the last of them step {step + 1}, had a loss '
                     f'or gradient that is not finite; their images and noise levels are in '
                     f'{out}/log.jsonl, and the newest checkpoint is good' if rank == 0 else 1)

    def images_of(step):
        return data.batch_indices(cfg['seed'], step, args.batch, dataset.trained)

    def read(at):
        step, rows = at
        tensors = dataset.rows(images_of(step)[rows])
        if device.type == 'cuda':
            torch.cuda.set_device(device)                                     # a thread begins on GPU 0
            tensors = [tensor.pin_memory() for tensor in tensors]
        return tensors

    if step == 0 and start:
        now_and_then(0)                                                       # tuning: before and after
    history, in_a_row, owed = [], 0, False
    shares = [slice(first, first + micro) for first in range(rank * micro, args.batch, world * micro)]
    batches = read_ahead(read, ((at, rows) for at in range(step, args.steps) for rows in shares))
    clock = time.perf_counter()
    bar = tqdm(range(step, args.steps), initial=step, total=args.steps, disable=rank > 0 or None, unit='step')
    for step in bar:
        decay = args.lr_decay * args.steps
        lr = cfg['lr'] * (min(1.0, (args.steps - step) / decay) if decay else 1.0)
        for group in optimizer.param_groups:
            group['lr'] = lr

        # this step's images and random numbers are those of the whole batch; each process takes its rows
        draws = model.draw(cfg, step, args.batch, device)
        normal = None
        if cfg['kind'] == 'moments':
            rng = model.generator(device, cfg['seed'], step, 'latent')
            normal = torch.randn(draws['noise'].shape, generator=rng, device=device)
        numbers = {}
        for rows in shares:
            raw, y = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            x = dataset.to_input(raw, None if normal is None else normal[rows])
            weight = (1.0 if loss_scale is None else loss_scale[0]) / args.accumulate
            with contextlib.nullcontext() if rows is shares[-1] or world == 1 else student.no_sync():
                mine = {name: value[rows] for name, value in draws.items()}
                parts = backward(student, teacher, x, y, mine, cfg, precision, weight,
                                 model.unmasked_step(cfg, step))
            for name, value in parts.items():
                if name == 'loss' or not cfg.get('unmasked'):
                    numbers[name] = numbers.get(name, 0) + value / args.accumulate
        numbers['grad_norm'] = update(net, ema, teacher, optimizer, loss_scale, step, cfg)
        history.append(torch.stack(list(numbers.values())))

        step += 1                                                             # from here: steps done
        done, stop = step == args.steps, stopped_by()
        if step % args.log_every == 0 or done or stop:
            table = torch.stack(history)
            good = table[:, -1].isfinite()
            means = table[good].mean(0)                                       # the only wait for the device
            if world > 1:
                dist.all_reduce(means)
            speed = len(history) * args.batch / (time.perf_counter() - clock)
            for at, fine in enumerate(good.tolist(), step - len(history)):
                in_a_row = 0 if fine else in_a_row + 1
                if not fine:
                    tell_skipped(at, in_a_row)
            if rank == 0:
                line = {'step': step} | dict(zip(numbers, (means / world).tolist()))
                line |= {'skipped': (~good).sum().item(), 'lr': lr, 'images_per_s': round(speed, 2)}
                log(line)
                left = time.strftime('%H:%M:%S', time.gmtime((args.steps - step) * args.batch / speed))
                days = int((args.steps - step) * args.batch / speed // 86400)
                losses = '  '.join(f'{name} {line[name]:.4f}' for name in numbers)
                tqdm.write(f'step {step}/{args.steps}  {losses}'
                           f'  {speed:.3g} images/s  {f"{days} d " if days else ""}{left} left')
            history, clock = [], time.perf_counter()
        paused = time.perf_counter()
        if step % args.eval_every == 0 or done:
            now_and_then(step)
        if step % args.save_every == 0 or done or stop or owed and step % args.log_every == 0:
            mistake = checkpoint(step)
            if mistake and (done or stop):
                raise mistake
            if mistake and rank == 0:
                tqdm.write(f'{mistake}; training goes on, and tries again at each line of the log')
            owed = mistake is not None
        clock += time.perf_counter() - paused                                 # steps are timed, and no more
        if stop and not done:
            if rank == 0:
                tqdm.write(f'stopped by {signal.Signals(stop).name} after step {step}, with a checkpoint: '
                           f'the same command goes on from here')
            sys.exit(128 + stop)

    path = out / f'{step:07d}.pt'
    if rank == 0:
        if args.export:
            save(args.export, {'ema': model.to_maskdit_names(ema.state_dict(), cfg)} if args.official_names
                 else {'ema': ema.state_dict(), 'step': step, 'config': cfg})
        unit = 2 ** 30 if sys.platform == 'darwin' else 2 ** 20               # of ru_maxrss: bytes or KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        if device.type == 'cuda':
            peak = torch.cuda.max_memory_allocated() / 2 ** 30
        print(f'done: {path}, peak memory {peak:.1f} GiB')
    return path


def main(argv=None):
    args = parse(argv)
    dataset = data.open_data(args.data)
    return train(args, configuration(args, dataset), dataset)


def script(name, main):
    """Run main() as the script `name`: a mistake is told in a sentence and ends it with status 2.

    One of several processes that fails may be alone in that, so it leaves without a word to the others:
    NCCL's farewell waits for all of them, and torchrun ends them only once it sees one dead.
    """
    def leave(status):
        if dist.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)

    try:
        main()
    except (BadInput, data.BadInput) as mistake:
        print(f'{name}: {mistake}', file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:                                                 # before the first step
        print(f'{name}: interrupted', file=sys.stderr)
        leave(130)
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        leave(1)
    finally:                                                                  # the end, or a stop of them all
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    script('train.py', main)
