"""Policies by name."""

from __future__ import annotations

from sgl_bdlora.cluster.base import Policy
from sgl_bdlora.cluster.baselines import Affinity, Contiguous, HighestRandomWeight, Random, Toppings
from sgl_bdlora.cluster.costs import Costs
from sgl_bdlora.cluster.placement import Balanced, RankPacking, RankSpill

NAMES = tuple(
    kind.name
    for kind in (RankPacking, RankSpill, Balanced, Random, Contiguous, Affinity, HighestRandomWeight, Toppings)
)


def make_policy(name: str, costs: Costs, tpot_ms: float, output_tokens: float, max_running: int) -> Policy:
    """ValueError for an unknown name."""
    if name == Toppings.name:
        return Toppings(costs, tpot_ms, output_tokens)
    if name == Affinity.name:
        return Affinity(2 * max_running)
    for kind in (RankSpill, Balanced):
        if name == kind.name:
            return kind(max_running // 4)
    for kind in (RankPacking, Random, Contiguous, HighestRandomWeight):
        if kind.name == name:
            return kind()
    raise ValueError(f"policy.name = {name!r} is not one of {', '.join(NAMES)}")
