"""Rank-ordered fractional packing with bounded moves, after what LoRAServe's abstract describes (arXiv 2511.22880)."""

from __future__ import annotations

import numpy as np

from sgl_bdlora.cluster.base import Adapter, Policy, Problem, View
from sgl_bdlora.cluster.moves import gather, healed, keep, relieve
from sgl_bdlora.cluster.packing import pack, pack_by_rank, pack_evenly
from sgl_bdlora.cluster.routing import RoutingTable
from sgl_bdlora.cluster.state import State


class RankPacking(Policy):
    """Adapters in order of rank fill one replica after another to the mean load, so that few replicas mix ranks.

    Later plans keep the current table: they shift parts between an adapter's holders for nothing, and spend at most max_moves new
    (adapter, replica) pairs, first to take load from the replicas above the mean, then to bring adapters back among their rank.
    """

    name = "rank-packing"
    by_rank = True

    def pack(self, problem: Problem) -> list[list[tuple[int, float]]]:
        """A placement from nothing: for each adapter [(replica, part), ...]."""
        return pack(problem, pack_by_rank)

    def plan(self, problem: Problem, current: RoutingTable | None) -> RoutingTable:
        problem.check_adapters()
        state = State(problem)
        version = 1 if current is None else current.version + 1
        if current is not None:
            current = healed(current, problem)
        if current is None:
            target = self.pack(problem)
            for a, parts in enumerate(target):
                for s, part in parts:
                    state.put(a, s, part)
        else:
            target = keep(state, current, self.pack)
            state.level()
            budget = relieve(state, problem.max_moves, target)
            if self.by_rank:
                gather(state, budget, target)
            state.level()
        return state.table(version)


class RankSpill(RankPacking):
    """Rank packing whose router looks at queues: a request whose sampled replica has `most` requests or more goes to the
    living replica with the fewest, first among those that have the adapter on their GPUs, if that has less than half as many."""

    name = "rank-spill"

    def __init__(self, most: int = 16):
        self._most = most

    def pick(self, adapter: Adapter, prompt_tokens: int, table: RoutingTable, view: View, draw: float) -> str:
        name = table.sample(adapter.name, draw)
        s = view.names.index(name)
        waiting = view.requests[s]
        if waiting < self._most and view.alive[s]:
            return name
        requests = np.where(view.alive, view.requests, np.iinfo(np.int64).max)
        having = sorted(view.holders.get(adapter.name, ()))
        for group in (having, range(len(view.names))):
            best = min(group, key=lambda t: (requests[t], t), default=s)
            if view.alive[best] and (not view.alive[s] or 2 * requests[best] <= waiting):
                return view.names[best]
        return name


class Balanced(RankSpill):
    """Spills likewise, but spreads both load and bytes of adapters evenly, whatever their ranks: for kernels in which ranks do not
    disturb each other, where what counts is that the adapters asked for fit the pools."""

    name = "balanced"
    by_rank = False

    def pack(self, problem: Problem) -> list[list[tuple[int, float]]]:
        return pack(problem, pack_evenly)


def required_replicas(problem: Problem, headroom: float = 0.0) -> int:
    """Replicas like the first that this demand needs, for its load and for the memory that its adapters take; at least 1.

    headroom: the part of a replica's operating point to keep free. PlacementError when an adapter fits none.
    """
    problem.check_adapters()
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom has to be at least 0 and below 1, got {headroom}")
    load = float(problem.utilisation().sum()) / (1 - headroom)
    memory = sum(a.size for a in problem.adapters) / problem.replicas[0].host_bytes
    return max(1, int(np.ceil(load - 1e-9)), int(np.ceil(memory - 1e-9)))
