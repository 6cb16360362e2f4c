"""A base model's adaptable layers as shapes, and what one of T ranks holds of them: SGLang's layers without SGLang.

Which layers are row-parallel is a property of the served model; here Megatron's convention decides by name, as in SGLang's dense
decoders: o_proj and down_proj are row-parallel, every other linear layer is column-parallel. The input embedding and lm_head are
split on the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgl_bdlora.adapters.format import Adapter
from sgl_bdlora.sharding.host import HostLayer, HostSlice, Parallelism, Span

if TYPE_CHECKING:
    import torch

ROW_PARALLEL = ("o_proj", "down_proj", "out_proj")

# SGLang fills the vocabulary up to a multiple of this before it splits it (vocab_parallel_embedding.py).
VOCABULARY_PADDING = 64

# Modules that SGLang runs as one layer, so that their gathers are one (layers/host.py: FUSED).
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True)
class BaseLayer:
    """One adaptable layer of a base model, whole.

    path: the adapter's module path. most_parts: into how many different parts it can be split; with more ranks, neighbours hold the
    same part (kv heads). None if nothing bounds it.
    """

    path: str
    inputs: int
    outputs: int
    parallelism: Parallelism
    most_parts: int | None = None

    @property
    def leaf(self) -> str:
        return leaf_of(self.path)

    @property
    def split(self) -> int:
        """Size of the dimension that tensor parallelism splits."""
        return self.inputs if self.parallelism in ("row", "embedding") else self.outputs


def leaf_of(path: str) -> str:
    """The last name of a module path, e.g. ``q_proj``."""
    return path.rpartition(".")[2]


def parallelism_of(leaf: str) -> Parallelism:
    """How Megatron's convention splits a linear layer of this name."""
    return "row" if leaf in ROW_PARALLEL else "column"


def layers_of(adapter: Adapter) -> list[BaseLayer]:
    """The layers that an adapter was trained on, as far as its own shapes tell."""
    layers = []
    for path, module in adapter.modules.items():
        parallelism = parallelism_of(leaf_of(path))
        if module.embedding:
            parallelism = "head" if leaf_of(path) == "lm_head" else "embedding"
        layers.append(BaseLayer(path, module.in_features, module.out_features, parallelism))
    return layers


def host_layers(
    layers: Iterable[BaseLayer], tp: int, rank: int, weights: dict[str, torch.Tensor] | None = None
) -> list[HostLayer]:
    """What rank `rank` of `tp` holds of these layers. weights: whole weights of embeddings and lm_head by path, where known."""
    found: dict[str, tuple[Parallelism, list[HostSlice], torch.Tensor | None]] = {}
    for layer in layers:
        parent, dot, leaf = layer.path.rpartition(".")
        path = f"{parent}{dot}{_FUSED.get(leaf, leaf)}"
        inputs, outputs = Span.whole(layer.inputs), Span.whole(layer.outputs)
        part = _part(layer, tp, rank)
        if layer.parallelism in ("row", "embedding"):
            inputs = part
        else:
            outputs = part
        weight = (weights or {}).get(layer.path)
        if weight is not None:
            weight = weight[part.start : part.stop]
        _, slices, _ = found.setdefault(path, (layer.parallelism, [], weight))
        y_start = slices[-1].y_start + len(slices[-1].outputs) if slices else 0
        slices.append(HostSlice(leaf, inputs, outputs, y_start))
    return [
        HostLayer(path, parallelism, tuple(slices), rank, tp, weight)
        for path, (parallelism, slices, weight) in found.items()
    ]


def _part(layer: BaseLayer, tp: int, rank: int) -> Span:
    if layer.parallelism in ("embedding", "head"):
        return _vocabulary(layer.split, tp, rank)
    parts = min(tp, layer.most_parts or tp)
    return Span.part(rank * parts // tp, parts, layer.split)


def _vocabulary(size: int, tp: int, rank: int) -> Span:
    """The last ranks of a large `tp` and a small vocabulary would hold padding only; they count like the last one that does not."""
    padded = -(-size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    share = -(-padded // tp)
    start = min(share * rank, size - 1)
    return Span(start, min(start + share, size), size)
