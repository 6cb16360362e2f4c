"""The benchmark of pinned memory sees pauses, tells of a way that fails, and runs the others."""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import pinning
from benchmarks.record import read_rows


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose steps do nothing."""
    monkeypatch.setattr(pinning, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(pinning, "SETTLE_S", 0.01)
    monkeypatch.setattr(pinning.Batches, "__init__", lambda self: None)
    monkeypatch.setattr(pinning.Batches, "step", lambda self: time.sleep(0.001))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(pinning, "gpu_name", lambda: None)
    with pytest.raises(SystemExit):
        pinning.main([])
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_a_pause_is_told_and_so_is_a_way_that_fails(gpu, tmp_path, capsys, monkeypatch):
    given_back = []

    @contextmanager
    def refused(_):
        raise RuntimeError("out of memory")
        yield

    @contextmanager
    def slow(nbytes):
        time.sleep(0.1)
        yield
        given_back.append(nbytes)

    monkeypatch.setattr(pinning, "ways", lambda: {"refused": refused, "slow": slow})
    words = ["--megabytes", "3", "--repeats", "2", "--output", str(tmp_path / "rows.jsonl")]
    assert pinning.main(words) == 1
    assert given_back == [3 * 10**6] * 2
    failed, *rows = read_rows(tmp_path / "rows.jsonl")
    assert (failed["kind"], failed["way"], failed["message"]) == ("error", "refused", "out of memory")
    assert [(row["way"], row["part"]) for row in rows] == [("slow", "take"), ("slow", "give back")] * 2
    assert all(row["seconds"] >= 0.1 for row in rows[::2])
    assert all(row["pause_ms"] >= row["median_ms"] >= 1 for row in rows)
    assert "slow, 3 MB" in capsys.readouterr().out


def test_the_longest_step_is_the_pause():
    naps = iter([0.001] * 5 + [0.05] + [0.001] * 1000)
    seconds, steps = pinning.beside(lambda: time.sleep(next(naps)), lambda: time.sleep(0.1))
    assert seconds >= 0.1
    assert max(steps) >= 0.05
