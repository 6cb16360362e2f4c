"""What the commands print for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from sgl_bdlora.adapters.convert import Conversion, ModuleReport
from sgl_bdlora.adapters.hosts import leaf_of
from sgl_bdlora.adapters.inspect import Report
from sgl_bdlora.adapters.plan import Plan
from sgl_bdlora.adapters.validate import Server, Verdict


def show_report(r: Report, console: Console) -> None:
    a = r.adapter
    blocks = f", {a.nblocks} blocks" if a.nblocks > 1 else ""
    console.print(f"{a.name}: {a.kind}{blocks}, rank {a.rank}, {len(a.modules)} modules, {r.parameters:,} parameters")
    table = _table("module", "layers", "rank", "blocks", f"local rank\nat TP {r.tp}", "parameters")
    for f in r.families:
        ranks = ", ".join(map(str, f.ranks))
        table.add_row(f.name, str(f.modules), ranks, str(f.blocks), str(f.local_rank), f"{f.parameters:,}")
    console.print(table)
    costs = _table("sharding", "parameters", "16-bit weights", "collectives\na step", title=f"On each of {r.tp} ranks")
    for title, count in r.per_rank.items():
        costs.add_row(title, f"{count:,}", _mib(2 * count), str(r.collectives[title]))
    console.print(costs)


def show_verdicts(verdicts: list[Verdict], server: Server, console: Console) -> None:
    """A line for each adapter, then what was found; problems themselves are for stderr."""
    model = f"{server.model.name} at " if server.model else ""
    table = _table("adapter", "result", "kind", "rank", "blocks", f"bytes a rank,\n{model}TP {server.tp}")
    for v in verdicts:
        result = "ok" if not v.problems else "malformed" if any(p.malformed for p in v.problems) else "refused"
        a = v.adapter
        described = (a.kind, str(a.rank), str(a.nblocks)) if a else ("-", "-", "-")
        table.add_row(v.name, result, *described, f"{v.bytes_per_rank:,}" if v.bytes_per_rank is not None else "-")
    console.print(table)
    for note in dict.fromkeys(note for v in verdicts for note in v.notes):
        console.print(f"Note: {note}", soft_wrap=True)


def show_plan(p: Plan, console: Console) -> None:
    console.print(
        f"{p.model.name} ({p.model.family}), TP {p.tp}, {len(p.targets)} modules in {p.model.layers} layers; plain LoRA of rank "
        f"{p.rank}: {p.parameters:,} parameters",
        soft_wrap=True,
    )
    table = _table("about", "rank", "of plain", "parameters", title=f"Block-diagonal, nblocks = {p.nblocks}")
    for c in p.candidates:
        table.add_row(f"{c.goal:.2f}x", str(c.rank), f"{c.ratio:.3f}x", f"{c.parameters:,}")
    console.print(table)
    costs = _table(
        "adapter", "rank", "local\nrank", "parameters", "16-bit\nMiB", "Mflop\na token", "collectives\na step",
        title=f"On each of {p.tp} ranks",
    )  # fmt: skip
    for c in p.costs:
        costs.add_row(
            c.adapter if c.sharding == "local" else f"{c.adapter}, {c.sharding}", str(c.rank), str(c.local_rank),
            f"{c.parameters:,}", f"{c.bytes_16_bit / 2**20:.2f}", f"{c.flops / 1e6:.2f}", str(c.collectives),
        )  # fmt: skip
    console.print(costs)


def show_conversion(c: Conversion, target: str, console: Console) -> None:
    families: dict[tuple[str, str], list[ModuleReport]] = {}
    for m in c.modules:
        families.setdefault((leaf_of(m.path), m.how), []).append(m)
    table = _table("module", "layers", "how", "rank", "parameters", "energy kept,\nmean", "error,\nworst")
    for (leaf, how), found in families.items():
        table.add_row(
            leaf, str(len(found)), how, _change([m.rank_before for m in found], [m.rank for m in found]),
            f"{sum(m.parameters for m in found):,}", f"{sum(m.energy_kept for m in found) / len(found):.4f}",
            f"{max(m.relative_error for m in found):.4f}",
        )  # fmt: skip
    console.print(table)
    before, after = sum(m.parameters_before for m in c.modules), sum(m.parameters for m in c.modules)
    quality = "exact" if c.exact else f"relative error {c.relative_error:.4f}, energy kept {c.energy_kept:.4f}"
    console.print(
        f"{c.source} -> {target}: rank {c.rank}, nblocks {c.nblocks}, {before:,} -> {after:,} parameters; {quality}",
        soft_wrap=True,
    )
    carried = [leaf_of(m.path) for m in c.modules if m.how == "carried"]
    if carried:
        console.print(
            f"Carried over unchanged: {', '.join(dict.fromkeys(carried))} ({len(carried)} modules)", soft_wrap=True
        )
    if c.not_copied:
        console.print(f"Not copied: {', '.join(c.not_copied)}", soft_wrap=True)
    for note in c.notes:
        console.print(f"Note: {note}", soft_wrap=True)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for i, column in enumerate(columns):
        words = i == 0 or column in ("how", "result", "kind")
        table.add_column(column, justify="left" if words else "right", no_wrap=column != "adapter", overflow="fold")
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def _change(before: list[int], after: list[int]) -> str:
    old, new = _range(before), _range(after)
    return new if old == new else f"{old} -> {new}"
