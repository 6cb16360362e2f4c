"""Served log-probabilities equal those of Transformers + PEFT in float32 to 1e-4, for every kind of adapter."""

from dataclasses import replace

import pytest
from harness import check, request_body
from servers import DEFAULT, LLAMA, SLOW, on
from zoo import RECIPES

everywhere = on(*DEFAULT, *SLOW)

# With and without the input embedding, with and without lm_head.
VOCABULARY = ("plain-vocabulary", None, "plain-head", "plain-r8-attention", "plain-embedding", "bd4-head", "bd4-r16")


@everywhere
def test_one_batch_of_every_adapter_and_the_base(live):
    """1, 2, 4 and 8 blocks, plain, patterns, rsLoRA, mixed, ranks 2 to 32, prompts of 3 to 60 tokens."""
    asks = [live.ask(recipe, 3 + 3 * i) for i, recipe in enumerate([None, *RECIPES])]
    check(live.oracle, asks, live.server.generate(asks))


@everywhere
def test_adapters_move_the_answer_visibly(live):
    """The tests above would pass with adapters that do nothing; these do not do nothing."""
    prompt = live.prompt(30)
    base = live.oracle.score(list(prompt)).all
    for recipe in RECIPES:
        moved = (live.oracle.score(list(prompt), live.folder(recipe)).all - base).abs().max().item()
        assert moved > 0.1, recipe


@on(LLAMA)
def test_the_comparison_notices_another_adapter(live):
    """A quarter of the batch is compared with the wrong adapter's oracle: just those requests are reported."""
    asks = [live.ask(recipe, 20) for recipe in (None, "bd4-r16", "plain-r2", "bd2-r8")]
    answers = live.server.generate(asks)
    check(live.oracle, asks, answers)
    swapped = [*asks[:3], replace(asks[3], folder=live.folder("bd1-r4"))]
    with pytest.raises(AssertionError, match=r"^adapter bd2-r8, prompt of 20: .* off"):
        check(live.oracle, swapped, answers)


@everywhere
def test_requests_sent_at_the_same_time(live):
    """Each its own POST: the scheduler mixes prefills and decodes as they come."""
    recipes = [None, "bd4-r16", "plain-r2", "bd8-r32", "plain-r32", "bd2-r8", "bd1-r4", "bd4-mixed"] * 2
    asks = [live.ask(recipe, 8 + 2 * i, new_tokens=4 + i) for i, recipe in enumerate(recipes)]
    check(live.oracle, asks, live.server.generate_each(asks))


@everywhere
def test_lm_head_gets_other_rows_than_the_layers(live):
    """Of one batch some requests want log-probabilities of the whole prompt, others only their answer's."""
    asks = [live.ask(recipe, 9 + 3 * i, prompt_logprobs=i % 3 != 1) for i, recipe in enumerate(VOCABULARY * 2)]
    check(live.oracle, asks, live.server.generate(asks))


@on(LLAMA)
def test_tokens_without_log_probabilities(live):
    asks = [live.ask(recipe, 12, new_tokens=4) for recipe in VOCABULARY]
    body = request_body(asks, return_logprob=False, logprob_start_len=None, top_logprobs_num=None)
    answers = live.server.post("/generate", body).json()
    expected = [live.oracle.greedy(list(ask.prompt), 4, ask.folder) for ask in asks]
    assert [answer["output_ids"] for answer in answers] == expected


@on(LLAMA)
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_an_adapter_alone(live, recipe):
    asks = [live.ask(recipe, 40)]
    check(live.oracle, asks, live.server.generate(asks))


@on(LLAMA)
def test_the_same_prompt_for_everyone(live):
    """Nothing but the adapter tells these requests apart."""
    prompt = live.prompt(25)
    asks = [live.ask(recipe, prompt=prompt) for recipe in (None, *RECIPES)]
    check(live.oracle, asks, live.server.generate(asks))


@on(LLAMA)
def test_long_answers(live):
    asks = [live.ask(recipe, 12, new_tokens=64) for recipe in (None, "bd2-r8", "bd8-r32", "plain-r32")]
    check(live.oracle, asks, live.server.generate(asks))


@on(LLAMA)
def test_prompts_longer_than_a_prefill_chunk(live):
    asks = [
        live.ask(recipe, 150 + i)
        for i, recipe in enumerate((None, "bd4-r16", "plain-r8-attention", "bd8-r8-rslora", "plain-vocabulary"))
    ]
    check(live.oracle, asks, live.server.generate(asks))
    assert "#new-token: 32," in live.server.log.read_text(), "no prefill of one chunk of 32 tokens"
