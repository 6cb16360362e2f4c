"""LoRA with plain torch operations: the CPU path, and the reference of the Triton kernels."""

from typing import Protocol

import torch

from sgl_bdlora.kernels.batch import Batch
from sgl_bdlora.kernels.stack import Stack, StackedLayer


class Collectives(Protocol):
    """What S-LoRA needs between shrink and expand, over the ranks that share a layer."""

    def all_gather(self, h_TR: torch.Tensor) -> torch.Tensor:
        """(tokens, R) of every rank -> (ranks, tokens, R)."""

    def all_reduce(self, h_TR: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's (tokens, R)."""


def add_lora(y_TN: torch.Tensor, x_TK: torch.Tensor, batch: Batch, path: str, collectives: Collectives) -> None:
    """Add every adapter's update of one host layer to its rows of y, in place.

    Semantics: for each row t of adapter a and each slice of the layer
        h = x[t] A^T;  h = combine(h) over the ranks, where the piece says so
        y[t, y_start : y_start + N] += (scale * h) B^T
    Shapes: y (tokens, local outputs), x (tokens, local inputs), both of the arena's dtype.
    Rounding: h is rounded to y's dtype, as PEFT's lora_A does.
    Collectives: none when every piece in the batch is local; else one for all adapters and slices of the layer together.
    """
    layer = batch.adapters.layer(path, y_TN.shape[1])
    if layer is None:
        return
    if layer.local is not None:
        _expand(y_TN, x_TK @ layer.local.a.T, layer.local, batch.owner)
    if layer.combined is not None:
        _expand(y_TN, _combined(x_TK, layer, collectives), layer.combined, batch.owner)


def add_embedding_lora(
    y_TN: torch.Tensor, ids_T: torch.Tensor, batch: Batch, path: str, first: int, gain: float = 1.0
) -> None:
    """Add every adapter's update of an embedding to its rows of y, in place; ids that another rank holds add nothing.

    Semantics: for each row t of adapter a with first <= ids[t] < first + V
        y[t] += gain * (scale * A[:, ids[t] - first]) B^T
    Shapes: y (tokens, width), ids (tokens,) integers, A (rank, V) with V the ids that this rank holds, B (width, rank).
    """
    layer = batch.adapters.layer(path, y_TN.shape[1])
    if layer is None:
        return
    a_RV = layer.local.a
    local_T = ids_T - first
    mine_T = (local_T >= 0) & (local_T < a_RV.shape[1])
    h_TR = gain * a_RV[:, torch.where(mine_T, local_T, 0)].T
    _expand(y_TN, h_TR, layer.local, torch.where(mine_T, batch.owner, -1))


def _combined(x_TK: torch.Tensor, layer: StackedLayer, collectives: Collectives) -> torch.Tensor:
    h_TR = x_TK @ layer.combined.a.T
    if layer.combine == "reduce":
        return collectives.all_reduce(h_TR)
    return collectives.all_gather(h_TR).transpose(0, 1).flatten(1)


def _expand(y_TN: torch.Tensor, h_TC: torch.Tensor, stack: Stack, owner_T: torch.Tensor) -> None:
    # Chosen, not multiplied by zero: another adapter's columns may hold infinity for this row.
    own = owner_T.unsqueeze(1) == stack.owner
    y_TN.addmm_(torch.where(own, h_TC * stack.scale, 0.0), stack.b.T)
