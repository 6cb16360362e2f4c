"""Where SGLang's launcher tells of a request's end, and where it shows metrics, logs and spans."""

import sys

from sgl_bdlora import config
from sgl_bdlora.metrics.engines import published
from sgl_bdlora.metrics.labels import label
from sgl_bdlora.metrics.requests import AdapterMetrics

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
    return {**result, "bdlora.adapter": label(_adapter(state))} if manager.enable_trace else result


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
