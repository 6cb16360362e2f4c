"""What a simulation came to: one flat row for machines, tables and pictures for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sgl_bdlora.cluster.costs import load_costs
from sgl_bdlora.cluster.simulate import Result

COLOURS = {
    "rank-packing": "tab:green",
    "rank-spill": "tab:purple",
    "balanced": "black", "random": "tab:gray", "contiguous": "tab:brown", "affinity": "tab:blue", "hrw-ema": "tab:orange",
    "toppings": "tab:red",
}  # fmt: skip


def percentile(values: np.ndarray, q: float) -> float | None:
    """The value at rank q, no interpolation, so that it may be infinite; None (not known: it did not come) then or without values."""
    if not len(values):
        return None
    value = float(np.percentile(values, q, method="higher"))
    return value if value < float("inf") else None


def row_of(result: Result) -> dict[str, Any]:
    """A flat, JSON-ready summary; times are null where the percentile falls on a request that got no answer."""
    config, counted = result.config, result.counted
    ttft, tpot, attained = result.ttft_ms(), result.tpot_ms(), result.attained()
    busy = result.busy_s / max(result.ends_at, 1e-9)
    seconds = config.workload.duration_s - config.workload.warmup_s
    costs = load_costs(config.costs)
    return {
        "policy": config.policy.name, "costs": costs.name, "provisional": costs.provisional, "replicas": config.replicas.count,
        "gpus": config.replicas.count * config.replicas.gpus, "adapters": config.adapters.count,
        "ranks": {str(r): p for r, p in config.adapters.ranks.items()}, "rate": config.workload.rate, "zipf": config.workload.zipf,
        "cv": config.workload.cv, "rotate_s": config.workload.rotate_s, "flash_x": config.workload.flash_x,
        "pool_gib": config.replicas.pool_gib, "seed": config.workload.seed, "requests": int(counted.sum()),
        "attainment": float(attained.mean()) if len(attained) else None, "goodput_req_s": float(attained.sum() / seconds),
        **{f"ttft_p{q}_ms": percentile(ttft, q) for q in (50, 95, 99)},
        **{f"tpot_p{q}_ms": percentile(tpot, q) for q in (50, 95, 99)},
        "arrived": len(result.trace), "finished": int(result.finished.sum()), "shed": result.shed, "failed": result.failed,
        "retried": result.retried, "unfinished": result.unfinished, "loads": result.loads, "bytes_moved": result.bytes_moved,
        "plans": result.plans, "moves": result.moves, "most_moves": result.most_moves, "busy_mean": float(busy.mean()),
        "imbalance": float(busy.max() / busy.mean()) if busy.mean() > 0 else None, "fairness": fairness(result), "wall_s": result.wall_s,
    }  # fmt: skip


def fairness(result: Result) -> float | None:
    """Jain's index of the adapters' attainments: 1 when all keep the SLO equally often, 1 / n when one of n does alone."""
    which, attained = result.trace.adapter[result.counted], result.attained()
    asked = np.bincount(which)
    kept = np.bincount(which, weights=attained, minlength=len(asked))[asked > 0] / asked[asked > 0]
    return float(kept.sum() ** 2 / (len(kept) * (kept**2).sum())) if (kept > 0).any() else None


def write_rows(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def show(rows: list[dict], slo_attainment: float) -> None:
    """A table of the rows on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for column in (
        "SLO kept", "TTFT ms\nP50", "\nP95", "\nP99", "TPOT ms\nP50", "\nP99", "cold\nloads", "GiB\nmoved", "moves\n(most)", "imbalance",
        "shed", "unfinished",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        kept = row["attainment"]
        mark = "-" if kept is None else f"{100 * kept:.1f} %" + ("" if kept >= slo_attainment else " !")
        table.add_row(
            row["policy"], mark, *(_ms(row[f"ttft_p{q}_ms"]) for q in (50, 95, 99)), _ms(row["tpot_p50_ms"], 1),
            _ms(row["tpot_p99_ms"], 1), str(sum(row["loads"].values())), f"{row['bytes_moved'] / 2**30:.1f}",
            f"{row['moves']} ({row['most_moves']})", "-" if row["imbalance"] is None else f"{row['imbalance']:.2f}", str(row["shed"]),
            str(row["unfinished"] + row["failed"]),
        )  # fmt: skip
    console = Console()
    # Numbers cut short would be worse than lines that the terminal wraps.
    console.width = max(console.width, 128)
    console.print(table)
    if any(row["provisional"] for row in rows):
        console.print(
            f"Cost model {rows[0]['costs']!r} is provisional (sgl_bdlora/cluster/default_costs.json says why)."
        )


def draw(results: list[Result], target: Path) -> None:
    """Distributions of first-token time, and its 95th percentile over time, one line a policy. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (spread, course) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for result in results:
        name = result.config.policy.name
        ttft = np.sort(result.ttft_ms())
        spread.plot(ttft, 100 * (1 - np.arange(len(ttft)) / max(1, len(ttft))), color=COLOURS.get(name), label=name)
        seconds = result.trace.arrival[result.counted]
        edges = np.linspace(result.config.workload.warmup_s, result.config.workload.duration_s, 25)
        at = np.digitize(seconds, edges)
        values = result.ttft_ms()
        p95 = [percentile(values[at == k], 95) or np.nan for k in range(1, len(edges))]
        course.plot((edges[1:] + edges[:-1]) / 2, p95, color=COLOURS.get(name), label=name)
    first = results[0].config
    for axes in (spread, course):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    course.axhline(first.slo.ttft_ms, color="gray", ls=":", lw=0.8)
    spread.axvline(first.slo.ttft_ms, color="gray", ls=":", lw=0.8)
    spread.set(xscale="log", yscale="log", xlabel="time to first token, ms", ylabel="% of requests that waited longer")
    course.set(yscale="log", xlabel="s", ylabel="P95 of the time to first token, ms")
    figure.suptitle(
        f"{first.replicas.count} replicas, {first.adapters.count} adapters, {first.workload.rate:g} requests/s, costs {first.costs}"
        + (" (provisional)" if load_costs(first.costs).provisional else ""),
        fontsize=10,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _ms(value: float | None, digits: int = 0) -> str:
    return "never" if value is None else f"{value:.{digits}f}"
