"""Tables and plots of the rows.  python -m benchmarks.quality report ROWS.jsonl --page docs/quality.md"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.stats import Interval, interval, over_rows, validation_loss

Key = tuple[str, str]  # arm, variant
COLOURS = {2: "tab:blue", 4: "tab:orange", 8: "tab:green"}
MARKERS = {"trained": "o", "small start": "s", "converted": "x", "healed": "^"}
# Lines of a page between which its tables stand.
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
# With two seeds Student's interval is 13 standard errors wide to either side: the plot shows the seeds themselves.
FEWEST = 3


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

    def rates(self) -> str:
        """Of what was trained, all that occur."""
        found: dict[str, set[float]] = {}
        for (_, variant), rows in self._by.items():
            for row in rows.values():
                if "lr" in row:
                    kind = "LoRA" if row["nblocks"] == 1 else "blocks" if variant == "trained" else f"blocks, {variant}"
                    found.setdefault(kind, set()).add(row["lr"])
                elif variant == "healed":
                    found.setdefault(variant, set()).add(row["heal_lr"])
        return "; ".join(f"{kind} {', '.join(f'{lr:g}' for lr in sorted(rates))}" for kind, rates in found.items())

    def perplexity_changes(self, key: Key) -> list[float]:
        """In percent of the LoRA's, a seed each."""
        return [100 * (a["perplexity"] / b["perplexity"] - 1) for a, b in zip(*self.paired(key), strict=True)]

    def accuracy_changes(self, key: Key) -> list[float]:
        """In points, a seed each."""
        return [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(*self.paired(key), strict=True)]


def tables(rows: Sequence[dict]) -> str:
    """Markdown: all tasks at equal parameters, a table for each model and task, the sweeps, the speed-up."""
    found = all_results(rows)
    parts = [_summary(found), *map(_table, found), _sweep(rows), _healing(rows), _speed(rows)]
    return "\n\n".join(part for part in parts if part)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the page's two marker lines. Raises ValueError if it does not have them."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}, between which the tables would go")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def all_results(rows: Sequence[dict]) -> list[Results]:
    places = dict.fromkeys((row["model"], row["task"]) for row in rows if row["kind"] == "result")
    return [Results(rows, model, task) for model, task in places]


def _summary(found: Sequence[Results]) -> str:
    lines, models = [], {results.model for results in found}
    for results in found:
        name = results.task if len(models) == 1 else f"{results.model}, {results.task}"
        arms = {key[0]: results.first(key) for key in results.keys if results.first(key)["nblocks"] > 1}
        for arm, first in arms.items():
            if first["goal"] != 1.0:
                continue
            keys = [(arm, variant) if (arm, variant) in results.keys else None for variant in MARKERS]
            seeds = max(len(results.paired(key)[0]) for key in keys if key)
            if not seeds:
                continue
            converted = keys[list(MARKERS).index("converted")]
            error = "-" if converted is None else f"{interval(results.values(converted, 'relative_error')).mean:.3f}"
            perplexity = [_marked(interval(results.perplexity_changes(key))) if key else "-" for key in keys]
            accuracy = [_marked(over_rows(*results.paired(key))) if key else "-" for key in keys]
            cells = [name, seeds, first["nblocks"], *perplexity, *accuracy, error]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if not lines:
        return ""
    first, *others = MARKERS
    columns = [f"{figure}: {first} | {' | '.join(others)}" for figure in ("perplexity", "accuracy")]
    head = [
        "### At equal parameters",
        "",
        "Against the LoRA of the same seeds. Perplexity: %, ± over seeds (none for one seed). Accuracy: points, ± over texts, of these "
        "seeds. Error: of the converted updates, by their norm. Intervals: 95 %; * excludes 0.",
        "",
        f"| task | seeds | blocks | {columns[0]} | {columns[1]} | error |",
        "|---" * (2 * len(MARKERS) + 4) + "|",
    ]
    return "\n".join([*head, *lines])


def _table(results: Results) -> str:
    if not results.keys:
        return f"### {results.model}, {results.task}\n\nNo adapter was scored yet."
    first = results.first(results.keys[0])
    seeds = len(results.values(results.keys[0], "accuracy"))
    lines = [
        f"### {results.model}, {results.task}",
        "",
        f"Seeds: {seeds}; {first['steps']} steps of {first['batch']}, {first['rows']:,} test rows; learning rates: {results.rates()}. "
        "Intervals: 95 %; * excludes 0.",
        "",
        "| adapter | rank | parameters | perplexity | against LoRA, %, ± over seeds | accuracy, % | points, ± over seeds "
        "| points, ± over texts |",
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
                _marked(interval(results.perplexity_changes(key))),
                _marked(interval(results.accuracy_changes(key))),
                _marked(over_rows(ours, theirs)),
            ]
        lines.append(
            f"| {name} | {row['rank']} | {row['params_ratio']:.2f}x | {perplexity} | {cells[0]} | {accuracy} | {cells[1]} | {cells[2]} |"
        )
    return "\n".join(lines)


def _marked(found: Interval) -> str:
    return found.text(2, sign=True) + ("*" if found.excludes_zero else "")


def _sweep(rows: Sequence[dict]) -> str:
    found: dict[tuple, dict[float, float]] = {}
    for row in rows:
        if row["kind"] == "sweep":
            place = (row["model"], row["task"], row["arm"], row["init"])
            found.setdefault(place, {})[row["lr"]] = validation_loss(row)
    return _losses(
        "### Learning rates and starts",
        "Validation loss (nats a text token + nats a class token), one seed; the lowest of a line is bold. Start: PEFT's own, or lora: "
        "the block-diagonal A of row-parallel layers as small as a plain LoRA's.",
        ("model", "task", "adapter", "start"),
        found,
    )


def _healing(rows: Sequence[dict]) -> str:
    found: dict[tuple, dict[float | str, float]] = {}
    for row in rows:
        if row["kind"] == "heal" and row["nblocks"] > 1:
            by = found.setdefault((row["model"], row["task"], row["nblocks"]), {})
            by["not healed" if row["variant"] == "converted" else row["heal_lr"]] = validation_loss(row)
    for row in rows:
        if row["kind"] == "heal" and row["nblocks"] == 1:
            for model, task, nblocks in found:
                if (model, task) == (row["model"], row["task"]):
                    found[model, task, nblocks]["LoRA"] = validation_loss(row)
    return _losses(
        "### Healing's rates",
        "Validation loss, as above, at the LoRA's parameters: of the LoRA, of its conversion, and of that healed at several rates; "
        "one seed; the lowest of the rates is bold.",
        ("model", "task", "blocks"),
        found,
    )


def _losses(title: str, text: str, names: Sequence[str], found: dict[tuple, dict[float | str, float]]) -> str:
    """A line for each of `found`: its losses by rate, which are numbers, after those that have a name."""
    columns = {column for by in found.values() for column in by}
    columns = sorted(columns, key=lambda column: (not isinstance(column, str), column))
    lines = []
    for place, by in found.items():
        best = min((column for column in by if not isinstance(column, str)), key=by.get, default=None)
        cells = [
            "-" if column not in by else f"**{by[column]:.4f}**" if column == best else f"{by[column]:.4f}"
            for column in columns
        ]
        lines.append(f"| {' | '.join(map(str, [*place, *cells]))} |")
    heads = [*names, *(column if isinstance(column, str) else f"{column:g}" for column in columns)]
    head = [title, "", text, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*head, *lines]) if lines else ""


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
    """Differences to the LoRA by goal of parameters: two rows of panels a model, a column a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [results for results in all_results(rows) if len(results.keys) > 1]
    if not found:
        raise ValueError("there is nothing to draw: no block-diagonal adapter was scored beside a LoRA")
    models, tasks = (list(dict.fromkeys(names)) for names in zip(*((r.model, r.task) for r in found), strict=True))
    figure, axes = plt.subplots(
        2 * len(models),
        len(tasks),
        figsize=(4.6 * len(tasks) + 2, 6.8 * len(models)),
        layout="constrained",
        squeeze=False,
    )
    unused = set(axes.flat)
    for results in found:
        top, column = 2 * models.index(results.model), tasks.index(results.task)
        goals = sorted({results.first(key)["goal"] for key in results.keys})
        for row, values in enumerate((results.perplexity_changes, results.accuracy_changes)):
            panel = axes[top + row][column]
            unused.discard(panel)
            panel.axhline(0, color="black", lw=0.8)
            for key in results.keys:
                first, each = results.first(key), values(key)
                if first["nblocks"] == 1 or not each:
                    continue
                blocks, variant, colour = first["nblocks"], key[1], COLOURS.get(first["nblocks"], "tab:gray")
                # Beside each other, so that intervals can be told apart.
                slot = len(COLOURS) * list(MARKERS).index(variant) + math.log2(blocks) - 0.5
                x = goals.index(first["goal"]) + 0.84 * (slot / (len(COLOURS) * len(MARKERS)) - 0.5)
                mean = over_rows(*results.paired(key)) if row else interval(each)
                half = mean.half if row or len(each) >= FEWEST else None
                panel.errorbar(
                    x, mean.mean, yerr=half, capsize=3, fmt=MARKERS[variant], color=colour,
                    mfc="none" if variant == "healed" else None, label=f"{blocks} blocks, {variant}",
                )  # fmt: skip
                if len(each) > 1:
                    panel.plot([x] * len(each), each, "_", color=colour, ms=9, alpha=0.6)
            panel.grid(axis="y", alpha=0.3)
            panel.set_xticks(range(len(goals)), [f"{goal:g}x" for goal in goals])
        seeds = max(len(results.values(key, "accuracy")) for key in results.keys)
        title = f"{results.model}\n{results.task}, {seeds} seed{'s' if seeds > 1 else ''}"
        axes[top][column].set(title=title, ylabel="perplexity against LoRA, %")
        axes[top + 1][column].set(
            ylabel="accuracy against LoRA, points",
            xlabel="parameters, by the LoRA's",
        )
    for panel in unused:
        panel.axis("off")
    kinds = {}
    for panel in axes.flat:
        handles, labels = panel.get_legend_handles_labels()
        kinds |= dict(zip(labels, handles, strict=True))
    figure.legend(kinds.values(), kinds.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"Block-diagonal against LoRA. Marks: means; dashes: seeds. Intervals, 95 %: of perplexity over seeds, from {FEWEST} seeds on; "
        "of accuracy over texts, of these seeds",
        fontsize=9,
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)
