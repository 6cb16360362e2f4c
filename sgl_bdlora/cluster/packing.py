"""Placements from nothing: by rank, or evenly."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from sgl_bdlora.cluster.base import PlacementError, Problem
from sgl_bdlora.cluster.state import EPS, State


def pack(problem: Problem, how: Callable[[State], None]) -> list[list[tuple[int, float]]]:
    """A placement from nothing: for each adapter [(replica, part), ...]. Where memory is too tight for it, adapters stay whole."""
    state = State(problem)
    try:
        how(state)
    except PlacementError:
        state = State(problem)
        _pack_whole(state)
    return [sorted(parts.items()) for parts in state.parts]


def pack_by_rank(state: State) -> None:
    """Highest rank first onto the replicas with the highest limit first; within a rank in an order that the name decides."""
    problem, mean = state.problem, state.mean
    names = [zlib.crc32(a.name.encode()) for a in problem.adapters]
    hot = [a for a in range(len(names)) if state.use[a] > EPS * mean]
    hot.sort(key=lambda a: (-state.rank[a], names[a], a))
    order = sorted(range(len(state.load)), key=lambda s: (-state.max_rank[s], -state.pool[s], s))
    left, place, target, overflow = float(state.use.sum()), 0, mean, []
    for i, a in enumerate(hot):
        need = state.use[a]
        if i and state.rank[a] != state.rank[hot[i - 1]] and place < len(order) - 1:
            # A replica that is nearly full when a rank ends stays pure, if the others can take the rest.
            bins = len(order) - 1 - place
            if state.load[order[place]] >= target * (1 - problem.slack) and left / bins <= state.cap:
                place, target = place + 1, left / bins
        while need > EPS * mean:
            if place == len(order):
                overflow.append((a, need))
                left -= need
                break
            s = order[place]
            room = target - state.load[s]
            if not state.holds(a)[s]:
                part = 0.0
            elif place == len(order) - 1 or need <= room + EPS * mean or state.load[s] + need <= state.cap:
                part = need
            else:
                part = max(0.0, room)
            if part > EPS * mean:
                state.put(a, s, part / state.use[a])
                need -= part
                left -= part
            if need > EPS * mean:
                place += 1
                target = left / max(1, len(order) - place)
    for a, need in overflow:
        fits = state.holds(a)
        for s in state.parts[a]:
            fits[s] = True
        if not fits.any():
            raise PlacementError("memory is too tight to split adapters")
        state.put(a, int(np.argmin(np.where(fits, state.load, np.inf))), need / state.use[a])
    cold = set(range(len(names))) - set(hot)
    for a in sorted(cold, key=lambda a: (-state.rank[a], -state.size[a], names[a], a)):
        state.spread_cold(a)


def pack_evenly(state: State) -> None:
    """Largest first by load or bytes, in as many parts as replicas it keeps busy, each part where load and bytes add up to the least."""
    mean = max(state.mean, 1e-300)
    mean_bytes = max(1.0, float(state.size.sum()) / len(state.load))
    weight = np.maximum(state.use / mean, state.size / mean_bytes)
    names = [a.name for a in state.problem.adapters]
    free = state.room.copy()
    for a in sorted(range(len(names)), key=lambda a: (-weight[a], names[a])):
        parts = min(len(state.load), max(1, int(np.ceil(state.use[a] / mean - 1e-9))))
        for _ in range(parts):
            fits = state.holds(a) & ~state.held[a]
            if not fits.any():
                raise PlacementError("memory is too tight to split adapters")
            filled = state.load / mean + (free - state.room) / mean_bytes
            state.put(a, int(np.argmin(np.where(fits, filled, np.inf))), 1 / parts)
    state.level()


def _pack_whole(state: State) -> None:
    """Largest first, each on the least loaded replica that has room for it."""
    for a in sorted(range(len(state.size)), key=lambda a: (-state.size[a], -state.use[a], a)):
        fits = state.holds(a)
        if fits.any():
            state.put(a, int(np.argmin(np.where(fits, state.load, np.inf))), 1.0)
        else:
            state.spread_cold(a)
