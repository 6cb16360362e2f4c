"""Do the page's numbers agree with the latency benchmark's? Both measure the same batches on the same servers, in turns.

    python -m benchmarks.page --tp 2                    # one server for both sides; 2 GPUs, Llama-3.1-8B shape, about 3 minutes
    python -m benchmarks.page --servers 2               # as with --compare-server: a server for each side, each on a GPU of its own
    python -m benchmarks.page --device cpu --tiny       # tries the benchmark itself

What is beneath the page runs here (app.compare, app.measure and the drawing of answers), without Gradio and a browser. agreement.py says
when numbers agree; the exit status is 1 when one does not, and 3 when the noise is too large to tell. Rows are appended to
benchmarks/results/ after each run and at the end.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import httpx

from app.client import Server, ServerProblem
from app.compare import BLOCK, PLAIN
from app.context import Context
from app.measure import METRICS
from app.plots import number, scaled
from benchmarks.failures import run_to_end
from benchmarks.files import LLAMA_8B, TINY, Shape, bytes_per_rank, folder_of, keep_adapter, keep_model, matched_rank
from benchmarks.latency.__main__ import lengths
from benchmarks.latency.arms import Setup, command
from benchmarks.latency.mixes import adapters_of, mix
from benchmarks.record import RESULTS, Rows, gpu_name
from sgl_bdlora.server_process import ServerProcess, free_port, started

from .agreement import NOISE, by_chance, judge
from .tokenizer import write_tokenizer
from .ways import GAIN, Figures, Ways, Work

WAYS = ("page", "runner", "runner-token-ids")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--servers", type=int, choices=(1, 2), default=1, help="one for both sides, or one for each (default: 1)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tp", type=int, default=1, help="ranks of each server (default: 1)")
    add("--layers", type=int, help="layers of the model (default: all)")
    add("--tiny", action="store_true", help="a tiny model instead of the 8B shape")
    add("--batch", type=int, default=8, help="requests in a batch (default: 8)")
    add("--lengths", type=lengths, default=(128, 64, None), metavar="IN/OUT", help="tokens (default: 128/64)")
    add("--mix", type=mix, default=mix("16x4"), metavar="RxN", help="adapters of each side (default: 16x4)")
    add("--repeats", type=int, default=5, help="of a run, as on the page (default: 5)")
    add("--rounds", type=int, default=5, help="runs of each way (default: 5)")
    add(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
        help="to measure: page and runner, which are judged, and runner-token-ids, whose prompts are no words, as benchmarks.latency "
        "sends them (default: all)",
    )  # fmt: skip
    add("--extra-arguments", default="", metavar="WORDS", help="further arguments of the servers, one string")
    add("--start-timeout", type=float, default=300, help="seconds that a server may take to start (default: 300)")
    add("--files", type=Path, help="where model and adapters are kept (default: a temporary directory)")
    add("--output", type=Path, help="results file (default: benchmarks/results/page-<time>.jsonl)")
    args = parser.parse_args(argv)
    args.output = args.output or RESULTS / time.strftime("page-%Y%m%dT%H%M%SZ.jsonl", time.gmtime())
    if args.device == "cuda" and gpu_name() is None:
        parser.error("there is no NVIDIA GPU here; say --device cpu --tiny to try the benchmark without one")
    prompt, output, only = args.lengths
    if only:
        parser.error("--lengths takes no batch here, --batch does")
    if args.tiny:
        args.lengths = min(prompt, 32), min(output, 16), None
    if not {"page", "runner"} <= set(args.ways):
        parser.error("--ways needs page and runner")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    base = TINY if args.tiny else LLAMA_8B
    shape = Shape(**{**vars(base), "layers": args.layers or base.layers})
    prompt, output, _ = args.lengths
    work = Work(args.batch, prompt, output, args.repeats, shape.vocab)
    rows = Rows(
        args.output, benchmark="page", device=args.device, model=shape.name, layers=shape.layers, tp=args.tp,
        servers=args.servers, mix=args.mix.text, batch=work.batch, input_len=prompt, output_len=output,
        repeats=args.repeats, rounds=args.rounds, extra_arguments=args.extra_arguments,
    )  # fmt: skip
    kept = nullcontext(args.files) if args.files else tempfile.TemporaryDirectory(prefix="page-")
    try:
        with kept as folder, running(args, shape, Path(folder), rows.path) as context:
            runs = measure(Ways(context, work), args.ways, args.rounds, rows)
    except (ServerProblem, httpx.HTTPError, RuntimeError, ValueError) as error:
        rows.write(kind="error", message=str(error))
        print(f"page: {error}", file=sys.stderr)
        return 1
    words = report(runs, rows)
    print(rows.path)
    return 1 if "differ" in words else 3 if "noisy" in words else 0


@contextmanager
def running(args: argparse.Namespace, shape: Shape, folder: Path, output: Path) -> Iterator[Context]:
    """The servers, started at once, as the page sees them. Raises StartFailed."""
    folder = folder_of(shape, folder)
    model = keep_model(shape, folder / "model")
    write_tokenizer(model, shape.vocab)
    sides = {PLAIN: write_adapters(args, shape, folder, None), BLOCK: write_adapters(args, shape, folder, 1.0)}
    if args.servers == 1:
        wanted = [("s-lora", sides[PLAIN] | sides[BLOCK])]
    else:
        wanted = [("ours", sides[BLOCK]), ("s-lora", sides[PLAIN])]
    servers = [process(args, shape, model, i, *one, output) for i, one in enumerate(wanted)]
    begin = time.monotonic()
    with started(servers):
        for server in servers:
            server.wait()
        print(f"ready after {time.monotonic() - begin:.0f} s", flush=True)
        block, *plain = (Server(server.url) for server in servers)
        yield Context(block, plain[0] if plain else None, folder)


def write_adapters(
    args: argparse.Namespace, shape: Shape, folder: Path, ratio: float | None
) -> dict[str, tuple[int, Path]]:
    """Name -> (rank, directory) of the mix's adapters, plain (ratio None) or block-diagonal, under names that the page pairs."""
    nblocks = None if ratio is None else max(2, args.tp)
    made = {}
    for adapter in adapters_of(args.mix, ratio):
        name = f"r{adapter.rank}-{adapter.number}-{'bd' if nblocks else 'lora'}"
        rank = matched_rank(shape, adapter.rank, nblocks, ratio) if nblocks else adapter.rank
        path = folder / f"{name}-nb{nblocks or 0}"
        made[name] = rank, keep_adapter(shape, path, rank, nblocks, adapter.number)
    return made


def process(
    args: argparse.Namespace, shape: Shape, model: Path, index: int, server: str, adapters: dict[str, tuple[int, Path]],
    output: Path,
) -> ServerProcess:  # fmt: skip
    """benchmarks.latency's server, with the tokenizer and the prefix cache of those that the page is for; of two, each on its own GPUs."""
    ranks, paths = zip(*adapters.values(), strict=True)
    setup = Setup(
        model,
        str(shape.dtype).removeprefix("torch."),
        args.tp,
        args.device,
        args.batch,
        args.mix.adapters + 1,
        max(ranks),
        min(args.batch * args.lengths[0], 16384),
        int(sum(bytes_per_rank(shape, path, args.tp) for path in paths) * 1.02 + 2**20),
        extra=tuple(args.extra_arguments.split()),
    )
    port = free_port()
    words, environment = command(server, setup, dict(zip(adapters, paths, strict=True)), port)
    for unlike in ("--skip-tokenizer-init", "--disable-radix-cache"):
        words.remove(unlike)
    if args.servers == 2 and args.device == "cuda":
        environment = {**environment, "CUDA_VISIBLE_DEVICES": gpus(index, args.tp)}
    log = output.with_name(f"{output.stem}-{server}.log")
    return ServerProcess(words, environment, f"http://127.0.0.1:{port}", log, args.start_timeout)


def gpus(index: int, tp: int) -> str:
    """Of server `index`: its share of those that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(2 * tp)]
    return ",".join(names[index * tp : (index + 1) * tp])


def measure(ways: Ways, names: list[str], rounds: int, rows: Rows) -> dict[str, list[Figures]]:
    """Way -> the figures of its runs. Ways take turns; every second round goes backwards, so that drift meets all alike."""
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    ways.warm_up()
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            begin = time.monotonic()
            figures = ways.by_name[name]()
            runs[name].append(figures)
            rows.write(
                kind="run", round=i, way=name, seconds=time.monotonic() - begin,
                figures=[{"arm": arm, "metric": key, **asdict(figure)} for (arm, key), figure in figures.items()],
            )  # fmt: skip
        print(f"round {i + 1} of {rounds}", flush=True)
    return runs


def report(runs: dict[str, list[Figures]], rows: Rows) -> set[str]:
    """Print and write every number by the runner and by each other way; the words of the verdicts on the page."""
    words: set[str] = set()
    print("median of the runs (least to greatest)")
    for name in (name for name in runs if name != "runner"):
        print(f"{name + ', runner':<34} {name:>26} {'runner':>26}   ratio")
        for metric in METRICS:
            for arm in (PLAIN, BLOCK, GAIN):
                found = judge(*([figures[arm, metric.key] for figures in runs[way]] for way in (name, "runner")))
                rows.write(
                    kind="verdict", way=name, arm=arm, metric=metric.key, word=found.word, noise=found.noise,
                    **asdict(found),
                )  # fmt: skip
                if name == "page":
                    words.add(found.word)
                unit, factor = ("x", 1.0) if arm == GAIN else scaled(metric.unit, found.runner)
                print(
                    f"  {metric.title.partition(',')[0]:<21} {arm:<14} {_cell(found.page, found.page_runs, factor)} "
                    f"{_cell(found.runner, found.runner_runs, factor)} {unit:<8} {found.ratio:.3f}  {found.word}"
                )
    chance = by_chance(len(runs["page"]))
    print(
        f"of equal numbers {chance:.1%} would differ; noisy: they meet, but runs of one lie more than {NOISE:.0%} apart"
    )
    return words


def _cell(value: float, runs: tuple[float, float], factor: float) -> str:
    return f"{number(value * factor)} ({number(runs[0] * factor)} to {number(runs[1] * factor)})".rjust(26)


if __name__ == "__main__":
    sys.exit(run_to_end(main))
