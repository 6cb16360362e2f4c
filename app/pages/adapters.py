"""Adapters: what is loaded and what it costs each rank; load, upload and unload."""

import tempfile
from pathlib import Path

import gradio as gr

from app import plots, text, uploads
from app.client import ServerProblem
from app.context import Context, look
from app.plots import Bar
from app.served import Adapter, Served

SHARDINGS = (("s-lora", "S-LoRA"), ("replicated", "replicated"))
MAX_FIGURES = 24


def build(context: Context, timer: gr.Timer, demo: gr.Blocks) -> None:
    urls = [server.url for server in context.servers]
    which = gr.Radio(urls, value=urls[0], label="Server", visible=len(urls) > 1)
    message = gr.HTML("", elem_id="adapter-message")
    listing = gr.HTML("<p>Waiting for the server …</p>", elem_id="adapter-list")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320), gr.Group():
            name = gr.Textbox(label="Name to load it under", placeholder="fr", elem_id="load-name")
            path = gr.Textbox(
                label="Folder on the server's machine", placeholder="/adapters/fr", elem_id="load-path",
                info="As PEFT's save_pretrained writes it.",
            )  # fmt: skip
            files = gr.File(
                label="or upload a zip, or the two files", file_count="multiple",
                file_types=[".zip", ".json", ".safetensors"], elem_id="load-files", height=150,
            )  # fmt: skip
            folder = gr.UploadButton("or upload a folder …", file_count="directory", elem_id="load-folder", size="sm")
            load = gr.Button("Load", variant="primary", elem_id="load")
        with gr.Column(min_width=320), gr.Group():
            old = gr.Dropdown([], label="Loaded adapter", elem_id="unload-name", allow_custom_value=False)
            unload = gr.Button("Unload", elem_id="unload")
            gr.HTML(
                "<p class='aside' style='padding:.6rem .9rem'>Uploads are unpacked on the machine of this page: they reach a server that "
                "shares its files. What cannot be served exactly is refused, in the server's own words.</p>"
            )

    sizes = gr.HTML("", elem_id="adapter-bytes")
    known = gr.State("")

    def refresh(url: str, known: str):
        try:
            served = look(context.named(url))
        except ServerProblem as problem:
            shown = text.message("bad", str(problem))
            return [gr.skip()] * 4 if known == shown else (shown, shown, "", gr.update(choices=[]))
        key = repr((url, served.adapters, served.pool_used_bytes))
        if key == known:
            return [gr.skip()] * 4
        return key, *overview(served), gr.update(choices=[a.name for a in served.adapters])

    def do_load(url: str, name: str, path: str, files: list[str] | None):
        try:
            name = uploads.check_name(name)
            if files:
                path = str(uploads.unpack(files, Path(tempfile.mkdtemp(dir=context.uploads)) / name))
            if not path.strip():
                raise uploads.BadUpload("Name a folder, or upload an adapter.")
            context.named(url).load(name, path.strip())
        except (uploads.BadUpload, ServerProblem) as problem:
            return text.message("bad", str(problem)), gr.skip(), gr.skip(), gr.skip()
        return text.message("good", f"{name} is loaded on every rank."), "", "", None

    def do_unload(url: str, name: str | None):
        if not name:
            return text.message("note", "Choose an adapter to unload."), gr.skip()
        try:
            context.named(url).unload(name)
        except ServerProblem as problem:
            return text.message("bad", str(problem)), gr.skip()
        return text.message("good", f"{name} is unloaded."), None

    private = {"api_visibility": "private", "concurrency_limit": None}
    outputs = [known, listing, sizes, old]
    for event in (demo.load, timer.tick, which.change):
        event(refresh, [which, known], outputs, show_progress="hidden", **private)
    loaded = load.click(do_load, [which, name, path, files], [message, name, path, files], **private)
    given = folder.upload(do_load, [which, name, path, folder], [message, name, path, folder], **private)
    unloaded = unload.click(do_unload, [which, old], [message, old], **private)
    for done in (loaded, given, unloaded):
        done.then(refresh, [which, known], outputs, show_progress="hidden", **private)


def overview(served: Served) -> tuple[str, str]:
    """The table, and every adapter's bytes per rank under each sharding, all to one scale."""
    if not served.adapters:
        return text.message("note", "No adapter is loaded. Load one below."), ""
    return _table(served), _bytes(served)


def _table(served: Served) -> str:
    rows = [
        [
            a.name,
            a.kind,
            str(a.rank),
            str(a.nblocks) if a.nblocks > 1 else "–",
            str(a.local_rank),
            text.count(a.parameters),
            str(a.collectives),
            "yes" if a.resident else "when asked for",
            str(a.running + a.waiting) if a.running + a.waiting else "–",
        ]
        for a in served.adapters
    ]
    head = [
        "name",
        "kind",
        "rank",
        "blocks",
        "on a rank",
        "parameters",
        "collectives a step",
        "in the pool",
        "requests",
    ]
    used = f"pool: {text.size(served.pool_used_bytes)} of {text.size(served.pool_bytes)} a rank"
    return text.table(head, rows, f"{len(rows)} adapters on {served.where}; {used}")


def _bytes(served: Served) -> str:
    shown = served.adapters[:MAX_FIGURES]
    largest = max(max([*a.bytes_per_rank, *(n for ranks in a.plain_bytes.values() for n in ranks)]) for a in shown)
    some = (
        f" The first {MAX_FIGURES} of {len(served.adapters)} adapters are drawn."
        if len(served.adapters) > len(shown)
        else ""
    )
    figures = "".join(_adapter_bytes(a, largest, served.sharding) for a in shown)
    return (
        "<div class='story'><h2>Bytes on each rank, to one scale</h2><p>As served now, and what an adapter of the same rank "
        f"would take were it plain. The fullest rank is shown.{some}</p></div><div class='plots'>{figures}</div>"
    )


def _adapter_bytes(adapter: Adapter, largest: float, sharding: str) -> str:
    own = f"plain, {dict(SHARDINGS)[sharding]}" if adapter.plain else adapter.kind
    bars = [Bar(f"{own} (as served)", "plain" if adapter.plain else "block", [max(adapter.bytes_per_rank)])]
    for key, words in SHARDINGS:
        if not (adapter.plain and key == sharding):
            style = "plain" if key == "s-lora" and not adapter.plain else "other"
            bars.append(Bar(f"plain, {words}", style, [max(adapter.plain_bytes[key])]))
    return plots.bars(f"{adapter.name}, rank {adapter.rank}", "bytes", bars, largest=largest)
