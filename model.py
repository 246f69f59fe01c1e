"""What is the network, what fills its holes, and what is minimised?

The reference is MC-DiT: "Contextual Enhancement via Clean-to-Clean Reconstruction for Masked Diffusion
Models" (NeurIPS 2024), beside the systems it is compared with: DiT (Peebles & Xie 2022), MaskDiT (Zheng et
al. 2024), MDT (Gao et al. 2023) and SD-DiT (Zhu et al. 2024). All are trained under EDM (Karras et al. 2022),
so that only the masking differs.

An encoder sees the visible noisy tokens alone. Before the decoder, every masked slot must be filled with
something, and what fills it is the whole difference between the methods:

    method   a masked slot is filled with      ratio  decoder           minimised              EMA network
    dit      (nothing is masked)               0      final layer only  denoise                -
    maskdit  one learned mask token            0.5    8 blocks x 512    denoise + reconstruct  -
    mdt      tokens that a side block makes    0.3    its last 2 blocks denoise, twice         -
    sddit    the noisy patch itself, embedded  0.2    8 blocks x 512    denoise + discriminate encoder, head
    mcdit    the clean patch itself, embedded  0.5    8 blocks x 512    clean + noise + 2 con  the decoder

The table `METHODS`, after the losses, has the same rows. A sixth method costs its parameters in
`Net.__init__` (named in `TRAINING_ONLY`), a branch in `Net.fill` if neither token nor patch fills its slots,
a loss, and a row.

Letters used for shapes:
    B images    C channels    H = W pixels a side    p patch side    P = p*p*C values a patch
    N = (H/p)^2 tokens    K visible ones    d encoder width    e decoder width (dd in some papers)
"""

import argparse
import copy
import hashlib
import math
import os
import pickle
import reprlib
import zipfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class BadInput(ValueError):
    """A user's mistake, told in one sentence. The scripts print the sentence and exit with status 2."""


# ------------------------------------------------------------------------------------------------ sizes

SIZES = {'T': (6, 160, 5), 'S': (12, 384, 6), 'B': (12, 768, 12), 'L': (24, 1024, 16), 'XL': (28, 1152, 16)}
PATCHES = (2, 4, 8)
DECODER = (8, 512, 16)                        # depth, width, heads: the same for S to XL, as in MaskDiT
TINY_DECODER = (2, 64, 2)                     # for T: XL/2's proportions, for laptops and tests


def parse_size(name):
    """'XL/2' -> ((depth, width, heads), (decoder depth, width, heads), patch). Raises BadInput."""
    size, _, patch = name.partition('/')
    if size not in SIZES or not patch.isdecimal() or int(patch) not in PATCHES:
        raise BadInput(f'--model {name} is not known: type one of {", ".join(SIZES)}, a slash, and a patch '
                       f'size of {", ".join(map(str, PATCHES))}, such as XL/2')
    return SIZES[size], TINY_DECODER if size == 'T' else DECODER, int(patch)


# --------------------------------------------------------------------------------- patches and positions

def patchify(x, p):
    """(B, C, H, W) -> (B, N, P). A patch is read by row, then column, then channel."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches, p, C):
    """(B, N, P) -> (B, C, H, W), the inverse of `patchify` for square images."""
    B, N, _ = patches.shape
    g = math.isqrt(N)
    return patches.reshape(B, g, g, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, g * p, g * p)


def take(tokens, index):
    """The tokens at `index`: (B, N, n), (B, K) -> (B, K, n)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def put(slots, index, tokens):
    """`slots` with `tokens` laid in at `index`: (B, N, n), (B, K), (B, K, n) -> (B, N, n)."""
    return slots.scatter(1, index[..., None].expand(-1, -1, slots.shape[-1]), tokens)


def visible_count(N, ratio):
    """K = int(N (1 - ratio) + 1e-9), the same for every image; 1e-9 because int(10 * (1 - 0.9)) is 0."""
    K = int(N * (1 - ratio) + 1e-9)
    if K < 1:
        raise BadInput(f'--mask-ratio {ratio} leaves none of the {N} tokens visible: use a smaller ratio or '
                       f'a smaller patch')
    return K


def position_table(g, width):
    """Fixed 2-D sine-cosine positions, (1, g*g, width): the column's half first, then the row's."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(g, dtype=torch.float64)[:, None] * omega             # (g, width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                       # (g, width/2)
    column, row = line.repeat(g, 1), line.repeat_interleave(g, dim=0)         # (g*g, width/2) each
    return torch.cat([column, row], dim=1)[None].float()


# ---------------------------------------------------------------------------------------- building blocks

def layer_norm(x):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)                  # no gain or bias: adaLN has them


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]                          # (B, N, n), (B, n), (B, n)


def keeping_inputs(function, *inputs):
    """function(*inputs), of which backward finds the inputs alone: it computes the rest once more."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing here draws


class Block(nn.Module):
    """A transformer block with adaLN-Zero: at initialisation every gate is zero and it is the identity.

    With `grid`, MDT's: attention gets a learned bias for each head and each offset between two tokens of a
    grid x grid image, and `forward` the `index` of every pair's offset, (N, N) or (B, K, K).
    """

    def __init__(self, width, heads, c_width, grid=None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(c_width, 6 * width)
        self.bias = nn.Parameter(torch.zeros((2 * grid - 1) ** 2, heads)) if grid else None

    def attention(self, x, index):
        B, N, n = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)    # (B, heads, N, ..)
        if index is not None and index.ndim == 3:             # B x heads x K x K biases: made again, not kept
            x = keeping_inputs(self.attend, q, k, v, index)
        else:
            x = self.attend(q, k, v, index)
        return self.proj(x.transpose(1, 2).reshape(B, N, n))

    def attend(self, q, k, v, index):
        bias = None
        if self.bias is not None:
            bias = functional.embedding(index, self.bias).to(q.dtype)         # (N, N, heads), or B of them
            bias = bias.movedim(-1, -3).contiguous()                          # or no fused kernel takes it
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)    # (B, heads, N, ..)

    def mlp(self, x):
        return self.fc2(functional.gelu(self.fc1(x), approximate='tanh'))

    def forward(self, x, c, index=None):
        modulation = self.modulation(functional.silu(c))                      # (B, 6 n)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attention(modulate(layer_norm(x), shift_a, scale_a), index)
        return x + gate_m[:, None] * self.mlp(modulate(layer_norm(x), shift_m, scale_m))


def through(blocks, tokens, c, index, checkpointed):
    for block in blocks:
        tokens = keeping_inputs(block, tokens, c, index) if checkpointed else block(tokens, c, index)
    return tokens                                                             # (B, N, n)


class ModulatedLinear(nn.Module):
    """LayerNorm, adaLN shift and scale, Linear: the bridge into the decoder, and the final layer."""

    def __init__(self, width, out, c_width):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.modulation = nn.Linear(c_width, 2 * width)

    def forward(self, x, c):
        shift, scale = self.modulation(functional.silu(c)).chunk(2, dim=1)
        return self.linear(modulate(layer_norm(x), shift, scale))


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> (B, d), through 256 sinusoids: cosines first, longest period 10000, no factor 1000."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(256, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, c_noise):
        frequency = torch.exp(torch.arange(128, device=c_noise.device, dtype=c_noise.dtype)
                              * (-math.log(10000) / 128))
        angle = c_noise[:, None] * frequency                                  # (B, 128)
        wave = torch.cat([angle.cos(), angle.sin()], dim=1)                   # (B, 256)
        return self.fc2(functional.silu(self.fc1(wave)))


class Head(nn.Module):
    """SD-DiT's projection head: tokens (.., d) -> cosines in [-1, 1] with K = 8192 prototypes, in float32."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 2048)
        self.fc2 = nn.Linear(2048, 2048)
        self.fc3 = nn.Linear(2048, 256)
        self.prototypes = nn.Parameter(torch.zeros(PROTOTYPES, 256))

    def forward(self, tokens):
        with torch.autocast('cuda' if tokens.is_cuda else 'cpu', enabled=False):         # bfloat16 gives NaN
            x = layer_norm(tokens.to(self.prototypes.dtype))
            x = self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(x)))))
            x, prototypes = functional.normalize(x, dim=-1), functional.normalize(self.prototypes, dim=-1)
            return functional.linear(x, prototypes)


# ------------------------------------------------------------------------------------------------ network

PROTOTYPES = 8192                             # SD-DiT's K
OWN_DECODER = 2                               # MDT: this many of the encoder's own blocks are its decoder


def relative_index(g, device='cpu'):
    """Which row of MDT's bias table belongs to query i and key j: (N, N), (dy + g-1)(2g-1) + (dx + g-1)."""
    at = torch.arange(g * g, device=device)
    dy, dx = (at[:, None] // g - at // g), (at[:, None] % g - at % g)
    return (dy + g - 1) * (2 * g - 1) + dx + g - 1


class Net(nn.Module):
    """F, the raw network inside the denoiser D of EDM eq. 7.

    `cfg` is a plain dictionary with `model` ('XL/2'), `method`, `stage` ('train' or 'tune'), `resolution`,
    `channels`, `classes` (0: unconditional), and `diffusion`: 'edm', or 'ddpm' for published weights. Only
    the parameters that the method uses are built, and tuning masks nothing, so it has none that fill a slot.
    `checkpoint_blocks` trades time for memory: backward computes each block again from its input.
    Raises BadInput for a resolution that the patch does not divide.
    """

    checkpoint_blocks = False

    def __init__(self, cfg):
        super().__init__()
        (depth, d, heads), (d_depth, e, d_heads), p = parse_size(cfg['model'])
        if cfg['resolution'] % p:
            raise BadInput(f'patches of {p} do not divide a picture of {cfg["resolution"]} x '
                           f'{cfg["resolution"]}: choose another patch in --model, or data of another size')
        method = METHODS[cfg['method']]
        own = method['decoder'] == 'own'                                 # MDT: no narrow decoder, but learned
        self.patch, self.channels = p, cfg['channels']                        # positions and biased attention
        self.grid, P = cfg['resolution'] // p, p * p * cfg['channels']
        if own:
            depth, d_depth, e, d_heads = depth - OWN_DECODER, OWN_DECODER, d, heads
        self.bias_grid = bias_grid = self.grid if own else None

        self.t_embed = NoiseEmbedding(d)
        self.y_embed = nn.Embedding(cfg['classes'] + 1, d) if cfg['classes'] else None    # last row: dropped
        self.patch_embed = nn.Linear(P, d)
        self.pos = nn.Parameter(position_table(self.grid, d), requires_grad=own)
        self.cls = nn.Parameter(torch.zeros(1, 1, d)) if cfg['method'] == 'sddit' else None
        self.blocks = nn.ModuleList(Block(d, heads, d, bias_grid) for _ in range(depth))

        self.bridge = ModulatedLinear(d, e, d) if method['decoder'] == 'narrow' else None
        if method['decoder']:
            self.decoder_pos = nn.Parameter(position_table(self.grid, e), requires_grad=own)
            self.decoder_blocks = nn.ModuleList(Block(e, d_heads, d, bias_grid) for _ in range(d_depth))
        self.outputs = self.channels * (2 if cfg['diffusion'] == 'ddpm' else 1)          # eps and a variance
        self.final = ModulatedLinear(e if method['decoder'] else d, p * p * self.outputs, d)

        fill = method['fill'] if cfg['stage'] == 'train' else None            # see TRAINING_ONLY
        if fill in ('token', 'side'):
            self.mask_token = nn.Parameter(torch.zeros(1, 1, e))
        if fill == 'side':
            self.side_block = Block(e, d_heads, d, bias_grid)
        if cfg['method'] == 'sddit' and cfg['stage'] == 'train':
            self.head = Head(d)
        initialise(self)
        if self.bridge is not None and cfg.get('bridge', 'zero') == 'zero':
            nn.init.zeros_(self.bridge.linear.weight)                         # MaskDiT's code

    @property
    def relative(self):
        """`relative_index` for MDT, else None. No buffer: DistributedDataParallel would write into it."""
        return relative_index(self.bias_grid, self.pos.device) if self.bias_grid else None

    def condition(self, c_noise, y):
        c = self.t_embed(c_noise)                                             # (B, d)
        return c if self.y_embed is None else c + self.y_embed(y)             # (B, d)

    def encode(self, patches, c, visible=None):
        """The visible tokens of noisy patches (B, N, P), encoded: (B, K, d); SD-DiT (B, 1 + K, d)."""
        pos = self.pos.expand(len(patches), -1, -1)                           # (B, N, d)
        index = getattr(self, 'relative', None)                               # (N, N)
        if visible is not None:
            patches, pos = take(patches, visible), take(pos, visible)         # (B, K, P), (B, K, d)
            index = None if index is None else index[visible[:, :, None], visible[:, None, :]]    # (B, K, K)
        tokens = self.patch_embed(patches) + pos                              # (B, K, d)
        if self.cls is not None:                                              # SD-DiT's [CLS]: never masked
            tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1)    # (B, 1 + K, d)
        return through(self.blocks, tokens, c, index, self.checkpoint_blocks)    # (B, K, d)

    def fill(self, tokens, visible, patches, c, gains=(1.0, 1.0)):
        """All N tokens of the decoder, positions added: `tokens` (B, K, d) where visible, elsewhere what the
        method puts there. `visible` None: nothing is masked."""
        N = self.grid ** 2
        token = hasattr(self, 'mask_token')
        masked = visible is not None
        if masked and not token:                                              # sddit, mcdit: at width d
            slots = self.patch_embed(patches) + self.pos                      # (B, N, d)
            tokens = put(slots.to(tokens.dtype), visible, tokens)             # (B, N, d)
        if self.bridge is not None:
            tokens = self.bridge(tokens, c)                                   # (B, N, e), maskdit (B, K, e)
        if masked and not token:
            gain = tokens.new_full((len(tokens), N, 1), gains[1])
            gain = put(gain, visible, tokens.new_full((len(tokens), visible.shape[1], 1), gains[0]))
            tokens = gain * tokens
        if token and (masked or not hasattr(self, 'side_block')):             # unmasked steps keep it in the graph
            if not masked:
                visible = torch.arange(N, device=tokens.device).expand(len(tokens), -1)
            slots = self.mask_token.expand(len(tokens), N, -1)                # (B, N, e)
            tokens = put(slots.to(tokens.dtype), visible, tokens)             # (B, N, e)
        slots = tokens + self.decoder_pos                                     # (B, N, e)
        if masked and hasattr(self, 'side_block'):                            # MDT's side-interpolater
            made = through([self.side_block], slots, c, self.relative, self.checkpoint_blocks)
            slots = put(made, visible, take(slots, visible).to(made.dtype))   # shortcut: visible ones stay
        return slots

    def decode(self, tokens, c):
        """Filled tokens (B, N, e) -> values (B, N, P)."""
        index = getattr(self, 'relative', None)                               # (N, N); EMADecoder has none
        tokens = through(self.decoder_blocks, tokens, c, index, self.checkpoint_blocks)  # (B, N, e)
        return self.final(tokens, c)                                          # (B, N, P)

    def forward(self, x, c_noise, y=None, visible=None, patches=None, gains=(1.0, 1.0)):
        """F (B, C, H, W) in at least float32, the conditioning c (B, d), SD-DiT's logits (B, 1 + K, 8192).

        x         (B, C, H, W)  the noisy image, already scaled by c_in; None: c is all that is asked for
        c_noise   (B,)          ln(sigma) / 4
        y         (B,)          labels; the number `classes` means dropped
        visible   (B, K)        indices of the visible tokens; None: all of them
        patches   (B, N, P)     what `fill` may embed into the masked slots
        gains     two factors   on the encoder's tokens and the filled ones, at the decoder's door
        """
        c = self.condition(c_noise.to(self.pos.dtype), y)                     # (B, d)
        if x is None:
            return None, c, None
        tokens = self.encode(patchify(x.to(self.pos.dtype), self.patch), c, visible)     # (B, K, d)
        logits = self.head(tokens) if hasattr(self, 'head') and visible is not None else None
        if self.cls is not None:
            tokens = tokens[:, 1:]                                            # (B, K, d)
        if hasattr(self, 'decoder_blocks'):
            values = self.decode(self.fill(tokens, visible, patches, c, gains), c)       # (B, N, P)
        else:
            values = self.final(tokens, c)                                    # (B, N, P)
        return unpatchify(values, self.patch, self.outputs).to(self.pos.dtype), c, logits


TRAINING_ONLY = ('mask_token', 'side_block.', 'head.')     # name prefixes; tuning and sampling
                                                                              # have no slot to fill


def initialise(net):
    """DiT's: Xavier-uniform weights, zero biases, embeddings N(0, 0.02^2), zero gates and output."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    small = [net.t_embed.fc1.weight, net.t_embed.fc2.weight]
    small += [net.y_embed.weight] if net.y_embed is not None else []
    small += [p for name, p in net.named_parameters()
              if name in ('mask_token', 'cls', 'head.prototypes') or name.endswith('.bias') and p.ndim == 2]
    for weight in small:
        nn.init.normal_(weight, std=0.02)
    for name, module in net.named_modules():
        if name.endswith('modulation') or name == 'final.linear':          # adaLN-Zero: every block starts as
            nn.init.zeros_(module.weight)                                     # the identity, and F as zero


class EMADecoder(nn.Module):
    """MC-DiT's branch network: an EMA copy of the decoder that is fed embedded patches, not encoder tokens.

    The paper draws two of them, for noisy and for clean patches. They start equal and are updated alike, so
    they stay equal for ever: one copy, run once on a batch of 2B, is both (786 M parameters in the paper's
    table = 730 M + one decoder). Its parameters have the names they have in `Net`.
    """

    def __init__(self, net):
        super().__init__()
        self.patch, self.channels = net.patch, net.channels
        self.patch_embed = copy.deepcopy(net.patch_embed)
        self.bridge = copy.deepcopy(net.bridge)
        self.register_buffer('pos', net.pos.detach().clone(), persistent=False)
        self.decoder_blocks = copy.deepcopy(net.decoder_blocks)
        self.final = copy.deepcopy(net.final)
        self.register_buffer('decoder_pos', net.decoder_pos.detach().clone(), persistent=False)

    decode, checkpoint_blocks = Net.decode, False

    def forward(self, x, c):
        """F_ema (B, C, H, W) of an image whose every token is embedded and none encoded."""
        tokens = self.patch_embed(patchify(x, self.patch)) + self.pos         # (B, N, d)
        tokens = self.bridge(tokens, c) + self.decoder_pos                    # (B, N, e)
        values = self.decode(tokens, c)                                       # (B, N, P)
        return unpatchify(values, self.patch, self.channels).to(self.decoder_pos.dtype)


class EMAEncoder(nn.Module):
    """SD-DiT's teacher: an EMA copy of the encoder and the head, and the centers of what it says.

    Each center follows the teacher's mean logits, over the batches of all processes, once an optimizer step.
    """

    def __init__(self, net):
        super().__init__()
        self.patch = net.patch
        for name in ('t_embed', 'y_embed', 'patch_embed', 'pos', 'cls', 'blocks', 'head'):
            setattr(self, name, copy.deepcopy(getattr(net, name)))
        self.register_buffer('centers', torch.zeros(2, PROTOTYPES))           # of [CLS], of patches
        self.register_buffer('seen', torch.zeros(2, PROTOTYPES), persistent=False)   # since the last update
        self.calls = 0

    condition, encode, checkpoint_blocks = Net.condition, Net.encode, False

    def forward(self, x, c_noise, y):
        """Logits (B, 1 + N, 8192) of images that hide nothing; their means are remembered for the centers."""
        x, c_noise = x.to(self.pos.dtype), c_noise.to(self.pos.dtype)
        logits = self.head(self.encode(patchify(x, self.patch), self.condition(c_noise, y)))
        self.seen += torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))])
        self.calls += 1
        return logits

    @torch.no_grad()
    def update_centers(self, ok=None):
        mean = self.seen / self.calls
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        if ok is not None:
            mean = torch.where(ok, mean, self.centers)                        # what was seen may be infinite
        self.centers.lerp_(mean, 1 - CENTER_MOMENTUM)
        self.seen.zero_()
        self.calls = 0


def compile_blocks(net):
    """Compile each block of a network or a teacher in its place, for one graph a shape: blocks of the same
    shapes share it. Names of parameters stay, and a copy of the network is not compiled."""
    torch._dynamo.config.optimize_ddp = False     # or DistributedDataParallel has each block cut in pieces
    for module in net.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


def make_teacher(net, cfg):
    """The second shadow of `net` that the method's loss consults, or None. No gradient ever reaches it."""
    teacher = None
    if cfg['stage'] == 'train' and cfg['method'] == 'sddit':
        teacher = EMAEncoder(net)
    elif cfg['stage'] == 'train' and cfg['method'] == 'mcdit' and (cfg['lambda_con1'] or cfg['lambda_con2']):
        if cfg['teacher_encoder']:                                            # MC-DiT Table 12
            teacher = copy.deepcopy(net)
        else:
            teacher = EMADecoder(net)
    return teacher if teacher is None else teacher.requires_grad_(False).to(net.pos.device)


def update_teacher(teacher, net, step, cfg, ok=None):
    """What follows the optimizer's step number `step`, counted from 0. If that was skipped, which `ok` says
    as for `update_ema`, nothing changes and what the teacher has seen is forgotten."""
    decay = BRANCH_DECAY
    if cfg['method'] == 'sddit':
        decay = teacher_momentum(step / cfg['steps'])
        teacher.update_centers(ok)
    update_ema(teacher, net, decay, ok)


@torch.no_grad()
def update_ema(shadow, net, decay, ok=None):
    """shadow <- decay * shadow + (1 - decay) * net, for every parameter that the shadow has.

    `ok` () bool, a tensor: if it is False the shadow stays as it is, and nobody waits for the device to
    learn which.
    """
    source = dict(net.named_parameters())
    names, values = zip(*shadow.named_parameters())
    weight = 1 - decay
    if ok is not None:                                     # on CUDA a launch for each, at a cost not measured
        weight = [ok.to(values[0].dtype) * weight] * len(values)
    torch._foreach_lerp_(list(values), [source[name] for name in names], weight)


def ema_decay(step, decay=0.9999):
    """Decay of the sampling weights: short while the network still changes fast."""
    return min(decay, (1 + step) / (10 + step))


BRANCH_DECAY = 0.999                          # MC-DiT's EMA decoder
CENTER_MOMENTUM = 0.9                         # SD-DiT's centers


def teacher_momentum(progress):
    """SD-DiT's teacher: from 0.996 to 0.999 by a cosine as progress goes from 0 to 1."""
    return 0.999 - 0.003 * (1 + math.cos(math.pi * progress)) / 2


# -------------------------------------------------------------------------------------------- EDM, Table 1

P_MEAN, P_STD = -1.2, 1.2                     # ln sigma ~ N(P_mean, P_std^2)
LABEL_DROPOUT = 0.1
MASKDIT_LAMBDA = 0.1                          # weight of MaskDiT's reconstruction


def precondition(sigma, sd):
    """c_skip, c_out, c_in (B, 1, 1, 1) and c_noise (B,) for noise levels sigma (B,). EDM Table 1."""
    s = sigma.view(-1, 1, 1, 1)
    c_skip = sd ** 2 / (s ** 2 + sd ** 2)
    c_out = s * sd / (s ** 2 + sd ** 2).sqrt()
    c_in = 1 / (s ** 2 + sd ** 2).sqrt()
    return c_skip, c_out, c_in, sigma.log() / 4


def unmasked_step(cfg, step):
    """Whether nothing is masked in this step: a function of (seed, step) alone."""
    share = cfg.get('unmasked', 0.0)
    return bool(share) and torch.rand((), generator=generator('cpu', cfg['seed'], step, 'unmasked')).item() < share


def loss_weight(sigma, sd):
    """lambda(sigma) = 1 / c_out^2, (B, 1, 1, 1)."""
    s = sigma.view(-1, 1, 1, 1)
    return (s ** 2 + sd ** 2) / (s * sd) ** 2


def denoise(net, x, sigma, y, cfg, visible=None, patches=None):
    """D(x; sigma), an estimate of the clean image. EDM eq. 7. By default every token is visible: inference.

    x (B, C, H, W), sigma (B,), y (B,); the result has the precision of x. Networks published under DDPM
    predict eps and a variance: D = x - sigma eps(x / sqrt(sigma^2 + 1), t(sigma)), EDM Table 1, column VP.
    """
    if cfg['diffusion'] == 'ddpm':
        s = sigma.view(-1, 1, 1, 1)
        eps = net(x / (s ** 2 + 1).sqrt(), ddpm_time(sigma), y, visible, patches)[0][:, :x.shape[1]]
        return x - s * eps
    c_skip, c_out, c_in, c_noise = precondition(sigma, cfg['sigma_data'])
    F, *_ = net(c_in * x, c_noise, y, visible, patches)
    return c_skip * x + c_out * F


def ddpm_sigmas(device='cpu'):
    """sqrt((1 - abar) / abar) of each of DDPM's 1000 linear steps: float64 (1000,), 0.0100005 to 157.407."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=device)).cumprod(0)
    return ((1 - abar) / abar).sqrt()


def ddpm_time(sigma):
    """t(sigma) in 0..999 for noise levels (B,), linear in ln sigma between the steps."""
    steps = ddpm_sigmas(sigma.device).log()                                   # a copy would wait for the GPU
    s = sigma.double().log().clamp(steps[0], steps[-1])
    i = torch.searchsorted(steps, s).clamp(1, 999)
    return (i - 1 + (s - steps[i - 1]) / (steps[i] - steps[i - 1])).to(sigma.dtype)


def sigma_range(cfg):
    """The sampler's sigma_min and sigma_max: EDM Table 1, or the ends of DDPM's schedule."""
    return (0.002, 80.0) if cfg['diffusion'] == 'edm' else (ddpm_sigmas()[0].item(), ddpm_sigmas()[-1].item())


# ---------------------------------------------------------------------------- the random numbers of a step

def generator(device, *key):
    """A torch.Generator that is a function of `key` (numbers and strings) and of nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'little'))


def draw(cfg, step, batch, device='cpu'):
    """Every random number that the loss of one step needs, for the whole global batch.

    They depend on (seed, step, purpose) alone: processes and micro-batches slice their rows, so that any
    number of them sees the same numbers, and a step can be repeated after a restart.

    sigma (B,)    noise    noise (B, C, H, W) of unit variance    drop (B,) bool: forget the label
    order (B, N)  a permutation of the tokens; its first K are visible
    noise2, drop2 where the method's row of METHODS says so     progress (B,)  step / steps, in every row
    """
    def rng(purpose):
        return generator(device, cfg['seed'], step, purpose)

    C, H, p = cfg['channels'], cfg['resolution'], parse_size(cfg['model'])[2]
    normal = torch.randn(batch, generator=rng('sigma'), device=device)
    draws = {'sigma': (P_MEAN + P_STD * normal).exp(),
             'order': torch.rand(batch, (H // p) ** 2, generator=rng('order'), device=device).argsort(1),
             'progress': torch.full((batch,), step / cfg['steps'], device=device)}
    for name in ('noise', 'drop', *(METHODS[cfg['method']]['draws'] if cfg['stage'] == 'train' else ())):
        if name.startswith('noise'):
            draws[name] = torch.randn(batch, C, H, H, generator=rng(name), device=device)
        else:
            draws[name] = torch.rand(batch, generator=rng(name), device=device) < LABEL_DROPOUT
    return draws


# ---------------------------------------------------------------------------------------------- the losses
#
# One signature: loss(net, teacher, x, y, draws, cfg) -> (loss, parts). x (B, C, H, W) clean images, y (B,)
# labels, draws as above with B rows. `parts` are detached numbers for the log. The net may be wrapped by
# DistributedDataParallel, so it is only ever called.

def drop_labels(y, draws, cfg, again=''):
    return torch.where(draws['drop' + again], cfg['classes'], y)


def split_tokens(draws, cfg):
    """Indices of the visible (B, K) and the masked tokens (B, N - K)."""
    K = visible_count(draws['order'].shape[1], cfg['mask_ratio'])
    return draws['order'][:, :K], draws['order'][:, K:]


def mean_over(e, index, p):
    """Mean of e (B, C, H, W) over the tokens at `index` (B, K): METHOD's vis(e) and msk(e)."""
    return take(patchify(e, p), index).mean()


def dit_loss(net, teacher, x0, y, draws, cfg):
    """w (D(xt) - x0)^2, over all tokens. EDM eq. 8; also what unmasked tuning minimises."""
    sigma, sd = draws['sigma'], cfg['sigma_data']
    xt = x0 + sigma.view(-1, 1, 1, 1) * draws['noise']
    D = denoise(net, xt, sigma, drop_labels(y, draws, cfg), cfg)
    loss = (loss_weight(sigma, sd) * (D - x0) ** 2).mean()
    return loss, {'denoise': loss.detach()}


def patch_norm(x, p):
    """Each patch of x (B, C, H, W) with zero mean and unit (unbiased) variance."""
    patches = patchify(x, p)
    patches = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    return unpatchify(patches, p, x.shape[1])


def maskdit_loss(net, teacher, x0, y, draws, cfg):
    """Denoise the visible tokens; reconstruct the noisy masked ones, each patch normalised."""
    sigma, sd, p = draws['sigma'], cfg['sigma_data'], parse_size(cfg['model'])[2]
    visible, masked = split_tokens(draws, cfg)
    xt = x0 + sigma.view(-1, 1, 1, 1) * draws['noise']
    D = denoise(net, xt, sigma, drop_labels(y, draws, cfg), cfg, visible)
    denoised = mean_over(loss_weight(sigma, sd) * (D - x0) ** 2, visible, p)
    rebuilt = mean_over((D - patch_norm(xt, p)) ** 2, masked, p)              # without w, as published
    loss = denoised + MASKDIT_LAMBDA * rebuilt
    return loss, {'denoise': denoised.detach(), 'reconstruct': rebuilt.detach()}


def mdt_loss(net, teacher, x0, y, draws, cfg):
    """DiT's loss over all tokens, twice: nothing masked, then masked. The same images and noise levels, other
    noise and other dropped labels. MDT section 4.4, under EDM."""
    sigma, sd = draws['sigma'], cfg['sigma_data']
    visible, _ = split_tokens(draws, cfg)
    parts = {}
    for name, again, seen in (('full', '', None), ('masked', '2', visible)):
        xt = x0 + sigma.view(-1, 1, 1, 1) * draws['noise' + again]
        D = denoise(net, xt, sigma, drop_labels(y, draws, cfg, again), cfg, seen)
        parts[name] = (loss_weight(sigma, sd) * (D - x0) ** 2).mean()
    return parts['full'] + parts['masked'], {name: part.detach() for name, part in parts.items()}


TEACHER_SIGMA = 0.002                         # SD-DiT: the teacher sees nearly clean images
STUDENT_TEMPERATURE = 0.1


def teacher_temperature(progress):
    """From 0.04 to 0.07 over the first tenth of training."""
    return 0.04 + 0.03 * (progress / 0.1).clamp(max=1)


def cross_entropy(logits, said, temperature):
    """H(P_T, P_S) and H(P_T) for each token, (.., K) -> (..): the student's logits against what the teacher
    said. SD-DiT eq. 11. `temperature` is the teacher's, and broadcasts."""
    log_P = (said / temperature).log_softmax(-1)
    crossed = -(log_P.exp() * (logits / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1)
    return crossed, -(log_P.exp() * log_P).sum(-1)


def sddit_loss(net, teacher, x0, y, draws, cfg):
    """L_G, DiT's loss over all tokens, and L_D, which asks the student's visible tokens and [CLS] to say what
    the teacher says of the nearly clean image. SD-DiT eq. 9 to 12."""
    sigma, sd, p = draws['sigma'], cfg['sigma_data'], parse_size(cfg['model'])[2]
    visible, _ = split_tokens(draws, cfg)
    c_skip, c_out, c_in, c_noise = precondition(sigma, sd)
    y = drop_labels(y, draws, cfg)
    xt = x0 + sigma.view(-1, 1, 1, 1) * draws['noise']
    F, _, logits = net(c_in * xt, c_noise, y, visible, patchify(c_in * xt, p))
    D = c_skip * xt + c_out * F
    generate = (loss_weight(sigma, sd) * (D - x0) ** 2).mean()

    with torch.no_grad():
        _, _, c_in, c_noise = precondition(torch.full_like(sigma, TEACHER_SIGMA), sd)
        centers = teacher.centers.clone()                                     # those of the steps before
        said = teacher(c_in * (x0 + TEACHER_SIGMA * draws['noise2']), c_noise, y)        # (B, 1 + N, 8192)
        said = torch.cat([said[:, :1] - centers[0], take(said[:, 1:], visible) - centers[1]], dim=1)
    crossed, entropy = cross_entropy(logits, said, teacher_temperature(draws['progress']).view(-1, 1, 1))
    discriminate = crossed[:, 0].mean() + crossed[:, 1:].mean()               # [CLS] + patches, eq. 12
    parts = {'generate': generate, 'discriminate': discriminate,            # a collapsed teacher shows in the
             'teacher_entropy': entropy[:, 1:].mean(),                     # entropy: ln 8192 = 9.01 or 0, and
             'kl': (crossed - entropy)[:, 1:].mean()}                         # in a kl of 0
    return generate + discriminate, {name: part.detach() for name, part in parts.items()}


TOKEN_GAINS = {'both': (1.0, 1.0), 'noisy': (1.0, 0.0), 'clean': (0.0, 1.0)}  # MC-DiT Table 10


def mcdit_branches(net, teacher, x0, y, draws, cfg):
    """What the EMA decoder makes of the image if every patch of it is noisy, and if every patch is clean:
    D_noisy and D_clean (B, C, H, W) under the names of their losses. One pass makes both."""
    sigma, sd = draws['sigma'], cfg['sigma_data']
    c_skip, c_out, c_in, c_noise = precondition(sigma, sd)
    y = drop_labels(y, draws, cfg)
    xt = x0 + sigma.view(-1, 1, 1, 1) * draws['noise']
    uses = [(name, x) for name, x in (('con1', xt), ('con2', x0)) if cfg['lambda_' + name]]
    if not uses:
        return {}
    inputs = torch.cat([c_in * x if name == 'con1' else x / sd for name, x in uses])    # (2B, C, H, W)
    if cfg['teacher_encoder']:
        with torch.no_grad():
            F, *_ = teacher(inputs, c_noise.repeat(len(uses)), y.repeat(len(uses)))
    else:
        c = net(None, c_noise, y)[1].detach()                          # no_grad could leave autocast with
        with torch.no_grad():                                          # casts that the main branch reuses
            F = teacher(inputs, c.repeat(len(uses), 1))                # and that have no graph
    return {name: c_skip * x + c_out * F_ema for (name, x), F_ema in zip(uses, F.chunk(len(uses)))}


def mcdit_student(net, x0, y, draws, cfg, gains):
    """What the main branch makes of the mixed image, with what it was made from.

    D_theta (B, C, H, W), the noisy image xt, and (visible, masked).
    """
    sigma, sd, p = draws['sigma'], cfg['sigma_data'], parse_size(cfg['model'])[2]
    visible, masked = split_tokens(draws, cfg)
    c_skip, c_out, c_in, c_noise = precondition(sigma, sd)
    y = drop_labels(y, draws, cfg)
    xt = x0 + sigma.view(-1, 1, 1, 1) * draws['noise']
    x_in = unpatchify(put(patchify(x0, p), visible, take(patchify(xt, p), visible)), p, x0.shape[1])
    F, *_ = net(c_in * xt, c_noise, y, visible, patchify(x0 / sd, p), gains)  # 1/sd is c_in at sigma = 0
    return c_skip * x_in + c_out * F, xt, (visible, masked)


def mcdit_loss(net, teacher, x0, y, draws, cfg):
    """Clean-to-clean reconstruction, kept from collapsing by two uses of the EMA decoder. MC-DiT eq. 8-12."""
    p = parse_size(cfg['model'])[2]
    w = loss_weight(draws['sigma'], cfg['sigma_data'])
    branches = mcdit_branches(net, teacher, x0, y, draws, cfg)                # while memory is empty: first
    D, xt, (visible, masked) = mcdit_student(net, x0, y, draws, cfg, TOKEN_GAINS[cfg['tokens']])

    clean = mean_over(w * (D - x0) ** 2, visible, p)                          # eq. 8
    parts = {'clean': clean}
    if cfg['all_clean']:                                                      # Table 6, its third row
        loss = (w * (D - x0) ** 2).mean()
    elif cfg['lambda_noise']:
        parts['noise'] = mean_over((D - xt) ** 2, masked, p)                  # eq. 9
        parts['noise_above_floor'] = parts['noise'] - mean_over((xt - x0) ** 2, masked, p)
        loss = clean + cfg['lambda_noise'] * parts['noise']                # nobody sees n there: E[n^2] stays
    else:
        loss = clean

    for name, D_ema in branches.items():
        parts[name] = mean_over(w * (D - D_ema) ** 2, visible, p)             # eq. 10, 11
        loss = loss + cfg['lambda_' + name] * parts[name]                     # eq. 12
    return loss, {name: part.detach() for name, part in parts.items()}


@torch.no_grad()
def collapse(net, x0, y, draws, cfg):
    """How much of the visible output rests on the encoder, and how much on the clean patches.

    Sums of squares on the visible tokens, for rms(D - D_zeroed) / rms(D): a dictionary of scalars `output`
    and, for what changes where one is zeroed, `encoder` and `patches`. A decoder that has learnt to
    read the clean patches and ignore the encoder shows as `encoder` near 0.
    """
    p, gains = parse_size(cfg['model'])[2], TOKEN_GAINS[cfg['tokens']]
    D, _, (visible, _) = mcdit_student(net, x0, y, draws, cfg, gains)
    sums = {'output': take(patchify(D ** 2, p), visible).sum()}
    for name, gains in (('encoder', (0.0, gains[1])), ('patches', (gains[0], 0.0))):
        D_zeroed = mcdit_student(net, x0, y, draws, cfg, gains)[0]
        sums[name] = take(patchify((D - D_zeroed) ** 2, p), visible).sum()
    return sums


METHODS = {
    'dit': dict(fill=None, decoder=None, loss=dit_loss, draws=(),
                defaults=dict(mask_ratio=0.0, lr=1e-4)),
    'maskdit': dict(fill='token', decoder='narrow', loss=maskdit_loss, draws=(),
                    defaults=dict(mask_ratio=0.5, lr=1e-4, bridge='zero', unmasked=0.0)),
    'mdt': dict(fill='side', decoder='own', loss=mdt_loss, draws=('noise2', 'drop2'),
                defaults=dict(mask_ratio=0.3, lr=3e-4)),
    'sddit': dict(fill='noisy', decoder='narrow', loss=sddit_loss, draws=('noise2',),
                  defaults=dict(mask_ratio=0.2, lr=1e-4, bridge='zero')),
    'mcdit': dict(fill='clean', decoder='narrow', loss=mcdit_loss, draws=(),
                  defaults=dict(mask_ratio=0.5, lr=1e-4, lambda_noise=0.1, lambda_con1=0.1, lambda_con2=0.05,
                                tokens='both', all_clean=False, teacher_encoder=False,
                                bridge='zero', unmasked=0.0)),
}


# ------------------------------------------------------------------- reading checkpoints, ours and published

def read_checkpoint(path):
    """The dictionary in a checkpoint: `ema`, `step`, `config`, and where training left them `model`,
    `teacher`, `opt`, `loss_scale`. Published weights of MaskDiT, DiT and MDT are translated. Never runs code
    from the file. Raises BadInput with what is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.compress_type for part in parts) \
                    or sum(part.file_size for part in parts) > os.path.getsize(path):
                raise BadInput(f'{path} unpacks to more than its size, and torch packs nothing: it is '
                               f'damaged, or made to fill the memory')
            broken = archive.testzip()           # torch.load sees no flipped byte; the archive's CRC-32s do
        if broken:
            raise BadInput(f'{path} is damaged: its part {broken} does not match its checksum')
        with torch.serialization.safe_globals([argparse.Namespace]):       # DiT and MaskDiT keep their `args`
            state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)    # 11 GB at XL
    except FileNotFoundError:
        raise BadInput(f'there is no checkpoint {path}: give a file such as out/0010000.pt') from None
    except OSError as error:
        raise BadInput(f'{path} cannot be read: {error.strerror or error}') from None
    except BadInput:
        raise
    except pickle.UnpicklingError:
        raise BadInput(f'{path} is no checkpoint, or damaged, or opening it would run code from the file: it '
                       f'holds more than tensors and plain values') from None
    except Exception as error:                                         # what torch raises here has many types
        raise BadInput(f'{path} is not a checkpoint or is truncated ({type(error).__name__})') from None
    if not (isinstance(state, dict) and {'ema', 'step', 'config'} <= state.keys()):
        try:
            state = translate(state)
        except Exception as error:                                            # strange tensors raise anything
            why = error if isinstance(error, BadInput) else type(error).__name__
            raise BadInput(f'{path} is not a checkpoint of train.py or finetune.py, nor of another program '
                           f'that is known here: {why}') from None
    wrong = mistaken(state['step'], state['config'])
    if wrong:
        raise BadInput(f'{path} is not a checkpoint that train.py or finetune.py wrote: its {wrong}')
    return state


SIGMA_DATA = 1e-3, 1e3                        # least and greatest


def one_of(*words):
    return lambda value: type(value) is str and value in words


def whole(low, high):
    return lambda value: type(value) is int and low <= value <= high


CONFIG = {                                    # what all rely on; a file from elsewhere may say anything
    'stage': one_of('train', 'tune'),
    'method': one_of(*METHODS),
    'model': lambda value: type(value) is str,
    'diffusion': one_of('edm', 'ddpm'),
    'data': lambda value: value is None or type(value) is str,
    'resolution': whole(1, 10_000),
    'channels': whole(1, 10_000),
    'classes': whole(0, 1_000_000),
    'class_names': lambda value: type(value) is list and all(map(str.isprintable, value)),
    'sigma_data': lambda value: type(value) in (int, float) and SIGMA_DATA[0] <= value <= SIGMA_DATA[1],
    'ema_step': whole(0, 2 ** 53),
    'seed': whole(0, 2 ** 63 - 1)}


def mistaken(step, cfg):
    """What is wrong with a checkpoint's step and configuration, in words, or None."""
    if not whole(0, 2 ** 53)(step) or not isinstance(cfg, dict):
        return f'step is {reprlib.repr(step)} and its configuration a {type(cfg).__name__}'
    for name, value in cfg.items():
        words = type(value) is list and all(type(part) is str for part in value)
        plain = words or value is None or type(value) in (str, int, float, bool)
        if type(name) is not str or not plain or name in CONFIG and not CONFIG[name](value):
            return f'configuration has {reprlib.repr(name)}: {reprlib.repr(value)}'
    lacks = [name for name in CONFIG if name not in cfg and name != 'seed']   # published weights have no seed
    if lacks:
        return f'configuration does not say {lacks[0]}'
    if len(cfg['class_names']) not in (0, cfg['classes']):
        return f'configuration names {len(cfg["class_names"])} of {cfg["classes"]} classes'
    return None


def load_net(path, device='cpu'):
    """(net, cfg) for inference from the EMA weights of a checkpoint. Raises BadInput."""
    state = read_checkpoint(path)
    net = empty_net(state, path)
    net.load_state_dict(state['ema'])
    return net.to(device).eval().requires_grad_(False), state['config']


def empty_net(state, path):
    """The network of what `read_checkpoint` gave, its memory not yet written. Raises BadInput if the weights
    there do not fit it."""
    cfg = state['config']
    (_, d, _), _, p = parse_size(cfg['model'])
    largest = d * max((cfg['resolution'] // p) ** 2, p * p * cfg['channels'], cfg['classes'])
    if 2 * largest > os.path.getsize(path):                               # before anything so large is made
        raise BadInput(f'{path} has a configuration of {largest:,} numbers in one table alone, and '
                       f'{os.path.getsize(path):,} bytes: it is damaged, or made to fill the memory')
    with torch.device('meta'):                                                # no random numbers for nothing
        net = Net(cfg)
    net.to_empty(device='cpu')
    for name in ('ema', 'model'):
        wrong = differences(state[name], net.state_dict()) if name in state else None
        if wrong:
            raise BadInput(f'{path} has weights that do not fit its own configuration: of the tensors in '
                           f'`{name}` there are {wrong}')
    return net


def differences(found, wanted):
    """How named tensors differ from those wanted, in words, or None."""
    if not isinstance(found, dict):
        return 'none at all'
    lacks, more = [k for k in wanted if k not in found], [k for k in found if k not in wanted]
    odd = [k for k in wanted if k in found and not alike(found[k], wanted[k])]
    return '; '.join(f'{len(keys)} {what}, such as {" ".join(str(keys[0])[:99].split())}' for what, keys in
                     (('missing', lacks), ('too many', more), ('of other shapes', odd)) if keys) or None


def alike(found, wanted):
    """Whether `found` is a tensor of numbers in the shape of `wanted`, every one of them in the file."""
    return (isinstance(found, torch.Tensor) and found.is_floating_point() and found.shape == wanted.shape
            and found.layout == torch.strided and found.device.type in ('cpu', wanted.device.type)
            and found.nbytes <= found.untyped_storage().nbytes())


LONG_AGO = 1_000_000                          # the step of published weights: long past the EMA's warm-up
OFFICIAL_NAMES = (                            # theirs, ours; applied in this order
    ('x_embedder.proj.', 'patch_embed.'),
    ('t_embedder.mlp.0.', 't_embed.fc1.'),
    ('t_embedder.mlp.2.', 't_embed.fc2.'),
    ('y_embedder.embedding_table.', 'y_embed.'),
    ('decoder_pos_embed', 'decoder_pos'),
    ('pos_embed', 'pos'),
    ('decoder_layer.', 'bridge.'),
    ('final_layer.', 'final.'),
    ('sideblocks.0.', 'side_block.'),
    ('adaLN_modulation.1.', 'modulation.'),
    ('.mlp.fc', '.fc'),
    ('.attn.rel_pos_bias.relative_position_bias_table', '.bias'),
    ('.attn.', '.'))


def translate(state):
    """A published file's content as a checkpoint of ours. Raises BadInput: the nearest match, and why."""
    flat = state if isinstance(state, dict) else {}
    both = {name: flat[name] for name in ('ema', 'model') if isinstance(flat.get(name), dict)}
    both = both or {'ema': flat}                                              # or the weights alone
    both = {name: {strip(key): value for key, value in weights.items()
                   if isinstance(key, str) and isinstance(value, torch.Tensor)}
            for name, weights in both.items()}
    weights = both.get('ema') or both.get('model') or {}
    if any(key.startswith('en_inblocks.') for key in weights):
        raise BadInput('it is MDT version 2, another network; version 1 (mdt_xl2_v1_ckpt.pt) is known')
    try:
        cfg = recognise(weights)
    except BadInput:
        raise
    except (KeyError, ValueError, AttributeError):
        found = ', '.join(list(weights)[:3]) or 'none'
        raise BadInput(f'expected the tensors of MaskDiT, DiT or MDT version 1, x_embedder.proj.weight '
                       f'and blocks.0.attn.qkv.weight, and found {found}') from None
    with torch.device('meta'):
        wanted = Net(cfg).state_dict()
    for name, theirs in both.items():
        both[name] = to_our_names(theirs, cfg)
        wrong = differences(both[name], wanted)
        if wrong:
            raise BadInput(f'the nearest match is {cfg["method"]} {cfg["model"]}, but of the tensors there '
                           f'are {wrong} (in the names of model.py)')
    both.setdefault('model', both.get('ema'))
    return {'model': both['model'], 'ema': both.get('ema', both['model']), 'step': LONG_AGO, 'config': cfg}


def strip(key):
    """A tensor's name without what wrappers put before it."""
    key = key.replace('module.', '').replace('_orig_mod.', '')
    return key.removeprefix('model.')


def recognise(weights):
    """The configuration that published weights were made with, from their names and shapes.

    Raises KeyError, ValueError or AttributeError where they do not look alike, BadInput for an odd size."""
    D, C, p, _ = weights['x_embedder.proj.weight'].shape
    depth = 1 + max(int(key.split('.')[1]) for key in weights if key.startswith('blocks.'))
    method = 'maskdit' if 'decoder_pos_embed' in weights and 'decoder_layer.linear.weight' in weights else \
        'mdt' if 'sideblocks.0.attn.qkv.weight' in weights else 'dit'
    size = next((name for name, (d, w, _) in SIZES.items() if (d, w) == (depth, D)), None)
    if size is None:
        raise BadInput(f'it has {depth} blocks of width {D}, and the sizes are '
                       + ', '.join(f'{name} {d} of {w}' for name, (d, w, _) in SIZES.items()))
    table = weights['y_embedder.embedding_table.weight'].shape
    classes = table[1] if method == 'maskdit' else table[0] - 1          # MaskDiT: a Linear on one-hot labels
    outputs = weights['final_layer.linear.weight'].shape[0]
    return METHODS[method]['defaults'] | {
        'stage': 'train', 'method': method, 'model': f'{size}/{p}', 'data': None, 'channels': C,
        'resolution': p * math.isqrt(weights['pos_embed'].shape[1]), 'classes': classes, 'class_names': [],
        'sigma_data': 0.5, 'ema_step': 0, 'diffusion': 'ddpm' if outputs == 2 * p * p * C else 'edm'}


def to_our_names(theirs, cfg):
    """Published tensors under the names and in the layouts of `Net`."""
    ours, first_decoder_block = {}, parse_size(cfg['model'])[0][0] - OWN_DECODER
    for key, value in theirs.items():
        if key.endswith('relative_position_index'):
            continue
        for old, new in OFFICIAL_NAMES:
            key = key.replace(old, new)
        if key == 'patch_embed.weight':
            value = value.permute(0, 2, 3, 1).flatten(1)                  # (D, C, p, p): channels first there
        elif key == 'y_embed.weight' and cfg['method'] == 'maskdit':
            value = torch.cat([value.T, value.new_zeros(1, value.shape[0])])  # a dropped label is zero there
        elif key.endswith('.bias') and value.ndim == 2:
            value = value[:-3]                                                # 3 rows that no index reaches
        if key.startswith('blocks.') and cfg['method'] == 'mdt':
            _, number, rest = key.split('.', 2)
            if int(number) >= first_decoder_block:
                key = f'decoder_blocks.{int(number) - first_decoder_block}.{rest}'
        ours[key] = value
    return ours


def to_maskdit_names(ours, cfg):
    """Weights of a `maskdit` network under MaskDiT's names. A dropped label is a zero vector there, so its
    row moves into the bias of the noise embedding, whose sum with a label is all that the network sees."""
    ours, (_, (_, e, _), p) = dict(ours), parse_size(cfg['model'])
    ours.setdefault('mask_token', torch.zeros(1, 1, e))                       # a tuned network has none
    null = ours['y_embed.weight'][-1]
    ours['t_embed.fc2.bias'] = ours['t_embed.fc2.bias'] + null
    ours['y_embed.weight'] = (ours['y_embed.weight'][:-1] - null).T.contiguous()
    patch = ours['patch_embed.weight'].unflatten(1, (p, p, -1))               # (D, p, p, C)
    ours['patch_embed.weight'] = patch.permute(0, 3, 1, 2).contiguous()
    theirs = {}
    for key, value in ours.items():
        part = key.split('.')
        if part[0] in ('blocks', 'decoder_blocks') and part[2] in ('qkv', 'proj'):
            key = '.'.join([*part[:2], 'attn', *part[2:]])
        elif part[0] in ('blocks', 'decoder_blocks') and part[2] in ('fc1', 'fc2'):
            key = '.'.join([*part[:2], 'mlp', *part[2:]])
        key = key.replace('modulation.', 'adaLN_modulation.1.')
        for theirs_, ours_ in OFFICIAL_NAMES[:8]:                            # of the parts that are no blocks
            if key.startswith(ours_):
                key = theirs_ + key.removeprefix(ours_)
                break
        theirs['model.' + key] = value
    return theirs
