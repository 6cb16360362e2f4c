"""How much a tenant may ask for: requests and tokens a minute, and requests at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Limited(Exception):
    """Over a limit. retry_after: seconds until a request may be let in."""

    def __init__(self, problem: str, retry_after: float):
        super().__init__(problem)
        self.retry_after = max(1, math.ceil(retry_after))


class TooLarge(ValueError):
    """A request that counts as more than a limit ever lets in."""


class Bucket:
    """A minute's worth of something, filled at an even rate. What is spent is known afterwards, so it may go below zero."""

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute, self._clock = per_minute, clock
        self._level, self._since = float(per_minute), clock()

    def spend(self, amount: float) -> None:
        self._fill()
        self._level -= amount

    def wait_for(self, amount: float) -> float:
        """Seconds until the bucket holds this much, to the microsecond; 0 if it does."""
        self._fill()
        return round(max(0.0, (amount - self._level) * 60 / self.per_minute), 6)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._since) * self.per_minute / 60)
        self._since = now


class Limits:
    """None for no limit.

    A request that counts as several (prompts times samples) is let in while as many are left of this minute's, tokens are left, and no more
    than max_concurrent run with it; its tokens are taken off as they come, so that the last request let in may overdraw, and later ones
    wait for it. How much it counts as is known only when its body has been read: `admit` takes one off before, `run` the rest.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrent: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._requests = Bucket(requests_per_minute, clock) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, clock) if tokens_per_minute else None
        self.max_concurrent = max_concurrent
        self.running = 0

    def admit(self) -> None:
        """Count a request as one. Raises Limited."""
        wait, problem = self._wait(1)
        if wait:
            raise Limited(problem, wait)
        if self._requests is not None:
            self._requests.spend(1)

    @contextmanager
    def run(self, count: int) -> Iterator[None]:
        """`count` requests run in the block, one of which has been admitted.

        Raises TooLarge if there are never that many, and Limited if there are not now; neither takes anything off.
        """
        per_minute = self._requests.per_minute if self._requests is not None else None
        for field, most in (("requests_per_minute", per_minute), ("max_concurrent", self.max_concurrent)):
            if most is not None and count > most:
                raise TooLarge(
                    f"this request counts as {count} (prompts times n), more than {field} of this API key lets in: {most}"
                )
        problem = None
        if self._requests is not None and count > 1 and self._requests.wait_for(count - 1):
            problem = f"limit of {per_minute} requests per minute, and this one counts as {count}"
        elif self.max_concurrent is not None and self.running + count > self.max_concurrent:
            problem = f"limit of {self.max_concurrent} requests at a time"
        if problem is not None:
            # It is admitted anew when it comes again, and so needs all of `count`.
            raise Limited(problem, self._wait(count)[0])
        if self._requests is not None:
            self._requests.spend(count - 1)
        self.running += count
        try:
            yield
        finally:
            self.running -= count

    def spend_tokens(self, count: int) -> None:
        if self._tokens is not None:
            self._tokens.spend(count)

    def _wait(self, count: int) -> tuple[float, str]:
        """Seconds until `count` requests and a token are left, 0 if they are, and the limit that takes longest."""
        waits = [(0.0, "")]
        if self._requests is not None:
            waits.append((self._requests.wait_for(count), f"limit of {self._requests.per_minute} requests per minute"))
        if self._tokens is not None:
            waits.append((self._tokens.wait_for(1), f"limit of {self._tokens.per_minute} tokens per minute"))
        return max(waits)
