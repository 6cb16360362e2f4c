"""HTTP to servers that answer, refuse, break off; runs that alternate, stop and wait for each other; uploads."""

import json
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app import uploads
from app.client import Server, ServerProblem
from app.compare import BLOCK, PLAIN, Ask, Comparison, Plan


class Fake:
    """A server of fixed answers. routes: path -> (status, body) or a function that writes the answer itself."""

    def __init__(self, routes: dict):
        fake = self
        self.asked: list[tuple[str, dict]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length") or 0)
                fake.asked.append((self.path, json.loads(self.rfile.read(length) or b"{}")))
                route = routes.get(self.path, (404, {"detail": "no such route"}))
                if callable(route):
                    return route(self, fake.asked[-1][1])
                self.send_response(route[0])
                self.end_headers()
                self.wfile.write(json.dumps(route[1]).encode())

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def event(index: int, tokens: int, reason: dict | None = None, **more) -> bytes:
    meta = {"completion_tokens": tokens, "prompt_tokens": 3, "cached_tokens": 0, "finish_reason": reason}
    return b"data: " + json.dumps({"text": "é" * tokens, "index": index, "meta_info": meta, **more}).encode() + b"\n\n"


def streaming(tokens: int, stop_after: int | None = None, gap: float = 0.0):
    def write(handler, body):
        handler.send_response(200)
        handler.end_headers()
        wanted = min(tokens, body["sampling_params"]["max_new_tokens"])
        for token in range(1, wanted + 1):
            for index in range(len(body["text"])):
                piece = event(index, token, {"type": "length"} if token == wanted else None)
                # In two pieces, as networks do.
                handler.wfile.write(piece[:40])
                handler.wfile.flush()
                handler.wfile.write(piece[40:])
            handler.wfile.flush()
            if stop_after == token and wanted > 2:
                return
            time.sleep(gap)
        handler.wfile.write(b"data: [DONE]\n\n")

    return write


def problem(of) -> ServerProblem:
    with pytest.raises(ServerProblem) as caught:
        of()
    return caught.value


def test_every_trouble_has_its_name_and_the_servers_own_words():
    with Fake({"/bdlora/info": (503, {}), "/load_lora_adapter": (400, {"success": False, "error_message": "wrong side"}),
               "/unload_lora_adapter": (400, {"error": {"message": "not loaded"}}), "/model_info": (200, {})}) as fake:  # fmt: skip
        server = Server(fake.url)
        assert problem(server.state).state == "starting"
        assert str(problem(lambda: server.load("a", "/a"))) == "wrong side"
        assert str(problem(lambda: server.unload("a"))) == "not loaded"
        assert fake.asked[1] == ("/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"})
    assert problem(server.state).state == "down"
    with Fake({}) as fake:
        assert problem(Server(fake.url).state).state == "other"
    with Fake({"/bdlora/info": (200, {"time": 1}), "/model_info": (200, {"model_path": "m"})}) as fake:
        assert problem(Server(fake.url).state).state == "other"


def test_the_admin_key_is_sent_to_the_routes_of_administration_only():
    seen = []

    def note(handler, body):
        seen.append((handler.path, handler.headers["Authorization"]))
        handler.send_response(400)
        handler.end_headers()
        handler.wfile.write(b"{}")

    routes = ("/bdlora/info", "/load_lora_adapter", "/unload_lora_adapter", "/generate")
    with Fake(dict.fromkeys(routes, note)) as fake:
        server = Server(fake.url, "user's", "admin's")
        for ask in (server.state, lambda: server.load("a", "/a"), lambda: server.unload("a")):
            problem(ask)
        problem(lambda: list(server.stream({"text": ["a"]})))
        problem(Server(fake.url, "user's").state)
    assert seen[:-1] == [(route, f"Bearer {'user' if route == '/generate' else 'admin'}'s") for route in routes]
    assert seen[-1] == ("/bdlora/info", "Bearer user's")


def test_a_stream_is_read_as_it_comes():
    with Fake({"/generate": streaming(3)}) as fake:
        body = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 3}}
        chunks = list(Server(fake.url).stream(body))
    assert [(c.index, c.tokens, c.text, c.finished) for c in chunks[-2:]] == [(0, 3, "ééé", True), (1, 3, "ééé", True)]
    assert len(chunks) == 6
    assert sorted(c.at for c in chunks) == [c.at for c in chunks]


def test_a_stream_that_breaks_off_or_is_refused_says_so():
    body = {"text": ["a"], "sampling_params": {"max_new_tokens": 9}}
    with Fake({"/generate": streaming(9, stop_after=2)}) as fake:
        assert problem(lambda: list(Server(fake.url).stream(body))).state == "died"
    with Fake({"/generate": (400, {"error": {"message": "no adapter 'x'"}})}) as fake:
        assert str(problem(lambda: list(Server(fake.url).stream(body)))) == "no adapter 'x'"

    def aborted(handler, _):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(event(0, 1, {"type": "abort", "message": "out of memory"}))

    with Fake({"/generate": aborted}) as fake:
        assert str(problem(lambda: list(Server(fake.url).stream(body)))) == "out of memory"


def plan(repeats: int = 2, tokens: int = 4) -> Plan:
    asks = (Ask("one?", {PLAIN: "x-lora", BLOCK: "x-bd"}), Ask("two?", {PLAIN: None, BLOCK: None}))
    return Plan(asks, tokens, 0.0, repeats)


def finish(run: Comparison, limit: float = 20) -> Comparison:
    end = time.monotonic() + limit
    while not run.done:
        assert time.monotonic() < end, run.status
        run.look()
        time.sleep(0.01)
    return run


TITLES = {PLAIN: "S-LoRA sharding", BLOCK: "Block-diagonal"}


def test_a_run_takes_turns_and_is_warmed_up():
    with Fake({"/generate": streaming(9)}) as fake:
        server = Server(fake.url)
        run = finish(Comparison(plan(), {PLAIN: server, BLOCK: server}, TITLES).start())
    asked = [(body["lora_path"][0], body["sampling_params"]["max_new_tokens"]) for _, body in fake.asked]
    assert asked[:2] == [("x-lora", 2), ("x-bd", 2)]
    assert asked[2:] == [("x-lora", 4), ("x-bd", 4), ("x-bd", 4), ("x-lora", 4)]
    # Prompts are forgotten: no batch looks up what another one left in the cache.
    assert len({body["extra_key"] for _, body in fake.asked}) == 6
    assert run.error is None
    assert [(b.arm, b.repeat, b.complete) for b in run.batches] == [
        (PLAIN, 0, True), (BLOCK, 0, True), (BLOCK, 1, True), (PLAIN, 1, True),
    ]  # fmt: skip
    assert all(a.tokens == 4 for b in run.batches for a in b.answers)


def test_a_server_that_dies_leaves_what_had_arrived():
    with (
        Fake({"/generate": streaming(9)}) as well,
        Fake({"/generate": streaming(9, stop_after=2)}) as ill,
    ):
        run = finish(Comparison(plan(), {PLAIN: Server(well.url), BLOCK: Server(ill.url)}, TITLES).start())
    assert "broke off" in run.error
    assert "1 finished batch and what had arrived are kept" in run.error
    assert [b.complete for b in run.batches] == [True, False]
    assert [a.tokens for a in run.batches[1].answers] == [2, 2]


def test_runs_wait_for_each_other_and_can_be_stopped():
    with Fake({"/generate": streaming(500, gap=0.01)}) as fake:
        server = Server(fake.url)
        first = Comparison(plan(tokens=500), {PLAIN: server, BLOCK: server}, TITLES).start()
        while not first.live:
            time.sleep(0.01)
        second = Comparison(plan(1, 4), {PLAIN: server, BLOCK: server}, TITLES).start()
        time.sleep(0.3)
        assert "Another comparison" in second.status
        assert Comparison.running()
        first.stop()
        finish(first)
        assert "Stopped" in first.status
        assert not first.batches[0].complete
        assert len(finish(second).batches) == 2
    assert not Comparison.running()


def make_zip(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_an_uploaded_zip_or_folder_becomes_the_two_files(tmp_path):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w"}
    packed = make_zip(
        tmp_path / "a.zip", {f"../../deep/{k}": v for k, v in files.items()} | {"../../evil.sh": b"x", "README.md": b""}
    )
    folder = uploads.unpack([packed], tmp_path / "one" / "a")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    assert not list(tmp_path.rglob("evil.sh"))
    again = uploads.unpack(list(folder.iterdir()), tmp_path / "two")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == files


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"adapter_config.json": b"{}"}, "adapter_model.safetensors is missing"),
        ({}, "adapter_config.json and adapter_model.safetensors are missing"),
        ({f"{d}/{n}": b"" for d in "ab" for n in uploads.NEEDED}, "more than once"),
    ],
)
def test_other_uploads_are_explained(tmp_path, members, words):
    with pytest.raises(uploads.BadUpload, match=words):
        uploads.unpack([make_zip(tmp_path / "a.zip", members)], tmp_path / "out")


def test_bad_zips_and_names_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(uploads.BadUpload, match="cannot be read"):
        uploads.unpack([tmp_path / "a.zip"], tmp_path / "out")
    for name in ("", "../a", "a/b", ".hidden", "x" * 65):
        with pytest.raises(uploads.BadUpload, match="name"):
            uploads.check_name(name)
    assert uploads.check_name(" fr-1.0 ") == "fr-1.0"


def test_the_page_needs_neither_torch_nor_sglang_nor_our_package():
    code = (
        "import sys, app.client, app.planning, app.results, app.drawing, app.uploads; "
        "print([m for m in ('torch', 'sglang', 'sgl_bdlora', 'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
