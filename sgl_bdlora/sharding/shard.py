"""An adapter's weights for one rank: every host layer's pieces in one flat host tensor."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import torch

from sgl_bdlora.adapters.check import check_base_weight, check_finite
from sgl_bdlora.adapters.errors import AdapterError
from sgl_bdlora.adapters.format import Adapter, LoRAModule
from sgl_bdlora.sharding.alternatives import plain_numel, stored_numel
from sgl_bdlora.sharding.host import HostLayer
from sgl_bdlora.sharding.piece import PieceLayout, Sharding, layout_for, read_piece

# Elements that every layer's block is a multiple of: 16 bytes of the 2-byte types, what a GPU loads at once.
ALIGNMENT = 8
# An adapter from so many bytes on is read by several threads, where this process has several cores.
THREADED_BYTES, THREADS = 2**24, 4


@dataclass(frozen=True)
class SliceLayout:
    """One slice's piece inside a layer's block of weights.

    name: the adapter module's leaf name.
    a_start: first of this slice's rows in the layer's stacked A (sum of local ranks, inputs / blocks_a).
    b_offset: element offset in the layer's block of this slice's B, transposed: (local rank, outputs / blocks_b), so that what
    belongs to one rank row lies together in both factors. y_start: first output column.
    """

    name: str
    piece: PieceLayout
    scale: float
    a_start: int
    b_offset: int
    y_start: int


@dataclass(frozen=True)
class LayerLayout:
    """The weights of one host layer for one adapter, one block of `numel` elements: stacked A, every slice's B, and what alignment adds."""

    slices: tuple[SliceLayout, ...]
    rows_a: int
    width_a: int
    numel: int


@dataclass(frozen=True, eq=False)
class AdapterShard:
    """An adapter on one rank.

    layers: host layer path -> layout. offsets: host layer path -> where its block starts in `weights`.
    weights: 1-D host tensor in the pool's dtype, from the start of its memory on.
    parameters: of the whole adapter. plain_numel: sharding -> elements that this rank would hold were it plain.
    """

    name: str
    kind: str
    rank: int
    nblocks: int
    layers: Mapping[str, LayerLayout]
    offsets: Mapping[str, int]
    weights: torch.Tensor
    parameters: int = 0
    plain_numel: Mapping[Sharding, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    @cached_property
    def local_ranks(self) -> dict[str, int]:
        """Adapter module leaf name -> the largest rank that this rank of the server keeps of it."""
        ranks: dict[str, int] = {}
        for layer in self.layers.values():
            for s in layer.slices:
                ranks[s.name] = max(ranks.get(s.name, 0), s.piece.local_rank)
        return ranks

    @cached_property
    def collectives(self) -> int:
        """Collectives that a forward pass runs for this adapter: one for each layer that gathers or reduces a shrink."""
        return sum(any(s.piece.combine != "none" for s in layer.slices) for layer in self.layers.values())


class HostModel:
    """The served model's adaptable layers on this rank, looked up by an adapter's module paths."""

    def __init__(self, layers: list[HostLayer]):
        self.layers = {layer.path: layer for layer in layers}
        self._by_module = {layer.module_path(s): (layer, s) for layer in layers for s in layer.slices}
        self._by_tail: dict[str, list[str]] = {}
        for path in self._by_module:
            self._by_tail.setdefault(_tail(path), []).append(path)

    def find(self, adapter: str, module: LoRAModule):
        """(host layer, slice) of an adapter's module.

        Paths are compared whole, then from "layers.<n>." on (outside the layers: by the last name), because a multimodal wrapper
        prefixes the same decoder differently in Transformers and in SGLang. Raises AdapterError when the model has no such layer.
        """
        if module.path in self._by_module:
            return self._by_module[module.path]
        candidates = self._by_tail.get(_tail(module.path), [])
        if len(candidates) == 1:
            return self._by_module[candidates[0]]
        leaves = sorted({s.name for layer in self.layers.values() for s in layer.slices})
        raise AdapterError(
            adapter,
            f"it targets {module.path!r}, but the server has no layer of that name that takes LoRA (it has {', '.join(leaves)})",
            "serve the base model that the adapter was trained on, and name the module in --lora-target-modules",
        )


def shard_adapter(
    adapter: Adapter,
    host: HostModel,
    dtype: torch.dtype,
    sharding: Sharding = "replicated",
    zeros: Callable[..., torch.Tensor] = torch.zeros,
) -> AdapterShard:
    """Read this rank's pieces of `adapter` into one flat host tensor. sharding: of its plain modules. zeros: where that tensor comes from.

    Raises AdapterError for unknown modules, shapes of another model, wrongly sided factors, weights that are not finite, and copies
    of the base model's embeddings that differ from it.
    """
    layers, plan = plan_layers(adapter, host, sharding)
    offsets, total = {}, 0
    for path, layer in layers.items():
        offsets[path] = total
        total += layer.numel
    weights = zeros(total, dtype=dtype)

    def fill(path: str) -> None:
        block = weights[offsets[path] : offsets[path] + layers[path].numel]
        for module, layout in zip(plan[path], layers[path].slices, strict=True):
            _fill(adapter.name, block, layers[path], module, layout)

    if weights.nbytes < THREADED_BYTES:
        for path in plan:
            fill(path)
    else:
        # On GPU hosts SGLang lets PyTorch use one thread in a rank (model_runner.py:load_model), and all requests wait for this.
        with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as pool:
            for _ in pool.map(fill, plan):
                pass
    return AdapterShard(
        adapter.name,
        adapter.kind,
        adapter.rank,
        adapter.nblocks,
        layers,
        offsets,
        weights,
        stored_numel(adapter),
        plain_numel(adapter, host),
    )


def plan_layers(
    adapter: Adapter, host: HostModel, sharding: Sharding
) -> tuple[dict[str, LayerLayout], dict[str, list[LoRAModule]]]:
    """Layouts by host layer, and the adapter modules behind each layout's slices, in the same order. No factor is read.

    Raises AdapterError for unknown modules, shapes of another model, wrongly sided factors, and copies of the base model's embeddings
    that differ from it.
    """
    found: dict[str, list] = {}
    for module in adapter.modules.values():
        layer, piece = host.find(adapter.name, module)
        layout = layout_for(adapter.name, module, layer, piece, sharding)
        if module.base_weight is not None:
            check_base_weight(adapter.name, module.base_weight, layer.vocabulary.start, layer.weight)
        # An S-LoRA row piece fills only this rank's part of the outputs.
        y_start = piece.y_start + layout.outputs.start - piece.outputs.start
        found.setdefault(layer.path, []).append((y_start, module, layout))
    layouts, modules = {}, {}
    for path in sorted(found):
        entries = sorted(found[path], key=lambda entry: entry[0])
        modules[path] = [module for _, module, _ in entries]
        layouts[path] = _layer_layout(entries)
    return layouts, modules


def layer_views(block: torch.Tensor, layer: LayerLayout) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A (rows_a, width_a) and every slice's transposed B (local rank, outputs / blocks_b) as views of a layer's block."""
    a = block[: layer.rows_a * layer.width_a].view(layer.rows_a, layer.width_a)
    bs = []
    for s in layer.slices:
        ranks, width = len(s.piece.ranks_b), len(s.piece.outputs) // s.piece.blocks_b
        bs.append(block[s.b_offset : s.b_offset + ranks * width].view(ranks, width))
    return a, bs


def _layer_layout(entries: list[tuple[int, LoRAModule, PieceLayout]]) -> LayerLayout:
    rows_a = sum(layout.local_rank for _, _, layout in entries)
    width_a = entries[0][2].shape_a[1]
    slices, row, offset = [], 0, rows_a * width_a
    for y_start, module, layout in entries:
        slices.append(SliceLayout(module.path.rpartition(".")[2], layout, module.scale, row, offset, y_start))
        row += layout.local_rank
        offset += layout.shape_b[0] * layout.shape_b[1]
    return LayerLayout(tuple(slices), rows_a, width_a, -(-offset // ALIGNMENT) * ALIGNMENT)


def _fill(adapter: str, block: torch.Tensor, layer: LayerLayout, module: LoRAModule, layout: SliceLayout) -> None:
    a, b = read_piece(module, layout.piece)
    check_finite(adapter, module.a.tensor.key, a)
    check_finite(adapter, module.b.tensor.key, b)
    stacked, transposed = layer_views(block, layer)
    stacked[layout.a_start : layout.a_start + layout.piece.local_rank].copy_(a)
    blocks = b.unflatten(0, (layout.piece.blocks_b, -1))
    rows = transposed[layer.slices.index(layout)].unflatten(0, (layout.piece.blocks_b, -1))
    # PyTorch has a quick transposing copy for two dimensions: 2 GB/s of bfloat16 on a CPU core, with three it is 0.4.
    for mine, stored in zip(rows, blocks, strict=True):
        mine.copy_(stored.t())


def _tail(path: str) -> str:
    _, found, rest = path.partition("layers.")
    return found + rest if found else path.rpartition(".")[2]
