"""What loading an adapter costs the requests that run meanwhile: the longest time without a token.

    python -m benchmarks.holdup                              # one GPU, Llama-3.1-8B shape, SGLang's own LoRA and ours, about 5 minutes
    python -m benchmarks.holdup --device cpu --ranks 512     # 2 cores, no GPU: a small model, about 3 minutes
    python -m benchmarks.holdup --device cpu --tiny          # tries the benchmark itself

Streams of requests for the base model run; after a second an adapter is loaded from files that were just written (so from memory, not
from a disk), then asked for once. Of every part the longest gap between two messages of a stream is taken, over all streams. "quiet" is
the second before. The adapters of all repeats stay loaded until the last one is there, because a load of SGLang's own takes no memory from
the system where it finds that of an unloaded adapter; then they are unloaded one by one. The median and the largest of the repeats are
printed, and a row for each part of each goes to benchmarks/results/.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import httpx

from benchmarks.failures import Failures, run_to_end
from benchmarks.files import LLAMA_8B, TINY, Shape, folder_of, keep_model, write_adapter
from benchmarks.latency.arms import Setup, command
from benchmarks.parts import summary
from benchmarks.record import RESULTS, Rows, gpu_name
from sgl_bdlora.server_process import ServerProcess, free_port

SMALL = Shape("small llama", 1024, 4096, 8, 8, 8, 512, TINY.dtype, 128)
SERVERS = ("stock", "ours")
PARTS = ("quiet", "load", "first request", "unload")
PROMPT, QUIET_S = 16, 1.0
# Of a stream, within the model's context. A server has room for all streams at once: one that waits for another gives no token.
TOKENS, CONTEXT = 8000, 8192


class Streams:
    """Requests that run until the block is left. gap: the longest time without a message in a span of time."""

    def __init__(self, url: str, count: int):
        self._url, self._end = url, threading.Event()
        self._times: list[list[float]] = [[] for _ in range(count)]
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]

    def _run(self, i: int) -> None:
        body = {
            "input_ids": [3 + (i + j) % 500 for j in range(PROMPT)],
            "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
            "stream": True,
        }
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", f"{self._url}/generate", json=body, timeout=600) as answer,
        ):
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    self._times[i].append(time.perf_counter())
                if self._end.is_set():
                    return

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 120
        while not all(len(times) > 3 for times in self._times):
            if time.monotonic() > deadline:
                raise RuntimeError("a stream gave no tokens within two minutes")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def gap(self, begin: float, end: float) -> float:
        """Seconds; gaps that the span cuts count whole."""
        gaps = [
            later - earlier
            for times in self._times
            for earlier, later in itertools.pairwise(times)
            if later >= begin and earlier <= end
        ]
        return max(gaps, default=float("nan"))


def measure(url: str, count: int, steps: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """Seconds that each step took beside `count` streams, and the longest gap in it and half a quiet second after."""
    spans = {}
    with Streams(url, count) as streams:
        for part, step in steps.items():
            begin = time.perf_counter()
            step()
            spans[part] = (begin, time.perf_counter())
            # A step may leave something to threads, as unloading does with host memory. It is over before the next one begins.
            time.sleep(QUIET_S)
        return {part: (end - begin, streams.gap(begin, end + QUIET_S / 2)) for part, (begin, end) in spans.items()}


def all_parts(url: str, count: int, folder: Path, repeats: int) -> Iterator[tuple[str, float, float]]:
    """(part, seconds, longest gap), of every part `repeats` times. One more load than that comes first, to warm up."""
    with httpx.Client(base_url=url, timeout=600) as client:

        def post(path: str, **body) -> Callable[[], None]:
            return lambda: _done(client.post(path, json=body))

        one_token = {"input_ids": list(range(3, 19)), "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        names = [f"new-{i}" for i in range(repeats + 1)]
        for name in names:
            steps = {
                "quiet": lambda: time.sleep(QUIET_S),
                "load": post("/load_lora_adapter", lora_name=name, lora_path=str(folder)),
                "first request": post("/generate", **one_token, lora_path=name),
            }
            for part, (seconds, gap) in measure(url, count, steps).items():
                if name != names[0]:
                    yield part, seconds, gap
        for name in names:
            found = measure(url, count, {"unload": post("/unload_lora_adapter", lora_name=name)})
            if name != names[0]:
                yield "unload", *found["unload"]


def _done(answer: httpx.Response) -> None:
    if answer.is_error or answer.json().get("success") is False:
        raise RuntimeError(answer.text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.holdup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="SGLang's own LoRA, ours (default: both)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tp", type=int, default=1)
    add("--tiny", action="store_true", help="a tiny model instead")
    add("--ranks", type=int, nargs="+", help="of plain adapters on all seven modules (default: 16 128, tiny 8)")
    add("--streams", type=int, default=8, help="requests that run meanwhile (default: 8)")
    add("--repeats", type=int, default=5)
    add("--extra-arguments", default="", metavar="WORDS", help="further arguments of all servers, one string")
    add(
        "--files", type=Path, help="where model and adapters are kept for the next run (default: a temporary directory)"
    )
    add("--output", type=Path, help="results file (default: benchmarks/results/holdup-<time>.jsonl)")
    args = parser.parse_args(argv)
    args.output = args.output or RESULTS / time.strftime("holdup-%Y%m%dT%H%M%SZ.jsonl", time.gmtime())
    args.ranks = args.ranks or ([8] if args.tiny else [16, 128])
    if args.device == "cuda" and gpu_name() is None:
        parser.error("there is no NVIDIA GPU here; say --device cpu to run the benchmark without one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    shape = TINY if args.tiny else SMALL if args.device == "cpu" else LLAMA_8B
    rows = Rows(
        args.output, benchmark="holdup", device=args.device, model=shape.name, tp=args.tp, streams=args.streams,
        extra_arguments=args.extra_arguments,
    )  # fmt: skip
    failures = Failures(rows)
    kept = nullcontext(args.files) if args.files else tempfile.TemporaryDirectory(prefix="holdup-")
    with kept as name:
        folder = folder_of(shape, Path(name))
        model = keep_model(shape, folder / "model")
        adapters = {rank: write_adapter(shape, folder / f"rank-{rank}", rank, None, rank) for rank in args.ranks}
        for server in args.servers:
            with failures.of(server=server):
                _run(server, args, shape, model, adapters, rows)
    print(rows.path)
    return 1 if failures.seen else 0


def _run(
    server: str, args: argparse.Namespace, shape: Shape, model: Path, adapters: dict[int, Path], rows: Rows
) -> None:
    sizes = {rank: sum(file.stat().st_size for file in folder.iterdir()) for rank, folder in adapters.items()}
    room = ("--context-length", str(CONTEXT), "--max-total-tokens", str(CONTEXT * (args.streams + 1)))
    setup = Setup(
        model, str(shape.dtype).removeprefix("torch."), args.tp, args.device, args.streams + 1, 2, max(adapters), 4096,
        2 * max(sizes.values()) + 2**20, extra=(*room, *args.extra_arguments.split()),
    )  # fmt: skip
    # SGLang's own LoRA is asked to serve LoRA by an adapter at the start; ours has the same one.
    first = {"first": adapters[min(adapters)]}
    port = free_port()
    words, environment = command(server, setup, first, port)
    log = rows.path.with_name(f"{rows.path.stem}-{server}.log")
    with ServerProcess(words, environment, f"http://127.0.0.1:{port}", log, 300) as running:
        for rank, folder in adapters.items():
            found: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}
            megabytes = round(sizes[rank] / 1e6, 1)
            for part, seconds, gap in all_parts(running.url, args.streams, folder, args.repeats):
                found[part].append((seconds, gap * 1e3))
                rows.write(
                    kind="part",
                    server=server,
                    rank=rank,
                    megabytes=megabytes,
                    part=part,
                    seconds=seconds,
                    gap_ms=gap * 1e3,
                )
            print(f"{server}, rank {rank}, {megabytes:.0f} MB; median (largest):", flush=True)
            print(summary(found, "longest gap"), flush=True)


if __name__ == "__main__":
    sys.exit(run_to_end(main))
