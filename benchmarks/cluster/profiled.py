"""What a profile's rows say: each arm's costs, how far the fit is off, and how much ranks disturb each other."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from benchmarks.cluster.points import PAIRS
from sgl_bdlora.cluster.costs import Costs, fit

# A prefill of 128 tokens without adapters and a decode step of one request both read the weights once: 13.1 and 4.7 ms to the client on
# an H200 (profile-h200-ours.jsonl). The difference is taken for time in which the GPU is free for others.
SERVER_MS = 8.5
# Of a token of context in a decode step on one H200: twice what latency-h200x2-graph-kinds.jsonl has at TP 2 without adapters, 8 requests
# of 128 and of 2,048 tokens. The profile's decode steps have 80 tokens of it a request.
CONTEXT_MS, PROFILE_CONTEXT = 1.34e-4, 80
# The cluster's front and proxy, fitted on the policies' run at 24 requests/s (policies-h200x2.jsonl).
FRONT_MS = 13.0
# A rank-8 request is not to notice its neighbours by more than this.
TARGET = 1.05


def report(rows: list[dict], beside: Path) -> list[Costs]:
    """Print it all, and write each arm's costs, which it returns, as JSON beside the rows' file."""
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows if row["kind"] in ("decode", "prefill")):
        own = [row for row in rows if row["arm"] == arm]
        kinds = {kind: [row for row in own if row["kind"] == kind] for kind in ("decode", "prefill")}
        if not all(kinds.values()):
            print(f"{arm}: not enough rows for a fit")
            continue
        costs = costs_of(arm, kinds)
        found.append(costs)
        path = beside.with_name(f"{beside.stem.removesuffix(f'-{arm}')}-{arm}-costs.json")
        path.write_text(json.dumps(asdict(costs), indent=1) + "\n")
        print(f"\n{arm}: {path}")
        print("  " + ", ".join(f"{k} {v:.3g}" for k, v in asdict(costs).items() if isinstance(v, float)))
        for kind, several in kinds.items():
            off = np.array([estimate(costs, row) / row["ms"] - 1 for row in several])
            worst = several[int(np.abs(off).argmax())]
            print(
                f"  {kind}: {len(several)} points, fit off by {100 * np.median(np.abs(off)):.1f} % (median), "
                f"{100 * np.abs(off).max():.1f} % at most (mix {worst['mix']}, batch {worst['batch']}, {worst['tokens']} tokens)"
            )
        for line in disturbance(kinds["decode"]):
            print("  " + line)
    return found


def costs_of(arm: str, kinds: dict[str, list[dict]]) -> Costs:
    first = kinds["decode"][0]
    where = f"{first['gpu'] or 'CPU'}, TP {first['tp']}, {first['model']}, {first['layers']} layers, run {first['run']}"
    name = {"ours": "bdlora", "stock": "csgmv"}[arm]
    words = (
        f"benchmarks.cluster.profile, {where}: {len(kinds['decode'])} decode and {len(kinds['prefill'])} prefill points"
    )
    return fit(name, kinds["decode"], kinds["prefill"], words)


def estimate(costs: Costs, row: dict) -> float:
    if row["kind"] == "decode":
        return float(costs.decode(row["batch"], row["rows"], row["width"]))
    return float(costs.prefill(row["tokens"], row["token_ranks"], row["width"]))


def disturbance(decode: list[dict]) -> list[str]:
    """A line for each pair that was measured: the step with mixed ranks by the step with one rank, total rank the same."""
    ms = {(row["mix"], row["batch"]): (row["ms"], row["rows"]) for row in decode}
    lines = []
    for pair in PAIRS:
        if pair.mixed in ms and pair.uniform in ms:
            (mixed, rows), (uniform, _) = ms[pair.mixed], ms[pair.uniform]
            ratio = mixed / uniform
            lines.append(
                f"total rank {rows}: {pair.mixed[0]} at batch {pair.mixed[1]} {mixed:.3f} ms, {pair.uniform[0]} at batch "
                f"{pair.uniform[1]} {uniform:.3f} ms: {ratio:.3f}x, {'within' if ratio <= TARGET else 'beyond'} {TARGET}x"
            )
    return lines


def write_defaults(found: list[Costs], path: Path) -> None:
    """Put measured models in the file of the package's own, and make anew those that are derived from ours."""
    data = json.loads(path.read_text())
    models = {costs.name: costs for costs in found}
    ours = models["bdlora"]
    for name, made in {**models, **derived(ours)}.items():
        data["models"][name] = {
            k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(made).items() if k != "name"
        }
    data["note"] = f"Ranks are those of the plain adapter with as many parameters. Measured: {ours.provenance}."
    path.write_text(json.dumps(data, indent=2) + "\n")


def derived(ours: Costs) -> dict[str, Costs]:
    """no-lora: without the LoRA terms; padded: the step of 32 requests and 4 adapters of rank 16 costs the same, all of it by padding;
    bdlora-served: with what a profile of short prompts on an idle server does not show."""
    nothing = dict.fromkeys(("row_ms", "pad_ms", "lora_token_ms", "rank_token_ms", "pad_token_ms"), 0.0)
    without = replace(
        ours, name="no-lora", **nothing, lora_ms=0.0,
        provenance="Model bdlora without its LoRA terms: adapters cost memory and loads only.",
    )  # fmt: skip
    padded = replace(
        ours, name="padded", **nothing | {
            "pad_ms": ours.row_ms * 4 / 32 + ours.pad_ms,
            "pad_token_ms": ours.lora_token_ms / 16 + ours.rank_token_ms + ours.pad_token_ms,
        },
        provisional=True,
        provenance="Hypothetical, not a measurement of any server: kernels that pad every token to the largest rank in the batch (Toppings'"
        " a * batch * max rank + b), with coefficients that cost what model bdlora costs for a batch of 32 requests and 4 adapters of rank"
        " 16. Shows what placement by rank gains where ranks disturb each other strongly.",
    )  # fmt: skip
    served = replace(
        ours, name="bdlora-served", prefill_ms=max(0.0, ours.prefill_ms - SERVER_MS),
        request_ms=max(0.0, ours.request_ms - PROFILE_CONTEXT * CONTEXT_MS), context_ms=CONTEXT_MS, outside_ms=SERVER_MS + FRONT_MS,
        provenance=f"Model bdlora in a cluster under load: attention grows with context ({CONTEXT_MS} ms a token, from the latency"
        f" benchmark), {SERVER_MS} ms of a prefill keep no GPU busy (from the profile's rows), {FRONT_MS} ms are the front's (fitted on the"
        " policies' run at 24 requests/s).",
    )  # fmt: skip
    return {"no-lora": without, "padded": padded, "bdlora-served": served}
