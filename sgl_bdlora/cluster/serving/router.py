"""The request router: which replica answers, by the published table and the policy's own pick.

Serve copies this module's class and functions by value into the processes that route, so what they share with others there has
to be reached through an imported module.
"""

from __future__ import annotations

import random
from collections import Counter

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from sgl_bdlora.cluster.base import Adapter, Policy, View
from sgl_bdlora.cluster.routing import RoutingTable
from sgl_bdlora.cluster.serving import follower


class TableRouter(RequestRouter):
    """Requests carry their adapter as multiplexed model id, and the keywords `avoid` (replicas to try last) and `prompt` (tokens)."""

    def initialize_state(self, **kwargs) -> None:
        # (request, replica) -> adapter for those that this router has sent and that have not ended.
        self._sent: dict[tuple[str, str], str] = {}
        self._healed: tuple[RoutingTable | None, frozenset[str], RoutingTable | None] = (None, frozenset(), None)
        follower.follow()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        follower.live.members = tuple(sorted(replica.unique_id for replica in self._replica_id_set))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is None:
            return [candidate_replicas]
        adapter = follower.live.adapters.get(pending_request.metadata.multiplexed_model_id)
        table = self._table_of(frozenset(by_name))
        avoid = set(pending_request.kwargs.get("avoid", ()))
        groups = [list(by_name)]
        if adapter is not None and table is not None and adapter.name in table.shares:
            prompt = pending_request.kwargs.get("prompt", 0)
            groups = ranked(table, follower.live.policy, adapter, prompt, self._view(by_name), random.random())
            known = set(table.replicas)
            groups.append([name for name in by_name if name not in known])
        groups = [*([n for n in group if n not in avoid] for group in groups), [n for n in by_name if n in avoid]]
        return [[by_name[name] for name in group] for group in groups if group]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result) -> None:
        metadata = pending_request.metadata
        sent = metadata.internal_request_id, replica_id.unique_id
        self._sent[sent] = metadata.multiplexed_model_id
        # Not on_request_completed: Serve may tell of a short request's end before it tells of its beginning.
        result.add_done_callback(lambda _: self._sent.pop(sent, None))

    def _table_of(self, alive: frozenset[str]) -> RoutingTable | None:
        """The published table without replicas that Serve no longer runs, which the controller may not have heard of yet."""
        table = follower.live.table
        if self._healed[:2] != (table, alive):
            healed = table
            if table is not None:
                dead = set(table.replicas) - alive
                healed = None if dead == set(table.replicas) else table.without(dead) if dead else table
            self._healed = (table, alive, healed)
        return self._healed[2]

    def _view(self, by_name: dict[str, RunningReplica]) -> View:
        loaded = {name: replica.routing_stats.get("loaded", ()) for name, replica in by_name.items()}
        queued = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        sent = [(replica, adapter) for (_, replica), adapter in list(self._sent.items())]
        return make_view(tuple(by_name), sent, queued, loaded, follower.live.adapters)


def make_view(names: tuple[str, ...], sent, queued: dict[str, int], loaded: dict, adapters: dict[str, Adapter]) -> View:
    """What a policy sees. sent: (replica, adapter) of requests on their way; queued: what replicas say they have; loaded: replica to
    adapters."""
    view = View.empty(names)
    running: dict[str, Counter] = {name: Counter() for name in names}
    for replica, adapter in list(sent):
        if replica in running:
            running[replica][adapter] += 1
    for s, name in enumerate(names):
        ranks = [adapters[a].rank for a in running[name] if a in adapters]
        view.requests[s] = max(running[name].total(), queued.get(name, 0))
        view.rows[s], view.width[s] = sum(ranks), max(ranks, default=0)
        view.loaded[s] = len(loaded.get(name, ()))
        for adapter in loaded.get(name, ()):
            view.holders.setdefault(adapter, set()).add(s)
    return view


def ranked(
    table: RoutingTable, policy: Policy, adapter: Adapter, prompt: int, view: View, draw: float
) -> list[list[str]]:
    """Replicas to try: the policy's pick, the adapter's other holders, the rest of the table."""
    try:
        first = policy.pick(adapter, prompt, table, view, draw)
    except (ValueError, KeyError):
        # A policy that looks for a replica that Serve has just taken away.
        first = table.sample(adapter.name, draw)
    others = [r for group in table.ranked(adapter.name, draw) for r in group if r != first]
    holders = [r for r in others if r in table.holders(adapter.name)]
    return [[first], holders, [r for r in others if r not in holders]]
