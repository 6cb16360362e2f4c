"""Synthetic requests: Zipf popularity with drift, gamma arrivals, log-normal lengths; a function of the configuration and its seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sgl_bdlora.cluster.base import Adapter
from sgl_bdlora.cluster.config import Adapters, Workload


@dataclass(frozen=True)
class Trace:
    """Parallel arrays, in order of arrival: seconds, adapter index, prompt and output tokens (at least 1)."""

    arrival: np.ndarray
    adapter: np.ndarray
    prompt: np.ndarray
    output: np.ndarray

    def __len__(self) -> int:
        return len(self.arrival)


def zipf(n: int, s: float) -> np.ndarray:
    """(n,) probabilities proportional to 1 / k**s for k = 1..n; s = 0 is uniform."""
    weights = np.arange(1, n + 1, dtype=float) ** -s
    return weights / weights.sum()


def make_adapters(spec: Adapters, seed: int = 0) -> tuple[Adapter, ...]:
    """spec.count adapters; ranks as close to their parts as whole numbers allow, in an order that the seed decides."""
    ranks = sorted(spec.ranks)
    ends = np.cumsum([spec.ranks[r] for r in ranks])
    middles = (np.arange(spec.count) + 0.5) / spec.count * ends[-1]
    chosen = np.array(ranks)[np.searchsorted(ends, middles)]
    np.random.default_rng((seed, 1)).shuffle(chosen)
    return tuple(Adapter(f"a{i}", int(r), int(r * spec.mib_per_rank * 2**20)) for i, r in enumerate(chosen))


def make_trace(spec: Workload, adapters: int) -> Trace:
    rng = np.random.default_rng((spec.seed, 2))
    arrival = _arrivals(spec, rng)
    n = len(arrival)
    # Which popularity each adapter has: order[k] is the adapter in place k.
    order = rng.permutation(adapters)
    step = max(1, round(spec.rotate_by * adapters)) if spec.rotate_s else 0
    turn = (arrival // spec.rotate_s).astype(np.int64) if spec.rotate_s else np.zeros(n, dtype=np.int64)
    place = np.searchsorted(np.cumsum(zipf(adapters, spec.zipf)), rng.random(n)).clip(max=adapters - 1)
    adapter = order[(place + turn * step) % adapters]
    if spec.flash_x:
        # The adapter that is the least popular when the crowd comes takes this part of the requests.
        part = spec.flash_x / (adapters + spec.flash_x)
        turns = int(spec.flash_s // spec.rotate_s) if spec.rotate_s else 0
        cold = order[(adapters - 1 + turns * step) % adapters]
        during = (arrival >= spec.flash_s) & (arrival < spec.flash_s + spec.flash_for_s)
        adapter = np.where(during & (rng.random(n) < part), cold, adapter)
    prompt = _lengths(rng, n, spec.prompt_median, spec.prompt_sigma, spec.max_prompt)
    output = _lengths(rng, n, spec.output_median, spec.output_sigma, spec.max_output)
    return Trace(arrival, adapter, prompt, output)


def mean_lengths(spec: Workload) -> tuple[float, float]:
    """Mean prompt and output tokens of such a trace."""
    rng = np.random.default_rng(0)
    lengths = (
        _lengths(rng, 20_000, spec.prompt_median, spec.prompt_sigma, spec.max_prompt),
        _lengths(rng, 20_000, spec.output_median, spec.output_sigma, spec.max_output),
    )
    return float(lengths[0].mean()), float(lengths[1].mean())


def _lengths(rng: np.random.Generator, n: int, median: float, sigma: float, most: int) -> np.ndarray:
    return np.exp(np.log(median) + sigma * rng.standard_normal(n)).round().clip(1, most).astype(np.int64)


def _arrivals(spec: Workload, rng: np.random.Generator) -> np.ndarray:
    """Gamma gaps in operational time, warped to the diurnal rate; (requests,) seconds below the duration."""
    expected = spec.rate * spec.duration_s
    shape = spec.cv**-2
    many = int(expected + 6 * spec.cv * np.sqrt(expected) + 16)
    ticks = np.cumsum(rng.gamma(shape, 1 / shape, many))
    while ticks[-1] < expected:
        ticks = np.concatenate([ticks, ticks[-1] + np.cumsum(rng.gamma(shape, 1 / shape, many))])
    if not spec.diurnal:
        times = ticks / spec.rate
    else:
        # Requests expected until t: rate * (t + diurnal * period / 2 pi * (1 - cos(2 pi t / period))), starting at the mean and rising.
        t = np.linspace(0, spec.duration_s, 4096)
        turn = 2 * np.pi / spec.diurnal_s
        until = spec.rate * (t + spec.diurnal / turn * (1 - np.cos(turn * t)))
        times = np.interp(ticks, until, t, right=np.inf)
    return times[times < spec.duration_s]
