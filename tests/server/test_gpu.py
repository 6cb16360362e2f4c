"""On GPUs, in bfloat16: adapters cost no accuracy beyond what bfloat16 costs the base model itself."""

import statistics

import pytest
from harness import Answer, Ask, Server
from zoo import RECIPES

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "qwen3")


def tensor_parallel_sizes() -> list[int]:
    import torch

    return [tp for tp in (1, 2, 4, 8) if tp <= max(1, torch.cuda.device_count())]


def make_asks(server: Server, zoo, family: str, recipes: list[str]) -> list[Ask]:
    """Four requests for the base model and one for each recipe, whose adapters are loaded."""
    asks = [Ask(prompt=tuple(range(3 + i, 63 + i)), new_tokens=16) for i in range(4)]
    for i, recipe in enumerate(recipes):
        folder = zoo.adapter(family, recipe)
        asks.append(Ask(prompt=tuple(range(5 + i, 65 + i)), adapter=recipe, folder=folder, new_tokens=16))
        server.load(recipe, folder)
    return asks


def ask_all(server: Server, zoo, family: str, recipes: list[str]) -> list[tuple[Ask, Answer]]:
    """All of them in one batch. Prompt log-probabilities come from prefill."""
    asks = make_asks(server, zoo, family, recipes)
    return list(zip(asks, server.generate(asks), strict=True))


BFLOAT16 = ("--dtype", "bfloat16", "--max-lora-rank", "32", "--max-loras-per-batch", "32")
# Adapters of linear layers only: what the Triton kernels and the decode graphs take.
LINEAR = [name for name in RECIPES if not name.endswith(("-head", "-vocabulary", "-embedding"))]


@pytest.mark.parametrize("sharding", ["replicated", "s-lora"])
@pytest.mark.parametrize("tp", tensor_parallel_sizes())
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errors_are_the_base_models(zoo, tmp_path, family, tp, sharding):
    oracle = zoo.oracle(family)
    arguments = (*BFLOAT16, "--lora-sharding", sharding)
    with Server(zoo.model(family), tp, tmp_path / "server.log", arguments) as server:
        for recipes in (LINEAR, list(RECIPES)):
            errors = [error(oracle, ask, answer) for ask, answer in ask_all(server, zoo, family, recipes)]
            base = statistics.mean(errors[:4])
            mean = statistics.mean(errors[4:])
            print(
                f"{family} tp {tp} {sharding}, {len(recipes)} adapters: mean error base {base:.4f}, adapters {mean:.4f}"
            )
            assert base < 0.05
            assert max(errors[4:]) < 3 * base


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_graphs_on_and_off_are_equal(zoo, tmp_path, family):
    """To the bit, one request at a time: how SGLang cuts requests that come together into batches, and with it bfloat16's rounding, varies.

    Prompts are computed without graphs in both: prefill graphs have tiles for many rank rows whatever the batch has, which add in another
    order. That they are no less exact is `test_bfloat16_errors_are_the_base_models`.
    """
    answers = []
    for extra in ((), ("--disable-cuda-graph",)):
        arguments = (*BFLOAT16, "--cuda-graph-backend-prefill", "disabled", *extra)
        with Server(zoo.model(family), 1, tmp_path / "server.log", arguments) as server:
            answers.append([server.generate([ask])[0] for ask in make_asks(server, zoo, family, LINEAR)])
    for with_graph, without in zip(*answers, strict=True):
        assert with_graph == without


def test_a_quantised_base_costs_adapters_no_more_than_the_base(zoo, tmp_path):
    oracle = zoo.oracle("llama")
    arguments = (*BFLOAT16, "--quantization", "fp8")
    with Server(zoo.model("llama"), 1, tmp_path / "server.log", arguments) as server:
        errors = [error(oracle, ask, answer) for ask, answer in ask_all(server, zoo, "llama", LINEAR)]
    base = statistics.mean(errors[:4])
    print(f"llama fp8: mean error base {base:.4f}, adapters {statistics.mean(errors[4:]):.4f}")
    assert base < 0.3
    assert max(errors[4:]) < 3 * base


def test_speculative_decoding(zoo, tmp_path):
    """NGRAM, the one algorithm that SGLang runs together with LoRA: tokens stay the likeliest within bfloat16's error."""
    oracle = zoo.oracle("llama")
    arguments = (*BFLOAT16, "--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4")
    with Server(zoo.model("llama"), 1, tmp_path / "server.log", arguments) as server:
        pairs = ask_all(server, zoo, "llama", LINEAR)
    for ask, answer in pairs:
        score = oracle.score([*ask.prompt, *answer.tokens], ask.folder)
        for i, token in enumerate(answer.tokens, len(ask.prompt)):
            assert score.all[i - 1].max().item() - score.of(i, token) < 0.3


def error(oracle, ask: Ask, answer: Answer) -> float:
    """Mean absolute difference of the prompt's and the answer's log-probabilities from the float32 oracle's."""
    prompt = list(ask.prompt)
    score = oracle.score(prompt + answer.tokens, ask.folder)
    served = answer.prompt[1:] + answer.generated
    expected = [score.of(i, token) for i, token in enumerate([*prompt, *answer.tokens]) if i]
    return statistics.mean(abs(a - b) for a, b in zip(served, expected, strict=True))
