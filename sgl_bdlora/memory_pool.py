"""Adapter weights on the device of one rank.

One flat arena of `budget` bytes holds every resident adapter's local pieces and nothing else: an adapter costs exactly what its
shard weighs, whatever the largest rank on the server is. Space is handed out per host layer, so that a large adapter fits into
the gaps that several small ones left (the idea of S-LoRA's unified paging, arXiv 2311.03285, section 5, with a layer's block as
the page). Loading evicts the least recently used adapters that the caller does not protect.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch

from sgl_bdlora.copies import Arrival, Copies
from sgl_bdlora.host_memory import PIECE, pieces
from sgl_bdlora.sharding import AdapterShard, layer_views


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights of a resident adapter, as views of the arena.

    a: (sum of local ranks, inputs / blocks_a). b: per slice, transposed (local rank, outputs / blocks_b). slices: see SliceLayout.
    """

    a: torch.Tensor
    b: list[torch.Tensor]
    slices: tuple


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter whose weights are in the arena; one object per load.

    number: counts loads, the same on every rank. blocks: host layer path -> (offset, numel) in elements of `arena`.
    arrival: the end of the copy, which a stream has to wait for before it reads the weights.
    """

    number: int
    shard: AdapterShard
    blocks: dict[str, tuple[int, int]]
    arrival: Arrival
    arena: torch.Tensor

    @cached_property
    def layers(self) -> dict[str, LayerWeights]:
        """Host layer path -> its weights."""
        layers = {}
        for path, layer in self.shard.layers.items():
            offset, numel = self.blocks[path]
            a, b = layer_views(self.arena[offset : offset + numel], layer)
            layers[path] = LayerWeights(a, b, layer.slices)
        return layers


class PoolFull(RuntimeError):
    """The protected adapters alone leave no room."""


class FreeList:
    """Free ranges of [0, size), by first fit; neighbours merge when freed."""

    def __init__(self, size: int):
        self._holes: list[tuple[int, int]] = [(0, size)] if size else []
        self.free = size

    def take(self, size: int) -> int | None:
        for i, (start, length) in enumerate(self._holes):
            if length >= size:
                if length == size:
                    del self._holes[i]
                else:
                    self._holes[i] = (start + size, length - size)
                self.free -= size
                return start
        return None

    def give(self, start: int, size: int) -> None:
        self.free += size
        i = bisect_left(self._holes, (start, size))
        if i < len(self._holes) and start + size == self._holes[i][0]:
            size += self._holes.pop(i)[1]
        if i and sum(self._holes[i - 1]) == start:
            before = self._holes.pop(i - 1)
            start, size = before[0], before[1] + size
        insort(self._holes, (start, size))


class MemoryPool:
    """Fixed arena of adapter weights on one rank; counts its loads and evictions, and in `changes` whatever comes or goes.

    Args:
        budget: bytes of device memory, all taken at start so that the KV cache is sized around it.
        dtype, device: of the weights, the model's own.
        max_loras_per_batch: adapters that one batch may name, SGLang's `--max-loras-per-batch`; the base model is none of them.
    """

    def __init__(self, budget: int, dtype: torch.dtype, device: torch.device, max_loras_per_batch: int):
        self.arena = torch.empty(budget // dtype.itemsize, dtype=dtype, device=device)
        self.max_loras_per_batch = max_loras_per_batch
        self.copies = Copies(device)
        self._space = FreeList(self.arena.numel())
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        self.loads = 0
        self.evictions = 0
        self.changes = 0

    @property
    def budget(self) -> int:
        """Bytes in all."""
        return self.arena.nbytes

    @property
    def used(self) -> int:
        """Bytes of weights that are resident now."""
        return (self.arena.numel() - self._space.free) * self.arena.itemsize

    @property
    def uid_to_buffer_id(self) -> dict[str, int]:
        """Resident adapters by id; SGLang's metrics count them (metrics_reporter.py:_update_lora_metrics)."""
        return {uid: i for i, uid in enumerate(self._resident)}

    def get(self, uid: str) -> Resident | None:
        return self._resident.get(uid)

    def fits(self, shards: Collection[AdapterShard]) -> bool:
        """Whether these adapters can be resident together."""
        return sum(shard.nbytes for shard in shards) <= self.budget

    def ensure(self, wanted: dict[str, AdapterShard], protected: Collection[str] = ()) -> list[str]:
        """Make every adapter in `wanted` resident, evicting others oldest first. Returns the ids that were loaded.

        `protected` ids are not evicted either. Raises PoolFull, with the pool as it was but for evictions, when there is no room.
        """
        keep = set(wanted) | set(protected)
        for uid in wanted:
            if uid in self._resident:
                self._resident.move_to_end(uid)
        missing = sorted(uid for uid in wanted if uid not in self._resident)
        for uid in missing:
            self._load(uid, wanted[uid], keep)
        return missing

    def remove(self, uid: str) -> bool:
        """Drop an adapter's weights; False if it was not resident."""
        resident = self._resident.pop(uid, None)
        if resident is None:
            return False
        for offset, numel in resident.blocks.values():
            self._space.give(offset, numel)
        self.changes += 1
        return True

    def _load(self, uid: str, shard: AdapterShard, keep: set[str]) -> None:
        blocks = self._place(shard)
        while blocks is None:
            victim = next((other for other in self._resident if other not in keep), None)
            if victim is not None:
                self.remove(victim)
                self.evictions += 1
            elif shard.weights.numel() <= self._space.free:
                self._compact()
            else:
                raise PoolFull(
                    f"LoRA memory pool: no room for adapter {shard.name!r} ({shard.nbytes} bytes on this rank) beside the "
                    f"adapters in use; {self.used} of {self.budget} bytes are taken. Raise --lora-pool-gb."
                )
            blocks = self._place(shard)
        self._install(uid, shard, blocks)

    def _compact(self) -> None:
        """Close all gaps by loading every resident adapter again, one after another, from host memory."""
        residents = {uid: resident.shard for uid, resident in self._resident.items()}
        for uid in residents:
            self.remove(uid)
        for uid, shard in residents.items():
            self._install(uid, shard, self._place(shard))

    def _install(self, uid: str, shard: AdapterShard, blocks: dict[str, tuple[int, int]]) -> None:
        arrival = self.copies.run(lambda: self._copy(shard, blocks))
        self.loads += 1
        self.changes += 1
        self._resident[uid] = Resident(self.loads, shard, blocks, arrival, self.arena)

    def _place(self, shard: AdapterShard) -> dict[str, tuple[int, int]] | None:
        """Offsets for every layer's block: one run if there is one, so that the copy is one too; else wherever blocks fit."""
        total = shard.weights.numel()
        if total > self._space.free:
            return None
        start = self._space.take(total)
        if start is not None:
            return {path: (start + offset, shard.layers[path].numel) for path, offset in shard.offsets.items()}
        blocks: dict[str, tuple[int, int]] = {}
        for path, layer in shard.layers.items():
            offset = self._space.take(layer.numel)
            if offset is None:
                for taken in blocks.values():
                    self._space.give(*taken)
                return None
            blocks[path] = (offset, layer.numel)
        return blocks

    def _copy(self, shard: AdapterShard, blocks: dict[str, tuple[int, int]]) -> None:
        """Copy in as few pieces as the placement and the host memory allow."""
        run_source = run_target = run_length = 0
        for path, source in sorted(shard.offsets.items(), key=lambda item: item[1]):
            target, numel = blocks[path]
            if run_length and target == run_target + run_length:
                run_length += numel
                continue
            self._copy_run(shard, run_source, run_target, run_length)
            run_source, run_target, run_length = source, target, numel
        self._copy_run(shard, run_source, run_target, run_length)

    def _copy_run(self, shard: AdapterShard, source: int, target: int, length: int) -> None:
        for start, stop in pieces(source, source + length, PIECE // shard.weights.itemsize):
            place = target + start - source
            self.arena[place : place + stop - start].copy_(shard.weights[start:stop], non_blocking=True)
