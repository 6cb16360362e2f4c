"""--adapter-root: adapters are read from below one directory only."""

from __future__ import annotations

import os
from pathlib import Path

from sgl_bdlora.adapters.errors import AdapterError, show

OPTION = "--adapter-root"


def confined(adapter: str, path: str, root: str | None) -> Path:
    """Where to read the adapter: *path*, from the root if it is relative, with symlinks resolved.

    adapter: the name for messages. root: None for no confinement. Raises AdapterError where the directory, or a link in it, leads
    out of the root; the message is the same whether there is something at that place or not.
    """
    if root is None:
        return Path(path)
    inside = os.path.realpath(root)
    try:
        directory = os.path.realpath(os.path.join(inside, path))
    except ValueError as error:
        raise _refusal(adapter, path, str(error)) from error
    if not _below(directory, inside):
        raise _refusal(adapter, path, "leads out of it")
    # A reader opens files of the directory itself (weights.py); any of them may be a link.
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
        if not _below(os.path.realpath(os.path.join(directory, name)), inside):
            raise _refusal(adapter, path, f"has {show(name)}, a link that leads out of it")
    return Path(directory)


def no_tensors(adapter: str) -> AdapterError:
    """Why an adapter that comes as tensors in a request is not loaded when there is a root."""
    return AdapterError(
        adapter,
        f"adapters are read from {OPTION} only, not from tensors in a request",
        f"save it below {OPTION} with PEFT's save_pretrained and load it by its path",
    )


def _below(path: str, root: str) -> bool:
    return os.path.commonpath((path, root)) == root


def _refusal(adapter: str, path: str, problem: str) -> AdapterError:
    return AdapterError(
        adapter,
        f"adapters are read from {OPTION} only, and {show(path)} {problem}",
        f"put the adapter there as a directory of files, and give its path from {OPTION}",
    )
