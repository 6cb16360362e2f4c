"""Every check that a server makes when it loads an adapter, without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sgl_bdlora.adapters.check import check_base_weight, check_finite, check_rank
from sgl_bdlora.adapters.errors import AdapterError
from sgl_bdlora.adapters.format import Adapter
from sgl_bdlora.adapters.hosts import BaseLayer, host_layers, layers_of, leaf_of
from sgl_bdlora.adapters.model import BaseModel
from sgl_bdlora.adapters.read import read_adapter
from sgl_bdlora.sharding import HostModel, Sharding, plan_layers
from sgl_bdlora.sharding.alternatives import stored_numel


@dataclass(frozen=True)
class Server:
    """The server that adapters are checked for. model: None checks what the adapter alone can tell.

    itemsize: bytes of a weight in its --dtype. pool_bytes: --lora-pool-gb in bytes.
    """

    model: BaseModel | None
    tp: int
    max_lora_rank: int
    sharding: Sharding
    pool_bytes: int
    itemsize: int


@dataclass(frozen=True)
class Problem:
    """check: "format" and "values" concern the adapter alone; "rank", "layers", "base weights" and "bytes" this server."""

    check: str
    error: AdapterError

    @property
    def malformed(self) -> bool:
        return self.check in ("format", "values")


@dataclass(frozen=True)
class Verdict:
    """adapter: None if it could not be read. bytes_per_rank: on the fullest rank; None where the layers do not fit."""

    name: str
    source: str
    adapter: Adapter | None
    bytes_per_rank: int | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict:
        a = self.adapter
        return {
            "name": self.name,
            "source": self.source,
            "ok": not self.problems,
            "kind": a and a.kind,
            "rank": a and a.rank,
            "nblocks": a and a.nblocks,
            "parameters": a and stored_numel(a),
            "bytes_per_rank": self.bytes_per_rank,
            "problems": [{"check": p.check, "problem": p.error.problem, "fix": p.error.fix} for p in self.problems],
            "notes": list(self.notes),
        }


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """0: all would be served; 1: one or more would not be by this server; 2: one or more would not be by any."""
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    return 2 if any(problem.malformed for problem in problems) else int(bool(problems))


def validate(directory: str | Path, server: Server) -> Verdict:
    """Check one adapter directory; every check that can be made is made, and reports the first thing it finds."""
    try:
        adapter = read_adapter(directory)
    except AdapterError as error:
        return Verdict(error.adapter, str(directory), None, None, (Problem("format", error),), ())
    problems: list[Problem] = []

    def run(check: str, action: Callable[[], object]):
        try:
            return action()
        except AdapterError as error:
            problems.append(Problem(check, error))
            return None

    run("values", lambda: _check_values(adapter))
    run("rank", lambda: check_rank(adapter, server.max_lora_rank))
    size = run("layers", lambda: _bytes_per_rank(adapter, server))
    if size is not None:
        run("bytes", lambda: _check_bytes(adapter, size, server.pool_bytes))
    weights = server.model.vocabulary_weights() if server.model and _has_copies(adapter) else {}
    if weights and size is not None:
        run("base weights", lambda: _check_base_weights(adapter, weights))
    return Verdict(
        adapter.name, str(directory), adapter, size, tuple(problems), tuple(_notes(adapter, server, weights))
    )


def _check_values(adapter: Adapter) -> None:
    for module in adapter.modules.values():
        for factor in (module.a, module.b):
            check_finite(adapter.name, factor.tensor.key, factor.tensor.read())


def _bytes_per_rank(adapter: Adapter, server: Server) -> int:
    """Of the arena, on every rank (sharding/even.py makes them equal). Raises AdapterError where layers and adapter do not fit."""
    if server.model is None:
        layers = layers_of(adapter)
        _check_divisible(adapter, layers, server.tp)
    else:
        layers = server.model.linear_layers() + server.model.vocabulary_layers()
    # Copies of the base weights are compared whole, by a check of their own.
    bare = replace(adapter, modules={p: replace(m, base_weight=None) for p, m in adapter.modules.items()})
    sizes: dict[str, int] = {}
    for rank in range(server.tp):
        layouts, _ = plan_layers(bare, HostModel(host_layers(layers, server.tp, rank)), server.sharding)
        for path, layout in layouts.items():
            sizes[path] = max(sizes.get(path, 0), layout.numel)
    return server.itemsize * sum(sizes.values())


def _check_divisible(adapter: Adapter, layers: Sequence[BaseLayer], tp: int) -> None:
    for layer in layers:
        # Heads of k and v may be repeated instead; only the model's configuration tells.
        split = layer.parallelism in ("column", "row") and layer.leaf not in ("k_proj", "v_proj")
        if split and layer.split % tp:
            side = "inputs" if layer.parallelism == "row" else "outputs"
            raise AdapterError(
                adapter.name,
                f"module {layer.path!r} has {layer.split} {side}, not divisible by --tp {tp}",
                "choose a tensor-parallel size that divides the model",
            )


def _check_bytes(adapter: Adapter, size: int, pool: int) -> None:
    if size > pool:
        raise AdapterError(
            adapter.name,
            f"its weights take {size} bytes on a rank; the LoRA memory pool has {pool}",
            "raise --lora-pool-gb",
        )


def _check_base_weights(adapter: Adapter, weights: dict[str, torch.Tensor]) -> None:
    by_leaf = {leaf_of(path): weight for path, weight in weights.items()}
    for module in adapter.modules.values():
        weight = by_leaf.get(leaf_of(module.path))
        if module.base_weight is None or weight is None:
            continue
        if weight.dtype == torch.float32:
            # A server in a 16-bit type rounds both; the copy was saved in the type of training.
            weight = weight.to(module.base_weight.dtype)
        check_base_weight(adapter.name, module.base_weight, 0, weight)


def _has_copies(adapter: Adapter) -> bool:
    return any(module.base_weight is not None for module in adapter.modules.values())


def _notes(adapter: Adapter, server: Server, weights: dict[str, torch.Tensor]) -> Iterable[str]:
    if server.model is None:
        yield "layers were not compared with a model's (give --model)"
    compared = {leaf_of(path) for path in weights}
    for module in adapter.modules.values():
        if module.base_weight is not None and leaf_of(module.path) not in compared:
            yield f"{module.base_weight.key} was not compared with a model's weights (give --model with their directory)"
