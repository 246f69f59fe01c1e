"""Two thousand steps through everything at once: killed, signalled, without room on the disk, on a tree of
images of which some are broken. The numbers are those of a calm run to the bit. It takes minutes.

    python -m pytest -s -m slow tests/slow/test_soak.py
"""

import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time

import conftest
import numpy as np
import pytest
import torch
from conftest import at_steps, lines, run, same
from PIL import Image

import data
import model

pytestmark = pytest.mark.slow

STEPS, LONG = 2000, 1000                      # in all; of the last stretch, which nobody disturbs
FLAGS = f'--steps {STEPS} --save-every 50 --eval-every 250'
PAGE = os.sysconf('SC_PAGE_SIZE')


def broken_and_whole(folder, rng, count=150):
    """Three classes of images, one in ten cut short, empty, or a web page. Returns how many are whole."""
    whole = 0
    for i in range(count):
        place = folder / f'class {i % 3}'
        place.mkdir(parents=True, exist_ok=True)
        side, file = rng.randint(12, 40), io.BytesIO()
        pixels = np.random.default_rng(i).integers(256, size=(side, side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(file, 'PNG')
        content = file.getvalue()
        if rng.random() < 0.1:
            content = rng.choice([content[:rng.randrange(len(content) // 2)], b'', b'<html>'])
        else:
            whole += 1
        (place / f'{i}.png').write_bytes(content)
    return whole


def work(folder, out, report, no_room_at):
    """One start of the run, in a process of its own. At the steps `no_room_at` the disk is full for a second.
    `report` gets (step, resident bytes, open files) of every step."""
    sys.stdout = sys.stderr = open(os.devnull, 'w')                      # pytest's is a file: it fills up too
    hard, seen, patch = resource.getrlimit(resource.RLIMIT_FSIZE)[1], [], pytest.MonkeyPatch()
    conftest.shrink(patch)

    def each(step):
        with open('/proc/self/statm') as file:
            seen.append((step, int(file.read().split()[1]) * PAGE, len(os.listdir('/proc/self/fd'))))
        if step in no_room_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            threading.Timer(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))).start()
    at_steps(patch, {step: lambda step=step: each(step) for step in range(STEPS)})
    try:
        run(folder, out, FLAGS)
    except (model.BadInput, OSError) as error:                            # no room for the last checkpoint
        print(error)
        os._exit(2)
    if report:
        report.write_text(json.dumps(seen))


def reached(out):
    return max([line['step'] for line in lines(out)], default=0)


def test_two_thousand_steps_under_fire(tmp_path):
    rng, began = random.Random(0), time.monotonic()
    whole = broken_and_whole(tmp_path / 'source', rng)
    folder = tmp_path / 'data'
    data.main(['folder', str(tmp_path / 'source'), '--out', str(folder), '--size', '8', '--workers', '1'])
    assert data.Data(folder).count == whole < 150
    fork = multiprocessing.get_context('fork').Process
    calm = fork(target=work, args=(folder, tmp_path / 'calm', None, ()))
    calm.start()
    calm.join()
    assert calm.exitcode == 0

    out, ends, starved = tmp_path / 'out', [], 0
    while reached(out) < LONG:
        no_room_at = rng.sample(range(LONG), 20)
        child = fork(target=work, args=(folder, out, None, no_room_at))
        first = reached(out)
        target = min(first + rng.randint(5, 60), LONG)
        child.start()
        while child.is_alive() and reached(out) < target:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.3)
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        if child.is_alive():                                                  # not ended by a full disk
            os.kill(child.pid, number)
        child.join()
        assert child.exitcode in (-signal.SIGKILL if number == signal.SIGKILL else 128 + number, 2)
        ends.append(child.exitcode)
        starved += sum(first <= step < reached(out) for step in no_room_at)
        assert len(ends) < 200
    last = fork(target=work, args=(folder, out, tmp_path / 'seen.json', ()))
    last.start()
    last.join()
    assert last.exitcode == 0

    runs = out, tmp_path / 'calm'
    assert same(*(torch.load(one / f'{STEPS:07d}.pt', weights_only=True) for one in runs))
    logged = [{line['step']: line['loss'] for line in lines(one)} for one in runs]
    assert logged[0].items() <= logged[1].items()                         # a full disk loses lines of the log
    assert [path.name for path in sorted(out.glob('*.pt*'))] == ['0001950.pt', '0002000.pt']
    seen = [tuple(at) for at in json.loads((tmp_path / 'seen.json').read_text())]
    seen = [at for at in seen if at[0] >= STEPS - LONG + 550]                 # the first charts are drawn
    early, late = (np.median([resident for _, resident, _ in some]) for some in (seen[:100], seen[-100:]))
    files = [max(files for *_, files in some) for some in (seen[:100], seen[-100:])]
    print(f'\n{len(ends)} starts, ended by {sorted(ends)}; no room {starved} times; {150 - whole} broken; '
          f'resident {early / 1e6:.1f} MB, at the end {late / 1e6:.1f} MB; open files {files}; '
          f'{time.monotonic() - began:.0f} s')
    assert abs(late / early - 1) < 0.02 and files[1] <= files[0]
    assert len(ends) >= 8 and starved >= 5 and {-9, 128 + 15, 128 + 2} <= {*ends}
