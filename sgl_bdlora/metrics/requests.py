"""Requests by adapter, with a bounded number of labels: a collector for prometheus_client's registry."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from sgl_bdlora.metrics.engines import engine_families
from sgl_bdlora.metrics.labels import OTHER, label

OUTCOMES = ("ok", "error", "abort")

FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
PER_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)


class Histogram:
    """Counts of values by upper bound."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many values are not above it), as Prometheus writes them."""
        total, rows = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class Series:
    """What is counted of one adapter's requests."""

    def __init__(self):
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = self.generation_tokens = 0
        self.first_token, self.per_token = Histogram(FIRST_TOKEN_BUCKETS), Histogram(PER_TOKEN_BUCKETS)


class AdapterMetrics:
    """Counts requests by adapter, and is a collector for prometheus_client's registry.

    Args:
        max_adapters: adapters with series of their own; requests of the others count under "other".
        registered: gives the names of the adapters that are loaded now. A series ends with its adapter.
        engines: gives what `engine_numbers` found in each engine.
    """

    def __init__(self, max_adapters: int, registered: Callable[[], Collection[str]], engines: Callable[[], list[dict]]):
        self._max_adapters, self._registered, self._engines = max_adapters, registered, engines
        self._series: dict[str | None, Series] = {}
        self._other = Series()

    def of(self, adapter: str | None) -> Series:
        """The series that a request for this adapter (None: the base model) counts in.

        Names that are not loaded come from clients: they get no label.
        """
        series = self._series.get(adapter)
        if series is not None:
            return series
        if adapter is not None:
            if adapter not in self._registered():
                return self._other
            if len(self._named()) >= self._max_adapters:
                self._forget_unloaded()
            if len(self._named()) >= self._max_adapters:
                return self._other
        return self._series.setdefault(adapter, Series())

    def ended(
        self,
        adapter: str | None,
        outcome: str,
        prompt_tokens: int = 0,
        generation_tokens: int = 0,
        first_token_s: float | None = None,
        per_token_s: float | None = None,
    ) -> None:
        """A request ended. outcome: one of OUTCOMES. Times are seconds; None where there was no such token."""
        series = self.of(adapter)
        series.outcomes[outcome] += 1
        series.prompt_tokens += prompt_tokens
        series.generation_tokens += generation_tokens
        if first_token_s is not None:
            series.first_token.observe(first_token_s)
        if per_token_s is not None:
            series.per_token.observe(per_token_s)

    def describe(self) -> list:
        """Names come with `collect`; the registry would otherwise call it while it is being set up."""
        return []

    def collect(self) -> Iterator:
        """The metric families of prometheus_client, as of now."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        self._forget_unloaded()
        rows = [(label(adapter), series) for adapter, series in self._series.items()]
        if self._other.outcomes:
            rows.append((OTHER, self._other))
        requests = CounterMetricFamily("bdlora_requests", "Requests that ended, by how.", labels=("adapter", "outcome"))
        for adapter, series in rows:
            for outcome in OUTCOMES:
                requests.add_metric((adapter, outcome), series.outcomes[outcome])
        yield requests
        for name, text, value in (
            ("bdlora_prompt_tokens", "Prompt tokens of requests that ended.", "prompt_tokens"),
            ("bdlora_generation_tokens", "Generated tokens of requests that ended.", "generation_tokens"),
        ):
            family = CounterMetricFamily(name, text, labels=("adapter",))
            for adapter, series in rows:
                family.add_metric((adapter,), getattr(series, value))
            yield family
        for name, text, value in (
            ("bdlora_time_to_first_token_seconds", "From a request's arrival to its first token.", "first_token"),
            ("bdlora_time_per_output_token_seconds", "Mean time between a request's tokens.", "per_token"),
        ):
            family = HistogramMetricFamily(name, text, labels=("adapter",))
            for adapter, series in rows:
                histogram: Histogram = getattr(series, value)
                family.add_metric((adapter,), histogram.buckets(), histogram.sum)
            yield family
        yield from engine_families(self._engines())

    def _named(self) -> Collection[str]:
        return self._series.keys() - {None}

    def _forget_unloaded(self) -> None:
        for adapter in self._named() - set(self._registered()):
            del self._series[adapter]
