"""Start SGLang's processes by forking one that has already imported everything.

SGLang spawns a process per rank and a detokenizer, and each imports torch and sglang afresh: 13 s of CPU time each,
one after another on a small machine. A fork server imports them once, while the launcher is still reading its
arguments, and the processes share its memory. CUDA forbids forking; without it nothing does: the server imports only,
and runs no OpenMP region and no event loop.
"""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver

from sgl_bdlora.cpu.detect import applies

PRELOAD = "sgl_bdlora.cpu.preload"


def start_fork_server() -> None:
    """Let the imports begin now, beside the launcher's own. Call it after prepare_environment, in the launcher only.

    Processes are forked once use_fork_server has been called. Does nothing with a GPU.
    """
    if not applies():
        return
    multiprocessing.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()


def use_fork_server() -> None:
    """Make multiprocessing fork from the server. SGLang's engine.py:_set_envs_and_config asks for spawning first."""
    start_fork_server()
    multiprocessing.set_start_method("forkserver", force=True)


def in_this_environment(function: Callable) -> Callable:
    """*function*, to run in a forked process with this process's present environment, not the server's."""
    return partial(_run, dict(os.environ), function)


def _run(environment: dict[str, str], function: Callable, *args, **kwargs):
    import torch

    os.environ.clear()
    os.environ.update(environment)
    # OpenMP read OMP_NUM_THREADS when the server imported torch, before the launcher knew the number of ranks.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    return function(*args, **kwargs)
