"""The decode step at other tensor-parallel sizes, predicted from rows of one size.

    python -m benchmarks.latency.predict MEASURED [MEASURED ...] --products TUNE [--tp 4 8] [--model 70b] [--layers 20] [--output FILE]

MEASURED: rows of `python -m benchmarks.latency` of one model at one size, with the arm no-lora; each file's model is predicted, with all
its layers, unless --model and --layers name others. TUNE: rows of `python -m benchmarks.kernels.tune` at the same size, cuBLAS's
microseconds for each of a layer's products. A step is the product of lm_head and its decoder layers, and one of those

    sum over its four products of (start + bytes / tp / bandwidth)  +  2 all-reduces  +  the rest  +  what the arm adds

start and bandwidth come from a line through the products; the rest (attention, norms, sampling by layers) is what no-lora leaves over at
each batch; what an arm adds is its step less no-lora's. Assumed, not measured: one small all-reduce takes ALL_REDUCE_US microseconds,
S-LoRA has four more a layer, and all else that an arm adds to a layer is the same at every size. What a step costs once, however many
layers there are, counts as theirs: a model measured with fewer layers than it has is predicted slower than it will be.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.files import LLAMA_8B, LLAMA_70B, Shape
from benchmarks.record import RESULTS, Rows, read_rows

# One-shot, through NVLink, of a few kilobytes: 2.5 at TP 2 (a profile, docs/performance.md); a rank reads tp - 1 others.
ALL_REDUCE_US = {1: 0.0, 2: 2.5, 4: 3.5, 8: 5.0}
BASE_COLLECTIVES, S_LORA_COLLECTIVES = 2, 4
MODELS = {shape.name: shape for shape in (LLAMA_8B, LLAMA_70B)}
PRODUCTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


def product_bytes(shape: Shape, product: str) -> int:
    """Of one product's weights over all ranks, 16 bits each."""
    return sum(2 * inputs * outputs for inputs, outputs in map(shape.linear, PRODUCTS[product]))


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: (intercept, slope)."""
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return intercept, slope


@dataclass(frozen=True)
class Model:
    """Microseconds of a decoder layer. rest: by batch; added: by (arm, mix, parameters, batch)."""

    tp: int
    start: float
    per_byte: float
    rest: dict[int, float]
    added: dict[tuple, float]

    def step_ms(self, shape: Shape, tp: int, batch: int, arm: tuple | None = None) -> float:
        """arm: (arm, mix, parameters); None: without LoRA."""
        layer = sum(self._product(product_bytes(shape, name), tp) for name in PRODUCTS)
        layer += BASE_COLLECTIVES * ALL_REDUCE_US[tp] + self.rest[batch]
        if arm is not None:
            layer += self.added[(*arm, batch)]
            if arm[0] == "s-lora":
                layer += S_LORA_COLLECTIVES * (ALL_REDUCE_US[tp] - ALL_REDUCE_US[self.tp])
        return (shape.layers * layer + self._product(2 * shape.vocab * shape.hidden, tp)) / 1e3

    def _product(self, size: int, tp: int) -> float:
        return self.start + self.per_byte * size / tp


def fit(measured: list[dict], products: list[dict]) -> tuple[Model, Shape]:
    """From rows of the latency benchmark and of the tuning benchmark at one size: the step's model, and the whole language model's shape.

    Raises ValueError where rows are missing.
    """
    points = [row for row in measured if row.get("kind") == "point" and row["output_len"] >= 64]
    sizes = {row["tp"] for row in [*points, *products]}
    if len(sizes) != 1 or not any(row["arm"] == "no-lora" for row in points):
        raise ValueError(f"rows of one tensor-parallel size with the arm no-lora are needed, not of {sorted(sizes)}")
    models = {(row["model"], row["layers"]) for row in points}
    if len(models) != 1 or not MODELS.keys() >= {name for name, _ in models}:
        raise ValueError(f"rows of one model of {', '.join(MODELS)} are needed, not of {sorted(models)}")
    (tp,), ((name, layers),) = sizes, models
    shape = replace(MODELS[name], layers=layers)
    cublas = {(row["layer"], row["tokens"]): row["cublas_us"] for row in products}
    if {name for name, _ in cublas} != set(PRODUCTS):
        raise ValueError(f"the products' rows have {sorted({name for name, _ in cublas})} of {sorted(PRODUCTS)}")
    # The products' rows are of one model; a line through them holds for all sizes.
    start, per_byte = line((product_bytes(LLAMA_8B, name) / tp, us) for (name, _), us in cublas.items())
    bare = Model(tp, start, per_byte, dict.fromkeys({row["batch"] for row in points}, 0.0), {})
    by_layer: dict[tuple, list[float]] = {}
    for row in points:
        arm = (row["arm"], row["mix"], row["params_ratio"] and round(row["params_ratio"], 2))
        key = ("no-lora",) if row["arm"] == "no-lora" else arm
        by_layer.setdefault((*key, row["batch"]), []).append(row["decode_ms"] * 1e3 / layers)
    step = {key: statistics.mean(values) for key, values in by_layer.items()}
    if missing := sorted({key[-1] for key in step} - {key[-1] for key in step if key[0] == "no-lora"}):
        raise ValueError(f"rows of the arm no-lora are missing at batch {', '.join(map(str, missing))}")
    rest = {
        batch: us - bare.step_ms(shape, tp, batch) * 1e3 / layers
        for (arm, *_, batch), us in step.items()
        if arm == "no-lora"
    }
    added = {key: us - step["no-lora", key[-1]] for key, us in step.items() if key[0] != "no-lora"}
    return Model(tp, start, per_byte, rest, added), MODELS[name]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("measured", type=Path, nargs="+", metavar="MEASURED")
    add("--products", type=Path, required=True, metavar="TUNE")
    add("--tp", type=int, nargs="+", default=[4, 8], choices=sorted(ALL_REDUCE_US))
    add(
        "--output", type=Path, default=RESULTS / "prediction.jsonl", help="default: benchmarks/results/prediction.jsonl"
    )
    add("--model", choices=("8b", "70b"), help="predict this one (default: the one that was measured)")
    add("--layers", type=int, help="of them (default: all)")
    args = parser.parse_args(argv)
    try:
        fitted = {path: fit(read_rows(path), read_rows(args.products)) for path in args.measured}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path, (model, measured) in fitted.items():
        shape = {None: measured, "8b": LLAMA_8B, "70b": LLAMA_70B}[args.model]
        shape = replace(shape, layers=args.layers or shape.layers)
        rows = Rows(args.output, benchmark="prediction", measured=path.name, products=args.products.name)
        _predict(model, shape, args.tp, rows)
    print(args.output)
    return 0


def _predict(model: Model, shape: Shape, sizes: Iterable[int], rows: Rows) -> None:
    print(
        f"{shape.name}: a product {model.start:.2f} us and its bytes at {1e-6 / model.per_byte:.2f} TB/s; the rest of a layer "
        + ", ".join(f"{us:.1f} us at batch {batch}" for batch, us in sorted(model.rest.items()))
    )
    for tp in sizes:
        for batch in sorted(model.rest):
            without = model.step_ms(shape, tp, batch)
            print(f"{shape.name}, TP {tp}, batch {batch}: no-lora {without:.2f} ms")
            rows.write(model=shape.name, tp=tp, batch=batch, arm="no-lora", decode_ms=without)
            for *arm, at in model.added:
                if at != batch:
                    continue
                step = model.step_ms(shape, tp, batch, tuple(arm))
                rows.write(
                    model=shape.name,
                    tp=tp,
                    batch=batch,
                    arm=arm[0],
                    mix=arm[1],
                    params_ratio=arm[2],
                    decode_ms=step,
                )
                ratio = f" {arm[2]:.2f}x" if arm[2] else ""
                print(f"  {arm[0] + ratio + ' ' + arm[1]:<32} {step:6.2f} ms  {step / without:.2f}x")


if __name__ == "__main__":
    sys.exit(main())
