"""When two ways of measuring agree within noise.

Noise is what a way's own number does from run to run. Two ways that have been run the same number of times, in turns, agree on a number
when the ranges of their runs meet. Were both drawn from one distribution, ranges of n and n runs would miss each other in 2 n! n! / (2n)!
of all cases: 0.8 % for five runs each, 0.2 % for six. Where a way's runs lie further apart than NOISE, meeting says nothing.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .ways import Figure

# Widest range of a way's runs, by their median. Chosen after runs on a CPU and before any on a GPU.
NOISE = 0.1


@dataclass(frozen=True)
class Verdict:
    """One number by the page and by the runner. ratio: page by runner. *_runs: the range of runs, *_repeats: of all their repeats."""

    page: float
    runner: float
    ratio: float
    page_runs: tuple[float, float]
    runner_runs: tuple[float, float]
    page_repeats: tuple[float, float]
    runner_repeats: tuple[float, float]

    @property
    def noise(self) -> float:
        """The wider range of runs, by its median."""
        ranges = ((self.page_runs, self.page), (self.runner_runs, self.runner))
        return max((high - low) / middle for (low, high), middle in ranges)

    @property
    def word(self) -> str:
        """ "agree", "differ", or "noisy" where they meet but could not help it."""
        if not self._meet:
            return "differ"
        return "agree" if self.noise <= NOISE else "noisy"

    @property
    def _meet(self) -> bool:
        return self.page_runs[0] <= self.runner_runs[1] and self.runner_runs[0] <= self.page_runs[1]


def judge(page: Sequence[Figure], runner: Sequence[Figure]) -> Verdict:
    """Of the figures of their runs."""
    one, other = (statistics.median(figure.value for figure in way) for way in (page, runner))
    return Verdict(one, other, one / other, *map(_runs, (page, runner)), *map(_repeats, (page, runner)))


def by_chance(runs: int) -> float:
    """How often ranges of `runs` and `runs` equal draws miss each other."""
    return 2 / math.comb(2 * runs, runs)


def _runs(figures: Sequence[Figure]) -> tuple[float, float]:
    return min(f.value for f in figures), max(f.value for f in figures)


def _repeats(figures: Sequence[Figure]) -> tuple[float, float]:
    return min(f.low for f in figures), max(f.high for f in figures)
