"""Every way to the same gradients: recomputed activations, bfloat16, micro-batches. The compiler, which takes
longer, is in tests/slow/test_compile.py."""

import functools

import pytest
import torch
from conftest import batch, build, config, numbers

import model

METHODS = list(model.METHODS)


def total(terms):
    return sum(weight * value for weight, value in terms.values())


@functools.cache
def gradients(method, way='eager'):
    """(loss, {name: gradient}, sums of SD-DiT's centers) of 4 images in float32, in one of several ways."""
    cfg = config(method, batch=4)
    net, teacher = build(cfg, torch.float32)
    (x0, y), r = batch(cfg, torch.float32), numbers(cfg, dtype=torch.float32)
    if 'checkpointed' in way:
        net.checkpoint_activations()
    if 'compiled' in way:
        for module in filter(None, (net, teacher)):
            model.compile_blocks(module)
    loss, micro_batches = 0.0, torch.arange(4).chunk(2 if way == 'two halves' else 1)
    for rows in micro_batches:
        with torch.autocast('cpu', torch.bfloat16, enabled=way == 'bfloat16'):
            mine = {name: value[rows] for name, value in r.items()}
            part = total(model.loss_of_step(cfg, 3)(net, teacher, x0[rows], y[rows], mine, cfg))
        (part / len(micro_batches)).backward()
        loss += part.item() / len(micro_batches)
    centers = teacher.seen / teacher.calls if method == 'sddit' else torch.zeros(())
    return loss, {name: p.grad for name, p in net.named_parameters() if p.requires_grad}, centers


BOUNDS = {                                    # of the loss, of each gradient, of all: relative, in the norm
    'checkpointed': (0, 0, 0),
    'two halves': (1e-6, 1e-5, 2e-6),
    'compiled': (1e-6, 1e-5, 2e-6),
    'compiled, checkpointed': (1e-6, 1e-5, 2e-6),
    'bfloat16': (3e-3, 0.08, 0.03),
}


def agree(method, way):
    (loss, exact, centers), (other, found, other_centers) = gradients(method), gradients(method, way)
    of_loss, of_each, of_all = BOUNDS[way]
    assert abs(other - loss) <= of_loss * loss
    for name, value in exact.items():
        assert (found[name] - value).norm() <= of_each * value.norm(), name
    flat = lambda grads: torch.cat([value.flatten() for value in grads.values()])
    assert (flat(found) - flat(exact)).norm() <= of_all * flat(exact).norm()
    assert (other_centers - centers).norm() <= of_each * centers.norm()


@pytest.mark.parametrize('way', ['checkpointed', 'two halves', 'bfloat16'])
@pytest.mark.parametrize('method', METHODS)
def test_all_ways_agree_with_eager_float32(method, way):
    agree(method, way)


@pytest.mark.parametrize('method', METHODS)
def test_every_block_is_recomputed(method, monkeypatch):
    """And none unless asked; MDT's attention under a mask always is, as its biases are one set per image."""
    cfg, again, checkpoint = config(method, batch=2), [], model.checkpoint
    monkeypatch.setattr(model, 'checkpoint', lambda function, *inputs, **how:
                        again.append(function) or checkpoint(function, *inputs, **how))
    net, teacher = build(cfg, torch.float32)
    loss = lambda: model.loss_of_step(cfg, 3)(net, teacher, *batch(cfg, torch.float32),
                                              numbers(cfg, dtype=torch.float32), cfg)
    loss()
    assert len(again) == (4 if method == 'mdt' else 0)                        # its 4 blocks of the encoder
    net.checkpoint_activations()
    loss()
    blocks = {module for module in net.modules() if isinstance(module, model.Block)}
    assert {function for function in again if isinstance(function, model.Block)} == blocks


@pytest.mark.parametrize('method', METHODS)
def test_a_step_waits_for_no_number(method):
    """Tensors on `meta` have no content: what would wait for a GPU, such as .item(), is an error there."""
    cfg = config(method)
    with torch.device('meta'):
        net = model.Net(cfg)
        teacher, ema = model.make_teacher(net, cfg), model.Net(cfg)
        x0, y = torch.empty(8, 16, 12), torch.empty(8, dtype=torch.long)
    r = {name: value.to('meta') for name, value in model.random_numbers(cfg, 0).items()}
    total(model.loss_of_step(cfg, 0)(net, teacher, x0, y, r, cfg)).backward()
    model.update_ema(ema, net, 0.5)
    if teacher is not None:
        teacher.update(net, 0.5, skipped=False)


def test_the_head_stays_in_float32_under_autocast():
    """SD-DiT: bfloat16 there makes the loss NaN."""
    cfg = config('sddit')
    net, _ = build(cfg, torch.float32)
    (x, y), r = batch(cfg, torch.float32), numbers(cfg, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        F, c, logits = net(x, r['sigma'], y, r['visible'], x)
    assert logits.dtype == F.dtype == torch.float32 and logits.shape == (8, 13, 64)
    assert logits.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize('method', model.METHODS)
def test_no_tensor_of_a_step_is_made_on_another_device(method):
    """On the meta device, which like a GPU does not mix with the CPU: loss, backward, EMA and teacher."""
    cfg = config(method)
    net, ema = model.Net(cfg).to('meta'), model.Net(cfg).to('meta')
    teacher = model.make_teacher(net, cfg)
    x0, y = (tensor.to('meta') for tensor in batch(cfg, torch.float32))
    r = {name: value.to('meta') for name, value in model.random_numbers(cfg, 3).items()}
    for loss in (model.METHODS[method].loss, model.dit_loss):
        terms = loss(net, teacher, x0, y, r, cfg)
        sum(weight * value for weight, value in terms.values()).backward()
        assert {value.device.type for _, value in terms.values()} == {'meta'}
    model.update_ema(ema, net, 0.5)
    if teacher is not None:
        teacher.update(net, 0.5, False)
    x = torch.empty(8, 3, 8, 8, device='meta')
    assert model.denoise_images(ema, x, r['sigma'], y, cfg).device.type == 'meta'
