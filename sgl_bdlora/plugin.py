"""The SGLang plugin: checks the host, registers hooks, says so in one line. The only file that names HookRegistry.

SGLang calls `register` in the launcher and in every process it starts (sglang/srt/plugins/__init__.py:load_plugins). Its loader
logs a plugin's exceptions and carries on unpatched, so everything that must not be ignored raises SystemExit here.
"""

import logging
import multiprocessing
from functools import partial

from sgl_bdlora import config, cpu, graphs, malformed, options_refused, request_checks

logger = logging.getLogger(__name__)

_targets: list[str] = []


def register() -> None:
    """Entry point of group `sglang.srt.plugins`."""
    cpu.prepare_environment()
    from sgl_bdlora import compat

    launcher = multiprocessing.parent_process() is None
    compat.require(launcher)
    options_refused.refuse_environment()
    _register_backend()
    _hook("sglang.srt.server_args.ServerArgs.add_cli_args", _after_add_cli_args, "AFTER")
    _hook("sglang.srt.server_args.ServerArgs.from_cli_args", _before_from_cli_args, "BEFORE")
    _hook("sglang.srt.server_args.ServerArgs.check_lora_server_args", _before_check_lora_server_args, "BEFORE")
    _hook("sglang.srt.model_executor.model_runner.ModelRunner.init_lora_manager", _around_init_lora_manager, "AROUND")
    _hook("sglang.srt.lora.lora_manager.LoRAManager.validate_new_adapter", _before_validate_new_adapter, "BEFORE")
    _hook("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _after_get_internal_state, "AFTER")
    _hook("sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill", _before_get_new_batch_prefill, "BEFORE")
    _hook("sglang.srt.managers.scheduler.Scheduler._can_schedule_lora_req", _around_can_schedule_lora_req, "AROUND")
    _hook(
        "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding._embed_local_shard",
        _around_embed_local_shard,
        "AROUND",
    )
    _hook("sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head", _around_compute_lm_head, "AROUND")
    graphs.register(_hook)
    if launcher:
        _hook("sglang.srt.entrypoints.http_server.launch_server", _before_launch_server, "BEFORE")
        _register_unloading()
        _register_metrics()
        _register_tenants()
        _register_ending()
        _register_malformed()
        _register_request_checks()
        tensors = "sglang.srt.managers.tokenizer_manager.TokenizerManager.load_lora_adapter_from_tensors"
        _hook(tensors, _around_load_lora_adapter_from_tensors, "AROUND")
    cpu.register_hooks(_hook)
    logger.info("sgl-bdlora: %d hooks on sglang %s", len(_targets), compat.SGLANG_VERSION)


def verify_hooks() -> None:
    """End the process if a hook did not land (SGLang's registry only logs it)."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _targets if target not in HookRegistry._patched]
    if missing or not _targets:
        raise SystemExit(
            f"sgl-bdlora: hooks not in place: {', '.join(missing) or 'all'}; refusing to serve LoRA unpatched."
        )


def _hook(target: str, hook, kind: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, hook, HookType[kind])
    _targets.append(target)


def _register_unloading() -> None:
    from sgl_bdlora import unloading

    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    registry = "sglang.srt.lora.lora_registry.LoRARegistry"
    _hook(f"{manager}.init_lora", unloading.after_init_lora, "AFTER")
    _hook(f"{manager}._discard_pending_req_states", unloading.around_discard_pending_req_states, "AROUND")
    _hook(f"{registry}.acquire", unloading.around_acquire, "AROUND")
    _hook(f"{registry}.release", unloading.around_release, "AROUND")
    _hook(f"{registry}.wait_for_unload", unloading.around_wait_for_unload, "AROUND")


def _register_metrics() -> None:
    from sgl_bdlora.metrics import hooks as metrics

    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    _hook(f"{manager}.init_lora", metrics.after_init_lora, "AFTER")
    _hook(f"{manager}.collect_metrics", metrics.after_collect_metrics, "AFTER")
    _hook(f"{manager}._handle_abort_req", metrics.before_handle_abort_req, "BEFORE")
    _hook(f"{manager}._discard_pending_req_states", metrics.before_discard_pending_req_states, "BEFORE")
    _hook(f"{manager}.convert_to_span_attrs", metrics.after_convert_to_span_attrs, "AFTER")
    _hook("sglang.srt.utils.request_logger.RequestLogger._compute_metadata", metrics.after_compute_metadata, "AFTER")
    _hook("sglang.srt.utils.common.add_prometheus_middleware", metrics.after_add_prometheus_middleware, "AFTER")


def _register_tenants() -> None:
    from sgl_bdlora.tenants import requests as tenants_requests
    from sgl_bdlora.tenants import start as tenants_start

    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    registry = "sglang.srt.lora.lora_registry.LoRARegistry"
    responses = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
    _hook("sglang.srt.utils.auth.add_api_key_middleware", tenants_start.around_add_api_key_middleware, "AROUND")
    _hook(f"{registry}._register_adapter", tenants_start.after_register_adapter, "AFTER")
    _hook(f"{registry}.unregister", tenants_start.around_unregister, "AROUND")
    _hook(f"{manager}.generate_request", tenants_requests.around_generate_request, "AROUND")
    _hook(f"{manager}.load_lora_adapter", _around_load_lora_adapter, "AROUND")
    _hook(f"{manager}.unload_lora_adapter", tenants_requests.around_unload_lora_adapter, "AROUND")
    _hook(f"{responses}.create_responses", tenants_requests.around_create_responses, "AROUND")


def _around_load_lora_adapter(original, manager, obj, request=None):
    from sgl_bdlora import loading
    from sgl_bdlora.tenants import requests as tenants_requests

    load = partial(loading.around_load_lora_adapter, original)
    return tenants_requests.around_load_lora_adapter(load, manager, obj, request)


def _register_ending() -> None:
    from sgl_bdlora import ending

    handler = "sglang.srt.managers.tokenizer_manager.SignalHandler"
    _hook(f"{handler}.sigterm_handler", ending.before_sigterm_handler, "BEFORE")
    _hook(f"{handler}.running_phase_sigquit_handler", ending.before_sigquit_handler, "BEFORE")
    _hook("sglang.srt.utils.common.kill_process_tree", ending.around_kill_process_tree, "AROUND")


def _register_malformed() -> None:
    entrypoints = "sglang.srt.entrypoints"
    ollama = f"{entrypoints}.ollama.serving.OllamaServing"
    openai = f"{entrypoints}.openai"
    for check in malformed.TARGETS:
        _hook(check, malformed.around_check, "AROUND")
    tokenize = "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_texts"
    _hook(tokenize, malformed.around_tokenize, "AROUND")
    streaming = f"{openai}.serving_base.OpenAIServingBase._handle_streaming_request"
    _hook(streaming, malformed.around_handle_streaming, "AROUND")
    detokenize = f"{openai}.serving_tokenize.OpenAIServingDetokenize._convert_to_internal_request"
    _hook(detokenize, malformed.before_detokenize, "BEFORE")
    anthropic = f"{entrypoints}.anthropic.serving.AnthropicServing._error_response"
    _hook(anthropic, malformed.around_anthropic_error, "AROUND")
    _hook(f"{ollama}.handle_chat", malformed.before_ollama_messages, "BEFORE")
    _hook(f"{ollama}._generate_chat_response", malformed.before_ollama_chat, "BEFORE")
    _hook(f"{ollama}._stream_chat_response", malformed.before_ollama_chat, "BEFORE")
    _hook(f"{ollama}._stream_chat_response", malformed.around_ollama_stream, "AROUND")
    _hook(f"{ollama}._stream_generate_response", malformed.around_ollama_stream, "AROUND")


def _register_request_checks() -> None:
    for kind in "GenerateReqInput", "EmbeddingReqInput":
        normalize = f"sglang.srt.managers.io_struct.{kind}.normalize_batch_and_arguments"
        _hook(normalize, request_checks.after_normalize, "AFTER")
    validate = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
    _hook(validate, request_checks.before_validate_one_request, "BEFORE")
    _hook("sglang.srt.sampling.sampling_params.SamplingParams.verify", request_checks.before_verify, "BEFORE")


def _register_backend() -> None:
    from sglang.srt.lora.backend.lora_registry import register_lora_backend
    from sglang.srt.server_args import LORA_BACKEND_CHOICES

    @register_lora_backend(config.BACKEND)
    def create_bdlora_backend():
        from sgl_bdlora.kernels.backend import BDLoRABackend

        return BDLoRABackend

    if config.BACKEND not in LORA_BACKEND_CHOICES:
        LORA_BACKEND_CHOICES.append(config.BACKEND)


def _after_add_cli_args(result, parser) -> None:
    config.add_arguments(parser)


def _before_from_cli_args(cls, args) -> None:
    config.capture(args)


def _before_check_lora_server_args(server_args) -> None:
    """SGLang demands a rank limit and target modules without adapters at start; the bdlora pool needs neither."""
    options_refused.refuse_unconfined(server_args)
    options_refused.refuse_unsupported(server_args)
    if multiprocessing.parent_process() is None:
        from sgl_bdlora.tenants import start as tenants_start

        tenants_start.start(server_args)
    if server_args.lora_backend != config.BACKEND or not server_args.enable_lora or server_args.lora_paths:
        return
    defaults = {}
    if not server_args.max_lora_rank:
        defaults["max_lora_rank"] = config.DEFAULT_MAX_RANK
    if not server_args.lora_target_modules:
        defaults["lora_target_modules"] = ["all"]
    if defaults:
        server_args.override("sgl_bdlora", **defaults)


async def _around_load_lora_adapter_from_tensors(original, manager, obj, request=None):
    """With --adapter-root adapters come from there only, not from a request: tensors in it are unpickled by SGLang."""
    if config.options().adapter_root is None:
        return await original(manager, obj, request)
    from sglang.srt.managers.io_struct import LoRAUpdateOutput

    from sgl_bdlora.adapters.root import no_tensors

    return LoRAUpdateOutput(success=False, error_message=str(no_tensors(obj.lora_name)))


def _around_init_lora_manager(original, runner) -> None:
    if runner.server_args.lora_backend != config.BACKEND:
        original(runner)
        return
    from sglang.srt.model_executor import model_runner

    from sgl_bdlora.manager import BDLoRAManager

    # The method builds the manager by the name its module imported; lend it ours for this one call.
    stock = model_runner.LoRAManager
    model_runner.LoRAManager = BDLoRAManager
    try:
        original(runner)
    finally:
        model_runner.LoRAManager = stock


def _before_validate_new_adapter(manager, lora_config, lora_ref) -> None:
    """SGLang's own back ends ignore these fields and would silently serve another function."""
    for field in ("use_bdlora", "use_rslora"):
        if lora_config.hf_config.get(field):
            raise ValueError(
                f"Adapter {lora_ref.lora_name!r}: adapter_config.json has {field}={lora_config.hf_config[field]!r}, which SGLang's own "
                f"LoRA back ends ignore. Start the server with --lora-backend {config.BACKEND}."
            )


def _after_get_internal_state(result, scheduler, recv_req) -> None:
    from sgl_bdlora import info

    info.after_get_internal_state(result, scheduler, recv_req)


def _before_get_new_batch_prefill(scheduler, running_batch) -> None:
    if not scheduler.enable_lora or scheduler.server_args.lora_backend != config.BACKEND:
        return
    running = {req.lora_id for req in running_batch.reqs if not req.finished()}
    if scheduler.chunked_req is not None:
        running.add(scheduler.chunked_req.lora_id)
    waiting = ((req.rid, req.lora_id) for req in scheduler.waiting_queue)
    scheduler.tp_worker.model_runner.lora_manager.next_round(running, waiting)


def _around_embed_local_shard(original, layer, input_):
    from sgl_bdlora.layers import embedding

    output = original(layer, input_)
    embedding.add_to_embedding(layer, output, input_)
    return output


def _around_compute_lm_head(original, processor, hidden_states, lm_head, *args, **kwargs):
    from sgl_bdlora.layers import embedding

    logits = original(processor, hidden_states, lm_head, *args, **kwargs)
    embedding.add_to_logits(lm_head, logits, hidden_states)
    return logits


def _around_can_schedule_lora_req(original, scheduler, req, running_loras) -> bool:
    """SGLang lets an adapter in use take every new request at once (Scheduler._can_schedule_lora_req)."""
    if scheduler.server_args.lora_backend == config.BACKEND:
        if req.lora_id in scheduler.tp_worker.model_runner.lora_manager.admission.closed:
            return False
    return original(scheduler, req, running_loras)


def _before_launch_server(server_args, *args, **kwargs):
    from sglang.srt.entrypoints import http_server

    from sgl_bdlora import info
    from sgl_bdlora.tenants import start as tenants_start

    info.add_route(http_server.app)
    malformed.add_handlers(http_server.app)
    warm_up = kwargs.get("execute_warmup_func", http_server._execute_server_warmup)
    return (server_args, *args), {**kwargs, "execute_warmup_func": tenants_start.warm_up_with_key(warm_up)}
