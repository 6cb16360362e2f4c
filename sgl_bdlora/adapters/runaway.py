"""A limit on the time that an adapter's regular expressions may take.

target_modules, the patterns of ranks and alphas, and layers_pattern are matched as PEFT matches them, by `re`, which backtracks: a short
expression can take years. `re` looks for signals while it matches, so a timer of the process's own CPU time can end it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sgl_bdlora.adapters.errors import AdapterError

# The configuration of a large adapter (560 modules, a rank pattern for each) takes 0.3 s.
LIMIT_S = 5.0


@contextmanager
def runaway_limit(adapter: str, seconds: float = LIMIT_S) -> Iterator[None]:
    """Raise AdapterError in the block once it has used `seconds` of CPU time.

    Only the main thread receives signals; in others, where no server reads adapters, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_):
        raise AdapterError(
            adapter,
            f"matching its module names takes more than {seconds:g} s",
            "write the regular expressions in adapter_config.json (target_modules, exclude_modules, rank_pattern, alpha_pattern, "
            "layers_pattern) without nested repeats, or list the modules by name",
        )

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
