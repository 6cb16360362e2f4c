"""What the middleware lets through and what a tenant's request may hold, without a server behind them."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from sgl_bdlora import cpu

cpu.prepare_environment()

from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput, LoRAUpdateOutput  # noqa: E402

from sgl_bdlora import config  # noqa: E402
from sgl_bdlora.tenants import ADMIN, Tenant, Tenants, digest, principal  # noqa: E402
from sgl_bdlora.tenants import requests as tenants_requests  # noqa: E402
from sgl_bdlora.tenants.http import TenantMiddleware  # noqa: E402
from sgl_bdlora.tenants.limits import Limits  # noqa: E402
from sgl_bdlora.tenants.requests import NotServed, around_load_lora_adapter, around_unload_lora_adapter, restrict  # noqa: E402

KEY, ADMIN_KEY = b"the tenant's key", b"administrator"


def tenant(**fields) -> Tenant:
    given = {"base": True, "may_load": False, "metrics": False, "max_body_bytes": 100, "limits": Limits(), **fields}
    return Tenant("acme", digest(KEY), ("acme-*",), **given)


# The middleware


def request(
    one: Tenant,
    method="POST",
    path="/generate",
    key=KEY,
    body=(b"{}",),
    kind="http",
    status=200,
    application=None,
    **headers,
):
    """Sends it through the middleware. Returns (status, headers, body, who it came from) with an application that answers `status`."""
    sent, seen, parts = [], [], list(body)

    async def answering(scope, receive, send):
        seen.append(principal.get())
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"answered"})

    async def receive():
        if not parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    head = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    if key is not None:
        head.append((b"authorization", b"Bearer " + key))
    scope = {"type": kind, "method": method, "path": path, "headers": head, "root_path": ""}
    middleware = TenantMiddleware(
        application or answering, Tenants([one], ADMIN_KEY.decode()), lambda who: {"data": who.name}
    )
    asyncio.run(middleware(scope, receive, send))
    if kind == "websocket":
        return sent, seen
    start = next(message for message in sent if message["type"] == "http.response.start")
    answer = b"".join(message.get("body", b"") for message in sent)
    return start["status"], dict(start["headers"]), answer, seen


def test_who_a_request_comes_from():
    one = tenant()
    assert request(one)[3] == [one]
    assert request(one, key=ADMIN_KEY, path="/server_info", method="GET")[3] == [ADMIN]
    assert request(one, key=None, method="GET", path="/health")[3] == [ADMIN]
    assert request(one, key=None, x_api_key=KEY)[3] == [one]


@pytest.mark.parametrize("key", [None, b"", b"wrong", KEY + b"x", KEY.upper()])
@pytest.mark.parametrize("path", ["/generate", "/metrics", "/v1/models", "/healthx", "/no-such-route"])
def test_without_a_key_nothing_is_reached(key, path):
    answers = [request(tenant(), method, path, key)[:3] for method in ("GET", "POST", "OPTIONS", "HEAD", "DELETE")]
    assert {status for status, _, _ in answers} == {401}
    assert len({answer for _, _, answer in answers}) == 1
    assert answers[0][1][b"www-authenticate"] == b"Bearer"


def test_browsers_may_ask_beforehand():
    asks = {"origin": b"https://example.org", "access_control_request_method": b"POST"}
    assert request(tenant(), "OPTIONS", key=None, **asks)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", "/generate", {}, 403),
        ("POST", "/generate/", {}, 403),
        ("POST", "/load_lora_adapter", {}, 403),
        ("POST", "/load_lora_adapter", {"may_load": True}, 200),
        ("POST", "/load_lora_adapter_from_tensors", {"may_load": True}, 403),
        ("GET", "/metrics", {}, 403),
        ("GET", "/metrics", {"metrics": True}, 200),
        ("GET", "/metricsx", {"metrics": True}, 403),
        ("GET", "/v1/models/acme-x", {}, 200),
        ("POST", "/v1/models/acme-x", {}, 403),
        ("GET", "/server_info", {"may_load": True, "metrics": True}, 403),
    ],
)
def test_routes(method, path, fields, status):
    assert request(tenant(**fields), method, path)[0] == status


def test_a_list_of_models_is_made_here():
    status, _, answer, seen = request(tenant(), "GET", "/v1/models")
    assert (status, json.loads(answer), seen) == (200, {"data": "acme"}, [])


def test_websockets_are_the_administrators():
    sent, seen = request(tenant(), kind="websocket")
    assert (sent, seen) == ([{"type": "websocket.close", "code": 1008}], [])
    assert request(tenant(), kind="websocket", key=ADMIN_KEY)[1] == [ADMIN]


def test_a_large_body_is_refused_announced_or_not():
    assert request(tenant(), content_length=b"100")[0] == 200
    for length in (b"101", b"-1", b"1e2", b"9" * 30):
        assert request(tenant(), content_length=length)[0] == 413
    assert request(tenant(), body=[b"x" * 60, b"x" * 40])[0] == 200
    assert request(tenant(), body=[b"x" * 60, b"x" * 41])[0] == 413


def test_limits_come_before_the_application():
    one = tenant(limits=Limits(requests_per_minute=1))
    assert request(one)[0] == 200
    status, headers, answer, seen = request(one)
    assert (status, headers[b"retry-after"], seen) == (429, b"60", [])
    assert json.loads(answer)["error"]["code"] == "rate_limit_exceeded"
    assert json.loads(request(one, path="/v1/messages")[2]) == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "limit of 1 requests per minute"},
    }
    assert request(one, "GET", "/model_info")[0] == 200
    assert request(tenant(), status=429)[1][b"retry-after"] == b"1"


# Requests


MANAGER = SimpleNamespace(lora_ref_cache={"acme-sql": 0, "other": 0}, gracefully_exit=False)


def restricted(one: Tenant, **fields) -> GenerateReqInput:
    asked = GenerateReqInput(**{"text": "x", **fields})
    restrict(one, MANAGER, asked)
    return asked


def test_only_its_own_adapters_that_there_are():
    for names in ("acme-sql", None, "", ["acme-sql", None, ""]):
        restricted(tenant(), lora_path=names)
    assert restricted(tenant(), lora_path=["", "acme-sql"]).lora_path == [None, "acme-sql"]
    messages = set()
    for name in ("other", "acme-none", "none"):
        for names in (name, [None, name], ["acme-sql", name]):
            with pytest.raises(NotServed) as caught:
                restricted(tenant(), lora_path=names)
            messages.add(str(caught.value).replace(name, "NAME"))
    assert messages == {"LoRA adapter 'NAME' does not exist"}


def test_the_base_model_only_where_it_is_granted():
    for names in (None, "", ["acme-sql", None], ["", "acme-sql"]):
        with pytest.raises(NotServed, match="needs an adapter"):
            restricted(tenant(base=False), lora_path=names)
    restricted(tenant(base=False), lora_path=["acme-sql"])


def test_fields_are_open_one_by_one():
    """Whatever SGLang adds is closed."""
    free = {*tenants_requests._OPEN_FIELDS, *tenants_requests._RESET_FIELDS}
    closed = GenerateReqInput.__dataclass_fields__.keys() - free
    assert {
        "session_params",
        "custom_logit_processor",
        "bootstrap_host",
        "input_embeds",
        "encoder_urls",
        "http_worker_ipc",
    } <= closed
    for name in closed:
        with pytest.raises(NotServed):
            restricted(tenant(), **{name: "something"})
    assert free <= GenerateReqInput.__dataclass_fields__.keys()


def test_what_belongs_to_all_is_set_back():
    given = restricted(tenant(), rid="a", session_id="s", lora_id="i", priority=9, log_metrics=False, no_logs=True)
    assert (given.rid, given.session_id, given.lora_id, given.priority, given.log_metrics, given.no_logs) == (
        None,
        None,
        None,
        None,
        True,
        False,
    )


def test_images_come_with_the_request():
    for good in ("data:image/png;base64,AAAA", [["data:x"], "data:y"], SimpleNamespace(url="data:z")):
        restricted(tenant(), image_data=good)
    for bad in (
        "/etc/passwd",
        "https://example.org/x.png",
        ["data:x", "file:///x"],
        {"url": "data:x"},
        SimpleNamespace(url="/x"),
        b"data:",
    ):
        with pytest.raises(NotServed, match="data: URLs"):
            restricted(tenant(), image_data=bad)


def test_what_has_no_place_in_the_prefix_cache_is_refused():
    with pytest.raises(NotServed, match="embeddings"):
        restrict(tenant(), MANAGER, EmbeddingReqInput(text="x"))
    for parameters in ({"stop_regex": "(a+)+b"}, [{}, {"stop_regex": ["x"]}]):
        with pytest.raises(NotServed, match="stop_regex"):
            restricted(tenant(), sampling_params=parameters)


def test_keys_of_the_prefix_cache_never_meet():
    one, other = tenant(), tenant()
    keys = [
        restricted(who, extra_key=given).extra_key
        for who in (one, other)
        for given in (None, "x", "y", other.salt, one.salt)
    ]
    assert len(set(keys)) == len(keys)
    assert len({len(key) for key in keys}) == 1
    assert restricted(one, extra_key="x").extra_key == keys[1]
    assert restricted(one, text=["a", "b"], extra_key=["x", "y"]).extra_key == keys[1:3]


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"text": "x"}, 1),
        ({"text": ["x", "y"]}, 2),
        ({"text": None, "input_ids": [1, 2, 3]}, 1),
        ({"text": None, "input_ids": [[1, 2], [3]], "sampling_params": {"n": 3}}, 6),
        ({"text": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 4}]}, 8),
        ({"text": "x", "sampling_params": {"n": -5}}, 1),
        ({"text": None, "input_ids": [(1, 2), (3,)]}, 2),
    ],
)
def test_a_batch_counts_as_its_requests(fields, count):
    assert tenants_requests._requests_in(GenerateReqInput(**fields)) == count


def generate(one, outputs, error=None, **asked):
    """Runs a tenant's request whose engine gives these outputs."""

    async def engine(manager, obj, request):
        for output in outputs:
            yield output
        if error is not None:
            raise error

    async def run():
        principal.set(one)
        manager = SimpleNamespace(
            server_args=SimpleNamespace(lora_backend=config.BACKEND),
            gracefully_exit=False,
            lora_ref_cache={"acme-sql": 0},
        )
        return [
            out
            async for out in tenants_requests.around_generate_request(
                engine, manager, GenerateReqInput(**{"text": "x", "lora_path": "acme-sql", **asked})
            )
        ]

    return asyncio.run(run())


def meta(rid, prompt, completion):
    return {"meta_info": {"id": rid, "prompt_tokens": prompt, "completion_tokens": completion}}


def test_tokens_are_taken_off_as_they_come():
    one = tenant(limits=Limits(tokens_per_minute=1000, clock=lambda: 0.0))
    outputs = [meta("a", 10, 1), meta("a", 10, 5), [meta("b", 20, 2), meta("c", 30, 3)]]
    assert generate(one, outputs) == outputs
    assert one.limits._tokens._level == 1000 - 15 - 22 - 33
    assert one.limits.running == 0


@pytest.mark.parametrize(
    "asked", [{"text": ["x"] * 500, "lora_path": None}, {"sampling_params": {"n": 500}}], ids=["batch", "samples"]
)
@pytest.mark.parametrize("limit", ["requests_per_minute", "max_concurrent"])
def test_more_than_a_limit_lets_in_is_a_bad_request(asked, limit):
    """SGLang's routes answer a ValueError without a status with 400."""
    one = tenant(limits=Limits(**{limit: 499}))
    with pytest.raises(ValueError, match=f"counts as 500 .*{limit} of this API key lets in: 499") as caught:
        generate(one, ["never"], **asked)
    assert not hasattr(caught.value, "status_code")
    assert generate(tenant(limits=Limits(**{limit: 500})), [], **asked) == []


def test_a_batch_that_is_too_early_is_told_when_to_come_again():
    one = tenant(limits=Limits(requests_per_minute=10, clock=lambda: 0.0))
    one.limits.admit()

    async def application(scope, receive, send):
        """Answers as SGLang's routes do, which hand on a refusal's status and none of its headers."""

        async def serve():
            manager = SimpleNamespace(**vars(MANAGER), server_args=SimpleNamespace(lora_backend=config.BACKEND))
            answers = tenants_requests.around_generate_request(None, manager, GenerateReqInput(text=["x"] * 10))
            with pytest.raises(tenants_requests.Refused, match="10 requests per minute") as caught:
                await anext(answers)
            return caught.value.status_code

        status = await asyncio.create_task(serve())
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    status, headers, _, _ = request(one, application=application)
    # Two of ten are taken off: its own one and the one before.
    assert (status, headers[b"retry-after"]) == (429, b"12")


def test_a_list_of_all_adapters_in_an_error_is_not_passed_on():
    with pytest.raises(NotServed, match="'acme-sql' does not exist"):
        generate(tenant(), [], ValueError("... are not loaded: acme-sql\nLoaded adapters: odict_keys(['other'])."))
    with pytest.raises(ValueError, match="too long"):
        generate(tenant(), [], ValueError("too long"))


def test_a_server_that_shuts_down_takes_nothing_new():
    manager = SimpleNamespace(server_args=SimpleNamespace(lora_backend=config.BACKEND), gracefully_exit=True)
    with pytest.raises(ValueError, match="shutting down") as caught:
        tenants_requests.around_generate_request(None, manager, GenerateReqInput(text="x"))
    assert caught.value.status_code == 503


# Loading


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("acme/good", "other/secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "acme" / "link").symlink_to(tmp_path / "other" / "secret")
    monkeypatch.setenv(config.ENV, json.dumps({"adapter_root": str(tmp_path)}))
    return tmp_path


def load(one, name, path, pinned=False, answer=None, request=True):
    """Returns what it answers and the path that reached SGLang."""
    reached = []

    async def original(manager, obj, request):
        reached.append(obj.lora_path)
        return answer or LoRAUpdateOutput(success=True, loaded_adapters={"other": "x"})

    async def run():
        principal.set(one)
        obj = SimpleNamespace(lora_name=name, lora_path=path, pinned=pinned)
        return await around_load_lora_adapter(original, None, obj, request or None)

    return asyncio.run(run()), reached


def test_a_tenant_loads_from_its_directory(root):
    result, reached = load(tenant(may_load=True), "acme-x", "good")
    assert (result.success, result.loaded_adapters, reached) == (True, {}, [str(root / "acme" / "good")])
    # SGLang reads an evicted adapter again by the path that it has.
    assert load(tenant(may_load=True), "acme-x", "/anywhere", request=False)[1] == ["/anywhere"]
    assert load(ADMIN, "any", "/anywhere")[1] == ["/anywhere"]


@pytest.mark.parametrize(
    ("name", "path", "fields"),
    [
        ("other", "good", {}),
        ("acme-x", "../other/secret", {}),
        ("acme-x", "link", {}),
        ("acme-x", "/", {}),
        ("acme-x", "good", {"pinned": True}),
    ],
)
def test_and_from_nowhere_else(root, name, path, fields):
    result, reached = load(tenant(may_load=True), name, path, **fields)
    assert (result.success, result.loaded_adapters, reached) == (False, {}, [])
    assert str(root) not in result.error_message


def test_refusals_show_neither_the_root_nor_others(root):
    for message, shown in (
        (f"LoRA adapter 'acme-x': {root}/acme/good has no x", "LoRA adapter 'acme-x': ./good has no x"),
        ("LoRA registry is: other", "LoRA adapter 'acme-x' could not be loaded"),
    ):
        refused = LoRAUpdateOutput(success=False, error_message=message, loaded_adapters={"other": "x"})
        result, _ = load(tenant(may_load=True), "acme-x", "good", answer=refused)
        assert (result.success, result.error_message, result.loaded_adapters) == (False, shown, {})


def test_a_tenant_unloads_what_it_sees(root):
    async def original(manager, obj, request):
        return LoRAUpdateOutput(success=True, loaded_adapters={"other": "x"})

    def unload(name):
        async def run():
            one = tenant(may_load=True)
            one.loaded["acme-x"] = None
            principal.set(one)
            return await around_unload_lora_adapter(original, None, SimpleNamespace(lora_name=name), object())

        return asyncio.run(run())

    assert unload("acme-x").success
    foreign, unknown = unload("other"), unload("xxxxx")
    assert (foreign.success, foreign.error_message) == (False, unknown.error_message.replace("xxxxx", "other"))
