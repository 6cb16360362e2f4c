"""Environment variables that a CPU-only server and every process it starts need."""

import importlib.util
import os
import sys
from pathlib import Path

from sgl_bdlora.cpu.detect import STUBS, applies
from sgl_bdlora.demo_model import cache_directory

# SGLang tries NCCL wherever its library is installed, also for CPU tensors
# (distributed/device_communicators/pynccl.py). A path to no file switches it off.
NO_NCCL = str(STUBS / "no-nccl.so")


def prepare_environment() -> None:
    """Make `import sglang` and its child processes work here. Call it before importing sglang; calling again is free.

    Values that the user has set are kept.
    """
    if not applies():
        return
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", NO_NCCL)
    # The wheel's sgl_kernel needs libcuda.so.1 to import. Processes started later import SGLang before any plugin
    # runs, so the stand-in travels by PYTHONPATH.
    _prepend("PYTHONPATH", str(STUBS))
    if str(STUBS) not in sys.path:
        sys.path.insert(0, str(STUBS))
    # Waiting OpenMP threads give up the core at once instead of spinning: ranks share cores here.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # numpy's BLAS and the tokenizer start a thread per core in each process and do nothing that needs one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # SGLang decorates three small functions of every forward pass with torch.compile, which calls a C++ compiler in
    # each rank during the first request (half a minute) and gains nothing measurable here.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    _keep_bytecode()


def _keep_bytecode() -> None:
    """Let Python cache bytecode where it has been told not to and the installation has none.

    SGLang imports about 7000 modules; compiling them takes longer than running them (25 of 38 s of CPU time a
    process). The files go to the user's cache folder, not beside the sources.
    """
    spec = importlib.util.find_spec("torch")
    if not sys.dont_write_bytecode or spec is None or Path(importlib.util.cache_from_source(spec.origin)).exists():
        return
    sys.dont_write_bytecode = False
    sys.pycache_prefix = sys.pycache_prefix or str(cache_directory() / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix


def bind_threads(tp_size: int) -> None:
    """Divide the cores this process may use among *tp_size* ranks, unless the user has."""
    cores = sorted(os.sched_getaffinity(0))
    _choose("SGLANG_CPU_OMP_THREADS_BIND", thread_binding(tp_size, cores))
    _choose("OMP_NUM_THREADS", str(max(1, len(cores) // tp_size)))


_chosen: dict[str, str] = {}


def _choose(variable: str, value: str) -> None:
    """Set *variable* unless the user has; what an earlier engine of this process chose is not the user's."""
    if os.environ.get(variable) == _chosen.get(variable):
        os.environ[variable] = _chosen[variable] = value


def thread_binding(tp_size: int, cores: list[int]) -> str:
    """The cores of each rank, in the form of SGLANG_CPU_OMP_THREADS_BIND (`0-3|4-7`, srt/utils/numa_utils.py).

    Ranks get equal runs of neighbouring cores; cores left over stay free for the tokenizer and the detokenizer. With
    more ranks than cores the ranks share them in turn, one core each.
    """
    if tp_size < 1 or not cores:
        raise ValueError(f"cannot divide {len(cores)} cores among {tp_size} ranks")
    share = len(cores) // tp_size
    if share == 0:
        groups = [[cores[rank % len(cores)]] for rank in range(tp_size)]
    else:
        groups = [cores[rank * share : (rank + 1) * share] for rank in range(tp_size)]
    return "|".join(_ranges(group) for group in groups)


def _ranges(cores: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _prepend(variable: str, entry: str) -> None:
    entries = [e for e in os.environ.get(variable, "").split(os.pathsep) if e]
    if entry not in entries:
        os.environ[variable] = os.pathsep.join([entry, *entries])
