"""The deployment of replicas: each one server process, adapters loaded when they are asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine

import httpx
import numpy as np
import ray
from ray import serve

from sgl_bdlora.adapters import AdapterError
from sgl_bdlora.adapters.root import confined
from sgl_bdlora.cluster.config import ClusterConfig
from sgl_bdlora.cluster.serving import follower
from sgl_bdlora.cluster.serving.catalog import read_body
from sgl_bdlora.cluster.serving.control import ReplicaReport
from sgl_bdlora.cluster.serving.errors import ReplicaBroken, error_body
from sgl_bdlora.cluster.serving.holding import Holding
from sgl_bdlora.cluster.serving.server import ReplicaServer

logger = logging.getLogger("ray.serve")

REPORT_S = 1.0
FETCH_S = 60.0


class Backend:
    """config: the cluster's. device: gpu or cpu. sizes: adapter to bytes."""

    async def __init__(self, config: ClusterConfig, device: str, sizes: dict[str, int]):
        context = serve.get_replica_context()
        self._config, self._sizes = config, sizes
        self._name = context.replica_id.unique_id
        self._cold, self._bytes, self._running, self._received = Counter(), Counter(), 0, 0
        self._offering = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()
        self._stopping = False
        self._server = ReplicaServer(config, device, context.rank.local_rank)
        try:
            await self._server.ready()
        except BaseException:
            self._server.stop()
            raise
        budget = int(config.replicas.host_gib * 2**30)
        self._holding = Holding(self._load, self._server.unload, sizes, budget)
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
        return {"loaded": list(self._holding.loaded)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve gives to the autoscaling policy (scaling.py)."""
        return {"required": float(follower.live.required)}

    def _report_for_ever(self) -> None:
        actor = None
        while True:
            try:
                actor = actor or follower.controller()
                report = ReplicaReport(
                    ray.util.get_node_ip_address(), os.getpid(), self._server.pid, self._running, tuple(self._holding.loaded),
                    tuple(self._holding.waiting()), sum(self._holding.loaded.values()), dict(self._cold), dict(self._bytes),
                    self._holding.unloads, self._received,
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
        self._received += 1
        try:
            if adapter is None:
                async for piece in self._ask(route, body):
                    yield piece
                return
            async with self._holding.using(adapter) as refusal:
                if refusal:
                    yield 400, "application/json", error_body(refusal)
                    return
                async for piece in self._ask(route, body):
                    yield piece
        except httpx.HTTPError as error:
            raise ReplicaBroken(self._name, f"its server broke off: {error!r}") from None
        finally:
            self._running -= 1

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

    async def _load(self, adapter: str) -> str | None:
        """Load it from a peer's host memory, else from disk; why the server refuses it, if it does."""
        body = await self._from_peer(adapter)
        if body is not None:
            try:
                refusal = await self._server.load_body(adapter, body)
            except OSError as error:
                refusal = str(error)
            if refusal is None:
                self._count("peer", len(body))
                return None
            logger.warning("cluster: adapter %s from a peer: %s; it is read from disk", adapter, refusal)
        root = self._config.serve.adapter_root
        try:
            refusal = await self._server.load(adapter, confined(adapter, adapter, root))
        except AdapterError as error:
            return str(error)
        if refusal is None:
            self._count("disk", self._sizes[adapter])
            self._start(self._offer(adapter))
        return refusal

    def _count(self, source: str, size: int) -> None:
        self._cold[source] += 1
        self._bytes[source] += size

    async def _from_peer(self, adapter: str) -> np.ndarray | None:
        """Its body; None where no peer has it, or the controller does not answer: it is read from disk then."""
        try:
            controller = follower.controller()
            for reference in await controller.source.remote(adapter):
                try:
                    return await asyncio.wait_for(asyncio.wrap_future(reference.future()), FETCH_S)
                except (ray.exceptions.RayError, asyncio.TimeoutError):
                    await controller.lost.remote(adapter)
                    raise
        except (ValueError, ray.exceptions.RayError, asyncio.TimeoutError) as error:
            words = "cluster: adapter %s cannot be had from a peer (%s), it is read from disk"
            logger.warning(words, adapter, type(error).__name__)
        return None

    async def _offer(self, adapter: str) -> None:
        """Put its body where peers can have it, unless it is there; one at a time, because nobody waits for it."""
        try:
            async with self._offering:
                controller = follower.controller()
                if await controller.source.remote(adapter):
                    return
                body = await asyncio.to_thread(read_body, adapter, self._config.serve.adapter_root)
                reference = await asyncio.to_thread(ray.put, body)
                # The controller's reference keeps it.
                await controller.offer.remote(adapter, self._name, [reference], len(body))
        except Exception as error:
            logger.warning("cluster: adapter %s is not offered to peers: %r", adapter, error)

    def _start(self, work: Coroutine) -> None:
        """Run it beside the rest; the event loop alone would not keep it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_forget(self) -> None:
        asyncio.run_coroutine_threadsafe(self._holding.forget(), self._loop)

    def _on_prefetch(self, placed: dict[str, list[str]]) -> None:
        for adapter in placed.get(self._name, ()):
            asyncio.run_coroutine_threadsafe(self._prefetch(adapter), self._loop)

    async def _prefetch(self, adapter: str) -> None:
        try:
            refusal = await self._holding.copy_ahead(adapter)
        except Exception as error:
            refusal = repr(error)
        if refusal:
            logger.warning("cluster: adapter %s was not copied in advance: %s", adapter, refusal)
