"""Which adapters are compared with which, and how many requests each gets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.served import Adapter

BASE = "base model"
_SUFFIX = re.compile(r"[-_.](bd|bdlora|bd-lora|block|block-diagonal|lora|plain|dense)$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A block-diagonal adapter and its plain counterpart. same_skill: their names say that they were trained for the same."""

    name: str
    block: Adapter
    plain: Adapter
    same_skill: bool

    @property
    def label(self) -> str:
        words = f"{self.name} · block-diagonal r {self.block.rank} | plain r {self.plain.rank}"
        return words if self.same_skill else f"{words} (paired by size)"

    @property
    def parameter_ratio(self) -> float:
        return self.block.parameters / self.plain.parameters


def skill(name: str) -> str:
    """What an adapter's name says without its kind: "json" of "json-bd"."""
    return _SUFFIX.sub("", name) or name


def pair_adapters(blocks: Sequence[Adapter], plains: Sequence[Adapter]) -> list[Pair]:
    """By skill first; what is left over by the nearest number of parameters, and marked so."""
    pairs, left = [], list(blocks)
    free = {a.name: a for a in plains}
    for block in blocks:
        plain = next((a for a in free.values() if skill(a.name) == skill(block.name)), None)
        if plain:
            pairs.append(Pair(skill(block.name), block, plain, True))
            left.remove(block)
            del free[plain.name]
    for block in left:
        if free:
            plain = min(free.values(), key=lambda a: (abs(a.parameters - block.parameters), a.name))
            pairs.append(Pair(f"{block.name} + {plain.name}", block, plain, False))
            del free[plain.name]
    return pairs


def spread(names: Sequence[str], requests: int, skewed: bool) -> dict[str, int]:
    """`requests` over `names` in order: evenly, or skewed so that the k-th gets a share of 1/k (Zipf). Zeros are left out."""
    if not names:
        return {}
    weights = [1 / (i + 1) if skewed else 1.0 for i in range(len(names))]
    exact = [requests * weight / sum(weights) for weight in weights]
    counts = [int(x) for x in exact]
    # The largest remainders get what rounding left over; earlier names first.
    order = sorted(range(len(names)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: requests - sum(counts)]:
        counts[i] += 1
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def show_mix(mix: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in mix.items())


def read_mix(text: str, known: Sequence[str]) -> dict[str, int]:
    """The inverse of show_mix. Raises ValueError that says which part is wrong."""
    mix: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, count = part.rpartition(" ")
        name = name.strip()
        if name not in known:
            raise ValueError(
                f"{part!r}: there is no adapter pair of that name (there are {', '.join(known) or 'none'})."
            )
        if not count.isdecimal():
            raise ValueError(f"{part!r}: a name has to be followed by a whole number of requests.")
        if int(count):
            mix[name] = mix.get(name, 0) + int(count)
    if not mix:
        raise ValueError("Choose at least one request.")
    if sum(mix.values()) > 256:
        raise ValueError(f"{sum(mix.values())} requests are more than the 256 that one batch may have here.")
    return mix
