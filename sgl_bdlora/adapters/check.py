"""Checks that need an adapter's values, or the base model's sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_bdlora.adapters.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from sgl_bdlora.adapters.format import Adapter, LoRAModule, StoredTensor

# Rows of an embedding that are compared at a time: 64 MiB of 8,192 16-bit numbers each.
_ROWS = 4096


def check_rank(adapter: Adapter, limit: int) -> None:
    """Raise AdapterError if a module's rank is above `limit`, the server's --max-lora-rank."""
    if adapter.rank > limit:
        raise AdapterError(
            adapter.name, f"r = {adapter.rank} is above the server's limit of {limit}", "raise --max-lora-rank"
        )


def check_finite(adapter: str, key: str, values: torch.Tensor) -> None:
    """Raise AdapterError if `values`, read from the tensor named `key`, hold NaN or infinity. adapter: its name."""
    if not values.numel():
        return
    # NaN comes through both. One pass without temporaries: 11 GB/s of bfloat16 on a CPU core, where isfinite().all() has 0.5.
    smallest, largest = values.aminmax()
    if not (bool(smallest.isfinite()) and bool(largest.isfinite())):
        raise AdapterError(
            adapter,
            f"tensor {key!r} holds NaN or infinite values",
            "train or convert the adapter again; float16 overflows above 65504, bfloat16 does not",
        )


def check_features(adapter: str, module: LoRAModule, in_features: int, out_features: int) -> None:
    """Raise AdapterError unless the module's (unpacked) sizes are those of the base model's layer.

    adapter: its name. in_features, out_features: of the whole layer, before tensor parallelism. Only here can a lora_A
    saved dense under a block-diagonal configuration, or packed under a plain one, be told from a larger model's.
    """
    if (module.in_features, module.out_features) == (in_features, out_features):
        return
    a = module.a
    if a.blocks > 1 and a.tensor.shape[1] == in_features:
        raise AdapterError(
            adapter,
            f"tensor {a.tensor.key!r} has the dense shape {a.tensor.shape}, but use_bdlora makes it block-diagonal "
            f"with nblocks = {a.blocks}, packed as {(module.rank, in_features // a.blocks)}",
            "save the packed blocks, or leave the module out of use_bdlora.target_modules_bd_a",
        )
    if a.blocks == 1 and in_features > a.tensor.shape[1] and in_features % a.tensor.shape[1] == 0:
        raise AdapterError(
            adapter,
            f"tensor {a.tensor.key!r} has shape {a.tensor.shape} on a layer with {in_features} inputs, as if packed in "
            f"{in_features // a.tensor.shape[1]} diagonal blocks, but use_bdlora does not make it block-diagonal",
            "set use_bdlora as in training, or save the dense factor; otherwise serve the base model it was trained on",
        )
    raise AdapterError(
        adapter,
        f"module {module.path!r} has {module.in_features} inputs and {module.out_features} outputs, but the base "
        f"model's layer has {in_features} and {out_features}",
        "serve the base model the adapter was trained on",
    )


def check_base_weight(adapter: str, stored: StoredTensor, first: int, weight: torch.Tensor | None) -> None:
    """Raise AdapterError unless `stored`, an embedding's own weight that PEFT saved beside its factors, is the served model's.

    weight: the served rows (n, width), beginning at row `first` of the whole; None if they cannot be compared. The stored numbers
    are converted to its type first, as the model's were when it was loaded.
    """
    if weight is None:
        raise AdapterError(
            adapter,
            f"tensor {stored.key!r} is a copy of a base model's weight, which cannot be compared with the served, quantised or packed one",
            "if the vocabulary's weights were not changed, save the adapter again with save_embedding_layers=False",
        )
    for start in range(0, len(weight), _ROWS):
        served = weight[start : start + _ROWS]
        copy = stored[first + start : first + start + len(served), :]
        if not bool((copy.to(served) == served).all()):
            raise AdapterError(
                adapter,
                f"tensor {stored.key!r}, the base model's weight as it was in training, differs from the served model's",
                "serve the base model that the adapter was trained on (for a changed vocabulary: merge the adapter into that model)",
            )
