"""Shrink and expand as Triton launches of their own: for prefill, quantised layers, and where a collective stands between the two.

    h[t, c] = scale * sum_k x[t, k] A[r, k]              shrink
    y[t, n] += sum_c h[t, c] B[n, r]                     expand

for the rank rows r of row t's own adapter, whose columns c of h lie side by side from 0 on (rows.py: places): h is as wide as the largest
adapter of the batch, whatever their number. Rows of the batch are taken in tiles; a tile visits the adapters between the least and the
greatest owner in it. The rows of a request lie together, so in prefill that is one adapter or two.

Prefill is bound by the base product's arithmetic, so bytes can be moved beside it: there expand only writes h B^T, and the product adds
itself to what it finds (cuBLAS, beta = 1). With the product first, expand would read all of y and write it again: twice the bytes, and
nothing beside them.
"""

import triton
import triton.language as tl

from sgl_bdlora.kernels.fused import FIELDS, read_b, shrink_tile, slice_of

_NONE = tl.constexpr(1 << 30)


@triton.jit
def _owners(owners, t, T):
    """Owner of each row of the tile, the least of them that is an adapter, and the greatest."""
    owner_T = tl.load(owners + t, mask=t < T, other=-1)
    return owner_T, tl.min(tl.where(owner_T < 0, _NONE, owner_T)), tl.max(owner_T)


@triton.jit
def _rows_of(places, s, adapters):
    """(first row, number of rows, first column) of an adapter in slice s."""
    here = places + s * adapters * 2
    start = tl.load(here)
    return start, tl.load(here + 2) - start, tl.load(here + 1)


@triton.jit(do_not_specialize=["T", "adapters"])
def shrink_kernel(
    x,
    arena,
    table,
    places,
    owners,
    h,
    T,
    K,
    stride,
    adapters,
    LIMIT: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (SPLITS * token tiles, programs that share a tile's adapters).

    x (T, K). table, places: one layer of rows.table_of, `adapters` the third dimension of places. h (SPLITS, T, stride), any float type:
    sums over SPLITS equal parts of K. Only the columns of a row's own adapter are written.
    """
    t = tl.program_id(0) // SPLITS * BT + tl.arange(0, BT)
    split = tl.program_id(0) % SPLITS
    owner_T, least, greatest = _owners(owners, t, T)
    k_count = tl.multiple_of(K // SPLITS, 16)
    for a in range(least + tl.program_id(1), greatest + 1, tl.num_programs(1)):
        own = owner_T == a
        if tl.max(own.to(tl.int32)) > 0:
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
            for first in range(0, total, BR):
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
                place = (split.to(tl.int64) * T + t[:, None]) * stride + column[None, :]
                tl.store(h + place, v.to(h.dtype.element_ty), mask=own[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["T", "adapters", "end0", "end1"])
def expand_kernel(
    y,
    bias,
    arena,
    table,
    places,
    owners,
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
):
    """y += h B^T if ADD, which leaves rows of the base model alone; else y = bias + h B^T in all rows.

    Grid: (N / BN, token tiles). y (T, N), bias (N,) if BIAS; the rest as in shrink_kernel.
    """
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    owner_T, least, greatest = _owners(owners, t, T)
    s = slice_of(n0, end0, end1)
    table += s * FIELDS * LIMIT
    y_TN = y + t[:, None].to(tl.int64) * N + n[None, :]
    if ADD:
        if greatest < 0:
            return
        written = (owner_T >= 0)[:, None]
        acc = tl.load(y_TN, mask=written, other=0.0).to(tl.float32)
    else:
        written = (t < T)[:, None]
        acc = tl.zeros((BT, BN), dtype=tl.float32)
        if BIAS:
            acc += tl.load(bias + n).to(tl.float32)[None, :]
    for a in range(least, greatest + 1):
        own = owner_T == a
        if tl.max(own.to(tl.int32)) > 0:
            row, count, column = _rows_of(places + a * 2, s, adapters)
            for first in range(0, count, BR):
                j = first + tl.arange(0, BR)
                inside = j < count
                b_RN = read_b(arena, table, row + tl.minimum(j, count - 1), n, LIMIT)
                h_TR = tl.zeros((BT, BR), dtype=tl.float32)
                for split in tl.static_range(SPLITS):
                    place = (t[:, None].to(tl.int64) + split * T) * stride + (column + j)[None, :]
                    h_TR += tl.load(h + place, mask=own[:, None] & inside[None, :], other=0.0).to(tl.float32)
                acc = tl.dot(h_TR.to(b_RN.dtype), b_RN, acc)
    tl.store(y_TN, acc.to(y.dtype.element_ty), mask=written)
