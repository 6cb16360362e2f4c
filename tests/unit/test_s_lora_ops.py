"""S-LoRA's gather and reduce, with the ranks of a layer run as threads that exchange their shrinks: equal to the dense update."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_sharding import HEAD, HIDDEN, INNER, Q_HEADS, adapter, host

from sgl_bdlora.adapters import dense_form
from sgl_bdlora.kernels.batch import make_batch
from sgl_bdlora.kernels.torch_ops import add_lora
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import shard_adapter

LENGTHS = [3, 1, 2, 1, 4]


class Exchange:
    """One collective at a time among `ranks` threads; counts the calls of rank 0."""

    def __init__(self, ranks: int):
        self._slots: list = [None] * ranks
        self._barrier = threading.Barrier(ranks)
        self.calls = 0

    def of(self, rank: int):
        exchange = self

        class Collectives:
            def all_gather(self, h_TR):
                exchange.calls += rank == 0
                exchange._slots[rank] = h_TR
                exchange._barrier.wait(30)
                gathered = torch.stack(exchange._slots)
                exchange._barrier.wait(30)
                return gathered

            def all_reduce(self, h_TR):
                return self.all_gather(h_TR).sum(0)

        return Collectives()


def run_layer(path: str, x_of_rank, y_of_rank, adapters: dict, names: list, tp: int, hidden: int) -> int:
    """Run a layer on every rank at once; y is changed in place. Returns the collectives run."""
    exchange = Exchange(tp)

    def one(rank: int):
        pool = MemoryPool(1 << 22, torch.float64, torch.device("cpu"), 8)
        shards = {n: shard_adapter(a, host(tp, rank, 24, hidden), torch.float64, "s-lora") for n, a in adapters.items()}
        pool.ensure(shards)
        batch = make_batch([n and pool.get(n) for n in names], LENGTHS, torch.device("cpu"))
        add_lora(y_of_rank[rank], x_of_rank[rank], batch, path, exchange.of(rank))

    with ThreadPoolExecutor(tp) as threads:
        list(threads.map(one, range(tp)))
    return exchange.calls


@pytest.mark.parametrize(("tp", "hidden"), [(1, HIDDEN), (2, HIDDEN), (4, HIDDEN), (4, 98)])
@pytest.mark.parametrize("names", [["a", None, "bd", "b", "a"], ["bd", "bd", None, "bd", None]])
def test_ranks_together_are_the_dense_update(tp, hidden, names):
    """Also where the outputs do not divide by TP."""
    made = {"a": (1, 1, 10), "b": (1, 2, 3), "bd": (4, 3, 24)}
    adapters = {name: adapter(blocks, 24, seed, r, hidden) for name, (blocks, seed, r) in made.items()}
    tokens, heads = sum(LENGTHS), Q_HEADS * HEAD
    owners = [n for n, length in zip(names, LENGTHS, strict=True) for _ in range(length)]
    remote = tp > 1 and {"a", "b"} & set(names)

    x = torch.randn(tokens, hidden, dtype=torch.float64)
    ys = [torch.zeros(tokens, 2 * INNER // tp, dtype=torch.float64) for _ in range(tp)]
    calls = run_layer("model.layers.0.mlp.gate_up_proj", [x] * tp, ys, adapters, names, tp, hidden)
    assert calls == (1 if remote else 0)
    for i, leaf in enumerate(("gate_proj", "up_proj")):
        part = torch.cat([y[:, i * INNER // tp : (i + 1) * INNER // tp] for y in ys], dim=1)
        assert torch.allclose(part, expected(adapters, owners, f"model.layers.0.mlp.{leaf}", x), atol=1e-9)

    x = torch.randn(tokens, heads, dtype=torch.float64)
    ys = [torch.zeros(tokens, hidden, dtype=torch.float64) for _ in range(tp)]
    xs = [x[:, r * heads // tp : (r + 1) * heads // tp] for r in range(tp)]
    calls = run_layer("model.layers.0.self_attn.o_proj", xs, ys, adapters, names, tp, hidden)
    assert calls == (1 if remote else 0)
    assert torch.allclose(sum(ys), expected(adapters, owners, "model.layers.0.self_attn.o_proj", x), atol=1e-9)


def expected(adapters: dict, owners: list, path: str, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for name, row in zip(owners, x, strict=True):
        if name is None:
            rows.append(torch.zeros(next(iter(adapters.values())).modules[path].out_features, dtype=torch.float64))
            continue
        module = adapters[name].modules[path]
        a, b = dense_form(module)
        rows.append(module.scale * row @ a.double().T @ b.double().T)
    return torch.stack(rows)
