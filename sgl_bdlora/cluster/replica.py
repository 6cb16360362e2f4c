"""One simulated replica: continuous batching by the cost model, adapters that take turns in a pool, loads from host, peer or disk."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from sgl_bdlora.cluster.base import Adapter, View
from sgl_bdlora.cluster.config import Replicas
from sgl_bdlora.cluster.costs import Costs

IDLE, PREFILL, DECODE, INSTALL = range(4)


@dataclass
class Ledger:
    """What the requests and loads of a simulation came to; lists are indexed by request. Times in seconds, -1 before they are known."""

    first: list[float]
    finish: list[float]
    loads: int = 0
    loads_from: dict[str, int] | None = None
    bytes_moved: int = 0
    finished: int = 0


class SimReplica:
    """Prefill goes before decode and takes whole prompts up to prefill_tokens; between changes of the batch decode steps are one event.
    An adapter new to the replica is installed between two steps, while all requests wait.

    push(time, index, token) asks for wake(token) then, on_loaded(time, index, adapter) for arrive(adapter), on_fetched likewise for
    fetched(adapter); fetch(adapter, index, now) says where it comes from, "peer" or "disk".
    """

    __slots__ = (
        "_blocked", "_coming", "_context", "_costs", "_counts", "_draining", "_fetch", "_fetched", "_host", "_host_used", "_index", "_leap",
        "_ledger", "_link_free", "_loading", "_network_free", "_on_fetched", "_on_loaded", "_pool", "_pool_used", "_prefill", "_push",
        "_ranks", "_ready", "_rows", "_running", "_started", "_starved", "_state", "_step", "_step_s", "_token", "_use", "_view",
        "busy_s", "host_bytes", "limits", "pool_bytes",
    )  # fmt: skip

    def __init__(
        self, index: int, limits: Replicas, costs: Costs, view: View, ledger: Ledger,
        push: Callable, on_fetched: Callable, on_loaded: Callable, fetch: Callable,
    ):  # fmt: skip
        self._index, self.limits, self._costs, self._view, self._ledger = index, limits, costs, view, ledger
        self._push, self._on_fetched, self._on_loaded, self._fetch = push, on_fetched, on_loaded, fetch
        self.pool_bytes = int(limits.pool_gib * 2**30)
        self.host_bytes = int(limits.host_gib * 2**30)
        self._token = 0
        self.busy_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Empty, as after a start."""
        self._token += 1
        self._state, self._step, self._leap, self._started, self._step_s = IDLE, 0, 0, 0.0, 0.0
        self._running: list = []  # heap of (step at which it ends, request, adapter, tokens at its end)
        self._context = 0  # tokens of the running requests
        self._prefill: list = []
        self._ready: deque = deque()  # (request, adapter, prompt, output, since when)
        self._blocked: dict[Adapter, list] = {}  # requests whose adapter is not on the GPUs
        self._starved: deque[Adapter] = deque()  # adapters that wait for room
        self._loading: set[Adapter] = set()
        self._draining: set[Adapter] = set()
        self._pool: OrderedDict[Adapter, float] = OrderedDict()  # least recently used first; value: when it came
        self._pool_used = 0
        self._use: dict[Adapter, int] = {}  # ready and running requests
        self._counts: dict[Adapter, int] = {}  # running requests
        self._ranks: dict[int, int] = {}  # rank to distinct adapters in the batch
        self._rows = 0
        # On their way into host memory; value: whether they go on to the GPUs from there.
        self._coming: dict[Adapter, bool] = {}
        self._fetched: deque[Adapter] = deque()  # those of them that wait to be installed
        self._host: OrderedDict[Adapter, float] = OrderedDict()  # value: from when on it is whole
        self._host_used = 0
        self._link_free = self._network_free = 0.0
        for values in (self._view.requests, self._view.rows, self._view.width, self._view.loaded):
            values[self._index] = 0
        for holders in self._view.holders.values():
            holders.discard(self._index)

    def in_flight(self) -> list[int]:
        """Requests that wait or run."""
        waiting = [item[0] for items in (self._ready, self._prefill, *self._blocked.values()) for item in items]
        return sorted({*waiting, *(item[1] for item in self._running)})

    def has_in_host(self, adapter: Adapter, now: float) -> bool:
        return self._host.get(adapter, float("inf")) <= now

    def preload(self, adapter: Adapter) -> None:
        """Have it in host memory and, if there is room, on the GPUs, before the start."""
        self._to_host(adapter, 0.0)
        if self._pool_used + adapter.size <= self.pool_bytes and adapter not in self._pool:
            self._pool_used += adapter.size
            self._enter(adapter, 0.0)

    def prefetch(self, adapter: Adapter, now: float, bandwidth: float) -> None:
        """Copy a newly placed adapter into host memory over the network."""
        if adapter not in self._host and adapter not in self._coming:
            self._bring(adapter, now, bandwidth, False)

    def submit(self, now: float, request: int, adapter: Adapter, prompt: int, output: int) -> None:
        self._view.requests[self._index] += 1
        item = (request, adapter, prompt, output)
        if adapter in self._pool and adapter not in self._draining:
            self._use[adapter] = self._use.get(adapter, 0) + 1
            self._pool.move_to_end(adapter)
            self._make_ready([item], now)
            return
        waiting = self._blocked.get(adapter)
        if waiting is None:
            self._blocked[adapter] = [item]
            self._starved.append(adapter)
            self._load_next(now)
        else:
            waiting.append(item)

    def fetched(self, now: float, adapter: Adapter) -> None:
        """An adapter's bytes are here; it is installed after the step that runs."""
        self._fetched.append(adapter)
        if self._state == IDLE:
            self._go(now)
        elif self._state == DECODE:
            self._cut(now)

    def arrive(self, now: float, adapter: Adapter) -> None:
        """An adapter's copy to the GPUs is done."""
        self._loading.discard(adapter)
        self._enter(adapter, now)
        items = self._blocked.pop(adapter, [])
        self._use[adapter] = len(items)
        self._make_ready(items, now)
        if self._starved:
            # Those that wait for room may want its place next.
            self._load_next(now)

    def wake(self, now: float, token: int) -> None:
        if token != self._token:
            return
        if self._state == PREFILL:
            self.busy_s += now - self._started
            for request, adapter, prompt, output, _ in self._prefill:
                self._ledger.first[request] = now
                if output == 1:
                    self._leave(request, adapter, now)
                else:
                    heappush(self._running, (self._step + output - 1, request, adapter, prompt + output))
                    self._context += prompt + 1
            self._prefill = []
        elif self._state == DECODE:
            self.busy_s += now - self._started
            self._step += self._leap
            self._context += self._leap * len(self._running)
        elif self._state == INSTALL:
            self.busy_s += now - self._started
            self._installed(now, self._fetched.popleft())
        running = self._running
        while running and running[0][0] <= self._step:
            _, request, adapter, tokens = heappop(running)
            self._context -= tokens
            self._leave(request, adapter, now)
        self._go(now)

    def _go(self, now: float) -> None:
        """Install what has been fetched, else start the next prefill batch, else decode until the first request ends."""
        ready, costs, limits = self._ready, self._costs, self.limits
        until = self._put_together()
        self._token += 1
        self._started = now
        if self._fetched:
            self._state = INSTALL
            self._push(now + self._install_s(self._fetched[0]), self._index, self._token)
        elif ready and ready[0][4] <= until and len(self._running) < limits.max_running:
            room, tokens, token_ranks, width = limits.max_running - len(self._running), 0, 0, 0
            batch = self._prefill
            while (
                ready
                and ready[0][4] <= until
                and len(batch) < room
                and (not batch or tokens + ready[0][2] <= limits.prefill_tokens)
            ):
                item = ready.popleft()
                batch.append(item)
                tokens += item[2]
                token_ranks += item[2] * item[1].rank
                width = max(width, item[1].rank)
                self._join(item[1])
            self._state = PREFILL
            self._push(now + costs.prefill(tokens, token_ranks, width) / 1000, self._index, self._token)
        elif self._running:
            self._state = DECODE
            many = len(self._running)
            # Those who are ready and came too late for this step are in the next one.
            self._leap = 1 if ready and many < limits.max_running else self._running[0][0] - self._step
            context = self._context + many * self._leap / 2
            self._step_s = costs.decode(many, self._rows, max(self._ranks), context) / 1000
            self._push(now + self._leap * self._step_s, self._index, self._token)
        else:
            self._state = IDLE

    def _put_together(self) -> float:
        """Until when a request had to be ready to be in the batch that starts now."""
        if not self.limits.ahead or self._state in (IDLE, INSTALL) or not self._running:
            return float("inf")
        return self._started if self._state == PREFILL else self._started + (self._leap - 1) * self._step_s

    def _make_ready(self, items: list, now: float) -> None:
        """An idle replica starts, a decoding one with a free place stops after the step that runs, or the one that follows that."""
        self._ready.extend((*item, now) for item in items)
        if self._state == IDLE:
            self._go(now)
        elif self._state == DECODE and len(self._running) < self.limits.max_running:
            self._cut(now, more=int(self.limits.ahead))

    def _cut(self, now: float, more: int = 0) -> None:
        """Decode no further than the step that runs, and `more` after it."""
        steps = int((now - self._started) / self._step_s) + 1 + more
        if steps < self._leap:
            self._leap = steps
            self._token += 1
            self._push(self._started + steps * self._step_s, self._index, self._token)

    def _join(self, adapter: Adapter) -> None:
        count = self._counts.get(adapter, 0)
        self._counts[adapter] = count + 1
        if not count:
            self._rows += adapter.rank
            self._ranks[adapter.rank] = self._ranks.get(adapter.rank, 0) + 1
            self._view.rows[self._index] = self._rows
            self._view.width[self._index] = max(self._ranks)

    def _leave(self, request: int, adapter: Adapter, now: float) -> None:
        self._ledger.finish[request] = now
        self._ledger.finished += 1
        self._view.requests[self._index] -= 1
        if self._counts[adapter] == 1:
            del self._counts[adapter]
            self._rows -= adapter.rank
            if self._ranks[adapter.rank] == 1:
                del self._ranks[adapter.rank]
            else:
                self._ranks[adapter.rank] -= 1
            self._view.rows[self._index] = self._rows
            self._view.width[self._index] = max(self._ranks, default=0)
        else:
            self._counts[adapter] -= 1
        self._use[adapter] -= 1
        if not self._use[adapter]:
            del self._use[adapter]
            if self._starved:
                self._load_next(now)

    def _load_next(self, now: float) -> None:
        """Start the loads that there is room for, in order; for the first without room, those that have been here longest get no new
        requests until enough of them will have left."""
        while self._starved:
            adapter = self._starved[0]
            if adapter in self._pool:
                # Its requests began to wait because it was to leave; it did not have to before its turn came.
                self._starved.popleft()
                self._draining.discard(adapter)
                items = self._blocked.pop(adapter)
                self._use[adapter] = self._use.get(adapter, 0) + len(items)
                self._make_ready(items, now)
                continue
            for other in [a for a in self._draining if a not in self._use]:
                self._evict(other)
            while self._pool_used + adapter.size > self.pool_bytes:
                free = next((a for a in self._pool if a not in self._use), None)
                if free is None:
                    leaving = sum(a.size for a in self._draining)
                    for other in sorted(self._pool, key=self._pool.__getitem__):
                        if self._pool_used - leaving + adapter.size <= self.pool_bytes:
                            break
                        if other not in self._draining:
                            self._draining.add(other)
                            leaving += other.size
                    return
                self._evict(free)
            self._starved.popleft()
            self._pool_used += adapter.size
            self._loading.add(adapter)
            limits, source = self.limits, "host"
            if adapter in self._host:
                self._host.move_to_end(adapter)
                self._to_gpu(adapter, max(now, self._host[adapter]))
            elif adapter in self._coming:
                self._coming[adapter] = True
            else:
                source = self._fetch(adapter, self._index, now)
                self._bring(adapter, now, (limits.peer_gb_s if source == "peer" else limits.disk_gb_s) * 1e9, True)
            self._ledger.loads += 1
            self._ledger.loads_from[source] += 1

    def _bring(self, adapter: Adapter, now: float, bandwidth: float, onward: bool) -> None:
        """Copy an adapter into host memory, and onward to the GPUs."""
        self._network_free = max(now, self._network_free) + adapter.size / bandwidth
        self._ledger.bytes_moved += adapter.size
        if self._install_s(adapter):
            self._coming[adapter] = onward
            self._on_fetched(self._network_free, self._index, adapter)
        else:
            self._to_host(adapter, self._network_free)
            if onward:
                self._to_gpu(adapter, self._network_free)

    def _install_s(self, adapter: Adapter) -> float:
        return self.limits.install_s + adapter.size / 1e9 * self.limits.install_s_per_gb

    def _installed(self, now: float, adapter: Adapter) -> None:
        self._to_host(adapter, now)
        if self._coming.pop(adapter):
            self._to_gpu(adapter, now)

    def _to_gpu(self, adapter: Adapter, start: float) -> None:
        self._link_free = max(start, self._link_free) + adapter.size / (self.limits.pcie_gb_s * 1e9)
        self._on_loaded(self._link_free, self._index, adapter)

    def _enter(self, adapter: Adapter, now: float) -> None:
        self._pool[adapter] = now
        self._view.loaded[self._index] = len(self._pool)
        self._view.holders.setdefault(adapter.name, set()).add(self._index)

    def _evict(self, adapter: Adapter) -> None:
        del self._pool[adapter]
        self._draining.discard(adapter)
        self._pool_used -= adapter.size
        self._view.loaded[self._index] = len(self._pool)
        self._view.holders[adapter.name].discard(self._index)

    def _to_host(self, adapter: Adapter, when: float) -> None:
        if adapter in self._host:
            return
        while self._host and self._host_used + adapter.size > self.host_bytes:
            gone, _ = self._host.popitem(last=False)
            self._host_used -= gone.size
        self._host[adapter] = when
        self._host_used += adapter.size
