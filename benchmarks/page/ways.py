"""Two ways to measure one batch under both kinds of adapters: as the page does, and as benchmarks.latency does."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app import results
from app.compare import BLOCK, PLAIN, REFRESH_S, Comparison
from app.context import Context, look, pairs
from app.measure import METRICS, Batch, ratio, values
from app.pairs import spread
from app.planning import Choices, arms, plan
from benchmarks.latency.timing import decode_s, random_ids, time_batches

from .tokenizer import text_of

GAIN = "speed-up"


@dataclass(frozen=True)
class Figure:
    """A number as it is shown, and what it varied between: its repeats' least and greatest."""

    value: float
    low: float
    high: float


# (PLAIN, BLOCK or GAIN, key of a metric of the page) -> its figure.
Figures = dict[tuple[str, str], Figure]


@dataclass(frozen=True)
class Work:
    """What is measured. prompt, output: tokens of each of `batch` requests. vocab: of the model."""

    batch: int
    prompt: int
    output: int
    repeats: int
    vocab: int

    def ids(self, rng: random.Random) -> list[list[int]]:
        """A batch's prompts."""
        return random_ids(rng, self.vocab, self.batch, self.prompt)

    def texts(self, rng: random.Random) -> tuple[str, ...]:
        """A batch's prompts as words."""
        return tuple(map(text_of, self.ids(rng)))


class Ways:
    """Measures `work` on the servers of `context`; each way is a call without arguments that returns its Figures."""

    def __init__(self, context: Context, work: Work):
        """Raises ServerProblem when a server does not answer, ValueError when there are no pairs of adapters."""
        self._context, self._work, self._turn = context, work, 0
        # One for the whole run: no prompt comes twice, so that the cache has none of the runner's.
        rng = random.Random(0)
        found = pairs(context)
        if not found:
            raise ValueError("the servers have no pair of adapters to compare")
        plain, block = (look(context.arms[key]) for key in (PLAIN, BLOCK))
        choices = Choices(
            spread([pair.name for pair in found], work.batch, False), work.output, 0.0, work.repeats, True, True, 0,
            work.texts(rng),
        )  # fmt: skip
        self._plan = plan(choices, found, block)
        self._sides = arms(choices, found, plain, block, {key: server.url for key, server in context.arms.items()})
        self._words = lambda: {"text": list(work.texts(rng))}
        self.by_name: dict[str, Callable[[], Figures]] = {
            "page": self._page,
            "runner": lambda: self._runner(self._words),
            "runner-token-ids": lambda: self._runner(lambda: {"input_ids": work.ids(rng)}),
        }

    def warm_up(self) -> None:
        """One batch of each arm at full length."""
        for arm in self._context.arms:
            self._time(arm, self._words, 0)

    def _page(self) -> Figures:
        """A run of the page's, watched and drawn as often as there. Raises RuntimeError for one that is no fair comparison."""
        titles = {side.key: side.title for side in self._sides}
        run = Comparison(self._plan, self._context.arms, titles).start()
        while not run.done:
            run.look()
            for side in self._sides:
                results.column(side, run.live.get(side.key, ()), "")
            time.sleep(REFRESH_S)
        if run.error:
            raise RuntimeError(f"the page's run went wrong: {run.error}")
        check(run.batches, self._work)
        return of_batches(run.batches)

    def _runner(self, prompts: Callable[[], dict]) -> Figures:
        arms = list(self._context.arms)
        self._turn += 1
        # The other side goes first in every second run.
        order = arms if self._turn % 2 else arms[::-1]
        return of_times({arm: self._time(arm, prompts, self._work.repeats) for arm in order}, self._work)

    def _time(self, arm: str, prompts: Callable[[], dict], repeats: int) -> tuple[list[float], list[float]]:
        names = [ask.adapters[arm] for ask in self._plan.asks]
        return time_batches(self._context.arms[arm].url, prompts, self._work.output, names, repeats)


def check(batches: Sequence[Batch], work: Work) -> None:
    """Raises RuntimeError unless every answer read and wrote what the runner's do."""
    for answer in (answer for batch in batches for answer in batch.answers):
        found = (answer.prompt_tokens, answer.cached_tokens, answer.tokens)
        if found != (work.prompt, 0, work.output):
            raise RuntimeError(f"(prompt, cached, output) tokens of an answer are {found}, not {work}")


def of_batches(batches: Sequence[Batch]) -> Figures:
    """What the page shows of them."""
    figures: Figures = {}
    for metric in METRICS:
        for arm in (PLAIN, BLOCK):
            figures[arm, metric.key] = _figure(values(metric, batches, arm))
        gain = ratio(metric, batches, BLOCK, PLAIN)
        figures[GAIN, metric.key] = Figure(gain.middle, gain.low, gain.high)
    return figures


def of_times(times: dict[str, tuple[list[float], list[float]]], work: Work) -> Figures:
    """What the runner makes of time_batches' seconds of each arm. Raises KeyError without both arms."""
    figures: Figures = {}
    numbers = {
        arm: _numbers(statistics.median(first), statistics.median(whole), work) for arm, (first, whole) in times.items()
    }
    each = {arm: [_numbers(*pair, work) for pair in zip(*both, strict=True)] for arm, both in times.items()}
    for metric in METRICS:
        key = metric.key
        for arm in (PLAIN, BLOCK):
            figures[arm, key] = _figure([one[key] for one in each[arm]], numbers[arm][key])
        better, than = (BLOCK, PLAIN) if metric.higher_is_better else (PLAIN, BLOCK)
        repeats = [a[key] / b[key] for a, b in zip(each[better], each[than], strict=True)]
        figures[GAIN, key] = _figure(repeats, numbers[better][key] / numbers[than][key])
    return figures


def _numbers(first: float, whole: float, work: Work) -> dict[str, float]:
    """The runner's numbers under the page's names."""
    return {
        "first_s": first,
        "per_token_s": decode_s(first, whole, work.output),
        "end_to_end_s": whole,
        "tokens_per_s": work.batch * work.output / whole,
    }


def _figure(repeats: Sequence[float], value: float | None = None) -> Figure:
    return Figure(statistics.median(repeats) if value is None else value, min(repeats), max(repeats))
