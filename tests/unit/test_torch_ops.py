"""The torch operations against the dense formula, over ragged batches, adapter popularity, ranks and block structure."""

import pytest
import torch

from sgl_bdlora.kernels.batch import make_batch
from sgl_bdlora.kernels.torch_ops import add_lora
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard, LayerLayout, PieceLayout, SliceLayout, Span

K, N = 48, (24, 12, 12)
PATH = "model.layers.0.self_attn.qkv_proj"


class NoCollectives:
    """All pieces here are local: a collective would be a defect."""

    def all_gather(self, h_TR):
        raise AssertionError("all_gather for local pieces")

    all_reduce = all_gather


def make(name: str, rank: int, blocks_a: int, blocks_b: int, present: tuple[int, ...], seed: int):
    """A shard of one layer, and its dense update (sum of N, K)."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.zeros(sum(N), K, dtype=torch.float64)
    slices, a_rows, b_flat, offset = [], [], [], 0
    for i in present:
        layout = PieceLayout(
            "none", Span.whole(rank), Span.whole(rank), Span.whole(K), Span.whole(N[i]), blocks_a, blocks_b
        )
        a = torch.randn(layout.shape_a, generator=generator)
        b = torch.randn(layout.shape_b, generator=generator)
        scale = 0.5 + i
        y_start = sum(N[:i])
        update = torch.block_diag(*b.chunk(blocks_b)).double() @ torch.block_diag(*a.chunk(blocks_a)).double()
        dense[y_start : y_start + N[i]] = scale * update
        slices.append((layout, scale, len(a_rows) * rank, y_start))
        a_rows.append(a)
        b_flat.append(b.unflatten(0, (blocks_b, -1)).transpose(1, 2).flatten())
    a_all = torch.cat(a_rows)
    offset, made = a_all.numel(), []
    for (layout, scale, a_start, y_start), b in zip(slices, b_flat, strict=True):
        made.append(SliceLayout("q_proj", layout, scale, a_start, offset, y_start))
        offset += b.numel()
    layer = LayerLayout(tuple(made), a_all.shape[0], a_all.shape[1], offset)
    weights = torch.cat([a_all.flatten(), *b_flat])
    return AdapterShard(name, "plain", rank, 1, {PATH: layer}, {PATH: 0}, weights), dense


@pytest.fixture(scope="module")
def adapters():
    pool = MemoryPool(1 << 20, torch.float32, torch.device("cpu"), 16)
    made = {
        "bd": make("bd", 8, 1, 4, (0, 1, 2), 1),
        "bd-small": make("bd-small", 4, 1, 2, (0, 1, 2), 2),
        "row": make("row", 6, 3, 1, (0,), 3),
        "plain": make("plain", 12, 1, 1, (0, 1, 2), 4),
        "q-and-v": make("q-and-v", 2, 1, 1, (0, 2), 5),
    }
    pool.ensure({name: shard for name, (shard, _) in made.items()})
    return {name: (pool.get(name), dense) for name, (_, dense) in made.items()}


MIXES = {
    "identical": ["bd"] * 6,
    "distinct": ["bd", "bd-small", "row", "plain", "q-and-v", None],
    "interleaved": ["bd", "plain", "bd", None, "plain", "bd"],
    "skewed": ["plain", "plain", "plain", "row", "plain", None],
    "none": [None] * 6,
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("lengths", [[1] * 6, [5, 1, 9, 2, 7, 3]])
def test_equals_the_dense_update(adapters, mix, lengths):
    names = MIXES[mix]
    tokens = sum(lengths)
    x, y = torch.randn(tokens, K), torch.randn(tokens, sum(N))
    wanted, start = y.double().clone(), 0
    for name, length in zip(names, lengths, strict=True):
        if name is not None:
            wanted[start : start + length] += x[start : start + length].double() @ adapters[name][1].T
        start += length
    batch = make_batch([adapters[name][0] if name else None for name in names], lengths, x.device)
    if batch is None:
        assert mix == "none"
        return
    add_lora(y, x, batch, PATH, NoCollectives())
    assert torch.allclose(y.double(), wanted, atol=1e-4)


def test_base_rows_are_untouched_bit_for_bit(adapters):
    x, y = torch.randn(3, K), torch.randn(3, sum(N))
    before = y.clone()
    add_lora(y, x, make_batch([None, adapters["bd"][0], None], [1, 1, 1], x.device), PATH, NoCollectives())
    assert torch.equal(y[[0, 2]], before[[0, 2]])
    assert not torch.equal(y[1], before[1])


def test_other_layers_are_untouched(adapters):
    x, y = torch.randn(2, K), torch.randn(2, sum(N))
    before = y.clone()
    add_lora(
        y,
        x,
        make_batch([adapters["bd"][0]] * 2, [1, 1], x.device),
        "model.layers.1.self_attn.qkv_proj",
        NoCollectives(),
    )
    assert torch.equal(y, before)


def test_a_set_is_taken_again_for_the_same_adapters(adapters):
    bd, plain = adapters["bd"][0], adapters["plain"][0]
    first = make_batch([bd, None, plain], [1, 1, 1], torch.device("cpu"))
    again = make_batch([plain, plain, bd], [1, 1, 1], torch.device("cpu"), first.adapters)
    assert again.adapters is first.adapters
    assert again.owner.tolist() == [1, 1, 0]
    assert make_batch([bd], [1], torch.device("cpu"), first.adapters).adapters is not first.adapters


def test_overflow_in_one_adapter_does_not_reach_other_rows(adapters):
    pool = MemoryPool(1 << 20, torch.float32, torch.device("cpu"), 4)
    huge, _ = make("huge", 4, 1, 1, (0, 1, 2), 7)
    huge.weights.fill_(3e38)
    pool.ensure({"huge": huge})
    x, y = torch.ones(3, K), torch.zeros(3, sum(N))
    wanted = torch.zeros(sum(N), dtype=torch.float64) + torch.ones(K).double() @ adapters["bd"][1].T
    add_lora(y, x, make_batch([adapters["bd"][0], pool.get("huge"), None], [1, 1, 1], x.device), PATH, NoCollectives())
    assert torch.allclose(y[0].double(), wanted, atol=1e-4)
    assert not torch.isfinite(y[1]).all()
    assert torch.equal(y[2], torch.zeros(sum(N)))
