"""Figures of a point of the policies' benchmark, its table, and the simulator's word on the same traces."""

import numpy as np

from benchmarks.cluster.client import Sent
from sgl_bdlora.cluster.base import Adapter
from sgl_bdlora.cluster.config import ClusterConfig, from_dict
from sgl_bdlora.cluster.report import percentile, row_of
from sgl_bdlora.cluster.simulate import simulate
from sgl_bdlora.cluster.trace import make_trace

QUANTILES = (50, 95, 99)
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


def against_simulator(rows: list[dict], costs: str) -> str:
    """A table of simulated times beside the real ones, for every point. costs: as in a configuration."""
    lines = [
        f"\nSimulated with cost model {costs}, each adapter on a replica from the start; real / simulated, ms:\n",
        "| rate | policy | TTFT P50 | TTFT P99 | TPOT P50 | TPOT P95 | in the SLO |\n|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["kind"] == "setup":
            adapters = tuple(Adapter(**a) for a in row["adapters"])
            ranks = {a.rank: 1.0 for a in adapters}
            base = from_dict({**row["settings"], "costs": costs, "adapters": {"count": len(adapters), "ranks": ranks}})
        elif row["kind"] == "point":
            config = base.with_(policy={"name": row["policy"]}, workload={"rate": row["rate"]})
            trace = make_trace(config.workload, len(adapters))
            said = row_of(simulate(config, trace=trace, adapters=adapters))
            cells = [
                f"{value(row[key])} / {value(said[key])}"
                for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p95_ms")
            ]
            share = f"{100 * row['attainment']:.1f} / {100 * said['attainment']:.1f} %"
            lines.append(f"| {row['rate']:g} | {row['policy']} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def value(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.1f}"
