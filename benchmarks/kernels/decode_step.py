"""The linear layers of one decode step as the server runs them, inside a CUDA graph: with adapters, and cuBLAS without.

    python -m benchmarks.kernels.decode_step [--tp 2] [--tokens 1 8 32] [--adapters 1 4 16] [--rank 12] [--output FILE]

One tensor-parallel rank of Llama-3.1-8B, bfloat16, products only, each behind a small kernel as in a model (norm, activation), which
all arms have alike: no attention, no collectives. Milliseconds are medians.

    cublas      the base products alone
    base        our kernel with no adapter in the batch
    linear      ours: the product, shrink and expand in one launch
    late        the same with nobody computing h: every tile gives up waiting and computes its own
    separate    cuBLAS, then shrink and expand as launches of their own (quantised bases, more than 64 tokens)
    bytes       the time that the weights alone would take at the bandwidth given by --bandwidth, base and adapters
"""

import sys

import numpy as np
import torch

from benchmarks.kernels.common import graph_ms, on_device, parse, parser_for, without_shrink
from benchmarks.kernels.shapes import hosts
from benchmarks.record import Rows

LAYERS = 32


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("decode_step", __doc__, rank=12, repeats=50)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[1, 8, 32])
    add("--adapters", type=int, nargs="+", default=[1, 4, 16], help="different adapters in the batch (default: 1 4 16)")
    add("--bandwidth", type=float, default=4.3, help="TB/s for the floor by bytes (default: 4.3, one H200)")
    args = parse(parser, argv)
    rows = Rows(args.output, tp=args.tp)
    layers = hosts("8b", args.tp, LAYERS)
    ops, residents = on_device(layers, max(args.adapters), args.rank, max(args.tokens))
    sizes = [(sum(len(s.outputs) for s in host.slices), len(host.slices[0].inputs)) for host in layers]
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for n, k in sizes]
    base_bytes = sum(w.nbytes for w in weights)

    for tokens in args.tokens:
        xs = [torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16) for _, k in sizes]
        for count in [n for n in args.adapters if n <= tokens or n == 1]:
            owners = np.arange(tokens, dtype=np.int32) % count
            capture = lambda c=count, o=owners: ops.batch.fill(residents[:c], o, static=True)  # noqa: E731

            def cublas(xs=xs):
                for x, w in zip(xs, weights, strict=True):
                    torch.mm(x.neg_(), w.T)

            def linear(xs=xs):
                for x, w, host in zip(xs, weights, layers, strict=True):
                    ops.linear(x.neg_(), w, None, host.path)

            def separate(xs=xs):
                for x, w, host in zip(xs, weights, layers, strict=True):
                    ops.add_lora(torch.mm(x.neg_(), w.T), x, host.path)

            row = {"cublas_ms": graph_ms(cublas, capture, args.repeats)}
            row["base_ms"] = graph_ms(linear, lambda o=owners: ops.batch.fill([], o * 0 - 1, static=True), args.repeats)
            row["linear_ms"] = graph_ms(linear, capture, args.repeats)
            plans, ops.plans = ops.plans, {path: without_shrink(plan) for path, plan in ops.plans.items()}
            row["late_ms"] = graph_ms(linear, capture, 5)
            ops.plans = plans
            row["separate_ms"] = graph_ms(separate, capture, args.repeats)
            row["bytes_ms"] = (base_bytes + count * residents[0].shard.nbytes) / (args.bandwidth * 1e9)
            rows.write(tokens=tokens, adapters=count, rank=args.rank, **row)
            times = "  ".join(f"{name.removesuffix('_ms')} {ms:6.3f}" for name, ms in row.items())
            ratio = row["linear_ms"] / row["cublas_ms"]
            print(f"{tokens:3d} tokens {count:3d} adapters  {times}  linear/cublas {ratio:.3f}", flush=True)
    print(rows.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
