"""What clients ask for and when, and what they measured: popularity, arrival times, percentiles."""

import random
from collections.abc import Sequence


def zipf_weights(count: int, s: float) -> list[float]:
    """Probabilities of `count` items, most popular first: item k gets k**-s / sum. s 0 is uniform."""
    weights = [rank**-s for rank in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def arrivals(rate: float, duration: float, cv: float, rng: random.Random) -> list[float]:
    """Arrival times in [0, duration) of an open loop: gamma gaps of mean 1/rate and coefficient of variation cv.

    cv 1 is a Poisson process, above 1 is bursty.
    """
    shape = cv**-2
    scale = 1 / (rate * shape)
    times: list[float] = []
    now = rng.gammavariate(shape, scale)
    while now < duration:
        times.append(now)
        now += rng.gammavariate(shape, scale)
    return times


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Percentile by linear interpolation between the closest ranks; None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
