"""What an adapter is and what a rank would hold of it, without a server (hosts.py says by which convention)."""

import dataclasses
from dataclasses import dataclass, replace

from sgl_bdlora.adapters.format import Adapter, LoRAModule
from sgl_bdlora.adapters.hosts import host_layers, layers_of, leaf_of
from sgl_bdlora.sharding import HostModel, LayerLayout, Sharding, plan_layers
from sgl_bdlora.sharding.alternatives import as_plain, stored_numel


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

    def as_json(self) -> dict:
        return {
            "name": self.adapter.name,
            "source": self.adapter.source,
            "kind": self.adapter.kind,
            "nblocks": self.adapter.nblocks,
            "rank": self.adapter.rank,
            "tp": self.tp,
            "parameters": self.parameters,
            "families": [dataclasses.asdict(family) for family in self.families],
            "parameters_per_rank": self.per_rank,
            "bytes_per_rank_16_bit": {title: 2 * count for title, count in self.per_rank.items()},
            "collectives_per_step": self.collectives,
        }


def report(adapter: Adapter, tp: int) -> Report:
    """Raises AdapterError when a factor is on the wrong side. A layer that `tp` does not divide counts as split nearly evenly."""
    # Copies of embeddings are compared with a model; here there is none.
    modules = {path: replace(module, base_weight=None) for path, module in adapter.modules.items()}
    bare = replace(adapter, modules=modules)
    dense = replace(bare, modules={path: as_plain(module) for path, module in modules.items()})
    layouts = {
        "as served": layouts_on_ranks(bare, tp, "replicated"),
        "dense, replicated": layouts_on_ranks(dense, tp, "replicated"),
        "dense, s-lora": layouts_on_ranks(dense, tp, "s-lora"),
    }
    ranks: dict[str, int] = {}
    for layers in layouts["as served"]:
        for s in (s for layer in layers for s in layer.slices):
            ranks[s.name] = max(ranks.get(s.name, 0), s.piece.local_rank)
    leaves = dict.fromkeys(map(leaf_of, modules))
    families = tuple(
        _family(leaf, [m for path, m in modules.items() if leaf_of(path) == leaf], ranks[leaf]) for leaf in leaves
    )
    return Report(
        adapter=adapter,
        tp=tp,
        families=families,
        parameters=stored_numel(adapter),
        per_rank={title: max(map(parameters, on_ranks)) for title, on_ranks in layouts.items()},
        collectives={title: collectives(on_ranks[0]) for title, on_ranks in layouts.items()},
    )


def layouts_on_ranks(adapter: Adapter, tp: int, sharding: Sharding) -> list[list[LayerLayout]]:
    """Every rank's layouts by the naming convention."""
    layers = layers_of(adapter)
    models = [HostModel(host_layers(layers, tp, rank)) for rank in range(tp)]
    return [list(plan_layers(adapter, model, sharding)[0].values()) for model in models]


def parameters(layers: list[LayerLayout]) -> int:
    """Parameters that one rank holds."""
    return sum(s.piece.numel for layer in layers for s in layer.slices)


def collectives(layers: list[LayerLayout]) -> int:
    """Collectives that a forward pass runs for these layers."""
    return sum(any(s.piece.combine != "none" for s in layer.slices) for layer in layers)


def _family(leaf: str, modules: list[LoRAModule], local_rank: int) -> Family:
    return Family(
        leaf,
        len(modules),
        tuple(sorted({m.rank for m in modules})),
        max(max(m.a.blocks, m.b.blocks) for m in modules),
        local_rank,
        sum(factor.tensor.shape[0] * factor.tensor.shape[1] for m in modules for factor in (m.a, m.b)),
    )
