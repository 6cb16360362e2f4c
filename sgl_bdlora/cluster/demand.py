"""Demand: tokens a second that each adapter will ask for in the next period."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np


class Demand:
    """Exponential moving average plus the linear trend of the last windows, per adapter.

    forecast = max(0, ema + slope), where ema <- alpha * x + (1 - alpha) * ema starts at the first window's x, and slope is the
    least-squares slope over the last `windows` windows, in tokens a second per window. An adapter first seen in a window had 0 before.
    """

    def __init__(self, alpha: float = 0.3, windows: int = 5):
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha has to be above 0 and at most 1, got {alpha}")
        if windows < 2:
            raise ValueError(f"windows has to be 2 or more for a trend, got {windows}")
        self._alpha = alpha
        self._recent: deque[Mapping[str, float]] = deque(maxlen=windows)
        self._ema: dict[str, float] | None = None

    def observe(self, tokens: Mapping[str, float], seconds: float) -> None:
        """What was asked for in one window: adapter to tokens, prompt and output."""
        if not seconds > 0:
            raise ValueError(f"a window has to last, got {seconds} s")
        rates = {name: count / seconds for name, count in tokens.items()}
        if self._ema is None:
            self._ema = dict(rates)
        else:
            faded = {name: (1 - self._alpha) * ema for name, ema in self._ema.items()}
            for name, rate in rates.items():
                faded[name] = faded.get(name, 0.0) + self._alpha * rate
            # What has faded to nothing is forgotten, so that names that came and went take no memory.
            self._ema = {name: ema for name, ema in faded.items() if ema > 1e-6}
        self._recent.append(rates)

    def forecast(self, adapters: Sequence[str]) -> np.ndarray:
        """(adapters,) tokens a second; zeros before the first window."""
        if self._ema is None:
            return np.zeros(len(adapters))
        ema = np.array([self._ema.get(name, 0.0) for name in adapters])
        n = len(self._recent)
        if n < 2:
            return ema
        x_N = np.arange(n) - (n - 1) / 2
        rates_NA = np.array([[window.get(name, 0.0) for name in adapters] for window in self._recent])
        return np.maximum(0.0, ema + x_N @ rates_NA / (x_N @ x_N))
