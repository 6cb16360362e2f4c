"""How benchmarks fail and end. A server does not start or breaks off: a row, a message, and the next one has its turn."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from benchmarks.record import Rows


class Failures:
    """``with failures.of(server="ours"):`` seen: whether one of the blocks failed."""

    def __init__(self, rows: Rows):
        self._rows, self.seen = rows, False

    @contextmanager
    def of(self, **where: str) -> Iterator[None]:
        """where: fields of the row. StartFailed is a RuntimeError."""
        try:
            yield
        except (RuntimeError, TimeoutError, httpx.HTTPError) as error:
            self.add(str(error) or repr(error), **where)

    def add(self, message: str, **where: str) -> None:
        self.seen = True
        self._rows.write(kind="error", **where, message=message)
        print(f"{' '.join(where.values())}: {message}", file=sys.stderr, flush=True)


def run_to_end(main: Callable[[], int | None]) -> int | None:
    """main's exit code, or 130: SIGTERM ends it as Ctrl-C does, also in the background, so that servers are stopped and files removed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        return 130
