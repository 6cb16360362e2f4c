"""Table and picture of a latency run.

python -m benchmarks.latency.plot benchmarks/results/latency-....jsonl
"""

import itertools
import statistics
import sys
from pathlib import Path

from benchmarks.record import points_to_draw

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
    """One line a point, with ratios to the mean of the servers without LoRA and the least and greatest of its repeats, where the row has
    them; and the most that the servers without LoRA drifted in each figure."""
    lines = []
    decode, ttft = baselines(rows, "decode_ms"), baselines(rows, "ttft_ms")
    for row in rows:
        ratios = ""
        if _place(row) in decode:
            base, first = statistics.mean(decode[_place(row)]), statistics.mean(ttft[_place(row)])
            ratios = f"  decode {row['decode_ms'] / base:5.2f}x  first token {row['ttft_ms'] / first:5.2f}x"
        lengths = f"{row['input_len']}/{row['output_len']}"
        each = row.get("decode_ms_each")
        spread = f" ({min(each):.3f} to {max(each):.3f})" if each else ""
        lines.append(
            f"{label(row):<32} batch {row['batch']:3d} {lengths:>10}{ratios}  {row['decode_ms']:8.3f} ms{spread}"
        )
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
    """A column a mix of adapters; for every prompt and output length the decode steps, from the least repeat to the greatest where rows
    have them, and below them their ratios where there are rows without LoRA."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = list(dict.fromkeys((row["input_len"], row["output_len"]) for row in rows))
    mixes = list(dict.fromkeys(row["mix"] for row in rows if row["adapters"])) or [""]
    decode = baselines(rows, "decode_ms")
    high = 2 if decode else 1
    size = (3.4 * len(mixes) + 2.6, 2.7 * high * len(lengths))
    figure, axes = plt.subplots(
        high * len(lengths), len(mixes), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    looks = _looks(rows)
    for (i, place), (j, mix) in itertools.product(enumerate(lengths), enumerate(mixes)):
        here = [
            row
            for row in rows
            if (row["input_len"], row["output_len"]) == place and (not row["adapters"] or row["mix"] == mix)
        ]
        panels = [axes[high * i + k][j] for k in range(high)]
        for name, look in looks.items():
            line = [row for row in here if _name(row) == name]
            _line(panels[0], [(row["batch"], row["decode_ms"]) for row in line], **look)
            for row in line:
                if each := row.get("decode_ms_each"):
                    panels[0].vlines(row["batch"], min(each), max(each), color=look["color"], lw=1)
            if decode and name != "no-lora":
                by = [(row["batch"], row["decode_ms"] / statistics.mean(decode[_place(row)]))
                      for row in line if _place(row) in decode]  # fmt: skip
                _line(panels[1], by, **look)
        panels[0].set_title(f"{mix}, {place[0]} in / {place[1]} out".removeprefix(", "), fontsize=10)
        if decode:
            panels[1].axhline(1, color="black", lw=0.8)
        panels[-1].set_xlabel("requests in the batch")
        batches = sorted({row["batch"] for row in here})
        for panel in panels:
            panel.set_xscale("log", base=2)
            panel.set_xticks(batches, [str(batch) for batch in batches])
            panel.grid(alpha=0.3)
    for row in axes:
        # Once, for all panels of a row: a limit ends their scaling.
        row[0].set_ylim(bottom=0)
    for i in range(len(lengths)):
        axes[high * i][0].set_ylabel("decode step, ms")
        if decode:
            axes[high * i + 1][0].set_ylabel("by the step without LoRA")
    handles = [plt.Line2D([], [], marker="o", label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside right center", fontsize=8)
    first = rows[0]
    figure.suptitle(f"{first['model']}, {first['layers']} layers\n{_size(first)}, {first['gpu'] or 'CPU'}", fontsize=10)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _size(row: dict) -> str:
    share = row.get("share_of", 1)
    return f"one rank of TP {share} without collectives" if share > 1 else f"TP {row['tp']}"


def _name(row: dict) -> str:
    """An arm's, whatever the mix: by the ratio that was asked for, where the row has it, because what came of it differs between ranks."""
    if row["arm"] != "block-diagonal":
        return row["arm"]
    return f"{row['arm']} {row.get('wanted_ratio', row['params_ratio']):.3g}x"


def _looks(rows: list[dict]) -> dict[str, dict]:
    """Name -> colour of its arm and a line style of its own there."""
    looks: dict[str, dict] = {}
    for row in rows:
        same = [name for name in looks if name.partition(" ")[0] == row["arm"] and name != _name(row)]
        looks.setdefault(_name(row), {"color": COLOURS[row["arm"]], "ls": STYLES[len(same) % len(STYLES)]})
    return looks


def _line(panel, points: list[tuple[int, float]], **look) -> None:
    """The mean of each batch's values, in order of batches."""
    batches = sorted({batch for batch, _ in points})
    values = [statistics.mean(value for other, value in points if other == batch) for batch in batches]
    panel.plot(batches, values, marker="o", **look)


def _is_of_one_model(points: list[dict]) -> None:
    """Raises ValueError if they are of several models or sizes."""
    if len(kinds := sorted({f"{row['model']}, {_size(row)}" for row in points})) > 1:
        raise ValueError(
            f"rows of {'; of '.join(kinds)}: one picture is of one of them, so give each a file of its own"
        )


def main(argv: list[str] | None = None) -> int:
    source, points = points_to_draw("latency", __doc__, argv, _is_of_one_model)
    print(table(points))
    draw(points, source.with_suffix(".png"))
    print(source.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
