"""The weights of several adapters in one host layer, side by side, so that a batch needs two matrix products and no loop.

With the shrink's columns of all adapters next to each other, row t of a batch uses only the columns that its own adapter owns:

    h = x A^T;  h[t, c] = scale[c] h[t, c] if owner[c] is t's adapter, else 0;  y += h B^T

Factors are written out densely here: diagonal blocks and slices that a column does not reach are zeros in B. That costs a few
idle multiplications and saves an operation for each adapter, slice and block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sgl_bdlora.memory_pool import LayerWeights
from sgl_bdlora.sharding import Combine, SliceLayout


@dataclass(frozen=True)
class Stack:
    """a: (R, local inputs). b: (local outputs, C). owner: (C,) int64, adapter of each column. scale: (C,), of b's dtype.

    C is R, or ranks x R where a gather stands between shrink and expand: rank after rank, each with its R columns.
    """

    a: torch.Tensor
    b: torch.Tensor
    owner: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class StackedLayer:
    """The local pieces of a host layer, and those that a collective combines; combine: how (one way for a whole layer)."""

    local: Stack | None
    combined: Stack | None
    combine: Combine


class _Entry(NamedTuple):
    owner: int
    weights: LayerWeights
    index: int

    @property
    def layout(self) -> SliceLayout:
        return self.weights.slices[self.index]


def stack_layer(layers: list[LayerWeights | None], outputs: int) -> StackedLayer | None:
    """Stack the layer's pieces of every adapter, in order; None where an adapter has none. outputs: local outputs of the layer."""
    entries = [_Entry(i, w, s) for i, w in enumerate(layers) if w is not None for s in range(len(w.slices))]
    if not entries:
        return None
    local = [e for e in entries if e.layout.piece.combine == "none"]
    combined = [e for e in entries if e.layout.piece.combine != "none"]
    combine = combined[0].layout.piece.combine if combined else "none"
    return StackedLayer(_stack(local, outputs), _stack(combined, outputs), combine)


def _stack(entries: list[_Entry], outputs: int) -> Stack | None:
    if not entries:
        return None
    a = torch.cat([_dense_a(e) for e in entries])
    pieces = [e.layout.piece for e in entries]
    ranks = len(pieces[0].ranks_b) // len(pieces[0].ranks_a)
    b = a.new_zeros(outputs, ranks, a.shape[0])
    column = 0
    for e, piece in zip(entries, pieces, strict=True):
        rows = slice(e.layout.y_start, e.layout.y_start + len(piece.outputs))
        part = _dense(e.weights.b[e.index], piece.blocks_b).T
        b[rows, :, column : column + piece.local_rank] = part.unflatten(1, (ranks, piece.local_rank))
        column += piece.local_rank
    owner = torch.cat([torch.full((p.local_rank,), e.owner) for e, p in zip(entries, pieces, strict=True)])
    scale = torch.cat([torch.full((p.local_rank,), e.layout.scale) for e, p in zip(entries, pieces, strict=True)])
    return Stack(a, b.flatten(1), owner.repeat(ranks).to(a.device), scale.repeat(ranks).to(a))


def _dense_a(e: _Entry) -> torch.Tensor:
    start, piece = e.layout.a_start, e.layout.piece
    return _dense(e.weights.a[start : start + piece.local_rank], piece.blocks_a)


def _dense(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    return torch.block_diag(*packed.chunk(blocks)) if blocks > 1 else packed
