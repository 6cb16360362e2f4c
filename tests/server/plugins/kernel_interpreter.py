"""A test-only SGLang plugin: a server without a GPU computes with the GPU's kernels, in Triton's interpreter.

Needs TRITON_INTERPRET=1 in the environment. Rank 0 keeps in the file KERNEL_CALLS_FILE, as JSON, how many batches with adapters were set
and repeated, and how many times the kernels were launched.
"""

import json
import os
from collections import Counter
from pathlib import Path

ENV = "KERNEL_CALLS_FILE"
_calls: Counter = Counter()


def register() -> None:
    """Entry point of group `sglang.srt.plugins`."""
    if not os.environ.get(ENV):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    backend = "sgl_bdlora.kernels.backend.BDLoRABackend"
    HookRegistry.register(f"{backend}.attach", _attach, HookType.AROUND)
    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.forward", _forward, HookType.AROUND)


def _attach(original, backend, arena, hosts, combines, max_rank):
    from sgl_bdlora.kernels.triton_ops import TritonOps

    original(backend, arena, hosts, combines, max_rank)
    backend._ops = TritonOps(arena, hosts, backend.max_loras_per_batch, backend.collectives if combines else None)
    for owner, method, name in (
        (backend._ops.batch, "fill", "set"),
        (backend._ops.batch, "repeat", "repeated"),
        (backend._ops, "_fused", "linear_kernel"),
        (backend._ops, "_shrink", "shrink_kernel"),
    ):
        setattr(owner, method, _counted(name, getattr(owner, method)))


def _counted(name, call):
    def counted(*args, **kwargs):
        _calls[name] += 1
        return call(*args, **kwargs)

    return counted


def _forward(original, *args, **kwargs):
    import torch

    result = original(*args, **kwargs)
    if torch.distributed.get_rank() == 0:
        file = Path(os.environ[ENV])
        part = file.with_suffix(".part")
        part.write_text(json.dumps(_calls))
        part.replace(file)
    return result
