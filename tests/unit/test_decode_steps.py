"""What the manager does anew in a step, and what it takes from the step before."""

from types import SimpleNamespace

import pytest
from test_memory_pool import pool, shard

from sgl_bdlora import cpu, graphs

cpu.prepare_environment()

from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.model_executor.runner_utils import capture_mode  # noqa: E402

from sgl_bdlora import manager as manager_module  # noqa: E402
from sgl_bdlora.manager import BDLoRAManager  # noqa: E402
from sgl_bdlora.memory_pool import PoolFull  # noqa: E402

SHARDS = {name: shard(name, 8) for name in "abcd"}
IDS = ["a", None, "b"]
REPEAT, RESET = "repeat", "reset"


class BackEnd:
    """Keeps what it was told: of a batch the residents and each request's rows."""

    prefill_cuda_graph_max_bs = prefill_cuda_graph_max_tokens = None

    def __init__(self):
        self.told: list = []
        self.failure: Exception | None = None

    def set_batch(self, adapters, lengths, head_lengths, prefill_graph=False) -> None:
        self.told.append((adapters, lengths))
        if self.failure is not None:
            raise self.failure

    def repeat_batch(self) -> None:
        self.told.append(REPEAT)

    def reset_batch_state(self) -> None:
        self.told.append(RESET)


@pytest.fixture
def manager():
    """Of a pool with room for three adapters, in which a, b and c are."""
    made = BDLoRAManager.__new__(BDLoRAManager)
    made.memory_pool, made.shards, made.lora_backend = pool(3), SHARDS, BackEnd()
    made.loader = SimpleNamespace(pinned=frozenset)
    made.last_used, made._published, made._fetched, made._prepared = {}, (0, 0), None, None
    made.memory_pool.ensure({name: SHARDS[name] for name in "abc"})
    return made


@pytest.fixture
def capturing():
    """Says which kind of graph is captured."""
    yield capture_mode._set_capture_lora_variant
    capture_mode._set_capture_lora_variant(None)


def batch(ids: list, mode: ForwardMode = ForwardMode.DECODE) -> SimpleNamespace:
    """Of 2 rows a request where it is no decode step."""
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=len(ids),
        lora_ids=list(ids),
        extend_seq_lens_cpu=[2] * len(ids),
        return_logprob=False,
        spec_info=SimpleNamespace(draft_token_num=2),
    )


def told(manager: BDLoRAManager, ids: list, mode: ForwardMode = ForwardMode.DECODE):
    """What the back end is told for this batch."""
    before = len(manager.lora_backend.told)
    manager.prepare_lora_batch(batch(ids, mode))
    (one,) = manager.lora_backend.told[before:]
    return one


def whole(manager: BDLoRAManager, ids: list, rows: int = 1) -> tuple[list, list[int]]:
    """What it has to be told of this batch when it is set."""
    return [None if uid is None else manager.memory_pool.get(uid) for uid in ids], [rows] * len(ids)


# Batches


@pytest.mark.parametrize("ids", [IDS, ["a"], [None, None]], ids=str)
def test_a_decode_step_of_the_same_requests_is_repeated(manager, ids):
    assert told(manager, ids) == whole(manager, ids)
    assert [told(manager, ids) for _ in range(3)] == [REPEAT] * 3


@pytest.mark.parametrize(
    "others",
    [["a", None, "c"], ["b", None, "a"], ["a", "b", None], [*IDS, "a"], [*IDS, None], ["a", None], [None] * 3],
    ids=str,
)
def test_other_requests_are_set(manager, others):
    for ids in (IDS, others, IDS):
        assert told(manager, ids) == whole(manager, ids)
        assert told(manager, ids) == REPEAT


def test_a_list_that_is_padded_after_the_step_was_prepared_does_not_count(manager):
    first = batch(IDS)
    manager.prepare_lora_batch(first)
    first.lora_ids.extend([None] * 2)
    assert told(manager, IDS) == REPEAT
    assert told(manager, first.lora_ids) == whole(manager, [*IDS, None, None])


def _load_one_instead_of_another(manager) -> None:
    manager.memory_pool.ensure({"d": SHARDS["d"]}, protected=["a", "b"])
    assert manager.memory_pool.get("c") is None


def _load_one_of_them_again(manager) -> None:
    manager.memory_pool.remove("a")
    manager.memory_pool.ensure({"a": SHARDS["a"]})


BETWEEN = {
    "prefill": lambda manager: manager.prepare_lora_batch(batch(IDS, ForwardMode.EXTEND)),
    "verification": lambda manager: manager.prepare_lora_batch(batch(IDS, ForwardMode.TARGET_VERIFY)),
    "no rows": lambda manager: manager.reset_lora_batch(),
    "another removed": lambda manager: manager.memory_pool.remove("c"),
    "another evicted": _load_one_instead_of_another,
    "loaded again": _load_one_of_them_again,
}


@pytest.mark.parametrize("between", BETWEEN)
def test_the_same_requests_are_set_again_after(manager, between):
    told(manager, IDS)
    assert told(manager, IDS) == REPEAT
    BETWEEN[between](manager)
    assert told(manager, IDS) == whole(manager, IDS)
    assert told(manager, IDS) == REPEAT


def test_an_adapter_that_came_is_a_change_too(manager):
    manager.memory_pool.remove("c")
    told(manager, IDS)
    manager.memory_pool.ensure({"c": SHARDS["c"]})
    assert told(manager, IDS) == whole(manager, IDS)


def test_an_adapter_that_has_gone_is_not_served(manager):
    told(manager, IDS)
    manager.memory_pool.remove("b")
    with pytest.raises(RuntimeError, match="adapter id b of the batch is not resident"):
        manager.prepare_lora_batch(batch(IDS))


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.TARGET_VERIFY], ids=lambda mode: mode.name)
def test_only_decode_steps_are_repeated(manager, mode):
    """The others' rows may be other ones."""
    for _ in range(2):
        assert told(manager, IDS, mode) == whole(manager, IDS, rows=2)


@pytest.mark.parametrize("kind", graphs.WITH_ADAPTERS)
def test_no_step_is_repeated_for_a_graph_or_after_one(manager, capturing, kind):
    """Without adapters, as SGLang captures; the kernels are launched all the same."""
    ids = [None] * 3
    told(manager, ids)
    capturing(kind)
    assert [told(manager, ids) for _ in range(2)] == [whole(manager, ids)] * 2
    capturing(None)
    assert told(manager, ids) == whole(manager, ids)
    assert told(manager, ids) == REPEAT


def test_steps_are_repeated_after_decode_graphs_were_captured(manager, capturing):
    """SGLang leaves the last variant behind, for good."""
    capturing("nolora")
    assert told(manager, IDS) == whole(manager, IDS)
    assert told(manager, IDS) == REPEAT


@pytest.mark.parametrize("failing", [IDS, ["c"]], ids=str)
def test_a_batch_that_could_not_be_set_is_not_repeated_nor_the_one_before(manager, failing):
    told(manager, ["b"])
    manager.lora_backend.failure = MemoryError("too little")
    for _ in range(2):
        with pytest.raises(MemoryError):
            manager.prepare_lora_batch(batch(failing))
        assert manager.lora_backend.told[-1] == whole(manager, failing)
    manager.lora_backend.failure = None
    assert told(manager, ["b"]) == whole(manager, ["b"])
    assert told(manager, failing) == whole(manager, failing)


def test_later_copies_wait_for_repeated_steps_too(manager, monkeypatch):
    order = manager.lora_backend.told
    monkeypatch.setattr(manager.memory_pool.copies, "read_by_current_stream", lambda: order.append("reads"))
    for _ in range(3):
        manager.prepare_lora_batch(batch(IDS))
    assert order == ["reads", whole(manager, IDS), "reads", REPEAT, "reads", REPEAT]


# Adapters of the next batch


@pytest.fixture
def asked(manager, monkeypatch) -> list[set[str]]:
    """What the pool is asked for."""
    calls, ensure = [], manager.memory_pool.ensure

    def counted(wanted, protected=()):
        calls.append(set(wanted))
        return ensure(wanted, protected)

    monkeypatch.setattr(manager.memory_pool, "ensure", counted)
    return calls


@pytest.fixture
def told_to_publish(manager, monkeypatch) -> list[tuple[int, int]]:
    """Loads and evictions, whenever the manager publishes."""
    pool, seen = manager.memory_pool, []
    manager._published = (pool.loads, pool.evictions)
    monkeypatch.setattr(manager_module.engines, "publish", lambda _: seen.append((pool.loads, pool.evictions)))
    return seen


def test_the_pool_is_asked_once_for_the_same_adapters(manager, asked):
    for new, running in (
        ({"a", "b"}, frozenset()),
        ({"b", "a", None}, frozenset()),
        ({"a"}, frozenset({"b"})),
        ({None}, frozenset({"a", "b", None})),
    ):
        manager.fetch_new_loras(new, running)
    assert asked == [{"a", "b"}]


def test_the_pool_is_asked_once_for_adapters_that_it_had_to_load(manager, asked):
    for _ in range(2):
        manager.fetch_new_loras({"a", "d"})
    assert asked == [{"a", "d"}]


def test_the_pool_is_asked_for_other_adapters(manager, asked):
    """Which ones were used last is the pool's to know."""
    sets = [{"a"}, {"a", "b"}, {"b"}, {"a"}, set(), {"a"}]
    for wanted in sets:
        manager.fetch_new_loras(wanted)
    assert asked == sets


@pytest.mark.parametrize("between", ["another removed", "another evicted", "loaded again"])
def test_the_pool_is_asked_again_after(manager, asked, between):
    manager.fetch_new_loras({"a", "b"})
    BETWEEN[between](manager)
    del asked[:]
    for _ in range(2):
        manager.fetch_new_loras({"a", "b"})
    assert asked == [{"a", "b"}]


def test_adapters_are_used_in_the_same_order_on_every_rank(manager):
    """A set's differs between processes, and the pool evicts by it."""

    class Reversed(set):
        def __or__(self, other):
            return self

        __sub__ = __or__

        def __iter__(self):
            return iter(["c", "b", "a"])

    manager.fetch_new_loras(Reversed("abc"))
    assert list(manager.memory_pool.uid_to_buffer_id) == ["a", "b", "c"]


def test_an_adapter_that_was_evicted_is_fetched_again(manager):
    manager.fetch_new_loras({"a"})
    manager.memory_pool.ensure({"d": SHARDS["d"]}, protected=["b", "c"])
    assert manager.memory_pool.get("a") is None
    manager.fetch_new_loras({"a"})
    assert manager.memory_pool.get("a") is not None


def test_adapters_that_had_no_room_are_asked_for_again(manager, asked):
    for _ in range(2):
        with pytest.raises(PoolFull):
            manager.fetch_new_loras(set(SHARDS))
    assert asked == [set(SHARDS)] * 2


def test_every_step_counts_as_use(manager, monkeypatch):
    clock = iter(range(1, 4))
    monkeypatch.setattr(manager_module, "time", SimpleNamespace(time=lambda: next(clock)))
    manager.fetch_new_loras({"a", "b", None})
    assert manager.last_used == {"a": 1, "b": 1}
    manager.fetch_new_loras({"a", "b"})
    assert manager.last_used == {"a": 2, "b": 2}
    manager.fetch_new_loras({None}, frozenset({"b"}))
    assert manager.last_used == {"a": 2, "b": 3}


def test_copies_are_published_once(manager, told_to_publish):
    for wanted, published in (
        ({"a", "b"}, []),
        ({"a", "d"}, [(4, 1)]),
        ({"a", "d"}, []),
        ({"b", "c"}, [(5, 2)]),
        ({"b"}, []),
    ):
        del told_to_publish[:]
        manager.fetch_new_loras(wanted)
        assert told_to_publish == published


def test_copies_for_waiting_requests_are_published_with_the_next_step(manager, told_to_publish):
    """They are made between two steps of the same requests (admission.py)."""
    manager.fetch_new_loras({"a"})
    manager.memory_pool.ensure({"d": SHARDS["d"]}, protected=["a"])
    for _ in range(2):
        manager.fetch_new_loras({"a"})
    assert told_to_publish == [(4, 1)]
