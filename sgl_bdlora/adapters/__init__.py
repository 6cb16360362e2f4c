"""PEFT LoRA adapters on disk: read, check, structure. Nothing here imports torch until an adapter is read."""

from __future__ import annotations

import importlib
from typing import Any

from sgl_bdlora.adapters.config import AdapterConfig, BlockDiagonalConfig
from sgl_bdlora.adapters.errors import AdapterError, ModelError
from sgl_bdlora.adapters.format import Adapter, Factor, LoRAModule, StoredTensor

_LAZY = {
    "adapter_from_tensors": "read",
    "check_features": "check",
    "check_finite": "check",
    "dense_form": "dense",
    "read_adapter": "read",
}

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "BlockDiagonalConfig",
    "Factor",
    "LoRAModule",
    "ModelError",
    "StoredTensor",
    "adapter_from_tensors",
    "check_features",
    "check_finite",
    "dense_form",
    "read_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
