"""`python -m sgl_bdlora.adapters`: look at adapters, check, cost and convert them without a server.

Exit codes: 0 done; 1 `validate` found adapters that this server would refuse; 2 malformed input; 130 interrupted.
"""

import argparse
import functools
import json
import signal
import sys
from pathlib import Path

from sgl_bdlora import config
from sgl_bdlora.adapters.errors import AdapterError, ModelError


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (AdapterError, ModelError) as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _inspect(args: argparse.Namespace) -> int:
    from sgl_bdlora.adapters import inspect, read_adapter, tables

    found = inspect.report(read_adapter(args.directory), args.tp)
    return _print(args, found.as_json(), functools.partial(tables.show_report, found))


def _validate(args: argparse.Namespace) -> int:
    from sgl_bdlora.adapters import model, tables, validate

    base = model.read_model(args.model) if args.model else None
    if base:
        base.check_tp(args.tp)
    itemsize = 4 if args.dtype == "float32" else 2
    server = validate.Server(
        base, args.tp, args.max_lora_rank, args.lora_sharding, int(args.lora_pool_gb * 2**30), itemsize
    )
    verdicts = [validate.validate(directory, server) for directory in args.directories]
    code = validate.exit_code(verdicts)
    for problem in (problem for verdict in verdicts for problem in verdict.problems):
        print(problem.error, file=sys.stderr)
    found = {
        "ok": code == 0,
        "model": base and base.name,
        "tp": args.tp,
        "max_lora_rank": args.max_lora_rank,
        "lora_sharding": args.lora_sharding,
        "adapters": [verdict.as_json() for verdict in verdicts],
    }
    _print(args, found, functools.partial(tables.show_verdicts, verdicts, server))
    return code


def _plan(args: argparse.Namespace) -> int:
    from sgl_bdlora.adapters import model, plan, tables

    base = model.read_model(args.model)
    made = plan.plan(base, args.tp, args.lora_rank, args.nblocks or args.tp, args.target_modules or model.LINEAR)
    return _print(args, made.as_json(), functools.partial(tables.show_plan, made))


def _convert(args: argparse.Namespace) -> int:
    from sgl_bdlora.adapters import convert

    common = {"overwrite": args.overwrite, "track": _progress("Converting")}
    if args.dense:
        if args.rank or args.keep:
            raise AdapterError(
                args.source.name,
                "--dense keeps rank and modules: --rank and --keep do not go with it",
                "leave them out",
            )
        done = convert.to_dense(args.source, args.target, **common)
    else:
        done = convert.to_block_diagonal(args.source, args.target, args.nblocks, args.rank, args.keep, **common)
    return _print_conversion(args, done)


def _re_block(args: argparse.Namespace) -> int:
    from sgl_bdlora.adapters import convert

    track = _progress("Re-blocking")
    done = convert.re_block(args.source, args.target, args.nblocks, args.rank, args.overwrite, track)
    return _print_conversion(args, done)


def _print_conversion(args: argparse.Namespace, done) -> int:
    from sgl_bdlora.adapters import tables

    return _print(args, done.as_json(), functools.partial(tables.show_conversion, done, str(args.target)))


def _print(args: argparse.Namespace, found: dict, show) -> int:
    from rich.console import Console

    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(Console())
    return 0


def _progress(words: str):
    """Wraps a list to show on stderr how far it is."""
    from rich.console import Console
    from rich.progress import track

    return functools.partial(track, description=words, console=Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sgl_bdlora.adapters", description="Tools for LoRA adapters.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, words: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=words, description=words)
        made.add_argument("--json", action="store_true", help="print JSON instead of tables")
        made.set_defaults(run=run)
        return made

    tp = {"type": _positive, "metavar": "N", "help": "tensor-parallel size"}

    look = command("inspect", _inspect, "what an adapter is, and what each of N ranks would hold of it")
    look.add_argument("directory", help="a directory that PEFT's save_pretrained wrote")
    look.add_argument("--tp", default=1, **tp)

    check = command("validate", _validate, "every check that a server makes when it loads adapters; for CI")
    check.add_argument("directories", nargs="+", metavar="DIR", help="adapter directories")
    check.add_argument("--model", metavar="CONFIG_OR_DIR", help="the served model's config.json or directory")
    check.add_argument("--tp", default=1, **tp)
    check.add_argument(
        "--max-lora-rank",
        type=_positive,
        default=config.DEFAULT_MAX_RANK,
        metavar="R",
        help="the server's (default: %(default)s)",
    )
    check.add_argument("--lora-sharding", choices=config.SHARDINGS, default=config.Options.lora_sharding)
    check.add_argument(
        "--lora-pool-gb",
        type=_size,
        default=config.Options.lora_pool_gb,
        metavar="GIB",
        help="the server's (default: %(default)s)",
    )
    check.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="the server's")

    cost = command(
        "plan", _plan, "which block-diagonal ranks cost as much as a plain LoRA, and what each sharding costs"
    )
    cost.add_argument("--model", required=True, metavar="CONFIG_OR_DIR", help="a model's config.json or directory")
    cost.add_argument("--tp", required=True, **tp)
    cost.add_argument("--lora-rank", required=True, type=_positive, metavar="R", help="rank of the plain LoRA")
    cost.add_argument("--nblocks", type=_positive, metavar="N", help="blocks (default: the tensor-parallel size)")
    cost.add_argument("--target-modules", nargs="+", metavar="NAME", default=None, help="default: all seven")

    change = command(
        "convert", _convert, "plain LoRA to block-diagonal (best fit), or with --dense back to plain (exact)"
    )
    _add_paths(change)
    form = change.add_mutually_exclusive_group(required=True)
    form.add_argument("--nblocks", type=_positive, metavar="N", help="blocks of the result")
    form.add_argument("--dense", action="store_true", help="write a block-diagonal adapter out as plain LoRA")
    change.add_argument("--rank", type=_positive, metavar="R", help="default: about as many parameters as the source")
    change.add_argument(
        "--keep", nargs="+", default=(), metavar="NAME", help="modules that stay plain; lm_head always does"
    )

    again = command("re-block", _re_block, "other blocks: exact where old and new ones nest, else the best fit")
    _add_paths(again)
    again.add_argument("--nblocks", type=_positive, required=True, metavar="M", help="blocks of the result")
    again.add_argument(
        "--rank", type=_positive, metavar="R", help="default: the exact one where blocks nest, else the source's"
    )
    return parser


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="an adapter directory")
    parser.add_argument("target", type=Path, metavar="DST", help="the directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is an adapter")


def _positive(word: str) -> int:
    if not word.isdecimal() or not 0 < int(word) < 2**31:
        raise argparse.ArgumentTypeError(f"has to be a whole number of at least 1, got {word!r}")
    return int(word)


def _size(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < 2**30:
        raise argparse.ArgumentTypeError(f"has to be a positive number of GiB, got {word!r}")
    return value


def _end(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Stopped by a CI system as by Ctrl-C: what was begun is removed.
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main(sys.argv[1:]))
