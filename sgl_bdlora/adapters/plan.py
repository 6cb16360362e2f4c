"""What adapters of a base model would cost, before any is trained: ranks, parameters, bytes, flops, collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgl_bdlora.adapters.budget import closest_rank, total_parameters
from sgl_bdlora.adapters.errors import ModelError
from sgl_bdlora.adapters.format import Factor, LoRAModule, StoredTensor
from sgl_bdlora.adapters.hosts import BaseLayer, host_layers
from sgl_bdlora.adapters.model import LINEAR, BaseModel
from sgl_bdlora.sharding import PieceLayout, Sharding, layout_for

# Parameters of the block-diagonal adapters, as multiples of the plain one's: the paper's two and the same number.
GOALS = (0.87, 1.0, 1.74)


@dataclass(frozen=True)
class Candidate:
    """A block-diagonal adapter. ratio: its parameters over the plain one's; goal: what that should be near."""

    goal: float
    rank: int
    parameters: int
    ratio: float


@dataclass(frozen=True)
class Cost:
    """What one of the ranks pays, the fullest. flops: two for each weight, a token. local_rank: the largest of any module."""

    adapter: str
    sharding: str
    rank: int
    nblocks: int
    local_rank: int
    parameters: int
    bytes_16_bit: int
    flops: int
    collectives: int


@dataclass(frozen=True)
class Plan:
    """rank, parameters: of the plain adapter."""

    model: BaseModel
    tp: int
    nblocks: int
    targets: tuple[str, ...]
    rank: int
    parameters: int
    candidates: tuple[Candidate, ...]
    costs: tuple[Cost, ...]

    def as_json(self) -> dict:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        nested = {key: [dataclasses.asdict(row) for row in fields[key]] for key in ("candidates", "costs")}
        return {"model": self.model.name, "family": self.model.family, **fields, **nested}


def plan(model: BaseModel, tp: int, rank: int, nblocks: int, targets: Sequence[str] = LINEAR) -> Plan:
    """Costs of a plain adapter of `rank` and of block-diagonal ones near GOALS. Raises ModelError for what does not divide."""
    model.check_tp(tp)
    for name in targets:
        if name not in LINEAR:
            raise ModelError(
                model.name,
                f"--target-modules {name} is not one of {', '.join(LINEAR)}",
                "name decoder layers by these names; embed_tokens and lm_head cannot be block-diagonal",
            )
    layers = model.linear_layers(tuple(targets))
    _check_blocks(model, layers, nblocks)
    plain = total_parameters(layers, rank)
    candidates, costs = [], []
    for sharding in ("replicated", "s-lora"):
        costs.append(_cost("plain", layers, tp, rank, 1, sharding))
    for goal in GOALS:
        fitting = closest_rank(lambda r: total_parameters(layers, r, nblocks), goal * plain, nblocks)
        count = total_parameters(layers, fitting, nblocks)
        if all(fitting != candidate.rank for candidate in candidates):
            costs.append(_cost("block-diagonal", layers, tp, fitting, nblocks, "replicated"))
        candidates.append(Candidate(goal, fitting, count, count / plain))
    return Plan(model, tp, nblocks, tuple(targets), rank, plain, tuple(candidates), tuple(costs))


def _check_blocks(model: BaseModel, layers: list[BaseLayer], nblocks: int) -> None:
    for layer in layers:
        if layer.split % nblocks:
            side = "inputs" if layer.parallelism == "row" else "outputs"
            raise ModelError(
                model.name,
                f"{layer.leaf} has {layer.split} {side}, not divisible by --nblocks {nblocks}",
                f"choose a divisor of {layer.split} for --nblocks, or leave {layer.leaf} out of --target-modules",
            )


def _cost(adapter: str, layers: list[BaseLayer], tp: int, rank: int, nblocks: int, sharding: Sharding) -> Cost:
    modules = {layer.path: _module(layer, rank, nblocks) for layer in layers}
    numels, local, gathers = [], 0, 0
    for tp_rank in range(tp):
        pieces = _pieces(adapter, layers, modules, tp, tp_rank, sharding)
        flat = [piece for host in pieces for piece in host]
        numels.append(sum(piece.numel for piece in flat))
        local = max(local, *(piece.local_rank for piece in flat))
        gathers = sum(any(piece.combine != "none" for piece in host) for host in pieces)
    shown = "local" if nblocks > 1 else sharding
    most = max(numels)
    return Cost(adapter, shown, rank, nblocks, local, most, 2 * most, 2 * most, gathers)


def _pieces(
    name: str, layers: list[BaseLayer], modules: dict[str, LoRAModule], tp: int, rank: int, sharding: Sharding
) -> list[list[PieceLayout]]:
    """By host layer, the pieces that one rank holds."""
    hosts = host_layers(layers, tp, rank)
    return [
        [layout_for(name, modules[host.module_path(piece)], host, piece, sharding) for piece in host.slices]
        for host in hosts
    ]


def _module(layer: BaseLayer, rank: int, nblocks: int) -> LoRAModule:
    """An adapter's module that has shapes and no values."""
    row = layer.parallelism == "row"
    a_blocks, b_blocks = (nblocks, 1) if row else (1, nblocks)

    def factor(key: str, shape: tuple[int, int], blocks: int) -> Factor:
        return Factor(StoredTensor(f"{layer.path}.{key}", shape, torch.bfloat16, None), blocks)

    return LoRAModule(
        layer.path,
        factor("lora_A", (rank, layer.inputs // a_blocks), a_blocks),
        factor("lora_B", (layer.outputs, rank // b_blocks), b_blocks),
        rank,
        1.0,
    )
