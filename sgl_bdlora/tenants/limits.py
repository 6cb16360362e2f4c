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


class Bucket:
    """A minute's worth of something, filled at an even rate. What is spent is known afterwards, so it may go below zero."""

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute, self._clock = per_minute, clock
        self._level, self._since = float(per_minute), clock()

    def spend(self, amount: float) -> None:
        self._fill()
        self._level -= amount

    def wait_for(self, amount: float) -> float:
        """Seconds until the bucket holds this much; 0 if it does."""
        self._fill()
        return max(0.0, (amount - self._level) * 60 / self.per_minute)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._since) * self.per_minute / 60)
        self._since = now


class Limits:
    """None for no limit.

    A request is let in while one is left of this minute's, tokens are left, and fewer than max_concurrent run; its tokens are taken off as
    they come, so that the last request let in may overdraw, and later ones wait for it.
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
        """Count a request. Raises Limited."""
        if self._requests is not None:
            wait = self._requests.wait_for(1)
            if wait:
                raise Limited(f"limit of {self._requests.per_minute} requests per minute", wait)
        if self._tokens is not None:
            wait = self._tokens.wait_for(1)
            if wait:
                raise Limited(f"limit of {self._tokens.per_minute} tokens per minute", wait)
        if self._requests is not None:
            self._requests.spend(1)

    @contextmanager
    def run(self, count: int) -> Iterator[None]:
        """`count` requests run in the block, one of which has been admitted. Raises Limited."""
        if self.max_concurrent is not None and self.running + count > self.max_concurrent:
            raise Limited(f"limit of {self.max_concurrent} requests at a time", 1)
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
