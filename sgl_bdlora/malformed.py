"""Requests that do not make sense are the client's mistake: 4xx, with the reason.

SGLang's routes answer a ValueError with 400. What its checks of a request raise otherwise (a list that is too short for the batch, a number
where a list should be) becomes a 500, some of its routes answer a ValueError with 500 too, and some of what its checks let through ends the
scheduler, and with it the server. A fault of the server stays one: only what reads a request is treated here, before the scheduler sees it.
"""

import logging
import math
import re
import sys
from numbers import Integral, Real

from jinja2 import TemplateError

logger = logging.getLogger(__name__)

# What Python raises for a value of the wrong type or length, or one that is no expression.
_MISTAKES = (AssertionError, AttributeError, IndexError, KeyError, TypeError, OverflowError, re.error)

# What reads or checks a request.
TARGETS = (
    "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
    "sglang.srt.managers.io_struct.GenerateReqInput.__getitem__",
    "sglang.srt.managers.io_struct.EmbeddingReqInput.normalize_batch_and_arguments",
    "sglang.srt.managers.io_struct.EmbeddingReqInput.__getitem__",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key",
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_messages",
)

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

# Routes whose handlers answer all that they raise themselves; what is left is the reader of a body that is no object.
_READERS = ("openai_v1_chat_completions", "sagemaker_chat_completions")

# Other handlers -> what of that which gets out of them a request has caused.
_BLAMED = {
    # These do nothing but parse the text of the request with the parser that it names.
    "parse_function_call_request": (ValueError, *_MISTAKES),
    "separate_reasoning_request": (ValueError, *_MISTAKES),
    "get_loads": (ValueError,),
    "ollama_chat": (ValueError, TemplateError),
    "ollama_generate": (ValueError,),
    # TypeError: names of fields are taken from the request.
    "vertex_generate": (ValueError, TypeError),
}

_MOST_TOKEN_ID = 2**32 - 1


def around_check(original, *args, **kwargs):
    """Hook of each of TARGETS."""
    try:
        return original(*args, **kwargs)
    except _MISTAKES as mistake:
        raise ValueError(_reason(mistake)) from mistake


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


async def around_tokenize(original, *args, **kwargs):
    try:
        return await original(*args, **kwargs)
    except _MISTAKES as mistake:
        raise ValueError(_reason(mistake)) from mistake


def add_handlers(app) -> None:
    """Answer 400 where a route lets through what a request has caused; anything else goes on to be a 500."""
    for kind in (ValueError, TemplateError, *_MISTAKES):
        app.add_exception_handler(kind, _answer)


async def _answer(request, error: Exception):
    from fastapi.responses import JSONResponse

    route = request.scope["endpoint"].__name__
    if route in _READERS and isinstance(error, AttributeError):
        reason = "the request is malformed: its body has to be a JSON object"
    elif isinstance(error, _BLAMED.get(route, ())):
        reason = _reason(error)
    else:
        raise error
    logger.info("refused: %s", reason, exc_info=error)
    return JSONResponse({"error": {"message": reason}}, status_code=400)


def around_anthropic_error(original, serving, **fields):
    """SGLang's Anthropic routes catch everything and answer 500, whatever it was."""
    error = sys.exc_info()[1]
    if fields["status_code"] == 500 and isinstance(error, ValueError):
        fields |= {"status_code": 400, "error_type": "invalid_request_error", "message": str(error)}
    return original(serving, **fields)


async def around_handle_streaming(original, serving, *args, **kwargs):
    """What SGLang calls for `stream` on a route without streams; it answers 501."""
    raise ValueError(f"{type(serving).__name__} does not stream; leave out stream")


def before_detokenize(serving, request, raw_request) -> None:
    for ids in request.tokens:
        for token in ids if isinstance(ids, list) else [ids]:
            if not 0 <= token <= _MOST_TOKEN_ID:
                raise ValueError(f"{token} is no token id: they are from 0 to {_MOST_TOKEN_ID}")


def before_ollama_chat(serving, request, *args, **kwargs) -> None:
    """The template's result is a mapping with transformers 5; SGLang passes it on as the prompt's token ids."""
    if not isinstance(request.input_ids, list):
        request.input_ids = request.input_ids["input_ids"]


def before_ollama_messages(serving, request, raw_request) -> None:
    if not request.messages:
        raise ValueError("messages cannot be empty")


async def around_ollama_stream(original, serving, *args, **kwargs):
    """Begin to stream only when there is something, so that a refused request is answered as one."""
    response = await original(serving, *args, **kwargs)
    pieces = response.body_iterator
    response.body_iterator = _with_first(await anext(pieces), pieces)
    return response


async def _with_first(first: bytes, pieces):
    yield first
    async for piece in pieces:
        yield piece


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"the request is malformed: {type(error).__name__}: {error}"
