"""Means with 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % points of Student's t by degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """mean - half to mean + half. half: None where one value gives no spread."""

    mean: float
    half: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int, sign: bool = False) -> str:
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Student's, over independent values such as seeds."""
    n = len(values)
    if n < 2:
        return Interval(values[0], None)
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    return Interval(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n))


def validation_loss(row: dict) -> float:
    """Of a sweep's row: nats a text token and nats a class token."""
    return row["text_loss"] + row["label_loss"]


def bits(row: dict) -> list[int]:
    """Of a result row: for every test row whether the class was right."""
    return [int(bit) for bit in f"{int(row['correct'], 16):0{row['rows']}b}"]


def over_rows(ours: Sequence[dict], theirs: Sequence[dict]) -> Interval:
    """Difference of accuracies, in points, with the spread over TEST ROWS: what another sample of texts would change.

    Each text's rightness is averaged over the seeds first, and the two sides are compared text by text.
    """
    mine, other = ([sum(each) / len(side) for each in zip(*map(bits, side), strict=True)] for side in (ours, theirs))
    differences = [100 * (a - b) for a, b in zip(mine, other, strict=True)]
    return Interval(statistics.fmean(differences), 1.96 * statistics.stdev(differences) / math.sqrt(len(differences)))
