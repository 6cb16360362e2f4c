"""Write an adapter as PEFT does, a tensor at a time, and put it in place only when it is whole."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sgl_bdlora.adapters.errors import AdapterError
from sgl_bdlora.adapters.hosts import leaf_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

# Fields that only say how training began. Loading the result must not run an initialisation for other shapes again.
_BEGINNING = {
    "init_lora_weights": True,
    "corda_config": None,
    "eva_config": None,
    "loftq_config": {},
    "lora_ga_config": None,
}


@dataclass(frozen=True)
class TensorSpec:
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file whose names, shapes and types are known before its values, which come in any order.

    Format: https://github.com/huggingface/safetensors#format. Tensors of larger types come first, so that all lie aligned.
    """

    def __init__(self, stream: BinaryIO, specs: Mapping[str, TensorSpec]):
        self._stream, self._specs, self._missing = stream, specs, set(specs)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key in sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key)):
            spec = specs[key]
            header[key] = {
                "dtype": _DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream.write(struct.pack("<Q", len(text)) + text)
        self._starts = {key: stream.tell() + header[key]["data_offsets"][0] for key in specs}
        stream.truncate(stream.tell() + offset)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Write one tensor, which has to be of the shape and type announced."""
        spec = self._specs[key]
        if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
            raise ValueError(f"{key}: {tuple(tensor.shape)} {tensor.dtype}, announced as {spec.shape} {spec.dtype}")
        self._stream.seek(self._starts[key])
        # A copy, because a transposed single column counts as contiguous, and yet cannot be viewed as bytes.
        plain = tensor.clone(memory_format=torch.contiguous_format)
        self._stream.write(plain.view(torch.uint8).numpy().data)
        self._missing.remove(key)

    def close(self) -> None:
        """Flush to the disk. Raises ValueError if a tensor was not written."""
        if self._missing:
            raise ValueError(f"not written: {sorted(self._missing)}")
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def put_in_place(name: str, target: Path, overwrite: bool) -> Iterator[Path]:
    """An empty directory beside `target`, renamed to it when the block ends well, removed when it does not.

    overwrite: an adapter at `target` is replaced whole, in the last step. Raises AdapterError, for the adapter `name`, if something
    else is there, or if the disk refuses.
    """
    target = target.absolute()
    check_target(name, target, overwrite)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise _not_written(name, target, error) from error
    try:
        yield partial
        # mkdtemp makes directories that only their owner can read.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        _swap(partial, target)
    except OSError as error:
        raise _not_written(name, target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(name: str, target: Path, overwrite: bool) -> None:
    """Raise AdapterError unless an adapter can be written to `target`, which holds nothing or, with `overwrite`, an adapter."""
    if not target.parent.is_dir():
        raise AdapterError(name, f"{target.parent}, where it should be written, is no directory", "create it first")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not (target / CONFIG).is_file():
        raise AdapterError(name, f"{target} exists and is no adapter directory", "write to another directory")
    if not overwrite:
        raise AdapterError(name, f"{target} exists", "write to another directory, or replace it with --overwrite")


def _swap(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_suffix(".old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _not_written(name: str, target: Path, error: OSError) -> AdapterError:
    return AdapterError(
        name, f"{target} cannot be written ({error.strerror or error})", "check the space and the permissions there"
    )


def new_config(
    raw: Mapping[str, Any],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    r: int,
    use_bdlora: dict[str, Any] | None,
) -> dict[str, Any]:
    """The source's adapter_config.json with other ranks and blocks, and every module's scale as it was.

    ranks, scales: by module path. r: the rank that most modules have. alpha / r (or alpha / sqrt(r)) stays what it was through alpha.
    """
    root = bool(raw.get("use_rslora"))
    alphas = {path: _tidy(scales[path] * (math.sqrt(rank) if root else rank)) for path, rank in ranks.items()}
    # Where none of the modules has the rank r (each has a pattern of its own), any alpha does.
    usual = Counter(alphas[path] for path, rank in ranks.items() if rank == r) or Counter(alphas.values())
    alpha = usual.most_common(1)[0][0]
    return {
        **raw,
        **_BEGINNING,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, r),
        "alpha_pattern": _patterns(alphas, alpha),
        "use_bdlora": use_bdlora,
    }


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """PEFT's patterns for the modules whose value is not the default: one for a leaf name where all its modules agree, else by path.

    No two of them match the same module, so that their order, which PEFT does not keep, means nothing.
    """
    by_leaf: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_leaf.setdefault(leaf_of(path), set()).add(value)
    patterns = {}
    for path, value in values.items():
        if value != default:
            leaf = leaf_of(path)
            patterns[leaf if len(by_leaf[leaf]) == 1 else re.escape(path)] = value
    return patterns


def _tidy(alpha: float) -> int | float:
    """Without the last digits' noise, and whole if it can be: 16, not 15.999999999999998."""
    alpha = float(f"{alpha:.13g}")
    return int(alpha) if alpha.is_integer() else alpha
