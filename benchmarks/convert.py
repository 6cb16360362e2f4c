"""How long `python -m sgl_bdlora.adapters convert` takes, and how much memory, for an adapter of real size.

    python -m benchmarks.convert [--rank 64] [--nblocks 8] [--output FILE]

A random plain LoRA of Llama-3.1-8B's shape (seven modules, 32 layers, bfloat16) is written once, then converted by a process of its own,
read and written through the file system: seconds from start to exit, the most memory that was resident (pages of the mapped source
file count), and the fit's error, which for random factors is as large as it gets: their singular values are nearly equal.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.failures import run_to_end
from benchmarks.files import LLAMA_8B, write_adapter
from benchmarks.record import RESULTS, Rows
from sgl_bdlora.server_process import end_group


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Time and memory of a conversion.")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--nblocks", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS / "convert-cpu.jsonl")
    args = parser.parse_args(argv)
    rows = Rows(args.output, benchmark="convert", model=LLAMA_8B.name, rank=args.rank, nblocks=args.nblocks)
    with tempfile.TemporaryDirectory(prefix="convert-") as folder:
        source = write_adapter(LLAMA_8B, Path(folder, "plain"), args.rank, None, seed=0)
        fitted = Path(folder, "fitted")
        commands = {
            "convert": ("convert", source, fitted, "--nblocks", args.nblocks),
            "convert, exact": (
                "convert", source, Path(folder, "exact"), "--nblocks", args.nblocks, "--rank", args.nblocks * args.rank,
            ),
            "convert --dense": ("convert", fitted, Path(folder, "dense"), "--dense"),
            "re-block, half": ("re-block", fitted, Path(folder, "half"), "--nblocks", args.nblocks // 2),
            "validate": ("validate", fitted, "--tp", args.nblocks),
        }  # fmt: skip
        for name, command in commands.items():
            seconds, peak, found = _run([str(word) for word in command])
            row = rows.write(
                command=name,
                seconds=round(seconds, 1),
                peak_gib=round(peak / 2**30, 2),
                parameters_before=found.get("parameters_before"),
                parameters=found.get("parameters"),
                relative_error=found.get("relative_error"),
            )
            print(f"{name}: {row['seconds']} s, {row['peak_gib']} GiB, relative error {row['relative_error']}")
    return 0


# A process's peak begins with its parent's size (Linux, at exec), so a small one stands between this one and the command.
_WATCH = """
import json, resource, subprocess, sys, time
start = time.monotonic()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([done.returncode, time.monotonic() - start, peak, done.stdout.decode()]))
"""


def _run(command: list[str]) -> tuple[float, int, dict]:
    """Seconds, peak resident bytes and the JSON that the command printed. Its progress bar stays visible."""
    words = [sys.executable, "-m", "sgl_bdlora.adapters", *command, "--json"]
    code, seconds, peak, out = _watched(words)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with code {code}")
    return seconds, peak, json.loads(out)


def _watched(words: list[str]) -> tuple[int, float, int, str]:
    """Exit code, seconds, peak resident bytes and output of a command, which ends with this process."""
    process = subprocess.Popen([sys.executable, "-c", _WATCH, *words], stdout=subprocess.PIPE, start_new_session=True)
    try:
        found, _ = process.communicate()
    except BaseException:
        end_group(process)
        raise
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} could not be watched: code {process.returncode}")
    return tuple(json.loads(found))


if __name__ == "__main__":
    sys.exit(run_to_end(lambda: main(sys.argv[1:])))
