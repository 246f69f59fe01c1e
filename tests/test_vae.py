"""The autoencoder of data.py and its files, against names, shapes and a network written a second time."""

import hashlib
import json
import math
import re
import struct

import pytest
import torch
from conftest import Payload
from torch.nn import functional

import data

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
    """SHA-256 of the lines "name shape", sorted: of the published files' lists, in both families' names."""
    lines = [f'{name} {what}' for name, what in sorted(entries.items())]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def test_every_name_and_shape():
    """Ours are LDM's, and the published lists of both families are the description's."""
    ldm = {name: list(shape) for name, shape in ldm_shapes().items()}
    assert len(ldm) == 248 and sum(map(math.prod, ldm.values())) == 83_653_863
    assert digest(ldm) == '5c5821b036193b0effb3adf049e2c1c81c13c11351273652c09fab3be5aa1501'
    assert digest({name: diffusers_name(name) for name in ldm}) \
        == '667d11234d55d46950feb47d62685b4ab611eef1b74c0c8805a5ca4fdf040f17'
    with torch.device('meta'):
        assert {name: list(value.shape) for name, value in data.VAE().state_dict().items()} == ldm


# ------------------------------------------------------------------------------------ files of random weights

@pytest.fixture(scope='module')
def weights():
    """Random weights under LDM's names. The first convolutions are so small that eps = 1e-6 matters."""
    rng, made = torch.Generator().manual_seed(0), {}
    for name, shape in ldm_shapes().items():
        value = torch.randn(shape, generator=rng)
        bias = len(shape) == 1
        value = value / 10 + name.endswith('weight') if bias else value / math.prod(shape[1:]) ** 0.5
        made[name] = value * 3e-3 if '.conv_in.' in name else value
    return made


def write_safetensors(path, tensors, metadata=None):
    """The format once more: the header's length, the header, the bytes one after the other."""
    header, at = {'__metadata__': metadata} if metadata else {}, 0
    for name, value in tensors.items():
        end = at + value.numel() * value.element_size()
        header[name] = {'dtype': 'F32', 'shape': list(value.shape), 'data_offsets': [at, end]}
        at = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text)
        for value in tensors.values():
            file.write(value.contiguous().numpy().tobytes())
    return path


@pytest.fixture(scope='module')
def vae_file(weights, tmp_path_factory):
    """As the official file: diffusers' older names, sorted. The only large file of these tests."""
    path = tmp_path_factory.mktemp('vae') / 'diffusion_pytorch_model.safetensors'
    yield write_safetensors(path, dict(sorted(to_diffusers(weights, OLD).items())), {'format': 'pt'})
    path.unlink()


@pytest.fixture(scope='module')
def vae(vae_file):
    vae, sha256 = data.read_vae(vae_file)
    assert sha256 == hashlib.sha256(vae_file.read_bytes()).hexdigest()
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    return vae


def test_the_official_file_is_read_and_has_the_published_size(vae_file, vae, weights):
    """With its names and numbers of 4 bytes it comes out to the byte, the header padded to 8."""
    assert vae_file.stat().st_size == 334_643_276 and '334,643,276' in data.PUBLISHED_VAE
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


def whole(weights):
    """What else is in a Stable Diffusion checkpoint, under names that would confuse a careless reader."""
    inside = {f'first_stage_model.{name}': value for name, value in weights.items()}
    return {'state_dict': inside | {
        'model.diffusion_model.input_blocks.0.0.weight': torch.zeros(320, 4, 3, 3),
        'quant_conv.weight': torch.zeros(8, 8, 1, 1), 'encoder.conv_in.bias': torch.zeros(128),
        'first_stage_model.loss.logvar': torch.zeros(()), 'model_ema.num_updates': torch.tensor(7)}}


@pytest.mark.parametrize('content', [
    to_diffusers, lambda weights: weights | {'loss.logvar': torch.zeros(())}, whole],
    ids=['diffusers today', 'LDM', 'Stable Diffusion'])
def test_all_layouts_give_the_same_weights(content, weights, tmp_path, monkeypatch):
    """As torch files; what they hold is in memory here. Half precision becomes float32."""
    (tmp_path / 'a.ckpt').write_bytes(b'PK')
    layout = content({name: value.half() for name, value in weights.items()})
    monkeypatch.setattr(torch, 'load', lambda path, device, weights_only: weights_only and layout)
    found = data.read_vae(tmp_path / 'a.ckpt')[0].state_dict()
    for name, value in weights.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value.half().float())


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
    """float32 against float64 of a second implementation: within 2e-6 and 2e-5 of the greatest value."""
    w = {name: value.double() for name, value in weights.items()}
    rng = torch.Generator().manual_seed(2)
    x, z = torch.rand(1, 3, 32, 32, generator=rng) * 2 - 1, torch.randn(1, 4, 4, 4, generator=rng)
    moments, images = vae.encode(x), vae.decode(z)
    assert moments.shape == (1, 8, 4, 4) and apart(moments, plain_encode(x.double(), w)) < 2e-6
    assert images.shape == (1, 3, 32, 32) and apart(images, plain_decode(z.double(), w)) < 2e-5


def test_images_depend_on_no_batch(vae):
    z = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(vae.decode(z)[1:2], vae.decode(z[1:2]))


# ---------------------------------------------------------------------------------- small files, good and bad

@pytest.mark.parametrize('zipped', [True, False])
def test_torch_files_of_both_ages_are_read(zipped, tmp_path):
    """Torch's older format is no zip file. Of these tensors one fits, so 247 are missing."""
    content = {'state_dict': {'quant_conv.bias': torch.zeros(8), 'step': 3}}
    torch.save(content, tmp_path / 'x.ckpt', _use_new_zipfile_serialization=zipped)
    with pytest.raises(data.BadInput, match='248 tensors 247 are missing.*sd-vae-ft-ema'):
        data.read_vae(tmp_path / 'x.ckpt')


def test_no_code_is_run_from_a_file(tmp_path):
    torch.save({'quant_conv.bias': torch.zeros(8), 'more': Payload(tmp_path / 'ran')}, tmp_path / 'x.ckpt')
    with pytest.raises(data.BadInput, match='would run code') as error:
        data.read_vae(tmp_path / 'x.ckpt')
    assert 'weights_only' not in str(error.value) and not (tmp_path / 'ran').exists()
    torch.load(tmp_path / 'x.ckpt', weights_only=False)
    assert (tmp_path / 'ran').exists()                                        # it would have


def test_bad_files_are_one_sentence(tmp_path):
    """Missing, empty, a web page, Git's pointer, truncated, other shapes."""
    good = write_safetensors(tmp_path / 'good', {'quant_conv.bias': torch.zeros(8)}).read_bytes()
    bad = {'no file': None, 'empty': b'', 'page': b'<!doctype html><title>404</title>', 'cut': good[:-8],
           'pointer': b'version https://git-lfs.github.com/spec/v1\n'}
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(data.BadInput, match=name) as error:
            data.read_vae(tmp_path / name)
        assert '\n' not in str(error.value) and len(str(error.value)) < 500
    write_safetensors(tmp_path / 'other', {'quant_conv.bias': torch.zeros(4)})
    with pytest.raises(data.BadInput, match='248 are missing or of another shape'):
        data.read_vae(tmp_path / 'other')
