"""The evidence harness and the benchmark: arithmetic on numbers that were made up, then the commands."""

import json
import math
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests/bench')]

import bench
import data
import evidence
import measures
import model

pytestmark = pytest.mark.slow
RATES = dict.fromkeys(evidence.ALL, 1e-3)


@pytest.fixture(autouse=True, scope='module')
def registered():
    """evidence.py's row `half`, head and decoder, for this file only."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((model, 'PROTOTYPES'), (model, 'DECODER'), (model.Head, '__init__')):
            patch.setattr(owner, name, getattr(owner, name))
        patch.setitem(model.METHODS, 'half', None)
        evidence.register()
        yield


def test_paired_interval():
    a, b = {0: 2.0, 1: 4.0, 2: 6.0, 3: 8.0, 4: 10.0, 5: 99.0}, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0}
    mean, width = evidence.paired(a, b)                                       # differences 1 to 5
    assert mean == 3 and width == pytest.approx(2.7764451052 * math.sqrt(2.5 / 5))
    assert math.isnan(evidence.paired({0: 1.0}, {0: 3.0})[1]) and evidence.paired({0: 1.0}, {0: 3.0})[0] == -2


def test_table():
    one = {'masked_steps': 30, 'tuning_steps': 10, 'petaflops': 0.5}
    found = {name: {seed: one | {'frechet': value} for seed, value in enumerate(values)}
             for name, values in (('mcdit', (10.0, 12.0)), ('dit', (11.0, 15.0)))}
    text = evidence.table(found, 'equal images', evidence.against('mcdit', 'dit', 'mdt'), ('frechet', 'eyes'))
    assert text.startswith('*equal images; seeds: 2; differences from mcdit*')
    assert '| mcdit | 30 + 10 | 11 ± 1.4 |  |' in text
    assert '| dit | 30 + 10 | 13 ± 2.8 | +2 [-11, +15] |' in text             # t = 12.706
    assert 'mdt' not in text and 'eyes' not in text


def test_settings_that_are_ahead():
    """Of settings of mcdit: those whose interval is below 0 against both rivals."""
    found = {name: {seed: {'frechet': value + 0.1 * seed * slope} for seed in range(3)}
             for name, value, slope in (('maskdit, equal compute', 10, 0), ('dit, equal compute', 9, 0),
                                        ('mcdit, equal compute', 9.5, 0), ('mcdit ratio 0.25', 8, 1),
                                        ('no branch', 8, 9))}
    text = evidence.settings_table(found)
    assert '3 tried, ahead of maskdit and dit beyond the interval: mcdit ratio 0.25*' in text
    assert '| mcdit ratio 0.25 | --mask-ratio 0.25 | 8.1 ± 0.1 | -1.9 [-2.1, -1.7] | -0.9 [-1.1, -0.65] |' in text


@pytest.mark.parametrize('key', evidence.QUESTIONS)
def test_questions_ask_for_runs_that_exist(key):
    question = evidence.QUESTIONS[key]
    assert all(name in evidence.ROWS for name in evidence.rows_of(question))
    assert all(len(rows) <= 6 for _, rows, _ in question['tables'])


def forward(n, width, depth, c_width):
    """FLOPs of DiT's blocks over n tokens."""
    return depth * (2 * n * 12 * width ** 2 + 4 * n ** 2 * width + 2 * 6 * c_width * width)


def test_equal_compute():
    N, K, P, d, e = 16, 8, 4, 160, 64                                         # digits, T/2
    c = 2 * (256 * d + d * d)
    encoder = lambda n: 2 * n * P * d + forward(n, d, 6, d) + c
    decoder = lambda n: (2 * n * d * e + 4 * d * d) + forward(N, e, 2, d) + (2 * N * e * P + 4 * d * e)
    final = 2 * N * d * P + 4 * d * d
    blind = 2 * P * d                                                         # inputs need no gradient
    want = {'dit': 3 * (encoder(N) + final) - N * blind - 2 * 256 * d,
            'half': 3 * (encoder(N) + final) - N * blind - 2 * 256 * d,
            'maskdit': 3 * (encoder(K) + decoder(K)) - K * blind - 2 * 256 * d,
            'mcdit': 3 * (encoder(K) + 2 * N * P * d + decoder(N)) - (K + N) * blind - 2 * 256 * d
            + 2 * (2 * N * P * d + decoder(N))}
    for method, flops in want.items():
        assert evidence.flops('T/2', method, '', 8, 1) == flops
    tuning = 3 * (encoder(N) + decoder(N)) - N * blind - 2 * 256 * d
    assert evidence.flops('T/2', 'mcdit', '', 8, 1, 'tune') == tuning
    assert evidence.flops('T/2', 'mcdit', '--unmasked 0.25', 8, 1) == 0.75 * want['mcdit'] + 0.25 * tuning

    s = evidence.SETS['digits']
    budget = evidence.steps_of('mcdit', s)[2]
    assert budget == s['batch'] * (3000 * want['mcdit'] + 1000 * tuning)
    for method in ('dit', 'maskdit'):
        M, T, total = evidence.steps_of(f'{method}, equal compute', s)
        assert T == 1000 and abs(total - budget) <= s['batch'] * want[method] / 2


def test_half_loss_with_all_tokens_is_dits():
    cfg = model.Config(method='half', model='T/2', resolution=8, channels=1, classes=10, batch=4,
                       mask_ratio=0.0)
    torch.manual_seed(0)
    net, r = model.Net(cfg), model.random_numbers(cfg, 0)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x0, y = torch.randn_like(r['noise']), torch.arange(4)
    whole = model.dit_loss(net, None, x0, y, r, cfg)['denoise'][1]
    assert torch.allclose(evidence.half_loss(net, None, x0, y, r, cfg)['denoise'][1], whole)
    few = r | {'visible': r['visible'][:, :8]}
    assert not torch.allclose(evidence.half_loss(net, None, x0, y, few, cfg)['denoise'][1], whole)


@pytest.mark.parametrize('size', evidence.SIZES)
@pytest.mark.parametrize('part', measures.PARTS)
def test_context_scores(part, size):
    """Nearly all real shapes pass, with noise on their pixels too; with one part exchanged none does."""
    label, score = measures.PARTS[part]
    noise = np.random.default_rng(1).normal(0, 4, (100, 3, size, size))
    for broken, low, high in ((False, 0.97, 1.0), (True, 0.0, 0.03)):
        images = (measures.draw_class(label, size, 100, 7, broken) + noise).round().clip(0, 255)
        passed = np.mean([score(measures.coverage(x)) > measures.threshold(part, size) for x in images])
        assert low <= passed <= high


def test_probe_is_the_denoiser(tmp_path):
    """Its first and last way are training's and inference's, as model.denoise has them."""
    cfg = model.Config(model='T/2', resolution=8, channels=3, classes=10)
    torch.manual_seed(0)
    net = model.Net(cfg)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    data.make_shapes(tmp_path / 'shapes', size=8, count=20)
    dataset = data.Data(tmp_path / 'shapes')
    dataset.trained, dataset.held_out = 0, 20
    found = measures.probe(net, cfg, dataset, cfg.K)
    x0, y = dataset.rows(np.arange(20))
    x0 = model.patchify(dataset.to_input(x0, None), 2)
    rng = model.generator('cpu', 'probe')
    visible, noise = torch.rand(20, 16, generator=rng).argsort(1)[:, :8], torch.randn(x0.shape, generator=rng)
    sigma = torch.full((20,), evidence.train.EVAL_SIGMAS[3])
    for way, given in ((measures.WAYS[0], (visible, x0)), (measures.WAYS[-1], ())):
        D = model.denoise(net, x0 + sigma[0] * noise, sigma, y, cfg, *given)[0]
        loss = model.take(model.loss_weight(sigma, 0.5) * (D - x0) ** 2, visible).mean()
        assert found[way][3] == pytest.approx(loss.item(), rel=1e-5)


def test_runner_resumes(tmp_path, monkeypatch):
    """Finished stages stay; what needs a failed one is not begun; the report is made of what there is."""
    monkeypatch.chdir(tmp_path)
    for name, value in (('masked', 3), ('tuned', 2), ('samples', 20)):
        monkeypatch.setitem(evidence.SETS['digits'], name, value)
    evidence.prepare('digits', 8, evidence.code('measure'))
    chain = evidence.stages('digits', 'mcdit', 0, RATES)
    assert evidence.carry_out(chain, jobs=1) == []
    before = {stage.kind: stage.result.stat().st_mtime_ns for stage in chain}
    chain[-1].result.unlink()
    assert evidence.carry_out(chain + chain, jobs=2) == []
    after = {stage.kind: stage.result.stat().st_mtime_ns for stage in chain}
    assert [kind for kind in before if before[kind] != after[kind]] == ['measure']

    bad = evidence.stages('digits', 'mcdit', 1, RATES | {'mcdit': -1.0})
    assert evidence.carry_out(bad, jobs=2) == bad[:1] and not pathlib.Path(bad[1].folder).exists()
    evidence.write_csv('results.csv', evidence.collect('digits', ['mcdit', 'dit'], 2, RATES))
    found = evidence.read_csv('results.csv')
    result = json.loads(chain[-1].result.read_text())
    assert list(found) == ['mcdit'] and found['mcdit'][0]['lr'] == 1e-3
    assert found['mcdit'][0]['frechet'] == pytest.approx(result['frechet'], rel=1e-5)
    evidence.write_report('digits', ['Q1', 'Q2'], found)
    assert 'run in six ways: mcdit*' in (tmp_path / 'report.md').read_text()
    assert (tmp_path / 'Q2.png').exists()

    monkeypatch.setattr(evidence, 'KEPT', {found['mcdit'][0]['measured']: found['mcdit'][0]})
    shutil.rmtree('runs')                                                     # as on another machine
    assert evidence.result(chain) == found['mcdit'][0]


def test_the_best_rates_of_question_7_are_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in evidence.FIVE:
        for k, values in enumerate(((9.0, 9.0), (3.0, 8.0), (5.0, 5.0))):     # means 9, 5.5, 5
            for seed, value in enumerate(values[:1 if method == 'mdt' else 2]):
                chain = evidence.stages('digits', f'{method} rate {k}', seed, {})
                for stage in chain:
                    pathlib.Path(stage.folder).mkdir(parents=True)
                    (pathlib.Path(stage.folder) / 'core-seconds').write_text('1.0\n2.0\n')
                chain[-1].result.write_text(json.dumps({'frechet': value}))
    rates = evidence.best_rates('digits', 2)
    assert rates == {m: None if m == 'mdt' else 4e-3 for m in evidence.ALL}   # mdt's are not all finished
    found = evidence.collect('digits', ['mcdit', 'mcdit rate 0'], 2, rates)
    assert found['mcdit rate 0'][1]['training_hours'] == 3 / 3600 and 'mcdit' not in found
    assert found['mcdit rate 0'][1]['other_hours'] == 9 / 3600
    assert '0.004' in evidence.stages('digits', 'half', 0, rates)[0].argv


def test_tables_of_results_are_those_of_the_csv():
    """RESULTS.md has every table whose runs are kept, to the digit."""
    found, text = evidence.read_csv(ROOT / 'assets/digits.csv'), (ROOT / 'assets/RESULTS.md').read_text()
    written = 0
    for question in (one for one in evidence.QUESTIONS.values() if 'digits' in one['sets']):
        for one in question['tables']:
            if all(found.get(name) for name, _ in one[1]):
                assert evidence.table(found, *one) in text, one[0]
                written += 1
        if not question['tables'] and all(found.get(name) for name in evidence.rows_of(question)):
            assert evidence.figure_table(found, question, evidence.SETS['digits']['rates']) in text
            written += 1
    assert written >= 2


def test_code_without_comments():
    text = 'def f(x):\n    """Doc."""\n    return x + 1  # why\n'
    assert evidence.without_docs(text) == evidence.without_docs('def f(x):\n    return (x + 1)\n')
    assert evidence.without_docs(text) != evidence.without_docs('def f(x):\n    return x + 2\n')


def test_bench_runs_its_whole_plan(tmp_path):
    path = tmp_path / 'tiny.json'
    command = [sys.executable, str(ROOT / 'tests/bench/bench.py'), '--tiny', '--json', str(path)]
    subprocess.run(command, check=True, timeout=1200)
    found = json.loads(path.read_text())
    assert found.keys() == {'about', *bench.PLAN} and not [item for item in found if 'failed' in found[item]]
    assert set(found['train mcdit']) == {'compiled', 'eager'} and found['profile']['steps']['kernels'] >= 0
    assert all(found['resume'][how]['largest_difference'] == 0 for how in ('SIGKILL', 'SIGTERM'))
