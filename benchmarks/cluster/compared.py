"""Figures of a point of the policies' benchmark, its table, and the simulator's word on the same traces."""

from collections.abc import Sequence

import numpy as np

from benchmarks.cluster.client import NOT_ANSWERED, Sent
from sgl_bdlora.cluster.base import Adapter
from sgl_bdlora.cluster.config import ClusterConfig, from_dict
from sgl_bdlora.cluster.report import percentile
from sgl_bdlora.cluster.simulate import simulate
from sgl_bdlora.cluster.trace import Trace, make_trace

QUANTILES = (50, 95, 99)
# Seconds after the last arrival at which the client gives up what has no whole answer.
DRAIN_S = 3.0
# Prompt and output tokens of the request that each adapter gets before a trace, and about how long these take together.
ASKED, TOUCH_S = (8, 1), 5.0
# Of policy.period_s, between the last of these and the trace.
PHASES = (0.1, 0.3, 0.5, 0.7, 0.9)
# What the simulation needs to know of SGLang's scheduler and of our loads: docs/cluster.md says where it is from.
SERVER = {"ahead": True, "disk_gb_s": 0.55, "peer_gb_s": 0.55, "install_s_per_gb": 0.5}
HEAD = """
| rate | policy | TTFT P50 / P95 / P99, ms | TPOT P50 / P95 / P99, ms | in the SLO | within it, req/s | loads: disk, peer | GiB | lost |
|---|---|---|---|---|---|---|---|---|"""


def point(sent: list[Sent], config: ClusterConfig, adapters: int) -> dict:
    """Figures over the requests after the warm-up, in order of the trace; requests without a whole answer are in none of the times
    but in every share."""
    trace = make_trace(config.workload, adapters)
    counted = [s for s, at in zip(sent, trace.arrival, strict=True) if at >= config.workload.warmup_s]
    slo, seconds = config.slo, config.workload.duration_s - config.workload.warmup_s
    kept = [s.ok and 1000 * s.ttft <= slo.ttft_ms and 1000 * (s.tpot or 0) <= slo.tpot_ms for s in counted]
    ttft = np.array([1000 * s.ttft for s in counted if s.ok])
    tpot = np.array([1000 * s.tpot for s in counted if s.tpot is not None])
    return {
        "requests": len(counted), "sent": len(sent), "lost": sum(not s.ok for s in sent), "attainment": float(np.mean(kept)),
        "goodput_req_s": sum(kept) / seconds, "answered_req_s": sum(s.ok for s in counted) / seconds,
        **{f"ttft_p{q}_ms": percentile(ttft, q) for q in QUANTILES}, **{f"tpot_p{q}_ms": percentile(tpot, q) for q in QUANTILES},
    }  # fmt: skip


def table(points: list[dict], head: bool = True) -> str:
    lines = [HEAD] if head else []
    for row in sorted(points, key=lambda row: row["rate"]):
        loads = row["cold_loads"]
        lines.append(
            f"| {row['rate']:g} | {row['policy']} | {times(row, 'ttft')} | {times(row, 'tpot')} | {100 * row['attainment']:.1f} % | "
            f"{row['goodput_req_s']:.1f} | {loads['disk']}, {loads['peer']} | {row['bytes_moved'] / 2**30:.1f} | "
            f"{row['lost']} of {row['sent']} |"
        )
    return "\n".join(lines)


def times(row: dict, kind: str) -> str:
    values = [row[f"{kind}_p{q}_ms"] for q in QUANTILES]
    return " / ".join("-" if v is None else f"{v:.1f}" if kind == "tpot" else f"{v:.0f}" for v in values)


def against_simulator(rows: list[dict], costs: str, names: Sequence[str] = ()) -> str:
    """A table of simulated times beside the real ones, for every point. costs: as in a configuration. names: the replicas' own, which
    rows that were written before they noted them lack."""
    base, adapters = cluster_of(rows, costs)
    lines = [
        f"\nSimulated with cost model {costs}, from empty replicas, medians of {len(PHASES)} phases of the plans; real / simulated, ms:\n",
        "| rate | policy | TTFT P50 | TTFT P95 | TPOT P50 | TPOT P95 | in the SLO |\n|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["kind"] == "point":
            config = base.with_(policy={"name": row["policy"]}, workload={"rate": row["rate"]})
            said = simulated(config, adapters, row.get("replicas", names))
            cells = [
                beside(row[key], said[key]) for key in ("ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms")
            ]
            share = f"{100 * row['attainment']:.0f} / {100 * said['attainment']:.0f} %"
            lines.append(f"| {row['rate']:g} | {row['policy']} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def cluster_of(rows: list[dict], costs: str) -> tuple[ClusterConfig, tuple[Adapter, ...]]:
    """The configuration and the adapters that a run's first row tells."""
    (setup,) = [row for row in rows if row["kind"] == "setup"][:1]
    adapters = tuple(Adapter(**a) for a in setup["adapters"])
    ranks = {a.rank: 1.0 for a in adapters}
    config = from_dict({**setup["settings"], "costs": costs, "adapters": {"count": len(adapters), "ranks": ranks}})
    return config.with_(replicas=SERVER), adapters


def simulated(config: ClusterConfig, adapters: tuple[Adapter, ...], names: Sequence[str] = ()) -> dict:
    """What point() says of the benchmark's own course, simulated: empty replicas, a plan that knows nothing, each adapter asked once, then
    the trace. When the plans fall is not known, so that figures are medians over some phases."""
    trace = make_trace(config.workload, len(adapters))
    said = []
    for phase in PHASES:
        offset = TOUCH_S + phase * config.policy.period_s
        whole = Trace(
            np.concatenate([np.linspace(0, TOUCH_S, len(adapters), endpoint=False), trace.arrival + offset]),
            np.concatenate([np.arange(len(adapters)), trace.adapter]),
            np.concatenate([np.full(len(adapters), ASKED[0]), trace.prompt]),
            np.concatenate([np.full(len(adapters), ASKED[1]), trace.output]),
        )
        longer = config.with_(workload={"duration_s": config.workload.duration_s + offset})
        result = simulate(longer, trace=whole, adapters=adapters, names=names, anew=True)
        first, finish = result.first[len(adapters) :] - offset, result.finish[len(adapters) :] - offset
        ends = float(trace.arrival[-1]) + DRAIN_S
        sent = [
            Sent(a - at, (b - a) / (n - 1) if n > 1 else None, True) if 0 <= b <= ends else NOT_ANSWERED
            for at, a, b, n in zip(trace.arrival, first, finish, trace.output, strict=True)
        ]
        said.append(point(sent, config, len(adapters)))
    figures = {key: [one[key] for one in said] for key in said[0]}
    return {key: None if None in values else float(np.median(values)) for key, values in figures.items()}


def beside(real: float | None, said: float | None) -> str:
    if real is None or said is None:
        return f"{value(real)} / {value(said)}"
    return f"{value(real)} / {value(said)} ({100 * (said / real - 1):+.0f} %)"


def value(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.1f}"
