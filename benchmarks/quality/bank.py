"""Several adapters of one frozen model in one forward and backward pass, each with its own rows, loss and optimiser state.

The rows of a batch belong to the adapters in turn: with K adapters and b rows each, rows i b to (i + 1) b - 1 are adapter i's. The base
model's products run once over all rows; only the low-rank ones differ, and those of adapters with equally many blocks are one batched
product. Adapters of different ranks share it too: a smaller one is filled up with zeros in A AND in B, whose gradients are zero as well,
so that they stay zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.quality.arms import Arm
from sgl_bdlora.adapters.hosts import BaseLayer

# Update = SCALE * B A for every rank (lora_alpha = SCALE * r), so that one learning rate means the same for all.
SCALE = 2.0
# Gradients are slices of one buffer on purpose; autograd adds into them in place all the same.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
Tensors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Group:
    """Adapters with equally many blocks. share: rank rows of a block, of the largest. start: the first adapter's place in the bank.

    Column-parallel layers have A (K, N, share, in) and B (K, N, out / N, share), row-parallel ones A (K, N, share, in / N) and
    B (K, out, N, share), K adapters in N blocks.
    """

    start: int
    arms: list[Arm]
    share: int
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    flat: torch.Tensor
    gradient: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @property
    def blocks(self) -> int:
        return self.arms[0].nblocks


class Bank:
    """Adapters for all `layers` of `model`. Sorts them by nblocks: `arms` has the order that rows follow."""

    def __init__(self, model: torch.nn.Module, layers: Sequence[BaseLayer], arms: Sequence[Arm], seed: int = 0):
        self.arms = sorted(arms, key=lambda arm: arm.nblocks)
        self.layers = {layer.path: layer for layer in layers}
        self._device = next(model.parameters()).device
        self._groups: list[_Group] = []
        for blocks in dict.fromkeys(arm.nblocks for arm in self.arms):
            self._groups.append(self._group([arm for arm in self.arms if arm.nblocks == blocks]))
        self._modules = {path: model.get_submodule(path) for path in self.layers}
        self._steps = 0
        self.reset(seed)

    def _group(self, arms: list[Arm]) -> _Group:
        n = arms[0].nblocks
        share = max(arm.rank for arm in arms) // n
        if self._device.type == "cuda":
            share = -(-share // 8) * 8  # 16-bit products of other sizes miss the tensor cores
        shapes = {path: _shapes(layer, n, share) for path, layer in self.layers.items()}
        size = sum(math.prod(shape) for pair in shapes.values() for shape in pair)
        flat, gradient, first, second = (torch.zeros(len(arms), size, device=self._device) for _ in range(4))
        factors, at = {}, 0
        for path, pair in shapes.items():
            made = []
            for shape in pair:
                part = slice(at, at + math.prod(shape))
                # A leaf that shares the flat buffers: the backward pass adds into `gradient`, a step changes `flat`.
                leaf = flat[:, part].view(len(arms), *shape).requires_grad_()
                leaf.grad = gradient[:, part].view(len(arms), *shape)
                made.append(leaf)
                at = part.stop
            factors[path] = tuple(made)
        start = sum(len(group.arms) for group in self._groups)
        return _Group(start, arms, share, factors, flat, gradient, first, second)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Fresh adapters, as PEFT begins them: B zero, A uniform. Optimiser states are cleared."""
        random = torch.Generator().manual_seed(seed)
        for index, arm in enumerate(self.arms):
            self.put(index, {path: _fresh(layer, arm, random) for path, layer in self.layers.items()})
        for group in self._groups:
            for buffer in (group.gradient, group.first, group.second):
                buffer.zero_()
        self._steps = 0

    @torch.no_grad()
    def put(self, index: int, tensors: Tensors) -> None:
        """Set adapter `index` from lora_A and lora_B by module path, in PEFT's packed shapes."""
        group, place = self._find(index)
        rows = group.arms[place].rank // group.blocks
        for path, (a, b) in tensors.items():
            into_a, into_b = (factor[place].zero_() for factor in group.factors[path])
            into_a[:, :rows] = a.view(group.blocks, rows, -1).to(into_a)
            if self.layers[path].parallelism == "row":
                into_b[..., :rows] = b.view(b.shape[0], group.blocks, rows).to(into_b)
            else:
                into_b[..., :rows] = b.view(group.blocks, -1, rows).to(into_b)

    def get(self, index: int) -> Tensors:
        """Adapter `index` on the CPU, in PEFT's packed shapes: the inverse of `put`."""
        group, place = self._find(index)
        arm, tensors = group.arms[place], {}
        rows = arm.rank // group.blocks
        for path, layer in self.layers.items():
            a, b = (factor[place].detach().cpu().clone() for factor in group.factors[path])
            a = a[:, :rows].reshape(arm.rank, -1)
            b = b[..., :rows].reshape(layer.outputs, -1)
            tensors[path] = (a, b)
        return tensors

    def _find(self, index: int) -> tuple[_Group, int]:
        group = next(g for g in self._groups if g.start <= index < g.start + len(g.arms))
        return group, index - group.start

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the model answers with the bank's adapters."""
        handles = [
            module.register_forward_hook(lambda _, args, output, path=path: output + self._update(path, args[0]))
            for path, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _update(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """x (rows, tokens, in) -> the adapters' part of the layer's output (rows, tokens, out)."""
        each = x.shape[0] // len(self.arms)
        parts = []
        for group in self._groups:
            mine = x[group.start * each : (group.start + len(group.arms)) * each]
            a, b = (factor.to(x.dtype) for factor in group.factors[path])
            x_kmi = mine.reshape(len(group.arms), -1, mine.shape[-1])
            product = _row if self.layers[path].parallelism == "row" else _column
            parts.append(product(x_kmi, a, b).view(*mine.shape[:-1], -1))
        return SCALE * (parts[0] if len(parts) == 1 else torch.cat(parts))

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """One step of AdamW (no decay) for every adapter by itself, its gradient clipped to norm 1, at `factor` times its rate."""
        self._steps += 1
        for group in self._groups:
            norm = group.gradient.norm(dim=1, keepdim=True)
            group.gradient.mul_((1 / (norm + 1e-6)).clamp(max=1))
            group.first.lerp_(group.gradient, 0.1)
            group.second.mul_(0.999).addcmul_(group.gradient, group.gradient, value=0.001)
            rate = torch.tensor([[arm.lr * factor] for arm in group.arms], device=self._device)
            change = group.second.sqrt().mul_((1 - 0.999**self._steps) ** -0.5).add_(1e-8)
            torch.div(group.first, change, out=change)
            group.flat.sub_(change.mul_(rate / (1 - 0.9**self._steps)))
            group.gradient.zero_()


def _column(x_kmi: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A dense, B block-diagonal: block n of the outputs comes from its own share of h."""
    k, m, _ = x_kmi.shape
    _, n, share, _ = a.shape
    h = torch.bmm(x_kmi, a.flatten(1, 2).mT)
    h = h.view(k, m, n, share).transpose(1, 2).reshape(k * n, m, share)
    y = torch.bmm(h, b.flatten(0, 1).mT)
    return y.view(k, n, m, -1).transpose(1, 2).reshape(k, m, -1)


def _row(x_kmi: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A block-diagonal, B dense: share n of h comes from its own block of the inputs."""
    k, m, _ = x_kmi.shape
    _, n, share, _ = a.shape
    x = x_kmi.view(k, m, n, -1).transpose(1, 2).reshape(k * n, m, -1)
    h = torch.bmm(x, a.flatten(0, 1).mT)
    h = h.view(k, n, m, share).transpose(1, 2).reshape(k, m, n * share)
    return torch.bmm(h, b.flatten(2, 3).mT)


def _shapes(layer: BaseLayer, n: int, share: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if layer.parallelism == "row":
        return (n, share, layer.inputs // n), (layer.outputs, n, share)
    return (n, share, layer.inputs), (n, layer.outputs // n, share)


def _fresh(layer: BaseLayer, arm: Arm, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT 0.21's start: B zero, A uniform within 1 / sqrt(in); its block-diagonal A within sqrt(6 N / in), unless init is "lora"."""
    row, n = layer.parallelism == "row", arm.nblocks
    inputs = layer.inputs // n if row else layer.inputs
    bound = math.sqrt((6 if row and n > 1 and arm.init == "peft" else 1) / inputs)
    if row and arm.init == "lora":
        bound = math.sqrt(1 / layer.inputs)
    a = (torch.rand(arm.rank, inputs, generator=random) * 2 - 1) * bound
    return a, torch.zeros(layer.outputs, arm.rank if row else arm.rank // n)
