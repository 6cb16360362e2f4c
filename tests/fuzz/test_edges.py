"""One field after another at its edges, in requests that are sound otherwise: refused with a 4xx, or answered; none ends the server.

Made-up requests (test_routes.py) seldom have one odd value alone, so that few of theirs reach the scheduler.
"""

import json

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ANSWER_S = 60
HUGE, LONG, LONE = 10**30, "x" * 10**5, "\ud800"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}

# Field -> values.
SAMPLING = {
    "temperature": [-1, 1e30, 1e-30, "a", None], "top_k": [0, -5, 10**9, 2**40, 2.5], "top_p": [0, 2, -1, 1e-30], "min_p": [2, -1],
    "n": [0, -1, 2.5], "stop": [[""], "", [1], {"a": 1}, [None]], "stop_token_ids": [[-1], [10**12], ["a"], 5],
    "stop_regex": ["(", [1]], "logit_bias": [{"999999": 1}, {"-1": 1}, {"abc": 1}, {"1": "x"}, {"1": float("inf")}, [1]],
    "min_new_tokens": [5, -1, "a"], "max_new_tokens": [-1, 0, HUGE, 1.5, None], "repetition_penalty": [0, -1], "frequency_penalty": [99],
    "presence_penalty": ["a"], "json_schema": ["{", "{}", '{"type": "nope"}', {"type": "object"}], "regex": ["(", "a{1,99999}", 5],
    "ebnf": ["x"], "structural_tag": ["{"], "custom_params": ["a", {"__req__": 1}, [1], {"thinking_budget": "x"}],
    "stream_interval": [0, -1, "a"], "ignore_eos": ["x"], "no_stop_trim": [1], "skip_special_tokens": ["a"],
    "spaces_between_special_tokens": [5], "sampling_seed": [-1, 2**70, "x"], "absent": [1],
}  # fmt: skip
FIELDS = {
    "input_ids": [[10**9], [-1], [], [[]], [[], [1]], [2**70], [1.5], [511, 512]],
    "lora_path": [["good"], [None], "", LONE, 5], "lora_id": ["x"], "extra_key": ["", LONE, LONG, ["a"]], "rid": ["", LONG, ["a"]],
    "priority": [HUGE, -HUGE, 5], "session_params": [{}, {"id": "x"}, {"id": 5}, {"id": "x", "rid": "y", "offset": -1}, {"foo": 1}],
    "session_id": ["x"], "return_hidden_states": [True, "last", "x", [True]], "return_routed_experts": [True],
    "routed_experts_start_len": [-5], "return_indexer_topk": [True], "routed_dp_rank": [0, 5, -1], "disagg_prefill_dp_rank": [3],
    "bootstrap_host": ["x", ["x"]], "bootstrap_room": [HUGE, -1], "bootstrap_port": [-1], "bootstrap_pair_key": ["x"],
    "decode_tp_size": [0],
    "multi_item_delimiter_indices": [[0], [-5], [10**9], [[1]]], "token_type_ids": [[1]], "need_wait_for_mm_inputs": [True],
    "num_items_assigned": [{}], "mm_data_mooncake": [[1]], "encoder_urls": [["x"]], "http_worker_ipc": ["ipc:///tmp/x"],
    "image_data": ["x", ["a"]], "video_data": ["x"], "audio_data": ["x"], "modalities": [["x"]], "mm_hashes": [["x"]],
    "positional_embed_overrides": [{"a": 1}, [1]], "custom_logit_processor": ["x"], "require_reasoning": [True], "max_thinking_tokens": [5],
    "return_sampling_mask": [True, [True]], "return_flat_raw_top_logprobs": [True], "return_entropy": [True], "return_bytes": [True],
    "return_prompt_token_ids": [True], "background": [True], "custom_labels": [{"a": "b"}], "external_trace_header": [{"a": 1}],
    "received_time": [-1.0], "conversation_id": ["x"], "routing_key": ["x"], "return_logprob": [[True]],
    "top_logprobs_num": [-1, 512, 60000, [2]], "logprob_start_len": [-7, 0, 4, 10**9, [0]],
    "token_ids_logprob": [[[1]], [10**9], list(range(512)) * 3],
}  # fmt: skip
TEXTS = ["", LONE, LONG]
EMBEDS = [[[0.0]], [], [[]], [[0.0] * 128], [[1e300] * 128], "x"]
COMPLETION = {
    "prompt": [["x", "y"], [1, 2], [[1], [2]], [], "", [10**9], [[-1]]], "logprobs": [512, -1, 60000], "n": [0],
    "best_of": [5], "suffix": ["x"],
    "seed": [2**70], "logit_bias": [{"9999999": 5}, {"-3": 5}], "cache_salt": [["x"]], "priority": [HUGE], "stop": [[""]],
    "temperature": [-1], "json_schema": ["{"], "response_format": [SCHEMA], "return_hidden_states": [True], "session_params": [{"id": "x"}],
    "min_tokens": [50], "bootstrap_room": [[1]], "rid": [["a"]], "custom_logit_processor": [["x"]], "lora_path": [["good"]],
}  # fmt: skip
CHAT = {
    "top_logprobs": [512, -1, 60000], "n": [0], "tool_choice": [{"type": "function", "function": {"name": "absent"}}],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": {"type": "nope"}}}]],
    "response_format": [SCHEMA, {"type": "structural_tag", "structures": [], "triggers": []}],
    "messages": [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}], [{"role": "assistant", "content": "x"}],
    ],
    "logit_bias": [{"a": 1}], "chat_template_kwargs": [{"x": 1}], "ebnf": ["x"], "regex": ["("], "rid": [["x"]],
    "session_params": [{"id": "x"}],
    "bootstrap_room": [[1]], "reasoning_effort": ["high"], "separate_reasoning": [True], "cache_salt": [["x"]], "lora_path": [["good"]],
}  # fmt: skip


def bodies(usual: dict, fields: dict) -> list[dict]:
    return [{**usual, name: value} for name, values in fields.items() for value in values]


GENERATE = {"input_ids": [5, 6, 7, 8], "lora_path": "good", "sampling_params": {"max_new_tokens": 2}}
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}
CASES = {
    "/generate": [
        *bodies(GENERATE, {"sampling_params": bodies({"max_new_tokens": 2}, SAMPLING)}),
        *bodies({**GENERATE, **LOGPROBS}, FIELDS),
        *bodies({**GENERATE, "input_ids": None}, {"text": TEXTS, "input_embeds": EMBEDS}),
        {**GENERATE, "stream": True, "sampling_params": {"max_new_tokens": 2, "n": 3}},
    ],
    "/v1/completions": bodies({"model": "base:good", "prompt": "x", "max_tokens": 2}, COMPLETION),
    "/v1/chat/completions": bodies(
        {"model": "base:good", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logprobs": True}, CHAT
    ),
}


@pytest.mark.parametrize("route", CASES)
def test_odd_values_reach_no_scheduler(server, probe, route):
    failed = []
    for body in CASES[route]:
        content, kind = json.dumps(body), {"Content-Type": "application/json"}
        answer = httpx.post(server.base_url + route, content=content, headers=kind, timeout=ANSWER_S)
        if answer.status_code >= 500:
            failed.append((answer.status_code, content[:300], answer.text[:200]))
        probe()
    assert not failed, failed
