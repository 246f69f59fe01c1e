"""The autoencoder of data.py and its files, against names, shapes and a network written a second time."""

import hashlib
import json
import math
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.nn import functional

import data
import finetune
import model
import sample
import train

# ------------------------------------------------------------------------------ names and shapes, once more


def ldm_shapes():
    """{name: shape} of the autoencoder inside LDM's files, from the description of the architecture."""
    shapes = {}

    def layer(name, *shape):
        shapes[f'{name}.weight'], shapes[f'{name}.bias'] = shape, shape[:1]

    def residual(name, n, m):
        layer(f'{name}.norm1', n), layer(f'{name}.conv1', m, n, 3, 3)
        layer(f'{name}.norm2', m), layer(f'{name}.conv2', m, m, 3, 3)
        if n != m:
            layer(f'{name}.nin_shortcut', m, n, 1, 1)

    def middle(name):
        residual(f'{name}.block_1', 512, 512), residual(f'{name}.block_2', 512, 512)
        layer(f'{name}.attn_1.norm', 512)
        for part in ('q', 'k', 'v', 'proj_out'):
            layer(f'{name}.attn_1.{part}', 512, 512, 1, 1)

    n = 128
    layer('encoder.conv_in', 128, 3, 3, 3)
    for i, m in enumerate((128, 256, 512, 512)):
        for j in range(2):
            residual(f'encoder.down.{i}.block.{j}', n, m)
            n = m
        if i < 3:
            layer(f'encoder.down.{i}.downsample.conv', m, m, 3, 3)
    middle('encoder.mid')
    layer('encoder.norm_out', 512), layer('encoder.conv_out', 8, 512, 3, 3)
    layer('decoder.conv_in', 512, 4, 3, 3)
    middle('decoder.mid')
    for i, m in reversed(list(enumerate((128, 256, 512, 512)))):
        for j in range(3):
            residual(f'decoder.up.{i}.block.{j}', n, m)
            n = m
        if i > 0:
            layer(f'decoder.up.{i}.upsample.conv', m, m, 3, 3)
    layer('decoder.norm_out', 128), layer('decoder.conv_out', 3, 128, 3, 3)
    layer('quant_conv', 8, 8, 1, 1), layer('post_quant_conv', 4, 4, 1, 1)
    return shapes


NEW, OLD = ('to_q', 'to_k', 'to_v', 'to_out.0'), ('query', 'key', 'value', 'proj_attn')


def diffusers_name(name, attention=NEW):
    """What diffusers calls LDM's tensor `name`; `attention` names the four maps of its attention."""
    side, *rest = name.split('.')
    if match := re.fullmatch(r'(down|up)\.(\d)\.(block\.(\d)|\w+sample)\.(.*)', '.'.join(rest)):
        way, i, what, j, last = match.groups()
        block = f'{way}_blocks.{3 - int(i) if way == "up" else i}'
        what = f'resnets.{j}' if j else f'{way}samplers.0'
        return f'{side}.{block}.{what}.{last.replace("nin_shortcut", "conv_shortcut")}'
    if match := re.fullmatch(r'mid\.block_(\d)\.(.*)', '.'.join(rest)):
        return f'{side}.mid_block.resnets.{int(match[1]) - 1}.{match[2]}'
    if match := re.fullmatch(r'mid\.attn_1\.(\w+)\.(\w+)', '.'.join(rest)):
        part = dict(zip(('q', 'k', 'v', 'proj_out', 'norm'), (*attention, 'group_norm')))[match[1]]
        return f'{side}.mid_block.attentions.0.{part}.{match[2]}'
    return name.replace('.norm_out.', '.conv_norm_out.')


def to_diffusers(weights, attention=NEW):
    """LDM's tensors as diffusers has them: other names, and attention as linear maps."""
    flat = lambda name, value: value[:, :, 0, 0] if '.attn_1.' in name and value.ndim == 4 else value
    return {diffusers_name(name, attention): flat(name, value) for name, value in weights.items()}


def digest(entries):
    lines = [f'{name} {what}' for name, what in sorted(entries.items())]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def test_every_name_and_shape():
    """SHA-256 of the lines "name shape", sorted, of the published files' lists, in both families' names."""
    ldm = ldm_shapes()
    assert len(ldm) == 248 and sum(math.prod(shape) for shape in ldm.values()) == 83_653_863
    as_lists = {name: list(shape) for name, shape in ldm.items()}
    assert digest(as_lists) == '5c5821b036193b0effb3adf049e2c1c81c13c11351273652c09fab3be5aa1501'
    both = {name: diffusers_name(name) for name in ldm}
    assert digest(both) == '667d11234d55d46950feb47d62685b4ab611eef1b74c0c8805a5ca4fdf040f17'
    with torch.device('meta'):
        ours = {name: list(value.shape) for name, value in data.VAE().state_dict().items()}
        theirs = to_diffusers({name: torch.empty(shape) for name, shape in ldm.items()})
    assert digest(ours) == 'a8eb7356226250e756201865679f4127b544badce9a66957f83afdbf731c2f37'
    assert ours == {name: list(value.shape) for name, value in theirs.items()}


# ------------------------------------------------------------------------------------ files of random weights


@pytest.fixture(scope='session')
def weights():
    """Random weights under LDM's names. The first convolutions are so small that eps = 1e-6 matters."""
    rng = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in ldm_shapes().items():
        value = torch.randn(shape, generator=rng)
        if len(shape) == 4:
            value = value / math.prod(shape[1:]) ** 0.5
        else:
            value = value / 10 + (name.endswith('weight'))
        made[name] = value * 3e-3 if '.conv_in.' in name else value
    return made


def write_safetensors(path, tensors, metadata=None):
    """The format once more: the header's length, the header, the bytes one after the other."""
    kinds = {torch.float32: 'F32', torch.float16: 'F16', torch.int64: 'I64'}
    header, at = {'__metadata__': metadata} if metadata else {}, 0
    for name, value in tensors.items():
        end = at + value.numel() * value.element_size()
        header[name] = {'dtype': kinds[value.dtype], 'shape': list(value.shape), 'data_offsets': [at, end]}
        at = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text)
        for value in tensors.values():
            file.write(value.contiguous().numpy().tobytes())
    return path


@pytest.fixture(scope='session')
def vae_file(weights, tmp_path_factory):
    """As the official file: diffusers' older names."""
    path = tmp_path_factory.mktemp('vae') / 'diffusion_pytorch_model.safetensors'
    return write_safetensors(path, dict(sorted(to_diffusers(weights, OLD).items())), {'format': 'pt'})


@pytest.fixture(scope='session')
def vae(vae_file):
    return data.read_vae(vae_file)[0]


def test_the_official_file_has_the_published_size(vae_file):
    """With its names and numbers of 4 bytes it comes out to the byte, sorted and the header padded to 8."""
    assert vae_file.stat().st_size == 334_643_276 and '334,643,276' in data.PUBLISHED_VAE


def whole(weights):
    """What else lies in a Stable Diffusion checkpoint, under names that would confuse a careless reader."""
    inside = {f'first_stage_model.{name}': value for name, value in weights.items()}
    return inside | {
        'model.diffusion_model.input_blocks.0.0.weight': torch.zeros(320, 4, 3, 3),
        'cond_stage_model.transformer.norm.weight': torch.zeros(768),
        'quant_conv.weight': torch.zeros(8, 8, 1, 1),
        'first_stage_model.loss.logvar': torch.zeros(()),
        'model_ema.num_updates': torch.tensor(7),
    }


def trained(weights):
    """An autoencoder's own checkpoint: its training is in the file as well."""
    more = {'loss.discriminator.main.0.weight': torch.zeros(64, 3, 4, 4)}
    return weights | more | {'model_ema.decay': torch.tensor(0.9)}


FILES = {
    'today.safetensors': to_diffusers,
    'today.bin': to_diffusers,
    'older.bin': lambda weights: to_diffusers(weights, OLD),
    'ldm.safetensors': trained,
    'ldm.ckpt': lambda weights: {'state_dict': trained(weights), 'global_step': 560_000},
    'sd.safetensors': whole,
    'sd.ckpt': lambda weights: {'state_dict': whole(weights), 'epoch': 3},
}


@pytest.mark.parametrize('name', FILES)
def test_all_files_make_the_same_network(name, weights, vae, tmp_path):
    """The older names in a safetensors file are the fixture's."""
    path = tmp_path / name
    content = FILES[name](weights)
    write_safetensors(path, content) if name.endswith('safetensors') else torch.save(content, path)
    found, hashed = data.read_vae(path)
    assert hashed == sha256(path)
    path.unlink()
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = found.encode(x)
    assert torch.equal(z, vae.encode(x)) and z.std() > 0.01
    assert torch.equal(found.decode(z[:, :4]), vae.decode(z[:, :4]))


def test_half_precision_files_are_widened_and_float32_is_meant(weights, vae, tmp_path):
    path = write_safetensors(tmp_path / 'half.safetensors', {k: v.half() for k, v in weights.items()})
    torch.backends.cudnn.conv.fp32_precision = 'tf32'  # torch's default
    found, _ = data.read_vae(path)
    assert torch.backends.cudnn.conv.fp32_precision == 'ieee'
    for name, value in found.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, vae.state_dict()[name].half().float())


# --------------------------------------------------------------------------------- the network, the plain way


def plain_norm(x, w, name):
    groups = x.unflatten(1, (32, -1)).flatten(2)                              # (B, 32, values of a group)
    centred = groups - groups.mean(-1, keepdim=True)
    unit = (centred / (centred**2).mean(-1, keepdim=True).add(1e-6).sqrt()).reshape(x.shape)
    return unit * w[f'{name}.weight'][:, None, None] + w[f'{name}.bias'][:, None, None]


def plain_conv(x, w, name, padding=(1, 1, 1, 1), stride=1):
    return functional.conv2d(functional.pad(x, padding), w[f'{name}.weight'], w[f'{name}.bias'], stride)


def plain_swish(x):
    return x / (1 + torch.exp(-x))


def plain_residual(x, w, name):
    inside = plain_conv(plain_swish(plain_norm(x, w, f'{name}.norm1')), w, f'{name}.conv1')
    inside = plain_conv(plain_swish(plain_norm(inside, w, f'{name}.norm2')), w, f'{name}.conv2')
    if f'{name}.nin_shortcut.weight' in w:
        x = plain_conv(x, w, f'{name}.nin_shortcut', (0, 0, 0, 0))
    return x + inside


def plain_middle(x, w, name):
    x = plain_residual(x, w, f'{name}.block_1')
    unit = plain_norm(x, w, f'{name}.attn_1.norm')
    q, k, v = (plain_conv(unit, w, f'{name}.attn_1.{part}', (0, 0, 0, 0)).flatten(2) for part in 'qkv')
    weight = torch.softmax(torch.einsum('bci,bcj->bij', q, k) / math.sqrt(512), dim=2)
    seen = torch.einsum('bij,bcj->bci', weight, v).reshape(x.shape)
    x = x + plain_conv(seen, w, f'{name}.attn_1.proj_out', (0, 0, 0, 0))
    return plain_residual(x, w, f'{name}.block_2')


def plain_end(x, w, side):
    return plain_conv(plain_swish(plain_norm(x, w, f'{side}.norm_out')), w, f'{side}.conv_out')


def plain_encode(x, w):
    x = plain_conv(x, w, 'encoder.conv_in')
    for i in range(4):
        for j in range(2):
            x = plain_residual(x, w, f'encoder.down.{i}.block.{j}')
        if i < 3:
            x = plain_conv(x, w, f'encoder.down.{i}.downsample.conv', (0, 1, 0, 1), 2)
    x = plain_end(plain_middle(x, w, 'encoder.mid'), w, 'encoder')
    return plain_conv(x, w, 'quant_conv', (0, 0, 0, 0))


def plain_decode(z, w):
    x = plain_conv(plain_conv(z, w, 'post_quant_conv', (0, 0, 0, 0)), w, 'decoder.conv_in')
    x = plain_middle(x, w, 'decoder.mid')
    for i in (3, 2, 1, 0):
        for j in range(3):
            x = plain_residual(x, w, f'decoder.up.{i}.block.{j}')
        if i > 0:
            twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = plain_conv(twice, w, f'decoder.up.{i}.upsample.conv')
    return plain_end(x, w, 'decoder')


def apart(found, truth):
    """The greatest difference relative to the greatest value."""
    return ((found - truth).abs().max() / truth.abs().max()).item()


def test_the_network_is_the_plain_one(vae, weights):
    """float32 against float64 of a second implementation: within 1e-4 of the greatest value."""
    w = {name: value.double() for name, value in weights.items()}
    rng = torch.Generator().manual_seed(2)
    x = torch.rand(2, 3, 32, 32, generator=rng) * 2 - 1
    moments, truth = vae.encode(x), plain_encode(x.double(), w)
    assert moments.shape == (2, 8, 4, 4) and apart(moments, truth) < 1e-4
    z = torch.randn(2, 4, 4, 4, generator=rng)
    pictures, truth = vae.decode(z), plain_decode(z.double(), w)
    assert pictures.shape == (2, 3, 32, 32) and apart(pictures, truth) < 1e-4


def test_autocast_does_not_reach_the_network(vae):
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.autocast('cpu', torch.bfloat16):
        moments = vae.encode(x)
        pictures = vae.decode(moments[:, :4])
    assert torch.equal(moments, vae.encode(x)) and torch.equal(pictures, vae.decode(moments[:, :4]))
    assert moments.dtype == pictures.dtype == torch.float32


def test_a_picture_depends_on_no_batch(vae):
    z = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(4))
    assert torch.equal(vae.decode(z)[1:2], vae.decode(z[1:2]))


def round_trip(vae, size):
    """A real picture to moments and back: the shapes, and that the picture's content matters."""
    picture, _ = data.read_picture(ROOT / 'assets' / 'laptop.png', size)
    x = torch.from_numpy(picture.copy())[None] / 127.5 - 1
    moments = vae.encode(x)
    assert moments.shape == (1, 8, size // 8, size // 8)
    back = data.to_uint8(vae.decode(moments[:, :4]))
    assert back.shape == (1, 3, size, size) and back.dtype == torch.uint8 and back.float().std() > 1


def test_round_trip_of_256_pixels(vae):
    round_trip(vae, 256)


@pytest.mark.slow
def test_round_trip_of_512_pixels(vae):
    round_trip(vae, 512)


@pytest.mark.parametrize('shape', [(1, 3, 32, 24), (1, 3, 36, 36), (1, 1, 32, 32), (1, 3, 0, 0)])
def test_other_pictures_are_refused(vae, shape):
    with pytest.raises(data.BadInput, match=re.escape(f'not {shape}')):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize('shape', [(1, 8, 4, 4), (1, 4, 4, 8), (1, 3, 4, 4)])
def test_other_latents_are_refused(vae, shape):
    with pytest.raises(data.BadInput, match=re.escape(f'not {shape}')):
        vae.decode(torch.zeros(shape))


def test_latents_are_sampled_around_the_encoder_s_mean(vae, tmp_path):
    """4,000 draws of one picture's 64 latents: mean and variance within 5 standard errors of the moments."""
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    row = vae.encode(x)[0].numpy()
    meta = {'kind': 'moments', 'classes': 0, 'scale': data.LATENT_SCALE}
    data.save_folder(tmp_path / 'd', [(row, 0), (row, 0)], 'float16', row.shape, meta)
    dataset, n = data.Data(tmp_path / 'd'), 4000
    raw, _ = dataset.rows(np.zeros(n, int))
    normal = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    drawn = dataset.to_input(raw, normal).double() / 0.18215
    mean, logvar = torch.from_numpy(row.astype(np.float16)).double().chunk(2)
    error = (logvar / 2).exp() / math.sqrt(n)
    assert ((drawn.mean(0) - mean).abs() < 5 * error).all()
    assert ((drawn.var(0) / logvar.exp() - 1).abs() < 5 * math.sqrt(2 / n)).all()
    assert mean.std() > 0.1 and logvar.std() > 0.1


@pytest.mark.slow
def test_the_network_is_that_of_diffusers(vae, weights):
    """Encoder and decoder within 1e-4 of the library's on the same weights, at 64 and 256 pixels."""
    diffusers = pytest.importorskip('diffusers')
    theirs = diffusers.AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    ).eval()
    theirs.load_state_dict(to_diffusers(weights))
    rng = torch.Generator().manual_seed(7)
    for size in (64, 256):
        x = torch.rand(1, 3, size, size, generator=rng) * 2 - 1
        z = torch.randn(1, 4, size // 8, size // 8, generator=rng)
        with torch.no_grad():
            assert apart(vae.encode(x), theirs.encode(x).latent_dist.parameters) < 1e-4
            assert apart(vae.decode(z), theirs.decode(z).sample) < 1e-4


# ---------------------------------------------------------------------------------- from moments to pictures


@pytest.fixture(scope='module')
def run(vae_file, tmp_path_factory):
    """(data folder, checkpoint) of a network of 4 x 8 x 8 latents, two steps of training."""
    desk = tmp_path_factory.mktemp('run')
    rng = np.random.default_rng(0)
    rows = ((rng.standard_normal((8, 8, 8)), k % 3) for k in range(60))
    meta = {'kind': 'moments', 'classes': 3, 'scale': 0.2}
    meta |= {'vae': str(vae_file), 'vae_sha256': sha256(vae_file)}
    data.save_folder(desk / 'data', rows, 'float16', (8, 8, 8), meta)
    return desk / 'data', train.main([*train_flags(desk), '--steps', '2'])


def train_flags(desk):
    flags = ['--model', 'T/2', '--batch', '4', '--preview', '0', '--precision', 'fp32']
    return [*flags, '--data', str(desk / 'data'), '--out', str(desk / 'out')]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_latents_are_decoded_with_the_data_s_vae(run, vae_file, weights, tmp_path, capsys):
    """The pictures are the plain decoder's of latents / scale, each pixel the nearest of 256 levels."""
    flags = ['-n', '2', '--steps', '2', '--batch', '2', '--precision', 'fp32', '--png', str(tmp_path / 'png')]
    sample.main([str(run[1]), *flags, '--npz', str(tmp_path / 'a.npz'), '--out', str(tmp_path / 'a.png')])
    out = capsys.readouterr().out
    assert f'VAE {vae_file}, SHA-256 {sha256(vae_file)}\n' in out and 'note' not in out
    with np.load(tmp_path / 'a.npz') as file:
        images, labels, settings = file['arr_0'], file['arr_1'], json.loads(str(file['settings']))
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
    assert (settings['vae'], settings['vae_sha256']) == (str(vae_file), sha256(vae_file))
    net, cfg = model.load_net(run[1])
    latents = sample.generate(net, cfg, 0, range(2), labels.tolist(), 2)
    plain = plain_decode(latents / 0.2, {name: value.double() for name, value in weights.items()})
    levels = ((plain + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - levels).max() < 0.51 and images.std() > 5
    for i in range(2):
        assert np.array_equal(np.asarray(Image.open(tmp_path / 'png' / f'{i:06d}.png')), images[i])
    assert Image.open(tmp_path / 'a.png').size[0] > 2 * 64


def test_another_vae_is_used_and_told(run, vae_file, tmp_path, capsys):
    """--vae goes before what is remembered, and a note tells if it is not the file the data was made with."""
    state = torch.load(run[1], weights_only=True)
    state['config'] |= {'vae': 'moved.safetensors', 'vae_sha256': 'a' * 64}
    torch.save(state, tmp_path / 'x.pt')
    sample.main([str(tmp_path / 'x.pt'), '-n', '1', '--steps', '2', '--vae', str(vae_file)])
    out = capsys.readouterr().out
    assert f'VAE {vae_file}, ' in out
    assert f'note: the data was made with another VAE file, SHA-256 {"a" * 64}\n' in out


def test_the_vae_may_move_and_tuning_remembers_it_too(run, tmp_path):
    shutil.copytree(run[0].parent, tmp_path / 'run')
    meta = json.loads((tmp_path / 'run' / 'data' / 'meta.json').read_text())
    moved = {'vae': 'moved.safetensors', 'vae_sha256': None}
    (tmp_path / 'run' / 'data' / 'meta.json').write_text(json.dumps(meta | moved))
    path = train.main([*train_flags(tmp_path / 'run'), '--steps', '2'])  # not refused: it goes on
    assert path.name == '0000002.pt'
    flags = ['--data', str(run[0]), '--steps', '1', '--batch', '2', '--preview', '0']
    flags += ['--out', str(tmp_path / 'tuned')]
    tuned = model.read_checkpoint(finetune.main([str(path), *flags]))['config']
    trained = model.read_checkpoint(run[1])['config']
    for name in ('vae', 'vae_sha256', 'scale'):
        assert tuned[name] == trained[name] == meta[name]


def test_a_picture_is_inpainted_through_the_vae(run, weights, tmp_path):
    """What is known is `scale` times the encoder's mean; the pictures come out at their own size."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(tmp_path / 'mask.png')
    flags = ['--inpaint', str(tmp_path / 'photo.png'), '--mask', str(tmp_path / 'mask.png')]
    flags = [str(run[1]), *flags, '-n', '1', '--steps', '2', '--out', str(tmp_path / 'a.png')]
    args, cfg = sample.parse(flags), model.load_net(run[1])[1]
    x0, known = sample.read_inpainting(args, cfg, sample.find_vae(args, cfg, torch.device('cpu'))[0])
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    mean = plain_encode(x.double(), {name: value.double() for name, value in weights.items()})[:, :4]
    assert x0.dtype == torch.float64 and apart(x0, 0.2 * mean) < 1e-4
    assert (~known).nonzero().flatten().tolist() == [0, 5, 10, 15]
    sample.main([*flags, '--npz', str(tmp_path / 'a.npz')])
    with np.load(tmp_path / 'a.npz') as file:
        assert file['arr_0'].shape == (1, 64, 64, 3)


# ------------------------------------------------------------------------------------- files that are refused


def test_a_missing_file_is_told_where_it_is_published(tmp_path):
    with pytest.raises(data.BadInput) as refusal:
        data.read_vae(tmp_path / 'none.safetensors')
    words = ('none.safetensors', 'huggingface.co/stabilityai/sd-vae-ft-ema', '334,643,276', 'a1d9934885')
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda w: w.pop('quant_conv.bias'), '1 missing, such as quant_conv.bias'),
        (lambda w: w.update({'x': torch.zeros(1), 'y': torch.zeros(1)}), '2 too many, such as x'),
        (lambda w: w.update({'quant_conv.bias': torch.zeros(4)}), '1 of other shapes, such as quant_co'),
        (
            lambda w: w.update({'decoder.mid.attn_1.q.weight': torch.zeros(512, 512, 3, 3)}),
            'other shapes, such as decoder.mid_block.attentions.0.to_q.weight',
        ),
        (lambda w: [w.pop(name) for name in list(w) if name.startswith('decoder')], '138 missing'),
        (lambda w: w.clear(), '248 missing'),
    ],
)
def test_other_tensors_are_refused_in_a_sentence(spoil, words, weights):
    """Of a file's content, that is; files of these were read above."""
    content = dict(weights)
    spoil(content)
    with torch.device('meta'):
        wanted = data.VAE().state_dict()
    with pytest.raises(data.BadInput, match=re.escape(words)) as refusal:
        data.to_vae_names(content, wanted, 'some.file')
    assert str(refusal.value).startswith('some.file ') and 'sd-vae-ft-ema' in str(refusal.value)


def test_numbers_that_are_not_finite_are_refused(weights):
    content = dict(weights)
    content['quant_conv.bias'] = torch.full((8,), torch.nan)
    with torch.device('meta'):
        wanted = data.VAE().state_dict()
    with pytest.raises(data.BadInput, match='not finite, quant_conv.bias and 0 more'):
        data.to_vae_names(content, wanted, 'some.file')


class Poison:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    torch.save({'quant_conv.bias': torch.zeros(8), 'more': Poison(tmp_path / 'ran')}, tmp_path / 'x.ckpt')
    with pytest.raises(data.BadInput, match='would run code.*safetensors twin'):
        data.read_vae(tmp_path / 'x.ckpt')
    assert not (tmp_path / 'ran').exists()
    torch.load(tmp_path / 'x.ckpt', weights_only=False)  # the poison is one
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize('content', [[1, 2], {'state_dict': 3}, {5: torch.zeros(1)}, torch.zeros(3)])
def test_torch_files_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / 'x.pt')
    with pytest.raises(data.BadInput, match='248 missing'):
        data.read_vae(tmp_path / 'x.pt')


def test_damaged_torch_files(tmp_path):
    torch.save({'a': torch.arange(10_000.0)}, tmp_path / 'x.pt')
    whole = (tmp_path / 'x.pt').read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(struct.pack('<f', 5000.0))] ^= 1
    for content, words in ((flipped, 'checksum'), (whole[:-500], 'cut short'), (whole[:2000], 'cut short')):
        (tmp_path / 'x.pt').write_bytes(content)
        with pytest.raises(data.BadInput, match=words):
            data.read_vae(tmp_path / 'x.pt')


@pytest.mark.parametrize(
    'content',
    [b'', b'<!doctype html><title>404</title>', b'version https://git-lfs.github.com/spec/v1\n', b'\x80\x02'],
)
def test_files_of_another_kind(content, tmp_path):
    (tmp_path / 'x').write_bytes(content)
    with pytest.raises(data.BadInput, match='neither a safetensors nor a torch file') as refusal:
        data.read_vae(tmp_path / 'x')
    assert repr(content[:16]) in str(refusal.value)


# ---------------------------------------------------------------------------------------------- safetensors


def raw_file(path, header, body=b'', length=None):
    """A file of this header, a dictionary or bytes, that may lie about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text) if length is None else length) + text + body)
    return path


def entry(dtype, shape, begin, end):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


def test_every_type_is_read(tmp_path):
    """All ten, a scalar, an empty tensor, bytes out of order in the header, and a start on an odd byte."""
    values = {
        'F64': torch.tensor([math.pi, -1e300], dtype=torch.float64),
        'F32': torch.tensor([[1.5, -2.5], [math.inf, 3e-40]]),
        'F16': torch.tensor([0.1], dtype=torch.float16),
        'BF16': torch.tensor([0.1, 2.0], dtype=torch.bfloat16),
        'I64': torch.tensor(-(2**62)),
        'I32': torch.tensor([-7, 2**31 - 1], dtype=torch.int32),
        'I16': torch.tensor([-300], dtype=torch.int16),
        'I8': torch.tensor([-5], dtype=torch.int8),
        'U8': torch.zeros(0, 3, dtype=torch.uint8),
        'BOOL': torch.tensor([True, False, True]),
    }
    header, body = {'__metadata__': {'format': 'pt'}}, b''
    for name in ('BOOL', 'F64', 'BF16', 'U8', 'I8', 'I64', 'F16', 'F32', 'I16', 'I32'):
        value = values[name]
        content = bytes(value.reshape(-1).view(torch.uint8).tolist())
        header[name] = entry(name, list(value.shape), len(body), len(body) + len(content))
        body += content
    header = dict(reversed(header.items()))
    found = data.read_safetensors(raw_file(tmp_path / 'x', header, body))
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
        assert found[name].data_ptr() % value.element_size() == 0
    found['F32'][:] = 0  # a tensor may be written to, the file is not
    assert torch.equal(data.read_safetensors(tmp_path / 'x')['F32'], values['F32'])


A, B = entry('F32', [2], 0, 8), entry('F32', [2], 8, 16)
LIES = {
    'empty file': (None, b'', None),
    'seven bytes': (None, b'\0' * 7, None),
    'header of 2^60 bytes': ({'a': A}, bytes(8), 2**60),
    'header of 2^64 - 1 bytes': ({'a': A}, bytes(8), 2**64 - 1),
    'header longer than the file': ({'a': A}, b'', 1000),
    'header above the cap': (b'{' + b' ' * 2_000_000 + b'}', b'', None),
    'header of zero bytes': (b'', bytes(8), None),
    'no JSON': (b'{"a": ', b'', None),
    'no UTF-8': (b'{"\xff": 1}', b'', None),
    'deep JSON': (b'{"a":' + b'[' * 100_000, b'', None),
    'a number of 5,000 digits': (b'{"a": {"dtype": "U8", "shape": [' + b'9' * 5000 + b']}}', b'', None),
    'a list': (b'[]', b'', None),
    'an entry that is a list': ({'a': [1]}, b'', None),
    'an entry that is a string': ({'a': 'dtype'}, b'', None),
    'no type': ({'a': {'shape': [2], 'data_offsets': [0, 8]}}, bytes(8), None),
    'another type': ({'a': A | {'dtype': 'F8_E4M3'}}, bytes(8), None),
    'a type that is a list': ({'a': A | {'dtype': ['F32']}}, bytes(8), None),
    'a shape that is an object': ({'a': entry('F32', {}, 0, 4)}, bytes(4), None),
    'a shape of text': ({'a': A | {'shape': '2'}}, bytes(8), None),
    'a shape of fractions': ({'a': A | {'shape': [2.0]}}, bytes(8), None),
    'a shape of truth': ({'a': entry('F32', [True], 0, 4)}, bytes(4), None),
    'a negative shape': ({'a': entry('F32', [-2, -1], 0, 8)}, bytes(8), None),
    'a shape whose product wraps to 0': ({'a': entry('U8', [2**32, 2**32], 0, 0)}, b'', None),
    'an empty shape of vast strides': ({'a': entry('U8', [2**62, 2**62, 0], 0, 0)}, b'', None),
    'nine dimensions': ({'a': entry('U8', [1] * 9, 0, 1)}, bytes(1), None),
    'one offset': ({'a': A | {'data_offsets': [0]}}, bytes(8), None),
    'offsets the wrong way': ({'a': entry('F32', [2], 8, 0)}, bytes(8), None),
    'negative offsets': ({'a': entry('F32', [2], -8, 0)}, bytes(8), None),
    'too few bytes for the shape': ({'a': entry('F32', [3], 0, 8)}, bytes(8), None),
    'too many bytes for the shape': ({'a': entry('F32', [2], 0, 12)}, bytes(12), None),
    'truncated': ({'a': A, 'b': B}, bytes(15), None),
    'trailing bytes': ({'a': A, 'b': B}, bytes(17), None),
    'past the end': ({'a': entry('F32', [2], 2**40, 2**40 + 8)}, bytes(8), None),
    'overlap': ({'a': A, 'b': entry('F32', [2], 4, 12)}, bytes(12), None),
    'the same bytes twice': ({'a': A, 'b': A}, bytes(8), None),
    'a hole': ({'a': A, 'b': entry('F32', [2], 12, 20)}, bytes(20), None),
    'a hole before the first': ({'a': B}, bytes(16), None),
    'a name twice': (b'{"a":%b,"a":%b}' % ((json.dumps(A).encode(),) * 2), bytes(8), None),
    'a key twice': (b'{"a":{"dtype":"U8","shape":[8],"shape":[8],"data_offsets":[0,8]}}', bytes(8), None),
}


@pytest.mark.parametrize('what', LIES)
def test_lying_safetensors_are_refused(what, tmp_path):
    header, body, length = LIES[what]
    path = tmp_path / 'x'
    path.write_bytes(body) if header is None else raw_file(path, header, body, length)
    with pytest.raises(data.BadInput, match='no whole safetensors file') as refusal:
        data.read_safetensors(path)
    assert '\n' not in str(refusal.value) and len(str(refusal.value)) < 400 + len(str(path))


def test_the_control_of_the_lies(tmp_path):
    """What they lie about is true: these two are read."""
    body = np.arange(4, dtype='<f4').tobytes()
    found = data.read_safetensors(raw_file(tmp_path / 'x', {'a': A, 'b': B}, body))
    assert found['a'].tolist() == [0, 1] and found['b'].tolist() == [2, 3]
    assert data.read_safetensors(raw_file(tmp_path / 'y', {})) == {}


def test_safetensors_that_cannot_be_read(tmp_path):
    for path in (tmp_path / 'none', tmp_path):
        with pytest.raises(data.BadInput, match='cannot be read'):
            data.read_safetensors(path)
