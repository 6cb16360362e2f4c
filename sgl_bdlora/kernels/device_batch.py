"""The current batch of one rank on the device, where CUDA graphs can replay it: its rank rows, whose its rows are, and buffers of h."""

from collections.abc import Sequence

import numpy as np
import torch
import triton

from sgl_bdlora.kernels.fused import TAGS
from sgl_bdlora.kernels.rows import FIELDS, SLICES, KnownAdapters, RankRows, block_starts, most_rows, padded, table_of
from sgl_bdlora.kernels.separate import TILE_FIELDS, most_tiles, order_of, tiles_of
from sgl_bdlora.kernels.tiles import FUSED_TOKENS, MAX_SPLITS, few_rows
from sgl_bdlora.memory_pool import Resident

# Rank rows that a kernel reads at once, at most: tables are filled up to a multiple, for what stands behind them is of an older batch.
PADDING = 128
# Rank rows that a batch may have in one slice of a layer; a multiple of PADDING.
LIMIT = 2048
# Rows of the batch that a tile of the separate kernels has at least.
SMALLEST_TILE = 16
# Columns of h, the largest adapter's, that graphs are captured with, in local layers and at least in combined ones.
COLUMNS = 1024
COMBINED_COLUMNS = 64


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
        width = padded(max(self.used, 1), PADDING)
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
        self._width = padded(tokens, 4)
        self._most = most_tiles(tokens, adapters, SMALLEST_TILE)
        self._all = torch.zeros(4 + 2 * self._width + TILE_FIELDS * self._most, dtype=torch.int32, device=device)
        self.meta, self.n_tiles = self._all[:2], self._all[2:4]
        self.rows, self.order, self.tiles = self._all[4:].split([self._width, self._width, self._most * TILE_FIELDS])
        self._first_tag = self._all[:1]
        self._last: np.ndarray | None = None
        self._host = np.empty(0, dtype=np.int32)

    def fill(self, first_tag: int, local_rows: int, owners: np.ndarray) -> None:
        if self._last is None or not np.array_equal(owners, self._last):
            tiles = tiles_of(owners, tile_rows(len(owners)))
            rows = np.pad(owners, (0, self._width - len(owners)), constant_values=-1)
            head = np.array([0, 0, len(tiles), np.count_nonzero(owners >= 0)], dtype=np.int32)
            self._host = np.concatenate([head, rows, order_of(owners, self._width), tiles.ravel()])
            self._last = owners.copy()
        self._host[:2] = first_tag, local_rows
        staged = _staged(torch.from_numpy(self._host), self._all.device)
        self._all[: len(staged)].copy_(staged, non_blocking=True)

    def retag(self, first_tag: int) -> None:
        """Replace only that: an argument of a kernel, where a copy would need pinned memory of its own."""
        self._first_tag.fill_(first_tag)


class DeviceBatch:
    """The current batch, and what graphs have room for. What they read keeps its address for the life of the server.

    Args:
        arena: the pool's weights. max_adapters: of a batch. combined: whether adapters may have pieces that are put together over the
        ranks. max_tokens: rows of the largest batch that a graph replays.

    For the launches:
        local, shrinks, expands: tables of what AdapterRows names so; the last two None without `combined`. owners: Owners. words: h of the
        linear kernel. static: launch as a graph has to, whatever the batch. combines: whether the batch has pieces that are put together
        over the ranks. for_many_rows: whether to launch as for many rank rows.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        known: KnownAdapters,
        max_adapters: int,
        combined: bool,
        max_tokens: int = FUSED_TOKENS,
    ):
        self.max_adapters = max_adapters
        self._arena, self._known, self._max_tokens = arena, known, max(max_tokens, FUSED_TOKENS)
        layers, device = len(known.index), arena.device
        self.local = Table(layers, max_adapters, device)
        self.shrinks = self.expands = None
        if combined:
            self.shrinks = Table(layers, max_adapters, device)
            self.expands = Table(layers, max_adapters, device)
        self._static_owners = self.owners = Owners(self._max_tokens, max_adapters, device)
        self.words = torch.zeros(FUSED_TOKENS * MAX_SPLITS * SLICES * LIMIT, dtype=torch.int32, device=device)
        self._static_h: torch.Tensor | None = None
        self._static_combined: torch.Tensor | None = None
        self._last_adapters: tuple[Resident, ...] | None = None
        self._last_owners = np.empty(0, dtype=np.int32)
        self._first_tag = 0
        self.static = self.combines = self.for_many_rows = False
        self._width = self._combined_width = self._rank_rows = 0

    def reserve(self, max_tokens: int, rows: int, combined: bool, max_rank: int, shared: bool) -> "DeviceBatch":
        """An empty one with what graphs of max_tokens rows need; rows: of h in all parts of K. The rest is as for TritonOps.reserve."""
        combined = combined and self.shrinks is not None
        other = DeviceBatch(self._arena, self._known, self.max_adapters, combined, max_tokens)
        other._static_h = torch.zeros(rows * COLUMNS, dtype=torch.float32, device=self._arena.device)
        if combined:
            columns = padded(max(COMBINED_COLUMNS, SLICES * max_rank, self._known.combined_width), COMBINED_COLUMNS)
            layers = 1 if shared else len(self._known.index)
            other._static_combined = self._arena.new_zeros(layers, other._max_tokens, columns)
        return other

    def takes(self, adapters: Sequence[Resident]) -> bool:
        """Whether the kernels can serve a batch of these adapters."""
        needs = [self._known.needs(adapter.shard) for adapter in adapters]
        if None in needs or (self.expands is None and any(n.combined_width for n in needs)):
            return False
        return max(sum(n.local for n in needs), sum(n.expand for n in needs)) <= LIMIT

    def captures(self, adapters: Sequence[Resident]) -> bool:
        """Whether graphs can compute a batch of these adapters that is not too large for them."""
        if not self.takes(adapters):
            return False
        needs = [self._known.needs(adapter.shard) for adapter in adapters]
        return all(n.width <= COLUMNS and n.combined_width <= self._combined_columns for n in needs)

    @property
    def _combined_columns(self) -> int:
        """Columns of h, of pieces that are put together over the ranks, that graphs have room for."""
        return 0 if self._static_combined is None else self._static_combined.shape[-1]

    def has_many_rows(self, tokens: int) -> bool:
        """Whether the current batch, filled up to so many rows, may have many local rank rows in a layer (tiles.few_rows), on any rank."""
        return self._rank_rows > few_rows(tokens)

    @property
    def replayable(self) -> bool:
        """Whether the current batch fits what graphs were captured with."""
        if self.combines and self._static_combined is None:
            return False
        fits = self._width <= COLUMNS and self._combined_width <= self._combined_columns
        return fits and len(self._last_owners) <= self._max_tokens

    def fill(
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
        many_rows: it is for batches of many rank rows too.
        """
        adapters = tuple(adapters)
        self.static = static
        if adapters != self._last_adapters:
            rows = [self._known.rows(adapter.shard) for adapter in adapters]
            needs = [self._known.needs(adapter.shard) for adapter in adapters]
            blocks = [block_starts(adapter.blocks, self._known.index) for adapter in adapters]
            self._width = max((n.width for n in needs), default=0)
            self._combined_width = max((n.combined_width for n in needs), default=0)
            self._rank_rows = sum(n.local for n in needs)
            self.local.fill([(r.local, b) for r, b in zip(rows, blocks, strict=True)])
            if self.shrinks is not None and (self._combined_width or self.shrinks.used):
                self.shrinks.fill([(r.shrink, b) for r, b in zip(rows, blocks, strict=True)])
                self.expands.fill([(r.expand, b) for r, b in zip(rows, blocks, strict=True)])
        if adapters != self._last_adapters or not np.array_equal(owners, self._last_owners):
            # A word of h may not have been written for long, so that its tag has come round again.
            self.words.zero_()
            if self._static_combined is not None:
                # Columns of other ranks have to be zero.
                self._static_combined.zero_()
        self._last_adapters, self._last_owners = adapters, owners.copy()
        self.combines = combining or self._combined_width > 0
        self.for_many_rows = many_rows if static else self.has_many_rows(len(owners))
        self.owners = self._static_owners
        if len(owners) > self._max_tokens:
            self.owners = Owners(len(owners), self.max_adapters, self._arena.device)
        self.owners.fill(self._next_tag(), self.local.used, owners)

    def repeat(self) -> None:
        """The same rows once more: the next step of the same requests."""
        self.owners.retag(self._next_tag())

    def _next_tag(self) -> int:
        """The first of the next step's, which has distinct ones for all of its launches and those of the step before."""
        self._first_tag = (self._first_tag + len(self._known.index)) % TAGS
        return self._first_tag

    @property
    def has_local(self) -> bool:
        """Whether to launch for local rank rows."""
        return self.static or self.local.used > 0

    def h(self, splits: int, tokens: int) -> torch.Tensor:
        """For the local pieces of a layer: (splits, tokens, columns) float32."""
        if self.static:
            return self._static_h[: splits * tokens * COLUMNS].view(splits, tokens, COLUMNS)
        return torch.empty(splits, tokens, self._width, dtype=torch.float32, device=self._arena.device)

    def combined_h(self, x_TK: torch.Tensor, layer: int) -> torch.Tensor:
        """For the pieces that are put together over the ranks: (tokens, columns), zero where other ranks write."""
        if not self.static:
            return x_TK.new_zeros(len(x_TK), padded(self._combined_width, 8))
        if self._shares_combined:
            return self._static_combined[0, : len(x_TK)].zero_()
        return self._static_combined[layer, : len(x_TK)]

    @property
    def keeps_combined(self) -> bool:
        """Whether the layer gets the same combined_h again, and has to leave it zero."""
        return self.static and not self._shares_combined

    @property
    def _shares_combined(self) -> bool:
        return len(self._static_combined) == 1


def tile_rows(tokens: int) -> int:
    """Rows of the batch that a program of the separate kernels takes: few in a decode step, whose rows are of many adapters."""
    return max(SMALLEST_TILE, min(64, triton.next_power_of_2(tokens) // 8))


def _staged(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pinned, so that the copy is asynchronous; PyTorch keeps the memory until the copy is done."""
    return host.pin_memory() if device.type == "cuda" else host
