"""What an adapter is and what a rank would hold of it, without a server.

Which layers are row-parallel is a property of the served model; without one, Megatron's convention decides by name, as in
SGLang's dense decoders: o_proj and down_proj are row-parallel, every other linear layer is column-parallel. The input embedding and
lm_head are split on the vocabulary.
"""

from dataclasses import dataclass, replace

from sgl_bdlora.adapters.format import Adapter, Factor, LoRAModule, StoredTensor
from sgl_bdlora.sharding import HostLayer, HostSlice, PieceLayout, Sharding, Span, layout_for

ROW_PARALLEL = ("o_proj", "down_proj", "out_proj")

# SGLang fills the vocabulary up to a multiple of this before it splits it (vocab_parallel_embedding.py).
VOCABULARY_PADDING = 64


@dataclass(frozen=True)
class Family:
    """All layers' modules of one leaf name. local_rank: the largest that a rank keeps. Others are sums over the layers."""

    name: str
    modules: int
    ranks: tuple[int, ...]
    blocks: int
    local_rank: int
    parameters: int


@dataclass(frozen=True)
class Report:
    """parameters: of the whole adapter. per_rank: sharding -> parameters on the fullest of `tp` ranks.

    Shardings: "as served" (its own structure; plain modules replicated), and what the same adapter written out densely would take:
    "dense, replicated" and "dense, s-lora". collectives: what each adds to a forward pass.
    """

    adapter: Adapter
    tp: int
    families: tuple[Family, ...]
    parameters: int
    per_rank: dict[str, int]
    collectives: dict[str, int]


def report(adapter: Adapter, tp: int) -> Report:
    """Raises AdapterError when a layer cannot be split over `tp` ranks, or a factor is on the wrong side."""
    modules = list(adapter.modules.values())
    leaves = dict.fromkeys(_leaf(m) for m in modules)
    shardings = {
        "as served": (False, "replicated"),
        "dense, replicated": (True, "replicated"),
        "dense, s-lora": (True, "s-lora"),
    }
    per_rank, collectives = {}, {}
    for title, (dense, sharding) in shardings.items():
        chosen = [_dense(m) if dense else m for m in modules]
        ranks = [[_layout(adapter.name, m, tp, rank, sharding) for m in chosen] for rank in range(tp)]
        per_rank[title] = max(sum(layout.numel for layout in layouts) for layouts in ranks)
        # SGLang fuses q, k, v and gate, up: their gathers are one.
        fused = {(m.path.rpartition(".")[0], x.combine) for m, x in zip(chosen, ranks[0], strict=True)}
        collectives[title] = sum(combine != "none" for _, combine in fused)
    families = tuple(_family(adapter.name, leaf, [m for m in modules if _leaf(m) == leaf], tp) for leaf in leaves)
    total = sum(_stored(m.a) + _stored(m.b) for m in modules)
    return Report(adapter, tp, families, total, per_rank, collectives)


def _family(adapter: str, leaf: str, modules: list[LoRAModule], tp: int) -> Family:
    layouts = [_layout(adapter, m, tp, rank, "replicated") for m in modules for rank in range(tp)]
    return Family(
        leaf,
        len(modules),
        tuple(sorted({m.rank for m in modules})),
        max(max(m.a.blocks, m.b.blocks) for m in modules),
        max(layout.local_rank for layout in layouts),
        sum(_stored(m.a) + _stored(m.b) for m in modules),
    )


def _layout(adapter: str, module: LoRAModule, tp: int, rank: int, sharding: Sharding) -> PieceLayout:
    leaf = _leaf(module)
    whole_in, whole_out = Span.whole(module.in_features), Span.whole(module.out_features)
    if module.embedding and leaf == "lm_head":
        host = HostSlice(leaf, whole_in, _vocabulary(module.out_features, tp, rank), 0)
        return layout_for(adapter, module, HostLayer(module.path, "head", (host,), rank, tp), host, sharding)
    if module.embedding:
        host = HostSlice(leaf, _vocabulary(module.in_features, tp, rank), whole_out, 0)
        return layout_for(adapter, module, HostLayer(module.path, "embedding", (host,), rank, tp), host, sharding)
    if leaf in ROW_PARALLEL:
        host = HostSlice(leaf, Span.part(rank, tp, module.in_features), whole_out, 0)
        return layout_for(adapter, module, HostLayer(module.path, "row", (host,), rank, tp), host, sharding)
    host = HostSlice(leaf, whole_in, Span.part(rank, tp, module.out_features), 0)
    return layout_for(adapter, module, HostLayer(module.path, "column", (host,), rank, tp), host, sharding)


def _dense(module: LoRAModule) -> LoRAModule:
    """The module as plain LoRA: same rank, factors without blocks. Its weights cannot be read, only laid out."""

    def factor(f: Factor) -> Factor:
        return Factor(StoredTensor(f.tensor.key, f.shape, f.tensor.dtype, None))

    return replace(module, a=factor(module.a), b=factor(module.b))


def _vocabulary(size: int, tp: int, rank: int) -> Span:
    """The last ranks of a large `tp` and a small vocabulary would hold padding only; they count like the last one that does not."""
    padded = -(-size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    share = -(-padded // tp)
    start = min(share * rank, size - 1)
    return Span(start, min(start + share, size), size)


def _leaf(module: LoRAModule) -> str:
    return module.path.rpartition(".")[2]


def _stored(factor: Factor) -> int:
    rows, cols = factor.tensor.shape
    return rows * cols
