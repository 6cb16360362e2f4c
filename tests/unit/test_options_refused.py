"""Options that would make LoRA wrong or a start endless end the process with a message that names them."""

from types import SimpleNamespace

import pytest

from sgl_bdlora import cpu

SERVED = {
    "pp_size": 1,
    "enable_dp_attention": False,
    "speculative_algorithm": None,
    "enable_lora_overlap_loading": False,
    "enable_mis": False,
    "enable_torch_compile": False,
}


@pytest.fixture(scope="module")
def manager():
    cpu.prepare_environment()
    from sgl_bdlora import manager

    return manager


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"pp_size": 2}, "--pp-size above 1"),
        ({"enable_dp_attention": True}, "--enable-dp-attention"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
        ({"enable_lora_overlap_loading": True}, "--enable-lora-overlap-loading"),
        ({"enable_mis": True}, "--enable-mis"),
        ({"enable_torch_compile": True}, "--enable-torch-compile"),
    ],
)
def test_an_option_that_does_not_work_is_named(manager, given, option):
    with pytest.raises(SystemExit, match=f"{option} does not work with --lora-backend bdlora"):
        manager.refuse_unsupported(SimpleNamespace(**SERVED | given))


def test_other_options_are_not_refused(manager):
    manager.refuse_unsupported(SimpleNamespace(**SERVED))
    manager.refuse_unsupported(SimpleNamespace(**SERVED | {"speculative_algorithm": "NGRAM"}))


def test_a_model_that_sglang_padded_is_refused(manager):
    padded = SimpleNamespace(num_attention_heads=12, original_num_attention_heads=9)
    with pytest.raises(SystemExit, match="num_attention_heads = 9 is not divisible by --tp-size 4"):
        manager.refuse_padded_model(padded, 4)
    manager.refuse_padded_model(SimpleNamespace(num_attention_heads=8, original_num_attention_heads=8), 4)
