"""Noise to pictures: the sampler of EDM (Karras et al. 2022, Algorithms 1 and 2) with guidance.

    python sample.py out/0400000.pt                                   # 16 pictures in out/0400000-samples.png
    python sample.py out/0400000.pt -n 50 --class 3 7 --cfg 4           # of two classes
    python sample.py out/0400000.pt --cfg 4 --cfg-interval 0.2 2         # guided at these noise levels only
    python sample.py out/0400000.pt --inpaint photo.png --mask mask.png  # what is white in the mask, anew
    python sample.py DiT-XL-2-256x256.pt --vae vae.safetensors --cfg 4     # latents, decoded
    torchrun --nproc_per_node 4 sample.py out/0400000.pt -n 50000 --npz out/50k.npz       # for evaluation

Image i of a seed has the same noise and the same label whatever the batch size and the number of processes.
The .npz is what ADM's evaluation reads: `arr_0` uint8 (n, H, W, 3), `arr_1` labels, and beside them
`settings`, a line of JSON. A checkpoint carries its configuration, so it is all that is needed. Latents are
decoded, in float32, by the VAE that their data was made with or the one of --vae; with --latents they stay as
the network makes them: the .npz has `latents` float32 (n, C, h, w) in place of `arr_0`.

Letters: B images a batch    C, H, W channels, height, width    D the denoiser    t noise levels
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import sys
import tempfile

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')     # before torch: idle CPU threads sleep, see train.py

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import model
from data import BadInput

RHO = 7                                       # EDM Table 1


# ------------------------------------------------------------------------------------------------- sampler

def noise_levels(steps, sigma_min=0.002, sigma_max=80.0):
    """[t_0 = sigma_max, ..., t_(N-1) = sigma_min, t_N = 0]. EDM eq. 5. Raises BadInput below 2 steps."""
    if steps < 2:
        raise BadInput(f'--steps {steps}: the sampler needs at least 2 steps')
    low, high = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    return [(high + i / (steps - 1) * (low - high)) ** RHO for i in range(steps)] + [0.0]


def edm_sampler(D, noise, t, S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0, fresh_noise=None,
                hold=None):
    """EDM Algorithm 2 (Algorithm 1 without churn) over the noise levels t: 2 N - 1 calls of D(x, sigma).

    noise (B, C, H, W) has unit variance, and its precision is that of the state: float64 or float32.
    `fresh_noise()` gives more of the same shape; only churn asks for it. `hold(x, sigma)` may put known
    pixels back into each new state; inpainting does.
    """
    steps = len(t) - 1
    hold = hold or (lambda x, sigma: x)
    x = hold(noise * t[0], t[0])
    for i in range(steps):
        gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_min <= t[i] <= S_max else 0.0
        t_hat = t[i] + gamma * t[i]
        if gamma > 0:
            x = x + math.sqrt(t_hat ** 2 - t[i] ** 2) * S_noise * fresh_noise()
        d = (x - D(x, t_hat)) / t_hat                                         # dx/dt
        x_next = hold(x + (t[i + 1] - t_hat) * d, t[i + 1])                   # Euler
        if t[i + 1] > 0:
            d_next = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = hold(x + (t[i + 1] - t_hat) * (d + d_next) / 2, t[i + 1])     # Heun's second order
        x = x_next
    return x


def guidance(w, cfg, interval=None, power=None):
    """The schedule w(sigma) of the guidance weight.

    constant   w
    interval   w for low < sigma <= high, 1 elsewhere (Kynkaanniemi et al. 2024)
    power      MDT's power-cosine, 1 + (w - 1) (1 - cos(pi u^s)) / 2 with s = `power`; u runs from 0 at the
               noisiest level to 1, by the sampler's steps or by DDPM's
    """
    def constant(sigma):
        return w

    def within(sigma):
        return w if interval[0] < sigma <= interval[1] else 1.0

    def power_cosine(sigma):
        if cfg['diffusion'] == 'ddpm':
            u = 1 - model.ddpm_time(torch.tensor([sigma], dtype=torch.float64)).item() / 1000
        else:
            low, high = (level ** (1 / RHO) for level in model.sigma_range(cfg))
            u = min(max((high - sigma ** (1 / RHO)) / (high - low), 0.0), 1.0)
        return 1 + (w - 1) * (1 - math.cos(math.pi * u ** power)) / 2

    return within if interval else power_cosine if power else constant


def guided(net, y, w, cfg, look=model.denoise):
    """D_w(x; sigma) = D(x; null) + w(sigma) (D(x; y) - D(x; null)), on every channel, in one batched call."""
    null = torch.full_like(y, cfg['classes'])

    def D(x, sigma):
        levels = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        if w(sigma) == 1:
            return look(net, x, levels, y, cfg)
        D_null, D_y = look(net, x.repeat(2, 1, 1, 1), levels.repeat(2), torch.cat([null, y]), cfg).chunk(2)
        return D_null + w(sigma) * (D_y - D_null)
    return D


# ---------------------------------------------------------------------------------------------- inpainting

def inpainting(cfg, x0, known, noise, t, fill_steps):
    """(look, hold) for `guided` and `edm_sampler`: the tokens `known` (N,) of a picture x0 (1, C, H, W) stay.

    mdt, maskdit   known tokens are visible and held at their noised values; in the first `fill_steps` steps
                   the rest is filled as in masked training (MDT appendix C), then nothing is masked
    mcdit          the roles turn: the known tokens are the clean patches that fill the masked slots, the
                   unknown ones are the visible noisy tokens, and nothing is noised again
    """
    p = model.parse_size(cfg['model'])[2]
    C = cfg['channels']
    picture_known = model.unpatchify(known[None, :, None].expand(1, -1, p * p * C), p, C)
    index = known.nonzero().T                                                 # (1, K)
    if cfg['method'] == 'mcdit':
        index = (~known).nonzero().T

    def look(net, x, levels, y, cfg):
        B = len(x)
        if cfg['method'] == 'mcdit':
            patches = model.patchify(x0 / cfg['sigma_data'], p).to(net.pos.dtype)
            return model.denoise(net, x, levels, y, cfg, index.expand(B, -1), patches.expand(B, -1, -1))
        masked = levels[0].item() > t[fill_steps]
        return model.denoise(net, x, levels, y, cfg, index.expand(B, -1) if masked else None)

    def hold(x, sigma):
        level = 0.0 if cfg['method'] == 'mcdit' else sigma
        return torch.where(picture_known, x0 + level * noise, x)              # at sigma = 0: x0 itself
    return look, hold


def refuse_bomb(image):
    if image.width * image.height > data.MAX_PIXELS:                          # none of which is read yet
        raise ValueError(f'a decompression bomb of {image.width} x {image.height} pixels')


def read_inpainting(args, cfg, vae=None):
    """(x0 (1, C, H, W), known (N,) bool) from --inpaint and --mask. Raises BadInput.

    Of latents, x0 is an .npy file as it is, or the mean of what `vae` makes of a picture, scaled.
    """
    H, C, p = cfg['resolution'], cfg['channels'], model.parse_size(cfg['model'])[2]
    pixels = H * data.VAE_FACTOR if vae else H
    if cfg['method'] not in ('mdt', 'maskdit', 'mcdit') or cfg['stage'] == 'tune':
        tuned = ', tuned' * (cfg['stage'] == 'tune')
        raise BadInput(f'--inpaint needs a checkpoint of mdt, maskdit or mcdit before its tuning, which can '
                       f'fill masked slots, and this is {cfg["method"]}{tuned}')
    if cfg.get('tokens', 'both') != 'both':                                   # MC-DiT Table 10
        raise BadInput('--inpaint gives the decoder noisy and clean tokens, and this network was trained on '
                       'one kind alone, by --tokens noisy or clean: take one that was trained on both')
    try:
        if args.inpaint.endswith('.npy'):
            x0 = torch.from_numpy(np.load(args.inpaint)).double()
        else:
            with Image.open(args.inpaint) as image:
                refuse_bomb(image)
                image = data.center_crop(image.convert('L' if C == 1 else 'RGB'), pixels)
            x0 = torch.from_numpy(np.array(image)).reshape(pixels, pixels, -1).permute(2, 0, 1)
            x0 = x0.double() / 127.5 - 1
            if vae:
                x0 = latent_scale(cfg) * vae.encode(x0[None])[0, :C].double().cpu()
        with Image.open(args.mask) as mask:
            refuse_bomb(mask)
            white = data.central_square(np.array(mask.convert('L')) > 127)
    except Exception as error:                                                # a broken file raises anything
        raise BadInput(f'--inpaint {args.inpaint} or --mask {args.mask} cannot be read: {error}') from None
    if x0.shape != (C, H, H) or not torch.isfinite(x0).all():
        raise BadInput(f'--inpaint {args.inpaint} holds {tuple(x0.shape)}: this network needs finite '
                       f'{(C, H, H)}' + (', latents as an .npy file' if C not in (1, 3) else ''))
    at = np.arange(max(len(white), H)) * len(white) // max(len(white), H)     # at least a pixel a token
    token = np.arange(len(at)) * (H // p) // len(at)                          # whose row or column it is
    anew = np.zeros((H // p, H // p), bool)
    np.logical_or.at(anew, (token[:, None], token), white[np.ix_(at, at)])    # a token with any white is
    known = torch.from_numpy(~anew).flatten()
    if known.all() or not known.any():
        raise BadInput(f'--mask {args.mask} is all {"black" if known.all() else "white"} on the {len(known)} '
                       f'tokens: white is made anew, black is kept, and both are needed')
    return x0[None], known


# ---------------------------------------------------------------------------------------- image i of a seed

def noise_source(seed, i):
    return np.random.default_rng([seed, i])


def label_of(seed, i, allowed, balanced):
    """The label of image i: the classes in turn, or one at random."""
    if balanced:
        return allowed[i % len(allowed)]
    return allowed[int(np.random.default_rng([seed, i, 1]).integers(len(allowed)))]


def make_ready(net, precision, compiled=False):
    """`net` for many calls of `generate` in `precision`; `compiled` as by `model.compile_blocks`."""
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.to(precision)                                               # once, to the same bits, what
    if compiled:                                                              # autocast does at every call
        model.compile_blocks(net)


def generate(net, cfg, seed, indices, labels, steps=40, w=None, precision=torch.float32, progress=None,
             inpaint=None, fill_steps=1, **churn):
    """Images `indices` of `seed` with `labels`, float64 (B, C, H, W) as the network makes them.

    The state of the sampler is float64, the network runs in `precision`. `w(sigma)` is the weight of
    guidance, `inpaint` what `read_inpainting` returns.
    """
    device = net.pos.device
    shape = (cfg['channels'], cfg['resolution'], cfg['resolution'])
    sources = [noise_source(seed, i) for i in indices]

    def normal():
        return torch.from_numpy(np.stack([source.standard_normal(shape) for source in sources])).to(device)

    t, noise = noise_levels(steps, *model.sigma_range(cfg)), normal()
    look, hold = model.denoise, None
    if inpaint:
        look, hold = inpainting(cfg, inpaint[0].to(device), inpaint[1].to(device), noise, t, fill_steps)
    D = guided(net, torch.tensor(labels, device=device), w or guidance(1.0, cfg), cfg, look)

    def counted(x, sigma):
        if progress is not None:
            progress.update()
        return D(x, sigma)

    with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        return edm_sampler(counted, noise, t, fresh_noise=normal, hold=hold, **churn)


def picture(x):
    """(B, C, H, W) as the network makes them -> uint8 (B, 3, H, W).

    Pixels are rounded to the nearest of 256 levels. Of latents, the first three channels are shown as they
    are, 3 units either side of grey: a look at them, no picture.
    """
    if x.shape[1] in (1, 3):
        return data.to_uint8(x).expand(-1, 3, -1, -1).cpu()
    return data.to_uint8(x[:, :3] / 3).cpu()


# ---------------------------------------------------------------------------------- latents, to be decoded

def of_latents(cfg):
    return cfg.get('kind') in ('moments', 'latents') or cfg['channels'] not in (1, 3)


def latent_scale(cfg):
    return cfg.get('scale', data.LATENT_SCALE)                                # published weights do not say


def find_vae(args, cfg, device):
    """(VAE, what `settings` say of it) from the file that --vae names, or that the data was made with.

    (None, {}) where nothing is to be decoded: for a network of pixels, or with --latents. Raises BadInput.
    """
    path = args.vae or cfg.get('vae')
    if not of_latents(cfg) and (args.vae or args.latents):
        raise BadInput('--vae and --latents are for networks of latents, and this one makes pictures: leave '
                       'them out')
    if not of_latents(cfg) or args.latents:
        return None, {}
    if cfg['channels'] != 4:
        raise BadInput(f'this network makes latents of {cfg["channels"]} channels, and the VAE decodes 4: '
                       f'with --latents they are kept as they are')
    if not path:
        raise BadInput(f'this network makes latents: name the VAE that decodes them with --vae, such as '
                       f'{data.PUBLISHED_VAE}; or keep them as they are with --latents')
    vae, sha256 = data.read_vae(path, device)
    return vae, {'vae': str(path), 'vae_sha256': sha256}


# ------------------------------------------------------------------------------------------------- script

def pick_precision(name, device):
    """The dtype the network runs in: bfloat16 where the hardware multiplies it faster than float32, float16
    on GPUs that multiply only that one faster (Volta and Turing)."""
    if name == 'auto' and device.type == 'cuda':
        volta = torch.cuda.get_device_capability(device) >= (7, 0)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = 'bf16' if bf16 else 'fp16' if volta else 'fp32'
    elif name == 'auto':
        name = 'bf16' if torch.cpu._is_avx512_bf16_supported() else 'fp32'
    return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}[name]


def parse(argv):
    parser = argparse.ArgumentParser(description='Noise to pictures.', allow_abbrev=False)
    flag = parser.add_argument
    flag('checkpoint', help='file of train.py or finetune.py')
    flag('-n', '--n', type=int, default=16, help='number of images (under torchrun -n, which before '
                        'Python 3.12 takes --n for an option of its own)')
    flag('--steps', type=int, default=40, help='of the sampler, which evaluates the network twice a step, '
                        'and once in the last')
    flag('--seed', type=int, default=0)
    flag('--class', type=int, nargs='+', dest='classes', help='only these classes')
    flag('--balanced', action='store_true', help='classes in turn instead of at random')
    flag('--cfg', type=float, default=1.0, help='weight of classifier-free guidance; 1 is none')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--cfg-interval', type=float, nargs=2, metavar=('LOW', 'HIGH'), help='guide only at noise '
                          'levels above LOW and up to HIGH')
    either('--cfg-power', type=float, metavar='S', help="MDT's power-cosine schedule; the paper: 4")
    flag('--inpaint', metavar='IMAGE', help='picture to keep in part, or latents as an .npy file')
    flag('--mask', help='picture, white where --inpaint is made anew; a token with any white is')
    flag('--fill-steps', type=int, help='first steps in which mdt and maskdit inpaint as in masked '
                        'training (1)')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--vae', metavar='FILE', help="Stable Diffusion's autoencoder, decodes latents (default: the one "
                          'that the data was made with)')
    either('--latents', action='store_true', help='keep latents as they are, for --npz and --inpaint')
    flag('--batch', type=int, default=64, help='images at a time, each process')
    flag('--precision', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto', help='of the network')
    flag('--compile', action='store_true', help='compile the network first; for thousands of images')
    flag('--S-churn', type=float, default=0.0, help='EDM Algorithm 2: noise put back, 0 is none')
    flag('--S-min', type=float, default=0.0, help='least noise level with churn')
    flag('--S-max', type=float, default=math.inf, help='greatest noise level with churn')
    flag('--S-noise', type=float, default=1.0, help='standard deviation of the noise put back')
    flag('--out', help='grid of the first 100 images, PNG (default: beside the checkpoint)')
    flag('--npz', help="file for ADM's evaluation to write")
    flag('--png', help='folder to fill with one PNG an image')
    return parser.parse_args(argv)


@contextlib.contextmanager
def writing(flag, file):
    """Tells an OSError as a BadInput that names what was to be written."""
    try:
        yield
    except OSError as error:
        raise BadInput(f'cannot write {file}: {error.strerror or error}: choose another {flag}') from None


def begin(args, grid, shape, dtype, until_open):
    """Process 0 alone: what cannot be written is found out now, not after hours.

    Returns the name of an .npy file that gathers the images, as memory might not hold them. `until_open`
    removes it; who has opened it keeps it, and however a run ends, nothing is left.
    """
    file, flag = (args.npz, '--npz') if args.npz else (grid, '--out')
    data.check_room(file, math.prod(shape) * dtype.itemsize * (2 if args.npz else 1))
    with writing('--out', grid):
        tempfile.TemporaryFile(dir=pathlib.Path(grid).parent).close()
    if args.png:
        with writing('--png', args.png):
            os.makedirs(args.png, exist_ok=True)
    with writing(flag, file):
        scratch = tempfile.NamedTemporaryFile(dir=pathlib.Path(file).parent, suffix='.npy')
        np.lib.format.open_memmap(until_open.enter_context(scratch).name, 'w+', dtype, shape)
    return scratch.name


def main(argv=None):
    args = parse(argv)

    # where am I
    rank, world, device = data.where_am_i(gpu=True)
    barrier = dist.barrier if world > 1 else lambda: None
    if (here := int(os.environ.get('LOCAL_WORLD_SIZE', world))) != world:
        raise BadInput(f'images gather in a file of one machine, and {here} of {world} processes are on '
                       f'this one: sample on each machine by itself, with a --seed of its own')

    # what is asked for
    net, cfg = model.load_net(args.checkpoint, device)
    allowed = args.classes or list(range(max(cfg['classes'], 1)))
    stem = pathlib.Path(args.checkpoint)
    grid = args.out or str(stem.with_name(stem.stem + '-samples.png'))
    if not 1 <= args.n <= 10 ** 7 or args.batch < 1 or args.seed < 0 or args.steps > 10 ** 4:
        raise BadInput('--n goes from 1 to ten millions, --batch is at least 1, --seed at least 0, --steps '
                       'at most 10,000')
    noise_levels(args.steps)
    if args.classes and not all(0 <= k < cfg['classes'] for k in args.classes):
        known = f'the classes 0 to {cfg["classes"] - 1}' if cfg['classes'] else 'no classes'
        raise BadInput(f'--class {args.classes}: this network knows {known}')
    if args.cfg != 1 and not cfg['classes']:
        raise BadInput('--cfg needs classes, and this network was trained without')
    if args.cfg == 1 and (args.cfg_interval or args.cfg_power):
        raise BadInput('--cfg-interval and --cfg-power plan guidance, and --cfg 1 is none: type its weight')
    low, high = args.cfg_interval or (0, 1)
    power = 1 if args.cfg_power is None else args.cfg_power
    if not 0 < power < math.inf or not low < high or not math.isfinite(args.cfg):
        raise BadInput('--cfg must be finite, --cfg-power above 0, --cfg-interval a low and a high level')
    if bool(args.inpaint) != bool(args.mask):
        raise BadInput('--inpaint and --mask go together: a picture, and what of it is made anew')
    if args.inpaint and args.S_churn:
        raise BadInput('--S-churn means nothing to --inpaint, which holds the known tokens: leave one out')
    finite = (args.S_churn, args.S_min, args.S_noise)
    if not all(0 <= value < math.inf for value in finite) or not args.S_max >= 0:
        raise BadInput('--S-churn, --S-min, --S-max and --S-noise must be at least 0')
    if not args.S_churn and (args.S_min, args.S_max, args.S_noise) != (0, math.inf, 1):
        raise BadInput('--S-min, --S-max and --S-noise shape the noise of --S-churn, and that is 0: type its '
                       'amount, or leave them out')
    if args.png and args.latents:
        raise BadInput('--png holds pictures, and --latents makes none: --npz takes them as they are')
    vae, decoder = find_vae(args, cfg, device)
    inpaint = read_inpainting(args, cfg, vae) if args.inpaint else None
    unfit = not inpaint or cfg['method'] == 'mcdit'
    if args.fill_steps is not None and (unfit or not 0 <= args.fill_steps <= args.steps):
        raise BadInput('--fill-steps is for --inpaint with mdt or maskdit, a number from 0 to --steps')
    if args.npz and os.path.exists(args.npz):
        raise BadInput(f'{args.npz} exists already: remove it, or choose another --npz')
    if args.png and os.path.isdir(args.png) and os.listdir(args.png):
        raise BadInput(f'{args.png} is not empty: clear it, or choose another --png')
    if not grid.endswith('.png') or os.path.isdir(grid):
        raise BadInput(f'--out {grid} must be a file that ends in .png')
    if args.out and os.path.exists(args.out):
        raise BadInput(f'{args.out} exists already: remove it, or choose another --out')

    # make the images: process r takes r, r + world, ...
    precision = pick_precision(args.precision, device)
    make_ready(net, precision, args.compile)
    fill_steps = 1 if args.fill_steps is None else args.fill_steps
    settings = {'checkpoint': str(stem), 'n': args.n, 'steps': args.steps, 'seed': args.seed, 'cfg': args.cfg,
                'labels': 'balanced' if args.balanced else 'uniform at random', 'classes': args.classes,
                'cfg_interval': args.cfg_interval, 'cfg_power': args.cfg_power, 'inpaint': args.inpaint,
                'mask': args.mask, 'fill_steps': None if unfit else fill_steps,
                'precision': str(precision).removeprefix('torch.'),
                'S_churn': args.S_churn, 'S_min': args.S_min, 'S_noise': args.S_noise,
                'S_max': args.S_max if args.S_max < math.inf else None} | decoder
    if rank == 0 and vae:
        print(f'VAE {decoder["vae"]}, SHA-256 {decoder["vae_sha256"]}')
        if cfg.get('vae_sha256') not in (None, decoder['vae_sha256']):
            print(f'note: the data was made with another VAE file, SHA-256 {cfg["vae_sha256"]}')
    w = guidance(args.cfg, cfg, args.cfg_interval, args.cfg_power)
    labels = [label_of(args.seed, i, allowed, args.balanced) for i in range(args.n)]
    mine = list(range(args.n))[rank::world]
    batches = [mine[k:k + args.batch] for k in range(0, len(mine), args.batch)]
    kept = args.n if args.npz else min(args.n, 100)
    side = cfg['resolution'] * (data.VAE_FACTOR if vae else 1)
    shape = (kept, cfg['channels'] if args.latents else 3, side, side)
    dtype = np.dtype(np.float32 if args.latents else np.uint8)
    with contextlib.ExitStack() as until_open:
        store = np.lib.format.open_memmap(
            data.from_first(lambda: begin(args, grid, shape, dtype, until_open), rank, world), 'r+')
        barrier()                                                             # all have it: it needs no name
    with tqdm(total=len(batches) * (2 * args.steps - 1), desc='sampling', disable=rank > 0 or None) as bar:
        for batch in batches:
            try:
                x = generate(net, cfg, args.seed, batch, [labels[i] for i in batch], args.steps, w, precision,
                             bar, inpaint, fill_steps, S_churn=args.S_churn, S_min=args.S_min,
                             S_max=args.S_max, S_noise=args.S_noise)
                x = vae.decode(x / latent_scale(cfg)) if vae else x
            except torch.OutOfMemoryError:
                less = f'type --batch {len(batch) // 2}' if len(batch) > 1 else 'use a larger one'
                raise BadInput(f'the GPU has too little memory for {len(batch)} images at a time'
                               + ', each twice for guidance' * (args.cfg != 1) + f': {less}') from None
            for i, finite in zip(batch, x.isfinite().flatten(1).all(1).tolist()):
                if not finite:
                    raise BadInput(f'image {i} of --seed {args.seed}, label {labels[i]}, is not finite: ' + (
                        'float16 may be too narrow for this network, try --precision fp32'
                        if precision == torch.float16 else 'the network has diverged'))
            for i, image in zip(batch, (x.float().cpu() if args.latents else picture(x)).numpy()):
                if i < kept:
                    store[i] = image
                if args.png:
                    with writing('--png', args.png):
                        Image.fromarray(image.transpose(1, 2, 0)).save(f'{args.png}/{i:06d}.png')
    barrier()
    if rank == 0:
        write_results(args, cfg, store, labels, grid, settings)
    return grid


def write_results(args, cfg, store, labels, grid, settings):
    if args.npz:
        with writing('--npz', args.npz), data.whole_file(args.npz) as file:
            pixels = store.dtype == np.uint8
            images = {'arr_0': store.transpose(0, 2, 3, 1)} if pixels else {'latents': store}
            np.savez(file, **images, arr_1=np.array(labels, np.int64),
                     settings=np.array(json.dumps(settings)))
        print(f'{args.n} images in {args.npz}')
    names = cfg['class_names'] or [str(k) for k in range(cfg['classes'])] or ['']
    some = store[:100] if store.dtype == np.uint8 else picture(torch.from_numpy(store[:100])).numpy()
    with writing('--out', grid):
        data.save_grid(grid, some, [names[k] for k in labels[:100]], columns=min(args.n, 10))
    print(f'{min(args.n, 100)} pictures in {grid}')
    if args.png:
        print(f'{args.n} images in {args.png}/')


if __name__ == '__main__':
    try:
        main()
    except (BadInput, model.BadInput) as mistake:
        print(f'sample.py: {mistake}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('sample.py: interrupted', file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
