"""The deployment of replicas: each one server process, adapters loaded when they are asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator

import httpx
import ray
from ray import serve

from sgl_bdlora.adapters import AdapterError
from sgl_bdlora.cluster.config import ClusterConfig
from sgl_bdlora.cluster.serving import follower
from sgl_bdlora.cluster.serving.catalog import read_body
from sgl_bdlora.cluster.serving.control import ReplicaReport
from sgl_bdlora.cluster.serving.errors import ReplicaBroken, error_body
from sgl_bdlora.cluster.serving.server import ServerProcess

logger = logging.getLogger("ray.serve")

REPORT_S = 1.0
FETCH_S = 60.0


class Backend:
    """config: the cluster's. device: gpu or cpu. sizes: adapter to bytes."""

    async def __init__(self, config: ClusterConfig, device: str, sizes: dict[str, int]):
        context = serve.get_replica_context()
        self._config, self._sizes = config, sizes
        self._name = context.replica_id.unique_id
        self._budget = int(config.replicas.host_gib * 2**30)
        # Adapters on the server, least recently used first; loads under way; requests by adapter.
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._loading: dict[str, asyncio.Task] = {}
        self._used: Counter[str] = Counter()
        self._making_room = asyncio.Lock()
        self._references: dict[str, ray.ObjectRef] = {}
        self._cold, self._bytes, self._unloads, self._running = Counter(), Counter(), 0, 0
        self._stopping = False
        self._server = ServerProcess(config, device, context.rank.local_rank)
        try:
            await self._server.ready()
        except BaseException:
            self._server.stop()
            raise
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._end_with_server, daemon=True).start()
        threading.Thread(target=self._report_for_ever, daemon=True).start()
        follower.follow(self._on_prefetch, self._on_forget)

    def __del__(self):
        if hasattr(self, "_server"):
            self._stopping = True
            self._server.stop()

    def _end_with_server(self) -> None:
        """A replica without its server ends, so that Serve starts another one at once."""
        while self._server.ended() is None:
            time.sleep(0.2)
        if not self._stopping:
            logger.error("cluster: replica %s ends: its server is gone\n%s", self._name, self._server.tail())
            self._server.stop()
            os._exit(1)

    async def check_health(self) -> None:
        problem = await self._server.ended_or_silent()
        if problem:
            raise RuntimeError(problem)

    def record_routing_stats(self) -> dict:
        """What Serve shows to routers."""
        return {"loaded": list(self._loaded)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve gives to the autoscaling policy (scaling.py)."""
        return {"required": float(follower.live.required)}

    def _report_for_ever(self) -> None:
        actor = None
        while True:
            try:
                actor = actor or follower.controller()
                report = ReplicaReport(
                    ray.util.get_node_ip_address(), os.getpid(), self._server.pid, self._running, tuple(self._loaded),
                    sum(self._loaded.values()), dict(self._cold), dict(self._bytes), self._unloads,
                )  # fmt: skip
                ray.get(actor.replica_says.remote(self._name, report), timeout=30)
            except Exception as error:
                logger.warning("cluster: no report to the controller (%s)", error)
                actor = None
            time.sleep(REPORT_S)

    async def answer(
        self, route: str, body: bytes, adapter: str | None, avoid: tuple[str, ...] = (), prompt: int = 0
    ) -> AsyncIterator[tuple[int, str, bytes] | bytes]:
        """(status, content type, first bytes), then the rest as it comes. avoid and prompt are for the router.

        Raises ReplicaBroken where another replica could answer.
        """
        self._running += 1
        if adapter is not None:
            self._used[adapter] += 1
        try:
            if adapter is not None:
                refusal = await self._ensure(adapter)
                if refusal:
                    yield 400, "application/json", error_body(refusal)
                    return
            async for piece in self._ask(route, body):
                yield piece
        except httpx.HTTPError as error:
            raise ReplicaBroken(self._name, f"its server broke off: {error!r}") from None
        finally:
            self._running -= 1
            if adapter is not None:
                self._used[adapter] -= 1

    async def _ask(self, route: str, body: bytes) -> AsyncIterator[tuple[int, str, bytes] | bytes]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        async with self._server.http.stream("POST", route, content=body, headers=headers) as response:
            kind = response.headers.get("content-type", "application/json")
            if not kind.startswith("text/event-stream"):
                yield response.status_code, kind, await response.aread()
                return
            first = True
            async for piece in response.aiter_raw():
                yield (response.status_code, kind, piece) if first else piece
                first = False

    async def _ensure(self, adapter: str) -> str | None:
        """Have an adapter on the server; why it cannot be, if it cannot."""
        if adapter in self._loaded:
            self._loaded.move_to_end(adapter)
            return None
        if adapter not in self._loading:
            task = self._loading[adapter] = asyncio.create_task(self._load(adapter))
            task.add_done_callback(lambda _: self._loading.pop(adapter, None))
        # A client that leaves must not end the load for the others.
        return await asyncio.shield(self._loading[adapter])

    async def _load(self, adapter: str) -> str | None:
        try:
            body, source = await self._fetch(adapter)
        except AdapterError as refusal:
            return str(refusal)
        size = self._sizes[adapter]
        await self._make_room(size)
        refusal = await self._server.load(adapter, body)
        if refusal:
            return refusal
        self._loaded[adapter] = size
        self._cold[source] += 1
        self._bytes[source] += len(body)
        return None

    async def _fetch(self, adapter: str) -> tuple[bytes | memoryview, str]:
        """The adapter's body and where it came from: a peer's host memory, else disk, and then others can have it from here."""
        controller = follower.controller()
        for reference in await controller.source.remote(adapter):
            try:
                return await asyncio.wait_for(asyncio.wrap_future(reference.future()), FETCH_S), "peer"
            except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
                logger.warning(
                    "cluster: adapter %s cannot be had from a peer (%s), it is read from disk",
                    adapter,
                    type(error).__name__,
                )
                await controller.lost.remote(adapter)
        body = await asyncio.to_thread(read_body, adapter, self._config.serve.adapter_root)
        reference = self._references[adapter] = ray.put(body)
        await controller.offer.remote(adapter, self._name, [reference], len(body))
        return body, "disk"

    async def _make_room(self, size: int) -> None:
        """Unload those that have not been asked for longest and that no request uses, until replicas.host_gib holds one more."""
        async with self._making_room:
            while sum(self._loaded.values()) + size > self._budget:
                free = next((a for a in self._loaded if not self._used[a]), None)
                if free is None:
                    return
                await self._unload(free)

    async def _unload(self, adapter: str) -> None:
        del self._loaded[adapter]
        self._references.pop(adapter, None)
        self._unloads += 1
        await self._server.unload(adapter)

    def _on_forget(self) -> None:
        asyncio.run_coroutine_threadsafe(self._forget(), self._loop)

    async def _forget(self) -> None:
        """Unload what no request uses."""
        async with self._making_room:
            for adapter in [a for a in self._loaded if not self._used[a]]:
                # A request may have come while another was unloaded.
                if adapter in self._loaded and not self._used[adapter]:
                    await self._unload(adapter)

    def _on_prefetch(self, placed: dict[str, list[str]]) -> None:
        for adapter in placed.get(self._name, ()):
            asyncio.run_coroutine_threadsafe(self._prefetch(adapter), self._loop)

    async def _prefetch(self, adapter: str) -> None:
        try:
            refusal = await self._ensure(adapter)
        except Exception as error:
            refusal = repr(error)
        if refusal:
            logger.warning("cluster: adapter %s was not copied in advance: %s", adapter, refusal)
