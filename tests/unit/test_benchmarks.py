"""The benchmarks' own arithmetic: a wrong sampler, percentile or verdict makes every figure wrong."""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from test_server_process import gone

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import convert, files, holdup
from benchmarks.cliff import arms, load
from benchmarks.failures import Failures
from benchmarks.record import RESULTS, Rows, read_rows
from benchmarks.soak import catalogue, killer, memory, references
from benchmarks.soak.clients import Tally
from benchmarks.soak.names import Names
from benchmarks.workload import arrivals, percentile, zipf_weights
from sgl_bdlora.adapters import read_adapter
from sgl_bdlora.server_process import ServerProcess, StartFailed, free_port, started


def test_zipf_weights_fall_by_rank_not_geometrically():
    weights = zipf_weights(4, 1.0)
    assert sum(weights) == pytest.approx(1)
    assert [weights[0] / w for w in weights] == pytest.approx([1, 2, 3, 4])
    assert zipf_weights(3, 0.0) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_arrivals_have_the_rate_and_the_spread(cv):
    times = arrivals(50, 2000, cv, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert spread / mean == pytest.approx(cv, rel=0.1)
    assert times == sorted(times)
    assert times[-1] < 2000


def test_percentile_interpolates():
    assert percentile([], 50) is None
    assert percentile([3], 99) == 3
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile(range(101), 99) == 99


def test_rows_carry_their_origin_and_are_there_at_once(tmp_path):
    rows = Rows(tmp_path / "new" / "rows.jsonl", benchmark="x")
    rows.write(kind="a", value=1)
    assert [row["value"] for row in read_rows(rows.path)] == [1]
    rows.write(kind="b", value=2)
    first, second = read_rows(rows.path)
    assert (second["kind"], second["value"]) == ("b", 2)
    assert {"run", "commit", "gpu", "versions", "benchmark"} <= first.keys() & second.keys()


def test_a_server_that_fails_is_a_row_and_a_message_and_the_next_has_its_turn(tmp_path, capsys):
    failures = Failures(Rows(tmp_path / "rows.jsonl", benchmark="x"))
    with failures.of(server="ours"):
        pass
    assert not failures.seen
    with failures.of(server="stock"):
        raise StartFailed("The server ended")
    with failures.of(server="s-lora"):
        raise httpx.ReadTimeout("")
    assert failures.seen
    rows = [(row["kind"], row["server"], row["message"]) for row in read_rows(tmp_path / "rows.jsonl")]
    assert rows == [("error", "stock", "The server ended"), ("error", "s-lora", "ReadTimeout('')")]
    assert capsys.readouterr().err == "stock: The server ended\ns-lora: ReadTimeout('')\n"
    with pytest.raises(KeyError), failures.of(server="ours"):
        raise KeyError("a fault of the benchmark")


def test_a_benchmark_that_is_told_to_end_while_its_servers_start_stops_them_and_removes_its_files(tmp_path):
    program = """if True:
        import pathlib, sys, tempfile
        from benchmarks.failures import run_to_end
        from sgl_bdlora.server_process import ServerProcess, free_port, started

        def main():
            with tempfile.TemporaryDirectory(dir=sys.argv[1]) as name:
                command, url = [sys.executable, "-c", "import time; time.sleep(60)"], f"http://127.0.0.1:{free_port()}"
                servers = [ServerProcess(command, {}, url, pathlib.Path(name) / f"log{i}", 60) for i in range(2)]
                with started(servers):
                    print(*(server.pid for server in servers), flush=True)
                    for server in servers:
                        server.wait()

        sys.exit(run_to_end(main))
    """
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True) as benchmark:
        servers = [int(pid) for pid in benchmark.stdout.readline().split()]
        benchmark.terminate()
        assert benchmark.wait(20) == 130
    assert list(tmp_path.iterdir()) == []
    assert len(servers) == 2
    for server in servers:
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)


def test_of_servers_that_start_together_all_are_stopped_when_one_cannot(tmp_path):
    running = ServerProcess([sys.executable, "-c", "import time; time.sleep(60)"], {}, "", tmp_path / "log", 60)
    missing = ServerProcess([str(tmp_path / "missing")], {}, "", tmp_path / "missing.log", 60)
    never = ServerProcess([sys.executable], {}, "", tmp_path / "never.log", 60)
    with pytest.raises(FileNotFoundError), started([running, missing, never]):
        pytest.fail("not all have started")
    assert running.ended() is not None
    assert not (tmp_path / "never.log").exists()


HEALTHY = """
import http.server, sys
http.server.SimpleHTTPRequestHandler.do_GET = lambda self: (self.send_response(200), self.end_headers())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_patience_with_a_server_counts_from_its_start_and_it_is_asked_at_least_once(tmp_path, monkeypatch):
    port = free_port()
    ready = ServerProcess([sys.executable, "-c", HEALTHY, str(port)], {}, f"http://127.0.0.1:{port}", tmp_path / "a", 0)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    stuck = ServerProcess(sleeper, {}, f"http://127.0.0.1:{free_port()}", tmp_path / "b", 0.5)
    with started([ready, stuck]):
        time.sleep(0.5)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(ready.url, trust_env=False)
                break
        ready.wait()
        with monkeypatch.context() as patched:
            patched.setattr(time, "sleep", lambda _: pytest.fail("its patience is over"))
            with pytest.raises(StartFailed, match="was not ready"):
                stuck.wait()


def test_servers_together_start_at_once_and_those_that_do_not_start_leave_the_others_their_turn(tmp_path, monkeypatch):
    from benchmarks.latency import run as latency
    from benchmarks.latency.__main__ import arguments

    def command(server, setup, adapters, port):
        return [sys.executable, "-c", "exit('stock is ill')" if server == "stock" else HEALTHY, str(port)], {}

    calls, measured = [], {}
    start, wait = ServerProcess.start, ServerProcess.wait
    monkeypatch.setattr(latency, "command", command)
    monkeypatch.setattr(
        ServerProcess, "start", lambda self: calls.append(("start", threading.get_ident())) or start(self)
    )
    monkeypatch.setattr(ServerProcess, "wait", lambda self: calls.append(("wait", threading.get_ident())) or wait(self))
    words = ["--device", "cpu", "--tiny", "--together", "--output", str(tmp_path / "rows.jsonl")]
    run = latency.Latency(arguments(words), tmp_path)
    run.write_files()
    monkeypatch.setattr(
        run, "_measure_all", lambda url, server, _: measured.update({server: httpx.get(url, trust_env=False)})
    )
    run._run_together({server: [] for server in ("no-lora", "stock", "ours", latency.AGAIN)})
    assert list(measured) == ["no-lora", "ours", "no-lora again"]
    # A signal reaches the main thread only; another would go on waiting.
    assert calls == [(what, threading.get_ident()) for what in ("start", "wait") for _ in range(3)]
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert (row["kind"], row["server"]) == ("error", "stock")
    assert "stock is ill" in row["message"]
    for answer in measured.values():
        with pytest.raises(httpx.ConnectError):
            httpx.get(answer.url, trust_env=False)


def test_a_benchmark_whose_servers_do_not_start_tells_of_each_and_fails(tmp_path, capsys, monkeypatch):
    used = []

    def command(server, setup, *_):
        used.append(setup.model)
        return [sys.executable, "-c", f"exit('{server} is ill')"], {}

    monkeypatch.setattr(holdup, "keep_model", lambda shape, folder: folder)
    monkeypatch.setattr(holdup, "write_adapter", lambda shape, folder, *_: folder.mkdir(parents=True) or folder)
    monkeypatch.setattr(holdup, "command", command)
    words = ["--device", "cpu", "--tiny", "--output", str(tmp_path / "rows.jsonl"), "--files", str(tmp_path)]
    assert holdup.main(words) == 1
    # Its files are of this shape, so that a run of another one writes its own.
    assert used == [tmp_path / "tiny-llama-2" / "model"] * 2
    said = capsys.readouterr().err
    for server in holdup.SERVERS:
        assert f"{server}: The server ended with code 1" in said
        assert f"--- end of {tmp_path}/rows-{server}.log\n{server} is ill\n" in said


def test_memory_that_grows_is_not_flat():
    seconds = list(range(0, 600, 2))
    noise = random.Random(0)
    steady = [900 + noise.uniform(-5, 5) for _ in seconds]
    flat = memory.flatness(seconds, steady)
    assert abs(flat.slope) < 0.5
    assert flat.flat(2, 2)
    leak = memory.flatness(seconds, [value + 3 * t / 60 for value, t in zip(steady, seconds, strict=True)])
    assert leak.slope == pytest.approx(3, abs=0.5)
    assert not leak.flat(2, 2)
    step = memory.flatness(seconds, [value + (40 if t > 460 else 0) for value, t in zip(steady, seconds, strict=True)])
    assert step.change_percent > 2
    assert not step.flat(100, 2)
    warming = memory.flatness(seconds, [value - max(0, 140 - t) for value, t in zip(steady, seconds, strict=True)])
    assert warming.flat(2, 2)
    with pytest.raises(ValueError, match="two samples"):
        memory.flatness([0, 1, 2], [1, 1, 1])


def _answer(tokens, logprobs, top=None):
    return references.Answer(tokens, [], logprobs, top or [{t: p} for t, p in zip(tokens, logprobs, strict=True)], 0)


def test_an_answer_is_compared_by_tokens_and_log_probabilities():
    reference = _answer([5, 6], [-1.0, -2.0], [{5: -1.0, 9: -1.5}, {6: -2.0, 7: -2.5}])
    assert references.difference(reference, _answer([5, 6], [-1.00005, -2.0])) is None
    assert "token 1 differs by 2.00e-04" in references.difference(reference, _answer([5, 6], [-1.0, -2.0002]))
    assert "1 tokens instead of 2" in references.difference(reference, _answer([5], [-1.0]))
    assert "nan" in references.difference(reference, _answer([5, 6], [float("nan"), -2.0]))
    flipped = references.difference(reference, _answer([5, 7], [-1.0, -2.1], [{5: -1.0}, {7: -2.1, 6: -2.2}]))
    assert "token 1 is 7, not 6" in flipped
    assert "of 6 was -2.000000 and is -2.200000, of 7 it was -2.500000 and is -2.100000" in flipped


def test_closed_names_are_not_chosen_and_popular_ones_are_chosen_more():
    names, rng = Names(1.0), random.Random(0)
    for name in "abc":
        names.open(name, Path(name))

    def draw() -> Counter:
        with names.choose(rng, 3000) as picked:
            return Counter(name for name, _ in picked)

    counts = draw()
    assert counts["a"] / counts["c"] == pytest.approx(3, rel=0.25)
    names.close("a")
    assert set(draw()) == {"b", "c"}
    names.open("a", Path("other"))
    assert names.folders()["a"] == Path("other")
    assert draw().most_common(1)[0][0] == "a"


def test_a_name_is_idle_when_nobody_asks_for_it():
    names = Names(0.0)
    names.open("a", Path("a"))
    with names.choose(random.Random(0)):
        assert not names.wait_until_idle("a", 0.01)
    assert names.wait_until_idle("a", 0.01)


class _Endless(BaseHTTPRequestHandler):
    """Streams pieces until its client is gone."""

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"data: {}\n\n")
                time.sleep(0.01)

    def log_message(self, *_):
        pass


def test_a_client_process_is_killed_with_its_streams_open(monkeypatch):
    monkeypatch.setattr(killer, "LIFE_S", (0.7, 0.7))
    monkeypatch.setattr(killer, "GRACE_S", 0)
    names, tally, asks = Names(0.0), Tally(), references.References()
    names.open("a", Path("a"))
    asks.add(references.Ask((1, 2, 3)), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        thread = killer.Killer(f"http://127.0.0.1:{server.server_port}", names, asks, tally, threading.Event(), "0")
        with names.choose(random.Random(0), 3) as picked:
            thread._report(thread._kill_one(picked), picked)
        server.shutdown()
    assert tally.counts["clients_killed"] == 1
    assert tally.counts["clients_killed_streams_open"] == 3
    assert not tally.failures


def test_open_files_are_counted(tmp_path):
    before = memory.sample(os.getpid())
    with (tmp_path / "file").open("w"):
        assert memory.sample(os.getpid())["handles"] == before["handles"] + 1
    assert memory.sample(os.getpid())["handles"] == before["handles"]


def test_the_soak_mixes_structures_and_ranks():
    recipes = catalogue.recipes(24)
    assert {recipe.nblocks for recipe in recipes} == {None, 2, 4}
    assert {recipe.rank for recipe in recipes if recipe.nblocks} >= {4, 32}
    assert {recipe.rank for recipe in recipes if not recipe.nblocks} >= {4, 8, 16, 24}
    assert len({recipe.seed for recipe in recipes}) == 24
    assert all(recipe.rank % (recipe.nblocks or 1) == 0 for recipe in recipes)


@pytest.mark.parametrize(("rank", "nblocks"), [(4, None), (8, 2)])
def test_cliff_adapters_are_what_the_reader_expects(tmp_path, rank, nblocks):
    folder = files.write_adapter(files.TINY, tmp_path / "a", rank, nblocks, seed=1)
    adapter = read_adapter(folder, "a")
    assert (adapter.kind, adapter.rank) == ("block-diagonal" if nblocks else "plain", rank)
    assert len(adapter.modules) == 7 * files.TINY.layers
    stored = sum(math.prod(f.tensor.shape) for m in adapter.modules.values() for f in (m.a, m.b))
    assert stored == files.parameters(files.TINY, rank, nblocks)
    assert files.bytes_per_rank(files.TINY, folder, 1) == 4 * stored


def test_matched_rank_keeps_the_parameters():
    """Eight blocks: twice the rank has 0.86 times the parameters (BD-LoRA's paper, 8B), 40 has 1.08."""
    assert files.parameters(files.LLAMA_8B, 16, None) == 41_943_040
    assert files.matched_rank(files.LLAMA_8B, 16, 2) == 24
    assert files.matched_rank(files.LLAMA_8B, 16, 8) == 40
    ratio = files.parameters(files.LLAMA_8B, 32, 8) / files.parameters(files.LLAMA_8B, 16, None)
    assert ratio == pytest.approx(0.8625, abs=1e-3)


def test_cliff_model_is_a_checkpoint_with_every_layer(tmp_path):
    shape = replace(files.TINY, layers=3)
    folder = files.write_model(shape, tmp_path)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert len(weights) == 3 + 9 * 3
    assert weights["model.layers.2.mlp.down_proj.weight"].shape == (128, 256)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3


def test_files_of_a_run_that_was_cut_off_are_written_again(tmp_path, monkeypatch):
    def cut_off(_, file):
        Path(file).write_bytes(b"half of it")
        raise KeyboardInterrupt

    model, adapter = tmp_path / "model" / "pytorch_model.bin", tmp_path / "adapter" / "adapter_model.safetensors"

    def keep() -> None:
        files.keep_model(files.TINY, model.parent)
        files.keep_adapter(files.TINY, adapter.parent, 4, None, seed=1)

    for place, name, target in ((torch, "save", model), (files, "save_file", adapter)):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, cut_off)
            with pytest.raises(KeyboardInterrupt):
                keep()
        assert [file for file in target.parent.iterdir() if file.suffix != ".json"] == []
    keep()
    assert len(torch.load(model, weights_only=True)) == 3 + 9 * files.TINY.layers
    assert read_adapter(adapter.parent, "a").rank == 4
    # What is there is kept.
    monkeypatch.setattr(files, "write_model", None)
    monkeypatch.setattr(files, "write_adapter", None)
    keep()


def test_a_conversion_ends_with_the_benchmark_that_times_it(tmp_path, monkeypatch):
    file = tmp_path / "pid"

    def interrupted(_):
        deadline = time.monotonic() + 20
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        raise KeyboardInterrupt

    code = "import os, sys, time; open('x', 'w').write(str(os.getpid())); os.rename('x', sys.argv[1]); time.sleep(60)"
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "communicate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert._watched([sys.executable, "-c", code, str(file)])
    assert gone(int(file.read_text()))
    code, seconds, peak, out = convert._watched([sys.executable, "-c", "print('so'); exit(3)"])
    assert (code, out) == (3, "so\n")
    assert seconds > 0
    assert peak > 2**20


def test_a_point_counts_waiting_requests_and_only_tokens_in_time():
    done = load.Outcome(1.0, [(1.5, 1), (2.5, 11)], end=2.5)
    late = load.Outcome(9.0, [(9.9, 1), (12.0, 11)], end=12.0)
    waiting = load.Outcome(4.0)
    failed = load.Outcome(5.0, error="500")
    figures = load.summarize([done, late, waiting, failed], seconds=10, drain=5)
    assert figures["ttft_p50_ms"] == pytest.approx(900)
    assert figures["ttft_p99_ms"] > 10_000
    assert figures["tpot_p50_ms"] == pytest.approx((100 + 210) / 2)
    assert figures["throughput_tok_s"] == pytest.approx(1.2)
    assert figures["throughput_req_s"] == pytest.approx(0.1)
    assert (figures["requests"], figures["failed"], figures["unfinished"]) == (4, 1, 1)


def test_arms_get_the_same_load_and_stock_gets_no_plugin(tmp_path):
    setup = arms.Setup(tmp_path, 2, "bfloat16", 8, 16, 64, "cuda", extra="--log-level debug", extra_ours="--x")
    adapters = [tmp_path / "a", tmp_path / "b"]
    words, environment = arms.command("stock", setup, adapters, 2**20, 30000)
    assert environment == {"SGLANG_PLUGINS": "none"}
    assert words[2] == "sglang.launch_server"
    assert words[words.index("--lora-backend") + 1] == "csgmv"
    assert "--lora-pool-gb" not in words
    assert "--x" not in words
    ours, environment = arms.command("plain", setup, adapters, 2**20, 30000)
    assert environment == {}
    assert ours[2] == "sgl_bdlora.launch_server"
    assert float(ours[ours.index("--lora-pool-gb") + 1]) == 2**-10
    assert "--x" in ours
    for shared in ("--max-loras-per-batch", "--max-running-requests", "--tp-size", "--log-level"):
        assert words[words.index(shared) + 1] == ours[ours.index(shared) + 1]
    assert f"adapter-01={tmp_path / 'b'}" in words


def test_mixes_are_read():
    from benchmarks.latency.mixes import adapters_of, mix

    chosen = mix("8x2+128x1")
    assert chosen.ranks == (8, 8, 128)
    assert [a.name for a in adapters_of(chosen, None)] == ["plain-r8-0", "plain-r8-1", "plain-r128-0"]
    assert [a.name for a in adapters_of(mix("16"), 0.85)] == ["bd0.85-r16-0"]
    for wrong in ("", "x4", "16x0", "0x4", "16x4+", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match="RANKxADAPTERS"):
            mix(wrong)


def test_prediction_gives_back_what_it_was_fitted_on():
    from benchmarks.files import LLAMA_8B, LLAMA_70B, PRODUCTS
    from benchmarks.latency.step_model import ALL_REDUCE_US, Arm, fit, product_bytes

    products = [
        {"tp": 2, "layer": name, "tokens": 8, "cublas_us": 5 + product_bytes(LLAMA_8B, name) / 2 / 4e6}
        for name in PRODUCTS
    ]
    point = {
        "kind": "point",
        "model": LLAMA_8B.name,
        "tp": 2,
        "layers": 32,
        "batch": 8,
        "output_len": 128,
        "modules": "all",
        "mix": "16x4",
        "wanted_ratio": None,
    }
    bd, plain, s_lora = Arm("block-diagonal", "16x4", 1.0), Arm("replicated", "64x4"), Arm("s-lora", "16x4")
    measured = [
        {**point, "arm": "no-lora", "decode_ms": 3.2},
        {**point, "arm": bd.name, "wanted_ratio": 1.0, "decode_ms": 3.5},
        {**point, "arm": plain.name, "mix": plain.mix, "decode_ms": 4.0},
        {**point, "arm": s_lora.name, "decode_ms": 6.0},
    ]
    model, shape, arms = fit(measured, products)
    assert (shape, arms) == (LLAMA_8B, [bd, plain, s_lora])
    assert (model.start, 1 / model.per_byte) == pytest.approx((5, 4e6))
    steps = [model.step_ms(LLAMA_8B, 2, 8, arm) for arm in (None, bd, plain, s_lora)]
    assert steps == pytest.approx([3.2, 3.5, 4.0, 6.0])
    # Half of the bytes, and the collectives of the base model and of S-LoRA.
    weights = sum(product_bytes(LLAMA_8B, name) for name in PRODUCTS) * 32 + 2 * LLAMA_8B.vocab * LLAMA_8B.hidden
    saved = weights / 4 / 4e9 - 64 * (ALL_REDUCE_US[4] - ALL_REDUCE_US[2]) / 1e3
    assert model.step_ms(LLAMA_8B, 4, 8) == pytest.approx(3.2 - saved)
    four = 4 * 32 * (ALL_REDUCE_US[4] - ALL_REDUCE_US[2]) / 1e3
    assert model.step_ms(LLAMA_8B, 4, 8, s_lora) == pytest.approx(6.0 - saved + four)
    # Equal points count by their mean, short outputs and other batches not at all; only S-LoRA has more all-reduces.
    stock = Arm("stock", "16x4")
    more = [
        *({**point, "arm": "stock", "decode_ms": ms} for ms in (5.0, 5.4)),
        {**measured[2], "output_len": 16, "decode_ms": 9.0},
        {**point, "batch": 32, "arm": "no-lora", "decode_ms": 3.6},
        {**point, "batch": 32, "arm": "s-lora", "decode_ms": 7.0},
    ]
    other, _, _ = fit([*measured, *more], products)
    assert other.local == {**model.local, 32: []}
    assert other.step_ms(LLAMA_8B, 4, 8, stock) == pytest.approx(5.2 - saved)
    # Half way between 48 rank rows and 256; a plain adapter has as many at every size.
    between = Arm("replicated", "38x4")
    assert [arm.rank_rows(LLAMA_8B, 2, 8) for arm in (bd, between, plain)] == [48, 160, 256]
    assert model.step_ms(LLAMA_8B, 2, 8, between) == pytest.approx(3.5 + 0.5 * (160 - 48) / (256 - 48))
    assert model.step_ms(LLAMA_8B, 4, 8, plain) == pytest.approx(4.0 - saved)
    with pytest.raises(ValueError, match="one tensor-parallel size"):
        fit([{**measured[0], "tp": 4}, *measured], products)
    with pytest.raises(ValueError, match="one model"):
        fit([*measured, {**measured[0], "model": LLAMA_70B.name}], products)
    with pytest.raises(ValueError, match="all modules are needed, not of attention"):
        fit([{**row, "modules": "attention"} for row in measured], products)
    with pytest.raises(ValueError, match="modules and wanted_ratio are needed: these are of an older benchmark"):
        fit([{key: row[key] for key in row if key != "modules"} for row in measured], products)
    # Measured with a quarter of its layers: four times the layers' part, and lm_head once.
    part, whole, _ = fit([{**row, "model": LLAMA_70B.name, "layers": 20} for row in measured], products)
    head = part.step_ms(replace(whole, layers=0), 2, 8)
    assert part.step_ms(whole, 2, 8) == pytest.approx(4 * (3.2 - head) + head)


def test_prediction_of_a_run_that_was_cut_off(tmp_path, capsys):
    """The last batch has no block-diagonal row yet."""
    from benchmarks.latency.predict import main

    rows = read_rows(RESULTS / "latency-h200x2-many-rows.jsonl")
    measured, output = tmp_path / "rows.jsonl", tmp_path / "prediction.jsonl"
    kept = [row for row in rows if row.get("batch") != 128 or row["arm"] in ("no-lora", "s-lora")]
    measured.write_text("".join(json.dumps(row) + "\n" for row in kept))
    products = str(RESULTS / "tune-h200-tp2.jsonl")
    assert main([str(measured), "--products", products, "--tp", "8", "--output", str(output)]) == 0
    told = read_rows(output)
    assert {row["arm"] for row in told if row["batch"] == 128} == {"no-lora", "s-lora"}
    assert {row["arm"] for row in told if row["batch"] == 8} == {"no-lora", "replicated", "block-diagonal", "s-lora"}
    assert "block-diagonal 0.86x 128x4, 128 rank rows" in capsys.readouterr().out


def test_prediction_refuses_rows_of_another_benchmark(capsys):
    from benchmarks.latency.predict import main

    measured = str(RESULTS / "latency-h200x2-many-rows.jsonl")
    products = str(RESULTS / "kernels-before-h200.jsonl")
    for words in (["--products", measured], ["--products", products, "--kernels", measured]):
        with pytest.raises(SystemExit):
            main([measured, *words])
        assert f"{measured}: rows of benchmarks.kernels.tune are needed" in capsys.readouterr().err


def test_prediction_by_kernels_that_were_timed():
    """At TP 2 adapters add 3 us beside what its kernels took longer than cuBLAS; at TP 8 that, and what those of now take longer."""
    from benchmarks.files import LLAMA_8B, PRODUCTS
    from benchmarks.latency.step_model import Arm, fit, kernels_of

    def timed(tp, rank, each, model="8b", tokens=8):
        return [
            {"model": model, "tp": tp, "layer": name, "tokens": tokens, "adapters": 4, "rank": rank}
            | {"cublas_us": 5.0 + i, "linear_us": 5.0 + i + each}
            for i, name in enumerate(PRODUCTS)
        ]

    point = {"kind": "point", "model": LLAMA_8B.name, "tp": 2, "layers": 32, "batch": 8, "output_len": 128}
    point |= {"modules": "all", "mix": "16x4", "wanted_ratio": None}
    measured = [
        {**point, "arm": "no-lora", "decode_ms": 3.2},
        {**point, "arm": "replicated", "decode_ms": 3.2 + 32 * 7.0 / 1e3},
        {**point, "arm": "replicated", "mix": "64x4", "decode_ms": 3.2 + 32 * 19.0 / 1e3},
    ]
    model, shape, (few, many) = fit(measured, [*timed(2, 16, 1.0), *timed(2, 64, 4.0)])
    assert model.beside == pytest.approx({8: 3.0})
    new = [*timed(8, 16, 0.5), *timed(8, 32, 1.5), *timed(8, 16, 9.0, "70b"), *timed(4, 16, 1.0)[:3]]
    # A batch of two has two adapters.
    assert kernels_of(timed(8, 15, 0.5, tokens=2), shape) == {(8, 2): [(32, 2.0)]}
    model = replace(model, kernels=kernels_of(new, shape))
    assert model.kernels == {(8, 8): [(64, 2.0), (128, 6.0)]}
    added = [model.step_ms(shape, tp, 8, arm) - model.step_ms(shape, tp, 8) for tp in (4, 8) for arm in (few, many)]
    # More rank rows than were timed, or none timed at that size: as measured.
    assert added == pytest.approx([32 * us / 1e3 for us in (7.0, 19.0, 2.0 + 3.0, 19.0)])
    between = Arm("replicated", "24x4")
    assert model.step_ms(shape, 8, 8, between) - model.step_ms(shape, 8, 8) == pytest.approx(32 * (4.0 + 3.0) / 1e3)


def test_prediction_by_ranks_that_were_served(tmp_path, capsys):
    """A rank's step and what adapters add to it are as measured, and the collectives come on top; other sizes and batches as before."""
    from benchmarks.files import LLAMA_8B, PRODUCTS
    from benchmarks.latency.predict import main
    from benchmarks.latency.step_model import ALL_REDUCE_US, Arm, fit, shares_of

    point = {"kind": "point", "model": LLAMA_8B.name, "tp": 2, "layers": 32, "batch": 8, "output_len": 128}
    point |= {"modules": "all", "mix": "16x4", "wanted_ratio": None}
    measured = [
        {**point, "arm": "no-lora", "decode_ms": 3.2},
        {**point, "arm": "replicated", "decode_ms": 3.6},
        {**point, "arm": "s-lora", "decode_ms": 6.0},
    ]
    products = [{"tp": 2, "layer": name, "tokens": 8, "cublas_us": 5.0 + i} for i, name in enumerate(PRODUCTS)]
    model, shape, _ = fit(measured, products)
    share = {**point, "tp": 1, "share_of": 8, "nblocks": 8}
    rows = [
        *({**share, "arm": "no-lora", "decode_ms": ms} for ms in (1.6, 1.8)),
        {**share, "arm": "replicated", "decode_ms": 1.9},
        {**share, "arm": "block-diagonal", "wanted_ratio": 0.87, "decode_ms": 1.8},
        {**share, "arm": "stock", "decode_ms": 3.0},
        {**share, "arm": "replicated", "output_len": 16, "decode_ms": 9.0},
        {**share, "arm": "replicated", "layers": 2, "decode_ms": 9.0},
        {**share, "arm": "replicated", "modules": "attention", "decode_ms": 9.0},
    ]
    shares = shares_of(rows, shape)
    assert list(shares) == [(8, 8)]
    assert shares[8, 8].step == pytest.approx(1700)
    assert [count for count, _ in shares[8, 8].added] == [16, 64]
    assert [us for _, us in shares[8, 8].added] == pytest.approx([100 / 32, 200 / 32])
    served = replace(model, shares=shares)
    collectives = 64 * ALL_REDUCE_US[8] / 1e3
    few, some, many = Arm("block-diagonal", "16x4", 0.87), Arm("replicated", "8x4"), Arm("replicated", "64x4")
    steps = [served.step_ms(shape, 8, 8, arm) for arm in (None, few, some, many, Arm("s-lora", "16x4"))]
    s_lora = 2.8 + 4 * 32 * (ALL_REDUCE_US[8] - ALL_REDUCE_US[2]) / 1e3
    # More rank rows than were served: what was measured at TP 2.
    assert [ms - collectives for ms in steps] == pytest.approx([1.7, 1.8, 1.8 + 0.1 / 3, 2.1, 1.7 + s_lora])
    for arm in (None, few):
        assert served.step_ms(shape, 4, 8, arm) == model.step_ms(shape, 4, 8, arm)
    with pytest.raises(ValueError, match="those of a rank's share are for --shares"):
        fit([*measured, rows[0]], products)
    file, other = tmp_path / "share.jsonl", str(RESULTS / "latency-h200x2-many-rows.jsonl")
    for wrong in (other, str(file)):
        file.write_text(json.dumps({**rows[0], "nblocks": 16}) + "\n")
        with pytest.raises(SystemExit):
            main([other, "--products", str(RESULTS / "kernels-before-h200.jsonl"), "--shares", wrong])
        assert f"{wrong}: rows of benchmarks.latency --share-of are needed" in capsys.readouterr().err
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "prediction.jsonl"
    words = ["--products", str(RESULTS / "kernels-before-h200.jsonl"), "--shares", str(file), "--tp", "8"]
    assert main([other, *words, "--output", str(output)]) == 0
    by = {(row["batch"], row["arm"], row.get("mix")): row for row in read_rows(output)}
    assert by[8, "no-lora", None]["decode_ms"] == pytest.approx(1.7 + collectives)
    assert by[8, "no-lora", None]["served"]
    assert by[8, "replicated", "16x4"]["served"]
    assert not by[8, "replicated", "64x4"]["served"]
    assert not by[32, "no-lora", None]["served"]
    assert "16 rank rows, served" in capsys.readouterr().out


def test_predicted_arms_have_the_rank_rows_of_their_size():
    """Parameters of 0.85 of a plain adapter's: a block for every rank, filled up to four rows; a batch of two has two adapters."""
    from benchmarks.files import LLAMA_8B, matched_rank
    from benchmarks.latency.step_model import Arm, through, unexplained

    arm = Arm("block-diagonal", "128x4", 0.85)
    assert [matched_rank(LLAMA_8B, 128, tp, 0.85) for tp in (2, 8)] == [162, 256]
    assert [arm.rank_rows(LLAMA_8B, tp, 8) for tp in (2, 8)] == [4 * 84, 4 * 32]
    assert arm.rank_rows(LLAMA_8B, 2, 2) == 2 * 84
    assert arm.params_ratio(LLAMA_8B, 8) == pytest.approx(0.85, abs=0.02)
    points = [(48, 7.0), (64, 8.0), (128, 20.0)]
    assert [through(points, x) for x in (4, 48, 56, 96, 160)] == [7, 7, 7.5, 14, 26]
    assert unexplained(points) == pytest.approx(7 + 13 * 16 / 80 - 8)
    assert unexplained(points[:2]) == 0


def test_a_sweep_takes_the_best_of_each_part(capsys):
    from triton.runtime.errors import OutOfResources

    from benchmarks.kernels.shapes import hosts
    from benchmarks.kernels.tune import kind_of, sweep
    from sgl_bdlora.kernels.tiles import H200, SUMS
    from sgl_bdlora.kernels.triton_ops import plan_for

    class Layer:
        plan = plan_for(hosts("8b", 2, 1)[0], H200)

        def around(self, tokens):
            return 1.0

        def served(self, mix, tokens, tiles):
            if tiles.programs == 100:
                raise OutOfResources(1, 0, "shared memory")
            return (
                11 + mix[0] + abs(tiles.programs - 68) / 8 + abs(tiles.late_stages - 6) + abs(tiles.block_n - 64) / 32
            )

    told = []
    sweep(Layer(), [(4, 40), (8, 40)], 8, ["h", "rest"], {"block_n": 16}, lambda *row: told.append(row))
    best = min(told, key=lambda row: row[1])
    assert (best[2].programs, best[2].late_stages, best[2].block_n) == (68, 6, 16)
    assert [row[0] for row in told[:4]] == [(4, 40), (8, 40)] * 2
    assert best[1] == 10 + 4 + 48 / 32
    assert "after rest: Tiles(block_n=16, " in capsys.readouterr().out
    for begin, why in (
        ({"shrink_rows": 1024}, "its loops need ("),
        ({"parts": 64}, f"its parts have {64 * 16 * 3072} of {SUMS} sums"),
        ({"parts": 8, "early": 1024}, "early=1024 is no multiple of block_k=128 within the first of 8 parts"),
        ({"early": 100}, "early=100 is no multiple"),
        ({"rows": 256, "late_stages": 3}, "rows=256 is more than tables are filled up to"),
    ):
        sweep(Layer(), [(4, 12)], 8, ["h"], begin, lambda *row: None)
        told = capsys.readouterr().out
        assert "not swept from Tiles(" in told
        assert why in told
    # Eight adapters at most in a batch of eight, each filled up to twelve rank rows.
    assert [kind_of((16, rank), 8) for rank in (8, 10)] == [(16, False), (16, True)]


def test_lengths_may_name_one_batch():
    from benchmarks.latency.__main__ import lengths

    assert lengths("128/64") == (128, 64, None)
    assert lengths("2048/16@8") == (2048, 16, 8)
    for wrong in ("128", "128/1", "0/8", "8/8@0", "8/8@"):
        with pytest.raises(argparse.ArgumentTypeError, match="PROMPT/OUTPUT"):
            lengths(wrong)


def test_a_resumed_run_measures_what_is_left(tmp_path):
    from benchmarks.latency.__main__ import arguments
    from benchmarks.latency.run import Latency

    output = tmp_path / "rows.jsonl"
    args = arguments(
        ["--device", "cpu", "--tiny", "--tp", "2", "--ratios", "1", "0.5", "--output", str(output), "--resume"]
    )
    first = Latency(args, tmp_path)
    points = first._todo("ours", "block-diagonal")
    assert len(points) == 6
    done = points[0]
    first.rows.write(
        kind="point", arm=done.arm, mix=done.mix.text, wanted_ratio=done.ratio, batch=done.batch,
        input_len=done.prompt, output_len=done.output,
    )  # fmt: skip
    again = Latency(args, tmp_path)
    assert again._todo("ours", "block-diagonal") == points[1:]
    # What ratios are taken to is of the same run.
    assert len(again._todo("no-lora", "no-lora")) == 3


@pytest.mark.parametrize("words", [
    [], ["--tp", "4"], ["--tp", "1", "--share-of", "2"],
    ["--nblocks", "4"], ["--repeats", "9"], ["--extra-arguments", "--attention-backend triton"],
    ["--modules", "attention"], ["--device", "cuda"],
])  # fmt: skip
def test_a_resumed_run_measures_points_of_another_configuration_again(tmp_path, monkeypatch, words):
    from benchmarks.latency import __main__ as options
    from benchmarks.latency import run as latency

    given = ["--device", "cpu", "--tiny", "--tp", "2", "--output", str(tmp_path / "rows.jsonl"), "--resume"]
    first = latency.Latency(options.arguments(given), tmp_path)
    for point in first._todo("ours", "block-diagonal"):
        first.rows.write(
            kind="point", arm=point.arm, mix=point.mix.text, wanted_ratio=point.ratio, batch=point.batch,
            input_len=point.prompt, output_len=point.output,
        )  # fmt: skip
    for module in (options, latency):
        monkeypatch.setattr(module, "gpu_name", lambda: "a GPU" if "cuda" in words else None)
    again = latency.Latency(options.arguments([*given, *words]), tmp_path)
    assert len(again._todo("ours", "block-diagonal")) == (3 if words else 0)
    monkeypatch.setattr(latency, "gpu_name", lambda: "another GPU")
    elsewhere = latency.Latency(options.arguments(given), tmp_path)
    assert len(elsewhere._todo("ours", "block-diagonal")) == 3


def test_rows_that_do_not_name_their_blocks_had_as_many_as_usual(tmp_path, monkeypatch):
    from benchmarks.latency import run as latency
    from benchmarks.latency.__main__ import arguments

    monkeypatch.setattr(latency, "gpu_name", lambda: None)
    output = shutil.copy(RESULTS / "latency-cpu-tiny-tp8.jsonl", tmp_path / "rows.jsonl")
    words = ["--device", "cpu", "--tiny", "--tp", "8", "--repeats", "2", "--resume", "--output", str(output)]
    points = [row for row in read_rows(output) if row["kind"] == "point"]
    assert points
    assert not any("nblocks" in row for row in points)
    assert latency.Latency(arguments(words), tmp_path).points == points
    other = latency.Latency(arguments([*words, "--nblocks", "4"]), tmp_path)
    assert other.points == []
    # Written a moment ago, it names them.
    other.rows.write(kind="point")
    assert read_rows(output)[-1]["nblocks"] == 4


def test_a_share_has_a_rank_s_part_of_the_model_and_of_its_adapters(tmp_path, capsys):
    from benchmarks.latency.__main__ import arguments
    from benchmarks.latency.run import Latency

    words = ["--device", "cpu", "--tiny", "--share-of", "4", "--mixes", "16x2", "--output", str(tmp_path / "rows")]
    run = Latency(arguments(words), tmp_path)
    run.write_files()
    whole = files.TINY
    adapters = {name: read_adapter(path, name) for name, path in run.paths.items()}
    assert sorted(adapters) == ["bd1-r16-0", "bd1-r16-1", "plain-r16-0", "plain-r16-1"]
    rank = files.matched_rank(whole, 16, 4)
    for name, adapter in adapters.items():
        for path, module in adapter.modules.items():
            leaf = path.rpartition(".")[2]
            inputs, outputs = whole.linear(leaf)
            inputs, outputs = (inputs // 4, outputs) if leaf in files.ROW else (inputs, outputs // 4)
            # What a rank has of a block-diagonal adapter with a block a rank: one block of the side that ranks split, and all of the
            # other side for a quarter of the rank. Plain ones are whole on the side that is not split.
            local = rank // 4 if name.startswith("bd") else 16
            assert module.a.shape == (local, inputs), (name, path)
            assert module.b.shape == (outputs, local), (name, path)
    model = torch.load(run.folder / "model" / "pytorch_model.bin", weights_only=True)
    assert model["model.layers.0.self_attn.q_proj.weight"].shape == (32, 128)
    assert model["model.layers.0.self_attn.k_proj.weight"].shape == (16, 128)
    assert model["model.layers.0.self_attn.o_proj.weight"].shape == (128, 32)
    assert model["model.layers.0.mlp.down_proj.weight"].shape == (128, 64)
    assert model["lm_head.weight"].shape == (128, 128)
    config = json.loads((run.folder / "model" / "config.json").read_text())
    assert (config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]) == (16, 2, 1)
    # Parameters are matched in the whole model, and rows say whose share it is.
    row = run.rows.write(kind="point")
    assert (row["model"], row["tp"], row["share_of"], row["nblocks"]) == ("tiny llama", 1, 4, 4)
    # Two blocks a rank are block-diagonal in a share too; servers have the adapters that their arms need.
    double = Latency(arguments([*words, "--nblocks", "8", "--arms", "no-lora", "block-diagonal", "stock"]), tmp_path)
    double.write_files()
    (adapter,) = (read_adapter(path, name) for name, path in double.paths.items() if name == "bd1-r16-0")
    assert adapter.nblocks == 2
    assert list(double._adapters(["block-diagonal"])) == ["bd1-r16-0", "bd1-r16-1"]
    assert list(double._adapters(["stock"])) == ["plain-r16-0", "plain-r16-1"]
    for wrong, why in (
        (["--tp", "2"], "leave out --tp 2"),
        (["--arms", "s-lora"], "leave it out of --arms"),
        (["--nblocks", "6"], "--nblocks 6 is no multiple of --share-of 4"),
        (["--share-of", "8"], "kv_heads is 4, which 8 ranks cannot share evenly"),
        (["--share-of", "0"], "has to be 1 or more"),
    ):
        with pytest.raises(SystemExit):
            arguments([*words, *wrong])
        assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arms", "kinds"),
    [
        (["no-lora"], {}),
        (["no-lora", "replicated"], {"ours": "plain"}),
        (["stock-base-only", "loaded-base-only"], {"stock": "plain", "ours": "bd1"}),
        (["s-lora", "block-diagonal"], {"s-lora": "plain", "ours": "bd1"}),
    ],
    ids=str,
)
def test_servers_have_the_adapters_of_the_arms_that_are_measured(tmp_path, monkeypatch, arms, kinds):
    from benchmarks.latency import run as latency
    from benchmarks.latency.__main__ import arguments

    words = ["--device", "cpu", "--tiny", "--mixes", "16x2", "--arms", *arms, "--output", str(tmp_path / "rows")]
    run = latency.Latency(arguments(words), tmp_path)
    run.write_files()
    assert {name.partition("-")[0] for name in run.paths} == set(kinds.values())
    given = {}
    monkeypatch.setattr(
        latency, "command", lambda server, setup, adapters, port: (given.update({server: list(adapters)}) or [], {})
    )
    for server in latency.SERVERS:
        run._process(server)
    assert {server: names for server, names in given.items() if names} == {
        server: [f"{kind}-r16-{i}" for i in range(2)] for server, kind in kinds.items()
    }


def test_ratios_are_by_the_mean_of_the_servers_without_lora():
    from benchmarks.latency.plot import table

    point = {"run": "a", "mix": "16x4", "adapters": 0, "batch": 1, "input_len": 8, "output_len": 8, "ttft_ms": 10.0}
    rows = [
        {**point, "arm": "no-lora", "decode_ms": 1.0},
        {**point, "arm": "block-diagonal", "adapters": 4, "params_ratio": 1.0, "decode_ms": 2.1,
         "decode_ms_each": [2.1, 2.45, 2.05]},
        {**point, "arm": "no-lora", "decode_ms": 1.1, "ttft_ms": 15.0},
        {**point, "batch": 4, "arm": "no-lora", "decode_ms": 1.0},
        {**point, "batch": 4, "arm": "no-lora", "decode_ms": 1.02, "ttft_ms": 11.0},
        {**point, "run": "b", "arm": "no-lora", "decode_ms": 4.0},
    ]  # fmt: skip
    text = table(rows)
    assert "block-diagonal 1.00x 16x4" in text
    assert "decode  2.00x" in text
    assert "2.100 ms (2.050 to 2.450)\n" in text
    assert "first to last, decode steps: at most 10.0 % (batch 1, 8/8)" in text
    assert "first to last, first tokens: at most 50.0 % (batch 1, 8/8)" in text
    assert "drift" not in table(rows[:2])


def test_a_picture_is_of_one_model_and_size(tmp_path, capsys):
    from benchmarks.latency.plot import main

    rows = [row for row in read_rows(RESULTS / "latency-8b-share4-h200.jsonl") if row["kind"] == "point"]
    mixed = tmp_path / "rows.jsonl"
    for other in ({**rows[0], "share_of": 8}, {**rows[0], "model": "another"}):
        mixed.write_text("".join(json.dumps(row) + "\n" for row in [*rows, other]))
        with pytest.raises(SystemExit):
            main([str(mixed)])
        told = capsys.readouterr().err
        assert f"{mixed}: rows of " in told
        assert "Llama-3.1-8B shape, one rank of TP 4 without collectives" in told
    assert not mixed.with_suffix(".png").exists()


def test_a_picture_needs_a_file_with_points(tmp_path, capsys):
    from benchmarks.latency.plot import main

    for name, text, why in (
        ("none.jsonl", None, "No such file or directory"),
        ("empty.jsonl", "", "rows of benchmarks.latency are needed"),
        ("error.jsonl", '{"benchmark": "latency", "kind": "error"}\n', "rows of benchmarks.latency are needed"),
        ("other.jsonl", '{"benchmark": "cliff", "kind": "point"}\n', "rows of benchmarks.latency are needed"),
        ("text.jsonl", "not a row\n", "Expecting value"),
    ):
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit):
            main([str(file)])
        told = capsys.readouterr().err
        assert why in told
        assert str(file) in told


def test_a_picture_goes_beside_its_rows(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.latency.plot import main

    file = Path(shutil.copy(RESULTS / "latency-8b-share4-h200.jsonl", tmp_path))
    assert main([str(file)]) == 0
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "block-diagonal" in capsys.readouterr().out


def test_a_picture_without_rows_without_lora_has_no_ratios(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.latency.plot import main

    rows = [row for row in read_rows(RESULTS / "latency-8b-share4-h200.jsonl") if row["arm"] != "no-lora"]
    heights = []
    for kept in (rows, read_rows(RESULTS / "latency-8b-share4-h200.jsonl")):
        file = tmp_path / f"{len(kept)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        assert main([str(file)]) == 0
        heights.append(int.from_bytes(file.with_suffix(".png").read_bytes()[20:24]))
    assert heights[0] < heights[1]


def test_picture_of_a_cliff(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.cliff.plot import main

    file = Path(shutil.copy(RESULTS / "cliff-h200.jsonl", tmp_path))
    assert main([str(file)]) == 0
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    file.write_text('{"benchmark": "latency", "kind": "point"}\n')
    with pytest.raises(SystemExit):
        main([str(file)])
    assert f"{file}: rows of benchmarks.cliff are needed" in capsys.readouterr().err


def test_gaps_between_tokens_are_those_that_a_span_touches():
    streams = holdup.Streams("http://nowhere", 2)
    streams._times = [[0.0, 1.0, 1.5, 4.0], [0.5, 0.6, 0.9]]
    assert streams.gap(1.1, 1.4) == 0.5
    assert streams.gap(1.4, 2.0) == 2.5
    assert streams.gap(0.55, 0.7) == 1.0
    assert math.isnan(streams.gap(5.0, 6.0))


def test_what_a_step_holds_up_is_not_the_next_steps(monkeypatch):
    spans = []

    class Streams:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def gap(self, begin: float, end: float) -> float:
            spans.append((begin, end))
            return 0.0

    monkeypatch.setattr(holdup, "Streams", Streams)
    monkeypatch.setattr(holdup, "QUIET_S", 0.1)
    assert list(holdup.measure("", 1, {"load": lambda: None, "first request": lambda: None})) == [
        "load",
        "first request",
    ]
    (_, end), (begin, _) = spans
    assert begin - end >= holdup.QUIET_S / 2
