"""What every policy is given and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from sgl_bdlora.cluster.routing import RoutingTable


class PlacementError(ValueError):
    """There is no placement; the message names the adapter, what it needs and what would help."""


@dataclass(frozen=True)
class Adapter:
    """rank: of the plain adapter with as many parameters; size: bytes of its weights on one replica, all GPUs of it."""

    name: str
    rank: int
    size: int


@dataclass(frozen=True)
class Replica:
    """pool_bytes: room for adapters on its GPUs; host_bytes: room in host memory, where every adapter placed there has to fit."""

    name: str
    pool_bytes: int
    host_bytes: int
    max_rank: int

    def can_hold(self, adapter: Adapter) -> bool:
        return adapter.rank <= self.max_rank and adapter.size <= min(self.pool_bytes, self.host_bytes)


@dataclass(frozen=True)
class Problem:
    """One planning step.

    demand: (adapters,) tokens a second, prompt and output; points: tokens a second that one replica serves of one rank within
    the SLO; max_moves: (adapter, replica) pairs that the new table may have and the current one has not; slack: how far a
    replica's load may be above the mean, as a part of it.
    """

    adapters: tuple[Adapter, ...]
    replicas: tuple[Replica, ...]
    demand: np.ndarray
    points: Mapping[int, float]
    max_moves: int = 64
    slack: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not self.replicas:
            raise PlacementError("there is no replica that could hold an adapter; start at least one")
        if len(self.demand) != len(self.adapters) or not np.all(np.isfinite(self.demand)) or np.any(self.demand < 0):
            raise ValueError(
                f"demand has to be {len(self.adapters)} finite numbers of at least 0, one for each adapter"
            )
        missing = sorted({a.rank for a in self.adapters} - set(self.points))
        if missing:
            raise ValueError(f"no operating point for rank {missing[0]}; there are {sorted(self.points)}")

    def utilisation(self) -> np.ndarray:
        """(adapters,) how many replicas the demand for each adapter keeps busy."""
        return self.demand / np.array([self.points[a.rank] for a in self.adapters], dtype=float)

    def check_adapters(self) -> None:
        """Raises PlacementError for the first adapter that no replica can hold."""
        kinds = set(map(_limits, self.replicas))
        for adapter in self.adapters:
            if not any(adapter.rank <= rank and adapter.size <= size for rank, size in kinds):
                rank, size = max(r for r, _ in kinds), max(s for _, s in kinds)
                raise PlacementError(
                    f"adapter {adapter.name!r} (rank {adapter.rank}, {adapter.size / 2**20:.0f} MiB) fits no replica: the largest takes "
                    f"rank {rank} and {size / 2**20:.0f} MiB; raise replicas.max_rank or replicas.pool_gib, or drop the adapter"
                )

    def admitted(self, utilisation: np.ndarray) -> float:
        """The part of the requests to admit so that the replicas can serve them within the SLO; the rest is shed."""
        total = float(utilisation.sum())
        return 1.0 if total <= len(self.replicas) else len(self.replicas) / total


def _limits(replica: Replica) -> tuple[int, int]:
    return replica.max_rank, min(replica.pool_bytes, replica.host_bytes)


@dataclass
class View:
    """What a router sees of the live replicas; arrays are indexed like `names`.

    requests: running and waiting; rows: ranks of the distinct adapters in the batch, summed; width: the largest of them;
    loaded: adapters on the GPUs; alive; holders: adapter to the indices of the replicas that have it on their GPUs.
    """

    names: tuple[str, ...]
    requests: np.ndarray
    rows: np.ndarray
    width: np.ndarray
    loaded: np.ndarray
    alive: np.ndarray
    holders: dict[str, set[int]] = field(default_factory=dict)

    @classmethod
    def empty(cls, names: tuple[str, ...]) -> View:
        zeros = (np.zeros(len(names), dtype=np.int64) for _ in range(4))
        return cls(names, *zeros, alive=np.ones(len(names), dtype=bool))


class Policy(ABC):
    """plan() says where adapters live, every period; pick() says who answers one request. Both are functions of what they are given.

    places: whether the table's new pairs are to be loaded; not where it only says who may answer.
    """

    name: str
    places: bool = True

    @abstractmethod
    def plan(self, problem: Problem, current: RoutingTable | None) -> RoutingTable:
        """The next table. Raises PlacementError where an adapter fits nowhere."""

    def pick(self, adapter: Adapter, prompt_tokens: int, table: RoutingTable, view: View, draw: float) -> str:
        """The replica for a request; draw is uniform in [0, 1). Raises KeyError for an adapter that the table does not know."""
        return table.sample(adapter.name, draw)
