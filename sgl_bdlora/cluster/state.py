"""A placement in the making: which part of each adapter's requests every replica takes, and what that fills."""

from __future__ import annotations

import numpy as np

from sgl_bdlora.cluster.base import PlacementError, Problem
from sgl_bdlora.cluster.routing import RoutingTable, normalised

# Loads and shares below this part of the mean are rounding errors.
EPS = 1e-9


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
