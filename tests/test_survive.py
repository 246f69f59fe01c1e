"""train.py and finetune.py under fire: killed, signalled, starved of disk, fed what is not a number."""

import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import TINY, Killed, kill_after, lines, run, same, torchrun, tune

import data
import model
import sample
import train

RUNS = {                                                                      # what resuming is tried on
    **{method: ['--method', method] for method in model.METHODS},
    'accumulated': ['--accumulate', '2'],
    'checkpointed': ['--checkpoint-blocks'],
    'bf16': ['--precision', 'bf16'],
    'fp16': ['--precision', 'fp16'],
}


def whole(path):
    return model.read_checkpoint(path)


def same_runs(a, b, step):
    """Equal to the bit, and every step once in both logs with equal numbers."""
    numbers = [[{k: v for k, v in line.items() if k != 'images_per_s'} for line in lines(x)] for x in (a, b)]
    assert [line['step'] for line in numbers[0]] == list(range(1, step + 1))
    assert numbers[0] == numbers[1]
    return same(*(whole(x / f'{step:07d}.pt') for x in (a, b)))


def start(*command, cwd):
    """A command of ours that runs beside the test, its output in a pipe."""
    calm = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=calm, text=True, stdout=subprocess.PIPE)


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith(f'step {step}/'):
            return
    raise AssertionError('it ended before')


def beside(function, *args):
    """A child process of this one that runs function(*args). Forked: nothing has to be imported again."""
    child = multiprocessing.get_context('fork').Process(target=function, args=args)
    child.start()
    return child


# --------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize('flags', RUNS.values(), ids=RUNS)
def test_resumed_is_bit_equal_to_uninterrupted(shapes, tmp_path, flags, capsys, monkeypatch):
    flags = [*flags, '--save-every', '2', '--steps', '5', '--lr-decay', '0.9']
    run(shapes, tmp_path / 'whole', *flags)
    kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        run(shapes, tmp_path / 'parts', *flags)
    run(shapes, tmp_path / 'parts', *flags)
    assert 'resumes' in capsys.readouterr().out
    assert same_runs(tmp_path / 'whole', tmp_path / 'parts', 5)


@pytest.mark.parametrize('method', ['dit', 'maskdit', 'mdt', 'mcdit',             # as dit's is
                                    pytest.param('sddit', marks=pytest.mark.slow)])
def test_tuning_resumes_bit_equal(shapes, tmp_path, monkeypatch, method):
    path = run(shapes, tmp_path / 'out', '--steps', '2', '--method', method)
    flags = ['--steps', '4', '--save-every', '2', '--lr-decay', '0.5']
    tune(path, tmp_path / 'whole', *flags)
    kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        tune(path, tmp_path / 'parts', *flags)
    tune(path, tmp_path / 'parts', *flags)
    assert same_runs(tmp_path / 'whole', tmp_path / 'parts', 4)


@pytest.mark.parametrize('stop', [1, 2, 6, 7])
def test_stopped_after_any_step(moments, tmp_path, monkeypatch, stop):
    """Latents, whose sampling is random too; 58 are trained on, so that the epoch's edge is in step 8."""
    flags = ['--model', 'T/2', '--save-every', '1', '--steps', '8', '--keep-every', '8']
    run(moments, tmp_path / 'whole', *flags)
    kill_after(monkeypatch, stop)
    with pytest.raises(Killed):
        run(moments, tmp_path / 'parts', *flags)
    run(moments, tmp_path / 'parts', *flags)
    assert same_runs(tmp_path / 'whole', tmp_path / 'parts', 8)


def test_a_resumed_run_lets_go_of_its_checkpoint(shapes, tmp_path, monkeypatch):
    """Still mapped, the file would keep its room on the disk when it is removed."""
    run(shapes, tmp_path, '--steps', '1')
    tensors, held, newest = [], [], train.newest_checkpoint

    def remember(*args):
        path, state = newest(*args)
        for name in ('model', 'ema', 'teacher'):
            tensors.extend(map(weakref.ref, state[name].values()))
        for moments in state['opt']['state'].values():
            tensors.extend(map(weakref.ref, moments.values()))
        return path, state
    monkeypatch.setattr(train, 'newest_checkpoint', remember)
    at_steps(monkeypatch, {1: lambda: held.append(sum(tensor() is not None for tensor in tensors))})
    run(shapes, tmp_path, '--steps', '2')
    assert tensors and held == [0]


CROWDS = [['sddit', 'mcdit'], pytest.param(['dit', 'maskdit', 'mdt', 'mcdit'], marks=pytest.mark.slow)]


@pytest.fixture(scope='module', params=CROWDS, ids=['some', 'others'])
def crowd(shapes, moments, tmp_path_factory, request):
    """A folder of runs that two processes made, one after the other in one group; see the tests that ask."""
    folder = tmp_path_factory.mktemp('crowd')
    flags = ['--steps', '6', '--lr-decay', '0.5', '--save-every', '2']
    first = run(shapes, folder / 'first', '--steps', '2')
    commands = {
        name: ['train', *TINY, '--data', str(shapes), '--method', name, *flags] for name in request.param
    }
    commands['accumulated'] = [*commands['mcdit'], '--accumulate', '2']
    commands['moments'] = ['train', *TINY, '--data', str(moments), '--model', 'T/2', *flags]
    commands['tuned'] = ['finetune', str(first), *TINY[2:], *flags]
    worker = []
    for name, command in commands.items():
        worker += [[*command, '--out', str(folder / 'whole' / name)]]
        parts = [*command, '--out', str(folder / 'parts' / name)]
        worker += [['stop=3', *parts], parts]

    long = [*TINY, '--data', str(shapes), '--lr', '1e-3', '--steps', '40', '--save-every', '20']
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 20)
        with pytest.raises(Killed):
            train.main([*long, '--out', str(folder / 'from 1 to 2')])
    worker += [['train', *long, '--out', str(folder / 'from 1 to 2')]]
    worker += [['stop=19', 'train', *long, '--out', str(folder / 'from 2 to 1')]]

    poison = str(poisoned(folder / 'poison', 41, [0]))
    flags = ['--steps', '5', '--save-every', '1', '--keep-every', '1']
    worker += [['train', *TINY, '--data', poison, '--method', method, *flags, '--out', str(folder / method)]
               for method in ('sddit', 'mcdit')]
    done = torchrun(ROOT / 'tests' / 'worker.py', json.dumps(worker), folder / 'spread.json')
    assert done.returncode == 0, done.stderr
    train.main([*long, '--out', str(folder / 'from 2 to 1')])
    train.main([*long, '--out', str(folder / 'one')])
    yield folder, commands
    shutil.rmtree(folder)                                                     # two gigabytes


def test_all_replicas_are_equal_to_the_bit(crowd):
    spread = json.loads((crowd[0] / 'spread.json').read_text())
    assert len(spread) >= 19 and all(run['modules'] >= 2 and run['difference'] == 0 for run in spread)


def test_two_processes_resume_bit_equal(crowd):
    """Stopped in step 3 by a signal that one of the two got."""
    folder, commands = crowd
    for name in commands:
        assert (folder / 'parts' / name / '0000004.pt').exists()              # where it stopped
        assert same_runs(folder / 'whole' / name, folder / 'parts' / name, 6)


@pytest.mark.parametrize('name', ['from 1 to 2', 'from 2 to 1'])
def test_another_number_of_processes_goes_on_to_1e_5(crowd, name):
    one, changed = ([line['loss'] for line in lines(crowd[0] / out)] for out in ('one', name))
    assert len(one) == 40 and (crowd[0] / name / '0000020.pt').exists()
    assert changed == pytest.approx(one, rel=1e-5)


# ------------------------------------------------------------------------------------------------- kill -9


def doomed(folder, out, flags, slow_save):
    """A run whose checkpoints, if so wished, take long enough to be hit."""
    os.setsid()
    sys.stdout = open(os.devnull, 'w')
    fsync = os.fsync
    train.os.fsync = lambda file: (time.sleep(0.2 * slow_save), fsync(file))
    run(folder, out, *flags)


def test_killed_at_ten_random_moments(shapes, tmp_path):
    """Half of the kills hit while a checkpoint is being written, the others while steps are made."""
    flags = ['--steps', '40', '--save-every', '1', '--batch', '4']
    run(shapes, tmp_path / 'whole', *flags)
    out, rng, reached, torn = tmp_path / 'parts', random.Random(0), [], 0
    for kill in range(10):
        saving = kill % 2 == 0
        child = beside(doomed, shapes, out, flags, saving)
        target = (reached[-1] if reached else 0) + rng.randint(1, 3)
        while child.is_alive():
            logged = max([line['step'] for line in lines(out)], default=0)
            if logged >= target and (not saving or list(out.glob('*.pt.tmp*'))):
                break
            time.sleep(0.001)
        assert child.is_alive(), 'it ended before the kill'
        time.sleep(rng.random() * 0.02)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        torn += len(list(out.glob('*.pt.tmp*')))
        reached.append(max([int(path.stem) for path in train.checkpoints(out)], default=0))
    assert torn >= 3 and len(set(reached)) >= 5 and reached == sorted(reached)
    run(shapes, out, *flags)
    assert same_runs(tmp_path / 'whole', out, 40)
    assert sorted(path.name for path in out.iterdir()) == ['0000039.pt', '0000040.pt', 'log.jsonl']


@pytest.fixture(scope='module')
def four_steps(shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp('four')
    run(shapes, out, '--steps', '4', '--save-every', '2')
    return out


def flip(content):
    """One bit of a number in the middle of the file, which torch.load would not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1:]


DAMAGE = {
    'emptied': lambda content: b'',
    'one byte left': lambda content: content[:1],
    'half': lambda content: content[: len(content) // 2],
    'all but a little': lambda content: content[: int(len(content) * 0.999)],
    'its end zeroed': lambda content: content[: len(content) // 2].ljust(len(content), b'\0'),
    'one bit flipped': flip,
    'a page': lambda content: b'<html>404</html>',
}


@pytest.mark.parametrize('harm', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(shapes, four_steps, tmp_path, capsys, harm):
    for name in ('0000002.pt', '0000004.pt', 'log.jsonl'):
        (tmp_path / name).write_bytes((four_steps / name).read_bytes())
    newest = tmp_path / '0000004.pt'
    newest.write_bytes(harm(newest.read_bytes()))
    run(shapes, tmp_path, '--steps', '4', '--save-every', '2')
    told = capsys.readouterr().out
    assert f'passed over: {newest} is ' in told and f'resumes   {tmp_path / "0000002.pt"}' in told
    assert same_runs(four_steps, tmp_path, 4)
    for file in tmp_path.glob('*.pt'):
        file.write_bytes(harm(file.read_bytes()))
    log = (tmp_path / 'log.jsonl').read_bytes()
    with pytest.raises(model.BadInput, match='none of the 2 checkpoints'):
        run(shapes, tmp_path, '--steps', '4')
    assert (tmp_path / 'log.jsonl').read_bytes() == log


def test_every_kth_checkpoint_is_kept(shapes, tmp_path):
    run(shapes, tmp_path, '--steps', '9', '--save-every', '1', '--keep-every', '3')
    assert [path.stem[-1] for path in train.checkpoints(tmp_path)] == list('3689')


def test_a_second_run_stays_out_of_the_folder(shapes, tmp_path):
    """Until the first has ended, even by kill -9; then its unfinished files are removed, and no others."""
    child = beside(doomed, shapes, tmp_path, ['--steps', '1000', '--save-every', '1'], True)
    while not list(tmp_path.glob('*.pt.tmp*')):
        assert child.is_alive()
    with pytest.raises(model.BadInput, match='another run is writing into'):
        run(shapes, tmp_path, '--steps', '1000', '--save-every', '1')
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    foreign = tmp_path / 'notes.tmp1'
    for path in (foreign, tmp_path / 'samples-0000001.png.tmp77'):
        path.touch()
    run(shapes, tmp_path, '--steps', '2')
    assert [path.name for path in tmp_path.iterdir() if '.tmp' in path.name] == ['notes.tmp1']


# -------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(shapes, tmp_path, number):
    flags = [*TINY, '--data', str(shapes), '--steps', '3000', '--out', 'out']
    process = start(sys.executable, ROOT / 'train.py', *flags, cwd=tmp_path)
    wait_for_step(process, 3)
    process.send_signal(number)
    told = process.stdout.read()
    assert process.wait() == 128 + number
    path, = (tmp_path / 'out').glob('*.pt')
    step = int(path.stem)
    assert f'stopped by {number.name} after step {step}' in told
    assert 3 <= model.read_checkpoint(path)['step'] == step < 3000
    run(shapes, tmp_path / 'out', '--steps', str(step + 2))                   # goes on as if nothing had been
    run(shapes, tmp_path / 'whole', '--steps', str(step + 2))
    assert same_runs(tmp_path / 'out', tmp_path / 'whole', step + 2)


def wait_in_a_step(folder, out):
    train.model.draw = lambda *args: time.sleep(60)
    run(folder, out, '--steps', '5')


def test_a_second_signal_exits_at_once(shapes, tmp_path):
    child = beside(wait_in_a_step, shapes, tmp_path)
    while not (tmp_path / 'log.jsonl').exists():
        assert child.is_alive()
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(1.2 * train.SAME_SIGNAL)
    assert child.is_alive()                                                   # the step is not finished
    os.kill(child.pid, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == 128 + signal.SIGTERM


def signalled_twice(folder, out):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
    at_steps(pytest.MonkeyPatch(), {2: twice})
    run(folder, out, '--steps', '9', '--log-every', '9')


def test_a_signal_that_comes_twice_at_once_is_one(shapes, tmp_path):
    """A scheduler signals torchrun and its processes, and torchrun passes on its own. What was not yet in the
    log is written too."""
    child = beside(signalled_twice, shapes, tmp_path)
    child.join(60)
    assert child.exitcode == 128 + signal.SIGTERM and whole(tmp_path / '0000003.pt')['step'] == 3
    assert [line['step'] for line in lines(tmp_path)] == [3]


def test_handlers_are_put_back(shapes, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(shapes, tmp_path, '--steps', '1')
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
def test_a_signal_stops_all_processes_at_one_step(shapes, tmp_path):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    flags = [*TINY, '--data', str(shapes), '--steps', '3000', '--out', 'out']
    process = start(*torchrun, ROOT / 'train.py', *flags, cwd=tmp_path)
    wait_for_step(process, 3)
    process.send_signal(signal.SIGTERM)
    told = process.stdout.read()
    assert process.wait() != 0 and told.count('stopped by SIGTERM') == 1
    path, = (tmp_path / 'out').glob('*.pt')
    run(shapes, tmp_path / 'out', '--steps', str(int(path.stem) + 1))


# ------------------------------------------------------------------------------------------------ full disks


@pytest.fixture
def room():
    """room(n): no file may grow beyond n bytes from here, which looks to a program like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def at_steps(monkeypatch, happenings):
    """Call happenings[step]() as that step, counted from 0, begins."""
    draw = model.draw

    def struck(cfg, step, *rest):
        happenings.get(step, lambda: None)()
        return draw(cfg, step, *rest)
    monkeypatch.setattr(model, 'draw', struck)


def test_a_full_disk_leaves_the_checkpoint_before(shapes, tmp_path, monkeypatch, room, capsys):
    at_steps(monkeypatch, {1: lambda: room(100_000)})
    words = r'cannot write .*0000003.pt: File too large \([\d.]+ MB are needed'
    with pytest.raises(model.BadInput, match=words):
        run(shapes, tmp_path, '--steps', '3', '--save-every', '1')
    assert 'cannot write' in capsys.readouterr().out                          # at step 2, and it went on
    assert [path.name for path in sorted(tmp_path.iterdir())] == ['0000001.pt', 'log.jsonl']
    assert whole(tmp_path / '0000001.pt')['step'] == 1
    room()
    monkeypatch.undo()
    run(shapes, tmp_path, '--steps', '3', '--save-every', '1')
    run(shapes, tmp_path / 'whole', '--steps', '3', '--save-every', '1')
    assert same_runs(tmp_path, tmp_path / 'whole', 3)


def test_a_disk_with_room_again_gets_the_checkpoint_soon(shapes, tmp_path, monkeypatch, room):
    """Not at the next --save-every, which may be hours away, but at the next line of the log."""
    at_steps(monkeypatch, {3: lambda: room(100_000), 6: room})
    seen = []
    replace = os.replace
    monkeypatch.setattr(train.os, 'replace', lambda a, b: (replace(a, b), seen.append(pathlib.Path(b).name)))
    run(shapes, tmp_path, '--steps', '8', '--save-every', '4', '--log-every', '1')
    assert [name for name in seen if name.endswith('.pt')] == ['0000007.pt', '0000008.pt']


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    usage = type('Usage', (), {'free': 3_000_000})
    monkeypatch.setattr(train.shutil, 'disk_usage', lambda folder: usage)
    monkeypatch.setattr(torch, 'save', lambda *args: pytest.fail('it was begun'))
    state = {'a': [torch.zeros(10 ** 6), {'b': torch.zeros(5, 10, dtype=torch.float64)}], 'step': 4}
    words = r'No space left on device \(4.0 MB are needed and 3.0 MB were free'
    with pytest.raises(model.BadInput, match=words):
        train.save(tmp_path / 'x.pt', state)


def test_what_a_gpu_reports_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(state, file):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')
    monkeypatch.setattr(torch, 'save', broken)
    with pytest.raises(RuntimeError, match='illegal memory access'):
        train.save(tmp_path / 'x.pt', {'step': 4})
    assert not list(tmp_path.iterdir())


def test_lines_that_a_full_disk_refuses_wait(shapes, tmp_path, monkeypatch, room, capsys):
    def full():
        room((tmp_path / 'log.jsonl').stat().st_size + 50)                    # the next line would be torn
    at_steps(monkeypatch, {2: full, 5: room})
    run(shapes, tmp_path, '--steps', '7', '--eval-every', '4')
    assert 'its last 1 lines wait' in capsys.readouterr().out
    for line in (tmp_path / 'log.jsonl').read_text().splitlines():
        json.loads(line)
    assert [line['step'] for line in lines(tmp_path)] == list(range(1, 8))
    assert [line['step'] for line in lines(tmp_path, 'held_out')] == [4, 7]


def test_a_log_that_cannot_be_begun_stops_all_processes(shapes, tmp_path, monkeypatch):
    (tmp_path / 'log.jsonl').mkdir()
    told = []
    monkeypatch.setattr(train, 'agree', lambda mistake, *group: told.append(mistake) or mistake)
    with pytest.raises(model.BadInput, match='cannot write .*log.jsonl: Is a directory'):
        run(shapes, tmp_path, '--steps', '1')
    assert isinstance(told[-1], model.BadInput)


def test_a_log_line_that_a_kill_tore_is_made_anew(shapes, tmp_path):
    run(shapes, tmp_path, '--steps', '2')
    with open(tmp_path / 'log.jsonl', 'a') as log:
        log.write('{"step": 3, "loss": 0.')
    run(shapes, tmp_path, '--steps', '4')
    assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert len((tmp_path / 'log.jsonl').read_text().splitlines()) == 1 + 4 + 2     # header, steps, held-out


def test_a_failed_picture_does_not_end_a_run(shapes, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(data, 'save_grid', full)
    run(shapes, tmp_path, '--steps', '1', '--preview', '2')
    assert 'no picture at step 1: [Errno 28] No space left' in capsys.readouterr().out
    assert (tmp_path / '0000001.pt').exists()


# ------------------------------------------------------------------------------------------ dead processes


def test_a_process_that_dies_is_started_anew_to_the_same_end(crowd):
    """kill -9 of one of two, with torchrun's --max-restarts: from the last checkpoint, equal to the bit."""
    folder, commands = crowd
    command = json.dumps([['die=5', *commands['mcdit'], '--out', str(folder / 'died')]])
    done = torchrun('--max-restarts=1', ROOT / 'tests' / 'worker.py', command, folder / 'died.json')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('resumes') == 1 and '0000004.pt' in done.stdout
    assert same_runs(folder / 'whole' / 'mcdit', folder / 'died', 6)
    assert json.loads((folder / 'died.json').read_text())[0]['difference'] == 0


FAILS_ALONE = '''
import sys
import time
sys.path.insert(0, sys.argv.pop(1))
import torch.distributed as dist
import model
import train

def fails(cfg, step, *rest):
    if dist.get_rank() == 1 and step == 1:
        raise RuntimeError('nobody else has this')
    return draw(cfg, step, *rest)

def farewell():
    print('farewell', flush=True)
    time.sleep(100)

draw, model.draw, dist.destroy_process_group = model.draw, fails, farewell
train.script('train.py', train.main)
'''


def test_a_process_that_fails_alone_waits_for_nobody(shapes, tmp_path):
    """NCCL's farewell, which blocks until all are there, is played by one that takes its time."""
    (tmp_path / 'fails.py').write_text(FAILS_ALONE)
    flags = [*TINY, '--data', shapes, '--out', tmp_path / 'out', '--steps', '3']
    done = torchrun(tmp_path / 'fails.py', ROOT, *flags)
    assert done.returncode != 0 and 'RuntimeError: nobody else has this' in done.stderr
    assert 'step 1/3' in done.stdout and 'farewell' not in done.stdout


def raising(error):
    def main():
        raise error
    return main


def in_a_group(main):
    train.dist.is_initialized = lambda: True
    train.dist.destroy_process_group = lambda: os._exit(77)
    train.script('train.py', main)


ENDS = [(lambda: None, 77), (raising(SystemExit(143)), 77), (raising(model.BadInput('a')), 2),
        (raising(data.BadInput('a')), 2), (raising(KeyboardInterrupt), 130), (raising(KeyError('a')), 1)]


@pytest.mark.parametrize('main, status', ENDS)
def test_a_group_parts_only_where_all_end(main, status):
    child = beside(in_a_group, main)
    child.join(60)
    assert child.exitcode == status


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_after_the_timeout(shapes, tmp_path):
    """One of two is stopped, not killed: the other gives up after --timeout, and torchrun ends both."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    flags = [*TINY, '--data', str(shapes), '--steps', '3000', '--out', 'out', '--timeout', '0.1']
    process = start(*command, ROOT / 'train.py', *flags, cwd=tmp_path)
    wait_for_step(process, 3)
    below = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    frozen = [int(pid) for pid in below if 'train.py' in pathlib.Path(f'/proc/{pid}/cmdline').read_text()][-1]
    os.kill(frozen, signal.SIGSTOP)
    before = time.monotonic()
    process.stdout.read()
    assert process.wait() != 0 and time.monotonic() - before < 90            # 6 s, and torchrun's grace of 30


# ---------------------------------------------------------------------------------------------- not a number


def poisoned(folder, count, bad):
    """Latents of which the images `bad` hold a number that is none."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count, 4, 8, 8)).astype(np.float32)
    rows[bad, 2, 3, 4] = np.nan
    meta = {'kind': 'latents', 'classes': 3}
    data.save_folder(folder, zip(rows, rng.integers(3, size=count).tolist()), 'float32', (4, 8, 8), meta)
    return folder


@pytest.mark.parametrize('method', model.METHODS)
@pytest.mark.parametrize('flags', [[], ['--accumulate', '2', '--precision', 'fp16']], ids=['plain', 'fp16'])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, method, flags):
    """Image 0 is nowhere finite: the one step of the epoch that has it leaves all as it was."""
    folder = poisoned(tmp_path / 'data', 41, [0])
    steps = [step for step in range(5) if 0 in data.batch_indices(0, step, 8, 40)]
    assert len(steps) == 1 and 0 < steps[0] < 4, 'choose another seed'
    out = tmp_path / 'out'
    run(folder, out, '--model', 'T/4', '--method', method, '--steps', '5', '--save-every', '1',
        '--keep-every', '1', *flags)
    states = [whole(out / f'{step:07d}.pt') for step in range(1, 6)]
    for step, (before, after) in enumerate(zip(states, states[1:]), 1):
        for name in ('model', 'ema', 'teacher', 'opt'):
            changed = not same(before[name], after[name])
            assert changed == (step != steps[0] and before[name] is not None), (step, name)
        if '--precision' in flags:
            ratio = after['loss_scale'][0] / before['loss_scale'][0]
            assert ratio == (0.5 if step == steps[0] else 1)
    assert all(torch.isfinite(value).all() for value in states[-1]['model'].values())
    for line in lines(out):
        assert line['skipped'] == (line['step'] == steps[0] + 1)
        assert (line['loss'] is None) == (line['step'] == steps[0] + 1)
    told, = lines(out, 'skipped_in_a_row')
    assert told['step'] == steps[0] + 1 and told['skipped_in_a_row'] == 1 and 0 in told['indices']
    cfg = states[0]['config']
    assert told['noise_levels'] == pytest.approx(model.draw(cfg, steps[0], 8)['sigma'].tolist())


def test_a_skipped_step_stays_out_of_the_means(tmp_path):
    folder = poisoned(tmp_path / 'data', 41, [0])
    run(folder, tmp_path / 'each', '--model', 'T/4', '--steps', '5')
    run(folder, tmp_path / 'mean', '--model', 'T/4', '--steps', '5', '--log-every', '5')
    each = [line['loss'] for line in lines(tmp_path / 'each') if line['loss'] is not None]
    line, = lines(tmp_path / 'mean')
    assert len(each) == 4 and line['loss'] == pytest.approx(np.mean(each)) and line['skipped'] == 1


def test_ten_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    """The checkpoint before is as it was, and the log says which images and noise levels they were."""
    folder = poisoned(tmp_path / 'data', 41, [])
    out = tmp_path / 'out'
    run(folder, out, '--model', 'T/4', '--steps', '3')
    before = (out / '0000003.pt').read_bytes()
    loss = model.METHODS['mcdit']['loss']
    infinite = lambda *args: (loss(*args)[0] * math_inf, loss(*args)[1])
    monkeypatch.setitem(model.METHODS['mcdit'], 'loss', infinite)
    with pytest.raises(SystemExit, match='10 steps in a row, the last of them step 13'):
        run(folder, out, '--model', 'T/4', '--steps', '20', '--save-every', '20')
    assert [path.name for path in train.checkpoints(out)] == ['0000003.pt']
    assert (out / '0000003.pt').read_bytes() == before
    told = lines(out, 'skipped_in_a_row')
    assert [line['skipped_in_a_row'] for line in told] == list(range(1, 11))
    for line in told:
        assert line['indices'] == data.batch_indices(0, line['step'] - 1, 8, 40).tolist()
    monkeypatch.undo()
    run(folder, out, '--model', 'T/4', '--steps', '5')                        # the cause removed, it goes on
    assert [line['step'] for line in lines(out)] == [1, 2, 3, 4, 5]


math_inf = float('inf')


def test_a_loss_that_is_not_finite_counts_even_where_its_gradient_is(shapes, tmp_path, monkeypatch):
    loss = model.METHODS['dit']['loss']

    def odd(net, teacher, x, y, draws, cfg):
        value, parts = loss(net, teacher, x, y, draws, cfg)
        return value + (math_inf if draws['progress'][0] == 0.5 else 0), parts
    monkeypatch.setitem(model.METHODS['dit'], 'loss', odd)
    run(shapes, tmp_path, '--method', 'dit', '--steps', '4', '--save-every', '1', '--keep-every', '1')
    assert [line['skipped'] for line in lines(tmp_path)] == [0, 0, 1, 0]
    assert same(*(whole(tmp_path / f'000000{step}.pt')['model'] for step in (2, 3)))


@pytest.mark.parametrize('method', ['sddit', 'mcdit'])
def test_all_processes_skip_what_one_of_them_saw(crowd, method):
    step, = (step for step in range(5) if 0 in data.batch_indices(0, step, 8, 40))
    out = crowd[0] / method
    assert [line['skipped'] for line in lines(out)] == [int(at == step) for at in range(5)]
    states = [whole(out / f'{at:07d}.pt') for at in (step, step + 1)]
    assert all(same(*(state[name] for state in states)) for name in ('model', 'ema', 'teacher', 'opt'))


def test_float16_scales_its_loss_up_again(monkeypatch):
    """2,000 good steps double the scale, one that overflows halves it, and neither shows in the weights."""
    monkeypatch.setattr(train, 'GROW_EVERY', 3)
    net = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    scale, seen = torch.tensor([8.0, 0.0]), []
    for step in range(8):
        net.weight.grad = scale[0] * torch.tensor([[0.3, 0.4]]) * (math_inf if step == 4 else 1)
        norm = train.update(net, net, None, optimizer, scale, step, {'ema_step': 0})
        assert norm == pytest.approx(math_inf if step == 4 else 0.5)
        seen.append(scale.tolist())
    assert seen == [[8, 1], [8, 2], [16, 0], [16, 1], [8, 0], [8, 1], [8, 2], [16, 0]]


def test_reading_ahead_keeps_the_order_and_passes_mistakes_on():
    threads = set()

    def read(place):
        threads.add(threading.get_ident())
        if place == 7:
            raise OSError('gone')
        return place * 10
    got = []
    with pytest.raises(OSError, match='gone'):
        for value in train.read_ahead(read, range(20)):
            got.append(value)
    assert got == [place * 10 for place in range(7)]
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(train.read_ahead(read, range(2))) == [0, 10]


def test_a_sampler_that_makes_no_numbers_writes_none(shapes, tmp_path):
    path = run(shapes, tmp_path, '--steps', '1')
    state = whole(path)
    state['ema']['patch_embed.weight'] = state['ema']['patch_embed.weight'] * math_inf
    train.save(path, state)
    with pytest.raises(data.BadInput, match="not finite"):
        sample.main([str(path), '-n', '2', '--steps', '2', '--npz', str(tmp_path / 'x.npz')])
    assert not list(tmp_path.glob("*npz*"))
