"""One run of the latency benchmark: its servers, the points that are measured on them, and their rows."""

import argparse
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.failures import Failures
from benchmarks.files import ATTENTION, MODULES, bytes_per_rank, folder_of, keep_adapter, keep_model
from benchmarks.record import Rows, gpu_name, read_rows
from sgl_bdlora.server_process import ServerProcess, StartFailed, free_port, started

from . import plot
from .arms import AGAIN, BASE_ONLY, BLOCK_DIAGONAL, PLAIN, SERVERS, Setup, command
from .mixes import Adapter, Mix, adapters_of, params_ratio, rank_of
from .timing import decode_s, random_ids, time_batches

TARGETS = {"all": MODULES, "attention": ATTENTION}


def default_nblocks(tp: int) -> int:
    return max(2, tp)


def is_like(row: dict, wanted: dict) -> bool:
    """Whether a row has the wanted fields. Some rows name no modules, nblocks or share_of, which then were the defaults."""
    row = {"modules": "all", "nblocks": default_nblocks(row["tp"]), "share_of": 1, **row}
    return all(row[key] == value for key, value in wanted.items())


@dataclass(frozen=True)
class Point:
    """What one row of the results measures. ratio: as wanted, of block-diagonal adapters; prompt, output: tokens."""

    arm: str
    mix: Mix
    ratio: float | None
    batch: int
    prompt: int
    output: int


class Latency:
    """One run: files, then each server and the points of its arms.

    shape: of the whole model, by which ranks of adapters are matched. served: what the servers serve, a share of it with --share-of.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.shape = args, args.shape
        self.served = self.shape.share(args.share_of)
        self.folder = folder_of(self.served, folder)
        self.modules = TARGETS[args.modules]
        self.points: list[dict] = []
        self.end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        self.left = 0
        self.configuration = {
            "device": args.device, "model": self.shape.name, "layers": self.shape.layers, "tp": args.tp,
            "share_of": args.share_of, "repeats": args.repeats, "extra_arguments": args.extra_arguments,
            "modules": args.modules, "nblocks": args.nblocks,
        }  # fmt: skip
        self.rows = Rows(args.output, benchmark="latency", **self.configuration)
        self.failures = Failures(self.rows)
        if args.resume and args.output.exists():
            wanted = {"kind": "point", "gpu": gpu_name(), **self.configuration}
            self.points = [row for row in read_rows(args.output) if is_like(row, wanted)]
            print(f"{len(self.points)} points of this configuration are in {args.output}", flush=True)

    def run(self) -> int:
        args = self.args
        self.write_files()
        todo = {
            server: [point for arm in arms if arm in args.arms for point in self._todo(server, arm)]
            for server, arms in SERVERS.items()
        }
        todo = {server: points for server, points in todo.items() if points}
        if args.together:
            self._run_together(todo)
        else:
            for server, points in todo.items():
                if self._may_go_on(server):
                    with self.failures.of(server=server):
                        begin = time.monotonic()
                        with self._process(server) as running:
                            print(f"{server}: ready after {time.monotonic() - begin:.0f} s", flush=True)
                            self._measure_all(running.url, server, points)
                else:
                    self.left += len(points)
        self._summarize()
        if self.left:
            print(f"left: {self.left} points; the same command with --resume goes on")
        return 1 if self.failures.seen else 3 if self.left else 0

    def _run_together(self, todo: dict[str, list["Point"]]) -> None:
        """The server without LoRA is asked first and last."""
        servers = {server: self._process(server) for server in todo if server != AGAIN}
        begin = time.monotonic()
        with started(servers.values()):
            urls = {}
            for server, process in servers.items():
                with self.failures.of(server=server):
                    self._wait(process)
                    urls[server] = process.url
                    print(f"{server}: ready, {time.monotonic() - begin:.0f} s after the start of all", flush=True)
            for server, points in todo.items():
                url = urls.get("no-lora" if server == AGAIN else server)
                if url is not None:
                    with self.failures.of(server=server):
                        self._measure_all(url, server, points)

    def _wait(self, process: ServerProcess) -> None:
        """One that does not start leaves its memory to the others. Raises StartFailed."""
        try:
            process.wait()
        except StartFailed:
            process.stop()
            raise

    def _may_go_on(self, server: str) -> bool:
        return server == AGAIN or time.monotonic() <= self.end

    def _todo(self, server: str, arm: str) -> list["Point"]:
        """The points of an arm that are still to be measured; those without LoRA in every run."""
        args = self.args
        points = [
            Point(arm, chosen, ratio, batch, prompt, output)
            for chosen in (args.mixes[:1] if arm in BASE_ONLY else args.mixes)
            for ratio in (args.ratios if arm == "block-diagonal" else [None])
            for prompt, output, only in args.lengths
            for batch in ([only] if only else args.batches)
        ]
        if arm == "no-lora":
            return points
        have = {
            (row["arm"], row["mix"], row.get("wanted_ratio"), row["batch"], row["input_len"], row["output_len"])
            for row in self.points
        }
        return [p for p in points if (p.arm, p.mix.text, p.ratio, p.batch, p.prompt, p.output) not in have]

    def write_files(self) -> None:
        """The model and the adapters that the arms need, as far as an earlier run has not left them."""
        keep_model(self.served, self.folder / "model")
        self.ranks: dict[str, int] = {}
        self.paths: dict[str, Path] = {}
        wanted = list(self._adapters(self.args.arms).values())
        for adapter in tqdm(wanted, desc="Writing adapters", unit="adapter", leave=False):
            # A share has its part of the blocks, and of the rank: it is as plain as any where it has one block.
            blocks = None if adapter.ratio is None else self.args.nblocks
            parts = 1 if adapter.ratio is None else self.args.share_of
            local = blocks // parts if blocks and blocks > parts else None
            rank = self._rank(adapter.rank, adapter.ratio) // parts
            folder = self.folder / f"{adapter.name}-nb{blocks or 0}-{self.args.modules}"
            self.ranks[adapter.name] = rank
            self.paths[adapter.name] = keep_adapter(self.served, folder, rank, local, adapter.number, self.modules)

    def _adapters(self, arms: Iterable[str]) -> dict[str, Adapter]:
        """By name, those that servers of these arms have."""
        plain = [None] if set(PLAIN) & set(arms) else []
        ratios = self.args.ratios if set(BLOCK_DIAGONAL) & set(arms) else []
        return {
            adapter.name: adapter
            for chosen in self.args.mixes
            for ratio in (*plain, *ratios)
            for adapter in adapters_of(chosen, ratio)
        }

    def _rank(self, plain_rank: int, ratio: float | None) -> int:
        return rank_of(plain_rank, ratio, self.shape, self.args.nblocks, self.modules)

    def _setup(self, names: list[str]) -> Setup:
        args = self.args
        most = max(prompt * (batch or max(args.batches)) for prompt, _, batch in args.lengths)
        # A server is told no larger rank than it serves: SGLang's own LoRA pads all adapters to it.
        ranks = [rank for name, rank in self.ranks.items() if name in names]
        # Room for every adapter, and what uneven pieces and alignment add.
        pool = sum(bytes_per_rank(self.served, self.paths[name], args.tp) for name in names) * 1.02 + 2**20
        return Setup(
            self.folder / "model",
            str(self.served.dtype).removeprefix("torch."),
            args.tp,
            args.device,
            args.largest,
            max(m.adapters for m in args.mixes) + 1,
            max(ranks, default=1),
            min(most, 16384),
            int(pool),
            self.modules,
            max((batch or args.largest) * (prompt + output) for prompt, output, batch in args.lengths),
            args.together,
            tuple(args.extra_arguments.split()),
        )

    def _process(self, server: str) -> ServerProcess:
        names = list(self._adapters(set(SERVERS[server]) & set(self.args.arms)))
        setup = self._setup(names)
        port = free_port()
        words, environment = command(server, setup, {name: self.paths[name] for name in names}, port)
        log = self.rows.path.with_name(f"{self.rows.path.stem}-{server.replace(' ', '-')}.log")
        return ServerProcess(words, environment, f"http://127.0.0.1:{port}", log, self.args.start_timeout)

    def _measure_all(self, url: str, server: str, points: list["Point"]) -> None:
        for i, point in enumerate(points):
            if not self._may_go_on(server):
                self.left += len(points) - i
                break
            self._measure(url, server, point)

    def _measure(self, url: str, server: str, point: "Point") -> None:
        adapters = [] if point.arm in BASE_ONLY else adapters_of(point.mix, point.ratio)
        names = [adapters[i % len(adapters)].name for i in range(point.batch)] if adapters else None
        firsts, wholes = self._time(url, point.batch, point.prompt, point.output, names)
        first, whole = statistics.median(firsts), statistics.median(wholes)
        row = self.rows.write(
            kind="point", arm=point.arm, server=server, mix=point.mix.text, adapters=len(adapters),
            rank=[self._rank(rank, point.ratio) for rank in point.mix.ranks] if adapters else [],
            params_ratio=self._measured_ratio(point.mix, point.ratio) if adapters else None, wanted_ratio=point.ratio,
            batch=point.batch, input_len=point.prompt, output_len=point.output,
            ttft_ms=first * 1e3, decode_ms=decode_s(first, whole, point.output) * 1e3, e2e_s=whole,
            ttft_ms_each=[one * 1e3 for one in firsts],
            decode_ms_each=[decode_s(*one, point.output) * 1e3 for one in zip(firsts, wholes, strict=True)],
        )  # fmt: skip
        self.points.append(row)
        print(
            f"  {point.arm:<16} {point.mix.text:<10} batch {point.batch:3d}  {point.prompt}/{point.output}  "
            f"decode {row['decode_ms']:7.3f} ms  first token {row['ttft_ms']:8.1f} ms",
            flush=True,
        )

    def _measured_ratio(self, chosen: Mix, ratio: float | None) -> float:
        return params_ratio(chosen, ratio, self.shape, self.args.nblocks, self.modules)

    def _time(
        self, url: str, batch: int, prompt: int, output: int, names: list[str] | None
    ) -> tuple[list[float], list[float]]:
        """Seconds of every repeat until each request has its first token, and until all have ended."""
        rng = random.Random(0)
        return time_batches(
            url,
            lambda: {"input_ids": random_ids(rng, self.served.vocab, batch, prompt)},
            output,
            names,
            self.args.repeats,
        )

    def _summarize(self) -> None:
        print(plot.table(self.points))
        if self.points:
            picture = self.rows.path.with_suffix(".png")
            try:
                plot.draw(self.points, picture)
                print(picture)
            except ImportError as error:
                print(f"no plot ({error}); python -m benchmarks.latency.plot {self.rows.path} draws it elsewhere")
        print(self.rows.path)
