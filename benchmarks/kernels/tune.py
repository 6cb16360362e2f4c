"""Tile sizes of the linear kernel (sgl_bdlora/kernels/tiles.py), swept: one kind of layer at a time, 32 of them in a CUDA graph.

    python -m benchmarks.kernels.tune [--model 8b] [--tp 2] [--tokens 8 32] [--mixes 4x12 4x128] [--only qkv_proj ...] [--chosen]
    python -m benchmarks.kernels.tune --parts h rest --begin block_n=64 programs=84 ...
    for layer in qkv_proj o_proj gate_up_proj down_proj; do python -m benchmarks.kernels.tune --only $layer --turns /tmp/turns & done; wait

A mix is adapters x local rank; rows of the batch take turns with the adapters. Mixes with few rank rows have tiles of their own, those with
many too (tiles.py: few_rows), so each kind is swept for all its mixes at once, best by the mean of times over the served ones. The parts
of a Tiles are swept one after another, each in full, with the best found so far of the others:

    h         programs that compute h, rank rows and inputs of theirs at a time, parts of K, half as many rank rows
    tile      block of W, stages, parts of its K
    rest      rank rows of h and B at a time, stages of those behind the first, and how early they are asked for

Every product stands behind a pause of 6 us and a small kernel, as behind the all-reduce, norm or attention of a model (down_proj: the
small kernel only). Microseconds a layer, less those of the same graph without products; cuBLAS without LoRA and what is served come
first. Where the separate kernels serve so many rows, there is nothing to sweep. Most of a sweep is compiling: processes that are given the
same --turns compile side by side and time one after another.
"""

import argparse
import fcntl
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import triton
from tqdm import tqdm

from benchmarks.files import MODELS, PRODUCTS
from benchmarks.kernels.common import graph_ms, on_device, parse, parser_for
from benchmarks.kernels.shapes import hosts, rank_rows
from benchmarks.record import Rows
from sgl_bdlora.kernels.device_batch import PADDING
from sgl_bdlora.kernels.tiles import H200, SUMS, WIDTHS, Tiles, few_rows, warps_for
from sgl_bdlora.kernels.triton_ops import Plan

LAYERS = 32
PAUSE = 12_000
# In flight; a product with fewer would wait for its weights.
LEAST_BYTES = 24_000


def h_variants(tiles: Tiles, plan: Plan, block_t: int) -> Iterator[Tiles]:
    sizes = ((16, 128), (16, 256), (16, 512), (32, 128), (32, 256), (32, 512), (64, 128), (64, 256))
    for programs, (rows, k) in itertools.product((4, 12, 20, 36, 68), sizes):
        if plan.inputs // tiles.splits % k == 0:
            yield replace(tiles, programs=programs, shrink_rows=rows, shrink_k=k, halves=False)
    if tiles.shrink_rows >= 32:
        yield replace(tiles, halves=not tiles.halves)
    for splits in (1, 2, 4):
        if plan.inputs % (splits * tiles.shrink_k) == 0:
            yield replace(tiles, splits=splits)


def tile_variants(tiles: Tiles, plan: Plan, block_t: int) -> Iterator[Tiles]:
    for block_n, block_k, stages, parts in itertools.product(WIDTHS, (128, 256), (3, 4, 6), (1, 2, 3, 4, 6, 8)):
        if any(n % block_n for n in (*plan.ends, plan.outputs)) or plan.inputs % block_k:
            continue
        blocks = plan.outputs // block_n
        if parts > 1 and (
            not H200.multiprocessors // 3 <= parts * blocks <= 2 * H200.multiprocessors
            or plan.inputs // block_k < 2 * parts
        ):
            continue
        warps = warps_for(block_t, block_n)
        early = max(1, min(tiles.early // block_k, plan.inputs // block_k // parts)) * block_k
        found = replace(tiles, block_n=block_n, block_k=block_k, stages=stages, warps=warps, parts=parts, early=early)
        if found.buffers(block_t)[0] >= LEAST_BYTES:
            yield found


def rest_variants(tiles: Tiles, plan: Plan, block_t: int) -> Iterator[Tiles]:
    for rows, stages in itertools.product((32, 64, 128), (3, 4, 6, 8)):
        yield replace(tiles, rows=rows, late_stages=stages)
    for early in (256, 1024, 2048):
        yield replace(tiles, early=early // tiles.block_k * tiles.block_k)


PARTS = {"h": h_variants, "tile": tile_variants, "rest": rest_variants}


@contextmanager
def alone(turns: Path | None) -> Iterator[None]:
    """Inside, no other process is inside with the same file."""
    if turns is None:
        yield
        return
    with turns.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Layer:
    """LAYERS layers of one kind on the device, to be timed with the adapters of each mix."""

    def __init__(self, kind: str, args: argparse.Namespace):
        layers = [host for host in hosts(args.model, args.tp, LAYERS) if host.path.endswith(kind)]
        self._paths = [host.path for host in layers]
        self._args = args
        self._ops = {mix: on_device(layers, *mix, max(args.tokens)) for mix in args.mixes}
        self.plan = next(iter(self._ops.values()))[0].plans[self._paths[0]]
        self._pause = 0 if kind == "down_proj" else PAUSE
        with alone(args.turns):
            sizes = self.plan.outputs, self.plan.inputs
            self._weights = [torch.randn(*sizes, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in self._paths]

    def served(self, mix: tuple[int, int], tokens: int, tiles: Tiles | None = None) -> float:
        """Microseconds of the layer with LoRA, by `tiles` if given. Raises triton's OutOfResources."""
        ops = self._ops[mix][0]
        key = kind_of(mix, tokens)
        plan = self.plan if tiles is None else replace(self.plan, tiles={**self.plan.tiles, key: tiles})
        ops.plans.update(dict.fromkeys(self._paths, plan))
        return self._us(mix, tokens, lambda x, w, path: ops.linear(x, w, None, path))

    def cublas(self, tokens: int) -> float:
        """Microseconds of the layer without LoRA."""
        return self._us(self._args.mixes[0], tokens, lambda x, w, path: torch.mm(x, w.T))

    def around(self, tokens: int) -> float:
        """Of what is timed with it, microseconds a layer."""
        return self._us(self._args.mixes[0], tokens, lambda x, w, path: None)

    def _us(self, mix: tuple[int, int], tokens: int, product: Callable) -> float:
        ops, residents = self._ops[mix]
        x = torch.randn(tokens, self.plan.inputs, device="cuda", dtype=torch.bfloat16)
        count = min(mix[0], tokens)
        owners = np.arange(tokens, dtype=np.int32) % count

        def before():
            ops.batch.fill(residents[:count], owners, static=True, many_rows=kind_of(mix, tokens)[1])

        def run():
            for w, path in zip(self._weights, self._paths, strict=True):
                if self._pause:
                    torch.cuda._sleep(self._pause)
                x.neg_()
                product(x, w, path)

        before()
        product(x, self._weights[0], self._paths[0])
        torch.cuda.synchronize()
        with alone(self._args.turns):
            return graph_ms(run, before, self._args.repeats) * 1e3 / len(self._paths)


def kind_of(mix: tuple[int, int], tokens: int) -> tuple[int, bool]:
    """tiles.py: KINDS."""
    many = rank_rows([mix[1]] * min(mix[0], tokens)) > few_rows(tokens)
    return max(16, triton.next_power_of_2(tokens)), many


def unfit(tiles: Tiles, plan: Plan, block_t: int) -> str:
    """Why the kernel cannot run or would compute something else; empty if it can on an H200."""
    if max(tiles.buffers(block_t)) > H200.shared:
        return f"its loops need {tiles.buffers(block_t)} of {H200.shared} bytes"
    if tiles.parts > 1 and tiles.parts * block_t * plan.outputs > SUMS:
        return f"its parts have {tiles.parts * block_t * plan.outputs} of {SUMS} sums"
    if (
        tiles.early % tiles.block_k
        or not 0 < tiles.early <= plan.inputs // tiles.block_k // tiles.parts * tiles.block_k
    ):
        return f"early={tiles.early} is no multiple of block_k={tiles.block_k} within the first of {tiles.parts} parts of K"
    if tiles.rows > PADDING:
        return f"rows={tiles.rows} is more than tables are filled up to, {PADDING}"
    return ""


def variants(part: str, tiles: Tiles, plan: Plan, block_t: int) -> list[Tiles]:
    """`tiles` and those of a part that can run."""
    found = dict.fromkeys([tiles, *PARTS[part](tiles, plan, block_t)])
    return [tiles for tiles in found if not unfit(tiles, plan, block_t)]


def sweep(
    layer: Layer,
    mixes: Sequence[tuple[int, int]],
    tokens: int,
    parts: Sequence[str],
    begin: Mapping[str, int],
    record: Callable,
) -> None:
    """Of one kind, from what is served with the fields of `begin` instead. record(mix, us, tiles) is called with all that was timed."""
    around = layer.around(tokens)
    block_t = kind_of(mixes[0], tokens)[0]
    best = layer.plan.tiles.get(kind_of(mixes[0], tokens))

    def times(tiles: Tiles | None) -> list[float]:
        return [layer.served(mix, tokens, tiles) - around for mix in mixes]

    served = times(best)
    for mix, us in zip(mixes, served, strict=True):
        record(mix, us, best)
    print(f"  {_words(served)} served: {best or 'separate kernels'}", flush=True)
    if best is None:
        return
    found = {best: 1.0}
    best = replace(best, **begin)
    if why := unfit(best, layer.plan, block_t):
        print(f"  not swept from {best}: {why}", flush=True)
        return
    for part in parts:
        tried = variants(part, best, layer.plan, block_t)
        for tiles in tqdm([t for t in tried if t not in found], desc=part, unit="variant", leave=False, disable=None):
            try:
                taken = times(tiles)
            except triton.runtime.errors.OutOfResources:
                continue
            for mix, us in zip(mixes, taken, strict=True):
                record(mix, us, tiles)
            found[tiles] = statistics.geometric_mean(max(us, 0.1) / by for us, by in zip(taken, served, strict=True))
        best = min((tiles for tiles in tried if tiles in found), key=found.get)
        print(f"  {found[best]:.3f} by what is served, after {part}: {best}", flush=True)
    for tiles in sorted(found, key=found.get)[:6]:
        print(f"  {found[tiles]:.3f} {tiles}", flush=True)


def _words(times: Sequence[float]) -> str:
    return ", ".join(f"{us:.2f}" for us in times) + " us"


def _field(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    names = [field.name for field in fields(Tiles)]
    if name not in names or not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: not FIELD=N with a field of Tiles ({', '.join(names)})")
    return name, int(value)


def _mix(text: str) -> tuple[int, int]:
    adapters, _, rank = text.partition("x")
    if not (adapters.isdecimal() and rank.isdecimal() and int(adapters) and int(rank)):
        raise argparse.ArgumentTypeError(f"{text!r}: not adapters x local rank, as in 4x12")
    return int(adapters), int(rank)


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("tune", __doc__, rank=None, repeats=12)
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="8b", help="shape of the base model (default: 8b)")
    add("--tokens", type=int, nargs="+", default=[8, 32])
    add("--mixes", type=_mix, nargs="+", default=[(4, 12)], metavar="ADAPTERSxRANK", help="(default: 4x12)")
    add(
        "--only",
        nargs="+",
        choices=list(PRODUCTS),
        default=list(PRODUCTS),
        help="these kinds of layers (default: all four)",
    )
    add(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        help="what is swept, in this order (default: all)",
    )
    add(
        "--begin",
        type=_field,
        nargs="+",
        default=[],
        metavar="FIELD=N",
        help="instead of what is served, as in block_n=64",
    )
    add("--chosen", action="store_true", help="nothing: only what tiles.py chooses")
    add("--turns", type=Path, metavar="FILE", help="time only while no other process with the same file does")
    args = parse(parser, argv)
    rows = Rows(args.output, model=args.model, tp=args.tp)
    for kind in args.only:
        layer = Layer(kind, args)
        for tokens in args.tokens:
            cublas = layer.cublas(tokens) - layer.around(tokens)
            for many in dict.fromkeys(kind_of(mix, tokens)[1] for mix in args.mixes):
                mixes = [mix for mix in args.mixes if kind_of(mix, tokens)[1] == many]
                print(
                    f"{kind} {tokens} tokens, {' '.join(f'{n}x{rank}' for n, rank in mixes)}: cuBLAS {cublas:.2f} us",
                    flush=True,
                )

                def record(mix, us, tiles, kind=kind, tokens=tokens, cublas=cublas):
                    row = dict(layer=kind, tokens=tokens, adapters=mix[0], rank=mix[1], cublas_us=cublas, linear_us=us)
                    rows.write(**row, **(asdict(tiles) if tiles else {}))

                sweep(layer, mixes, tokens, [] if args.chosen else args.parts, dict(args.begin), record)
    print(rows.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
