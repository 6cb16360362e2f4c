"""Read a served model's linear layers as HostLayers: spans come from the layers' own shard sizes, never from module names."""

from collections.abc import Collection, Iterator

import torch
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.utils import get_layer_id

from sgl_bdlora.sharding import HostLayer, HostSlice, Span

# Adapter modules inside SGLang's fused layers, in the order of the fused output (each model's stacked_params_mapping).
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def host_layers(
    model: torch.nn.Module, target_modules: Collection[str] | None
) -> Iterator[tuple[HostLayer, LinearBase]]:
    """Every decoder linear layer that adapters may target, with its module.

    target_modules: leaf names, an adapter's ("q_proj") or the served model's ("qkv_proj"); None for all.
    """
    for path, module in model.named_modules():
        if not isinstance(module, LinearBase) or get_layer_id(path) is None:
            continue
        leaf = path.rpartition(".")[2]
        names = FUSED.get(leaf, (leaf,))
        if target_modules is not None and not {leaf, *names} & set(target_modules):
            continue
        layer = _describe(path, names, module)
        if layer is not None:
            yield layer, module


def _describe(path: str, names: tuple[str, ...], module: LinearBase) -> HostLayer | None:
    if isinstance(module, QKVParallelLinear):
        return _qkv(path, names, module)
    if isinstance(module, MergedColumnParallelLinear):
        return _merged(path, names, module)
    if isinstance(module, ColumnParallelLinear):
        outputs = Span.shard(module.output_size_per_partition, module.tp_rank, module.output_size)
        return HostLayer(
            path,
            "column",
            (HostSlice(names[0], Span.whole(module.input_size), outputs, 0),),
            module.tp_rank,
            module.tp_size,
        )
    if isinstance(module, RowParallelLinear):
        inputs = Span.shard(module.input_size_per_partition, module.tp_rank, module.input_size)
        return HostLayer(
            path,
            "row",
            (HostSlice(names[0], inputs, Span.whole(module.output_size), 0),),
            module.tp_rank,
            module.tp_size,
        )
    if isinstance(module, ReplicatedLinear) and len(names) == 1:
        whole = HostSlice(names[0], Span.whole(module.input_size), Span.whole(module.output_size), 0)
        return HostLayer(path, "replicated", (whole,))
    return None


def _qkv(path: str, names: tuple[str, ...], module: QKVParallelLinear) -> HostLayer | None:
    """With more ranks than kv heads, `num_kv_head_replicas` neighbouring ranks hold the same kv head."""
    if len(names) != 3:
        return None
    replicas = module.num_kv_head_replicas
    kv_index = module.tp_rank // replicas
    inputs = Span.whole(module.input_size)
    sizes = [size // share for size, share in zip(module.output_sizes, (1, replicas, replicas), strict=True)]
    shards = (module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size)
    slices, y_start = [], 0
    for name, size, shard, index in zip(names, sizes, shards, (module.tp_rank, kv_index, kv_index), strict=True):
        slices.append(HostSlice(name, inputs, Span.shard(shard, index, size), y_start))
        y_start += shard
    return HostLayer(path, "column", tuple(slices), module.tp_rank, module.tp_size)


def _merged(path: str, names: tuple[str, ...], module: MergedColumnParallelLinear) -> HostLayer | None:
    if len(names) != len(module.output_sizes):
        return None
    inputs = Span.whole(module.input_size)
    slices, y_start = [], 0
    for name, size, shard in zip(names, module.output_sizes, module.output_partition_sizes, strict=True):
        slices.append(HostSlice(name, inputs, Span.shard(shard, module.tp_rank, size), y_start))
        y_start += shard
    return HostLayer(path, "column", tuple(slices), module.tp_rank, module.tp_size)
