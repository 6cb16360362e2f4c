"""Pinned memory is registered in pieces, copied from piece by piece, and given back once, when nothing reads it any more."""

import ctypes
import gc
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_pool import LAYERS, holds, shard
from torch.utils._python_dispatch import TorchDispatchMode

from sgl_bdlora import host_memory, memory_pool
from sgl_bdlora.copies import Copies
from sgl_bdlora.host_memory import Cuda, PinnedMemory, PinningError, pieces
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard, even_out, layer_sizes

PAGE = mmap.PAGESIZE
PIECE = 2 * PAGE


class FakeCuda:
    """CUDA without a GPU: refuses what CUDA refuses. room: bytes that it registers at most.

    registered: address -> bytes. calls: all of them, in order. done: cleared while copies go on.
    """

    def __init__(self, room: float = float("inf")):
        self.registered: dict[int, int] = {}
        self.calls: list[str] = []
        self.done = threading.Event()
        self.done.set()
        self._room = room

    def register(self, address: int, nbytes: int) -> None:
        assert address % PAGE == nbytes % PAGE == 0
        assert all(address + nbytes <= a or a + n <= address for a, n in self.registered.items())
        if sum(self.registered.values()) + nbytes > self._room:
            raise RuntimeError("out of memory (2)")
        self.calls.append("register")
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        # Ends the process if the memory is unmapped.
        ctypes.string_at(address, self.registered.pop(address))
        self.calls.append("unregister")

    def finish_copies(self) -> None:
        assert self.done.wait(10)
        self.calls.append("finish")


def mapped(address: int) -> bool:
    spans = re.findall(r"^(\w+)-(\w+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in spans)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 100))
def test_pieces_cover_a_span_once_and_end_at_multiples(start, length, size):
    spans = list(pieces(start, start + length, size))
    assert [i for span in spans for i in range(*span)] == list(range(start, start + length))
    assert all(a < b and a // size == (b - 1) // size for a, b in spans)
    assert len(spans) <= length // size + 2


@pytest.mark.parametrize("nbytes", [0, 2, PAGE, PAGE + 2, PIECE, 5 * PIECE, 5 * PIECE + 2])
def test_memory_is_zero_and_registered_once_and_whole(nbytes):
    cuda = FakeCuda()
    weights = PinnedMemory(cuda, PIECE, 0).zeros(nbytes // 2, torch.bfloat16)
    assert (weights.shape, weights.dtype, weights.is_contiguous()) == ((nbytes // 2,), torch.bfloat16, True)
    assert not weights.any()
    sizes = list(cuda.registered.values())
    pages = max(PAGE, -(-nbytes // PAGE) * PAGE)
    assert sizes == [stop - start for start, stop in pieces(0, pages, PIECE)]
    start = min(cuda.registered)
    assert list(cuda.registered) == [start + i * PIECE for i in range(len(sizes))]
    assert nbytes == 0 or weights.data_ptr() == start


def test_it_rests_between_pieces_beside_the_main_thread_only():
    took = []

    def take():
        begin = time.perf_counter()
        PinnedMemory(FakeCuda(), PIECE, 0.1).zeros(2 * PIECE, torch.uint8)
        took.append(time.perf_counter() - begin)

    take()
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert took[0] < 0.1 < 0.2 <= took[1]


def test_it_is_given_back_after_its_last_view_and_its_copies_and_then_unmapped():
    cuda = FakeCuda()
    memory = PinnedMemory(cuda, PIECE, 0)
    weights = memory.zeros(3 * PIECE, torch.uint8)
    address = weights.data_ptr()
    view = weights[5:9].view(2, 2)
    cuda.done.clear()
    del weights
    memory.drain()
    assert cuda.calls == ["register"] * 3
    del view
    time.sleep(0.05)
    assert cuda.calls == ["register"] * 3
    assert mapped(address)
    cuda.done.set()
    memory.drain()
    assert cuda.calls == ["register"] * 3 + ["finish"] + ["unregister"] * 3
    assert not mapped(address)


def test_memory_in_a_cycle_and_of_several_threads_is_given_back():
    cuda = FakeCuda()
    memory = PinnedMemory(cuda, PIECE, 0)

    def take_and_drop():
        for _ in range(20):
            weights = memory.zeros(PIECE + 1, torch.uint8)
            cycle = [weights]
            cycle.append(cycle)

    threads = [threading.Thread(target=take_and_drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    memory.drain()
    assert not cuda.registered
    assert cuda.calls.count("finish") == 80
    assert cuda.calls.count("register") == cuda.calls.count("unregister") == 160


def test_what_fails_half_way_is_undone_and_said():
    cuda = FakeCuda(room=2.5 * PIECE)
    memory = PinnedMemory(cuda, PIECE, 0)
    with pytest.raises(PinningError, match=rf"^{4 * PIECE} bytes of host memory could not be pinned: out of memory"):
        memory.zeros(4 * PIECE, torch.uint8)
    assert cuda.calls == ["register", "register", "unregister", "unregister"]
    with pytest.raises(PinningError, match="Cannot allocate memory"):
        memory.zeros(2**62, torch.uint8)
    memory.drain()
    assert not cuda.registered
    assert len(memory.zeros(2 * PIECE, torch.uint8)) == 2 * PIECE


def test_memory_is_given_back_after_a_failure_of_cuda(caplog):
    cuda = FakeCuda()
    memory = PinnedMemory(cuda, PIECE, 0)
    weights = memory.zeros(1, torch.uint8)
    cuda.registered.clear()
    del weights
    memory.drain()
    assert "was not given back" in caplog.text
    weights = memory.zeros(1, torch.uint8)
    del weights
    memory.drain()
    assert not cuda.registered


def test_memory_that_cuda_may_still_know_stays_mapped(caplog):
    """Another mapping at its addresses could not be registered."""
    cuda = FakeCuda()
    memory = PinnedMemory(cuda, PIECE, 0)
    weights = memory.zeros(PIECE, torch.int8)
    address = weights.data_ptr()
    finish, cuda.finish_copies = cuda.finish_copies, lambda: 1 / 0
    del weights
    memory.drain()
    cuda.finish_copies = finish
    assert cuda.registered
    assert mapped(address)
    assert "was not given back" in caplog.text


def test_a_child_process_does_not_have_the_memory():
    """Else the parent's next write would go to a copy of the page, and the device read the old one."""
    weights = PinnedMemory(FakeCuda(), PIECE, 0).zeros(PIECE, torch.int8)
    child = os.fork()
    if child == 0:
        os._exit(mapped(weights.data_ptr()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_ends_with_memory_taken_and_on_its_way_back():
    program = """
import atexit, torch
from test_host_memory import PIECE, FakeCuda, PinnedMemory
cuda = FakeCuda()
atexit.register(lambda: print(cuda.calls.count("unregister")))
memory = PinnedMemory(cuda, PIECE, 0.01)
kept, dropped = memory.zeros(PIECE, torch.uint8), memory.zeros(10 * PIECE, torch.uint8)
del dropped
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "10\n", "")


class CopiedSpans(TorchDispatchMode):
    """Source addresses of the copies."""

    def __init__(self):
        super().__init__()
        self.spans: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.spans.append((args[1].data_ptr(), args[1].data_ptr() + args[1].nbytes))
        return func(*args, **(kwargs or {}))


def pinned(source: AdapterShard, memory: PinnedMemory) -> AdapterShard:
    weights = memory.zeros(source.weights.numel(), source.weights.dtype).copy_(source.weights)
    return AdapterShard(source.name, source.kind, source.rank, 1, source.layers, source.offsets, weights)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_no_copy_spans_two_registrations(ranks, rng):
    cuda = FakeCuda()
    memory = PinnedMemory(cuda, PIECE, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_pool, "PIECE", PIECE)
        shards = {f"{i}": pinned(shard(f"{i}-{rank}", rank), memory) for i, rank in enumerate(ranks)}
        pool = MemoryPool(sum(s.nbytes for s in shards.values()), torch.float32, torch.device("cpu"), 8)
        for _ in range(8):
            with CopiedSpans() as copied:
                loaded = pool.ensure({uid: shards[uid] for uid in rng.sample(sorted(shards), min(3, len(shards)))})
            ends = [(a, a + n) for a, n in cuda.registered.items()]
            assert all(any(a <= start and stop <= b for a, b in ends) for start, stop in copied.spans)
            # A run is cut once a piece.
            assert len(copied.spans) <= sum(LAYERS + -(-shards[uid].nbytes // PIECE) for uid in pool._resident)
            assert all(holds(pool, uid, shards[uid]) for uid in loaded)
            pool.remove(rng.choice(sorted(shards)))
        pool.ensure(shards)
        assert all(holds(pool, uid, shards[uid]) for uid in shards)


def test_weights_that_grow_take_new_memory_and_give_the_old_one_back():
    cuda = FakeCuda()
    memory = PinnedMemory(cuda, PIECE, 0)
    shards = [pinned(shard("one", 4), memory)]
    grown = even_out(shards[0], [layer_sizes(shards[0]), layer_sizes(shard("one", 8))], memory.zeros)
    shards.clear()
    memory.drain()
    assert next(iter(cuda.registered)) == grown.weights.data_ptr()
    assert sum(cuda.registered.values()) == -(-grown.nbytes // PAGE) * PAGE


class Recorded(Cuda):
    """Keeps the addresses that are registered."""

    def __init__(self, *args):
        super().__init__(*args)
        self.registered: set[int] = set()

    def register(self, address: int, nbytes: int) -> None:
        super().register(address, nbytes)
        self.registered.add(address)

    def unregister(self, address: int) -> None:
        super().unregister(address)
        self.registered.remove(address)


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.device_count() - 1)

    @pytest.mark.parametrize("busy", [False, True])
    def test_an_adapter_is_copied_and_its_memory_given_back(self, device, monkeypatch, busy):
        """busy: dropped while its copy still waits for the batch."""
        monkeypatch.setattr(memory_pool, "PIECE", PIECE)
        pool = MemoryPool(2**26, torch.float32, device, 8)
        cuda = Recorded(device, pool.copies)
        memory = PinnedMemory(cuda, PIECE, 0)
        source = shard("one", 1024)
        one = pinned(source, memory)
        assert one.weights.is_pinned()
        assert len(cuda.registered) == one.nbytes // PIECE > 3
        with torch.cuda.device(device):
            if busy:
                pool.copies.read_by_current_stream()
                torch.cuda._sleep(10**9)
            begin = time.perf_counter()
            pool.ensure({"one": one})
            assert not busy or time.perf_counter() - begin < 0.1
            place, _ = pool.get("one").blocks["layers.0"]
            pool.remove("one")
            del one
            memory.drain()
            torch.cuda.synchronize()
        assert not cuda.registered
        assert torch.equal(pool.arena[place : place + source.weights.numel()].cpu(), source.weights)

    def test_pieces_of_the_real_size(self, device):
        pool = MemoryPool(2**27, torch.bfloat16, device, 8)
        memory = PinnedMemory(Cuda(device, pool.copies))
        numel = (2 * host_memory.PIECE + 6 * PAGE + 10) // 2
        one = AdapterShard("one", "plain", 1, 1, {}, {}, memory.zeros(numel, torch.bfloat16))
        one.weights.view(torch.int16).random_()
        pool.copies.run(lambda: pool._copy_run(one, 3, 7, numel - 3))
        pool.copies.finish()
        assert torch.equal(pool.arena[7 : 7 + numel - 3].view(torch.int16).cpu(), one.weights[3:].view(torch.int16))

    def test_a_refused_registration_harms_no_later_launch(self, device):
        cuda = Cuda(device, Copies(device))
        memory = PinnedMemory(cuda)
        weights = memory.zeros(PAGE, torch.uint8)
        with pytest.raises(RuntimeError, match="already"):
            cuda.register(weights.data_ptr(), PAGE)
        assert (torch.ones(8, device=device) + 1).sum().item() == 16
        with pytest.raises(RuntimeError):
            cuda.unregister(weights.data_ptr() + PAGE)
        assert (torch.ones(8, device=device) + 1).sum().item() == 16

    def test_no_context_comes_up_on_another_device(self, device):
        program = """
import torch
from sgl_bdlora.copies import Copies
from sgl_bdlora.host_memory import Cuda, PinnedMemory
device = torch.device("cuda", torch.cuda.device_count() - 1)
memory = PinnedMemory(Cuda(device, Copies(device)))
kept, dropped = memory.zeros(2**26, torch.uint8), memory.zeros(2**26, torch.uint8)
memory.drain()
del dropped
memory.drain()
print([i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)] == [device.index])
dropped = memory.zeros(2**26, torch.uint8)
del dropped
"""
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
