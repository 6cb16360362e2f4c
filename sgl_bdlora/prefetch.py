"""Adapters of waiting requests start their copy before they are needed."""

from collections.abc import Collection, Iterable, Mapping

from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard

# Issuing the copy of an adapter on seven modules of 32 layers takes the host about a millisecond.
COPIES_PER_ROUND = 4


def prefetch(
    pool: MemoryPool,
    shards: Mapping[str, AdapterShard],
    running: Collection[str],
    waiting: Iterable[str],
    pinned: Collection[str],
) -> set[str]:
    """Start copying adapters of waiting requests, first come first served, beside the batches that run meanwhile.

    Called before each scheduling round with the adapter ids of requests that run, that wait (in order of the queue), and the pinned
    ones. Running, pinned and earlier waiting adapters are never evicted for a later one.

    Returns the ids that this round must not schedule: while something runs, a request whose adapter is still to come waits for
    a later round, so the copy has the time of a batch and no running request waits for it. Nothing depends on a copy's speed:
    ranks that see the same requests take the same decisions.
    """
    keep = {*running, *pinned}
    room = pool.budget - sum(shards[uid].nbytes for uid in keep)
    to_come = [uid for uid in dict.fromkeys(waiting) if uid not in keep]
    awaited: set[str] = set()
    copies = 0
    for i, uid in enumerate(to_come):
        shard, resident = shards[uid], pool.get(uid) is not None
        if shard.nbytes > room or (not resident and copies == COPIES_PER_ROUND):
            # Later ones wait too: space that the first one needs must not go to them.
            awaited.update(to_come[i:])
            break
        room -= shard.nbytes
        keep.add(uid)
        if not resident:
            pool.ensure({uid: shard}, protected=keep)
            awaited.add(uid)
            copies += 1
    return awaited if running else set()
