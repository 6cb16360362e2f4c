"""A real cluster of two replicas under every policy: the same traces, one start of the servers.

    python -m benchmarks.cluster.policies --costs ours-costs.json           # 2 GPUs, Llama-3.1-8B shape, TP 1 each, about 5 minutes
    python -m benchmarks.cluster.policies --output rows.jsonl --resume      # goes on with the points that the file has not
    python -m benchmarks.cluster.policies --simulate rows.jsonl --costs ours-costs.json     # simulator against those rows; no GPU
    python -m benchmarks.cluster.policies --device cpu --tiny               # tries the benchmark itself, about 3 minutes on 2 cores

Clients stream over HTTP through the cluster's front. Of every answer the server sends only the first token and the last message
(`stream_interval` of the request), so that neither front nor client is what is measured: the time to the first token has everything in it
that a client waits for, loads of adapters too; the time per token is that between the two messages by the tokens between. Before each point
replicas unload every adapter, the controller forgets the demand, and each adapter answers one request, where the policy sends it, as in the
simulator; loads are counted from there. Rows are appended as points are done, all policies at one rate before the next rate. A point before
which the cluster does not come to rest is left out, with the reason, and the next one is tried; --within ends a run in time.
"""

import argparse
import asyncio
import math
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import httpx

from benchmarks.cluster.client import Sent, client, replay, send
from benchmarks.cluster.compared import ASKED, DRAIN_S, against_simulator, point, table
from benchmarks.failures import run_to_end
from benchmarks.files import LLAMA_8B, MODULES, TINY, Shape, folder_of, keep_adapter, keep_model
from benchmarks.record import RESULTS, Rows, gpu_name, read_rows
from sgl_bdlora.cluster.config import ClusterConfig, from_dict
from sgl_bdlora.cluster.policies import NAMES
from sgl_bdlora.cluster.serving.catalog import read_catalog
from sgl_bdlora.cluster.trace import make_trace
from sgl_bdlora.server_process import free_port

# Rank to adapters: 3.3 GiB with the 8B shape, of which a replica's pool of 2 GiB holds the half and not all.
ADAPTERS = {8: 24, 16: 8, 32: 4, 64: 2, 128: 1}
TINY_ADAPTERS = {4: 6, 8: 3, 32: 2, 64: 1}
# A message after the first only at the end.
INTERVAL = 1 << 20
# Until the cluster has unloaded everything, and how often it is asked to: a plan of the last trace may still load something.
CLEAR_S, CLEARINGS = 7.0, 3
# Adapters asked for at once when all are loaded: more would only wait in the replicas.
TOUCHED = 8
# Until what replicas have counted is in the status.
REPORTED_S = 1.2


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--policies", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}")
    add("--rates", type=float, nargs="+", help="requests/s over the cluster (default: 24 40; tiny 2 4)")
    add("--seconds", type=float, default=8.0, help="length of a trace; the first quarter is not counted (default: 8)")
    add(
        "--costs",
        default="bdlora",
        help="cost model that policies and the simulator use, as `costs:` (default: bdlora)",
    )
    add("--device", choices=("gpu", "cpu"), default="gpu")
    add("--tiny", action="store_true", help="a tiny model in place of the 8B one")
    add("--pool-gib", type=float, help="device memory for adapters of a replica (default: 2; tiny 0.002)")
    add("--seed", type=int, default=0)
    add("--extra-arguments", default="", metavar="WORDS", help="further arguments of the servers, one string")
    add(
        "--files", type=Path, help="where model and adapters are kept for the next run (default: a temporary directory)"
    )
    add("--output", type=Path, help="results file (default: benchmarks/results/policies-<time>.jsonl)")
    add("--within", type=float, default=math.inf, metavar="SECONDS", help="begin no point that might not end by then")
    add("--resume", action="store_true", help="skip the points that --output has")
    add("--simulate", type=Path, metavar="ROWS", help="measure nothing: simulate that file's points and compare")
    add("--names", nargs="+", default=(), help="with --simulate: the replicas' ids, where the rows have none")
    args = parser.parse_args(argv)
    args.rates = args.rates or ([2.0, 4.0] if args.tiny else [24.0, 40.0])
    args.output = args.output or RESULTS / time.strftime("policies-%Y%m%dT%H%M%SZ.jsonl", time.gmtime())
    if not args.simulate and args.device == "gpu" and gpu_name() is None:
        parser.error("there is no NVIDIA GPU here; say --device cpu --tiny to try the benchmark without one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.simulate:
        show(args.simulate, args.costs, args.names)
        return 0
    with tempfile.TemporaryDirectory(prefix="policies-") as name:
        shape, ranks = (TINY, TINY_ADAPTERS) if args.tiny else (LLAMA_8B, ADAPTERS)
        folder = folder_of(shape, args.files or Path(name))
        write_files(shape, ranks, folder)
        settings = settings_of(args, shape, folder)
        run = Run(args, from_dict(settings), settings, shape)
        return run.whole()


def show(path: Path, costs: str, names: Sequence[str] = ()) -> None:
    rows = read_rows(path)
    print(table([row for row in rows if row["kind"] == "point"]))
    print(against_simulator(rows, costs, names))
    print(path, flush=True)


def write_files(shape: Shape, ranks: dict[int, int], folder: Path) -> None:
    """Adapters of one rank have the same weights, in one file with several names."""
    keep_model(shape, folder / "model")
    for rank, count in ranks.items():
        first = keep_adapter(shape, folder / "adapters" / f"r{rank}-0", rank, None, seed=rank)
        for i in range(1, count):
            other = folder / "adapters" / f"r{rank}-{i}"
            other.mkdir(exist_ok=True)
            for file in first.iterdir():
                if not (other / file.name).exists():
                    os.link(file, other / file.name)


def settings_of(args: argparse.Namespace, shape: Shape, folder: Path) -> dict:
    """The cluster's configuration, as its YAML file would have it."""
    tiny, words = (
        args.tiny,
        ["--skip-tokenizer-init", "--disable-radix-cache", "--dtype", str(shape.dtype).removeprefix("torch.")],
    )
    words += ["--lora-target-modules", *MODULES]
    if args.device == "cpu":
        words += ["--max-total-tokens", "16384"]
    else:
        words += [
            "--grammar-backend",
            "none",
            "--cuda-graph-max-bs-decode",
            "32",
            "--cuda-graph-max-bs-prefill",
            "2048",
        ]
    lengths = {
        "prompt_median": 32 if tiny else 512, "prompt_sigma": 0.5, "max_prompt": 128 if tiny else 2048,
        "output_median": 8 if tiny else 64, "output_sigma": 0.6, "max_output": 24 if tiny else 256,
    }  # fmt: skip
    return {
        "replicas": {
            "count": 2, "gpus": 1, "pool_gib": args.pool_gib or (0.002 if tiny else 2.0), "host_gib": 1.0 if tiny else 16.0,
            "max_rank": 64 if tiny else 128, "max_running": 8 if tiny else 32,
        },
        "slo": {"ttft_ms": 2000 if tiny else 500, "tpot_ms": 400 if tiny else 30},
        "policy": {"period_s": 3, "max_moves": 6},
        "workload": {
            "rate": args.rates[0], "duration_s": args.seconds, "warmup_s": args.seconds / 4, "zipf": 0.8, "seed": args.seed,
            "rotate_s": args.seconds / 2, "rotate_by": 0.2, **lengths,
        },
        "costs": args.costs,
        "serve": {
            "model": str(folder / "model"), "adapter_root": str(folder / "adapters"), "name": "base", "device": args.device,
            "port": free_port(), "cpus": 1 if args.device == "cpu" else 8, "store_gib": 0.3 if tiny else 4.0,
            "arguments": [*words, *args.extra_arguments.split()],
        },
    }  # fmt: skip


class Run:
    """The cluster in this process's main thread, its clients in another."""

    def __init__(self, args: argparse.Namespace, config: ClusterConfig, settings: dict, shape: Shape):
        self.args, self.config, self.shape = args, config, shape
        self.adapters = tuple(entry.adapter for entry in read_catalog(config.serve.adapter_root).values())
        done = read_rows(args.output) if args.resume and args.output.exists() else []
        self.done = {(row["policy"], row["rate"]) for row in done if row["kind"] == "point"}
        self.ended, self.failed = threading.Event(), False
        self.began = time.monotonic()
        self.rows = Rows(args.output, benchmark="policies", device=args.device, model=shape.name, seconds=args.seconds)
        shown = {key: value for key, value in settings.items() if key not in ("serve", "costs")}
        self.rows.write(
            kind="setup", settings=shown, arguments=settings["serve"]["arguments"], planned_with=args.costs,
            adapters=[asdict(a) for a in self.adapters],
        )  # fmt: skip

    def whole(self) -> int:
        from sgl_bdlora.cluster.serving.launch import ClusterFailed, serve_cluster, url

        measuring = threading.Thread(target=self._measure, args=(url(self.config),), daemon=True)

        def say(words: str) -> None:
            self._say(words)
            if words.startswith("The cluster is ready"):
                measuring.start()

        try:
            serve_cluster(self.config, say, self.ended)
        except (ClusterFailed, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 1 if self.failed else 0

    def _measure(self, url: str) -> None:
        try:
            asyncio.run(self._points(url))
            # Before the cluster stops, which can take half a minute.
            show(self.args.output, self.args.costs)
        except Exception:
            self.failed = True
            traceback.print_exc()
        finally:
            self.ended.set()

    def _say(self, words: str) -> None:
        print(f"{time.monotonic() - self.began:4.0f} s: {words}", flush=True)

    async def _points(self, url: str) -> None:
        names = [a.name for a in self.adapters]
        async with client(url) as http:
            # Not counted: what servers compile when they are asked first, and when batches are large first.
            await self._touch(http, names)
            await self._replay(http, names, max(self.args.rates))
            self._say("servers are warm")
            longest = 0.0
            for rate in self.args.rates:
                for policy in self.args.policies:
                    began = time.monotonic()
                    if self.ended.is_set() or (policy, rate) in self.done:
                        continue
                    if began + longest - self.began > self.args.within:
                        self._say(
                            f"{policy} at {rate:g}: left out, --within {self.args.within:g} is over; --resume goes on"
                        )
                        continue
                    await self._point(http, names, policy, rate)
                    longest = max(longest, time.monotonic() - began)

    async def _touch(self, http: httpx.AsyncClient, names: list[str]) -> None:
        """Each adapter answers one request, where the policy sends it."""
        began, places = time.monotonic(), asyncio.Semaphore(TOUCHED)

        async def one(name: str) -> Sent:
            async with places:
                return await send(http, name, *ASKED, self.shape.vocab)

        sent = await asyncio.gather(*(one(name) for name in names))
        lost = [name for name, answer in zip(names, sent, strict=True) if not answer.ok]
        size, seconds = sum(a.size for a in self.adapters), time.monotonic() - began
        self._say(
            f"{len(names)} adapters, {size / 1e6:.0f} MB, loaded in {seconds:.1f} s"
            + f"; no answer: {lost}" * bool(lost)
        )

    async def _replay(self, http: httpx.AsyncClient, names: list[str], rate: float) -> list[Sent]:
        trace = make_trace(self.config.with_(workload={"rate": rate}).workload, len(names))
        # Every point asks for the same prompts.
        random.seed(self.args.seed)
        return await replay(http, trace, names, self.shape.vocab, INTERVAL, DRAIN_S)

    async def _point(self, http: httpx.AsyncClient, names: list[str], policy: str, rate: float) -> None:
        before = await self._fresh(http, policy)
        if before is None:
            self.failed = True
            return
        await self._touch(http, names)
        sent = await self._replay(http, names, rate)
        await asyncio.sleep(REPORTED_S)
        after = (await http.get("/cluster/status")).json()
        config = self.config.with_(workload={"rate": rate})
        row = self.rows.write(
            kind="point", policy=policy, rate=rate, **point(sent, config, len(names)),
            cold_loads={k: after["cold_loads"][k] - before["cold_loads"][k] for k in after["cold_loads"]},
            bytes_moved=sum(after["bytes_moved"].values()) - sum(before["bytes_moved"].values()),
            moves=after["moves"] - before["moves"], replicas=[r["id"] for r in after["replicas"]],
            received=[b["received"] - a["received"] for a, b in zip(before["replicas"], after["replicas"], strict=False)],
        )  # fmt: skip
        self._say(table([row], head=False))

    async def _fresh(self, http: httpx.AsyncClient, policy: str) -> dict | None:
        """The status once the cluster plans by this policy and no replica has an adapter or a request; None if it does not come to that."""
        from sgl_bdlora.cluster.serving import follower

        for _ in range(CLEARINGS):
            await asyncio.wrap_future(follower.controller().use_policy.remote(policy).future())
            deadline = time.monotonic() + CLEAR_S
            while True:
                status = (await http.get("/cluster/status")).json()
                busy = [r for r in status["replicas"] if r["loaded"] or r["loading"] or r["running"]]
                if status["policy"] == policy and not busy:
                    return status
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.2)
        shown = [
            f"{r['name']} runs {r['running']} requests, has {r['loaded']} and is loading {r['loading']}" for r in busy
        ]
        problem = "; ".join(shown) or f"the controller still plans by {status['policy']}"
        self._say(f"{policy}: left out, not at rest {CLEARINGS} times {CLEAR_S:g} s after it was chosen: {problem}")
        return None


if __name__ == "__main__":
    sys.exit(run_to_end(main))
