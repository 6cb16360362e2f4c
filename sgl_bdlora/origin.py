"""Where numbers come from: the machine, the package's version and, in a checkout, its commit."""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from sgl_bdlora import __version__


def hardware(device: str) -> dict:
    """device: "cuda" or "cpu". Name of one device, and how many cores this process may use."""
    if device == "cpu":
        name = _cpu_name()
    else:
        import torch

        name = torch.cuda.get_device_name()
    return {"device": device, "name": name, "cores": len(os.sched_getaffinity(0))}


@cache
def version() -> dict:
    """{"version", "commit"}: the commit is None outside a checkout and ends in "+" when tracked files differ from it."""
    return {"version": __version__, "commit": _commit()}


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
