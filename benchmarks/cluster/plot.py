"""Picture and tables of a grid run.  python -m benchmarks.cluster.plot benchmarks/results/cluster-grid.jsonl"""

import sys
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


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(read_rows(source), source.with_suffix(".png"))
    print(tables(read_rows(source)))
