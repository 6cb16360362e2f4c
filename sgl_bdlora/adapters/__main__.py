"""`python -m sgl_bdlora.adapters`: look at adapters without a server."""

import argparse
import dataclasses
import json
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from sgl_bdlora.adapters import AdapterError, read_adapter
from sgl_bdlora.adapters.inspect import Report, report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sgl_bdlora.adapters", description="Tools for LoRA adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="what an adapter is, and what each of N ranks would hold of it")
    look.add_argument("directory", help="a directory that PEFT's save_pretrained wrote")
    look.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    look.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    if args.tp < 1:
        parser.error(f"--tp has to be at least 1, got {args.tp}")
    try:
        found = report(read_adapter(args.directory), args.tp)
    except AdapterError as problem:
        print(problem, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        show(found, Console())
    return 0


def as_json(r: Report) -> dict:
    return {
        "name": r.adapter.name,
        "source": r.adapter.source,
        "kind": r.adapter.kind,
        "nblocks": r.adapter.nblocks,
        "rank": r.adapter.rank,
        "tp": r.tp,
        "parameters": r.parameters,
        "families": [dataclasses.asdict(family) for family in r.families],
        "parameters_per_rank": r.per_rank,
        "bytes_per_rank_16_bit": {title: 2 * count for title, count in r.per_rank.items()},
        "collectives_per_step": r.collectives,
    }


def show(r: Report, console: Console) -> None:
    a = r.adapter
    blocks = f", {a.nblocks} blocks" if a.nblocks > 1 else ""
    console.print(f"{a.name}: {a.kind}{blocks}, rank {a.rank}, {len(a.modules)} modules, {r.parameters:,} parameters")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("module", "layers", "rank", "blocks", f"local rank at TP {r.tp}", "parameters"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for f in r.families:
        ranks = ", ".join(map(str, f.ranks))
        table.add_row(f.name, str(f.modules), ranks, str(f.blocks), str(f.local_rank), f"{f.parameters:,}")
    console.print(table)
    costs = Table(title=f"On each of {r.tp} ranks", box=box.SIMPLE_HEAD)
    for column in ("sharding", "parameters", "16-bit weights", "collectives a step"):
        costs.add_column(column, justify="left" if column == "sharding" else "right")
    for title, count in r.per_rank.items():
        costs.add_row(title, f"{count:,}", f"{2 * count / 2**20:.2f} MiB", str(r.collectives[title]))
    console.print(costs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
