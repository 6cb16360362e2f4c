"""What many registered adapters cost a server: its start and the lists that name them all.

    python -m benchmarks.registered --adapters 1000     # 2 cores, no GPU; about a minute
    python -m benchmarks.registered --adapters 20       # tries the benchmark itself

A tiny random Llama on the CPU, TP 1; every name stands for the same directory, in a pool that holds 20 of them. Routes are asked as the
administrator and as a tenant that sees one adapter: the least of 20 times each, because what disturbs a time only adds to it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks import files
from benchmarks.failures import Failures, run_to_end
from benchmarks.record import RESULTS, Rows
from sgl_bdlora.server_process import ServerProcess, free_port

ADMIN, TENANT = "the administrator's key", "the key of a tenant"
ROUTES = {
    "/v1/models": (ADMIN, TENANT),
    "/bdlora/info": (ADMIN, TENANT),
    "/bdlora/info?limit=20": (ADMIN,),
    "/metrics": (ADMIN,),
}
REPEATS = 20
START_S = 600


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.registered",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=RESULTS / "registered-cpu.jsonl")
    args = parser.parse_args(argv)
    if args.adapters < 1:
        parser.error("--adapters has to be 1 or more")
    rows = Rows(args.output, benchmark="registered", model=files.TINY.name, adapters=args.adapters)
    failures = Failures(rows)
    with tempfile.TemporaryDirectory(prefix="registered-") as folder, failures.of(server="ours"):
        command = _command(Path(folder), args.adapters)
        url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
        begun = time.monotonic()
        with ServerProcess(command, {}, url, rows.path.with_suffix(".log"), START_S):
            seconds = time.monotonic() - begun
            rows.write(kind="start", seconds=round(seconds, 1))
            print(f"{'start':24s} {seconds:8.1f} s")
            for route, keys in ROUTES.items():
                for key in keys:
                    milliseconds, size = _ask(url + route, key)
                    who = "tenant" if key == TENANT else "administrator"
                    rows.write(kind="route", route=route, who=who, milliseconds=round(milliseconds, 1), bytes=size)
                    print(f"{route:24s} {milliseconds:8.1f} ms {size:9d} bytes  {who}")
    return 1 if failures.seen else 0


def _command(folder: Path, count: int) -> list[str]:
    model = files.write_model(files.TINY, folder / "model")
    adapter = files.write_adapter(files.TINY, folder / "adapter", rank=8, nblocks=2, seed=0)
    tenants = folder / "tenants.yaml"
    tenants.write_text(f"tenants: {{one: {{key: {TENANT}, adapters: [a{count - 1:06}]}}}}\n")
    pool_gib = 20 * files.bytes_per_rank(files.TINY, adapter, 1) / 2**30
    return [
        sys.executable, "-m", "sgl_bdlora.launch_server", "--model-path", str(model), "--skip-tokenizer-init", "--dtype", "float32",
        "--port", str(free_port()), "--max-total-tokens", "4096", "--enable-metrics", "--lora-pool-gb", repr(pool_gib),
        "--tenants", str(tenants), "--admin-api-key", ADMIN, "--lora-paths", *(f"a{i:06}={adapter}" for i in range(count)),
    ]  # fmt: skip


def _ask(url: str, key: str) -> tuple[float, int]:
    """(least milliseconds, bytes of the answer). Raises httpx.HTTPStatusError for any answer but success."""
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        response = httpx.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        taken.append(time.perf_counter() - begun)
        response.raise_for_status()
    return 1000 * min(taken), len(response.content)


if __name__ == "__main__":
    sys.exit(run_to_end(lambda: main(sys.argv[1:])))
