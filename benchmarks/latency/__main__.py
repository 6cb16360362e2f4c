"""Latency of a decode step and of the first token: without LoRA, SGLang's own LoRA, and ours under each sharding.

    python -m benchmarks.latency --tp 2                                   # 2 GPUs, Llama-3.1-8B shape, about 6 minutes
    python -m benchmarks.latency --tp 2 --batches 1 8 32 128 --lengths 128/128 1024/128 2048/512 128/1024 --mixes 16x1 16x4 64x4 128x16
    python -m benchmarks.latency --tp 8 --output rows.jsonl --resume --minutes 9   # again and again, until nothing is left
    python -m benchmarks.latency --share-of 8                             # 1 GPU: what one rank of TP 8 does between collectives
    python -m benchmarks.latency --device cpu --tiny                      # tries the benchmark itself

Each point is a batch of equal requests sent at once, repeated, of which rows have the median and each; a decode step is the time of the
whole batch less that of its first tokens, by the tokens between. The server without LoRA runs first and last; the difference is the
machine's drift. With --resume it does so in every run, and ratios are to the rows of the same run; other points that the file has of the
same configuration (model, machine, server arguments, blocks, repeats) are not measured again. With
--together all servers start at once and stay up while one after another is measured: much of a short run is waiting for starts.
With --share-of 8 the model is one rank's share of a model at TP 8 (its heads, intermediate units and vocabulary; every layer), and so are
the adapters: the products, kernels, attention and graphs of that rank in a server on one GPU. Collectives are what is missing: two
all-reduces a layer, which cost the same with and without adapters, so that ratios of our arms come out higher than at TP 8, and two more in
SGLang's own LoRA, whose ratios may come out lower. No arm can be served whose adapters have collectives between their products (s-lora).
Rows are appended to benchmarks/results/ as soon as a point is measured; plots are drawn at the end.
"""

import argparse
import re
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from benchmarks.failures import run_to_end
from benchmarks.files import MODELS, TINY
from benchmarks.record import RESULTS, gpu_name

from .arms import ARMS
from .mixes import mix
from .run import TARGETS, Latency, default_nblocks


def lengths(text: str) -> tuple[int, int, int | None]:
    """Prompt and output tokens, and the one batch to measure with them, if there is only one."""
    found = re.fullmatch(r"(\d+)/(\d+)(?:@(\d+))?", text)
    prompt, output, batch = (int(n) if n else None for n in found.groups()) if found else (0, 0, None)
    if not prompt or output < 2 or batch == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r}: has to be PROMPT/OUTPUT tokens like 128/128, output at least 2, or with one batch like 2048/16@8"
        )
    return prompt, output, batch


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)} (default: all that can be)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tp", type=int, default=1)
    add("--share-of", type=int, default=1, metavar="TP", help="serve one rank's share of the model at this size")
    add("--model", choices=list(MODELS), default="8b", help="shape of the base model (default: 8b)")
    add("--layers", type=int, help="layers of it (default: all)")
    add("--tiny", action="store_true", help="a tiny model instead")
    add("--batches", type=int, nargs="+", default=[1, 8, 32], help="requests in a batch (default: 1 8 32)")
    add(
        "--lengths",
        type=lengths,
        nargs="+",
        default=[(128, 128, None)],
        metavar="IN/OUT[@BATCH]",
        help="tokens, of every batch or of one (default: 128/128)",
    )
    add(
        "--mixes", type=mix, nargs="+", default=[mix("16x4")], metavar="RxN", help="adapters of a batch (default: 16x4)"
    )
    add(
        "--ratios",
        type=float,
        nargs="+",
        default=[1.0],
        help="parameters of block-diagonal adapters by plain ones' (default: 1)",
    )
    add("--modules", choices=list(TARGETS), default="all", help="that adapters change: all seven, or attention only")
    add("--nblocks", type=int, help="of block-diagonal adapters (default: --tp or --share-of, but at least 2)")
    add("--repeats", type=int, default=5)
    add("--extra-arguments", default="", metavar="WORDS", help="further arguments of all servers, one string")
    add("--start-timeout", type=float, default=300, help="seconds that a server may take to start (default: 300)")
    add(
        "--files", type=Path, help="where model and adapters are kept for the next run (default: a temporary directory)"
    )
    add("--together", action="store_true", help="all servers up at once; the GPUs need memory for all of them")
    add("--output", type=Path, help="results file (default: benchmarks/results/latency-<time>.jsonl)")
    add("--resume", action="store_true", help="skip the points that --output has")
    add("--minutes", type=float, help="start no point after so many; exit status 3 if some are left")
    args = parser.parse_args(argv)
    if args.resume and not args.output:
        parser.error("--resume needs --output, the file of the run to go on with")
    if args.share_of < 1:
        parser.error(f"--share-of {args.share_of}: has to be 1 or more")
    if args.share_of > 1:
        if args.tp > 1:
            parser.error(f"--share-of {args.share_of} is served by one GPU: leave out --tp {args.tp}")
        if "s-lora" in (args.arms or ()):
            parser.error("--share-of has no collectives, which the arm s-lora needs: leave it out of --arms")
    args.arms = args.arms or [arm for arm in ARMS if args.share_of == 1 or arm != "s-lora"]
    args.nblocks = args.nblocks or default_nblocks(max(args.tp, args.share_of))
    if args.nblocks % args.share_of:
        parser.error(f"--nblocks {args.nblocks} is no multiple of --share-of {args.share_of}")
    args.output = args.output or RESULTS / time.strftime("latency-%Y%m%dT%H%M%SZ.jsonl", time.gmtime())
    if args.device == "cuda" and gpu_name() is None:
        parser.error("there is no NVIDIA GPU here; say --device cpu --tiny to try the benchmark without one")
    if args.tiny:
        args.lengths = [(min(prompt, 32), min(output, 8), batch) for prompt, output, batch in args.lengths]
    base = TINY if args.tiny else MODELS[args.model]
    args.shape = replace(base, layers=args.layers or base.layers)
    try:
        args.shape.share(args.share_of)
    except ValueError as error:
        parser.error(f"--share-of: {error}")
    args.largest = max([*args.batches, *(batch or 0 for _, _, batch in args.lengths)])
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    kept = nullcontext(args.files) if args.files else tempfile.TemporaryDirectory(prefix="latency-")
    with kept as folder:
        return Latency(args, Path(folder)).run()


if __name__ == "__main__":
    sys.exit(run_to_end(main))
