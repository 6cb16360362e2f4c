"""Which rank of a block-diagonal adapter costs as much as a plain one of another rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sgl_bdlora.adapters.hosts import BaseLayer

# Within this of the goal, a rank that divides by a higher power of two is taken instead of the closest: it suits kernels, and
# every size of server.
_SLACK = 0.015


def factor_parameters(layer: BaseLayer, rank: int, nblocks: int = 1) -> int:
    """Parameters of one layer's two factors; the one that the layer's parallelism makes block-diagonal stores only its blocks."""
    a, b = rank * layer.inputs, rank * layer.outputs
    return a // nblocks + b if layer.parallelism == "row" else a + b // nblocks


def total_parameters(layers: Iterable[BaseLayer], rank: int, nblocks: int = 1) -> int:
    return sum(factor_parameters(layer, rank, nblocks) for layer in layers)


def closest_rank(count: Callable[[int], int], goal: float, nblocks: int) -> int:
    """The multiple R of nblocks whose `count(R)`, which grows with R, comes closest to `goal`; rounder ones first within 1.5 %."""
    ranks = [nblocks]
    while count(ranks[-1]) < goal * (1 + _SLACK):
        ranks.append(ranks[-1] + nblocks)
    near = [rank for rank in ranks if abs(count(rank) - goal) <= _SLACK * goal]
    if near:
        return max(near, key=lambda rank: (rank & -rank, -abs(count(rank) - goal)))
    return min(ranks, key=lambda rank: abs(count(rank) - goal))
