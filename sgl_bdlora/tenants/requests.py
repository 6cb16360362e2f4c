"""What a tenant's requests may do, checked where all routes meet: hooks of SGLang's tokenizer manager, in the launcher's process.

A name that a tenant does not see and one that nothing has are refused by the same lines, before anything is looked up. The prefix
cache is keyed by a tenant's own salt before everything else (managers/schedule_batch.py: Req.extra_key), so that neither cached_tokens
nor the time to a first token tells what others have asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from contextlib import aclosing

from fastapi import HTTPException

from sgl_bdlora import config
from sgl_bdlora.adapters.root import confined
from sgl_bdlora.tenants import Tenant, current, limits_met
from sgl_bdlora.tenants.limits import Limited


class NotServed(ValueError):
    """A request that this tenant may not make."""


class Refused(HTTPException, ValueError):
    """SGLang's routes turn one or the other of its bases into an answer with its status."""


# Fields of GenerateReqInput that a tenant may set, others have to be what they are by default: some name files, addresses or other
# requests, run code, or belong to SGLang's own processes.
_OPEN_FIELDS = frozenset(
    {
        "text", "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob",
        "return_sampling_mask", "return_text_in_logprobs", "return_flat_raw_top_logprobs", "return_flat_raw_top_logprobs_b64", "stream",
        "return_hidden_states", "return_entropy", "return_prompt_token_ids", "modalities", "lora_path", "extra_key", "require_reasoning",
        "max_thinking_tokens", "routing_key", "conversation_id", "custom_labels", "received_time", "external_trace_header", "images_config",
        "max_dynamic_patch", "min_dynamic_patch", "image_max_dynamic_patch", "video_max_dynamic_patch", "use_audio_in_video",
    }
)  # fmt: skip
# Names of requests are shared by all (an abort takes every request whose name begins like it), and the rest decides for others too.
_RESET_FIELDS = {
    "rid": None,
    "session_id": None,
    "lora_id": None,
    "priority": None,
    "log_metrics": True,
    "no_logs": False,
}
_MEDIA_FIELDS = ("image_data", "video_data", "audio_data")


def around_generate_request(original, manager, obj, request=None):
    """Hook of TokenizerManager.generate_request; an asynchronous generator of outputs."""
    if manager.server_args.lora_backend == config.BACKEND:
        # SGLang takes it from the body of /generate as it is; an id that no adapter has would end the scheduler.
        obj.lora_id = None
    if manager.gracefully_exit:
        raise Refused(503, "this server is shutting down")
    tenant = current()
    return original(manager, obj, request) if tenant is None else _generate(original, tenant, manager, obj, request)


async def _generate(original, tenant: Tenant, manager, obj, request):
    restrict(tenant, manager, obj)
    seen: dict[str, int] = {}
    try:
        with tenant.limits.run(_requests_in(obj)):
            async with aclosing(original(manager, obj, request)) as outputs:
                async for out in outputs:
                    for one in out if isinstance(out, list) else [out]:
                        meta = one["meta_info"]
                        tokens = (meta.get("prompt_tokens") or 0) + (meta.get("completion_tokens") or 0)
                        tenant.limits.spend_tokens(max(0, tokens - seen.get(meta["id"], 0)))
                        seen[meta["id"]] = tokens
                    yield out
    except Limited as limited:
        limits_met.get([]).append(limited)
        raise Refused(429, str(limited)) from limited
    except ValueError as error:
        # An adapter that was unloaded while it was looked up: SGLang's message lists all others (lora/lora_registry.py:acquire).
        if "oaded adapters:" in str(error):
            raise unknown(next(filter(None, _names(obj)))) from None
        raise


def restrict(tenant: Tenant, manager, obj) -> None:
    """Refuse what the tenant may not ask for, and move the request into its part of the prefix cache. Raises NotServed."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        # They have no key for the prefix cache (EmbeddingReqInput).
        raise NotServed("embeddings and scores are not served to this API key")
    for name, value in _RESET_FIELDS.items():
        setattr(obj, name, value)
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        if field.name in _MEDIA_FIELDS:
            # serving_chat.py wraps what a message holds in an object with a url.
            urls = [getattr(item, "url", item) for item in _flat(value)]
            if not all(isinstance(url, str) and url.startswith("data:") for url in urls):
                raise NotServed(f"{field.name} has to be given as data: URLs with this API key")
        elif field.name not in _OPEN_FIELDS and field.name not in _RESET_FIELDS and value not in (None, field.default):
            raise NotServed(f"{field.name} is not available with this API key")
    given = obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]
    if any(isinstance(parameters, dict) and parameters.get("stop_regex") for parameters in given):
        # The scheduler matches it while everyone waits, and it may take years.
        raise NotServed("stop_regex is not available with this API key")
    names = _names(obj)
    # SGLang looks up "" in a list, and refuses it with the names of all adapters.
    obj.lora_path = names if isinstance(obj.lora_path, list) else names[0]
    if not tenant.base and None in names:
        raise NotServed("this API key needs an adapter in every request")
    for name in names:
        if name is not None and not (tenant.sees(name) and name in manager.lora_ref_cache):
            raise unknown(name)
    given = obj.extra_key if isinstance(obj.extra_key, list) else [obj.extra_key]
    keys = [_cache_key(tenant, key) for key in given]
    obj.extra_key = keys if isinstance(obj.extra_key, list) else keys[0]


def unknown(name: str) -> NotServed:
    return NotServed(f"LoRA adapter {name[:100]!r} does not exist")


def _names(obj) -> list[str | None]:
    """The adapters that a request names; "" and None are the base model."""
    given = obj.lora_path if isinstance(obj.lora_path, list) else [obj.lora_path]
    return [name or None for name in given]


def _cache_key(tenant: Tenant, given: str | None) -> str:
    # Of one length each, so that no two join to the same key, also when SGLang appends the adapter's id.
    return tenant.salt + hashlib.sha256((given or "").encode("utf-8", "surrogatepass")).hexdigest()


def _requests_in(obj) -> int:
    """How many requests this one holds: prompts, times samples."""
    prompts = 1
    if isinstance(obj.text, list):
        prompts = len(obj.text)
    elif isinstance(obj.input_ids, list) and obj.input_ids and not isinstance(obj.input_ids[0], int):
        prompts = len(obj.input_ids)
    given = obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]
    samples = [p["n"] for p in given if isinstance(p, dict) and isinstance(p.get("n"), int)]
    return max(1, prompts * max([1, *samples]))


def _flat(value) -> Iterable:
    if value is None:
        return
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


# Loading


async def around_load_lora_adapter(original, manager, obj, request=None):
    """Hook of TokenizerManager.load_lora_adapter. SGLang calls it without a request when it reads an evicted adapter again."""
    tenant = current() if request is not None else None
    if tenant is None:
        return await original(manager, obj, request)
    problem = _loading_problem(tenant, obj.lora_name)
    home = os.path.join(config.options().adapter_root, tenant.name)
    if problem is None and obj.pinned:
        problem = "pinned adapters are not available with this API key"
    if problem is None:
        try:
            obj.lora_path = str(confined(obj.lora_name, obj.lora_path, home))
        except ValueError as error:
            problem = str(error)
    if problem is not None:
        return _update(False, problem, tenant)
    result = await original(manager, obj, request)
    message = result.error_message
    if not result.success and not message.startswith(f"LoRA adapter {obj.lora_name!r}"):
        message = f"LoRA adapter {obj.lora_name!r} could not be loaded"
    return _update(result.success, message and message.replace(os.path.realpath(home), "."), tenant)


async def around_unload_lora_adapter(original, manager, obj, request=None):
    """Hook of TokenizerManager.unload_lora_adapter."""
    tenant = current()
    if tenant is None:
        return await original(manager, obj, request)
    if _loading_problem(tenant, obj.lora_name) or obj.lora_name not in tenant.loaded:
        return _update(False, str(unknown(obj.lora_name)), tenant)
    result = await original(manager, obj, request)
    return _update(result.success, None if result.success else str(unknown(obj.lora_name)), tenant)


def _loading_problem(tenant: Tenant, adapter: str) -> str | None:
    if tenant.may_load and tenant.sees(adapter):
        return None
    return f"adapters named {adapter[:100]!r} cannot be loaded with this API key"


def _update(success: bool, message: str | None, tenant: Tenant):
    from sglang.srt.managers.io_struct import LoRAUpdateOutput

    loaded = {name: name for name in tenant.loaded}
    return LoRAUpdateOutput(success=success, error_message=message, loaded_adapters=loaded)


async def around_create_responses(original, serving, request, raw_request=None):
    """Hook of OpenAIServingResponses.create_responses, which keeps answers under ids that all share."""
    if current() is not None:
        if request.background or request.previous_response_id:
            return serving.create_error_response(
                "background and previous_response_id are not available with this API key"
            )
        request = request.model_copy(update={"store": False})
    return await original(serving, request, raw_request)
