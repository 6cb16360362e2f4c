"""Requests that would end the scheduler are refused before it sees them, and the field is named."""

import contextlib
import math
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from sgl_bdlora import request_checks
from sgl_bdlora.malformed import around_check

PARAMETERS = {
    "top_k": [2**40, "a", 2.5, True], "max_new_tokens": [1.5, "many", 10**30], "n": [2.5], "min_new_tokens": [2**31],
    "stream_interval": ["a"], "sampling_seed": [2**70, "x"], "temperature": ["a", [1]], "presence_penalty": ["a"],
    "logit_bias": [[1], {"1": "x"}, {"1": math.inf}],
    "stop_token_ids": [[-1], [100]], "skip_special_tokens": ["a"], "ignore_eos": [[]], "json_schema": [{"type": "object"}], "regex": [5],
    "custom_params": ["a", [1]],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in PARAMETERS.items() for value in values])
def test_sampling_parameters_that_the_scheduler_would_end_with_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^({name} |the request is malformed)"):
        around_check(lambda: request_checks.before_verify(SamplingParams(**{name: value}), 100))


def test_sampling_parameters_that_make_sense_pass():
    request_checks.before_verify(SamplingParams(), 100)
    sound = SamplingParams(
        top_k=50.0, temperature=0, stop_token_ids=[99], logit_bias={"5": -1}, ignore_eos=1, json_schema="{}", sampling_seed=2**62,
        max_new_tokens=None,
    )  # fmt: skip
    request_checks.before_verify(sound, 100)
    assert isinstance(SamplingParams(top_k=50.0).top_k, float)
    other = SamplingParams(top_k=50.0)
    request_checks.before_verify(other, 100)
    assert isinstance(other.top_k, int)


def test_lists_are_for_batches():
    for name in request_checks._EACH:
        fields = dict.fromkeys(request_checks._EACH) | {name: ["a"]}
        with pytest.raises(ValueError, match=f"^{name}: a list has a value for each prompt"):
            request_checks.after_normalize(None, SimpleNamespace(is_single=True, **fields))
        request_checks.after_normalize(None, SimpleNamespace(is_single=False, **fields))
    request = GenerateReqInput(text="x")
    request.normalize_batch_and_arguments()
    assert all(
        hasattr(request, name) for name in (*request_checks._EACH, "is_single", "top_logprobs_num", "logprob_start_len")
    )


@pytest.mark.parametrize(
    ("multimodal", "picture", "refused"), [(True, "x", False), (True, None, True), (False, "x", True)]
)
def test_pictures_may_have_ids_behind_the_vocabulary(multimodal, picture, refused):
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100, is_multimodal=multimodal))
    request = GenerateReqInput(input_ids=[5, 100], image_data=picture)
    with pytest.raises(ValueError, match="from 0 to 99, got 5 to 100") if refused else contextlib.nullcontext():
        request_checks.before_validate_one_request(manager, request, [5, 100])
