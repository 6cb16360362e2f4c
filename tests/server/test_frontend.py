"""Programs of SGLang's frontend language whose calls and branches are for different adapters."""

import importlib.util
import sys
import threading
from pathlib import Path

import httpx
import pytest
import sglang as sgl
from servers import LLAMA, on

from sgl_bdlora import frontend
from sgl_bdlora.adapters import AdapterError
from sgl_bdlora.frontend import Endpoint, fork, result, use

pytestmark = on(LLAMA)

ADAPTERS = (None, "bd4-r16", "plain-r2", "bd2-r8")
QUESTION = "What is the capital of France?"
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def endpoint(live):
    for adapter in ADAPTERS[1:]:
        live.ensure(adapter)
    live.server.flush_cache()
    return Endpoint(live.server.base_url, chat_template_name="chatml")


def generate(live, adapter, text=QUESTION, tokens=12) -> str:
    """What POST /generate answers."""
    body = {"text": text, "lora_path": adapter, "sampling_params": {**GREEDY, "max_new_tokens": tokens}}
    response = live.server.post("/generate", body)
    assert response.status_code == 200, response.text
    return response.json()["text"]


def cached_tokens(live, adapter, text) -> int:
    """How many of the text's tokens the server has in its prefix cache for the adapter."""
    body = {"text": text, "lora_path": adapter, "sampling_params": {"max_new_tokens": 1}}
    return live.server.post("/generate", body).json()["meta_info"]["cached_tokens"]


def answers_differ(live, **more) -> dict:
    """Each adapter's answer; no two are alike, so that a wrong adapter is seen."""
    answers = {adapter: generate(live, adapter, **more) for adapter in ADAPTERS}
    assert len(set(answers.values())) == len(ADAPTERS), answers
    return answers


@sgl.function
def once(s, question, tokens=12):
    s += question + sgl.gen("answer", max_tokens=tokens)


@sgl.function
def branches(s, question, adapters, tokens):
    s += question
    states = fork(s, adapters)
    states += sgl.gen("answer", max_tokens=tokens)
    states.join()


@sgl.function
def one_after_another(s, question, adapters, tokens):
    s += question
    for adapter in adapters:
        for state in fork(s, [adapter]):
            state += sgl.gen("answer", max_tokens=tokens)
            state.sync()


def test_a_bound_endpoint(live, endpoint):
    expected = answers_differ(live)
    for adapter in ADAPTERS:
        assert result(once.run(QUESTION, backend=endpoint.bind(adapter), **GREEDY), "answer") == expected[adapter]
    bound = Endpoint(live.server.base_url, adapter="bd4-r16")
    assert result(once.run(QUESTION, backend=bound, **GREEDY), "answer") == expected["bd4-r16"]
    assert result(once.run(QUESTION, backend=bound.bind(None), **GREEDY), "answer") == expected[None]


def test_each_call_and_each_state_chooses(live, endpoint):
    @sgl.function
    def program(s):
        s += QUESTION
        s += frontend.on("bd4-r16", sgl.gen("first", max_tokens=6))
        s += sgl.gen("second", max_tokens=6)
        s += use("bd2-r8")
        s += sgl.gen("third", max_tokens=6)
        # One within another, around more than one expression; then the adapter of before again.
        s += frontend.on(
            "plain-r2", "," + sgl.gen("fourth", max_tokens=6) + frontend.on(None, sgl.gen("fifth", max_tokens=6))
        )
        s += sgl.gen("sixth", max_tokens=6)
        for branch in s.fork(2):
            branch += sgl.gen("forked", max_tokens=6)
            s["forked"] = result(branch, "forked")

    state = program.run(backend=endpoint, **GREEDY)
    text = QUESTION
    plan = [
        ("first", "bd4-r16"), ("second", None), ("third", "bd2-r8"), ("fourth", "plain-r2"), ("fifth", None), ("sixth", "bd2-r8"),
        ("forked", "bd2-r8"),
    ]  # fmt: skip
    for name, adapter in plan:
        text += "," if name == "fourth" else ""
        others = {other: generate(live, other, text, 6) for other in ADAPTERS}
        assert result(state, name) == others[adapter], name
        assert list(others.values()).count(others[adapter]) == 1, "the answer would not show the adapter"
        text += others[adapter]


def test_a_fork_over_two_adapters_is_one_mixed_batch(live, endpoint):
    """The server's own record of its forward passes; the same requests one after another never share one."""
    pair, tokens = ["bd4-r16", "plain-r2"], 96
    expected = [generate(live, adapter, tokens=tokens) for adapter in pair]
    with live.counting_collectives() as passes:
        state = branches.run(QUESTION, pair, tokens, backend=endpoint, **GREEDY)
        assert result(state, "answer") == expected
    mixed = [p for p in passes if p["mode"] == "DECODE" and p["adapters"] == 2]
    assert all(p["requests"] == p["with_adapter"] == 2 for p in mixed)
    assert len(mixed) > tokens / 2, passes
    with live.counting_collectives() as passes:
        one_after_another.run(QUESTION, pair, tokens, backend=endpoint, **GREEDY).sync()
    assert sum(p["mode"] == "DECODE" for p in passes) >= 2 * (tokens - 1)
    assert not any(p["requests"] > 1 for p in passes)


def test_the_server_says_which_adapters_run_together(live, endpoint):
    pair, seen = ["bd4-r16", "bd2-r8"], []
    program = threading.Thread(target=lambda: branches.run(QUESTION, pair, 400, backend=endpoint, **GREEDY).sync())
    program.start()
    while program.is_alive():
        state = httpx.get(f"{live.server.base_url}/bdlora/info", timeout=60).json()
        seen.append({a["name"]: a["requests_running"] for a in state["adapters"] if a["requests_running"]})
    # One look at one running batch.
    assert dict.fromkeys(pair, 1) in seen, seen


def test_every_branch_answers_like_generate(live, endpoint):
    expected = answers_differ(live)
    order = [*ADAPTERS, *reversed(ADAPTERS)]
    state = branches.run(QUESTION, order, 12, backend=endpoint.bind("bd2-r8"), **GREEDY)
    assert result(state, "answer") == [expected[adapter] for adapter in order]


def test_run_batch(live, endpoint):
    @sgl.function
    def program(s, question, adapter):
        s += use(adapter)
        s += question + sgl.gen("answer", max_tokens=12)

    rows = [{"question": q, "adapter": adapter} for adapter in ADAPTERS for q in (QUESTION, "The quick brown fox")]
    states = program.run_batch(rows, backend=endpoint, num_threads=8, **GREEDY)
    expected = [generate(live, row["adapter"], row["question"]) for row in rows]
    assert [result(state, "answer") for state in states] == expected


def test_streaming(live, endpoint):
    # As many as a reader on a busy machine does not receive in one piece.
    expected = answers_differ(live, tokens=64)
    for adapter in ADAPTERS:
        state = once.run(QUESTION, 64, backend=endpoint.bind(adapter), stream=True, **GREEDY)
        pieces = list(state.text_iter("answer"))
        assert "".join(pieces) == expected[adapter]
        assert len([piece for piece in pieces if piece]) > 1
    # A choice in the middle of a stream, and its text.
    state = branches.run(QUESTION, ADAPTERS, 12, backend=endpoint, stream=True, **GREEDY)
    state.sync()
    assert "".join(state.text_iter()) == QUESTION


CHOICES = [" Paris.", " the lazy dog", " price"]


@pytest.mark.parametrize(
    "method", [sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized]
)
def test_select_scores_under_the_adapter(live, endpoint, method):
    """The log-probabilities that a choice was made by are the adapter's own, of the choice's tokens and no others."""

    @sgl.function
    def program(s):
        s += QUESTION + sgl.select("choice", CHOICES, choices_method=method)

    for adapter in ADAPTERS:
        state = program.run(backend=endpoint.bind(adapter))
        assert result(state, "choice") in CHOICES
        meta = state.get_meta_info("choice")
        expected = scored(live, [{"text": QUESTION + choice, "lora_path": adapter} for choice in CHOICES])
        for entries, whole, choice in zip(meta["input_token_logprobs"], expected, CHOICES, strict=True):
            same_logprobs(entries, whole[-len(entries) :])
            assert "".join(entry[2] for entry in entries) == choice
        if "unconditional_token_logprobs" in meta:
            ids = [[entry[1] for entry in entries] for entries in meta["input_token_logprobs"]]
            expected = scored(live, [{"input_ids": i, "lora_path": adapter} for i in ids])
            for entries, whole in zip(meta["unconditional_token_logprobs"], expected, strict=True):
                same_logprobs(entries[1:], whole[1:])


def scored(live, bodies) -> list:
    more = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    return [live.server.post("/generate", {**b, **more}).json()["meta_info"]["input_token_logprobs"] for b in bodies]


def same_logprobs(served, expected) -> None:
    assert [entry[1] for entry in served] == [entry[1] for entry in expected]
    assert [entry[0] for entry in served] == pytest.approx([entry[0] for entry in expected], abs=1e-4)


def test_select_chooses_what_the_adapter_finds_likeliest(live, endpoint):
    """By the mean log-probability of a choice's tokens, from /generate; the adapters do not all choose alike."""
    words = [
        " the",
        " capital",
        " of",
        " France",
        " is",
        " Paris",
        " block",
        " adapters",
        " rank",
        " quick",
        " dog",
        " price",
    ]

    @sgl.function
    def program(s, adapter):
        s += QUESTION
        s += frontend.on(adapter, sgl.select("choice", words))

    expected = {}
    for adapter in ADAPTERS:
        question = len(scored(live, [{"text": QUESTION, "lora_path": adapter}])[0])
        scores = scored(live, [{"text": QUESTION + word, "lora_path": adapter} for word in words])
        means = [sum(entry[0] for entry in s[question:]) / len(s[question:]) for s in scores]
        expected[adapter] = words[means.index(max(means))]
    assert len(set(expected.values())) > 1, expected
    assert {a: result(program.run(a, backend=endpoint), "choice") for a in ADAPTERS} == expected


def test_cached_prefixes_belong_to_the_adapter(live, endpoint):
    """A prefix, or the text before a fork, is computed before it is needed, under the adapter that needs it and no other."""
    text = (
        "SELECT name, price FROM products WHERE price > 10 ORDER BY name; The quick brown fox jumps over the lazy dog."
    )
    endpoint.bind("bd4-r16").cache_prefix(text)
    assert cached_tokens(live, "bd4-r16", text) > 0
    assert cached_tokens(live, "plain-r2", text) == 0

    @sgl.function
    def forks(s):
        s += text
        s += use("bd2-r8")
        s.sync()  # SGLang caches what there is when fork is called
        s.fork(2)

    live.server.flush_cache()
    forks.run(backend=endpoint).sync()
    assert cached_tokens(live, None, text) == 0
    assert cached_tokens(live, "bd2-r8", text) > 0

    @sgl.function
    def branches_of_one_adapter(s):
        s += text
        fork(s, ["plain-r2", "plain-r2", "bd2-r8"])

    live.server.flush_cache()
    branches_of_one_adapter.run(backend=endpoint).sync()
    assert cached_tokens(live, None, text) == cached_tokens(live, "bd2-r8", text) == 0
    assert cached_tokens(live, "plain-r2", text) > 0

    @sgl.function
    def long_prefix(s, question):
        s += text + question + sgl.gen("answer", max_tokens=2)

    live.server.flush_cache()
    long_prefix.cache(backend=endpoint.bind("bd4-r16"))
    assert cached_tokens(live, None, text) == 0
    assert cached_tokens(live, "bd4-r16", text) > 0


def complaint(live, act) -> str:
    with pytest.raises(AdapterError) as caught:
        act()
    message = str(caught.value)
    for word in ("'no-such'", "'bd4-r16'", "'plain-r2'", live.server.base_url, "Fix: "):
        assert word in message
    return message


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_an_unknown_adapter_is_named_with_those_that_are_loaded(live, endpoint):
    @sgl.function
    def asks(s):
        s += QUESTION + frontend.on("no-such", sgl.gen("answer", max_tokens=2))

    @sgl.function
    def selects(s):
        s += use("no-such")
        s += QUESTION + sgl.select("answer", ["a", "b"])

    @sgl.function
    def forks(s):
        s += QUESTION
        fork(s, ["bd4-r16", "no-such"])

    complaint(live, lambda: Endpoint(live.server.base_url, adapter="no-such"))
    complaint(live, lambda: endpoint.bind("no-such"))
    complaint(live, lambda: endpoint._bound("no-such").cache_prefix(QUESTION))
    complaint(live, lambda: forks.run(backend=endpoint))
    for program in (asks, selects):
        complaint(live, lambda program=program: result(program.run(backend=endpoint), "answer"))
    complaint(live, lambda: result(asks.run(backend=endpoint, stream=True), "answer"))
    assert result(once.run(QUESTION, backend=endpoint, **GREEDY), "answer") == generate(live, None)


def test_an_adapter_that_is_not_listed_but_answered_is_taken(live, endpoint, monkeypatch):
    """As those that --max-loaded-loras has put out, which SGLang loads again."""
    monkeypatch.setattr(Endpoint, "adapters", lambda self: [])
    bound = endpoint.bind("bd4-r16")
    assert result(once.run(QUESTION, backend=bound, **GREEDY), "answer") == generate(live, "bd4-r16")
    with pytest.raises(AdapterError, match="no adapters"):
        endpoint.bind("no-such")


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_another_backend_is_refused_in_words(live):
    stock = sgl.RuntimeEndpoint(live.server.base_url)

    @sgl.function
    def chooses(s):
        s += QUESTION + frontend.on("bd4-r16", sgl.gen("answer", max_tokens=2))

    with pytest.raises(TypeError, match=r"sgl_bdlora\.frontend\.Endpoint"):
        result(chooses.run(backend=stock), "answer")
    with pytest.raises(TypeError, match=r"sgl_bdlora\.frontend\.Endpoint"):
        branches.run(QUESTION, ["bd4-r16"], 2, backend=stock)


EXAMPLES = Path(__file__).parents[2] / "examples" / "programs"
SKILLS = {"json-bd": "bd4-r16", "pirate-bd": "plain-r2", "sentiment-bd": "bd2-r8", "sql-bd": "plain-r32"}


@pytest.fixture
def skills(live):
    """Zoo adapters under the names of the shipped ones, whose model is another."""
    for name, recipe in SKILLS.items():
        live.load(name, live.folder(recipe))
    yield
    for name in SKILLS:
        live.unload(name)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("router", []), ("best_of_n", ["--samples", "3"]), ("choose", ["--adapters", "sentiment-bd", "json-bd"])],
)
def test_the_examples_run(live, skills, capsys, monkeypatch, name, arguments):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, example)
    spec.loader.exec_module(example)
    with live.counting_collectives() as passes:
        assert example.main(["--server", live.server.base_url, *arguments]) == 0
    said = capsys.readouterr().out
    used = {"router": SKILLS, "best_of_n": ["pirate-bd"], "choose": ["sentiment-bd", "json-bd"]}[name]
    assert all(adapter in said for adapter in used)
    assert max(p["with_adapter"] for p in passes) > 1
