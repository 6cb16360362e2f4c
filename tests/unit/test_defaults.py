"""What the launcher and the engine add, and that the user's words win."""

import pytest

from sgl_bdlora import cpu, defaults


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr("sgl_bdlora.cpu.arguments.applies", lambda: True)
    monkeypatch.setattr(cpu, "applies", lambda: True)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr("sgl_bdlora.cpu.arguments.applies", lambda: False)
    monkeypatch.setattr(cpu, "applies", lambda: False)


def test_lora_is_on_with_our_back_end(on_gpu):
    assert defaults.arguments([]) == ["--enable-lora", "--lora-backend", "bdlora"]


def test_stock_back_ends_are_taken(on_gpu):
    assert defaults.arguments(["--lora-backend", "csgmv"]) == ["--enable-lora"]


def test_the_users_words_win(on_cpu):
    given = ["--attention-backend=triton", "--max-total-tokens", "99", "--sleep-on-idle", "--lora-backend=triton"]
    added = defaults.arguments(given)
    assert not {"--attention-backend", "--max-total-tokens", "--sleep-on-idle", "--lora-backend"} & set(added)
    assert added[added.index("--device") + 1] == "cpu"
    assert "--disable-cuda-graph" not in added


def test_engine_fields(on_cpu):
    fields = defaults.fields({"device": "cuda", "enable_lora": False})
    assert "device" not in fields
    assert "enable_lora" not in fields
    assert fields["sleep_on_idle"] is True
