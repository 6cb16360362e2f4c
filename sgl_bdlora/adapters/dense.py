"""The dense LoRA that a module is equal to: the oracle for every sharding and kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sgl_bdlora.adapters.format import Factor, LoRAModule


def dense_form(module: LoRAModule) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in_features) and B (out_features, rank) in float32, zeros written out; neither holds the scale.

    The update of the base weight (out_features, in_features) is ``module.scale * B @ A``.
    """
    return _dense(module.a), _dense(module.b)


def _dense(factor: Factor) -> torch.Tensor:
    import torch

    # As BlockDiagonalLinear.weight_as_blockdiagonal_matrix in peft/tuners/lora/variants.py.
    packed = factor.tensor.read().float()
    return torch.block_diag(*packed.chunk(factor.blocks, dim=0))
