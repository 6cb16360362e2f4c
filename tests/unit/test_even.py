"""Ranks with unequal pieces take equal room."""

import pytest
import torch
from test_memory_pool import shard

from sgl_bdlora.adapters import AdapterError
from sgl_bdlora.sharding import even_out, layer_sizes, layer_views


def test_equal_shards_stay_as_they_are():
    mine = shard("one", 8)
    assert even_out(mine, [layer_sizes(mine)] * 3) is mine


def test_smaller_blocks_grow_and_keep_their_weights():
    small, large = shard("one", 4), shard("one", 8)
    grown = even_out(small, [layer_sizes(small), layer_sizes(large)])
    assert layer_sizes(grown) == layer_sizes(large)
    assert grown.nbytes == large.nbytes
    for path, layer in grown.layers.items():
        block = grown.weights[grown.offsets[path] : grown.offsets[path] + layer.numel]
        before = small.weights[small.offsets[path] : small.offsets[path] + small.layers[path].numel]
        a, (b,) = layer_views(block, layer)
        assert torch.equal(torch.cat([a.flatten(), b.flatten()]), before)


def test_different_layers_are_refused():
    mine = shard("one", 8)
    theirs = dict(list(layer_sizes(mine).items())[1:])
    with pytest.raises(AdapterError, match="different layers"):
        even_out(mine, [layer_sizes(mine), theirs])
