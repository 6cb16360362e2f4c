"""Memory and open files of a server's processes over time, and whether they grow."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil


def sample(pid: int) -> dict:
    """Memory in MiB and open file handles of a process and all its descendants: sums, and both by process.

    private: pages that a process has written and shares with nobody (Private_Dirty and Swap of /proc/PID/smaps_rollup). USS, which
    psutil reports, has unwritten pages of files too: it falls and rises by MiBs when some other Python starts and ends on this machine.
    RSS counts a page that several processes share once for each. handles: files, sockets, pipes (entries of /proc/PID/fd).
    """
    root = psutil.Process(pid)
    sums = {"private_mib": 0.0, "uss_mib": 0.0, "rss_mib": 0.0, "handles": 0}
    by_process: dict[str, float] = {}
    handles: dict[str, int] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            title, rollup = _title(process), Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            open_here = process.num_fds()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
        private = _mib(rollup, "Private_Dirty", "Swap")
        by_process[title] = by_process.get(title, 0.0) + private
        sums["private_mib"] += private
        sums["uss_mib"] += _mib(rollup, "Private_Dirty", "Private_Clean", "Private_Hugetlb")
        sums["rss_mib"] += _mib(rollup, "Rss")
        handles[title] = handles.get(title, 0) + open_here
        sums["handles"] += open_here
    return {**sums, "private_by_process_mib": by_process, "handles_by_process": handles}


def _mib(rollup: str, *fields: str) -> float:
    lines = (line.split() for line in rollup.splitlines()[1:])
    return sum(int(kib) for field, kib, _ in lines if field.rstrip(":") in fields) / 1024


def _title(process: psutil.Process) -> str:
    """SGLang names its processes (`sglang::scheduler_TP0`); of the others the module that they run is enough."""
    name, line = process.name(), " ".join(process.cmdline())
    if name.startswith("sglang"):
        return name
    found = re.search(r"-m (\S+)|(resource_tracker|forkserver)", line)
    return (found[1] or found[2]) if found else name


@dataclass(frozen=True)
class Flatness:
    """Of one series: its unit a minute by least squares after the first quarter, and last quarter's mean against the second's."""

    slope: float
    change_percent: float
    start: float
    end: float

    def flat(self, most_slope: float, most_percent: float) -> bool:
        """Shrinking is flat too."""
        return self.slope <= most_slope and self.change_percent <= most_percent


def flatness(seconds: Sequence[float], values: Sequence[float]) -> Flatness:
    """Judge a series by time; needs two samples in each quarter. Raises ValueError when there are fewer."""
    t, y = np.asarray(seconds, dtype=float), np.asarray(values, dtype=float)
    quarter = np.minimum((t - t[0]) / (t[-1] - t[0]) * 4, 3.999).astype(int) if len(t) > 1 else np.zeros(0, int)
    counts = np.bincount(quarter, minlength=4)
    if counts.min() < 2:
        raise ValueError(f"a series needs two samples in each quarter of the run, there are {counts.tolist()}")
    slope = np.polyfit(t[quarter > 0] / 60, y[quarter > 0], 1)[0]
    second, last = y[quarter == 1].mean(), y[quarter == 3].mean()
    return Flatness(float(slope), float((last / second - 1) * 100), float(second), float(last))
