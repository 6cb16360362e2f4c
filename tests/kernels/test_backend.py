"""The back end on the kernels' path: what a linear layer gives, whichever way the batch's rows and adapters ask for it."""

import pytest
import torch
from test_triton_ops import ERROR, HOSTS, PATHS, SHARDS, K, N, make

from sgl_bdlora import graphs
from sgl_bdlora.kernels.fused import TAGS
from sgl_bdlora.kernels.tiles import FUSED_TOKENS
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard


class Layer(torch.nn.Module):
    """What UnquantizedLinearMethod reads of a layer."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(
            (torch.randn(sum(N), K, generator=generator) * 0.1).to(dtype), requires_grad=False
        )


@pytest.fixture
def served(device, monkeypatch):
    """(back end, pool, layer's linear method, layer)."""
    from sgl_bdlora import cpu, plugin

    if device.type == "cpu":
        cpu.prepare_environment()
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from sgl_bdlora.kernels.backend import BDLoRABackend
    from sgl_bdlora.kernels.triton_ops import TritonOps
    from sgl_bdlora.layers.linear import LoRALinearMethod

    monkeypatch.setattr(plugin, "verify_hooks", lambda: None)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pool = MemoryPool(4 << 20, dtype, device, 16)
    shards = {
        n: AdapterShard(n, s.kind, s.rank, 1, s.layers, s.offsets, s.weights.to(dtype)) for n, s in SHARDS.items()
    }
    pool.ensure(shards)
    backend = BDLoRABackend(16, device, None)
    # As on a GPU, whatever this machine has.
    backend._ops = TritonOps(pool.arena, HOSTS, 16, None)
    backend.init_cuda_graph_batch_info(64, 1)
    return backend, pool, LoRALinearMethod(UnquantizedLinearMethod(), backend, PATHS[0]), Layer(dtype).to(device)


def ask(backend, pool, names: list, lengths: list[int]) -> None:
    adapters = [None if name is None else pool.get(name) for name in names]
    backend.set_batch(adapters, lengths, lengths)


def torch_path(served, names, lengths, x):
    """The same by torch operations."""
    backend, pool, method, layer = served
    kernels, backend._ops = backend._ops, None
    ask(backend, pool, names, lengths)
    y = method.apply(layer, x)
    backend._ops = kernels
    return y


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [20, 1, 7, 120]], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    "names", [["plain", None, "blocks_b", "plain"], [None] * 4, ["large", "q and v", "small", "blocks_a"]]
)
def test_kernels_give_what_torch_operations_give(served, device, names, lengths):
    backend, pool, method, layer = served
    x = torch.randn(sum(lengths), K, generator=torch.Generator().manual_seed(2)).to(layer.weight)
    wanted = torch_path(served, names, lengths, x)
    ask(backend, pool, names, lengths)
    assert backend.replayable == (sum(lengths) <= FUSED_TOKENS or not any(names))
    got = method.apply(layer, x)
    error = (got - wanted).float().abs().max() / wanted.float().abs().max()
    assert error < (ERROR if device.type == "cpu" else 2**-6)


def steps_of(layer, rows: int, steps: int = 3) -> list[torch.Tensor]:
    """x of decode steps."""
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(rows, K, generator=generator).to(layer.weight) for _ in range(steps)]


@pytest.mark.parametrize("first_tag", [TAGS - 5, TAGS - 4], ids=["tags come round in a step", "between steps"])
def test_a_repeated_batch_gives_what_torch_operations_give(served, device, first_tag):
    """In a model of two layers, which share the words of h; another batch comes in between."""
    backend, pool, method, layer = served
    methods = [method, type(method)(method.base, backend, PATHS[1])]
    batch, owners = backend._ops.batch, backend._ops.batch.owners
    batch._first_tag = tag = first_tag
    xs = steps_of(layer, 5)
    for names in (
        ["plain", None, "blocks_b", "large", "plain"],
        ["small"] * 5,
        ["plain", "q and v", None, "large", None],
    ):
        wanted = [[torch_path((backend, pool, m, layer), names, [1] * 5, x) for m in methods] for x in xs]
        ask(backend, pool, names, [1] * 5)
        local_rows = int(owners.meta[1])
        for step, x in enumerate(xs):
            if step > 0:
                backend.repeat_batch()
            tag = (tag + len(PATHS)) % TAGS
            assert (owners.meta.tolist(), batch._first_tag) == ([tag, local_rows], tag)
            for m, y in zip(methods, wanted[step], strict=True):
                error = (m.apply(layer, x) - y).float().abs().max() / y.float().abs().max()
                assert error < (ERROR if device.type == "cpu" else 2**-6)


def test_words_of_the_step_before_are_not_taken_for_those_of_a_repeated_one(served):
    """As a tile would find them that runs before any of its step's have been written."""
    backend, pool, method, layer = served
    ask(backend, pool, ["plain", "small"], [1, 1])
    batch, seen = backend._ops.batch, []
    for step, x in enumerate(steps_of(layer, 2)):
        if step > 0:
            backend.repeat_batch()
        method.apply(layer, x)
        (tag,) = set((batch.words & TAGS).unique().tolist()) - {0}
        seen.append(tag)
    assert seen == [len(PATHS) * step + 1 for step in (1, 2, 3)]


def test_a_large_batch_is_repeated(served, device):
    """Its owners are not those that graphs read."""
    backend, pool, method, layer = served
    names = ["plain", None, "small", "blocks_a"] * (FUSED_TOKENS // 4 + 1)
    xs = steps_of(layer, len(names))
    wanted = [torch_path(served, names, [1] * len(names), x) for x in xs]
    ask(backend, pool, names, [1] * len(names))
    batch = backend._ops.batch
    assert batch.owners is not batch._static_owners
    for step, x in enumerate(xs):
        if step > 0:
            backend.repeat_batch()
        assert int(batch.owners.meta[0]) == batch._first_tag == (step + 1) * len(PATHS)
        error = (method.apply(layer, x) - wanted[step]).float().abs().max() / wanted[step].float().abs().max()
        assert error < (ERROR if device.type == "cpu" else 2**-6)


def test_a_repeated_batch_without_adapters_is_the_base_model_s(served):
    backend, pool, method, layer = served
    for names, adapted in (([None] * 2, False), (["plain"] * 2, True), ([None] * 2, False)):
        ask(backend, pool, names, [1] * 2)
        for x in steps_of(layer, 2):
            backend.repeat_batch()
            base = method.base.apply(layer, x)
            assert torch.equal(method.apply(layer, x), base) != adapted


def test_torch_operations_repeat_a_batch_too(served):
    """As where there is no GPU; lm_head's rows are counted from the first again."""
    backend, pool, method, layer = served
    names, xs = ["plain", None, "blocks_b"], steps_of(layer, 3)
    wanted = [torch_path(served, names, [1] * 3, x) for x in xs]
    backend._ops = None
    ask(backend, pool, names, [1] * 3)
    for step, x in enumerate(xs):
        if step > 0:
            backend.repeat_batch()
        head = method.base.apply(layer, x)
        backend.add_head_lora(head, x, PATHS[0])
        assert torch.equal(method.apply(layer, x), wanted[step])
        assert torch.equal(head, wanted[step])


def test_graphs_for_many_rank_rows(served):
    """Up to 128 rows: beyond, and where adapters have few, there is one kind."""
    backend, pool, *_ = served
    assert [backend.further_graphs(rows) for rows in (8, 64, 100, 129)] == [(graphs.MANY_ROWS,)] * 3 + [()]
    # "large" has 128 rank rows. A graph may have more rows than the batch.
    for names, lengths, rows, kind in (
        (["plain", None], [1, 1], 2, graphs.LORA),
        (["large", None], [8, 8], 16, graphs.MANY_ROWS),
        (["large", None], [8, 8], 24, graphs.LORA),
        (["large", None], [8, 9], 24, graphs.LORA),
        (["large", "plain"], [16, 16], 32, graphs.MANY_ROWS),
        (["large", "plain"], [16, 16], 160, graphs.LORA),
    ):
        ask(backend, pool, names, lengths)
        assert backend.decode_graph(rows) == kind


def test_every_rank_replays_the_same_graph(served):
    """Ranks hold different amounts where blocks and ranks have no common grid: what one needs, all go by."""
    backend, pool, *_ = served
    mine = backend.prepare(pool.get("small").shard)
    ask(backend, pool, ["small"], [1])
    assert (backend.decode_graph(1), backend.replayable) == (graphs.LORA, True)
    for theirs, kind, replayable in (
        (mine._replace(local=144), graphs.MANY_ROWS, True),
        (mine._replace(width=2000), graphs.LORA, False),
        (mine._replace(local=3000), graphs.LORA, False),
        (None, graphs.LORA, False),
        (mine, graphs.LORA, True),
    ):
        backend.agree(pool.get("small").shard, [mine, theirs])
        backend._ops.batch._last_adapters = None
        ask(backend, pool, ["small"], [1])
        assert (backend.decode_graph(1), backend.replayable) == (kind, replayable)


def test_leading_dimensions_and_bias(served, device):
    backend, pool, method, layer = served
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(3)).to(layer.weight)
    bias = torch.randn(sum(N), generator=torch.Generator().manual_seed(4)).to(layer.weight)
    ask(backend, pool, ["plain", "small"], [3, 3])
    got = method.apply(layer, x, bias)
    assert got.shape == (2, 3, sum(N))
    flat = method.apply(layer, x.flatten(0, 1), bias)
    assert torch.equal(got.flatten(0, 1), flat)


def test_a_graph_with_adapters_is_recorded_without_any(served, monkeypatch):
    """SGLang captures with requests for the base only and says which variant it wants."""
    backend, pool, method, layer = served
    x = torch.randn(4, K).to(layer.weight)
    module = "sgl_bdlora.kernels.backend.get_capture_lora_variant"
    for variant, fused in (("lora", True), ("nolora", False), (None, False)):
        monkeypatch.setattr(module, lambda v=variant: v)
        ask(backend, pool, [None] * 4, [1] * 4)
        assert backend.fuses(PATHS[0], x, layer.weight) == fused
        assert torch.allclose(method.apply(layer, x).float(), x.float() @ layer.weight.float().T, atol=0.05)


def test_adapters_that_are_no_rank_rows_run_without_graphs(served):
    backend, pool, method, layer = served
    odd = make("odd", 4, 1, 1, (0,), ("model.embed_tokens",))
    pool.ensure(
        {"odd": AdapterShard("odd", "plain", 4, 1, odd.layers, odd.offsets, odd.weights.to(layer.weight.dtype))}
    )
    ask(backend, pool, ["odd", "plain"], [1, 1])
    assert not backend.replayable
    x = torch.randn(2, K).to(layer.weight)
    assert torch.isfinite(method.apply(layer, x)).all()
    ask(backend, pool, ["plain", None], [1, 1])
    assert backend.replayable


def test_a_prefill_graph_is_recorded_without_adapters_and_replayed_with_them(served, device, monkeypatch):
    backend, pool, method, layer = served
    backend.init_prefill_cuda_graph_batch_info(128)
    assert backend.prefill_graphs == ("lora",)
    x = torch.randn(80, K, generator=torch.Generator().manual_seed(5)).to(layer.weight)
    for captured, names in (("nolora", [None] * 3), ("lora", [None] * 3), (None, ["plain", None, "large"])):
        monkeypatch.setattr("sgl_bdlora.kernels.backend.get_capture_lora_variant", lambda v=captured: v)
        adapters = [None if name is None else pool.get(name) for name in names]
        assert backend.prefills_from_graph(adapters)
        wanted = torch_path(served, names, [10, 30, 40], x)
        backend.set_batch(adapters, [10, 30, 40], [1] * 3, prefill_graph=True)
        # Base-only prompts have a graph without our kernels.
        assert backend.prefill_graph == (None if captured == "nolora" else "lora")
        assert backend.fuses(PATHS[0], x, layer.weight) == (captured != "nolora")
        got = method.apply(layer, x)
        assert (got - wanted).float().abs().max() / wanted.float().abs().max() < (
            ERROR if device.type == "cpu" else 2**-6
        )
