"""On GPUs, in bfloat16: adapters cost no accuracy beyond what bfloat16 costs the base model itself."""

import statistics

import pytest
from harness import Answer, Ask, Served, Server
from zoo import RECIPES

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "qwen3")


def tensor_parallel_sizes() -> list[int]:
    import torch

    return [tp for tp in (1, 2, 4, 8) if tp <= max(1, torch.cuda.device_count())]


@pytest.mark.parametrize("sharding", ["replicated", "s-lora"])
@pytest.mark.parametrize("tp", tensor_parallel_sizes())
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errors_are_the_base_models(zoo, tmp_path, family, tp, sharding):
    served = Served(family, tp)
    oracle = zoo.oracle(family)
    arguments = (
        "--dtype",
        "bfloat16",
        "--max-lora-rank",
        "32",
        "--max-loras-per-batch",
        "24",
        "--lora-sharding",
        sharding,
    )
    with Server(zoo.model(served.family), tp, tmp_path / "server.log", arguments) as server:
        asks = [Ask(prompt=tuple(range(3 + i, 63 + i))) for i in range(4)]
        for i, recipe in enumerate(RECIPES):
            folder = zoo.adapter(family, recipe)
            assert server.load(recipe, folder).status_code == 200
            asks.append(Ask(prompt=tuple(range(5 + i, 65 + i)), adapter=recipe, folder=folder))
        errors = [error(oracle, ask, answer) for ask, answer in zip(asks, server.generate(asks), strict=True)]
    base = statistics.mean(errors[:4])
    print(
        f"{family} tp {tp} {sharding}: mean error of the base {base:.4f}, of adapters {statistics.mean(errors[4:]):.4f}"
    )
    assert base < 0.05
    assert max(errors[4:]) < 3 * base


def error(oracle, ask: Ask, answer: Answer) -> float:
    """Mean absolute difference of the prompt's and the answer's log-probabilities from the float32 oracle's."""
    prompt = list(ask.prompt)
    score = oracle.score(prompt + answer.tokens, ask.folder)
    served = answer.prompt[1:] + answer.generated
    expected = [score.of(i, token) for i, token in enumerate([*prompt, *answer.tokens]) if i]
    return statistics.mean(abs(a - b) for a, b in zip(served, expected, strict=True))
