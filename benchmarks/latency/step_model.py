"""A model of the decode step by tensor-parallel size: what it costs without LoRA, and what arms add by their rank rows.

Fitted to rows of one size; predict.py says what a step is made of and what is assumed.
"""

import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from benchmarks.files import MODELS, PRODUCTS, Shape
from benchmarks.kernels.shapes import rank_rows

from .mixes import mix, params_ratio, rank_of

# One-shot, through NVLink, of a few kilobytes: 2.5 at TP 2 (a profile, docs/performance.md); a rank reads tp - 1 others.
ALL_REDUCE_US = {1: 0.0, 2: 2.5, 4: 3.5, 8: 5.0}
BASE_COLLECTIVES, S_LORA_COLLECTIVES = 2, 4
NAMED = {shape.name: shape for shape in MODELS.values()}


def product_bytes(shape: Shape, product: str) -> int:
    """Of one product's weights over all ranks, 16 bits each."""
    return sum(2 * inputs * outputs for inputs, outputs in map(shape.linear, PRODUCTS[product]))


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: (intercept, slope)."""
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return intercept, slope


@dataclass(frozen=True)
class Arm:
    """What a step is computed with. ratio: wanted, of block-diagonal adapters' parameters by the mix's plain ones'; None of plain ones."""

    name: str
    mix: str
    ratio: float | None = None

    @property
    def local(self) -> bool:
        """Whether it adds no collective."""
        return self.name in ("replicated", "block-diagonal")

    def params_ratio(self, shape: Shape, tp: int) -> float:
        return params_ratio(mix(self.mix), self.ratio, shape, tp)

    def rank_rows(self, shape: Shape, tp: int, batch: int) -> int:
        """Of a layer on a rank, in a batch whose requests take turns with the adapters."""
        blocks = 1 if self.ratio is None else tp
        ranks = [rank_of(plain, self.ratio, shape, tp) for plain in mix(self.mix).ranks[:batch]]
        return rank_rows(rank // blocks for rank in ranks)


@dataclass(frozen=True)
class Share:
    """One rank of a size, without collectives, at a batch: microseconds of a step without LoRA, and (rank rows, what they add to a layer),
    ascending."""

    step: float
    added: list[tuple[int, float]]


@dataclass(frozen=True)
class Model:
    """Microseconds of a decoder layer.

    rest: by batch. local: (rank rows, what they add), by batch, ascending. added: by arm and batch, of the arms with collectives.
    kernels: (rank rows, what they take longer than cuBLAS), by size and batch, ascending. beside: what local arms add to that, by batch.
    shares: of the model that is predicted, by size and batch.
    """

    tp: int
    start: float
    per_byte: float
    rest: dict[int, float]
    local: dict[int, list[tuple[int, float]]]
    added: dict[tuple[Arm, int], float]
    kernels: dict[tuple[int, int], list[tuple[int, float]]] = field(default_factory=dict)
    beside: dict[int, float] = field(default_factory=dict)
    shares: dict[tuple[int, int], Share] = field(default_factory=dict)

    def served(self, tp: int, batch: int, count: int = 0) -> bool:
        """Whether one rank of this size was served at this batch, with so many rank rows or more."""
        share = self.shares.get((tp, batch))
        return share is not None and (count == 0 or (bool(share.added) and count <= share.added[-1][0]))

    def timed(self, tp: int, batch: int, count: int) -> bool:
        """Whether kernels were timed at this size and batch with so many rank rows or more."""
        points = self.kernels.get((tp, batch))
        return batch in self.beside and bool(points) and count <= points[-1][0]

    def step_ms(self, shape: Shape, tp: int, batch: int, arm: Arm | None = None) -> float:
        """arm: None: without LoRA."""
        layer, once = BASE_COLLECTIVES * ALL_REDUCE_US[tp], 0.0
        if self.served(tp, batch):
            once = self.shares[tp, batch].step
        else:
            layer += sum(self._product(product_bytes(shape, name), tp) for name in PRODUCTS) + self.rest[batch]
            once = self._product(2 * shape.vocab * shape.hidden, tp)
        if arm is not None:
            layer += self._adds(shape, tp, batch, arm)
        return (shape.layers * layer + once) / 1e3

    def _adds(self, shape: Shape, tp: int, batch: int, arm: Arm) -> float:
        """To a layer."""
        if arm.local:
            count = arm.rank_rows(shape, tp, batch)
            if self.served(tp, batch, count):
                return through(self.shares[tp, batch].added, count)
            if self.timed(tp, batch, count):
                return through(self.kernels[tp, batch], count) + self.beside[batch]
            return through(self.local[batch], count)
        more = S_LORA_COLLECTIVES * (ALL_REDUCE_US[tp] - ALL_REDUCE_US[self.tp]) if arm.name == "s-lora" else 0.0
        return self.added[arm, batch] + more

    def _product(self, size: int, tp: int) -> float:
        return self.start + self.per_byte * size / tp


def through(points: Sequence[tuple[int, float]], x: int) -> float:
    """y at x of the line through the points, straight between two and beyond the last, level before the first."""
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if x <= pair[1][0]), points[-2:])
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def unexplained(points: Sequence[tuple[int, float]]) -> float:
    """The largest difference of a point from the line through the others, the first and the last left out; 0 of fewer than three."""
    left = (
        abs(through([*points[:i], *points[i + 1 :]], points[i][0]) - points[i][1]) for i in range(1, len(points) - 1)
    )
    return max(left, default=0.0)


def fit(measured: list[dict], products: list[dict]) -> tuple[Model, Shape, list[Arm]]:
    """From rows of the latency benchmark at one size, and of the tuning benchmark: the step's model, the whole language model's shape, and
    the arms that were measured.

    Raises ValueError where rows are missing.
    """
    points = [row for row in measured if row.get("kind") == "point" and row["output_len"] >= 64]
    if any(row.get("share_of", 1) > 1 for row in points):
        raise ValueError("rows of whole models are needed: those of a rank's share are for --shares")
    sizes = {row["tp"] for row in points}
    if len(sizes) != 1 or not any(row["arm"] == "no-lora" for row in points):
        raise ValueError(f"rows of one tensor-parallel size with the arm no-lora are needed, not of {sorted(sizes)}")
    models = {(row["model"], row["layers"]) for row in points}
    if len(models) != 1 or not NAMED.keys() >= {name for name, _ in models}:
        raise ValueError(f"rows of one model of {', '.join(NAMED)} are needed, not of {sorted(models)}")
    if any(not {"modules", "wanted_ratio"} <= row.keys() for row in points):
        raise ValueError("rows with the fields modules and wanted_ratio are needed: these are of an older benchmark")
    if changed := {row["modules"] for row in points} - {"all"}:
        raise ValueError(f"rows of adapters of all modules are needed, not of {', '.join(sorted(changed))}")
    (tp,), ((name, layers),) = sizes, models
    shape = replace(NAMED[name], layers=layers)
    cublas = {(row["layer"], row["tokens"], row["tp"], row.get("model", "8b")): row["cublas_us"] for row in products}
    if {name for name, *_ in cublas} != set(PRODUCTS):
        raise ValueError(f"the products' rows have {sorted({name for name, *_ in cublas})} of {sorted(PRODUCTS)}")
    # One line through the products of all models and sizes.
    start, per_byte = line((product_bytes(MODELS[of], name) / at, us) for (name, _, at, of), us in cublas.items())
    bare = Model(tp, start, per_byte, dict.fromkeys({row["batch"] for row in points}, 0.0), {}, {})
    step = _means(((arm_of(row), row["batch"]), row["decode_ms"] * 1e3 / layers) for row in points)
    without = {batch: us for (arm, batch), us in step.items() if arm is None}
    if missing := sorted({batch for _, batch in step} - set(without)):
        raise ValueError(f"rows of the arm no-lora are missing at batch {', '.join(map(str, missing))}")
    rest = {batch: us - bare.step_ms(shape, tp, batch) * 1e3 / layers for batch, us in without.items()}
    added = {(arm, batch): us - without[batch] for (arm, batch), us in step.items() if arm is not None}
    local = {
        batch: sorted(
            _means(
                (arm.rank_rows(shape, tp, batch), us) for (arm, at), us in added.items() if arm.local and at == batch
            ).items()
        )
        for batch in without
    }
    others = {key: us for key, us in added.items() if not key[0].local}
    ran = kernels_of(products, NAMED[name])
    beside = {
        batch: statistics.median(through(local[batch], count) - us for count, us in ran[tp, batch])
        for batch in local
        if local[batch] and (tp, batch) in ran
    }
    model = Model(tp, start, per_byte, rest, local, others, beside=beside)
    return model, NAMED[name], list(dict.fromkeys(arm for arm, _ in added))


def kernels_of(rows: list[dict], shape: Shape) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Of a model, from rows of the tuning benchmark in which all of a layer's products were timed with LoRA: Model.kernels."""
    longer: dict = {}
    for row in rows:
        if MODELS[row.get("model", "8b")] == shape and "linear_us" in row:
            count = rank_rows([row["rank"]] * min(row["adapters"], row["tokens"]))
            products = longer.setdefault((row["tp"], row["tokens"]), {}).setdefault(count, {})
            products.setdefault(row["layer"], []).append(row["linear_us"] - row["cublas_us"])
    found = {}
    for at, counts in longer.items():
        points = [
            (n, sum(map(statistics.mean, of.values()))) for n, of in sorted(counts.items()) if set(of) == set(PRODUCTS)
        ]
        if points:
            found[at] = points
    return found


def shares_of(rows: list[dict], shape: Shape) -> dict[tuple[int, int], Share]:
    """Of a model with all of its layers, from rows of the latency benchmark with --share-of: Model.shares."""
    points = [
        (row["share_of"], row["batch"], arm_of(row), row["decode_ms"] * 1e3)
        for row in rows
        if (row["model"], row["layers"], row["modules"]) == (shape.name, shape.layers, "all")
        and row["output_len"] >= 64
    ]
    steps = _means(((tp, batch), us) for tp, batch, arm, us in points if arm is None)
    return {
        (tp, batch): Share(
            step,
            sorted(
                _means(
                    (arm.rank_rows(shape, tp, batch), (us - step) / shape.layers)
                    for *at, arm, us in points
                    if at == [tp, batch] and arm is not None and arm.local
                ).items()
            ),
        )
        for (tp, batch), step in steps.items()
    }


def arm_of(row: dict) -> Arm | None:
    """Of a point; None without LoRA."""
    return None if row["arm"] == "no-lora" else Arm(row["arm"], row["mix"], row["wanted_ratio"])


def _means(pairs: Iterable[tuple[Hashable, float]]) -> dict:
    values: dict = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: statistics.mean(of) for key, of in values.items()}
