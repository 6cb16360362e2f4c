"""Rank-ordered fractional packing with bounded moves, after what LoRAServe's abstract describes (arXiv 2511.22880)."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from sgl_bdlora.cluster.base import Adapter, PlacementError, Policy, Problem, View
from sgl_bdlora.cluster.routing import RoutingTable, normalised

# Loads and shares below this part of the mean are rounding errors.
EPS = 1e-9
# A move that shifts less than this part of the mean load is not worth its copy.
LEAST_GAIN = 0.005


class RankPacking(Policy):
    """Adapters in order of rank fill one replica after another to the mean load, so that few replicas mix ranks.

    Later plans keep the current table: they shift parts between an adapter's holders for nothing, and spend at most max_moves new
    (adapter, replica) pairs, first to take load from the replicas above the mean, then to bring adapters back among their rank.
    """

    name = "rank-packing"
    by_rank = True

    def pack(self, problem: Problem) -> list[list[tuple[int, float]]]:
        """A placement from nothing: for each adapter [(replica, part), ...]."""
        return pack(problem, _pack_by_rank)

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
        return pack(problem, _pack_evenly)


class State:
    """A placement in the making: parts[a] is {replica: part of a's requests}, load and room follow it."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.use = problem.utilisation()
        self.load = np.zeros(len(problem.replicas))
        self.room = np.array([r.host_bytes for r in problem.replicas], dtype=np.int64)
        self.rank = np.array([a.rank for a in problem.adapters], dtype=np.int64)
        self.size = np.array([a.size for a in problem.adapters], dtype=np.int64)
        self.max_rank = np.array([r.max_rank for r in problem.replicas], dtype=np.int64)
        self.pool = np.array([min(r.pool_bytes, r.host_bytes) for r in problem.replicas], dtype=np.int64)
        self.parts: list[dict[int, float]] = [{} for _ in problem.adapters]
        self.on: list[set[int]] = [set() for _ in problem.replicas]
        self.held = np.zeros((len(problem.adapters), len(problem.replicas)), dtype=bool)

    @property
    def mean(self) -> float:
        return float(self.use.sum()) / len(self.load)

    @property
    def cap(self) -> float:
        return self.mean * (1 + self.problem.slack)

    def holds(self, a: int) -> np.ndarray:
        """(replicas,) whether each could take adapter a as it is filled now."""
        return (self.rank[a] <= self.max_rank) & (self.size[a] <= self.pool) & (self.size[a] <= self.room)

    def put(self, a: int, s: int, part: float) -> None:
        if s not in self.parts[a]:
            self.room[s] -= self.size[a]
            self.on[s].add(a)
            self.held[a, s] = True
            self.parts[a][s] = 0.0
        self.parts[a][s] += part
        self.load[s] += part * self.use[a]

    def take(self, a: int, s: int, part: float) -> None:
        """Take part of a's requests from s; a leaves s when nothing is left."""
        part = min(part, self.parts[a][s])
        self.parts[a][s] -= part
        self.load[s] -= part * self.use[a]
        if self.parts[a][s] <= EPS:
            del self.parts[a][s]
            self.on[s].discard(a)
            self.held[a, s] = False
            self.room[s] += self.size[a]

    def spread_cold(self, a: int) -> None:
        """Put an adapter that nobody asks for where its rank is, else where a larger one is, else anywhere; the emptiest of those."""
        fits = self.holds(a)
        if not fits.any():
            raise PlacementError(
                f"adapter {self.problem.adapters[a].name!r} ({self.size[a] / 2**20:.0f} MiB) finds no room in host memory: "
                f"{len(self.problem.adapters)} adapters of {self.size.sum() / 2**30:.1f} GiB on {len(self.load)} replicas; raise "
                "replicas.host_gib or replicas.count"
            )
        widest = self.widths()
        for wanted in (fits & self.has_rank(self.rank[a]), fits & (widest >= self.rank[a]), fits):
            if wanted.any():
                self.put(a, int(np.argmax(np.where(wanted, self.room, -1))), 1.0)
                return

    def has_rank(self, rank: int) -> np.ndarray:
        return self.held[self.rank == rank].any(axis=0)

    def widths(self) -> np.ndarray:
        return (self.held * self.rank[:, None]).max(axis=0)

    def level(self) -> None:
        """Shift parts between the holders that adapters have, so that loads become even; no adapter gets a new holder."""
        shared = [a for a, parts in enumerate(self.parts) if len(parts) > 1]
        shared.sort(key=lambda a: (-self.use[a], a))
        for _ in range(3):
            for a in shared:
                use, holders = self.use[a], sorted(self.parts[a])
                if len(holders) < 2 or use <= EPS * self.mean:
                    continue
                others = np.array([self.load[s] - self.parts[a][s] * use for s in holders])
                for s, filled in zip(holders, fill(others, use), strict=True):
                    change = filled / use - self.parts[a][s]
                    if change >= 0:
                        self.put(a, s, change)
                    else:
                        self.take(a, s, -change)

    def table(self, version: int) -> RoutingTable:
        names = [r.name for r in self.problem.replicas]
        shares = {
            adapter.name: normalised((names[s], part) for s, part in parts.items())
            for adapter, parts in zip(self.problem.adapters, self.parts, strict=True)
        }
        return RoutingTable(version, tuple(names), shares, self.problem.admitted(self.use))


def fill(levels: np.ndarray, amount: float) -> np.ndarray:
    """Pour `amount` onto columns of these heights so that the highest that gets any is as low as can be; (columns,) what each gets."""
    order = np.argsort(levels, kind="stable")
    heights = levels[order]
    counts = np.arange(1, len(levels) + 1)
    tops = (amount + np.cumsum(heights)) / counts
    # The last column whose own height is below the level that it and the lower ones reach.
    top = tops[np.nonzero(heights <= tops)[0][-1]]
    poured = np.maximum(0.0, top - levels)
    return poured * (amount / poured.sum())


def pack(problem: Problem, how: Callable[[State], None]) -> list[list[tuple[int, float]]]:
    """A placement from nothing: for each adapter [(replica, part), ...]. Where memory is too tight for it, adapters stay whole."""
    state = State(problem)
    try:
        how(state)
    except PlacementError:
        state = State(problem)
        _pack_whole(state)
    return [sorted(parts.items()) for parts in state.parts]


def _pack_by_rank(state: State) -> None:
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


def _pack_evenly(state: State) -> None:
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
