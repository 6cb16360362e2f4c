"""Several adapters of one frozen model in one forward and backward pass, each with its own rows, loss and optimiser state.

The rows of a batch belong to the adapters in turn: with K adapters and b rows each, rows i b to (i + 1) b - 1 are adapter i's. The base
model's products run once over all rows, and the low-rank ones of all adapters are batched products. For that every adapter has dense
factors of the largest rank R, and a mask says which of their entries it really has: those of its own rank and, in its block-diagonal
factor, of its blocks. The others are zero and stay zero, because their gradients are made zero. A step on a GPU is bound by the number of
operations that it starts, so that multiplying zeros too costs less than products of each adapter's own shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.quality.arms import Arm
from sgl_bdlora.adapters.hosts import BaseLayer

# Update = SCALE * B A for every rank (lora_alpha = SCALE * r), so that one learning rate means the same for all.
SCALE = 2.0
Tensors = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Bank:
    """Adapters for all `layers` of `model`, in the order of `arms`.

    Each buffer is (K, size), a row for an adapter: by layer A (R, in) and B transposed (R, out). Weights, clipped gradients and the
    optimiser's state are float32; the copy that the model multiplies with and its gradient have the model's type.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[BaseLayer], arms: Sequence[Arm], seed: int = 0):
        self.arms = list(arms)
        self.layers = {layer.path: layer for layer in layers}
        # 16-bit products of other sizes miss the tensor cores.
        self._rank = -(-max(arm.rank for arm in arms) // 8) * 8
        zeros = partial(torch.zeros, len(arms), self._rank * sum(layer.inputs + layer.outputs for layer in layers))
        like = next(model.parameters())
        self._weights, self._clipped = (zeros(device=like.device) for _ in range(2))
        self._copy, self._gradient = (zeros(device=like.device, dtype=like.dtype) for _ in range(2))
        self._mask = zeros(device=like.device, dtype=torch.bool)
        for path, masks in self._factors(self._mask).items():
            for index, arm in enumerate(self.arms):
                for mask, pattern in zip(masks, _patterns(self.layers[path], arm, self._rank), strict=True):
                    mask[index] = pattern
        copies, gradients = self._factors(self._copy), self._factors(self._gradient)
        self._forwards = {}
        for path, (a, b) in copies.items():
            module = model.get_submodule(path)
            ours = module.weight, module.bias, a.requires_grad_(), b, *gradients[path]
            self._forwards[module] = partial(_Adapted.apply, *ours)
        self._rows = [self._weights[index].requires_grad_() for index in range(len(arms))]
        for row, gradient in zip(self._rows, self._clipped, strict=True):
            row.grad = gradient
        self.reset(seed)

    def _factors(self, buffer: torch.Tensor) -> Tensors:
        """Views of a buffer: A (K, R, in) and B (K, R, out) by layer."""
        widths = [width for layer in self.layers.values() for width in (layer.inputs, layer.outputs)]
        parts = buffer.split([self._rank * width for width in widths], dim=1)
        views = [part.unflatten(1, (self._rank, -1)) for part in parts]
        return dict(zip(self.layers, zip(views[::2], views[1::2], strict=True), strict=True))

    def reset(self, seed: int) -> None:
        """Fresh adapters, as PEFT begins them: B zero, A uniform. Optimiser states are cleared."""
        random = torch.Generator().manual_seed(seed)
        for index, arm in enumerate(self.arms):
            self.put(index, {path: _fresh(layer, arm, random) for path, layer in self.layers.items()})
        self._optimizer = torch.optim.AdamW([{"params": [row]} for row in self._rows], weight_decay=0.0, fused=True)

    @torch.no_grad()
    def put(self, index: int, tensors: Tensors) -> None:
        """Set adapter `index` from lora_A and lora_B by module path, in PEFT's packed shapes: the entries of the mask, row by row."""
        weights, masks = self._factors(self._weights), self._factors(self._mask)
        for path, (a, b) in tensors.items():
            (into_a, into_b), (mask_a, mask_b) = ([f[index] for f in found[path]] for found in (weights, masks))
            into_a[mask_a] = a.flatten().to(into_a)
            into_b.T[mask_b.T] = b.flatten().to(into_b)
        self._copy[index].copy_(self._weights[index])

    @torch.no_grad()
    def get(self, index: int) -> Tensors:
        """Adapter `index` on the CPU, in PEFT's packed shapes: the inverse of `put`."""
        tensors, masks = {}, self._factors(self._mask)
        for path, (a, b) in self._factors(self._weights).items():
            mask_a, mask_b = masks[path]
            packed_a = a[index][mask_a[index]].view(self.arms[index].rank, -1)
            packed_b = b[index].T[mask_b[index].T].view(self.layers[path].outputs, -1)
            tensors[path] = (packed_a.cpu(), packed_b.cpu())
        return tensors

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the model answers with the bank's adapters. A backward pass overwrites their gradient."""
        for module, forward in self._forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in self._forwards:
                del module.forward

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """One step of AdamW (no decay) for every adapter by itself, its gradient clipped to norm 1, at `factor` times its rate."""
        self._gradient.mul_(self._mask)
        norm = torch.linalg.vector_norm(self._gradient, dim=1, keepdim=True, dtype=torch.float32)
        torch.mul(self._gradient, (1 / (norm + 1e-6)).clamp(max=1), out=self._clipped)
        for arm, group in zip(self.arms, self._optimizer.param_groups, strict=True):
            group["lr"] = arm.lr * factor
        self._optimizer.step()
        self._copy.copy_(self._weights)


class _Adapted(torch.autograd.Function):
    """A frozen linear layer with K adapters: y_k = x_k weight^T + bias + SCALE (x_k a_k^T) b_k.

    weight (out, in), bias (out,) or None, a (K, R, in), b (K, R, out), x (K rows, tokens, in) -> y (K rows, tokens, out). The backward pass
    writes the factors' gradients to into_a and into_b, shaped like a and b; `a` has to require a gradient, so that there is one.
    """

    @staticmethod
    def forward(ctx, weight, bias, a, b, into_a, into_b, x):
        x_kmi = x.reshape(len(a), -1, x.shape[-1])
        h_kmr = torch.bmm(x_kmi, a.mT)
        y = torch.nn.functional.linear(x, weight, bias)
        y.view(len(a), -1, y.shape[-1]).baddbmm_(h_kmr, b, alpha=SCALE)
        ctx.save_for_backward(weight, a, b, x_kmi, h_kmr)
        ctx.into = into_a, into_b
        return y

    @staticmethod
    def backward(ctx, slope):
        weight, a, b, x_kmi, h_kmr = ctx.saved_tensors
        into_a, into_b = ctx.into
        slope_kmo = slope.reshape(len(a), -1, slope.shape[-1])
        slope_kmr = torch.bmm(slope_kmo, b.mT)
        into_a.baddbmm_(slope_kmr.mT, x_kmi, beta=0, alpha=SCALE)
        into_b.baddbmm_(h_kmr.mT, slope_kmo, beta=0, alpha=SCALE)
        back = (slope_kmo @ weight).baddbmm_(slope_kmr, a, alpha=SCALE)
        return None, None, None, None, None, None, back.view(*slope.shape[:-1], -1)


def _patterns(layer: BaseLayer, arm: Arm, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries of A (rank, in) and of B transposed (rank, out) an adapter has; the rows beyond its own rank are not among them."""
    row = layer.parallelism == "row"
    return (
        _blocks(rank, layer.inputs, arm.rank, arm.nblocks if row else 1),
        _blocks(rank, layer.outputs, arm.rank, 1 if row else arm.nblocks),
    )


def _blocks(rank: int, width: int, used: int, blocks: int) -> torch.Tensor:
    """(rank, width): true in the `blocks` equal blocks along the diagonal of the first `used` rows."""
    return (torch.arange(rank) // (used // blocks))[:, None] == torch.arange(width) // (width // blocks)


def _fresh(layer: BaseLayer, arm: Arm, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT 0.21's start: B zero, A uniform within 1 / sqrt(in); its block-diagonal A within sqrt(6 N / in), unless init is "lora"."""
    row, n = layer.parallelism == "row", arm.nblocks
    inputs = layer.inputs // n if row else layer.inputs
    bound = math.sqrt((6 if row and n > 1 and arm.init == "peft" else 1) / inputs)
    if row and arm.init == "lora":
        bound = math.sqrt(1 / layer.inputs)
    a = (torch.rand(arm.rank, inputs, generator=random) * 2 - 1) * bound
    return a, torch.zeros(layer.outputs, arm.rank if row else arm.rank // n)
