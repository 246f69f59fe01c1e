"""torch.compile gives the gradients of the eager network, with one graph for all blocks of one shape."""

import copy

import pytest
import torch
from conftest import batch, build, config, numbers
from test_ways import METHODS, agree

import model

pytestmark = pytest.mark.slow                 # the compiler takes half a minute per method

# encoder, decoder, EMA network without gradient; MDT: blocks without a mask, blocks under one
GRAPHS = {'dit': 1, 'maskdit': 2, 'mdt': 2, 'sddit': 3, 'mcdit': 3}


@pytest.mark.parametrize('method', METHODS)
def test_compiled_agrees_with_eager_float32(method):
    """No new graph for the next network, nor for its blocks with activation checkpointing."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    agree(method, 'compiled')
    agree(method, 'compiled, checkpointed')
    assert counters['stats']['unique_graphs'] == GRAPHS[method]


def test_a_compiled_network_keeps_its_names_and_its_copy_is_not_compiled():
    net = model.Net(config())
    names = list(net.state_dict())
    model.compile_blocks(net)
    assert list(net.state_dict()) == names
    compiled = lambda module: [part for part in module.modules() if part._compiled_call_impl is not None]
    assert len(compiled(net)) == len(net.encoder.blocks) + len(net.decoder.blocks)
    assert not compiled(copy.deepcopy(net)) and not compiled(model.make_teacher(net, config()))


def test_several_ranks_compile_each_block_whole(monkeypatch):
    """DistributedDataParallel would cut a block where its parameters fill a bucket of the gradients' sum."""
    graphs, compile_ = [], torch.nn.Module.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(model.Block, 'compile', lambda block, **how: compile_(block, backend=backend, **how))
    torch._dynamo.reset()
    cfg = config('maskdit')
    net, _ = build(cfg, torch.float32)
    model.compile_blocks(net)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.1)
        model.maskdit_loss(wrapped, None, *batch(cfg, torch.float32), numbers(cfg, dtype=torch.float32), cfg)
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == GRAPHS['maskdit']
