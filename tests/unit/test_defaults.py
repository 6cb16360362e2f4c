"""What the launcher and the engine add, and that the user's words win."""

import argparse

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


@pytest.fixture
def file(tmp_path):
    """Writes --config's file, and returns the words that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "server.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_what_the_configuration_file_says_wins(on_cpu, file):
    given = file("lora-backend: csgmv\ndevice: cuda\nmax-total-tokens: 99\nenable-lora: false\nsleep-on-idle: true\n")
    added = defaults.arguments(["--tp-size", "2", *given])
    assert not {"--lora-backend", "--device", "--max-total-tokens", "--enable-lora", "--sleep-on-idle"} & set(added)
    assert added[added.index("--attention-backend") + 1] == "torch_native"


def test_a_configuration_file_that_says_nothing_changes_nothing(on_gpu, file):
    for text in ("", "model-path: /model\n"):
        assert defaults.arguments(file(text)) == ["--enable-lora", "--lora-backend", "bdlora"]


def test_words_count_more_than_the_configuration_file(file):
    given = ["--device", "cpu", *file("device: cuda\nport: 1\n")]
    assert defaults.given_fields(given) == {"device": "cpu", "port": "1"}


def test_sglang_reads_the_file_with_what_is_added(on_cpu, file):
    """As launch_server does, with SGLang's own parser."""
    cpu.prepare_environment()
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    words = file("model-path: /model\nlora-backend: csgmv\nmax-total-tokens: 99\nenable-lora: false\n")
    parsed = parser.parse_args(ConfigArgumentMerger(parser).merge_config_with_args(words + defaults.arguments(words)))
    assert (parsed.lora_backend, parsed.max_total_tokens) == ("csgmv", 99)
    assert not parsed.enable_lora
    assert (parsed.device, parsed.max_running_requests) == ("cpu", 64)


@pytest.mark.parametrize(
    "words", [["--config"], ["--config", "/none.yaml"], ["--config", "a.yaml", "--config", "b.yaml"]]
)
def test_a_configuration_file_that_sglang_refuses_is_refused(words):
    with pytest.raises(ValueError, match=r"[Cc]onfig file"):
        defaults.arguments(words)
