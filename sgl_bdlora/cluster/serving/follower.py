"""The published table in a process: one thread that asks the controller for changes; everyone here reads the same value."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sgl_bdlora.cluster.base import Adapter, Policy
from sgl_bdlora.cluster.config import ClusterConfig
from sgl_bdlora.cluster.costs import Costs, load_costs
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


def follow(
    on_prefetch: Callable[[dict[str, list[str]]], None] | None = None, on_forget: Callable[[], None] | None = None
) -> None:
    """Keep `live` up to date from now on; calling again is free. From the thread, on_prefetch is told what to copy where, and on_forget
    is called when the cluster is to go on as if it had just started."""
    if _started.acquire(blocking=False):
        threading.Thread(target=_follow, args=(on_prefetch, on_forget), daemon=True).start()


def take(news: dict, config: ClusterConfig, costs: Costs, anew: bool = False) -> None:
    """Put what the controller says into `live`. Where it has no table, as one that has just started, the last one stays in force,
    unless everything is to be forgotten (anew)."""
    if live.policy is None or news["policy"] != live.policy.name:
        live.policy = policy_of(config.with_(policy={"name": news["policy"]}), costs)
    if news["table"] or anew:
        live.table = RoutingTable.from_json(news["table"]) if news["table"] else None
    live.required = news["required"]


def _follow(on_prefetch, on_forget) -> None:
    import ray

    actor, stamp, forgotten = None, -1, None
    while True:
        try:
            if actor is None:
                actor = controller()
                config, adapters = ray.get(actor.setup.remote(), timeout=30)
                live.adapters = {a.name: a for a in adapters}
                costs = load_costs(config.costs)
            news = ray.get(actor.changes.remote(stamp), timeout=POLL_S + 30)
        except Exception as error:
            logger.warning("cluster: the controller does not answer (%s); the last table stays in force", error)
            # Another controller counts from 0 again.
            actor = forgotten = None
            time.sleep(1)
            continue
        if news["stamp"] != stamp:
            stamp = news["stamp"]
            anew = forgotten not in (None, news["forgotten"])
            take(news, config, costs, anew)
            if on_forget and anew:
                on_forget()
            forgotten = news["forgotten"]
            if on_prefetch and news["prefetch"]:
                on_prefetch(news["prefetch"])
