"""What makes it fast, in numbers that no machine changes: FLOPs, bytes, calls. Nothing is asserted of time."""

import copy

import pytest
import torch
from conftest import build, config, draws, images, randomise

import model
from model import METHODS

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
