"""Cutting an adapter's pieces beside the batches.

A rank works on requests and loads in one loop: while it reads and cuts an adapter, nobody gets a token, 0.85 s for 386 MB on two cores.
So a load has two parts. First the launcher asks every rank to prepare the adapter (loading.py): what needs the main thread is done at
once, the pieces are cut by another thread, and the launcher asks again until that is done. Then SGLang's own load comes to all ranks,
takes what was prepared, and agrees on it (loader.py). Whatever goes wrong before is said by that load.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from sgl_bdlora.adapters import Adapter
from sgl_bdlora.sharding import AdapterShard

# How the launcher marks the requests that only prepare, in place of an adapter's id.
BEGIN, POLL = "bdlora-begin-", "bdlora-poll-"
# Prepared adapters that wait for their load: the launcher begins no more (loading.py); should loads fail to come, the oldest is forgotten.
WAITING = 4

_tokens = itertools.count()


def new_token() -> str:
    return str(next(_tokens))


class Prepared(NamedTuple):
    """adapter: its open files, None where they could not be read. shard: its pieces, or the exception that reading or cutting gave."""

    adapter: Adapter | None
    shard: Future[AdapterShard]


class Preparations:
    """One rank's. Keys are (name, path): a load takes the last preparation of its own."""

    def __init__(self, read: Callable[[str, str], Adapter], cut: Callable[[Adapter], AdapterShard]):
        """read: what needs the main thread, for a name and a path. cut: runs in another thread."""
        self._read, self._cut = read, cut
        self._thread = ThreadPoolExecutor(1, "bdlora-cut")
        self._waiting: dict[tuple[str, str], tuple[str, Prepared]] = {}

    def ask(self, order: str, name: str, path: str) -> bool:
        """Begin or poll, by the mark of `order`; returns whether there is nothing to wait for."""
        key = (name, path)
        if order.startswith(BEGIN):
            self._waiting.pop(key, None)
            self._waiting[key] = order.removeprefix(BEGIN), self._begin(name, path)
            if len(self._waiting) > WAITING:
                del self._waiting[next(iter(self._waiting))]
        token, prepared = self._waiting.get(key, ("", None))
        return prepared is None or token != order.removeprefix(BEGIN).removeprefix(POLL) or prepared.shard.done()

    def take(self, name: str, path: str) -> Prepared | None:
        """The last preparation, if there is one; it may still be at work."""
        return self._waiting.pop((name, path), ("", None))[1]

    def _begin(self, name: str, path: str) -> Prepared:
        try:
            adapter = self._read(name, path)
        except Exception as error:
            failed: Future[AdapterShard] = Future()
            failed.set_exception(error)
            return Prepared(None, failed)
        return Prepared(adapter, self._thread.submit(self._cut, adapter))
