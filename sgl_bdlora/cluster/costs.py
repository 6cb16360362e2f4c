"""Cost of a decode step and of a prefill batch of one replica, fitted from rows, and the operating points that follow."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DEFAULTS = Path(__file__).with_name("default_costs.json")

DECODE = ("decode_ms", "request_ms", "lora_ms", "row_ms", "pad_ms")
PREFILL = ("prefill_ms", "token_ms", "lora_token_ms", "rank_token_ms", "pad_token_ms")


@dataclass(frozen=True)
class Costs:
    """Semantics, in milliseconds:

        decode  = decode_ms + request_ms * batch + [rows > 0] * lora_ms + row_ms * rows + pad_ms * batch * width + context_ms * context
        prefill = prefill_ms + token_ms * T + [width > 0] * lora_token_ms * T + rank_token_ms * token_ranks + pad_token_ms * T * width

    batch: requests; rows: ranks of the batch's distinct adapters, summed; width: the largest rank; T: tokens; token_ranks: each
    token's rank, summed. A kernel that reads each adapter once has row_ms, one that pads to the largest rank pad_ms.
    context: tokens, prompt and output, that the batch's requests have so far, summed; a profile of short prompts leaves it out.
    outside_ms: what a request takes beside these, while its replica does others' work: HTTP, the cluster's front, scheduling ahead.
    """

    name: str
    decode_ms: float
    request_ms: float
    lora_ms: float
    row_ms: float
    pad_ms: float
    prefill_ms: float
    token_ms: float
    lora_token_ms: float
    rank_token_ms: float
    pad_token_ms: float
    context_ms: float = 0.0
    outside_ms: float = 0.0
    provisional: bool = True
    provenance: str = ""

    def __post_init__(self):
        for name in (*DECODE, *PREFILL, "context_ms", "outside_ms"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(
                    f"cost model {self.name!r}: {name} has to be a number of milliseconds, at least 0, got {value!r}"
                )
        if not self.decode_ms + self.request_ms > 0:
            raise ValueError(
                f"cost model {self.name!r}: decode_ms or request_ms has to be above 0, or a step would take no time"
            )

    def decode(self, batch, rows, width, context=0):
        """Milliseconds of a decode step; numbers or arrays of one shape."""
        lora = (rows > 0) * self.lora_ms + self.row_ms * rows + self.pad_ms * batch * width
        return self.decode_ms + self.request_ms * batch + lora + self.context_ms * context

    def prefill(self, tokens, token_ranks, width):
        """Milliseconds of a prefill batch; numbers or arrays of one shape."""
        lora = (
            tokens * ((width > 0) * self.lora_token_ms + self.pad_token_ms * width) + self.rank_token_ms * token_ranks
        )
        return self.prefill_ms + self.token_ms * tokens + lora


@dataclass(frozen=True)
class Load:
    """The requests that an operating point is for. adapters: distinct ones in a full batch; occupancy: the part of a replica's time that
    may be busy, less than 1 because arrivals are random."""

    prompt_tokens: float = 1155.0
    output_tokens: float = 211.0
    max_running: int = 64
    adapters: int = 16
    occupancy: float = 0.75


def operating_point(costs: Costs, rank: int, tpot_ms: float, load: Load) -> float:
    """Highest tokens a second, prompt and output, of one replica that serves only this rank with a mean time per token of tpot_ms.

    With b requests running, one takes prefill p and output_tokens * step(b) / b of the replica's time, so the rate is
    1 / (p + output_tokens * step(b) / b), and a token comes every b / (rate * output_tokens). ValueError when one request alone is slower.
    """
    batch = np.arange(1, load.max_running + 1)
    rows = np.minimum(batch, load.adapters) * rank
    prefill = costs.prefill(load.prompt_tokens, load.prompt_tokens * rank, rank)
    context = batch * (load.prompt_tokens + load.output_tokens / 2)
    rate = 1 / (prefill + load.output_tokens * costs.decode(batch, rows, rank, context) / batch)  # a millisecond
    tpot = batch / (rate * load.output_tokens)
    if not tpot[0] <= tpot_ms:
        raise ValueError(
            f"slo.tpot_ms = {tpot_ms} cannot be held: with cost model {costs.name!r} one request of rank {rank} alone takes "
            f"{tpot[0]:.1f} ms a token; raise it to {tpot[0]:.0f} or more"
        )
    best = rate[tpot <= tpot_ms].max()
    return float(1000 * best * load.occupancy * (load.prompt_tokens + load.output_tokens))


def operating_points(costs: Costs, ranks: Iterable[int], tpot_ms: float, load: Load | None = None) -> dict[int, float]:
    return {rank: operating_point(costs, rank, tpot_ms, load or Load()) for rank in sorted(set(ranks))}


def fit(name: str, decode_rows: list[Mapping], prefill_rows: list[Mapping], provenance: str) -> Costs:
    """Costs from a profile of one replica, by least squares of the relative error with no coefficient below 0.

    decode_rows: {"ms", "batch", "rows", "width"}; prefill_rows: {"ms", "tokens", "token_ranks", "width"}. ValueError without rows.
    """
    from scipy.optimize import nnls

    def solve(rows: list[Mapping], columns: list[list[float]], kind: str) -> np.ndarray:
        if not rows:
            raise ValueError(f"cost model {name!r}: there are no {kind} rows to fit")
        ms = np.array([row["ms"] for row in rows], dtype=float)
        if not np.all(ms > 0):
            raise ValueError(f"cost model {name!r}: every {kind} row needs ms above 0")
        matrix = np.array(columns, dtype=float) / ms[:, None]
        # Columns differ by many powers of ten; nnls wants them alike.
        scale = np.where(matrix.max(axis=0) > 0, matrix.max(axis=0), 1)
        return nnls(matrix / scale, np.ones(len(rows)))[0] / scale

    decode = [[1, r["batch"], r["rows"] > 0, r["rows"], r["batch"] * r["width"]] for r in decode_rows]
    prefill = [
        [1, r["tokens"], (r["width"] > 0) * r["tokens"], r["token_ranks"], r["tokens"] * r["width"]] for r in prefill_rows
    ]  # fmt: skip
    fitted = zip(
        (*DECODE, *PREFILL),
        (*solve(decode_rows, decode, "decode"), *solve(prefill_rows, prefill, "prefill")),
        strict=True,
    )
    return Costs(name, **{k: float(v) for k, v in fitted}, provisional=False, provenance=provenance)


def load_costs(name: str) -> Costs:
    """A model of default_costs.json by name, or the one in a JSON file of the same fields. ValueError names what is wrong."""
    known = json.loads(DEFAULTS.read_text())["models"]
    if name in known:
        return Costs(name, **known[name])
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"costs = {name!r} is neither one of {', '.join(sorted(known))} nor a file; name one or give a path"
        )
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"costs: {path} is not JSON: {error}") from None
    fields = {f.name for f in dataclasses.fields(Costs)}
    if not isinstance(data, dict) or set(data) - fields or not {"name", *DECODE, *PREFILL} <= set(data):
        raise ValueError(f"costs: {path} has to be an object with {', '.join(('name', *DECODE, *PREFILL))}")
    return Costs(**data)
