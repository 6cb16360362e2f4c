"""From tensors and configuration to modules: names, pairs, structure and shapes, all without a base model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sgl_bdlora.adapters.config import AdapterConfig
from sgl_bdlora.adapters.errors import AdapterError, show
from sgl_bdlora.adapters.format import Factor, LoRAModule, StoredTensor

_PREFIX = "base_model.model."
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BASE = "base_layer.weight"
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+?)\.({'|'.join(map(re.escape, (*_LINEAR, *_EMBEDDING, _BASE)))})")

# What a tensor with an unexpected name tells about the adapter: expression, explanation, fix.
_HINTS = (
    (r"lora_magnitude_vector", "it belongs to DoRA", "merge the adapter, or train it with use_dora = false"),
    (r"lora_B\.bias$", "it is a bias of lora_B", "train with lora_bias = false"),
    (r"modules_to_save|original_module", "it replaces a module of the base model", "train without modules_to_save"),
    (r"token_adapter|trainable_tokens", "it replaces rows of the embedding", "train without trainable_token_indices"),
    (
        r"(embed_tokens|lm_head)\.weight$",
        "it replaces the vocabulary of the base model",
        "merge the adapter into the resized model; if the vocabulary was not resized, save again with "
        "save_embedding_layers=False",
    ),
    (r"^(?!base_model\.model\.).*lora_", f"it does not start with {_PREFIX!r}", f"rename it with {_PREFIX!r} in front"),
    (
        r"lora_(A|B|embedding_A|embedding_B)\.[^.]+(\.weight)?$",
        "it carries the name of an adapter",
        "save it with PeftModel.save_pretrained, which removes that name",
    ),
)


def lora_modules(adapter: str, config: AdapterConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, LoRAModule]:
    """The modules of an adapter by path, sorted. Raises AdapterError for anything that is not exactly understood."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for key in sorted(tensors):
        match = _KEY.fullmatch(key)
        if match is None:
            raise _unknown(adapter, key)
        _check_two_dimensions(adapter, tensors[key])
        found.setdefault(match[1], {})[match[2]] = tensors[key]
    if not found:
        raise AdapterError(
            adapter, "its weights file holds no tensors: the adapter targets nothing", "save the trained adapter again"
        )
    if not any(config.selects(path, embedding=_is_embedding(path, parts)) for path, parts in found.items()):
        raise AdapterError(
            adapter,
            f"target_modules = {show(config.target_modules)} matches none of the {len(found)} modules that have "
            f"tensors (for example {show(next(iter(found)))}): the adapter targets nothing",
            "set target_modules (and exclude_modules, layers_to_transform) as in training",
        )
    return {path: _module(adapter, config, path, parts) for path, parts in found.items()}


def _check_two_dimensions(adapter: str, tensor: StoredTensor) -> None:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise AdapterError(
            adapter,
            f"tensor {tensor.key!r} has shape {tensor.shape}, not two non-zero dimensions",
            "adapt linear layers only; if it was trained with ZeRO-3 or FSDP, gather the parameters before saving",
        )


def _module(adapter: str, config: AdapterConfig, path: str, parts: dict[str, StoredTensor]) -> LoRAModule:
    lookup = _is_lookup(parts)
    embedding = _is_embedding(path, parts)
    a, b = _pair(adapter, path, parts, _EMBEDDING if lookup else _LINEAR)
    _check_selected(adapter, config, path, a.key, embedding)
    if lookup and config.use_bdlora is not None:
        raise AdapterError(
            adapter,
            f"tensor {a.key!r} adapts an embedding, but use_bdlora is set, which PEFT does not support on embeddings",
            "train the embedding in a plain LoRA adapter, or leave it out of target_modules",
        )
    side = config.block_side(adapter, path)
    if embedding and side:
        raise AdapterError(
            adapter,
            f"use_bdlora.target_modules_bd_{side} makes {path!r} block-diagonal, which is not supported on lm_head",
            f"leave {path!r} out of target_modules, or out of the use_bdlora lists with match_strict = false",
        )
    rank = _check_shapes(adapter, config, path, a, b, side)
    blocks = config.use_bdlora.nblocks if config.use_bdlora and side else 1
    module = LoRAModule(
        path=path,
        a=Factor(a, blocks if side == "a" else 1),
        b=Factor(b, blocks if side == "b" else 1),
        rank=rank,
        scale=config.scale_of(path),
        embedding=embedding,
        base_weight=parts.get(_BASE),
    )
    _check_base_weight(adapter, config, module, lookup)
    return module


def _is_lookup(parts: Mapping[str, StoredTensor]) -> bool:
    return not parts.keys().isdisjoint(_EMBEDDING)


def _is_embedding(path: str, parts: Mapping[str, StoredTensor]) -> bool:
    return _is_lookup(parts) or path.rpartition(".")[2] == "lm_head"


def _pair(
    adapter: str, path: str, parts: dict[str, StoredTensor], names: tuple[str, str]
) -> tuple[StoredTensor, StoredTensor]:
    extra = parts.keys() - {*names, _BASE}
    if extra:
        raise AdapterError(
            adapter,
            f"module {path!r} has tensors of a linear layer and of an embedding ({show(sorted(parts))})",
            "save the adapter again",
        )
    for name in names:
        if name not in parts:
            raise AdapterError(
                adapter,
                f"tensor {f'{_PREFIX}{path}.{name}'!r} is missing: module {path!r} only has {show(sorted(parts))}",
                "save the adapter again, with both factors of each module",
            )
    return parts[names[0]], parts[names[1]]


def _check_selected(adapter: str, config: AdapterConfig, path: str, key: str, embedding: bool) -> None:
    if "experts" in path.split("."):
        raise AdapterError(
            adapter,
            f"tensor {key!r} adapts experts of a mixture-of-experts layer, which are not supported",
            "train with target_modules that leave the experts out",
        )
    if not config.selects(path, embedding=embedding):
        raise AdapterError(
            adapter,
            f"tensor {key!r} is in the file, but target_modules = {show(config.target_modules)}, exclude_modules = "
            f"{show(config.exclude_modules)}, layers_to_transform = {show(config.layers_to_transform)} do not select "
            f"module {path!r}, so PEFT would ignore it",
            "make these fields select every trained module, or remove the tensors",
        )


def _check_shapes(
    adapter: str, config: AdapterConfig, path: str, a: StoredTensor, b: StoredTensor, side: str | None
) -> int:
    """The module's rank, once both shapes agree with it and with the block structure."""
    rank, field = config.rank_of(path)
    blocks = config.use_bdlora.nblocks if config.use_bdlora and side else 1
    if rank % blocks:
        raise AdapterError(
            adapter,
            f"{field} = {rank} of module {path!r} is not divisible by use_bdlora.nblocks = {blocks}",
            f"set {field} and nblocks as in training",
        )
    if a.shape[0] != rank:
        raise AdapterError(
            adapter,
            f"tensor {a.key!r} has shape {a.shape}, rank {a.shape[0]}, but {field} = {rank}",
            f"set {field} to the rank the adapter was trained with",
        )
    width = rank // blocks if side == "b" else rank
    if b.shape[1] == width:
        if side == "b" and b.shape[0] % blocks:
            raise AdapterError(
                adapter,
                f"tensor {b.key!r} has shape {b.shape}, whose {b.shape[0]} rows are not divisible by "
                f"use_bdlora.nblocks = {blocks}",
                "set nblocks as in training",
            )
        return rank
    if side == "b" and b.shape[1] == rank:
        raise AdapterError(
            adapter,
            f"tensor {b.key!r} has the dense shape {b.shape}, but use_bdlora makes it block-diagonal with nblocks = "
            f"{blocks}, packed as {(b.shape[0], width)}",
            "save the packed blocks, or leave the module out of use_bdlora.target_modules_bd_b",
        )
    if blocks == 1 and b.shape[1] < rank and rank % b.shape[1] == 0:
        raise AdapterError(
            adapter,
            f"tensor {b.key!r} has shape {b.shape}, as if packed in {rank // b.shape[1]} diagonal blocks of {field} = "
            f"{rank}, but use_bdlora does not make it block-diagonal",
            "set use_bdlora as in training, or save the dense factor",
        )
    raise AdapterError(
        adapter,
        f"tensor {b.key!r} has shape {b.shape}, but {field} = {rank}"
        + (f" and use_bdlora.nblocks = {blocks}" if side == "b" else "")
        + f" need {width} columns",
        f"set {field}{' and nblocks' if side == 'b' else ''} as in training",
    )


def _check_base_weight(adapter: str, config: AdapterConfig, module: LoRAModule, lookup: bool) -> None:
    base = module.base_weight
    if base is not None and not module.embedding:
        raise _unknown(adapter, base.key)
    if base is not None:
        want = (module.in_features, module.out_features) if lookup else (module.out_features, module.in_features)
        if base.shape != want:
            raise AdapterError(
                adapter,
                f"tensor {base.key!r} has shape {base.shape}, but the factors are of a layer of shape {want}",
                "save the adapter again",
            )
    if module.embedding and config.ensure_weight_tying:
        raise AdapterError(
            adapter,
            f"ensure_weight_tying = True ties the adapted {module.path!r} to another layer, which is not supported",
            "train with ensure_weight_tying = false",
        )


def _unknown(adapter: str, key: str) -> AdapterError:
    for expression, explanation, fix in _HINTS:
        if re.search(expression, key):
            return AdapterError(adapter, f"tensor {show(key)} is not supported: {explanation}", fix)
    return AdapterError(
        adapter,
        f"tensor {show(key)} is not one of lora_A.weight, lora_B.weight, lora_embedding_A, lora_embedding_B",
        "train and save the adapter as plain or block-diagonal LoRA",
    )
