"""Every SGLang name this package relies on. `python -m sgl_bdlora.compat` prints the table and fails on a mismatch.

Moving to another SGLang release starts here: run it against the new release and read the rows that differ.
"""

import inspect
import pkgutil
import sys
from importlib.metadata import PackageNotFoundError, version

from sgl_bdlora import cpu

SGLANG_VERSION = "0.5.17"

# Dotted name -> the parameters we pass or receive, in order; None where only the name is used.
NAMES: dict[str, tuple[str, ...] | None] = {
    "sglang.srt.plugins.load_plugins": (),
    "sglang.srt.plugins.hook_registry.HookRegistry.register": ("target", "hook", "hook_type"),
    "sglang.srt.plugins.hook_registry.HookRegistry._patched": None,
    "sglang.srt.server_args.LORA_BACKEND_CHOICES": None,
    "sglang.srt.server_args.prepare_server_args": ("argv",),
    "sglang.srt.server_args.ServerArgs.add_cli_args": ("parser",),
    "sglang.srt.server_args.ServerArgs.from_cli_args": ("args",),
    "sglang.srt.server_args.ServerArgs.check_lora_server_args": ("self",),
    "sglang.srt.server_args.ServerArgs.override": ("self", "source"),
    "sglang.launch_server.run_server": ("server_args",),
    "sglang.srt.entrypoints.engine.Engine.__init__": ("self",),
    "sglang.srt.lora.backend.lora_registry.register_lora_backend": ("name",),
    "sglang.srt.lora.backend.base_backend.BaseLoRABackend.__init__": ("self", "max_loras_per_batch", "device"),
    "sglang.srt.lora.backend.base_backend.BaseLoRABackend.reset_batch_state": ("self",),
    "sglang.srt.model_executor.model_runner.LoRAManager": None,
    "sglang.srt.model_executor.model_runner.ModelRunner.init_lora_manager": ("self",),
    "sglang.srt.lora.lora_manager.LoRAManager.init_state": ("self", "max_lora_rank", "target_modules", "lora_paths"),
    "sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager.unload_lora_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager._load_lora_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager._load_lora_adapter_from_tensors": (
        "self",
        "lora_ref",
        "tensors",
        "config_dict",
        "added_tokens_config",
    ),
    "sglang.srt.lora.lora_manager.LoRAManager._unload_lora_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager.validate_new_adapter": ("self", "lora_config", "lora_ref"),
    "sglang.srt.lora.lora_manager.LoRAManager.validate_lora_batch": ("self", "lora_ids"),
    "sglang.srt.lora.lora_manager.LoRAManager.fetch_new_loras": ("self", "new_loras", "running_loras"),
    "sglang.srt.lora.lora_manager.LoRAManager.prepare_lora_batch": ("self", "forward_batch"),
    "sglang.srt.lora.lora_manager.LoRAManager.create_lora_update_result": ("self", "success", "error_message"),
    "sglang.srt.lora.lora_registry.LoRARef": None,
    "sglang.srt.managers.io_struct.LoRAUpdateOutput": None,
    "sglang.srt.layers.quantization.base_config.LinearMethodBase.apply": ("self", "layer", "x", "bias"),
    "sglang.srt.layers.linear.LinearBase": None,
    "sglang.srt.layers.linear.ColumnParallelLinear.forward": ("self", "input_"),
    "sglang.srt.layers.linear.MergedColumnParallelLinear": None,
    "sglang.srt.layers.linear.QKVParallelLinear": None,
    "sglang.srt.layers.linear.ReplicatedLinear": None,
    "sglang.srt.layers.linear.RowParallelLinear.forward": ("self", "input_", "skip_all_reduce"),
    "sglang.srt.layers.vocab_parallel_embedding.ParallelLMHead": None,
    "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding._embed_local_shard": ("self", "input_"),
    "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbeddingShardIndices.num_org_elements": None,
    "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head": ("self", "hidden_states", "lm_head"),
    "sglang.srt.layers.logits_processor.LogitsProcessor._get_pruned_states": (
        "self",
        "hidden_states",
        "hidden_states_before_norm",
        "aux_hidden_states",
        "logits_metadata",
    ),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.extend_logprob_start_lens_cpu": None,
    "sglang.srt.layers.utils.get_layer_id": ("weight_name",),
    "sglang.srt.managers.scheduler.Scheduler.get_internal_state": ("self", "recv_req"),
    "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill": ("self", "running_batch"),
    "sglang.srt.managers.scheduler.Scheduler._can_schedule_lora_req": ("self", "req", "running_loras"),
    "sglang.srt.managers.io_struct.GetInternalStateReqOutput": None,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_lora": ("self",),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop": ("self",),
    "sglang.srt.managers.communicator.FanOutCommunicator.queueing_call": ("self", "obj"),
    "sglang.srt.managers.io_struct.LoadLoRAAdapterReqInput.lora_id": None,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.load_lora_adapter_from_tensors": ("self", "obj"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._discard_pending_req_states": (
        "self",
        "obj",
        "lifecycle_ids",
    ),
    "sglang.srt.managers.tokenizer_manager.ReqState.dispatched": None,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.collect_metrics": ("self", "state", "recv_obj", "i"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_req": ("self", "recv_obj"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._logical_rids": ("obj",),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.convert_to_span_attrs": (
        "self",
        "state",
        "recv_obj",
        "i",
    ),
    "sglang.srt.observability.req_time_stats.APIServerReqTimeStats.first_token_time": None,
    "sglang.srt.observability.req_time_stats.SchedulerReqTimeStats.prefill_finished_time": None,
    "sglang.srt.utils.request_logger.RequestLogger._compute_metadata": ("self",),
    "sglang.srt.utils.common.add_prometheus_middleware": ("app",),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request": ("self", "obj", "request"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.load_lora_adapter": ("self", "obj"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.unload_lora_adapter": ("self", "obj"),
    "sglang.srt.managers.tokenizer_manager.SignalHandler.sigterm_handler": ("self", "signum", "frame"),
    "sglang.srt.managers.tokenizer_manager.SignalHandler.running_phase_sigquit_handler": ("self", "signum", "frame"),
    "sglang.srt.managers.io_struct.GenerateReqInput.extra_key": None,
    "sglang.srt.utils.common.kill_process_tree": ("parent_pid", "include_parent", "skip_pid", "wait_timeout"),
    "sglang.srt.utils.auth.add_api_key_middleware": ("app", "api_key", "admin_api_key"),
    "sglang.srt.entrypoints.http_server._execute_server_warmup": ("server_args",),
    "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses": (
        "self",
        "request",
        "raw_request",
    ),
    "sglang.srt.lora.lora_registry.LoRARegistry._register_adapter": ("self", "lora_ref"),
    "sglang.srt.lora.lora_registry.LoRARegistry.unregister": ("self", "lora_name"),
    "sglang.srt.lora.lora_registry.LoRARegistry.acquire": ("self", "lora_name"),
    "sglang.srt.lora.lora_registry.LoRARegistry.release": ("self", "lora_id"),
    "sglang.srt.lora.lora_registry.LoRARegistry.wait_for_unload": ("self", "lora_id"),
    "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments": ("self",),
    "sglang.srt.managers.io_struct.GenerateReqInput.__getitem__": ("self", "i"),
    "sglang.srt.managers.io_struct.EmbeddingReqInput.normalize_batch_and_arguments": ("self",),
    "sglang.srt.managers.io_struct.EmbeddingReqInput.__getitem__": ("self", "i"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state": ("self", "obj", "request"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request": ("self", "obj", "input_ids"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object": (
        "self",
        "obj",
        "input_text",
        "input_ids",
    ),
    "sglang.srt.sampling.sampling_params.SamplingParams.verify": ("self", "vocab_size"),
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key": ("self", "request"),
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._handle_streaming_request": (
        "self",
        "adapted_request",
        "request",
        "raw_request",
    ),
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_messages": (
        "self",
        "request",
        "is_multimodal",
    ),
    "sglang.srt.entrypoints.openai.serving_tokenize.OpenAIServingDetokenize._convert_to_internal_request": (
        "self",
        "request",
        "raw_request",
    ),
    "sglang.srt.entrypoints.anthropic.serving.AnthropicServing._error_response": (
        "self",
        "status_code",
        "error_type",
        "message",
        "exception_name",
    ),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_texts": ("self", "texts"),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_chat": ("self", "request", "raw_request"),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing._generate_chat_response": ("self", "gen_request"),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing._stream_chat_response": ("self", "gen_request"),
    "sglang.srt.entrypoints.ollama.serving.OllamaServing._stream_generate_response": ("self", "gen_request"),
    "sglang.srt.entrypoints.http_server.openai_v1_chat_completions": ("request", "raw_request"),
    "sglang.srt.entrypoints.http_server.sagemaker_chat_completions": ("request", "raw_request"),
    "sglang.srt.entrypoints.http_server.parse_function_call_request": ("obj", "request"),
    "sglang.srt.entrypoints.http_server.separate_reasoning_request": ("obj", "request"),
    "sglang.srt.entrypoints.http_server.ollama_chat": ("request", "raw_request"),
    "sglang.srt.entrypoints.http_server.ollama_generate": ("request", "raw_request"),
    "sglang.srt.entrypoints.http_server.vertex_generate": ("vertex_req", "raw_request"),
    "sglang.srt.entrypoints.v1_loads.get_loads": (),
    "sglang.srt.entrypoints.http_server.launch_server": ("server_args",),
    "sglang.srt.entrypoints.http_server.app": None,
    "sglang.srt.entrypoints.http_server._global_state": None,
    "sglang.srt.utils.auth.AuthLevel.ADMIN_OPTIONAL": None,
    "sglang.srt.utils.auth.auth_level": ("level",),
    "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes": (
        "server_args",
        "port_args",
        "run_scheduler_process_func",
    ),
    "sglang.srt.entrypoints.engine.Engine._launch_detokenizer_subprocesses": (
        "server_args",
        "port_args",
        "run_detokenizer_process_func",
    ),
    "sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce": ("self", "input_"),
    "sglang.srt.constrained.xgrammar_backend._allocate_token_bitmask": ("vocab_size", "batch_size"),
    "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask": ("self", "logits", "vocab_mask"),
    "xgrammar.apply_token_bitmask_inplace": ("logits", "bitmask"),
    "sglang.srt.managers.embed_types.PositionalEmbeds": None,
    "sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp": (
        "model_config",
        "load_config",
        "tp_size",
    ),
    "sglang.srt.distributed.get_tp_group": (),
    "sglang.srt.distributed.tensor_model_parallel_all_gather": ("input_", "dim"),
    "sglang.srt.distributed.tensor_model_parallel_all_reduce": ("input_",),
    "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod": None,
    "sglang.srt.lora.backend.base_backend.BaseLoRABackend.init_cuda_graph_batch_info": (
        "self",
        "max_bs_in_cuda_graph",
        "num_tokens_per_req",
    ),
    "sglang.srt.model_executor.runner_utils.capture_mode.get_capture_lora_variant": (),
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture": ("self",),
    "sglang.srt.model_executor.runner_utils.capture_mode._set_capture_lora_variant": ("variant",),
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_one_shape": (
        "self",
        "size",
        "forward",
        "stream_idx",
        "variant_label",
    ),
    "sglang.srt.lora.lora_manager.LoRAManager.can_use_prefill_cuda_graph": ("self", "forward_batch"),
    "sglang.srt.lora.backend.base_backend.BaseLoRABackend.init_prefill_cuda_graph_batch_info": (
        "self",
        "max_num_tokens",
    ),
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph": (
        "self",
        "forward_batch",
    ),
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._make_graph_key": (
        "self",
        "size",
        "stream_idx",
        "variant_label",
    ),
    "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.capture_one_shape": (
        "self",
        "size",
        "prefix_num_chunks",
    ),
    "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph": (
        "self",
        "forward_batch",
    ),
    "sglang.srt.model_executor.runner.shape_key.ShapeKey.variant_label": None,
    "sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend.BreakableCudaGraphBackend.capture_one": (
        "self",
        "shape_key",
    ),
    "sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend.BreakableCudaGraphBackend.replay": (
        "self",
        "shape_key",
    ),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.__init__": ("self", "base_url"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint._add_images": ("self", "s", "data"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint._generate_http_request": ("self", "s", "data"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint._assert_success": ("self", "res"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.cache_prefix": ("self", "prefix_str"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.commit_lazy_operations": ("self", "s"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.generate_stream": ("self", "s", "sampling_params"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.select": (
        "self",
        "s",
        "choices",
        "temperature",
        "choices_method",
    ),
    "sglang.lang.choices.ChoicesDecision": ("decision", "meta_info"),
    "sglang.lang.choices.ChoicesSamplingMethod": None,
    "sglang.lang.interpreter.ProgramState.fork": ("self", "size"),
    "sglang.lang.interpreter.ProgramStateGroup": ("states", "src_state"),
    "sglang.lang.interpreter.StreamExecutor": (
        "backend",
        "arguments",
        "default_sampling_para",
        "chat_template",
        "stream",
    ),
    "sglang.lang.interpreter.StreamExecutor._execute_select": ("self", "expr"),
    "sglang.lang.ir.SglConstantText": ("value",),
    "sglang.lang.ir.SglExprList": ("expr_list",),
    "sglang.lang.ir.SglSelect": ("name", "choices", "temperature", "choices_method"),
    "sglang.utils.http_request": ("url", "json", "stream", "api_key", "verify"),
}


# Modules that only the launcher needs; importing them costs every other process a second.
LAUNCHER_ONLY = (
    "sglang.launch_server.",
    "sglang.srt.entrypoints.http_server.",
    "sglang.srt.entrypoints.v1_loads.",
    "sglang.srt.entrypoints.openai.",
    "sglang.srt.entrypoints.anthropic.",
    "sglang.srt.entrypoints.ollama.",
    "sglang.srt.managers.tokenizer_manager.",
    "sglang.lang.",
)

# What only the hooks of sgl_bdlora/cpu/hooks.py patch and call, which are not registered with a GPU.
CPU_ONLY = (
    "sglang.srt.entrypoints.engine.Engine._launch_",
    "sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce",
    "sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",
    "sglang.srt.constrained.xgrammar_backend.",
    "xgrammar.",
)


def check(launcher: bool = True) -> list[tuple[str, str]]:
    """(name, problem) for every row that matters to this process; the problem is empty where the name is as expected."""
    elsewhere = (() if launcher else LAUNCHER_ONLY) + (() if cpu.applies() else CPU_ONLY)
    names = {name: p for name, p in NAMES.items() if not name.startswith(elsewhere)}
    return [(name, _problem(name, parameters)) for name, parameters in names.items()]


def version_problem() -> str:
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return f"sglang is not installed; this package needs sglang=={SGLANG_VERSION}"
    return (
        "" if found == SGLANG_VERSION else f"sglang {found} is installed; this package needs sglang=={SGLANG_VERSION}"
    )


def require(launcher: bool) -> None:
    """End the process, naming every mismatch, when the host is not the one this package was written for."""
    problems = [f"{name}: {problem}" for name, problem in check(launcher) if problem]
    if version_problem():
        problems.insert(0, version_problem())
    if problems:
        raise SystemExit(
            "sgl-bdlora: this SGLang does not fit, refusing to start unpatched.\n  " + "\n  ".join(problems)
        )


def _problem(name: str, parameters: tuple[str, ...] | None) -> str:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        return f"not found ({error})"
    if parameters is None:
        return ""
    # A hooked function keeps its own signature as __wrapped__.
    have = tuple(inspect.signature(found).parameters)
    if have[: len(parameters)] != parameters:
        return f"takes ({', '.join(have)}), expected ({', '.join(parameters)}, ...)"
    return ""


def main() -> int:
    cpu.prepare_environment()
    rows = check()
    width = max(len(name) for name, _ in rows)
    for name, problem in rows:
        print(f"{name:<{width}}  {'MISMATCH: ' + problem if problem else 'ok'}")
    bad = sum(bool(problem) for _, problem in rows)
    if version_problem():
        print(f"MISMATCH: {version_problem()}")
        bad += 1
    print(f"{len(rows)} names, {bad} mismatches (sglang {SGLANG_VERSION})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
