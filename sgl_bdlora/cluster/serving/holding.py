"""Which adapters a replica's server has: loaded when a request comes or in advance, unloaded when there is no room or all are forgotten."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

# Loads at a time: one is read from disk or from a peer while the server's ranks have another.
LOADS = 2


class Holding:
    """Runs in one event loop.

    load: adapter to why the server refuses it, None once it has it. unload: adapter. sizes: adapter to bytes; budget: most bytes, unless
    requests use more. loaded: adapter to bytes, least recently used first. unloads: how many there were.
    """

    def __init__(
        self,
        load: Callable[[str], Awaitable[str | None]],
        unload: Callable[[str], Awaitable[None]],
        sizes: dict[str, int],
        budget: int,
    ):
        self._ask_load, self._ask_unload, self._sizes, self._budget = load, unload, sizes, budget
        self.loaded: OrderedDict[str, int] = OrderedDict()
        self.unloads = 0
        # Requests by adapter; adapters to be copied in advance; loads and unloads under way.
        self._used: Counter[str] = Counter()
        self._ahead: set[str] = set()
        self._loading: dict[str, asyncio.Task] = {}
        self._unloading: dict[str, asyncio.Task] = {}
        # Bytes of loads that have their turn.
        self._coming: dict[str, int] = {}
        self._turns, self._making_room = asyncio.Semaphore(LOADS), asyncio.Lock()
        # Copies in advance have one of the turns at most: a request's load must not wait behind them.
        self._ahead_turn = asyncio.Lock()
        self._forgotten = 0

    @asynccontextmanager
    async def using(self, adapter: str) -> AsyncIterator[str | None]:
        """A request's time with an adapter; gives why it cannot be had, if it cannot. Raises what load raises."""
        self._used[adapter] += 1
        try:
            yield await self._ensure(adapter)
        finally:
            self._used[adapter] -= 1

    async def copy_ahead(self, adapter: str) -> str | None:
        """Load it without a request, unless it is forgotten before its turn; why it cannot be had, if it cannot."""
        self._ahead.add(adapter)
        try:
            async with self._ahead_turn:
                return await self._ensure(adapter) if adapter in self._ahead else None
        finally:
            self._ahead.discard(adapter)

    async def forget(self) -> None:
        """Unload what no request uses, now or when its load is done; what waits for its turn without a request is not loaded."""
        self._forgotten += 1
        self._ahead.clear()
        async with self._making_room:
            for adapter in list(self.loaded):
                # A request may have come while another was unloaded.
                if adapter in self.loaded and not self._used[adapter]:
                    await self._unload(adapter)

    def waiting(self) -> list[str]:
        """Adapters whose load is under way or waits for its turn."""
        return [*self._loading, *sorted(self._ahead - self._loading.keys() - self.loaded.keys())]

    async def _ensure(self, adapter: str) -> str | None:
        if adapter in self.loaded:
            self.loaded.move_to_end(adapter)
            return None
        if adapter not in self._loading:
            task = self._loading[adapter] = asyncio.create_task(self._load(adapter))
            # It may fail when nobody waits any more.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        # A client that leaves must not end the load for the others.
        return await asyncio.shield(self._loading[adapter])

    async def _load(self, adapter: str) -> str | None:
        try:
            async with self._turns:
                if not self._used[adapter] and adapter not in self._ahead:
                    return None
                forgotten = self._forgotten
                self._coming[adapter] = self._sizes[adapter]
                await self._make_room()
                if adapter in self._unloading:
                    await self._unloading[adapter]
                refusal = await self._ask_load(adapter)
                if refusal is None:
                    self.loaded[adapter] = self._sizes[adapter]
        finally:
            self._coming.pop(adapter, None)
            del self._loading[adapter]
        if refusal is None and forgotten != self._forgotten and not self._used[adapter]:
            await self._unload(adapter)
        return refusal

    async def _make_room(self) -> None:
        """Unload those that have not been asked for longest and that no request uses, until the budget holds what is coming."""
        async with self._making_room:
            while sum(self.loaded.values()) + sum(self._coming.values()) > self._budget:
                free = next((a for a in self.loaded if not self._used[a]), None)
                if free is None:
                    return
                await self._unload(free)

    async def _unload(self, adapter: str) -> None:
        del self.loaded[adapter]
        self.unloads += 1
        task = self._unloading[adapter] = asyncio.create_task(self._ask_unload(adapter))
        try:
            await task
        finally:
            del self._unloading[adapter]
