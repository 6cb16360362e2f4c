"""The controller: one named actor that plans every period, publishes the table and knows whose host memory has which adapter."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict

from sgl_bdlora.cluster.serving.control import Control, FrontReport, ReplicaReport

NAME = "bdlora-cluster-controller"
NAMESPACE = "bdlora-cluster"
# How long a question for changes waits for one.
POLL_S = 10.0


class Controller:
    """Its methods are what fronts and replicas call; a controller that was restarted learns everything again from their reports."""

    def __init__(self, config, adapters):
        self._control = Control(config, adapters)
        self._lock = threading.Lock()
        # Adapter -> (its owner, reference to its body, bytes), least recently asked for first.
        self._store: OrderedDict[str, tuple[str, list, int]] = OrderedDict()
        threading.Thread(target=self._plan_for_ever, daemon=True).start()

    def _plan_for_ever(self) -> None:
        while True:
            time.sleep(self._control.config.policy.period_s)
            with self._lock:
                self._control.tick()

    async def setup(self):
        """(configuration, adapters): what routers need to make the policy."""
        return self._control.config, self._control.adapters

    async def changes(self, known: int) -> dict:
        """The table and what goes with it, as soon as it is another than the known one, at the latest after POLL_S."""
        end = time.monotonic() + POLL_S
        while self._control.stamp == known and time.monotonic() < end:
            await asyncio.sleep(0.05)
        with self._lock:
            control = self._control
            table = control.table.to_json() if control.table else None
            return {
                "stamp": control.stamp, "table": table, "prefetch": control.prefetch, "required": control.required,
                "policy": control.config.policy.name, "forgotten": control.forgotten,
            }  # fmt: skip

    async def use_policy(self, name: str) -> None:
        """See Control.use_policy; bodies in the object store are forgotten too."""
        with self._lock:
            self._control.use_policy(name)
        self._store.clear()

    async def front_says(self, report: FrontReport) -> None:
        with self._lock:
            self._control.front_says(report)

    async def replica_says(self, name: str, report: ReplicaReport) -> None:
        with self._lock:
            self._control.replica_says(name, report)

    async def status(self) -> dict:
        with self._lock:
            return {**self._control.status(), "store_bytes": sum(size for _, _, size in self._store.values())}

    async def offer(self, adapter: str, owner: str, reference: list, size: int) -> None:
        """Keep a reference (in a list, or Ray would fetch it) to an adapter's body in the owner's object store."""
        self._store[adapter] = (owner, reference, size)
        self._store.move_to_end(adapter)
        budget = self._control.config.serve.store_gib * 2**30
        while len(self._store) > 1 and sum(size for _, _, size in self._store.values()) > budget:
            self._store.popitem(last=False)

    async def source(self, adapter: str) -> list:
        """[reference] to the adapter's body, or []."""
        if adapter not in self._store:
            return []
        self._store.move_to_end(adapter)
        return self._store[adapter][1]

    async def lost(self, adapter: str) -> None:
        """The body could not be fetched: its owner is gone."""
        self._store.pop(adapter, None)
