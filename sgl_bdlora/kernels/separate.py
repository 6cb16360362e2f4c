"""Shrink and expand as Triton launches of their own: for large batches, quantised layers, and where a collective stands between the two.

    h[i, c] = scale * sum_k x[t, k] A[r, k]              shrink
    y[t, n] += sum_c h[i, c] B[n, r]                     expand

Rows t of the batch are taken adapter by adapter (i is a row's place in that order), in tiles of one adapter each (tiles_of): whatever
stands side by side in the batch, a tile reads one adapter's A and B and nothing of the others'. An adapter's columns c of h lie side by
side from 0 on (rows.py: places): h is as wide as the largest adapter of the batch, whatever their number. How many tiles there are is
known on the device alone once the kernels are in a graph; programs that find none left end.

Prefill is bound by the base product's arithmetic, so bytes can be moved beside it: there expand only writes h B^T, and the product adds
itself to what it finds (cuBLAS, beta = 1). With the product first, expand would read all of y and write it again: twice the bytes, and
nothing beside them.
"""

import numpy as np
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sgl_bdlora.kernels.fused import FIELDS, read_b, shrink_tile, slice_of

# Numbers of a tile (tiles_of).
TILE_FIELDS = 3
_TILE_FIELDS = tl.constexpr(TILE_FIELDS)


def order_of(owners: np.ndarray, places: int) -> np.ndarray:
    """(places,) int32: the rows adapter by adapter, those of the base model and what no row has behind them."""
    order = np.arange(places, dtype=np.int32)
    order[: len(owners)] = np.argsort(np.where(owners < 0, np.iinfo(np.int32).max, owners), kind="stable")
    return order


def tiles_of(owners: np.ndarray, rows: int) -> np.ndarray:
    """(tiles, 3) int32: adapter, first place in `order_of`, and number of rows, at most `rows`, of every tile."""
    adapters, counts = np.unique(owners[owners >= 0], return_counts=True)
    tiles = -(-counts // rows)
    within = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = np.repeat(np.cumsum(counts) - counts, tiles) + within * rows
    left = np.repeat(counts, tiles) - within * rows
    return np.stack([np.repeat(adapters, tiles), first, np.minimum(left, rows)], axis=1).astype(np.int32)


def most_tiles(tokens: int, adapters: int, rows: int) -> int:
    """Of a batch of so many rows."""
    return tokens // rows + min(adapters, tokens)


@triton.jit
def _rows_of(places, s, adapters):
    """(first row, number of rows, first column) of an adapter in slice s."""
    here = places + s * adapters * 2
    start = tl.load(here)
    return start, tl.load(here + 2) - start, tl.load(here + 1)


@triton.jit(do_not_specialize=["T", "adapters", "groups"])
def shrink_kernel(
    x,
    arena,
    table,
    places,
    n_tiles,
    order,
    tiles,
    h,
    T,
    K,
    stride,
    adapters,
    groups,
    LIMIT: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid: any number of programs.

    x (T, K). table, places: one layer of rows.table_of, `adapters` the third dimension of places. n_tiles (2,): of the batch, and the place
    behind the last one's rows. order, tiles: order_of and tiles_of, at most BT rows. h (SPLITS, T, stride), any float type: sums over
    SPLITS equal parts of K; only the columns of a row's own adapter are written. groups: programs that share the rank rows of a tile.
    DEPENDENT: as for linear_kernel, but it lets the next kernel begin at once, which is mostly the expand.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    k_count = tl.multiple_of(K // SPLITS, 16)
    for item in range(tl.program_id(0), tl.load(n_tiles) * SPLITS * groups, tl.num_programs(0)):
        group = item % groups
        split = item // groups % SPLITS
        tile = tiles + item // groups // SPLITS * _TILE_FIELDS
        a = tl.load(tile)
        i = tl.load(tile + 1) + tl.arange(0, BT)
        filled = tl.arange(0, BT) < tl.load(tile + 2)
        t = tl.load(order + i, mask=filled, other=T)
        row0, total, column0 = _rows_of(places + a * 2, 0, adapters)
        stop0 = total
        row1, column1 = row0, column0
        row2, column2 = row0, column0
        stop1 = total
        if SLICES > 1:
            row1, count, column1 = _rows_of(places + a * 2, 1, adapters)
            total += count
            stop1 = total
        if SLICES > 2:
            row2, count, column2 = _rows_of(places + a * 2, 2, adapters)
            total += count
        for first in range(group * BR, total, groups * BR):
            # Rows of all slices in one list, so that x is read once for them.
            j = first + tl.arange(0, BR)
            inside = j < total
            j = tl.minimum(j, total - 1)
            s = (j >= stop0).to(tl.int32) + (j >= stop1).to(tl.int32)
            within = j - tl.where(s == 0, 0, tl.where(s == 1, stop0, stop1))
            row = within + tl.where(s == 0, row0, tl.where(s == 1, row1, row2))
            column = within + tl.where(s == 0, column0, tl.where(s == 1, column1, column2))
            v = shrink_tile(
                x, arena, table, t, T, split * k_count, k_count, K, s * (FIELDS * LIMIT) + row, LIMIT, BT, BR, BK
            )
            place = (split.to(tl.int64) * T + i[:, None]) * stride + column[None, :]
            tl.store(h + place, v.to(h.dtype.element_ty), mask=filled[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["T", "adapters", "end0", "end1"])
def expand_kernel(
    y,
    bias,
    arena,
    table,
    places,
    n_tiles,
    order,
    tiles,
    h,
    T,
    N,
    end0,
    end1,
    stride,
    adapters,
    LIMIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y += h B^T if ADD, which leaves rows of the base model alone; else y = bias + h B^T in all rows.

    Grid: any number of programs. y (T, N), bias (N,) if BIAS; the rest as in shrink_kernel.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    count = tl.load(n_tiles)
    # The base model's first place.
    base = tl.load(n_tiles + 1)
    blocks = N // BN
    total = (count if ADD else count + tl.cdiv(T - base, BT)) * blocks
    # Side by side, so that a program reads a tile's order, places and h once from afar and then from its own cache.
    each = tl.cdiv(total, tl.num_programs(0))
    for item in range(tl.program_id(0) * each, tl.minimum(total, (tl.program_id(0) + 1) * each)):
        number = item // blocks
        n0 = item % blocks * BN
        n = n0 + tl.arange(0, BN)
        is_base = number >= count
        tile = tiles + tl.where(is_base, 0, number) * _TILE_FIELDS
        first = tl.where(is_base, base + (number - count) * BT, tl.load(tile + 1))
        i = first + tl.arange(0, BT)
        filled = tl.arange(0, BT) < tl.where(is_base, T - first, tl.load(tile + 2))
        t = tl.load(order + i, mask=filled, other=0)
        y_TN = y + t[:, None].to(tl.int64) * N + n[None, :]
        if ADD:
            acc = tl.load(y_TN, mask=filled[:, None], other=0.0).to(tl.float32)
        else:
            acc = tl.zeros((BT, BN), dtype=tl.float32)
            if BIAS:
                acc += tl.load(bias + n).to(tl.float32)[None, :]
        if not is_base:
            s = slice_of(n0, end0, end1)
            row, ranks, column = _rows_of(places + tl.load(tile) * 2, s, adapters)
            for r in tl.range(0, ranks, BR, num_stages=3):
                j = r + tl.arange(0, BR)
                b_RN = read_b(arena, table + s * FIELDS * LIMIT, row + tl.minimum(j, ranks - 1), n, LIMIT)
                h_TR = tl.zeros((BT, BR), dtype=tl.float32)
                for split in tl.static_range(SPLITS):
                    place = (i[:, None].to(tl.int64) + split * T) * stride + (column + j)[None, :]
                    h_TR += tl.load(h + place, mask=filled[:, None] & (j < ranks)[None, :], other=0.0).to(tl.float32)
                acc = tl.dot(h_TR.to(b_RN.dtype), b_RN, acc)
        tl.store(y_TN, acc.to(y.dtype.element_ty), mask=filled[:, None])
