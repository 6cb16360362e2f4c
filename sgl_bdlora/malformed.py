"""Requests that do not make sense are the client's mistake: 4xx, with the reason.

SGLang's routes answer a ValueError with 400. What its checks of a request raise otherwise (a list that is too short for the batch, a number
where a list should be) becomes a 500, and some of its routes answer a ValueError with 500 too. A fault of the server stays one: only what
reads a request is treated here, before the scheduler sees anything of it. What SGLang does not check is checked in request_checks.py.
"""

import logging
import re
import sys

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
