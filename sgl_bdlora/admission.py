"""Whose turn it is when more adapters are asked for than fit, and their copies before they are needed.

A request holds its adapter for as long as it runs, so with more adapters than fit the copies are not what costs: it is that an
adapter in use always finds its next request first, never leaves, and the others starve. Here adapters take turns. Those that wait
claim room in the order in which their requests came; for each claim the adapter that has had its turn longest gets no new requests,
and so leaves when those that run have ended. Waiting grows in proportion to how many adapters share the room, and the batch stays full.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard

# Issuing the copy of an adapter on seven modules of 32 layers takes the host about a millisecond.
COPIES_PER_ROUND = 4


@dataclass(frozen=True)
class Waiting:
    """A waiting request: its id and its adapter's."""

    request: str
    adapter: str


class Admission:
    """Decides before every scheduling round which adapters' requests may start. Ranks that see the same requests decide alike.

    Args:
        pool: holds the adapters' weights; copies are started here. shards: adapter id -> shard of every loaded adapter.
        pinned: gives the ids that never leave the pool.
    """

    def __init__(self, pool: MemoryPool, shards: Mapping[str, AdapterShard], pinned: Callable[[], Collection[str]]):
        self._pool, self._shards, self._pinned = pool, shards, pinned
        self._came: dict[str, int] = {}
        self._requests = 0
        self._began: dict[str, int] = {}
        self._rounds = 0
        self.closed: frozenset[str] = frozenset()

    def next_round(self, running: Collection[str], waiting: Iterable[Waiting], base_runs: bool = False) -> None:
        """Set `closed`: the waiting adapters whose requests may not start in this round.

        running: adapters of requests that run, or are being prefilled in parts. waiting: in any order. base_runs: requests for the base
        model run.
        """
        self._rounds += 1
        self._began = {uid: self._began.get(uid, self._rounds) for uid in running}
        pinned = self._pinned()
        queue = self._in_order(waiting)
        claims = [uid for uid in queue if uid not in self._began]
        if not self._fits({*running, *claims}, pinned):
            claims = self._first_that_fit([], claims, pinned)
            latest_first = sorted(running, key=lambda uid: (-self._began[uid], uid))
            stay = set(self._first_that_fit(claims, latest_first, pinned)[len(claims) :])
        else:
            stay = set(running)
        self.closed = frozenset(queue) - stay - self._bring(claims, set(running), pinned, bool(running) or base_runs)

    def _in_order(self, waiting: Iterable[Waiting]) -> list[str]:
        """The adapters, by when the oldest of their waiting requests came."""
        came, oldest = {}, {}
        for entry in waiting:
            if entry.request not in self._came:
                self._requests += 1
            number = came[entry.request] = self._came.get(entry.request, self._requests)
            oldest[entry.adapter] = min(number, oldest.get(entry.adapter, number))
        self._came = came
        return sorted(oldest, key=oldest.__getitem__)

    def fits(self, adapters: Collection[str]) -> bool:
        """Whether one batch may name these adapters, and the pool holds them beside the pinned ones."""
        return self._fits(adapters, self._pinned())

    def _fits(self, adapters: Collection[str], pinned: Collection[str]) -> bool:
        together = [self._shards[uid] for uid in {*adapters, *pinned}]
        return len(adapters) <= self._pool.max_loras_per_batch and self._pool.fits(together)

    def _first_that_fit(self, given: list[str], more: list[str], pinned: Collection[str]) -> list[str]:
        """given, and as many of `more`, in order, as fit beside them."""
        taken = list(given)
        for uid in more:
            if not self._fits([*taken, uid], pinned):
                break
            taken.append(uid)
        return taken

    def _bring(self, claims: list[str], running: set[str], pinned: Collection[str], busy: bool) -> set[str]:
        """Start the copies of the claims, in order, as far as what runs leaves room. Returns those that can start now.

        While something runs, a copy has the time of a batch before its first request starts, so that nobody waits for it.
        """
        present, kept, copies = set(), set(running), 0
        for uid in claims:
            resident = self._pool.get(uid) is not None
            if not self._fits(kept | {uid}, pinned) or (not resident and copies == COPIES_PER_ROUND):
                # Later ones wait too: room that this one needs must not go to them.
                break
            kept.add(uid)
            if not resident:
                self._pool.ensure({uid: self._shards[uid]}, protected={*kept, *pinned})
                copies += 1
            if resident or not busy:
                present.add(uid)
        return present
