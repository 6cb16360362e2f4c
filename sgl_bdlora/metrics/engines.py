"""What an engine tells of its adapters and its pool, from its rank 0 to the launcher: one small file each, and the metrics made of them."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sgl_bdlora import config
from sgl_bdlora.metrics.labels import OTHER, label

logger = logging.getLogger(__name__)

# Both are set by SGLang's launcher before it starts its processes (entrypoints/engine.py:_set_envs_and_config).
DIRECTORY_ENV = "PROMETHEUS_MULTIPROC_DIR"
RUN_ENV = "SGLANG_RUN_ID"


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
        totals.update({label(adapter): size for adapter, size in engine["resident"].items()})
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
