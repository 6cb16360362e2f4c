"""The adapters that one rank has loaded, and how they come and go: on every rank, or on none.

Each rank reads the adapter and cuts its own pieces. The ranks tell each other what went wrong and how large the pieces are, make them
equally large, and tell each other again whether they have room. The first error, in order of rank, is every rank's answer; nothing is
kept before that. loading.py is the launcher's part of a load, preparing.py what is done of it beside the batches.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sgl_bdlora import config
from sgl_bdlora.adapters import Adapter, AdapterError, adapter_from_tensors, read_adapter
from sgl_bdlora.adapters.check import check_rank
from sgl_bdlora.adapters.root import confined
from sgl_bdlora.host_memory import Cuda, PinnedMemory, PinningError
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.preparing import Preparations
from sgl_bdlora.sharding import AdapterShard, HostModel, Sharding, even_out, layer_sizes, shard_adapter

if TYPE_CHECKING:
    from sglang.srt.lora.lora_registry import LoRARef

logger = logging.getLogger(__name__)


class Kernels(Protocol):
    """What the kernels have to do with a load."""

    def prepare(self, shard: AdapterShard) -> Any: ...

    def agree(self, shard: AdapterShard, everyone: Sequence[Any]) -> None: ...


class AdapterLoader:
    """Keeps this rank's shards in host memory. Loads are collective calls: every rank makes the same ones in the same order.

    Args:
        pool: what the adapters have to fit into; shards are of its dtype, and pinned where it is on a GPU.
        host: the model's layers that take LoRA. sharding: of plain adapters. max_rank: of any module.
        kernels: `prepare` works out what they need for a shard, `agree` is given what every rank's returned. all_ranks: gives every rank's
        argument, in order of rank.

    Attributes:
        shards, refs: by adapter id, in the order of the loads.
        preparations: what the launcher asked for ahead of loads (preparing.py).
    """

    def __init__(
        self,
        pool: MemoryPool,
        host: HostModel,
        sharding: Sharding,
        max_rank: int,
        kernels: Kernels,
        all_ranks: Callable[[Any], list],
    ):
        self._pool, self._host, self._sharding, self._max_rank = pool, host, sharding, max_rank
        self._kernels, self._all_ranks = kernels, all_ranks
        self._memory = PinnedMemory(Cuda(pool.arena.device, pool.copies)) if pool.arena.is_cuda else None
        self._zeros = self._memory.zeros if self._memory else torch.zeros
        self.shards: dict[str, AdapterShard] = {}
        self.refs: dict[str, LoRARef] = {}
        self._pinned: frozenset[str] = frozenset()
        self.preparations = Preparations(self._read, self._cut)

    def load(self, ref: LoRARef) -> str | None:
        """Load the adapter in the directory ref.lora_path. Returns what is wrong, on whichever rank; None when all have it."""
        prepared = self.preparations.take(ref.lora_name, ref.lora_path)
        # What stood in the way of reading it ahead may be gone: an adapter of its name that was still loaded, or its files.
        if prepared is None or prepared.adapter is None:
            return self._load(ref, lambda: self._read(ref.lora_name, ref.lora_path), self._cut)
        return self._load(ref, lambda: prepared.adapter, lambda _: prepared.shard.result())

    def load_tensors(
        self, ref: LoRARef, tensors: Mapping[str, torch.Tensor], config_dict: Mapping[str, Any]
    ) -> str | None:
        """The same for tensors in memory. config_dict: the content of adapter_config.json."""
        return self._load(ref, lambda: adapter_from_tensors(ref.lora_name, tensors, config_dict), self._cut)

    def unload(self, uid: str) -> bool:
        """Forget an adapter, in the pool too; False if it is not loaded."""
        if uid not in self.refs:
            return False
        self._pool.remove(uid)
        del self.shards[uid], self.refs[uid]
        self._pinned -= {uid}
        return True

    def settle(self) -> None:
        """Returns when the host memory of everything that was let go has been given back."""
        if self._memory is not None:
            self._memory.drain()

    def pinned(self) -> frozenset[str]:
        """The ids of the adapters that never leave the pool; asked in every step."""
        return self._pinned

    def _load(self, ref: LoRARef, read: Callable[[], Adapter], cut: Callable[[Adapter], AdapterShard]) -> str | None:
        shard, error = None, None
        try:
            self._check_name(ref.lora_name)
            self._check_pinned(ref)
            adapter = read()
            shard = cut(adapter)
            adapter.check_unchanged()
        except Exception as failure:
            error = _why(ref.lora_name, failure)
            _let_go(failure)
        errors, sizes = zip(*self._all_ranks((error, layer_sizes(shard) if shard else {})), strict=True)
        error = _first(errors)
        if error is not None:
            return error
        needs = None
        try:
            shard = even_out(shard, sizes, self._zeros)
            self._check_bytes(shard, bool(ref.pinned))
            needs = self._kernels.prepare(shard)
        except Exception as failure:
            error = _why(ref.lora_name, failure)
            _let_go(failure)
        # Memory can be too little on one rank alone.
        errors, needs = zip(*self._all_ranks((error, needs)), strict=True)
        error = _first(errors)
        if error is not None:
            return error
        self._kernels.agree(shard, needs)
        self.shards[ref.lora_id], self.refs[ref.lora_id] = shard, ref
        if ref.pinned:
            self._pinned |= {ref.lora_id}
        return None

    def _read(self, name: str, path: str) -> Adapter:
        """Open the adapter and check what needs neither its values nor the base model."""
        self._check_name(name)
        return read_adapter(confined(name, path, config.options().adapter_root), name)

    def _cut(self, adapter: Adapter) -> AdapterShard:
        """This rank's pieces, in any thread."""
        check_rank(adapter, self._max_rank)
        return shard_adapter(adapter, self._host, self._pool.arena.dtype, self._sharding, self._zeros)

    def _check_name(self, name: str) -> None:
        if any(ref.lora_name == name for ref in self.refs.values()):
            raise AdapterError(name, f"lora_name {name!r} is already loaded", "unload that first, or use another name")

    def _check_pinned(self, ref: LoRARef) -> None:
        pinned, most = len(self.pinned()), self._pool.max_loras_per_batch
        if ref.pinned and pinned >= most - 1:
            raise AdapterError(
                ref.lora_name,
                f"pinned = True, but {pinned} adapters are pinned and --max-loras-per-batch is {most}, which has to leave a place "
                "for others",
                "load it unpinned, or raise --max-loras-per-batch",
            )

    def _check_bytes(self, shard: AdapterShard, pinned: bool) -> None:
        """Refuse what could never become resident, or would keep another adapter from it: its requests would wait for ever."""
        pinned_ids = self.pinned()
        fixed = sum(self.shards[uid].nbytes for uid in pinned_ids)
        unpinned = max((other.nbytes for uid, other in self.shards.items() if uid not in pinned_ids), default=0)
        if fixed + shard.nbytes + (unpinned if pinned else 0) <= self._pool.budget:
            return
        raise AdapterError(
            shard.name,
            f"its weights take {shard.nbytes} bytes on a rank; the LoRA memory pool has {self._pool.budget}, of which pinned "
            f"adapters keep {fixed}" + (f", and the largest unpinned one needs {unpinned}" if pinned else ""),
            "raise --lora-pool-gb, or pin fewer adapters",
        )


def _first(errors: Iterable[str | None]) -> str | None:
    return next((error for error in errors if error is not None), None)


def _let_go(failure: BaseException | None) -> None:
    """Drop what the frames of an exception hold, which would keep an adapter's memory until the next garbage collection."""
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__


def _why(name: str, failure: Exception) -> str:
    """What to answer when adapter `name` cannot be loaded."""
    if isinstance(failure, AdapterError):
        return str(failure)
    logger.error("sgl-bdlora: loading adapter %r failed", name, exc_info=failure)
    if isinstance(failure, PinningError):
        return str(
            AdapterError(
                name,
                str(failure),
                "unload adapters or lower --max-loaded-loras, or give the machine or the container more memory",
            )
        )
    if isinstance(failure, OSError) and failure.filename is not None:
        return str(
            AdapterError(
                name, f"{failure.filename}: {failure.strerror}", "check the disk, and load it when it is whole"
            )
        )
    return f"LoRA adapter {name!r}: {type(failure).__name__}: {failure}"
