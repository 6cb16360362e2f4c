"""The published table in a process: one thread that asks the controller for changes; everyone here reads the same value."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sgl_bdlora.cluster.base import Adapter, Policy
from sgl_bdlora.cluster.costs import load_costs
from sgl_bdlora.cluster.routing import RoutingTable
from sgl_bdlora.cluster.serving.controller import NAME, NAMESPACE, POLL_S
from sgl_bdlora.cluster.simulate import policy_of

logger = logging.getLogger(__name__)


@dataclass
class Live:
    """table and policy are None until the controller has answered. members: the running replicas, which this process's router knows."""

    table: RoutingTable | None = None
    policy: Policy | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    required: int = 0
    members: tuple[str, ...] | None = None


live = Live()
_started = threading.Lock()


def controller():
    """The controller's handle. ValueError while there is none."""
    import ray

    return ray.get_actor(NAME, namespace=NAMESPACE)


def follow(on_prefetch: Callable[[dict[str, list[str]]], None] | None = None) -> None:
    """Keep `live` up to date from now on; calling again is free. on_prefetch is told, from the thread, what to copy where."""
    if _started.acquire(blocking=False):
        threading.Thread(target=_follow, args=(on_prefetch,), daemon=True).start()


def _follow(on_prefetch) -> None:
    import ray

    actor, stamp = None, -1
    while True:
        try:
            if actor is None:
                actor = controller()
                config, adapters = ray.get(actor.setup.remote(), timeout=30)
                live.adapters = {a.name: a for a in adapters}
                live.policy = policy_of(config, load_costs(config.costs))
            news = ray.get(actor.changes.remote(stamp), timeout=POLL_S + 30)
        except Exception as error:
            logger.warning("cluster: the controller does not answer (%s); the last table stays in force", error)
            actor = None
            time.sleep(1)
            continue
        if news["stamp"] != stamp:
            stamp = news["stamp"]
            live.table = RoutingTable.from_json(news["table"]) if news["table"] else None
            live.required = news["required"]
            if on_prefetch and news["prefetch"]:
                on_prefetch(news["prefetch"])
