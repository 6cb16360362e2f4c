"""LoRA with plain torch operations: the CPU path, and the reference of the Triton kernels."""

from typing import NamedTuple, Protocol

import torch

from sgl_bdlora.kernels.batch import Batch, Segment
from sgl_bdlora.memory_pool import LayerWeights
from sgl_bdlora.sharding import SliceLayout


class Collectives(Protocol):
    """What S-LoRA needs between shrink and expand, over the ranks that share a layer."""

    def all_gather(self, h_TR: torch.Tensor) -> torch.Tensor:
        """(tokens, R) of every rank -> (ranks, tokens, R)."""

    def all_reduce(self, h_TR: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's (tokens, R)."""


class Waiting(NamedTuple):
    """A segment whose shrink has to meet the other ranks' before it can be expanded."""

    segment: Segment
    weights: LayerWeights
    h_SR: torch.Tensor


def add_lora(y_TN: torch.Tensor, x_TK: torch.Tensor, batch: Batch, path: str, collectives: Collectives) -> None:
    """Add every adapter's update of one host layer to its rows of y, in place.

    Semantics: for each segment with rows t and each slice of the layer
        h = x[t] A^T;  h = combine(h) over the ranks, where the piece says so
        y[t, y_start : y_start + N] += scale * h B^T
    Shapes: y (tokens, local outputs), x (tokens, local inputs), both of the arena's dtype; A and B as LayerWeights.
    Rounding: the shrink's result is rounded to y's dtype, as PEFT's lora_A does.
    Collectives: none when every piece in the batch is local; else one for all segments and slices of the layer together.
    """
    waiting = []
    for segment in batch.segments:
        weights = segment.adapter.layers.get(path)
        if weights is None:
            continue
        h_SR = _shrink(x_TK[segment.rows], weights)
        local = [i for i, s in enumerate(weights.slices) if s.piece.combine == "none"]
        parts = {i: h_SR[:, _columns(weights.slices[i])] for i in local}
        _expand_rows(y_TN, segment, weights, parts)
        if len(local) < len(weights.slices):
            waiting.append(Waiting(segment, weights, h_SR))
    if waiting:
        _combine(y_TN, waiting, collectives)


def _columns(s: SliceLayout) -> slice:
    return slice(s.a_start, s.a_start + s.piece.local_rank)


def _combine(y_TN: torch.Tensor, waiting: list[Waiting], collectives: Collectives) -> None:
    """One collective over the shrinks of all waiting segments, side by side, padded to the widest."""
    rows = sum(w.h_SR.shape[0] for w in waiting)
    stacked = waiting[0].h_SR.new_zeros(rows, max(w.h_SR.shape[1] for w in waiting))
    start = 0
    for w in waiting:
        stacked[start : start + w.h_SR.shape[0], : w.h_SR.shape[1]] = w.h_SR
        start += w.h_SR.shape[0]
    # A host layer is either column- or row-parallel, so its pieces all gather or all reduce.
    gather = any(s.piece.combine == "gather" for s in waiting[0].weights.slices)
    h_GTR = collectives.all_gather(stacked) if gather else collectives.all_reduce(stacked).unsqueeze(0)
    start = 0
    for segment, weights, h_SR in waiting:
        h_GSR = h_GTR[:, start : start + h_SR.shape[0]]
        parts = {}
        for i, s in enumerate(weights.slices):
            if s.piece.combine != "none":
                # Rank g gathered rows [g R, (g + 1) R) of A: its columns follow those of rank g - 1.
                parts[i] = h_GSR[:, :, _columns(s)].transpose(0, 1).flatten(1)
        _expand_rows(y_TN, segment, weights, parts)
        start += h_SR.shape[0]


def _expand_rows(y_TN: torch.Tensor, segment: Segment, weights: LayerWeights, parts: dict[int, torch.Tensor]) -> None:
    """Expand some slices of one segment. parts: slice number -> its shrink (S, rank columns of B)."""
    if not parts:
        return
    y_SN = y_TN[segment.rows]
    for i, h_SR in parts.items():
        s = weights.slices[i]
        _expand(y_SN[:, s.y_start : s.y_start + s.piece.shape_b[0]], h_SR, weights.b[i], s.piece.blocks_b, s.scale)
    if not isinstance(segment.rows, slice):
        y_TN[segment.rows] = y_SN


def _shrink(x_SK: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
    """x A^T, (S, R). With n blocks, x's columns and A's rows fall into n groups that meet only each other."""
    blocks = weights.slices[0].piece.blocks_a
    if blocks == 1:
        return x_SK @ weights.a.T
    x_GSK = x_SK.unflatten(1, (blocks, -1)).transpose(0, 1)
    h_GSR = x_GSK @ weights.a.unflatten(0, (blocks, -1)).transpose(1, 2)
    return h_GSR.transpose(0, 1).flatten(1)


def _expand(y_SN: torch.Tensor, h_SR: torch.Tensor, b: torch.Tensor, blocks: int, scale: float) -> None:
    """y += scale * h B^T, in place."""
    if blocks == 1:
        y_SN.addmm_(h_SR, b.T, alpha=scale)
        return
    h_GSR = h_SR.unflatten(1, (blocks, -1)).transpose(0, 1)
    d_GSN = h_GSR @ b.unflatten(0, (blocks, -1)).transpose(1, 2)
    y_SN.add_(d_GSN.transpose(0, 1).flatten(1), alpha=scale)
