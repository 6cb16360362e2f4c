"""The tensors of an adapter directory, opened but not read. Only safetensors files: nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sgl_bdlora.adapters.errors import AdapterError, show
from sgl_bdlora.adapters.format import StoredTensor
from sgl_bdlora.adapters.tensor_file import DTYPES, DamagedFileError, OpenFile, open_tensors

WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_NAME = 512
_MAX_JSON = {"adapter_config.json": 2**20, INDEX: 2**24}


def tensors_in_directory(adapter: str, directory: Path) -> dict[str, StoredTensor]:
    """The tensors of adapter_model.safetensors, or of the files its index lists. Raises AdapterError."""
    if os.path.isfile(directory / WEIGHTS):
        return _tensors_in_file(adapter, directory / WEIGHTS)
    if os.path.isfile(directory / INDEX):
        return _tensors_in_shards(adapter, directory)
    pickled = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    if pickled:
        raise AdapterError(
            adapter,
            f"{directory} has its weights in {pickled[0]}, a pickle that could run code when it is loaded, and no "
            f"{WEIGHTS}",
            f"re-save it as safetensors: safetensors.torch.save_file(torch.load({pickled[0]!r}, weights_only=True), "
            f"{WEIGHTS!r})",
        )
    raise AdapterError(adapter, f"{directory} has no {WEIGHTS}", "give the directory that PEFT's save_pretrained wrote")


def tensors_in_memory(adapter: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """The same for tensors that are already loaded."""
    stored = {}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise AdapterError(
                adapter, f"tensors[{show(key)}] is {show(tensor)}, not a tensor", "give a dict from names to tensors"
            )
        dtype = tensor.dtype if tensor.dtype in DTYPES.values() else str(tensor.dtype)
        stored[key] = _stored(adapter, key, tuple(tensor.shape), dtype, tensor.detach())
    return stored


def load_json(adapter: str, file: Path) -> Any:
    """The JSON value in the file, whose size is bounded. Raises AdapterError."""
    return open_json(adapter, file)[0]


def open_json(adapter: str, file: Path) -> tuple[Any, OpenFile]:
    """The same, and the file."""
    limit = _MAX_JSON[file.name]
    try:
        opened = OpenFile(file)
        data = opened.read(0, min(opened.size, limit + 1))
    except OSError as error:
        raise AdapterError(
            adapter, f"{file} cannot be read ({error.strerror})", "give the directory that PEFT's save_pretrained wrote"
        ) from error
    if len(data) > limit:
        raise AdapterError(
            adapter, f"{file} is larger than {limit} bytes", f"check that {file.name} is what PEFT wrote"
        )
    try:
        return json.loads(data), opened
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            adapter, f"{file} is not valid JSON ({error})", f"write {file.name} again with PEFT's save_pretrained"
        ) from error


def _tensors_in_file(adapter: str, file: Path) -> dict[str, StoredTensor]:
    try:
        opened = open_tensors(file)
    except (DamagedFileError, OSError) as error:
        raise AdapterError(
            adapter,
            f"{file} is not a complete safetensors file ({error})",
            "copy or download it again, or save the adapter again",
        ) from error
    return {key: _stored(adapter, key, part.shape, part.dtype, part) for key, part in opened.items()}


def _tensors_in_shards(adapter: str, directory: Path) -> dict[str, StoredTensor]:
    index = load_json(adapter, directory / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise AdapterError(
            adapter,
            f"{INDEX} has no weight_map object from tensor names to file names",
            f"save the adapter again as one {WEIGHTS}",
        )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        # A bare name: the index must not reach outside the adapter's directory.
        if Path(file).name != file or not file.endswith(".safetensors") or not os.path.isfile(directory / file):
            raise AdapterError(
                adapter,
                f"{INDEX} lists {show(file)}, which is no safetensors file in {directory}",
                "copy all files of the adapter into its directory",
            )
        found = _tensors_in_file(adapter, directory / file)
        listed = {key for key, value in files.items() if value == file}
        if set(found) != listed:
            key = min(set(found) ^ listed)
            where = f"lists {show(key)} in {file}, which lacks it" if key in listed else f"lacks {show(key)} of {file}"
            raise AdapterError(adapter, f"{INDEX} {where}", f"save the adapter again as one {WEIGHTS}")
        tensors |= found
    return tensors


def _stored(adapter: str, key: str, shape: tuple[int, ...], dtype: torch.dtype | str, source: Any) -> StoredTensor:
    if len(key) > _MAX_NAME:
        raise AdapterError(adapter, f"tensor {show(key)} has a name of {len(key)} characters", "save the adapter again")
    if isinstance(dtype, str):
        raise AdapterError(
            adapter,
            f"tensor {key!r} has dtype {dtype}, not float16, bfloat16 or float32",
            "convert it to bfloat16 and save the adapter again",
        )
    return StoredTensor(key, shape, dtype, source)
