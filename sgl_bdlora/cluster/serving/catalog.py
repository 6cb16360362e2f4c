"""The adapters of a directory, as the policy sees them, and as one safetensors body that goes from machine to machine."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sgl_bdlora.cluster.base import Adapter, PlacementError
from sgl_bdlora.cluster.config import ClusterConfig, ConfigError

if TYPE_CHECKING:
    from sgl_bdlora.adapters import Adapter as StoredAdapter

CONFIG = "adapter_config.json"
# The key of a body's metadata that holds adapter_config.json.
CONFIG_KEY = "adapter_config"
# No slash and no colon: names become parts of URLs and of OpenAI's `model`.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Entry:
    """adapter: what the policy plans with. folder: where it is on disk. limit: the largest rank of any module."""

    adapter: Adapter
    folder: str
    limit: int


def read_catalog(root: str) -> dict[str, Entry]:
    """Every directory below root that has an adapter_config.json, by name. Raises ConfigError for one that cannot be served."""
    from sgl_bdlora.adapters import AdapterError, read_adapter
    from sgl_bdlora.adapters.root import confined

    if not os.path.isdir(root):
        raise ConfigError(
            f"serve.adapter_root = {root!r} is no directory; name the one whose subdirectories are adapters"
        )
    found = {}
    for folder in sorted(Path(root).iterdir()):
        if not (folder / CONFIG).is_file():
            continue
        if not NAME.fullmatch(folder.name):
            raise ConfigError(
                f"serve.adapter_root: {folder.name!r} cannot be an adapter's name; use letters, digits, '.', '_' and '-', at most 128"
            )
        try:
            stored = read_adapter(confined(folder.name, folder.name, root), folder.name)
        except AdapterError as refusal:
            raise ConfigError(f"serve.adapter_root: {refusal}") from None
        found[folder.name] = Entry(describe(stored), str(folder), stored.rank)
    if not found:
        raise ConfigError(f"serve.adapter_root = {root!r} has no subdirectory with an {CONFIG}; put adapters there")
    return found


def describe(stored: StoredAdapter) -> Adapter:
    """Rank of the plain adapter on the same modules with as many parameters, and bytes as stored."""
    parameters = size = width = 0
    for module in stored.modules.values():
        for tensor in (module.a.tensor, module.b.tensor):
            numel = tensor.shape[0] * tensor.shape[1]
            parameters += numel
            size += numel * tensor.dtype.itemsize
        width += module.in_features + module.out_features
    return Adapter(stored.name, max(1, math.ceil(parameters / width)), size)


def check_limits(catalog: dict[str, Entry], config: ClusterConfig) -> None:
    """Raises PlacementError for an adapter whose rank is above replicas.max_rank; sizes are the plan's business."""
    for name, entry in catalog.items():
        if entry.limit > config.replicas.max_rank:
            raise PlacementError(
                f"adapter {name!r} has rank {entry.limit} and fits no replica: replicas.max_rank = {config.replicas.max_rank}; raise it "
                "or take the adapter out of serve.adapter_root"
            )


def read_body(name: str, root: str) -> np.ndarray:
    """An adapter of the root as one safetensors body (1-D, uint8), its configuration in the metadata. Raises AdapterError and OSError."""
    from sgl_bdlora.adapters.root import confined
    from sgl_bdlora.adapters.tensor_file import DTYPES
    from sgl_bdlora.adapters.weights import load_json, tensors_in_directory

    words = {dtype: word for word, dtype in DTYPES.items()}
    folder = confined(name, name, root)
    header: dict = {"__metadata__": {CONFIG_KEY: json.dumps(load_json(name, folder / CONFIG))}}
    tensors, end = tensors_in_directory(name, folder), 0
    for key, stored in tensors.items():
        start, end = end, end + math.prod(stored.shape) * stored.dtype.itemsize
        header[key] = {"dtype": words[stored.dtype], "shape": stored.shape, "data_offsets": (start, end)}
    first = json.dumps(header).encode()
    first += b" " * (-len(first) % 8)
    body = np.empty(8 + len(first) + end, np.uint8)
    view = memoryview(body)
    view[: 8 + len(first)] = len(first).to_bytes(8, "little") + first
    for key, stored in tensors.items():
        start, stop = (8 + len(first) + offset for offset in header[key]["data_offsets"])
        stored.source.file.read_into(view[start:stop], stored.source.offset)
    for file in {stored.source.file for stored in tensors.values()}:
        file.check_unchanged()
    return body


def write_body(body: np.ndarray, folder: Path) -> None:
    """The adapter's directory again, from a body; only this user can read the files. ValueError for what has no configuration, OSError.

    Tensors are checked by who reads the directory.
    """
    from sgl_bdlora.adapters.tensor_file import MAX_HEADER
    from sgl_bdlora.adapters.weights import WEIGHTS

    data = memoryview(body)
    length = int.from_bytes(data[:8], "little")
    try:
        if not 0 < length <= min(MAX_HEADER, len(data) - 8):
            raise ValueError("its header is longer than it")
        config = json.loads(json.loads(bytes(data[8 : 8 + length]))["__metadata__"][CONFIG_KEY])
        if not isinstance(config, dict):
            raise ValueError("its configuration is no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a safetensors body with an {CONFIG_KEY}: {error}") from None
    for name, content in ((CONFIG, json.dumps(config).encode()), (WEIGHTS, data)):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            done = 0
            while done < len(content):
                done += file.write(content[done:])
