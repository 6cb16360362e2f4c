"""LoRA in linear layers with Triton kernels: a layer's tile sizes and its launches.

    few rows                    the layer, shrink and expand in one launch (fused.py; tiles.py: KINDS)
    more rows                   shrink and expand (separate.py), to which the layer is added
    a quantised layer           the layer, to which shrink and expand are added
    combined pieces (S-LoRA)    beside these: shrink, an all-reduce of h over the ranks, and expand

The all-reduce stands for both of S-LoRA's collectives: where the paper gathers, the ranks write disjoint columns of a zeroed h. SGLang's
one-shot all-reduce of so few bytes is faster than NCCL's all-gather, and can be captured.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
import triton

from sgl_bdlora.kernels.device_batch import LIMIT, SMALLEST_TILE, DeviceBatch, Table, tile_rows
from sgl_bdlora.kernels.fused import linear_kernel
from sgl_bdlora.kernels.rows import SLICES, KnownAdapters, LayerIndex
from sgl_bdlora.kernels.separate import expand_kernel, most_tiles, shrink_kernel
from sgl_bdlora.kernels.tiles import (
    H200,
    KINDS,
    SHRINK_ROWS,
    SHRINK_STAGES,
    SMALLEST_SUM,
    SUMS,
    Device,
    Tiles,
    divisor,
    power_of_two,
    tiles_for,
)
from sgl_bdlora.kernels.torch_ops import Collectives
from sgl_bdlora.sharding import HostLayer

# Up to here the tiles of the separate expand are half as wide, so that there are enough of them.
NARROW_TOKENS = 64
# Up to here kernels begin before the one ahead of them has ended. Those of longer prompts lost more by that than a launch takes.
EARLY_TOKENS = 1024
# Programs that the separate kernels should have at least: two for each multiprocessor of an H100 or H200.
PROGRAMS = 264
# And at most for each multiprocessor; more would find nothing to do in most batches.
PROGRAMS_EACH = 16
# Of them, those that share the rank rows of one tile at most.
GROUPS = 8


@dataclass(frozen=True)
class Plan:
    """One layer's shape and tile sizes. ends: where the outputs of its first two slices end. tiles: of tiles.py's KINDS.

    expand_n: outputs of a tile of the separate expand. combines: whether an S-LoRA piece of this layer would be put together over the
    ranks.
    """

    slices: int
    ends: tuple[int, int]
    inputs: int
    outputs: int
    tiles: Mapping[tuple[int, bool], Tiles]
    expand_n: int
    combines: bool


def plan_for(host: HostLayer, device: Device) -> Plan | None:
    """Tile sizes for a layer, None if its shapes do not divide into tiles."""
    inputs = len(host.slices[0].inputs)
    ends = [s.y_start + len(s.outputs) for s in host.slices]
    if len(ends) > SLICES:
        return None
    tiles = {kind: tiles_for(ends, inputs, *kind, device) for kind in KINDS}
    if None in tiles.values():
        return None
    first_two = (ends[0], ends[min(1, len(ends) - 1)])
    combines = host.tp_size > 1 and host.parallelism in ("column", "row")
    return Plan(len(ends), first_two, inputs, ends[-1], tiles, divisor(128, *ends), combines)


class TritonOps:
    """The kernels of one rank's layers, launched for its current batch.

    Args:
        arena: the pool's weights. hosts: the model's linear layers, in the order of the forward pass. max_adapters: of a batch.
        collectives: over the ranks that share a layer; None where no adapter has pieces that are put together.
    """

    def __init__(
        self, arena: torch.Tensor, hosts: Sequence[HostLayer], max_adapters: int, collectives: Collectives | None
    ):
        self._device = _device(arena.device)
        self.plans = {host.path: plan_for(host, self._device) for host in hosts}
        self.known = KnownAdapters(LayerIndex([host for host in hosts if self.plans[host.path]]))
        self.batch = DeviceBatch(arena, self.known, max_adapters, collectives is not None)
        self._arena, self._collectives = arena, collectives
        # By stream: SGLang may compute layers side by side on several.
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._no_sums = _sums(SMALLEST_SUM, arena.device)
        self._fewest_programs, self._most_programs = PROGRAMS, PROGRAMS_EACH * self._device.multiprocessors
        if arena.device.type != "cuda":
            # The interpreter runs program after program.
            self._fewest_programs = self._most_programs = 16

    def sums(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What linear_kernel needs for tiles that programs share, of the current stream alone; None in a capture that is its first use.

        SGLang runs a batch on the very streams before it captures it.
        """
        stream, capturing = 0, False
        if self._arena.is_cuda:
            stream, capturing = torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()
        if stream not in self._sums and not capturing:
            self._sums[stream] = _sums(SUMS, self._arena.device)
        return self._sums.get(stream)

    def reserve(self, max_tokens: int, combines: bool, max_rank: int = 0, shared: bool = False) -> "TritonOps":
        """The same with a batch of its own, which has what graphs of max_tokens rows need.

        combines: also those whose adapters are put together over the ranks. max_rank: of such adapters that may be loaded later.
        shared: all layers share one h of theirs and each clears it first, where every layer of its own would take too much memory.
        """
        other = copy(self)
        # Several parts of K only where they come to no more than this many rows (_splits).
        rows = max(max_tokens, PROGRAMS // 4 * 64)
        other.batch = self.batch.reserve(max_tokens, rows, combines, max_rank, shared)
        return other

    def minds_many_rows(self, tokens: int) -> bool:
        """Whether kernels for batches of so many rows depend on the batch's `many_rows`."""
        plans = [plan for plan in self.plans.values() if plan]
        return any(_tiles(plan, tokens, False) != _tiles(plan, tokens, True) for plan in plans)

    def fuses(self, path: str, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> bool:
        """Whether `linear` can compute the layer."""
        plan = self.plans[path]
        return (
            plan is not None
            and (
                self.batch.has_local
                or (_tiles(plan, len(x_TK), self.batch.for_many_rows) is None and self._has_combined(plan))
            )
            and weight_NK.shape == (plan.outputs, plan.inputs)
            and weight_NK.dtype == x_TK.dtype
            and weight_NK.is_contiguous()
        )

    def _has_combined(self, plan: Plan) -> bool:
        return self.batch.combines and plan.combines

    def linear(self, x_TK: torch.Tensor, w_NK: torch.Tensor, bias_N: torch.Tensor | None, path: str) -> torch.Tensor:
        """x W^T + bias with the batch's updates added."""
        plan, layer = self.plans[path], self.known.index.number[path]
        x_TK = x_TK.contiguous()
        y_TN = x_TK.new_empty(len(x_TK), plan.outputs)
        tiles = _tiles(plan, len(x_TK), self.batch.for_many_rows)
        if tiles is not None:
            self._fused(y_TN, x_TK, w_NK, bias_N, plan, tiles, layer)
            if self._has_combined(plan):
                self._expand_combined(y_TN, x_TK, plan, layer)
            return y_TN
        if self.batch.has_local:
            self._expand(y_TN, self._local_h(x_TK, plan, layer), self.batch.local, plan, layer, bias_N, add=False)
        if self._has_combined(plan):
            self._expand_combined(y_TN, x_TK, plan, layer, bias_N, add=self.batch.has_local)
        return y_TN.addmm_(x_TK, w_NK.T)

    def _fused(
        self,
        y_TN: torch.Tensor,
        x_TK: torch.Tensor,
        w_NK: torch.Tensor,
        bias_N: torch.Tensor | None,
        plan: Plan,
        tiles: Tiles,
        layer: int,
    ) -> None:
        """The same into y, without pieces that are put together over the ranks."""
        tokens, sums = len(x_TK), self._no_sums
        if tiles.parts > 1:
            sums = self.sums()
            if sums is None:
                tiles, sums = replace(tiles, parts=1), self._no_sums
        linear_kernel[(tiles.programs + plan.outputs // tiles.block_n * tiles.parts,)](
            x_TK,
            w_NK,
            w_NK if bias_N is None else bias_N,
            y_TN,
            self._arena,
            self.batch.local.rows[layer],
            self.batch.owners.meta,
            self.batch.owners.rows,
            self.batch.words,
            *sums,
            layer,
            tokens,
            plan.outputs,
            plan.inputs,
            *plan.ends,
            LIMIT=LIMIT,
            SLICES=plan.slices,
            SPLITS=tiles.splits,
            PROGRAMS=tiles.programs,
            PARTS=tiles.parts,
            BT=_block_t(tokens),
            BN=tiles.block_n,
            BK=tiles.block_k,
            STAGES=tiles.stages,
            EARLY=tiles.early,
            BR=tiles.rows,
            SHRINK_BR=tiles.shrink_rows,
            SHRINK_BK=tiles.shrink_k,
            HALVES=tiles.halves,
            LATE_BK=min(tiles.shrink_k, 64),
            LATE_STAGES=tiles.late_stages,
            BIAS=bias_N is not None,
            num_warps=tiles.warps,
            **self._launch(tokens),
        )

    def add_lora(self, y_TN: torch.Tensor, x_TK: torch.Tensor, path: str) -> None:
        """Add the batch's updates to y in place: for layers that `linear` cannot compute."""
        plan = self.plans[path]
        if plan is None:
            return
        x_TK, layer = x_TK.contiguous(), self.known.index.number[path]
        if self.batch.has_local:
            self._expand(y_TN, self._local_h(x_TK, plan, layer), self.batch.local, plan, layer)
        if self._has_combined(plan):
            self._expand_combined(y_TN, x_TK, plan, layer)

    def _local_h(self, x_TK: torch.Tensor, plan: Plan, layer: int) -> torch.Tensor:
        """h of the local pieces: (splits, tokens, columns) float32."""
        h = self.batch.h(_splits(plan, len(x_TK)), len(x_TK))
        self._shrink(h, x_TK, self.batch.local, plan, layer)
        return h

    def _expand_combined(
        self,
        y_TN: torch.Tensor,
        x_TK: torch.Tensor,
        plan: Plan,
        layer: int,
        bias_N: torch.Tensor | None = None,
        add: bool = True,
    ) -> None:
        """_expand of the pieces that are put together over the ranks."""
        h = self.batch.combined_h(x_TK, layer)
        self._shrink(h[None], x_TK, self.batch.shrinks, plan, layer)
        combined = self._collectives.all_reduce(h)
        self._expand(y_TN, combined[None], self.batch.expands, plan, layer, bias_N, add)
        if self.batch.keeps_combined and combined.data_ptr() == h.data_ptr():
            h.zero_()

    def _shrink(self, h: torch.Tensor, x_TK: torch.Tensor, table: Table, plan: Plan, layer: int) -> None:
        splits, tokens, columns = h.shape
        tile = tile_rows(tokens)
        # Ranks of 16 in all slices at once.
        rows = SHRINK_ROWS * triton.next_power_of_2(plan.slices)
        groups = self._fewest_programs // (splits * triton.cdiv(tokens, tile))
        groups = max(1, min(GROUPS, groups, triton.cdiv(columns, rows)))
        numbers = min(16384, self._device.loops // (SHRINK_STAGES * 2))
        shrink_kernel[(self._programs(tokens, splits * groups),)](
            x_TK,
            self._arena,
            table.rows[layer],
            table.places[layer],
            self.batch.owners.n_tiles,
            self.batch.owners.order,
            self.batch.owners.tiles,
            h,
            tokens,
            plan.inputs,
            columns,
            table.places.shape[2],
            groups,
            LIMIT=LIMIT,
            SLICES=plan.slices,
            SPLITS=splits,
            BT=tile,
            BR=rows,
            # So that two programs fit where there is room for 16,384 numbers in each stage.
            BK=divisor(min(256, power_of_two(numbers // (tile + rows))), plan.inputs // splits),
            num_warps=4,
            num_stages=SHRINK_STAGES,
            **self._launch(tokens),
        )

    def _expand(
        self,
        y_TN: torch.Tensor,
        h: torch.Tensor,
        table: Table,
        plan: Plan,
        layer: int,
        bias_N: torch.Tensor | None = None,
        add: bool = True,
    ) -> None:
        splits, tokens, columns = h.shape
        block_n = plan.expand_n if tokens > NARROW_TOKENS else min(plan.expand_n, 64)
        expand_kernel[(self._programs(tokens, plan.outputs // block_n),)](
            y_TN,
            y_TN if bias_N is None else bias_N,
            self._arena,
            table.rows[layer],
            table.places[layer],
            self.batch.owners.n_tiles,
            self.batch.owners.order,
            self.batch.owners.tiles,
            h,
            tokens,
            plan.outputs,
            *plan.ends,
            columns,
            table.places.shape[2],
            LIMIT=LIMIT,
            SPLITS=splits,
            BT=tile_rows(tokens),
            BN=block_n,
            BR=32 if tile_rows(tokens) == SMALLEST_TILE else 16,
            ADD=add,
            BIAS=bias_N is not None,
            num_warps=4,
            **self._launch(tokens),
        )

    def _launch(self, tokens: int) -> dict[str, bool]:
        """How a kernel for so many rows is launched, and what it has to know of that."""
        early = self._device.dependent and tokens <= EARLY_TOKENS
        return {"DEPENDENT": early, "launch_pdl": early}

    def _programs(self, tokens: int, each: int) -> int:
        """Of a separate kernel that has so many things to do for a tile."""
        # One more than an adapter's: the base model's.
        return min(self._most_programs, each * (most_tiles(tokens, self.batch.max_adapters, tile_rows(tokens)) + 1))


def _sums(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """So many sums, and counters of the tiles that they may be of."""
    return (
        torch.empty(count, dtype=torch.float32, device=device),
        torch.zeros(count // SMALLEST_SUM, dtype=torch.int32, device=device),
    )


def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        # As many multiprocessors as the shapes of tests need: the interpreter runs block after block.
        return replace(H200, multiprocessors=20, dependent=False)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count, properties.shared_memory_per_block_optin, dependent=properties.major >= 9
    )


def _block_t(tokens: int) -> int:
    """Rows of a tile that holds the whole batch."""
    return max(KINDS[0][0], triton.next_power_of_2(tokens))


def _tiles(plan: Plan, tokens: int, many_rows: bool) -> Tiles | None:
    """Those of the linear kernel; None where the separate kernels compute so many rows."""
    return plan.tiles.get((_block_t(tokens), many_rows))


def _splits(plan: Plan, tokens: int) -> int:
    """Parts of K for a separate shrink of local pieces."""
    tiles = triton.cdiv(tokens, tile_rows(tokens))
    return max(n for n in (1, 2, 4) if n == 1 or (plan.inputs % (n * 64) == 0 and n * tiles <= PROGRAMS // 4))
