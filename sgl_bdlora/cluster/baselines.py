"""What rank packing is compared with."""

from __future__ import annotations

import math
import zlib
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from sgl_bdlora.cluster.base import Adapter, PlacementError, Policy, Problem, View
from sgl_bdlora.cluster.costs import Costs
from sgl_bdlora.cluster.moves import healed
from sgl_bdlora.cluster.routing import RoutingTable, moves


class _Whole(Policy):
    """Each adapter whole on the first of its preferred replicas that has room; an adapter that has a place keeps it."""

    def plan(self, problem: Problem, current: RoutingTable | None) -> RoutingTable:
        problem.check_adapters()
        version = 1 if current is None else current.version + 1
        current = healed(current, problem) if current is not None else None
        room = {r.name: r.host_bytes for r in problem.replicas}
        by_name = {r.name: r for r in problem.replicas}
        shares = {}
        for i, adapter in enumerate(problem.adapters):
            if current is not None and adapter.name in current.shares:
                wanted = [r for r in current.holders(adapter.name) if r in by_name]
            else:
                wanted = []
            for name in [*wanted, *self.preferred(problem, i)]:
                if by_name[name].can_hold(adapter) and adapter.size <= room[name]:
                    room[name] -= adapter.size
                    shares[adapter.name] = ((name, 1.0),)
                    break
            else:
                raise no_room(adapter, len(problem.replicas))
        return RoutingTable(version, tuple(by_name), shares, problem.admitted(problem.utilisation()))

    def preferred(self, problem: Problem, i: int) -> list[str]:
        raise NotImplementedError


class Random(_Whole):
    """A random replica for each adapter, whatever is asked for."""

    name = "random"

    def preferred(self, problem: Problem, i: int) -> list[str]:
        names = [r.name for r in problem.replicas]
        order = np.random.default_rng((problem.seed, zlib.crc32(problem.adapters[i].name.encode()))).permutation(
            len(names)
        )
        return [names[j] for j in order]


class Contiguous(_Whole):
    """Blocks of adapters in the order in which they were listed, as many on each replica."""

    name = "contiguous"

    def preferred(self, problem: Problem, i: int) -> list[str]:
        names = [r.name for r in problem.replicas]
        first = i * len(names) // len(problem.adapters)
        return names[first:] + names[:first]


class HighestRandomWeight(Policy):
    """Rendezvous hashing; an adapter gets as many replicas as its part of the demand asks for, and even parts of its requests on each.

    What NVIDIA Dynamo does with demand smoothed by an EMA; the demand that problem carries is smoothed by the same (demand.py).
    """

    name = "hrw-ema"

    def plan(self, problem: Problem, current: RoutingTable | None) -> RoutingTable:
        problem.check_adapters()
        version = 1 if current is None else current.version + 1
        current = healed(current, problem) if current is not None else None
        use = problem.utilisation()
        mean = use.sum() / len(problem.replicas)
        room = {r.name: r.host_bytes for r in problem.replicas}
        wanted = [max(1, math.ceil(u / mean - 1e-9)) if mean > 0 else 1 for u in use]
        chosen: list[list[str]] = [[] for _ in use]
        names = tuple(r.name for r in problem.replicas)
        # First one replica for everyone, then the others, so that the popular do not push out the rest.
        for once in (True, False):
            for i, adapter in enumerate(problem.adapters):
                if len(chosen[i]) >= wanted[i]:
                    continue
                for j in ranking(adapter.name, names):
                    replica = problem.replicas[j]
                    if len(chosen[i]) >= (1 if once else wanted[i]):
                        break
                    if (
                        replica.name not in chosen[i]
                        and replica.can_hold(adapter)
                        and adapter.size <= room[replica.name]
                    ):
                        room[replica.name] -= adapter.size
                        chosen[i].append(replica.name)
                if not chosen[i]:
                    raise no_room(adapter, len(problem.replicas))
        shares = {
            a.name: tuple((r, 1 / len(on)) for r in sorted(on)) for a, on in zip(problem.adapters, chosen, strict=True)
        }  # fmt: skip
        table = RoutingTable(version, tuple(room), shares, problem.admitted(use))
        return self._bounded(problem, current, table)

    def _bounded(self, problem: Problem, current: RoutingTable | None, table: RoutingTable) -> RoutingTable:
        """Where more than max_moves pairs are new, adapters that need the least keep their current holders."""
        new: dict[str, int] = {}
        for adapter, _ in moves(current, table):
            new[adapter] = new.get(adapter, 0) + 1
        shares, left = dict(table.shares), problem.max_moves
        use = dict(zip((a.name for a in problem.adapters), problem.utilisation(), strict=True))
        for adapter in sorted(new, key=lambda a: (-use[a], a)):
            if new[adapter] <= left:
                left -= new[adapter]
            else:
                shares[adapter] = current.shares[adapter]
        room = {r.name: r.host_bytes for r in problem.replicas}
        for adapter in problem.adapters:
            for replica, _ in shares[adapter.name]:
                room[replica] -= adapter.size
        # Old and new holders together may not fit; then all stay, as far as they have a place.
        if min(room.values()) < 0 and all(a.name in current.shares for a in problem.adapters):
            shares = {a.name: current.shares[a.name] for a in problem.adapters}
        return RoutingTable(table.version, table.replicas, shares, table.admitted)


@lru_cache(maxsize=8192)
def ranking(adapter: str, replicas: tuple[str, ...]) -> tuple[int, ...]:
    """Indices of the replicas, highest random weight first."""
    weights = [blake2b(f"{replica}/{adapter}".encode(), digest_size=8).digest() for replica in replicas]
    return tuple(sorted(range(len(replicas)), key=lambda j: weights[j], reverse=True))


class _Anywhere(Policy):
    """Every replica may answer for every adapter that it can hold; the choice is made request by request, from what is loaded."""

    places = False

    def plan(self, problem: Problem, current: RoutingTable | None) -> RoutingTable:
        problem.check_adapters()
        names = tuple(r.name for r in problem.replicas)
        admitted = problem.admitted(problem.utilisation())
        shares, known = {}, {}
        for a in problem.adapters:
            if (a.rank, a.size) not in known:
                able = [r.name for r in problem.replicas if r.can_hold(a)]
                known[a.rank, a.size] = tuple((name, 1 / len(able)) for name in sorted(able))
            shares[a.name] = known[a.rank, a.size]
        return RoutingTable(1 if current is None else current.version + 1, names, shares, admitted)


class Affinity(_Anywhere):
    """A replica that has the adapter loaded, the shorter queue of two random ones; else one with the fewest adapters.

    What Ray Serve does with multiplexed models: replicas that are full (most requests at once) are passed over.
    """

    name = "affinity"

    def __init__(self, max_requests: int = 128):
        self._max = max_requests

    def pick(self, adapter: Adapter, prompt_tokens: int, table: RoutingTable, view: View, draw: float) -> str:
        free = view.alive & (view.requests < self._max)
        having = sorted(s for s in view.holders.get(adapter.name, ()) if free[s])
        if not having:
            allowed = free if free.any() else view.alive
            having = np.nonzero(allowed & (view.loaded == view.loaded[allowed].min()))[0].tolist()
        # Two different ones from one draw.
        n = len(having)
        first = int(draw * n)
        second = (first + 1 + int((draw * n - first) * (n - 1))) % n if n > 1 else first
        return view.names[min(having[first], having[second], key=lambda s: (view.requests[s], s))]


class Toppings(_Anywhere):
    """Algorithm 1 of Toppings (ATC'25): the least cost over all servers, where

    cost = (added prefill / mean response length + added decode) * (running + queued), infinite when the decode step would exceed the SLO.
    """

    name = "toppings"

    def __init__(self, costs: Costs, tpot_ms: float, output_tokens: float):
        self._costs, self._tpot_ms, self._output = costs, tpot_ms, output_tokens

    def pick(self, adapter: Adapter, prompt_tokens: int, table: RoutingTable, view: View, draw: float) -> str:
        rank = adapter.rank
        has = np.zeros(len(view.names), dtype=bool)
        has[list(view.holders.get(adapter.name, ()))] = True
        now = self._costs.decode(view.requests, view.rows, view.width)
        # An adapter that is on a server's GPUs is taken to be in its batch already.
        after = self._costs.decode(view.requests + 1, view.rows + np.where(has, 0, rank), np.maximum(view.width, rank))
        prefill = self._costs.prefill(prompt_tokens, prompt_tokens * rank, np.maximum(view.width, rank))
        cost = (prefill / self._output + after - now) * view.requests
        cost = np.where(after > self._tpot_ms, np.inf, cost)
        cost = np.where(view.alive, cost, np.nan)
        # Among equal ones (idle servers, or all above the SLO) the one with the fewest requests, then by the draw.
        best = np.nonzero(cost == np.nanmin(cost))[0]
        best = best[view.requests[best] == view.requests[best].min()]
        return view.names[int(best[int(draw * len(best))])]


def no_room(adapter: Adapter, replicas: int) -> PlacementError:
    return PlacementError(
        f"adapter {adapter.name!r} ({adapter.size / 2**20:.0f} MiB) finds no room in the host memory of {replicas} replicas; raise "
        "replicas.host_gib or replicas.count"
    )
