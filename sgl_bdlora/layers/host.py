"""Read a served model's layers as HostLayers: spans come from the layers' own shard sizes, never from module names."""

import re
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
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from sgl_bdlora.sharding import HostLayer, HostSlice, Span
from sgl_bdlora.sharding.host import Parallelism

# Adapter modules inside SGLang's fused layers, in the order of the fused output (each model's stacked_params_mapping).
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


# What a multimodal model reads pictures and sound with.
_TOWER = re.compile(r"(^|\.)(vision|visual|audio)")


def _of_decoder(model: torch.nn.Module, path: str) -> bool:
    """Whether a linear layer is the decoder's, whose rows are the batch's tokens. SGLang's multimodal models say so of their own layers."""
    applies = getattr(model, "should_apply_lora", None)
    return not _TOWER.search(path) and (applies is None or applies(path))


def host_layers(
    model: torch.nn.Module, target_modules: Collection[str] | None
) -> Iterator[tuple[HostLayer, LinearBase]]:
    """Every decoder linear layer that adapters may target, with its module.

    target_modules: leaf names, an adapter's ("q_proj") or the served model's ("qkv_proj"); None for all.
    """
    for path, module in model.named_modules():
        if not isinstance(module, LinearBase) or get_layer_id(path) is None or not _of_decoder(model, path):
            continue
        leaf = path.rpartition(".")[2]
        names = FUSED.get(leaf, (leaf,))
        if target_modules is not None and not {leaf, *names} & set(target_modules):
            continue
        layer = _describe(path, names, module)
        if layer is not None:
            yield layer, module


def vocabulary_layers(
    model: torch.nn.Module, tied: bool, target_modules: Collection[str] | None
) -> Iterator[tuple[HostLayer, torch.nn.Module]]:
    """The input embedding and lm_head, with the modules that hold them.

    tied: the model is configured to use one weight for both. Many of SGLang's models then have no lm_head of their own (llama.py,
    gemma2.py), and the embedding is described twice, the second time as "lm_head". target_modules: as for host_layers.
    """
    embeddings, heads = {}, {}
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if _TOWER.search(path):
            continue
        if isinstance(module, ParallelLMHead):
            heads[path] = module
        elif isinstance(module, VocabParallelEmbedding) or (
            isinstance(module, torch.nn.Embedding) and leaf == "embed_tokens"
        ):
            embeddings[path] = module
    shared = [module for path, module in embeddings.items() if path.rpartition(".")[2] == "embed_tokens"]
    if tied and not heads and len(shared) == 1:
        heads["lm_head"] = shared[0]
    for modules, parallelism in ((embeddings, "embedding"), (heads, "head")):
        for path, module in modules.items():
            if target_modules is None or path.rpartition(".")[2] in target_modules:
                layer = _vocabulary_layer(path, parallelism, module)
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


def _vocabulary_layer(path: str, parallelism: Parallelism, module: torch.nn.Module) -> HostLayer | None:
    rows = _vocabulary(module)
    if rows is None:
        return None
    width = Span.whole(module.embedding_dim)
    inputs, outputs = (rows, width) if parallelism == "embedding" else (width, rows)
    piece = HostSlice(path.rpartition(".")[2], inputs, outputs, 0)
    return HostLayer(path, parallelism, (piece,), weight=_plain_weight(module, rows, width))


def _vocabulary(module: torch.nn.Module) -> Span | None:
    """The token ids whose rows this rank holds; None if padding has left it none."""
    if not isinstance(module, VocabParallelEmbedding):
        return Span.whole(module.num_embeddings)
    part = module.shard_indices
    if module.num_added_embeddings or part.num_org_elements == 0:
        return None
    return Span(part.org_vocab_start_index, part.org_vocab_end_index, module.org_vocab_size)


def _plain_weight(module: torch.nn.Module, rows: Span, width: Span) -> torch.Tensor | None:
    """This rank's rows (len(rows), len(width)) without padding; None where the weight is quantised or packed."""
    weight = getattr(module, "weight", None)
    packed = getattr(module, "use_intel_amx_backend", False)
    if weight is None or packed or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return weight.data[: len(rows)] if weight.dim() == 2 and weight.shape[1] == len(width) else None
