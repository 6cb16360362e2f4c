"""The page in a real browser, against a real server of a tiny model on two ranks."""

import json
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from browser import ask_for, listening, page_for, run, wait_done
from harness import Server
from link import Link
from live import LORA
from servers import S_LORA, on

from sgl_bdlora.server_process import free_port

ADAPTERS = {"ink-bd": "bd2-r8", "ink-lora": "plain-r8-attention", "oak-bd": "bd4-r16", "oak-lora": "plain-r32"}
TIMES_OUT_MS = 60_000
TOKENS = 80

# Notes how much of unfinished answers each side has shown, and for how many batches the first plot had values.
WATCH = """() => {
    window.seen = {left: new Set(), right: new Set(), plots: new Set()};
    new MutationObserver(() => {
        for (const side of ['left', 'right'])
            if (document.querySelector(`#${side} .caret`)) seen[side].add(document.querySelector(`#${side} .answers`).innerText.length);
        const plot = document.querySelector('#plots figure');
        const count = name => plot.querySelectorAll(name).length;
        const batches = plot && count('circle') + count('rect') - count('.spread');
        if (batches) seen.plots.add(batches);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@dataclass
class Stage:
    """A page at `url` for a server that is reached through `link`; `foreign` are requests of the browser that left the machine."""

    url: str
    link: Link
    server: Server
    browser: object
    foreign: list[str]
    zoo: object

    def open(self, width: int = 1280, height: int = 900):
        page = self.browser.new_context(viewport={"width": width, "height": height}).new_page()
        page.set_default_timeout(TIMES_OUT_MS)
        page.on("request", lambda r: self._note(r.url))
        page.goto(self.url)
        page.wait_for_function("document.querySelectorAll('#pairs input').length > 1")
        return page

    def _note(self, url: str) -> None:
        if not re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:", url):
            self.foreign.append(url)

    def info(self) -> dict:
        return httpx.get(f"{self.server.base_url}/bdlora/info", timeout=60).json()


def serve(zoo, folder: Path) -> Server:
    """A server of its own, for a test that ends it."""
    paths = [f"{name}={zoo.adapter(S_LORA.family, recipe)}" for name, recipe in ADAPTERS.items()]
    arguments = (*LORA, *S_LORA.arguments, "--lora-paths", *paths)
    return Server(zoo.model(S_LORA.family), S_LORA.tp, folder / "server.log", arguments)


@contextmanager
def staged(browser, server: Server, zoo, folder: Path) -> Iterator[Stage]:
    link = Link(free_port(), int(server.base_url.rpartition(":")[2]))
    with page_for(link.url, free_port(), folder) as url:
        yield Stage(url, link, server, browser, [], zoo)
    link.cut()


@pytest.fixture(scope="module")
def stage(browser, live, tmp_path_factory) -> Iterator[Stage]:
    """A page for the shared S-LoRA server, which has just these adapters meanwhile."""
    live.clear()
    for name, recipe in ADAPTERS.items():
        live.load(name, live.folder(recipe))
    with staged(browser, live.server, live.zoo, tmp_path_factory.mktemp("page")) as stage:
        yield stage
    for name in ADAPTERS:
        live.unload(name)


def drawn(page) -> dict[str, list[list[float]]]:
    """Title of each plot -> for each arm its dots, or its bar where there is one value."""
    return page.evaluate("""() => Object.fromEntries([...document.querySelectorAll('#plots figure')].map(figure => {
        const arms = {};
        for (const mark of figure.querySelectorAll('[data-value]')) {
            const top = Math.floor(parseFloat(mark.getAttribute('y') ?? mark.getAttribute('cy')) / 52);
            (arms[top] ??= {})[mark.tagName] ??= [];
            arms[top][mark.tagName].push(parseFloat(mark.dataset.value));
        }
        const title = figure.querySelector('figcaption').childNodes[0].textContent.trim();
        return [title, Object.values(arms).map(arm => arm.circle ?? arm.rect)];
    }))""")


@on(S_LORA)
def test_a_mixed_batch_streams_on_both_sides_and_the_numbers_are_those_of_the_responses(stage, monkeypatch, tmp_path):
    page = stage.open()
    ask_for(page, requests=9, tokens=TOKENS, repeats=2)
    page.evaluate(WATCH)
    with listening(monkeypatch) as exchanges:
        run(page)
        status = wait_done(page)
    # Both sides filled word by word: each was seen with several lengths of unfinished answers, and the plots with fewer bars.
    assert all(len(page.evaluate(f"[...window.seen.{side}]")) > 3 for side in ("left", "right"))
    assert page.evaluate("[...window.seen.plots]") == [1, 2, 3, 4]
    assert "Done: 4 batches" in status
    for side in ("#left", "#right"):
        assert page.locator(f"{side} .answers li").count() == 9
        assert page.locator(f"{side} .chip.base").count() == 3
        assert page.locator(f"{side} .caret").count() == 0

    measured = [e for e in exchanges if e.body.get("sampling_params", {}).get("max_new_tokens") == TOKENS]
    assert len(measured) == 4
    batches = {"lora": [], "bd": []}
    for exchange in measured:
        arm = next(name for name in exchange.body["lora_path"] if name).partition("-")[2]
        tokens = exchange.tokens()
        assert [seen[-1][1] for seen in tokens.values()] == [TOKENS] * 9
        last = max(seen[-1][0] for seen in tokens.values())
        batches[arm].append({
            "Time to first token": statistics.median(seen[0][0] for seen in tokens.values()),
            "Time per output token": statistics.median(
                (seen[-1][0] - seen[0][0]) / (seen[-1][1] - seen[0][1]) for seen in tokens.values()
            ),
            "End to end": statistics.median(seen[-1][0] for seen in tokens.values()),
            "Tokens a second, whole batch": TOKENS * 9 / last,
        })  # fmt: skip
    shown = drawn(page)
    for title in batches["bd"][0]:
        for row, arm in enumerate(("lora", "bd")):
            expected = [batch[title] for batch in batches[arm]]
            assert shown[title][row] == pytest.approx(expected, rel=0.02, abs=0.002), (title, arm)
    ratios = [
        b["Tokens a second, whole batch"] / p["Tokens a second, whole batch"]
        for b, p in zip(batches["bd"], batches["lora"], strict=True)
    ]
    speedup = float(page.get_attribute("#headline .headline", "data-speedup"))
    assert speedup == pytest.approx(statistics.median(ratios), rel=0.02)
    assert page.inner_text("#headline .big") == f"{speedup:.2f}×"

    entries = {a["name"]: a for a in stage.info()["adapters"]}
    for row, kind in enumerate(("lora", "bd")):
        used = [a for name, a in entries.items() if name in (f"ink-{kind}", f"oak-{kind}")]
        assert shown["Collectives that LoRA adds"][row] == [max(a["collectives_per_step"] for a in used)]
        assert shown["Adapter weights on a rank"][row] == [
            max(sum(a["host_bytes"][rank] for a in used) for rank in range(S_LORA.tp))
        ]
    assert shown["Collectives that LoRA adds"][0] != shown["Collectives that LoRA adds"][1] == [0]
    assert "times show the idea" in page.inner_text("#note")

    page.wait_for_selector("#save-json:not([disabled])")
    with page.expect_download() as download:
        page.click("#save-json")
    saved = tmp_path / "run.json"
    download.value.save_as(saved)
    assert len(json.loads(saved.read_text())["batches"]) == 4
    other = stage.open()
    with other.expect_file_chooser() as chooser:
        other.click("#open")
    chooser.value.set_files(saved)
    assert "Opened the run" in wait_done(other)
    assert drawn(other) == shown
    assert stage.foreign == []


@on(S_LORA)
def test_an_adapter_is_loaded_and_unloaded_and_a_bad_one_shows_its_error(stage, tmp_path):
    page = stage.open()
    page.get_by_role("tab", name="Adapters").click()
    page.wait_for_selector("#adapter-list table")

    page.fill("#load-name textarea, #load-name input", "new")
    page.fill("#load-path textarea, #load-path input", str(stage.zoo.adapter(S_LORA.family, "bd4-mlp")))
    page.click("#load")
    page.wait_for_selector("#adapter-message .good")
    page.wait_for_function("document.querySelector('#adapter-list').innerText.includes('new')")
    entry = next(a for a in stage.info()["adapters"] if a["name"] == "new")
    cells = (
        page.locator("#adapter-list tr", has=page.get_by_role("rowheader", name="new", exact=True))
        .locator("td")
        .all_inner_texts()
    )
    assert cells[:3] == ["block-diagonal", "12", "4"]
    bars = page.locator("#adapter-bytes figure", has_text="new, rank 12").locator("rect")
    drawn = [int(float(bars.nth(i).get_attribute("data-value"))) for i in range(bars.count())]
    assert drawn == [max(entry["host_bytes"]), *(max(entry["plain_bytes"][s]) for s in ("s-lora", "replicated"))]

    bad = shutil.copytree(stage.zoo.adapter(S_LORA.family, "bd4-r16"), tmp_path / "bad")
    config = json.loads((bad / "adapter_config.json").read_text())
    config["use_dora"] = True
    (bad / "adapter_config.json").write_text(json.dumps(config))
    told = httpx.post(
        f"{stage.server.base_url}/load_lora_adapter", json={"lora_name": "bad", "lora_path": str(bad)}, timeout=60
    )
    assert told.status_code == 400
    page.fill("#load-name textarea, #load-name input", "bad")
    with page.expect_file_chooser() as chooser:
        page.locator("#load-files button").first.click()
    chooser.value.set_files(shutil.make_archive(str(tmp_path / "packed"), "zip", bad))
    page.wait_for_selector("#load-files .file-preview")
    page.click("#load")
    page.wait_for_selector("#adapter-message .bad")
    message = page.inner_text("#adapter-message")
    assert "use_dora" in message
    assert "Fix:" in message
    assert "bad" not in {a["name"] for a in stage.info()["adapters"]}

    page.click("#unload-name input")
    page.get_by_role("option", name="new", exact=True).click()
    page.click("#unload")
    page.wait_for_function("!document.querySelector('#adapter-list').innerText.includes('new')")
    assert "new" not in {a["name"] for a in stage.info()["adapters"]}


@pytest.mark.slow
@on(S_LORA)
def test_two_readers_at_once_and_a_server_that_dies_and_comes_back(stage):
    first, second = stage.open(), stage.open(390, 844)
    ask_for(first, requests=8, tokens=400, repeats=1)
    run(first)
    first.wait_for_selector("#left .caret")
    # The second reader is answered while the first one's comparison runs.
    second.get_by_role("tab", name="Chat").click()
    second.click("#chat-send")
    second.wait_for_function("[...document.querySelectorAll('#chat-answers .text')].some(a => a.innerText.length > 3)")
    assert first.locator("#left .caret").count() + first.locator("#right .caret").count() > 0
    assert second.evaluate("document.documentElement.scrollWidth") <= 390

    stage.link.cut()
    words = wait_done(first, "bad")
    assert "broke off" in words
    assert "kept" in words
    assert first.locator("#left .answers li").count() == 8
    first.wait_for_selector("#servers [data-state=down]")
    first.wait_for_selector("#run:not([disabled])")
    run(first)
    first.wait_for_function("document.querySelector('#status').innerText.includes('Nothing answers')")

    stage.link.mend()
    first.wait_for_selector("#servers [data-state=ready]")
    field = first.locator("#tokens input[type=number]")
    field.fill("4")
    field.press("Tab")
    run(first)
    assert "Done: 2 batches" in wait_done(first)
    assert stage.foreign == []


@pytest.mark.slow
@on(S_LORA)
def test_the_page_is_usable_within_two_seconds_by_keyboard_and_on_a_phone(stage):
    """The best of five: other work on the machine is not what is measured."""
    times = []
    for _ in range(5):
        page = stage.browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        begin = time.perf_counter()
        page.goto(stage.url)
        page.wait_for_selector("#run:not([disabled])")
        times.append(time.perf_counter() - begin)
    assert min(times) < 2, times
    page.wait_for_selector("#servers [data-state=ready]")
    for tab in ("Compare", "Chat", "Adapters", "How it works"):
        button = page.get_by_role("tab", name=tab)
        button.focus()
        button.press("Enter")
        page.wait_for_timeout(300)
        assert button.get_attribute("aria-selected") == "true"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    drawing = page.locator("#how .drawing", has_text="S-LoRA sharding")
    q_proj = next(layer for layer in stage.info()["model_layers"] if layer["name"] == "qkv_proj")["slices"][0]
    assert f"×{q_proj['inputs']}" in drawing.inner_text()
    assert drawing.locator(".collective").count() == 4
    assert page.locator("#how .drawing", has_text="0 extra collectives").locator(".collective").count() == 0


@pytest.mark.slow
@on(S_LORA)
def test_a_comparison_of_64_requests_does_not_freeze_the_page(stage):
    page = stage.open()
    ask_for(page, requests=64, tokens=48, repeats=2)
    # The longest time between two frames of the page, while it runs.
    page.evaluate("""() => { window.longest = 0; let before = performance.now();
        const tick = now => { window.longest = Math.max(window.longest, now - before); before = now; requestAnimationFrame(tick); };
        requestAnimationFrame(tick); }""")
    run(page)
    page.wait_for_selector("#left .caret")
    page.get_by_role("tab", name="How it works").click()
    page.wait_for_selector("#how .drawing")
    page.get_by_role("tab", name="Compare").click()
    assert "Done: 4 batches" in wait_done(page, limit_s=240)
    assert page.locator("#left .answers li").count() == 64
    assert page.evaluate("window.longest") < 2000


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again(browser, zoo, tmp_path):
    with serve(zoo, tmp_path / "first") as server, staged(browser, server, zoo, tmp_path) as stage:
        _kill_and_start_again(stage, tmp_path)


def _kill_and_start_again(stage, tmp_path):
    page = stage.open()
    ask_for(page, requests=8, tokens=400, repeats=3)
    run(page)
    page.wait_for_selector("#left .caret")
    stage.server.stop()
    assert "broke off" in wait_done(page, "bad")
    page.wait_for_selector("#servers [data-state=died], #servers [data-state=down]")
    with serve(stage.zoo, tmp_path / "again") as again:
        stage.link.cut()
        stage.link.mend(int(again.base_url.rpartition(":")[2]))
        page.wait_for_selector("#servers [data-state=ready]")
        field = page.locator("#tokens input[type=number]")
        field.fill("4")
        field.press("Tab")
        run(page)
        assert "Done: 6 batches" in wait_done(page)


@pytest.mark.slow
def test_a_password_can_be_asked_for(browser, tmp_path):
    with page_for("http://127.0.0.1:1", free_port(), tmp_path, auth=[("ann", "secret")]) as url:
        assert httpx.get(f"{url}/config").status_code == 401
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("username").fill("ann")
        page.get_by_label("password").fill("secret")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#servers [data-state=down]")
