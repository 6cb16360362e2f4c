"""The linear layers of one tensor-parallel rank, and adapters for them, without a model or a file."""

from collections.abc import Iterable

import torch

from benchmarks.files import MODELS, PRODUCTS
from sgl_bdlora.kernels.rows import TOGETHER, padded
from sgl_bdlora.sharding import AdapterShard, HostLayer, HostSlice, LayerLayout, PieceLayout, SliceLayout, Span

ROW_PARALLEL = ("o_proj", "down_proj")


def hosts(model: str, tp: int, layers: int) -> list[HostLayer]:
    """The first `layers` decoder layers' linear layers, in the order of the forward pass."""
    shape = MODELS[model].share(tp)
    made = []
    for i in range(layers):
        for leaf, modules in PRODUCTS.items():
            sizes = [shape.linear(module) for module in modules]
            inputs, outputs = sizes[0][0], [size for _, size in sizes]
            slices = [
                HostSlice(f"{leaf}.{s}", Span.whole(inputs), Span.whole(size), sum(outputs[:s]))
                for s, size in enumerate(outputs)
            ]
            made.append(HostLayer(f"layers.{i}.{leaf}", "column", tuple(slices)))
    return made


def rank_rows(ranks: Iterable[int]) -> int:
    """Of a layer, where a batch has adapters of these local ranks."""
    return sum(padded(rank, TOGETHER) for rank in ranks)


def shard(
    name: str, layers: list[HostLayer], rank: int, blocks: int = 1, dtype: torch.dtype = torch.bfloat16
) -> AdapterShard:
    """A random adapter on all layers with local rank `rank`, in `blocks` diagonal blocks on each layer's split side; scales 1, 2, 3."""
    layouts, offsets, total = {}, {}, 0
    whole = Span.whole(rank)
    for host in layers:
        inputs, row = host.slices[0].inputs, host.path.endswith(ROW_PARALLEL)
        blocks_a, blocks_b = (blocks, 1) if row else (1, blocks)
        offset, made = rank * len(host.slices) * len(inputs) // blocks_a, []
        for i, s in enumerate(host.slices):
            piece = PieceLayout("none", whole, whole, inputs, s.outputs, blocks_a, blocks_b)
            made.append(SliceLayout(s.name, piece, 1.0 + i, i * rank, offset, s.y_start))
            offset += rank * len(s.outputs) // blocks_b
        layouts[host.path] = LayerLayout(tuple(made), rank * len(host.slices), len(inputs) // blocks_a, offset)
        offsets[host.path] = total
        total += offset
    weights = torch.randn(total, generator=torch.Generator().manual_seed(rank)) * 0.02
    return AdapterShard(name, "plain", rank, 1, layouts, offsets, weights.to(dtype))
