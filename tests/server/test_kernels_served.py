"""Servers without a GPU that compute with the GPU's kernels, in Triton's interpreter (plugins/kernel_interpreter.py)."""

from harness import check
from servers import KERNELS, KERNELS_S_LORA, on
from zoo import RECIPES

# Kernels take adapters of linear layers; batches with others are torch operations.
LINEAR = [name for name in RECIPES if not name.endswith(("-head", "-vocabulary", "-embedding"))]
# The kernels' h has 12 bits of significand. 3e-4 to 4e-4 was seen in every one of these tests; adapters move the answer by 0.1 and more
# (test_exactness.py).
TOLERANCE = 2e-3


@on(*KERNELS, *KERNELS_S_LORA)
def test_one_batch_of_every_adapter_and_the_base(live):
    """Prompts and decode steps; steps of the same requests as the one before repeat its batch."""
    asks = [live.ask(recipe, 3 + i, new_tokens=5) for i, recipe in enumerate([None, *LINEAR])]
    # More rows than the linear kernel takes.
    asks.append(live.ask("bd4-r16", 140, new_tokens=1, prompt_logprobs=False))
    before = live.kernel_calls
    check(live.oracle, asks, live.server.generate(asks), TOLERANCE)
    calls = live.kernel_calls - before
    assert calls["repeated"] > 0
    assert calls["linear_kernel"] >= 4 * 4 * live.layers
    assert calls["shrink_kernel"] > 0


@on(*KERNELS)
def test_requests_come_and_go(live):
    """Each its own POST and length: batches change between steps that are repeated."""
    recipes = ["bd4-r16", None, "plain-r2", "bd8-r32", "bd4-r16", "plain-r32"]
    asks = [live.ask(recipe, 4 + 2 * i, new_tokens=3 + i) for i, recipe in enumerate(recipes)]
    before = live.kernel_calls
    check(live.oracle, asks, live.server.generate_each(asks), TOLERANCE)
    calls = live.kernel_calls - before
    assert calls["repeated"] > 0
    assert calls["set"] > 2
