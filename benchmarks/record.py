"""Machine-readable results: one JSON object a line, written as soon as it is known."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("sglang", "torch", "triton", "transformers")


def origin() -> dict:
    """What every row has to say about where it comes from: run id, commit, machine and versions."""
    return {
        "run": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
        "commit": _commit(),
        "gpu": gpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def gpu_name() -> str | None:
    """The first GPU's name by the driver's own tool, without making a CUDA context; None without one."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0] if names else None


class Rows:
    """Appends rows to a file, each with the run's origin; what is written survives a run that is cut off."""

    def __init__(self, path: Path, **common):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._common = {**origin(), **common}

    def write(self, **fields) -> dict:
        row = {**self._common, **fields}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
        return row


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def points_to_draw(
    benchmark: str, description: str, argv: Sequence[str] | None, check: Callable[[list[dict]], object] | None = None
) -> tuple[Path, list[dict]]:
    """The command line of a benchmark's plot: the file that it names, and its rows of kind "point".

    check: raises ValueError for points that one picture cannot show. Ends the process, with a line that names the file, where there is
    nothing to draw.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}.plot",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help=f"rows of benchmarks.{benchmark}; the picture goes beside them"
    )
    file = parser.parse_args(argv).file
    try:
        points = [row for row in read_rows(file) if (row.get("benchmark"), row.get("kind")) == (benchmark, "point")]
        if not points:
            raise ValueError(f"rows of benchmarks.{benchmark} are needed, with points")
        if check is not None:
            check(points)
    except OSError as error:
        parser.error(str(error))
    except ValueError as error:
        parser.error(f"{file}: {error}")
    return file, points


def _commit() -> str | None:
    """Short commit id, with "+" when tracked files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
