"""Tile sizes of the linear kernel (sgl_bdlora/kernels/tiles.py), swept: one kind of layer at a time, 32 of them in a CUDA graph.

    python -m benchmarks.kernels.tune [--tp 2] [--tokens 8 32] [--adapters 4] [--rank 12] [--only qkv_proj ...] [--quick | --chosen]
    for layer in qkv_proj o_proj gate_up_proj down_proj; do python -m benchmarks.kernels.tune --only $layer --turns /tmp/turns & done; wait

Every product stands behind a pause of 6 us and a small kernel, as behind the all-reduce, norm or attention of a model (down_proj: the
small kernel only). Microseconds a layer, less those of the same graph without products; cuBLAS without LoRA and what is served come
first, then variants of it, best first. Rows of the batch take turns with the adapters; where the separate kernels serve so many rows, there
are no variants. Most of a sweep is compiling: processes that are given the same --turns compile side by side and time one after another.
"""

import fcntl
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import triton

from benchmarks.kernels.common import graph_ms, on_device, parse, parser_for
from benchmarks.kernels.shapes import hosts
from benchmarks.record import Rows
from sgl_bdlora.kernels.tiles import FEW_ROWS
from sgl_bdlora.kernels.triton_ops import PADDING

LAYERS = 32
PAUSE = 12_000
WIDTHS = ((16, 256), (32, 128), (32, 256), (64, 128), (64, 256), (128, 64), (128, 128))


def variants(tiles, outputs: int, inputs: int, quick: bool):
    """tiles with other widths, stages, warps, descriptors and programs for h; quick: one change at a time."""
    yield tiles
    near = [replace(tiles, programs=programs) for programs in (4, 12, 24, 36, 68)]
    near += [replace(tiles, stages=tiles.stages + more) for more in (-1, 1)]
    near += [replace(tiles, descriptor=not tiles.descriptor), replace(tiles, warps=12 - tiles.warps)]
    near += [
        replace(tiles, rows=min(tiles.rows * 2, PADDING)),
        *(replace(tiles, shrink_rows=rows) for rows in (32, 64, 128)),
    ]
    near += [replace(tiles, late_stages=stages) for stages in (1, 2, 4, 6, 8)]
    near += [replace(tiles, early=early) for early in (256, 512, 1024) if early <= inputs]
    near += [replace(tiles, shrink_k=k) for k in (64, 128, 256) if inputs // tiles.splits % k == 0]
    wide = []
    for (block_n, block_k), stages, descriptor in itertools.product(WIDTHS, (4, 6), (False, True)):
        if outputs % block_n == 0 and inputs % block_k == 0:
            warps = 8 if block_n >= 128 else 4
            wide.append(
                replace(tiles, block_n=block_n, block_k=block_k, stages=stages, warps=warps, descriptor=descriptor)
            )
    # Few places beside the tiles: larger pieces of h.
    wide += [replace(t, programs=4, shrink_rows=64) for t in wide]
    if not quick:
        wide = [replace(t, programs=p) for t in wide for p in (4, 12, 36)]
    yield from (t for t in near + wide if t != tiles)


@contextmanager
def alone(turns: Path | None) -> Iterator[None]:
    """Inside, no other process is inside with the same file."""
    if turns is None:
        yield
        return
    with turns.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("tune", __doc__, rank=12, repeats=12)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[8, 32])
    add("--adapters", type=int, default=4)
    add("--only", nargs="+", metavar="LAYER", help="these kinds of layers (default: all four)")
    add("--quick", action="store_true", help="fewer variants")
    add("--chosen", action="store_true", help="none: only what tiles.py chooses")
    add("--turns", type=Path, metavar="FILE", help="time only while no other process with the same file does")
    args = parse(parser, argv)
    rows = Rows(args.output, tp=args.tp)
    layers = hosts("8b", args.tp, LAYERS)
    ops, residents = on_device(layers, args.adapters, args.rank, max(args.tokens))
    for kind in dict.fromkeys(host.path.rpartition(".")[2] for host in layers):
        if args.only and kind not in args.only:
            continue
        paths = [host.path for host in layers if host.path.endswith(kind)]
        plan = ops.plans[paths[0]]
        with alone(args.turns):
            weights = [
                torch.randn(plan.outputs, plan.inputs, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in paths
            ]
        pause = 0 if kind == "down_proj" else PAUSE
        for tokens in args.tokens:
            x = torch.randn(tokens, plan.inputs, device="cuda", dtype=torch.bfloat16)
            count = min(args.adapters, tokens)
            batch = (residents[:count], np.arange(tokens, dtype=np.int32) % count)
            key = (max(16, triton.next_power_of_2(tokens)), count * args.rank > FEW_ROWS)

            def us(product, batch=batch, key=key, x=x, weights=weights, paths=paths, pause=pause):
                def run():
                    for w, path in zip(weights, paths, strict=True):
                        if pause:
                            torch.cuda._sleep(pause)
                        x.neg_()
                        product(x, w, path)

                def before():
                    ops.set_batch(*batch, static=True, many_rows=key[1])

                before()
                product(x, weights[0], paths[0])
                torch.cuda.synchronize()
                with alone(args.turns):
                    return graph_ms(run, before, args.repeats) * 1e3 / len(paths)

            around = us(lambda x, w, path: None)
            cublas = us(lambda x, w, path: torch.mm(x, w.T)) - around
            print(f"{kind} {tokens} tokens, {count} adapters: cuBLAS {cublas:.2f} us", flush=True)
            row = dict(layer=kind, tokens=tokens, adapters=count, rank=args.rank, cublas_us=cublas)
            chosen, found = plan.tiles.get(key), []
            if chosen is None:
                served = us(lambda x, w, path: ops.linear(x, w, None, path)) - around
                rows.write(**row, linear_us=served)
                print(f"  {served:6.2f} separate kernels", flush=True)
                continue
            for tiles in [chosen] if args.chosen else variants(chosen, plan.outputs, plan.inputs, args.quick):
                for path in paths:
                    ops.plans[path] = replace(plan, tiles={**plan.tiles, key: tiles})
                try:
                    found.append((us(lambda x, w, path: ops.linear(x, w, None, path)) - around, tiles))
                except triton.runtime.errors.OutOfResources:
                    continue
                finally:
                    for path in paths:
                        ops.plans[path] = plan
                rows.write(**row, linear_us=found[-1][0], **asdict(tiles))
            print(f"  {found[0][0]:6.2f} chosen {found[0][1]}", flush=True)
            for time, tiles in sorted(found, key=lambda pair: pair[0])[:6]:
                print(f"  {time:6.2f} {tiles}", flush=True)
    print(rows.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
