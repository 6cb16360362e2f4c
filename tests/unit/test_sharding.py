"""Local pieces of every rank put together are the dense update, for any nblocks, any TP and any host layer."""

import itertools

import pytest
import torch

from sgl_bdlora.adapters import AdapterError, adapter_from_tensors, dense_form
from sgl_bdlora.sharding import HostLayer, HostModel, HostSlice, Span, layer_views, layout_for, shard_adapter
from sgl_bdlora.sharding import shard as shard_module

HEAD, HIDDEN, INNER = 8, 96, 192
RANK = 24
BLOCKS = (1, 2, 3, 4, 8)
TP = (1, 2, 3, 4, 6, 8)
Q_HEADS = 24


def config(nblocks: int) -> dict:
    use_bdlora = {
        "nblocks": nblocks,
        "target_modules_bd_a": ["o_proj", "down_proj"],
        "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    }
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 17,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "use_bdlora": use_bdlora if nblocks > 1 else None,
    }


def adapter(nblocks: int, kv_heads: int, seed: int = 0, r: int = RANK, hidden: int = HIDDEN, **changes):
    generator = torch.Generator().manual_seed(seed)
    dims = {
        "self_attn.q_proj": (hidden, Q_HEADS * HEAD),
        "self_attn.k_proj": (hidden, kv_heads * HEAD),
        "self_attn.v_proj": (hidden, kv_heads * HEAD),
        "self_attn.o_proj": (Q_HEADS * HEAD, hidden),
        "mlp.gate_proj": (hidden, INNER),
        "mlp.up_proj": (hidden, INNER),
        "mlp.down_proj": (INNER, hidden),
    }
    tensors = {}
    for leaf, (k, n) in dims.items():
        row = leaf.endswith(("o_proj", "down_proj"))
        a = (r, k // nblocks) if row else (r, k)
        b = (n, r) if row else (n, r // nblocks)
        stem = f"base_model.model.model.layers.0.{leaf}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(a, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(b, generator=generator)
    return adapter_from_tensors("sample", tensors, {**config(nblocks), "r": r, **changes})


def host(tp: int, rank: int, kv_heads: int, hidden: int = HIDDEN) -> HostModel:
    """The layers of one decoder layer as SGLang shards them, kv heads repeated when there are fewer than ranks."""
    replicas = max(1, tp // kv_heads)
    kv_shard, kv_index = max(1, kv_heads // tp) * HEAD, rank // replicas
    q_shard = Q_HEADS * HEAD // tp
    kv = Span.shard(kv_shard, kv_index, kv_heads * HEAD)
    wide, inner = Span.whole(hidden), Span.shard(INNER // tp, rank, INNER)
    q = Span.shard(q_shard, rank, Q_HEADS * HEAD)
    qkv = (
        HostSlice("q_proj", wide, q, 0),
        HostSlice("k_proj", wide, kv, q_shard),
        HostSlice("v_proj", wide, kv, q_shard + kv_shard),
    )
    gate_up = (HostSlice("gate_proj", wide, inner, 0), HostSlice("up_proj", wide, inner, INNER // tp))
    stem = "model.layers.0"
    return HostModel(
        [
            HostLayer(f"{stem}.self_attn.qkv_proj", "column", qkv, rank, tp),
            HostLayer(f"{stem}.self_attn.o_proj", "row", (HostSlice("o_proj", q, wide, 0),), rank, tp),
            HostLayer(f"{stem}.mlp.gate_up_proj", "column", gate_up, rank, tp),
            HostLayer(f"{stem}.mlp.down_proj", "row", (HostSlice("down_proj", inner, wide, 0),), rank, tp),
        ]
    )


def local_update(shard, path: str, index: int) -> torch.Tensor:
    """The dense local update of a slice, from its packed weights."""
    layer = shard.layers[path]
    block = shard.weights[shard.offsets[path] : shard.offsets[path] + layer.numel]
    a, bs = layer_views(block, layer)
    piece = layer.slices[index]
    rows = a[piece.a_start : piece.a_start + piece.piece.local_rank]
    dense_a = torch.block_diag(*rows.chunk(piece.piece.blocks_a)) if piece.piece.blocks_a > 1 else rows
    dense_b = torch.block_diag(*bs[index].chunk(piece.piece.blocks_b)) if piece.piece.blocks_b > 1 else bs[index]
    return piece.scale * dense_b.T.double() @ dense_a.double()


CASES = [
    (nblocks, tp, kv)
    for nblocks, tp, kv in itertools.product(BLOCKS, TP, (1, 2, 6, 24))
    if (kv % tp == 0 or tp % kv == 0) and kv * HEAD % nblocks == 0
]


@pytest.mark.parametrize(("nblocks", "tp", "kv_heads"), CASES)
def test_ranks_together_are_the_dense_update(nblocks, tp, kv_heads):
    sample = adapter(nblocks, kv_heads)
    hosts = [host(tp, rank, kv_heads) for rank in range(tp)]
    shards = [shard_adapter(sample, h, torch.float32) for h in hosts]
    for module in sample.modules.values():
        a, b = dense_form(module)
        dense = module.scale * b.double() @ a.double()
        total = torch.zeros_like(dense)
        seen = torch.zeros_like(dense)
        for h, shard in zip(hosts, shards, strict=True):
            layer, piece = h.find(sample.name, module)
            local = local_update(shard, layer.path, layer.slices.index(piece))
            where = (slice(piece.outputs.start, piece.outputs.stop), slice(piece.inputs.start, piece.inputs.stop))
            # A kv head that several ranks repeat is the same on each of them.
            assert torch.allclose(total[where][seen[where] > 0], local[seen[where] > 0], atol=1e-12)
            total[where] = local
            seen[where] = 1
        assert seen.all()
        assert torch.allclose(total, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("nblocks", "tp", "wanted"), [(4, 4, 6), (4, 2, 12), (4, 8, 6), (4, 1, 24), (8, 4, 6), (1, 4, 24)]
)
def test_local_rank(nblocks, tp, wanted):
    shard = shard_adapter(adapter(nblocks, 24), host(tp, 0, 24), torch.float32)
    assert {s.piece.local_rank for layer in shard.layers.values() for s in layer.slices} == {wanted}


def test_repeated_kv_heads_keep_a_larger_local_rank():
    shard = shard_adapter(adapter(4, 2), host(4, 1, 2), torch.float32)
    ranks = {s.y_start: s.piece.local_rank for s in shard.layers["model.layers.0.self_attn.qkv_proj"].slices}
    assert list(ranks.values()) == [6, 12, 12]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_bytes_equal_the_formula(tp):
    """Parameters per rank: column r k / T + n r / T^2 (nblocks = T), row likewise; plain column r k + n r / T."""
    bd = shard_adapter(adapter(tp, 24), host(tp, 0, 24), torch.bfloat16)
    plain = shard_adapter(adapter(1, 24), host(tp, 0, 24), torch.bfloat16)
    heads = Q_HEADS * HEAD
    columns = [(HIDDEN, heads)] * 3 + [(HIDDEN, INNER)] * 2
    rows = [(heads, HIDDEN), (INNER, HIDDEN)]
    of_bd = sum(RANK // tp * k + n // tp * RANK // tp for k, n in columns)
    of_bd += sum(RANK // tp * k // tp + n * RANK // tp for k, n in rows)
    of_plain = sum(RANK * k + n // tp * RANK for k, n in columns) + sum(RANK * k // tp + n * RANK for k, n in rows)
    assert bd.nbytes == 2 * of_bd
    assert plain.nbytes == 2 * of_plain
    s_lora = shard_adapter(adapter(1, 24), host(tp, 0, 24), torch.bfloat16, "s-lora")
    assert s_lora.nbytes == 2 * sum(RANK * k + n * RANK for k, n in columns + rows) // tp


@pytest.mark.parametrize(
    ("rank", "tp", "hidden"),
    [(24, 2, HIDDEN), (24, 8, HIDDEN), (10, 4, HIDDEN), (3, 8, HIDDEN), (7, 3, HIDDEN), (10, 4, 98)],
)
def test_s_lora_ranks_together_are_the_dense_update(rank, tp, hidden):
    """Shrinks put together over the ranks, then each rank's expand; ranks that do not divide by TP are padded, outputs are not."""
    sample = adapter(1, 24, r=rank, hidden=hidden)
    hosts = [host(tp, t, 24, hidden) for t in range(tp)]
    shards = [shard_adapter(sample, h, torch.float64, "s-lora") for h in hosts]
    for module in sample.modules.values():
        a, b = dense_form(module)
        total = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
        layer, piece = hosts[0].find(sample.name, module)
        index = layer.slices.index(piece)
        places = [h.layers[layer.path].slices[index] for h in hosts]
        factors = [local_factors(shard, layer.path, index) for shard in shards]
        if layer.parallelism == "column":
            whole_a = torch.cat([a for a, _, _ in factors])
        else:
            whole_a = torch.cat([a for a, _, _ in factors], dim=1)
        for place, (_, local_b, layout) in zip(places, factors, strict=True):
            outputs = layout.piece.outputs
            assert layout.y_start == place.y_start + outputs.start - place.outputs.start
            assert layout.piece.combine == ("gather" if layer.parallelism == "column" else "reduce")
            total[outputs.start : outputs.stop] = layout.scale * local_b @ whole_a
        assert torch.allclose(total, module.scale * b.double() @ a.double(), atol=1e-9)
    assert all(shard.collectives == 4 for shard in shards)
    starts = [start for shard in shards for start in shard.offsets.values()]
    assert all(start % shard_module.ALIGNMENT == 0 for start in starts)


def local_factors(shard, path: str, index: int):
    layer = shard.layers[path]
    a, bs = layer_views(shard.weights[shard.offsets[path] : shard.offsets[path] + layer.numel], layer)
    s = layer.slices[index]
    return a[s.a_start : s.a_start + s.piece.local_rank], bs[index].T, s


def test_block_diagonal_stays_local_under_s_lora():
    shard = shard_adapter(adapter(4, 24), host(4, 1, 24), torch.float32, "s-lora")
    assert shard.collectives == 0
    assert set(shard.local_ranks.values()) == {6}


def test_wrong_side_is_refused():
    swapped = {
        "use_bdlora": {
            "nblocks": 2,
            "target_modules_bd_a": ["q_proj"],
            "target_modules_bd_b": [],
        },
        "target_modules": ["q_proj"],
    }
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(RANK, HIDDEN // 2),
        f"{stem}.lora_B.weight": torch.ones(Q_HEADS * HEAD, RANK),
    }
    sample = adapter_from_tensors("swapped", tensors, {**config(1), **swapped})
    with pytest.raises(AdapterError, match=r"(?s)swapped.*q_proj.*target_modules_bd_b"):
        shard_adapter(sample, host(2, 0, 24), torch.float32)


def test_other_models_shapes_are_refused():
    module = next(iter(adapter(2, 24).modules.values()))
    other = HostSlice("q_proj", Span.whole(HIDDEN * 2), Span.whole(Q_HEADS * HEAD), 0)
    with pytest.raises(AdapterError, match=rf"(?s)sample.*down_proj.*{HIDDEN * 2}"):
        layout_for("sample", module, HostLayer("q_proj", "column", (other,)), other, "replicated")


def test_unknown_module_is_refused():
    layer = HostLayer("model.layers.1.mlp.down_proj", "row", (HostSlice("down_proj", Span.whole(4), Span.whole(4), 0),))
    with pytest.raises(AdapterError, match=r"(?s)sample.*layers\.0"):
        shard_adapter(adapter(2, 24), HostModel([layer]), torch.float32)


def test_weights_that_are_not_finite_are_refused():
    sample = adapter(2, 24)
    module = next(m for m in sample.modules.values() if m.path.endswith("down_proj"))
    module.b.tensor.source[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"(?s)sample.*down_proj\.lora_B.*NaN"):
        shard_adapter(sample, host(2, 0, 24), torch.float32)


@pytest.mark.parametrize("nblocks", [1, 4])
def test_threads_change_nothing(monkeypatch, nblocks):
    sample = adapter(nblocks, 24)
    alone = shard_adapter(sample, host(2, 1, 24), torch.bfloat16)
    monkeypatch.setattr(shard_module, "THREADED_BYTES", 0)
    assert torch.equal(shard_adapter(sample, host(2, 1, 24), torch.bfloat16).weights, alone.weights)
    name = next(iter(sample.modules))
    sample.modules[name].a.tensor.source[-1, -1] = float("nan")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        shard_adapter(sample, host(2, 1, 24), torch.bfloat16)
