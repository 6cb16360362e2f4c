"""Rank rows: an adapter's pieces as the Triton kernels read them.

A rank row is one row of a local A with the matching column of B. Whatever an adapter's structure is, it is a list of these, each with
five numbers (fused.py reads them as int64 columns of `LIMIT` entries):

    A_FIELD      a - x0: element offset of the row's A in the arena, less the first input it touches
    X_FIELD      x0 | x1 << 32: the inputs it touches, x0 <= k < x1
    B_FIELD      b - y0: element offset of its B, less the first output it touches
    Y_FIELD      y0 | y1 << 32
    OWNER_FIELD  owner | bits of the float32 scale << 32; owner -2: no row

An adapter's local rows of one slice are filled up to a multiple of four with rows that touch nothing, so that kernels read and write h in
vectors. An adapter's rows of one slice of a layer lie together, and they have columns of h one after another, slice after slice. Where a
collective stands between shrink and expand, a rank shrinks some rows (its part of them, or all on its part of the inputs) and expands
all: two lists, whose rows share the columns of h that the collective combines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from sgl_bdlora.sharding import AdapterShard, HostLayer, LayerLayout, SliceLayout
from sgl_bdlora.sharding.shard import ALIGNMENT

FIELDS = 5
SLICES = 3
_OFFSETS = (0, 2)
# Local rows of a slice come in multiples of this.
TOGETHER = 4
_NO_OWNER = -2 & 0xFFFFFFFF


def padded(count: int, multiple: int) -> int:
    """The least multiple that is not below `count`. Local ranks of a slice take as many rank rows, in multiples of TOGETHER."""
    return -(-count // multiple) * multiple


class NoRankRows(ValueError):
    """The adapter has pieces that are not rank rows: in other layers, or not aligned to vector loads."""


class LayerIndex:
    """Numbers linear layers; their order is that of the tables."""

    def __init__(self, hosts: Sequence[HostLayer]):
        self.hosts = {host.path: host for host in hosts}
        self.paths = list(self.hosts)
        self.number = {path: i for i, path in enumerate(self.paths)}

    def __len__(self) -> int:
        return len(self.paths)

    def slice_of(self, path: str, y_start: int) -> int:
        """Which slice of the layer outputs from y_start on belong to."""
        return max(i for i, s in enumerate(self.hosts[path].slices) if s.y_start <= y_start)


@dataclass(frozen=True)
class RankRows:
    """Rank rows in all layers, in order of layer and slice.

    counts: (layers, SLICES) rows of each slice. columns: (layers, SLICES) column of h of each slice's first row.
    fields: (rows, FIELDS) int64, offsets from the start of the layer's block, owner 0.
    """

    counts: np.ndarray
    columns: np.ndarray
    fields: np.ndarray

    def at(self, blocks: np.ndarray) -> np.ndarray:
        """fields for blocks (layers,), the arena offset of every layer's block."""
        layer = np.repeat(np.arange(len(self.counts)), self.counts.sum(axis=1))
        placed = self.fields.copy()
        placed[:, _OFFSETS] += blocks[layer, None]
        return placed


class Needs(NamedTuple):
    """What an adapter takes of tables and of h: the largest of any rank, so that all ranks decide alike what computes a batch.

    local, expand: rank rows of its fullest slice, of those kinds (AdapterRows). width, combined_width: columns of h, of the local rows
    and of the others.
    """

    local: int
    expand: int
    width: int
    combined_width: int


@dataclass(frozen=True)
class AdapterRows:
    """One adapter on one rank. local: rows with nothing between shrink and expand. shrink, expand: those with a collective between."""

    local: RankRows
    shrink: RankRows
    expand: RankRows

    @cached_property
    def needs(self) -> Needs:
        """Of this rank."""
        counts = self.local.counts, self.expand.counts
        return Needs(*(int(c.max(initial=0)) for c in counts), *(int(c.sum(axis=1).max(initial=0)) for c in counts))


def adapter_rows(shard: AdapterShard, index: LayerIndex) -> AdapterRows:
    """The rank rows of an adapter. Raises NoRankRows."""
    local, shrink, expand = _Collector(index, TOGETHER), _Collector(index), _Collector(index)
    first_rank = np.zeros((len(index), SLICES), dtype=np.int64)
    for path, layer in shard.layers.items():
        if path not in index.number:
            raise NoRankRows(path)
        for layout in layer.slices:
            piece = layout.piece
            place = (index.number[path], index.slice_of(path, layout.y_start))
            a, b = _a_fields(layer, layout), _b_fields(layout)
            if piece.combine == "none":
                local.add(place, a + b)
            else:
                shrink.add(place, a)
                expand.add(place, b)
                first_rank[place] = piece.ranks_a.start
    combined = expand.rows()
    return AdapterRows(local.rows(), shrink.rows(combined.columns + first_rank), combined)


class KnownAdapters:
    """The rank rows of adapters and what they need, each worked out once."""

    def __init__(self, index: LayerIndex):
        self.index = index
        self._rows: WeakKeyDictionary[AdapterShard, AdapterRows | None] = WeakKeyDictionary()
        self._needs: WeakKeyDictionary[AdapterShard, Needs | None] = WeakKeyDictionary()

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

    @property
    def combined_width(self) -> int:
        """The largest that any of them needs."""
        return max((needs.combined_width for needs in map(self.needs, self._rows) if needs), default=0)


class _Collector:
    """together: rows of a slice are filled up to a multiple of it."""

    def __init__(self, index: LayerIndex, together: int = 1):
        self._together = together
        self._counts = np.zeros((len(index), SLICES), dtype=np.int64)
        self._parts: dict[tuple[int, int], np.ndarray] = {}

    def add(self, place: tuple[int, int], fields: np.ndarray) -> None:
        fields = np.pad(fields, ((0, -len(fields) % self._together), (0, 0)))
        self._counts[place] = len(fields)
        self._parts[place] = fields

    def rows(self, columns: np.ndarray | None = None) -> RankRows:
        """columns: where they are not simply one slice after another."""
        if columns is None:
            columns = np.cumsum(self._counts, axis=1) - self._counts
        fields = [self._parts[place] for place in sorted(self._parts)]
        return RankRows(self._counts, columns, np.concatenate([np.zeros((0, FIELDS), np.int64), *fields]))


def _a_fields(layer: LayerLayout, layout: SliceLayout) -> np.ndarray:
    """(local rank, FIELDS) with the fields of A and the scale."""
    piece = layout.piece
    j = np.arange(piece.local_rank)
    width = piece.shape_a[1]
    x0 = j // (piece.local_rank // piece.blocks_a) * width
    a = (layout.a_start + j) * layer.width_a
    _check_aligned(layout, x0, a, width)
    scale = int(np.float32(layout.scale).view(np.int32))
    return np.stack([a - x0, x0 | (x0 + width) << 32, j * 0, j * 0, np.full_like(j, scale << 32)], axis=1)


def _b_fields(layout: SliceLayout) -> np.ndarray:
    """(rank of B, FIELDS) with the fields of B."""
    piece = layout.piece
    rank = len(piece.ranks_b)
    j = np.arange(rank)
    width = len(piece.outputs) // piece.blocks_b
    y0 = layout.y_start + j // (rank // piece.blocks_b) * width
    b = layout.b_offset + j * width
    _check_aligned(layout, y0, b, width)
    return np.stack([j * 0, j * 0, b - y0, y0 | (y0 + width) << 32, j * 0], axis=1)


def _check_aligned(layout: SliceLayout, starts: np.ndarray, offsets: np.ndarray, width: int) -> None:
    if width % ALIGNMENT or np.any(starts % ALIGNMENT) or np.any(offsets % ALIGNMENT):
        raise NoRankRows(layout.name)


def block_starts(blocks: Mapping[str, tuple[int, int]], index: LayerIndex) -> np.ndarray:
    """(layers,) arena offsets of a resident adapter's blocks; 0 where it has none."""
    return np.array([blocks.get(path, (0, 0))[0] for path in index.paths], dtype=np.int64)


def most_rows(adapters: Sequence[RankRows]) -> int:
    """Rank rows of the fullest slice of a batch."""
    return int(sum(rows.counts for rows in adapters).max()) if adapters else 0


def table_of(adapters: Sequence[tuple[RankRows, np.ndarray]], layers: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank rows of a batch, and where each adapter's are.

    adapters: each one's rows and block_starts; its owner number is its place here. limit: at least most_rows.
    Returns rows (layers, SLICES, FIELDS, limit) int64, and places (layers, SLICES, adapters + 1, 2) int32: an adapter's first row and
    the column of h of that row.
    """
    table = np.zeros((layers, SLICES, FIELDS, limit), dtype=np.int64)
    table[:, :, -1] = _NO_OWNER
    places = np.zeros((layers, SLICES, len(adapters) + 1, 2), dtype=np.int32)
    flat = table.reshape(layers * SLICES, FIELDS, limit)
    filled = np.zeros(layers * SLICES, dtype=np.int64)
    for owner, (rows, blocks) in enumerate(adapters):
        counts = rows.counts.ravel()
        place = np.repeat(np.arange(counts.size), counts)
        within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        fields = rows.at(blocks)
        fields[:, -1] += owner
        flat[place, :, filled[place] + within] = fields
        places[:, :, owner] = np.stack([filled.reshape(layers, SLICES), rows.columns], axis=-1)
        filled += counts
    places[:, :, -1, 0] = filled.reshape(layers, SLICES)
    return table, places
