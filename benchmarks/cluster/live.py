"""The simulator against a real cluster: fit the costs of its replicas from a profile, replay one trace on both, compare the medians.

    python -m benchmarks.cluster.live              # two replicas on CPUs, about 6 minutes on 2 cores

Starts `python -m sgl_bdlora.cluster serve` with a Llama of 25 million parameters. Both replicas are profiled together, each with the
same work, since on one machine they share what is not their own core: the front, Ray and the client.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np
import torch
import yaml

from benchmarks.cluster.client import client, replay, send
from benchmarks.failures import run_to_end
from benchmarks.files import Shape, write_adapter, write_model
from benchmarks.record import RESULTS, Rows
from sgl_bdlora.cluster.config import load_config
from sgl_bdlora.cluster.costs import Costs, fit
from sgl_bdlora.cluster.serving.catalog import read_catalog
from sgl_bdlora.cluster.simulate import simulate
from sgl_bdlora.cluster.trace import Trace, make_trace
from sgl_bdlora.server_process import free_port

SHAPE = Shape("llama of 25M parameters", 512, 1376, 8, 8, 8, 512, torch.float32, 64)
RANKS = (4, 8, 16, 32)
ADAPTERS = 24
SECONDS_TO_START = 200
# Distinct requests of a batch, and adapters among them, for decode steps; prompt lengths for prefills.
DECODE = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (8, 4), (8, 8))
PREFILL = (16, 64, 128, 256)
DECODE_TOKENS = 24


def configuration(folder: Path, costs: str, args: argparse.Namespace) -> dict:
    workload = {
        "rate": args.rate, "duration_s": args.seconds, "warmup_s": args.seconds / 5, "zipf": 0.8, "rotate_s": args.seconds / 3,
        "rotate_by": 0.2,
        "prompt_median": 64, "prompt_sigma": 0.4, "output_median": 24, "output_sigma": 0.4, "max_prompt": 256, "max_output": 64,
    }  # fmt: skip
    return {
        "replicas": {"count": 2, "gpus": 1, "pool_gib": 0.5, "host_gib": 1.0, "max_rank": 64, "max_running": 16, "prefill_tokens": 2048},
        "slo": {"ttft_ms": 3000, "tpot_ms": 400}, "workload": workload, "costs": costs,
        "policy": {"name": "rank-packing", "period_s": 5, "max_moves": 6},
        "serve": {
            "model": str(folder / "model"), "adapter_root": str(folder / "adapters"), "name": "base", "device": "cpu", "cpus": 1,
            "port": args.port, "store_gib": 0.3, "arguments": ["--dtype", "float32", "--skip-tokenizer-init", "--disable-radix-cache"],
        },
    }  # fmt: skip


def write_files(folder: Path) -> None:
    write_model(SHAPE, folder / "model")
    for i in range(ADAPTERS):
        write_adapter(SHAPE, folder / "adapters" / f"a{i}", RANKS[i % len(RANKS)], None, seed=i)


class Running:
    """The cluster's process; leaving ends it."""

    def __init__(self, folder: Path, config: dict):
        self._log, file = folder / "cluster.log", folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(config))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sgl_bdlora.cluster", "serve", "--config", str(file)], stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            )  # fmt: skip

    def __enter__(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while "The cluster is ready" not in self._log.read_text():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise SystemExit(f"the cluster did not start:\n{self._log.read_text()}")
            time.sleep(0.5)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


async def profile(http: httpx.AsyncClient, ranks: dict[str, int], repeats: int) -> tuple[list[dict], list[dict]]:
    """Rows for costs.fit(): decode steps and prefills, the same on both replicas at once."""
    status = (await http.get("/cluster/status")).json()
    names = [r["name"] for r in status["replicas"]]
    alone = {n: sorted(a["name"] for a in status["adapters"] if list(a["shares"]) == [n]) for n in names}
    least = min(map(len, alone.values()))
    if least < 8:
        raise SystemExit(f"only {least} adapters live on one replica alone; the profile needs 8")
    for adapter in itertools.chain.from_iterable(alone.values()):
        await send(http, adapter, 8, 2, SHAPE.vocab)
    decode, prefill = [], []
    for _ in range(repeats):
        for batch, distinct in DECODE:
            chosen = {n: alone[n][:distinct] for n in names}
            asks = [
                send(http, chosen[n][i % distinct], 16, DECODE_TOKENS, SHAPE.vocab) for n in names for i in range(batch)
            ]
            ms = [1000 * s.tpot for s in await asyncio.gather(*asks)]
            used = [ranks[a] for n in names for a in chosen[n]]
            row = {"batch": batch, "rows": sum(used) / len(names), "width": max(used), "ms": statistics.median(ms)}
            decode.append(row)
        for tokens in PREFILL:
            for place in (0, 4):
                asks = [send(http, alone[n][place], tokens, 1, SHAPE.vocab) for n in names]
                ms = [1000 * s.ttft for s in await asyncio.gather(*asks)]
                rank = sum(ranks[alone[n][place]] for n in names) / len(names)
                prefill.append(
                    {"tokens": tokens, "token_ranks": tokens * rank, "width": rank, "ms": statistics.median(ms)}
                )
    return decode, prefill


async def measure(url: str, ranks: dict[str, int], trace: Trace, names: Sequence[str], repeats: int):
    async with client(url) as http:
        rows = await profile(http, ranks, repeats)
        sent = await replay(http, trace, names, SHAPE.vocab)
        return rows, sent, (await http.get("/cluster/status")).json()


def compare(kind: str, real: Sequence[float], simulated: Sequence[float], rows: Rows, **labels) -> None:
    real, simulated = (np.array([v for v in values if np.isfinite(v)]) for values in (real, simulated))
    for q in (50, 95):
        a, b = np.percentile(real, q), np.percentile(simulated, q)
        rows.write(
            metric=kind,
            percentile=q,
            real_ms=float(a),
            simulated_ms=float(b),
            off=float(b / a - 1),
            requests=len(real),
            **labels,
        )
        print(f"{kind} P{q}: real {a:.1f} ms, simulated {b:.1f} ms, {100 * (b / a - 1):+.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster.live",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rate", type=float, default=2.0, help="requests/s (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=90.0, help="length of the trace (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of the profile (default: %(default)s)")
    parser.add_argument("--port", type=int, default=free_port())
    parser.add_argument("--output", type=Path, default=RESULTS / "cluster-live-cpu.jsonl")
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory(prefix="bdlora-live-") as name:
        folder = Path(name)
        write_files(folder)
        # What the real cluster plans with before its costs are known: in proportion, which is all that a table needs.
        guess = Costs("guess", 10, 1, 1, 0.01, 0, 20, 0.3, 0, 0, 0)
        (folder / "costs.json").write_text(json.dumps(asdict(guess)))
        config = configuration(folder, str(folder / "costs.json"), args)
        with Running(folder, config):
            made = load_config(folder / "cluster.yaml")
            catalog = read_catalog(made.serve.adapter_root)
            adapters = tuple(entry.adapter for entry in catalog.values())
            trace = make_trace(made.workload, len(adapters))
            ranks, names = {a.name: a.rank for a in adapters}, [a.name for a in adapters]
            url = f"http://127.0.0.1:{args.port}"
            (decode, prefill), sent, status = asyncio.run(measure(url, ranks, trace, names, args.repeats))
        costs = fit("live", decode, prefill, "benchmarks.cluster.live, both replicas busy, through the front")
        (folder / "costs.json").write_text(json.dumps(asdict(costs)))
        used = made.with_(adapters={"count": len(adapters), "ranks": {r: 1.0 for r in ranks.values()}})
        result = simulate(used, trace=trace, adapters=adapters)
    args.output.unlink(missing_ok=True)
    rows = Rows(args.output, benchmark="cluster-live")
    for kind, profiled in (("decode", decode), ("prefill", prefill)):
        for row in profiled:
            guess_ms = costs.decode(row["batch"], row["rows"], row["width"]) if kind == "decode" else costs.prefill(
                row["tokens"], row["token_ranks"], row["width"]
            )  # fmt: skip
            rows.write(profile=kind, fitted_ms=float(guess_ms), **row)
    rows.write(
        costs=asdict(costs), cold_loads=status["cold_loads"], moves=status["moves"], most_moves=status["most_moves"]
    )
    counted = result.counted
    real = [s for s, after in zip(sent, counted, strict=True) if after]
    print(f"{len(sent)} requests, {sum(not s.ok for s in sent)} without a whole answer; costs {asdict(costs)}")
    labels = {
        "rate": args.rate,
        "lost": sum(not s.ok for s in sent),
        "busy": float((result.busy_s / result.ends_at).mean()),
    }
    compare("ttft", [1000 * s.ttft for s in real], result.ttft_ms(), rows, **labels)
    tpot = [ms for ms, n in zip(result.tpot_ms(), trace.output[counted], strict=True) if n > 1]
    compare("tpot", [1000 * s.tpot for s in real if s.tpot is not None], tpot, rows, **labels)


if __name__ == "__main__":
    sys.exit(run_to_end(main))
