"""A test-only SGLang plugin: writes the collectives of every forward pass on rank 0, while the switch file exists.

Counts at the dispatcher, below every Python wrapper, so that no collective is missed whoever starts it, and in
sgl_bdlora.cpu.shared_memory, which goes round the dispatcher.
"""

import json
import os
from collections import Counter
from pathlib import Path

# Rank 0 appends a JSON line a forward pass to this file while a file of the same name + ".on" exists.
ENV = "COLLECTIVE_COUNTER_FILE"


def register() -> None:
    """Entry point of group `sglang.srt.plugins`."""
    if not os.environ.get(ENV):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.forward", _forward, HookType.AROUND)


def _forward(original, runner, forward_batch, *args, **kwargs):
    import torch

    path = Path(os.environ[ENV])
    if torch.distributed.get_rank() != 0 or not path.with_suffix(".on").exists():
        return original(runner, forward_batch, *args, **kwargs)
    with _counting() as counts:
        result = original(runner, forward_batch, *args, **kwargs)
    adapters = [uid for uid in forward_batch.lora_ids or [] if uid is not None]
    line = {
        "mode": forward_batch.forward_mode.name,
        "requests": forward_batch.batch_size,
        "with_adapter": len(adapters),
        "adapters": len(set(adapters)),
        "collectives": dict(counts),
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return result


def _counting():
    from contextlib import contextmanager
    from unittest.mock import patch

    from torch.utils._python_dispatch import TorchDispatchMode

    from sgl_bdlora.cpu.shared_memory import SharedMemoryGroup

    all_reduce = SharedMemoryGroup.all_reduce

    class Mode(TorchDispatchMode):
        def __init__(self, counts: Counter):
            super().__init__()
            self.counts = counts

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # c10d: torch.distributed's own; shm_*: the collectives of SGLang's CPU kernels.
            if func.namespace in ("c10d", "_c10d_functional") or func.__name__.startswith("shm_all"):
                self.counts[str(func.overloadpacket)] += 1
            return func(*args, **(kwargs or {}))

    @contextmanager
    def count():
        counts: Counter = Counter()

        def counted(group, tensor):
            counts["shared_memory.all_reduce"] += 1
            return all_reduce(group, tensor)

        with patch.object(SharedMemoryGroup, "all_reduce", counted), Mode(counts):
            yield counts

    return count()
