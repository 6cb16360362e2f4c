"""Which adapters a batch asks for: "16x4" is four of rank 16, "8x16+128x1" sixteen of rank 8 and one of rank 128."""

import argparse
from dataclasses import dataclass


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


def adapters_of(chosen: Mix, ratio: float | None) -> list[Adapter]:
    """The mix's adapters; equal ranks get different numbers."""
    counts: dict[int, int] = {}
    made = []
    for rank in chosen.ranks:
        made.append(Adapter(rank, counts.get(rank, 0), ratio))
        counts[rank] = counts.get(rank, 0) + 1
    return made
