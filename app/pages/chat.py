"""Chat: one prompt to several adapters at once, streamed in columns."""

import time
from collections.abc import Iterator
from html import escape

import gradio as gr

from app import text
from app.client import ServerProblem
from app.compare import BLOCK, extend
from app.context import Context, kind_class, look, look_or_none
from app.measure import Answer
from app.pairs import BASE
from app.served import Served

REFRESH_S = 0.15


def build(context: Context, timer: gr.Timer, demo: gr.Blocks) -> None:
    gr.HTML(
        "<div class='story'><p>Ask once; the base model and every adapter that you choose answer in the same batch.</p></div>"
    )
    known = gr.State([])
    adapters = gr.CheckboxGroup([BASE], value=[BASE], label="Who answers", elem_id="chat-adapters")
    prompt = gr.Textbox(label="Prompt", lines=2, value="How do I make tea?", elem_id="chat-prompt", submit_btn=False)
    with gr.Row():
        tokens = gr.Slider(1, 512, 64, step=1, label="Longest answer (tokens)")
        temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0: always the likeliest word)")
    with gr.Row():
        send = gr.Button("Send", variant="primary", elem_id="chat-send")
        stop = gr.Button("Stop", elem_id="chat-stop")
    answers = gr.HTML("<div class='chat'></div>", elem_id="chat-answers")

    def answer(prompt: str, chosen: list[str], tokens: float, temperature: float) -> Iterator[str]:
        yield from chat(context, prompt, chosen, int(tokens), float(temperature))

    def choices(known: list[str]):
        served = look_or_none(context.server)
        names = [BASE, *(a.name for a in served.adapters)] if served else known
        if names == known:
            return gr.skip(), gr.skip()
        return names, gr.update(choices=names, value=[BASE, *_first_skills(served)])

    for event in (demo.load, timer.tick):
        event(
            choices, known, [known, adapters], show_progress="hidden", api_visibility="private", concurrency_limit=None
        )
    inputs = [prompt, adapters, tokens, temperature]
    running = gr.on(
        [send.click, prompt.submit],
        answer,
        inputs,
        answers,
        show_progress="hidden",
        api_visibility="private",
        concurrency_limit=16,
    )
    stop.click(None, cancels=[running])


def _first_skills(served: Served) -> list[str]:
    """Up to three adapters to begin with: block-diagonal ones where there are some."""
    return [a.name for a in sorted(served.adapters, key=lambda a: a.plain)][:3]


def chat(context: Context, prompt: str, chosen: list[str], max_tokens: int, temperature: float) -> Iterator[str]:
    """The columns as they fill. Ends by itself when the reader leaves: closing it closes the server's stream."""
    if not prompt.strip() or not chosen:
        yield text.message("note", "Write a prompt and choose who answers.")
        return
    server = context.arms[BLOCK]
    try:
        served = look(server)
    except ServerProblem as problem:
        yield text.message("bad", str(problem))
        return
    names = [None if name == BASE else name for name in chosen]
    answers = [Answer(name, prompt) for name in names]
    body = {
        "text": [served.prompt_format.replace("{prompt}", prompt)] * len(names),
        **({"lora_path": names} if any(names) else {}),
        "sampling_params": {"temperature": temperature, "max_new_tokens": max_tokens},
    }
    yield columns(answers, served)
    begin = shown = time.perf_counter()
    stream = server.stream(body)
    try:
        for chunk in stream:
            answers[chunk.index] = extend(answers[chunk.index], chunk, begin)
            if time.perf_counter() - shown > REFRESH_S:
                yield columns(answers, served)
                shown = time.perf_counter()
    except ServerProblem as problem:
        yield text.message("bad", f"{problem} What had arrived is kept.") + columns(answers, served, live=False)
        return
    finally:
        stream.close()
    yield columns(answers, served, live=False)


def columns(answers: list[Answer], served: Served, live: bool = True) -> str:
    return f"<div class='chat'>{''.join(_column(a, served, live) for a in answers)}</div>"


def _column(answer: Answer, served: Served, live: bool) -> str:
    adapter = served.adapter(answer.adapter) if answer.adapter else None
    name = answer.adapter or BASE
    about = adapter.describe if adapter else "no adapter" if not answer.adapter else ""
    words, _ = text.until_end(answer.text)
    caret = " caret" if live and not answer.finished else ""
    facts = f"{answer.tokens} tokens · first after {text.seconds(answer.first_s)} · {text.seconds(answer.per_token_s)} a token"
    return (
        f"<article aria-label='{escape(name, quote=True)}'><span class='chip {kind_class(adapter)}'>{escape(name)}</span> "
        f"<span class='times'>{escape(about)}</span><p class='text{caret}'>{escape(words)}</p><p class='times'>{facts}</p></article>"
    )
