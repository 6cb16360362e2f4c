"""Invariants of every policy's plans on random problems. `-m slow` runs 10,000 of them, the default a few hundred."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instances import loads, problem, problems

from sgl_bdlora.cluster.costs import load_costs
from sgl_bdlora.cluster.moves import healed
from sgl_bdlora.cluster.placement import RankPacking
from sgl_bdlora.cluster.policies import NAMES, make_policy
from sgl_bdlora.cluster.routing import RoutingTable, moves
from sgl_bdlora.cluster.state import fill

COSTS = load_costs("bdlora")
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
FEW = settings(max_examples=150, deadline=None, suppress_health_check=QUIET, derandomize=True)
MANY = settings(max_examples=10_000, deadline=None, suppress_health_check=QUIET, database=None)


def policy(name):
    return make_policy(name, COSTS, 30.0, 200.0, 64)


def check_table(p, table, places=True):
    names = {r.name for r in p.replicas}
    assert set(table.shares) == {a.name for a in p.adapters}
    assert table.replicas == tuple(r.name for r in p.replicas)
    room = {r.name: r.host_bytes for r in p.replicas}
    for adapter in p.adapters:
        parts = table.shares[adapter.name]
        assert {r for r, _ in parts} <= names
        assert len({r for r, _ in parts}) == len(parts) > 0
        assert all(part > 0 for _, part in parts)
        assert sum(part for _, part in parts) == pytest.approx(1, abs=1e-9)
        for replica, _ in parts:
            room[replica] -= adapter.size
            assert next(r for r in p.replicas if r.name == replica).can_hold(adapter)
    if places:
        assert min(room.values()) >= 0
    assert 0 < table.admitted <= 1
    assert table.admitted * p.utilisation().sum() <= len(p.replicas) * (1 + 1e-9)


def drifted(p, seed):
    """The same cluster after its demand changed hands."""
    order = np.random.default_rng(seed).permutation(len(p.demand))
    return dataclasses.replace(p, demand=p.demand[order])


def check_rank_packing(p, seed):
    packing = RankPacking()
    table = packing.plan(p, None)
    check_table(p, table)
    assert table == packing.plan(p, None)
    plenty = p.replicas[0].host_bytes >= 10 * sum(a.size for a in p.adapters)
    use, load = p.utilisation(), loads(p, table)
    mean = use.sum() / len(p.replicas)
    if plenty:
        assert load.max() <= mean * (1 + p.slack) * (1 + 1e-6) + 1e-12
        # Replicas that mix ranks which are asked for: at most one for each change of rank.
        rank = {a.name: a.rank for a, u in zip(p.adapters, use, strict=True) if u > 0}
        on = {r.name: {rank[a] for a, s in table.shares.items() if a in rank and r.name in dict(s)} for r in p.replicas}
        assert sum(len(ranks) > 1 for ranks in on.values()) <= max(0, len(set(rank.values())) - 1)
    later = drifted(p, seed)
    second = packing.plan(later, table)
    check_table(later, second)
    assert second.version == table.version + 1
    assert len(moves(table, second)) <= p.max_moves
    assert second == packing.plan(later, table)
    if plenty:
        # Moves never make the busiest replica busier than leaving all as it was, or than the slack allows.
        cap = later.utilisation().sum() / len(later.replicas) * (1 + later.slack)
        assert loads(later, second).max() <= max(loads(later, table).max(), cap) * (1 + 1e-6) + 1e-12
    # The first replica dies.
    if len(p.replicas) > 1:
        fewer = dataclasses.replace(later, replicas=p.replicas[1:])
        if plenty:
            third = packing.plan(fewer, second)
            check_table(fewer, third)
            assert len(moves(healed(second, fewer), third)) <= p.max_moves


@FEW
@given(p=problems, seed=st.integers(0, 1000))
def test_rank_packing(p, seed):
    check_rank_packing(p, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(p=problems, seed=st.integers(0, 1000))
def test_rank_packing_10000(p, seed):
    check_rank_packing(p, seed)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "rank-packing"])
@settings(FEW, max_examples=25)
@given(p=problems, seed=st.integers(0, 1000))
def test_baselines(name, p, seed):
    chosen = policy(name)
    table = chosen.plan(p, None)
    anywhere = name in ("affinity", "toppings")
    check_table(p, table, places=not anywhere)
    later = drifted(p, seed)
    second = chosen.plan(later, table)
    check_table(later, second, places=not anywhere)
    assert len(moves(table, second)) <= p.max_moves
    assert second == chosen.plan(later, table)


@FEW
@given(p=problems, rounds=st.integers(1, 6))
def test_repeated_plans_with_steady_demand_settle(p, rounds):
    packing = RankPacking()
    table = packing.plan(p, None)
    for _ in range(rounds):
        new = packing.plan(p, table)
        if p.replicas[0].host_bytes >= 10 * sum(a.size for a in p.adapters):
            assert moves(table, new) == set()
        table = new


def test_bounded_moves_reach_balance_after_some_periods():
    p = problem(3, adapters=200, replicas=8, moves=8)
    packing = RankPacking()
    table = packing.plan(p, None)
    p = drifted(p, 1)
    mean = p.utilisation().sum() / 8
    worst = [loads(p, table).max() / mean]
    for _ in range(8):
        table = packing.plan(p, table)
        worst.append(loads(p, table).max() / mean)
    assert worst[0] > 1.2
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] <= 1.1 + 1e-6


@FEW
@given(
    levels=st.lists(st.floats(0, 100), min_size=1, max_size=12), amount=st.floats(0.001, 1000)
)  # fmt: skip
def test_fill_is_water(levels, amount):
    levels = np.array(levels)
    poured = fill(levels, amount)
    assert poured.min() >= 0
    assert poured.sum() == pytest.approx(amount)
    top = (levels + poured)[poured > 1e-9 * amount]
    assert np.allclose(top, top[0])
    assert np.all(levels[poured == 0] >= top[0] * (1 - 1e-6))


@FEW
@given(
    parts=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    dead=st.sets(st.integers(0, 7)), draw=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_healing_keeps_every_adapter(parts, dead, draw):
    names = tuple(f"r{i}" for i in range(8))
    total = sum(parts)
    shares = {"split": tuple((f"r{i}", x / total) for i, x in enumerate(parts)), "one": (("r0", 1.0),)}
    table = RoutingTable(4, names, shares)
    gone = {f"r{i}" for i in dead}
    if len(gone) == 8:
        with pytest.raises(ValueError, match="no replica is alive"):
            table.without(gone)
        return
    new = table.without(gone)
    assert new.version == 5
    for adapter in shares:
        assert not set(new.holders(adapter)) & gone
        assert sum(part for _, part in new.shares[adapter]) == pytest.approx(1)
        assert new.sample(adapter, draw) in new.holders(adapter)
        ranked = [r for group in new.ranked(adapter, draw) for r in group]
        assert sorted(ranked) == sorted(new.replicas)
        assert ranked[0] == new.sample(adapter, draw)
    assert RoutingTable.from_json(new.to_json()) == new
