"""Adapters in another structure: plain to block-diagonal, block-diagonal to plain, other blocks. One module at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sgl_bdlora.adapters.budget import closest_rank
from sgl_bdlora.adapters.check import check_finite
from sgl_bdlora.adapters.dense import dense_form
from sgl_bdlora.adapters.errors import AdapterError
from sgl_bdlora.adapters.fit import fit_blocks, squared_error
from sgl_bdlora.adapters.format import Adapter, LoRAModule, StoredTensor
from sgl_bdlora.adapters.hosts import leaf_of, parallelism_of
from sgl_bdlora.adapters.read import read_adapter
from sgl_bdlora.adapters.weights import load_json
from sgl_bdlora.adapters.write import CONFIG, WEIGHTS, TensorFile, TensorSpec, check_target, new_config, put_in_place

REPORT = "conversion.json"

How = Literal["exact", "fitted", "carried"]
Track = Callable[[Sequence["Target"]], Iterable["Target"]]


@dataclass(frozen=True)
class Target:
    """What becomes of a module. side: the factor that will be block-diagonal; None for plain. untouched: as it is in the source."""

    module: LoRAModule
    rank: int
    blocks: int = 1
    side: Literal["a", "b"] | None = None
    untouched: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the stored lora_A and lora_B."""
        m = self.module
        if self.untouched:
            return m.a.tensor.shape, m.b.tensor.shape
        a, b = (self.blocks if self.side == side else 1 for side in ("a", "b"))
        return (self.rank, m.in_features // a), (m.out_features, self.rank // b)


@dataclass(frozen=True)
class ModuleReport:
    """relative_error: Frobenius norm of what changed in the update over the update's, as stored. energy_kept: share of its squared
    singular values that the fit kept, before its factors were rounded to the stored type."""

    path: str
    how: How
    nblocks: int
    rank_before: int
    rank: int
    parameters_before: int
    parameters: int
    relative_error: float
    energy_kept: float
    # Squares of the scaled update, of what changed and of what was kept: they add up over the modules.
    squares: tuple[float, float, float] = field(repr=False)

    def as_json(self) -> dict:
        fields = dataclasses.asdict(self)
        del fields["squares"]
        return fields


@dataclass(frozen=True)
class Conversion:
    """What was done. not_copied: files in the source's directory that are not part of the adapter."""

    command: str
    source: str
    nblocks: int
    rank: int
    modules: tuple[ModuleReport, ...]
    not_copied: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return all(m.how != "fitted" for m in self.modules)

    @property
    def relative_error(self) -> float:
        """Of all modules' updates taken as one vector."""
        return math.sqrt(_ratio(sum(m.squares[1] for m in self.modules), sum(m.squares[0] for m in self.modules), 0.0))

    @property
    def energy_kept(self) -> float:
        return _ratio(sum(m.squares[2] for m in self.modules), sum(m.squares[0] for m in self.modules), 1.0)

    def as_json(self) -> dict:
        return {
            "command": self.command,
            "source": self.source,
            "nblocks": self.nblocks,
            "rank": self.rank,
            "exact": self.exact,
            "relative_error": self.relative_error,
            "energy_kept": self.energy_kept,
            "parameters_before": sum(m.parameters_before for m in self.modules),
            "parameters": sum(m.parameters for m in self.modules),
            "carried": [m.path for m in self.modules if m.how == "carried"],
            "not_copied": list(self.not_copied),
            "notes": list(self.notes),
            "modules": [m.as_json() for m in self.modules],
        }


def to_block_diagonal(
    source: Path,
    target: Path,
    nblocks: int,
    rank: int | None = None,
    keep: Collection[str] = (),
    overwrite: bool = False,
    track: Track = iter,
) -> Conversion:
    """Plain LoRA in `source` -> block-diagonal LoRA in `target`, every block the best fit of its rank.

    rank: of the modules that have the configuration's r; others keep their proportion to it. Multiple of nblocks; without it the one
    that gives about as many parameters as the source has. keep: leaf names of modules that stay plain; lm_head always does.
    track: wraps the list of targets, to show progress. Raises AdapterError.
    """
    adapter = read_adapter(source)
    if adapter.kind != "plain":
        raise AdapterError(
            adapter.name,
            f"use_bdlora in adapter_config.json makes it {adapter.kind} already, with nblocks = {adapter.nblocks}",
            "change its blocks with re-block, or write it out plain with convert --dense",
        )
    _check_keep(adapter, keep)
    changed = [m for m in adapter.modules.values() if not m.embedding and leaf_of(m.path) not in keep]
    _check_embeddings(adapter)
    _check_divisible(adapter, changed, nblocks)
    _check_rank(adapter.name, rank, nblocks)
    if rank is None:
        goal = sum(m.rank * (m.in_features + m.out_features) for m in changed)
        rank = closest_rank(lambda r: _count(_fitted(adapter, changed, nblocks, r)), goal, nblocks)
    targets = _fitted(adapter, changed, nblocks, rank)
    most = nblocks * adapter.config.r
    notes = [f"rank {rank} is above nblocks x r = {most}, which is exact: the rest is zeros"] if rank > most else []
    return _write("convert", adapter, target, targets, nblocks, rank, overwrite, track, notes)


def to_dense(source: Path, target: Path, overwrite: bool = False, track: Track = iter) -> Conversion:
    """Block-diagonal LoRA in `source` -> the plain LoRA of the same rank that it is equal to, zeros written out. Exact."""
    adapter = read_adapter(source)
    if adapter.config.use_bdlora is None:
        raise AdapterError(
            adapter.name, "use_bdlora = None in adapter_config.json: it is plain already", "use it as it is"
        )
    targets = {
        path: Target(module, module.rank, untouched=not module.block_diagonal)
        for path, module in adapter.modules.items()
    }
    return _write("convert --dense", adapter, target, targets, 1, adapter.config.r, overwrite, track)


def re_block(
    source: Path, target: Path, nblocks: int, rank: int | None = None, overwrite: bool = False, track: Track = iter
) -> Conversion:
    """Block-diagonal LoRA in `source` -> the same with `nblocks` blocks, on the side that each layer's parallelism wants.

    Exact where blocks are merged (nblocks divides the source's) with the source's rank, and where they are split (the source's divides
    nblocks) with rank * nblocks / source's nblocks, as every new block then holds a product of one old block's rank. Both are the
    default. Otherwise, and with a smaller rank, every block is the best fit of its rank. Plain modules are carried over.
    """
    adapter = read_adapter(source)
    if adapter.kind == "plain":
        raise AdapterError(
            adapter.name, "it has no block-diagonal module (use_bdlora in adapter_config.json)", "use convert --nblocks"
        )
    changed = [m for m in adapter.modules.values() if m.block_diagonal]
    _check_divisible(adapter, changed, nblocks)
    _check_rank(adapter.name, rank, nblocks)
    if rank is None:
        before, r = adapter.nblocks, adapter.config.r
        rank = r * nblocks // before if nblocks % before == 0 else -(-r // nblocks) * nblocks
    targets = _fitted(adapter, changed, nblocks, rank)
    wrong = [t.module.path for t in targets.values() if _was_wrongly_sided(t)]
    notes = [f"{len(wrong)} modules were block-diagonal on the wrong side, for example {wrong[0]}"] if wrong else []
    return _write("re-block", adapter, target, targets, nblocks, rank, overwrite, track, notes)


def _fitted(adapter: Adapter, changed: list[LoRAModule], nblocks: int, rank: int) -> dict[str, Target]:
    """Targets of all modules: those in `changed` block-diagonal, the others untouched."""
    targets = {path: Target(module, module.rank, untouched=True) for path, module in adapter.modules.items()}
    for m in changed:
        # In proportion to the configuration's r, at least a row a block.
        own = max(round(m.rank * rank / (adapter.config.r * nblocks)), 1) * nblocks
        side = "a" if parallelism_of(leaf_of(m.path)) == "row" else "b"
        targets[m.path] = Target(m, own, nblocks, side)
    return targets


def _count(targets: dict[str, Target]) -> int:
    return sum(math.prod(shape) for t in targets.values() if not t.untouched for shape in t.shapes)


def _was_wrongly_sided(target: Target) -> bool:
    was = "a" if target.module.a.blocks > 1 else "b"
    return target.side is not None and target.side != was


def _write(
    command: str,
    adapter: Adapter,
    path: Path,
    targets: dict[str, Target],
    nblocks: int,
    rank: int,
    overwrite: bool,
    track: Track,
    notes: Sequence[str] = (),
) -> Conversion:
    source = Path(adapter.source)
    if path.resolve() in source.resolve().parents:
        raise AdapterError(adapter.name, f"{path} contains the adapter itself", "write to another directory")
    check_target(adapter.name, path, overwrite)
    scales = {p: m.scale for p, m in adapter.modules.items()}
    ranks = {p: t.rank for p, t in targets.items()}
    raw = load_json(adapter.name, source / CONFIG)
    config = new_config(raw, ranks, scales, rank, _use_bdlora(targets, nblocks) if nblocks > 1 else None)
    with put_in_place(adapter.name, path, overwrite) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with (folder / WEIGHTS).open("wb") as stream:
            file = TensorFile(stream, _specs(targets))
            modules = tuple(_convert(adapter.name, target, file) for target in track(list(targets.values())))
            file.close()
        _check_result(adapter.name, folder, targets)
        parts = {CONFIG, WEIGHTS, REPORT, *(p.name for p in source.glob("adapter_model*"))}
        others = tuple(sorted(p.name for p in source.iterdir() if p.name not in parts))
        done = Conversion(command, adapter.name, nblocks, rank, modules, others, tuple(notes))
        (folder / REPORT).write_text(json.dumps(done.as_json(), indent=1) + "\n")
    return done


def _specs(targets: dict[str, Target]) -> dict[str, TensorSpec]:
    specs = {}
    for target in targets.values():
        m = target.module
        for stored, shape in zip((m.a.tensor, m.b.tensor), target.shapes, strict=True):
            specs[stored.key] = TensorSpec(shape, stored.dtype)
        if m.base_weight is not None:
            specs[m.base_weight.key] = TensorSpec(m.base_weight.shape, m.base_weight.dtype)
    return specs


def _convert(adapter: str, target: Target, file: TensorFile) -> ModuleReport:
    m = target.module
    stored_a, stored_b = m.a.tensor, m.b.tensor
    if m.base_weight is not None:
        file.put(m.base_weight.key, m.base_weight.read())
    if target.untouched:
        for stored in (stored_a, stored_b):
            file.put(stored.key, _finite(adapter, stored))
        return _module_report(target, "carried", 0.0, 0.0, 0.0)
    for stored in (stored_a, stored_b):
        _finite(adapter, stored)
    a, b = dense_form(m)
    if target.side is None:
        file.put(stored_a.key, a.to(stored_a.dtype))
        file.put(stored_b.key, b.to(stored_b.dtype))
        return _module_report(target, "exact", 0.0, 0.0, 0.0)
    left, right = (b, a) if target.side == "b" else (a.T, b.T)
    types = (stored_b.dtype, stored_a.dtype) if target.side == "b" else (stored_a.dtype, stored_b.dtype)
    fit = fit_blocks(left, right, target.blocks, target.rank)
    packed, other = fit.left.to(types[0]), fit.right.to(types[1])
    error = 0.0 if fit.exact else squared_error(left, right, packed, other, target.blocks)
    if target.side == "b":
        new_a, new_b = other, packed
    else:
        new_a, new_b = torch.cat([block.T for block in packed.chunk(target.blocks)]), other.T
    for stored, values in ((stored_a, new_a), (stored_b, new_b)):
        check_finite(adapter, stored.key, values)
        file.put(stored.key, values)
    return _module_report(target, "exact" if fit.exact else "fitted", fit.energy, error, fit.kept)


def _finite(adapter: str, stored: StoredTensor) -> torch.Tensor:
    values = stored.read()
    check_finite(adapter, stored.key, values)
    return values


def _module_report(target: Target, how: How, energy: float, error: float, kept: float) -> ModuleReport:
    m, square = target.module, target.module.scale**2
    return ModuleReport(
        path=m.path,
        how=how,
        nblocks=max(m.a.blocks, m.b.blocks) if target.untouched else target.blocks,
        rank_before=m.rank,
        rank=target.rank,
        parameters_before=math.prod(m.a.tensor.shape) + math.prod(m.b.tensor.shape),
        parameters=sum(math.prod(shape) for shape in target.shapes),
        relative_error=math.sqrt(_ratio(error, energy, 0.0)),
        energy_kept=_ratio(kept, energy, 1.0),
        squares=(square * energy, square * error, square * kept),
    )


def _ratio(part: float, whole: float, empty: float) -> float:
    return part / whole if whole else empty


def _use_bdlora(targets: dict[str, Target], nblocks: int) -> dict[str, Any]:
    """PEFT's lists, whose entries match as substrings of the path: leaf names where that says enough, else paths."""
    lists: dict[str, dict[str, None]] = {"a": {}, "b": {}}
    for path, target in targets.items():
        if target.side is None:
            continue
        leaf = leaf_of(path)
        alike = all(other.side == target.side for other_path, other in targets.items() if leaf in other_path)
        lists[target.side][leaf if alike else path] = None
    return {
        "nblocks": nblocks,
        "target_modules_bd_a": list(lists["a"]),
        "target_modules_bd_b": list(lists["b"]),
        "match_strict": all(target.side is not None for target in targets.values()),
    }


def _check_result(name: str, folder: Path, targets: dict[str, Target]) -> None:
    """Read the result back: every module has to have the rank, the blocks and the scale that were meant."""
    written = read_adapter(folder, name)
    for path, target in targets.items():
        m = written.modules[path]
        blocks = {"a": (target.blocks, 1), "b": (1, target.blocks)}.get(target.side or "", (1, 1))
        same_scale = math.isclose(m.scale, target.module.scale, rel_tol=1e-12)
        if (m.rank, m.a.blocks, m.b.blocks) != (target.rank, *blocks) or not same_scale:
            raise RuntimeError(f"{name}: {path} was written as {m}, meant as {target}")


def _check_rank(name: str, rank: int | None, nblocks: int) -> None:
    if rank is not None and rank % nblocks:
        below, above = rank // nblocks * nblocks, -(-rank // nblocks) * nblocks
        raise AdapterError(
            name,
            f"--rank {rank} is not divisible by --nblocks {nblocks}",
            f"choose {below} or {above}" if below else f"choose {above}",
        )


def _check_divisible(adapter: Adapter, modules: list[LoRAModule], nblocks: int) -> None:
    for m in modules:
        row = parallelism_of(leaf_of(m.path)) == "row"
        size, what = (m.in_features, "inputs") if row else (m.out_features, "outputs")
        if size % nblocks:
            raise AdapterError(
                adapter.name,
                f"module {m.path!r} has {size} {what}, not divisible by --nblocks {nblocks}",
                f"choose a divisor of {size} for --nblocks"
                + ("" if m.block_diagonal else f", or leave it plain with --keep {leaf_of(m.path)}"),
            )


def _check_keep(adapter: Adapter, keep: Collection[str]) -> None:
    leaves = {leaf_of(path) for path in adapter.modules}
    for name in keep:
        if name not in leaves:
            raise AdapterError(
                adapter.name,
                f"--keep {name} names none of its modules ({', '.join(sorted(leaves))})",
                "name one of them",
            )
    if leaves <= {*keep, "lm_head", "embed_tokens"}:
        raise AdapterError(
            adapter.name,
            f"it adapts only {', '.join(sorted(leaves))}, of which none would become block-diagonal",
            "serve it as it is",
        )


def _check_embeddings(adapter: Adapter) -> None:
    for m in adapter.modules.values():
        if m.embedding and leaf_of(m.path) != "lm_head":
            raise AdapterError(
                adapter.name,
                f"module {m.path!r} is an embedding, which PEFT cannot hold in an adapter with use_bdlora",
                "keep the adapter plain, or train the embedding in a plain adapter of its own",
            )
