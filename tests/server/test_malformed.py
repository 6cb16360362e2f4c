"""Requests that make no sense are refused with a 4xx (sgl_bdlora/malformed.py), and the routes that were mended still answer."""

import json

import pytest
from harness import check
from servers import LLAMA, on

pytestmark = on(LLAMA)

MESSAGES = [{"role": "user", "content": "hi"}]


def test_requests_whose_fields_do_not_fit_together_are_refused(live):
    """SGLang's checks of a request end in errors of Python's own, which it answers with 500 (sgl_bdlora/malformed.py)."""
    live.ensure("bd4-r16")
    prompts = [list(live.prompt(4)), list(live.prompt(4))]
    for fields in (
        {"input_ids": prompts, "lora_path": ["bd4-r16"]},
        {"input_ids": prompts, "sampling_params": [{"max_new_tokens": 1}]},
        {"input_ids": prompts[0], "sampling_params": {"max_new_tokens": "many"}},
        {"input_ids": [], "lora_path": "bd4-r16"},
    ):
        response = live.server.post("/generate", fields)
        assert response.status_code == 400, (fields, response.text)
    fields = {"model": "base", "prompt": prompts[0], "max_tokens": 1, "extra_key": ["a list"]}
    response = live.server.post("/v1/completions", fields)
    assert response.status_code == 400, response.text
    ask = live.ask("bd4-r16", 12)
    check(live.oracle, [ask], live.server.generate([ask]))


LOGPROBS = {"return_logprob": True}


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_path": ["bd4-r16"]},
        {"lora_path": [None]},
        {"extra_key": ["a"]},
        {**LOGPROBS, "logprob_start_len": [0]},
        {**LOGPROBS, "top_logprobs_num": [2]},
        {"return_logprob": [True]},
        {**LOGPROBS, "top_logprobs_num": 60000},
        {**LOGPROBS, "top_logprobs_num": -1},
        {**LOGPROBS, "logprob_start_len": -7},
        {**LOGPROBS, "logprob_start_len": 10**9},
        {**LOGPROBS, "token_ids_logprob": [[1]]},
        {**LOGPROBS, "token_ids_logprob": [10**9]},
        {"input_ids": [10**9]},
        {"input_ids": [-1]},
        {"input_ids": [[]]},
        {"positional_embed_overrides": [1]},
        {"sampling_params": {"top_k": 2**40}},
        {"sampling_params": {"logit_bias": {"1": "x"}}},
        {"sampling_params": {"skip_special_tokens": "a"}},
        {"sampling_params": {"json_schema": {"type": "object"}}},
    ],
    ids=str,
)
def test_what_would_end_the_scheduler_does_not_reach_it(live, fields):
    """Each is SGLang's to refuse, and ended its server: a list where there is one prompt, numbers that no operation takes."""
    live.ensure("bd4-r16")
    body = {
        "input_ids": list(live.prompt(4)),
        "lora_path": "bd4-r16",
        "sampling_params": {"max_new_tokens": 2},
        **fields,
    }
    response = live.server.post("/generate", body)
    assert response.status_code == 400, response.text
    named = fields.get("sampling_params") or fields.keys() - LOGPROBS.keys() or LOGPROBS
    assert next(iter(named)) in response.text
    ask = live.ask("bd4-r16", 4)
    check(live.oracle, [ask], live.server.generate([ask]))


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"model": "base", "prompt": "hi", "lora_path": ["bd4-r16"]}),
        ("/v1/chat/completions", {"model": "base", "messages": MESSAGES, "lora_path": ["bd4-r16"]}),
        ("/v1/chat/completions", {"model": "base", "messages": MESSAGES, "logprobs": True, "top_logprobs": 60000}),
        ("/v1/completions", {"model": "base", "prompt": "hi", "logprobs": 60000}),
        ("/v1/chat/completions", "text"),
        ("/invocations", "text"),
        ("/parse_function_call", {"text": "a"}),
        ("/separate_reasoning", {"text": "a", "reasoning_parser": "absent"}),
        ("/v1/tokenize", {"model": "base", "prompt": "a", "stream": True}),
        ("/v1/detokenize", {"model": "base", "tokens": [[-1]]}),
        ("/v1/messages/count_tokens", {"model": "base", "messages": []}),
        ("/v1/messages", {"model": "base", "messages": [], "max_tokens": 1}),
        ("/vertex_generate", {"instances": [{"text": 5}]}),
        ("/vertex_generate", {"instances": [{"text": "a"}], "parameters": {"absent": 1}}),
        ("/api/chat", {"model": "base", "messages": []}),
        ("/api/chat", {"model": "base", "messages": MESSAGES, "options": {"num_predict": 99999}}),
        ("/api/generate", {"model": "base", "prompt": "a", "options": {"num_predict": "many"}}),
    ],
)
def test_bodies_that_make_no_request_are_refused(live, route, body):
    response = live.server.post(route, body)
    assert response.status_code == 400, response.text
    assert '"message":' in response.text


def test_grammars_bind_answers(live):
    """SGLang has the mask of a grammar for accelerators alone (sgl_bdlora/cpu/hooks.py)."""
    live.ensure("bd4-r16")
    body = {
        "input_ids": list(live.prompt(4)),
        "lora_path": "bd4-r16",
        "sampling_params": {"max_new_tokens": 8, "regex": "[0-9]{3}"},
    }
    response = live.server.post("/generate", body)
    assert response.status_code == 200, response.text
    assert len(response.json()["text"]) == 3
    assert response.json()["text"].isdigit()


@pytest.mark.parametrize("stream", [True, False])
def test_the_ollama_routes_answer(live, stream):
    """Refusing before the first piece must not lose it."""
    common = {"model": "base", "options": {"num_predict": 4, "temperature": 0}, "stream": stream}
    for route, fields in ("/api/chat", {"messages": MESSAGES}), ("/api/generate", {"prompt": "hi"}):
        response = live.server.post(route, {**common, **fields})
        assert response.status_code == 200, response.text
        pieces = [json.loads(line) for line in response.text.splitlines()]
        assert pieces[-1]["done"]
        assert len(pieces) == 1 if not stream else len(pieces) > 1
