"""What the controller knows and decides, as plain code: demand, members, plans, what to prefetch, how many replicas are needed."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from sgl_bdlora.cluster.base import Adapter, PlacementError, Problem, Replica
from sgl_bdlora.cluster.config import ClusterConfig
from sgl_bdlora.cluster.costs import load_costs
from sgl_bdlora.cluster.demand import Demand
from sgl_bdlora.cluster.placement import required_replicas
from sgl_bdlora.cluster.routing import RoutingTable, moves
from sgl_bdlora.cluster.simulate import cluster_of, in_equal_use, points_of, policy_of
from sgl_bdlora.cluster.trace import mean_lengths

# Upper ends of the buckets of the time to the first token, in seconds.
TTFT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PLANS_KEPT = 60
# A replica that Serve no longer runs still reports while it ends; what it did counts as final after so long without a word.
GONE_S = 60.0
# How long the first plan waits for replicas that are still starting, so that it need not be moved away from.
SETTLE_S = 60.0


@dataclass
class FrontReport:
    """What a front has seen since its last one. members: the replicas that Serve says run, None if it does not know yet.

    arrived: adapter (None: the base) to requests. answered, tokens: requests whose length is known, and their prompt and output tokens.
    outcomes: word to requests. ttft: requests by bucket, the last one for longer ones.
    """

    members: tuple[str, ...] | None = None
    arrived: Counter = field(default_factory=Counter)
    answered: int = 0
    tokens: int = 0
    outcomes: Counter = field(default_factory=Counter)
    ttft: list[int] = field(default_factory=lambda: [0] * (len(TTFT_BUCKETS) + 1))
    ttft_seconds: float = 0.0


@dataclass
class ReplicaReport:
    """What a replica says of itself, since it started.

    pid: of its Ray process; server_pid: of its server. loading: adapters that are being loaded or wait for their turn.
    cold_loads and bytes_moved: by source, "peer" or "disk". received: requests that were routed to it.
    """

    node: str
    pid: int
    server_pid: int
    running: int
    loaded: tuple[str, ...]
    loading: tuple[str, ...]
    loaded_bytes: int
    cold_loads: dict[str, int]
    bytes_moved: dict[str, int]
    unloads: int
    received: int = 0


class Control:
    """config and adapters as for a simulation; clock gives seconds. Raises PlacementError for an adapter that no replica can hold and
    ValueError for an SLO that one request alone would miss."""

    def __init__(
        self, config: ClusterConfig, adapters: tuple[Adapter, ...], clock: Callable[[], float] = time.monotonic
    ):
        self.config = config.with_(adapters={"count": len(adapters), "ranks": {a.rank: 1.0 for a in adapters}})
        self.adapters, self._clock = adapters, clock
        self._costs = load_costs(config.costs)
        self._points = points_of(self.config, self._costs)
        self._spec = cluster_of(self.config)[0]
        self._members: tuple[str, ...] = ()
        self._first_member: float | None = None
        self._labels: dict[str, str] = {}
        # Of replicas that run or ran until lately, and when they came.
        self._reports: dict[str, ReplicaReport] = {}
        self._reported: dict[str, float] = {}
        self._gone = {"cold_loads": Counter(), "bytes_moved": Counter(), "unloads": 0}
        self._wanted: deque[tuple[float, int]] = deque()
        self._plans: deque[dict] = deque(maxlen=PLANS_KEPT)
        self.table: RoutingTable | None = None
        self.prefetch: dict[str, list[str]] = {}
        self.required = config.replicas.count
        # Larger than any of a controller that ran before this one.
        self.stamp = int(time.time() * 1000)
        self._versions = 0
        # How often everything that was learnt has been forgotten.
        self.forgotten = 0
        self._learn_anew()
        self.planned = self.moved = self.most_moved = self.healed = 0
        self.problem: str | None = None
        self.totals = FrontReport()
        self._problem((self._spec,)).check_adapters()

    def _learn_anew(self) -> None:
        self._policy = policy_of(self.config, self._costs)
        self._demand = Demand(self.config.policy.ema, self.config.policy.windows)
        self._mean_tokens = sum(mean_lengths(self.config.workload))
        self._window = self._clock()
        self._arrived: Counter[str] = Counter()

    def use_policy(self, name: str) -> None:
        """Plan by another policy, as if the cluster had just started: the demand is forgotten, and replicas unload every adapter that no
        request uses. Counters go on. Raises ConfigError for an unknown name."""
        self.config = self.config.with_(policy={"name": name})
        self._learn_anew()
        self.table = None
        self.forgotten += 1
        self.stamp += 1
        self.plan()

    def front_says(self, report: FrontReport) -> None:
        for name, count in report.arrived.items():
            if name is not None:
                self._arrived[name] += count
        if report.answered:
            # Weighted as if about a hundred requests had been seen before.
            part = report.answered / (report.answered + 100)
            self._mean_tokens += part * (report.tokens / report.answered - self._mean_tokens)
        totals = self.totals
        totals.arrived.update(report.arrived)
        totals.outcomes.update(report.outcomes)
        totals.answered += report.answered
        totals.tokens += report.tokens
        totals.ttft = [a + b for a, b in zip(totals.ttft, report.ttft, strict=True)]
        totals.ttft_seconds += report.ttft_seconds
        if report.members is not None:
            self.members_are(report.members)

    def replica_says(self, name: str, report: ReplicaReport) -> None:
        self._reports[name] = report
        self._reported[name] = self._clock()

    def members_are(self, names: Iterable[str]) -> None:
        """Heal the table of replicas that are gone, plan for those that came."""
        names = tuple(sorted(names))
        if names == self._members:
            return
        gone, came = set(self._members) - set(names), set(names) - set(self._members)
        self._members = names
        for name in gone:
            self._labels.pop(name, None)
        free = (f"r{i}" for i in range(len(names)) if f"r{i}" not in self._labels.values())
        for name in sorted(came):
            self._labels[name] = next(free)
        if self.table is not None and names:
            dead = set(self.table.replicas) - set(names)
            if dead == set(self.table.replicas):
                self.table = None
            elif dead:
                self.table = self.table.without(dead)
                self._versions = self.table.version
                self.healed += 1
                self.stamp += 1
        if names and self._first_member is None:
            self._first_member = self._clock()
        if came:
            self.plan()

    def tick(self) -> None:
        """The end of a period: learn the demand and plan."""
        now = self._clock()
        tokens = {name: count * self._mean_tokens for name, count in self._arrived.items()}
        self._demand.observe(tokens, max(now - self._window, 1e-3))
        self._arrived.clear()
        self._window = now
        self._part_with_the_gone(now)
        self.plan()

    def _part_with_the_gone(self, now: float) -> None:
        for name in set(self._reports) - set(self._members):
            if now - self._reported[name] > GONE_S:
                del self._reported[name]
                report = self._reports.pop(name)
                for key in ("cold_loads", "bytes_moved"):
                    self._gone[key].update(getattr(report, key))
                self._gone["unloads"] += report.unloads

    def _problem(self, replicas: tuple[Replica, ...]) -> Problem:
        policy = self.config.policy
        demand = self._demand.forecast([a.name for a in self.adapters])
        return Problem(self.adapters, replicas, demand, self._points, policy.max_moves, policy.slack)

    def plan(self) -> None:
        """A new table; the old one stays where there is no placement, and status says why."""
        if not self._members or self._unsettled():
            return
        spec = self._spec
        problem = self._problem(
            tuple(Replica(n, spec.pool_bytes, spec.host_bytes, spec.max_rank) for n in self._members)
        )
        self._need(required_replicas(problem, self.config.policy.headroom))
        before = self.table
        if before is None and not problem.demand.any():
            problem = in_equal_use(problem)
        try:
            table = self._policy.plan(problem, before)
            self.problem = None
        except PlacementError as error:
            self.problem = str(error)
            return
        self.planned += 1
        self.stamp += 1
        new = moves(before, table) if self._policy.places else set()
        if before is None and self._versions:
            table = replace(table, version=self._versions + 1)
        self.table, self._versions = table, table.version
        self.moved += len(new)
        self.most_moved = max(self.most_moved, len(new))
        use = dict(zip((a.name for a in self.adapters), problem.utilisation(), strict=True))
        self.prefetch = {}
        for adapter, replica in sorted(new, key=lambda pair: -use[pair[0]]):
            self.prefetch.setdefault(replica, []).append(adapter)
        self._plans.append({
            "version": table.version, "at": time.time(), "moves": len(new), "admitted": table.admitted,
            "utilisation": float(problem.utilisation().sum()), "required": self.required,
        })  # fmt: skip

    def _unsettled(self) -> bool:
        few = self.table is None and len(self._members) < self.config.replicas.count
        return few and self._clock() - self._first_member < SETTLE_S

    def _need(self, wanted: int) -> None:
        """Up at once; down to the most that was wanted in the last downscale_s."""
        serve, least = self.config.serve, self.config.replicas.count
        now = self._clock()
        wanted = min(max(wanted, least), max(serve.max_replicas, least))
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - serve.downscale_s:
            self._wanted.popleft()
        self.required = max(count for _, count in self._wanted)

    def status(self) -> dict:
        """Everything for /cluster/status, as JSON values."""
        use = dict(
            zip((a.name for a in self.adapters), self._problem((self._spec,)).utilisation().tolist(), strict=True)
        )
        demand = dict(
            zip(
                (a.name for a in self.adapters),
                self._demand.forecast([a.name for a in self.adapters]).tolist(),
                strict=True,
            )
        )
        shares = self.table.shares if self.table else {}
        ranks = {a.name: a.rank for a in self.adapters}
        replicas = []
        for name in sorted(self._members, key=lambda n: int(self._labels[n][1:])):
            placed = {a: part for a, parts in shares.items() for replica, part in parts if replica == name}
            report = self._reports.get(name)
            replicas.append({
                "name": self._labels[name], "id": name, "node": report.node if report else None, "pid": report.pid if report else None,
                "server_pid": report.server_pid if report else None,
                "load": float(sum(part * use[a] for a, part in placed.items())), "placed": len(placed),
                "bins": {str(rank): count for rank, count in sorted(Counter(ranks[a] for a in placed).items())},
                "running": report.running if report else 0, "received": report.received if report else 0,
                "loaded": sorted(report.loaded) if report else [],
                "loading": sorted(report.loading) if report else [],
                "loaded_bytes": report.loaded_bytes if report else 0,
            })  # fmt: skip
        totals = {key: Counter(self._gone[key]) for key in ("cold_loads", "bytes_moved")}
        for report in self._reports.values():
            for key, total in totals.items():
                total.update(getattr(report, key))
        seen = self.totals
        return {
            "version": self.table.version if self.table else 0, "policy": self.config.policy.name, "period_s": self.config.policy.period_s,
            "max_moves": self.config.policy.max_moves, "replicas": replicas, "required_replicas": self.required,
            "max_replicas": max(self.config.serve.max_replicas, self.config.replicas.count),
            "admitted": self.table.admitted if self.table else 1.0, "shedding": self.config.policy.shed, "problem": self.problem,
            "plans": self.planned, "moves": self.moved, "most_moves": self.most_moved, "heals": self.healed, "history": list(self._plans),
            "cold_loads": {source: totals["cold_loads"][source] for source in ("peer", "disk")},
            "bytes_moved": {source: totals["bytes_moved"][source] for source in ("peer", "disk")},
            "unloads": self._gone["unloads"] + sum(r.unloads for r in self._reports.values()),
            "transfer": "object store", "mean_tokens": self._mean_tokens,
            "requests": {"arrived": sum(seen.arrived.values()), **{k: seen.outcomes[k] for k in OUTCOMES}},
            "ttft": {"buckets": list(TTFT_BUCKETS), "counts": list(seen.ttft), "seconds": seen.ttft_seconds},
            "adapters": [
                {
                    "name": a.name, "rank": a.rank, "bytes": a.size, "requests": seen.arrived[a.name], "demand": demand[a.name],
                    "shares": {self._labels.get(replica, replica): part for replica, part in shares.get(a.name, ())},
                }
                for a in self.adapters
            ],
        }  # fmt: skip


# done: answered; refused: the server's own 4xx; shed: 429; failed: 503; broken: a stream that ended early; retried: sent twice;
# left: the client went away.
OUTCOMES = ("done", "refused", "shed", "failed", "broken", "retried", "left")
