"""Soak: keep a small server under load while adapters come and go, and check every answer and its memory.

    python -m benchmarks.soak --minutes 10
    python -m benchmarks.soak --minutes 0.5 --adapters 12 --prompts 2     # about a minute in all

Runs on a CPU with a tiny random Llama (float32). All adapters together would fill the LoRA pool three times. Client threads ask for
the base and for adapters by Zipf popularity, in whole, streamed, batched and abandoned requests; client processes with several open
requests are killed; an operator thread loads adapters under new names, puts other adapters under names in use, unloads, loads bad ones
and asks for unknown ones. Every answer has to be the one that the same adapter and prompt got when asked alone before. At the end the
server has to have given everything back. Exit code 0: no failure, and memory and open files flat (judged from 5 minutes on).
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from harness import Server
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar
from zoo import Oracle, write_model

from benchmarks.failures import Failures, run_to_end
from benchmarks.record import RESULTS, Rows
from benchmarks.workload import percentile

from . import memory, plot
from .afterwards import check_empty
from .catalogue import pool_bytes, write_adapters, write_spoiled
from .churn import Operator
from .clients import Client, Tally
from .killer import Killer
from .names import Names
from .references import gather

JUDGED_FROM_S = 300
MOST_CHANGE_PERCENT = 2.0
# Of one series: unit, and the steepest slope per minute.
SERIES = {"private_mib": ("MiB", 2.0), "rss_mib": ("MiB", 2.0), "handles": ("open files", 0.5)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--oversubscribed", type=float, default=3, help="times all adapters fill the pool (default: 3)")
    parser.add_argument("--prompts", type=int, default=5, help="prompts for every adapter (default: 5)")
    parser.add_argument("--clients", type=int, default=6, help="client threads (default: 6)")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the adapters' popularity (default: 1)")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--lora-sharding", choices=("replicated", "s-lora"), default="replicated")
    parser.add_argument("--no-killer", action="store_true", help="no client process is killed")
    parser.add_argument("--no-operator", action="store_true", help="adapters stay as they are loaded at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/soak-<time>.jsonl)")
    args = parser.parse_args(argv)
    if args.adapters < 4 or args.prompts < 1 or args.clients < 1 or args.minutes <= 0 or args.oversubscribed < 1:
        parser.error(
            "--adapters has to be 4 or more, --prompts and --clients 1, --minutes positive, --oversubscribed 1 or more"
        )
    args.output = args.output or RESULTS / time.strftime("soak-%Y%m%dT%H%M%SZ.jsonl", time.gmtime())
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return soak(args, Path(folder))


def soak(args: argparse.Namespace, root: Path) -> int:
    rng = random.Random(args.seed)
    disable_progress_bar()
    print(f"Writing a model and {args.adapters} adapters ...", flush=True)
    model = write_model("llama", root / "model")
    folders = write_adapters(model, root / "adapters", args.adapters)
    spoiled = write_spoiled(folders[0], root / "spoiled")
    pool = pool_bytes(folders, args.tp, args.lora_sharding, args.oversubscribed)
    flags = [
        *("--lora-pool-gb", repr(pool / 2**30), "--lora-sharding", args.lora_sharding, "--max-loras-per-batch", "8"),
        *("--max-lora-rank", "32", "--chunked-prefill-size", "32", "--max-total-tokens", "2048"),
    ]
    rows = Rows(
        args.output, benchmark="soak", model="tiny llama, float32", tp=args.tp, lora_sharding=args.lora_sharding,
        adapters=args.adapters, oversubscribed=args.oversubscribed, clients=args.clients, zipf=args.zipf, seed=args.seed,
    )  # fmt: skip
    print("Starting the server ...", flush=True)
    failures = Failures(rows)
    with failures.of(server="ours"), Server(model, args.tp, args.output.with_suffix(".log"), flags) as server:
        names, tally, end = Names(args.zipf), Tally(), threading.Event()
        for i, place in enumerate(folders):
            response = server.load(f"adapter-{i:02d}", place)
            if response.status_code != 200:
                raise SystemExit(f"loading {place.name} got {response.status_code} {response.text}")
            names.open(f"adapter-{i:02d}", place)
        with tqdm(desc="References", unit=" requests", mininterval=1) as bar:
            references = gather(server, names.folders(), Oracle(model), args.prompts, rng, bar.update)
        print(f"{args.prompts * (args.adapters + 1)} references equal the Transformers + PEFT oracle", flush=True)

        handles_before = memory.sample(server.process.pid)["handles"]
        common = (server.base_url, names, references, tally, end)
        operator = Operator(*common, f"{args.seed} operator", folders, spoiled)
        threads = [Client(*common, f"{args.seed} client {i}") for i in range(args.clients)]
        threads += [] if args.no_killer else [Killer(*common, f"{args.seed} killer")]
        threads += [] if args.no_operator else [operator]
        for thread in threads:
            thread.start()
        samples = watch(server, tally, args.minutes * 60, rows)
        end.set()
        for thread in threads:
            thread.join(90)
            if thread.is_alive():
                tally.fail(f"a {type(thread).__name__} thread has not ended 90 s after the run")
        handles = {"before": handles_before, "after": check_empty(server, operator, handles_before, tally)}
    return 1 if failures.seen else summarize(rows, samples, tally, handles)


def watch(server: Server, tally: Tally, duration: float, rows: Rows) -> list[dict]:
    """A row every 2 seconds, a line every 10."""
    begin, samples, next_line = time.monotonic(), [], 0.0
    while (seconds := time.monotonic() - begin) < duration:
        try:
            pool = server.get("/bdlora/info").json()["pool"]
            usage = memory.sample(server.process.pid)
        except Exception as error:
            tally.fail(f"the server does not tell its state: {error!r}")
            break
        row = {
            "seconds": round(seconds, 1),
            "requests": tally.counts["requests"],
            "failures": tally.counts["failures"],
            "refused_as_expected": tally.counts["refused_as_expected"],
            "loaded": tally.counts["loaded"],
            "unloaded": tally.counts["unloaded"],
            "clients_killed": tally.counts["clients_killed"],
            "pool_loads": pool["loads"],
            "pool_evictions": pool["evictions"],
            "pool_resident": pool["resident_adapters"],
            **usage,
        }
        samples.append(rows.write(kind="sample", **row))
        if seconds >= next_line:
            next_line += 10
            print(
                f"{seconds:5.0f} s  {row['requests']:6d} requests  {row['refused_as_expected']:4d} refused as expected  "
                f"{row['failures']:3d} failures  {pool['loads']:6d} pool loads  {pool['resident_adapters']:3d} resident  "
                f"{row['clients_killed']:4d} killed  private {usage['private_mib']:7.1f} MiB  {usage['handles']:4d} open files",
                flush=True,
            )
        time.sleep(max(0.0, 2 * len(samples) - (time.monotonic() - begin)))
    return samples


def summarize(rows: Rows, samples: list[dict], tally: Tally, handles: dict[str, int]) -> int:
    seconds = [row["seconds"] for row in samples]
    series, verdicts = {}, []
    for name, (_, most_slope) in SERIES.items():
        try:
            series[name] = memory.flatness(seconds, [row[name] for row in samples])
        except ValueError as error:
            print(error)
            continue
        verdicts.append(series[name].flat(most_slope, MOST_CHANGE_PERCENT))
    judged = bool(seconds) and seconds[-1] >= JUDGED_FROM_S - 10
    passed = (
        not tally.counts["failures"]
        and bool(samples)
        and (not judged or (len(verdicts) == len(SERIES) and all(verdicts)))
    )
    summary = {
        **tally.counts,
        "failures": tally.counts["failures"],
        "failure_messages": tally.failures,
        "largest_logprob_difference": tally.worst,
        "request_seconds": {f"p{p}": percentile(tally.seconds, p) for p in (50, 99)},
        "pool_loads": samples[-1]["pool_loads"] if samples else None,
        "pool_evictions": samples[-1]["pool_evictions"] if samples else None,
        "seconds": seconds[-1] if seconds else 0,
        "handles_idle": handles,
        "flatness": {name: vars(flat) for name, flat in series.items()},
        "flatness_judged": judged,
        "passed": passed,
    }
    rows.write(kind="summary", **summary)
    picture = rows.path.with_suffix(".png")
    if samples:
        plot.draw(samples, picture)
    print("\nSummary")
    for name, value in summary.items():
        if name not in ("failure_messages", "flatness"):
            print(f"  {name}: {value}")
    for name, flat in series.items():
        unit, most_slope = SERIES[name]
        print(
            f"  {name}: {flat.slope:+.2f} {unit} a minute after the first quarter (at most {most_slope}), second quarter "
            f"{flat.start:.1f}, last quarter {flat.end:.1f} ({flat.change_percent:+.2f} %, at most {MOST_CHANGE_PERCENT})"
            f"{'' if judged else '; too short to judge'}"
        )
    for message in tally.failures:
        print(f"  FAILURE {message}")
    print(f"  {rows.path}\n  {picture}\n{'PASSED' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(run_to_end(main))
