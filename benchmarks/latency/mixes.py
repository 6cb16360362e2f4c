"""Which adapters a batch asks for: "16x4" is four of rank 16, "8x16+128x1" sixteen of rank 8 and one of rank 128."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.files import MODULES, Shape, matched_rank, parameters


@dataclass(frozen=True)
class Mix:
    """ranks: of every adapter, in the order in which requests take turns with them."""

    text: str
    ranks: tuple[int, ...]

    @property
    def adapters(self) -> int:
        return len(self.ranks)


def mix(text: str) -> Mix:
    ranks: list[int] = []
    for part in text.split("+"):
        rank, times, count = part.partition("x")
        if not (rank.isdigit() and (count.isdigit() or not times) and int(rank) and int(count or 1)):
            raise argparse.ArgumentTypeError(f"{text!r}: has to be like 16x4 or 8x16+128x1, RANKxADAPTERS joined by +")
        ranks += [int(rank)] * int(count or 1)
    return Mix(text, tuple(ranks))


@dataclass(frozen=True)
class Adapter:
    """One adapter of a benchmark. rank: of the plain adapter that it stands for. ratio: its parameters by that one's; None: plain."""

    rank: int
    number: int
    ratio: float | None = None

    @property
    def name(self) -> str:
        kind = "plain" if self.ratio is None else f"bd{self.ratio:g}"
        return f"{kind}-r{self.rank}-{self.number}"


def rank_of(plain: int, ratio: float | None, shape: Shape, nblocks: int, modules: Sequence[str] = MODULES) -> int:
    """Of the adapter of `ratio` that stands for a plain one of rank `plain`."""
    return plain if ratio is None else matched_rank(shape, plain, nblocks, ratio, modules)


def params_ratio(
    chosen: Mix, ratio: float | None, shape: Shape, nblocks: int, modules: Sequence[str] = MODULES
) -> float:
    """Parameters of the mix's adapters of `ratio` by its plain ones', as ranks come out."""
    blocks = None if ratio is None else nblocks
    ranks = [rank_of(plain, ratio, shape, nblocks, modules) for plain in chosen.ranks]
    have = sum(parameters(shape, rank, blocks, modules) for rank in ranks)
    return have / sum(parameters(shape, plain, None, modules) for plain in chosen.ranks)


def adapters_of(chosen: Mix, ratio: float | None) -> list[Adapter]:
    """The mix's adapters; equal ranks get different numbers."""
    counts: dict[int, int] = {}
    made = []
    for rank in chosen.ranks:
        made.append(Adapter(rank, counts.get(rank, 0), ratio))
        counts[rank] = counts.get(rank, 0) + 1
    return made
