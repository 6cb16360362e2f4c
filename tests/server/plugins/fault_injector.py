"""A test-only SGLang plugin: makes one rank fail while it loads an adapter, as the file FAULT_FILE says.

A regular expression that runs away is ended after 1 s: a refused load waits for that twice, and the 5 s of a server are no better tested.
The file holds JSON: {"rank": 1, "at": "open", "opened" or "prepare", "do": "raise", or what is done to the file "path": "truncate",
"write", "replace", "delete"}.
"""

import errno
import json
import os
from pathlib import Path

ENV = "FAULT_FILE"


def register() -> None:
    """Entry point of group `sglang.srt.plugins`."""
    if not os.environ.get(ENV):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sgl_bdlora.loader.read_adapter", _read, HookType.AROUND)
    HookRegistry.register("sgl_bdlora.adapters.read.runaway_limit", _limit, HookType.AROUND)
    HookRegistry.register("sgl_bdlora.kernels.backend.BDLoRABackend.prepare", _prepare, HookType.AROUND)


def _read(original, *args):
    _fail("open")
    adapter = original(*args)
    _fail("opened")
    return adapter


def _limit(original, adapter):
    return original(adapter, 1.0)


def _prepare(original, *args):
    _fail("prepare")
    return original(*args)


def _fail(at: str) -> None:
    from torch import distributed

    try:
        fault = json.loads(Path(os.environ[ENV]).read_text())
    except FileNotFoundError:
        return
    if fault["at"] != at or fault["rank"] != (distributed.get_rank() if distributed.is_initialized() else 0):
        return
    path = Path(fault.get("path", "/"))
    if fault["do"] == "raise":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")
    if fault["do"] == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif fault["do"] == "write":
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
    elif fault["do"] == "replace":
        other = path.with_suffix(".new")
        other.write_bytes(path.read_bytes())
        other.replace(path)
    elif fault["do"] == "delete":
        path.unlink()
