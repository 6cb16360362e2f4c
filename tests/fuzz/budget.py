"""How many cases a fuzz test tries, and how long one may take."""

import faulthandler
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings

# Of each test in the default suite; of all tests together where the slow ones run too, and in `make fuzz`, which asks for 100,000.
FEW = 60
MANY = int(os.environ.get("BDLORA_FUZZ_CASES", "5000"))

# One case of a small file, read three times, each with up to 5 s for its regular expressions (adapters/runaway.py).
LONGEST_S = 30


def few_and_many(share: float):
    """Run the test with FEW cases, and, marked slow, with this share of MANY."""
    many = pytest.param(int(MANY * share), id="many", marks=[pytest.mark.slow, pytest.mark.timeout(7200)])
    return pytest.mark.parametrize("cases", [pytest.param(FEW, id="few"), many])


def settings_for(cases: int) -> settings:
    """No example is replayed from earlier runs in the default suite, so that its time does not grow."""
    return settings(
        max_examples=cases,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


class TookTooLongError(BaseException):
    """Not an Exception, so that nothing under test takes it for a fault of the adapter."""


@contextmanager
def at_most(seconds: float = LONGEST_S) -> Iterator[None]:
    """Raise in the block when it takes longer; where it hangs in C code, the process ends with a traceback of all threads."""

    def ring(*_):
        raise TookTooLongError(f"one case took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)
