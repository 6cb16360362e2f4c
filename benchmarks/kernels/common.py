"""What the kernels' benchmarks share: the command line, adapters on the device, and the timing of a CUDA graph."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.kernels.shapes import shard
from benchmarks.record import RESULTS
from sgl_bdlora.kernels.triton_ops import Plan, TritonOps
from sgl_bdlora.memory_pool import MemoryPool, Resident
from sgl_bdlora.sharding import HostLayer


def parser_for(name: str, description: str, rank: int | None, repeats: int) -> argparse.ArgumentParser:
    """With the options of all of them; name: the module's own. rank: the default; None where one rank is not enough."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.kernels.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tp", type=int, default=2, help="one rank of this many (default: 2)")
    if rank is not None:
        parser.add_argument("--rank", type=int, default=rank, help=f"local rank of the adapters (default: {rank})")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument(
        "--output", type=Path, help=f"results file (default: benchmarks/results/{_file(name, '<time>')})"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with a results file; ends the process where there is no GPU."""
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    name = parser.prog.rpartition(".")[2]
    args.output = args.output or RESULTS / _file(name, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    return args


def _file(name: str, when: str) -> str:
    return f"{name.replace('_', '-')}-{when}.jsonl"


def on_device(layers: list[HostLayer], adapters: int, rank: int, max_tokens: int) -> tuple[TritonOps, list[Resident]]:
    """The kernels over a pool in which `adapters` random adapters have arrived, and these."""
    shards = {f"{i}": shard(f"{i}", layers, rank) for i in range(adapters)}
    pool = MemoryPool(sum(s.nbytes for s in shards.values()), torch.bfloat16, torch.device("cuda"), adapters)
    pool.ensure(shards)
    residents = [pool.get(uid) for uid in shards]
    for resident in residents:
        resident.arrival.wait()
    return TritonOps(pool.arena, layers, adapters, None).reserve(max_tokens, combines=False), residents


def without_shrink(plan: Plan | None) -> Plan | None:
    """The same with no program that computes h."""
    return plan and replace(plan, tiles={rows: replace(tiles, programs=0) for rows, tiles in plan.tiles.items()})


def graph_ms(run: Callable[[], object], before: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a replay of `run`; `before` runs ahead of each, outside the graph.

    Captured on the stream that it ran on first (TritonOps.sums).
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            before()
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times = []
    for _ in range(repeats):
        before()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
