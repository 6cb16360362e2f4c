"""A linear layer with its LoRA in one launch, in variants: the experiments behind sgl_bdlora/kernels/fused.py's two.

    python -m benchmarks.kernels.one_launch [--tokens 1 8 32] [--adapters 1 4] [--only NAME ...] [--output FILE]

Some programs of the launch compute h, the others a tile of x w^T each, which waits for the tags of its h. Variants are where those
programs stand in the grid (blocks start in that order, and those that start first push others together on the remaining
multiprocessors; "beside": in a launch of their own on a second stream, as served), how many they are, in how many parts they cut K,
whether B is read before the product, and whether a layer's programs bring the next layer's A into the second-level cache. One
tensor-parallel rank of Llama-3.1-8B as in decode_step; cuBLAS without LoRA and what is served run beside them. Milliseconds are medians.
"""

import itertools
import sys
from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl

from benchmarks.kernels.common import graph_ms, on_device, parse, parser_for
from benchmarks.kernels.decode_step import LAYERS
from benchmarks.kernels.shapes import hosts
from benchmarks.record import Rows
from sgl_bdlora.kernels import triton_ops
from sgl_bdlora.kernels.fused import (
    A_FIELD,
    OWNER_FIELD,
    X_FIELD,
    _expand_tile,
    _tag,
    _tagged,
    high,
    low,
    read_b,
    shrink_tile,
    slice_of,
)
from sgl_bdlora.kernels.triton_ops import LIMIT, ROWS, SHRINK_ROWS, TritonOps, _divisor

_FIELDS = tl.constexpr(5)
PLACES = ("beside", "first", "wave", "last")


@triton.jit
def _prefetch_a(arena, table, n_rows, program, LIMIT: tl.constexpr, SLICES: tl.constexpr, PROGRAMS: tl.constexpr):
    """Bring the A of a layer into the second-level cache: a line of 64 numbers a lane."""
    lines = tl.arange(0, 128)
    for row in range(program, n_rows * SLICES, PROGRAMS):
        here = table + row % SLICES * _FIELDS * LIMIT + row // SLICES
        offset = tl.load(here + A_FIELD * LIMIT)
        span = tl.load(here + X_FIELD * LIMIT)
        for first in range(low(span), high(span), 128 * 64):
            k = tl.minimum(first + lines * 64, high(span) - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [arena + offset + k], tl.int32, is_pure=False, pack=1
            )


@triton.jit(do_not_specialize=["layer", "T", "end0", "end1", "ahead", "next_slices"])
def one_launch_kernel(
    x,
    w,
    y,
    arena,
    table,
    next_table,
    meta,
    owners,
    h,
    layer,
    T,
    N,
    K,
    end0,
    end1,
    ahead,
    LIMIT: tl.constexpr,
    SLICES: tl.constexpr,
    NEXT_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    SHRINK_BR: tl.constexpr,
    SHRINK_BK: tl.constexpr,
    EARLY_B: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """y = x w^T + h B^T. Grid: (PROGRAMS + N / BN,), `ahead` of the tiles before the programs that compute h."""
    LATE_BK: tl.constexpr = SHRINK_BK if SHRINK_BK < 64 else 64
    pid = tl.program_id(0)
    t = tl.arange(0, BT)
    owner_T = tl.load(owners + t, mask=t < T, other=-1)
    tag = _tag(meta, layer)
    n_rows = tl.load(meta + 1)
    if (pid >= ahead) & (pid < ahead + PROGRAMS):
        k_count = tl.multiple_of(K // SPLITS, 16)
        groups = tl.cdiv(n_rows, SHRINK_BR)
        for piece in range(pid - ahead, groups * SPLITS * SLICES, PROGRAMS):
            split = piece % SPLITS
            s = piece // SPLITS // groups
            r = piece // SPLITS % groups * SHRINK_BR + tl.arange(0, SHRINK_BR)
            rows = table + s * _FIELDS * LIMIT
            own = owner_T[:, None] == low(tl.load(rows + OWNER_FIELD * LIMIT + r))[None, :]
            v = shrink_tile(x, arena, rows, t, T, split * k_count, k_count, K, r, LIMIT, BT, SHRINK_BR, SHRINK_BK)
            place = ((split * BT + t[:, None]) * SLICES + s) * LIMIT + r[None, :]
            tl.store(h + place, _tagged(v, tag), mask=own)
        if PREFETCH:
            _prefetch_a(arena, next_table, n_rows, pid - ahead, LIMIT, NEXT_SLICES, PROGRAMS)
        return
    n0 = tl.where(pid < ahead, pid, pid - PROGRAMS) * BN
    n = n0 + tl.arange(0, BN)
    s = slice_of(n0, end0, end1)
    table += s * _FIELDS * LIMIT
    r = tl.arange(0, BR)
    owner_R = low(tl.load(table + OWNER_FIELD * LIMIT + r))
    if EARLY_B:
        early_RN = read_b(arena, table, r, n, LIMIT)
    rows = tl.where(t < T, t, 0)
    k = tl.arange(0, BK)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        x_TK = tl.load(x + rows[:, None] * K + (k0 + k)[None, :])
        w_KN = tl.load(w + n[None, :].to(tl.int64) * K + (k0 + k)[:, None])
        acc = tl.dot(x_TK, w_KN, acc)
    if EARLY_B:
        b_RN = early_RN
    else:
        b_RN = read_b(arena, table, r, n, LIMIT)
    acc = _expand_tile(
        acc, b_RN, x, arena, table, h, t, owner_T, tag, s, r, owner_R, T, K, LIMIT, SLICES, SPLITS, BT, BR, LATE_BK
    )
    for first in tl.range(BR, n_rows, BR, num_stages=1):
        r = first + tl.arange(0, BR)
        owner_R = low(tl.load(table + OWNER_FIELD * LIMIT + r))
        b_RN = read_b(arena, table, r, n, LIMIT)
        acc = _expand_tile(
            acc, b_RN, x, arena, table, h, t, owner_T, tag, s, r, owner_R, T, K, LIMIT, SLICES, SPLITS, BT, BR, LATE_BK
        )
    tl.store(y + t[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=(t < T)[:, None])


class OneLaunch:
    """The launches of a variant.

    place: "first", "last", "wave" (after one tile for each multiprocessor) or "beside". programs: beside, for each slice and part of K.
    """

    def __init__(self, ops: TritonOps, programs: int, place: str, splits: int, early_b: bool, prefetch: bool):
        self.ops = ops
        self.programs, self.place, self.splits, self.early_b, self.prefetch = programs, place, splits, early_b, prefetch
        self.multiprocessors = 132
        if ops._arena.device.type == "cuda":
            self.multiprocessors = torch.cuda.get_device_properties(ops._arena.device).multi_processor_count

    def linear(self, x_TK: torch.Tensor, w_NK: torch.Tensor, path: str) -> torch.Tensor:
        ops = self.ops
        plan, layer = ops.plans[path], ops.index.number[path]
        following = (layer + 1) % len(ops.index)
        block_t = max(16, triton.next_power_of_2(len(x_TK)))
        tiles = plan.outputs // plan.block_n
        ahead = {"first": 0, "wave": min(tiles, self.multiprocessors)}.get(self.place, tiles)
        splits = max(n for n in range(1, self.splits + 1) if plan.inputs % (n * 16) == 0)
        words, programs = ops._words[0], self.programs
        if self.place == "beside":
            words, programs = ops._words[layer % 2], 0
            plan = replace(plan, splits=splits)
            triton_ops.SHRINK_PROGRAMS = self.programs
            ops._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(ops._side):
                ops._shrink_beside(x_TK, words, plan, layer, block_t)
        y_TN = x_TK.new_empty(len(x_TK), plan.outputs)
        one_launch_kernel[(programs + tiles,)](
            x_TK, w_NK, y_TN, ops._arena, ops._local.rows[layer], ops._local.rows[following], ops._meta, ops._meta[2:],
            words, layer, len(x_TK), plan.outputs, plan.inputs, *plan.ends, ahead,
            LIMIT=LIMIT, SLICES=plan.slices, NEXT_SLICES=ops.plans[ops.index.paths[following]].slices, SPLITS=splits,
            PROGRAMS=programs, BT=block_t, BN=plan.block_n,
            BK=plan.block_k if block_t <= 32 else min(plan.block_k, 128),
            BR=max(16, min(ROWS, 2048 // (block_t * splits))), SHRINK_BR=SHRINK_ROWS,
            SHRINK_BK=_divisor(256 * 16 // block_t, plan.inputs // splits),
            EARLY_B=self.early_b, PREFETCH=self.prefetch, num_warps=4, num_stages=4,
        )  # fmt: skip
        if self.place == "beside" and layer == len(ops.index) - 1:
            torch.cuda.current_stream().wait_stream(ops._side)
        return y_TN


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("one_launch", __doc__, rank=12, repeats=40)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[1, 8, 32])
    add("--adapters", type=int, nargs="+", default=[1, 4])
    add("--programs", type=int, nargs="+", default=[4, 16, 36, 132])
    add("--splits", type=int, nargs="+", default=[2, 4])
    add("--places", nargs="+", default=list(PLACES), choices=PLACES)
    args = parse(parser, argv)
    rows = Rows(args.output, tp=args.tp)
    layers = hosts("8b", args.tp, LAYERS)
    ops, residents = on_device(layers, max(args.adapters), args.rank, max(args.tokens))
    sizes = [(sum(len(s.outputs) for s in host.slices), len(host.slices[0].inputs)) for host in layers]
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for n, k in sizes]
    paths = [host.path for host in layers]
    served_programs = triton_ops.SHRINK_PROGRAMS
    variants = [None]
    for variant in itertools.product(args.places, args.programs, args.splits, (False, True), (False, True)):
        beside, prefetch = variant[0] == "beside", variant[-1]
        if (beside and variant[1] > 16) or (not beside and variant[1] < 16) or (beside and prefetch):
            continue
        variants.append(variant)
    for tokens, count in itertools.product(args.tokens, args.adapters):
        if count > tokens:
            continue
        xs = [torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16) for _, k in sizes]
        owners = np.arange(tokens, dtype=np.int32) % count
        capture = lambda c=count, o=owners: ops.set_batch(residents[:c], o, static=True)  # noqa: E731

        def run(linear, xs=xs):
            for x, w, path in zip(xs, weights, paths, strict=True):
                linear(x.neg_(), w, path)

        cublas = graph_ms(lambda run=run: run(lambda x, w, path: torch.mm(x, w.T)), capture, args.repeats)
        print(f"{tokens} tokens, {count} adapters: cuBLAS {cublas:.3f} ms", flush=True)
        for variant in variants:
            triton_ops.SHRINK_PROGRAMS = served_programs
            one = None if variant is None else OneLaunch(ops, variant[1], variant[0], *variant[2:])
            linear = one.linear if one else lambda x, w, path: ops.linear(x, w, None, path)
            ms = graph_ms(lambda run=run, linear=linear: run(linear), capture, args.repeats)
            names = ("place", "programs", "splits", "early_b", "prefetch")
            setting = dict(zip(names, variant, strict=True)) if variant else {"place": "served"}
            rows.write(tokens=tokens, adapters=count, rank=args.rank, cublas_ms=cublas, linear_ms=ms, **setting)
            print(f"  {ms:6.3f} ms  {ms / cublas:.3f}  {setting}", flush=True)
    print(rows.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
