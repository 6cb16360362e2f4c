"""On a GPU: the kernels on the layers of Llama-3.1 8B and 70B at every tensor-parallel size, in both 16-bit types."""

import numpy as np
import pytest
import torch

from benchmarks.files import MODELS
from benchmarks.kernels.shapes import hosts, shard
from sgl_bdlora.kernels.tiles import few_rows
from sgl_bdlora.kernels.triton_ops import TritonOps
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard, HostLayer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="real shapes take too long without a GPU")

# Name -> local rank, blocks of the column layers' B and of the row layers' A.
ADAPTERS = {"eight": (8, 1), "sixteen": (16, 1), "large": (128, 1), "four blocks": (12, 4)}
OWNERS = {
    "one": ["sixteen"],
    "distinct": [*ADAPTERS, None],
    "identical": ["eight"] * 8,
    "uniform": ["eight", None, "large", "four blocks"] * 8,
    "skewed": ["sixteen"] * 60 + ["large", None, "eight"],
    "hundred rows": ["eight", None, "four blocks", "sixteen"] * 25,
    "hundred rows of many ranks": ["large", None, "four blocks", "sixteen"] * 25,
    "taking turns": ["eight", None, "large", "four blocks", "sixteen"] * 40,
    "prefill": ["eight"] * 130 + [None] * 7 + ["large"] * 100 + ["four blocks"] * 65,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_real_shapes(device, model, tp, dtype):
    layers = hosts(model, tp, 1)
    shards = {name: shard(name, layers, *ADAPTERS[name], dtype) for name in ADAPTERS}
    pool = MemoryPool(sum(s.nbytes for s in shards.values()), dtype, device, len(shards))
    pool.ensure(shards)
    ops = TritonOps(pool.arena, layers, len(shards), None).reserve(512, combines=False)
    torch.manual_seed(0)
    for host in layers:
        k, n = len(host.slices[0].inputs), sum(len(s.outputs) for s in host.slices)
        weight = (torch.randn(n, k, device=device) * 0.02).to(dtype)
        for popularity, names in OWNERS.items():
            x = torch.randn(len(names), k, device=device).to(dtype)
            here = [name for name in ADAPTERS if name in names]
            owners = np.array([-1 if o is None else here.index(o) for o in names], dtype=np.int32)
            many_rows = sum(ADAPTERS[name][0] for name in here) > few_rows(len(owners))
            ops.batch.fill([pool.get(name) for name in here], owners, static=True, many_rows=many_rows)
            update = dense_update(shards, host, x, names)
            base = x.float() @ weight.float().T
            if ops.fuses(host.path, x, weight):
                y = ops.linear(x, weight, None, host.path)
                assert relative(y, base + update) < 2**-7, (host.path, popularity, "linear")
            y = torch.zeros(len(x), n, dtype=dtype, device=device)
            ops.add_lora(y, x, host.path)
            assert relative(y, update) < 2**-6, (host.path, popularity, "separate")


def dense_update(shards: dict[str, AdapterShard], host: HostLayer, x: torch.Tensor, names: list) -> torch.Tensor:
    """Every row's update in float32, from factors written out densely."""
    update = torch.zeros(len(x), sum(len(s.outputs) for s in host.slices), device=x.device)
    for name, s in shards.items():
        rows = [t for t, owner in enumerate(names) if owner == name]
        layer = s.layers[host.path]
        block = s.weights[s.offsets[host.path] :][: layer.numel].float().to(x.device)
        a = block[: layer.rows_a * layer.width_a].view(layer.rows_a, layer.width_a)
        for part in layer.slices if rows else ():
            piece = part.piece
            local_a = a[part.a_start : part.a_start + piece.local_rank]
            width = len(piece.outputs) // piece.blocks_b
            local_b = block[part.b_offset :][: piece.local_rank * width].view(piece.local_rank, width)
            dense_a = torch.block_diag(*local_a.chunk(piece.blocks_a))
            dense_b = torch.block_diag(*local_b.chunk(piece.blocks_b))
            here = slice(part.y_start, part.y_start + len(piece.outputs))
            update[rows, here] += part.scale * x[rows].float() @ dense_a.T @ dense_b
    return update


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.float() - wanted).abs().max() / wanted.abs().max()).item()
