"""Equal sizes on every rank.

Ranks hold different amounts where blocks and ranks have no common grid (3 blocks on 4 ranks) or a dimension does not divide. Pools
that take the same sizes in the same order stay alike, so every rank schedules and evicts alike without asking the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from sgl_bdlora.adapters.errors import AdapterError
from sgl_bdlora.sharding.shard import AdapterShard


def layer_sizes(shard: AdapterShard) -> dict[str, int]:
    """Host layer path -> elements of this rank's block."""
    return {path: layer.numel for path, layer in shard.layers.items()}


def even_out(
    shard: AdapterShard, everyone: Sequence[Mapping[str, int]], zeros: Callable[..., torch.Tensor] = torch.zeros
) -> AdapterShard:
    """`shard` with each layer's block as large as the largest of any rank's.

    everyone: every rank's layer_sizes. zeros: as in shard_adapter.

    Raises AdapterError if the ranks do not hold the same layers.
    """
    mine = layer_sizes(shard)
    if all(sizes == mine for sizes in everyone):
        return shard
    if any(sizes.keys() != mine.keys() for sizes in everyone):
        raise AdapterError(
            shard.name, "the ranks found different layers in it", "give every rank the same adapter directory"
        )
    layers = {
        path: replace(layer, numel=max(sizes[path] for sizes in everyone)) for path, layer in shard.layers.items()
    }
    offsets, total = {}, 0
    for path, layer in layers.items():
        offsets[path] = total
        total += layer.numel
    weights = zeros(total, dtype=shard.weights.dtype)
    for path, numel in mine.items():
        source = shard.weights[shard.offsets[path] : shard.offsets[path] + numel]
        weights[offsets[path] : offsets[path] + numel].copy_(source)
    return replace(shard, layers=layers, offsets=offsets, weights=weights)
