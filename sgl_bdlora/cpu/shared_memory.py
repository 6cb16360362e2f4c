"""All-reduce between ranks of one machine through shared memory.

Gloo moves even a few kilobytes through TCP sockets and several threads a rank; a decode step has two all-reduces a
layer, and with more ranks than cores each thread switch waits its turn: most of a step of SmolLM2-135M with 3 ranks
on 2 cores. SGLang has a shared-memory all-reduce in its CPU kernels; this is the same idea in Python with futexes.

Each rank has one counter and two slots, used in turn. A rank writes its tensor into its slot, advances its counter,
waits until every counter has reached its own, and sums all slots in rank order, so all ranks get the same bits. It
can reuse a slot two operations later without asking: having finished the operation between, it knows that all ranks
have read the slot.
"""

import ctypes
import mmap
import os
import platform
import tempfile

import torch
import torch.distributed as dist

SLOT_BYTES = 1 << 20
COUNTER_BYTES = 64  # one cache line each
# Linux on x86-64 only: its stores become visible in order, which the counters rely on.
SUPPORTED = platform.system() == "Linux" and platform.machine() == "x86_64"
SYS_FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 0, 1
YIELDS = 20


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


_libc = ctypes.CDLL(None)
_SECOND = _Timespec(1, 0)


class SharedMemoryGroup:
    """The shared memory of one group of ranks.

    path: a file of `SharedMemoryGroup.size(world_size)` zero bytes that every rank of the group opens.
    """

    def __init__(self, path: str, rank: int, world_size: int):
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.size(world_size))
        self._rank, self._world_size, self._count = rank, world_size, 0
        self._counters = [ctypes.c_uint32.from_buffer(self._memory, r * COUNTER_BYTES) for r in range(world_size)]
        data = torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._header(world_size))
        self._slots = data.view(2, world_size, SLOT_BYTES)

    @staticmethod
    def _header(world_size: int) -> int:
        return -(-world_size * COUNTER_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE

    @classmethod
    def size(cls, world_size: int) -> int:
        return cls._header(world_size) + 2 * world_size * SLOT_BYTES

    def fits(self, tensor: torch.Tensor) -> bool:
        return tensor.is_contiguous() and 0 < tensor.nbytes <= SLOT_BYTES

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum *tensor* over the ranks, in place. Shapes: any, contiguous, at most SLOT_BYTES; equal on all ranks."""
        self._count = (self._count + 1) & 0xFFFFFFFF
        slots = self._slots[self._count & 1, :, : tensor.nbytes].view(tensor.dtype)
        flat = tensor.view(-1)
        slots[self._rank].copy_(flat)
        self._advance()
        torch.sum(slots, 0, out=flat)
        return tensor

    def _advance(self) -> None:
        """Say that this rank's slot is written, and wait until all are."""
        mine = self._counters[self._rank]
        behind = (self._count - 1) & 0xFFFFFFFF
        mine.value = self._count
        _libc.syscall(SYS_FUTEX, ctypes.byref(mine), FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)
        for counter in self._counters:
            yields = 0
            # A rank is one operation behind or has arrived: nobody gets two ahead.
            while counter.value == behind:
                if yields < YIELDS:
                    yields += 1
                    os.sched_yield()
                else:
                    # Returns at once if the counter has moved; the time limit lets signals be handled.
                    _libc.syscall(SYS_FUTEX, ctypes.byref(counter), FUTEX_WAIT, behind, ctypes.byref(_SECOND), None, 0)


def connect(cpu_group: dist.ProcessGroup) -> SharedMemoryGroup | None:
    """Set up shared memory among the ranks of *cpu_group* (a collective call); None, on all of them, if one cannot."""
    rank, world_size = cpu_group.rank(), cpu_group.size()
    path = [None]
    if rank == 0 and SUPPORTED:
        file, path[0] = tempfile.mkstemp(prefix="sgl_bdlora.", dir="/dev/shm")
        os.truncate(file, SharedMemoryGroup.size(world_size))
        os.close(file)
    dist.broadcast_object_list(path, group=cpu_group, group_src=0)
    group = None
    if path[0] is not None and os.path.exists(path[0]):
        group = SharedMemoryGroup(path[0], rank, world_size)
    connected = [None] * world_size
    dist.all_gather_object(connected, group is not None, group=cpu_group)
    if rank == 0 and path[0] is not None:
        os.unlink(path[0])
    return group if all(connected) else None


_groups: dict[str, SharedMemoryGroup | None] = {}


def around_all_reduce(original, coordinator, tensor):
    """Hook of GroupCoordinator.all_reduce (sglang/srt/distributed/parallel_state.py)."""
    if coordinator.world_size == 1 or not tensor.is_cpu:
        return original(coordinator, tensor)
    name = coordinator.unique_name
    if name not in _groups:
        _groups[name] = connect(coordinator.cpu_group)
    group = _groups[name]
    if group is None or not group.fits(tensor):
        return original(coordinator, tensor)
    return group.all_reduce(tensor)
