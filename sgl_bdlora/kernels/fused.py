"""A linear layer with its LoRA in Triton, for batches of few rows (decode steps).

A rank row is one row of a local A together with the matching column of B; it carries its adapter's number (owner), its scale and the
spans of inputs and outputs that it touches (rows.py). For each row t of the batch and each rank row r of the same owner

    h[t, r] = scale_r * sum_k x[t, k] A[r, k]            shrink
    y[t, n] += h[t, r] B[n, r]                           expand

and for all others h is taken as zero. Nothing is padded to the largest rank, and inputs and outputs outside a row's span (the zero
blocks of block-diagonal factors) are not read.

With local pieces nothing stands between shrink and expand, so one launch does it all. Its first programs compute h, each of the others a
tile of x W^T, to which it adds the expand before it stores it: y is written once. Programs cannot wait for one another with a barrier; a
tile waits for h itself, every word of which carries a tag of the launch that wrote it. A tile whose tags do not come computes its part of
the shrink itself, so it ends whether or not the others ever get a place on the chip.

Where tiles would be narrow, or x is read again and again by many of them, several programs share a tile: each has a part of K and some of
the rank rows, and whichever comes last adds up all parts' sums (float32).

What a tile needs of the tables is loaded before the product, and what they point to (B, h) is asked for shortly before the product ends:
nothing waits in front of the weights, and little behind them. Rows beyond the batch are masked, not repeated: hundreds of programs that
ask for the same line of x wait for each other (2 us of 11, one token).

Between two kernels a GPU does nothing for about a microsecond, of some ten that a launch takes. Where it can, a launch therefore begins
while the kernel ahead of it ends (CUDA's programming guide, "Programmatic Dependent Launch"). Every program waits for that kernel before
it reads or writes anything, and only then lets the next kernel begin, here once its product is through. So what a next kernel reads before
it waits in turn (flashinfer's all-reduce the residual, its attention the indices) is older than this launch and complete. A kernel ahead
that was launched likewise has to wait in at least one of its programs, as all of SGLang's do: else it could end before those ahead of it.

h is float32 with the low 12 bits replaced by the tag, which leaves 12 bits of significand: more than float16's 11 and bfloat16's 8.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sgl_bdlora.kernels.tiles import SHRINK_STAGES

# Bits of a word of h that hold the tag.
TAG_BITS = 12
TAGS = 2**TAG_BITS - 1
_MASK = tl.constexpr(TAGS)
_SHRINK_STAGES = tl.constexpr(SHRINK_STAGES)
# Polls of a tile before it computes the shrink itself; each takes about a microsecond.
_PATIENCE = tl.constexpr(64)

# Fields of a rank row in the table, `limit` entries each (rows.py).
A_FIELD = tl.constexpr(0)
X_FIELD = tl.constexpr(1)
B_FIELD = tl.constexpr(2)
Y_FIELD = tl.constexpr(3)
OWNER_FIELD = tl.constexpr(4)
FIELDS = tl.constexpr(5)


@triton.jit
def low(packed):
    return packed.to(tl.int32)


@triton.jit
def high(packed):
    return (packed >> 32).to(tl.int32)


@triton.jit
def _tag(first_tag, layer):
    return (first_tag + layer) % _MASK + 1


@triton.jit
def shrink_tile(
    x,
    arena,
    table,
    t,
    T,
    k_first,
    k_count,
    K,
    r,
    LIMIT: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """scale * x A^T over k_count inputs from k_first on: (BT, BR) float32, zero in rows t >= T."""
    a_off = tl.multiple_of(tl.load(table + A_FIELD * LIMIT + r), 8)
    span = tl.load(table + X_FIELD * LIMIT + r)
    scale = high(tl.load(table + OWNER_FIELD * LIMIT + r)).to(tl.float32, bitcast=True)
    x0 = tl.multiple_of(low(span), 8)
    x1 = tl.multiple_of(high(span), 8)
    acc = tl.zeros((BT, BR), dtype=tl.float32)
    for k0 in tl.range(0, k_count, BK, num_stages=_SHRINK_STAGES):
        k = k_first + k0 + tl.arange(0, BK)
        x_TK = tl.load(x + t[:, None].to(tl.int64) * K + k[None, :], mask=(t < T)[:, None], other=0.0)
        inside = tl.max_constancy((k[:, None] >= x0[None, :]) & (k[:, None] < x1[None, :]), [8, 1])
        a_KR = tl.load(arena + a_off[None, :] + k[:, None], mask=inside, other=0.0)
        acc = tl.dot(x_TK, a_KR, acc)
    return acc * scale[None, :]


@triton.jit
def _own(owner_T, owner_R):
    """Which rank rows are a row's own adapter's: (BT, BR). Adapters have multiples of four rows (rows.py: TOGETHER)."""
    return tl.max_constancy(owner_T[:, None] == owner_R[None, :], [1, 4])


@triton.jit
def _tagged(v, tag):
    """Words of h: v rounded to nearest above the tag's bits. Infinities and NaN keep theirs."""
    bits = v.to(tl.int32, bitcast=True)
    bits = tl.where(tl.abs(v) < float("inf"), bits + (_MASK + 1) // 2, bits)
    return (bits & ~_MASK) | tag


@triton.jit
def _splits_of_h(n_rows, SPLITS: tl.constexpr, SLICES: tl.constexpr, PROGRAMS: tl.constexpr, BR: tl.constexpr):
    """Parts of K that h is computed in: half of four where the programs could not compute all of them in one round."""
    if SPLITS <= 2 or PROGRAMS == 0:
        return SPLITS
    return tl.where(tl.cdiv(n_rows, BR) * SLICES * SPLITS <= PROGRAMS, SPLITS, SPLITS // 2)


@triton.jit
def _places(place, own, n_splits, SPLIT: tl.constexpr, SPLITS: tl.constexpr):
    """(BT, BR, SPLITS): where the words of h are, and which of them there are."""
    split = tl.arange(0, SPLITS)
    there = own[:, :, None]
    if SPLITS > 2:
        there = there & (split < n_splits)[None, None, :]
    return place[:, :, None] + (split * SPLIT)[None, None, :], there


@triton.jit
def _words(h, place, own, n_splits, tag, SPLIT: tl.constexpr, SPLITS: tl.constexpr):
    """(BT, BR, SPLITS) words of h. A word read again may be newer, so value and tag come from one load."""
    places, there = _places(place, own, n_splits, SPLIT, SPLITS)
    return tl.load(h + places, mask=there, other=tag, volatile=True)


@triton.jit
def _value(words):
    """(BT, BR): the sum of all splits, always in the same order."""
    return tl.sum((words & ~_MASK).to(tl.float32, bitcast=True), axis=2)


@triton.jit
def _late(words, tag):
    """Whether words are of an older launch."""
    return tl.max((words ^ tag) & _MASK) > 0


@triton.jit
def _expand_tile(
    acc,
    b_RN,
    words,
    x,
    arena,
    table,
    h,
    t,
    own,
    place,
    n_splits,
    tag,
    r,
    T,
    K,
    LIMIT: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """acc + h B^T for BR rank rows. words: of h, as they were read first."""
    late = _late(words, tag)
    patience = _PATIENCE
    while late & (patience > 0):
        words = _words(h, place, own, n_splits, tag, SPLIT, SPLITS)
        late = _late(words, tag)
        patience -= 1
    h_TR = _value(words)
    if late:
        h_TR = shrink_tile(x, arena, table, t, T, 0, K, K, r, LIMIT, BT, BR, BK)
    # Chosen, not multiplied by zero: another adapter's rows may hold infinity here.
    h_TR = tl.where(own, h_TR, 0.0).to(b_RN.dtype)
    return tl.dot(h_TR, b_RN, acc)


@triton.jit
def read_b(arena, table, r, n, LIMIT: tl.constexpr):
    """(BR, BN) of B, zero outside the rows' spans."""
    b_off = tl.multiple_of(tl.load(table + B_FIELD * LIMIT + r), 8)
    return _read_b(arena, b_off, tl.load(table + Y_FIELD * LIMIT + r), n)


@triton.jit
def _read_b(arena, b_off, span, n):
    """The same from loaded fields; b_off has to be declared a multiple of 8 where it is loaded, or B is read two bytes at a time."""
    y0 = tl.multiple_of(low(span), 8)
    y1 = tl.multiple_of(high(span), 8)
    inside = tl.max_constancy((n[None, :] >= y0[:, None]) & (n[None, :] < y1[:, None]), [1, 8])
    return tl.load(arena + b_off[:, None] + n[None, :], mask=inside, other=0.0)


@triton.jit
def _expand_rest(
    acc,
    x,
    arena,
    table,
    h,
    t,
    owner_T,
    s,
    n_splits,
    tag,
    n,
    part,
    n_rows,
    T,
    K,
    LIMIT: tl.constexpr,
    SLICES: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """acc + h B^T for this part's of the rank rows from BR on: all of them as they are found, again from the start as long as any was late.

    So nothing waits inside the loop, and rank rows can be asked for ahead (STAGES).
    """
    done = acc
    begin = tl.where(part == 0, PARTS, part) * BR
    late = True
    patience = _PATIENCE
    while late & (patience > 0):
        acc = done
        missing = tl.zeros((BT, BR, SPLITS), dtype=tl.int32)
        for first in tl.range(begin, n_rows, PARTS * BR, num_stages=STAGES):
            r = first + tl.arange(0, BR)
            own = _own(owner_T, low(tl.load(table + OWNER_FIELD * LIMIT + r)))
            place = (t[:, None] * SLICES + s) * LIMIT + r[None, :]
            # Not from the first-level cache, which would keep words of before.
            places, there = _places(place, own, n_splits, SPLIT, SPLITS)
            words = tl.load(h + places, mask=there, other=tag, cache_modifier=".cg")
            missing |= words ^ tag
            b_RN = read_b(arena, table, r, n, LIMIT)
            acc = tl.dot(tl.where(own, _value(words), 0.0).to(b_RN.dtype), b_RN, acc)
        late = tl.max(missing & _MASK) > 0
        patience -= 1
    if late:
        acc = done
        for first in tl.range(begin, n_rows, PARTS * BR, num_stages=1):
            r = first + tl.arange(0, BR)
            own = _own(owner_T, low(tl.load(table + OWNER_FIELD * LIMIT + r)))
            b_RN = read_b(arena, table, r, n, LIMIT)
            h_TR = shrink_tile(x, arena, table, t, T, 0, K, K, r, LIMIT, BT, BR, BK)
            acc = tl.dot(tl.where(own, h_TR, 0.0).to(b_RN.dtype), b_RN, acc)
    return acc


@triton.jit
def slice_of(n0, end0, end1):
    return (n0 >= end0).to(tl.int32) + (n0 >= end1).to(tl.int32)


@triton.jit
def _shrink(
    x,
    arena,
    table,
    h,
    n_rows,
    n_splits,
    t,
    owner_T,
    tag,
    T,
    K: tl.constexpr,
    LIMIT: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """This program's pieces of h: BR rank rows of a slice, over a part of K."""
    groups = tl.cdiv(n_rows, BR)
    k_count = K // n_splits
    if SPLITS > 2:
        k_count = tl.multiple_of(k_count, BK)
    for piece in range(tl.program_id(0), groups * n_splits * SLICES, PROGRAMS):
        split = piece % n_splits
        s = piece // n_splits // groups
        r = piece // n_splits % groups * BR + tl.arange(0, BR)
        rows = table + s * FIELDS * LIMIT
        own = _own(owner_T, low(tl.load(rows + OWNER_FIELD * LIMIT + r)))
        v = shrink_tile(x, arena, rows, t, T, split * k_count, k_count, K, r, LIMIT, BT, BR, BK)
        place = ((split * BT + t[:, None]) * SLICES + s) * LIMIT + r[None, :]
        tl.store(h + place, _tagged(v, tag), mask=own)


@triton.jit
def _sum_of_parts(acc, sums, arrived, tile, part, t, T, PARTS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """(sum, last). last: whether this program is the last of its tile's to come; only then is it the sum, in the order of the parts, so
    that it is the same whoever is last."""
    place = tl.arange(0, BT)[:, None] * BN + tl.arange(0, BN)[None, :]
    sums += tile * PARTS * BT * BN
    inside = (t < T)[:, None]
    tl.store(sums + part * BT * BN + place, acc, mask=inside)
    # All threads have stored before one of them tells.
    tl.debug_barrier()
    last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1
    if last:
        tl.store(arrived + tile, 0)
        acc = tl.zeros((BT, BN), dtype=tl.float32)
        for i in tl.static_range(PARTS):
            acc += tl.load(sums + i * BT * BN + place, mask=inside, other=0.0, cache_modifier=".cg")
    return acc, last


@triton.jit(do_not_specialize=["layer", "T", "end0", "end1"])
def linear_kernel(
    x,
    w,
    bias,
    y,
    arena,
    table,
    meta,
    owners,
    h,
    sums,
    arrived,
    layer,
    T,
    N,
    K: tl.constexpr,
    end0,
    end1,
    LIMIT: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    BR: tl.constexpr,
    SHRINK_BR: tl.constexpr,
    SHRINK_BK: tl.constexpr,
    HALVES: tl.constexpr,
    LATE_BK: tl.constexpr,
    LATE_STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y = x w^T + bias + h B^T. Grid: (PROGRAMS for h + PARTS for each of N / BN tiles,).

    x (T, K), w (N, K), bias (N,), y (T, N), T <= BT; K divides by BK, SPLITS * SHRINK_BK and LATE_BK, slices by BN. h (SPLITS, BT, SLICES,
    LIMIT) int32: tagged sums over SPLITS equal parts of K, or fewer (_splits_of_h); only words of a row's own adapter are written.
    PROGRAMS may be 0: then every tile computes its own. meta: first tag less one, number of rank rows. end0, end1: where the outputs of the
    first and of the second slice end; N where there is no further slice.

    A tile's product and its rank rows are shared by PARTS programs, K as equally as its blocks allow. sums (N / BN, PARTS, BT, BN) float32
    and arrived (N / BN,) int32, zero before and after, are used where there are several. EARLY: inputs that are left of the first part when
    it asks for h and B, a multiple of BK and no longer than that part.

    DEPENDENT: it is launched so that it may begin before the kernel ahead of it has ended.
    """
    if DEPENDENT:
        gdc_wait()
    t = tl.arange(0, BT)
    owner_T = tl.load(owners + t, mask=t < T, other=-1)
    first_tag = tl.load(meta)
    n_rows = tl.load(meta + 1)
    n_splits = _splits_of_h(n_rows, SPLITS, SLICES, PROGRAMS, SHRINK_BR)
    if PROGRAMS > 0:
        if tl.program_id(0) < PROGRAMS:
            # Rank rows that a round computes with half as many at a time.
            HALF_ROUND: tl.constexpr = PROGRAMS // (SPLITS * SLICES) * (SHRINK_BR // 2) if HALVES else 0
            if HALVES and n_rows <= HALF_ROUND:
                _shrink(
                    x, arena, table, h, n_rows, n_splits, t, owner_T, _tag(first_tag, layer),
                    T, K, LIMIT, SLICES, SPLITS, PROGRAMS, BT, SHRINK_BR // 2, SHRINK_BK,
                )  # fmt: skip
            else:
                _shrink(
                    x, arena, table, h, n_rows, n_splits, t, owner_T, _tag(first_tag, layer),
                    T, K, LIMIT, SLICES, SPLITS, PROGRAMS, BT, SHRINK_BR, SHRINK_BK,
                )  # fmt: skip
            return
    tile = (tl.program_id(0) - PROGRAMS) // PARTS
    part = (tl.program_id(0) - PROGRAMS) % PARTS
    n0 = tile * BN
    n = n0 + tl.arange(0, BN)
    s = slice_of(n0, end0, end1)
    tag = _tag(first_tag, layer)
    table += s * FIELDS * LIMIT
    # From one split's words to the next's.
    SPLIT: tl.constexpr = BT * SLICES * LIMIT
    r = tl.arange(0, BR)
    owner_R = tl.load(table + OWNER_FIELD * LIMIT + r)
    b_off = tl.multiple_of(tl.load(table + B_FIELD * LIMIT + r), 8)
    span = tl.load(table + Y_FIELD * LIMIT + r)
    place = (t[:, None] * SLICES + s) * LIMIT + r[None, :]
    words = tl.zeros((BT, BR, SPLITS), dtype=tl.int32)
    b_RN = tl.zeros((BR, BN), dtype=x.dtype.element_ty)
    k = tl.arange(0, BK)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    blocks: tl.constexpr = K // BK
    end = (part + 1) * blocks // PARTS * BK
    early = tl.where(part == 0, end - EARLY, -1)
    for k0 in tl.range(part * blocks // PARTS * BK, end, BK, num_stages=STAGES):
        w_KN = tl.load(w + n[None, :].to(tl.int64) * K + (k0 + k)[:, None])
        x_TK = tl.load(x + t[:, None] * K + (k0 + k)[None, :], mask=(t < T)[:, None], other=0.0)
        acc = tl.dot(x_TK, w_KN, acc)
        if k0 == early:
            words = _words(h, place, _own(owner_T, low(owner_R)), n_splits, tag, SPLIT, SPLITS)
            b_RN = _read_b(arena, b_off, span, n)
    if DEPENDENT:
        # Not at the start: what comes next would take room from this kernel.
        gdc_launch_dependents()
    if part == 0:
        own = _own(owner_T, low(owner_R))
        acc = _expand_tile(
            acc, b_RN, words, x, arena, table, h, t, own, place, n_splits, tag, r,
            T, K, LIMIT, SPLIT, SPLITS, BT, BR, LATE_BK,
        )  # fmt: skip
    if n_rows > BR:
        acc = _expand_rest(
            acc, x, arena, table, h, t, owner_T, s, n_splits, tag, n, part, n_rows,
            T, K, LIMIT, SLICES, SPLIT, SPLITS, PARTS, BT, BR, LATE_BK, LATE_STAGES,
        )  # fmt: skip
    if PARTS > 1:
        acc, last = _sum_of_parts(acc, sums, arrived, tile, part, t, T, PARTS, BT, BN)
        if not last:
            return
    if BIAS:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    tl.store(y + t[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=(t < T)[:, None])
