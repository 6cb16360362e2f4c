"""Graphs by kind of batch.

Decode: SGLang captures a size with and without adapters where its runner's record_nolora_graph says so (decode_cuda_graph_runner.py), under
the labels "lora" and "nolora"; what our back end needs further is captured after "lora", under labels of our own. A batch with adapters is
replayed under the label that the back end names for it and the graph's rows.

Prefill: SGLang captures a size once, with whatever a batch without adapters launches, and without a label: with our back end that is the
base model. Kinds with adapters are captured after it, and told apart where the graphs are kept, because the runner takes any label for one
of its own (prefill_cuda_graph_runner.py: execute). Only segmented graphs, SGLang's choice with LoRA, are captured so; with
--cuda-graph-backend-prefill full prompts with adapters run without.
"""

import contextlib
import dataclasses

from sgl_bdlora import config

# SGLang's name of the graph with adapters.
LORA = "lora"
# Ours: more rank rows than the kernels in "lora" are tuned for; pieces that are put together over the ranks.
MANY_ROWS = "lora-many-rows"
COLLECTIVES = "lora-collectives"
WITH_ADAPTERS = (LORA, MANY_ROWS, COLLECTIVES)

_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_PREFILL = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner"
_SEGMENTED = "sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend.BreakableCudaGraphBackend"


def register(hook) -> None:
    """hook: plugin.py's (target, function, kind)."""
    hook(f"{_RUNNER}.capture", _before_capture, "BEFORE")
    hook(f"{_RUNNER}.capture_one_shape", _around_capture_one_shape, "AROUND")
    hook(f"{_RUNNER}._make_graph_key", _around_make_graph_key, "AROUND")
    hook(f"{_RUNNER}.can_run_graph", _around_can_run_graph, "AROUND")
    hook(f"{_PREFILL}.capture_one_shape", _around_prefill_capture_one_shape, "AROUND")
    hook(f"{_PREFILL}.can_run_graph", _around_prefill_can_run_graph, "AROUND")
    hook(f"{_SEGMENTED}.capture_one", _around_segmented, "AROUND")
    hook(f"{_SEGMENTED}.replay", _around_segmented, "AROUND")


def _our_backend(model_runner):
    """The LoRA back end of a model; None where it is not ours."""
    args = model_runner.server_args
    if args.enable_lora and args.lora_backend == config.BACKEND:
        return model_runner.lora_manager.lora_backend
    return None


def _rows(runner, size: int) -> int:
    """Rows of a batch of a captured size, which counts requests or, with ragged verification, rows."""
    return size if runner.ragged_verify_mode else size * runner.captured_req_width


def _before_capture(runner) -> None:
    """Capture every size twice, with and without adapters, so that base-only batches pay nothing."""
    if _our_backend(runner.model_runner) is not None:
        runner.record_nolora_graph = True


def _around_capture_one_shape(original, runner, size, forward, stream_idx=None, variant_label=None) -> None:
    original(runner, size, forward, stream_idx, variant_label)
    backend = _our_backend(runner.model_runner)
    if backend is None or variant_label != LORA:
        return
    for kind in backend.further_graphs(size * runner.captured_req_width):
        with _capturing(kind):
            original(runner, size, forward, stream_idx, kind)


@contextlib.contextmanager
def _capturing(kind: str):
    """Say that graphs of this kind are captured."""
    from sglang.srt.model_executor.runner_utils import capture_mode

    before = capture_mode.get_capture_lora_variant()
    capture_mode._set_capture_lora_variant(kind)
    try:
        yield
    finally:
        capture_mode._set_capture_lora_variant(before)


def _around_make_graph_key(original, runner, size, stream_idx=None, variant_label=None):
    """Of SGLang's two labels this one has adapters in it. While a graph is captured its label is settled."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_lora_variant

    backend = _our_backend(runner.model_runner)
    if backend is not None and variant_label == LORA and get_capture_lora_variant() not in WITH_ADAPTERS:
        variant_label = backend.decode_graph(_rows(runner, size))
    return original(runner, size, stream_idx, variant_label)


def _around_can_run_graph(original, runner, forward_batch) -> bool:
    """Batches with pieces that the captured kernels do not compute run without a graph."""
    backend = _our_backend(runner.model_runner)
    if backend is not None and not backend.replayable:
        return False
    return original(runner, forward_batch)


def _segmented(runner) -> bool:
    from sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend import BreakableCudaGraphBackend

    return isinstance(runner.backend, BreakableCudaGraphBackend)


def _around_prefill_capture_one_shape(original, runner, size, **kwargs) -> None:
    original(runner, size, **kwargs)
    backend = _our_backend(runner.model_runner)
    if backend is None or not _segmented(runner):
        return
    for kind in backend.prefill_graphs:
        with _capturing(kind):
            original(runner, size, **kwargs)


def _around_prefill_can_run_graph(original, runner, forward_batch) -> bool:
    """Only segmented graphs have kinds with adapters."""
    backend = _our_backend(runner.model_runner)
    if backend is not None and backend.prefill_graph is not None and not _segmented(runner):
        return False
    return original(runner, forward_batch)


def _around_segmented(original, graphs, shape_key, *args, **kwargs):
    """Capture and replay under the key of the batch's kind. Decode graphs have their label already."""
    backend = _our_backend(graphs._model_runner)
    if backend is not None and shape_key.variant_label is None:
        shape_key = dataclasses.replace(shape_key, variant_label=backend.prefill_graph)
    return original(graphs, shape_key, *args, **kwargs)
