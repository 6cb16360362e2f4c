"""What a host layer looks like to one tensor-parallel rank.

A host layer computes y = x W^T on this rank with x of `k` columns and y of one or more slices of rows (q, k, v; gate, up).
Each slice is one module of the adapter, and covers a span of that module's inputs and a span of its outputs. An embedding is the
same with rows of x that are zero but for a one at the token's id, so its inputs are the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Parallelism = Literal["column", "row", "replicated", "embedding", "head"]


@dataclass(frozen=True)
class Span:
    """The half-open range [start, stop) of a dimension of `size` entries."""

    start: int
    stop: int
    size: int

    def __post_init__(self):
        if not 0 <= self.start < self.stop <= self.size:
            raise ValueError(f"bad span: start {self.start}, stop {self.stop}, size {self.size}")

    def __len__(self) -> int:
        return self.stop - self.start

    @classmethod
    def whole(cls, size: int) -> Span:
        return cls(0, size, size)

    @classmethod
    def part(cls, index: int, parts: int, size: int) -> Span:
        """Part number `index` of `parts` nearly equal parts; their sizes differ by at most one."""
        return cls(size * index // parts, size * (index + 1) // parts, size)

    @classmethod
    def shard(cls, shard_size: int, index: int, size: int) -> Span:
        """Shard number `index` of equal shards of `shard_size` entries."""
        return cls(shard_size * index, shard_size * (index + 1), size)


@dataclass(frozen=True)
class HostSlice:
    """One adapter module inside a host layer, as this rank sees it.

    name: the module's leaf name in the adapter, e.g. "q_proj".
    inputs: the span of the module's input features that this rank's x holds.
    outputs: the span of the module's output features that this rank's y holds. Ranks that repeat a kv head share a span.
    y_start: where these outputs begin among the columns of the host layer's local output.
    """

    name: str
    inputs: Span
    outputs: Span
    y_start: int


@dataclass(frozen=True)
class HostLayer:
    """A layer of the served model on one rank.

    path: module path in the served model, e.g. "model.layers.0.self_attn.qkv_proj".
    parallelism: "column" (split on outputs), "row" (split on inputs, partial sums reduced by the host), "replicated", or, both split
    on the vocabulary, "embedding" (on inputs) and "head" (lm_head, on outputs).
    slices: in the order of the local output's columns. All slices share the same inputs.
    tp_rank, tp_size: this rank's place among those that share the layer.
    weight: an embedding's or head's own (local vocabulary, width), to compare with the copy that an adapter may bring; None if it
    is not held as plain numbers.
    """

    path: str
    parallelism: Parallelism
    slices: tuple[HostSlice, ...]
    tp_rank: int = 0
    tp_size: int = 1
    weight: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def vocabulary(self) -> Span:
        """The token ids of this rank's part of an embedding or head."""
        return self.slices[0].inputs if self.parallelism == "embedding" else self.slices[0].outputs

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    def module_path(self, piece: HostSlice) -> str:
        """The adapter's path of a slice, e.g. "model.layers.0.self_attn.q_proj"."""
        return f"{self.parent}.{piece.name}" if self.parent else piece.name
