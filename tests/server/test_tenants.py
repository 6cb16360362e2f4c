"""Two API keys on one server: neither finds out a name, a path, a cached prefix or the number of the other's adapters."""

import json
import shutil

import httpx
import pytest
from harness import Ask, check, request_body
from servers import ADMIN_KEY, QWEN2, on

pytestmark = on(QWEN2)

ACME, GLOBEX, HURRIED, BATCHES, SPENT, ADAPTERS_ONLY, LOADER = (
    f"{name}'s own secret key" for name in ("acme", "globex", "hurried", "batches", "spent", "adapters-only", "loader")
)


@pytest.fixture(scope="module")
def stocked(live):
    """acme has two adapters and one together with globex, which has one; one more belongs to nobody."""
    loaded = {
        "acme-sql": "bd4-r16",
        "acme-chat": "plain-r2",
        "globex-law": "bd2-r8",
        "shared": "plain-r32",
        "internal": "bd2-r8",
    }
    live.clear()
    for name, recipe in loaded.items():
        live.load(name, live.folder(recipe))
    yield loaded
    for name in loaded:
        live.unload(name)


def body(live, adapter: str | None, prompt=None, **more) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    return {"input_ids": list(prompt or live.prompt(24)), "lora_path": adapter, "sampling_params": sampling, **more}


def generate(live, key: str, adapter: str | None, prompt=None, **more) -> httpx.Response:
    return live.server.post("/generate", body(live, adapter, prompt, **more), key=key)


def test_a_key_uses_its_adapters_exactly(live, stocked):
    for key, name in (
        (ACME, "acme-sql"),
        (ACME, "shared"),
        (GLOBEX, "globex-law"),
        (ADMIN_KEY, "internal"),
        (ACME, None),
    ):
        folder = live.folder(stocked[name]) if name else None
        asks = [Ask(live.prompt(12), name, folder) for _ in range(2)]
        response = live.server.post("/generate", request_body(asks), key=key)
        assert response.status_code == 200, response.text
        check(live.oracle, asks, map(live.answer, response.json()))
        chat = {
            "model": f"base:{name}" if name else "base",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 2,
        }
        assert live.server.post("/v1/chat/completions", chat, key=key).status_code == 200


def test_a_foreign_adapter_is_answered_like_one_that_nobody_has(live, stocked):
    """Byte for byte, but for the name that was asked for; on every route that takes a name."""
    foreign, unknown = "globex-law", "globex-xyz"
    messages = [{"role": "user", "content": "Hello"}]
    for route, ask in {
        "/generate": lambda name: body(live, name, range(3, 20)),
        "/generate ": lambda name: {**body(live, name, range(3, 20)), "stream": True},
        "/v1/completions": lambda name: {"model": f"base:{name}", "prompt": "Hello", "max_tokens": 2},
        "/v1/completions ": lambda name: {"model": f"base:{name}", "prompt": "Hello", "max_tokens": 2, "stream": True},
        "/v1/chat/completions": lambda name: {
            "model": "base",
            "lora_path": name,
            "messages": messages,
            "max_tokens": 2,
        },
        "/v1/messages": lambda name: {"model": f"base:{name}", "messages": messages, "max_tokens": 2},
        "/invocations": lambda name: {"model": f"base:{name}", "messages": messages, "max_tokens": 2},
        "/vertex_generate": lambda name: {"instances": [{"text": "Hello"}], "parameters": {"lora_path": name}},
    }.items():
        answers = [live.server.post(route.strip(), ask(name), key=ACME) for name in (foreign, unknown)]
        texts = [answer.text.replace(name, "NAME") for answer, name in zip(answers, (foreign, unknown), strict=True)]
        assert texts[0] == texts[1], route
        assert "does not exist" in texts[0], f"{route}: {texts[0]}"
        assert answers[0].status_code == answers[1].status_code, route
        kept = [{k: v for k, v in answer.headers.items() if k not in ("date", "content-length")} for answer in answers]
        assert kept[0] == kept[1], route
        for secret in ("acme-", "internal", "shared", str(live.folder("bd2-r8"))):
            assert secret not in texts[0], f"{route}: {texts[0]}"
    unnamed = live.server.post(
        "/generate", {**body(live, None), "input_ids": [[5, 6], [7, 8]], "lora_path": ["", "acme-sql"]}, key=ACME
    )
    assert unnamed.status_code == 200, unnamed.text
    both = live.server.post(
        "/generate", {**body(live, None), "input_ids": [[5, 6], [7, 8]], "lora_path": ["acme-sql", foreign]}, key=ACME
    )
    assert both.status_code == 400
    assert "does not exist" in both.text


def test_lists_hold_what_is_ones_own_and_no_path(live, stocked):
    for key, own in ((ACME, {"acme-sql", "acme-chat", "shared"}), (GLOBEX, {"globex-law", "shared"})):
        models = live.server.get("/v1/models", key=key)
        assert {card["id"] for card in models.json()["data"]} == {"base", *own}
        info = live.server.get("/bdlora/info", key=key)
        assert {adapter["name"] for adapter in info.json()["adapters"]} == own
        for text in (models.text, info.text):
            for secret in (
                *({*stocked} - own),
                str(live.folder("bd2-r8").parent),
                "pool",
                "resident",
                "requests_",
                "last_used",
            ):
                assert secret not in text, f"{key}: {secret} in {text}"
    everything = live.server.get("/bdlora/info").json()
    assert {adapter["name"] for adapter in everything["adapters"]} >= stocked.keys()


def test_cached_prefixes_are_ones_own(live, stocked):
    """The same prompt on the same adapter, and on the base model: only who asked before finds it in the cache."""
    for adapter in (None, "shared"):
        prompt = live.prompt(64)

        def cached(key: str, name=adapter, asked=prompt, **more) -> int:
            return generate(live, key, name, asked, **more).json()["meta_info"]["cached_tokens"]

        assert cached(ACME) == 0
        assert cached(ACME) > 0
        assert cached(GLOBEX) == 0
        assert cached(GLOBEX, extra_key="") > 0
        assert cached(ADMIN_KEY) == 0
        # Nor by guessing at the key of the cache.
        for guess in ("acme", "", ACME):
            assert cached(ADMIN_KEY, extra_key=guess or "x") == 0
        assert cached(GLOBEX, extra_key="acme") == 0


def test_without_a_key_or_with_a_wrong_one_nothing_is_told(live, stocked):
    for key in ("", "wrong", ACME[:-1], ACME + "x"):
        answers = [
            live.server.post("/generate", body(live, "acme-sql"), key=key),
            live.server.post("/load_lora_adapter", {"lora_name": "x", "lora_path": "/"}, key=key),
            *(
                live.server.get(route, key=key)
                for route in ("/v1/models", "/bdlora/info", "/metrics", "/server_info", "/no-such-route")
            ),
        ]
        # Mounted applications answer every method.
        answers += [
            httpx.options(live.server.base_url + route, headers=live.server.headers(key))
            for route in ("/metrics", "/generate")
        ]
        assert {answer.status_code for answer in answers} == {401}
        assert len({answer.content for answer in answers}) == 1
    assert live.server.get("/health", key="").status_code == 200
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert httpx.options(live.server.base_url + "/generate", headers=asked).headers["access-control-allow-origin"]


def test_other_ways_to_send_a_key(live, stocked):
    for headers, status in (
        ({"x-api-key": ACME}, 200),
        ({"authorization": f"BEARER {ACME}"}, 200),
        ({"authorization": ACME}, 401),
    ):
        assert httpx.get(live.server.base_url + "/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    "route",
    [
        "GET /server_info", "GET /get_server_info", "GET /metrics", "GET /metrics/", "GET /metricsx", "GET /v1/loads", "GET /get_load",
        "POST /load_lora_adapter", "POST /unload_lora_adapter", "POST /load_lora_adapter_from_tensors", "POST /flush_cache",
        "POST /abort_request", "POST /open_session", "POST /close_session", "POST /update_weights_from_disk", "POST /v1/embeddings",
        "POST /v1/score", "POST /v1/rerank", "POST /encode", "POST /classify", "GET /v1/responses/resp_1", "POST /configure_logging",
        "POST /set_trace_level", "GET /docs", "GET /openapi.json", "POST /v1/audio/transcriptions", "GET /no-such-route", "POST //generate",
    ],
)  # fmt: skip
def test_routes_that_are_not_known_to_be_safe_are_closed(live, route):
    method, path = route.split()
    response = httpx.request(
        method, live.server.base_url + path, headers=live.server.headers(ACME), json={"lora_name": "acme-sql"}
    )
    assert response.status_code == 403, response.text
    assert response.json()["error"]["type"] == "permission_error"


def test_fields_that_reach_other_requests_or_files_are_refused(live):
    for field, value in {
        "session_params": {"id": "s"},
        "sampling_params": {"max_new_tokens": 1, "stop_regex": "(x+)+y"},
        "custom_logit_processor": "x",
        "bootstrap_room": 3,
        "image_data": "/etc/passwd",
        "encoder_urls": ["http://127.0.0.1:1"],
    }.items():
        response = generate(live, ACME, None, **{field: value})
        assert (response.status_code, "not available" in response.text or "data: URLs" in response.text) == (
            400,
            True,
        ), response.text
    # Names of requests are one's own: an abort takes all whose name begins like it (Scheduler.abort_request).
    assert generate(live, ACME, None, rid="mine").json()["meta_info"]["id"] != "mine"


def test_an_adapters_id_from_outside_is_not_believed(live, stocked):
    """SGLang's own route would hand it to the scheduler, where no adapter has it."""
    prompt = live.prompt(24)
    expected = generate(live, ADMIN_KEY, None, prompt).json()["text"]
    for key in (ACME, ADMIN_KEY):
        assert generate(live, key, None, prompt, lora_id="0" * 32).json()["text"] == expected


def test_the_base_model_can_be_kept_from_a_key(live, stocked):
    assert generate(live, ADAPTERS_ONLY, "shared").status_code == 200
    for response in (generate(live, ADAPTERS_ONLY, None), generate(live, ADAPTERS_ONLY, "")):
        assert response.status_code == 400
        assert "needs an adapter" in response.text


def test_limits_answer_429_and_when_to_come_again(live):
    for _ in range(3):
        assert generate(live, HURRIED, None).status_code == 200
    for route, ask in (("/generate", body(live, None)), ("/v1/completions", {"model": "base", "prompt": "x"})):
        response = live.server.post(route, ask, key=HURRIED)
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 20
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    # 28 tokens of 30 a minute are left something of; the next request overdraws, and the one after waits for it.
    assert generate(live, SPENT, None).status_code == 200
    assert generate(live, SPENT, None).status_code == 200
    response = generate(live, SPENT, None)
    assert response.status_code == 429
    assert 20 <= int(response.headers["retry-after"]) <= 60


def test_a_batch_counts_as_its_requests(live, stocked):
    def batch(count):
        return live.server.post("/generate", {**body(live, None), "input_ids": [[5, 6]] * count}, key=BATCHES)

    response = batch(500)
    assert response.status_code == 400
    assert "counts as 500 (prompts times n), more than requests_per_minute of this API key lets in: 8" in response.text
    samples = {"model": "base", "prompt": "x", "n": 6, "max_tokens": 1}
    response = live.server.post("/v1/completions", samples, key=BATCHES)
    assert response.status_code == 400
    assert "counts as 6 (prompts times n), more than max_concurrent of this API key lets in: 5" in response.text
    # Six of eight are left, then one, and none: four come in 30 s.
    response = batch(5)
    assert (response.status_code, len(response.json())) == (200, 5)
    response = batch(4)
    assert response.status_code == 429
    assert 20 <= int(response.headers["retry-after"]) <= 30


def test_a_body_has_a_largest_size(live):
    headers = {**live.server.headers(ACME), "content-type": "application/json"}
    huge = b'{"text": "' + b"x" * (33 << 20) + b'"}'
    assert httpx.post(live.server.base_url + "/generate", content=huge, headers=headers, timeout=60).status_code == 413
    parts = (huge[start : start + 2**20] for start in range(0, len(huge), 2**20))
    assert httpx.post(live.server.base_url + "/generate", content=parts, headers=headers, timeout=60).status_code in (
        400,
        413,
    )


def test_responses_are_not_kept_for_others(live, stocked):
    answer = live.server.post("/v1/responses", {"model": "base", "input": "Hello", "max_output_tokens": 2}, key=ACME)
    assert answer.status_code == 200, answer.text
    assert live.server.get(f"/v1/responses/{answer.json()['id']}").status_code == 404
    again = {"model": "base", "input": "Hello", "previous_response_id": answer.json()["id"]}
    assert live.server.post("/v1/responses", again, key=GLOBEX).status_code == 400


def test_streams_are_served_to_the_end(live, stocked):
    ask = {**body(live, "acme-sql"), "stream": True}
    with httpx.stream(
        "POST", live.server.base_url + "/generate", json=ask, headers=live.server.headers(ACME), timeout=60
    ) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["meta_info"]["completion_tokens"] == 4


def test_a_tenant_that_may_load_does_so_from_its_own_directory_under_its_own_names(live, stocked):
    root = live.folder("bd4-r16").parent
    home = shutil.copytree(root / "bd4-r16", root / "loader" / "good").parent
    shutil.copytree(home / "good", home / "bad")
    (home / "bad" / "adapter_model.safetensors").write_bytes(b"")
    (home / "link").symlink_to(root / "bd2-r8")
    try:
        for name, path in (
            ("acme-sql", "good"),
            ("loader-x", "../bd2-r8"),
            ("loader-x", str(root / "bd2-r8")),
            ("loader-x", "link"),
            ("loader-x", "bad"),
        ):
            response = live.server.post("/load_lora_adapter", {"lora_name": name, "lora_path": path}, key=LOADER)
            assert response.status_code == 400, f"{name} {path}: {response.text}"
            assert response.json()["loaded_adapters"] == {}
            assert "acme-chat" not in response.text
        assert str(root) not in response.text
        pinned = {"lora_name": "loader-x", "lora_path": "good", "pinned": True}
        assert live.server.post("/load_lora_adapter", pinned, key=LOADER).status_code == 400
        response = live.server.post("/load_lora_adapter", {"lora_name": "loader-x", "lora_path": "good"}, key=LOADER)
        assert (response.status_code, response.json()["loaded_adapters"]) == (200, {"loader-x": "loader-x"}), (
            response.text
        )
        ask = Ask(live.prompt(12), "loader-x", live.folder("bd4-r16"))
        check(
            live.oracle, [ask], map(live.answer, live.server.post("/generate", request_body([ask]), key=LOADER).json())
        )
        foreign, unknown = (
            live.server.post("/unload_lora_adapter", {"lora_name": name}, key=LOADER)
            for name in ("acme-sql", "acme-xyz")
        )
        assert (foreign.status_code, foreign.text.replace("acme-sql", "")) == (
            400,
            unknown.text.replace("acme-xyz", ""),
        )
        assert live.server.post("/unload_lora_adapter", {"lora_name": "loader-x"}, key=LOADER).status_code == 200
        assert "acme-sql" in live.server.get("/v1/models", key=ACME).text
    finally:
        shutil.rmtree(home)
