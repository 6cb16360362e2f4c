"""The line under the title: each server's state, asked again every few seconds."""

from html import escape

import gradio as gr

from app.client import Server, ServerProblem
from app.compare import BLOCK, PLAIN, Comparison
from app.context import Context, look, plain_title
from app.plots import hatch

MASTHEAD = (
    "<header class='masthead'><h1>Block-diagonal LoRA, live</h1><p>A model split over several ranks answers with small adapters "
    "(LoRA). Cut the usual way, every adapter makes the ranks wait for each other four times a layer. Block-diagonal adapters "
    "never do. See what that saves.</p></header>"
)
WORDS = {
    "down": "not there",
    "starting": "starting",
    "busy": "busy",
    "other": "not ours",
    "refused": "refuses",
    "died": "broke off",
}


def build(context: Context, timer: gr.Timer, demo: gr.Blocks) -> None:
    gr.HTML(hatch() + MASTHEAD)
    line = gr.HTML("<div class='servers'>Looking for the server …</div>", elem_id="servers")

    def show() -> str:
        return status(context)

    for event in (demo.load, timer.tick):
        event(show, None, line, show_progress="hidden", api_visibility="private", concurrency_limit=None)


def status(context: Context) -> str:
    two = context.compare_server is not None
    titles = {context.arms[BLOCK]: "Block-diagonal server" if two else "Server"}
    if two:
        titles[context.arms[PLAIN]] = "S-LoRA server"
    return f"<div class='servers' role='status'>{''.join(_server(server, title) for server, title in titles.items())}</div>"


def _server(server: Server, title: str) -> str:
    address = f"{escape(title)} <code>{escape(server.url)}</code>"
    try:
        served = look(server)
    except ServerProblem as problem:
        return (
            f"<span class='server problem' data-state='{problem.state}'><span class='lamp'>✕ {WORDS[problem.state]}</span>"
            f"<span>{address}: {escape(str(problem))} Asking again every few seconds.</span></span>"
        )
    busy = (
        " · a comparison is running"
        if Comparison.running()
        else f" · {served.running} requests"
        if served.running
        else ""
    )
    count = len(served.adapters)
    facts = f"{served.model}, {served.where}, {count} adapter{'' if count == 1 else 's'}, plain ones: {plain_title(served)}{busy}"
    return f"<span class='server ready' data-state='ready'><span class='lamp'>● ready</span><span>{address}: {escape(facts)}</span></span>"
