"""Requests made up from the server's own OpenAPI description: refused with a 4xx, or answered; none crashes or hangs the server.

docs/fuzzing.md says what was found.
"""

import contextlib
import json
import os
from collections import Counter

import httpx
import pytest
from budget import settings_for
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is missing: uv pip install -e '.[dev]'")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# For each route and each kind of case; `make fuzz` asks for 100.
CASES = int(os.environ.get("BDLORA_FUZZ_REQUESTS", "10"))
ANSWER_S = 60

# What loads, unloads, names or lists adapters.
ADAPTER_ROUTES = (
    ("POST", "/load_lora_adapter"), ("POST", "/unload_lora_adapter"), ("POST", "/load_lora_adapter_from_tensors"),
    ("GET", "/bdlora/info"), ("POST", "/generate"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"), ("POST", "/v1/score"), ("POST", "/v1/classify"), ("POST", "/v1/responses"),
    ("POST", "/v1/messages"), ("POST", "/encode"), ("POST", "/classify"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}"),
)  # fmt: skip

# Administration, which by its purpose stops, changes or slows the server or writes files, and what waits for another machine.
CONTROL = (
    "/abort_request", "/add_external_corpus", "/clear_hicache", "/close_session", "/configure_logging", "/continue_generation",
    "/destroy_weights_update_group", "/dump_expert_distribution_record", "/freeze_gc", "/get_remote_instance", "/get_weights_by_name",
    "/health", "/hicache", "/init_weights", "/is_scaling_elastic_ep", "/list_external_corpora", "/open_session", "/pause_generation",
    "/release_memory_occupation", "/remote_instance", "/remove_external_corpus", "/resume_memory_occupation", "/scale_elastic_ep",
    "/send_weights", "/set_internal_state", "/set_trace_level", "/slow_down", "/start_", "/stop_", "/update_weight", "/weights_checker",
)  # fmt: skip

NAMES = st.sampled_from(
    ["good", "other", "absent", "", "base", "base:good", "base:absent", ":", "good\0", "\ud800", "x" * 5000]
)


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_dict(httpx.get(f"{server.base_url}/openapi.json", timeout=60).json())


def tame(value):
    """Work that was asked for is done: how much of it a request asks for is bounded here, as a proxy would bound it."""
    most = {
        "max_new_tokens": 8,
        "max_tokens": 8,
        "max_completion_tokens": 8,
        "max_output_tokens": 8,
        "num_predict": 8,
        "n": 4,
        "best_of": 4,
    }
    if isinstance(value, dict):
        tamed = {key: tame(part) for key, part in value.items()}
        return {k: min(v, most[k]) if k in most and isinstance(v, (int, float)) else v for k, v in tamed.items()}
    return [tame(part) for part in value] if isinstance(value, list) else value


# Requests as a client would make them, with one thing or another not as it should be.
USUAL = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(max_size=20) | st.lists(st.text(max_size=5), max_size=3),
        "input_ids": st.lists(st.integers(-2, 600), max_size=6),
        "prompt": st.text(max_size=20),
        "input": st.text(max_size=20),
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=9)}), max_size=2
        ),
        "model": NAMES | st.none(),
        "lora_path": NAMES | st.none() | st.lists(NAMES | st.none(), max_size=3) | st.integers(),
        "lora_name": NAMES,
        "sampling_params": st.fixed_dictionaries({"max_new_tokens": st.integers(-1, 4)}),
        "max_tokens": st.integers(-1, 4),
        # Without it SGLang's Ollama routes ask for 2048 tokens, more than the tiny model's context.
        "options": st.fixed_dictionaries({"num_predict": st.integers(-1, 4)}),
        "stream": st.booleans(),
    },
)
RAW = st.binary(max_size=60) | st.sampled_from(
    [
        b"[" * 9000,
        b"{" * 9000,
        b"null",
        b'"x"',
        b"1e999",
        b'{"text": "\\ud800"}',
        b'{"lora_name": "\\ud800", "lora_path": "\\u0000"}',
    ]
)


def send(
    client: httpx.Client, method: str, path: str, body=None, raw: bytes | None = None, query=None
) -> httpx.Response:
    content = raw if raw is not None else json.dumps(tame(body)).encode() if body is not None else None
    return client.request(method, path, content=content, params=query, headers={"Content-Type": "application/json"})


def fuzz(server, schema, method: str, path: str) -> tuple[Counter, list]:
    """Status code -> how often, and the requests that were answered with a 5xx or half an answer. Raises what does not answer in time."""
    statuses, failed = Counter(), []
    # A connection for each request: a kept one may be closed by the server while a case is made up.
    client = httpx.Client(base_url=server.base_url, timeout=ANSWER_S, limits=httpx.Limits(max_keepalive_connections=0))

    def ask(**request) -> None:
        try:
            response = send(client, method, **request)
        except httpx.RemoteProtocolError as error:
            statuses["broken off"] += 1
            failed.append((request, repr(error)))
            return
        statuses[response.status_code] += 1
        if response.status_code >= 500:
            failed.append((request, response.text[:300]))

    def as_described(case) -> None:
        body = case.body if isinstance(case.body, (dict, list, str, int, float, bool)) else None
        with contextlib.suppress(httpx.InvalidURL):
            ask(path=case.formatted_path, body=body, query=case.query or None)

    operation = schema[path][method]
    # Schemathesis takes seconds to make up a body that does not fit a large description.
    for mode, cases in (
        (schemathesis.GenerationMode.POSITIVE, CASES),
        (schemathesis.GenerationMode.NEGATIVE, CASES // 5),
    ):
        # A description without parameters leaves nothing to do wrong.
        with contextlib.suppress(Unsatisfiable):
            run(operation.as_strategy(generation_mode=mode), cases, as_described)
    if method == "POST":
        run(USUAL, CASES, lambda body: ask(path=path.replace("{model}", "good"), body=body))
        run(RAW, CASES, lambda content: ask(path=path.replace("{model}", "%00"), raw=content))
    client.close()
    assert statuses
    return statuses, failed


def run(strategy: st.SearchStrategy, cases: int, act) -> None:
    @seed(1)
    @settings(settings_for(cases), phases=[Phase.generate])
    @given(strategy)
    def body(case):
        act(case)

    body()


@pytest.mark.parametrize(("method", "path"), ADAPTER_ROUTES, ids=lambda word: word.strip("/"))
def test_routes_that_take_adapters(server, schema, probe, method, path):
    statuses, failed = fuzz(server, schema, method, path)
    print(f"{method} {path}: {dict(statuses)}")
    probe()
    assert not failed, failed[:3]


def test_other_routes(server, schema, probe):
    failing = {}
    for path, operations in schema.raw_schema["paths"].items():
        if path.startswith(CONTROL):
            continue
        for method in (name.upper() for name in operations):
            if (method, path) in ADAPTER_ROUTES:
                continue
            statuses, failed = fuzz(server, schema, method, path)
            print(f"{method} {path}: {dict(statuses)}")
            probe()
            if failed:
                failing[f"{method} {path}"] = failed[:3]
    assert not failing, json.dumps(failing, indent=1, default=repr)
