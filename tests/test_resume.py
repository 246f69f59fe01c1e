"""A run that is killed, stopped, poisoned or short of disk resumes to the same bits; two ranks equal one."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import FOUR, ROOT, TINY, at_steps, lines, run, same, torchrun, tune

import data
import finetune
import model
import train


def whole(path):
    return torch.load(path, weights_only=True)


def killed_after(source, out, step):
    """`out` as a kill -9 leaves it some time after the checkpoint of `step` in the run `source`."""
    out.mkdir()
    for name in (f'{step:07d}.pt', 'log.jsonl'):
        shutil.copy(source / name, out)
    return out


def steps(out):
    """The log's lines of steps, without what depends on the clock."""
    return [{name: value for name, value in line.items() if name != 'images_per_s'} for line in lines(out)]


def same_runs(a, b, step):
    """Whether logs and checkpoints are equal to the bit; no step missing and none twice."""
    assert steps(a) == steps(b) and [line['step'] for line in steps(a)] == list(range(1, step + 1))
    return same(*(whole(out / f'{step:07d}.pt') for out in (a, b)))


# ---------------------------------------------------------------------------------------- resuming to the bit

@pytest.mark.parametrize('method', model.METHODS)
def test_resumed_is_bit_equal_to_uninterrupted(shapes, trained, tmp_path, method, capsys):
    parts = killed_after(trained(method, *FOUR), tmp_path / 'parts', 2)
    run(shapes, parts, f'--method {method} --steps 4 --save-every 2')
    assert f'resumes   {parts}/0000002.pt' in capsys.readouterr().out
    assert same_runs(trained(method, *FOUR), parts, 4)


VARIANTS = ['--accumulate 2 --lr-decay 0.9', '--unmasked 0.5', '--method maskdit --unmasked 0.5', 'moments',
            '--precision fp16', '--precision bf16 --teacher-encoder', '--checkpoint-blocks --method sddit']


@pytest.mark.parametrize('flags', VARIANTS)
def test_resumed_is_bit_equal_with(shapes, moments, tmp_path, flags):
    folder = moments if flags == 'moments' else shapes
    flags = f'{flags.removeprefix("moments")} --steps 5 --save-every 3'
    run(folder, tmp_path / 'whole', flags)
    parts = killed_after(tmp_path / 'whole', tmp_path / 'parts', 3)
    run(folder, parts, flags)
    assert same_runs(tmp_path / 'whole', parts, 5)


@pytest.mark.parametrize('method, place', [('dit', 'gone.pt'), ('maskdit', 'gone.pt'), ('mdt', 'gone.pt'),
                                           ('sddit', 'gone.pt'), ('mcdit', '../moved/0000004.pt')])
def test_tuning_resumes_with_its_source_gone_or_typed_differently(trained, tmp_path, method, place):
    source = shutil.copytree(trained(method, *FOUR), tmp_path / 'source') / '0000004.pt'
    flags = '--steps 4 --save-every 2 --lr-decay 0.5'
    tune(source, tmp_path / 'whole', flags)
    source.unlink()
    parts = killed_after(tmp_path / 'whole', tmp_path / 'parts', 2)
    tune(place, parts, flags)
    assert same_runs(tmp_path / 'whole', parts, 4)


def test_no_step_is_missing_in_the_log_whatever_it_was_stopped_after(moments, tmp_path, monkeypatch):
    """A line is the mean over all steps since the line before, also where a save or a signal comes between.
    58 images are trained on, so that step 8 spans two epochs."""
    run(moments, tmp_path / 'each', '--steps 8 --save-every 1 --keep-every 1')
    loss = [line['loss'] for line in lines(tmp_path / 'each')]
    for stop in (1, 7):
        parts = killed_after(tmp_path / 'each', tmp_path / f'from{stop}', stop)
        run(moments, parts, '--steps 8')
        assert same_runs(tmp_path / 'each', parts, 8)

    flags = '--steps 8 --log-every 3 --save-every 4'
    run(moments, tmp_path / 'whole', flags)
    parts = killed_after(tmp_path / 'whole', tmp_path / 'parts', 4)
    at_steps(monkeypatch, {4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(SystemExit):
        run(moments, parts, flags)
    monkeypatch.undo()
    run(moments, parts, flags)
    for out, ends in ((tmp_path / 'whole', [0, 3, 4, 6, 8]), (parts, [0, 3, 4, 5, 6, 8])):
        assert [line['step'] for line in lines(out)] == ends[1:]
        assert [line['loss'] for line in lines(out)] == pytest.approx(
            [np.mean(loss[a:b]) for a, b in zip(ends, ends[1:])], rel=1e-6)
    assert same(*(whole(out / '0000008.pt') for out in (tmp_path / 'each', tmp_path / 'whole')))
    assert same(*(whole(out / '0000008.pt') for out in (tmp_path / 'whole', parts)))


def test_a_run_may_be_prolonged_unless_a_schedule_depends_on_its_length(shapes, trained, tmp_path):
    prolonged = shutil.copytree(trained('mcdit', *FOUR), tmp_path / 'prolonged')
    run(shapes, prolonged, '--steps 6')
    run(shapes, tmp_path / 'long', '--steps 6')
    assert same_runs(tmp_path / 'long', prolonged, 6)
    for flags in ('--method sddit', '--method dit --lr-decay 0.5'):
        out = tmp_path / str(len(flags))
        run(shapes, out, f'--steps 1 {flags}')
        with pytest.raises(model.BadInput, match='steps was 1 and is now 2'):
            run(shapes, out, f'--steps 2 {flags}')


def test_a_finished_run_has_nothing_to_do(shapes, trained, tmp_path):
    out = shutil.copytree(trained('dit', *FOUR), tmp_path / 'out')
    content = (out / '0000004.pt').read_bytes()
    assert run(shapes, out, '--method dit --steps 4') == out / '0000004.pt'
    assert (out / '0000004.pt').read_bytes() == content and steps(out) == steps(trained('dit', *FOUR))
    with pytest.raises(model.BadInput, match='checkpoint of step 4, beyond --steps 3'):
        run(shapes, out, '--method dit --steps 3')


def test_a_field_that_an_older_file_lacks_takes_its_default(shapes, trained, tmp_path):
    out = killed_after(trained('mcdit', *FOUR), tmp_path / 'out', 2)
    state = whole(out / '0000002.pt')
    for name in ('unmasked', 'bridge', 'tuned_from'):
        del state['config'][name]
    torch.save(state, out / '0000002.pt')
    run(shapes, out, '--steps 4 --save-every 2')
    assert same_runs(trained('mcdit', *FOUR), out, 4)


@pytest.mark.parametrize('kind', ['images', 'moments'])
def test_other_data_is_rejected_and_a_moved_folder_is_not(shapes, moments, trained, tmp_path, kind):
    """Other images of the same count; the same images moved; moments by another VAE."""
    if kind == 'images':
        source, folder, flags = trained('dit', *FOUR), tmp_path / 'data', '--method dit --steps 4'
        data.make_shapes(folder, size=8, count=200, seed=1)
        words = 'fingerprint was'
    else:
        folder, flags, words = tmp_path / 'data', '--method dit --steps 2', 'vae_sha256 was'
        shutil.copytree(moments, folder)
        source = run(folder, tmp_path / 'out', flags).parent
        meta = json.loads((folder / 'meta.json').read_text())
        (folder / 'meta.json').write_text(json.dumps(meta | {'vae': 'other.pt', 'vae_sha256': '0' * 64}))
    out = shutil.copytree(source, tmp_path / 'again')
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(model.BadInput, match=words):
        run(folder, out, flags)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    run(shutil.copytree(shapes if kind == 'images' else moments, tmp_path / 'moved'), out, flags)


# -------------------------------------------------------------------------------------------- what is on disk

def test_checksums_are_read_only_where_training_resumes(shapes, trained, tmp_path, monkeypatch):
    """Tuning and sampling read the file at once; on which rank, see `test_replicas_are_equal`."""
    source, calls, testzip = trained('dit', *FOUR), [], zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, 'testzip', lambda file: (calls.append(file), testzip(file))[1])
    model.load_net(source / '0000004.pt')
    tune(source / '0000004.pt', tmp_path / 'tuned', '--steps 1')
    assert calls == []
    run(shapes, killed_after(source, tmp_path / 'out', 2), '--method dit --steps 3')
    assert len(calls) == 1


def flip(content):
    """One bit of a number in the middle of the file, which torch.load does not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1:]


@pytest.mark.parametrize('harm', [flip, lambda whole: whole[:len(whole) // 2], lambda whole: b'<html>404'],
                         ids=['flipped', 'half', 'page'])
def test_a_damaged_newest_checkpoint_is_skipped(shapes, trained, tmp_path, capsys, harm):
    source, out = trained('dit', *FOUR), shutil.copytree(trained('dit', *FOUR), tmp_path / 'out')
    newest = out / '0000004.pt'
    newest.write_bytes(harm(newest.read_bytes()))
    run(shapes, out, '--method dit --steps 4 --save-every 2')
    shown = capsys.readouterr().out
    assert f'skipped: {newest} is ' in shown and f'resumes   {out}/0000002.pt' in shown
    assert same_runs(source, out, 4)
    for path in out.glob('*.pt'):
        path.write_bytes(harm(path.read_bytes()))
    log = (out / 'log.jsonl').read_bytes()
    with pytest.raises(model.BadInput, match=f'every checkpoint in {out} is damaged'):
        run(shapes, out, '--method dit --steps 4')
    assert (out / 'log.jsonl').read_bytes() == log


def test_only_old_checkpoints_of_its_own_are_removed(shapes, tmp_path):
    tmp_path.joinpath('0000001-keep.pt').touch()
    run(shapes, tmp_path, '--method dit --steps 7 --save-every 1 --keep-every 3')
    assert sorted(path.stem for path in tmp_path.glob('*.pt')) == [
        '0000001-keep', '0000003', '0000006', '0000007']
    tmp_path.joinpath('10000000.pt').touch()
    assert train.checkpoints(tmp_path)[-1].stem == '10000000'                 # by number, not by name


@pytest.mark.parametrize('content', ['notes\n', 'notes\nmore\n', '{"loss": 1}\n{"loss": 2}\n', '3\n', '[]'])
def test_a_foreign_log_is_not_overwritten(shapes, tmp_path, content):
    (tmp_path / 'log.jsonl').write_text(content)
    with pytest.raises(model.BadInput, match='is not a log of train.py'):
        run(shapes, tmp_path, '--steps 1')
    assert (tmp_path / 'log.jsonl').read_text() == content and len(list(tmp_path.iterdir())) == 1


def test_the_log_of_another_run_is_kept_and_a_torn_line_is_made_anew(shapes, trained, tmp_path):
    out = killed_after(trained('dit', *FOUR), tmp_path / 'out', 2)
    (out / '0000002.pt').unlink()
    log = (out / 'log.jsonl').read_text()
    with pytest.raises(model.BadInput, match='log.jsonl is of another config.* .seed was 0 and is now 1'):
        run(shapes, out, '--method dit --steps 4 --seed 1')
    assert (out / 'log.jsonl').read_text() == log
    shutil.copy(trained('dit', *FOUR) / '0000002.pt', out)
    (out / 'log.jsonl').write_text(log[:log.index('"step": 4') + 15])
    run(shapes, out, '--method dit --steps 4')
    assert same_runs(trained('dit', *FOUR), out, 4)


def test_one_run_per_folder(shapes, tmp_path, monkeypatch):
    def second():
        with pytest.raises(model.BadInput, match='another run is writing into'):
            run(shapes, tmp_path, '--method dit --steps 2')
    at_steps(monkeypatch, {1: second})
    run(shapes, tmp_path, '--method dit --steps 2')
    assert len(lines(tmp_path)) == 2


def test_out_may_be_removed_while_it_runs(shapes, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    at_steps(monkeypatch, {1: lambda: shutil.rmtree(out)})
    run(shapes, out, '--method dit --steps 3 --save-every 2')
    assert [path.stem for path in train.checkpoints(out)] == ['0000002', '0000003']
    assert [line['step'] for line in lines(out)] == [2, 3]
    run(shapes, out, '--method dit --steps 4')
    assert [line['step'] for line in lines(out)] == [2, 3, 4]


@pytest.fixture
def room():
    """room(n): no file may grow beyond n bytes, which looks like a full disk; room(): as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_warns_and_is_tried_again_and_the_last_is_an_error(
        shapes, trained, tmp_path, monkeypatch, room, capsys):
    flags = '--method dit --steps 4 --save-every 1'
    at_steps(monkeypatch, {1: lambda: room(100_000), 2: room, 3: lambda: room(100_000)})
    with pytest.raises(model.BadInput, match=r'cannot write .*4.pt \(.*\); the newest checkpoint is .*3.pt'):
        run(shapes, tmp_path, flags)
    room()
    warning = r'cannot write .*2.pt \(.*\): training continues and saves again at step 3'
    assert re.search(warning, capsys.readouterr().out)
    assert [path.stem for path in train.checkpoints(tmp_path)] == ['0000001', '0000003']
    assert not list(tmp_path.glob('*.tmp'))
    monkeypatch.undo()
    run(shapes, tmp_path, flags)
    assert same_runs(tmp_path, trained('dit', *FOUR), 4)


def test_a_full_disk_leaves_no_half_lines_in_the_log(shapes, tmp_path, monkeypatch, room, capsys):
    at_steps(monkeypatch, {2: lambda: room((tmp_path / 'log.jsonl').stat().st_size + 50), 4: room})
    run(shapes, tmp_path, '--method dit --steps 6')
    assert 'log.jsonl: the disk is full' in capsys.readouterr().out
    assert [line['step'] for line in lines(tmp_path)] == [1, 2, 5, 6]


# ------------------------------------------------------------------------------------------ kills and signals

def slow_saves(folder, out, flags):
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(0.2), fsync(file))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    run(folder, out, flags)


def test_kill_9_while_checkpoints_are_written(shapes, tmp_path):
    """Three times, in a forked process, with a half-written file on disk each time."""
    flags = '--method dit --steps 8 --save-every 1 --batch 4'
    run(shapes, tmp_path / 'whole', flags)
    out = tmp_path / 'out'
    for target in (1, 3, 6):
        child = multiprocessing.get_context('fork').Process(target=slow_saves, args=(shapes, out, flags))
        child.start()
        while not (out / f'{target:07d}.pt.tmp').exists():
            assert child.is_alive()
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert (out / f'{target:07d}.pt.tmp').exists() and not (out / f'{target:07d}.pt').exists()
    run(shapes, out, flags)
    assert same_runs(tmp_path / 'whole', out, 8)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / 'whole').iterdir()}


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_prints_at_once_and_ends_with_a_checkpoint(
        shapes, trained, tmp_path, monkeypatch, capfd, number):
    """A second one changes nothing."""
    def strike():
        os.kill(os.getpid(), number)
        time.sleep(0)                                                         # Python runs the handler here
        assert f'\n{number.name}: stopping after this step, with a checkpoint' in capfd.readouterr().err
        assert not list(tmp_path.glob('*.pt'))
        os.kill(os.getpid(), number)
    at_steps(monkeypatch, {2: strike})
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(shapes, tmp_path, '--method dit --steps 4')
    assert stop.value.code == 128 + number and [path.stem for path in tmp_path.glob('*.pt')] == ['0000003']
    out, err = capfd.readouterr()
    assert 'stopped after step 3: run the same command to resume' in out and number.name not in err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    run(shapes, tmp_path, '--method dit --steps 4')
    assert same_runs(tmp_path, trained('dit', *FOUR), 4)


# ------------------------------------------------------------------------------------------- steps not finite

BAD_STEP = 2                                  # counted from 0


@pytest.fixture(scope='module')
def poisoned(tmp_path_factory):
    """41 latents, of which the only one that is not finite is in the batch of BAD_STEP."""
    folder, rng = tmp_path_factory.mktemp('poisoned') / 'data', np.random.default_rng(0)
    rows = rng.standard_normal((41, 4, 8, 8)).astype(np.float32)
    data.save_folder(folder, ((row, k % 3) for k, row in enumerate(rows)), 'float32', (4, 8, 8),
                     {'kind': 'latents', 'classes': 3})
    np.load(folder / 'data.npy', mmap_mode='r+')[data.batch_indices(0, BAD_STEP, 8, 40)[3], 2, 3, 4] = np.nan
    return folder


def changed_parts(out, step):
    before, after = (whole(out / f'{at:07d}.pt') for at in (step, step + 1))
    return {name for name in ('model', 'ema', 'teacher', 'opt') if not same(before[name], after[name])}


@pytest.mark.parametrize('flags', [*(f'--method {method}' for method in model.METHODS),
                                   '--method dit --accumulate 2 --precision fp16'])
def test_a_step_that_is_not_finite_changes_nothing(poisoned, tmp_path, flags):
    """Neither AdamW nor EMA, teacher and centers, nor the means of the log; float16 halves its scale."""
    run(poisoned, tmp_path / 'each', f'--steps 4 --save-every 1 --keep-every 1 {flags}')
    parts = {'model', 'ema', 'opt'} | ({'teacher'} if 'sddit' in flags or 'mcdit' in flags else set())
    assert [changed_parts(tmp_path / 'each', step) for step in (1, 2, 3)] == [parts, set(), parts]
    logged = {line['step']: line for line in lines(tmp_path / 'each')}
    assert list(logged) == [1, 2, 4]
    assert [line['step'] for line in lines(tmp_path / 'each', 'skipped_in_a_row')] == [3]
    if 'fp16' in flags:
        scale = [whole(tmp_path / 'each' / f'{step:07d}.pt')['scaler']['scale'] for step in (1, 2, 3, 4)]
        assert scale[2] == scale[3] == scale[0] / 2 == scale[1] / 2
    run(poisoned, tmp_path / 'mean', f'--steps 4 --log-every 4 {flags}')
    line, = lines(tmp_path / 'mean')
    for name in logged[1].keys() - {'step', 'lr', 'images_per_s'}:
        assert line[name] == pytest.approx(np.mean([logged[step][name] for step in (1, 2, 4)]), rel=1e-5)


def test_ten_in_a_row_end_the_run_with_a_sentence_that_holds(shapes, trained, tmp_path, monkeypatch):
    row = model.METHODS['dit']
    infinite = lambda *args: {'denoise': (float('inf'), row.loss(*args)['denoise'][1])}
    with monkeypatch.context() as patch:
        patch.setitem(model.METHODS, 'dit', row._replace(loss=infinite))
        with pytest.raises(model.BadInput, match='10 consecutive steps .* there is no checkpoint yet'):
            run(shapes, tmp_path / 'new', '--method dit --steps 20')
        assert not list((tmp_path / 'new').glob('*.pt'))
        out = shutil.copytree(trained('dit', *FOUR), tmp_path / 'old')
        good = (out / '0000004.pt').read_bytes()
        with pytest.raises(model.BadInput, match=f'10 consecutive .* checkpoint {out}/0000004.pt is good'):
            run(shapes, out, '--method dit --steps 20')
        assert (out / '0000004.pt').read_bytes() == good
        assert [line['skipped_in_a_row'] for line in lines(out, 'skipped_in_a_row')] == list(range(1, 11))
    run(shapes, out, '--method dit --steps 5')                                # the cause is gone
    assert [line['step'] for line in lines(out)] == [1, 2, 3, 4, 5] and not lines(out, 'skipped_in_a_row')


# -------------------------------------------------------------------------------------------------- two ranks

@pytest.fixture(scope='module')
def crowd(moments, poisoned, trained, tmp_path_factory):
    """(folder, commands) of the runs that two ranks made, all in one group, and that one rank made too."""
    folder = tmp_path_factory.mktemp('crowd')
    flags = f'{TINY} --model T/4 --lr 1e-3 --save-every 2 --keep-every 1'
    commands = {name: ['train', *f'{flags} {more}'.split()] for name, more in {
        'sddit': f'--method sddit --data {poisoned} --steps 5',
        'mcdit': f'--method mcdit --data {poisoned} --steps 5 --unmasked 0.5 --save-every 1',
        'maskdit': f'--method maskdit --data {moments} --steps 5 --unmasked 0.5 --accumulate 2'}.items()}
    source = trained('mcdit', *FOUR) / '0000004.pt'
    commands['tuned'] = ['finetune', str(source), *f'{TINY} --lr 1e-3 --steps 5'.split()]
    for name, (script, *argv) in commands.items():
        {'train': train.main, 'finetune': finetune.main}[script](
            [*argv, '--out', str(folder / 'one' / name)])
    worker = [[*command, '--out', str(folder / 'two' / name)] for name, command in commands.items()]
    parts = [*commands['mcdit'], '--out', str(folder / 'parts')]
    worker += [['stop=3', *parts], parts]
    (folder / 'from 1 to 2').mkdir()
    killed_after(folder / 'one' / 'sddit', folder / 'from 1 to 2' / 'sddit', 2)
    worker += [[*commands['sddit'], '--out', str(folder / 'from 1 to 2' / 'sddit')]]
    done = torchrun(ROOT / 'tests' / 'worker.py', json.dumps(worker), folder / 'results.json')
    assert done.returncode == 0, done.stderr[-3000:]
    yield folder, commands
    shutil.rmtree(folder)


def test_replicas_are_equal_and_rank_0_alone_reads_checksums(crowd):
    results = json.loads((crowd[0] / 'results.json').read_text())
    assert len(results) == 7 and all(result['difference'] == 0 for result in results)
    assert [result['modules'] >= 3 for result in results] == [True, True, False, False, True, True, True]
    assert [result['verified'] for result in results] == [[0, 0]] * 5 + [[1, 0]] * 2


@pytest.mark.parametrize('name', ['sddit', 'mcdit', 'maskdit', 'tuned', 'from 1 to 2'])
def test_two_ranks_equal_one(crowd, name):
    """To rounding: losses, gradient norms and held-out losses; also where a run resumes on two ranks."""
    one, two = (crowd[0] / count / name for count in ('one', 'two'))
    if name == 'from 1 to 2':
        one, two = crowd[0] / 'one' / 'sddit', crowd[0] / name / 'sddit'
    assert [line.keys() for line in steps(one)] == [line.keys() for line in steps(two)] and steps(one)[3:]
    for ours, theirs in zip(steps(one), steps(two)):
        assert theirs['loss'] == pytest.approx(ours['loss'], rel=1e-5)
        assert theirs['grad_norm'] == pytest.approx(ours['grad_norm'], rel=1e-3)
    if name != 'from 1 to 2':
        for ours, theirs in zip(lines(one, 'held_out'), lines(two, 'held_out')):
            assert theirs['held_out'] == pytest.approx(ours['held_out'], rel=1e-4)


@pytest.mark.parametrize('name', ['sddit', 'mcdit'])
def test_both_ranks_skip_what_one_of_them_saw(crowd, name):
    out = crowd[0] / 'two' / name
    assert [line['step'] for line in lines(out)] == [1, 2, 4, 5]
    assert len(lines(out, 'skipped_in_a_row')) == 1


def test_two_ranks_stop_together_and_resume_bit_equal(crowd):
    """SIGTERM reached rank 1 alone, in step 3 counted from 0."""
    parts, two = crowd[0] / 'parts', crowd[0] / 'two' / 'mcdit'
    assert steps(parts) == steps(two)
    assert same(*(whole(out / '0000005.pt') for out in (parts, two)))


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_and_max_restarts_recovers(shapes, tmp_path):
    flags = f'{TINY} --model T/4 --data {shapes} --steps 6 --save-every 2 --out {tmp_path / "out"}'.split()
    worker = ROOT / 'tests' / 'worker.py', json.dumps([['die=5', 'train', *flags]]), tmp_path / 'results.json'
    done = torchrun(*worker)
    assert done.returncode != 0
    assert [path.stem for path in train.checkpoints(tmp_path / 'out')] == ['0000002', '0000004']
    shutil.rmtree(tmp_path / 'out')
    done = torchrun(*worker, flags=['--max-restarts=1'])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('resumes') == 1 and '0000004.pt' in done.stdout
    assert json.loads((tmp_path / 'results.json').read_text())[0]['difference'] == 0
    flags[-1] = str(tmp_path / 'whole')
    done = torchrun(worker[0], json.dumps([['train', *flags]]), tmp_path / 'whole.json')
    assert done.returncode == 0 and same_runs(tmp_path / 'whole', tmp_path / 'out', 6)


@pytest.mark.slow
def test_torchrun_draws_the_shapes_once_and_trains(tmp_path, monkeypatch):
    """The bare command in an empty folder, by two ranks, which both find that there is no data."""
    monkeypatch.chdir(tmp_path)
    done = torchrun(ROOT / 'train.py', *f'{TINY} --model T/8 --steps 2'.split())
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'shapes']
    assert 'shapes: 19,600 images' in done.stdout and '8 = 2 ranks x 4 images x 1 accumulated' in done.stdout
