"""A headless Chromium, a page in this process, and what the page received from its server, byte by byte."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

HOW = "uv pip install -e '.[app]' playwright; apt-get install chromium (or set CHROMIUM to its path)"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def chromium() -> Iterator:
    """Skips the test where Chromium or Playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason=f"Playwright is missing: {HOW}")
    pytest.importorskip("gradio", reason=f"Gradio is missing: {HOW}")
    if CHROMIUM is None:
        pytest.skip(f"Chromium is missing: {HOW}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def page_for(server: str, port: int, folder: Path, compare_server: str | None = None, **launch) -> Iterator[str]:
    """The application for the server at this address; yields its own address."""
    from app.client import Server
    from app.context import Context
    from app.page import build
    from app.theme import CSS, theme

    context = Context(Server(server), Server(compare_server) if compare_server else None, folder)
    demo = build(context)
    demo.launch(
        server_name="127.0.0.1", server_port=port, theme=theme(), css=CSS, prevent_thread_lock=True, quiet=True,
        ssr_mode=False, allowed_paths=[str(folder)], **launch,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        demo.close(verbose=False)


@dataclass
class Exchange:
    """A streamed request: when it was sent, its body, and every piece of the answer with its time (perf_counter seconds)."""

    begin: float
    body: dict
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def tokens(self) -> dict[int, list[tuple[float, int]]]:
        """Request of the batch -> (seconds since the batch was sent, tokens so far) whenever there were more."""
        found: dict[int, list[tuple[float, int]]] = {}
        rest = b""
        for at, piece in self.pieces:
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    told = json.loads(event[6:])
                    seen = found.setdefault(told["index"], [])
                    count = told["meta_info"]["completion_tokens"]
                    if count > (seen[-1][1] if seen else 0):
                        seen.append((at - self.begin, count))
        return found


@contextmanager
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exchange]]:
    """Every streamed exchange of this process, as httpx hands it over."""
    exchanges: list[Exchange] = []
    stream, iter_raw = httpx.Client.stream, httpx.Response.iter_raw

    def listened_stream(self, method, url, **more):
        exchanges.append(Exchange(time.perf_counter(), more.get("json") or {}))
        return stream(self, method, url, **more)

    def listened_iter_raw(self, *args, **more):
        if self.url.path != "/generate":
            yield from iter_raw(self, *args, **more)
            return
        exchange = exchanges[-1]
        for piece in iter_raw(self, *args, **more):
            exchange.pieces.append((time.perf_counter(), piece))
            yield piece

    monkeypatch.setattr(httpx.Client, "stream", listened_stream)
    monkeypatch.setattr(httpx.Response, "iter_raw", listened_iter_raw)
    yield exchanges


def ask_for(page, requests: int, tokens: int, repeats: int) -> None:
    """Fill the form: all pairs and the base model."""
    page.get_by_label("base model, no adapter").check()
    for name, value in (("batch", requests), ("tokens", tokens), ("repeats", repeats)):
        field = page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")
    page.get_by_role("button", name=re.compile("More:")).click()
    page.wait_for_function(f"""() => {{
        const words = document.querySelector('#mix textarea, #mix input')?.value ?? '';
        return [...words.matchAll(/ (\\d+)(,|$)/g)].reduce((sum, found) => sum + +found[1], 0) == {requests}
            && words.includes('base model');
    }}""")


def run(page) -> None:
    page.click("#run")


def wait_done(page, kind: str = "good", limit_s: float = 120) -> str:
    page.wait_for_selector(f"#status [data-kind={kind}]", timeout=limit_s * 1e3)
    return page.inner_text("#status")
