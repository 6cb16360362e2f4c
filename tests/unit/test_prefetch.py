"""Waiting adapters come in before they are needed, in order of the queue, and never at the cost of one in use."""

from test_memory_pool import holds, pool, shard

from sgl_bdlora.prefetch import COPIES_PER_ROUND, prefetch

SHARDS = {name: shard(name, 8) for name in "abcdefgh"} | {"wide": shard("wide", 24)}


def residents(where) -> set[str]:
    return {uid for uid in SHARDS if where.get(uid)}


def test_a_waiting_adapter_arrives_while_another_runs():
    where = pool(4)
    where.ensure({"a": SHARDS["a"]})
    assert prefetch(where, SHARDS, {"a"}, ["b"], ()) == {"b"}
    assert holds(where, "b", SHARDS["b"])
    assert prefetch(where, SHARDS, {"a"}, ["b"], ()) == set()


def test_with_nothing_running_nobody_waits_for_a_round():
    where = pool(4)
    assert prefetch(where, SHARDS, set(), ["a", "b"], ()) == set()
    assert residents(where) == {"a", "b"}


def test_running_and_pinned_adapters_stay():
    where = pool(3)
    where.ensure({name: SHARDS[name] for name in "abc"})
    assert prefetch(where, SHARDS, {"a"}, ["d"], {"b"}) == {"d"}
    assert residents(where) == {"a", "b", "d"}
    assert prefetch(where, SHARDS, {"a"}, ["d", "e"], {"b"}) == {"e"}
    assert residents(where) == {"a", "b", "d"}


def test_the_first_in_the_queue_is_not_overtaken():
    """A large adapter that has to wait for room is not starved by small ones behind it."""
    where = pool(4)
    where.ensure({name: SHARDS[name] for name in "ab"})
    assert prefetch(where, SHARDS, {"a", "b"}, ["wide", "c"], ()) == {"wide", "c"}
    assert residents(where) == {"a", "b"}
    assert prefetch(where, SHARDS, {"b"}, ["wide", "c"], ()) == {"wide", "c"}
    assert residents(where) == {"b", "wide"}
    assert prefetch(where, SHARDS, {"b"}, ["wide", "c"], ()) == {"c"}


def test_a_round_starts_a_bounded_number_of_copies():
    where = pool(8)
    where.ensure({"a": SHARDS["a"]})
    queue = [*"bcdefgh", "b"]
    assert prefetch(where, SHARDS, {"a"}, queue, ()) == set("bcdefgh")
    assert len(residents(where)) == 1 + COPIES_PER_ROUND
    assert prefetch(where, SHARDS, {"a"}, queue, ()) == set("fgh")
    assert residents(where) == set("abcdefgh")


def test_twice_as_many_adapters_as_fit_are_copied_once_for_each_use():
    """Requests for 8 adapters in turn through a pool of 4: one copy for each adapter that is scheduled, none in vain."""
    where = pool(4)
    queue = list("abcdefgh") * 4
    running: list[str] = []
    scheduled = 0
    while queue:
        awaited = prefetch(where, SHARDS, running, queue, ())
        now = [uid for uid in queue[:2] if uid not in awaited and where.get(uid)]
        assert now or running
        for uid in now:
            queue.remove(uid)
        assert all(where.get(uid) for uid in running)
        running, scheduled = now, scheduled + len(now)
    assert scheduled == 32
    assert where.loads <= 32
