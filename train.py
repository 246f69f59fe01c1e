"""The loop: train a diffusion transformer on masked images.

    python train.py                                                          # mcdit B/2 on drawn shapes
    torchrun --nproc_per_node 4 train.py --model XL/2 --data imagenet256     # XL/2 on 4 GPUs
    torchrun --nproc_per_node 4 train.py --model XL/2 --data imagenet256 --method maskdit --out out-maskdit

Several nodes: the same on each, with torchrun's --nnodes, --rdzv_backend c10d and --rdzv_endpoint HOST:PORT,
and with --out and --data on a disk that all nodes see. Without GPUs it trains on the CPU.

It writes into --out:
    0010000.pt             `model`, `ema`, `teacher`, `opt`, `scaler`, `step`, `config`; the last two are kept
    log.jsonl              a header, then a line every --log-every steps and one every --eval-every
    samples-0010000.png    samples from the EMA weights, of the same noise each time
    losses.png             training loss, and held-out loss by noise level

To resume, run the same command again. All randomness is a function of (seed, step, purpose), so on the same
machine a resumed run has the same bits as an uninterrupted one. SIGTERM or Ctrl-C finishes the step, writes a
checkpoint and exits with status 128 + signal. With torchrun's --max-restarts, a rank that dies costs the
steps since the last checkpoint.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

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
from model import BadInput, check

MAX_GRAD_NORM = 1.0
MAX_SKIPPED = 10                              # consecutive steps that are not finite before training stops
EVAL_SIGMAS = np.geomspace(0.02, 20, 8).tolist()
PREVIEW_STEPS = 20                            # of the sampler


# --------------------------------------------------------------------------------------------------- flags

def shared_flags(parser, steps, batch):
    """The flags of train.py and finetune.py: how a run is done, not what network it trains."""
    flag = parser.add_argument
    flag('--steps', type=int, default=steps, help='optimizer steps')
    flag('--batch', type=int, default=batch, help='global: ranks x micro-batch x --accumulate')
    flag('--accumulate', type=int, default=1, help='gradient accumulation: backward passes per step')
    flag('--lr-decay', type=float, default=0.0, help='last share of the steps, in which --lr falls to 0')
    flag('--precision', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto', help='mixed precision')
    flag('--compile', action=argparse.BooleanOptionalAction, help='compile each block; None: on GPUs')
    flag('--checkpoint-blocks', action='store_true', help='activation checkpointing: a third of the memory, '
         'four thirds of the time')
    flag('--log-every', type=int, default=50, help='steps between lines of the log')
    flag('--eval-every', type=int, default=5000, help='steps between held-out losses, previews and charts')
    flag('--save-every', type=int, default=10000, help='steps between checkpoints')
    flag('--keep-every', type=int, default=0, help='checkpoints at multiples of this many steps are never '
         'removed; 0: only the last two are kept')
    flag('--preview', type=int, default=20, help='images in a preview; 0: none')


def parse(argv):
    parser = argparse.ArgumentParser(description='Train.', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag('--method', choices=model.METHODS, default='mcdit', help='masks, fill and loss')
    flag('--model', default='B/2', help='T, S, B, L or XL, and a patch side of 2, 4 or 8')
    flag('--data', default='shapes', help='data folder, see data.py; shapes are generated if absent')
    flag('--unlabelled', action='store_true', help='ignore the labels of the data')
    flag('--out', default='out', help='folder for everything that is written')
    flag('--seed', type=int, default=0, help='of weights, order, noise and masks')
    flag('--sigma-data', type=float, default=0.5, help='standard deviation of the data, for EDM')
    shared_flags(parser, steps=400_000, batch=256)
    # each method has defaults of its own for these, and ignores none that is typed
    method = parser.add_argument_group('depending on --method')
    flag = lambda name, **settings: method.add_argument(name, default=argparse.SUPPRESS, **settings)
    flag('--lr', type=float, help='learning rate (default: 1e-4, mdt 3e-4)')
    flag('--mask-ratio', type=float, help='masked share of the tokens (default: maskdit, mcdit 0.5, mdt 0.3, '
         'sddit 0.2)')
    flag('--bridge', choices=('zero', 'xavier'), help='initial weights of the bridge (default: zero)')
    flag('--unmasked', type=float, help='share of steps that mask nothing; in no paper (default: 0)')
    flag('--lambda-noise', type=float, help='weight of L_noise (default: 0.1; MC-DiT Tables 4, 6, 13)')
    flag('--lambda-con1', type=float, help='weight of the noisy branch (default: 0.1; Tables 5, 14)')
    flag('--lambda-con2', type=float, help='weight of the clean branch (default: 0.05; Tables 5, 15)')
    flag('--all-clean', action='store_true', help='clean targets for all tokens (Table 6)')
    flag('--tokens', choices=model.TOKEN_GAINS, help='what the decoder is given (default: both; Table 10)')
    flag('--teacher-encoder', action='store_true', help='EMA of the encoder too (Table 12)')
    return parser.parse_args(argv)


def configuration(args, dataset):
    """The run's Config. Precedence: default < the method's row < the command line. Raises BadInput."""
    given, method = vars(args), model.METHODS[args.method]
    for name in {flag for other in model.METHODS.values() for flag in other.flags} - set(method.flags):
        check(name not in given,
              f'--{name.replace("_", "-")} does not apply to --method {args.method}: leave it out')
    cfg = model.Config(
        method=args.method, model=args.model, seed=args.seed, sigma_data=args.sigma_data, steps=args.steps,
        batch=args.batch, lr_decay=args.lr_decay, **describe(dataset, labelled=not args.unlabelled),
        **{'mask_ratio': method.mask_ratio, 'lr': method.lr}
        | {name: given[name] for name in ('lr', *method.flags) if name in given})
    lambdas = (cfg.lambda_noise, cfg.lambda_con1, cfg.lambda_con2)
    check('mask_ratio' not in given or 0 < cfg.mask_ratio < 1,
          f'--mask-ratio {cfg.mask_ratio}: expected a number above 0 and below 1')
    check(0 <= cfg.unmasked <= 1 and min(lambdas) >= 0 and cfg.sigma_data > 0,
          '--unmasked must be from 0 to 1, the --lambda weights at least 0, and --sigma-data above 0')
    check(not (cfg.all_clean and 'lambda_noise' in given),
          '--lambda-noise does not apply with --all-clean, which replaces L_noise: leave one out')
    check(not cfg.teacher_encoder or cfg.lambda_con1 or cfg.lambda_con2,
          '--teacher-encoder needs a branch: --lambda-con1 or --lambda-con2 above 0')
    return cfg


def describe(dataset, labelled):
    """The fields of Config that are the data's."""
    return {'data': str(dataset.path), 'fingerprint': dataset.fingerprint, 'kind': dataset.kind,
            'count': dataset.count, 'resolution': dataset.resolution, 'channels': dataset.channels,
            'classes': dataset.classes if labelled else 0,
            'class_names': tuple(dataset.class_names) if labelled else (),
            'scale': dataset.scale, 'vae': dataset.vae, 'vae_sha256': dataset.vae_sha256}


# ---------------------------------------------------------------------------------- ranks, folder, signals

def setup_distributed():
    """(rank, world, device), with a process group if torchrun started several ranks."""
    rank, world, device = data.rank_world_device()
    if world > 1 and not dist.is_initialized():
        store, wait = None, datetime.timedelta(minutes=10)
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # torchrun's store keeps the addresses of dead processes: one prefix per restart
            store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                                  timeout=wait)
            store = dist.PrefixStore(f'try {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', store=store, rank=rank,
                                world_size=world, timeout=wait)
    return rank, world, device


@contextlib.contextmanager
def lock_folder(out, rank):
    """Keep a second run out of the folder. The lock ends with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):                                    # a file system without locks
            try:
                if rank == 0:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f'another run is writing into {out}: wait, or choose another --out') from None
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def stop_on_signal():
    """A list that gets the number of the first SIGINT or SIGTERM; later ones change nothing."""
    signals = []

    def handler(number, frame):
        if not signals:
            os.write(2, f'\n{signal.Signals(number).name}: stopping after this step, with a checkpoint '
                        f'(kill -9 stops at once and loses the steps since the last one)\n'.encode())
        signals.append(number)
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def git_commit():
    with contextlib.suppress(OSError):                                        # no git on this machine
        return subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=pathlib.Path(__file__).parent,
                              capture_output=True, text=True).stdout.strip() or 'unknown'


# --------------------------------------------------------------------------------- checkpoints and the log

def checkpoints(out):
    """Those that training wrote into `out`, oldest first."""
    return sorted((path for path in out.glob('*.pt') if re.fullmatch(r'\d{7,}', path.stem)),
                  key=lambda path: int(path.stem))


def newest_checkpoint(out, verify=True):
    """(path, state) of the newest undamaged checkpoint in `out`; (None, None) if there is none at all.

    `verify` reads all of it: torch.load does not notice a flipped byte, the CRC-32s in the file do. Raises
    BadInput if all are damaged.
    """
    for path in reversed(checkpoints(out)):
        try:
            state = model.read_checkpoint(path)
            check('opt' in state, f'{path} has no optimizer state')
            with data.reading(path), zipfile.ZipFile(path) as archive:
                broken = archive.testzip() if verify else None
            check(not broken, f'{path} is damaged: {broken} does not match its checksum')
            return path, state
        except BadInput as error:
            print(f'skipped: {error}')
    check(not checkpoints(out), f'every checkpoint in {out} is damaged: remove them to start again')
    return None, None


def save(path, state, keep_every):
    """Write a checkpoint, whole or not at all, and remove those it replaces. Returns what failed, or None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)                        # somebody may have removed it
        with data.whole_file(path) as file:
            torch.save(state, file)
        for old in checkpoints(path.parent)[:-2]:
            if not keep_every or int(old.stem) % keep_every:
                old.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:                                  # torch makes one of a full disk
        return getattr(error, 'strerror', None) or str(error).splitlines()[0]


def check_same_run(theirs, cfg, where):
    """Raise BadInput if `theirs`, the configuration in a checkpoint or a log, is of another run than cfg."""
    may_change = {'data', 'class_names', 'vae', 'tuned_from'}             # paths and words; hashes may not
    if not cfg.lr_decay and model.METHODS[cfg.method].teacher is not model.EMAEncoder:
        may_change.add('steps')                                               # no schedule depends on it
    ours = dataclasses.asdict(cfg)
    differ = [f'{name} was {theirs[name]!r} and is now {ours[name]!r}' for name in ours
              if name in theirs and name not in may_change and theirs[name] != ours[name]]
    check(not differ, f'{where} is of another configuration ({"; ".join(differ[:3])}): choose another --out, '
          f'or type the command it was made with')


def read_log(out):
    """The lines of `out`/log.jsonl as dictionaries, without a last line that a kill cut short."""
    path = out / 'log.jsonl'
    texts = path.read_text().splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
            ours = isinstance(lines[-1], dict) and ('step' in lines[-1] or 'config' in lines[-1])
        except ValueError:
            ours = number == len(texts) and text.startswith('{')
        check(ours, f'{path} is not a log of train.py, see its line {number}: move it away')
    return lines


def write_log(out, line):
    """Append a dictionary to the log. Numbers that are not finite become null: JSON has no word for them."""
    line = json.loads(json.dumps(line), parse_constant=lambda name: None)
    text = (json.dumps(line) + '\n').encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / 'log.jsonl', 'ab', buffering=0) as file:
            end = file.tell()
            if file.write(text) < len(text):
                file.truncate(end)                                            # not half a line
                raise OSError(None, 'the disk is full')
    except OSError as error:
        tqdm.write(f'cannot write {out}/log.jsonl: {error.strerror}')


# ----------------------------------------------------------------------------------- evaluation and previews

@torch.no_grad()
def evaluate(net, cfg, dataset, batch, rank, world, precision):
    """Held-out loss by noise level through the inference path, and MC-DiT's collapse measure.

    {'held_out': one number per level of EVAL_SIGMAS}, and where clean patches fill masked positions
    'collapse_encoder' and 'collapse_patches', rms(D - D_zeroed) / rms(D). Image i has the same noise and mask
    each time, on any device and any number of ranks.
    """
    device, sd = next(net.parameters()).device, cfg.sigma_data
    measure_collapse = cfg.stage == 'train' and model.METHODS[cfg.method].context is not None
    levels, shape = len(EVAL_SIGMAS), (cfg.channels, cfg.resolution, cfg.resolution)
    sums = torch.zeros(levels, 4, dtype=torch.float64, device=device)         # loss; output, encoder, patches
    mine = np.arange(dataset.held_out)[rank::world]
    for at in range(0, len(mine), batch):                                     # none on a rank without images
        rows = mine[at:at + batch]
        raw, y = dataset.rows(dataset.trained + rows)
        rngs = [model.generator('cpu', cfg.seed, 'held-out', int(i)) for i in rows]
        noise, latent = (torch.stack([torch.randn(size, generator=rng) for rng in rngs]).to(device)
                         for size in ((levels, *shape), shape))
        order = torch.stack([torch.randperm(cfg.N, generator=rng) for rng in rngs]).to(device)
        x0 = model.patchify(dataset.to_input(raw.to(device), latent), cfg.patch)
        y = y.to(device)
        for j, level in enumerate(EVAL_SIGMAS):
            sigma = torch.full((len(x0),), level, device=device)
            xt = x0 + level * model.patchify(noise[:, j], cfg.patch)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                D, *_ = model.denoise(net, xt, sigma, y, cfg)
                sums[j, 0] += (model.loss_weight(sigma, sd) * (D - x0) ** 2).sum()
                if measure_collapse:
                    parts = model.collapse(net, x0, xt, sigma, y, order[:, :cfg.K], cfg)
                    sums[j, 1:] += torch.stack([parts['output'], parts['encoder'], parts['patches']])
    if world > 1:
        dist.all_reduce(sums)
    result = {'held_out': (sums[:, 0] / (dataset.held_out * math.prod(shape))).tolist()}
    if measure_collapse:
        result |= {'collapse_encoder': (sums[:, 2] / sums[:, 1]).sqrt().tolist(),
                   'collapse_patches': (sums[:, 3] / sums[:, 1]).sqrt().tolist()}
    return result


def show(rows):
    """A table for the screen: {title: one number per level of EVAL_SIGMAS}."""
    return '\n'.join([f'  {"sigma":17}' + ''.join(f'{sigma:9.3g}' for sigma in EVAL_SIGMAS)] + [
        f'  {title:17}' + ''.join(f'{math.nan if value is None else value:9.4f}' for value in values)
        for title, values in rows.items()])


def preview(net, cfg, out, step, n, precision):
    """A chart of the losses so far, and `n` samples of fixed noise."""
    log = read_log(out)
    trained = [line for line in log if 'loss' in line]
    tested = [line for line in log if 'held_out' in line]
    series = [('training', data.COLOURS[6], *([line[name] for line in trained] for name in ('step', 'loss')))]
    series += [(f'held out, sigma {level:.2g}', data.COLOURS[j % 6], [line['step'] for line in tested],
                [line['held_out'][j] for line in tested]) for j, level in enumerate(EVAL_SIGMAS)]
    data.chart(out / 'losses.png', f'{cfg.method} {cfg.model}', series, 'step', 'loss', log_y=True)
    if n:
        allowed = list(range(max(cfg.classes, 1)))
        labels = [sample.label_of(cfg.seed, i, allowed, balanced=True) for i in range(n)]
        x = sample.generate(net, cfg, cfg.seed, range(n), labels, PREVIEW_STEPS, precision=precision)
        names = cfg.class_names or [''] * len(allowed)
        titles = [names[k] for k in labels]
        data.save_grid(out / f'samples-{step:07d}.png', sample.to_image(x), titles, columns=min(n, 10))


def report(net, args, cfg, dataset, step, micro, rank, world, precision):
    """Evaluate on all ranks; log, print and draw on rank 0."""
    result, out = evaluate(net, cfg, dataset, 4 * micro, rank, world, precision), pathlib.Path(args.out)
    if rank == 0:
        write_log(out, {'step': step, 'sigma': EVAL_SIGMAS} | result)
        tqdm.write(show({name.replace('_', ' '): values for name, values in result.items()}))
        try:
            preview(net, cfg, out, step, args.preview, precision)
        except (OSError, BadInput, torch.OutOfMemoryError) as error:          # not worth the end of a run
            tqdm.write(f'no preview at step {step}: {error}')


# ---------------------------------------------------------------------------------------------------- loop

def learning_rate(step, cfg):
    """Constant, then linear to 0 over the last share cfg.lr_decay of the steps."""
    decay = cfg.lr_decay * cfg.steps
    return cfg.lr * (min(1.0, (cfg.steps - step) / decay) if decay else 1.0)


def can_compile(device):
    """Whether the device is a GPU that Triton knows, Volta or later, and there is a C compiler to call."""
    compiler = os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (7, 0) and bool(compiler)


def train(args, cfg, dataset, start=None):
    """Train what `cfg` says; the same for train.py and finetune.py. Returns the path of the last checkpoint.

    `start` (model weights, EMA weights) replaces the initialisation where --out has no checkpoint yet.
    Raises BadInput.
    """
    world = data.rank_and_world()[1]
    share = world * args.accumulate
    check(min(args.steps, args.batch, args.accumulate, args.log_every, args.eval_every, args.save_every) >= 1
          and min(args.preview, args.keep_every, cfg.seed) >= 0 and 0 <= args.lr_decay <= 1 and cfg.lr > 0,
          '--steps, --batch, --accumulate, --log-every, --eval-every and --save-every must be at least 1, '
          '--preview, --keep-every and --seed at least 0, --lr-decay from 0 to 1, and --lr above 0')
    check(args.batch % share == 0, f'--batch {args.batch} cannot be split over {world} ranks x --accumulate '
          f'{args.accumulate}: type a multiple of {share}, such as {args.batch // share * share + share}')
    rank, world, device = setup_distributed()
    with lock_folder(pathlib.Path(args.out), rank), stop_on_signal() as signals:
        return loop(args, cfg, dataset, start, rank, world, device, signals)


def loop(args, cfg, dataset, start, rank, world, device, signals):
    """`train`, in a folder of its own; `signals` fills when somebody asks it to stop."""
    out, first = pathlib.Path(args.out), rank == 0

    # where to resume: rank 0 chooses
    path = state = None
    if first:
        path, state = newest_checkpoint(out)
        log = read_log(out)
        if state:
            check_same_run(dataclasses.asdict(state['config']), cfg, path)
        elif log:
            check_same_run(log[0].get('config', {}), cfg, f'{out}/log.jsonl')
    step = torch.tensor([state['step'] if state else 0], device=device)
    if world > 1:
        dist.broadcast(step, 0)
    step = step.item()
    check(step <= cfg.steps, f'{out} has a checkpoint of step {step}, beyond --steps {cfg.steps}: type more')
    if step and not first:
        state = model.read_checkpoint(out / f'{step:07d}.pt')

    # the network, its EMA (what is sampled from), its teacher (what the loss uses), AdamW
    torch.manual_seed(cfg.seed)
    net = model.Net(cfg)
    ema = copy.deepcopy(net)
    if start:
        net.load_state_dict(start[0])
        ema.load_state_dict(start[1])
    net, ema = net.to(device), ema.to(device).eval().requires_grad_(False)
    teacher = model.make_teacher(net, cfg)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0, fused=True)
    precision = sample.pick_precision(args.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    if state:
        net.load_state_dict(state['model'])
        ema.load_state_dict(state['ema'])
        if teacher is not None:
            teacher.load_state_dict(state['teacher'])
        optimizer.load_state_dict(state['opt'])
        for moments in optimizer.state.values():                              # or the file stays mapped
            moments.update({name: value.clone() for name, value in moments.items()})
        if scaler.is_enabled() and state['scaler']:
            scaler.load_state_dict(state['scaler'])
        state = None

    # speed: attention on CPUs, compiled blocks, activation checkpointing, data parallelism
    slow = device.type == 'cpu' and precision == torch.bfloat16
    torch.backends.cuda.enable_flash_sdp(not slow)        # on a CPU its bfloat16 backward takes half a step
    compiled = can_compile(device) if args.compile is None else args.compile
    for module in (net, teacher) if compiled else ():
        if module is not None:
            model.compile_blocks(module)
    if args.checkpoint_blocks:
        net.checkpoint_activations()
    ddp_net = net
    if world > 1:
        ddp_net = DistributedDataParallel(net, [device] if device.type == 'cuda' else None,
                                          gradient_as_bucket_view=True)

    # micro-batches: each rank reads and computes its rows of the global batch
    micro = args.batch // world // args.accumulate
    slices = [slice(at, at + micro) for at in range(rank * micro, args.batch, world * micro)]

    def read(place):
        step, rows = place
        tensors = dataset.rows(data.batch_indices(cfg.seed, step, args.batch, dataset.trained)[rows])
        if device.type == 'cuda':
            torch.cuda.set_device(device)                                     # a thread begins on GPU 0
            tensors = [tensor.pin_memory() for tensor in tensors]
        return tensors
    batches = data.read_ahead(read, ((at, rows) for at in range(step, cfg.steps) for rows in slices))

    # the header
    if first:
        hardware = f'CPU, {torch.get_num_threads()} threads'
        if device.type == 'cuda':
            hardware = torch.cuda.get_device_name(device)
        counts = [0 if m is None else sum(p.numel() for p in m.parameters()) for m in (net, teacher)]
        header = {
            'method': f'{cfg.method}, {cfg.mask_ratio:.0%} masked',
            'network': f'{cfg.model}, {counts[0]:,} parameters, {counts[1]:,} in the teacher',
            'data': f'{cfg.data}: {dataset.trained:,} {cfg.kind} and {dataset.held_out:,} held out, '
                    f'{cfg.channels} x {cfg.resolution} x {cfg.resolution}, {cfg.classes or "no"} classes',
            'device': f'{world} x {hardware}, {precision}' + ', compiled' * compiled,
            'batch': f'{args.batch} = {world} ranks x {micro} images x {args.accumulate} accumulated',
            'steps': f'{step} to {cfg.steps}',
            'versions': f'torch {torch.__version__}, numpy {np.__version__}, python {sys.version.split()[0]}',
            'commit': git_commit(), 'seed': cfg.seed} | ({'resumes': str(path)} if step else {})
        for name, value in header.items():
            print(f'{name:10}{value}', flush=True)
        kept = [line for line in log if line.get('step', 0) <= step] if step else []    # the rest is repeated
        with data.whole_file(out / 'log.jsonl') as file:
            file.write(''.join(json.dumps(line) + '\n' for line in kept).encode())
        write_log(out, header | {'config': dataclasses.asdict(cfg)})

    # the loop
    if step == 0 and start:
        report(ema, args, cfg, dataset, step, micro, rank, world, precision)  # tuning: what it starts from
    window, skipped, newest, clock, timed = {}, 0, path, time.perf_counter(), 0
    for step in data.progress(range(step, cfg.steps), initial=step, total=cfg.steps, unit='step'):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, cfg)

        # gradients over the micro-batches; DistributedDataParallel averages them in the last backward
        r = model.random_numbers(cfg, step, device)                           # for the global batch
        loss_fn, values = model.loss_of_step(cfg, step), {}
        for rows in slices:
            mine = {name: value[rows] for name, value in r.items()}
            raw, y = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            x0 = model.patchify(dataset.to_input(raw, mine.get('latent')), cfg.patch)
            with contextlib.nullcontext() if rows is slices[-1] or world == 1 else ddp_net.no_sync():
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    terms = loss_fn(ddp_net, teacher, x0, y, mine, cfg)
                    loss = sum(weight * value for weight, value in terms.values())
                scaler.scale(loss / args.accumulate).backward()
            for name, (_, value) in {'loss': (1, loss), **terms}.items():
                values.setdefault(name, []).append(value.detach())

        # clip; skip the step on all ranks if it is not finite on one; stop all if one was asked to
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        flags = torch.tensor([0, signals[0] if signals else 0], device=device)
        flags[0] = norm.isfinite().logical_not()
        if world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        skip, stop = flags.tolist()                                           # the one wait for the device

        # update: AdamW, the sampling EMA, the teacher
        if skip:
            skipped += 1
            if first:
                tqdm.write(f'step {step + 1} skipped: its gradient is not finite')
                write_log(out, {'step': step + 1, 'skipped_in_a_row': skipped})
            sentence = f'{skipped} consecutive steps had a gradient that is not finite'
            if first:                                                         # other ranks do not save
                sentence += f'; the checkpoint {newest} is good' if newest else '; there is no checkpoint yet'
            check(skipped < MAX_SKIPPED, sentence)
        else:
            skipped = 0
            for name, some in (values | {'grad_norm': [norm]}).items():
                window.setdefault(name, []).extend(some)
            scaler.step(optimizer)
            model.update_ema(ema, net, model.ema_decay(cfg.ema_step + step))
        if teacher is not None:
            teacher.update(net, step / cfg.steps, skip)
        scaler.update()
        optimizer.zero_grad()

        # log, evaluate, save, stop
        step, timed = step + 1, timed + 1                                     # from here: steps that are done
        saving = step % args.save_every == 0 or step == cfg.steps or bool(stop)
        if step % args.log_every == 0 or saving:                              # a resumed log misses no step
            means = {name: torch.stack(some).mean() for name, some in window.items()}
            if means and world > 1:
                table = torch.stack(list(means.values()))
                dist.all_reduce(table)
                means = dict(zip(means, table / world))
            if first:
                speed = timed * args.batch / (time.perf_counter() - clock)
                means = {name: value.item() for name, value in means.items()}
                left = datetime.timedelta(seconds=round((cfg.steps - step) * args.batch / speed))
                write_log(out, {'step': step, **means, 'lr': optimizer.param_groups[0]['lr'],
                                'images_per_s': round(speed, 2)})
                tqdm.write(f'step {step}/{cfg.steps}  ' + '  '.join(f'{k} {v:.4f}' for k, v in means.items())
                           + f'  {speed:.3g} images/s  {left} left')
            window, timed, clock = {}, 0, time.perf_counter()
        paused = time.perf_counter()
        if step % args.eval_every == 0 or step == cfg.steps:
            report(ema, args, cfg, dataset, step, micro, rank, world, precision)
        if saving and first:
            path = out / f'{step:07d}.pt'
            error = save(path, {'model': net.state_dict(), 'ema': ema.state_dict(),
                                'teacher': None if teacher is None else teacher.state_dict(), 'step': step,
                                'opt': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                                'config': dataclasses.asdict(cfg)}, args.keep_every)
            check(not (error and (stop or step == cfg.steps)),
                  f'cannot write {path} ({error}); the newest checkpoint is {newest}')
            if error:
                tqdm.write(f'cannot write {path} ({error}): training continues and saves again at step '
                           f'{min(cfg.steps, step + args.save_every)}')
            else:
                newest = path
        clock += time.perf_counter() - paused                                 # steps are timed, nothing else
        if stop and step < cfg.steps:
            if first:
                tqdm.write(f'stopped after step {step}: run the same command to resume')
            raise SystemExit(128 + stop)

    path = out / f'{cfg.steps:07d}.pt'
    if first:
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


if __name__ == '__main__':
    data.script('train.py', main)
