"""Quality of block-diagonal adapters against LoRA of as many parameters, trained, converted and healed.

python -m benchmarks.quality prepare --out .cache/quality                # network, no GPU: data as tokens, model in parts
python -m benchmarks.quality run --data .cache/quality/MODEL --resume    # GPU, no network; --only, --minutes, --quick
python -m benchmarks.quality report benchmarks/results/quality.jsonl     # tables (Markdown) and a plot

Several processes may `run` into one file, each with units of its own (--only): a row is one write at its end.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.record import RESULTS, read_rows
from sgl_bdlora.demo_model import DemoModelError

OUTPUT = RESULTS / "quality.jsonl"


def prepare(args: argparse.Namespace) -> int:
    """Fetch, tokenise and pack into OUT/MODEL."""
    from transformers import AutoTokenizer

    from benchmarks.quality import data, models, tasks, weights

    with tempfile.TemporaryDirectory(dir=args.out.parent if args.out.parent.is_dir() else None) as scratch:
        if args.model in models.NAMES:
            model, gguf = models.fetch_model(args.model, Path(scratch))
        else:
            model, gguf = Path(args.model), args.gguf
            if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
                print(
                    f"error: --model {model} is neither {' nor '.join(models.NAMES)} nor a folder with a config.json and safetensors",
                    file=sys.stderr,
                )
                return 2
        texts = args.texts or Path(scratch) / "texts"
        tasks.fetch(texts)
        target = args.out / model.name
        tokenizer = AutoTokenizer.from_pretrained(model)
        for name in args.tasks:
            task = tasks.TASKS[name]
            parts = {
                part: data.encode(tokenizer, rows, task.question, task.classes, task.max_tokens)
                for part, rows in tasks.split(task, texts).items()
            }
            data.save(target, name, parts)
            for part, rows in parts.items():
                shares = [round(float((rows.label == i).float().mean()), 3) for i in range(len(task.classes))]
                tokens = float(rows.length.float().mean())
                print(f"{name}, {part}: {len(rows):,} rows, {tokens:.0f} tokens each, classes {shares}")
        weights.pack(model, target, gguf)
        (target / "prepared.json").write_text(json.dumps({"tasks": args.tasks}) + "\n")
    sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    for name, size in sizes.items():
        print(f"{size / 1e6:8.2f} MB  {target / name}")
    print(f"{sum(sizes.values()) / 1e6:8.2f} MB  in all")
    return 0


def run(args: argparse.Namespace) -> int:
    import torch

    from benchmarks.quality.run import QUICK, Plan, Quality

    if not (args.data / "prepared.json").is_file():
        print(f"error: {args.data} was not made by `python -m benchmarks.quality prepare`", file=sys.stderr)
        return 2
    if args.output.exists() and not args.resume:
        print(f"error: {args.output} exists: --resume goes on with it, --output names another", file=sys.stderr)
        return 2
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {
        name: getattr(args, name) for name in ("rank", "steps", "heal_steps", "heal_lr", "batch", "together", "test")
    }
    given |= {name: tuple(values) for name in ("seeds", "nblocks") if (values := getattr(args, name))}
    plan = dataclasses.replace(QUICK if args.quick else Plan(), **{k: v for k, v in given.items() if v is not None})
    quality = Quality(args.data, args.output, plan, device, args.resume)
    if args.list:
        print("\n".join(quality.units()))
        return 0
    quality.run(args.only, args.minutes)
    print(args.output)
    return 0


def report(args: argparse.Namespace) -> int:
    from benchmarks.quality.report import draw, put_into, tables

    rows = []
    for path in args.rows:
        rows += [row for row in read_rows(path) if row not in rows]  # files may begin with the same rows
    try:
        put_into(args.page, tables(rows)) if args.page else print(tables(rows))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    picture = args.plot or args.rows[0].with_suffix(".png")
    try:
        draw(rows, picture)
        print(picture, file=sys.stderr)
    except (ImportError, ValueError) as error:
        print(f"no plot: {error}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    make = commands.add_parser("prepare", help="data and model into a folder that can be copied")
    make.set_defaults(run=prepare)
    make.add_argument("--out", type=Path, default=Path(".cache/quality"), help="default: %(default)s")
    make.add_argument(
        "--model", default="SmolLM2-135M-Instruct", metavar="NAME|DIR",
        help="SmolLM2-135M-Instruct or gemma-3-270m (from packages), or a folder in Transformers' format (default: %(default)s)",
    )  # fmt: skip
    make.add_argument("--gguf", type=Path, help="the quantised file that the model in DIR was converted from")
    make.add_argument("--texts", type=Path, help="keep the packages' texts here (default: they are deleted)")
    make.add_argument(
        "--tasks", nargs="+", default=["imdb", "sentences", "spam"], choices=["imdb", "sentences", "spam"]
    )

    go = commands.add_parser("run", help="train, convert, heal and score")
    go.set_defaults(run=run)
    go.add_argument("--data", type=Path, required=True, help="a folder that prepare made: OUT/MODEL")
    go.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    go.add_argument("--resume", action="store_true", help="go on with the file: what is done is skipped")
    go.add_argument("--only", nargs="+", default=(), metavar="PATTERN", help="units, for example sweep/* main/imdb/*")
    go.add_argument("--list", action="store_true", help="print the units and stop")
    go.add_argument("--minutes", type=float, help="begin no unit that would end later than this")
    go.add_argument("--quick", action="store_true", help="tiny sizes: tries the benchmark, not a measurement")
    go.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    go.add_argument("--seeds", type=int, nargs="+")
    go.add_argument("--nblocks", type=int, nargs="+")
    for name in ("rank", "steps", "heal-steps", "batch", "together", "test"):
        go.add_argument(f"--{name}", type=int)
    go.add_argument("--heal-lr", type=float)

    show = commands.add_parser("report", help="Markdown tables and a plot")
    show.set_defaults(run=report)
    show.add_argument("rows", type=Path, nargs="+", help="one or more files that run wrote")
    show.add_argument("--plot", type=Path, help="default: beside the rows")
    show.add_argument("--page", type=Path, help="put the tables into this page, between its marker lines")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
