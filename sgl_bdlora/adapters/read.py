"""Read an adapter: from a directory in PEFT's format, or from tensors and a configuration in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_bdlora.adapters.config import AdapterConfig
from sgl_bdlora.adapters.errors import AdapterError
from sgl_bdlora.adapters.format import Adapter
from sgl_bdlora.adapters.modules import lora_modules
from sgl_bdlora.adapters.runaway import runaway_limit
from sgl_bdlora.adapters.weights import open_json, tensors_in_directory, tensors_in_memory

if TYPE_CHECKING:
    import torch

_CONFIG = "adapter_config.json"


def read_adapter(path: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """Open the adapter in a directory and check everything that needs neither its values nor the base model.

    path: holds adapter_config.json and adapter_model.safetensors (or an index and its shards). name: for messages and
    requests; the directory's name if not given. The tensors stay in the open file. Raises AdapterError.
    """
    directory = Path(path)
    adapter = name or directory.absolute().name
    # os.path, not Path: a path that cannot be looked up (too long, no permission) counts as missing and is no OSError.
    if not os.path.isdir(directory):
        problem = "is a file, not a directory" if os.path.exists(directory) else "does not exist"
        raise AdapterError(
            adapter, f"{directory} {problem}", f"give a local directory with {_CONFIG} and adapter_model.safetensors"
        )
    if not os.path.isfile(directory / _CONFIG):
        raise AdapterError(
            adapter, f"{directory} has no {_CONFIG}", "give the directory that PEFT's save_pretrained wrote"
        )
    raw, config_file = open_json(adapter, directory / _CONFIG)
    tensors = tensors_in_directory(adapter, directory)
    files = (config_file, *{tensor.source.file for tensor in tensors.values()})
    with runaway_limit(adapter):
        config = AdapterConfig.from_dict(adapter, raw)
        return Adapter(adapter, str(directory), config, lora_modules(adapter, config, tensors), files)


def adapter_from_tensors(name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Adapter:
    """The same for tensors in memory. config: the content of adapter_config.json. The tensors are not copied."""
    with runaway_limit(name):
        parsed = AdapterConfig.from_dict(name, config)
        return Adapter(name, "<tensors>", parsed, lora_modules(name, parsed, tensors_in_memory(name, tensors)))
