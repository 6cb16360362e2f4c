"""What SGLang's checks of a request let through, and what would end the scheduler, and with it the server, in the middle of a batch.

Hooks of the launcher, which raise ValueError: SGLang's routes answer it with 400. Each names the field, what it may be, and what came.
"""

import math
from numbers import Integral, Real

# Fields that have a value for each prompt of a batch. The scheduler takes one value, not a list of one.
_EACH = (
    "lora_path", "extra_key", "return_logprob", "logprob_start_len", "top_logprobs_num", "return_sampling_mask", "return_hidden_states",
    "custom_logit_processor", "bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "decode_tp_size",
)  # fmt: skip

# Sampling parameters by kind, which SGLang compares and passes on as they come. Whole numbers: bits of what they become.
_WHOLE = {"top_k": 31, "max_new_tokens": 31, "min_new_tokens": 31, "n": 31, "stream_interval": 31, "sampling_seed": 63}
_NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
_TEXTS = ("json_schema", "regex", "ebnf", "structural_tag")
_SWITCHES = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")


def after_normalize(result, request) -> None:
    """SGLang looks into these lists only where there are several prompts."""
    if not request.is_single:
        return
    for name in _EACH:
        if isinstance(getattr(request, name, None), list):
            raise ValueError(
                f"{name}: a list has a value for each prompt of a batch, and this request has one prompt; give the value"
            )


def before_validate_one_request(manager, request, input_ids) -> None:
    """What the scheduler passes on to operations, which fail in the middle of a batch. EmbeddingReqInput has not all of it."""
    from sglang.srt.managers.embed_types import PositionalEmbeds

    embeds = getattr(request, "positional_embed_overrides", None)
    if embeds is not None and not isinstance(embeds, PositionalEmbeds):
        raise ValueError("positional_embed_overrides has tensors, which a request in JSON cannot give; leave it out")
    words, most = manager.model_config.vocab_size, len(input_ids or ())
    if not input_ids and getattr(request, "input_embeds", None) is None:
        raise ValueError("the prompt has no token; give text or input_ids")
    # A picture's place may have an id behind the vocabulary (mllama), which the scheduler replaces.
    pictures = manager.model_config.is_multimodal and request.contains_mm_input()
    if input_ids and not pictures and not 0 <= min(input_ids) <= max(input_ids) < words:
        raise ValueError(f"input_ids have to be from 0 to {words - 1}, got {min(input_ids)} to {max(input_ids)}")
    for name, least, highest in ("top_logprobs_num", 0, words), ("logprob_start_len", -1, most):
        value = getattr(request, name, None)
        if value is not None and not least <= value <= highest:
            raise ValueError(f"{name} has to be from {least} to {highest} for this prompt, got {value}")


def before_verify(parameters, vocab_size: int) -> None:
    """Hook of SamplingParams.verify: types, and what an operation of the scheduler would take for an index."""

    def refuse(name: str, what: str) -> None:
        raise ValueError(f"{name} has to be {what}, got {str(getattr(parameters, name))[:200]}")

    for name, bits in _WHOLE.items():
        value = getattr(parameters, name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
            setattr(parameters, name, value)
        if value is not None and (not _is(value, Integral) or abs(value) >= 2**bits):
            refuse(name, f"a whole number of at most {bits} bits")
    for name in _NUMBERS:
        if not _is(getattr(parameters, name), Real):
            refuse(name, "a number")
    for name in _SWITCHES:
        if getattr(parameters, name) not in (False, True):  # 0 and 1 too
            refuse(name, "true or false")
    for name in _TEXTS:
        if not isinstance(getattr(parameters, name), str | None):
            refuse(name, "text")
    if not all(0 <= token < vocab_size for token in parameters.stop_token_ids or ()):
        refuse("stop_token_ids", f"token ids from 0 to {vocab_size - 1}")
    bias = parameters.logit_bias
    if bias is not None and not (
        isinstance(bias, dict) and all(_is(v, Real) and math.isfinite(v) for v in bias.values())
    ):
        refuse("logit_bias", "an object of token ids and finite numbers")
    if not isinstance(parameters.custom_params, dict | None):
        refuse("custom_params", "an object")


def _is(value, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
