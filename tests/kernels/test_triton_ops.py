"""The Triton kernels against the torch operations: ragged batches, mixed structures and ranks, every popularity of adapters."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernels.common import without_shrink
from sgl_bdlora.kernels import fused
from sgl_bdlora.kernels.batch import make_batch
from sgl_bdlora.kernels.device_batch import LIMIT
from sgl_bdlora.kernels.fused import TAGS, _tagged
from sgl_bdlora.kernels.rows import SLICES
from sgl_bdlora.kernels.tiles import FUSED_TOKENS
from sgl_bdlora.kernels.torch_ops import add_lora
from sgl_bdlora.kernels.triton_ops import TritonOps
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard, HostLayer, HostSlice, LayerLayout, PieceLayout, SliceLayout, Span

K, N = 256, (64, 32, 32)
PATHS = ("layers.0.qkv_proj", "layers.1.qkv_proj")
HOSTS = [
    HostLayer(
        path,
        "column",
        tuple(HostSlice(f"{i}", Span.whole(K), Span.whole(n), sum(N[:i])) for i, n in enumerate(N)),
    )
    for path in PATHS
]


def make(name: str, rank: int, blocks_a: int, blocks_b: int, slices: tuple[int, ...], layers=PATHS) -> AdapterShard:
    layouts, offsets, total = {}, {}, 0
    for path in layers:
        made, offset = [], rank * len(slices) * K // blocks_a
        for at, i in enumerate(slices):
            whole = Span.whole(rank)
            piece = PieceLayout("none", whole, whole, Span.whole(K), Span.whole(N[i]), blocks_a, blocks_b)
            made.append(SliceLayout(str(i), piece, 0.25 * (i + 1), at * rank, offset, sum(N[:i])))
            offset += rank * N[i] // blocks_b
        layouts[path] = LayerLayout(tuple(made), rank * len(slices), K // blocks_a, offset)
        offsets[path] = total
        total += offset
    generator = torch.Generator().manual_seed(len(name) * 100 + rank)
    weights = torch.randn(total, generator=generator) * 0.1
    return AdapterShard(name, "plain", rank, 1, layouts, offsets, weights)


SHARDS = {
    "plain": make("plain", 16, 1, 1, (0, 1, 2)),
    "small": make("small", 3, 1, 1, (0, 1, 2)),
    "large": make("large", 128, 1, 1, (0, 1, 2)),
    "blocks_b": make("blocks_b", 8, 1, 4, (0, 1, 2)),
    "blocks_a": make("blocks_a", 8, 4, 1, (0,)),
    "q and v": make("q and v", 12, 1, 1, (0, 2)),
    "second layer": make("second layer", 4, 1, 1, (1,), PATHS[1:]),
}
POPULARITY = {
    "none": [None] * 5,
    "identical": ["plain"] * 7,
    "distinct": [*SHARDS, None],
    "uniform": ["plain", "large", None, "blocks_b"] * 4,
    "skewed": ["large"] * 9 + ["small", None, "blocks_a"],
    "one row": ["q and v"],
    "many rows": ["plain", "blocks_a", None, "second layer", "small"] * 20,
    "many rows and rank rows": ["plain", "large", None, "small"] * 20,
    "more rows": ["plain", "blocks_a", None, "large"] * 35,
}
# In the linear kernel h keeps 12 bits of significand in each part of K.
ERROR = 2**-11


@pytest.fixture(scope="module")
def engine(device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pool = MemoryPool(4 << 20, dtype, device, 16)
    shards = {
        name: AdapterShard(s.name, s.kind, s.rank, 1, s.layers, s.offsets, s.weights.to(dtype))
        for name, s in SHARDS.items()
    }
    pool.ensure(shards)
    return pool, TritonOps(pool.arena, HOSTS, 16, None).reserve(160, combines=False)


def case(engine, device, popularity: str, seed: int, static: bool = False):
    pool, ops = engine
    owners = [None if name is None else pool.get(name) for name in POPULARITY[popularity]]
    distinct = sorted({id(a): a for a in owners if a is not None}.values(), key=lambda a: a.number)
    assert ops.batch.takes(distinct)
    ops.batch.fill(distinct, np.array([-1 if a is None else distinct.index(a) for a in owners], dtype=np.int32), static)
    batch = make_batch(owners, [1] * len(owners), torch.device("cpu"))
    x = torch.randn(len(owners), K, generator=torch.Generator().manual_seed(seed))
    return ops, batch, x.to(device, pool.arena.dtype)


def reference(pool, batch, y, x, path):
    """In float32 on the CPU, from the same (rounded) weights."""
    y, x = y.float().cpu(), x.float().cpu()
    if batch is None:
        return y
    exact = MemoryPool(4 << 20, torch.float32, torch.device("cpu"), 16)
    shards = {
        f"{i}": AdapterShard(a.shard.name, "plain", 1, 1, a.shard.layers, a.shard.offsets, a.shard.weights.float())
        for i, a in enumerate(batch.adapters.adapters)
    }
    exact.ensure(shards)
    again = make_batch([exact.get(f"{i}") for i in range(len(shards))], [1] * len(shards), torch.device("cpu"))
    add_lora(y, x, type(batch)(again.adapters, batch.owner), path, None)
    return y


@pytest.fixture
def _impatient(device, monkeypatch):
    """Programs of the interpreter run one after another: words that are late never come."""
    if device.type == "cpu":
        monkeypatch.setattr(fused, "_PATIENCE", tl.constexpr(1))


def close(got, wanted, scale: float):
    error = (got.float().cpu() - wanted).abs().max() / scale
    return error < (ERROR if got.dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("static", [False, True], ids=["eager", "graph"])
def test_shrink_and_expand(engine, device, popularity, path, static):
    ops, batch, x = case(engine, device, popularity, 1, static)
    y = torch.randn(len(x), sum(N), generator=torch.Generator().manual_seed(2)).to(x)
    wanted = reference(engine[0], batch, y, x, path)
    ops.add_lora(y, x, path)
    assert close(y, wanted, wanted.abs().max())


FUSED = [name for name, who in POPULARITY.items() if len(who) <= FUSED_TOKENS]


@pytest.mark.parametrize(
    ("popularity", "bias", "static"),
    [
        *((name, False, True) for name in FUSED),
        ("distinct", True, True),
        *((name, bias, False) for name in ("many rows", "more rows") for bias in (False, True)),
        ("many rows and rank rows", True, False),
    ],
)
def test_linear(engine, device, popularity, bias, static):
    """Few rows, and up to 128 where there are few rank rows, in one launch; others added to what the expand wrote."""
    ops, batch, x = case(engine, device, popularity, 3, static)
    generator = torch.Generator().manual_seed(4)
    weight = (torch.randn(sum(N), K, generator=generator) * 0.1).to(x)
    b = torch.randn(sum(N), generator=generator).to(x) if bias else None
    for path in PATHS:
        assert ops.fuses(path, x, weight)
        y = x.float() @ weight.float().T + (b.float() if bias else 0)
        wanted = reference(engine[0], batch, y, x, path)
        assert close(ops.linear(x, weight, b, path), wanted, wanted.abs().max())


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    "change",
    [{"programs": 0}, {"programs": 0, "parts": 3, "block_k": 64, "early": 64, "rows": 16}],
    ids=str,
)
def test_a_tile_whose_shrink_does_not_come_computes_it(engine, device, monkeypatch, change):
    """Nothing depends on the progress of the programs that compute it: not a deadlock, not a wrong sum."""
    ops, batch, x = case(engine, device, "uniform", 5)
    weight = torch.zeros(sum(N), K).to(x)
    wanted = reference(engine[0], batch, torch.zeros(len(x), sum(N)), x, PATHS[0])
    give_tiles(monkeypatch, ops, change)
    assert close(ops.linear(x, weight, None, PATHS[0]), wanted, wanted.abs().max())


@pytest.mark.parametrize(
    "change",
    [
        {"programs": 4, "shrink_rows": 64},
        {"programs": 12, "shrink_rows": 64, "halves": True},
        {"splits": 1},
        {"splits": 4, "shrink_k": 32, "programs": 96},
        {"splits": 4, "shrink_k": 32, "programs": 5},
        {"early": K},
        {"parts": 2, "block_k": 64, "early": 128, "rows": 16},
        {"parts": 3, "block_k": 32, "early": 64, "rows": 16},
        {"parts": 4, "block_k": 64, "early": 64, "rows": 128, "block_n": 32},
    ],
    ids=str,
)
@pytest.mark.parametrize("popularity", ["skewed", "many rows and rank rows", "none"])
def test_other_tiles(engine, device, monkeypatch, change, popularity):
    ops, batch, x = case(engine, device, popularity, 6, static=True)
    generator = torch.Generator().manual_seed(4)
    weight = (torch.randn(sum(N), K, generator=generator) * 0.1).to(x)
    bias = torch.randn(sum(N), generator=generator).to(x)
    give_tiles(monkeypatch, ops, change)
    wanted = reference(engine[0], batch, x.float() @ weight.float().T + bias.float(), x, PATHS[0])
    assert close(ops.linear(x, weight, bias, PATHS[0]), wanted, wanted.abs().max())


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_sum_is_of_this_launch_whoever_is_last(engine, device, monkeypatch, parts):
    """Launch after launch with other activations, the same numbers whichever part of K is last: on a GPU a race, so many times."""
    ops, _, x = case(engine, device, "none", 13, static=True)
    weight = (torch.randn(sum(N), K, generator=torch.Generator().manual_seed(4)) * 0.1).to(x)
    give_tiles(monkeypatch, ops, {"parts": parts, "block_k": 64, "early": 64})
    xs = [x, -2 * x.flip(0), x.roll(1, 1)]
    wanted = [x.float().cpu() @ weight.float().cpu().T for x in xs]
    first = [ops.linear(x, weight, None, PATHS[0]) for x in xs]
    assert all(close(got, y, y.abs().max()) for got, y in zip(first, wanted, strict=True))
    for _ in range(1 if device.type == "cpu" else 500):
        assert all(torch.equal(ops.linear(x, weight, None, PATHS[0]), y) for x, y in zip(xs, first, strict=True))


@pytest.mark.parametrize("parts", [2, 3])
def test_every_tile_and_part_has_its_own_sum_and_the_last_to_come_adds(engine, device, monkeypatch, parts):
    ops, _, x = case(engine, device, "none", 14, static=True)
    weight = (torch.randn(sum(N), K, generator=torch.Generator().manual_seed(4)) * 0.1).to(x)
    give_tiles(monkeypatch, ops, {"parts": parts, "block_k": 64, "early": 64, "block_n": 32})
    tiles = sum(N) // 32
    y = ops.linear(x, weight, None, PATHS[0])
    sums, arrived = ops.sums()
    arrived = arrived[:tiles]
    sums = sums[: tiles * parts * 16 * 32].view(tiles, parts, 16, 32)[:, :, : len(x)]
    for part in range(parts):
        k = slice(*(at * (K // 64) // parts * 64 for at in (part, part + 1)))
        wanted = x.float().cpu()[:, k] @ weight.float().cpu()[:, k].T
        assert close(sums[:, part].transpose(0, 1).flatten(1), wanted, wanted.abs().max())
    assert not arrived.any()
    if device.type == "cpu":
        # In the interpreter the last part is always the last to come. As if one had come already, whose numbers are there: the last but one
        # adds, and the last is the first of the next launch.
        arrived.fill_(1)
        again = ops.linear(x, weight, None, PATHS[0])
        left = arrived.clone()
        arrived.zero_()
        assert torch.equal(again, y)
        assert (left == 1).all()


def test_streams_share_no_sums(engine, device, monkeypatch):
    """SGLang may compute layers side by side. A stream first seen in a capture goes without: its memory would be the graph's."""
    ops, _, x = case(engine, device, "none", 15, static=True)
    weight = (torch.randn(sum(N), K, generator=torch.Generator().manual_seed(4)) * 0.1).to(x)
    wanted = x.float().cpu() @ weight.float().cpu().T
    give_tiles(monkeypatch, ops, {"parts": 2, "block_k": 64, "early": 64})
    seen = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(ops, "_sums", {})
    monkeypatch.setattr(ops, "_arena", SimpleNamespace(is_cuda=True, device=device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=seen.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    found = []
    for seen.stream, seen.capturing in ((1, False), (2, False), (1, True), (3, True)):
        found.append(ops.sums())
    first, second, again, none = found
    assert first is again
    assert none is None
    assert first[0].data_ptr() != second[0].data_ptr()
    assert first[1].data_ptr() != second[1].data_ptr()
    monkeypatch.undo()
    give_tiles(monkeypatch, ops, {"parts": 2, "block_k": 64, "early": 64})
    monkeypatch.setattr(ops, "sums", lambda: None)
    assert close(ops.linear(x, weight, None, PATHS[0]), wanted, wanted.abs().max())


def test_layers_side_by_side(engine, device, monkeypatch):
    if device.type == "cpu":
        pytest.skip("needs a GPU's streams")
    ops, _, x = case(engine, device, "none", 16, static=True)
    weight = (torch.randn(sum(N), K, generator=torch.Generator().manual_seed(4)) * 0.1).to(x)
    for path in PATHS:
        give_tiles(monkeypatch, ops, {"parts": 4, "block_k": 64, "early": 64}, path)
    wanted = {path: ops.linear(x * (i + 1), weight, None, path) for i, path in enumerate(PATHS)}
    streams = [torch.cuda.Stream() for _ in PATHS]
    torch.cuda.synchronize()
    got = {path: [] for path in PATHS}
    for _ in range(200):
        for i, (path, stream) in enumerate(zip(PATHS, streams, strict=True)):
            with torch.cuda.stream(stream):
                got[path].append(ops.linear(x * (i + 1), weight, None, path))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted[path]) for path in PATHS for y in got[path])


def test_shared_tiles_in_a_graph(engine, device, monkeypatch):
    if device.type == "cpu":
        pytest.skip("needs a GPU's graphs")
    ops, _, x = case(engine, device, "none", 17, static=True)
    weight = (torch.randn(sum(N), K, generator=torch.Generator().manual_seed(4)) * 0.1).to(x)
    give_tiles(monkeypatch, ops, {"parts": 4, "block_k": 64, "early": 64})
    stream, graph, read = torch.cuda.Stream(), torch.cuda.CUDAGraph(), x.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ops.linear(read, weight, None, PATHS[0])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = ops.linear(read, weight, None, PATHS[0])
    for factor in (1, -2, 3):
        read.copy_(x * factor)
        graph.replay()
        assert torch.equal(y, ops.linear(read, weight, None, PATHS[0]))


@pytest.mark.parametrize("popularity", ["distinct", "many rows"])
def test_repeated_steps_of_a_graph(engine, device, popularity):
    """As a server takes them: only the tag moves between two replays. Words of the step before would be of x with another factor."""
    if device.type == "cpu":
        pytest.skip("needs a GPU's graphs")
    ops, _, x = case(engine, device, popularity, 18, static=True)
    weight = (torch.randn(sum(N), K, generator=torch.Generator().manual_seed(5)) * 0.1).to(x)
    stream, graph, read = torch.cuda.Stream(), torch.cuda.CUDAGraph(), x.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        wanted = [ops.linear(read, weight, None, path) for path in PATHS]
    torch.cuda.synchronize()
    wanted = [y.float().cpu() for y in wanted]
    with torch.cuda.graph(graph, stream=stream):
        got = [ops.linear(read, weight, None, path) for path in PATHS]
    for step in range(500):
        factor = (-2.0, 0.5, 4.0)[step % 3]
        read.copy_(x * factor)
        ops.batch.repeat()
        graph.replay()
        assert all(close(y / factor, w, w.abs().max()) for y, w in zip(got, wanted, strict=True))


def give_tiles(monkeypatch, ops, change, path=PATHS[0]):
    """Every kind's tiles of a layer with these fields, and tiles where the separate kernels would serve."""
    plan = ops.plans[path]
    tiles = {kind: replace(t, **change) for kind, t in plan.tiles.items()}
    tiles[FUSED_TOKENS, True] = tiles[FUSED_TOKENS, False]
    monkeypatch.setitem(ops.plans, path, replace(plan, tiles=tiles))


@pytest.mark.usefixtures("_impatient")
def test_stale_sums_are_not_taken(engine, device, monkeypatch):
    """The same batch again with other activations: words of the step before and of the layer before carry other tags.

    In the second step nobody writes new ones, in the third only the first layer does. Else it is a race, on a GPU, so many times.
    """
    weight = torch.zeros(sum(N), K)
    wanted, plans = {}, engine[1].plans
    alone = {path: without_shrink(plan) for path, plan in plans.items()}
    changed = {1: alone, 2: {**plans, PATHS[1]: alone[PATHS[1]]}}
    steps, who = (3, "uniform") if device.type == "cpu" else (500, "distinct")
    for step in range(steps):
        ops, batch, x = case(engine, device, who, step % 2, static=True)
        monkeypatch.setattr(ops, "plans", changed.get(step, plans))
        for path in PATHS:
            if (path, step % 2) not in wanted:
                wanted[path, step % 2] = reference(engine[0], batch, torch.zeros(len(x), sum(N)), x, path)
            sums = wanted[path, step % 2]
            assert close(ops.linear(x, weight.to(x), None, path), sums, sums.abs().max())


@pytest.mark.usefixtures("_impatient")
def test_sums_of_long_ago_are_not_taken(engine, device, monkeypatch):
    """So many steps later the tags are the same again."""
    ops, _, x = case(engine, device, "identical", 10, static=True)
    weight = torch.zeros(sum(N), K).to(x)
    ops.linear(x, weight, None, PATHS[0])
    for _ in range(TAGS - 1):
        ops.batch.fill([], np.full(len(x), -1, dtype=np.int32), static=True)
    ops, batch, x = case(engine, device, "identical", 11, static=True)
    monkeypatch.setattr(ops, "plans", {path: without_shrink(plan) for path, plan in ops.plans.items()})
    wanted = reference(engine[0], batch, torch.zeros(len(x), sum(N)), x, PATHS[0])
    assert close(ops.linear(x, weight, None, PATHS[0]), wanted, wanted.abs().max())


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("splits", "split", "rows"), [(2, 0, 128), (2, 1, 16), (4, 0, 16), (4, 3, 128)])
def test_a_part_of_a_sum_is_not_taken(engine, device, monkeypatch, splits, split, rows):
    """Words of the other parts of K are of an older launch, or those of this one are."""
    ops, batch, x = case(engine, device, "skewed", 12, static=True)
    weight = torch.zeros(sum(N), K).to(x)
    plan = ops.plans[PATHS[0]]
    tiles = {kind: replace(t, splits=splits, shrink_k=32, rows=rows, programs=96) for kind, t in plan.tiles.items()}
    monkeypatch.setitem(ops.plans, PATHS[0], replace(plan, tiles=tiles))
    wanted = reference(engine[0], batch, torch.zeros(len(x), sum(N)), x, PATHS[0])
    assert close(ops.linear(x, weight, None, PATHS[0]), wanted, wanted.abs().max())
    parts = ops.batch.words[: splits * 16 * SLICES * LIMIT].view(splits, -1)
    right = parts.clone()
    there = right != 0
    # Other values, and the tag after this launch's.
    late = torch.where(there, (right ^ (TAGS + 1) << 11) + 1, 0)
    monkeypatch.setattr(ops, "plans", {path: without_shrink(plan) for path, plan in ops.plans.items()})
    for mine, others in ((late, right), (right, late)):
        parts.copy_(others)
        parts[split] = mine[split]
        assert close(ops.linear(x, weight, None, PATHS[0]), wanted, wanted.abs().max())
        # It is the tag that tells.
        parts.copy_(torch.where(there & (parts != right), parts - 1, parts))
        assert not close(ops.linear(x, weight, None, PATHS[0]), wanted, wanted.abs().max())


@pytest.mark.parametrize(("more", "parts"), [(0, 4), (-1, 2)], ids=["one round", "more"])
def test_h_is_in_fewer_parts_where_the_programs_cannot_compute_four_in_one_round(
    engine, device, monkeypatch, more, parts
):
    ops, batch, x = case(engine, device, "skewed", 16, static=True)
    weight = torch.zeros(sum(N), K).to(x)
    pieces = triton.cdiv(ops.batch.local.used, 16) * len(N) * 4
    give_tiles(monkeypatch, ops, {"splits": 4, "shrink_k": 32, "shrink_rows": 16, "programs": pieces + more})
    ops.batch.words.zero_()
    wanted = reference(engine[0], batch, torch.zeros(len(x), sum(N)), x, PATHS[0])
    assert close(ops.linear(x, weight, None, PATHS[0]), wanted, wanted.abs().max())
    written = ops.batch.words[: 4 * 16 * SLICES * LIMIT].view(4, -1).any(1)
    assert written.tolist() == [part < parts for part in range(4)]


def _words(v, h, COUNT: tl.constexpr, TAG: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(h + i, _tagged(tl.load(v + i), TAG))


def test_words_are_rounded_to_nearest(device):
    """Twelve bits of significand: half of 2^-11 between 1 and 2. Infinities and a GPU's NaN stay what they are."""
    v = 1 + torch.rand(1024, generator=torch.Generator().manual_seed(9))
    v = torch.cat([v, -v])
    v[-3:] = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000], dtype=torch.int32).view(torch.float32)
    words = torch.empty(len(v), dtype=torch.int32, device=device)
    # Here, for the interpreter has been chosen by now.
    triton.jit(_words)[(1,)](v.to(device), words, COUNT=len(v), TAG=7)
    words = words.cpu()
    assert torch.all(words & TAGS == 7)
    got = (words & ~TAGS).view(torch.float32)
    assert (got - v)[:-3].abs().max() <= 2**-12
    assert torch.equal(got[-2:], v[-2:])
    assert got[-3].isnan()


def test_infinity_of_another_adapter_stays_out(engine, device):
    ops, _, x = case(engine, device, "distinct", 7)
    x[1:] = float("inf")
    y = torch.zeros(len(x), sum(N)).to(x)
    ops.add_lora(y, x, PATHS[0])
    assert y[0].isfinite().all()
    assert not y[2].isfinite().all()


def test_base_rows_are_not_touched(engine, device):
    ops, _, x = case(engine, device, "uniform", 8)
    y = torch.randn(len(x), sum(N)).to(x)
    before = y.clone()
    ops.add_lora(y, x, PATHS[0])
    assert torch.equal(y[2::4], before[2::4])
    assert not torch.equal(y[0], before[0])
