"""What a profile measures: decode steps and prefills, and pairs of decode steps whose adapters have the same ranks in all."""

from dataclasses import dataclass

from benchmarks.latency.mixes import Mix, mix

# Rank to adapters that a server has; no point names more.
ADAPTERS = {8: 24, 16: 4, 32: 16, 64: 4, 128: 8}
NONE = Mix("none", ())


@dataclass(frozen=True)
class Point:
    """A batch of equal requests that take turns with the adapters. prompt, output: tokens of each; turn: those of lower ones go first."""

    chosen: Mix
    batch: int
    prompt: int
    output: int
    turn: int


@dataclass(frozen=True)
class Pair:
    """Two decode steps of one total rank: adapters of several ranks, and of one rank."""

    mixed: tuple[str, int]
    uniform: tuple[str, int]


def decode(text: str, batch: int, turn: int) -> Point:
    return Point(mix(text) if text else NONE, batch, 64, 33, turn)


def prefill(text: str, batch: int, prompt: int, turn: int) -> Point:
    return Point(mix(text) if text else NONE, batch, prompt, 2, turn)


# (mix, batch). First: as many requests for both; then: one request for each adapter.
PAIRS = (
    Pair(("8x8+128x1", 24), ("8x24", 24)),
    Pair(("8x8+128x1", 9), ("8x24", 24)),
    Pair(("8x16+64x1", 24), ("8x24", 24)),
    Pair(("8x16+64x1", 17), ("8x24", 24)),
    Pair(("8x8+128x1", 48), ("8x24", 48)),
    Pair(("128x4", 16), ("32x16", 16)),
    Pair(("8x8+64x1+128x3", 32), ("32x16", 32)),
)
_PAIRED = dict.fromkeys(side for pair in PAIRS for side in (pair.mixed, pair.uniform))
_UNIFORM = [
    (f"{rank}x{count}", batch)
    for batch in (1, 4, 16, 32, 64)
    for count in (1, 4, 16)
    for rank in (8, 32, 128)
    if count <= min(batch, ADAPTERS[rank])
]
_MORE = [
    ("16x4", 32), ("64x4", 32), ("16x4", 4), ("64x4", 4), ("128x8", 8), ("128x8", 64), ("8x8+128x8", 16), ("8x8+128x8", 64),
    ("8x16+128x1", 64), ("8x4+16x4+32x4+64x4", 16), ("8x4+16x4+32x4+64x4+128x4", 64), ("8x2+128x2", 4),
]  # fmt: skip
DECODE = (
    *(decode(text, batch, 0) for text, batch in _PAIRED),
    *(decode("", batch, 1) for batch in (1, 4, 16, 32, 64)),
    *(decode(text, batch, 3) for text, batch in dict.fromkeys([*_UNIFORM, *_MORE]) if (text, batch) not in _PAIRED),
)
PREFILL = (
    *(prefill(text, 1, prompt, 2) for prompt in (128, 512, 2048, 6144) for text in ("", "8", "32", "128")),
    *(prefill(text, 8, prompt, 2) for prompt in (128, 1024) for text in ("", "8x8", "8x7+128x1", "8x4+128x4", "128x8")),
)
