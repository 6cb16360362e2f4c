"""Tables and plots of the rows.  python -m benchmarks.quality report ROWS.jsonl"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality.stats import Interval, interval, over_rows

Key = tuple[str, str]  # arm, variant
COLOURS = {2: "tab:blue", 4: "tab:orange", 8: "tab:green"}
MARKERS = {"trained": "o", "converted": "x", "healed": "^"}


class Results:
    """The result rows of one model and task: for each arm and variant one row a seed, the last written."""

    def __init__(self, rows: Sequence[dict], model: str, task: str):
        self.model, self.task = model, task
        self._by: dict[Key, dict] = {}
        for row in rows:
            if row["kind"] == "result" and (row["model"], row["task"]) == (model, task):
                self._by.setdefault((row["arm"], row["variant"]), {})[row["seed"]] = row
        variants = list(MARKERS)
        self.base = self._by.pop(("base", "base"), {}).get(None)
        self.keys = sorted(
            self._by, key=lambda key: (variants.index(key[1]), self.first(key)["nblocks"], self.first(key)["goal"])
        )

    def first(self, key: Key) -> dict:
        return next(iter(self._by[key].values()))

    def values(self, key: Key, figure: str) -> list[float]:
        return [row[figure] for _, row in sorted(self._by[key].items())]

    def paired(self, key: Key) -> tuple[list[dict], list[dict]]:
        """Rows of `key` and of the LoRA of the same seeds."""
        plain = self._by.get(("lora", "trained"), {})
        seeds = sorted(set(self._by[key]) & set(plain))
        return [self._by[key][seed] for seed in seeds], [plain[seed] for seed in seeds]

    def difference(self, key: Key, of: Callable[[dict, dict], float]) -> Interval | None:
        """Over seeds, of `of(row, LoRA's row)`."""
        ours, theirs = self.paired(key)
        return interval([of(a, b) for a, b in zip(ours, theirs, strict=True)]) if ours else None

    def perplexity_change(self, key: Key) -> Interval | None:
        """In percent of the LoRA's."""
        return self.difference(key, lambda a, b: 100 * (a["perplexity"] / b["perplexity"] - 1))

    def accuracy_change(self, key: Key) -> Interval | None:
        """In points."""
        return self.difference(key, lambda a, b: 100 * (a["accuracy"] - b["accuracy"]))


def tables(rows: Sequence[dict]) -> str:
    """Markdown: a table for each model and task, the sweep, the speed-up."""
    parts = []
    for results in all_results(rows):
        parts.append(_table(results))
    parts += [part for part in (_sweep(rows), _speed(rows)) if part]
    return "\n\n".join(parts)


def all_results(rows: Sequence[dict]) -> list[Results]:
    places = dict.fromkeys((row["model"], row["task"]) for row in rows if row["kind"] == "result")
    return [Results(rows, model, task) for model, task in places]


def _table(results: Results) -> str:
    if not results.keys:
        return f"### {results.model}, {results.task}\n\nNo adapter was scored yet."
    first = results.first(results.keys[0])
    seeds = len(results.values(results.keys[0], "accuracy"))
    lines = [
        f"### {results.model}, {results.task}",
        "",
        f"Seeds: {seeds}; {first['steps']} steps of {first['batch']}, {first['rows']:,} test rows. Intervals: 95 %; * excludes 0.",
        "",
        "| adapter | rank | parameters | perplexity | against LoRA, % | accuracy, % | against LoRA, points | spread over texts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if results.base:
        perplexity, accuracy = results.base["perplexity"], 100 * results.base["accuracy"]
        lines.append(f"| none | - | 0 | {perplexity:.3f} | - | {accuracy:.2f} | - | - |")
    for key in results.keys:
        row = results.first(key)
        blocks = "LoRA" if row["nblocks"] == 1 else f"{row['nblocks']} blocks"
        name = blocks if key[1] == "trained" else f"{blocks}, {key[1]}"
        perplexity = interval(results.values(key, "perplexity")).text(3)
        accuracy = interval([100 * value for value in results.values(key, "accuracy")]).text(2)
        cells = ["-", "-", "-"]
        ours, theirs = results.paired(key)
        if key != ("lora", "trained") and ours:
            cells = [
                _marked(results.perplexity_change(key)),
                _marked(results.accuracy_change(key)),
                _marked(over_rows(ours, theirs)),
            ]
        lines.append(
            f"| {name} | {row['rank']} | {row['params_ratio']:.2f}x | {perplexity} | {cells[0]} | {accuracy} | {cells[1]} | {cells[2]} |"
        )
    return "\n".join(lines)


def _marked(found: Interval) -> str:
    return found.text(2, sign=True) + ("*" if found.excludes_zero else "")


def _sweep(rows: Sequence[dict]) -> str:
    found: dict[tuple, dict[float, dict]] = {}
    for row in rows:
        if row["kind"] == "sweep":
            place = (row["model"], row["task"], row["arm"], row["init"])
            found.setdefault(place, {})[row["lr"]] = row
    if not found:
        return ""
    rates = sorted({lr for by in found.values() for lr in by})
    lines = [
        "### Learning rates and starts",
        "",
        "Validation loss (nats a text token + nats a class token), one seed; the lowest of a line is bold. Start: PEFT's own, or lora: "
        "the block-diagonal A of row-parallel layers as small as a plain LoRA's.",
        "",
        f"| model | task | adapter | start | {' | '.join(f'{lr:g}' for lr in rates)} |",
        "|---|---|---|---|" + "---|" * len(rates),
    ]
    for (model, task, arm, init), by in found.items():
        losses = {lr: row["text_loss"] + row["label_loss"] for lr, row in by.items()}
        best = min(losses, key=losses.get)
        cells = [
            "-" if lr not in losses else f"**{losses[lr]:.4f}**" if lr == best else f"{losses[lr]:.4f}" for lr in rates
        ]
        lines.append(f"| {model} | {task} | {arm} | {init} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(rows: Sequence[dict]) -> str:
    lines = [
        f"| {row['model']}, {row['task']} | {row['gpu'] or 'CPU'} | {row['adapters']} | {row['batch']} | {row['together_s']:.3f} | "
        f"{row['one_after_another_s']:.3f} | {row['speed_up']:.2f}x |"
        for row in rows
        if row["kind"] == "speed"
    ]
    if not lines:
        return ""
    head = [
        "### Several adapters in one pass",
        "",
        "| | device | adapters | rows each | s a step, one pass | s a step, one after another | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines])


def draw(rows: Sequence[dict], target: Path) -> None:
    """Differences to the LoRA against parameters, one column a model and task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [results for results in all_results(rows) if len(results.keys) > 1]
    if not found:
        raise ValueError("there is nothing to draw: no block-diagonal adapter was scored beside a LoRA")
    figure, axes = plt.subplots(2, len(found), figsize=(4.6 * len(found) + 2, 7.4), layout="constrained", squeeze=False)
    for column, results in enumerate(found):
        for row, change in enumerate((results.perplexity_change, results.accuracy_change)):
            panel = axes[row][column]
            panel.axhline(0, color="black", lw=0.8)
            for key in results.keys:
                first, difference = results.first(key), change(key)
                if first["nblocks"] == 1 or difference is None:
                    continue
                blocks, variant = first["nblocks"], key[1]
                # Beside each other, so that intervals can be told apart.
                shift = 0.012 * (math.log2(blocks) - 2) + 0.04 * list(MARKERS).index(variant)
                panel.errorbar(
                    first["params_ratio"] + shift, difference.mean, yerr=difference.half or 0, capsize=3,
                    fmt=MARKERS[variant], color=COLOURS.get(blocks, "tab:gray"),
                    mfc="none" if variant == "healed" else None, label=f"{blocks} blocks, {variant}",
                )  # fmt: skip
            panel.grid(alpha=0.3)
        axes[0][column].set(title=f"{results.model}\n{results.task}", ylabel="perplexity against LoRA, %")
        axes[1][column].set(ylabel="accuracy against LoRA, points", xlabel="parameters, by the LoRA's")
    kinds = {}
    for panel in axes[0]:
        handles, labels = panel.get_legend_handles_labels()
        kinds |= dict(zip(labels, handles, strict=True))
    figure.legend(kinds.values(), kinds.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle("Block-diagonal against LoRA: mean and 95 % interval over seeds", fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)
