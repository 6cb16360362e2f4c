"""Pictures of a grid run and of policies on a real cluster.

python -m benchmarks.cluster.plot benchmarks/results/cluster-grid.jsonl       # and its tables
python -m benchmarks.cluster.plot benchmarks/results/policies-h200x2.jsonl
"""

import argparse
from pathlib import Path

from benchmarks.record import read_rows
from sgl_bdlora.cluster.report import COLOURS


def label_of(row: dict) -> str:
    variant = "" if row["variant"] == "base" else f", {row['variant']}"
    return f"{row['ranks_label']}, {row['drift']}{variant}"


def draw(rows: list[dict], target: Path) -> None:
    """Highest rate at the SLO, bars by case and policy, one panel a cost model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["costs"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure, panels = plt.subplots(len(models), 1, figsize=(12, 4 * len(models)), layout="constrained", squeeze=False)
    for axes, model in zip(panels[:, 0], models, strict=True):
        found = [row for row in rows if row["costs"] == model]
        labels = list(dict.fromkeys(map(label_of, found)))
        for k, policy in enumerate(policies):
            rate = {label_of(row): row["highest_rate"] for row in found if row["policy"] == policy}
            x = [i + (k - len(policies) / 2 + 0.5) * 0.1 for i in range(len(labels))]
            axes.bar(x, [rate.get(label, 0) for label in labels], 0.095, color=COLOURS.get(policy), label=policy)
        axes.set_xticks(range(len(labels)), [label.replace(", ", "\n") for label in labels], fontsize=8)
        axes.set(ylabel="highest requests/s at the SLO")
        provisional = ", provisional" if any(row["provisional"] for row in found) else ""
        axes.set_title(
            f"cost model {model}{provisional}; {found[0]['replicas']} replicas, {found[0]['adapters']} adapters",
            fontsize=10,
        )
        axes.grid(alpha=0.3, axis="y")
    panels[0, 0].set_ylim(top=170)
    panels[0, 0].legend(fontsize=8, ncols=len(policies), loc="upper right")
    figure.savefig(target, dpi=100)
    plt.close(figure)


def draw_policies(rows: list[dict], target: Path) -> None:
    """Times to the first token and requests served within the SLO, a column for each rate of the real cluster's run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (setup,) = [row for row in rows if row["kind"] == "setup"][:1]
    points = [row for row in rows if row["kind"] == "point"]
    rates = sorted({row["rate"] for row in points})
    figure, panels = plt.subplots(
        2, len(rates), figsize=(5.5 * len(rates), 6), layout="constrained", sharey="row", squeeze=False
    )
    for rate, (times, served) in zip(rates, panels.T, strict=True):
        found = [row for row in points if row["rate"] == rate]
        names, x = [row["policy"] for row in found], range(len(found))
        colours = [COLOURS.get(name) for name in names]
        for q, marker in ((50, "_"), (95, "o"), (99, "^")):
            # None: it did not come.
            values = [float("nan") if row[f"ttft_p{q}_ms"] is None else row[f"ttft_p{q}_ms"] for row in found]
            times.scatter(x, values, c=colours, marker=marker, s=60)
            # In the legend without a policy's colour.
            times.scatter([], [], c="black", marker=marker, label=f"P{q}")
        times.axhline(setup["settings"]["slo"]["ttft_ms"], color="gray", ls=":", lw=0.8)
        times.set(yscale="log", title=f"{rate:g} requests/s")
        times.set_xticks(x, [])
        served.bar(x, [row["answered_req_s"] for row in found], color="none", edgecolor="gray", lw=0.8)
        served.bar(x, [row["goodput_req_s"] for row in found], color=colours)
        served.set_xticks(x, names, rotation=40, ha="right")
        for axes in (times, served):
            axes.grid(alpha=0.3, axis="y")
    panels[0, 0].set_ylabel("time to first token, ms")
    panels[1, 0].set_ylabel("requests/s in the SLO\n(outline: answered)")
    panels[0, 0].legend(fontsize=8)
    replicas, model = setup["settings"]["replicas"]["count"], setup["model"]
    figure.suptitle(
        f"{replicas} replicas of one {setup['gpu']}, {model}, {len(setup['adapters'])} adapters", fontsize=10
    )
    figure.savefig(target, dpi=100)
    plt.close(figure)


def tables(rows: list[dict]) -> str:
    """Markdown: highest rate / P99 of the first token at one rate [/ replicas needed], a line a case."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lines = []
    for model in dict.fromkeys(row["costs"] for row in rows):
        lines += [
            "",
            f"Cost model `{model}`:",
            "",
            "| ranks, drift | " + " | ".join(policies) + " |",
            "|---" * (len(policies) + 1) + "|",
        ]
        for case in dict.fromkeys(label_of(row) for row in rows if row["costs"] == model):
            cells = []
            for policy in policies:
                (row,) = [r for r in rows if (r["costs"], label_of(r), r["policy"]) == (model, case, policy)]
                p99 = "never" if row["ttft_p99_ms"] is None else f"{row['ttft_p99_ms']:.0f}"
                cells.append(
                    f"{row['highest_rate']:.0f} / {p99}"
                    + (f" / {row['needed_replicas']}" if "needed_replicas" in row else "")
                )
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", type=Path, help="of benchmarks.cluster.grid or .policies; the picture goes beside them")
    source = parser.parse_args().rows
    rows = read_rows(source)
    if rows[0]["benchmark"] == "policies":
        draw_policies(rows, source.with_suffix(".png"))
    else:
        draw(rows, source.with_suffix(".png"))
        print(tables(rows))


if __name__ == "__main__":
    main()
