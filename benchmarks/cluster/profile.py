"""Costs of one replica: decode steps over batch, adapters and ranks, prefills over tokens and ranks; with our kernels and SGLang's.

    python -m benchmarks.cluster.profile                                        # one GPU, Llama-3.1-8B shape, 5 minutes
    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.cluster.profile --arms ours --output ours.jsonl      # one arm a GPU, at once
    CUDA_VISIBLE_DEVICES=1 python -m benchmarks.cluster.profile --arms stock --output stock.jsonl
    python -m benchmarks.cluster.profile --fit ours.jsonl stock.jsonl           # both together: no GPU, nothing is measured
    python -m benchmarks.cluster.profile --device cpu --tiny --seconds 30       # tries the benchmark itself

Both arms serve the same plain adapters: at TP 1 no layer is split, so block-diagonal ones would only be other adapters. Points are
measured as benchmarks/latency does, most telling first, for --seconds an arm. Rows are appended as soon as a point is measured; at the end
each arm's costs are fitted and written beside them, a file for `costs:` in a cluster's configuration, and what ranks do to each other is
printed.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import httpx

from benchmarks.cluster.points import ADAPTERS, DECODE, PREFILL, Point
from benchmarks.cluster.profiled import report, write_defaults
from benchmarks.failures import Failures, run_to_end
from benchmarks.files import LLAMA_8B, TINY, Shape, bytes_per_rank, folder_of, keep_adapter, keep_model
from benchmarks.latency.arms import Setup, command
from benchmarks.latency.mixes import adapters_of, mix
from benchmarks.latency.timing import decode_s, random_ids, time_batches
from benchmarks.record import RESULTS, Rows, gpu_name, read_rows
from sgl_bdlora.cluster.costs import DEFAULTS
from sgl_bdlora.server_process import ServerProcess, free_port

ARMS = {"ours": "our kernels, plain adapters", "stock": "SGLang's own LoRA (csgmv), the same adapters"}
# What one prefill batch takes; the largest point has as many.
PREFILL_TOKENS = 8192
RUNNING = 64


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tp", type=int, default=1)
    add("--tiny", action="store_true", help="a tiny model in place of the 8B one")
    add("--layers", type=int, help="layers of the model (default: all)")
    add("--seconds", type=float, default=90.0, help="of measuring for each arm; later points are left (default: 90)")
    add("--repeats", type=int, default=3, help="of each point, after one that is not counted (default: 3)")
    add("--extra-arguments", default="", metavar="WORDS", help="further arguments of all servers, one string")
    add("--start-timeout", type=float, default=300, help="seconds that a server may take to start (default: 300)")
    add(
        "--files", type=Path, help="where model and adapters are kept for the next run (default: a temporary directory)"
    )
    add("--output", type=Path, help="results file (default: benchmarks/results/profile-<time>.jsonl)")
    add(
        "--fit", type=Path, nargs="+", metavar="ROWS", help="measure nothing: fit and report these files' rows together"
    )
    add("--defaults", action="store_true", help="with --fit: make these the package's cost models (default_costs.json)")
    args = parser.parse_args(argv)
    if args.defaults and not args.fit:
        parser.error("--defaults needs --fit, the rows to make them of")
    args.output = args.output or RESULTS / time.strftime("profile-%Y%m%dT%H%M%SZ.jsonl", time.gmtime())
    if not args.fit and args.device == "cuda" and gpu_name() is None:
        parser.error("there is no NVIDIA GPU here; say --device cpu --tiny to try the benchmark without one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.fit:
        found = report([row for path in args.fit for row in read_rows(path)], args.fit[0])
        if args.defaults:
            write_defaults(found, DEFAULTS)
            print(DEFAULTS)
        return 0
    base = TINY if args.tiny else LLAMA_8B
    shape = Shape(**{**vars(base), "layers": args.layers or base.layers})
    kept = nullcontext(args.files) if args.files else tempfile.TemporaryDirectory(prefix="profile-")
    with kept as folder:
        return Profile(args, shape, Path(folder)).run()


class Profile:
    """One run: files, then each arm's server and its points."""

    def __init__(self, args: argparse.Namespace, shape: Shape, folder: Path):
        self.args, self.shape = args, shape
        self.folder = folder_of(shape, folder)
        self.rows = Rows(
            args.output, benchmark="profile", device=args.device, model=shape.name, layers=shape.layers, tp=args.tp,
            repeats=args.repeats, extra_arguments=args.extra_arguments,
        )  # fmt: skip
        self.failures = Failures(self.rows)

    def run(self) -> int:
        keep_model(self.shape, self.folder / "model")
        # Adapters of one rank are one directory under several names: servers keep a copy for each name.
        folders = {rank: keep_adapter(self.shape, self.folder / f"r{rank}", rank, None, seed=rank) for rank in ADAPTERS}
        adapters = {
            a.name: folders[a.rank]
            for rank, count in ADAPTERS.items()
            for a in adapters_of(mix(f"{rank}x{count}"), None)
        }
        for arm in self.args.arms:
            with self.failures.of(arm=arm):
                self._run_arm(arm, adapters)
        report(read_rows(self.rows.path), self.rows.path)
        print(self.rows.path)
        return 1 if self.failures.seen else 0

    def _run_arm(self, arm: str, adapters: dict[str, Path]) -> None:
        args = self.args
        # Every adapter has a place, so that no point waits for a copy.
        pool = sum(bytes_per_rank(self.shape, folder, args.tp) for folder in adapters.values()) * 1.02 + 2**20
        most = 1 + max(len(point.chosen.ranks) for point in (*DECODE, *PREFILL))
        setup = Setup(
            self.folder / "model", str(self.shape.dtype).removeprefix("torch."), args.tp, args.device, RUNNING, most, max(ADAPTERS),
            PREFILL_TOKENS, int(pool), extra=tuple(args.extra_arguments.split()),
        )  # fmt: skip
        port = free_port()
        words, environment = command(arm, setup, adapters, port)
        log = self.rows.path.with_name(f"{self.rows.path.stem}-{arm}.log")
        begin = time.monotonic()
        with ServerProcess(words, environment, f"http://127.0.0.1:{port}", log, args.start_timeout) as server:
            print(f"{arm}: {ARMS[arm]}; ready after {time.monotonic() - begin:.0f} s", flush=True)
            begin = time.monotonic()
            todo = [(kind, point) for kind, points in (("decode", DECODE), ("prefill", PREFILL)) for point in points]
            todo.sort(key=lambda item: item[1].turn)
            for i, (kind, point) in enumerate(todo):
                if time.monotonic() - begin > args.seconds:
                    print(f"  {len(todo) - i} points left: the {args.seconds:.0f} s are over", flush=True)
                    break
                try:
                    self._measure(server.url, arm, kind, point)
                except httpx.HTTPStatusError as error:
                    self.failures.add(f"{kind} {point}: {error.response.text[:300]}", arm=arm)

    def _measure(self, url: str, arm: str, kind: str, point: Point) -> None:
        adapters = adapters_of(point.chosen, None)
        names = [adapters[i % len(adapters)].name for i in range(point.batch)] if adapters else None
        rng = random.Random(0)
        firsts, wholes = time_batches(
            url,
            lambda: {"input_ids": random_ids(rng, self.shape.vocab, point.batch, point.prompt)},
            point.output,
            names,
            self.args.repeats,
        )
        first, whole = statistics.median(firsts), statistics.median(wholes)
        ms = 1e3 * (first if kind == "prefill" else decode_s(first, whole, point.output))
        ranks = [adapters[i % len(adapters)].rank for i in range(point.batch)] if adapters else [0]
        row = self.rows.write(
            kind=kind, arm=arm, mix=point.chosen.text, batch=point.batch, adapters=len(adapters), prompt=point.prompt,
            rows=sum(a.rank for a in adapters[: point.batch]), width=max(ranks), tokens=point.batch * point.prompt,
            token_ranks=point.prompt * sum(ranks), ms=ms, ms_all=[1e3 * s for s in (firsts if kind == "prefill" else wholes)],
        )  # fmt: skip
        print(
            f"  {arm:<6} {kind:<8} {row['mix']:<16} batch {point.batch:3d} of {point.prompt:4d} tokens {ms:9.3f} ms",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(run_to_end(main))
