"""A safetensors file that is read, not mapped.

A mapped file that somebody truncates ends the process that looks at it (SIGBUS), and one that somebody writes to changes under it.
Reads come back short instead, and whether the file is still what it was can be asked when all is read. They cost no more: every part
is looked at once, and comes from the same page cache. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Bits of every type of the format; those that DTYPES lacks are told apart from damage, and refused by name.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}
MAX_HEADER = 2**24


class DamagedFileError(ValueError):
    """The file is no safetensors file, or not all of one; the message says how."""


class ChangedFileError(OSError):
    """The file was truncated, written to, replaced or removed while it was being read."""

    def __init__(self, path: Path):
        super().__init__(errno.ESTALE, "it was changed, replaced or removed while it was being read", str(path))


class OpenFile:
    """An open file and what it was when it was opened; closed with the last reference to it."""

    def __init__(self, path: Path):
        self.path = path
        # Opening a pipe that has no writer would wait for one.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._descriptor)
        opened = os.fstat(self._descriptor)
        if not stat.S_ISREG(opened.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        self.identity, self.size = _identity(opened), opened.st_size

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on. Raises ChangedFileError where the file ends before, OSError where the disk fails."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target`, of bytes, likewise."""
        done = 0
        while done < len(target):
            # The kernel reads at most 2 GiB at a time.
            count = os.preadv(self._descriptor, [target[done:]], offset + done)
            if not count:
                raise ChangedFileError(self.path)
            done += count

    def check_unchanged(self) -> None:
        """Raise ChangedFileError unless this file is still at its path, with the size and time of writing that it had."""
        try:
            now = {_identity(os.fstat(self._descriptor)), _identity(os.stat(self.path))}
        except OSError as error:
            raise ChangedFileError(self.path) from error
        if now != {self.identity}:
            raise ChangedFileError(self.path)


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file. shape: as in the header; dtype: the header's word for one that DTYPES lacks."""

    file: OpenFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def __getitem__(self, index: tuple[slice, slice]) -> torch.Tensor:
        """`tensor[rows, cols]` of a 2-D tensor, with slices of step 1, as a contiguous copy. Whole rows are read. Raises OSError."""
        rows, cols = index
        start, stop, _ = rows.indices(self.shape[0])
        width = self.shape[1]
        values = torch.empty(max(0, stop - start), width, dtype=self.dtype)
        if values.numel():
            target = memoryview(values.view(torch.uint8).numpy()).cast("B")
            self.file.read_into(target, self.offset + start * width * self.dtype.itemsize)
        return values if cols.indices(width) == (0, width, 1) else values[:, cols].clone()


def open_tensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by name. Raises DamagedFileError, and OSError where it cannot be read."""
    file = OpenFile(path)
    if file.size < 8:
        raise DamagedFileError(f"it has {file.size} bytes")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if not length <= min(MAX_HEADER, file.size - 8):
        raise DamagedFileError(f"its header should have {length} bytes, the file has {file.size}")
    try:
        header = json.loads(file.read(8, length))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise DamagedFileError("its header is no JSON object")
    header.pop("__metadata__", None)
    entries = sorted((_entry(key, value) for key, value in header.items()), key=lambda entry: entry.offsets)
    end = 0
    for entry in entries:
        if entry.offsets[0] != end:
            raise DamagedFileError(f"the data of {entry.key[:100]!r} begin at {entry.offsets[0]}, not at {end}")
        end = entry.offsets[1]
    if 8 + length + end != file.size:
        raise DamagedFileError(f"its data should have {end} bytes, and have {file.size - 8 - length}")
    return {e.key: FileTensor(file, 8 + length + e.offsets[0], e.shape, DTYPES.get(e.dtype, e.dtype)) for e in entries}


@dataclass(frozen=True)
class _Entry:
    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


def _entry(key: str, value: Any) -> _Entry:
    """One tensor of the header, with offsets that hold its shape."""
    problem = DamagedFileError(f"its header does not describe {key[:100]!r}")
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise problem
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise problem
    bits = _BITS.get(value["dtype"])
    if bits is None:
        raise DamagedFileError(f"{key[:100]!r} is of an unknown type, {value['dtype'][:100]!r}")
    if math.prod(shape) * bits != 8 * (offsets[1] - offsets[0]):
        raise DamagedFileError(f"{key[:100]!r} of shape {tuple(shape)} does not have {offsets[1] - offsets[0]} bytes")
    return _Entry(key, value["dtype"], tuple(shape), (offsets[0], offsets[1]))


def _are_sizes(value: Any) -> bool:
    # A tensor of 64 dimensions is none; sizes that no file has would make products of thousands of digits.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in value)
    )


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
