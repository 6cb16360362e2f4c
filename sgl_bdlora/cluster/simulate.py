"""Discrete-event simulation of a cluster: the policy's own code routes and plans, replicas are simulated (replica.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np

from sgl_bdlora.cluster.base import Adapter, Policy, Problem, Replica, View
from sgl_bdlora.cluster.config import ClusterConfig
from sgl_bdlora.cluster.costs import Costs, Load, load_costs, operating_points
from sgl_bdlora.cluster.demand import Demand
from sgl_bdlora.cluster.policies import make_policy
from sgl_bdlora.cluster.replica import Ledger, SimReplica
from sgl_bdlora.cluster.routing import RoutingTable, moves
from sgl_bdlora.cluster.trace import Trace, make_adapters, make_trace, mean_lengths

# Events of one moment happen in this order.
STEP, FETCHED, LOADED, BACK, FAIL, PLAN = range(6)

# After the last arrival the simulation goes on for so long; what has not finished then is counted as unfinished.
DRAIN_S = 30.0


@dataclass(frozen=True)
class Result:
    """Arrays are indexed by request, in order of arrival. first and finish are -1 where they did not come; counted: after the warm-up.

    arrived = finished + shed + failed + unfinished.
    """

    config: ClusterConfig
    trace: Trace
    first: np.ndarray
    finish: np.ndarray
    shed: int
    failed: int
    retried: int
    loads: dict[str, int]
    bytes_moved: int
    plans: int
    moves: int
    most_moves: int
    busy_s: np.ndarray
    served: np.ndarray
    ends_at: float
    wall_s: float

    @property
    def finished(self) -> np.ndarray:
        return self.finish >= 0

    @property
    def unfinished(self) -> int:
        return len(self.trace) - int(self.finished.sum()) - self.shed - self.failed

    @property
    def counted(self) -> np.ndarray:
        return self.trace.arrival >= self.config.workload.warmup_s

    def ttft_ms(self) -> np.ndarray:
        """Of counted requests, infinite where no token came."""
        ms = np.where(self.first >= 0, 1000 * (self.first - self.trace.arrival), np.inf)
        return ms[self.counted]

    def tpot_ms(self) -> np.ndarray:
        """Of counted requests; 0 for a single token, infinite where the request did not finish."""
        ms = 1000 * (self.finish - self.first) / np.maximum(1, self.trace.output - 1)
        return np.where(self.finished, ms, np.inf)[self.counted]

    def attained(self) -> np.ndarray:
        """Of counted requests: whether each kept the SLO."""
        slo = self.config.slo
        return (self.ttft_ms() <= slo.ttft_ms) & (self.tpot_ms() <= slo.tpot_ms)


def cluster_of(config: ClusterConfig, names: Sequence[str] = ()) -> tuple[Replica, ...]:
    """names: of the replicas, by default r0, r1, ..."""
    r = config.replicas
    pool, host = int(r.pool_gib * 2**30), int(r.host_gib * 2**30)
    return tuple(Replica(name, pool, host, r.max_rank) for name in names or [f"r{i}" for i in range(r.count)])


def points_of(config: ClusterConfig, costs: Costs) -> dict[int, float]:
    """Operating points, tokens a second by rank, for this workload's lengths."""
    prompt, output = mean_lengths(config.workload)
    # A full batch has at most as many distinct adapters as are a replica's even part.
    distinct = min(config.replicas.max_running, -(-config.adapters.count // config.replicas.count))
    load = Load(prompt, output, config.replicas.max_running, distinct)
    return operating_points(costs, config.adapters.ranks, config.slo.tpot_ms, load)


def policy_of(config: ClusterConfig, costs: Costs) -> Policy:
    output = mean_lengths(config.workload)[1]
    return make_policy(config.policy.name, costs, config.slo.tpot_ms, output, config.replicas.max_running)


def in_equal_use(problem: Problem) -> Problem:
    """The same as if every adapter took as much of a replica's time: what a cluster that knows nothing plans with."""
    return replace(problem, demand=np.array([problem.points[a.rank] / len(problem.adapters) for a in problem.adapters]))


def simulate(
    config: ClusterConfig, progress: Callable[[float], None] | None = None, trace: Trace | None = None,
    adapters: tuple[Adapter, ...] | None = None, names: Sequence[str] = (), anew: bool = False,
) -> Result:  # fmt: skip
    """Run a workload through a cluster. progress is told the simulated seconds at each plan. names: of the replicas, which some policies
    hash. anew: replicas begin empty and the first plan as if all adapters were in equal use, as in a real cluster; otherwise it knows
    the first period's demand, and what it places is loaded.

    Raises PlacementError for adapters that fit nowhere and ValueError for an SLO that one request alone would miss.
    """
    return Simulation(config, progress, trace, adapters, names, anew).run()


class Simulation:
    def __init__(self, config: ClusterConfig, progress=None, trace=None, adapters=None, names=(), anew=False):
        self._config, self._progress, self._anew = config, progress, anew
        costs = self._costs = load_costs(config.costs)
        self._adapters = adapters if adapters is not None else make_adapters(config.adapters, config.workload.seed)
        self._trace = trace if trace is not None else make_trace(config.workload, len(self._adapters))
        self._points = points_of(config, costs)
        self._policy = policy_of(config, costs)
        self._specs = cluster_of(config, names)
        self._tokens = sum(mean_lengths(config.workload))
        self._demand = Demand(config.policy.ema, config.policy.windows)
        self._view = View.empty(tuple(r.name for r in self._specs))
        n = len(self._trace)
        self._ledger = Ledger([-1.0] * n, [-1.0] * n, loads_from={"host": 0, "peer": 0, "disk": 0})
        self._events: list = []
        self._order = 0
        self._index = {r.name: i for i, r in enumerate(self._specs)}
        self._by_name = {a.name: a for a in self._adapters}
        # A load that began before its replica died is ignored.
        self._generation = [0] * len(self._specs)
        self._replicas = [
            SimReplica(
                i,
                config.replicas,
                costs,
                self._view,
                self._ledger,
                self._push_step,
                self._push_fetched,
                self._push_loaded,
                self._fetch,
            )
            for i in range(len(self._specs))
        ]
        self._seen = np.zeros(len(self._adapters), dtype=np.int64)
        self._plans = self._moves = self._most_moves = self._failed = self._retried = self._shed = 0
        self._served = np.zeros(len(self._specs), dtype=np.int64)
        self._retries: set[int] = set()
        self._table: RoutingTable | None = None

    def _push(self, when: float, kind: int, replica: int, what) -> None:
        self._order += 1
        heappush(self._events, (when, kind, self._order, replica, what))

    def _push_step(self, when: float, replica: int, token: int) -> None:
        self._push(when, STEP, replica, token)

    def _push_fetched(self, when: float, replica: int, adapter: Adapter) -> None:
        self._push(when, FETCHED, replica, (self._generation[replica], adapter))

    def _push_loaded(self, when: float, replica: int, adapter: Adapter) -> None:
        self._push(when, LOADED, replica, (self._generation[replica], adapter))

    def _fetch(self, adapter: Adapter, replica: int, now: float) -> str:
        """Where a replica gets an adapter from that it has not in its own host memory."""
        alive = self._view.alive
        has = any(r.has_in_host(adapter, now) for i, r in enumerate(self._replicas) if i != replica and alive[i])
        return "peer" if has else "disk"

    def run(self) -> Result:
        began = time.perf_counter()
        config, trace, events, view = self._config, self._trace, self._events, self._view
        period = config.policy.period_s
        self._start(int(np.searchsorted(trace.arrival, period)))
        end = config.workload.duration_s
        for k in range(1, int(end / period) + 1):
            if k * period < end:
                self._push(k * period, PLAN, -1, None)
        for failure in config.failures:
            self._push(failure.at_s, FAIL, failure.replica, failure.back_s)
        rng = np.random.default_rng((config.workload.seed, 3))
        draws = rng.random((len(trace), 2)).tolist()
        times, prompts, outputs = trace.arrival.tolist(), trace.prompt.tolist(), trace.output.tolist()
        which = trace.adapter.tolist()
        self._lengths = (prompts, outputs)
        infinity, now, limit = float("inf"), 0.0, end + DRAIN_S
        adapters, replicas, policy, index, seen = self._adapters, self._replicas, self._policy, self._index, self._seen
        i, n = 0, len(trace)
        next_arrival = times[0] if n else infinity
        while events or i < n:
            if i < n and (not events or next_arrival < events[0][0]):
                now = next_arrival
                a = which[i]
                seen[a] += 1
                draw, luck = draws[i]
                if (config.policy.shed and self._table.sheds(luck)) or not view.alive.any():
                    self._shed += 1
                else:
                    adapter = adapters[a]
                    r = index[policy.pick(adapter, prompts[i], self._table, view, draw)]
                    self._served[r] += 1
                    replicas[r].submit(now, i, adapter, prompts[i], outputs[i])
                i += 1
                next_arrival = times[i] if i < n else infinity
                continue
            when, kind, _, r, what = heappop(events)
            if when > limit:
                break
            now = when
            if kind == STEP:
                replicas[r].wake(now, what)
            elif kind in (FETCHED, LOADED):
                generation, adapter = what
                if generation == self._generation[r]:
                    (replicas[r].arrive if kind == LOADED else replicas[r].fetched)(now, adapter)
            elif kind == PLAN:
                self._plan(now)
            elif kind == FAIL:
                self._die(now, r, what, draws, which)
            else:
                view.alive[r] = True
                self._plan(now, observe=False)
        ledger, outside = self._ledger, self._costs.outside_ms / 1000
        first, finish = (np.where(at >= 0, at + outside, -1.0) for at in map(np.array, (ledger.first, ledger.finish)))
        return Result(
            config=config, trace=trace, first=first, finish=finish, shed=self._shed,
            failed=self._failed, retried=self._retried, loads=dict(ledger.loads_from), bytes_moved=ledger.bytes_moved,
            plans=self._plans, moves=self._moves, most_moves=self._most_moves,
            busy_s=np.array([r.busy_s for r in replicas]), served=self._served, ends_at=min(now, limit),
            wall_s=time.perf_counter() - began,
        )  # fmt: skip

    def _start(self, first_window: int) -> None:
        """The first plan knows the demand of the first period, as after a restart; what it places is loaded, busiest first."""
        if self._anew:
            self._table, self._plans = self._policy.plan(in_equal_use(self._problem()), None), 1
            return
        counts = np.bincount(self._trace.adapter[:first_window], minlength=len(self._adapters))
        self._observe(counts)
        self._table = self._policy.plan(self._problem(), None)
        self._plans = 1
        for k, a in enumerate(np.argsort(-counts, kind="stable").tolist()):
            adapter = self._adapters[a]
            # Policies that may send a request anywhere start with each adapter on one replica, round robin.
            round_robin = [self._specs[k % len(self._specs)].name]
            names = self._table.holders(adapter.name) if self._policy.places else round_robin
            for name in names:
                self._replicas[self._index[name]].preload(adapter)

    def _observe(self, counts: np.ndarray) -> None:
        tokens = {a.name: float(c) * self._tokens for a, c in zip(self._adapters, counts.tolist(), strict=True) if c}
        self._demand.observe(tokens, self._config.policy.period_s)

    def _problem(self) -> Problem:
        alive = tuple(r for r, up in zip(self._specs, self._view.alive, strict=True) if up)
        policy = self._config.policy
        return Problem(
            self._adapters, alive, self._demand.forecast([a.name for a in self._adapters]), self._points, policy.max_moves,
            policy.slack, self._config.workload.seed,
        )  # fmt: skip

    def _plan(self, now: float, observe: bool = True) -> None:
        if observe:
            self._observe(self._seen)
            self._seen[:] = 0
            if self._progress:
                self._progress(now)
        if not self._view.alive.any():
            return
        before, self._table = self._table, self._policy.plan(self._problem(), self._table)
        self._plans += 1
        if self._table.shares == before.shares:
            return
        if not self._policy.places:
            return
        new = moves(before, self._table)
        self._moves += len(new)
        self._most_moves = max(self._most_moves, len(new))
        for name, replica in sorted(new):
            self._replicas[self._index[replica]].prefetch(
                self._by_name[name], now, self._config.replicas.peer_gb_s * 1e9
            )

    def _die(self, now: float, r: int, back_s: float, draws: list, which: list) -> None:
        """A replica dies with its memory; requests without a first token are sent to another one, once."""
        if not self._view.alive[r]:
            return
        lost = self._replicas[r].in_flight()
        self._generation[r] += 1
        self._replicas[r].reset()
        self._view.alive[r] = False
        self._push(now + back_s, BACK, r, None)
        if self._view.alive.any():
            self._table = self._table.without({self._specs[r].name} & set(self._table.replicas))
        prompts, outputs = self._lengths
        for i in lost:
            if self._ledger.first[i] >= 0 or i in self._retries or not self._view.alive.any():
                self._failed += 1
                continue
            self._retries.add(i)
            self._retried += 1
            adapter = self._adapters[which[i]]
            chosen = self._index[self._policy.pick(adapter, prompts[i], self._table, self._view, draws[i][0])]
            self._served[chosen] += 1
            self._replicas[chosen].submit(now, i, adapter, prompts[i], outputs[i])
