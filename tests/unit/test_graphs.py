"""Which graphs are captured, and under which of them a batch is replayed."""

from types import SimpleNamespace

import pytest

from sgl_bdlora import config, cpu, graphs

pytest.importorskip("triton")
from sgl_bdlora.kernels.tiles import FEW_ROWS, H200, tiles_for


class BackEnd:
    """Needs a graph for many rank rows from 17 rows on, and has a batch of many."""

    prefill_graphs = (graphs.LORA, graphs.COLLECTIVES)
    replayable = True

    @property
    def prefill_graph(self) -> str | None:
        """As though the batch had been prepared while this kind was captured."""
        from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_lora_variant

        kind = get_capture_lora_variant()
        return kind if kind in self.prefill_graphs else None

    def decode_graph(self, rows: int) -> str:
        return graphs.MANY_ROWS if rows > 16 else graphs.LORA

    def further_graphs(self, rows: int) -> tuple[str, ...]:
        return (graphs.MANY_ROWS, graphs.COLLECTIVES) if rows > 16 else (graphs.COLLECTIVES,)


def runner(backend: str = config.BACKEND, width: int = 1, ragged: bool = False):
    args = SimpleNamespace(enable_lora=True, lora_backend=backend)
    model = SimpleNamespace(server_args=args, lora_manager=SimpleNamespace(lora_backend=BackEnd()))
    return SimpleNamespace(model_runner=model, captured_req_width=width, ragged_verify_mode=ragged)


def captured(of, size: int, variant: str | None) -> list[tuple[str | None, str | None]]:
    """(label, what the kernels were told is captured) of every capture."""
    cpu.prepare_environment()
    from sglang.srt.model_executor.runner_utils import capture_mode

    seen = []

    def original(_, size, forward, stream_idx, label):
        seen.append((label, capture_mode.get_capture_lora_variant()))

    capture_mode._set_capture_lora_variant(variant)
    try:
        graphs._around_capture_one_shape(original, of, size, None, None, variant)
        assert capture_mode.get_capture_lora_variant() == variant
    finally:
        capture_mode._set_capture_lora_variant(None)
    return seen


@pytest.mark.parametrize(("size", "width", "many"), [(16, 1, False), (17, 1, True), (16, 2, True)])
def test_further_kinds_are_captured_where_the_back_end_needs_them(size, width, many):
    kinds = [graphs.LORA, *([graphs.MANY_ROWS] if many else []), graphs.COLLECTIVES]
    assert captured(runner(width=width), size, graphs.LORA) == [(kind, kind) for kind in kinds]
    assert captured(runner(width=width), size, "nolora") == [("nolora", "nolora")]
    assert captured(runner("csgmv", width), size, graphs.LORA) == [(graphs.LORA, graphs.LORA)]


@pytest.mark.parametrize(
    ("size", "width", "ragged", "label"),
    [
        (16, 1, False, graphs.LORA),
        (24, 1, False, graphs.MANY_ROWS),
        (16, 4, False, graphs.MANY_ROWS),
        (16, 4, True, graphs.LORA),
    ],
)
def test_a_batch_is_replayed_under_a_label_for_the_graphs_rows(size, width, ragged, label):
    """Sizes count rows, not requests, with ragged verification."""
    of = runner(width=width, ragged=ragged)

    def key(label, of=of):
        return graphs._around_make_graph_key(lambda _, *key: key, of, size, None, label)

    assert key(graphs.LORA) == (size, None, label)
    assert key("nolora") == (size, None, "nolora")
    assert key(graphs.LORA, runner("csgmv", width)) == (size, None, graphs.LORA)


def test_a_graph_is_captured_under_its_own_label():
    cpu.prepare_environment()
    from sglang.srt.model_executor.runner_utils import capture_mode

    capture_mode._set_capture_lora_variant(graphs.LORA)
    try:
        key = graphs._around_make_graph_key(lambda _, *key: key, runner(), 24, None, graphs.LORA)
    finally:
        capture_mode._set_capture_lora_variant(None)
    assert key == (24, None, graphs.LORA)


@pytest.fixture
def segmented():
    """SGLang's segmented graphs, kept in memory only; after decode graphs, which leave their last variant behind."""
    cpu.prepare_environment()
    from sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend import BreakableCudaGraphBackend
    from sglang.srt.model_executor.runner_utils import capture_mode

    def make(backend: str = config.BACKEND):
        kept = BreakableCudaGraphBackend.__new__(BreakableCudaGraphBackend)
        kept._model_runner = runner(backend).model_runner
        return SimpleNamespace(model_runner=kept._model_runner, backend=kept)

    capture_mode._set_capture_lora_variant("nolora")
    yield make
    capture_mode._set_capture_lora_variant(None)


def prefill_keys(of) -> list:
    """Keys that one size is captured under."""
    from sglang.srt.model_executor.runner.shape_key import ShapeKey

    seen = []

    def capture_one_shape(runner, size, *, prefix_num_chunks=0):
        graphs._around_segmented(lambda _, key: seen.append(key), runner.backend, ShapeKey(size=size))

    graphs._around_prefill_capture_one_shape(capture_one_shape, of, 32)
    return [key.variant_label for key in seen]


def test_prefill_graphs_are_captured_for_the_base_and_for_every_kind(segmented):
    assert prefill_keys(segmented()) == [None, graphs.LORA, graphs.COLLECTIVES]
    assert prefill_keys(segmented("csgmv")) == [None]


def test_decode_graphs_that_are_segmented_keep_their_label(segmented):
    from sglang.srt.model_executor.runner.shape_key import ShapeKey

    key = ShapeKey(size=4, variant_label=graphs.MANY_ROWS)
    with graphs._capturing(graphs.LORA):
        assert graphs._around_segmented(lambda _, key: key, segmented().backend, key) == key


def test_prompts_with_adapters_run_without_graphs_that_are_not_segmented(segmented):
    of = segmented()
    other = SimpleNamespace(model_runner=of.model_runner, backend=None)

    def asked(runner) -> bool:
        return graphs._around_prefill_can_run_graph(lambda *_: True, runner, None)

    with graphs._capturing(graphs.LORA):
        assert (asked(of), asked(other)) == (True, False)
    assert (asked(of), asked(other)) == (True, True)


@pytest.mark.parametrize("block_t", [32, 64])
def test_few_rank_rows_leave_the_multiprocessors_to_narrow_tiles(block_t):
    """o_proj of Llama-3.1-8B at TP 2 on an H200: one wave in both cases."""
    few, many = (tiles_for([4096], 2048, block_t, kind, H200) for kind in (False, True))
    assert (few.block_n, few.programs) == (32, 4)
    assert few.programs * few.shrink_rows // few.splits == FEW_ROWS
    assert (many.block_n, many.programs) == (64, 36)
