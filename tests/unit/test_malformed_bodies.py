"""What a request has caused is answered 400 with the reason; a fault of the server stays a 500."""

import asyncio

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from jinja2 import TemplateError

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
