"""Shrink and expand of one layer beside SGLang's csgmv, PyTorch and the floor of bytes and launches.

    python -m benchmarks.kernels.shrink_expand [--model 8b] [--tp 2] [--tokens 1 8 32 256 4096 16384] [--adapters 1 8] [--rank 16]

Microseconds, medians, each in a CUDA graph after the second-level cache was emptied. Adapters are plain, of one rank, uniformly
spread over the rows (in blocks above 128 rows, as in prefill; with --turns they take turns, as in decode steps), bfloat16.

    floor     what has to be moved, at --bandwidth, and two launches of 2.5 us
    ours      sgl_bdlora/kernels/separate.py
    linear    what LoRA adds to the base product where one method computes both: with it less cuBLAS without. For few rows that is
              sgl_bdlora/kernels/fused.py, else the expand written first and the product added to it
    csgmv     SGLang's own LoRA kernels (not where sglang is not installed)
    torch     sgl_bdlora/kernels/torch_ops.py
"""

import itertools
import sys
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.files import MODELS
from benchmarks.kernels.common import graph_ms, on_device, parse, parser_for
from benchmarks.kernels.shapes import hosts, rank_rows
from benchmarks.record import Rows
from sgl_bdlora.kernels.batch import AdapterSet, Batch
from sgl_bdlora.kernels.tiles import FUSED_TOKENS, few_rows
from sgl_bdlora.kernels.torch_ops import add_lora
from sgl_bdlora.sharding import HostLayer

LAUNCH_US = 2.5


def csgmv(host: HostLayer, owners: np.ndarray, adapters: int, rank: int) -> Callable | None:
    """f(y, x) that adds random adapters of the same shapes by SGLang's kernels; None without sglang."""
    try:
        from sglang.srt.lora.backend.chunked_backend import ChunkedSgmvLoRABackend
        from sglang.srt.lora.utils import LoRABatchInfo, merge_and_chunk_segments
    except ImportError:
        return None

    class Arguments:
        max_lora_chunk_size = 16

    device, slices = torch.device("cuda"), host.slices
    backend = ChunkedSgmvLoRABackend(adapters, device, Arguments())
    order = np.argsort(owners, kind="stable").astype(np.int32)
    chunk = backend._determine_chunk_size_for_tokens(len(owners))
    indices, lengths = merge_and_chunk_segments(owners[order].tolist(), [1] * len(owners), chunk)

    def on_device(values, dtype=torch.int32):
        return torch.tensor(np.asarray(values), dtype=dtype, device=device)

    backend.batch_info = LoRABatchInfo(
        use_cuda_graph=False,
        bs=len(owners),
        num_segments=len(indices),
        seg_indptr=on_device(np.cumsum([0, *lengths])),
        weight_indices=on_device(indices),
        lora_ranks=on_device([rank] * adapters),
        scalings=on_device([1.0] * adapters, torch.float32),
        max_len=chunk,
        seg_lens=None,
        permutation=on_device(order),
    )
    k, outputs = len(slices[0].inputs), [len(s.outputs) for s in slices]
    a = torch.randn(adapters, len(slices) * rank, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(adapters, sum(outputs), rank, device=device, dtype=torch.bfloat16)
    offsets = on_device(np.cumsum([0, *outputs]))

    def run(y: torch.Tensor, x: torch.Tensor) -> None:
        if len(slices) == 3:
            backend.run_qkv_lora(x, a, b, offsets, max(outputs), base_output=y)
        elif len(slices) == 2:
            backend.run_gate_up_lora(x, a, b, offsets, base_output=y)
        else:
            backend.run_lora_b_sgemm(backend.run_lora_a_sgemm(x, a), b, offsets, base_output=y)

    return run


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("shrink_expand", __doc__, rank=16, repeats=20)
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="8b")
    add("--tokens", type=int, nargs="+", default=[1, 8, 32, 256, 4096, 16384])
    add("--adapters", type=int, nargs="+", default=[1, 8])
    add("--turns", action="store_true", help="rows take turns with the adapters, however many there are")
    add("--bandwidth", type=float, default=4.3, help="TB/s for the floor (default: 4.3, one H200)")
    args = parse(parser, argv)
    rows = Rows(args.output, model=args.model, tp=args.tp, rank=args.rank)
    layers = hosts(args.model, args.tp, 1)
    ops, residents = on_device(layers, max(args.adapters), args.rank, max(args.tokens))
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for tokens, count, host in itertools.product(args.tokens, args.adapters, layers):
        if count > tokens:
            continue
        k, n = len(host.slices[0].inputs), sum(len(s.outputs) for s in host.slices)
        owners = np.arange(tokens, dtype=np.int32) % count
        if tokens > FUSED_TOKENS and not args.turns:
            owners.sort()
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        y = torch.zeros(tokens, n, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        batch = Batch(AdapterSet(residents[:count]), torch.from_numpy(owners).long().cuda())

        many_rows = rank_rows([args.rank] * count) > few_rows(tokens)

        def before(static: bool, count=count, owners=owners, many_rows=many_rows):
            ops.batch.fill(residents[:count], owners, static, many_rows=many_rows)
            flush.zero_()

        def timed(run: Callable[[], None], static: bool = True, before=before) -> float:
            return 1e3 * graph_ms(run, lambda: before(static), args.repeats)

        layer_bytes = 2 * (count * args.rank * (len(host.slices) * k + n) + x.numel() + 2 * y.numel())
        row = {"floor": layer_bytes / (args.bandwidth * 1e6) + 2 * LAUNCH_US}
        row["ours"] = timed(lambda y=y, x=x, host=host: ops.add_lora(y, x, host.path))
        few = tokens <= FUSED_TOKENS
        with_lora = timed(lambda x=x, w=weight, host=host: ops.linear(x, w, None, host.path), static=few)
        row["linear"] = with_lora - timed(lambda x=x, w=weight: torch.mm(x, w.T))
        stock = csgmv(host, owners, count, args.rank)
        if stock is not None:
            row["csgmv"] = timed(lambda y=y, x=x, stock=stock: stock(y, x))
        row["torch"] = timed(lambda y=y, x=x, batch=batch, host=host: add_lora(y, x, batch, host.path, None))
        rows.write(layer=host.path, tokens=tokens, adapters=count, **{f"{name}_us": us for name, us in row.items()})
        times = "  ".join(f"{name} {us:8.1f}" for name, us in row.items())
        print(f"{host.path:22s} {tokens:6d} tokens {count:3d} adapters  {times}", flush=True)
    print(rows.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
