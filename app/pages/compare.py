"""Compare: the same prompts as an S-LoRA-sharded batch and as a block-diagonal batch, in turns."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from app import record as records
from app import results, text
from app.client import ServerProblem
from app.compare import BLOCK, PLAIN, REFRESH_S, Comparison
from app.context import Context, look, pairs
from app.pairs import BASE, read_mix, show_mix, spread
from app.planning import Choices, arms, plan, record
from app.record import Arm, Record

EVEN, SKEWED = "Even", "Skewed: the first is asked most"
PLACEHOLDER = "<p class='placeholder'>Times, collectives and bytes are drawn here while the batches run.</p>"
SIDES = ((PLAIN, "S-LoRA sharding", "left"), (BLOCK, "Block-diagonal", "right"))


def build(context: Context, timer: gr.Timer, demo: gr.Blocks) -> None:
    known, finished = gr.State([]), gr.State(None)
    chosen = gr.CheckboxGroup(
        [BASE],
        value=[],
        label="Adapters in the batch, each as a block-diagonal and as a plain one",
        elem_id="pairs",
    )
    with gr.Row():
        batch = gr.Slider(1, 64, 8, step=1, label="Requests in a batch", elem_id="batch")
        tokens = gr.Slider(2, 512, 24, step=1, label="Answer length (tokens)", elem_id="tokens")
        repeats = gr.Slider(1, 10, 3, step=1, label="Repeats", elem_id="repeats")
    with gr.Accordion("More: mix, prompts, temperature", open=False):
        with gr.Row():
            shape = gr.Radio([EVEN, SKEWED], value=EVEN, label="Mix")
            mix = gr.Textbox(label="Requests for each", info="Edit the numbers to make your own mix.", elem_id="mix")
        with gr.Row():
            temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0: always the likeliest word)")
            words = gr.Slider(0, 1000, 0, step=10, label="Lengthen prompts to about this many words (0: as they are)")
        own = gr.Textbox(
            label="Own prompts, one a line, used in turn", lines=2, placeholder="Empty: prompts that fit each skill"
        )
        with gr.Row():
            same = gr.Checkbox(
                True, label="Every answer has exactly the length above, so that both sides do equal work"
            )
            forget = gr.Checkbox(True, label="Do not take prompts from the cache")
    with gr.Row():
        run = gr.Button("Run the comparison", variant="primary", elem_id="run", scale=3)
        stop = gr.Button("Stop", elem_id="stop", scale=1)
    status = gr.HTML(_status("Choose adapters and press Run."), elem_id="status")
    headline = gr.HTML("", elem_id="headline")
    with gr.Row(equal_height=True):
        left, right = (gr.HTML(_empty(key, title), elem_id=side, min_width=300) for key, title, side in SIDES)
    figures = gr.HTML(PLACEHOLDER, elem_id="plots")
    note = gr.HTML("", elem_id="note")
    with gr.Row():
        as_json = gr.DownloadButton("Save as JSON", interactive=False, elem_id="save-json", size="sm")
        as_csv = gr.DownloadButton("Save as CSV", interactive=False, elem_id="save-csv", size="sm")
        opened = gr.UploadButton("Open a saved run …", file_types=[".json"], elem_id="open", size="sm")
    views = [status, headline, left, right, figures, note]

    def choices(known: list[str], chosen: list[str]):
        found = pairs(context)
        labels = [pair.label for pair in found]
        if not found or labels == known:
            return gr.skip(), gr.skip()
        options = [(pair.label, pair.name) for pair in found] + [(f"{BASE}, no adapter", BASE)]
        values = [value for _, value in options]
        kept = [name for name in chosen if name in values]
        return labels, gr.update(choices=options, value=kept or [pair.name for pair in found[:8]])

    def mixed(chosen: list[str], batch: float, shape: str) -> str:
        return show_mix(spread(chosen, int(batch), shape == SKEWED))

    def go(mix, tokens, repeats, temperature, words, own, same, forget) -> Iterator[tuple]:
        lines = tuple(line.strip() for line in (own or "").splitlines() if line.strip())

        def wanted(known: list[str]) -> Choices:
            return Choices(
                read_mix(mix, known), int(tokens), float(temperature), int(repeats), same, forget, int(words), lines
            )

        yield from compare(context, wanted)

    def reopen(path: str):
        try:
            found = records.from_json(Path(path).read_bytes())
        except (records.NotARecord, OSError) as problem:
            return _status(str(problem), "bad"), *[gr.skip()] * (len(views) - 1), gr.skip()
        return *show(found, f"Opened the run of {found.made}."), found

    def save(found: Record | None):
        if found is None:
            return gr.update(interactive=False), gr.update(interactive=False)
        folder = Path(tempfile.mkdtemp(dir=context.uploads))
        stem = "comparison-" + "".join(c if c.isdigit() else "-" for c in found.made.removesuffix(" UTC"))
        paths = folder / f"{stem}.json", folder / f"{stem}.csv"
        paths[0].write_text(records.to_json(found), encoding="utf-8")
        paths[1].write_text(records.to_csv(found), encoding="utf-8", newline="")
        return tuple(gr.update(value=str(path), interactive=True) for path in paths)

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    for event in (demo.load, timer.tick):
        event(choices, [known, chosen], [known, chosen], concurrency_limit=None, **quiet)
    gr.on(
        [chosen.change, batch.change, shape.change], mixed, [chosen, batch, shape], mix, concurrency_limit=None, **quiet
    )
    inputs = [mix, tokens, repeats, temperature, words, own, same, forget]
    running = run.click(go, inputs, [*views, finished], concurrency_limit=16, **quiet)
    running.then(save, finished, [as_json, as_csv], concurrency_limit=None, **quiet)
    # Cancelling closes the generator, which stops the run; what it showed stays.
    stop.click(lambda: _status("Stopped. What had arrived is kept.", "note"), None, status, cancels=[running], **quiet)
    opened.upload(reopen, opened, [*views, finished], **quiet).then(save, finished, [as_json, as_csv], **quiet)


def compare(context: Context, wanted) -> Iterator[tuple]:
    """Everything the page shows, again and again while the run goes on. wanted: names of pairs -> Choices."""
    try:
        plain, block = look(context.arms[PLAIN]), look(context.arms[BLOCK])
        found = pairs(context)
        choices: Choices = wanted([*(pair.name for pair in found), BASE])
    except (ServerProblem, ValueError) as problem:
        yield _status(str(problem), "bad"), *[gr.skip()] * 6
        return
    sides = arms(choices, found, plain, block, {key: server.url for key, server in context.arms.items()})
    run = Comparison(plan(choices, found, block), context.arms, {arm.key: arm.title for arm in sides}).start()

    def so_far() -> Record:
        return record(choices, sides, plain, block, run.batches, run.error)

    seen, drawn, done = -1, -1, False
    try:
        while not done:
            run.look()
            done = run.done
            if run.changes != seen:
                seen = run.changes
                now = so_far()
                columns = [results.column(arm, run.live.get(arm.key, ()), _doing(run, arm)) for arm in sides]
                if len(run.batches) != drawn or done:
                    drawn = len(run.batches)
                    yield (
                        _run_status(run),
                        results.headline(now),
                        *columns,
                        results.figures(now),
                        results.note(now),
                        now if done else gr.skip(),
                    )
                else:
                    yield _run_status(run), gr.skip(), *columns, gr.skip(), gr.skip(), gr.skip()
            if not done:
                time.sleep(REFRESH_S)
    finally:
        run.stop()


def show(found: Record, words: str) -> tuple:
    """The views of a finished run."""
    columns = [results.column(arm, results.latest(found.batches, arm.key), "saved run") for arm in found.arms]
    state = _status(found.error, "bad") if found.error else _status(words, "good")
    return state, results.headline(found), *columns, results.figures(found), results.note(found)


def _doing(run: Comparison, arm: Arm) -> str:
    if run.done:
        return "done"
    return "answering" if run.current == arm.key else "waiting for its turn"


def _run_status(run: Comparison) -> str:
    if run.error:
        return _status(run.error, "bad")
    return _status(run.status, "good" if run.done else "note")


def _status(words: str, kind: str = "note") -> str:
    return f"<div data-kind='{kind}'>{text.message(kind, words)}</div>"


def _empty(key: str, title: str) -> str:
    return results.side(key, title, "answers appear here", "")
