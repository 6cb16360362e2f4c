"""Prometheus metrics per adapter, on SGLang's own `GET /metrics` (`--enable-metrics`).

SGLang's metrics are files that each of its processes maps (prometheus_client's multi-process mode); a label in them can never be taken
away again, so adapters that come and go would fill them. Ours are read when they are asked for: requests are counted in the launcher,
where they end, and the numbers of the pool come from rank 0 of each engine, in one small file each beside SGLang's.
"""

import json
import logging
import os
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sgl_bdlora import config

logger = logging.getLogger(__name__)

# Both are set by SGLang's launcher before it starts its processes (entrypoints/engine.py:_set_envs_and_config).
DIRECTORY_ENV = "PROMETHEUS_MULTIPROC_DIR"
RUN_ENV = "SGLANG_RUN_ID"
BASE, OTHER = "base", "other"
OUTCOMES = ("ok", "error", "abort")

FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
PER_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)


class Histogram:
    """Counts of values by upper bound."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many values are not above it), as Prometheus writes them."""
        total, rows = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class Series:
    """What is counted of one adapter's requests."""

    def __init__(self):
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = self.generation_tokens = 0
        self.first_token, self.per_token = Histogram(FIRST_TOKEN_BUCKETS), Histogram(PER_TOKEN_BUCKETS)


class AdapterMetrics:
    """Counts requests by adapter, and is a collector for prometheus_client's registry.

    Args:
        max_adapters: adapters with series of their own; requests of the others count under "other".
        registered: gives the names of the adapters that are loaded now. A series ends with its adapter.
        engines: gives what `engine_numbers` found in each engine.
    """

    def __init__(self, max_adapters: int, registered: Callable[[], Collection[str]], engines: Callable[[], list[dict]]):
        self._max_adapters, self._registered, self._engines = max_adapters, registered, engines
        self._series: dict[str | None, Series] = {}
        self._other = Series()

    def of(self, adapter: str | None) -> Series:
        """The series that a request for this adapter (None: the base model) counts in.

        Names that are not loaded come from clients: they get no label.
        """
        series = self._series.get(adapter)
        if series is not None:
            return series
        if adapter is not None:
            if adapter not in self._registered():
                return self._other
            if len(self._named()) >= self._max_adapters:
                self._forget_unloaded()
            if len(self._named()) >= self._max_adapters:
                return self._other
        return self._series.setdefault(adapter, Series())

    def ended(
        self,
        adapter: str | None,
        outcome: str,
        prompt_tokens: int = 0,
        generation_tokens: int = 0,
        first_token_s: float | None = None,
        per_token_s: float | None = None,
    ) -> None:
        """A request ended. outcome: one of OUTCOMES. Times are seconds; None where there was no such token."""
        series = self.of(adapter)
        series.outcomes[outcome] += 1
        series.prompt_tokens += prompt_tokens
        series.generation_tokens += generation_tokens
        if first_token_s is not None:
            series.first_token.observe(first_token_s)
        if per_token_s is not None:
            series.per_token.observe(per_token_s)

    def describe(self) -> list:
        """Names come with `collect`; the registry would otherwise call it while it is being set up."""
        return []

    def collect(self) -> Iterator:
        """The metric families of prometheus_client, as of now."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        self._forget_unloaded()
        rows = [(_label(adapter), series) for adapter, series in self._series.items()]
        if self._other.outcomes:
            rows.append((OTHER, self._other))
        requests = CounterMetricFamily("bdlora_requests", "Requests that ended, by how.", labels=("adapter", "outcome"))
        for adapter, series in rows:
            for outcome in OUTCOMES:
                requests.add_metric((adapter, outcome), series.outcomes[outcome])
        yield requests
        for name, text, value in (
            ("bdlora_prompt_tokens", "Prompt tokens of requests that ended.", "prompt_tokens"),
            ("bdlora_generation_tokens", "Generated tokens of requests that ended.", "generation_tokens"),
        ):
            family = CounterMetricFamily(name, text, labels=("adapter",))
            for adapter, series in rows:
                family.add_metric((adapter,), getattr(series, value))
            yield family
        for name, text, value in (
            ("bdlora_time_to_first_token_seconds", "From a request's arrival to its first token.", "first_token"),
            ("bdlora_time_per_output_token_seconds", "Mean time between a request's tokens.", "per_token"),
        ):
            family = HistogramMetricFamily(name, text, labels=("adapter",))
            for adapter, series in rows:
                histogram: Histogram = getattr(series, value)
                family.add_metric((adapter,), histogram.buckets(), histogram.sum)
            yield family
        yield from engine_families(self._engines())

    def _named(self) -> Collection[str]:
        return self._series.keys() - {None}

    def _forget_unloaded(self) -> None:
        for adapter in self._named() - set(self._registered()):
            del self._series[adapter]


def _label(adapter: str | None) -> str:
    """The base model has a label of its own, which an adapter of that name must not share."""
    if adapter is None:
        return BASE
    return f"adapter:{adapter}" if adapter in (BASE, OTHER) else adapter


# What an engine tells, from rank 0 of it


def engine_numbers(manager) -> dict:
    """The numbers of a BDLoRAManager that `engine_families` shows; bytes are this rank's."""
    pool, layers = manager.memory_pool, manager.base_hf_config.get_text_config().num_hidden_layers
    collectives: dict[str, float] = {}
    for shard in manager.shards.values():
        collectives[shard.kind] = max(collectives.get(shard.kind, 0), shard.collectives / layers)
    resident = {ref.lora_name: shard.nbytes for ref, shard in manager.resident()}
    shown = dict(list(resident.items())[: config.options().metrics_max_adapters])
    return {
        **{name: manager.counts[name] for name in ("loads", "load_failures", "unloads")},
        "pool_loads": pool.loads,
        "pool_evictions": pool.evictions,
        "pool_bytes": pool.budget,
        "pool_used_bytes": pool.used,
        "registered": len(manager.shards),
        "collectives": collectives,
        "resident": shown,
        "resident_others": sum(resident.values()) - sum(shown.values()),
    }


def _prefix() -> str:
    """Of this server's files: a user may give the same directory to several servers, or to one after another."""
    return f"bdlora-{os.environ.get(RUN_ENV, '')}-"


def publish(manager) -> None:
    """Leave this engine's numbers where the launcher finds them; nothing without --enable-metrics."""
    directory = os.environ.get(DIRECTORY_ENV)
    if not directory or manager.tp_rank != 0:
        return
    target = Path(directory) / f"{_prefix()}{os.getpid()}.json"
    partial = target.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(engine_numbers(manager)))
        partial.replace(target)
    except OSError as error:
        # A full disk must not stop the serving.
        logger.warning("sgl-bdlora: metrics not written: %s", error)


def published() -> list[dict]:
    """The numbers of all engines of this server."""
    found = []
    for path in Path(os.environ[DIRECTORY_ENV]).glob(f"{_prefix()}*.json"):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            logger.warning("sgl-bdlora: metrics of %s not read: %s", path.name, error)
    return found


_ENGINE_COUNTERS = {
    "bdlora_adapter_loads": ("loads", "Adapters read, checked and registered."),
    "bdlora_adapter_load_failures": ("load_failures", "Adapters refused, or that could not be read."),
    "bdlora_adapter_unloads": ("unloads", "Adapters unregistered."),
    "bdlora_pool_loads": ("pool_loads", "Copies of an adapter from host memory into the pool."),
    "bdlora_pool_evictions": ("pool_evictions", "Adapters pushed out of the pool by others."),
}
_ENGINE_GAUGES = {
    "bdlora_pool_bytes": ("pool_bytes", "Size of the pool for adapter weights, on rank 0."),
    "bdlora_pool_used_bytes": ("pool_used_bytes", "Bytes of it that adapters take, on rank 0."),
    "bdlora_adapters_registered": ("registered", "Adapters that are loaded, resident or not."),
}


def engine_families(engines: list[dict]) -> Iterator:
    """Metric families of the engines' numbers, added up."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for name, (key, text) in _ENGINE_COUNTERS.items():
        yield CounterMetricFamily(name, text, value=sum(engine[key] for engine in engines))
    for name, (key, text) in _ENGINE_GAUGES.items():
        yield GaugeMetricFamily(name, text, value=sum(engine[key] for engine in engines))
    resident = GaugeMetricFamily(
        "bdlora_adapter_resident_bytes", "Bytes of an adapter in the pool, on rank 0.", labels=("adapter",)
    )
    totals: Counter[str] = Counter()
    for engine in engines:
        totals.update({_label(adapter): size for adapter, size in engine["resident"].items()})
        totals.update({OTHER: engine["resident_others"]} if engine["resident_others"] else {})
    for adapter, size in totals.items():
        resident.add_metric((adapter,), size)
    yield resident
    collectives = GaugeMetricFamily(
        "bdlora_collectives_per_layer", "Collectives that adapters of a kind add to a decoder layer.", labels=("kind",)
    )
    kinds = {kind for engine in engines for kind in engine["collectives"]}
    for kind in sorted(kinds):
        collectives.add_metric((kind,), max(engine["collectives"].get(kind, 0) for engine in engines))
    yield collectives


# Hooks of the launcher's process

_metrics: AdapterMetrics | None = None


def after_init_lora(result, manager) -> None:
    """Hook of TokenizerManager.init_lora: begin to count, if this server has metrics and our back end."""
    global _metrics
    args = manager.server_args
    if args.enable_metrics and args.enable_lora and args.lora_backend == config.BACKEND:
        _metrics = AdapterMetrics(
            config.options().metrics_max_adapters, manager.lora_registry.get_all_adapters, published
        )


def after_add_prometheus_middleware(result, app) -> None:
    """Hook of add_prometheus_middleware, which has mounted /metrics: show ours there too."""
    if _metrics is None:
        return
    from prometheus_client import CollectorRegistry, make_asgi_app, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    registry.register(_metrics)
    if config.options().tenants is not None:
        from sgl_bdlora.tenants.http import TenantMetrics

        registry.register(TenantMetrics())
    app.routes[-1].app = make_asgi_app(registry=registry)


def after_collect_metrics(result, manager, state, recv_obj, i: int) -> None:
    """Hook of TokenizerManager.collect_metrics: one output of a request that the scheduler ran."""
    if _metrics is None or not state.finished or getattr(state, "bdlora_ended", False):
        return
    tokens = recv_obj.completion_tokens[i] if getattr(recv_obj, "completion_tokens", None) else 0
    first = _first_token_time(state, recv_obj, i)
    last = state.time_stats.finished_time
    _metrics.ended(
        _adapter(state),
        _outcome(recv_obj.finished_reasons[i]),
        prompt_tokens=recv_obj.prompt_tokens[i],
        generation_tokens=tokens,
        first_token_s=first - state.time_stats.created_time if tokens else None,
        per_token_s=(last - first) / (tokens - 1) if tokens > 1 else None,
    )


def before_handle_abort_req(manager, recv_obj) -> None:
    """Hook of TokenizerManager._handle_abort_req: a request that ended in the scheduler's queue."""
    state = manager.rid_to_state.get(recv_obj.rid)
    if state is not None:
        _ended_early(state, _outcome(recv_obj.finished_reason or {"type": "abort"}))


def before_discard_pending_req_states(manager, obj, lifecycle_ids=None) -> None:
    """Hook of TokenizerManager._discard_pending_req_states: a request was refused, or its client has left.

    It is called while the exception is handled that ended the request.
    """
    if _metrics is None:
        return
    refused = isinstance(sys.exc_info()[1], Exception)
    for rid in manager._logical_rids(obj):
        for each in (rid, *manager.logical_rid_to_child_rids.get(rid, ())):
            state = manager.rid_to_state.get(each)
            if state is not None and not state.finished:
                _ended_early(state, "error" if refused and not state.dispatched else "abort")


def after_convert_to_span_attrs(result, manager, state, recv_obj, i: int) -> dict:
    """Hook of TokenizerManager.convert_to_span_attrs: the request's span (--enable-trace) names the adapter."""
    return {**result, "bdlora.adapter": _label(_adapter(state))} if manager.enable_trace else result


def after_compute_metadata(result, request_logger):
    """Hook of RequestLogger._compute_metadata: the log of requests names the adapter on levels 0 and 1 too."""
    max_length, skipped, skipped_of_output = result
    return max_length, skipped and skipped - {"lora_path"}, skipped_of_output


def _ended_early(state, outcome: str) -> None:
    if _metrics is None or not state.obj.log_metrics or getattr(state, "bdlora_ended", False):
        return
    # Its last output may come yet (unloading.py keeps the state until then).
    state.bdlora_ended = True
    _metrics.ended(_adapter(state), outcome)


def _adapter(state) -> str | None:
    adapter = state.obj.lora_path
    return adapter if isinstance(adapter, str) and adapter else None


def _outcome(reason: dict) -> str:
    """SGLang's finish reason is an abort with a status code where it refused or failed."""
    if reason.get("type") != "abort":
        return "ok"
    return "error" if reason.get("status_code") else "abort"


def _first_token_time(state, recv_obj, i: int) -> float:
    """When the first token was there, on the clock of `state.time_stats`.

    The tokenizer manager sees only the last output of a request that does not stream; then the scheduler's time counts.
    """
    stats = recv_obj.time_stats[i] if recv_obj.time_stats is not None else None
    prefilled = getattr(stats, "prefill_finished_time", 0.0)
    if prefilled and not getattr(state.obj, "stream", False):
        return prefilled
    return state.time_stats.first_token_time
