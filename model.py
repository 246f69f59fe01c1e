"""What is the network, what fills the masked positions, and what is minimised?

The reference is MC-DiT: "Contextual Enhancement via Clean-to-Clean Reconstruction for Masked Diffusion
Models" (NeurIPS 2024), with the systems it is compared with: DiT (Peebles & Xie 2022), MaskDiT (Zheng et al.
2024), MDT (Gao et al. 2023) and SD-DiT (Zhu et al. 2024). All are trained under EDM (Karras et al. 2022), so
that only the masking differs.

An encoder sees the visible noisy tokens only. Before the decoder, every masked position must be filled with
something, and what fills it is the whole difference between the methods:

    method   masked positions get              ratio  decoder          minimised               EMA network
    dit      (nothing is masked)               0      final layer      denoise                 -
    maskdit  one learned mask token            0.5    8 blocks x 512   denoise + reconstruct   -
    mdt      tokens from a side block          0.3    last 2 blocks    denoise, twice          -
    sddit    the noisy patch, embedded         0.2    8 blocks x 512   denoise + discriminate  encoder, head
    mcdit    the clean patch, embedded         0.5    8 blocks x 512   clean + noise + 2 con   decoder

`METHODS`, after the losses, is this table as code. A sixth method costs one loss, one row, and a branch in
`Decoder` if neither a token nor a patch fills its masked positions. Read `Net.forward`, `denoise`,
`random_numbers`, `dit_loss`, `mcdit_loss` and `METHODS` first; everything below "checkpoints" can wait.

Letters used for shapes:
    B images    C channels    H = W image side    p patch side    P = p*p*C values per patch
    N = (H/p)^2 tokens    K visible tokens    d encoder width    e decoder width    n any width
"""

import argparse
import copy
import dataclasses
import hashlib
import math
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class BadInput(ValueError):
    """A user's error, as one sentence: what was found, what was expected, what to type."""


def check(condition, sentence):
    if not condition:
        raise BadInput(sentence)


# ------------------------------------------------------------------------------------------ configuration

SIZES = {'T': (6, 160, 5), 'S': (12, 384, 6), 'B': (12, 768, 12), 'L': (24, 1024, 16), 'XL': (28, 1152, 16)}
DECODER = (8, 512, 16)                        # depth, width, heads: the same for S to XL, as in MaskDiT
TINY_DECODER = (2, 64, 2)                     # for T, the laptop's: XL/2's proportions
OWN_DECODER = 2                               # MDT: the last blocks of the encoder are its decoder


@dataclasses.dataclass(frozen=True)
class Config:
    """What a network is and how it is trained. A checkpoint carries it as a plain dictionary; a field that an
    older file does not have takes its default."""

    method: str = 'mcdit'                     # a row of METHODS
    model: str = 'B/2'                        # a size of SIZES, a slash, the patch side p
    stage: str = 'train'                      # 'tune': nothing is masked, no parameter fills masked positions
    diffusion: str = 'edm'                    # 'ddpm': published weights that predict eps and a variance
    # the data, as its folder describes it
    data: str = ''
    fingerprint: str = ''                     # hash of labels and some rows
    kind: str = 'images'                      # 'images', 'moments' or 'latents'
    count: int = 0
    resolution: int = 32                      # H
    channels: int = 4                         # C
    classes: int = 0                          # 0: unconditional
    class_names: tuple = ()
    scale: float = 0.18215                    # of latents
    vae: str | None = None
    vae_sha256: str | None = None
    # masking and loss
    sigma_data: float = 0.5                   # standard deviation of the data, EDM
    mask_ratio: float = 0.5                   # share of the tokens that is masked; METHODS has each method's
    unmasked: float = 0.0                     # share of the steps that mask nothing: ours, in no paper
    bridge: str = 'zero'                      # initial weight of the bridge: 'zero' or 'xavier'
    lambda_noise: float = 0.1                 # MC-DiT eq. 12: weight of the masked noisy target,
    lambda_con1: float = 0.1                  # of the EMA decoder's output on noisy patches as a target,
    lambda_con2: float = 0.05                 # and of its output on clean patches
    all_clean: bool = False                   # MC-DiT Table 6: clean targets for all tokens
    tokens: str = 'both'                      # MC-DiT Table 10: what the decoder is given, see TOKEN_GAINS
    teacher_encoder: bool = False             # MC-DiT Table 12: EMA of the encoder too
    # optimization
    steps: int = 400_000
    batch: int = 256                          # global: ranks x micro-batch x gradient accumulation
    lr: float = 1e-4
    lr_decay: float = 0.0                     # last share of the steps, in which lr falls to 0
    seed: int = 0
    ema_step: int = 0                         # step at which the EMA's warm-up counts on: tuning
    tuned_from: str | None = None

    def __post_init__(self):
        size, _, p = self.model.partition('/')
        check(size in SIZES and p in ('2', '4', '8'),
              f'--model {self.model} is not known: type one of {", ".join(SIZES)}, a slash, and a patch side '
              f'of 2, 4 or 8, such as XL/2')
        check(self.resolution % int(p) == 0,
              f'patches of {p} do not divide an image of {self.resolution} x {self.resolution}: choose '
              f'another patch in --model, or data of another size')
        check(0 <= self.mask_ratio < 1 and self.K >= 1, f'--mask-ratio {self.mask_ratio} leaves none of the '
              f'{self.N} tokens visible: use a smaller ratio or a smaller patch')

    size = property(lambda self: self.model.partition('/')[0])
    patch = property(lambda self: int(self.model.partition('/')[2]))
    grid = property(lambda self: self.resolution // self.patch)
    N = property(lambda self: self.grid ** 2)
    K = property(lambda self: int(self.N * (1 - self.mask_ratio) + 1e-9))     # 1e-9: int(10 * (1 - 0.9)) is 0


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
    """`slots` with `tokens` written at `index`: (B, N, n), (B, K), (B, K, n) -> (B, N, n)."""
    return slots.scatter(1, index[..., None].expand(-1, -1, slots.shape[-1]), tokens)


def sincos_positions(g, width):
    """Fixed 2-D sine-cosine positions, (1, g*g, width): the column's half first, then the row's."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(g, dtype=torch.float64)[:, None] * omega             # (g, width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                       # (g, width/2)
    column, row = line.repeat(g, 1), line.repeat_interleave(g, dim=0)         # (g*g, width/2) each
    return torch.cat([column, row], dim=1)[None].float()


def relative_positions(g, device):
    """The row of MDT's bias table for query i and key j: (N, N), (dy + g-1)(2g-1) + (dx + g-1)."""
    at = torch.arange(g * g, device=device)
    dy, dx = (at[:, None] // g - at // g), (at[:, None] % g - at % g)
    return (dy + g - 1) * (2 * g - 1) + dx + g - 1


# ---------------------------------------------------------------------------------------- building blocks

def layer_norm(x):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)                  # no gain or bias: adaLN has them


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]                          # (B, N, n), (B, n), (B, n)


def recompute(function, *inputs):
    """function(*inputs) with activation checkpointing: backward recomputes everything but the inputs."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)    # no dropout here


class Block(nn.Module):
    """A transformer block with adaLN-Zero: every gate starts at zero, and so the block as the identity.

    With `grid`, MDT's: attention has a learned bias per head and per offset between two tokens of a grid x
    grid image, and `forward` gets the `index` of every pair's offset, (N, N) or (B, K, K).
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
        if index is not None and index.ndim == 3:             # (B, heads, K, K) bias: recomputed, not stored
            x = recompute(self.attend, q, k, v, index)
        else:
            x = self.attend(q, k, v, index)
        return self.proj(x.transpose(1, 2).reshape(B, N, n))

    def attend(self, q, k, v, index):
        bias = None
        if self.bias is not None:
            bias = functional.embedding(index, self.bias).to(q.dtype)         # ([B,] N, N, heads)
            bias = bias.movedim(-1, -3).contiguous()                          # as the fused kernels want it
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)    # (B, heads, N, ..)

    def mlp(self, x):
        return self.fc2(functional.gelu(self.fc1(x), approximate='tanh'))

    def forward(self, x, c, index=None):
        modulation = self.modulation(functional.silu(c))                      # (B, 6 n)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attention(modulate(layer_norm(x), shift_a, scale_a), index)
        return x + gate_m[:, None] * self.mlp(modulate(layer_norm(x), shift_m, scale_m))


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


class PatchEmbedding(nn.Module):
    """Patches (B, N, P) -> tokens (B, N, d) with positions; with `visible` (B, K), those tokens only."""

    def __init__(self, P, width, grid, learned):
        super().__init__()
        self.linear = nn.Linear(P, width)
        self.pos = nn.Parameter(sincos_positions(grid, width), requires_grad=learned)

    def forward(self, patches, visible=None):
        pos = self.pos.expand(len(patches), -1, -1)                           # (B, N, d)
        if visible is not None:
            patches, pos = take(patches, visible), take(pos, visible)         # (B, K, P), (B, K, d)
        return self.linear(patches) + pos                                     # (B, K, d)


PROTOTYPES = 8192                             # of SD-DiT's head; K in its paper


class Head(nn.Module):
    """SD-DiT's projection head: tokens (.., d) -> cosines in [-1, 1] with 8192 prototypes, in float32."""

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

def run_blocks(blocks, tokens, c, index, checkpointing):
    for block in blocks:
        tokens = recompute(block, tokens, c, index) if checkpointing else block(tokens, c, index)
    return tokens                                                             # (B, N, n)


class Encoder(nn.Module):
    """The visible noisy patches, embedded and passed through DiT's blocks; and the conditioning vector c."""

    checkpointing = False

    def __init__(self, cfg):
        super().__init__()
        depth, d, heads = SIZES[cfg.size]
        self.grid, self.biased = cfg.grid, METHODS[cfg.method].decoder == 'own'
        if self.biased:                                                       # MDT: learned positions, biased
            depth -= OWN_DECODER                                              # attention, two blocks fewer
        self.t_embed = NoiseEmbedding(d)
        self.y_embed = nn.Embedding(cfg.classes + 1, d) if cfg.classes else None         # last row: dropped
        self.embed = PatchEmbedding(cfg.patch ** 2 * cfg.channels, d, cfg.grid, self.biased)
        self.cls = nn.Parameter(torch.zeros(1, 1, d)) if METHODS[cfg.method].cls else None
        self.blocks = nn.ModuleList(Block(d, heads, d, cfg.grid if self.biased else None)
                                    for _ in range(depth))

    def condition(self, c_noise, y):
        """c_noise (B,), labels y (B,), where the number `classes` means dropped -> c (B, d)."""
        c = self.t_embed(c_noise)
        return c if self.y_embed is None else c + self.y_embed(y)

    def forward(self, x, c, visible=None):
        """Noisy patches (B, N, P), of which those at `visible` (B, K) are encoded -> tokens (B, K, d)."""
        tokens = self.embed(x, visible)                                       # (B, K, d)
        if self.cls is not None:                                              # SD-DiT's [CLS], never masked
            tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1)    # (B, 1 + K, d)
        index = None
        if self.biased:
            index = relative_positions(self.grid, x.device)                   # (N, N)
            if visible is not None:
                index = index[visible[:, :, None], visible[:, None, :]]       # (B, K, K)
        return run_blocks(self.blocks, tokens, c, index, self.checkpointing)


class Decoder(nn.Module):
    """From tokens to values: bridge, mask token or side block where the method has one, blocks, final layer.

    dit's decoder is the final layer alone; mdt's has the encoder's width and no bridge.
    """

    checkpointing = False

    def __init__(self, cfg):
        super().__init__()
        method, (_, d, heads) = METHODS[cfg.method], SIZES[cfg.size]
        fill = method.fill if cfg.stage == 'train' else None
        depth, e, e_heads = {'none': (0, d, heads), 'own': (OWN_DECODER, d, heads),
                             'narrow': TINY_DECODER if cfg.size == 'T' else DECODER}[method.decoder]
        self.grid, self.biased = cfg.grid, method.decoder == 'own'
        bias_grid = cfg.grid if self.biased else None
        self.bridge = ModulatedLinear(d, e, d) if method.decoder == 'narrow' else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, e)) if fill in ('token', 'side') else None
        self.pos = nn.Parameter(sincos_positions(cfg.grid, e), requires_grad=self.biased) if depth else None
        self.side_block = Block(e, e_heads, d, bias_grid) if fill == 'side' else None
        self.blocks = nn.ModuleList(Block(e, e_heads, d, bias_grid) for _ in range(depth))
        outputs = cfg.channels * (2 if cfg.diffusion == 'ddpm' else 1)        # DDPM: eps and a variance
        self.final = ModulatedLinear(e, cfg.patch ** 2 * outputs, d)

    def forward(self, tokens, c, visible=None, gains=(1.0, 1.0)):
        """Tokens (B, N, d), or (B, K, d) where the mask token fills the rest -> values (B, N, P); DDPM's 2P.

        `gains` multiply the bridged tokens at visible and at masked positions (MC-DiT Table 10, `collapse`).
        """
        masked, B, N = visible is not None, len(tokens), self.grid ** 2
        if self.bridge is not None:
            tokens = self.bridge(tokens, c)                                   # (B, N, e) or (B, K, e)
        if gains != (1.0, 1.0):
            gain = tokens.new_full((B, N, 1), gains[1])
            tokens = tokens * gain.scatter(1, visible[..., None], gains[0])
        if self.mask_token is not None:
            if not masked:                    # overwrite it all: DistributedDataParallel waits for a gradient
                visible = torch.arange(N, device=tokens.device).expand(B, -1)
            slots = self.mask_token.expand(B, N, -1).to(tokens.dtype)         # (B, N, e)
            tokens = put(slots, visible, tokens)                              # (B, N, e)
        if self.pos is not None:
            tokens = tokens + self.pos                                        # (B, N, e)
        index = relative_positions(self.grid, tokens.device) if self.biased else None    # (N, N)
        if self.side_block is not None and masked:                            # MDT's side-interpolater
            made = run_blocks([self.side_block], tokens, c, index, self.checkpointing)
            tokens = put(made, visible, take(tokens, visible).to(made.dtype))     # visible ones stay
        return self.final(run_blocks(self.blocks, tokens, c, index, self.checkpointing), c)    # (B, N, P)


class Net(nn.Module):
    """F, the raw network inside the denoiser D of EDM eq. 7. Only the parameters that the method uses are
    built; tuning masks nothing, so it has none that fill masked positions."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.fill_with_patches = METHODS[cfg.method].fill not in (None, 'token', 'side')
        self.head = None
        if METHODS[cfg.method].cls and cfg.stage == 'train':
            self.head = Head(self.encoder.embed.pos.shape[-1])
        initialise(self, cfg)

    def forward(self, x, c_noise, y=None, visible=None, fill=None, gains=(1.0, 1.0)):
        """F (B, N, P) in the precision of the parameters, c (B, d), SD-DiT's logits (B, 1 + K, 8192) or None.

        x         (B, N, P)  patches of the noisy image, scaled by c_in
        c_noise   (B,)       ln(sigma) / 4
        y         (B,)       labels; the number `classes` means dropped
        visible   (B, K)     indices of the visible tokens; None: nothing is masked
        fill      (B, N, P)  the patches that sddit and mcdit put at the masked positions
        """
        dtype = self.encoder.embed.pos.dtype
        x, c_noise = x.to(dtype), c_noise.to(dtype)
        c = self.encoder.condition(c_noise, y)                                # (B, d)
        tokens = self.encoder(x, c, visible)                                  # (B, K, d) or (B, 1 + K, d)
        logits = None
        if self.encoder.cls is not None:
            if self.head is not None and visible is not None:
                logits = self.head(tokens)                                    # (B, 1 + K, 8192)
            tokens = tokens[:, 1:]                                            # (B, K, d)
        if self.fill_with_patches and visible is not None:        # embed all; the encoder's tokens replace K
            filled = self.encoder.embed(fill.to(dtype))                       # (B, N, d)
            tokens = put(filled.to(tokens.dtype), visible, tokens)            # (B, N, d)
        return self.decoder(tokens, c, visible, gains).to(dtype), c, logits

    def checkpoint_activations(self):
        self.encoder.checkpointing = self.decoder.checkpointing = True


TRAINING_ONLY = ('decoder.mask_token', 'decoder.side_block.', 'head.')       # name prefixes: tuning has none


def initialise(net, cfg):
    """DiT's: Xavier-uniform weights, zero biases, embeddings N(0, 0.02^2), zero gates and output; MaskDiT's
    bridge starts at zero too."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in net.named_parameters():
        relative_bias = name.endswith('.bias') and parameter.ndim == 2        # MDT's tables
        if relative_bias or name.endswith(('t_embed.fc1.weight', 't_embed.fc2.weight', 'y_embed.weight',
                                           'mask_token', 'cls', 'prototypes')):
            nn.init.normal_(parameter, std=0.02)
        zero_bridge = name == 'decoder.bridge.linear.weight' and cfg.bridge == 'zero'
        if zero_bridge or name.endswith('modulation.weight') or name == 'decoder.final.linear.weight':
            nn.init.zeros_(parameter)


def compile_blocks(net):
    """Compile each block of a network or a teacher in its place, for one graph per shape: blocks of the same
    shapes share it. Names of parameters stay, and a copy of the network is not compiled."""
    torch._dynamo.config.optimize_ddp = False     # or DistributedDataParallel cuts each block in pieces
    for module in net.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


# ------------------------------------------------------------------------------------- EMA and the teachers
#
# Two copies follow the network, with different decays and different jobs: `ema` (0.9999, all weights) is what
# is sampled from; the teacher of sddit and mcdit is what their losses consult. No gradient reaches either.

@torch.no_grad()
def update_ema(shadow, net, decay):
    """shadow <- decay * shadow + (1 - decay) * net, parameter by parameter."""
    torch._foreach_lerp_(list(shadow.parameters()), list(net.parameters()), 1 - decay)


def ema_decay(step, decay=0.9999):
    """Decay of the sampling weights: short while the network still changes fast."""
    return min(decay, (1 + step) / (10 + step))


BRANCH_DECAY = 0.999                          # MC-DiT section 4.1
CENTER_MOMENTUM = 0.9                         # SD-DiT's centers


class EMADecoder(nn.Module):
    """MC-DiT's branches: an EMA of the way from a patch to the output, without the encoder's blocks.

    The paper has two of them, for noisy and for clean patches. They start equal and are updated alike, so
    they stay equal: one copy, run once on a batch of 2B, serves both (the paper counts 786 M
    parameters = 730 M + one decoder). With cfg.teacher_encoder the encoder is copied too (Table 12).
    """

    def __init__(self, net, cfg):
        super().__init__()
        self.whole = cfg.teacher_encoder
        self.encoder = copy.deepcopy(net.encoder if self.whole else net.encoder.embed)
        self.decoder = copy.deepcopy(net.decoder)

    def forward(self, x, c, c_noise, y):
        """F_ema (B, N, P) of patches (B, N, P) that are all embedded; c (B, d) is the student's."""
        if self.whole:
            c = self.encoder.condition(c_noise, y)
            return self.decoder(self.encoder(x, c), c).to(x.dtype)
        return self.decoder(self.encoder(x), c).to(x.dtype)

    def update(self, net, progress, skipped):
        """After each step; a skipped one changes no weights."""
        if not skipped:
            update_ema(self.encoder, net.encoder if self.whole else net.encoder.embed, BRANCH_DECAY)
            update_ema(self.decoder, net.decoder, BRANCH_DECAY)


class EMAEncoder(nn.Module):
    """SD-DiT's teacher: an EMA copy of encoder and head, and the centers of its logits, which follow the mean
    logits over the batches of all ranks."""

    def __init__(self, net, cfg):
        super().__init__()
        self.encoder, self.head = copy.deepcopy(net.encoder), copy.deepcopy(net.head)
        self.register_buffer('centers', torch.zeros(2, PROTOTYPES))           # of [CLS], of patches
        self.register_buffer('seen', torch.zeros(2, PROTOTYPES), persistent=False)   # since the last update
        self.calls = 0

    def forward(self, x, c_noise, y):
        """Logits (B, 1 + N, 8192) of patches (B, N, P), nothing masked; their means go into the centers."""
        logits = self.head(self.encoder(x, self.encoder.condition(c_noise, y)))
        self.seen += torch.stack([logits[:, 0].mean(0), logits[:, 1:].mean((0, 1))])
        self.calls += 1
        return logits

    @torch.no_grad()
    def update(self, net, progress, skipped):
        """After each step; a skipped one changes no weights. `progress` is the share of the training done."""
        if not skipped:
            decay = 0.999 - 0.003 * (1 + math.cos(math.pi * progress)) / 2    # 0.996 to 0.999 by a cosine
            update_ema(self.encoder, net.encoder, decay)
            update_ema(self.head, net.head, decay)
            mean = self.seen / self.calls
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            self.centers.lerp_(mean, 1 - CENTER_MOMENTUM)
        self.seen.zero_()
        self.calls = 0


def make_teacher(net, cfg):
    """The module that the method's loss consults, or None."""
    teacher = METHODS[cfg.method].teacher if cfg.stage == 'train' else None
    if teacher is EMADecoder and not (cfg.lambda_con1 or cfg.lambda_con2):
        teacher = None
    device = net.encoder.embed.pos.device
    return None if teacher is None else teacher(net, cfg).requires_grad_(False).to(device)


# -------------------------------------------------------------------------------------------- EDM, Table 1

P_MEAN, P_STD = -1.2, 1.2                     # ln sigma ~ N(P_mean, P_std^2)
LABEL_DROPOUT = 0.1


def precondition(sigma, sd):
    """c_skip, c_out, c_in (B, 1, 1) and c_noise (B,) for noise levels sigma (B,). EDM Table 1."""
    s = sigma.view(-1, 1, 1)
    c_skip = sd ** 2 / (s ** 2 + sd ** 2)
    c_out = s * sd / (s ** 2 + sd ** 2).sqrt()
    c_in = 1 / (s ** 2 + sd ** 2).sqrt()
    return c_skip, c_out, c_in, sigma.log() / 4


def loss_weight(sigma, sd):
    """lambda(sigma) = 1 / c_out^2, (B, 1, 1)."""
    s = sigma.view(-1, 1, 1)
    return (s ** 2 + sd ** 2) / (s * sd) ** 2


def denoise(net, xt, sigma, y, cfg, visible=None, clean=None, gains=(1.0, 1.0)):
    """D (B, N, P), an estimate of the clean patches, with the c and logits of `Net.forward`. EDM eq. 7.

    xt (B, N, P) noisy patches, sigma (B,), y (B,). Without `visible` nothing is masked: inference. With it,
    sddit fills masked positions with xt's own patches, and mcdit with `clean`: the denoiser's argument is
    then the mixed image x_in, whose masked patches have no noise and so the c_in of sigma = 0, which is 1/sd;
    c_skip and c_out stay those of sigma.

    Networks published under DDPM predict eps and a variance, and D = x - sigma eps(x / sqrt(sigma^2 + 1),
    t(sigma)): EDM Table 1, column VP.
    """
    if cfg.diffusion == 'ddpm':
        s = sigma.view(-1, 1, 1)
        F, c, logits = net(xt / (s ** 2 + 1).sqrt(), ddpm_time(sigma), y, visible)
        eps = F.unflatten(2, (-1, 2 * cfg.channels))[..., :cfg.channels].flatten(2)      # (B, N, P)
        return xt - s * eps, c, logits
    assert visible is None or clean is not None or not METHODS[cfg.method].context, 'give clean patches'
    sd = cfg.sigma_data
    c_skip, c_out, c_in, c_noise = precondition(sigma, sd)
    x_in, fill = xt, c_in * xt
    if clean is not None:
        x_in, fill = put(clean, visible, take(xt, visible)), clean / sd
    F, c, logits = net(c_in * xt, c_noise, y, visible, fill, gains)
    return c_skip * x_in + c_out * F, c, logits


def denoise_images(net, x, sigma, y, cfg, visible=None, clean=None):
    """`denoise` for images (B, C, H, W), as the sampler wants it; the result has the precision of x."""
    p = cfg.patch
    clean = None if clean is None else patchify(clean, p)
    return unpatchify(denoise(net, patchify(x, p), sigma, y, cfg, visible, clean)[0], p, cfg.channels)


def ddpm_sigmas(device='cpu'):
    """sqrt((1 - abar) / abar) of each of DDPM's 1000 linear steps: float64 (1000,), 0.0100005 to 157.407."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=device)).cumprod(0)
    return ((1 - abar) / abar).sqrt()


def ddpm_time(sigma):
    """t(sigma) in 0..999 for noise levels (B,), linear in ln sigma between the steps."""
    steps = ddpm_sigmas(sigma.device).log()
    s = sigma.double().log().clamp(steps[0], steps[-1])
    i = torch.searchsorted(steps, s).clamp(1, 999)
    return (i - 1 + (s - steps[i - 1]) / (steps[i] - steps[i - 1])).to(sigma.dtype)


def sigma_range(cfg):
    """The sampler's sigma_min and sigma_max: EDM Table 1, or the ends of DDPM's schedule."""
    return (0.002, 80.0) if cfg.diffusion == 'edm' else (ddpm_sigmas()[0].item(), ddpm_sigmas()[-1].item())


# ----------------------------------------------------------------------------- the random numbers of a step

def generator(device, *key):
    """A torch.Generator that is a function of `key` (numbers and strings) and of nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'little'))


def random_numbers(cfg, step, device='cpu'):
    """Every random number that one step needs, for the whole global batch B = cfg.batch.

    They are functions of (seed, step, purpose): ranks and micro-batches slice their rows, so any number of
    them sees the same numbers. On another kind of device, or another model of GPU, the numbers differ.

    sigma (B,)        noise levels              noise (B, N, P)        unit variance
    visible (B, K)    indices of the tokens     masked (B, N - K)      the others
    drop (B,) bool    drop the label            progress (B,)          share of the training that is done
    noise2, drop2     second draws, where METHODS asks for them
    latent (B, C, H, W)    unit variance: samples a VAE's moments, where the data has them
    """
    def rng(purpose):
        return generator(device, cfg.seed, step, purpose)

    B, shape = cfg.batch, (cfg.batch, cfg.channels, cfg.resolution, cfg.resolution)
    order = torch.rand(B, cfg.N, generator=rng('order'), device=device).argsort(1)
    r = {'sigma': (P_MEAN + P_STD * torch.randn(B, generator=rng('sigma'), device=device)).exp(),
         'visible': order[:, :cfg.K], 'masked': order[:, cfg.K:],
         'progress': torch.full((B,), step / cfg.steps, device=device)}
    second = METHODS[cfg.method].second_draws if cfg.stage == 'train' else ()
    for name in ('noise', 'drop', *second):
        if name.startswith('noise'):
            r[name] = patchify(torch.randn(shape, generator=rng(name), device=device), cfg.patch)
        else:
            r[name] = torch.rand(B, generator=rng(name), device=device) < LABEL_DROPOUT
    if cfg.kind == 'moments':
        r['latent'] = torch.randn(shape, generator=rng('latent'), device=device)
    return r


# ---------------------------------------------------------------------------------------------- the losses
#
# loss(net, teacher, x0, y, r, cfg) -> {name: (weight, value)}: the loop minimises the sum of weight * value
# and logs the values. x0 (B, N, P) clean patches, y (B,) labels, r the rows of `random_numbers`. Values of
# weight 0 are for the log. The net may be wrapped by DistributedDataParallel, so it is only ever called.

def corrupt(x0, y, r, cfg, second=''):
    """Noisy patches xt (B, N, P), and labels of which a tenth is dropped."""
    xt = x0 + r['sigma'].view(-1, 1, 1) * r['noise' + second]
    return xt, torch.where(r['drop' + second], cfg.classes, y)


def dit_loss(net, teacher, x0, y, r, cfg):
    """w (D(xt) - x0)^2 over all tokens, nothing masked. EDM eq. 8; unmasked tuning minimises it too."""
    xt, y = corrupt(x0, y, r, cfg)
    D, *_ = denoise(net, xt, r['sigma'], y, cfg)
    return {'denoise': (1.0, (loss_weight(r['sigma'], cfg.sigma_data) * (D - x0) ** 2).mean())}


MASKDIT_LAMBDA = 0.1                          # weight of MaskDiT's reconstruction


def maskdit_loss(net, teacher, x0, y, r, cfg):
    """Denoise the visible tokens; reconstruct the masked noisy ones, each patch normalised."""
    visible, masked, w = r['visible'], r['masked'], loss_weight(r['sigma'], cfg.sigma_data)
    xt, y = corrupt(x0, y, r, cfg)
    D, *_ = denoise(net, xt, r['sigma'], y, cfg, visible)
    target = (xt - xt.mean(2, keepdim=True)) / (xt.var(2, keepdim=True) + 1e-6).sqrt()   # unbiased variance
    return {'denoise': (1.0, take(w * (D - x0) ** 2, visible).mean()),
            'reconstruct': (MASKDIT_LAMBDA, take((D - target) ** 2, masked).mean())}     # no w, as published


def mdt_loss(net, teacher, x0, y, r, cfg):
    """DiT's loss over all tokens twice, unmasked and masked: the same images and noise levels, independent
    noise and label dropout. MDT section 4.4, under EDM."""
    terms, w = {}, loss_weight(r['sigma'], cfg.sigma_data)
    for name, second, visible in (('full', '', None), ('masked', '2', r['visible'])):
        xt, labels = corrupt(x0, y, r, cfg, second)
        D, *_ = denoise(net, xt, r['sigma'], labels, cfg, visible)
        terms[name] = (1.0, (w * (D - x0) ** 2).mean())
    return terms


TEACHER_SIGMA = 0.002                         # SD-DiT: the teacher sees nearly clean images
STUDENT_TEMPERATURE = 0.1


def sddit_loss(net, teacher, x0, y, r, cfg):
    """L_G, DiT's loss over all tokens, and L_D: the student's visible tokens and [CLS] match the prototype
    distributions of the teacher, which sees the whole, nearly clean image. SD-DiT eq. 9 to 12."""
    visible, w = r['visible'], loss_weight(r['sigma'], cfg.sigma_data)
    xt, y = corrupt(x0, y, r, cfg)
    D, _, logits = denoise(net, xt, r['sigma'], y, cfg, visible)

    with torch.no_grad():
        _, _, c_in, c_noise = precondition(torch.full_like(r['sigma'], TEACHER_SIGMA), cfg.sigma_data)
        cls_center, patch_center = teacher.centers                            # of the steps before
        target = teacher(c_in * (x0 + TEACHER_SIGMA * r['noise2']), c_noise, y)    # (B, 1 + N, 8192)
        target = torch.cat([target[:, :1] - cls_center, take(target[:, 1:], visible) - patch_center], dim=1)
        temperature = 0.04 + 0.03 * (r['progress'] / 0.1).clamp(max=1)        # 0.04 rises to 0.07
        log_P = (target / temperature.view(-1, 1, 1)).log_softmax(-1)         # (B, 1 + K, 8192)
        entropy = -(log_P.exp() * log_P).sum(-1)                              # (B, 1 + K)
    cross = -(log_P.exp() * (logits / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1)      # SD-DiT eq. 11
    return {'generate': (1.0, (w * (D - x0) ** 2).mean()),
            'discriminate': (1.0, cross[:, 0].mean() + cross[:, 1:].mean()),  # [CLS] + patches, eq. 12
            # the teacher has collapsed if its entropy is ln 8192 = 9.01 or 0, or if kl is 0
            'teacher_entropy': (0.0, entropy[:, 1:].mean()),
            'kl': (0.0, (cross.detach() - entropy)[:, 1:].mean())}


TOKEN_GAINS = {'both': (1.0, 1.0), 'noisy': (1.0, 0.0), 'clean': (0.0, 1.0)}  # MC-DiT Table 10


def mcdit_loss(net, teacher, x0, y, r, cfg):
    """Clean-to-clean reconstruction, kept from collapsing by two uses of the EMA decoder. MC-DiT eq. 8-12."""
    visible, masked, sigma, sd = r['visible'], r['masked'], r['sigma'], cfg.sigma_data
    w = loss_weight(sigma, sd)
    xt, y = corrupt(x0, y, r, cfg)
    clean = METHODS[cfg.method].context(x0, cfg)                              # mcdit's: x0 itself
    D, c, _ = denoise(net, xt, sigma, y, cfg, visible, clean, TOKEN_GAINS[cfg.tokens])   # D_theta

    terms = {'clean': (1.0, take(w * (D - x0) ** 2, visible).mean())}         # eq. 8
    if cfg.all_clean:                                                         # Table 6, third row
        terms = {'clean': (0.0, terms['clean'][1].detach()), 'all_clean': (1.0, (w * (D - x0) ** 2).mean())}
    elif cfg.lambda_noise:
        noise = take((D - xt) ** 2, masked).mean()                            # eq. 9: no token shows this
        floor = take((xt - x0) ** 2, masked).mean()                           # noise, so its square remains
        terms |= {'noise': (cfg.lambda_noise, noise), 'noise_above_floor': (0.0, noise.detach() - floor)}

    if teacher is not None:
        c_skip, c_out, c_in, c_noise = precondition(sigma, sd)
        with torch.no_grad():                                                 # both in one pass of 2B
            F_noisy, F_clean = teacher(torch.cat([c_in * xt, x0 / sd]), c.repeat(2, 1), c_noise.repeat(2),
                                       y.repeat(2)).chunk(2)
        D_noisy, D_clean = c_skip * xt + c_out * F_noisy, c_skip * x0 + c_out * F_clean
        terms['con1'] = (cfg.lambda_con1, take(w * (D - D_noisy) ** 2, visible).mean())  # eq. 10
        terms['con2'] = (cfg.lambda_con2, take(w * (D - D_clean) ** 2, visible).mean())  # eq. 11
    return terms                                                              # eq. 12: their weighted sum


class Method(NamedTuple):
    """Every difference between the methods. Training, sampling and measuring ask for no method's name."""

    loss: Callable                            # (net, teacher, x0, y, r, cfg) -> terms
    fill: str | None                          # masked positions get: mask 'token', 'side' block's, or patches
    decoder: str                              # 'none', 'narrow', or the encoder's 'own' last blocks
    mask_ratio: float
    lr: float = 1e-4
    teacher: type | None = None               # EMADecoder or EMAEncoder
    cls: bool = False                         # a [CLS] token and a projection head
    second_draws: tuple = ()                  # of `random_numbers`
    context: Callable | None = None           # (x0, cfg) -> the clean patches (B, N, P) that fill, if any do
    inpaint: str | None = None                # known tokens are 'visible' (held), or the clean 'context'
    flags: tuple = ()                         # of train.py, besides those that every method reads


METHODS = {
    'dit': Method(dit_loss, fill=None, decoder='none', mask_ratio=0.0),
    'maskdit': Method(maskdit_loss, fill='token', decoder='narrow', mask_ratio=0.5, inpaint='visible',
                      flags=('mask_ratio', 'bridge', 'unmasked')),
    'mdt': Method(mdt_loss, fill='side', decoder='own', mask_ratio=0.3, lr=3e-4,
                  second_draws=('noise2', 'drop2'), inpaint='visible', flags=('mask_ratio',)),
    'sddit': Method(sddit_loss, fill='noisy', decoder='narrow', mask_ratio=0.2, teacher=EMAEncoder, cls=True,
                    second_draws=('noise2',), flags=('mask_ratio', 'bridge')),
    'mcdit': Method(mcdit_loss, fill='clean', decoder='narrow', mask_ratio=0.5, teacher=EMADecoder,
                    context=lambda x0, cfg: x0, inpaint='context',
                    flags=('mask_ratio', 'bridge', 'unmasked', 'lambda_noise', 'lambda_con1', 'lambda_con2',
                           'all_clean', 'tokens', 'teacher_encoder')),
}


def loss_of_step(cfg, step):
    """The method's loss; DiT's in tuning, and in the share cfg.unmasked of the steps of training, which are a
    function of (seed, step). That share is ours, in no paper: eq. 8 of MC-DiT teaches E[x0_visible |
    xt_visible, x0_masked, y], and the sampler needs E[x0 | xt, y]."""
    if cfg.stage == 'tune':
        return dit_loss
    draw = torch.rand((), generator=generator('cpu', cfg.seed, step, 'unmasked')).item()
    return dit_loss if draw < cfg.unmasked else METHODS[cfg.method].loss


@torch.no_grad()
def collapse(net, x0, xt, sigma, y, visible, cfg):
    """How much the output on visible tokens depends on the encoder, and how much on the clean patches.

    Sums of squares for rms(D - D_zeroed) / rms(D), scalars: `output`, and the change where `encoder` or
    `patches` is zeroed. A decoder that reads the clean patches and ignores the encoder has `encoder` near 0.
    """
    clean, (on_encoder, on_patches) = METHODS[cfg.method].context(x0, cfg), TOKEN_GAINS[cfg.tokens]
    D, D_without_encoder, D_without_patches = (
        take(denoise(net, xt, sigma, y, cfg, visible, clean, gains)[0], visible)         # (B, K, P)
        for gains in ((on_encoder, on_patches), (0.0, on_patches), (on_encoder, 0.0)))
    return {'output': (D ** 2).sum(), 'encoder': ((D - D_without_encoder) ** 2).sum(),
            'patches': ((D - D_without_patches) ** 2).sum()}


# ------------------------------------------------------------------------------------ checkpoints, ours

def read_checkpoint(path):
    """The dictionary in a checkpoint: `ema`, `step`, `config` (a Config) and, where training wrote it,
    `model`, `teacher`, `opt`, `scaler`. Published weights are translated. Never runs code from the file, and
    maps it into memory instead of reading it. Raises BadInput."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):      # DiT and MaskDiT keep their `args`
            state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        raise BadInput(f'there is no checkpoint {path}: give a file such as out/0010000.pt') from None
    except Exception as error:                                                # torch raises many types here
        raise BadInput(f'{path} is not a checkpoint, or is truncated, or holds more than tensors and plain '
                       f'values ({type(error).__name__})') from None
    if not (isinstance(state, dict) and {'ema', 'step', 'config'} <= state.keys()):
        return translate(state, path)
    check('encoder.embed.linear.weight' in state['ema'], f'{path} was written by the first edition of this '
          f'code, whose networks are others: train again, or use commit 4fdd509 to sample from it')
    known = {field.name for field in dataclasses.fields(Config)}
    newer = sorted(state['config'].keys() - known)
    check(not newer, f'{path} was written by a later version of this code: its configuration has {newer}')
    return state | {'config': Config(**state['config'])}


def load_net(path, device='cpu'):
    """(net, cfg) for inference with the EMA weights of a checkpoint. Raises BadInput."""
    state = read_checkpoint(path)
    return fit(state['ema'], state['config'], path).to(device).eval().requires_grad_(False), state['config']


def fit(weights, cfg, path):
    """A network of `cfg` with `weights`. Raises BadInput if they do not fit."""
    with torch.device('meta'):                                                # no memory, no random numbers
        net = Net(cfg)
    try:
        net.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise BadInput(f'{path} does not fit a {cfg.method} {cfg.model}: '
                       + ' '.join(str(error).split())[:300]) from None
    return net


# ------------------------------------------------------------------------- checkpoints, published by others
#
# MaskDiT, DiT and MDT version 1 by their authors' files. Nobody needs this to understand the methods.

LONG_AGO = 1_000_000                          # the step of published weights: past the EMA's warm-up
OFFICIAL_NAMES = (                            # theirs, ours; applied in this order
    ('x_embedder.proj.', 'encoder.embed.linear.'),
    ('t_embedder.mlp.0.', 'encoder.t_embed.fc1.'),
    ('t_embedder.mlp.2.', 'encoder.t_embed.fc2.'),
    ('y_embedder.embedding_table.', 'encoder.y_embed.'),
    ('decoder_pos_embed', 'decoder.pos'),
    ('pos_embed', 'encoder.embed.pos'),
    ('mask_token', 'decoder.mask_token'),
    ('decoder_layer.', 'decoder.bridge.'),
    ('final_layer.', 'decoder.final.'),
    ('sideblocks.0.', 'decoder.side_block.'),
    ('decoder_blocks.', 'decoder.blocks.'),
    ('adaLN_modulation.1.', 'modulation.'),
    ('.mlp.fc', '.fc'),
    ('.attn.rel_pos_bias.relative_position_bias_table', '.bias'),
    ('.attn.', '.'))


def translate(state, path):
    """The content of a published file as a checkpoint of ours. Raises BadInput."""
    def strip(key):                                                       # what wrappers put before a name
        return key.replace('module.', '').replace('_orig_mod.', '').removeprefix('model.')

    tables = {name: state[name] for name in ('ema', 'model') if isinstance(state.get(name), dict)} \
        if isinstance(state, dict) else {}
    tables = tables or {'ema': state if isinstance(state, dict) else {}}      # or the weights alone
    tables = {name: {strip(key): value for key, value in weights.items() if isinstance(value, torch.Tensor)}
              for name, weights in tables.items()}
    weights = tables.get('ema') or tables.get('model') or {}
    check('en_inblocks.0.attn.qkv.weight' not in weights,
          f'{path} is MDT version 2, another network: version 1 (mdt_xl2_v1_ckpt.pt) can be read')
    needed = ('x_embedder.proj.weight', 'blocks.0.attn.qkv.weight', 'final_layer.linear.weight',
              'y_embedder.embedding_table.weight', 'pos_embed')
    check(all(name in weights for name in needed),
          f'{path} is no checkpoint of train.py or finetune.py, nor of MaskDiT, DiT or MDT version 1: it has '
          f'tensors {", ".join(list(weights)[:3]) or "none"}')
    cfg = recognise(weights, path)
    tables = {name: to_our_names(theirs, cfg) for name, theirs in tables.items()}
    for theirs in tables.values():
        fit(theirs, cfg, path)
    ema = tables.get('ema', tables.get('model'))
    return {'model': tables.get('model', ema), 'ema': ema, 'step': LONG_AGO, 'config': cfg}


def recognise(weights, path):
    """The Config of published weights, from their names and shapes. Raises BadInput for an unknown size."""
    d, C, p, _ = weights['x_embedder.proj.weight'].shape
    depth = 1 + max(int(key.split('.')[1]) for key in weights if key.startswith('blocks.'))
    size = next((name for name, (n, width, _) in SIZES.items() if (n, width) == (depth, d)), None)
    check(size, f'{path} has {depth} blocks of width {d}: the sizes are '
          + ', '.join(f'{name} {n} of {width}' for name, (n, width, _) in SIZES.items()))
    method = 'maskdit' if 'decoder_layer.linear.weight' in weights else \
        'mdt' if 'sideblocks.0.attn.qkv.weight' in weights else 'dit'
    table = weights['y_embedder.embedding_table.weight'].shape
    outputs = weights['final_layer.linear.weight'].shape[0]
    return Config(
        method=method, model=f'{size}/{p}', channels=C,
        resolution=p * math.isqrt(weights['pos_embed'].shape[1]),
        classes=table[1] if method == 'maskdit' else table[0] - 1,             # MaskDiT: a Linear layer
        diffusion='ddpm' if outputs == 2 * p * p * C else 'edm',
        mask_ratio=METHODS[method].mask_ratio, lr=METHODS[method].lr)


def to_our_names(theirs, cfg):
    """Published tensors under the names and in the layouts of `Net`."""
    ours, first_own = {}, SIZES[cfg.size][0] - OWN_DECODER
    for key, value in theirs.items():
        if key.endswith('relative_position_index'):
            continue
        for old, new in OFFICIAL_NAMES:
            key = key.replace(old, new)
        if key.startswith('blocks.'):
            number, rest = key.split('.', 2)[1:]
            own = METHODS[cfg.method].decoder == 'own' and int(number) >= first_own
            key = f'decoder.blocks.{int(number) - first_own}.{rest}' if own else f'encoder.{key}'
        if key == 'encoder.embed.linear.weight':
            value = value.permute(0, 2, 3, 1).flatten(1)                      # (d, C, p, p) there
        elif key == 'encoder.y_embed.weight' and METHODS[cfg.method].decoder == 'narrow':
            value = torch.cat([value.T, value.new_zeros(1, value.shape[0])])  # a dropped label is zero there
        elif key.endswith('.bias') and value.ndim == 2:
            value = value[:-3]                                                # 3 rows that no index reaches
        ours[key] = value
    return ours
