"""What every (adapter, prompt) has to be answered with, asked alone before the soak begins."""

import random
from collections.abc import Callable
from pathlib import Path

from harness import Answer, Ask, Server, check
from zoo.oracle import TOLERANCE, Oracle

# A prompt is used only if no adapter's answer to it has a token whose runner-up is closer than this in log-probability. Rounding moves
# log-probabilities by far less, so that a different token is a wrong answer.
NO_TIE = 10 * TOLERANCE

VOCAB = 512
LENGTHS = (
    (4, 8),
    (12, 20),
    (30, 34),
    (60, 80),
    (100, 120),
)  # prompt tokens, least and most; prompts above 32 are chunked
NEW_TOKENS = (16, 24, 8, 12, 4)


class References:
    """Answers by adapter directory (None: the base model) and prompt; the prompts are common to all."""

    def __init__(self):
        self.asks: list[Ask] = []
        self._answers: dict[tuple[Path | None, tuple[int, ...]], Answer] = {}

    def of(self, folder: Path | None, ask: Ask) -> Answer:
        return self._answers[folder, ask.prompt]

    def add(self, ask: Ask, answers: dict[Path | None, Answer]) -> None:
        self.asks.append(ask)
        self._answers.update({(folder, ask.prompt): answer for folder, answer in answers.items()})


def gather(
    server: Server, names: dict[str, Path], oracle: Oracle, prompts: int, rng: random.Random, tick: Callable[[], None]
) -> References:
    """Ask for `prompts` prompts with every loaded adapter and the base, one request at a time.

    names: served name -> directory. tick: called after each request. Raises AssertionError when an answer is not the oracle's
    (Transformers + PEFT).
    """
    references = References()
    while len(references.asks) < prompts:
        kind = len(references.asks) % len(LENGTHS)
        prompt = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(*LENGTHS[kind])))
        plain = Ask(prompt, new_tokens=NEW_TOKENS[kind], prompt_logprobs=False)
        answers: dict[Path | None, Answer] = {}
        for name, folder in (None, None), *names.items():
            ask = Ask(prompt, name, folder, plain.new_tokens, prompt_logprobs=False)
            answer = server.generate([ask])[0]
            check(oracle, [ask], [answer])
            tick()
            if _gap(answer) < NO_TIE:
                break
            answers[folder] = answer
        else:
            references.add(plain, answers)
    return references


def _gap(answer: Answer) -> float:
    """Smallest difference between a position's two likeliest tokens."""
    likeliest = (sorted(top.values(), reverse=True)[:2] for top in answer.top)
    return min(first - second for first, second in likeliest)


def difference(reference: Answer, answer: Answer) -> str | None:
    """What is wrong with an answer, in words; None if tokens are equal and log-probabilities within the tolerance."""
    if len(answer.tokens) != len(reference.tokens):
        return f"{len(answer.tokens)} tokens instead of {len(reference.tokens)}"
    for i, (expected, got) in enumerate(zip(reference.tokens, answer.tokens, strict=True)):
        if expected != got:
            then, now = reference.top[i], answer.top[i]
            return (
                f"token {i} is {got}, not {expected}; log-probability of {expected} was {_show(then.get(expected))} and is "
                f"{_show(now.get(expected))}, of {got} it was {_show(then.get(got))} and is {_show(now.get(got))}"
            )
        apart = abs(reference.generated[i] - answer.generated[i])
        if not apart <= TOLERANCE:
            return f"log-probability of token {i} differs by {apart:.2e}"
    return None


def _show(logprob: float | None) -> str:
    return "below the top" if logprob is None else f"{logprob:.6f}"
