"""Everything around the forward pass: prefix cache, streaming, the OpenAI routes, adapters that come and go."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
from harness import Answer, Ask, check, request_body
from servers import LLAMA, on
from zoo import Recipe, write_adapter

pytestmark = on(LLAMA)


def test_prefix_cache_hits_stay_exact(live):
    recipes = (None, "bd4-r16", "plain-r2", "plain-vocabulary")
    asks = [live.ask(recipe, 70, prompt_logprobs=False) for recipe in recipes]
    # Another test's random prompt may begin with the same token.
    live.server.flush_cache()
    first = live.server.generate(asks)
    assert [answer.cached_tokens for answer in first] == [0] * len(asks)
    again = live.server.generate(asks)
    assert all(answer.cached_tokens >= 60 for answer in again), [answer.cached_tokens for answer in again]
    longer = [replace(ask, prompt=ask.prompt + live.prompt(15)) for ask in asks]
    extended = live.server.generate(longer)
    assert all(answer.cached_tokens >= 60 for answer in extended)
    check(live.oracle, asks + asks + longer, first + again + extended)


def test_prefix_cache_is_not_shared_between_adapters(live):
    prompt = live.prompt(50)
    live.server.flush_cache()
    for recipe in (None, "bd2-r8", "plain-r2", "bd8-r32", "plain-embedding"):
        asks = [live.ask(recipe, prompt=prompt, prompt_logprobs=False)]
        answers = live.server.generate(asks)
        assert answers[0].cached_tokens == 0
        check(live.oracle, asks, answers)


def test_another_adapter_under_an_old_name_never_sees_its_cache(live, tmp_path):
    """Also when it lies in the same directory."""
    prompt, served = live.prompt(50), tmp_path / "served"
    for seed in (101, 102):
        folder = _put_weights(live, seed, served)
        live.load("reloaded", served)
        _exact_at_first_and_from_cache(live, Ask(prompt, "reloaded", folder, prompt_logprobs=False))
        live.unload("reloaded")


def test_an_unloaded_adapter_that_is_asked_for_is_read_again(live, tmp_path):
    """SGLang remembers where it was (managers/tokenizer_manager.py: lora_ref_cache); what it was must not come back."""
    prompt, served = live.prompt(50), tmp_path / "served"
    folder = _put_weights(live, 103, served)
    live.load("returning", served)
    _exact_at_first_and_from_cache(live, Ask(prompt, "returning", folder, prompt_logprobs=False))
    live.unload("returning")
    folder = _put_weights(live, 104, served)
    _exact_at_first_and_from_cache(live, Ask(prompt, "returning", folder, prompt_logprobs=False))
    live.unload("returning")


def _put_weights(live, seed: int, target: Path) -> Path:
    """Make ``target`` hold the adapter of ``seed``; returns the directory that the oracle knows it by."""
    folder = live.zoo.adapter(live.served.family, Recipe(f"reloaded-{seed}", 8, 4, seed=seed))
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return folder


def _exact_at_first_and_from_cache(live, ask: Ask) -> None:
    first = live.server.generate([ask])
    assert first[0].cached_tokens == 0
    again = live.server.generate([ask])
    assert again[0].cached_tokens >= 40
    check(live.oracle, [ask, ask], first + again)


def _stream(live, ask: Ask) -> Iterator[Answer]:
    """The growing answer to a streamed request."""
    body = {key: value[0] if isinstance(value, list) else value for key, value in request_body([ask]).items()}
    url = live.server.base_url + "/generate"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield Answer.parse(json.loads(line.removeprefix("data: ")))


def test_streaming(live):
    """The stream's pieces arrive one after another, and its last one holds the whole answer."""
    ask = live.ask("bd4-patterns", 20, new_tokens=12)
    pieces = list(_stream(live, ask))
    assert len(pieces) > 1
    assert len(pieces[0].tokens) < 12
    check(live.oracle, [ask], pieces[-1:])


def test_chat_completions_name_an_adapter_after_a_colon(live):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(live.zoo.model(live.served.family))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    for recipe in ("bd4-r16", None, "plain-r32"):
        if recipe:
            live.ensure(recipe)
        folder = recipe and live.folder(recipe)
        body = {
            "model": f"base:{recipe}" if recipe else "base",
            "messages": messages,
            "temperature": 0,
            "max_tokens": 10,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 1,
        }
        response = live.server.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        content = response.json()["choices"][0]["logprobs"]["content"]
        expected = live.oracle.greedy(prompt, 10, folder)
        assert response.json()["usage"]["prompt_tokens"] == len(prompt)
        score = live.oracle.score(prompt + expected, folder)
        for i, (token, served) in enumerate(zip(expected, content, strict=True)):
            assert served["token"] == tokenizer.decode([token])
            assert abs(served["logprob"] - score.of(len(prompt) + i, token)) <= 1e-4

    response = live.server.post("/v1/chat/completions", {**body, "model": "base:no-such-adapter"})
    assert response.status_code == 400
    assert "no-such-adapter" in response.text


def test_models_route_lists_loaded_adapters(live):
    live.ensure("bd4-r16")
    models = httpx.get(live.server.base_url + "/v1/models", timeout=30).json()["data"]
    assert {"base", "bd4-r16"} <= {model["id"] for model in models}


def test_adapters_come_and_go_while_requests_run(live, tmp_path):
    """Two clients keep asking while six adapters are loaded, asked for and unloaded; everyone gets the right answer."""
    family, stop, failures, rounds = live.served.family, threading.Event(), [], []
    steady = [live.ask(recipe, 15) for recipe in (None, "bd4-r16", "plain-r2", "bd2-attention")]

    def keep_asking():
        while not stop.is_set():
            try:
                check(live.oracle, steady, live.server.generate(steady))
                rounds.append(1)
            except BaseException as error:  # handed to the test's own thread
                failures.append(error)
                return

    check(live.oracle, steady, live.server.generate(steady))
    clients = [threading.Thread(target=keep_asking) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for i in range(6):
            recipe = Recipe(f"passing-{i}", 4 + 4 * i, (None, 1, 2, 4)[i % 4], seed=200 + i)
            folder = write_adapter(live.zoo.model(family), recipe, tmp_path / recipe.name)
            live.load(recipe.name, folder)
            asks = [Ask(live.prompt(12), recipe.name, folder), live.ask("bd8-r32", 12)]
            check(live.oracle, asks, live.server.generate(asks))
            live.unload(recipe.name)
    finally:
        stop.set()
        for client in clients:
            client.join(60)
    assert not failures, failures[0]
    assert len(rounds) >= 2


def test_unloading_waits_for_running_requests(live, tmp_path):
    recipe = Recipe("leaving", 8, 2, seed=300)
    folder = write_adapter(live.zoo.model(live.served.family), recipe, tmp_path / "leaving")
    live.load("leaving", folder)
    ask = Ask(live.prompt(10), "leaving", folder, new_tokens=100)
    pieces = _stream(live, ask)
    first = next(pieces)
    assert len(first.tokens) < 100
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(live.unload, "leaving")
        *_, last = pieces
        unloading.result(60)
    check(live.oracle, [ask], [last])
