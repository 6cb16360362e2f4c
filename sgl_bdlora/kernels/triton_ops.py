"""LoRA in linear layers with Triton kernels: the current batch on the device, where CUDA graphs can replay it, and the launches.

    few rows                    the layer, shrink and expand in one launch (fused.py; tiles.py: KINDS)
    more rows                   shrink and expand (separate.py), to which the layer is added
    a quantised layer           the layer, to which shrink and expand are added
    combined pieces (S-LoRA)    beside these: shrink, an all-reduce of h over the ranks, and expand

The all-reduce stands for both of S-LoRA's collectives: where the paper gathers, the ranks write disjoint columns of a zeroed h. SGLang's
one-shot all-reduce of so few bytes is faster than NCCL's all-gather, and can be captured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl_bdlora.kernels.fused import TAGS, linear_kernel
from sgl_bdlora.kernels.rows import (
    FIELDS,
    SLICES,
    AdapterRows,
    LayerIndex,
    Needs,
    NoRankRows,
    RankRows,
    adapter_rows,
    block_starts,
    most_rows,
    table_of,
)
from sgl_bdlora.kernels.separate import TILE_FIELDS, expand_kernel, most_tiles, order_of, shrink_kernel, tiles_of
from sgl_bdlora.kernels.tiles import (
    FEW_ROWS,
    KINDS,
    MAX_SPLITS,
    SHRINK_ROWS,
    SHRINK_STAGES,
    Device,
    Tiles,
    divisor,
    power_of_two,
    tiles_for,
)
from sgl_bdlora.kernels.torch_ops import Collectives
from sgl_bdlora.memory_pool import Resident
from sgl_bdlora.sharding import AdapterShard, HostLayer

# Rank rows that a kernel reads at once, at most: tables are filled up to a multiple, for what stands behind them is of an older batch.
PADDING = 128
# Rank rows that a batch may have in one slice of a layer; a multiple of PADDING.
LIMIT = 2048
# Up to here the base product is bound by its weights' bytes, and one tile holds all rows of the batch.
FUSED_TOKENS = 128
# Up to here the tiles of the separate expand are half as wide, so that there are enough of them.
NARROW_TOKENS = 64
# Rows of the batch that a tile of the separate kernels has at least.
SMALLEST_TILE = 16
# Programs that the separate kernels should have at least: two for each multiprocessor of an H100 or H200.
PROGRAMS = 264
# And at most for each multiprocessor; more would find nothing to do in most batches.
PROGRAMS_EACH = 16
# Of them, those that share the rank rows of one tile at most.
GROUPS = 8
# Columns of h, the largest adapter's, that graphs are captured with, in local layers and at least in combined ones.
COLUMNS = 1024
COMBINED_COLUMNS = 64


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


class Table:
    """The rank rows of the current batch on the device, at addresses that do not change (rows.table_of)."""

    def __init__(self, layers: int, adapters: int, device: torch.device):
        self.rows = torch.zeros(layers, SLICES, FIELDS, LIMIT, dtype=torch.int64, device=device)
        self.rows[:, :, -1] = -2
        self.places = torch.zeros(layers, SLICES, adapters + 1, 2, dtype=torch.int32, device=device)
        self.used = 0

    def fill(self, adapters: Sequence[tuple[RankRows, np.ndarray]]) -> None:
        """Replace the rows; adapters: as for rows.table_of."""
        self.used = most_rows([rows for rows, _ in adapters])
        width = _padded(max(self.used, 1), PADDING)
        rows, places = table_of(adapters, len(self.rows), width)
        self.rows[..., :width].copy_(_staged(torch.from_numpy(rows), self.rows.device), non_blocking=True)
        self.places[:, :, : len(adapters) + 1].copy_(
            _staged(torch.from_numpy(places), self.places.device), non_blocking=True
        )


class Owners:
    """Whose the rows of the current batch are, on the device: parts of one tensor, which one copy brings.

    meta (2,): first tag less one, number of local rank rows. rows (tokens,): each one's adapter, -1 for none. n_tiles (2,), order (tokens,)
    and tiles: what the separate kernels take (separate.py).
    """

    def __init__(self, tokens: int, adapters: int, device: torch.device):
        # Every part is aligned alike, whatever the batch: kernels are compiled for an alignment.
        self._width = _padded(tokens, 4)
        self._most = most_tiles(tokens, adapters, SMALLEST_TILE)
        self._all = torch.zeros(4 + 2 * self._width + TILE_FIELDS * self._most, dtype=torch.int32, device=device)
        self.meta, self.n_tiles = self._all[:2], self._all[2:4]
        self.rows, self.order, self.tiles = self._all[4:].split([self._width, self._width, self._most * TILE_FIELDS])
        self._last: np.ndarray | None = None
        self._host = np.empty(0, dtype=np.int32)

    def fill(self, first_tag: int, local_rows: int, owners: np.ndarray) -> None:
        if self._last is None or not np.array_equal(owners, self._last):
            tiles = tiles_of(owners, _tile(len(owners)))
            rows = np.pad(owners, (0, self._width - len(owners)), constant_values=-1)
            head = np.array([0, 0, len(tiles), np.count_nonzero(owners >= 0)], dtype=np.int32)
            self._host = np.concatenate([head, rows, order_of(owners, self._width), tiles.ravel()])
            self._last = owners.copy()
        self._host[:2] = first_tag, local_rows
        staged = _staged(torch.from_numpy(self._host), self._all.device)
        self._all[: len(staged)].copy_(staged, non_blocking=True)


class TritonOps:
    """The current batch of one rank, and its kernels.

    Args:
        arena: the pool's weights. hosts: the model's linear layers, in the order of the forward pass. max_adapters: of a batch.
        collectives: over the ranks that share a layer; None where no adapter has pieces that are put together. max_tokens: rows of the
        largest batch that a graph replays. What graphs read keeps its address for the life of the server.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        hosts: Sequence[HostLayer],
        max_adapters: int,
        collectives: Collectives | None,
        max_tokens: int = FUSED_TOKENS,
    ):
        self._device = _device(arena.device)
        self.plans = {host.path: plan_for(host, self._device) for host in hosts}
        self.index = LayerIndex([host for host in hosts if self.plans[host.path]])
        self.max_tokens = max(max_tokens, FUSED_TOKENS)
        self._hosts, self._max_adapters, self._collectives = hosts, max_adapters, collectives
        self._arena = arena
        device = arena.device
        self._local = Table(len(self.index), max_adapters, device)
        self._shrinks = self._expands = None
        if collectives is not None:
            self._shrinks = Table(len(self.index), max_adapters, device)
            self._expands = Table(len(self.index), max_adapters, device)
        self._static_owners = self._owners = Owners(self.max_tokens, max_adapters, device)
        self._fewest_programs, self._most_programs = PROGRAMS, PROGRAMS_EACH * self._device.multiprocessors
        if device.type != "cuda":
            # The interpreter runs program after program.
            self._fewest_programs = self._most_programs = 16
        self._words = torch.zeros(FUSED_TOKENS * MAX_SPLITS * SLICES * LIMIT, dtype=torch.int32, device=device)
        self._static_h: torch.Tensor | None = None
        self._static_combined: torch.Tensor | None = None
        self._rows: WeakKeyDictionary[AdapterShard, AdapterRows | None] = WeakKeyDictionary()
        self._needs: WeakKeyDictionary[AdapterShard, Needs | None] = WeakKeyDictionary()
        self._last_adapters: tuple[Resident, ...] | None = None
        self._last_owners = np.empty(0, dtype=np.int32)
        self._first_tag = 0
        self._static = False
        self._combining = False
        self._many_rows = False
        self._width = self._combined_width = self._rank_rows = 0

    def reserve(self, max_tokens: int, combines: bool, max_rank: int = 0, shared: bool = False) -> "TritonOps":
        """The same with what graphs of max_tokens rows need.

        combines: also those whose adapters are put together over the ranks. max_rank: of such adapters that may be loaded later.
        shared: all layers share one h of theirs and each clears it first, where every layer of its own would take too much memory.
        """
        collectives = self._collectives if combines else None
        other = TritonOps(self._arena, self._hosts, self._max_adapters, collectives, max_tokens)
        other._rows, other._needs = self._rows, self._needs
        arena, tokens = self._arena, other.max_tokens
        # Several parts of K only where they come to no more than this many rows (_splits).
        rows = max(tokens, PROGRAMS // 4 * 64)
        other._static_h = torch.zeros(rows * COLUMNS, dtype=torch.float32, device=arena.device)
        if other._collectives is not None:
            widths = [needs.combined_width for needs in map(self.needs, self._rows) if needs]
            columns = _padded(max([COMBINED_COLUMNS, SLICES * max_rank, *widths]), COMBINED_COLUMNS)
            other._static_combined = arena.new_zeros(1 if shared else len(self.index), tokens, columns)
        return other

    def rows(self, shard: AdapterShard) -> AdapterRows | None:
        """The adapter's rank rows; None if it is not all rank rows of these layers."""
        if shard not in self._rows:
            try:
                self._rows[shard] = adapter_rows(shard, self.index)
            except NoRankRows:
                self._rows[shard] = None
        return self._rows[shard]

    def needs(self, shard: AdapterShard) -> Needs | None:
        """What was agreed on, else this rank's own; None if it is not all rank rows of these layers."""
        if shard not in self._needs:
            rows = self.rows(shard)
            return rows and rows.needs
        return self._needs[shard]

    def agree(self, shard: AdapterShard, everyone: Sequence[Needs | None]) -> None:
        """Take the largest of every rank's `needs`."""
        self._needs[shard] = None if None in everyone else Needs(*map(max, zip(*everyone, strict=True)))

    def takes(self, adapters: Sequence[Resident]) -> bool:
        """Whether the kernels can serve a batch of these adapters."""
        needs = [self.needs(adapter.shard) for adapter in adapters]
        if None in needs or (self._expands is None and any(n.combined_width for n in needs)):
            return False
        return max(sum(n.local for n in needs), sum(n.expand for n in needs)) <= LIMIT

    def captures(self, adapters: Sequence[Resident]) -> bool:
        """Whether graphs can compute a batch of these adapters that is not too large for them."""
        if not self.takes(adapters):
            return False
        needs = [self.needs(adapter.shard) for adapter in adapters]
        return all(n.width <= COLUMNS and n.combined_width <= self._combined_columns for n in needs)

    @property
    def _combined_columns(self) -> int:
        """Columns of h, of pieces that are put together over the ranks, that graphs have room for."""
        return 0 if self._static_combined is None else self._static_combined.shape[-1]

    @property
    def combines(self) -> bool:
        """Whether the current batch has pieces that are put together over the ranks."""
        return self._combining

    @property
    def many_rows(self) -> bool:
        """Whether the current batch may have more than FEW_ROWS local rank rows in a layer, on any rank."""
        return self._rank_rows > FEW_ROWS

    def minds_many_rows(self, tokens: int) -> bool:
        """Whether kernels for batches of so many rows depend on `many_rows`."""
        plans = [plan for plan in self.plans.values() if plan]
        return any(_tiles(plan, tokens, False) != _tiles(plan, tokens, True) for plan in plans)

    @property
    def replayable(self) -> bool:
        """Whether the current batch fits what graphs were captured with."""
        if self._combining and self._static_combined is None:
            return False
        fits = self._width <= COLUMNS and self._combined_width <= self._combined_columns
        return fits and len(self._last_owners) <= self.max_tokens

    def set_batch(
        self,
        adapters: Sequence[Resident],
        owners: np.ndarray,
        static: bool = False,
        combining: bool = False,
        many_rows: bool = True,
    ) -> None:
        """The rows of the next forward pass.

        adapters: distinct, `takes` is true for them. owners: (rows,) int32, each row's adapter as its place among them, -1 for the base
        model. static: launch as a graph has to, whatever the batch. combining: the graph being captured takes combined pieces too.
        many_rows: it is for batches of more than FEW_ROWS rank rows too.
        """
        adapters = tuple(adapters)
        self._static = static
        if adapters != self._last_adapters:
            rows = [self.rows(adapter.shard) for adapter in adapters]
            needs = [self.needs(adapter.shard) for adapter in adapters]
            blocks = [block_starts(adapter.blocks, self.index) for adapter in adapters]
            self._width = max((n.width for n in needs), default=0)
            self._combined_width = max((n.combined_width for n in needs), default=0)
            self._rank_rows = sum(n.local for n in needs)
            self._local.fill([(r.local, b) for r, b in zip(rows, blocks, strict=True)])
            if self._shrinks is not None and (self._combined_width or self._shrinks.used):
                self._shrinks.fill([(r.shrink, b) for r, b in zip(rows, blocks, strict=True)])
                self._expands.fill([(r.expand, b) for r, b in zip(rows, blocks, strict=True)])
        if adapters != self._last_adapters or not np.array_equal(owners, self._last_owners):
            # A word of h may not have been written for long, so that its tag has come round again.
            self._words.zero_()
            if self._static_combined is not None:
                # Columns of other ranks have to be zero.
                self._static_combined.zero_()
        self._combining = combining or self._combined_width > 0
        self._many_rows = many_rows if static else self.many_rows
        self._last_adapters, self._last_owners = adapters, owners.copy()
        # Distinct tags for all launches of this step and the last.
        self._first_tag = (self._first_tag + len(self.index)) % TAGS
        self._owners = self._static_owners
        if len(owners) > self.max_tokens:
            self._owners = Owners(len(owners), self._max_adapters, self._arena.device)
        self._owners.fill(self._first_tag, self._local.used, owners)

    def fuses(self, path: str, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> bool:
        """Whether `linear` can compute the layer."""
        plan = self.plans[path]
        return (
            plan is not None
            and (self._has_local or (_tiles(plan, len(x_TK), self._many_rows) is None and self._has_combined(plan)))
            and weight_NK.shape == (plan.outputs, plan.inputs)
            and weight_NK.dtype == x_TK.dtype
            and weight_NK.is_contiguous()
        )

    @property
    def _has_local(self) -> bool:
        return self._static or self._local.used > 0

    def _has_combined(self, plan: Plan) -> bool:
        return self._combining and plan.combines

    def linear(self, x_TK: torch.Tensor, w_NK: torch.Tensor, bias_N: torch.Tensor | None, path: str) -> torch.Tensor:
        """x W^T + bias with the batch's updates added."""
        plan, layer = self.plans[path], self.index.number[path]
        x_TK = x_TK.contiguous()
        y_TN = x_TK.new_empty(len(x_TK), plan.outputs)
        tiles = _tiles(plan, len(x_TK), self._many_rows)
        if tiles is not None:
            self._fused(y_TN, x_TK, w_NK, bias_N, plan, tiles, layer)
            if self._has_combined(plan):
                self._expand_combined(y_TN, x_TK, plan, layer)
            return y_TN
        if self._has_local:
            self._expand(y_TN, self._local_h(x_TK, plan, layer), self._local, plan, layer, bias_N, add=False)
        if self._has_combined(plan):
            self._expand_combined(y_TN, x_TK, plan, layer, bias_N, add=self._has_local)
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
        tokens = len(x_TK)
        w_tiles = w_NK
        if tiles.descriptor:
            w_tiles = TensorDescriptor(w_NK, w_NK.shape, w_NK.stride(), [tiles.block_n, tiles.block_k])
        linear_kernel[(tiles.programs + plan.outputs // tiles.block_n,)](
            x_TK,
            w_NK,
            w_tiles,
            w_NK if bias_N is None else bias_N,
            y_TN,
            self._arena,
            self._local.rows[layer],
            self._owners.meta,
            self._owners.rows,
            self._words,
            layer,
            tokens,
            plan.outputs,
            plan.inputs,
            *plan.ends,
            LIMIT=LIMIT,
            SLICES=plan.slices,
            SPLITS=tiles.splits,
            PROGRAMS=tiles.programs,
            BT=_block_t(tokens),
            BN=tiles.block_n,
            BK=tiles.block_k,
            STAGES=tiles.stages,
            EARLY=tiles.early,
            BR=tiles.rows,
            SHRINK_BR=tiles.shrink_rows,
            SHRINK_BK=tiles.shrink_k,
            LATE_BK=min(tiles.shrink_k, 64),
            LATE_STAGES=tiles.late_stages,
            TILES=tiles.descriptor,
            BIAS=bias_N is not None,
            num_warps=tiles.warps,
        )

    def add_lora(self, y_TN: torch.Tensor, x_TK: torch.Tensor, path: str) -> None:
        """Add the batch's updates to y in place: for layers that `linear` cannot compute."""
        plan = self.plans[path]
        if plan is None:
            return
        x_TK, layer = x_TK.contiguous(), self.index.number[path]
        if self._has_local:
            self._expand(y_TN, self._local_h(x_TK, plan, layer), self._local, plan, layer)
        if self._has_combined(plan):
            self._expand_combined(y_TN, x_TK, plan, layer)

    def _local_h(self, x_TK: torch.Tensor, plan: Plan, layer: int) -> torch.Tensor:
        """h of the local pieces: (splits, tokens, columns) float32."""
        splits, tokens = _splits(plan, len(x_TK)), len(x_TK)
        columns = COLUMNS if self._static else self._width
        if self._static:
            h = self._static_h[: splits * tokens * columns].view(splits, tokens, columns)
        else:
            h = torch.empty(splits, tokens, columns, dtype=torch.float32, device=x_TK.device)
        self._shrink(h, x_TK, self._local, plan, layer)
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
        """_expand of the pieces that are put together over the ranks. Columns of h that other ranks write have to be zero here."""
        shared = self._static and len(self._static_combined) == 1
        if self._static:
            h = self._static_combined[0 if shared else layer, : len(x_TK)]
        else:
            h = x_TK.new_zeros(len(x_TK), _padded(self._combined_width, 8))
        if shared:
            h.zero_()
        self._shrink(h[None], x_TK, self._shrinks, plan, layer)
        combined = self._collectives.all_reduce(h)
        self._expand(y_TN, combined[None], self._expands, plan, layer, bias_N, add)
        if self._static and not shared and combined.data_ptr() == h.data_ptr():
            h.zero_()

    def _shrink(self, h: torch.Tensor, x_TK: torch.Tensor, table: Table, plan: Plan, layer: int) -> None:
        splits, tokens, columns = h.shape
        tile = _tile(tokens)
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
            self._owners.n_tiles,
            self._owners.order,
            self._owners.tiles,
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
            self._owners.n_tiles,
            self._owners.order,
            self._owners.tiles,
            h,
            tokens,
            plan.outputs,
            *plan.ends,
            columns,
            table.places.shape[2],
            LIMIT=LIMIT,
            SPLITS=splits,
            BT=_tile(tokens),
            BN=block_n,
            BR=32 if _tile(tokens) == SMALLEST_TILE else 16,
            ADD=add,
            BIAS=bias_N is not None,
            num_warps=4,
        )

    def _programs(self, tokens: int, each: int) -> int:
        """Of a separate kernel that has so many things to do for a tile."""
        # One more than an adapter's: the base model's.
        return min(self._most_programs, each * (most_tiles(tokens, self._max_adapters, _tile(tokens)) + 1))


def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        # As many multiprocessors as the shapes of tests need: the interpreter runs block after block.
        return Device(20, 232_448)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def _block_t(tokens: int) -> int:
    """Rows of a tile that holds the whole batch."""
    return max(KINDS[0][0], triton.next_power_of_2(tokens))


def _tiles(plan: Plan, tokens: int, many_rows: bool) -> Tiles | None:
    """Those of the linear kernel; None where the separate kernels compute so many rows."""
    return plan.tiles.get((_block_t(tokens), many_rows))


def _tile(tokens: int) -> int:
    """Rows of the batch that a program of the separate kernels takes: few in a decode step, whose rows are of many adapters."""
    return max(SMALLEST_TILE, min(64, triton.next_power_of_2(tokens) // 8))


def _splits(plan: Plan, tokens: int) -> int:
    """Parts of K for a separate shrink of local pieces."""
    tiles = triton.cdiv(tokens, _tile(tokens))
    return max(n for n in (1, 2, 4) if n == 1 or (plan.inputs % (n * 64) == 0 and n * tiles <= PROGRAMS // 4))


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _staged(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pinned, so that the copy is asynchronous; PyTorch keeps the memory until the copy is done."""
    return host.pin_memory() if device.type == "cuda" else host
