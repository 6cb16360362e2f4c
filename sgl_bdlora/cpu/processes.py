"""Start SGLang's processes by forking one that has already imported everything.

SGLang spawns a process per rank and a detokenizer, and each imports torch and sglang afresh: about 25 s of CPU time each,
one after another on a small machine. A fork server imports them once, while the launcher is still reading its arguments,
and the processes share its memory. CUDA forbids forking; without it nothing does: the server imports only, and starts no
thread, no OpenMP region and no socket.
"""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver

PRELOAD = "sgl_bdlora.cpu.preload"


def start_fork_server() -> None:
    """Let the imports begin now. Processes are forked once use_fork_server has been called."""
    multiprocessing.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()


def use_fork_server() -> None:
    """Make multiprocessing fork from the server, after SGLang has asked for spawning (entrypoints/engine.py:_set_envs_and_config)."""
    start_fork_server()
    multiprocessing.set_start_method("forkserver", force=True)


def in_this_environment(function: Callable) -> Callable:
    """*function*, to run in a forked process with this process's environment as it is now, not as it was at the server's start."""
    return partial(_run, dict(os.environ), function)


def _run(environment: dict[str, str], function: Callable, *args, **kwargs):
    import torch

    os.environ.clear()
    os.environ.update(environment)
    # OpenMP read OMP_NUM_THREADS when the server imported torch, before the launcher knew the number of ranks.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    return function(*args, **kwargs)
