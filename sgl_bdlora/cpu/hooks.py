"""The hooks that a CPU-only server needs in SGLang; each is one thin function."""

from collections.abc import Callable

from sgl_bdlora.cpu import environment, processes
from sgl_bdlora.cpu.detect import applies

# SGLang's LoRA code asks for pinned host memory without looking whether there is a device to copy to. Everything that
# does so runs inside one of these methods of LoRAManager (sglang/srt/lora/lora_manager.py).
PINNING_METHODS = ("__init__", "load_lora_adapter", "load_lora_adapter_from_tensors", "prepare_lora_batch")


def register_hooks(register: Callable[[str, Callable, str], None]) -> None:
    """Call *register(target, hook, kind)* for each hook; kind is a name of SGLang's HookType. None with a GPU."""
    if not applies():
        return
    register("sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes", before_launch_schedulers, "BEFORE")
    register(
        "sglang.srt.entrypoints.engine.Engine._launch_detokenizer_subprocesses", before_launch_detokenizers, "BEFORE"
    )
    register("sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce", around_all_reduce, "AROUND")
    register("sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp", around_align, "AROUND")
    grammar = "sglang.srt.constrained.xgrammar_backend"
    register(f"{grammar}._allocate_token_bitmask", around_pinning, "AROUND")
    register(f"{grammar}.XGrammarGrammar.apply_vocab_mask", around_apply_vocab_mask, "AROUND")
    for method in PINNING_METHODS:
        register(f"sglang.srt.lora.lora_manager.LoRAManager.{method}", around_pinning, "AROUND")


def before_launch_schedulers(cls, server_args, port_args, run_scheduler_process_func):
    environment.bind_threads(server_args.tp_size)
    processes.use_fork_server()
    return (cls, server_args, port_args, processes.in_this_environment(run_scheduler_process_func)), {}


def before_launch_detokenizers(cls, server_args, port_args, run_detokenizer_process_func):
    run = processes.in_this_environment(run_detokenizer_process_func)
    return (cls,), {"server_args": server_args, "port_args": port_args, "run_detokenizer_process_func": run}


def around_all_reduce(original, coordinator, tensor):
    from sgl_bdlora.cpu import shared_memory

    return shared_memory.around_all_reduce(original, coordinator, tensor)


def around_pinning(original, *args, **kwargs):
    from sgl_bdlora.cpu.unpinned import Unpinned

    with Unpinned():
        return original(*args, **kwargs)


def around_apply_vocab_mask(original, grammar, logits, vocab_mask):
    """SGLang has it for accelerators alone."""
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask)


def around_align(original, model_config, load_config, tp_size):
    """With fewer kv heads than ranks SGLang pads heads with zeros on a CPU, where it repeats kv heads on a GPU.

    Padded layers are wider than the model's own, and half of the ranks idle: repeat the heads here too.
    """
    kv_heads = model_config.get_total_num_kv_heads()
    if model_config.num_attention_heads % tp_size == 0 and tp_size % kv_heads == 0:
        tp_size = min(tp_size, kv_heads)
    return original(model_config, load_config, tp_size)
