"""Decode steps on a GPU: the batch as the Triton kernels read it, in buffers that a CUDA graph can replay from, and the launches.

Only local pieces in linear layers; batches with other pieces take torch_ops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton

from sgl_bdlora.kernels.fused import TAGS, expand_kernel, linear_kernel, shrink_kernel
from sgl_bdlora.kernels.rows import (
    SLICES,
    LayerIndex,
    NoRankRows,
    RankRows,
    block_starts,
    most_rows,
    rank_rows,
    table_of,
)
from sgl_bdlora.memory_pool import Resident
from sgl_bdlora.sharding import AdapterShard, HostLayer

# Rank rows that a batch may have in one slice of a layer; a multiple of ROWS.
LIMIT = 2048
# Rows of one tile of the kernels; the number of rank rows is rounded up to it.
ROWS = 64
SHRINK_ROWS = 16
# Two halves of K: beside a base product of 7 us and more, one H200, 48 rank rows, 8 tokens: 3 us instead of 5.
SPLITS = 2
# Up to here the base product is bound by its weights' bytes, and one tile holds all rows of the batch.
FUSED_TOKENS = 64
# Programs a slice's rank rows are shared by.
SHRINK_PROGRAMS = 16


@dataclass(frozen=True)
class Plan:
    """Tile sizes of one layer. ends: where the outputs of its first two slices end."""

    slices: int
    ends: tuple[int, int]
    inputs: int
    outputs: int
    block_n: int
    block_k: int
    shrink_k: int


def plan_for(host: HostLayer) -> Plan | None:
    """Tile sizes for a layer, None if its shapes do not divide into tiles.

    Swept on one H200, 2026-11-22, Llama-3.1-8B shapes at TP 2, 1 to 32 tokens: wide outputs 64 x 128, others 32 x 256, 4 stages, 4 warps.
    """
    inputs = len(host.slices[0].inputs)
    ends = [s.y_start + len(s.outputs) for s in host.slices]
    if len(ends) > SLICES:
        return None
    block_n, block_k = (64, 128) if ends[-1] >= 8192 else (32, 256)
    block_n = _divisor(block_n, *ends)
    block_k = _divisor(block_k, inputs)
    shrink_k = _divisor(128, inputs // SPLITS) if inputs % SPLITS == 0 else 0
    if min(block_n, block_k, shrink_k) < 16:
        return None
    return Plan(len(ends), (ends[0], ends[min(1, len(ends) - 1)]), inputs, ends[-1], block_n, block_k, shrink_k)


def _divisor(block: int, *sizes: int) -> int:
    while block > 1 and any(size % block for size in sizes):
        block //= 2
    return block


class Decode:
    """The current batch of one rank, and its kernels.

    Args:
        arena: the pool's weights. hosts: the model's linear layers, in the order of the forward pass. max_tokens: rows of the largest
        batch that a graph replays. What graphs read keeps its address for the life of the server.
    """

    def __init__(self, arena: torch.Tensor, hosts: Sequence[HostLayer], max_tokens: int):
        self._hosts = hosts
        self.plans = {host.path: plan_for(host) for host in hosts}
        self.index = LayerIndex([host for host in hosts if self.plans[host.path]])
        self.max_tokens = max(max_tokens, FUSED_TOKENS)
        self._arena = arena
        device = arena.device
        self._table = torch.from_numpy(table_of([], len(self.index), LIMIT)).to(device)
        # First tag less one, number of rank rows, owner of every row.
        self._static_meta = torch.zeros(2 + self.max_tokens, dtype=torch.int32, device=device)
        self._meta = self._static_meta
        words = max(2 * FUSED_TOKENS, _padded(self.max_tokens)) * SPLITS * SLICES * LIMIT
        self._static_h = torch.zeros(words, dtype=torch.int32, device=device)
        self._rows: WeakKeyDictionary[AdapterShard, RankRows | None] = WeakKeyDictionary()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._forked = False
        self._last_adapters: tuple[Resident, ...] | None = None
        self._last_owners = np.empty(0, dtype=np.int32)
        self._first_tag = 0
        self._used = 0
        self._capturing = False

    def resized(self, max_tokens: int) -> "Decode":
        """The same with room for graphs of max_tokens rows."""
        other = Decode(self._arena, self._hosts, max_tokens)
        other._rows = self._rows
        return other

    def rows(self, shard: AdapterShard) -> RankRows | None:
        """The adapter's rank rows; None if it is not all rank rows of these layers."""
        if shard not in self._rows:
            try:
                self._rows[shard] = rank_rows(shard, self.index)
            except NoRankRows:
                self._rows[shard] = None
        return self._rows[shard]

    def takes(self, adapters: Sequence[Resident]) -> bool:
        """Whether the kernels can serve a batch of these adapters."""
        rows = [self.rows(adapter.shard) for adapter in adapters]
        return None not in rows and most_rows(rows) <= LIMIT

    def set_batch(self, adapters: Sequence[Resident], owners: np.ndarray, capturing: bool = False) -> None:
        """The rows of the next forward pass.

        adapters: distinct, `takes` is true for them. owners: (rows,) int32, each row's adapter as its place among them, -1 for the base
        model. capturing: the launches are being recorded.
        """
        device = self._arena.device
        adapters = tuple(adapters)
        self._capturing = capturing
        if adapters != self._last_adapters:
            rows = [self.rows(adapter.shard) for adapter in adapters]
            self._used = most_rows(rows)
            width = _padded(max(self._used, 1))
            blocks = [block_starts(adapter.blocks, self.index) for adapter in adapters]
            table = torch.from_numpy(table_of(list(zip(rows, blocks, strict=True)), len(self.index), width))
            self._table[..., :width].copy_(_staged(table, device), non_blocking=True)
        if adapters != self._last_adapters or not np.array_equal(owners, self._last_owners):
            # A word of h may not have been written for long, so that its tag has come round again.
            self._static_h[: 2 * FUSED_TOKENS * SPLITS * SLICES * LIMIT].zero_()
        self._last_adapters, self._last_owners = adapters, owners
        # Distinct tags for all launches of this step and the last.
        self._first_tag = (self._first_tag + len(self.index)) % TAGS
        meta = np.full(2 + max(len(owners), self.max_tokens), -1, dtype=np.int32)
        meta[:2] = self._first_tag, self._used
        meta[2 : 2 + len(owners)] = owners
        staged = _staged(torch.from_numpy(meta), device)
        if len(owners) <= self.max_tokens:
            self._static_meta.copy_(staged, non_blocking=True)
            self._meta = self._static_meta
        else:
            self._meta = staged.to(device, non_blocking=True)

    def fuses(self, path: str, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> bool:
        """Whether `linear` can compute the layer."""
        plan = self.plans[path]
        return (
            plan is not None
            and len(x_TK) <= FUSED_TOKENS
            and weight_NK.shape == (plan.outputs, plan.inputs)
            and weight_NK.dtype == x_TK.dtype
            and weight_NK.is_contiguous()
        )

    def linear(self, x_TK: torch.Tensor, w_NK: torch.Tensor, bias_N: torch.Tensor | None, path: str) -> torch.Tensor:
        """x W^T + bias with the batch's updates added; the shrink runs on a second stream beside the product."""
        plan, layer = self.plans[path], self.index.number[path]
        tokens = len(x_TK)
        block_t = max(16, triton.next_power_of_2(tokens))
        # Two layers in turn: the shrink of one may start before the last tile of the other has read its h.
        h = self._static_h[layer % 2 * FUSED_TOKENS * SPLITS * SLICES * LIMIT :]
        if self._side is None:
            self._shrink(x_TK, h, LIMIT, plan, layer, block_t, tagged=True)
        else:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._shrink(x_TK, h, LIMIT, plan, layer, block_t, tagged=True)
            self._forked = True
        y_TN = x_TK.new_empty(tokens, plan.outputs)
        linear_kernel[(plan.outputs // plan.block_n,)](
            x_TK,
            w_NK,
            w_NK if bias_N is None else bias_N,
            y_TN,
            self._arena,
            self._table[layer],
            self._meta,
            self._meta[2:],
            h,
            layer,
            tokens,
            plan.outputs,
            plan.inputs,
            *plan.ends,
            LIMIT=LIMIT,
            SLICES=SLICES,
            SPLITS=SPLITS,
            BT=block_t,
            BN=plan.block_n,
            BK=plan.block_k if block_t <= 32 else min(plan.block_k, 128),
            BR=ROWS,
            BKR=min(plan.shrink_k, 64),
            BIAS=bias_N is not None,
            num_warps=4,
            num_stages=4,
        )
        if layer == len(self.index) - 1:
            self._join()
        return y_TN

    def _join(self) -> None:
        """Let what follows wait for the second stream, which is long done; a graph may not end with an open branch."""
        if self._forked:
            torch.cuda.current_stream().wait_stream(self._side)
            self._forked = False

    def add_lora(self, y_TN: torch.Tensor, x_TK: torch.Tensor, path: str) -> None:
        """Add the batch's updates to y in place, in two launches: for quantised layers and for more than FUSED_TOKENS rows."""
        plan = self.plans[path]
        if plan is None:
            return
        self._join()
        layer = self.index.number[path]
        tokens = len(x_TK)
        block_t = max(16, min(FUSED_TOKENS, triton.next_power_of_2(tokens)))
        tiles = triton.cdiv(tokens, block_t)
        h, stride = self._static_h, LIMIT
        if not self._capturing:
            # Outside graphs h need not be as wide as the widest batch.
            stride = _padded(max(self._used, 1))
            h = torch.empty(SPLITS * tiles * block_t * SLICES * stride, dtype=torch.int32, device=y_TN.device)
        self._shrink(x_TK, h, stride, plan, layer, block_t, tagged=False)
        expand_kernel[(plan.outputs // plan.block_n, tiles)](
            y_TN,
            self._arena,
            self._table[layer],
            self._meta,
            self._meta[2:],
            h,
            tokens,
            plan.outputs,
            *plan.ends,
            stride,
            LIMIT=LIMIT,
            SLICES=SLICES,
            SPLITS=SPLITS,
            BT=block_t,
            BN=plan.block_n,
            BR=SHRINK_ROWS,
            num_warps=4,
        )

    def _shrink(
        self, x_TK: torch.Tensor, h: torch.Tensor, stride: int, plan: Plan, layer: int, block_t: int, tagged: bool
    ) -> None:
        tiles = triton.cdiv(len(x_TK), block_t)
        shrink_kernel[(SPLITS * tiles, SHRINK_PROGRAMS if tiles == 1 else 1, plan.slices)](
            x_TK,
            self._arena,
            self._table[layer],
            self._meta,
            self._meta[2:],
            h,
            layer,
            len(x_TK),
            plan.inputs,
            stride,
            LIMIT=LIMIT,
            SLICES=SLICES,
            SPLITS=SPLITS,
            BT=block_t,
            BR=SHRINK_ROWS,
            BK=plan.shrink_k,
            TAGGED=tagged,
            num_warps=4,
            num_stages=4,
        )


def _padded(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def _staged(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pinned, so that the copy is asynchronous; PyTorch keeps the memory until the copy is done."""
    return host.pin_memory() if device.type == "cuda" else host
