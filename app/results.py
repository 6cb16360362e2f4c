"""A run as HTML: answers side by side, the speed-up in large type, plots, and the note of what was compared."""

from collections.abc import Sequence
from html import escape

from app import plots, text
from app.compare import BLOCK, PLAIN
from app.measure import BY_KEY, METRICS, Answer, Batch, ratio, values
from app.pairs import BASE
from app.record import Arm, Record

STYLES = {PLAIN: "plain", BLOCK: "block"}
# The first is the one in large type.
GAINS = (
    ("tokens_per_s", "tokens a second"),
    ("first_s", "first token"),
    ("per_token_s", "each further token"),
    ("end_to_end_s", "end to end"),
)


def column(arm: Arm, answers: Sequence[Answer], state: str) -> str:
    """One side with its answers. state: a word on what it is doing."""
    items = "".join(_answer(a, STYLES[arm.key]) for a in answers)
    return side(
        arm.key, arm.title, f"{arm.collectives} extra collectives a step · {state}", f"<ol class='answers'>{items}</ol>"
    )


def side(key: str, title: str, about: str, content: str) -> str:
    """The frame of one side. content: HTML."""
    name = escape(title, quote=True)
    return (
        f"<section class='side {STYLES[key]}' aria-label='{name}'><div class='side-head'><h3>{name}</h3><p>{escape(about)}</p></div>"
        f"{content}</section>"
    )


def _answer(answer: Answer, style: str) -> str:
    words, ended = text.until_end(answer.text)
    hidden = "<span class='more'> · goes on unseen, for equal work</span>" if ended and not answer.finished else ""
    caret = "" if answer.finished or ended else " caret"
    times = (
        f"{answer.tokens} tokens · first {text.seconds(answer.first_s)} · {text.seconds(answer.per_token_s)} each"
        if answer.tokens
        else "waiting"
    )
    chip = f"<span class='chip {style if answer.adapter else 'base'}'>{escape(answer.adapter or BASE)}</span>"
    return (
        f"<li><div class='top'>{chip}<span class='times'>{times}{hidden}</span></div><div class='prompt'>{escape(answer.prompt)}</div>"
        f"<div class='text{caret}'>{escape(words.strip())}</div></li>"
    )


def headline(record: Record) -> str:
    """The speed-up, or what is missing to say it."""
    titles = {arm.key: arm.title for arm in record.arms}
    gains = {key: ratio(BY_KEY[key], record.batches, BLOCK, PLAIN) for key, _ in GAINS}
    main = gains[GAINS[0][0]]
    if main is None:
        return "<div class='headline'><p class='what'>The speed-up appears when both sides have run once.</p></div>"
    over = f" ({main.low:.2f} to {main.high:.2f} over {main.repeats} repeats)" if main.repeats > 1 else " (one repeat)"
    rest = "".join(
        f"<li>{escape(words)} <b>{gains[key].middle:.2f}×</b></li>" for key, words in GAINS[1:] if gains[key]
    )
    cpu = "<p>On a CPU: the times show the idea, not GPU speed.</p>" if record.on_cpu else ""
    against = f"the tokens a second with block-diagonal adapters, against {titles[PLAIN]}{over}"
    return (
        f"<div class='headline' data-speedup='{main.middle!r}'><div class='big'>{main.middle:.2f}×</div>"
        f"<div class='what'><p>{escape(against)}</p>{cpu}<ul aria-label='Other gains'>{rest}</ul></div></div>"
    )


def figures(record: Record) -> str:
    """All plots, and their numbers as a table."""
    batches = record.batches
    shown = [
        plots.bars(
            metric.title,
            metric.unit,
            [plots.Bar(arm.title, STYLES[arm.key], values(metric, batches, arm.key)) for arm in record.arms],
            "higher is better" if metric.higher_is_better else "lower is better",
        )
        for metric in METRICS
    ]
    for title, unit, field, note in (
        ("Collectives that LoRA adds", "a step", "collectives", "every one makes all ranks wait"),
        ("Adapter weights on a rank", "bytes", "bytes_per_rank", "of the adapters in this batch"),
    ):
        shown.append(
            plots.bars(
                title, unit, [plots.Bar(arm.title, STYLES[arm.key], [getattr(arm, field)]) for arm in record.arms], note
            )
        )
    return f"<div class='plots'>{''.join(shown)}</div>{_numbers(record)}"


def _numbers(record: Record) -> str:
    rows = []
    for metric in METRICS:
        for arm in record.arms:
            found = values(metric, record.batches, arm.key)
            unit, factor = plots.scaled(metric.unit, max(found, default=0))
            rows.append([f"{metric.title} ({unit})", arm.title, *(plots.number(v * factor) for v in found)])
    width = max((len(row) for row in rows), default=2)
    rows = [[*row, *[""] * (width - len(row))] for row in rows]
    head = ["", "side", *(f"repeat {i + 1}" for i in range(width - 2))]
    caption = "Each value is the median of the batch's requests; tokens a second are those of the whole batch."
    return f"<details class='more-numbers'><summary>The numbers as a table</summary>{text.table(head, rows, caption)}</details>"


def note(record: Record) -> str:
    """What was compared, line by line."""
    items = "".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in record.note)
    cpu = text.message("note", "This ran on a CPU. The times show the idea and not GPU speed.") if record.on_cpu else ""
    return f"<section aria-label='What was compared'>{cpu}<dl class='note-list'>{items}</dl></section>"


def latest(batches: Sequence[Batch], arm: str) -> tuple[Answer, ...]:
    """The answers of an arm's last batch."""
    return next((b.answers for b in reversed(batches) if b.arm == arm), ())
