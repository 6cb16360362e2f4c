"""The routing table: which part of an adapter's requests each replica takes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(frozen=True)
class RoutingTable:
    """shares: adapter to ((replica, part), ...), parts positive and summing to 1. admitted: the part of requests not to shed.

    Immutable; a change is a new table with a higher version, so a router swaps one reference.
    """

    version: int
    replicas: tuple[str, ...]
    shares: Mapping[str, tuple[tuple[str, float], ...]]
    admitted: float = 1.0
    _cumulative: dict[str, tuple[list[float], tuple[str, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def holders(self, adapter: str) -> tuple[str, ...]:
        return tuple(replica for replica, _ in self.shares[adapter])

    def pairs(self) -> set[tuple[str, str]]:
        """Every (adapter, replica)."""
        return {(adapter, replica) for adapter, parts in self.shares.items() for replica, _ in parts}

    def sample(self, adapter: str, draw: float) -> str:
        """The replica whose part of [0, 1) has `draw` in it. KeyError for an unknown adapter."""
        known = self._cumulative.get(adapter)
        if known is None:
            parts = self.shares[adapter]
            known = self._cumulative[adapter] = (list(accumulate(p for _, p in parts)), tuple(r for r, _ in parts))
        ends, names = known
        # The last end may be 1 less a rounding error.
        return names[min(bisect_right(ends, draw), len(names) - 1)]

    def ranked(self, adapter: str, draw: float) -> list[list[str]]:
        """Groups to try one after another: the sampled replica, the adapter's other holders by part, then all others."""
        first = self.sample(adapter, draw)
        others = [r for r, _ in sorted(self.shares[adapter], key=lambda item: (-item[1], item[0])) if r != first]
        rest = [r for r in self.replicas if r != first and r not in others]
        return [group for group in ([first], others, rest) if group]

    def sheds(self, draw: float) -> bool:
        """Whether a request with this uniform draw is to be refused (429 with Retry-After)."""
        return draw >= self.admitted

    def without(self, dead: Iterable[str]) -> RoutingTable:
        """The table healed of replicas that died.

        Their parts go to the adapter's other holders in proportion; an adapter that had no other goes to the living replica with
        the fewest adapters. ValueError when none lives.
        """
        gone = set(dead)
        alive = tuple(r for r in self.replicas if r not in gone)
        if not alive:
            raise ValueError("no replica is alive; requests have to wait for one or be refused")
        count = dict.fromkeys(alive, 0)
        kept = {a: tuple(item for item in parts if item[0] not in gone) for a, parts in self.shares.items()}
        for parts in kept.values():
            for replica, _ in parts:
                count[replica] += 1
        for adapter in sorted(a for a, parts in kept.items() if not parts):
            least = min(alive, key=lambda r: (count[r], r))
            count[least] += 1
            kept[adapter] = ((least, 1.0),)
        return RoutingTable(self.version + 1, alive, {a: normalised(parts) for a, parts in kept.items()}, self.admitted)

    def to_json(self) -> dict:
        shares = {adapter: [list(item) for item in parts] for adapter, parts in self.shares.items()}
        return {
            "version": self.version, "replicas": list(self.replicas), "admitted": self.admitted, "shares": shares,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict) -> RoutingTable:
        shares = {adapter: tuple((r, float(p)) for r, p in parts) for adapter, parts in data["shares"].items()}
        return cls(data["version"], tuple(data["replicas"]), shares, data["admitted"])


def normalised(parts: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Parts scaled to sum to 1, in order of the replica's name."""
    kept = sorted(parts)
    total = sum(part for _, part in kept)
    return tuple((replica, part / total) for replica, part in kept)


def moves(current: RoutingTable | None, new: RoutingTable) -> set[tuple[str, str]]:
    """(adapter, replica) pairs that are new; those of adapters that the current table did not know are no moves."""
    if current is None:
        return set()
    before = current.pairs()
    return {pair for pair in new.pairs() if pair not in before and pair[0] in current.shares}
