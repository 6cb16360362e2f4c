"""One-launch decode linear: base GEMM, LoRA shrink and LoRA expand in a single Triton kernel.

Block-diagonal and replicated shardings put nothing between shrink and expand, so one launch can do all three: the first programs
compute the shrink (x A^T, split over K, partial sums in float32), the others compute tiles of the base product and add the expand
in their epilogue once the shrink programs have raised their flags. Programs start in order of their number, and the shrink
programs never wait, so a waiting tile always finds its shrink running or done.

    python benchmarks/kernels/fused_decode.py [--check] [--json FILE]

Times one TP-2 rank's four linear layers x 32 of Llama-3.1-8B inside one CUDA graph, beside the GEMMs alone (cuBLAS and Triton).
"""

import argparse
import json
import os

import torch
import triton
import triton.language as tl

LAYERS = 32
# (K, outputs of each slice) of one rank at TP 2, Llama-3.1-8B.
LINEARS = {
    "qkv": (4096, (2048, 512, 512)),
    "o": (2048, (4096,)),
    "gate_up": (4096, (7168, 7168)),
    "down": (7168, (4096,)),
}


@triton.jit
def fused_linear_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    arena_ptr,
    meta_ptr,
    seg_slot_ptr,
    tok_seg_ptr,
    h_ptr,
    flag_ptr,
    step_ptr,
    T,
    N,
    K,
    n_segs_ptr,
    stride_meta_slot,
    END0: tl.constexpr,
    END1: tl.constexpr,
    SLICES: tl.constexpr,
    S_MAX: tl.constexpr,
    CHUNKS: tl.constexpr,
    FLAGS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK_K: tl.constexpr,
    RANK: tl.constexpr,
    HR: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BKS: tl.constexpr,
    LORA: tl.constexpr,
):
    pid = tl.program_id(0)
    SHRINKS: tl.constexpr = S_MAX * CHUNKS
    t = tl.arange(0, BT)
    step = tl.load(step_ptr)
    if LORA:
        if pid < SHRINKS:
            seg = pid // CHUNKS
            chunk = pid % CHUNKS
            if seg < tl.load(n_segs_ptr):
                slot = tl.load(seg_slot_ptr + seg)
                a_off = tl.load(meta_ptr + slot * stride_meta_slot)
                rank = tl.load(meta_ptr + slot * stride_meta_slot + 1).to(tl.int32)
                mine = tl.load(tok_seg_ptr + t, mask=t < T, other=-1) == seg
                r = tl.arange(0, HR)
                rows = rank * SLICES
                # Rows of a slice are RANK apart in h, so that the epilogue finds them without a table.
                src = (r // RANK) * rank + r % RANK
                ok = (r % RANK < rank) & (r // RANK < SLICES) & (src < rows)
                acc = tl.zeros((BT, HR), dtype=tl.float32)
                k = chunk * CHUNK_K + tl.arange(0, BKS)
                for _ in range(0, CHUNK_K, BKS):
                    x = tl.load(
                        x_ptr + t[:, None] * K + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0
                    )
                    a = tl.load(
                        arena_ptr + a_off + src[None, :] * K + k[:, None],
                        mask=ok[None, :] & (k < K)[:, None],
                        other=0.0,
                    )
                    acc = tl.dot(x, a, acc)
                    k += BKS
                tl.store(h_ptr + (chunk * BT + t[:, None]) * HR + r[None, :], acc, mask=mine[:, None])
                tl.debug_barrier()
                tl.atomic_xchg(flag_ptr + pid, step, sem="release", scope="gpu")
            return
        pid -= SHRINKS
    n0 = pid * BN
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(x_ptr + t[:, None] * K + (k0 + k)[None, :], mask=(t < T)[:, None], other=0.0)
        w = tl.load(w_ptr + n[None, :].to(tl.int64) * K + (k0 + k)[:, None])
        acc = tl.dot(x, w, acc)
    if LORA:
        n_segs = tl.load(n_segs_ptr)
        sl = 0
        first = 0
        if SLICES > 1:
            if n0 >= END0:
                sl = 1
                first = END0
        if SLICES > 2:
            if n0 >= END1:
                sl = 2
                first = END1
        tok_seg = tl.load(tok_seg_ptr + t, mask=t < T, other=-1)
        # GROUP adapters at a time, their ranks side by side: one load of B and one dot for all of them.
        d = tl.arange(0, GROUP * RANK)
        r = d % RANK
        f = tl.arange(0, FLAGS)
        live = f < n_segs * CHUNKS
        # Unrolled: in a loop Triton's pipeliner would fetch h ahead of the wait.
        for g in tl.static_range((S_MAX + GROUP - 1) // GROUP):
            seg = g * GROUP + d // RANK
            here = seg < n_segs
            slot = tl.load(seg_slot_ptr + seg, mask=here, other=0)
            rank = tl.load(meta_ptr + slot * stride_meta_slot + 1, mask=here, other=0).to(tl.int32)
            b_off = tl.load(meta_ptr + slot * stride_meta_slot + 2 + sl, mask=here, other=0)
            b = tl.load(
                arena_ptr + b_off[:, None] + (n - first)[None, :] * rank[:, None] + r[:, None],
                mask=(r < rank)[:, None],
                other=0.0,
            )
            if g == 0:
                waiting = 1
                while waiting > 0:
                    seen = tl.load(flag_ptr + f, mask=live, other=0, volatile=True)
                    waiting = tl.sum(tl.where(live & (seen != step), 1, 0))
                tl.atomic_add(flag_ptr + FLAGS, 0, sem="acquire", scope="gpu")
            h = tl.zeros((BT, GROUP * RANK), dtype=tl.float32)
            mine = tok_seg[:, None] == seg[None, :]
            for c in tl.static_range(CHUNKS):
                h += tl.load(
                    h_ptr + (c * BT + t[:, None]) * HR + sl * RANK + r[None, :],
                    mask=mine,
                    other=0.0,
                    cache_modifier=".cg",
                )
            acc = tl.dot(h.to(b.dtype), b, acc)
    tl.store(y_ptr + t[:, None] * N + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None])


class Case:
    """One rank's linear layers and a batch of adapters, with everything the kernel reads."""

    def __init__(
        self,
        tokens,
        adapters,
        rank,
        layers=LAYERS,
        chunks=8,
        device="cuda",
        dtype=torch.bfloat16,
        linears=LINEARS,
        share=1,
    ):
        self.tokens, self.rank, self.chunks = tokens, rank, chunks
        self.pad = max(16, triton.next_power_of_2(rank))
        self.s_max = max(1, min(adapters, tokens)) if adapters else 0
        self.bt = max(16, triton.next_power_of_2(tokens))
        g = torch.Generator(device=device).manual_seed(0)
        rand = lambda *s: torch.randn(*s, generator=g, device=device, dtype=dtype) * 0.02  # noqa: E731
        self.linears, self.items = linears, []
        slots = max(self.s_max, 1)
        sizes = {n: (rank * len(o) * k, [rank * m for m in o]) for n, (k, o) in linears.items()}
        per_adapter = sum(a + sum(b) for a, b in sizes.values()) * layers
        self.arena = rand(per_adapter * slots)
        meta = torch.zeros(slots, layers * len(linears), 8, dtype=torch.int64)
        offset, index = 0, 0
        for _ in range(layers):
            for name, (k, outs) in linears.items():
                w = rand(sum(outs), k)
                for s in range(slots):
                    meta[s, index, 0], meta[s, index, 1] = offset, rank
                    offset += rank * len(outs) * k
                    for i, m in enumerate(outs):
                        meta[s, index, 2 + i] = offset
                        offset += rank * m
                self.items.append(
                    (
                        name,
                        k,
                        outs,
                        w,
                        rand(tokens, k),
                        torch.empty(tokens, sum(outs), device=device, dtype=dtype),
                        index,
                    )
                )
                index += 1
        self.meta = meta.to(device)
        self.seg_slot = torch.arange(slots, dtype=torch.int32, device=device)
        self.n_segs = torch.tensor([self.s_max], dtype=torch.int32, device=device)
        seg = torch.arange(tokens, dtype=torch.int32) % max(self.s_max, 1)
        self.tok_seg = (seg if adapters else torch.full_like(seg, -1)).to(device)
        hr = triton.next_power_of_2(3 * self.pad)
        self.h = torch.full((chunks * self.bt * hr,), float("nan"), device=device)
        self.flags = torch.zeros(
            index, triton.next_power_of_2(max(1, self.s_max) * chunks) + 1, dtype=torch.int32, device=device
        )
        self.step = torch.zeros(1, dtype=torch.int32, device=device)

    def fused(self, configs, lora=True, max_group=8):
        for name, k, outs, w, x, y, i in self.items:
            n = sum(outs)
            bn, bk, warps, stages = configs[name]
            s_max = self.s_max if lora else 0
            chunk_k = triton.cdiv(triton.cdiv(k, self.chunks), 128) * 128
            ends = [*torch.tensor(outs).cumsum(0).tolist(), 0, 0]
            grid = (s_max * self.chunks + n // bn,)
            fused_linear_kernel[grid](
                x,
                w,
                y,
                self.arena,
                self.meta[0, i],
                self.seg_slot,
                self.tok_seg,
                self.h,
                self.flags[i],
                self.step,
                self.tokens,
                n,
                k,
                self.n_segs,
                self.meta.stride(0),
                END0=ends[0],
                END1=ends[1],
                SLICES=len(outs),
                S_MAX=max(s_max, 1),
                CHUNKS=self.chunks,
                FLAGS=triton.next_power_of_2(max(s_max, 1) * self.chunks),
                GROUP=min(max_group, triton.next_power_of_2(max(s_max, 1))),
                CHUNK_K=chunk_k,
                RANK=self.pad,
                HR=triton.next_power_of_2(len(outs) * self.pad),
                BT=self.bt,
                BN=bn,
                BK=bk,
                BKS=128,
                LORA=bool(s_max),
                num_warps=warps,
                num_stages=stages,
            )

    def cublas(self):
        for _, _, _, w, x, y, _ in self.items:
            torch.mm(x, w.T, out=y)

    def reference(self, item):
        _, k, outs, w, x, _, index = item
        y = x.double() @ w.double().T
        for s in range(self.s_max):
            m = self.meta[s, index].tolist()
            rows, start = self.tok_seg == s, 0
            a = self.arena[m[0] : m[0] + self.rank * len(outs) * k].view(-1, k).double()
            for i, out in enumerate(outs):
                b = self.arena[m[2 + i] : m[2 + i] + self.rank * out].view(out, self.rank).double()
                y[rows, start : start + out] += x[rows].double() @ a[i * self.rank : (i + 1) * self.rank].T @ b.T
                start += out
        return y


def graph_ms(run, prepare=lambda: None, repeats=50):
    """Median milliseconds of one replay of `run` captured in a CUDA graph; `prepare` runs before each replay, untimed."""
    prepare()
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    prepare()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        prepare()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


BASE = {"qkv": (32, 256, 4, 4), "o": (32, 256, 4, 4), "gate_up": (64, 128, 4, 4), "down": (32, 256, 4, 4)}


def check(device):
    small = {"qkv": (256, (64, 32, 32)), "o": (128, (64,)), "gate_up": (256, (64, 64)), "down": (384, (64,))}
    configs = dict.fromkeys(small, (32, 128, 4, 2))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for tokens, adapters, rank in ((1, 1, 8), (5, 3, 12), (8, 8, 16), (20, 4, 24), (3, 0, 8)):
        case = Case(tokens, adapters, rank, layers=2, chunks=2, device=device, dtype=dtype, linears=small)
        for _ in range(2):
            case.step += 1
            case.fused(configs)
        for item in case.items:
            want, got = case.reference(item), item[5].double()
            error = ((got - want).norm() / want.norm()).item()
            assert error < (1e-2 if device == "cuda" else 1e-5), (tokens, adapters, rank, item[0], error)
    print("fused kernel agrees with the dense formula")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check the arithmetic (on a CPU: TRITON_INTERPRET=1)")
    parser.add_argument("--json", help="append the rows to this file")
    args = parser.parse_args()
    check("cuda" if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET") else "cpu")
    if args.check:
        return
    rows = []
    for tokens, adapters in ((1, 1), (8, 1), (8, 4), (8, 8), (32, 1), (32, 4), (32, 8), (32, 32)):
        for chunks, group in ((8, 4), (8, 8), (4, 4), (16, 4)) if adapters > 1 else ((8, 1), (4, 1), (16, 1)):
            case = Case(tokens, adapters, 12, chunks=chunks)
            row = {
                "gpu": torch.cuda.get_device_name(),
                "tokens": tokens,
                "adapters": adapters,
                "rank": 12,
                "chunks": chunks,
                "group": group,
            }
            row["cublas_ms"] = graph_ms(case.cublas)
            row["triton_ms"] = graph_ms(lambda c=case: c.fused(BASE, lora=False))
            row["fused_ms"] = graph_ms(
                lambda c=case, g=group: c.fused(BASE, max_group=g), lambda c=case: c.step.add_(1)
            )
            rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "gpu"}, flush=True)
            del case
    if args.json:
        with open(args.json, "a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
