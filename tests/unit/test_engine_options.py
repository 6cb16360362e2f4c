"""The options of offline engines, and that one's are not another's."""

import argparse
import json
import os

import pytest

from sgl_bdlora import cpu

cpu.prepare_environment()

from sgl_bdlora import config, engine  # noqa: E402


@pytest.fixture
def made(monkeypatch):
    """Makes an Engine that starts nothing. Returns the options in force and the fields that SGLang's engine gets."""
    fields = {}
    monkeypatch.setattr(engine.engine.Engine, "__init__", lambda self, **kwargs: fields.update(kwargs))
    monkeypatch.delenv(config.ENV, raising=False)
    # Set back what the engines publish.
    monkeypatch.setenv(config.ENV, "{}")
    monkeypatch.delenv(config.ENV)

    def make(**kwargs) -> tuple[config.Options, dict]:
        fields.clear()
        engine.Engine(**kwargs)
        return config.options(), dict(fields)

    return make


def test_an_engine_takes_our_options_and_sglangs(made, tmp_path):
    options, fields = made(model_path="/model", lora_backend="csgmv", lora_pool_gb=0.25, adapter_root=str(tmp_path))
    assert options == config.Options(lora_pool_gb=0.25, adapter_root=str(tmp_path))
    assert (fields["model_path"], fields["lora_backend"], fields["enable_lora"]) == ("/model", "csgmv", True)
    assert not config.names() & fields.keys()


def test_options_end_with_the_engine_that_they_were_given_to(made, tmp_path):
    made(adapter_root=str(tmp_path), lora_pool_gb=0.1)
    assert made(lora_pool_gb=0.5)[0] == config.Options(lora_pool_gb=0.5)
    for _ in range(2):
        assert made()[0] == config.Options()


def test_what_the_user_said_outside_holds_for_every_engine(made, monkeypatch):
    monkeypatch.setenv(config.ENV, json.dumps({"lora_pool_gb": 2.0, "metrics_max_adapters": 5}))
    assert made(lora_pool_gb=0.5)[0] == config.Options(lora_pool_gb=0.5, metrics_max_adapters=5)
    assert made()[0] == config.Options(lora_pool_gb=2.0, metrics_max_adapters=5)
    # Also when it is said between two engines, in the environment or on a command line.
    monkeypatch.setenv(config.ENV, json.dumps({"lora_pool_gb": 3.0}))
    assert made(metrics_max_adapters=7)[0] == config.Options(lora_pool_gb=3.0, metrics_max_adapters=7)
    config.capture(argparse.Namespace(lora_sharding="s-lora"))
    expected = config.Options(lora_pool_gb=3.0, lora_sharding="s-lora")
    assert config.options() == expected
    assert made(server_args="parsed") == (expected, {"server_args": "parsed"})
    monkeypatch.delenv(config.ENV)
    assert made()[0] == config.Options()


def test_a_refused_option_leaves_everything_as_it_was(made):
    made(lora_pool_gb=0.5)
    with pytest.raises(ValueError, match="has to be positive"):
        made(lora_pool_gb=-1)
    assert json.loads(os.environ[config.ENV])["lora_pool_gb"] == 0.5
    assert made()[0] == config.Options()
