"""Two thousand steps through everything at once: killed, asked to stop, without room on the disk, and fed
from pictures of which some are broken. It takes minutes:

    python -m pytest -s -m soak tests/test_soak.py
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

import numpy as np
import pytest
from PIL import Image
from test_survive import same_runs
from test_train import lines, run

import data
import model
import train

STEPS, LONG = 2000, 1000                      # all; of one stretch, at the end, in which nobody disturbs
FLAGS = ['--steps', str(STEPS), '--save-every', '50', '--eval-every', '250']
PAGE = os.sysconf('SC_PAGE_SIZE')


def pictures(folder, rng, count=150):
    """Three classes of pictures, of which one in ten is cut short, empty, or a page of text. Returns how many
    are whole."""
    whole = 0
    for i in range(count):
        place = folder / f'class {i % 3}'
        place.mkdir(parents=True, exist_ok=True)
        side = rng.randint(12, 40)
        pixels = np.random.default_rng(i).integers(256, size=(side, side, 3)).astype(np.uint8)
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, 'PNG')
        content = held.getvalue()
        broken = rng.random() < 0.1
        whole += not broken
        if broken:
            content = rng.choice([content[:rng.randrange(len(content) // 2)], b'', b'<html>'])
        (place / f'{i}.png').write_bytes(content)
    return whole


def watch(seen):
    """Remember (step, resident bytes, open files) of this process at every step."""
    draw = model.draw

    def remembered(cfg, step, *rest):
        with open('/proc/self/statm') as file:
            resident = int(file.read().split()[1]) * PAGE
        seen.append((step, resident, len(os.listdir('/proc/self/fd'))))
        return draw(cfg, step, *rest)
    model.draw = remembered


def work(folder, out, report, no_room_at):
    """A try of the run in a process of its own. At the steps `no_room_at` the disk is full for a second."""
    os.setsid()
    sys.stdout = open(os.devnull, 'w')
    model.SIZES['T'], model.TINY_DECODER = (2, 64, 2), (2, 64, 2)             # 64 wide and 2 blocks deep
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    seen = []
    watch(seen)
    remembered = model.draw

    def starved(cfg, step, *rest):
        if step in no_room_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))         # of any file
            threading.Timer(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))).start()
        return remembered(cfg, step, *rest)
    model.draw = starved
    try:
        run(folder, out, *FLAGS)
    except train.BadInput as mistake:                                         # no room for a checkpoint
        print(mistake, file=sys.stderr)
        os._exit(2)
    if report:
        report.write_text(json.dumps(seen))


def reached(out):
    return max([line['step'] for line in lines(out)], default=0)


@pytest.mark.soak
def test_two_thousand_steps_under_fire(tmp_path):
    rng, began = random.Random(0), time.monotonic()
    whole = pictures(tmp_path / 'source', rng)
    folder = tmp_path / 'data'
    data.make_folder(str(tmp_path / 'source'), str(folder), 8, 1)
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
        target = min(first + rng.randint(5, 120), LONG)
        child.start()
        while child.is_alive() and reached(out) < target:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.3)
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
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

    assert same_runs(tmp_path / 'calm', out, STEPS)
    assert sorted(path.name for path in out.iterdir()) == ['0001950.pt', '0002000.pt', 'log.jsonl']
    seen = [tuple(at) for at in json.loads((tmp_path / 'seen.json').read_text())]
    seen = [at for at in seen if at[0] >= STEPS - LONG + 200]                 # warm
    early, late = (np.median([resident for _, resident, _ in some]) for some in (seen[:100], seen[-100:]))
    files = {files for *_, files in seen[:100]}, {files for *_, files in seen[-100:]}
    print(f'\n{len(ends)} starts, ended by {sorted(ends)}; no room {starved} times; {150 - whole} broken '
          f'pictures; resident {early / 1e6:.1f} MB at step {seen[0][0]}, {late / 1e6:.1f} MB at the end; '
          f'open files {files[0]}, {files[1]}; {time.monotonic() - began:.0f} s')
    assert abs(late / early - 1) < 0.02
    assert max(files[1]) <= max(files[0])
    assert len(ends) >= 8 and starved >= 5 and {-9, 128 + 15, 128 + 2} <= {*ends}
