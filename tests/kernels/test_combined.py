"""S-LoRA pieces through the Triton kernels, every rank in turn: together they are the dense update."""

import numpy as np
import pytest
import torch

from sgl_bdlora.kernels.triton_ops import TritonOps
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard, HostLayer, HostSlice, LayerLayout, PieceLayout, SliceLayout, Span

TP, K, N = 2, 256, (64, 32)
RANKS = {"a": 6, "b": 20, "c": 3}
OWNERS = ["a", None, "b", "a", "c", "b"]
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
    """This rank's pieces: column layers gather, row layers reduce."""
    padded, share = PADDED[name], PADDED[name] // TP
    whole, mine = Span.whole(padded), Span.shard(share, rank, padded)
    slices, stacked, transposed, offset = [], [], [], share * len(N) * K
    for i, n in enumerate(N):
        a, b = factors(name, K, n * TP, i)
        piece = PieceLayout("gather", mine, whole, Span.whole(K), Span.shard(n, rank, n * TP))
        slices.append(SliceLayout(f"{i}", piece, 0.5 + i, i * share, offset, sum(N[:i])))
        stacked.append(a[mine.start : mine.stop])
        transposed.append(b[rank * n : (rank + 1) * n].T.flatten())
        offset += padded * n
    column = torch.cat([torch.cat(stacked).flatten(), *transposed])
    a, b = factors(name, K * TP, N[0], 7)
    part = Span.part(rank, TP, N[0])
    piece = PieceLayout("reduce", whole, whole, Span.shard(K, rank, K * TP), part)
    b_offset = padded * K
    row = torch.cat([a[:, rank * K : (rank + 1) * K].flatten(), b[part.start : part.stop].T.flatten()])
    layers = {
        COLUMN: LayerLayout(tuple(slices), share * len(N), K, len(column)),
        ROW: LayerLayout((SliceLayout("0", piece, 2.0, 0, b_offset, part.start),), padded, K, len(row)),
    }
    return AdapterShard(name, "plain", RANKS[name], 1, layers, {COLUMN: 0, ROW: len(column)}, torch.cat([column, row]))


class Ranks:
    """The all-reduce of ranks that run one after another, each twice: what they give is recorded, then added up."""

    def __init__(self):
        self.given: dict[int, torch.Tensor] = {}
        self.rank = 0

    def all_reduce(self, h: torch.Tensor) -> torch.Tensor:
        self.given[self.rank] = h.clone()
        return sum(self.given.values())


def run(device, path: str, xs: list[torch.Tensor], static: bool) -> list[torch.Tensor]:
    ranks, engines = Ranks(), []
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for rank in range(TP):
        pool = MemoryPool(1 << 20, dtype, device, 4)
        shards = {name: shard(name, rank) for name in RANKS}
        pool.ensure(
            {n: AdapterShard(n, "plain", 1, 1, s.layers, s.offsets, s.weights.to(dtype)) for n, s in shards.items()}
        )
        adapters = [pool.get(name) for name in RANKS]
        ops = TritonOps(pool.arena, hosts(rank), 4, ranks)
        for adapter in adapters:
            ops.rows(adapter.shard)
        ops = ops.reserve(16, combines=True)
        assert ops.takes(adapters)
        owners = np.array([-1 if o is None else list(RANKS).index(o) for o in OWNERS], dtype=np.int32)
        ops.set_batch(adapters, owners, static)
        assert ops.combines
        assert ops.replayable
        engines.append((ops, pool))
    for _ in range(2):
        ys = []
        for ranks.rank, (ops, _) in enumerate(engines):
            plan = ops.plans[path]
            y = torch.zeros(len(OWNERS), plan.outputs, dtype=dtype, device=device)
            ops.add_lora(y, xs[ranks.rank].to(device, dtype), path)
            ys.append(y.float().cpu())
    return ys


def expected(x: torch.Tensor, inputs: int, outputs: int, seed: int, scale: float) -> torch.Tensor:
    rows = torch.zeros(len(OWNERS), outputs)
    for t, name in enumerate(OWNERS):
        if name is not None:
            a, b = factors(name, inputs, outputs, seed)
            rows[t] = scale * x[t] @ a.T @ b.T
    return rows


def close(device, got: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = (got - wanted).abs().max() / wanted.abs().max()
    return bool(error < (1e-5 if device.type == "cpu" else 2**-6))


@pytest.mark.parametrize("static", [False, True], ids=["eager", "graph"])
def test_column_layers(device, static):
    x = torch.randn(len(OWNERS), K, generator=torch.Generator().manual_seed(1))
    ys = run(device, COLUMN, [x] * TP, static)
    for i, n in enumerate(N):
        part = torch.cat([y[:, sum(N[:i]) : sum(N[:i]) + n] for y in ys], dim=1)
        assert close(device, part, expected(x, K, n * TP, i, 0.5 + i))


@pytest.mark.parametrize("static", [False, True], ids=["eager", "graph"])
def test_row_layers(device, static):
    x = torch.randn(len(OWNERS), K * TP, generator=torch.Generator().manual_seed(2))
    ys = run(device, ROW, [x[:, rank * K : (rank + 1) * K] for rank in range(TP)], static)
    assert close(device, sum(ys), expected(x, K * TP, N[0], 7, 2.0))
