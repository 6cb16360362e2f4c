"""Table and picture of a latency run.  python -m benchmarks.latency.plot benchmarks/results/latency-....jsonl"""

import statistics
import sys
from pathlib import Path

from benchmarks.record import read_rows

STYLES = ("-", "--", ":", "-.")
COLOURS = {
    "no-lora": "black",
    "stock": "tab:red",
    "stock-base-only": "salmon",
    "replicated": "tab:blue",
    "s-lora": "tab:orange",
    "block-diagonal": "tab:green",
    "loaded-base-only": "tab:gray",
}


def label(row: dict) -> str:
    ratio = f" {row['params_ratio']:.2f}x" if row["arm"] == "block-diagonal" else ""
    return f"{row['arm']}{ratio}" + (f" {row['mix']}" if row["adapters"] else "")


def baselines(rows: list[dict], figure: str) -> dict[tuple, list[float]]:
    """(run, batch, lengths) -> the figure without LoRA, from the first server and from the last."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        if row["arm"] == "no-lora":
            found.setdefault(_place(row), []).append(row[figure])
    return found


def _place(row: dict) -> tuple:
    return row["run"], row["batch"], row["input_len"], row["output_len"]


def table(rows: list[dict]) -> str:
    """One line a point, with ratios to the mean of the servers without LoRA, and the most that these drifted in each figure."""
    lines = []
    decode, ttft = baselines(rows, "decode_ms"), baselines(rows, "ttft_ms")
    for row in rows:
        ratios = ""
        if _place(row) in decode:
            base, first = statistics.mean(decode[_place(row)]), statistics.mean(ttft[_place(row)])
            ratios = f"  decode {row['decode_ms'] / base:5.2f}x  first token {row['ttft_ms'] / first:5.2f}x"
        lengths = f"{row['input_len']}/{row['output_len']}"
        lines.append(f"{label(row):<32} batch {row['batch']:3d} {lengths:>10}{ratios}  {row['decode_ms']:8.3f} ms")
    for name, found in (("decode steps", decode), ("first tokens", ttft)):
        drifts = {place: max(values) / min(values) - 1 for place, values in found.items() if len(values) > 1}
        if drifts:
            _, batch, prompt, output = place = max(drifts, key=drifts.get)
            lines.append(
                f"drift of the server without LoRA, first to last, {name}: at most {100 * drifts[place]:.1f} % "
                f"(batch {batch}, {prompt}/{output})"
            )
    return "\n".join(lines)


def draw(rows: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = list(dict.fromkeys((row["input_len"], row["output_len"]) for row in rows))
    figure, axes = plt.subplots(
        2, len(places), figsize=(5.2 * len(places) + 2, 7.4), layout="constrained", squeeze=False
    )
    decode = baselines(rows, "decode_ms")
    # One line style a label of an arm: its mixes and ratios.
    styles: dict[str, dict[str, str]] = {}
    for column, place in enumerate(places):
        here = [row for row in rows if (row["input_len"], row["output_len"]) == place]
        latency, ratio = axes[0][column], axes[1][column]
        for name in dict.fromkeys(label(row) for row in here):
            line = sorted((row for row in here if label(row) == name), key=lambda row: row["batch"])
            batches = sorted({row["batch"] for row in line})
            steps = [statistics.mean(row["decode_ms"] for row in line if row["batch"] == batch) for batch in batches]
            arm = styles.setdefault(line[0]["arm"], {})
            look = {"color": COLOURS[line[0]["arm"]], "ls": arm.setdefault(name, STYLES[len(arm) % len(STYLES)])}
            latency.plot(batches, steps, marker="o", label=name, **look)
            if line[0]["arm"] != "no-lora" and all(_place(row) in decode for row in line):
                by_batch = {
                    b: [r["decode_ms"] / statistics.mean(decode[_place(r)]) for r in line if r["batch"] == b]
                    for b in batches
                }
                ratio.plot(batches, [statistics.mean(by_batch[b]) for b in batches], marker="o", **look)
        latency.set(title=f"{place[0]} in / {place[1]} out", ylabel="decode step, ms")
        ratio.set(ylabel="by the step without LoRA", xlabel="requests in the batch")
        ratio.axhline(1, color="black", lw=0.8)
        batches = sorted({row["batch"] for row in here})
        for panel in (latency, ratio):
            panel.set_xscale("log", base=2)
            panel.set_xticks(batches, [str(batch) for batch in batches])
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['layers']} layers, TP {first['tp']}, {first['gpu'] or 'CPU'}", fontsize=10
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    points = [row for row in read_rows(source) if row["kind"] == "point"]
    print(table(points))
    draw(points, source.with_suffix(".png"))
    print(source.with_suffix(".png"))
