"""The cluster's status as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator

PREFIX = "bdlora_cluster_"


def render(status: dict) -> str:
    """Prometheus' text format, from what /cluster/status says."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(status))
    return generate_latest(registry).decode()


class _Collector:
    def __init__(self, status: dict):
        self._status = status

    def collect(self) -> Iterator:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        status = self._status

        def family(kind: type, name: str, words: str, label: str | None, values: dict):
            made = kind(PREFIX + name, words, labels=[label] if label else [])
            for value_label, value in values.items():
                made.add_metric([str(value_label)] if label else [], value)
            return made

        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        replicas = {r["name"]: r for r in status["replicas"]}
        yield family(gauge, "table_version", "Version of the routing table", None, {"": status["version"]})
        yield family(gauge, "replicas", "Running replicas", None, {"": len(replicas)})
        yield family(
            gauge, "required_replicas", "Replicas that the demand needs", None, {"": status["required_replicas"]}
        )
        yield family(
            gauge, "admitted_ratio", "Part of the requests that the replicas can serve", None, {"": status["admitted"]}
        )
        yield family(gauge, "store_bytes", "Adapters in the object store", None, {"": status["store_bytes"]})
        demand = {a["name"]: a["demand"] for a in status["adapters"]}
        yield family(gauge, "adapter_demand_tokens", "Forecast demand, tokens a second", "adapter", demand)
        for key, name, words in (
            ("load", "replica_load", "Planned load, 1 is what it can serve within the SLO"),
            ("placed", "replica_placed_adapters", "Adapters that the table gives it"),
            ("running", "replica_running_requests", "Requests that it has"),
            ("loaded_bytes", "replica_loaded_bytes", "Adapters on its server"),
        ):
            yield family(gauge, name, words, "replica", {label: r[key] for label, r in replicas.items()})
        bins = GaugeMetricFamily(PREFIX + "replica_bin_adapters", "Placed adapters by rank", labels=["replica", "rank"])
        for label, replica in replicas.items():
            for rank, count in replica["bins"].items():
                bins.add_metric([label, rank], count)
        yield bins
        for key in ("plans", "moves", "heals", "unloads"):
            yield family(counter, key, f"{key.capitalize()} since the start", None, {"": status[key]})
        yield family(
            counter, "cold_loads", "Adapters loaded on a request or in advance", "source", status["cold_loads"]
        )
        yield family(counter, "moved_bytes", "Bytes of adapters loaded", "source", status["bytes_moved"])
        yield family(
            counter, "adapter_requests", "Requests", "adapter", {a["name"]: a["requests"] for a in status["adapters"]}
        )
        outcomes = {k: v for k, v in status["requests"].items() if k != "arrived"}
        yield family(counter, "requests", "Requests by outcome", "outcome", outcomes)
        ttft, total, buckets = status["ttft"], 0, []
        for end, count in zip([*map(str, status["ttft"]["buckets"]), "+Inf"], ttft["counts"], strict=True):
            total += count
            buckets.append((end, total))
        times = HistogramMetricFamily(PREFIX + "ttft_seconds", "Time to the first byte of an answer, at the front")
        times.add_metric([], buckets, ttft["seconds"])
        yield times
