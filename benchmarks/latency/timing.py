"""The runner's clock: a batch sent at once, not streamed, timed from sending it to its whole answer."""

import random
import time
from collections.abc import Callable, Sequence

import httpx


def random_ids(rng: random.Random, vocab: int, batch: int, prompt: int) -> list[list[int]]:
    """`batch` prompts of `prompt` token ids, none of them below 3."""
    return [[rng.randrange(3, vocab) for _ in range(prompt)] for _ in range(batch)]


def time_batches(
    url: str, prompts: Callable[[], dict], output: int, names: Sequence[str] | None, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of every repeat until each request has its first token, and until all have `output`; one repeat before is not measured.

    prompts: draws a batch's `input_ids` or `text` anew. names: adapter of each request. Raises httpx.HTTPError.
    """
    first: list[float] = []
    whole: list[float] = []
    with httpx.Client(timeout=600) as client:
        for repeat in range(-1, repeats):
            for tokens, times in ((1, first), (output, whole)):
                body = {
                    **prompts(),
                    "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
                    **({"lora_path": list(names)} if names else {}),
                }
                begin = time.perf_counter()
                client.post(f"{url}/generate", json=body).raise_for_status()
                if repeat >= 0:
                    times.append(time.perf_counter() - begin)
    return first, whole


def decode_s(first: float, whole: float, output: int) -> float:
    """Seconds of a decode step: of the whole batch less that of its first tokens, by the tokens between."""
    return (whole - first) / (output - 1)
