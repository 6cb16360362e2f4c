"""What was measured: answers, batches, and the numbers drawn from them. No I/O."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One request of a batch. Times are seconds from sending the batch; None until there is such a token.

    adapter: None for the base model. first_s: its first token. last_s: its latest token.
    """

    adapter: str | None
    prompt: str
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None
    first_tokens: int = 0
    finished: bool = False

    @property
    def per_token_s(self) -> float | None:
        """Seconds for each output token after those that came first."""
        after = self.tokens - self.first_tokens
        return (self.last_s - self.first_s) / after if self.first_s is not None and after > 0 else None


@dataclass(frozen=True)
class Batch:
    """One batch under one arm. error: why it is incomplete; such a batch counts for nothing but is kept."""

    arm: str
    repeat: int
    answers: tuple[Answer, ...]
    error: str | None = None

    @property
    def complete(self) -> bool:
        return self.error is None and all(a.finished for a in self.answers)

    @property
    def seconds(self) -> float | None:
        """From sending the batch to its last token."""
        return max((a.last_s for a in self.answers if a.last_s is not None), default=None)


@dataclass(frozen=True)
class Metric:
    """A number of a batch. of: None where the batch does not have it."""

    key: str
    title: str
    unit: str
    higher_is_better: bool
    of: Callable[[Batch], float | None]


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def tokens_per_s(batch: Batch) -> float | None:
    return sum(a.tokens for a in batch.answers) / batch.seconds if batch.seconds else None


METRICS = (
    Metric("first_s", "Time to first token", "s", False, lambda b: _median([a.first_s for a in b.answers])),
    Metric("per_token_s", "Time per output token", "s", False, lambda b: _median([a.per_token_s for a in b.answers])),
    Metric("end_to_end_s", "End to end", "s", False, lambda b: _median([a.last_s for a in b.answers])),
    Metric("tokens_per_s", "Tokens a second, whole batch", "tokens/s", True, tokens_per_s),
)
BY_KEY = {metric.key: metric for metric in METRICS}


def values(metric: Metric, batches: Sequence[Batch], arm: str) -> list[float]:
    """The metric of every complete batch of an arm, in the order of the repeats."""
    found = (metric.of(b) for b in sorted(batches, key=lambda b: b.repeat) if b.arm == arm and b.complete)
    return [v for v in found if v is not None]


@dataclass(frozen=True)
class Ratio:
    """How many times better one arm is: the middle of the repeats, the worst and the best."""

    middle: float
    low: float
    high: float
    repeats: int


def ratio(metric: Metric, batches: Sequence[Batch], better: str, than: str) -> Ratio | None:
    """Above 1 where arm `better` is the better one. A repeat's two batches, run one after the other, are compared."""
    ratios = []
    for repeat in sorted({b.repeat for b in batches}):
        one = values(metric, [b for b in batches if b.repeat == repeat], better)
        other = values(metric, [b for b in batches if b.repeat == repeat], than)
        if one and other and one[0] and other[0]:
            ratios.append(one[0] / other[0] if metric.higher_is_better else other[0] / one[0])
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios)) if ratios else None
