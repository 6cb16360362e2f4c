"""Is this a machine without an accelerator and without SGLang's CPU kernels?"""

import ctypes
import functools
import glob
import importlib.machinery
import os
import sys
from pathlib import Path

# Drivers of other accelerators that SGLang serves (ROCm, Ascend, Habana); with one of them nothing here is ours to
# decide.
OTHER_ACCELERATORS = ("/dev/kfd", "/dev/davinci*", "/dev/accel/accel*")

STUBS = Path(__file__).parent / "stubs"


@functools.cache
def applies() -> bool:
    """True if SGLang can only run here with what this package provides. Imports no torch and starts no CUDA context."""
    if not sys.platform.startswith("linux") or os.environ.get("SGLANG_PLATFORM"):
        return False
    if any(glob.glob(pattern) for pattern in OTHER_ACCELERATORS):
        return False
    return not has_cuda_device() and not has_cpu_kernels()


def has_cuda_device() -> bool:
    """Whether a CUDA device is visible to this process. NVML counts them without creating a context."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    if not _loads("libcuda.so.1"):
        return False
    nvml = _loads("libnvidia-ml.so.1")
    if not nvml:
        # Jetson and WSL drivers may lack NVML; believe the driver library.
        return True
    if nvml.nvmlInit_v2() != 0:
        return False
    count = ctypes.c_uint(0)
    failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return not failed and count.value > 0


def has_cpu_kernels() -> bool:
    """Whether the installed sgl_kernel is the CPU build: one extension beside __init__.py, none per GPU kind."""
    search = [entry for entry in sys.path if entry != str(STUBS)]
    spec = importlib.machinery.PathFinder.find_spec("sgl_kernel", search)
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(spec.submodule_search_locations[0])
    return any(folder.glob("common_ops*.so")) and not any(folder.glob("sm*/common_ops*.so"))


def _loads(library: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(library)
    except OSError:
        return None
