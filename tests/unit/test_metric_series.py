"""Counting by adapter with a bounded number of labels; with a real server: tests/server/test_metrics.py."""

import json
import os
from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sgl_bdlora.metrics import engines, hooks
from sgl_bdlora.metrics.requests import FIRST_TOKEN_BUCKETS, AdapterMetrics

ENGINE = {
    "loads": 3, "load_failures": 1, "unloads": 1, "pool_loads": 7, "pool_evictions": 2, "pool_bytes": 1000, "pool_used_bytes": 600,
    "registered": 2, "collectives": {"plain": 4.0}, "resident": {"a": 200, "base": 300}, "resident_others": 100,
}  # fmt: skip


def exposed(collector) -> dict[tuple, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode().replace("# EOF\n", "")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def adapters(loaded, most=2):
    return AdapterMetrics(most, lambda: loaded, lambda: [])


def test_as_many_labels_as_allowed_and_one_for_the_rest():
    counted = adapters(["a", "b", "c"])
    for name in ("a", "b", "c", None, "made-up", "c"):
        counted.ended(name, "ok", prompt_tokens=10)
    found = exposed(counted)
    assert {key[1] for key in found if key[0] == "bdlora_requests_total"} == {"a", "b", "base", "other"}
    assert found["bdlora_requests_total", "other", "ok"] == 3
    assert found["bdlora_prompt_tokens_total", "other"] == 30
    assert sum(value for key, value in found.items() if key[0] == "bdlora_prompt_tokens_total") == 60


def test_an_unloaded_adapter_leaves_its_label_to_another():
    loaded = ["a", "b"]
    counted = adapters(loaded)
    for name in loaded:
        counted.ended(name, "ok")
    loaded[:] = ["b", "c"]
    counted.ended("c", "ok")
    assert {key[1] for key in exposed(counted) if key[0] == "bdlora_requests_total"} == {"b", "c"}


def test_no_label_at_all():
    counted = adapters(["a"], most=0)
    counted.ended("a", "error")
    counted.ended(None, "ok")
    found = exposed(counted)
    assert found["bdlora_requests_total", "other", "error"] == found["bdlora_requests_total", "base", "ok"] == 1


def test_an_adapter_called_base_is_not_the_base_model():
    counted = adapters(["base"])
    counted.ended("base", "ok")
    counted.ended(None, "abort")
    found = exposed(counted)
    assert found["bdlora_requests_total", "adapter:base", "ok"] == found["bdlora_requests_total", "base", "abort"] == 1


def test_histograms_are_cumulative_and_their_bounds_belong_to_them():
    counted = adapters([])
    for seconds in (0.005, 0.01, 0.011, 500):
        counted.ended(None, "ok", first_token_s=seconds)
    found = exposed(counted)
    name = "bdlora_time_to_first_token_seconds"
    assert found[f"{name}_bucket", "base", "0.01"] == 2
    assert found[f"{name}_bucket", "base", "0.02"] == 3
    assert found[f"{name}_bucket", "base", str(FIRST_TOKEN_BUCKETS[-1])] == 3
    assert found[f"{name}_bucket", "base", "+Inf"] == found[f"{name}_count", "base"] == 4
    assert found[f"{name}_sum", "base"] == 500.026


def test_engines_are_added_up_and_named_like_the_rest():
    found = exposed(AdapterMetrics(2, lambda: (), lambda: [ENGINE, ENGINE | {"collectives": {"block-diagonal": 0.0}}]))
    assert found[("bdlora_adapter_loads_total",)] == 6
    assert found[("bdlora_pool_bytes",)] == 2000
    assert found["bdlora_adapter_resident_bytes", "a"] == 400
    assert found["bdlora_adapter_resident_bytes", "adapter:base"] == 600
    assert found["bdlora_adapter_resident_bytes", "other"] == 200
    assert found["bdlora_collectives_per_layer", "plain"] == 4
    assert found["bdlora_collectives_per_layer", "block-diagonal"] == 0


def test_what_an_engine_publishes_is_found_and_nobody_elses(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(engines.DIRECTORY_ENV, str(tmp_path))
    monkeypatch.setenv(engines.RUN_ENV, "this")
    monkeypatch.setattr(engines, "engine_numbers", lambda manager: ENGINE)
    (tmp_path / "bdlora-other-1.json").write_text(json.dumps(ENGINE))
    engines.publish(SimpleNamespace(tp_rank=1))
    assert engines.published() == []
    engines.publish(SimpleNamespace(tp_rank=0))
    assert engines.published() == [ENGINE]
    assert sorted(os.listdir(tmp_path)) == ["bdlora-other-1.json", f"bdlora-this-{os.getpid()}.json"]


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(engines.DIRECTORY_ENV, str(tmp_path / "gone"))
    monkeypatch.setattr(engines, "engine_numbers", lambda manager: ENGINE)
    engines.publish(SimpleNamespace(tp_rank=0))
    assert "metrics not written" in caplog.text


def test_spans_and_logs_name_the_adapter():
    state = SimpleNamespace(obj=SimpleNamespace(lora_path="sql"))
    traced, plain = SimpleNamespace(enable_trace=True), SimpleNamespace(enable_trace=False)
    assert hooks.after_convert_to_span_attrs({"a": 1}, traced, state, None, 0) == {"a": 1, "bdlora.adapter": "sql"}
    assert hooks.after_convert_to_span_attrs({}, plain, state, None, 0) == {}
    state.obj.lora_path = None
    assert hooks.after_convert_to_span_attrs({}, traced, state, None, 0) == {"bdlora.adapter": "base"}
    assert hooks.after_compute_metadata((1, {"text", "lora_path"}, {"text"}), None) == (1, {"text"}, {"text"})
    assert hooks.after_compute_metadata((2048, None, None), None) == (2048, None, None)
