"""The adapter cliff: first-token latency and throughput as more adapters are asked for than fit on the device.

    python -m benchmarks.cliff                                  # one GPU, Llama-3.1-8B shape, about 8 minutes
    python -m benchmarks.cliff --device cpu --tiny --quick      # tries the benchmark itself, about 5 minutes on 2 cores

Serves SGLang's own LoRA and ours in turn, on the same random base model and with room for the same number of adapters (--slots). All
adapters are registered at the start, so that points differ only in how many of them are asked for. Open loop: Poisson arrivals at the
same rate for every arm, --load times what the first arm can do with half of the slots in use, unless --rates says otherwise.
Rows are appended to benchmarks/results/ as soon as a point is measured; a plot of what is there is made after each arm.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import httpx
from tqdm import tqdm

from benchmarks.failures import Failures, run_to_end
from benchmarks.files import (
    LLAMA_8B,
    TINY,
    Shape,
    bytes_per_rank,
    folder_of,
    keep_model,
    matched_rank,
    parameters,
    write_adapters,
)
from benchmarks.record import RESULTS, Rows, gpu_name
from sgl_bdlora.server_process import ServerProcess, free_port

from . import plot
from .arms import ARMS, Setup, command, name
from .load import Requests, capacity, run_point, settle, summarize


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cliff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="in this order (default: all)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tp", type=int, default=1)
    add("--tiny", action="store_true", help="a tiny model in place of the 8B one")
    add("--layers", type=int, help="layers of the model (default: 32, tiny 2)")
    add("--slots", type=int, default=8, help="adapters that fit, and that a batch may name (default: 8)")
    add("--adapters", type=int, nargs="+", help="working sets (default: 4 8 12 16 24 32)")
    add("--rank", type=int, default=16, help="of the plain adapters (default: 16)")
    add("--nblocks", type=int, help="of the block-diagonal adapters (default: --tp, but at least 2)")
    add("--zipf", type=float, default=0.0, help="exponent of the adapters' popularity (default: 0, uniform)")
    add("--rates", type=float, nargs="+", help="requests a second (default: one rate, measured)")
    add("--load", type=float, default=0.7, help="measured rate's share of the first arm's capacity (default: 0.7)")
    add("--cv", type=float, default=1.0, help="coefficient of variation of the gamma arrivals (default: 1, Poisson)")
    add("--prompt", type=int, help="prompt tokens (default: 256, tiny 32)")
    add("--output-tokens", type=int, help="output tokens (default: 64, tiny 8)")
    add("--seconds", type=float, help="of load for a point (default: 10, quick 6)")
    add("--drain", type=float, help="seconds to wait for a point's last answers (default: 5, quick 3)")
    add("--quick", action="store_true", help="short points, working sets 4 8 16 32")
    add("--max-running", type=int, default=64, help="requests in a batch (default: 64)")
    add("--extra-arguments", default="", metavar="WORDS", help="further server arguments for all arms, one string")
    add("--extra-stock", default="", metavar="WORDS", help="the same for the stock arm only")
    add("--extra-ours", default="", metavar="WORDS", help="the same for our arms only")
    add("--start-timeout", type=float, default=240, help="seconds that a server may take to start (default: 240)")
    add(
        "--files", type=Path, help="where model and adapters are kept for the next run (default: a temporary directory)"
    )
    add("--output", type=Path, help="results file (default: benchmarks/results/cliff-<time>.jsonl)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    args.adapters = sorted(args.adapters or ((4, 8, 16, 32) if args.quick else (4, 8, 12, 16, 24, 32)))
    args.nblocks = args.nblocks or max(2, args.tp)
    args.layers = args.layers or (2 if args.tiny else 32)
    args.prompt = args.prompt or (32 if args.tiny else 256)
    args.output_tokens = args.output_tokens or (8 if args.tiny else 64)
    args.seconds = args.seconds or (6 if args.quick else 10)
    args.drain = args.drain or (3 if args.quick else 5)
    args.output = args.output or RESULTS / time.strftime("cliff-%Y%m%dT%H%M%SZ.jsonl", time.gmtime())
    if args.slots < 2 or args.adapters[0] < 1:
        parser.error("--slots has to be 2 or more, --adapters 1 or more")
    if args.device == "cuda" and gpu_name() is None:
        parser.error("there is no NVIDIA GPU here; say --device cpu --tiny to try the benchmark without one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    base = TINY if args.tiny else LLAMA_8B
    shape = Shape(**{**vars(base), "layers": args.layers})
    kept = nullcontext(args.files) if args.files else tempfile.TemporaryDirectory(prefix="cliff-")
    with kept as folder:
        return Cliff(args, shape, Path(folder)).run()


class Cliff:
    """One run: files, then each arm's server and its points."""

    def __init__(self, args: argparse.Namespace, shape: Shape, folder: Path):
        self.args, self.shape = args, shape
        self.folder = folder_of(shape, folder)
        self.rates: list[float] | None = args.rates
        self.points: list[dict] = []
        self.failed = False
        self.rows = Rows(
            args.output, benchmark="cliff", device=args.device, model=shape.name, layers=shape.layers, tp=args.tp,
            dtype=str(shape.dtype).removeprefix("torch."), prompt_tokens=args.prompt, output_tokens=args.output_tokens,
            zipf=args.zipf, cv=args.cv, seed=args.seed, max_running=args.max_running, extra_arguments=args.extra_arguments,
        )  # fmt: skip
        self.failures = Failures(self.rows)

    def run(self) -> int:
        args = self.args
        model = keep_model(self.shape, self.folder / "model")
        dtype = str(self.shape.dtype).removeprefix("torch.")
        setup = Setup(
            model, args.tp, dtype, args.slots, args.rank, args.max_running, args.device,
            args.extra_arguments, args.extra_stock, args.extra_ours,
        )  # fmt: skip
        for arm in args.arms:
            with self.failures.of(arm=arm):
                self._run_arm(arm, setup)
            self._draw()
        print(self.rows.path)
        return 1 if self.failed or self.failures.seen else 0

    def _draw(self) -> None:
        picture = self.rows.path.with_suffix(".png")
        try:
            if self.points:
                plot.draw(self.points, picture)
                print(picture, flush=True)
        except ImportError as error:
            print(f"no plot ({error}); python -m benchmarks.cliff.plot {self.rows.path} draws it elsewhere", flush=True)

    def _run_arm(self, arm: str, setup: Setup) -> None:
        args = self.args
        nblocks = args.nblocks if arm == "block-diagonal" else None
        rank = matched_rank(self.shape, args.rank, nblocks) if nblocks else args.rank
        count = args.adapters[-1]
        with tqdm(total=count, desc=f"{arm}: adapters of rank {rank}", leave=False) as bar:
            folders = write_adapters(self.shape, self.folder / "adapters", count, rank, nblocks, bar.update)
        pool = args.slots * bytes_per_rank(self.shape, folders[0], args.tp)
        port = free_port()
        words, environment = command(arm, setup, folders, pool, port)
        log = self.rows.path.with_name(f"{self.rows.path.stem}-{arm}.log")
        begin = time.monotonic()
        with ServerProcess(words, environment, f"http://127.0.0.1:{port}", log, args.start_timeout) as server:
            print(f"{arm}: {ARMS[arm]}, rank {rank}; ready after {time.monotonic() - begin:.0f} s", flush=True)
            about = {
                "arm": arm,
                "rank": rank,
                "nblocks": nblocks,
                "adapter_parameters": parameters(self.shape, rank, nblocks),
                "pool_adapters": args.slots,
                "pool_bytes_per_rank": None if arm == "stock" else pool,
            }
            self._warm_up(server.url, about)
            for rate in self.rates:
                for adapters in args.adapters:
                    self._measure(server.url, about, adapters, rate)

    def _requests(self, url: str, adapters: int) -> Requests:
        names = [name(i) for i in range(adapters)]
        return Requests(url, names, self.args.zipf, self.args.prompt, self.args.output_tokens, self.shape.vocab)

    def _warm_up(self, url: str, about: dict) -> None:
        """Let the server compile what its first requests need; measure its capacity, and with it the rate if none is given."""
        args = self.args
        requests = self._requests(url, max(1, args.slots // 2))
        asyncio.run(capacity(requests, args.max_running // 4 or 1, 3, f"{args.seed} warm-up"))
        most = asyncio.run(capacity(requests, args.max_running, args.seconds / 2, f"{args.seed} capacity"))
        if self.rates is None:
            self.rates = [args.load * most]
        self.rows.write(kind="capacity", **about, capacity_req_s=most, adapters=len(requests.adapters))
        print(f"  {most:.2f} requests/s at most with {len(requests.adapters)} adapters; rate {self.rates}", flush=True)

    def _measure(self, url: str, about: dict, adapters: int, rate: float) -> None:
        args = self.args
        asyncio.run(settle(url))
        before = pool_counts(url) if about["arm"] != "stock" else None
        # Every point has the same arrivals, so that throughputs can be compared.
        seed = f"{args.seed} {rate:.6g}"
        with tqdm(desc=f"  {adapters} adapters", unit=" requests", leave=False) as bar:
            outcomes = asyncio.run(
                run_point(self._requests(url, adapters), rate, args.seconds, args.drain, args.cv, seed, bar.update)
            )
        after = pool_counts(url) if before else None
        figures = summarize(outcomes, args.seconds, args.drain)
        self.failed |= bool(figures["failed"])
        row = self.rows.write(
            kind="point", **about, adapters=adapters, rate=rate, duration_s=args.seconds, **figures,
            loads=after["loads"] - before["loads"] if before else None,
            evictions=after["evictions"] - before["evictions"] if before else None,
        )  # fmt: skip
        self.points.append(row)
        print(
            f"  {adapters:3d} adapters  TTFT P50 {show(row['ttft_p50_ms'])} P99 {show(row['ttft_p99_ms'])} ms  "
            f"TPOT P50 {show(row['tpot_p50_ms'])} ms  {row['throughput_tok_s']:8.1f} tokens/s  {row['requests']} requests, "
            f"{row['failed']} failed, {row['unfinished']} unfinished"
            + ("" if row["loads"] is None else f", {row['loads']} loads"),
            flush=True,
        )


def pool_counts(url: str) -> dict:
    response = httpx.get(f"{url}/bdlora/info", timeout=60)
    response.raise_for_status()
    return response.json()["pool"]


def show(value: float | None) -> str:
    return "      -" if value is None else f"{value:7.1f}"


if __name__ == "__main__":
    sys.exit(run_to_end(main))
