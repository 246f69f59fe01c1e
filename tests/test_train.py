"""train.py and finetune.py: what a run writes, resuming, several processes, and refusals."""

import json
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import finetune
import model
import sample
import train

TINY = ['--model', 'T/4', '--batch', '8', '--precision', 'fp32', '--log-every', '1', '--preview', '0']


def run(folder, out, *argv):
    return train.main([*TINY, '--data', str(folder), '--out', str(out), *argv])


def tune(checkpoint, out, *argv):
    return finetune.main([str(checkpoint), '--out', str(out), *TINY[2:], *argv])


def lines(out, key='loss'):
    return [line for line in train.read_log(pathlib.Path(out)) if key in line]


def same(a, b):
    """Whether two checkpoints hold the same bits everywhere."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Killed(Exception):
    pass


def kill_after(monkeypatch, step):
    """The next run dies right after it has written the checkpoint of `step`."""
    save = train.save

    def save_and_die(path, state):
        save(path, state)
        if state['step'] == step:
            monkeypatch.setattr(train, 'save', save)
            raise Killed

    monkeypatch.setattr(train, 'save', save_and_die)


# ------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize('method', model.METHODS)
def test_a_run_writes_checkpoints_log_and_pictures(shapes, tmp_path, capsys, method):
    out = tmp_path / 'out'
    path = run(
        shapes,
        out,
        '--method',
        method,
        '--steps',
        '4',
        '--save-every',
        '1',
        '--eval-every',
        '2',
        '--preview',
        '3',
        '--export',
        str(tmp_path / 'ema.pt'),
    )
    assert path == out / '0000004.pt'
    assert sorted(file.name for file in out.iterdir()) == [
        '0000003.pt',
        '0000004.pt',
        'log.jsonl',
        'samples-0000002.png',
        'samples-0000004.png',
    ]
    state = model.read_checkpoint(path)
    assert state.keys() == {'model', 'ema', 'teacher', 'opt', 'loss_scale', 'step', 'config'}
    assert state['step'] == 4
    assert (state['teacher'] is not None) == (method in ('sddit', 'mcdit'))
    assert state['config']['method'] == method and state['config']['resolution'] == 8

    first = train.read_log(out)[0]
    told = capsys.readouterr().out
    for name in ('method', 'network', 'data', 'device', 'batch', 'steps', 'versions', 'commit', 'seed'):
        assert re.search(f'^{name} +{re.escape(str(first[name]))}$', told, re.M)
    assert first['config'] == state['config']
    assert [line['step'] for line in lines(out)] == [1, 2, 3, 4]
    assert [line['step'] for line in lines(out, 'held_out')] == [2, 4]
    for line in lines(out, 'held_out'):
        assert (
            len(line['held_out']) == 8
            and line['sigma'][0] == pytest.approx(0.02)
            and line['sigma'][-1] == pytest.approx(20)
        )
        assert ('collapse_encoder' in line) == ('collapse_patches' in line) == (method == 'mcdit')
    assert 'images/s' in told and 'left' in told

    exported, kept = model.read_checkpoint(tmp_path / 'ema.pt'), model.read_checkpoint(path)
    assert exported.keys() == {'ema', 'step', 'config'} and same(exported['ema'], kept['ema'])
    sample.main([str(tmp_path / 'ema.pt'), '--n', '1', '--steps', '2'])


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_do(shapes, tmp_path):
    for name in ('--compile', '--no-compile'):
        run(shapes, tmp_path / name, '--steps', '20', '--lr', '1e-3', name)
    assert train.read_log(tmp_path / '--compile')[0]['device'].endswith(', compiled')
    one, two = ([line['loss'] for line in lines(tmp_path / name)] for name in ('--compile', '--no-compile'))
    assert one == pytest.approx(two, rel=1e-5)


def test_speed_counts_steps_and_not_what_comes_between(shapes, tmp_path, monkeypatch):
    """On a clock that goes a second a step, and an hour while a loss is measured or a checkpoint written."""
    clock, parts = [0.0], {'draw': (model, 1), 'evaluate': (train, 3600), 'save': (train, 3600)}

    def slow(function, seconds):
        def slowed(*args):
            clock[0] += seconds
            return function(*args)
        return slowed

    for name, (module, seconds) in parts.items():
        monkeypatch.setattr(module, name, slow(getattr(module, name), seconds))
    monkeypatch.setattr(train.time, 'perf_counter', lambda: clock[0])
    run(shapes, tmp_path, '--steps', '9', '--log-every', '4', '--eval-every', '3', '--save-every', '2')
    assert [line['images_per_s'] for line in lines(tmp_path)] == [8, 8, 8]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(model.BadInput, match='process 2 .* type --nproc_per_node 2'):
        train.where_am_i(10)


def test_float32_is_not_tf32(monkeypatch):
    """Neither --precision fp32 nor, whatever the precision, SD-DiT's head."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    assert train.where_am_i(10) == (0, 1, torch.device('cuda', 0))
    assert torch.get_float32_matmul_precision() == 'highest'


@pytest.mark.parametrize('capability, can', [((9, 0), True), ((7, 0), True), ((6, 1), False)])
def test_the_compiler_knows_gpus_from_volta_on(capability, can, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert train.can_compile(torch.device('cuda')) == can and not train.can_compile(torch.device('cpu'))


def test_blocks_are_compiled_where_they_can_be_and_nothing_is_said(shapes, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(model, 'compile_blocks', compiled.append)
    monkeypatch.setattr(train, 'can_compile', lambda device: True)
    run(shapes, tmp_path / 'eager', '--steps', '1', '--no-compile')
    assert not compiled
    run(shapes, tmp_path / 'compiled', '--steps', '1')
    assert len(compiled) == 2                                                 # the network and its teacher


def test_losses_fall(shapes, tmp_path):
    run(shapes, tmp_path, '--steps', '60', '--batch', '16', '--lr', '2e-3')
    loss = [line['clean'] for line in lines(tmp_path)]
    assert np.mean(loss[-10:]) < 0.9 * np.mean(loss[:5])


def test_held_out_loss_is_the_inference_paths(shapes, tmp_path):
    """Said again without batches: EMA weights, every token visible, weighted, fixed noise."""
    path = run(shapes, tmp_path, '--steps', '2')
    net, cfg = model.load_net(path)
    dataset = data.Data(shapes)
    x = torch.from_numpy(dataset.array[196:].astype(np.float32)) / 127.5 - 1
    y = torch.from_numpy(dataset.labels[196:])
    for j, (sigma, loss) in enumerate(zip(train.EVAL_SIGMAS, lines(tmp_path, 'held_out')[-1]['held_out'])):
        n = torch.randn(4, 3, 8, 8, generator=model.generator('cpu', 0, 'held-out', j))
        D = model.denoise(net, x + sigma * n, torch.full((4,), sigma), y, cfg)
        assert loss == pytest.approx(
            ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (D - x) ** 2).mean().item(), rel=1e-5
        )


def test_learning_rate_falls_to_zero_over_the_last_part(shapes, tmp_path):
    run(shapes, tmp_path, '--steps', '8', '--lr', '0.001', '--lr-decay', '0.5')
    assert [line['lr'] for line in lines(tmp_path)] == pytest.approx([0.001] * 5 + [0.00075, 0.0005, 0.00025])


def test_gradient_norm_is_clipped(shapes, tmp_path, monkeypatch):
    """Steps follow the clipped gradient: with a bound of 0 nothing moves."""
    monkeypatch.setattr(train, 'MAX_GRAD_NORM', 0.0)
    path = run(shapes, tmp_path, '--steps', '2')
    torch.manual_seed(0)
    fresh = model.Net(model.read_checkpoint(path)['config'])
    assert same(model.read_checkpoint(path)['model'], fresh.state_dict())
    assert lines(tmp_path)[0]['grad_norm'] > 0


def test_ema_is_exact(shapes, tmp_path):
    """Two steps: ema_2 = d_1 (d_0 w_0 + (1 - d_0) w_1) + (1 - d_1) w_2, with d_k = (1 + k) / (10 + k)."""
    for steps in ('1', '2'):
        run(shapes, tmp_path / steps, '--steps', steps)
    torch.manual_seed(0)
    one, two = (model.read_checkpoint(tmp_path / s / f'000000{s}.pt') for s in '12')
    for name, w0 in model.Net(one['config']).state_dict().items():
        ema1 = 0.1 * w0 + 0.9 * one['model'][name]
        assert torch.allclose(one['ema'][name], ema1, atol=1e-7)
        assert torch.allclose(two['ema'][name], 2 / 11 * ema1 + 9 / 11 * two['model'][name], atol=1e-7)


def test_moments_and_no_classes(moments, tmp_path):
    path = run(moments, tmp_path, '--steps', '2', '--classes', '0', '--model', 'T/2', '--preview', '2')
    cfg = model.read_checkpoint(path)['config']
    assert cfg['classes'] == 0 and cfg['channels'] == 4 and cfg['kind'] == 'moments'


@pytest.mark.parametrize(
    'argv',
    [
        ['--lambda-noise', '0'],
        ['--lambda-con1', '0'],
        ['--lambda-con2', '0'],
        ['--all-clean'],
        ['--tokens', 'noisy'],
        ['--tokens', 'clean'],
        ['--teacher-encoder'],
        ['--mask-ratio', '0.75'],
        ['--sigma-data', '0.8'],
    ],
    ids=lambda argv: argv[0][2:],
)
def test_every_ablation_runs_and_changes_the_numbers(shapes, tmp_path, argv):
    losses = {}
    for name, extra in (('plain', []), ('ablated', argv)):
        run(shapes, tmp_path / name, '--model', 'T/2', '--steps', '3', '--lr', '0.01', *extra)
        losses[name] = lines(tmp_path / name)[-1]['loss']
    assert losses['plain'] != losses['ablated']


# --------------------------------------------------------------------------------------- the folder of a run


def test_a_run_may_be_prolonged_unless_a_schedule_depends_on_its_length(shapes, tmp_path):
    run(shapes, tmp_path / 'a', '--steps', '3')
    run(shapes, tmp_path / 'b', '--steps', '2')
    run(shapes, tmp_path / 'b', '--steps', '3')
    a, b = (model.read_checkpoint(tmp_path / name / '0000003.pt') for name in 'ab')
    assert same(a, b)
    run(shapes, tmp_path / 'c', '--steps', '2', '--lr-decay', '0.5')
    with pytest.raises(model.BadInput, match='steps was 2 and is now 3'):
        run(shapes, tmp_path / 'c', '--steps', '3', '--lr-decay', '0.5')


def test_only_its_own_checkpoints_are_removed(shapes, tmp_path):
    path = run(shapes, tmp_path, '--steps', '1')
    kept = [tmp_path / '0000001-keep.pt', tmp_path / 'best.pt']
    for copy in kept:
        copy.write_bytes(path.read_bytes())
    run(shapes, tmp_path, '--steps', '4', '--save-every', '1')
    assert [file.name for file in train.checkpoints(tmp_path)] == ['0000003.pt', '0000004.pt']
    assert all(copy.exists() for copy in kept)
    for step in ('9999999', '10000000'):
        path.with_stem(step).write_bytes(b'')
    assert train.checkpoints(tmp_path)[-1].stem == '10000000'  # as numbers, not as words


def test_an_export_overwrites_nothing_but_its_own(shapes, tmp_path):
    export = tmp_path / 'ema.pt'
    export.write_text('precious')
    with pytest.raises(model.BadInput, match='exists already'):
        run(shapes, tmp_path / 'out', '--steps', '1', '--export', str(export))
    assert export.read_text() == 'precious'
    with pytest.raises(model.BadInput, match='name of a checkpoint'):
        run(shapes, tmp_path / 'out', '--steps', '1', '--export', str(tmp_path / 'out' / '0000001.pt'))
    export.unlink()
    for _ in range(2):                                                        # the same command again
        run(shapes, tmp_path / 'out', '--steps', '1', '--export', str(export))
    content = export.read_bytes()
    run(shapes, tmp_path / 'other', '--steps', '1', '--seed', '1')
    with pytest.raises(model.BadInput, match='ema.pt exists already'):        # of a finished run too
        run(shapes, tmp_path / 'other', '--steps', '1', '--seed', '1', '--export', str(export))
    assert export.read_bytes() == content


def test_the_log_of_another_run_is_kept(shapes, tmp_path):
    run(shapes, tmp_path, '--steps', '1').unlink()
    log = (tmp_path / 'log.jsonl').read_text()
    with pytest.raises(model.BadInput, match='log.jsonl is of another run'):
        run(shapes, tmp_path, '--steps', '1', '--seed', '1')
    assert (tmp_path / 'log.jsonl').read_text() == log
    run(shapes, tmp_path, '--steps', '2')                                     # its own begins anew
    assert (tmp_path / 'log.jsonl').read_text() != log
    run(shapes, tmp_path / 'scheduled', '--steps', '1', '--lr-decay', '0.5').unlink()
    with pytest.raises(model.BadInput, match='log.jsonl is of another run'):  # as long as its schedule
        run(shapes, tmp_path / 'scheduled', '--steps', '2', '--lr-decay', '0.5')


@pytest.mark.parametrize('minutes', ['0', '-1', 'nan', '1e300'])
def test_a_timeout_is_refused_before_it_is_used(shapes, tmp_path, minutes, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')                                     # the other never comes
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(model.BadInput, match='--timeout'):
        run(shapes, tmp_path, '--steps', '1', '--timeout', minutes)


def test_a_finished_run_has_nothing_to_do(shapes, tmp_path):
    path = run(shapes, tmp_path, '--steps', '2')
    content = path.read_bytes()
    assert run(shapes, tmp_path, '--steps', '2') == path
    assert path.read_bytes() == content


# -------------------------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize('method', model.METHODS)
def test_tuning(shapes, tmp_path, method, capsys):
    path = run(shapes, tmp_path / 'out', '--method', method, '--steps', '3')
    start = model.read_checkpoint(path)
    tuned = tune(path, tmp_path / 'tuned', '--steps', '2')
    state = model.read_checkpoint(tuned)
    assert state['teacher'] is None and state['config']['ema_step'] == 3
    assert not any(name.startswith(model.TRAINING_ONLY) for name in state['model'])
    assert all(entry['step'] == 2 for entry in state['opt']['state'].values())  # fresh, not continued
    before, after = lines(tmp_path / 'tuned', 'held_out')
    assert before['step'] == 0 and after['step'] == 2
    # before tuning it is the network that training left, on the same noise but for the seed
    net, cfg = model.load_net(path)
    expected = train.evaluate(net, state['config'], data.Data(shapes), 8, 0, 1, torch.float32)['held_out']
    assert before['held_out'] == pytest.approx(expected, rel=1e-6)
    told = capsys.readouterr().out
    assert re.search('before .*\n.*after ', told)
    # EMA warm-up counts on: the last of three steps was 2, so the next decay is (1 + 3) / (10 + 3)
    one = model.read_checkpoint(tune(path, tmp_path / 'one', '--steps', '1'))
    for name, value in one['ema'].items():
        assert torch.allclose(value, 4 / 13 * start['ema'][name] + 9 / 13 * one['model'][name], atol=1e-7)


def test_two_fresh_starts_of_tuning_differ_from_training_in_noise_and_order(shapes, tmp_path):
    path = run(shapes, tmp_path / 'out', '--steps', '1')
    cfg = model.read_checkpoint(tune(path, tmp_path / 'tuned', '--steps', '1'))['config']
    assert cfg['seed'] != model.read_checkpoint(path)['config']['seed']


@pytest.mark.parametrize('rank', [0, 1])
def test_one_process_tells_of_new_labels(shapes, tmp_path, rank, monkeypatch, capsys):
    path = run(shapes, tmp_path / 'out', '--steps', '1')
    rows = ((np.zeros((3, 8, 8), np.uint8), k % 4) for k in range(60))
    data.save_folder(tmp_path / 'four', rows, 'uint8', (3, 8, 8), {'kind': 'images', 'classes': 4})
    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setattr(train, 'train', lambda args, *rest: pathlib.Path(args.out) / 'none.pt')
    tune(path, tmp_path / 'tuned', '--data', str(tmp_path / 'four'))
    told = capsys.readouterr().out.count('10 classes were trained and the data has 4')
    assert told == (1 if rank == 0 else 0)


# --------------------------------------------------------------------------------------- several processes


def torchrun(*argv, processes=2, cwd=None):
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        f'--nproc_per_node={processes}',
        *map(str, argv),
    ]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    'methods', [['sddit', 'mcdit'], pytest.param(['dit', 'maskdit', 'mdt', 'mcdit'], marks=pytest.mark.slow)]
)
def test_two_processes_equal_one(shapes, moments, tmp_path, methods):
    """The same global batch: a loss curve equal to 1e-5 over 40 float32 steps, replicas equal to the bit."""
    steps = ['--steps', '40', '--lr', '1e-3', '--eval-every', '20', '--batch', '8']
    commands = {
        method: ['train', *TINY, '--data', str(shapes), '--method', method, *steps] for method in methods
    }
    commands['accumulated'] = [*commands['mcdit'], '--accumulate', '2']
    commands['moments'] = ['train', *TINY, '--data', str(moments), *steps, '--model', 'T/2', '--steps', '10']
    start = run(shapes, tmp_path / 'start', '--steps', '2')
    commands['tuned'] = ['finetune', str(start), *TINY[2:], *steps]
    worker = [[*command, '--out', str(tmp_path / 'two' / name)] for name, command in commands.items()]
    done = torchrun(ROOT / 'tests' / 'worker.py', json.dumps(worker), tmp_path / 'spread.json')
    assert done.returncode == 0, done.stderr
    for name, (script, *argv) in commands.items():
        {'train': train, 'finetune': finetune}[script].main([*argv, '--out', str(tmp_path / 'one' / name)])
        for key in ('loss', 'grad_norm'):
            one, two = ([line[key] for line in lines(tmp_path / count / name)] for count in ('one', 'two'))
            assert len(one) == (10 if name == 'moments' else 40)
            assert two == pytest.approx(one, rel=1e-5 if key == 'loss' else 1e-3)
        one, two = (
            [line['held_out'] for line in lines(tmp_path / count / name, 'held_out')]
            for count in ('one', 'two')
        )
        assert np.allclose(one, two, rtol=1e-4)
    accumulated, plain = (
        [line['loss'] for line in lines(tmp_path / 'one' / name)] for name in ('accumulated', 'mcdit')
    )
    assert accumulated == pytest.approx(plain, rel=1e-5)
    for spread, name in zip(json.loads((tmp_path / 'spread.json').read_text()), commands):
        assert spread['difference'] == 0
        assert spread['modules'] == (3 if name in ('sddit', 'mcdit', 'accumulated', 'moments') else 2)


def test_a_refusal_of_process_0_stops_all_with_a_sentence(shapes, tmp_path):
    run(shapes, tmp_path, '--steps', '1')
    flags = [*TINY, '--data', shapes, '--out', tmp_path, '--steps', '1']
    done = torchrun(ROOT / 'train.py', *flags, '--method', 'dit')
    assert done.returncode != 0 and "method was 'mcdit' and is now 'dit'" in done.stderr
    assert 'train.py: process 0 has found a mistake' in done.stderr and 'RuntimeError' not in done.stderr


def test_two_processes_sample_the_same_images(shapes, tmp_path):
    path = run(shapes, tmp_path, '--steps', '3', '--lr', '0.01')
    flags = [path, '-n', '7', '--steps', '4', '--cfg', '2', '--precision', 'fp32', '--batch', '3']
    done = torchrun(ROOT / 'sample.py', *flags, '--npz', tmp_path / 'two.npz', '--png', tmp_path / 'png')
    assert done.returncode == 0, done.stderr
    sample.main([*map(str, flags), '--npz', str(tmp_path / 'one.npz')])
    with np.load(tmp_path / 'one.npz') as one, np.load(tmp_path / 'two.npz') as two:
        assert np.array_equal(one['arr_1'], two['arr_1'])
        assert abs(one['arr_0'].astype(int) - two['arr_0']).max() <= 1
    assert len(list((tmp_path / 'png').iterdir())) == 7


@pytest.mark.slow
def test_torchrun_makes_shapes_once_and_trains(tmp_path):
    """The bare command in an empty folder, by two processes: both ask for the data set at the same time."""
    done = torchrun(
        ROOT / 'train.py', '--model', 'T/8', '--steps', '2', '--batch', '4', '--preview', '0', cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'shapes']
    assert (
        'shapes: 19,600 images' in done.stdout
        and '2 x CPU' in done.stdout
        and '4 = 2 processes x 2 images x 1 accumulated' in done.stdout
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('method', model.METHODS)
def test_on_a_gpu(shapes, moments, tmp_path, method, monkeypatch):
    """Every method trains in bfloat16, resumes, is tuned and sampled there."""
    for folder in (shapes, moments):
        out = tmp_path / folder.name
        flags = [*TINY, '--model', 'T/2', '--precision', 'bf16', '--method', method]
        flags += ['--save-every', '2', '--preview', '2']
        kill_after(monkeypatch, 2)
        with pytest.raises(Killed):
            run(folder, out, *flags, '--steps', '4')
        path = run(folder, out, *flags, '--steps', '4')
        assert all(math.isfinite(line['loss']) for line in lines(out))
        tuned = tune(path, tmp_path / f'{folder.name}-tuned', '--precision', 'bf16', '--steps', '2')
        sample.main([str(tuned), '-n', '4', '--steps', '3', '--cfg', '2', '--npz', str(out / 'a.npz')])


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope='module')
def desk(shapes, tmp_path_factory):
    """A folder of good and bad things, on which a refused command must leave no trace."""
    desk = tmp_path_factory.mktemp('desk')
    (desk / 'file').write_text('')
    for name, size in (('broken', 8), ('strange', 8), ('twelve', 12), ('large', 16)):
        data.make_shapes(desk / name, size=size, count=50)
    (desk / 'broken' / 'data.npy').write_bytes((desk / 'broken' / 'data.npy').read_bytes()[:-1])
    np.save(desk / 'strange' / 'labels.npy', np.full(50, 10))
    path = run(shapes, desk / 'other', '--method', 'dit', '--steps', '1', '--export', str(desk / 'ema.pt'))
    (desk / 'cut.pt').write_bytes(path.read_bytes()[:5000])
    data.make_shapes(desk / 'nameless', size=8, count=50)
    (desk / 'nameless' / 'meta.json').write_text('{"kind": "images", "classes": 0}')
    np.save(desk / 'nameless' / 'labels.npy', np.zeros(50, np.int64))
    (desk / 'twin.pt').write_bytes(path.read_bytes())
    tune(desk / 'twin.pt', desk / 'tuned2', '--steps', '1')
    torch.save(torch.load(path, weights_only=True) | {'config': {}}, desk / 'bare.pt')
    (desk / 'text').mkdir()
    (desk / 'text' / '0000001.pt').write_text('not a checkpoint')
    (desk / 'text' / 'log.jsonl').write_text('')
    return desk


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--data', 'nowhere'], 'no data folder nowhere'),
        (['--data', 'broken'], 'truncated'),
        (['--data', 'strange'], 'labels from 0 to 9'),
        (['--model', 'T/3'], '--model T/3'),
        (['--model', 'T/8', '--data', 'twelve'], 'do not divide'),
        (['--batch', '7', '--accumulate', '2'], 'a multiple of 2'),
        (['--batch', '0'], 'at least 1'),
        (['--steps', '0'], 'at least 1'),
        (['--lr', '0'], '--lr above 0'),
        (['--lr-decay', '2'], 'between 0 and 1'),
        (['--mask-ratio', '0'], '--mask-ratio 0.0'),
        (['--mask-ratio', '1'], '--mask-ratio 1.0'),
        (['--mask-ratio', '-0.5'], '--mask-ratio -0.5'),
        (['--mask-ratio', '0.99'], 'none of the 4 tokens'),
        (['--mask-ratio', 'half'], 'invalid float'),
        (['--method', 'dit', '--mask-ratio', '0.5'], 'masks nothing'),
        (['--method', 'maskdit', '--lambda-con1', '0.1'], 'means nothing to --method maskdit'),
        (['--method', 'dit', '--all-clean'], 'means nothing to --method dit'),
        (['--all-clean', '--lambda-noise', '0.1'], 'leave one out'),
        (['--teacher-encoder', '--lambda-con1', '0', '--lambda-con2', '0'], 'without a branch'),
        (['--lambda-con1', '-1'], 'at least 0'),
        (['--sigma-data', '0'], '--sigma-data from 0.001'),
        (['--classes', '5'], '0 ignores them'),
        (['--method', 'vae'], 'invalid choice'),
        (['--tokens', 'none'], 'invalid choice'),
        (['--mask', '0.5'], 'unrecognized arguments'),
        (['--out', 'file/inside'], 'cannot write to file/inside'),
        (['--export', 'file/x.pt'], 'which --out or --export names'),
        (['--out', 'other'], "method was 'dit' and is now 'mcdit'"),
        (['--out', 'text'], 'none of the 1 checkpoints'),
    ],
)
def test_refusals_exit_with_2_and_write_nothing(argv, words, shapes, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    before = contents(desk)
    flags = ['--out', 'out'] if '--out' not in argv else []
    monkeypatch.setattr('sys.argv', ['train.py', *TINY, '--steps', '1', '--data', str(shapes), *flags, *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(train.__file__, run_name='__main__')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and 'Traceback' not in error
    assert contents(desk) == before


@pytest.mark.parametrize(
    'argv, words',
    [
        (['none.pt', '--out', 'tuned'], 'no checkpoint none.pt'),
        (['cut.pt', '--out', 'tuned'], 'truncated'),
        (['ema.pt', '--out', 'tuned'], 'EMA weights alone'),
        (['other/0000001.pt', '--out', 'tuned', '--data', 'large'], 'give other --data'),
        (['other/0000001.pt', '--out', 'tuned', '--data', 'nowhere'], 'no data folder'),
        (['other/0000001.pt', '--out', 'tuned', '--data', 'nameless'], 'give data with labels'),
        (['other/0000001.pt', '--out', 'tuned2'], 'tuned_from was'),
        (['bare.pt', '--out', 'tuned'], 'its configuration does not say stage'),
        (['other/0000001.pt', '--out', 'other'], 'another configuration'),
        (['other/0000001.pt'], 'required: --out'),
        (['other/0000001.pt', '--out', 'tuned', '--mask-ratio', '0.5'], 'unrecognized arguments'),
    ],
)
def test_tuning_refusals(argv, words, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    before = contents(desk)
    monkeypatch.setattr('sys.argv', ['finetune.py', *argv, *TINY[2:], '--steps', '1'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(finetune.__file__, run_name='__main__')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and 'Traceback' not in error
    assert contents(desk) == before
