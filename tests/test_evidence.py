"""evidence.py: readings are what they say, the plan is in order, tables hold the numbers they were given."""

import json
import math
import pathlib
import statistics
import time

import numpy as np
import pytest
import torch
from conftest import build, config, draws, images

import evidence
import judge
import model

QUICK = evidence.SETTINGS['quick']


# ------------------------------------------------------------------------------------------ other readings

@pytest.fixture(scope='module')
def made():
    cfg = config()
    net, teacher = build(cfg)
    x, y = images(cfg)
    return cfg, net, teacher, x, y, draws(cfg)


def test_unturned_the_second_writing_is_the_first(made):
    cfg, net, teacher, x, y, some = made
    ours, theirs = (loss(net, teacher, x, y, some, cfg) for loss in (evidence.mcdit_loss, model.mcdit_loss))
    assert abs(ours[0] - theirs[0]) < 1e-12
    assert all(abs(value - theirs[1][name]) < 1e-12 for name, value in ours[1].items())
    ours, theirs = (student(net, x, y, some, cfg, (1.0, 1.0))
                    for student in (evidence.student, model.mcdit_student))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_skip_adds_the_noise_at_masked_slots_alone(made):
    cfg, net, _, x, y, some = made
    D, xt, (visible, masked) = evidence.student(net, x, y, some, cfg, (1.0, 1.0))
    turned = evidence.student(net, x, y, some, cfg, (1.0, 1.0), skip=True)[0]
    c_skip = model.precondition(some['sigma'], cfg['sigma_data'])[0]
    change, noise = (model.patchify(part, 2) for part in (turned - D, c_skip * (xt - x)))
    assert model.take(change, visible).abs().max() == 0
    assert (model.take(change - noise, masked)).abs().max() < 1e-12 < model.take(noise, masked).abs().max()


def test_scale_is_c_in_for_both_uses_of_clean_patches(made, monkeypatch):
    cfg, net, teacher, x, y, some = made
    seen = []
    hooks = [embed.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0]))
             for embed in (net.fill_embed, teacher.fill_embed)]
    monkeypatch.setattr(model, 'mcdit_student', lambda *a: evidence.student(*a, scale=True))
    evidence.mcdit_loss(net, teacher, x, y, some, cfg, scale=True)
    for hook in hooks:
        hook.remove()
    expected = model.patchify(x / (some['sigma'] ** 2 + 0.25).sqrt().view(-1, 1, 1, 1), 2)
    assert len(seen) == 3 and all((some - expected).abs().max() < 1e-12 for some in (seen[0], seen[2]))


def test_normalised_changes_the_noise_term_alone(made):
    cfg, net, teacher, x, y, some = made
    (raw, before), (turned, after) = (evidence.mcdit_loss(net, teacher, x, y, some, cfg, normalised=flag)
                                      for flag in (False, True))
    D, xt, (_, masked) = evidence.student(net, x, y, some, cfg, (1.0, 1.0))
    patches = model.patchify(xt, 2)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    expected = model.take((model.patchify(D, 2) - target) ** 2, masked).mean()
    assert abs(after['noise'] - expected) < 1e-12
    assert abs(turned - raw - 0.1 * (expected - before['noise'])) < 1e-12
    assert all(after[name] == before[name] for name in ('clean', 'con1', 'con2'))


def test_a_zero_bridge_and_a_narrow_head(monkeypatch):
    for name in ('PROTOTYPES', 'initialise', 'mcdit_student'):
        monkeypatch.setattr(model, name, getattr(model, name))
    monkeypatch.setattr(model.Head, '__init__', model.Head.__init__)
    monkeypatch.setattr(evidence.train, 'EVAL_SIGMAS', [1.0, 2.0])
    monkeypatch.setitem(model.METHODS, 'mcdit', dict(model.METHODS['mcdit']))
    evidence.prepare('zero bridge')
    net = model.Net(config())
    assert net.bridge.linear.weight.abs().max() == 0 < net.fill_embed.weight.abs().max()
    assert model.Net(config('dit')).bridge is None
    net, teacher = build(config('sddit'))
    x, y = images(config('sddit'))
    logits = net(x, torch.zeros(4).double(), y, torch.arange(12).repeat(4, 1), model.patchify(x, 2))[2]
    assert logits.shape == (4, 13, evidence.PROTOTYPES) and teacher.centers.shape == (2, evidence.PROTOTYPES)
    assert evidence.train.EVAL_SIGMAS == evidence.SIGMAS


def test_fast_branches_forget_sooner(monkeypatch):
    monkeypatch.setattr(model, 'BRANCH_DECAY', model.BRANCH_DECAY)
    monkeypatch.setattr(model, 'PROTOTYPES', model.PROTOTYPES)
    monkeypatch.setattr(model.Head, '__init__', model.Head.__init__)
    monkeypatch.setattr(evidence.train, 'EVAL_SIGMAS', [1.0, 2.0])
    cfg = config()
    net, teacher = build(cfg)
    evidence.prepare(evidence.RUNS['fast branches'][2])
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    with torch.no_grad():
        for value in net.parameters():
            value += 1
    model.update_teacher(teacher, net, 0, cfg)
    new = dict(net.named_parameters())
    for name, value in teacher.named_parameters():
        assert (value - before[name] - 0.02 * (new[name] - before[name])).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------ the plan

def test_the_plan_is_in_order(tmp_path):
    units = evidence.plan(tmp_path, QUICK, list(evidence.QUESTIONS), [0, 1])
    finished = set()
    for unit in units:
        assert set(unit['needs']) <= finished                                 # nothing waits for a later unit
        lengths = [stage[1:] for stage in unit['stages'].values()]
        assert lengths == sorted(lengths)                                     # long ones go on from short
        trained = set()
        for folder, (kind, M, T) in unit['stages'].items():
            trained |= {(M, T)} if kind != 'sample' else set()
            assert kind not in ('tune', 'sample') or {(M, 0), (M, T)} <= trained
        finished |= set(unit['stages'])
    seeds = [unit['seed'] for unit in units if unit['seed'] is not None]
    assert seeds == sorted(seeds) and {unit['run'] for unit in units} >= set(evidence.RUNS)
    everything = [folder for unit in units for folder in unit['stages']]
    assert len(set(everything)) < len(everything)                             # questions share stages


def test_a_folder_is_a_configuration(tmp_path):
    def folder(run='mcdit', seed=0, **changes):
        return evidence.folder_of(tmp_path, QUICK | changes, run, seed, 'sample', 4, 2)
    others = [folder(run) for run in evidence.RUNS] + [folder(seed=1), folder(lr=1.0), folder(samples=21),
                                                       folder(real=61)]
    assert len(set(others)) == len(others) and folder() == folder()
    # the length of a training is no part of the run's name: a longer one goes on from a shorter
    assert folder(masked=5).parent == folder().parent
    assert evidence.judge_of(tmp_path, QUICK) != evidence.judge_of(tmp_path, QUICK | {'real': 61})


def test_equal_time_is_in_steps():
    assert evidence.stages(QUICK | {'masked': 100}, 'mdt', 'time', 'short_tune') == [
        ('train', 65, 0), ('tune', 65, 2), ('sample', 65, 2)]
    assert evidence.stages(QUICK, 'dit', 'masked', None) == [('train', 4, 0), ('sample', 4, 0)]
    labels = [[row[0] for row in evidence.rows_of(evidence.SETTINGS[name], 'methods')]
              for name in ('laptop', 'gpu')]                                  # a GPU's steps were never timed
    assert set(labels[0]) - set(labels[1]) == {f'{name}, equal time' for name in model.METHODS
                                               if name != 'mcdit'}


def test_claims_name_rows_that_exist():
    for words, published, question, metric, labels, how in evidence.CLAIMS:
        known = [label for label, *_ in evidence.QUESTIONS[question][2]]
        assert set(labels) <= set(known) and len(set(known)) == len(known)
        assert published in (evidence.PICTURE, evidence.OURS) or len(published) == len(labels)
        assert list(published) == sorted(published) or type(published) is str
        assert how in (evidence.CHAIN, evidence.FIRST) and metric in ('frechet', 'on_clean', 'away')


def test_at_the_deadline_what_runs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, '__file__', str(tmp_path / 'sleeper.py'))
    (tmp_path / 'sleeper.py').write_text('import time; time.sleep(600)')
    units = evidence.plan(tmp_path, QUICK, ['targets'], [0])
    begun = time.time()
    missing = evidence.carry_out(tmp_path, 'quick', units, 2, deadline=begun + 1)
    assert set(missing.values()) == {'no time left'} and time.time() - begun < 60


def test_what_is_finished_is_not_repeated_and_what_cannot_start_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence.subprocess, 'Popen', None)                   # nothing may be started
    units = evidence.plan(tmp_path, QUICK, ['targets'], [0])
    folders = [folder for unit in units for folder in unit['stages']]
    assert set(evidence.carry_out(tmp_path, 'quick', units, 2, deadline=0)) == set(folders)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'result.json').write_text('{"a": 1}')
    assert evidence.carry_out(tmp_path, 'quick', units, 2, deadline=math.inf) == {}
    (folders[0] / 'result.json').write_text('{"a": 1')                        # never left by `write`
    with pytest.raises(json.JSONDecodeError):
        evidence.result_of(folders[0])


# -------------------------------------------------------------------------------------------------- tables

def test_mean_and_deviation():
    assert evidence.summary([1.0, 2.0, None, 6.0]) == (3.0, math.sqrt(7.0), 3)
    assert evidence.summary([2.5]) == (2.5, None, 1) and evidence.summary([None]) == (None, None, 0)
    cells = [evidence.cell(values, 2) for values in ([1, 2, 6], [2.5, None], [])]
    assert cells == ['3.00 ± 2.65', '2.50', '-']
    assert evidence.in_seeds([1, 2, 3, None], [2, 1, 4, 5]) == '2 of 3'
    assert evidence.in_seeds([1], [None]) == '-'
    assert evidence.quotients([3, 1, None, 1], [2, 0, 1, None]) == [1.5, None, None, None]


def fill(out, settings, question, frechet):
    """Results of every stage of a question, made up: `frechet` {label: a number for each seed}. The same
    weights measure differently on the held-out noise of masked training and on that of tuning."""
    for label, run, *how in evidence.rows_of(settings, question):
        for seed, value in enumerate(frechet.get(label, ())):
            for kind, M, T in evidence.stages(settings, run, *how):
                folder = evidence.folder_of(out, settings, run, seed, kind, M, T)
                folder.mkdir(parents=True, exist_ok=True)
                levels, worse = [seed + j for j in range(6)], 2 if run == 'mcdit' else 1
                curve = [{'step': step, 'held_out': [worse * (level + 7 * M / step) for level in levels],
                          'collapse_encoder': levels} for step in (M // 2, M)]
                result = {'train': {'on_clean': 0.5, 'curve': curve},
                          'tune': {'before': levels, 'after': [worse * level / 2 for level in levels]},
                          'sample': {'fidelity': 0.5 + seed / 4, 'frechet': value, 'precision': 0.1,
                                     'recall': 0.2}}
                (folder / 'result.json').write_text(json.dumps(result[kind]))


JUDGE = {'accuracy': 1.0, 'real shapes': {'fidelity': 1.0, 'frechet': 0.5, 'precision': 0.9, 'recall': 0.8}}


def test_tables_hold_the_numbers_they_were_given(tmp_path):
    fill(tmp_path, QUICK, 'targets',
         {'clean and noise': (1, 2, 3), 'only clean': (2, 3, 2.5), 'all clean': (3, 2.5)})
    evidence.judge_of(tmp_path, QUICK).mkdir()
    (evidence.judge_of(tmp_path, QUICK) / 'result.json').write_text(json.dumps(JUDGE))
    for run, seed, begun in (('main branch', 0, 'abc'), ('main branch', 1, 'abc'), ('all clean', 0, 'abc'),
                             ('main branch', 0, 'def-dirty')):                # stopped, and gone on with
        folder = evidence.folder_of(tmp_path, QUICK, run, seed, 'train', 4, 0)
        with open(folder / 'log.jsonl', 'a') as log:
            log.write(json.dumps({'commit': begun}) + '\n' + json.dumps({'step': 1, 'loss': 1.0}) + '\n')
    lines = evidence.report(tmp_path, QUICK, ['targets'], [0, 1, 2], {tmp_path / 'a' / 'b': 'no time left'})
    row = '| clean and noise | 3 | 4 + 2 | 2.000 ± 1.000 | 1.000 ± 0.500 | 3.500 ± 1.000 | 1.750 ± 0.500 | ' \
        '0.750 ± 0.250 | 2 ± 1 | 0.100 ± 0.000 | 0.200 ± 0.000 |'            # all on the noise of tuning
    assert row in lines
    assert '| real shapes, 20 more |  |  |  |  |  |  | 1.000 | 0 | 0.900 | 0.800 |' in lines
    levels = ' | '.join(f'{j / 2:.3f} ± 0.500' for j in range(1, 7))
    assert f'| main branch | 4 + 2 | {levels} |' in lines
    claim, = (line for line in lines if line.startswith('| targets: clean and noise < clean alone'))
    # the means are of the two seeds that all three have
    assert claim.endswith('(Table 6) | 22.10, 25.88, 34.53 | 2 ± 1, 2 ± 1, 3 ± 0 | 2 of 3, 1 of 2 | '
                          '0 of 3, 0 of 2 | 0 of 3, 0 of 2 |')
    assert '- a/b: no time left' in lines
    assert (tmp_path / 'evidence.md').read_text().splitlines() == lines
    written = json.loads((tmp_path / 'evidence.json').read_text())
    values = [seed['frechet'] for seed in written['questions']['targets'][2]['seeds'].values()]
    assert values == [1, 2, 3] and statistics.stdev(values) == 1
    assert written['missing'] == {'a/b': 'no time left'}
    assert written['commits of the runs'] == {'abc': 3, 'def-dirty': 1}
    assert all((tmp_path / name).stat().st_size > 1000 for name in ('curves.png', 'samples.png'))


@pytest.mark.parametrize('size', evidence.SETTINGS)
def test_every_size_can_be_reported(size, tmp_path):
    settings = evidence.SETTINGS[size]
    for question in evidence.QUESTIONS:
        if question != 'information':
            fill(tmp_path, settings, question, {row[0]: (1,) for row in evidence.rows_of(settings, question)})
    folder = evidence.judge_of(tmp_path, settings)
    folder.mkdir()
    (folder / 'result.json').write_text(json.dumps(JUDGE))
    lines = evidence.report(tmp_path, settings, list(evidence.QUESTIONS), [0], {})
    told = [any(line.startswith(f'| {claim[0]} |') for line in lines) for claim in evidence.CLAIMS]
    timed = ['equal time' not in claim[0] or settings['timing'] > 0 for claim in evidence.CLAIMS]
    assert told == timed and '| 1.00 |' in '\n'.join(evidence.gap_tables(
        evidence.collect(tmp_path, settings, ['methods', 'tuning'], [0]), settings))


def test_without_published_numbers_the_first_is_compared_with_each(tmp_path):
    fill(tmp_path, QUICK, 'ratio', {'0.25': (2, 1), '0.5': (1, 2), '0.75': (3, 1.5)})
    collected = evidence.collect(tmp_path, QUICK, ['ratio'], [0, 1])
    line, = (line for claim in evidence.CLAIMS if (line := evidence.verdict(claim, collected)))
    assert line[1:4] == ['a picture', '2 ± 1, 2 ± 1, 2 ± 1', '1 of 2, 1 of 2']
    assert line[4:] == ['0 of 2, 0 of 2', '0 of 2, 0 of 2']                   # made equal


def test_the_puzzle_is_in_quotients_of_one_seed(tmp_path):
    fill(tmp_path, QUICK, 'tuning', {label: (6, 12) if 'no tuning' in label else (4, 6)
                                     for label, *_ in evidence.QUESTIONS['tuning'][2]})
    lines = evidence.puzzle(evidence.collect(tmp_path, QUICK, ['tuning'], [0, 1]), QUICK)
    # untuned over tuned: Fréchet 6 / 4 and 12 / 6; losses, j + seed, are halved by tuning; at sigma 0.03 that
    # of seed 0 is 0, which has no quotient
    for run, quotient in (('dit', '2.00'), ('mcdit', '1.00')):
        levels = ' | '.join([quotient, *[f'{quotient} ± 0.00'] * 5])
        assert f'| {run} | 4 + 2 | 1.75 ± 0.35 | 1.00 ± 0.00 | {levels} |' in lines
    # mcdit over maskdit, by masked training's own logs and by tuning's
    for steps in ('2 + 0', '4 + 0', '8 + 0'):
        assert f'| mcdit | {steps} | ' + ' | '.join(['2.00 ± 0.00'] * 6) + ' |' in lines
    for steps in ('4 + 2', '4 + 4', '8 + 4'):
        assert f'| mcdit | {steps} | 2.00 | ' + ' | '.join(['2.00 ± 0.00'] * 5) + ' |' in lines


def test_a_gap_is_to_the_maskdit_that_it_is_like(tmp_path):
    fill(tmp_path, QUICK, 'ratio', {row[0]: (1, 2) for row in evidence.QUESTIONS['ratio'][2]})
    for seed in (0, 1):                                       # its own loss is ten times as large
        folder = evidence.folder_of(tmp_path, QUICK, 'maskdit 0.75', seed, 'train', 4, 0) / 'result.json'
        text = json.loads(folder.read_text())
        for line in text['curve']:
            line['held_out'] = [10 * loss for loss in line['held_out']]
        folder.write_text(json.dumps(text))
    lines = evidence.gap_tables(evidence.collect(tmp_path, QUICK, ['ratio'], [0, 1]), QUICK)
    twice, same, tenth = (' | '.join([f'{x} ± 0.00'] * 4) for x in ('2.00', '1.00', '0.10'))
    end = '2 ± 1 | 2 ± 1 | 1.50 ± 0.71 | 3.50 ± 0.71 | - |'
    assert f'| as here | {twice} | {end}' in lines and f'| mask ratio 0.25 | {same} | {end}' in lines
    assert f'| mask ratio 0.75 | {tenth} | {end}' in lines and f'| `maskdit` | - | - | - | - | {end}' in lines
    assert f'| 4 | {twice} | 2 ± 1 | 2 ± 1 |' in lines and '| 8 | - | - | - | - | - | - |' in lines


def test_information_is_measured_from_clean_images(tmp_path):
    folder = evidence.folder_of(tmp_path, QUICK, 'information', 0, 'information', 0, 0)
    folder.mkdir(parents=True)
    found = {row[0] + ', inference path': [2.0, 4.0] for row in evidence.QUESTIONS['information'][2]}
    found |= {'clean images': [3.0, 3.0], 'mixed, clean / noisy': [3.0, 2.0], 'noisy images': [3.0, 0.0]}
    (folder / 'result.json').write_text(json.dumps(found))
    rows = {row['label']: row['seeds'][0] for row in evidence.collect(tmp_path, QUICK, ['information'],
                                                                      [0])['information']}
    away = {label: numbers['away'] for label, numbers in rows.items()}
    assert away['mcdit'] == 1 and away['clean images'] == 0                   # more counts as less does
    assert away['mixed, clean / noisy'] == 0.5 and away['noisy images'] == 1.5


def test_the_readme_has_the_claims_of_the_committed_run():
    root = pathlib.Path(evidence.__file__).parent.parent
    committed = json.loads((root / 'assets' / 'evidence.json').read_text())
    readme = (root / 'README.md').read_text()
    for claim in evidence.CLAIMS:
        line = '| ' + ' | '.join(evidence.verdict(claim, committed['questions'])) + ' |'
        assert line in readme, line
    for line in evidence.gap_tables(committed['questions'], evidence.SETTINGS['laptop']):
        assert line in readme, line


def test_judge_features_decide():
    torch.manual_seed(0)
    some = judge.network().eval()
    x = torch.randn(7, 3, 16, 16)
    features = judge.features(some, x)
    assert features.shape == (7, 512) and torch.equal(some[-1](features), some(x))


def test_real_shapes_are_near_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, 'TRAIN', 300)
    monkeypatch.setattr(judge, 'TEST', 100)
    result = evidence.run_judge(tmp_path, QUICK, 'judge', None, 0, 0, tmp_path)
    x, y = judge.real(8, QUICK['real'], 1003)                                 # the reference itself
    same = evidence.judged(tmp_path, evidence.data.to_uint8(x), y)
    assert same['frechet'] < 1e-6 * result['real shapes']['frechet']
    assert same['precision'] == same['recall'] == 1


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(model.BadInput, match='--jobs must be at least 1'):
        evidence.main(['--quick', '--out', str(tmp_path), '--jobs', '0'])
    if not torch.cuda.is_available():
        with pytest.raises(model.BadInput, match='torch sees no GPU'):
            evidence.main(['--gpu', '--out', str(tmp_path)])


# ------------------------------------------------------------------------------------------------ the whole

@pytest.mark.slow
def test_from_nothing_to_tables(tmp_path, capsys):
    command = ['--quick', '--out', str(tmp_path), '--only', 'targets', 'readings', '--seeds', '0']
    spoilt = evidence.folder_of(tmp_path, QUICK, 'scale', 0, 'train', 4, 0)
    spoilt.mkdir(parents=True)
    (spoilt / '0000002.pt').write_bytes(b'no checkpoint')
    assert evidence.main(command) == 1
    told = capsys.readouterr().out
    assert 'scale, seed 0 failed: train-4: none of the 1 checkpoints' in told
    assert '## Not run: 4 stages' in told
    (spoilt / '0000002.pt').unlink()

    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('result.json')}
    assert evidence.main(command) == 0
    told = capsys.readouterr().out
    assert 'Not run' not in told and told.count('seed 0: ') == 1              # `scale` alone ran
    assert all(path.stat().st_mtime_ns == when for path, when in results.items())

    written = json.loads((tmp_path / 'evidence.json').read_text())
    rows = {row['label']: row['seeds']['0'] for row in written['questions']['readings']}
    assert set(rows) == {label for label, *_ in evidence.QUESTIONS['readings'][2]}
    for label, run, *how in evidence.QUESTIONS['readings'][2]:
        folder = evidence.folder_of(tmp_path, QUICK, run, 0, *evidence.stages(QUICK, run, *how)[-1])
        with np.load(folder / 'samples.npz') as file:
            pictures, labels = torch.from_numpy(file['arr_0']), torch.from_numpy(file['arr_1'])
        again = evidence.judged(evidence.judge_of(tmp_path, QUICK), pictures.permute(0, 3, 1, 2), labels)
        assert all(math.isclose(rows[label][k], again[k], rel_tol=1e-4) for k in evidence.SCORE)
    after = [tuple(numbers['after']) for numbers in rows.values() if 'after' in numbers]
    assert len(set(after)) == len(after) == len(rows) / 2                     # readings are other networks
