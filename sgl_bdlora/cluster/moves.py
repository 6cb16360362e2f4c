"""From one placement to the next with a bounded number of moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from sgl_bdlora.cluster.base import Problem
from sgl_bdlora.cluster.routing import RoutingTable
from sgl_bdlora.cluster.state import EPS, State

# A move that shifts less than this part of the mean load is not worth its copy.
LEAST_GAIN = 0.005


def healed(current: RoutingTable, problem: Problem) -> RoutingTable | None:
    """The current table without replicas that are gone; None when none of them is left. Moves are counted against it."""
    alive = {r.name for r in problem.replicas}
    dead = set(current.replicas) - alive
    if not dead:
        return current
    return current.without(dead) if set(current.replicas) & alive else None


def keep(state: State, current: RoutingTable, pack: Callable) -> list[set[int]]:
    """Put into state what the current table says of adapters and replicas that exist and fit, new adapters where a fresh plan puts
    them; returns that fresh plan's holders, relabelled so that few adapters would have to move."""
    problem = state.problem
    index = {r.name: s for s, r in enumerate(problem.replicas)}
    for a, adapter in enumerate(problem.adapters):
        parts = [(index[name], part) for name, part in current.shares.get(adapter.name, ()) if name in index]
        parts = [(s, part) for s, part in parts if state.holds(a)[s]]
        total = sum(part for _, part in parts)
        for s, part in parts:
            state.put(a, s, part / total)
    target = relabelled(state, pack(problem))
    for a, wanted in enumerate(target):
        if state.parts[a]:
            continue
        parts = [(s, part) for s, part in wanted if state.holds(a)[s]]
        if not parts:
            state.spread_cold(a)
        total = sum(part for _, part in parts)
        for s, part in parts:
            state.put(a, s, part / total)
    return [{s for s, _ in parts} for parts in target]


def relabelled(state: State, packed: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """packed with its bins given to the replicas that already hold most of their bytes (maximum-weight matching)."""
    n = len(state.load)
    weight_BS = np.zeros((n, n))
    bytes_B, rank_B, largest_B = np.zeros(n), np.zeros(n), np.zeros(n)
    for a, parts in enumerate(packed):
        for b, _ in parts:
            bytes_B[b] += state.size[a]
            rank_B[b] = max(rank_B[b], state.rank[a])
            largest_B[b] = max(largest_B[b], state.size[a])
            for s in state.parts[a]:
                weight_BS[b, s] += state.size[a]
    host = np.array([r.host_bytes for r in state.problem.replicas])
    fits = (bytes_B[:, None] <= host) & (rank_B[:, None] <= state.max_rank) & (largest_B[:, None] <= state.pool)
    # Bins as they were packed fit their own replicas, so a matching of fitting pairs exists.
    rows, columns = linear_sum_assignment(np.where(fits, weight_BS, -1e6 * (1 + weight_BS.sum())), maximize=True)
    replica = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [[(replica[b], part) for b, part in parts] for parts in packed]


def relieve(state: State, budget: int, target: list[set[int]]) -> int:
    """Take load from replicas above the cap, one new pair at a time; returns what is left of the budget."""
    mean, cap = state.mean, state.cap
    if mean <= 0:
        return budget
    ranks = sorted(set(state.rank.tolist()))
    column = {rank: i for i, rank in enumerate(ranks)}
    rank_on = np.zeros((len(state.load), len(ranks)), dtype=np.int64)
    for s, on in enumerate(state.on):
        for a in on:
            rank_on[s, column[state.rank[a]]] += 1
    wanted = np.zeros_like(state.held)
    for a, replicas in enumerate(target):
        wanted[a, list(replicas)] = True
    stuck: set[int] = set()
    while budget > 0:
        high = [s for s in range(len(state.load)) if s not in stuck and state.load[s] > cap * (1 + EPS)]
        if not high:
            return budget
        s = max(high, key=lambda s: (state.load[s], -s))
        on = np.array(sorted(a for a in state.on[s] if state.use[a] > EPS * mean), dtype=np.int64)
        amount_A = np.array([state.parts[a][s] * state.use[a] for a in on])
        # No replica may end above the mean, nor give away more than it has above it.
        gain_AS = np.minimum(
            np.minimum(amount_A, state.load[s] - mean)[:, None], np.maximum(0.0, mean - state.load)[None]
        )
        # An adapter that is too large to split usefully may go whole up to the cap.
        whole_AS = (amount_A[:, None] + state.load[None] <= cap) & (
            amount_A[:, None] <= state.load[s] - mean + cap - mean
        )
        gain_AS = np.where(whole_AS, np.maximum(gain_AS, np.minimum(amount_A, state.load[s] - mean)[:, None]), gain_AS)
        size_A, rank_A = state.size[on], state.rank[on]
        fits_AS = (size_A[:, None] <= np.minimum(state.pool, state.room)) & (rank_A[:, None] <= state.max_rank)
        score_AS = np.where(fits_AS & ~state.held[on], gain_AS, 0.0)
        at_home_AS = (rank_on[:, [column[r] for r in rank_A]] > 0).T | wanted[on]
        score_AS *= np.where(at_home_AS, 1.0, 0.5)
        i, t = np.unravel_index(int(np.argmax(score_AS)), score_AS.shape)
        if score_AS[i, t] <= LEAST_GAIN * mean:
            stuck.add(s)
            continue
        a, t = int(on[i]), int(t)
        amount = amount_A[i] if whole_AS[i, t] else gain_AS[i, t]
        part = min(amount / state.use[a], state.parts[a][s])
        state.put(a, t, part)
        state.take(a, s, part)
        rank_on[t, column[state.rank[a]]] += 1
        if s not in state.parts[a]:
            rank_on[s, column[state.rank[a]]] -= 1
        budget -= 1
    return budget


def gather(state: State, budget: int, target: list[set[int]]) -> None:
    """Bring adapters that sit among larger or smaller ranks to the fresh plan's replica, busiest first, where the cap allows it."""
    cap = state.cap
    main = []
    for on in state.on:
        loads: dict[int, float] = {}
        for a in sorted(on):
            loads[state.rank[a]] = loads.get(state.rank[a], 0.0) + sum(state.parts[a].values()) * state.use[a]
        main.append(max(loads, key=lambda r: (loads[r], r)) if loads else None)
    foreign = [
        a for a, parts in enumerate(state.parts)
        if len(parts) == 1 and state.use[a] > EPS * state.mean and main[next(iter(parts))] != state.rank[a]
    ]  # fmt: skip
    for a in sorted(foreign, key=lambda a: (-state.use[a], a)):
        if budget <= 0:
            return
        (s,) = state.parts[a]
        fits = state.holds(a)
        there = [t for t in sorted(target[a]) if t != s and main[t] == state.rank[a] and fits[t]]
        there = [t for t in there if state.load[t] + state.use[a] <= cap]
        if there:
            state.put(a, there[0], 1.0)
            state.take(a, s, 1.0)
            budget -= 1
