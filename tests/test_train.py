"""train.py and finetune.py: the loop's equations a second time, what a run writes, tuning, a sixth method."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from conftest import FOUR, TINY, lines, randomise, run, same, tune

import data
import model
import train


def prepared(folder, out, flags=''):
    """(args, cfg, dataset), as train.main has them."""
    args = train.parse(f'--model T/4 {TINY} --data {folder} --out {out} {flags}'.split())
    dataset = data.Data(folder)
    return args, train.configuration(args, dataset), dataset


# ----------------------------------------------------------------------------------------- the optimizer step

def plain_steps(cfg, dataset, net, ema, steps, lr):
    """Steps of mcdit in plain code: weights, EMA, teacher, AdamW's moments and the gradient norms."""
    teacher = model.EMADecoder(net, cfg)
    learned = lambda *modules: [p for module in modules for p in module.parameters() if p.requires_grad]
    w, shadow = learned(net), [*ema.parameters()]
    shadow = [p for p, trained in zip(shadow, net.parameters()) if trained.requires_grad]
    branch = [p for p in (*teacher.encoder.parameters(), *teacher.decoder.parameters())]
    source = [p for p in (*net.encoder.embed.parameters(), *net.decoder.parameters())]
    m, v, norms = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w], []
    for step in range(steps):
        raw, y = dataset.rows(data.batch_indices(cfg.seed, step, cfg.batch, 196))    # 4 of 200 are held out
        x0 = model.patchify(raw / 127.5 - 1, cfg.patch)
        value = {name: value for name, (_, value) in
                 model.mcdit_loss(net, teacher, x0, y, model.random_numbers(cfg, step), cfg).items()}
        loss = value['clean'] + 0.1 * value['noise'] + 0.1 * value['con1'] + 0.05 * value['con2']
        g = torch.autograd.grad(loss, w)
        norms.append(math.sqrt(sum((x ** 2).sum() for x in g)))
        with torch.no_grad():
            for k in range(len(w)):
                clipped = g[k] / max(norms[-1], 1)
                m[k] = 0.9 * m[k] + 0.1 * clipped
                v[k] = 0.999 * v[k] + 0.001 * clipped ** 2
                m_hat, v_hat = m[k] / (1 - 0.9 ** (step + 1)), v[k] / (1 - 0.999 ** (step + 1))
                w[k] -= lr * m_hat / (v_hat.sqrt() + 1e-8)
                decay = (1 + step) / (10 + step)                              # the EMA's warm-up
                shadow[k].copy_(decay * shadow[k] + (1 - decay) * w[k])
            for old, new in zip(branch, source):
                old.copy_(0.999 * old + 0.001 * new)
    return teacher, m, v, norms


@pytest.mark.parametrize('flags', ['', '--accumulate 2', '--checkpoint-blocks'])
def test_three_steps_are_those_of_plain_code(shapes, tmp_path, flags):
    """Gradients clipped at 1, AdamW without weight decay, EMA with warm-up, teacher; the logged norm too."""
    args, cfg, dataset = prepared(shapes, tmp_path, f'--steps 3 --lr 1e-3 {flags}')
    torch.manual_seed(0)
    net, ema = randomise(model.Net(cfg), 1, 0.2), randomise(model.Net(cfg), 2)
    start = [{name: value.clone() for name, value in module.state_dict().items()} for module in (net, ema)]
    state = torch.load(train.train(args, cfg, dataset, start), weights_only=True)
    teacher, m, v, norms = plain_steps(cfg, dataset, net, ema, 3, 1e-3)
    close = lambda ours, theirs, atol: all(                                   # keys' biases have no gradient
        torch.allclose(ours[name], theirs[name], 1e-4, atol) for name in theirs if 'qkv.bias' not in name)
    assert [line['grad_norm'] for line in lines(tmp_path)] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 1.5                                                   # so that all three are clipped
    assert close(state['model'], net.state_dict(), 5e-6) and not close(state['model'], start[0], 2e-3)
    assert close(state['ema'], ema.state_dict(), 5e-6) and not close(state['ema'], net.state_dict(), 2e-3)
    assert close(state['teacher'], teacher.state_dict(), 1e-6)
    for k, moments in state['opt']['state'].items():
        assert torch.allclose(moments['exp_avg'], m[k], rtol=1e-3, atol=1e-7)
        assert torch.allclose(moments['exp_avg_sq'], v[k], rtol=1e-3, atol=1e-10)
    group, = state['opt']['param_groups']
    assert (group['betas'], group['eps'], group['weight_decay']) == ((0.9, 0.999), 1e-8, 0)


def test_the_learning_rate_falls_to_zero_over_the_last_part(shapes, tmp_path):
    path = run(shapes, tmp_path, '--method dit --steps 8 --lr 0.001 --lr-decay 0.5')
    assert [line['lr'] for line in lines(tmp_path)] == pytest.approx([0.001] * 5 + [0.00075, 0.0005, 0.00025])
    assert torch.load(path, weights_only=True)['opt']['param_groups'][0]['lr'] == pytest.approx(0.00025)


@pytest.mark.parametrize('flags, dtypes', [
    ('--precision bf16', {torch.bfloat16}), ('--precision fp32', {torch.float32}),
    ('--precision bf16 --method sddit', {torch.bfloat16})])
def test_the_network_runs_in_the_precision(shapes, tmp_path, flags, dtypes):
    """Training, held-out loss and EMA networks; SD-DiT's head and all weights stay in float32."""
    seen = {'fc1': set(), 'head': set()}

    def hook(module, inputs, output):
        if isinstance(module, model.Head):
            seen['head'].add(output.dtype)
        elif isinstance(module, model.Block):
            seen['fc1'].add(module.fc1(inputs[0]).dtype)
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        path = run(shapes, tmp_path, f'--steps 1 {flags}')
    finally:
        handle.remove()
    assert seen['fc1'] == dtypes and seen['head'] <= {torch.float32}
    assert {value.dtype for value in torch.load(path, weights_only=True)['model'].values()} == {torch.float32}


def test_every_step_samples_latents_with_new_noise(moments, tmp_path, monkeypatch):
    drawn, to_input = [], data.Data.to_input
    monkeypatch.setattr(data.Data, 'to_input', lambda self, raw, normal: (drawn.append(normal),
                                                                          to_input(self, raw, normal))[1])
    path = run(moments, tmp_path, '--steps 2 --accumulate 2 --eval-every 9 --unlabelled')
    cfg = model.read_checkpoint(path)['config']
    assert (cfg.channels, cfg.kind, cfg.classes) == (4, 'moments', 0)
    for step in (0, 1):
        noise = torch.randn(8, 4, 8, 8, generator=model.generator('cpu', 0, step, 'latent'))
        assert torch.equal(torch.cat(drawn[2 * step:2 * step + 2]), noise)
    assert not torch.equal(drawn[0], drawn[2])


def test_losses_fall(shapes, tmp_path):
    run(shapes, tmp_path, '--steps 40 --batch 16 --lr 2e-3')
    loss = [line['clean'] for line in lines(tmp_path)]
    assert np.mean(loss[-10:]) < 0.9 * np.mean(loss[:5])


# ------------------------------------------------------------------------------------------ the held-out loss

def test_the_held_out_loss_is_the_inference_paths(shapes, trained):
    """In plain code: EMA weights, every token visible, weighted, image i with noise of its own."""
    net, cfg = model.load_net(trained('mcdit', *FOUR) / '0000004.pt')
    dataset = data.Data(shapes)
    x = torch.from_numpy(dataset.array[196:].astype(np.float32)) / 127.5 - 1
    y = torch.from_numpy(dataset.labels[196:])
    rngs = [model.generator('cpu', 0, 'held-out', i) for i in range(4)]
    n = torch.stack([torch.randn(8, 3, 8, 8, generator=rng) for rng in rngs])
    logged, = lines(trained('mcdit', *FOUR), 'held_out')
    assert len(logged['sigma']) == 8 and logged['sigma'][::7] == pytest.approx([0.02, 20])
    for j, sigma in enumerate(logged['sigma']):
        D = model.denoise_images(net, x + sigma * n[:, j], torch.full((4,), sigma), y, cfg)
        loss = ((sigma ** 2 + 0.25) / (sigma * 0.5) ** 2 * (D - x) ** 2).mean()
        assert logged['held_out'][j] == pytest.approx(loss.item(), rel=1e-5)


def test_evaluation_is_by_micro_batches_and_their_size_changes_nothing(shapes, trained, monkeypatch):
    net, cfg = model.load_net(trained('mcdit', *FOUR) / '0000004.pt')
    randomise(net.requires_grad_(True))
    sizes, to_input = [], data.Data.to_input
    monkeypatch.setattr(data.Data, 'to_input', lambda self, raw, normal: (sizes.append(len(raw)),
                                                                          to_input(self, raw, normal))[1])
    found = [train.evaluate(net, cfg, data.Data(shapes), batch, 0, 1, torch.float32) for batch in (1, 3, 8)]
    assert sizes == [1, 1, 1, 1, 3, 1, 4]
    for other in found[:2]:
        for name, values in found[2].items():
            assert other[name] == pytest.approx(values, rel=1e-4)


# ------------------------------------------------------------------------------------------ what a run writes

@pytest.mark.parametrize('method', model.METHODS)
def test_a_run_writes_checkpoints_a_log_and_a_chart(trained, method):
    out = trained(method, *FOUR)
    assert {path.name for path in out.iterdir()} == {'0000002.pt', '0000004.pt', 'log.jsonl', 'losses.png'}
    state = model.read_checkpoint(out / '0000004.pt')
    assert state.keys() == {'model', 'ema', 'teacher', 'opt', 'scaler', 'step', 'config'}
    assert (state['teacher'] is not None) == (model.METHODS[method].teacher is not None)
    assert (state['step'], state['config'].method, state['config'].resolution) == (4, method, 8)
    header, *rest = train.read_log(out)
    names = tuple(header['config'].pop('class_names'))
    assert model.Config(**header['config'], class_names=names) == state['config']
    assert [line['step'] for line in rest] == [1, 2, 3, 4, 4]                 # the last has the held-out loss
    assert {'loss', 'grad_norm', 'lr', 'images_per_s'} < rest[0].keys() and 'held_out' in rest[4]
    assert ('collapse_encoder' in rest[4]) == ('collapse_patches' in rest[4]) \
        == (model.METHODS[method].context is not None)


def test_the_header_previews_and_step_lines(shapes, tmp_path, capsys):
    run(shapes, tmp_path, '--steps 2 --eval-every 1 --preview 3')
    assert sorted(path.name for path in tmp_path.glob('*.png')) == [
        'losses.png', 'samples-0000001.png', 'samples-0000002.png']
    header, shown = train.read_log(tmp_path)[0], capsys.readouterr().out
    for name in ('method', 'network', 'data', 'device', 'batch', 'steps', 'versions', 'commit', 'seed'):
        assert re.search(f'^{name} +{re.escape(str(header[name]))}$', shown, re.M)
    assert header['batch'] == '8 = 1 ranks x 8 images x 1 accumulated'
    assert re.search(r'^step 2/2  loss \d.* images/s  0:00:00 left$', shown, re.M) and 'held out' in shown


def test_a_failed_preview_does_not_end_a_run(shapes, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(data, 'save_grid', full)
    assert run(shapes, tmp_path, '--steps 1 --preview 1').exists()
    assert 'no preview at step 1: [Errno 28] No space left' in capsys.readouterr().out


def test_speed_counts_steps_and_not_what_comes_between(shapes, tmp_path, monkeypatch):
    """On a clock that goes a second a step, and an hour while a loss is measured or a checkpoint written."""
    clock = [0.0]
    for module, name, seconds in ((model, 'random_numbers', 1), (train, 'evaluate', 3600),
                                  (torch, 'save', 3600)):
        def slowed(*args, function=getattr(module, name), seconds=seconds):
            clock[0] += seconds
            return function(*args)
        monkeypatch.setattr(module, name, slowed)
    monkeypatch.setattr(train.time, 'perf_counter', lambda: clock[0])
    run(shapes, tmp_path, '--method dit --steps 9 --log-every 4 --eval-every 3 --save-every 8')
    assert [line['images_per_s'] for line in lines(tmp_path)] == [8, 8, 8]


def test_blocks_are_compiled_where_they_can_be(shapes, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(model, 'compile_blocks', compiled.append)
    for capability, can in (((9, 0), True), ((7, 0), True), ((6, 1), False)):         # from Volta on
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        assert train.can_compile(torch.device('cuda')) == can and not train.can_compile(torch.device('cpu'))
    monkeypatch.setattr(train, 'can_compile', lambda device: True)
    run(shapes, tmp_path / 'eager', '--steps 1 --no-compile')
    assert not compiled
    run(shapes, tmp_path / 'compiled', '--steps 1')
    assert len(compiled) == 2                                                 # the network and its teacher


# -------------------------------------------------------------------------------------- flags, and --unmasked

ABLATIONS = ['--lambda-noise 0', '--lambda-con1 0', '--lambda-con2 0', '--all-clean', '--tokens noisy',
             '--tokens clean', '--teacher-encoder', '--mask-ratio 0.75', '--bridge xavier']


@pytest.mark.parametrize('flags', ABLATIONS)
def test_every_ablation_runs_and_changes_the_numbers(shapes, tmp_path, flags):
    losses = []
    for name in ('', flags):
        args, cfg, dataset = prepared(shapes, tmp_path / f'out{len(losses)}', f'--steps 1 {name}')
        torch.manual_seed(0)
        start = randomise(model.Net(cfg)).state_dict()
        train.train(args, cfg, dataset, (start, start))
        losses.append(lines(args.out)[0]['loss'])
    assert losses[0] != losses[1]


@pytest.mark.parametrize('method', model.METHODS)
def test_what_a_flag_cannot_affect_is_rejected(shapes, method):
    for flag in (*ABLATIONS, '--unmasked 0.5'):
        name, *value = flag.split()
        field = name[2:].replace('-', '_')
        if field in model.METHODS[method].flags:
            given = getattr(prepared(shapes, 'out', f'--method {method} {flag}')[1], field)
            assert given == (type(given)(value[0]) if value else True)
        else:
            with pytest.raises(model.BadInput, match=f'{name} does not apply to --method {method}'):
                prepared(shapes, 'out', f'--method {method} {flag}')


@pytest.mark.parametrize('method', ['maskdit', 'mcdit'])
def test_unmasked_steps_are_dits_and_a_function_of_seed_and_step(shapes, tmp_path, method):
    run(shapes, tmp_path, f'--method {method} --unmasked 0.5 --steps 8')
    masked_only = {'maskdit': 'reconstruct', 'mcdit': 'noise'}[method]
    draws = [torch.rand((), generator=model.generator('cpu', 0, step, 'unmasked')) for step in range(8)]
    unmasked = [masked_only not in line for line in lines(tmp_path)]
    assert unmasked == [bool(draw < 0.5) for draw in draws] and 0 < sum(unmasked) < 8
    for line in lines(tmp_path):
        assert ('clean' not in line and 'con1' not in line and line['loss'] == line['denoise']) \
            == (masked_only not in line)


# ----------------------------------------------------------------------------------------------------- tuning

@pytest.mark.parametrize('method', model.METHODS)
def test_tuning(trained, tmp_path, method, capsys):
    source = trained(method, *FOUR) / '0000004.pt'
    start = model.read_checkpoint(source)
    state = model.read_checkpoint(tune(source, tmp_path, '--steps 1 --lr 0.01'))
    cfg, shown = state['config'], capsys.readouterr().out
    assert (cfg.stage, cfg.mask_ratio, cfg.lr, cfg.seed, cfg.ema_step) == ('tune', 0, 0.01, 1, 4)
    assert state['teacher'] is None and not [n for n in state['model'] if n.startswith(model.TRAINING_ONLY)]
    assert all(entry['step'] == 1 for entry in state['opt']['state'].values())       # fresh
    step, = lines(tmp_path)
    assert step['loss'] == step['denoise']                                    # dit's, whatever the method
    for name, value in state['ema'].items():      # continues `ema`, and its warm-up counts on from step 4
        assert torch.allclose(value, 5 / 14 * start['ema'][name] + 9 / 14 * state['model'][name], atol=1e-7)
    before, after = lines(tmp_path, 'held_out')
    net, old = model.load_net(source)
    old, dataset = dataclasses.replace(old, seed=1), data.Data(old.data)
    expected = train.evaluate(net, old, dataset, 8, 0, 1, torch.float32)
    assert before['step'] == 0 and before['held_out'] == pytest.approx(expected['held_out'], rel=1e-6)
    assert after['step'] == 1 and re.search('before .*\n.*after ', shown)


def test_tuning_on_other_classes_has_a_new_label_table(trained, tmp_path, capsys):
    rows = ((np.zeros((3, 8, 8), np.uint8), k % 4) for k in range(60))
    data.save_folder(tmp_path / 'four', rows, 'uint8', (3, 8, 8), {'kind': 'images', 'classes': 4})
    source = trained('dit', *FOUR) / '0000004.pt'
    path = tune(source, tmp_path / 'out', f'--data {tmp_path / "four"} --steps 1 --lr 1e-6')
    old, new = (model.read_checkpoint(file)['model']['encoder.y_embed.weight'] for file in (source, path))
    assert new.shape[0] == 5 and torch.allclose(new[4], old[10], atol=1e-5) and new[:4].std() < 0.03
    assert '10 classes were trained and the data has 4' in capsys.readouterr().out


def test_published_ddpm_weights_are_tuned(tmp_path):
    """The loss is dit's on D = x - sigma eps, from the eps half of the outputs."""
    rows = ((np.random.default_rng(k).standard_normal((4, 8, 8)), k % 3) for k in range(60))
    data.save_folder(tmp_path / 'data', rows, 'float16', (4, 8, 8), {'kind': 'latents', 'classes': 3})
    dataset = data.Data(tmp_path / 'data')
    cfg = model.Config(method='dit', model='T/4', diffusion='ddpm', resolution=8, classes=3, mask_ratio=0.0)
    net = randomise(model.Net(cfg))
    torch.save({'model': net.state_dict(), 'ema': net.state_dict(), 'step': 0,
                'config': dataclasses.asdict(cfg)}, tmp_path / 'ddpm.pt')
    path = tune(tmp_path / 'ddpm.pt', tmp_path / 'out', f'--data {tmp_path / "data"} --steps 1')
    raw, y = dataset.rows(data.batch_indices(1, 0, 8, 59))
    r = model.random_numbers(model.read_checkpoint(path)['config'], 0)
    s = r['sigma'].view(8, 1, 1, 1)
    x, y = raw.float() + s * model.unpatchify(r['noise'], 4, 4), torch.where(r['drop'], 3, y)
    F, *_ = net(model.patchify(x / (s ** 2 + 1).sqrt(), 4), model.ddpm_time(r['sigma']), y)
    D = x - s * model.unpatchify(F, 4, 8)[:, :4]
    loss = ((s ** 2 + 0.25) / (0.5 * s) ** 2 * (D - raw.float()) ** 2).mean().item()
    assert lines(tmp_path / 'out')[0]['loss'] == pytest.approx(loss, rel=1e-5)


# --------------------------------------------------------------------------------------------- a sixth method

def blur(x0, cfg):
    """Clean patches (B, N, P) with each image's mean patch mixed in."""
    return (x0 + x0.mean(1, keepdim=True)) / 2


def blur_loss(net, teacher, x0, y, r, cfg):
    """Masked positions get the clean patch, blurred; minimised is the error at all tokens."""
    xt, y = model.corrupt(x0, y, r, cfg)
    D, *_ = model.denoise(net, xt, r['sigma'], y, cfg, r['visible'], clean=blur(x0, cfg))
    return {'blurred': (1.0, (model.loss_weight(r['sigma'], cfg.sigma_data) * (D - x0) ** 2).mean())}


def test_a_sixth_method_is_a_loss_and_a_row(shapes, tmp_path, monkeypatch):
    """It trains, samples, resumes to the bit, measures its collapse and is tuned; no other file names it."""
    monkeypatch.setitem(model.METHODS, 'blur', model.Method(
        blur_loss, fill='blurred', decoder='narrow', mask_ratio=0.25, context=blur, inpaint='context',
        flags=('mask_ratio', 'bridge')))
    flags = '--method blur --save-every 1 --preview 1'
    path = run(shapes, tmp_path / 'whole', f'{flags} --steps 2')
    run(shapes, tmp_path / 'parts', f'{flags} --steps 1')
    resumed = run(shapes, tmp_path / 'parts', f'{flags} --steps 2')
    assert same(*(torch.load(file, weights_only=True) for file in (path, resumed)))
    assert 'blurred' in lines(path.parent)[0] and len(lines(path.parent, 'collapse_encoder')) == 1
    assert model.load_net(path)[1].mask_ratio == 0.25 and (path.parent / 'samples-0000002.png').exists()
    assert model.load_net(tune(path, tmp_path / 'tuned', '--steps 1'))[1].method == 'blur'
