"""The decode step at other tensor-parallel sizes, predicted from rows of one size.

    python -m benchmarks.latency.predict MEASURED [MEASURED ...] --products TUNE [--kernels TUNE] [--shares FILE ...] [--tp 4 8] \
        [--model 70b] [--layers 20] [--output FILE]

MEASURED: rows of `python -m benchmarks.latency` of one model at one size, with the arm no-lora; each file's model is predicted, with all
its layers, unless --model and --layers name others. TUNE: rows of `python -m benchmarks.kernels.tune`, cuBLAS's microseconds for each
of a layer's products. A step is the product of lm_head and its decoder layers, and one of those

    sum over its four products of (start + bytes / tp / bandwidth)  +  2 all-reduces  +  the rest  +  what the arm adds

start and bandwidth come from a line through the products; the rest (attention, norms, sampling by layers) is what no-lora leaves over at
each batch; what an arm adds is its step less no-lora's. What arms without collectives of their own (replicated, block-diagonal) add is a
function of the rank rows that the batch's adapters have on a rank (sgl_bdlora/kernels/rows.py), drawn through all of their points at a
batch: at another size plain adapters have as many, while block-diagonal ones are matched anew, with a block for every rank, and have
fewer. How well rank rows alone explain the points is printed: the error of each from the line through the others.

One rank's kernels can be timed on one GPU at any size: --kernels names rows of `python -m benchmarks.kernels.tune --chosen` at the sizes
to predict, --products then those of the kernels that MEASURED ran, with LoRA, at its size. Where there are rows for an arm's batch and up
to its rank rows, what it adds is what its kernels take longer than cuBLAS at that size, and what MEASURED has beside that (the median over
the rank rows that --products has; of another model where MEASURED's has none).

A rank can be served on one GPU too, but for its collectives: --shares names rows of `python -m benchmarks.latency --share-of` with all of
a model's layers. Where there are such rows for a size and batch, its step without LoRA is theirs and 2 all-reduces a layer, and what arms
without collectives add, up to the most rank rows that were measured there, is drawn through theirs.

Assumed, not measured: one small all-reduce takes ALL_REDUCE_US microseconds, S-LoRA has four more a layer, and what else S-LoRA adds, and
what so many rank rows add, is the same at every size. What a step costs once, however many layers there are, counts as theirs: a model
measured with fewer layers than it has is predicted slower than it will be.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.files import MODELS, Shape
from benchmarks.record import RESULTS, Rows, read_rows

from .step_model import ALL_REDUCE_US, Arm, Model, fit, kernels_of, shares_of, unexplained

# What a row of the tuning benchmark has.
TUNED = {"layer", "tp", "tokens", "adapters", "rank", "cublas_us"}


def served_rows(path: Path) -> list[dict]:
    """Points of ranks' shares. Raises ValueError for others."""
    rows = [row for row in read_rows(path) if row.get("kind") == "point"]
    if not rows or any(row.get("share_of", 1) == 1 or row["nblocks"] != row["share_of"] for row in rows):
        raise ValueError(f"{path}: rows of benchmarks.latency --share-of are needed, with as many blocks as ranks")
    return rows


def tuned(path: Path) -> list[dict]:
    """Rows of the tuning benchmark. Raises ValueError for others."""
    rows = read_rows(path)
    for row in rows:
        if not row.keys() >= TUNED or row.get("model", "8b") not in MODELS:
            raise ValueError(f"{path}: rows of benchmarks.kernels.tune are needed, with {', '.join(sorted(TUNED))}")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("measured", type=Path, nargs="+", metavar="MEASURED")
    add("--products", type=Path, required=True, metavar="TUNE")
    add("--kernels", type=Path, metavar="TUNE", help="of one rank at the sizes to predict")
    add("--shares", type=Path, nargs="+", default=[], metavar="FILE", help="rows of one rank's share, served")
    add("--tp", type=int, nargs="+", default=[4, 8], choices=sorted(ALL_REDUCE_US))
    add(
        "--output", type=Path, default=RESULTS / "prediction.jsonl", help="default: benchmarks/results/prediction.jsonl"
    )
    add("--model", choices=list(MODELS), help="predict this one (default: the one that was measured)")
    add("--layers", type=int, help="of them (default: all)")
    args = parser.parse_args(argv)
    try:
        products, kernels = (tuned(path) if path else [] for path in (args.products, args.kernels))
        fitted = {path: fit(read_rows(path), products) for path in args.measured}
        shares = [row for path in args.shares for row in served_rows(path)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    beside = next((model.beside for model, *_ in fitted.values() if model.beside), {})
    for path, (model, measured, arms) in fitted.items():
        shape = MODELS.get(args.model, measured)
        shape = replace(shape, layers=args.layers or shape.layers)
        rows = Rows(args.output, benchmark="prediction", measured=path.name, products=args.products.name)
        model = replace(
            model, kernels=kernels_of(kernels, shape), beside=model.beside or beside, shares=shares_of(shares, shape)
        )
        _predict(model, shape, args.tp, arms, rows)
    print(args.output)
    return 0


def _predict(model: Model, shape: Shape, sizes: Iterable[int], arms: Sequence[Arm], rows: Rows) -> None:
    print(
        f"{shape.name}: a product {model.start:.2f} us and its bytes at {1e-6 / model.per_byte:.2f} TB/s; the rest of a layer "
        + ", ".join(f"{us:.1f} us at batch {batch}" for batch, us in sorted(model.rest.items()))
    )
    for batch, points in sorted(model.local.items()):
        drawn = ", ".join(f"{count}: {us:.1f}" for count, us in points)
        print(
            f"added by rank rows, us a layer, batch {batch}: {drawn}; at most {unexplained(points):.1f} us unexplained"
        )
    for tp in sizes:
        for batch in sorted(model.rest):
            without = model.step_ms(shape, tp, batch)
            print(f"{shape.name}, TP {tp}, batch {batch}: no-lora {without:.2f} ms")
            rows.write(
                model=shape.name, tp=tp, batch=batch, arm="no-lora", decode_ms=without, served=model.served(tp, batch)
            )
            for arm in arms:
                if not (model.local[batch] if arm.local else (arm, batch) in model.added):
                    continue
                step, ratio = model.step_ms(shape, tp, batch, arm), arm.params_ratio(shape, tp)
                about = {}
                if arm.local:
                    count = arm.rank_rows(shape, tp, batch)
                    served = model.served(tp, batch, count)
                    about = {
                        "rank_rows": count,
                        "served": served,
                        "kernels_timed": not served and model.timed(tp, batch, count),
                    }
                rows.write(
                    model=shape.name,
                    tp=tp,
                    batch=batch,
                    arm=arm.name,
                    mix=arm.mix,
                    params_ratio=ratio,
                    decode_ms=step,
                    **about,
                )
                how = ", served" * about["served"] + ", timed" * about["kernels_timed"] if arm.local else ""
                told = f", {count} rank rows{how}" if arm.local else ""
                print(f"  {f'{arm.name} {ratio:.2f}x {arm.mix}{told}':<52} {step:6.2f} ms  {step / without:.2f}x")


if __name__ == "__main__":
    sys.exit(main())
