"""GET /metrics counts requests by adapter, and shows the pool; the log and the metrics name adapters, not what clients made up."""

import re
import time

import httpx
import pytest
from harness import request_body
from prometheus_client.parser import text_string_to_metric_families
from servers import QWEN2, on

pytestmark = on(QWEN2)
PROMETHEUS = "prometheus's own secret key"


def scrape(live) -> dict[tuple, float]:
    """(name, labels in order of their names) -> value, of our metrics."""
    response = live.server.get("/metrics", key=PROMETHEUS)
    assert response.status_code == 200, response.text
    assert "sglang:num_running_reqs" in response.text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        if family.name.startswith("bdlora_")
        for sample in family.samples
    }


def growth(before: dict, after: dict, *key) -> float:
    return after.get(key, 0) - before.get(key, 0)


@pytest.fixture
def counted(live):
    live.load("counted", live.folder("bd4-r16"))
    yield "counted"
    live.unload("counted")


def test_requests_and_tokens_are_counted_by_adapter(live, counted):
    before = scrape(live)
    asks = [live.ask(None, 10, new_tokens=3), live.ask(None, 20, new_tokens=5)]
    named = [live.ask(None, tokens, new_tokens=4) for tokens in (11, 12, 13)]
    live.server.generate(asks)
    live.server.generate([type(ask)(ask.prompt, counted, None, 4) for ask in named])
    after = scrape(live)
    assert growth(before, after, "bdlora_requests_total", "base", "ok") == 2
    assert growth(before, after, "bdlora_prompt_tokens_total", "base") == 30
    assert growth(before, after, "bdlora_generation_tokens_total", "base") == 8
    assert growth(before, after, "bdlora_requests_total", counted, "ok") == 3
    assert growth(before, after, "bdlora_prompt_tokens_total", counted) == 36
    assert growth(before, after, "bdlora_generation_tokens_total", counted) == 12
    for name in ("bdlora_time_to_first_token_seconds", "bdlora_time_per_output_token_seconds"):
        assert growth(before, after, f"{name}_count", counted) == 3
        assert 0 < growth(before, after, f"{name}_sum", counted) < 30
        assert after[f"{name}_bucket", counted, "+Inf"] == after[f"{name}_count", counted]


def test_times_are_those_that_a_client_sees(live, counted):
    """A first token comes before the other thirty do, also where the client gets all at once."""
    before = scrape(live)
    ask = type(live.ask(None))(live.prompt(10), counted, None, 31, prompt_logprobs=False)
    live.server.generate([ask])
    after = scrape(live)
    first = growth(before, after, "bdlora_time_to_first_token_seconds_sum", counted)
    each = growth(before, after, "bdlora_time_per_output_token_seconds_sum", counted)
    assert 0 < first < 15 * each


def test_refused_requests_count_as_errors_and_unknown_names_get_no_label(live, counted):
    before = scrape(live)
    body = request_body([live.ask(None)])
    for adapter, new in (("made-up-by-a-client", 1), (counted, -1)):
        asked = {**body, "lora_path": [adapter], "sampling_params": {"max_new_tokens": new}}
        assert live.server.post("/generate", asked).status_code == 400
    after = scrape(live)
    assert growth(before, after, "bdlora_requests_total", "other", "error") == 1
    assert growth(before, after, "bdlora_requests_total", counted, "error") == 1
    assert "made-up-by-a-client" not in str(after)


def test_clients_that_leave_count_as_aborted(live, counted):
    before = scrape(live)
    for adapter in (None, counted):
        sampling = {"max_new_tokens": 400, "ignore_eos": True}
        ask = {"input_ids": list(live.prompt(9)), "lora_path": adapter, "sampling_params": sampling, "stream": True}
        url = live.server.base_url + "/generate"
        with httpx.stream("POST", url, json=ask, headers=live.server.headers(), timeout=60) as response:
            next(response.iter_lines())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        after = scrape(live)
        aborted = [growth(before, after, "bdlora_requests_total", name, "abort") for name in ("base", counted)]
        if aborted == [1, 1]:
            break
        time.sleep(0.2)
    assert aborted == [1, 1]
    assert [growth(before, after, "bdlora_requests_total", name, "ok") for name in ("base", counted)] == [0, 0]


def test_loads_copies_and_bytes_are_shown(live):
    before = scrape(live)
    live.load("passing", live.folder("plain-r32"))
    loaded = scrape(live)
    assert growth(before, loaded, "bdlora_adapter_loads_total") == 1
    assert growth(before, loaded, "bdlora_adapters_registered") == 1
    assert ("bdlora_adapter_resident_bytes", "passing") not in loaded
    live.server.generate([type(live.ask(None))(live.prompt(5), "passing", None, 1)])
    resident = scrape(live)
    entry = next(a for a in live.server.get("/bdlora/info").json()["adapters"] if a["name"] == "passing")
    assert growth(loaded, resident, "bdlora_pool_loads_total") == 1
    assert resident["bdlora_adapter_resident_bytes", "passing"] == entry["pool_bytes"][0] > 0
    assert growth(loaded, resident, "bdlora_pool_used_bytes") == entry["pool_bytes"][0]
    assert resident[("bdlora_pool_bytes",)] >= resident[("bdlora_pool_used_bytes",)]
    assert resident["bdlora_collectives_per_layer", "plain"] == 0
    assert live.server.load("refused", "/nonexistent").status_code == 400
    live.unload("passing")
    gone = scrape(live)
    assert growth(before, gone, "bdlora_adapter_unloads_total") == 1
    assert growth(before, gone, "bdlora_adapter_load_failures_total") == 1
    assert growth(before, gone, "bdlora_adapters_registered") == 0
    assert "passing" not in str(gone)


def test_the_tenants_requests_are_counted(live):
    before = scrape(live)
    for _ in range(2):
        live.server.get("/v1/models", key="acme's own secret key")
        live.server.get("/server_info", key="acme's own secret key")
    after = scrape(live)
    assert growth(before, after, "bdlora_tenant_requests_total", "admitted", "acme") == 2
    assert growth(before, after, "bdlora_tenant_requests_total", "refused", "acme") == 2


def test_the_log_of_requests_names_the_adapter(live, counted):
    """--log-requests-level 0 leaves out prompts, answers and, in SGLang, the adapter."""
    prompt = live.prompt(9)
    live.server.generate([type(live.ask(None))(prompt, counted, None, 2)])
    lines = [line for line in live.server.log.read_text().splitlines() if "Finish: " in line]
    assert re.search(rf"lora_path=\[?'{counted}'", lines[-1]), lines[-1]
    assert str(prompt[:3])[1:-1] not in lines[-1]
