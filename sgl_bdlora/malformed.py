"""Requests whose fields do not fit together are the client's mistake: 400, with the reason.

SGLang's routes answer a ValueError with 400. What its checks of a request raise otherwise (a list that is too short for the batch, a number
where a list should be) becomes a 500. These are hooks of those checks, all of which run before the scheduler sees anything of the request.
"""

# What Python raises for a value of the wrong type or length.
_MISTAKES = (AssertionError, AttributeError, IndexError, KeyError, TypeError)

TARGETS = (
    "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
    "sglang.srt.managers.io_struct.GenerateReqInput.__getitem__",
    "sglang.srt.managers.io_struct.EmbeddingReqInput.normalize_batch_and_arguments",
    "sglang.srt.managers.io_struct.EmbeddingReqInput.__getitem__",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key",
)


def around_check(original, *args, **kwargs):
    """Hook of each of TARGETS."""
    try:
        return original(*args, **kwargs)
    except _MISTAKES as mistake:
        raise ValueError(f"the request is malformed: {type(mistake).__name__}: {mistake}") from mistake
