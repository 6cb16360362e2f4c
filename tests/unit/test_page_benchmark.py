"""The page against the latency benchmark: what each makes of known times, and when they agree."""

import argparse
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from app.compare import BLOCK, PLAIN
from app.measure import Answer, Batch
from benchmarks.files import TINY
from benchmarks.page import __main__ as benchmark
from benchmarks.page.__main__ import gpus
from benchmarks.page.agreement import by_chance, judge
from benchmarks.page.tokenizer import text_of, write_tokenizer
from benchmarks.page.ways import GAIN, Figure, Work, check, of_batches, of_times
from sgl_bdlora.server_process import ServerProcess, StartFailed

WORK = Work(batch=2, prompt=3, output=5, repeats=3, vocab=300)


def batch(arm: str, repeat: int, first: float, last: float, cached: int = 0) -> Batch:
    answer = Answer("a", "why?", "so", 5, 3, cached, first, last, 1, True)
    return Batch(arm, repeat, (answer, answer))


def test_both_ways_make_the_same_numbers_of_the_same_times():
    times = {PLAIN: ([1.0, 3.0, 2.0], [9.0, 7.0, 10.0]), BLOCK: ([1.0, 1.5, 0.5], [3.0, 5.5, 4.5])}
    batches = [
        batch(arm, repeat, first, whole)
        for arm, both in times.items()
        for repeat, (first, whole) in enumerate(zip(*both, strict=True))
    ]
    check(batches, WORK)
    page, runner = of_batches(batches), of_times(times, WORK)
    assert page.keys() == runner.keys()
    for key in ("first_s", "end_to_end_s", "tokens_per_s"):
        for arm in (PLAIN, BLOCK):
            assert page[arm, key] == runner[arm, key]
    assert runner[PLAIN, "first_s"] == Figure(2, 1, 3)
    assert runner[PLAIN, "tokens_per_s"] == Figure(10 / 9, 1, 10 / 7)
    # The runner takes the medians first, the page the steps: (9 - 2) / 4, and the median of 2, 1 and 2.
    assert runner[PLAIN, "per_token_s"] == Figure(1.75, 1, 2)
    assert page[PLAIN, "per_token_s"] == Figure(2, 1, 2)
    # The same again: the page takes the median of 9 / 3, 7 / 5.5 and 10 / 4.5, the runner divides the medians.
    for key in ("end_to_end_s", "tokens_per_s"):
        assert (page[GAIN, key].value, runner[GAIN, key].value) == pytest.approx((10 / 4.5, 2))
        assert (runner[GAIN, key].low, runner[GAIN, key].high) == pytest.approx((7 / 5.5, 3))


def test_answers_that_are_no_equal_work_are_not_compared():
    with pytest.raises(RuntimeError, match=r"\(3, 2, 5\)"):
        check([batch(PLAIN, 0, 1, 2, cached=2)], WORK)


def test_numbers_agree_when_their_runs_ranges_meet():
    def runs(*values: float) -> list[Figure]:
        return [Figure(value, value - 1, value + 1) for value in values]

    found = judge(runs(100, 102, 101), runs(103, 102, 104))
    assert found.word == "agree"
    assert (found.page, found.runner, found.page_runs, found.runner_repeats) == (101, 103, (100, 102), (101, 105))
    for page, runner in ((runs(100, 101), runs(102, 103)), (runs(102, 103), runs(100, 101))):
        assert judge(page, runner).word == "differ"
    # Far apart, they would meet whatever was measured.
    for page, runner in ((runs(10, 20), runs(14, 15)), (runs(14, 15), runs(10, 20))):
        assert judge(page, runner).word == "noisy"
    assert judge(runs(10, 20), runs(30, 31)).word == "differ"


def test_ranges_of_equal_numbers_miss_each_other_as_often_as_said():
    rng = random.Random(0)
    missed = 0
    for _ in range(4000):
        page, runner = ([Figure(x, x, x) for x in (rng.random() for _ in range(3))] for _ in range(2))
        missed += judge(page, runner).word == "differ"
    assert missed / 4000 == pytest.approx(by_chance(3), rel=0.15)
    assert by_chance(5) == pytest.approx(0.0079, abs=1e-4)


def test_a_prompt_has_the_tokens_that_it_was_made_of(tmp_path):
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path, 300)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = list(range(300))
    assert tokenizer.encode(text_of(ids)).ids == ids
    assert tokenizer.decode([20, 200]) == text_of([20, 200])


def test_each_of_two_servers_has_its_own_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpus(i, 2) for i in (0, 1)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [gpus(i, 1) for i in (0, 1)] == ["5", "7"]


def test_what_is_beneath_the_page_needs_no_gradio():
    code = "import sys, app.context, app.planning, app.results; sys.exit('gradio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_both_servers_are_stopped_when_one_does_not_start(tmp_path, monkeypatch):
    codes = {"ours": "import time; time.sleep(60)", "s-lora": "exit('s-lora is ill')"}
    servers, waited = {}, []

    def process(args, shape, model, index, server, adapters, output) -> ServerProcess:
        command = [sys.executable, "-c", codes[server]]
        servers[server] = ServerProcess(command, {}, "http://127.0.0.1:9", tmp_path / server, 60)
        return servers[server]

    wait = ServerProcess.wait

    def soon(self) -> None:
        waited.append(threading.get_ident())
        if self is servers["s-lora"]:
            wait(self)

    for name, stub in {
        "keep_model": lambda shape, folder: folder, "write_tokenizer": lambda *_: None, "write_adapters": lambda *_: {}, "process": process,
    }.items():  # fmt: skip
        monkeypatch.setattr(benchmark, name, stub)
    monkeypatch.setattr(ServerProcess, "wait", soon)
    args = argparse.Namespace(servers=2)
    with (
        pytest.raises(StartFailed, match="s-lora is ill"),
        benchmark.running(args, TINY, tmp_path, tmp_path / "rows.jsonl"),
    ):
        pytest.fail("one has not started")
    # A signal reaches the main thread only.
    assert waited == [threading.get_ident()] * 2
    for server in servers.values():
        with pytest.raises(ProcessLookupError):
            os.kill(server.pid, 0)
