"""What it takes the host to prepare a decode step's adapters: of other requests than the step before, and of the same.

    python -m benchmarks.preparation     # seconds, no GPU needed

The manager and back end of one rank of Llama-3.1-8B at TP 8, without a model: four adapters in the pool, requests that take turns with
them. The least of 200 times each, because what disturbs a time only adds to it. Without a GPU most of the former is clearing h, which a
GPU does by itself. A step of TP 8 takes 1.6 to 2 ms on GPUs, and the host has as long for all of its own work.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from benchmarks.kernels.shapes import hosts, shard
from benchmarks.record import RESULTS, Rows
from sgl_bdlora import cpu

TP, LAYERS, ADAPTERS = 8, 32, 4
REPEATS = 200


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preparation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="(default: 1 8 32 128)")
    parser.add_argument("--output", type=Path, default=RESULTS / f"preparation-{device}.jsonl")
    args = parser.parse_args(argv)
    if min(args.batches) < 1:
        parser.error("--batches have to be 1 or more")
    rows = Rows(args.output, benchmark="preparation", device=device, tp=TP, adapters=ADAPTERS)
    manager = _manager(torch.device(device), max(args.batches))
    uids = list(manager.shards)
    for batch in args.batches:
        ids = [uids[i % ADAPTERS] for i in range(batch)]
        turned = [*ids[1:], uids[batch % ADAPTERS]]
        times = {
            "other requests": _least_us(manager, [ids, turned]),
            "the same requests": _least_us(manager, [ids, ids]),
        }
        for step, us in times.items():
            rows.write(batch=batch, step=step, us=round(us, 1))
        print(f"batch {batch:3d}: " + ", ".join(f"{step} {us:6.1f} us" for step, us in times.items()), flush=True)
    print(rows.path)
    return 0


def _least_us(manager, steps: list[list[str]]) -> float:
    """Microseconds of the steps in turn, each as ForwardBatch.init_new asks for it."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    times = []
    for repeat in range(2 * REPEATS):
        ids = steps[repeat % 2]
        batch = SimpleNamespace(lora_ids=list(ids), forward_mode=ForwardMode.DECODE, batch_size=len(ids))
        begin = time.perf_counter()
        manager.fetch_new_loras(set(batch.lora_ids))
        manager.prepare_lora_batch(batch)
        times.append(time.perf_counter() - begin)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return min(times[2:]) * 1e6


def _manager(device: torch.device, max_batch: int):
    """A rank's manager as after its start, with adapters in the pool and buffers for decode graphs."""
    if device.type == "cpu":
        cpu.prepare_environment()
    from sgl_bdlora import plugin
    from sgl_bdlora.kernels.backend import BDLoRABackend
    from sgl_bdlora.kernels.triton_ops import TritonOps
    from sgl_bdlora.manager import BDLoRAManager
    from sgl_bdlora.memory_pool import MemoryPool

    layers = hosts("8b", TP, LAYERS)
    shards = {f"{i:032x}": shard(f"{i}", layers, 4) for i in range(ADAPTERS)}
    pool = MemoryPool(sum(s.nbytes for s in shards.values()), torch.bfloat16, device, ADAPTERS)
    pool.ensure(shards)
    with mock.patch.object(plugin, "verify_hooks"):
        backend = BDLoRABackend(ADAPTERS, device, None)
    # As on a GPU, whatever this machine has.
    backend._ops = TritonOps(pool.arena, layers, ADAPTERS, None)
    backend.init_cuda_graph_batch_info(max_batch, 1)
    manager = BDLoRAManager.__new__(BDLoRAManager)
    manager.memory_pool, manager.shards, manager.lora_backend = pool, shards, backend
    manager.loader = SimpleNamespace(pinned=frozenset)
    manager.last_used, manager._published = {}, (pool.loads, pool.evictions)
    manager._fetched = manager._prepared = None
    return manager


if __name__ == "__main__":
    sys.exit(main())
