"""python -m sgl_bdlora.cluster simulate|plan|serve: how a cluster would serve a workload, how many GPUs it needs, and a real one."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from sgl_bdlora.cluster.base import PlacementError
from sgl_bdlora.cluster.config import ClusterConfig, ConfigError, from_dict, load_config
from sgl_bdlora.cluster.policies import NAMES

EXAMPLE = """A configuration (every field has a default; sgl_bdlora/cluster/config.py lists them all):

  replicas: {count: 8, gpus: 2, pool_gib: 16}
  adapters: {count: 200, ranks: {8: 0.9, 128: 0.1}}
  slo: {ttft_ms: 1000, tpot_ms: 30}
  policy: {name: rank-packing, period_s: 10, max_moves: 64}
  workload: {rate: 80, duration_s: 120, zipf: 0.8, cv: 4, rotate_s: 60}
  costs: bdlora
  serve: {model: /models/llama, adapter_root: /adapters, port: 8000}
"""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        config = load_config(args.config) if args.config else from_dict({})
        return args.run(config, args)
    except (ConfigError, PlacementError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _simulate(config: ClusterConfig, args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from sgl_bdlora.cluster.report import draw, row_of, show, write_rows
    from sgl_bdlora.cluster.simulate import simulate

    results = []
    with Progress(transient=True, console=_stderr(), disable=args.json) as bar:
        for name in args.policy or [config.policy.name]:
            task = bar.add_task(name, total=config.workload.duration_s)
            results.append(
                simulate(config.with_(policy={"name": name}), lambda now, task=task: bar.update(task, completed=now))
            )
    rows = [row_of(result) for result in results]
    if args.json:
        print(json.dumps(rows if args.policy else rows[0], indent=2))
    else:
        show(rows, config.slo.attainment)
    if args.output:
        write_rows(rows, args.output)
    if args.plot:
        draw(results, args.plot)
    return 0


def _plan(config: ClusterConfig, args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from sgl_bdlora.cluster.report import row_of
    from sgl_bdlora.cluster.sizing import needed_replicas

    with Progress(transient=True, console=_stderr(), disable=args.json) as bar:
        task = bar.add_task("replicas tried", total=None)
        count, results = needed_replicas(
            config, args.max_replicas,
            lambda n, _: bar.update(task, advance=1, description=f"{n} replicas"),
        )  # fmt: skip
    tried = {n: row_of(result) for n, result in sorted(results.items())}
    gpus = None if count is None else count * config.replicas.gpus
    if args.json:
        print(json.dumps({"replicas": count, "gpus": gpus, "tried": list(tried.values())}, indent=2))
    else:
        for n, row in tried.items():
            print(
                f"{n:4d} replicas, {row['gpus']:4d} GPUs: SLO kept by {100 * (row['attainment'] or 0):.2f} % of requests"
            )
        if count is None:
            print(
                f"Even {args.max_replicas} replicas do not keep the SLO; allow more with --max-replicas, or ask for less."
            )
        else:
            note = ", by a provisional cost model" if tried[count]["provisional"] else ""
            print(f"{config.policy.name} needs {count} replicas, {gpus} GPUs{note}.")
    return 0 if count is not None else 1


def _serve(config: ClusterConfig, args: argparse.Namespace) -> int:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "serving needs Ray Serve, which is not installed; install the extra, in a checkout: pip install '.[cluster]'"
        )
    from sgl_bdlora.cluster.serving.launch import run

    given = {name: getattr(args, name) for name in ("host", "port", "address") if getattr(args, name) is not None}
    return run(config.with_(serve=given))


def _stderr():
    from rich.console import Console

    return Console(stderr=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_bdlora.cluster", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, words: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=words, description=words, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--config", type=Path, metavar="FILE", help="YAML; without it everything has its default")
        made.set_defaults(run=run)
        if run is not _serve:
            made.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return made

    sim = command("simulate", _simulate, "serve a workload in simulation; no GPU, no model")
    sim.add_argument(
        "--policy", nargs="+", choices=NAMES, metavar="NAME", help=f"compare several of {', '.join(NAMES)}"
    )
    sim.add_argument("--output", type=Path, metavar="FILE", help="write the rows, one JSON object a line")
    sim.add_argument("--plot", type=Path, metavar="PNG", help="draw first-token times (needs matplotlib)")

    plan = command("plan", _plan, "how many replicas and GPUs the SLO needs; exit code 1 if --max-replicas are too few")
    plan.add_argument("--max-replicas", type=_positive, default=64, metavar="N", help="default: %(default)s")

    serve = command(
        "serve",
        _serve,
        "run a real cluster on Ray Serve until Ctrl-C; the configuration has to name serve.model and serve.adapter_root (docs/cluster.md)",
    )
    serve.add_argument("--host", help="address of the front; overrides serve.host")
    serve.add_argument("--port", type=_port, help="its port; overrides serve.port")
    serve.add_argument("--address", metavar="HOST:PORT", help="a running Ray cluster's head; overrides serve.address")
    return parser


def _positive(word: str) -> int:
    if not word.isdecimal() or not 0 < int(word) <= 1024:
        raise argparse.ArgumentTypeError(f"has to be a whole number from 1 to 1024, got {word!r}")
    return int(word)


def _port(word: str) -> int:
    if not word.isdecimal() or not 0 < int(word) <= 65535:
        raise argparse.ArgumentTypeError(f"has to be a port from 1 to 65535, got {word!r}")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
