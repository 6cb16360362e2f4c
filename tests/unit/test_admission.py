"""Adapters take turns: waiting ones come in before they are needed, nobody starves, and none in use is evicted."""

import random
from collections import Counter

import pytest
from test_memory_pool import holds, pool, shard

from sgl_bdlora.admission import COPIES_PER_ROUND, Admission, Waiting

SHARDS = {name: shard(name, 8) for name in "abcdefgh"} | {"wide": shard("wide", 24)}


def start(room: int, resident: str = "", pinned: str = "") -> tuple:
    where = pool(room)
    where.ensure({name: SHARDS[name] for name in resident})
    return where, Admission(where, SHARDS, lambda: set(pinned))


def queue(*adapters: str) -> list[Waiting]:
    return [Waiting(f"{i} {uid}", uid) for i, uid in enumerate(adapters)]


def residents(where) -> set[str]:
    return {uid for uid in SHARDS if where.get(uid)}


def test_a_waiting_adapter_arrives_while_another_runs():
    where, admission = start(4, "a")
    admission.next_round({"a"}, queue("b"))
    assert admission.closed == {"b"}
    assert holds(where, "b", SHARDS["b"])
    admission.next_round({"a"}, queue("b"))
    assert not admission.closed


def test_with_nothing_running_nobody_waits_for_a_round():
    where, admission = start(4)
    admission.next_round(set(), queue("a", "b"))
    assert not admission.closed
    assert residents(where) == {"a", "b"}


def test_requests_for_the_base_do_not_wait_for_a_copy_either():
    _, admission = start(4)
    admission.next_round(set(), queue("a"), base_runs=True)
    assert admission.closed == {"a"}
    admission.next_round(set(), queue("a"), base_runs=True)
    assert not admission.closed


def test_running_and_pinned_adapters_stay():
    where, admission = start(3, "abc", pinned="b")
    admission.next_round({"a"}, queue("d"))
    assert residents(where) == {"a", "b", "d"}
    admission.next_round({"a"}, queue("d", "e"))
    assert residents(where) == {"a", "b", "d"}
    assert admission.closed == {"e"}


def test_the_adapter_that_has_run_longest_gives_way():
    where, admission = start(2, "ab")
    admission.next_round({"b"}, [])
    admission.next_round({"a", "b"}, [])
    waiting = [Waiting("1", "c"), Waiting("2", "a"), Waiting("3", "b")]
    admission.next_round({"a", "b"}, waiting)
    assert admission.closed == {"b", "c"}
    waiting.remove(Waiting("2", "a"))
    admission.next_round({"a"}, waiting)
    assert residents(where) == {"a", "c"}
    admission.next_round({"a"}, waiting)
    assert admission.closed == {"b"}


def test_order_is_of_coming_not_of_the_queue():
    _, admission = start(1, "a")
    first, second = Waiting("1", "b"), Waiting("2", "c")
    admission.next_round({"a"}, [first])
    admission.next_round({"a"}, [second, first])
    admission.next_round(set(), [second, first])
    assert admission.closed == {"c"}


def test_a_large_adapter_is_not_overtaken_by_small_ones():
    where, admission = start(4, "ab")
    waiting = queue("wide", "c")
    admission.next_round({"a", "b"}, waiting)
    assert admission.closed == {"wide", "c"}
    assert residents(where) == {"a", "b"}
    admission.next_round({"b"}, waiting)
    assert residents(where) == {"b", "wide"}
    admission.next_round({"b"}, waiting)
    assert admission.closed == {"c"}


def test_a_round_starts_a_bounded_number_of_copies():
    where, admission = start(8, "a")
    waiting = queue(*"bcdefgh", "b")
    admission.next_round({"a"}, waiting)
    assert len(residents(where)) == 1 + COPIES_PER_ROUND
    admission.next_round({"a"}, waiting)
    assert residents(where) == set("abcdefgh")
    assert admission.closed == set("fgh")


def test_no_more_adapters_than_a_batch_may_name():
    where, admission = start(8, "ab")
    where.max_loras_per_batch = 2
    admission.next_round({"a", "b"}, queue("c"))
    assert admission.closed == {"c"}
    assert residents(where) == {"a", "b"}


@pytest.mark.parametrize("adapters", [4, 8, 16, 32])
def test_nobody_starves_and_the_batch_stays_full(adapters):
    """Room for 8 adapters, requests of 60 rounds at 0.7 a round: the longest wait grows with the number of adapters, not with time."""
    length, rounds, most = 60, 6000, 64
    shards = {f"{i}": shard(f"{i}", 8) for i in range(adapters)}
    where = pool(8)
    admission = Admission(where, shards, lambda: set())
    rng = random.Random(adapters)
    waiting: list[tuple[int, Waiting]] = []
    ends: list[tuple[int, str]] = []
    waits, served = [], Counter()
    for now in range(rounds):
        if rng.random() < 0.7:
            waiting.append((now, Waiting(f"{now}", f"{rng.randrange(adapters)}")))
        ends = [(end, uid) for end, uid in ends if end > now]
        running = {uid for _, uid in ends}
        admission.next_round(running, [entry for _, entry in waiting])
        for came, entry in list(waiting):
            if len(ends) < most and entry.adapter not in admission.closed:
                assert where.get(entry.adapter), "a request starts only with its adapter there"
                waiting.remove((came, entry))
                ends.append((now + length, entry.adapter))
                waits.append(now - came)
                served[entry.adapter] += 1
        assert len({uid for _, uid in ends}) <= 8
    assert len(served) == adapters
    assert max(waits) <= length * (1 if adapters <= 8 else adapters / 8 + 1)
    assert len(waiting) <= 0.7 * length * (adapters / 8 + 1)
