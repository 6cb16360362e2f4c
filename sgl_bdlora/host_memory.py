"""Pinned host memory that is taken and given back beside running batches.

A GPU copies beside its other work only from pages that CUDA knows to stay in place. PyTorch takes such memory with one call, for which
every launch of the process waits: 419 ms for 671 MB on an H200. Ordinary memory that is registered with CUDA by pieces, with a rest after
each, holds launches up for 6 ms at most (docs/performance.md, `python -m benchmarks.pinning`), and takes the bytes that were asked
for, where PyTorch rounds up to a power of two. It is the system's again once its last tensor is gone: nothing is kept for the next load.
"""

import atexit
import contextlib
import ctypes
import logging
import mmap
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue

import torch

from sgl_bdlora.copies import Copies

logger = logging.getLogger(__name__)

# Without rests a piece follows the other, where its pages are at hand: with pieces of 4 MiB launches waited for 16 ms.
PIECE = 2**24
REST_S = 0.002
_PAGE = mmap.PAGESIZE


class PinningError(RuntimeError):
    """Pinned memory that the system or CUDA refused."""

    def __init__(self, nbytes: int, cause: Exception):
        super().__init__(f"{nbytes} bytes of host memory could not be pinned: {cause}")


def pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at the multiples of `size`."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end


class Cuda:
    """What pinned memory asks of CUDA, in any thread. Errors are RuntimeErrors.

    copies: of one device, the only ones that read the memory.
    """

    def __init__(self, device: torch.device, copies: Copies):
        self._device, self._copies = device, copies

    def register(self, address: int, nbytes: int) -> None:
        self._check(lambda runtime: runtime.cudaHostRegister(address, nbytes, 0))

    def unregister(self, address: int) -> None:
        self._check(lambda runtime: runtime.cudaHostUnregister(address))

    def finish_copies(self) -> None:
        """Returns when all copies that were queued before are done."""
        self._copies.finish()

    def _check(self, call: Callable) -> None:
        # Without its device a thread would make a context on the first one.
        with torch.cuda.device(self._device):
            error = int(call(torch.cuda.cudart()))
            if error:
                # CUDA names it again where this thread asks after its next launch, which would be a batch's.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=self._device)
                raise torch.cuda.CudaError(error)


class PinnedMemory:
    """Gives tensors of pinned memory. Lives as long as the process, with a thread that gives their memory back.

    cuda: see Cuda. piece: bytes registered at once, a multiple of the page size. rest: seconds between pieces.
    """

    def __init__(self, cuda: Cuda, piece: int = PIECE, rest: float = REST_S):
        self._cuda, self._piece, self._rest = cuda, piece, rest
        # Finalizers put into it, which may run at any point of a thread, within another put as well: SimpleQueue is made for that.
        self._returns: SimpleQueue[Callable[[], object]] = SimpleQueue()
        # What CUDA may still know: unmapped, its addresses could be given out again.
        self._kept: list[object] = []
        self._thread = threading.Thread(target=self._run, name="bdlora-unpin", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor at the start of memory of its own, which lives as long as any view of it.

        One copy to a device must not cross a multiple of `piece` bytes: CUDA refuses those that span two registrations.
        Raises PinningError, with nothing taken.
        """
        nbytes = max(1, -(-numel * dtype.itemsize // _PAGE)) * _PAGE
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # After a fork, a write would go to a copy of the page, and the device read the old one.
            memory.madvise(mmap.MADV_DONTFORK)
            owner = (ctypes.c_char * nbytes).from_buffer(memory)
            self._pin(torch.frombuffer(owner, dtype=torch.uint8))
        except (OSError, RuntimeError) as error:
            raise PinningError(nbytes, error) from error
        address = ctypes.addressof(owner)
        # What is left when the process ends, the system takes.
        weakref.finalize(owner, self._returns.put, partial(self._give_back, address, memory)).atexit = False
        return torch.frombuffer(owner, dtype=dtype)[:numel]

    def drain(self) -> None:
        """Returns when all memory whose tensors are gone has been given back."""
        done = threading.Event()
        self._returns.put(done.set)
        done.wait()

    def _pin(self, pages: torch.Tensor) -> None:
        registered = []
        try:
            for start, stop in pieces(0, len(pages), self._piece):
                # The first write to a page is what takes it: half of the time, in which nobody waits.
                pages[start:stop:_PAGE].zero_()
                self._cuda.register(pages.data_ptr() + start, stop - start)
                registered.append(pages.data_ptr() + start)
                # The main thread runs the batches, so that none runs beside what it does itself.
                if threading.current_thread() is not threading.main_thread():
                    time.sleep(self._rest)
        except BaseException:
            for address in registered:
                try:
                    self._cuda.unregister(address)
                except RuntimeError:
                    self._kept.append(pages)
            raise

    def _give_back(self, address: int, memory: mmap.mmap) -> None:
        """Everything but the empty mapping, which goes with `memory`."""
        self._cuda.finish_copies()
        for start, stop in pieces(0, len(memory), self._piece):
            self._cuda.unregister(address + start)
            memory.madvise(mmap.MADV_DONTNEED, start, stop - start)
            time.sleep(self._rest)

    def _run(self) -> None:
        while True:
            give_back = self._returns.get()
            try:
                give_back()
            except Exception:
                self._kept.append(give_back)
                logger.exception("sgl-bdlora: pinned host memory was not given back")
            del give_back

    def _end(self) -> None:
        # CUDA must not be left while it is in a call; but copies behind a batch whose peer has died never end.
        self._returns.put(sys.exit)
        self._thread.join(10)
