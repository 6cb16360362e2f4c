"""How many replicas an SLO needs, by simulation."""

from __future__ import annotations

from collections.abc import Callable

from sgl_bdlora.cluster.base import PlacementError
from sgl_bdlora.cluster.config import ClusterConfig
from sgl_bdlora.cluster.simulate import Result, simulate


def keeps_slo(result: Result) -> bool:
    attained = result.attained()
    return bool(len(attained)) and float(attained.mean()) >= result.config.slo.attainment


def needed_replicas(
    config: ClusterConfig, most: int, tried: Callable[[int, Result | None], None] | None = None
) -> tuple[int | None, dict[int, Result]]:
    """The fewest replicas, at most `most`, with which the workload keeps the SLO, taking it that more never serve worse; None if
    even `most` do not. Also every result by replicas; a number on which the adapters have no room has none. Failures of replicas
    that a try does not have are left out of it.
    """
    results: dict[int, Result] = {}

    def enough(count: int) -> bool:
        try:
            # However many a deployment of it may add: how many it would need is the question.
            failures = tuple(failure for failure in config.failures if failure.replica < count)
            result = simulate(config.with_(replicas={"count": count}, serve={"max_replicas": 0}, failures=failures))
        except PlacementError:
            if count == most:
                raise
            if tried:
                tried(count, None)
            return False
        results[count] = result
        if tried:
            tried(count, result)
        return keeps_slo(result)

    low, high = 0, min(most, config.replicas.count)
    while not enough(high):
        if high == most:
            return None, results
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high, results


def highest_rate(config: ClusterConfig, least: float, most: float, runs: int = 6) -> tuple[float, list[Result]]:
    """The highest rate in [least, most] that keeps the SLO, by bisection with so many runs (0 when `least` does not), and all runs."""
    results = []
    low, high = 0.0, most
    rate = least
    for _ in range(runs):
        result = simulate(config.with_(workload={"rate": rate}))
        results.append(result)
        if keeps_slo(result):
            low = rate
        else:
            high = rate
            if rate <= least:
                return 0.0, results
        rate = (low + high) / 2
    return low, results
