"""LoRA with plain torch operations: the CPU path, and the reference of the Triton kernels."""

import torch

from sgl_bdlora.kernels.batch import Batch
from sgl_bdlora.memory_pool import LayerWeights


def add_lora(y_TN: torch.Tensor, x_TK: torch.Tensor, batch: Batch, path: str) -> None:
    """Add every adapter's update of one host layer to its rows of y, in place.

    Semantics: for each segment with rows t and each slice of the layer
        y[t, y_start : y_start + N] += scale * (x[t] A^T) B^T
    Shapes: y (tokens, local outputs), x (tokens, local inputs), both of the arena's dtype; A and B as LayerWeights.
    Rounding: the shrink's result is rounded to y's dtype, as PEFT's lora_A does.
    """
    for segment in batch.segments:
        weights = segment.adapter.layers.get(path)
        if weights is None:
            continue
        x_SK = x_TK[segment.rows]
        if isinstance(segment.rows, slice):
            _add_rows(y_TN[segment.rows], x_SK, weights)
        else:
            y_SN = y_TN[segment.rows]
            _add_rows(y_SN, x_SK, weights)
            y_TN[segment.rows] = y_SN


def _add_rows(y_SN: torch.Tensor, x_SK: torch.Tensor, weights: LayerWeights) -> None:
    h_SR = _shrink(x_SK, weights.a, weights.slices[0].piece.blocks_a)
    for piece, b in zip(weights.slices, weights.b, strict=True):
        layout = piece.piece
        h = h_SR[:, piece.a_start : piece.a_start + layout.local_rank]
        y = y_SN[:, piece.y_start : piece.y_start + layout.shape_b[0]]
        _expand(y, h, b, layout.blocks_b, piece.scale)


def _shrink(x_SK: torch.Tensor, a: torch.Tensor, blocks: int) -> torch.Tensor:
    """x A^T, (S, R). With n blocks, x's columns and A's rows fall into n groups that meet only each other."""
    if blocks == 1:
        return x_SK @ a.T
    x_GSK = x_SK.unflatten(1, (blocks, -1)).transpose(0, 1)
    h_GSR = x_GSK @ a.unflatten(0, (blocks, -1)).transpose(1, 2)
    return h_GSR.transpose(0, 1).flatten(1)


def _expand(y_SN: torch.Tensor, h_SR: torch.Tensor, b: torch.Tensor, blocks: int, scale: float) -> None:
    """y += scale * h B^T, in place."""
    if blocks == 1:
        y_SN.addmm_(h_SR, b.T, alpha=scale)
        return
    h_GSR = h_SR.unflatten(1, (blocks, -1)).transpose(0, 1)
    d_GSN = h_GSR @ b.unflatten(0, (blocks, -1)).transpose(1, 2)
    y_SN.add_(d_GSN.transpose(0, 1).flatten(1), alpha=scale)
