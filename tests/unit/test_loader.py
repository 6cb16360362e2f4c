"""A load succeeds on every rank or on none, and every rank gives the same answer."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_host_memory import FakeCuda
from test_sharding import HIDDEN, RANK, adapter, config, host

from sgl_bdlora import loader, preparing
from sgl_bdlora.host_memory import PinnedMemory
from sgl_bdlora.loader import AdapterLoader
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard, shard_adapter

TP, KV_HEADS, MAX_LORAS = 2, 2, 3


def shard(rank: int) -> AdapterShard:
    return shard_adapter(adapter(TP, KV_HEADS), host(TP, rank, KV_HEADS), torch.float32)


class Ranks:
    """The loaders of two ranks, each called in a thread of its own.

    room: of the pools, in adapters. max_ranks: by rank. unprepared: whose kernels fail.
    """

    def __init__(self, room: float = 8, max_ranks: tuple[int, ...] = (RANK, RANK), unprepared: int | None = None):
        self._barrier, self._told, self._unprepared = threading.Barrier(TP, timeout=10), [None] * TP, unprepared
        self.agreed: list[tuple] = []
        pools = [
            MemoryPool(int(room * shard(0).nbytes), torch.float32, torch.device("cpu"), MAX_LORAS) for _ in range(TP)
        ]
        self.loaders = [
            AdapterLoader(
                pools[rank],
                host(TP, rank, KV_HEADS),
                "replicated",
                max_ranks[rank],
                SimpleNamespace(prepare=partial(self._prepare, rank), agree=partial(self._agree, rank)),
                partial(self._all_ranks, rank),
            )
            for rank in range(TP)
        ]

    def load(self, name: str, pinned: bool = False, load=AdapterLoader.load) -> str | None:
        ref = SimpleNamespace(lora_id=f"id of {name}", lora_name=name, lora_path="here", pinned=pinned)
        with ThreadPoolExecutor(TP) as threads:
            answers = list(threads.map(lambda each: load(each, ref), self.loaders))
        assert answers == answers[:1] * TP
        return answers[0]

    def loaded(self) -> list[str]:
        everyone = [[ref.lora_name for ref in each.refs.values()] for each in self.loaders]
        assert everyone == everyone[:1] * TP
        assert all(each.refs.keys() == each.shards.keys() for each in self.loaders)
        return everyone[0]

    def _prepare(self, rank: int, _) -> int:
        if rank == self._unprepared:
            raise MemoryError("too little")
        return rank

    def _agree(self, rank: int, shard, everyone) -> None:
        self.agreed.append((rank, shard, list(everyone)))

    def _all_ranks(self, rank: int, mine) -> list:
        self._told[rank] = mine
        self._barrier.wait()
        everyone = list(self._told)
        self._barrier.wait()
        return everyone


@pytest.fixture(autouse=True)
def reads(monkeypatch) -> list[str]:
    """The names of the adapters that are read; each is the same one."""
    names: list[str] = []

    def read(path: str, name: str):
        names.append(name)
        return adapter(TP, KV_HEADS)

    monkeypatch.setattr(loader, "read_adapter", read)
    return names


def test_an_adapter_is_kept_until_it_is_unloaded():
    ranks = Ranks()
    assert ranks.load("one") is None
    assert ranks.load("two") is None
    assert ranks.loaded() == ["one", "two"]
    for rank, each in enumerate(ranks.loaders):
        assert torch.equal(each.shards["id of one"].weights, shard(rank).weights)
        assert each.unload("id of one")
        assert not each.unload("id of one")
    assert ranks.loaded() == ["two"]


def test_every_rank_s_kernels_go_by_what_all_need():
    ranks = Ranks()
    assert ranks.load("one") is None
    agreed = sorted(ranks.agreed, key=lambda each: each[0])
    assert [(rank, everyone) for rank, _, everyone in agreed] == [(rank, list(range(TP))) for rank in range(TP)]
    assert all(shard is ranks.loaders[rank].shards["id of one"] for rank, shard, _ in agreed)


def test_a_refused_load_keeps_no_memory(monkeypatch):
    """Not until the garbage collector comes by, which is when there is too little."""
    held: list[weakref.ref] = []

    def cut(*_):
        weights = torch.zeros(8)
        held.append(weakref.ref(weights))
        try:
            raise MemoryError("too little")
        except MemoryError as error:
            raise RuntimeError("refused") from error

    monkeypatch.setattr(loader, "shard_adapter", cut)
    gc.disable()
    try:
        assert "refused" in Ranks().load("one")
        assert [each() for each in held] == [None] * TP
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"max_ranks": (RANK, RANK - 1)}, "above the server's limit"), ({"unprepared": 1}, "MemoryError: too little")],
)
def test_what_fails_on_one_rank_is_kept_on_none(fault, message):
    ranks = Ranks(**fault)
    assert message in ranks.load("one")
    assert ranks.loaded() == []


def test_pinned_memory_that_one_rank_does_not_get_refuses_the_load():
    ranks = Ranks()
    ranks.loaders[1]._zeros = PinnedMemory(FakeCuda(room=0)).zeros
    answer = ranks.load("one")
    assert "bytes of host memory could not be pinned: out of memory" in answer
    assert "Fix: unload adapters" in answer
    assert ranks.loaded() == []
    ranks.loaders[1]._zeros = PinnedMemory(FakeCuda()).zeros
    assert ranks.load("one") is None


def test_what_was_prepared_is_not_read_again(reads):
    ranks = Ranks()
    for each in ranks.loaders:
        each.preparations.ask(f"{preparing.BEGIN}1", "one", "here")
    assert reads == ["one"] * TP
    assert ranks.load("one") is None
    assert reads == ["one"] * TP


def test_what_hindered_the_preparation_may_be_gone_when_the_load_comes():
    ranks = Ranks()
    assert ranks.load("one") is None
    for each in ranks.loaders:
        # The adapter of this name is put out only now.
        each.preparations.ask(f"{preparing.BEGIN}1", "one", "here")
        each.unload("id of one")
    assert ranks.load("one") is None
    assert ranks.loaded() == ["one"]


def test_tensors_in_memory_are_loaded_alike(reads):
    ranks, path = Ranks(), "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A.weight": torch.ones(RANK, HIDDEN), f"{path}.lora_B.weight": torch.ones(2 * HIDDEN, RANK)}
    fields = config(1) | {"target_modules": ["q_proj"]}
    assert ranks.load("one", load=lambda each, ref: each.load_tensors(ref, tensors, fields)) is None
    assert (ranks.loaded(), reads) == (["one"], [])
    del tensors[f"{path}.lora_B.weight"]
    assert "lora_B" in ranks.load("two", load=lambda each, ref: each.load_tensors(ref, tensors, fields))


def test_a_name_is_loaded_once():
    ranks = Ranks()
    assert ranks.load("one") is None
    assert "lora_name 'one' is already loaded" in ranks.load("one")
    assert ranks.loaded() == ["one"]


def test_a_place_is_left_for_unpinned_adapters():
    ranks = Ranks()
    assert [ranks.load(f"{i}", pinned=True) for i in range(MAX_LORAS - 1)] == [None] * (MAX_LORAS - 1)
    assert f"2 adapters are pinned and --max-loras-per-batch is {MAX_LORAS}" in ranks.load("another", pinned=True)
    assert ranks.load("another") is None


def test_pinned_adapters_leave_room_for_the_largest_other():
    ranks = Ranks(room=1.5)
    assert ranks.load("one") is None
    assert "the largest unpinned one needs" in ranks.load("pinned", pinned=True)
    assert ranks.load("two") is None
    assert "raise --lora-pool-gb" in Ranks(room=0.5).load("large")


def test_pinned_adapters_are_known_from_load_to_unload():
    ranks = Ranks()

    def pinned() -> set[str]:
        everyone = [each.pinned() for each in ranks.loaders]
        assert everyone == everyone[:1] * TP
        return {uid.removeprefix("id of ") for uid in everyone[0]}

    def unload(name: str) -> None:
        for each in ranks.loaders:
            each.unload(f"id of {name}")

    assert pinned() == set()
    for name, is_pinned, known in (
        ("one", True, {"one"}),
        ("two", False, {"one"}),
        ("three", True, {"one", "three"}),
    ):
        assert ranks.load(name, pinned=is_pinned) is None
        assert pinned() == known
    assert ranks.load("refused", pinned=True) is not None
    assert pinned() == {"one", "three"}
    for name, known in (("two", {"one", "three"}), ("never loaded", {"one", "three"}), ("one", {"three"})):
        unload(name)
        assert pinned() == known
    # The same id again.
    assert ranks.load("one") is None
    assert pinned() == {"three"}
    unload("three")
    assert ranks.load("two", pinned=True) is None
    assert pinned() == {"two"}
