"""Bars as inline SVG: from zero, with units, spread over repeats, and the same numbers in words for those who cannot see them.

Widths are percentages, so that a plot fills its place at any width and its text keeps its size.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW, HEAD, BAR, FOOT = 52, 4, 20, 26


@dataclass(frozen=True)
class Bar:
    """One arm's bar. style: "block" or "plain" chooses colour and hatching. values: one a repeat."""

    label: str
    style: str
    values: Sequence[float]

    @property
    def middle(self) -> float | None:
        return statistics.median(self.values) if self.values else None


def nice_scale(largest: float) -> tuple[float, float]:
    """(end, step) of an axis from zero with 3 to 6 steps of 1, 2, 2.5 or 5 times a power of ten, its end at or above `largest`."""
    if largest <= 0:
        return 1.0, 0.5
    power = 10 ** math.floor(math.log10(largest / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if largest / (factor * power) <= 5)
    return math.ceil(largest / step - 1e-9) * step, step


def scaled(unit: str, largest: float) -> tuple[str, float]:
    """A unit in which `largest` reads well, and the factor to it: seconds become ms or µs, bytes KiB to GiB."""
    if unit == "s" and 0 < largest < 1:
        return ("ms", 1e3) if largest >= 1e-3 else ("µs", 1e6)
    if unit == "bytes":
        for name, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if largest >= factor:
                return name, 1 / factor
    return unit, 1.0


def bars(title: str, unit: str, data: Sequence[Bar], note: str = "", largest: float | None = None) -> str:
    """A figure with one bar a row: the median, a dot for each repeat, a line from the smallest to the largest.

    largest: what the axis reaches to, for figures of one scale; default: the largest value.
    """
    if largest is None:
        largest = max((v for bar in data for v in bar.values), default=0.0)
    unit, factor = scaled(unit, largest)
    end, step = nice_scale(largest * factor)
    height = HEAD + ROW * len(data) + FOOT
    words = "; ".join(f"{bar.label}: {_words(bar, unit, factor)}" for bar in data)
    parts = [_axis(end, step, height)]
    for row, bar in enumerate(data):
        parts += _bar(bar, HEAD + row * ROW, end, factor)
    side = f"<p class='aside'>{escape(note)}</p>" if note else ""
    return (
        f"<figure class='plot'><figcaption>{escape(title)} <span class='unit'>({escape(unit)})</span></figcaption>"
        f"<svg role='img' aria-label='{escape(f'{title} in {unit}. {words}', quote=True)}' width='100%' height='{height}'>"
        f"{''.join(parts)}</svg>{side}</figure>"
    )


def hatch() -> str:
    """The pattern that plain bars are filled with; once on a page."""
    return (
        "<svg width='0' height='0' aria-hidden='true' class='defs'><defs>"
        "<pattern id='hatch' width='7' height='7' patternUnits='userSpaceOnUse' patternTransform='rotate(45)'>"
        "<rect width='7' height='7' class='fill-plain'/><rect width='2' height='7' class='fill-hatch'/></pattern></defs></svg>"
    )


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def _words(bar: Bar, unit: str, factor: float) -> str:
    if bar.middle is None:
        return "not measured yet"
    text = f"{number(bar.middle * factor)} {unit}"
    if len(bar.values) > 1:
        text += f" ({number(min(bar.values) * factor)} to {number(max(bar.values) * factor)} over {len(bar.values)} repeats)"
    return text


def _short(bar: Bar, factor: float) -> str:
    """The median and the range, for beside the label."""
    if bar.middle is None:
        return "…"
    spread = (
        f" ({number(min(bar.values) * factor)} to {number(max(bar.values) * factor)})" if len(bar.values) > 1 else ""
    )
    return number(bar.middle * factor) + spread


def _axis(end: float, step: float, height: int) -> str:
    steps = round(end / step)
    bottom = height - FOOT
    parts = []
    for i in range(steps + 1):
        at = 100 * i / steps
        anchor = "start" if i == 0 else "end" if i == steps else "middle"
        parts.append(f"<line class='grid' x1='{at:.2f}%' x2='{at:.2f}%' y1='0' y2='{bottom}'/>")
        parts.append(
            f"<text class='tick' x='{at:.2f}%' y='{height - 8}' text-anchor='{anchor}'>{_tick(i * step, step)}</text>"
        )
    return "".join(parts)


def _tick(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**digits, 6) % 1:
        digits += 1
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def _bar(bar: Bar, top: int, end: float, factor: float) -> list[str]:
    def at(value: float) -> str:
        return f"{100 * value * factor / end:.3f}%"

    parts = [
        f"<text class='bar-label' x='4' y='{top + 15}'>{escape(bar.label)}"
        f"<tspan class='bar-value' dx='8'>{_short(bar, factor)}</tspan></text>"
    ]
    if bar.middle is None:
        return parts
    y, middle = top + 22, top + 22 + BAR // 2
    parts.append(
        f"<rect class='bar {bar.style}' x='0' y='{y}' width='{at(bar.middle)}' height='{BAR}' data-value='{bar.middle!r}'/>"
    )
    if len(bar.values) > 1:
        low, high = at(min(bar.values)), at(max(bar.values))
        parts.append(f"<line class='spread' x1='{low}' x2='{high}' y1='{middle}' y2='{middle}'/>")
        parts += [f"<circle class='dot' cx='{at(v)}' cy='{middle}' r='3.5' data-value='{v!r}'/>" for v in bar.values]
    return parts
