"""Noise to images: the sampler of EDM (Karras et al. 2022, Algorithms 1 and 2) with guidance.

    python sample.py out/0400000.pt                                       # 16 images: out/0400000-samples.png
    python sample.py out/0400000.pt -n 50 --class 3 7 --cfg 4             # of two classes, guided
    python sample.py out/0400000.pt --cfg 4 --cfg-interval 0.2 2          # at these noise levels only
    python sample.py out/0400000.pt --inpaint photo.png --mask mask.png   # regenerate what is white
    python sample.py DiT-XL-2-256x256.pt --vae vae.safetensors --cfg 4    # latents, decoded
    torchrun --nproc_per_node 4 sample.py out/0400000.pt -n 50000 --npz out/50k.npz    # for fid.py

A checkpoint carries its configuration, so it is all that is needed. Latents are decoded, in float32, by the
VAE that their data was made with or the one of --vae; --latents keeps them as the network makes them.

Image i of a seed has the same noise and the same label for any batch size and any number of ranks. After a
kill, run the same command again: it resumes at the last finished batch and ends with identical files.

The .npz is what ADM's evaluation reads: `arr_0` uint8 (n, H, W, 3), `arr_1` labels (n,), and `settings`, a
line of JSON. With --latents it has `latents` float32 (n, C, h, w) in place of `arr_0`.

Letters: B images    C, H, W channels, height, width    N tokens    D the denoiser    t noise levels
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import shutil
import time

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

import data
import model
from model import METHODS, check

# ------------------------------------------------------------------------------------------------- sampler

RHO = 7                                       # EDM Table 1
NO_CHURN = (0.0, 0.0, math.inf, 1.0)          # S_churn, S_min, S_max, S_noise


def noise_levels(N, sigma_min=0.002, sigma_max=80.0):
    """[t_0 = sigma_max, ..., t_(N-1) = sigma_min, t_N = 0]. EDM eq. 5."""
    check(N >= 2, f'--steps {N}: the sampler needs at least 2 steps')
    low, high = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    return [(high + i / (N - 1) * (low - high)) ** RHO for i in range(N)] + [0.0]


def edm_sampler(D, noise, t, churn=NO_CHURN, fresh_noise=None, on_step=lambda: None):
    """EDM Algorithm 2 (Algorithm 1 without churn) over the noise levels t: 2 N - 1 calls of D(x, sigma).

    noise (B, C, H, W) has unit variance, and its precision is the state's: float64 or float32. Churn calls
    `fresh_noise()` for more of the same shape.
    """
    S_churn, S_min, S_max, S_noise = churn
    N = len(t) - 1
    x = noise * t[0]
    for i in range(N):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_min <= t[i] <= S_max else 0.0
        t_hat, x_hat = t[i] + gamma * t[i], x
        if gamma > 0:
            x_hat = x + math.sqrt(t_hat ** 2 - t[i] ** 2) * S_noise * fresh_noise()
        d = (x_hat - D(x_hat, t_hat)) / t_hat                                 # dx/dt
        x = x_hat + (t[i + 1] - t_hat) * d                                    # Euler
        if t[i + 1] > 0:
            d_prime = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_prime) / 2                # Heun: second order
        on_step()
    return x


def guidance(scale, cfg, interval=None, power=None):
    """w(sigma), the classifier-free guidance scale as a function of the noise level.

    constant   scale
    interval   scale for low < sigma <= high, 1 elsewhere (Kynkaanniemi et al. 2024)
    power      MDT's power-cosine, 1 + (scale - 1) (1 - cos(pi u^s)) / 2 with s = `power`; u runs from 0 at
               the noisiest level to 1, by the sampler's steps, or by DDPM's for networks trained under it
    """
    low, high = (level ** (1 / RHO) for level in model.sigma_range(cfg))

    def w(sigma):
        if interval:
            return scale if interval[0] < sigma <= interval[1] else 1.0
        if not power:
            return scale
        if cfg.diffusion == 'ddpm':
            u = 1 - model.ddpm_time(torch.tensor([sigma], dtype=torch.float64)).item() / 1000
        else:
            u = min(max((high - sigma ** (1 / RHO)) / (high - low), 0.0), 1.0)
        return 1 + (scale - 1) * (1 - math.cos(math.pi * u ** power)) / 2
    return w


def guided(net, y, w, cfg, denoise=model.denoise_images):
    """D_w(x, sigma) = D(x; null) + w(sigma) (D(x; y) - D(x; null)), on every channel, in one batched call."""
    null = torch.full_like(y, cfg.classes)

    def D(x, sigma):
        levels = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        if w(sigma) == 1:
            return denoise(net, x, levels, y, cfg)
        D_null, D_y = denoise(net, x.repeat(2, 1, 1, 1), levels.repeat(2), torch.cat([null, y]), cfg).chunk(2)
        return D_null + w(sigma) * (D_y - D_null)
    return D


# ---------------------------------------------------------------------------------------------- inpainting

def inpainting(cfg, x0, known, noise, fill_above):
    """A denoiser to take the place of `denoise_images`, given the tokens `known` (N,) of x0 (1, C, H, W).

    At known tokens the network sees x0 at the current noise level, and the result is x0: so the sampler ends
    there at x0 by itself. What else is made of them is a column of METHODS:

    visible    above the noise level `fill_above` they are the only visible tokens, and the network fills the
               rest as in masked training; below, nothing is masked (MDT appendix C)
    context    they are the clean patches that fill masked positions; the visible tokens are the unknown ones
    """
    p, C, method = cfg.patch, cfg.channels, METHODS[cfg.method]
    known_pixels = model.unpatchify(known[None, :, None].expand(1, -1, p * p * C), p, C)     # (1, C, H, W)
    visible, clean = known, None
    if method.inpaint == 'context':
        visible, clean = ~known, model.unpatchify(method.context(model.patchify(x0, p), cfg), p, C)
    visible = visible.nonzero().T                                             # (1, K)

    def denoise(net, x, sigma, y, cfg):
        B, masked = len(x), clean is not None or sigma[0].item() > fill_above
        noised = x0 + sigma.view(-1, 1, 1, 1) * noise.repeat(B // len(noise), 1, 1, 1)   # guided: B is double
        D = model.denoise_images(net, torch.where(known_pixels, noised, x), sigma, y, cfg,
                                 visible.expand(B, -1) if masked else None,
                                 clean if clean is None else clean.expand(B, -1, -1, -1))
        return torch.where(known_pixels, x0, D)
    return denoise


def read_inpainting(image, mask, cfg, vae=None):
    """(x0 (1, C, H, W), known (N,) bool) from the files of --inpaint and --mask. A token with any white pixel
    in the mask is unknown. Of latents, x0 is the mean of what `vae` makes of the image, scaled."""
    able = [name for name, method in METHODS.items() if method.inpaint]
    check(cfg.method in able and cfg.stage == 'train' and cfg.tokens == 'both',
          f'--inpaint needs a network that can fill masked positions, from train.py with --method '
          f'{" or ".join(able)} and --tokens both: this one is {cfg.method}, stage {cfg.stage}, tokens '
          f'{cfg.tokens}')
    channels, side = (3, cfg.resolution * data.VAE_FACTOR) if vae else (cfg.channels, cfg.resolution)
    x0 = torch.from_numpy(data.read_image(image, channels, side))[None].double() / 127.5 - 1
    if vae:
        x0 = cfg.scale * vae.encode(x0)[:, :cfg.channels].double().cpu()
    with data.reading(mask):
        white = torch.from_numpy(np.array(data.load_image(mask)[0].convert('L')) > 127)
    (h, w), (width, height) = white.shape, data.load_image(image)[0].size
    check(abs(width * h - height * w) <= max(width, height),                  # half a pixel of the mask
          f'{mask} is {w} x {h} and {image} is {width} x {height}: they must have the same proportions')
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2                              # the square, as of the image
    white = white[top:top + side, left:left + side].float()
    known = functional.adaptive_max_pool2d(white[None], cfg.grid).flatten() == 0
    check(known.any() and not known.all(), f'{mask} is all {"black" if known.all() else "white"} on the '
          f'{cfg.N} tokens: white is regenerated, black is kept, and both are needed')
    return x0, known


# ---------------------------------------------------------------------------------------- image i of a seed

def label_of(seed, i, allowed, balanced):
    """The label of image i: the classes in turn, or one at random."""
    if balanced:
        return allowed[i % len(allowed)]
    return allowed[int(np.random.default_rng([seed, i, 1]).integers(len(allowed)))]


def generate(net, cfg, seed, indices, labels, steps=40, w=lambda sigma: 1.0, precision=torch.float32,
             inpaint=None, churn=NO_CHURN, on_step=lambda: None):
    """Images `indices` of `seed` with `labels`: float64 (B, C, H, W) as the network makes them.

    The state of the sampler is float64, the network runs in `precision`. `w` is what `guidance` returns,
    `inpaint` what `read_inpainting` returns and the number of first steps that fill.
    """
    device, shape = next(net.parameters()).device, (cfg.channels, cfg.resolution, cfg.resolution)
    generators = [np.random.default_rng([seed, i]) for i in indices]

    def normal():
        return torch.from_numpy(np.stack([rng.standard_normal(shape) for rng in generators])).to(device)

    t, noise, denoise = noise_levels(steps, *model.sigma_range(cfg)), normal(), model.denoise_images
    if inpaint:
        x0, known, fill_steps = inpaint
        denoise = inpainting(cfg, x0.to(device), known.to(device), noise, t[fill_steps])
    D = guided(net, torch.tensor(labels, device=device), w, cfg, denoise)
    with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        return edm_sampler(D, noise, t, churn, normal, on_step)


def to_image(x):
    """(B, C, H, W) as the network makes them -> uint8 (B, 3, H, W).

    Of latents, it shows the first three channels, 3 units either side of grey.
    """
    C = x.shape[1]
    rgb = x[:, [0, 1 % C, 2 % C]]                                             # a single channel is grey
    return data.to_uint8(rgb if C in (1, 3) else rgb / 3).cpu()


# ----------------------------------------------------------------------------------------- finished batches
#
# OUT.partial/000007.npz    the images of batch 7 and the settings they were made with
#
# OUT is --npz, or else --out. The files appear by renaming, so a kill leaves whole ones. Rank r makes batches
# r, r + world, ...; rank 0 waits for all and joins them. If a rank fails, torchrun ends the others.

def digest(*tensors):
    """16 hexadecimal digits that identify their content."""
    return hashlib.sha256(b''.join(tensor.cpu().numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def check_settings(partial, settings):
    """Raises BadInput if the batches that are finished were made with other settings."""
    for file in sorted(partial.glob('*.npz')):
        with data.reading(file), np.load(file) as batch:
            old = json.loads(str(batch['settings']))
        differ = [f'{key} was {old.get(key)} and is now {settings[key]}' for key in settings
                  if old.get(key) != settings[key]]
        check(not differ, f'{partial} was begun with other settings ({"; ".join(differ)}): run the command '
                          f'as it was to resume, or remove {partial} to start again')


def join(partial, files, args, cfg, labels, settings):
    """Write --npz, --png and the grid from the files of all batches, then remove them."""
    some = np.load(files[0])['images']
    images = np.lib.format.open_memmap(partial / 'images.npy', 'w+', some.dtype, (args.n, *some.shape[1:]))
    for k, file in enumerate(files):                                          # memory may not hold them all
        images[k * args.batch:(k + 1) * args.batch] = np.load(file)['images']
    if args.npz:
        how = {key: value for key, value in settings.items() if key not in ('out', 'npz', 'png')}
        with data.whole_file(args.npz) as file:
            np.savez(file, **{'latents' if args.latents else 'arr_0': images}, arr_1=np.array(labels),
                     settings=np.array(json.dumps(how)))
        print(f'{args.n} images in {args.npz}')
    if args.png:
        os.makedirs(args.png, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(f'{args.png}/{i:06d}.png')
        print(f'{args.n} images in {args.png}/')
    some = images[:100]
    some = to_image(torch.from_numpy(some)).numpy() if args.latents else some.transpose(0, 3, 1, 2)
    names = cfg.class_names or [str(k) for k in range(cfg.classes)] or ['']
    data.save_grid(args.out, some, [names[k] for k in labels[:100]], columns=min(args.n, 10))
    print(f'{len(some)} images in {args.out}')
    shutil.rmtree(partial)


# ------------------------------------------------------------------------------------------------- command

def parse(argv):
    parser = argparse.ArgumentParser(description='Noise to images.', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag('checkpoint', help='file of train.py or finetune.py')
    flag('-n', '--n', type=int, default=16, help='images (under torchrun -n, which before Python 3.12 takes '
         '--n for an option of its own)')
    flag('--steps', type=int, default=40, help='of the sampler: 2 network evaluations each, 1 in the last')
    flag('--seed', type=int, default=0, help='image i of a seed is always the same')
    flag('--class', type=int, nargs='+', dest='classes', help='only these classes; None: all')
    flag('--balanced', action='store_true', help='classes in turn instead of at random')
    flag('--cfg', type=float, default=1.0, help='classifier-free guidance scale; 1: no guidance')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--cfg-interval', type=float, nargs=2, metavar=('LOW', 'HIGH'),
           help='guide only at noise levels above LOW and up to HIGH')
    either('--cfg-power', type=float, metavar='S', help="MDT's power-cosine schedule; its paper: 4")
    flag('--churn', type=float, nargs=4, metavar=('S_churn', 'S_min', 'S_max', 'S_noise'),
         help='EDM Algorithm 2: noise to add, lowest and highest noise level at which to add it, and its '
         'standard deviation; for ImageNet EDM uses 40 0.05 50 1.003')
    flag('--inpaint', metavar='IMAGE', help='image to keep where --mask is black')
    flag('--mask', metavar='IMAGE', help='white where --inpaint is regenerated; a token with any white is')
    flag('--fill-steps', type=int, default=1, help='first steps in which known tokens are the only visible '
         'ones, as in masked training; not for methods whose known tokens are the clean context')
    either = parser.add_mutually_exclusive_group().add_argument
    either('--vae', metavar='FILE', help='decoder of latents; None: the one that the data was made with')
    either('--latents', action='store_true', help='keep latents as they are, for --npz')
    flag('--batch', type=int, default=64, help='images at a time, per rank')
    flag('--precision', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto', help='of the network')
    flag('--compile', action='store_true', help='compile the network first; for thousands of images')
    flag('--out', help='grid of the first 100 images, PNG; None: beside the checkpoint, 0400000-samples.png')
    flag('--npz', help="file for ADM's evaluation")
    flag('--png', help='folder for one PNG per image')
    return parser.parse_args(argv)


def find_vae(args, cfg, device):
    """(VAE, SHA-256 of its file), from --vae or as the data was made; None where nothing is to be decoded."""
    latents = cfg.kind in ('moments', 'latents') or cfg.channels not in (1, 3)
    check(latents or not (args.vae or args.latents),
          '--vae and --latents are for networks of latents, and this one makes images: leave them out')
    if not latents or args.latents:
        return None, None
    path = args.vae or cfg.vae
    check(path, f'this network makes latents: name the VAE that decodes them with --vae, such as '
                f'{data.PUBLISHED_VAE}; or keep them as they are with --latents')
    vae, sha256 = data.read_vae(path, device)
    if cfg.vae_sha256 not in (None, sha256):
        print(f'note: the data was made with another VAE than {path}, of SHA-256 {cfg.vae_sha256}')
    return vae, sha256


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


def cast_weights(net, precision):
    """Cast the linear layers once, to the same bits, instead of by autocast at every call."""
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.to(precision)


def main(argv=None):
    args = parse(argv)
    rank, world, device = data.rank_world_device()
    check(args.n >= 1 and args.batch >= 1 and args.seed >= 0, '--n and --batch must be at least 1, --seed 0')
    outputs = ('--npz', args.npz), ('--png', args.png), ('--out', args.out)   # the default may be overwritten
    args.out = args.out or os.path.splitext(args.checkpoint)[0] + '-samples.png'
    check(args.out.endswith('.png'), f'--out {args.out}: it is a PNG, its name must end in .png')

    # which batches are mine, and not finished
    batches = [range(at, min(at + args.batch, args.n)) for at in range(0, args.n, args.batch)]
    partial = pathlib.Path(f'{args.npz or args.out}.partial')
    files = [partial / f'{k:06d}.npz' for k in range(len(batches))]
    todo = [k for k in range(rank, len(files), world) if not files[k].exists()]
    if rank and not todo:
        return                                                                # rank 0 joins them

    # what is asked for
    net, cfg = model.load_net(args.checkpoint, device)
    allowed = args.classes or list(range(max(cfg.classes, 1)))
    noise_levels(args.steps)
    check(not args.classes or all(0 <= k < cfg.classes for k in args.classes),
          f'--class {args.classes}: this network has {cfg.classes} classes, numbered from 0')
    check(args.cfg == 1 or cfg.classes, '--cfg needs classes, and this network was trained without')
    check(args.cfg != 1 or not (args.cfg_interval or args.cfg_power),
          '--cfg-interval and --cfg-power are schedules of guidance, and --cfg 1 is none: type its scale')
    check(not args.cfg_interval or args.cfg_interval[0] < args.cfg_interval[1],
          '--cfg-interval takes a low and a high noise level')
    check(bool(args.inpaint) == bool(args.mask),
          '--inpaint and --mask go together: an image, and what of it is regenerated')
    fills = args.inpaint and METHODS[cfg.method].inpaint == 'visible'
    check(args.fill_steps == 1 or fills and 0 <= args.fill_steps <= args.steps,
          '--fill-steps, from 0 to --steps, is for --inpaint with methods whose known tokens are visible: '
          + ' or '.join(name for name, method in METHODS.items() if method.inpaint == 'visible'))
    check(not (args.latents and (args.png or args.inpaint)),
          '--png and --inpaint are for images, and --latents makes none: leave one out')
    vae, vae_sha256 = find_vae(args, cfg, device)
    inpaint = (*read_inpainting(args.inpaint, args.mask, cfg, vae), args.fill_steps) if args.inpaint else None
    precision = pick_precision(args.precision, device)
    w = guidance(args.cfg, cfg, args.cfg_interval, args.cfg_power)
    labels = [label_of(args.seed, i, allowed, args.balanced) for i in range(args.n)]
    settings = json.loads(json.dumps(vars(args) | {                           # as it will be read: no tuples
        'precision': str(precision), 'device': device.type, 'vae_sha256': vae_sha256,
        'weights': digest(net.decoder.final.linear.weight), 'known': inpaint and digest(*inpaint[:2])}))
    check_settings(partial, settings)
    for flag, path in outputs:                                                # of a resumed run they are ours
        check(not path or partial.exists() or not os.path.exists(path),
              f'{path} exists already: remove it, or choose another {flag}')

    # make the images
    cast_weights(net, precision)
    if args.compile:
        model.compile_blocks(net)
    with data.progress(total=len(todo) * args.steps, desc='sampling', unit=' steps') as bar:
        for k in todo:
            x = generate(net, cfg, args.seed, batches[k], [labels[i] for i in batches[k]], args.steps, w,
                         precision, inpaint, args.churn or NO_CHURN, bar.update)
            x = vae.decode(x / cfg.scale) if vae else x
            check(x.isfinite().all(), f'images {batches[k][0]} to {batches[k][-1]} are not all finite: the '
                  f'network has diverged, or {precision} is too narrow for it: try --precision fp32')
            images = x.float().cpu() if args.latents else to_image(x).permute(0, 2, 3, 1)
            partial.mkdir(parents=True, exist_ok=True)
            with data.whole_file(files[k]) as file:
                np.savez(file, images=images.numpy(), settings=np.array(json.dumps(settings)))
    if rank == 0:
        while not all(file.exists() for file in files):                       # other ranks are not ready
            time.sleep(0.2)
        join(partial, files, args, cfg, labels, settings)
    return args.out


if __name__ == '__main__':
    data.script('sample.py', main)
