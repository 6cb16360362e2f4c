"""S-LoRA pieces through the Triton kernels, beside local ones, every rank in turn: together they are the dense layer."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from sgl_bdlora.kernels.tiles import FUSED_TOKENS
from sgl_bdlora.kernels.triton_ops import TritonOps
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard, HostLayer, HostSlice, LayerLayout, PieceLayout, SliceLayout, Span

TP, K, N = 2, 256, (64, 32)
RANKS = {"a": 6, "b": 20, "c": 3, "local": 5, "wide": 40}
OWNERS = {
    "few rows": ["a", None, "b", "local", "a", "c", "b", "local"],
    "hundred rows": ["a", None, "b", "local", "c"] * 20,
    "many rows": ["a"] * 70 + [None] * 3 + ["local"] * 60 + ["c", "b"],
    "many rows, none local": ["b"] * 90 + [None] * 3 + ["a"] * 45,
}
SERVED = ("a", "b", "c", "local")
COLUMN, ROW = "layers.0.gate_up_proj", "layers.0.down_proj"
PADDED = {name: -(-rank // TP) * TP for name, rank in RANKS.items()}


def factors(name: str, inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense A (padded rank, inputs) and B (outputs, padded rank); rows beyond the rank are zero."""
    generator = torch.Generator().manual_seed(seed * 100 + RANKS[name])
    a = torch.zeros(PADDED[name], inputs)
    b = torch.zeros(outputs, PADDED[name])
    a[: RANKS[name]] = torch.randn(RANKS[name], inputs, generator=generator) * 0.1
    b[:, : RANKS[name]] = torch.randn(outputs, RANKS[name], generator=generator) * 0.1
    return a, b


def hosts(rank: int) -> list[HostLayer]:
    column = tuple(HostSlice(f"{i}", Span.whole(K), Span.shard(n, rank, n * TP), sum(N[:i])) for i, n in enumerate(N))
    row = (HostSlice("0", Span.shard(K, rank, K * TP), Span.whole(N[0]), 0),)
    return [HostLayer(COLUMN, "column", column, rank, TP), HostLayer(ROW, "row", row, rank, TP)]


def shard(name: str, rank: int) -> AdapterShard:
    """This rank's pieces: column layers gather, row layers reduce; those of "local" do neither."""
    local = name == "local"
    padded, share = PADDED[name], PADDED[name] // (1 if local else TP)
    whole, mine = Span.whole(padded), Span.whole(padded) if local else Span.shard(share, rank, padded)
    slices, stacked, transposed, offset = [], [], [], share * len(N) * K
    for i, n in enumerate(N):
        a, b = factors(name, K, n * TP, i)
        piece = PieceLayout("none" if local else "gather", mine, whole, Span.whole(K), Span.shard(n, rank, n * TP))
        slices.append(SliceLayout(f"{i}", piece, 0.5 + i, i * share, offset, sum(N[:i])))
        stacked.append(a[mine.start : mine.stop])
        transposed.append(b[rank * n : (rank + 1) * n].T.flatten())
        offset += padded * n
    column = torch.cat([torch.cat(stacked).flatten(), *transposed])
    a, b = factors(name, K * TP, N[0], 7)
    part = Span.whole(N[0]) if local else Span.part(rank, TP, N[0])
    piece = PieceLayout("none" if local else "reduce", whole, whole, Span.shard(K, rank, K * TP), part)
    b_offset = padded * K
    row = torch.cat([a[:, rank * K : (rank + 1) * K].flatten(), b[part.start : part.stop].T.flatten()])
    layers = {
        COLUMN: LayerLayout(tuple(slices), share * len(N), K, len(column)),
        ROW: LayerLayout((SliceLayout("0", piece, 2.0, 0, b_offset, part.start),), padded, K, len(row)),
    }
    return AdapterShard(name, "plain", RANKS[name], 1, layers, {COLUMN: 0, ROW: len(column)}, torch.cat([column, row]))


class Ranks:
    """The all-reduce of ranks that run one after another: each adds up what all gave last, so it is right in the second step."""

    def __init__(self, in_place: bool = False):
        self.given: dict[int, torch.Tensor] = {}
        self.rank = 0
        self._in_place = in_place

    def all_reduce(self, h: torch.Tensor) -> torch.Tensor:
        self.given[self.rank] = h.clone()
        total = sum(self.given.values())
        return h.copy_(total) if self._in_place else total


class Way(NamedTuple):
    """How the layer is asked for. graph: launch as a graph has to, with buffers of all layers or one that they share.

    whole: the layer with its updates; else only these, added to what is there. in_place: what the all-reduce gives lies where h lay.
    """

    graph: bool = False
    shared: bool = False
    whole: bool = True
    in_place: bool = False


WAYS = {
    "eager": Way(),
    "graph": Way(graph=True),
    "prefill graph": Way(graph=True, shared=True),
    "added": Way(whole=False),
    "added in a graph": Way(graph=True, whole=False, in_place=True),
}


CASES = [
    *(("few rows", way) for way in ("eager", "graph", "added in a graph")),
    ("hundred rows", "eager"),
    *(("many rows", way) for way in ("eager", "prefill graph", "added")),
    *(("many rows, none local", way) for way in ("eager", "prefill graph")),
]


class Engine(NamedTuple):
    """One rank's kernels and the pool that they read."""

    ops: TritonOps
    pool: MemoryPool

    def ask(self, owners: list, graph: bool) -> None:
        """Set the batch: each row's adapter, None for the base model."""
        adapters = [self.pool.get(name) for name in RANKS if name in owners]
        assert self.ops.batch.takes(adapters)
        assert self.ops.batch.captures(adapters)
        place = {adapter.shard.name: i for i, adapter in enumerate(adapters)}
        self.ops.batch.fill(adapters, np.array([place.get(o, -1) for o in owners], dtype=np.int32), graph)
        assert self.ops.batch.combines
        assert self.ops.batch.replayable


def engine(device, rank: int, ranks: Ranks, way: Way, max_rank: int = 0) -> Engine:
    """With room in its graphs for the adapters that are served, and for others of max_rank."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pool = MemoryPool(1 << 20, dtype, device, 8)
    shards = {name: shard(name, rank) for name in RANKS}
    pool.ensure(
        {n: AdapterShard(n, "plain", 1, 1, s.layers, s.offsets, s.weights.to(dtype)) for n, s in shards.items()}
    )
    ops = TritonOps(pool.arena, hosts(rank), 4, ranks)
    for name in SERVED:
        ops.known.rows(pool.get(name).shard)
    return Engine(ops.reserve(160, True, max_rank, way.shared), pool)


def run(
    device, path: str, batches: list[list], xs: list[torch.Tensor], ws: list[torch.Tensor], biases: list, way: Way
) -> list[torch.Tensor]:
    """What every rank gives in the last step. batches: every step's, the last two the same (see Ranks), all of as many rows.

    xs, ws, biases: every rank's, no bias where it is None.
    """
    ranks = Ranks(way.in_place)
    engines = [engine(device, rank, ranks, way) for rank in range(TP)]
    rows = len(batches[0])
    for step, owners in enumerate(batches):
        ys = []
        for one in engines:
            one.ask(owners, way.graph)
        if step == 0:
            # What another layer leaves behind must not be seen.
            other = ROW if path == COLUMN else COLUMN
            for ranks.rank, (ops, pool) in enumerate(engines):
                plan = ops.plans[other]
                ops.add_lora(pool.arena.new_zeros(rows, plan.outputs), pool.arena.new_ones(rows, plan.inputs), other)
        for ranks.rank, (ops, pool) in enumerate(engines):
            given = (xs[ranks.rank], ws[ranks.rank], biases[ranks.rank])
            x, w, bias = (None if tensor is None else tensor.to(pool.arena) for tensor in given)
            if way.whole and ops.fuses(path, x, w):
                y = ops.linear(x, w, bias, path)
            else:
                y = torch.nn.functional.linear(x, w, bias)
                ops.add_lora(y, x, path)
            ys.append(y.float().cpu())
    return ys


def expected(owners: list, x: torch.Tensor, w: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    rows = x @ w.T
    for t, name in enumerate(owners):
        if name is not None:
            a, b = factors(name, x.shape[1], len(w), seed)
            rows[t] += scale * x[t] @ a.T @ b.T
    return rows


def close(device, got: torch.Tensor, wanted: torch.Tensor, way: Way) -> bool:
    """In the linear kernel, whole layers of few rows, h keeps 12 bits of significand."""
    error = (got - wanted).abs().max() / wanted.abs().max()
    bound = 2**-11 if way.whole and len(got) <= FUSED_TOKENS else 1e-5
    return bool(error < (bound if device.type == "cpu" else 2**-6))


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def check_column_layer(device, batches: list[list], way: Way) -> None:
    owners = batches[-1]
    x = rand(1, len(owners), K) * 10
    w = [rand(3 + i, n * TP, K) * way.whole for i, n in enumerate(N)]
    bias = [rand(8 + i, n * TP) * 10 for i, n in enumerate(N)]
    ws, biases = ([torch.cat([part.chunk(TP)[rank] for part in parts]) for rank in range(TP)] for parts in (w, bias))
    ys = run(device, COLUMN, batches, [x] * TP, ws, biases, way)
    for i, n in enumerate(N):
        part = torch.cat([y[:, sum(N[:i]) : sum(N[:i]) + n] for y in ys], dim=1)
        assert close(device, part, expected(owners, x, w[i], i, 0.5 + i) + bias[i], way)


@pytest.mark.parametrize(("rows", "way"), CASES)
def test_column_layers(device, rows, way):
    check_column_layer(device, [OWNERS[rows]] * 2, WAYS[way])


def test_columns_of_the_batch_before_are_cleared(device):
    """Where a rank wrote its half of 20 columns, the other has to write half of 6."""
    check_column_layer(device, [["b"], ["a"], ["a"]], Way(graph=True, whole=False))


@pytest.mark.parametrize(("rows", "way"), CASES)
def test_row_layers(device, rows, way):
    owners, way = OWNERS[rows], WAYS[way]
    x, w = rand(2, len(owners), K * TP) * 10, rand(6, N[0], K * TP) * way.whole
    ys = run(device, ROW, [owners] * 2, x.chunk(TP, dim=1), w.chunk(TP, dim=1), [None] * TP, way)
    assert close(device, sum(ys), expected(owners, x, w, 7, 2.0), way)


def test_graphs_have_room_for_so_many_columns(device):
    """Two slices of rank 40 are more than the least that is kept, unless such a rank is said to come."""
    ops, pool = engine(device, 0, Ranks(), Way())
    fits, wide = [pool.get("b")], [pool.get("wide")]
    assert ops.batch.takes(wide)
    assert ops.batch.captures(fits)
    assert not ops.batch.captures(wide)
    ops.batch.fill(fits, np.zeros(2, dtype=np.int32))
    assert ops.batch.replayable
    ops.batch.fill(wide, np.zeros(2, dtype=np.int32))
    assert not ops.batch.replayable
    ops, pool = engine(device, 0, Ranks(), Way(), max_rank=RANKS["wide"])
    wide = [pool.get("wide")]
    assert ops.batch.captures(wide)
    ops.batch.fill(wide, np.zeros(2, dtype=np.int32))
    assert ops.batch.replayable


def test_graphs_have_room_for_the_widest_known_adapter(device):
    one = engine(device, 0, Ranks(), Way(graph=True))
    wide = one.pool.get("wide")
    assert not one.ops.batch.captures([wide])
    # Its rank rows are known by now.
    assert one.ops.reserve(160, True).batch.captures([wide])


@pytest.mark.parametrize("shared", [False, True])
def test_layers_share_one_h_where_they_are_told_to(device, shared):
    one = engine(device, 0, Ranks(), Way(graph=True, shared=shared))
    one.ask(["a"] * 3, graph=True)
    x = one.pool.arena.new_zeros(3, K)
    first, second = (one.ops.batch.combined_h(x, layer) for layer in (0, 1))
    assert (first.data_ptr() == second.data_ptr()) == shared
    first.fill_(1)
    # The next layer finds it zero, whoever clears it.
    assert not one.ops.batch.combined_h(x, 1).any()
    assert one.ops.batch.keeps_combined != shared
