"""What is compared: a plain LoRA, and block-diagonal adapters of about 0.87, 1.0 and 1.74 times its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgl_bdlora.adapters.budget import closest_rank, total_parameters
from sgl_bdlora.adapters.hosts import BaseLayer
from sgl_bdlora.adapters.plan import GOALS


@dataclass(frozen=True)
class Arm:
    """One adapter. nblocks: 1 for plain. goal: parameters over the plain LoRA's, as wished; ratio: as they are."""

    nblocks: int
    rank: int
    goal: float
    ratio: float
    lr: float = 1e-3
    init: str = "peft"

    @property
    def name(self) -> str:
        return "lora" if self.nblocks == 1 else f"bd{self.nblocks}-{self.goal:.2f}x"


def arms_of(
    layers: Sequence[BaseLayer], rank: int, nblocks: Sequence[int], goals: Sequence[float] = GOALS
) -> list[Arm]:
    """The plain LoRA of `rank` and, for each number of blocks that divides all layers, the rank closest to each goal."""
    plain = total_parameters(layers, rank)
    arms = [Arm(1, rank, 1.0, 1.0)]
    for n in nblocks:
        if any(layer.split % n for layer in layers):
            continue
        for goal in goals:
            r = closest_rank(lambda r, n=n: total_parameters(layers, r, n), goal * plain, n)
            arms.append(Arm(n, r, goal, total_parameters(layers, r, n) / plain))
    return arms
