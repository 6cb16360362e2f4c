"""Options that would make LoRA wrong or a start endless end the process with a message that names them."""

from types import SimpleNamespace

import pytest

from sgl_bdlora import cpu, options_refused

SERVED = {
    "lora_backend": "bdlora",
    "enable_lora": True,
    "lora_paths": None,
    "pp_size": 1,
    "enable_dp_attention": False,
    "speculative_algorithm": None,
    "enable_lora_overlap_loading": False,
    "enable_mis": False,
    "enable_torch_compile": False,
}


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
@pytest.mark.parametrize("lora", [{}, {"enable_lora": None, "lora_paths": ["a=/a"]}])
def test_an_option_that_does_not_work_is_named(given, option, lora):
    with pytest.raises(SystemExit, match=f"{option} does not work with --lora-backend bdlora"):
        options_refused.refuse_unsupported(SimpleNamespace(**SERVED | given | lora))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"speculative_algorithm": "NGRAM"},
        {"lora_backend": "csgmv", "enable_torch_compile": True},
        {"enable_lora": None, "pp_size": 2},
        {"enable_lora": False, "lora_paths": ["a=/a"], "pp_size": 2},
    ],
)
def test_other_options_are_not_refused(given):
    options_refused.refuse_unsupported(SimpleNamespace(**SERVED | given))


def test_a_model_that_sglang_padded_is_refused():
    cpu.prepare_environment()
    from sgl_bdlora import manager

    padded = SimpleNamespace(num_attention_heads=12, original_num_attention_heads=9)
    with pytest.raises(SystemExit, match="num_attention_heads = 9 is not divisible by --tp-size 4"):
        manager.refuse_padded_model(padded, 4)
    manager.refuse_padded_model(SimpleNamespace(num_attention_heads=8, original_num_attention_heads=8), 4)
