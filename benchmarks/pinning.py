"""How long work on a GPU stops while another thread takes pinned host memory and gives it back, by the way it is taken.

    python -m benchmarks.pinning                                # one GPU, about half a minute
    python -m benchmarks.pinning --megabytes 64 --repeats 1     # tries it

The work is a loop, as of decode steps: a CUDA graph of small products, a copy of a few bytes, and a wait for both. Ways: PyTorch's own
pinned memory (PYTORCH_CUDA_ALLOC_CONF chooses how that is taken), and sgl_bdlora's, registered with CUDA in one piece, in pieces of
several sizes, and in pieces with rests, which is how adapters are loaded. The median and the largest of the repeats are printed, and a
row for each goes to benchmarks/results/. A way that fails is told, and the others run.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.failures import Failures, run_to_end
from benchmarks.parts import summary
from benchmarks.record import RESULTS, Rows, gpu_name
from sgl_bdlora.copies import Copies
from sgl_bdlora.host_memory import PIECE, REST_S, Cuda, PinnedMemory

# Takes so many bytes when it is entered, gives them back when it is left.
Way = Callable[[int], AbstractContextManager]
# Before and after each part, so that the loop is under way, and what comes late is seen.
SETTLE_S = 0.1
SMALL_PIECE = 2**22


class Batches:
    """The loop. A step takes 0.33 ms on an H200."""

    def __init__(self):
        self._host = torch.zeros(8, pin_memory=True)
        self._device = torch.empty(8, device="cuda")
        self._x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self._work()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._work()
        for _ in range(100):
            self.step()

    def _work(self) -> None:
        for _ in range(30):
            torch.mm(self._x, self._x[:, :16])

    def step(self) -> None:
        self._graph.replay()
        self._device.copy_(self._host, non_blocking=True)
        torch.cuda.synchronize()


def ways() -> dict[str, Way]:
    device = torch.device("cuda", torch.cuda.current_device())
    cuda = Cuda(device, Copies(device))
    return {
        "nothing": _nothing,
        "PyTorch's": _pytorch,
        "in one piece": _registered(PinnedMemory(cuda, sys.maxsize, 0)),
        f"by {PIECE >> 20} MiB": _registered(PinnedMemory(cuda, PIECE, 0)),
        f"by {SMALL_PIECE >> 20} MiB": _registered(PinnedMemory(cuda, SMALL_PIECE, 0)),
        f"by {PIECE >> 20} MiB with rests of {REST_S * 1e3:.0f} ms": _registered(PinnedMemory(cuda)),
    }


@contextmanager
def _nothing(_: int) -> Iterator[None]:
    time.sleep(SETTLE_S)
    yield
    time.sleep(SETTLE_S)


@contextmanager
def _pytorch(nbytes: int) -> Iterator[None]:
    memory = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    yield
    del memory
    torch._C._host_emptyCache()


def _registered(pinned: PinnedMemory) -> Way:
    @contextmanager
    def way(nbytes: int) -> Iterator[None]:
        memory = pinned.zeros(nbytes, torch.uint8)
        yield
        del memory
        pinned.drain()

    return way


def beside(step: Callable[[], None], part: Callable[[], object]) -> tuple[float, list[float]]:
    """Seconds that `part` takes in another thread, and seconds of each `step` meanwhile."""

    def timed() -> float:
        time.sleep(SETTLE_S)
        begin = time.perf_counter()
        part()
        seconds = time.perf_counter() - begin
        time.sleep(SETTLE_S)
        return seconds

    steps = []
    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(timed)
        last = time.perf_counter()
        while not under_way.done():
            step()
            now = time.perf_counter()
            steps.append(now - last)
            last = now
    return under_way.result(), steps


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pinning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--megabytes", type=int, default=671, help="taken at once (default: 671, rank 128 on Llama-3.1-8B)")
    add("--repeats", type=int, default=3)
    add("--output", type=Path, help="results file (default: benchmarks/results/pinning-<time>.jsonl)")
    args = parser.parse_args(argv)
    args.output = args.output or RESULTS / time.strftime("pinning-%Y%m%dT%H%M%SZ.jsonl", time.gmtime())
    if min(args.megabytes, args.repeats) < 1:
        parser.error("--megabytes and --repeats have to be 1 or more")
    if gpu_name() is None:
        parser.error("there is no NVIDIA GPU here, and nothing that pinned memory could hold up")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    rows = Rows(
        args.output, benchmark="pinning", megabytes=args.megabytes, allocator=os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    )
    failures = Failures(rows)
    batches = Batches()
    for name, way in ways().items():
        with failures.of(way=name):
            _run(name, way, args, batches, rows)
    print(rows.path)
    return 1 if failures.seen else 0


def _run(name: str, way: Way, args: argparse.Namespace, batches: Batches, rows: Rows) -> None:
    found: dict[str, list[tuple[float, float]]] = {"take": [], "give back": []}
    for _ in range(args.repeats):
        with ExitStack() as taken:
            parts = {"take": partial(taken.enter_context, way(args.megabytes * 10**6)), "give back": taken.close}
            for part, run in parts.items():
                seconds, steps = beside(batches.step, run)
                pause, median = max(steps) * 1e3, statistics.median(steps) * 1e3
                found[part].append((seconds, pause))
                rows.write(kind="part", way=name, part=part, seconds=seconds, pause_ms=pause, median_ms=median)
    print(f"{name}, {args.megabytes} MB; median (largest):", flush=True)
    print(summary(found, "longest pause"), flush=True)


if __name__ == "__main__":
    sys.exit(run_to_end(main))
