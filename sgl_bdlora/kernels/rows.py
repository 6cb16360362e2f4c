"""Rank rows: an adapter's local pieces as the Triton kernels read them.

A rank row is one row of a local A with the matching column of B. Whatever an adapter's structure is, it is a list of these, each with
five numbers (fused.py reads them as int64 columns of `limit` entries):

    A_FIELD      a - x0: element offset of the row's A in the arena, less the first input it touches
    X_FIELD      x0 | x1 << 32: the inputs it touches, x0 <= k < x1
    B_FIELD      b - y0: element offset of its B, less the first output it touches
    Y_FIELD      y0 | y1 << 32
    OWNER_FIELD  owner | bits of the float32 scale << 32; owner -2: no row
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sgl_bdlora.sharding import AdapterShard, HostLayer, LayerLayout
from sgl_bdlora.sharding.shard import ALIGNMENT

FIELDS = 5
SLICES = 3
_OFFSETS = (0, 2)
_NO_OWNER = -2 & 0xFFFFFFFF


class NoRankRows(ValueError):
    """The adapter has pieces that are not rank rows: combined over the ranks, in other layers, or not aligned to vector loads."""


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
    """One adapter's rank rows in all layers, in order of layer and slice.

    counts: (layers, SLICES) rows of each slice. fields: (rows, FIELDS) int64, offsets from the start of the layer's block, owner 0.
    """

    counts: np.ndarray
    fields: np.ndarray

    def at(self, blocks: np.ndarray) -> np.ndarray:
        """fields for blocks (layers,), the arena offset of every layer's block."""
        layer = np.repeat(np.arange(len(self.counts)), self.counts.sum(axis=1))
        placed = self.fields.copy()
        placed[:, _OFFSETS] += blocks[layer, None]
        return placed


def rank_rows(shard: AdapterShard, index: LayerIndex) -> RankRows:
    """The rank rows of an adapter. Raises NoRankRows."""
    counts = np.zeros((len(index), SLICES), dtype=np.int64)
    parts: dict[tuple[int, int], np.ndarray] = {}
    for path, layer in shard.layers.items():
        if path not in index.number:
            raise NoRankRows(path)
        for y_start, fields in _layer_rows(layer):
            place = (index.number[path], index.slice_of(path, y_start))
            counts[place] = len(fields)
            parts[place] = fields
    fields = [parts[place] for place in sorted(parts)]
    return RankRows(counts, np.concatenate([np.zeros((0, FIELDS), np.int64), *fields]))


def _layer_rows(layer: LayerLayout) -> Iterator[tuple[int, np.ndarray]]:
    for layout in layer.slices:
        piece = layout.piece
        if piece.combine != "none":
            raise NoRankRows(layout.name)
        j = np.arange(piece.local_rank)
        width_a, width_b = piece.shape_a[1], len(piece.outputs) // piece.blocks_b
        x0 = j // (piece.local_rank // piece.blocks_a) * width_a
        y0 = layout.y_start + j // (piece.local_rank // piece.blocks_b) * width_b
        a = (layout.a_start + j) * layer.width_a
        b = layout.b_offset + j * width_b
        if np.any(np.stack([x0, y0, a, b, j * 0 + width_a, j * 0 + width_b]) % ALIGNMENT):
            raise NoRankRows(layout.name)
        scale = int(np.float32(layout.scale).view(np.int32))
        owner = np.full_like(j, scale << 32)
        yield (
            layout.y_start,
            np.stack([a - x0, x0 | (x0 + width_a) << 32, b - y0, y0 | (y0 + width_b) << 32, owner], axis=1),
        )


def block_starts(blocks: Mapping[str, tuple[int, int]], index: LayerIndex) -> np.ndarray:
    """(layers,) arena offsets of a resident adapter's blocks; 0 where it has none."""
    return np.array([blocks.get(path, (0, 0))[0] for path in index.paths], dtype=np.int64)


def most_rows(adapters: Sequence[RankRows]) -> int:
    """Rank rows of the fullest slice of a batch."""
    return int(sum(rows.counts for rows in adapters).max()) if adapters else 0


def table_of(adapters: Sequence[tuple[RankRows, np.ndarray]], layers: int, limit: int) -> np.ndarray:
    """The rank rows of a batch: (layers, SLICES, FIELDS, limit) int64.

    adapters: each one's rows and block_starts; its owner number is its place here. limit: at least most_rows.
    """
    table = np.zeros((layers, SLICES, FIELDS, limit), dtype=np.int64)
    table[:, :, -1] = _NO_OWNER
    flat = table.reshape(layers * SLICES, FIELDS, limit)
    filled = np.zeros(layers * SLICES, dtype=np.int64)
    for owner, (rows, blocks) in enumerate(adapters):
        counts = rows.counts.ravel()
        place = np.repeat(np.arange(counts.size), counts)
        within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        fields = rows.at(blocks)
        fields[:, -1] += owner
        flat[place, :, filled[place] + within] = fields
        filled += counts
    return table
