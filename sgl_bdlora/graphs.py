"""Decode graphs by kind of batch.

SGLang captures a size with and without adapters where its runner's record_nolora_graph says so (decode_cuda_graph_runner.py), under the
labels "lora" and "nolora"; what our back end needs further is captured after "lora", under labels of our own. A batch is replayed under the
label that the back end names for it, or under "lora" where that size has no such graph.
"""

from sgl_bdlora import config

# SGLang's name of the graph with adapters.
LORA = "lora"
# Ours: more rank rows than the kernels in "lora" are tuned for; pieces that are put together over the ranks.
MANY_ROWS = "lora-many-rows"
COLLECTIVES = "lora-collectives"

_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"


def register(hook) -> None:
    """hook: plugin.py's (target, function, kind)."""
    hook(f"{_RUNNER}.capture", _before_capture, "BEFORE")
    hook(f"{_RUNNER}.capture_one_shape", _around_capture_one_shape, "AROUND")
    hook(f"{_RUNNER}._resolve_lora_variant", _around_resolve_lora_variant, "AROUND")
    hook(f"{_RUNNER}._make_graph_key", _around_make_graph_key, "AROUND")
    hook(f"{_RUNNER}.can_run_graph", _around_can_run_graph, "AROUND")


def _our_backend(runner):
    """The back end of a graph runner's model; None where it is not ours."""
    args = runner.model_runner.server_args
    if args.enable_lora and args.lora_backend == config.BACKEND:
        return runner.model_runner.lora_manager.lora_backend
    return None


def _rows(runner, size: int) -> int:
    """Rows of a batch of a captured size, which counts requests or, with ragged verification, rows."""
    return size if runner.ragged_verify_mode else size * runner.captured_req_width


def _before_capture(runner) -> None:
    """Capture every size twice, with and without adapters, so that base-only batches pay nothing."""
    if _our_backend(runner) is not None:
        runner.record_nolora_graph = True


def _around_capture_one_shape(original, runner, size, forward, stream_idx=None, variant_label=None) -> None:
    original(runner, size, forward, stream_idx, variant_label)
    backend = _our_backend(runner)
    if backend is None or variant_label != LORA:
        return
    from sglang.srt.model_executor.runner_utils import capture_mode

    try:
        for kind in backend.further_graphs(size * runner.captured_req_width):
            capture_mode._set_capture_lora_variant(kind)
            original(runner, size, forward, stream_idx, kind)
    finally:
        capture_mode._set_capture_lora_variant(variant_label)


def _around_resolve_lora_variant(original, runner, forward_batch):
    variant = original(runner, forward_batch)
    backend = _our_backend(runner)
    # Of SGLang's two only this one has adapters in it.
    return backend.decode_graph if backend is not None and variant == LORA else variant


def _around_make_graph_key(original, runner, size, stream_idx=None, variant_label=None):
    backend = _our_backend(runner)
    if (
        backend is not None
        and variant_label == MANY_ROWS
        and MANY_ROWS not in backend.further_graphs(_rows(runner, size))
    ):
        variant_label = LORA
    return original(runner, size, stream_idx, variant_label)


def _around_can_run_graph(original, runner, forward_batch) -> bool:
    """Batches with pieces that the captured kernels do not compute run without a graph."""
    backend = _our_backend(runner)
    if backend is not None and not backend.replayable:
        return False
    return original(runner, forward_batch)
