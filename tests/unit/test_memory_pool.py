"""The arena holds exactly what shards weigh, evicts the oldest, and never moves an adapter that is in use."""

import random

import pytest
import torch

from sgl_bdlora.memory_pool import FreeList, MemoryPool, PoolFull
from sgl_bdlora.sharding import AdapterShard, LayerLayout, PieceLayout, SliceLayout, Span

K, N, LAYERS = 32, 16, 4


def shard(name: str, rank: int) -> AdapterShard:
    piece = PieceLayout("none", Span.whole(rank), Span.whole(rank), Span.whole(K), Span.whole(N))
    layer = LayerLayout((SliceLayout("q_proj", piece, 1.0, 0, rank * K, 0),), rank, K, rank * (K + N))
    layers = {f"layers.{i}": layer for i in range(LAYERS)}
    offsets = {path: i * layer.numel for i, path in enumerate(layers)}
    weights = torch.randn(LAYERS * layer.numel, generator=torch.Generator().manual_seed(hash(name) % 2**31))
    return AdapterShard(name, "plain", rank, 1, layers, offsets, weights)


def pool(shards_of_rank_8: float) -> MemoryPool:
    return MemoryPool(int(shards_of_rank_8 * shard("one", 8).nbytes), torch.float32, torch.device("cpu"), 8)


def holds(where: MemoryPool, uid: str, what: AdapterShard) -> bool:
    resident = where.get(uid)
    for path, layer in what.layers.items():
        block = what.weights[what.offsets[path] : what.offsets[path] + layer.numel]
        views = resident.layers[path]
        if not torch.equal(torch.cat([views.a.flatten(), *[b.flatten() for b in views.b]]), block):
            return False
    return True


def test_an_adapter_costs_what_it_weighs():
    where = pool(20)
    where.ensure({f"s{i}": shard(f"s{i}", 8) for i in range(3)})
    where.ensure({"big": shard("big", 64)})
    assert where.used == 11 * shard("one", 8).nbytes


def test_small_adapters_do_not_pay_for_large_ones():
    """100 adapters of rank 8 and 4 of rank 128 in a pool of just their weight, through churn that scatters its gaps."""
    shards = {f"small{i}": shard(f"small{i}", 8) for i in range(100)} | {
        f"large{i}": shard(f"large{i}", 128) for i in range(4)
    }
    where = pool(100 + 4 * 128 / 8)
    rng = random.Random(1)
    for _ in range(300):
        where.ensure({uid: shards[uid] for uid in rng.sample(sorted(shards), 3)})
        where.remove(rng.choice(sorted(shards)))
    where.ensure(shards)
    assert where.used == where.budget == sum(s.nbytes for s in shards.values())
    assert where.arena.nbytes == where.budget
    assert all(holds(where, uid, shards[uid]) for uid in shards)


def test_least_recently_used_goes_first_and_protected_stay():
    where = pool(3)
    shards = {name: shard(name, 8) for name in "abcde"}
    for name in "abc":
        where.ensure({name: shards[name]})
    where.ensure({"a": shards["a"]})
    assert where.ensure({"d": shards["d"]}) == ["d"]
    assert [uid for uid in shards if where.get(uid)] == ["a", "c", "d"]
    where.ensure({"e": shards["e"]}, protected=["c", "a"])
    assert [uid for uid in shards if where.get(uid)] == ["a", "c", "e"]
    assert all(holds(where, uid, shards[uid]) for uid in "ace")


def test_in_use_adapters_alone_can_fill_it():
    where = pool(2)
    with pytest.raises(PoolFull, match=r"--lora-pool-gb"):
        where.ensure({name: shard(name, 8) for name in "abc"})


def test_large_adapter_fits_into_scattered_gaps():
    where = pool(8)
    small = {f"s{i}": shard(f"s{i}", 8) for i in range(8)}
    where.ensure(small)
    for i in (0, 2, 4, 6):
        where.remove(f"s{i}")
    big = shard("big", 32)
    where.ensure({"big": big}, protected=list(small))
    assert where.used == where.budget
    assert holds(where, "big", big)
    assert all(holds(where, f"s{i}", small[f"s{i}"]) for i in (1, 3, 5, 7))


def test_random_traffic_keeps_every_resident_intact():
    rng = random.Random(0)
    where = pool(12)
    shards = {f"r{i}": shard(f"r{i}", rng.choice((2, 4, 8, 16, 32))) for i in range(40)}
    for _ in range(500):
        names = rng.sample(sorted(shards), rng.randint(1, 3))
        wanted = {name: shards[name] for name in names}
        if not where.fits(wanted.values()):
            continue
        where.ensure(wanted)
        assert all(holds(where, name, shards[name]) for name in names)
        if rng.random() < 0.1:
            where.remove(rng.choice(names))
    resident = [uid for uid in shards if where.get(uid)]
    assert all(holds(where, uid, shards[uid]) for uid in resident)
    assert where.used == sum(shards[uid].nbytes for uid in resident)


def test_free_list_merges_neighbours():
    space = FreeList(100)
    parts = [space.take(10) for _ in range(10)]
    assert space.take(1) is None
    for part in (parts[3], parts[5], parts[4]):
        space.give(part, 10)
    assert space.take(30) == parts[3]
