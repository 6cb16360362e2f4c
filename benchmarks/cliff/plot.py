"""Picture of a cliff run.  python -m benchmarks.cliff.plot benchmarks/results/cliff-....jsonl"""

import sys
from pathlib import Path

from benchmarks.record import points_to_draw

COLOURS = {"stock": "tab:red", "plain": "tab:blue", "block-diagonal": "tab:green"}


def draw(rows: list[dict], target: Path) -> None:
    """rows: those of kind "point"; with several rates, one line each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (latency, throughput) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rates = sorted({row["rate"] for row in rows})
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for rate in rates:
            line = sorted((r for r in rows if (r["arm"], r["rate"]) == (arm, rate)), key=lambda r: r["adapters"])
            line = [row for row in line if row["ttft_p50_ms"] is not None]
            if not line:
                continue
            x = [row["adapters"] / row["pool_adapters"] for row in line]
            colour, label = COLOURS.get(arm), arm if len(rates) == 1 else f"{arm}, {rate:.3g}/s"
            latency.plot(x, [r["ttft_p50_ms"] for r in line], marker="o", color=colour, label=f"{label}, P50")
            latency.plot(x, [r["ttft_p99_ms"] for r in line], marker="^", ls="--", color=colour, label=f"{label}, P99")
            throughput.plot(x, [r["throughput_tok_s"] for r in line], marker="o", color=colour, label=label)
    latency.set(yscale="log", ylabel="time to first token, ms")
    throughput.set(ylabel="output tokens a second")
    throughput.set_ylim(bottom=0)
    for axes in (latency, throughput):
        axes.set_xlabel("adapters asked for / adapters that fit")
        axes.axvline(1, color="gray", lw=0.8, ls=":")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    first = rows[0]
    offered = ", ".join(f"{rate:.3g}" for rate in rates)
    figure.suptitle(
        f"{first['model']}, {first['layers']} layers, TP {first['tp']}, {first['gpu'] or 'CPU'}, {offered} requests/s",
        fontsize=10,
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    source, points = points_to_draw("cliff", __doc__, argv)
    draw(points, source.with_suffix(".png"))
    print(source.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
