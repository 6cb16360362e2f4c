"""How a server ends: with code 0 after SIGTERM, once its requests are answered; with code 1, and saying why, when a process of it is lost.

SGLang ends itself with SIGKILL in both cases (utils/common.py:kill_process_tree), which looks like a lack of memory to whoever started it,
and which the first process of a container does not even receive: there it goes on to exit with code 0.
"""

import logging
import os
import sys

logger = logging.getLogger(__name__)

_draining = False


def before_sigterm_handler(handler, signum=None, frame=None) -> None:
    """Hook of SignalHandler.sigterm_handler."""
    global _draining
    _draining = True


def before_sigquit_handler(handler, signum=None, frame=None) -> None:
    """Hook of SignalHandler.running_phase_sigquit_handler: what is said above tells which process was lost."""
    global _draining
    _draining = False
    logger.error("sgl-bdlora: a process of this server has ended; ending the others, and the server with code 1")


def around_kill_process_tree(original, parent_pid, include_parent=True, skip_pid=None, wait_timeout=None) -> None:
    """Hook of kill_process_tree."""
    if not include_parent or parent_pid != os.getpid():
        original(parent_pid, include_parent, skip_pid, wait_timeout)
        return
    original(parent_pid, False, skip_pid, wait_timeout)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if _draining else 1)
