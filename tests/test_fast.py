"""What makes it fast, in numbers that no machine changes: FLOPs, bytes, calls. Nothing is asserted of time.

Most of it is counted on `meta` tensors, which have shapes and no content: XL/2 takes a second there.
"""

import copy
import json
import statistics
import weakref

import bench
import pytest
import torch
from conftest import build, config, draws, images, randomise
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model
from model import METHODS


def latents(method, size, resolution=32, **changes):
    """The configuration of a run on ImageNet's latents: 4 x 32 x 32, 256 tokens, or 4 x 64 x 64, 1024."""
    return config(method, model=size, resolution=resolution, channels=4, classes=1000, **changes)


def loss_on_meta(cfg, n=1):
    """(net, teacher, a function that computes the loss of n images): shapes only, no numbers."""
    with torch.device('meta'):
        net = model.Net(cfg)
        teacher = model.make_teacher(net, cfg)
        x, y = torch.empty(n, 4, cfg['resolution'], cfg['resolution']), torch.empty(n, dtype=torch.long)
    made = {name: value.to('meta') for name, value in model.draw(cfg, 0, n).items()}
    return net, teacher, lambda: METHODS[cfg['method']]['loss'](net, teacher, x, y, made, cfg)[0]


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: q, k, v, the bias and its result, and no N x N weights."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        result = torch.empty_like(v.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, bias, result)
        return result

    @staticmethod
    def backward(ctx, grad):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


@pytest.fixture
def fused(monkeypatch):
    attention = lambda q, k, v, attn_mask: FusedAttention.apply(q, k, v, attn_mask)
    monkeypatch.setattr(functional, 'scaled_dot_product_attention', attention)


# ------------------------------------------------------------------------------------------------ arithmetic

# Multiply-adds of the parts, n tokens of width w, conditioning of width c; 16 values a patch.
block = lambda n, w, c: 12 * n * w * w + 2 * n * n * w + 6 * c * w  # qkv, proj, MLP; q k and p v; adaLN
modulated = lambda n, w, out, c: n * w * out + 2 * c * w
rest_of_stem = lambda d: d * d  # the second layer of the noise embedding
first = lambda n, d: n * 16 * d + 256 * d  # layers on what asks for no gradient: backward costs them 1, not 2


def training_flops(method, size, N):
    """FLOPs of one training image: forward, backward, and the EMA network's forward."""
    depth, d = {'S': (12, 384), 'B': (12, 768), 'XL': (28, 1152)}[size]
    K = {'dit': N, 'maskdit': N // 2, 'mcdit': N // 2, 'mdt': int(0.7 * N), 'sddit': int(0.8 * N)}[method]
    e, narrow = 512, 8
    if method == 'dit':
        both = rest_of_stem(d) + depth * block(N, d, d) + modulated(N, d, 16, d)
        return 2 * (3 * both + 2 * first(N, d))
    if method == 'mdt':
        full = rest_of_stem(d) + depth * block(N, d, d) + modulated(N, d, 16, d)
        masked = rest_of_stem(d) + (depth - 2) * block(K, d, d) + 3 * block(N, d, d) + modulated(N, d, 16, d)
        again = (depth - 2) * K * K * d  # q k once more in backward, under biases that were not kept
        return 2 * (3 * (full + masked) + 2 * (first(N, d) + first(K, d)) + again)
    seen = K + (method == 'sddit')  # [CLS]
    decoder = narrow * block(N, e, d) + modulated(N, e, 16, d)
    both = rest_of_stem(d) + depth * block(seen, d, d) + modulated(K, d, e, d) + decoder
    once, filled = 0, N * 16 * e
    if method == 'mcdit':
        once = 2 * (filled + decoder) + 256 * d + d * d  # two branches without encoder; c for them
    elif method == 'sddit':
        head = d * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 8192
        both += seen * head
        once = first(N, d) + rest_of_stem(d) + depth * block(N + 1, d, d) + (N + 1) * head
    return 2 * (3 * both + 2 * (first(K, d) + filled * (method != 'maskdit')) + once)


@pytest.mark.parametrize('size, side', [('S/2', 32), ('B/2', 32), ('XL/2', 32), ('XL/2', 64)])
def test_training_flops(size, side):
    """The counter and the closed form agree to the last FLOP; the ratios are the known ones to 0.2 %.

    MDT's includes what its masked pass computes twice (0.15 % at 256 tokens), SD-DiT's its head and a teacher
    on all tokens.
    """
    counted = {}
    for method in METHODS:
        _, _, loss = loss_on_meta(latents(method, size, side))
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        counted[method] = counter.get_total_flops()
        assert counted[method] == training_flops(method, size.partition('/')[0], (side // 2) ** 2), method
    ratio = {('S/2', 32): 1.471, ('B/2', 32): 1.256, ('XL/2', 32): 1.0714, ('XL/2', 64): 1.0819}[size, side]
    assert counted['mcdit'] / counted['maskdit'] == pytest.approx(ratio, rel=2e-3)
    if (size, side) == ('XL/2', 32):
        known = {'dit': 1, 'maskdit': 0.552, 'mcdit': 0.591, 'mdt': 1.75, 'sddit': 1.21}
        for method, times in known.items():
            assert counted[method] / counted['dit'] == pytest.approx(times, rel=3e-3), method


def test_a_step_asks_for_no_number():
    """What waits for the device, such as .item(), is an error on tensors without content."""
    for method in METHODS:
        cfg = config(method, channels=4)
        net, teacher, loss = loss_on_meta(cfg, 4)
        ema = copy.deepcopy(net)
        loss().backward()
        ok = torch.empty((), dtype=torch.bool, device='meta')
        model.update_ema(ema, net, 0.5, ok)
        if teacher is not None:
            model.update_teacher(teacher, net, 3, cfg, ok)


class Devices(TorchDispatchMode):
    """Where the tensors that are made under it lie."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.add(result.device.type)
        return result


def test_ddpms_steps_are_made_where_they_are_used():
    """A copy from main memory would wait for the GPU, at every step of tuning and of the sampler."""
    with Devices() as devices:
        model.ddpm_time(torch.ones(3, device='meta'))
    assert devices.seen == {'meta'}


# ---------------------------------------------------------------------------------------- MC-DiT's branches


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(function, net):
    """Bytes that backward of what `function` returns would find, the network's own parameters left out."""
    everything = []

    def pack(tensor):
        kept = Kept(tensor)
        everything.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = function()
    kept = [kept().tensor.untyped_storage() for kept in everything if kept() is not None]
    assert result is not None  # so its graph has been alive until here
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    return sum({storage._cdata: storage.nbytes() for storage in kept if storage._cdata not in own}.values())


def test_the_branches_keep_nothing_for_backward():
    """MC-DiT's network keeps one tensor more than MaskDiT's, the clean patches, and its loss two images: four
    squares of differences against two."""
    n, bytes_of = 4, {}
    for method in ('maskdit', 'mcdit'):
        cfg = latents(method, 'XL/2')
        net, _, loss = loss_on_meta(cfg, n)
        with torch.device('meta'):
            x, y = torch.empty(n, 4, 32, 32), torch.empty(n, dtype=torch.long)
            visible, patches = torch.empty(n, 128, dtype=torch.long), torch.empty(n, 256, 16)
        alone = saved_bytes(
            lambda: net(x, x[:, 0, 0, 0], y, visible, patches if method == 'mcdit' else None), net
        )
        bytes_of[method] = alone, saved_bytes(loss, net) - alone
    image = n * 4 * 32 * 32 * 4
    assert bytes_of['mcdit'][0] - bytes_of['maskdit'][0] == image
    assert 0 < bytes_of['mcdit'][1] - bytes_of['maskdit'][1] <= 4 * image
    assert bytes_of['maskdit'][0] > 1000 * image


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made under it hold at a time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def freed(self, address, size):
        self.now -= size
        self.known.remove(address)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def test_the_branches_come_before_the_activations(fused):
    """So the peak of a step is MaskDiT's, the EMA decoder's weights, and a few images. With the branches
    last, their own activations would lie on top: 530 images' worth, 3 GB for 256 of XL/2 in float32."""
    n, peaks = 4, {}
    image = n * 4 * 32 * 32 * 4
    for method in ('maskdit', 'mcdit'):
        net, teacher, loss = loss_on_meta(latents(method, 'S/2'), n)
        with PeakBytes() as held:
            loss().backward()
        peaks[method] = held.peak
    weights = sum(4 * p.numel() for p in teacher.parameters())
    assert abs(peaks['mcdit'] - peaks['maskdit'] - weights) < 10 * image


def nodes(tensor):
    """Names of the nodes of the graph behind `tensor`."""
    found, ahead = set(), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [after for after, _ in node.next_functions]
    return [node.name() for node in found]


def test_one_pass_of_each_decoder_and_no_graph_through_the_second():
    cfg = config()
    net, teacher = build(cfg)
    x, y = images(cfg)
    calls = []
    for whose in (net, teacher):
        for part in whose.decoder_blocks:
            part.register_forward_hook(lambda _, args, __, whose=whose: calls.append((whose, len(args[0]))))
    loss, _ = model.mcdit_loss(net, teacher, x, y, draws(cfg), cfg)
    assert calls == [(teacher, 8)] * 2 + [(net, 4)] * 2
    linears = sum(isinstance(module, torch.nn.Linear) for module in net.modules())
    assert sum(name.startswith(('Addmm', 'Linear')) for name in nodes(loss)) == linears


# ----------------------------------------------------------------------------------------------- MDT's biases


@pytest.mark.parametrize('size', ['S/2', 'XL/2'])
def test_mdts_masked_pass_keeps_no_more_a_token_than_the_other(size, fused):
    """Every image has its own visible tokens and so its own biases; kept, they would make it 1.08 to 1.09."""
    net, *_ = loss_on_meta(latents('mdt', size))
    with torch.device('meta'):
        patches, c = torch.empty(4, 256, 16), torch.empty(4, net.pos.shape[-1])
        visible = torch.empty(4, 179, dtype=torch.long)
    full = saved_bytes(lambda: net.encode(patches, c), net) / 256
    masked = saved_bytes(lambda: net.encode(patches, c, visible), net) / 179
    assert 0.5 * full < masked <= 1.05 * full


# ---------------------------------------------------------------------------- every way to the same gradients


def gradients(method, way='eager'):
    """(loss, {name: gradient}) of 8 images with random weights in float32, in one of several ways."""
    cfg = config(method)
    torch.manual_seed(0)
    net, teacher = build(cfg, torch.float32)
    x, y = images(cfg, 8, torch.float32)
    made = draws(cfg, 8, dtype=torch.float32)
    net.checkpoint_blocks = 'checkpointed' in way
    if 'compiled' in way:
        for module in (net, teacher):
            model.compile_blocks(module) if module is not None else None
    shares = 2 if way == 'accumulated' else 1
    total = 0
    for rows in torch.arange(8).chunk(shares):
        with torch.autocast('cpu', torch.bfloat16, enabled=way == 'bfloat16'):
            mine = {name: value[rows] for name, value in made.items()}
            loss, _ = METHODS[method]['loss'](net, teacher, x[rows], y[rows], mine, cfg)
        (loss / shares).backward()
        total += loss.item() / shares
    return total, {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


BOUNDS = {  # of the loss; of each gradient, in the norm; of all gradients together
    'checkpointed': (0, 0, 0),
    'accumulated': (1e-6, 1e-5, 2e-6),
    'compiled': (1e-6, 1e-5, 2e-6),
    'compiled, checkpointed': (1e-6, 1e-5, 2e-6),
    'bfloat16': (3e-3, 0.08, 0.03),
}


def agree(method, way):
    (loss, exact), (other, found) = gradients(method), gradients(method, way)
    of_loss, of_each, of_all = BOUNDS[way]
    assert abs(other - loss) <= of_loss * loss
    for name, value in exact.items():
        assert (found[name] - value).norm() <= of_each * value.norm(), name
    flat = lambda grads: torch.cat([value.flatten() for value in grads.values()])
    assert (flat(found) - flat(exact)).norm() <= of_all * flat(exact).norm()


@pytest.mark.parametrize('way', ['checkpointed', 'accumulated', 'bfloat16'])
@pytest.mark.parametrize('method', METHODS)
def test_all_ways_agree_with_eager_float32(method, way):
    agree(method, way)


# encoder, decoder, EMA network; MDT's blocks are alike, but some tokens are hidden from them or none
GRAPHS = {'dit': 1, 'maskdit': 2, 'mdt': 2, 'sddit': 3, 'mcdit': 3}


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_compiled_agrees_with_eager_float32(method):
    """The compiler takes half a minute. One graph for all blocks of one shape, and none more for the next
    network, nor for its blocks computed twice."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    agree(method, 'compiled')
    agree(method, 'compiled, checkpointed')
    assert counters['stats']['unique_graphs'] == GRAPHS[method]


def test_several_processes_compile_each_block_whole(monkeypatch):
    """DistributedDataParallel would cut a block where its parameters fill a bucket of the gradients' sum."""
    graphs, compile_ = [], torch.nn.Module.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(model.Block, 'compile', lambda block, **how: compile_(block, backend=count, **how))
    torch._dynamo.reset()
    net, _ = build(config('maskdit'), torch.float32)
    model.compile_blocks(net)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        student = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.1)
        x, y = images(config(), 8, torch.float32)
        model.maskdit_loss(student, None, x, y, draws(config(), 8, dtype=torch.float32), config('maskdit'))
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == GRAPHS['maskdit']


def test_a_compiled_network_keeps_its_names_and_its_copy_is_not_compiled():
    net = model.Net(config())
    names = list(net.state_dict())
    model.compile_blocks(net)
    assert list(net.state_dict()) == names
    compiled = lambda m: [part for part in m.modules() if part._compiled_call_impl is not None]
    assert len(compiled(net)) == len(net.blocks) + len(net.decoder_blocks)
    assert not compiled(copy.deepcopy(net)) and not compiled(model.make_teacher(net, config()))


def test_checkpointed_blocks_keep_their_input_alone():
    net, *_ = loss_on_meta(latents('mcdit', 'S/2'))
    with torch.device('meta'):
        patches, c = torch.empty(4, 256, 16), torch.empty(4, 384)
    everything = saved_bytes(lambda: net.encode(patches, c), net)
    net.checkpoint_blocks = True
    inputs = saved_bytes(lambda: net.encode(patches, c), net)
    one = 4 * 256 * 384 * 4
    assert 12 * one <= inputs <= 12.5 * one and inputs < everything / 10


@pytest.mark.parametrize('method', METHODS)
def test_every_block_is_checkpointed(method, monkeypatch):
    net, _, loss = loss_on_meta(config(method, channels=4))
    again, checkpoint = set(), model.checkpoint

    def remember(function, *inputs, **how):
        again.add(function)
        return checkpoint(function, *inputs, **how)

    monkeypatch.setattr(model, 'checkpoint', remember)
    loss()
    assert not any(isinstance(function, model.Block) for function in again)
    net.checkpoint_blocks = True
    loss()
    assert again >= {module for module in net.modules() if isinstance(module, model.Block)}


# ------------------------------------------------------------------------------------------- the benchmark


@pytest.mark.slow
def test_the_benchmark_writes_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'SAMPLING_STEPS', 3)
    flags = ['--model', 'T/2', '--batch', '1', '--rounds', '3', '--no-compile', '--json', str(tmp_path / 'a')]
    more = ['--methods', 'dit', 'mcdit', '--precision', 'bf16', '--sampling', '--images', '2']
    report = bench.main([*flags, *more])
    assert json.loads((tmp_path / 'a').read_text()) == report
    (section,) = report['sections']
    rows = section['rows']
    assert list(rows) == ['dit', 'mcdit', 'again'] and section['peak'] is None
    for row in rows.values():
        took, first = statistics.median(row['times']), statistics.median(rows['dit']['times'])
        assert len(row['times']) == 3 and row['seconds'] == took and row['time_ratio'] == took / first
        assert row['flops_per_s'] == pytest.approx(row['flops'] * row['images_per_s'])
        assert row['overhead'] == row['time_ratio'] / row['flop_ratio']
    assert rows['again']['flop_ratio'] == 1 < rows['mcdit']['flop_ratio']
    assert [plan['images'] for plan in section['sampling'].values()] == [2, 2, 2]
    shown = capsys.readouterr().out
    assert all(f'| {name} |' in shown for name in rows) and '50,000 images at 3 steps, guidance:' in shown
    wide = bench.main([*flags, '--methods', 'dit', '--tokens', '1024', '--rounds', '1', '--steps', '2'])
    assert wide['sections'][0]['rows']['dit']['flops'] > 4 * rows['dit']['flops']


def test_the_benchmarks_plan_for_a_gpu(monkeypatch):
    """Its flags are known, and its devices' peaks; without a GPU it says that nothing was measured."""
    plan = [bench.parse(flags) for flags in bench.GPU_PLAN]
    assert {method for section in plan for method in section.methods} == METHODS.keys()
    assert any(section.sampling for section in plan)
    for name, peak in (('NVIDIA H200', 989e12), ('Tesla V100-SXM2-16GB', 125e12), ('Some GPU', None)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
        assert bench.peak_flops(torch.device('cuda'), torch.bfloat16) == peak
        assert bench.peak_flops(torch.device('cuda'), torch.float32) is None
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match='not measured on a GPU'):
            bench.main(['--gpu'])


# ------------------------------------------------------------------------------------- a step that is skipped


def spoken(method):
    """(cfg, net, teacher) after one loss in float32, so that SD-DiT's teacher has something to remember."""
    cfg = config(method)
    net, teacher = build(cfg, torch.float32)
    x, y = images(cfg, dtype=torch.float32)
    METHODS[method]['loss'](net, teacher, x, y, draws(cfg, dtype=torch.float32), cfg)
    return cfg, net, teacher


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('method', ['mcdit', 'sddit'])
def test_a_step_that_went_well_moves_the_shadows_as_if_nobody_had_asked(method):
    """To the bit, with weights of the new on both sides of one half, where lerp has two formulas."""
    cfg, net, teacher = spoken(method)
    for step in (0, 9):
        randomise(net, seed=step)
        asked, moved = copy.deepcopy(teacher), copy.deepcopy(teacher)
        model.update_teacher(asked, net, step, cfg, torch.tensor(True))
        model.update_teacher(moved, net, step, cfg)
        assert same(asked, moved) and not same(asked, teacher)
        model.update_ema(asked, net, model.ema_decay(step), torch.tensor(True))
        model.update_ema(moved, net, model.ema_decay(step))
        assert same(asked, moved)


@pytest.mark.parametrize('method', ['mcdit', 'sddit'])
def test_a_skipped_step_leaves_the_shadows_to_the_bit(method):
    """Also where what the teacher said was the reason, and the step after starts with nothing seen."""
    cfg, net, teacher = spoken(method)
    if method == 'sddit':
        teacher.seen += torch.nan
    before = copy.deepcopy(teacher)
    randomise(net, seed=7)
    for step in (0, 9):
        model.update_ema(teacher, net, model.ema_decay(step), torch.tensor(False))
        assert same(teacher, before)
    model.update_teacher(teacher, net, 9, cfg, torch.tensor(False))
    assert same(teacher, before)
    if method == 'sddit':
        assert teacher.calls == 0 and teacher.seen.abs().max() == 0
