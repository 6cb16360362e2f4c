"""What a request has caused is answered 400 with the reason; a fault of the server stays a 500."""

import asyncio
import contextlib
import math
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from jinja2 import TemplateError
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from sgl_bdlora import malformed


def route(name: str, error: Exception) -> TestClient:
    """An application whose only handler is called `name` and raises `error`."""

    def handler():
        raise error

    handler.__name__ = name
    app = FastAPI()
    app.post("/")(handler)
    malformed.add_handlers(app)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("openai_v1_chat_completions", AttributeError("no attribute 'get'"), "its body has to be a JSON object"),
        ("sagemaker_chat_completions", AttributeError("no attribute 'get'"), "its body has to be a JSON object"),
        ("parse_function_call_request", ValueError("no such parser"), "no such parser"),
        ("separate_reasoning_request", KeyError("name"), "malformed: KeyError: 'name'"),
        ("get_loads", ValueError("no such section"), "no such section"),
        ("ollama_chat", TemplateError("roles must alternate"), "TemplateError: roles must alternate"),
        ("ollama_generate", ValueError("too long"), "too long"),
        ("vertex_generate", TypeError("unexpected keyword"), "malformed: TypeError: unexpected keyword"),
    ],
)
def test_what_a_request_has_caused_is_refused(name, error, said):
    response = route(name, error).post("/")
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("openai_v1_chat_completions", TypeError("of the answer")),
        ("ollama_chat", AttributeError("of the engine")),
        ("vertex_generate", KeyError("of the engine")),
        ("parse_function_call_request", RuntimeError("of the parser")),
        ("bdlora_info", ValueError("of the state")),
    ],
)
def test_a_fault_stays_a_fault(name, error):
    assert route(name, error).post("/").status_code == 500


PARAMETERS = {
    "top_k": [2**40, "a", 2.5, True], "max_new_tokens": [1.5, "many", 10**30], "n": [2.5], "min_new_tokens": [2**31],
    "stream_interval": ["a"], "sampling_seed": [2**70, "x"], "temperature": ["a", [1]], "presence_penalty": ["a"],
    "logit_bias": [[1], {"1": "x"}, {"1": math.inf}],
    "stop_token_ids": [[-1], [100]], "skip_special_tokens": ["a"], "ignore_eos": [[]], "json_schema": [{"type": "object"}], "regex": [5],
    "custom_params": ["a", [1]],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in PARAMETERS.items() for value in values])
def test_sampling_parameters_that_the_scheduler_would_end_with_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^({name} |the request is malformed)"):
        malformed.around_check(lambda: malformed.before_verify(SamplingParams(**{name: value}), 100))


def test_sampling_parameters_that_make_sense_pass():
    malformed.before_verify(SamplingParams(), 100)
    sound = SamplingParams(
        top_k=50.0, temperature=0, stop_token_ids=[99], logit_bias={"5": -1}, ignore_eos=1, json_schema="{}", sampling_seed=2**62,
        max_new_tokens=None,
    )  # fmt: skip
    malformed.before_verify(sound, 100)
    assert isinstance(SamplingParams(top_k=50.0).top_k, float)
    other = SamplingParams(top_k=50.0)
    malformed.before_verify(other, 100)
    assert isinstance(other.top_k, int)


def test_lists_are_for_batches():
    for name in malformed._EACH:
        fields = dict.fromkeys(malformed._EACH) | {name: ["a"]}
        with pytest.raises(ValueError, match=f"^{name}: a list has a value for each prompt"):
            malformed.after_normalize(None, SimpleNamespace(is_single=True, **fields))
        malformed.after_normalize(None, SimpleNamespace(is_single=False, **fields))
    request = GenerateReqInput(text="x")
    request.normalize_batch_and_arguments()
    assert all(
        hasattr(request, name) for name in (*malformed._EACH, "is_single", "top_logprobs_num", "logprob_start_len")
    )


@pytest.mark.parametrize(
    ("multimodal", "picture", "refused"), [(True, "x", False), (True, None, True), (False, "x", True)]
)
def test_pictures_may_have_ids_behind_the_vocabulary(multimodal, picture, refused):
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100, is_multimodal=multimodal))
    request = GenerateReqInput(input_ids=[5, 100], image_data=picture)
    with pytest.raises(ValueError, match="from 0 to 99, got 5 to 100") if refused else contextlib.nullcontext():
        malformed.before_validate_one_request(manager, request, [5, 100])


def anthropic(error: Exception, status: int) -> dict:
    try:
        raise error
    except Exception:
        return malformed.around_anthropic_error(
            lambda serving, **fields: fields, None, status_code=status, error_type="api_error", message="hidden"
        )


def test_only_a_value_error_of_an_anthropic_request_is_the_clients():
    assert anthropic(ValueError("no messages"), 500) == {
        "status_code": 400,
        "error_type": "invalid_request_error",
        "message": "no messages",
    }
    assert anthropic(RuntimeError("secret"), 500)["message"] == "hidden"
    assert anthropic(ValueError("busy"), 503)["status_code"] == 503


def test_a_stream_begins_with_its_first_piece_or_not_at_all():
    async def pieces(error: Exception | None):
        if error:
            raise error
        for piece in (b"a", b"b", b"c"):
            yield piece

    async def stream(serving, error):
        return StreamingResponse(pieces(error))

    async def read() -> list[bytes]:
        response = await malformed.around_ollama_stream(stream, None, None)
        return [piece async for piece in response.body_iterator]

    assert asyncio.run(read()) == [b"a", b"b", b"c"]
    with pytest.raises(ValueError, match="too long"):
        asyncio.run(malformed.around_ollama_stream(stream, None, ValueError("too long")))
