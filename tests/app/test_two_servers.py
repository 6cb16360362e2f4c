"""`python -m app --server A --compare-server B` as a reader starts it, with two real servers and a real browser."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from browser import ask_for, run, wait_done
from harness import Server
from live import LORA
from servers import S_LORA, on

from sgl_bdlora.server_process import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), on(S_LORA)]

LOCAL = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:")
BLOCKS = {"ink-bd": "bd2-r8", "oak-bd": "bd4-r16"}
PLAINS = {"ink-lora": "plain-r8-attention", "oak-lora": "plain-r32"}


@pytest.fixture
def two(live, tmp_path):
    """(server of the block-diagonal adapters, server of the plain ones in S-LoRA's sharding)."""
    live.clear()
    for name, recipe in PLAINS.items():
        live.load(name, live.folder(recipe))
    paths = [f"{name}={live.folder(recipe)}" for name, recipe in BLOCKS.items()]
    model = live.zoo.model(live.served.family)
    with Server(model, live.served.tp, tmp_path / "log", (*LORA, "--lora-paths", *paths)) as blocks:
        yield blocks, live.server
    for name in PLAINS:
        live.unload(name)


def asked(server: Server) -> int:
    """How many batches a server has answered."""
    return server.log.read_text(errors="replace").count('"POST /generate HTTP/1.1" 200')


def test_each_side_is_asked_at_its_own_server(two, browser, tmp_path):
    blocks, plains = two
    port, log = free_port(), tmp_path / "page.log"
    command = [
        sys.executable,
        "-m",
        "app",
        "--server",
        blocks.base_url,
        "--compare-server",
        plains.base_url,
        "--port",
        str(port),
    ]
    with log.open("wb") as out:
        page_process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2], env={**os.environ}
        )
    try:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(60_000)
        foreign = []
        page.on("request", lambda r: foreign.append(r.url) if not LOCAL.match(r.url) else None)
        for _ in range(60):
            try:
                httpx.get(f"http://127.0.0.1:{port}", timeout=2)
                break
            except httpx.TransportError:
                page.wait_for_timeout(500)
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_function("document.querySelectorAll('#pairs input').length > 1")
        before = asked(blocks), asked(plains)
        ask_for(page, requests=6, tokens=24, repeats=2)
        run(page)
        status = wait_done(page)
        assert "Done: 4 batches" in status
        # Each side: a batch that is not measured, and one for each of two repeats.
        assert (asked(blocks) - before[0], asked(plains) - before[1]) == (3, 3)
        for side, names in (("#left", PLAINS), ("#right", BLOCKS)):
            assert page.locator(f"{side} .answers li").count() == 6
            chips = set(page.locator(f"{side} .chip").all_inner_texts())
            assert set(names) <= {word for chip in chips for word in re.split(r"\s+", chip)}, chips
        note = page.inner_text("#note")
        assert "two servers" in note
        assert "S-LoRA sharding" in note
        assert page.get_attribute("#headline .headline", "data-speedup")
        assert foreign == []
    finally:
        page_process.terminate()
        assert page_process.wait(20) == 0, log.read_text()
    assert "The page is up at" in log.read_text()
