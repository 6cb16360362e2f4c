"""Imported by the fork server, and by nothing else, before it forks the first process (see processes.py)."""

import ctypes
import gc
import importlib
import logging
import os
import signal
import warnings

PR_SET_PDEATHSIG = 1
MODULES = ("sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager", "sglang.srt.models.registry")


def follow_launcher(launcher: int) -> None:
    """Die with the launcher, and pass on what the forked processes tell their parent.

    A scheduler that fails sends SIGQUIT to its parent (managers/scheduler.py:run_scheduler_process), which SGLang
    takes to be the launcher; here it is the fork server.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)
    server = os.getpid()

    def forward(signum, frame):
        if os.getpid() == server:
            os.kill(launcher, signum)
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    signal.signal(signal.SIGQUIT, forward)


follow_launcher(os.getppid())
# What SGLang says while it is imported is about accelerators that this machine does not have.
sglang_logger = logging.getLogger("sglang")
sglang_logger.setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for module in MODULES:
        importlib.import_module(module)
sglang_logger.setLevel(logging.NOTSET)
# Hooks are put in place once, before forking: each walks all of SGLang's modules.
load_plugins = importlib.import_module("sglang.srt.plugins").load_plugins
load_plugins()
# A full collection writes to every object that it looks at, and the pages that the processes share become copies: 270 MiB for each process
# that collects. It does not look at these.
gc.freeze()
