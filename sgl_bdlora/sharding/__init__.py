"""Pure functions: (adapter structure, host layer) -> what one tensor-parallel rank holds. No SGLang import."""

from sgl_bdlora.sharding.even import even_out, layer_sizes
from sgl_bdlora.sharding.host import HostLayer, HostSlice, Span
from sgl_bdlora.sharding.piece import Combine, PieceLayout, Sharding, layout_for, read_piece
from sgl_bdlora.sharding.shard import (
    AdapterShard,
    HostModel,
    LayerLayout,
    SliceLayout,
    layer_views,
    plan_layers,
    shard_adapter,
)

__all__ = [
    "AdapterShard",
    "Combine",
    "HostLayer",
    "HostModel",
    "HostSlice",
    "LayerLayout",
    "PieceLayout",
    "Sharding",
    "SliceLayout",
    "Span",
    "even_out",
    "layer_sizes",
    "layer_views",
    "layout_for",
    "plan_layers",
    "read_piece",
    "shard_adapter",
]
