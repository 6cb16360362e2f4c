"""Several adapters of one frozen model in one forward and backward pass, each with its own rows, loss and optimiser state.

The rows of a batch belong to the adapters in turn: with K adapters and b rows each, rows i b to (i + 1) b - 1 are adapter i's. The base
model's products run once over all rows, and the low-rank ones of all adapters are batched products. For that every adapter has dense
factors of the largest rank R, and a mask says which of their entries it really has: those of its own rank and, in its block-diagonal
factor, of its blocks. The others are zero and stay zero, because their gradients are made zero. A step on a GPU is bound by the number of
operations that it starts, so that multiplying zeros too costs less than products of each adapter's own shape.
"""

from __future__ import annotations

import itertools
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
        for index in range(len(arms)):
            for view in itertools.chain(*self._entries(self._mask, index)):
                view.fill_(True)
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

    def _entries(self, buffer: torch.Tensor, index: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of what adapter `index` has of a buffer, layer by layer: A (N, rank / N, in / N) and B transposed (N, rank / N, out / N).

        N: blocks of the block-diagonal factor, 1 for the other. A view is written without asking the device where a mask is true.
        """
        rank, at = self.arms[index].rank, index * buffer.shape[1]
        for layer in self.layers.values():
            views = []
            for width, n in zip((layer.inputs, layer.outputs), _blocks(layer, self.arms[index]), strict=True):
                size = n, rank // n, width // n
                views.append(buffer.as_strided(size, (size[1] * width + size[2], width, 1), at))
                at += self._rank * width
            yield views[0], views[1]

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Fresh adapters, as PEFT begins them: B zero, A uniform; arms of one shape draw the same. Optimiser states are cleared."""
        self._weights.zero_()
        for index, arm in enumerate(self.arms):
            random = torch.Generator().manual_seed(seed)
            views = [a for a, _ in self._entries(self._weights, index)]
            drawn = torch.rand(sum(map(torch.numel, views)), generator=random).to(self._weights.device).mul_(2).sub_(1)
            for layer, a, values in zip(
                self.layers.values(), views, drawn.split([*map(torch.numel, views)]), strict=True
            ):
                torch.mul(values.view(a.shape), _bound(layer, arm), out=a)
        self._copy.copy_(self._weights)
        self._optimizer = torch.optim.AdamW([{"params": [row]} for row in self._rows], weight_decay=0.0, fused=True)

    @torch.no_grad()
    def put(self, index: int, tensors: Tensors) -> None:
        """Set adapter `index` from lora_A and lora_B by module path, in PEFT's packed shapes."""
        leaves = [leaf for path in self.layers for leaf in tensors[path]]
        sent = torch.cat([leaf.flatten() for leaf in leaves]).to(self._weights)
        parts = iter(sent.split([leaf.numel() for leaf in leaves]))
        for a, b in self._entries(self._weights, index):
            a.copy_(next(parts).view(a.shape))
            b.mT.copy_(next(parts).view(b.mT.shape))
        self._copy[index].copy_(self._weights[index])

    @torch.no_grad()
    def get(self, index: int) -> Tensors:
        """Adapter `index` on the CPU, in PEFT's packed shapes: the inverse of `put`."""
        views = self._entries(self._weights, index)
        pairs = [[v.flatten(0, 1).contiguous().to("cpu", copy=True) for v in (a, b.mT)] for a, b in views]
        return dict(zip(self.layers, map(tuple, pairs), strict=True))

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


def _blocks(layer: BaseLayer, arm: Arm) -> tuple[int, int]:
    """Of A and of B: a row-parallel layer's A is block-diagonal, a column-parallel one's B."""
    return (arm.nblocks, 1) if layer.parallelism == "row" else (1, arm.nblocks)


def _bound(layer: BaseLayer, arm: Arm) -> float:
    """PEFT 0.21's start: A uniform within 1 / sqrt(in); its block-diagonal A within sqrt(6 N / in), unless init is "lora"."""
    n, _ = _blocks(layer, arm)
    return math.sqrt((6 if n > 1 else 1) / (layer.inputs // n)) if arm.init == "peft" else math.sqrt(1 / layer.inputs)
