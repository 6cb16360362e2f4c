"""The local piece of a low-rank update.

The update of a module is dW = s B A with A (r, in) and B (out, r). Rank t of a host layer holds the inputs [i0, i1) and the
outputs [o0, o1); it needs dW[o0:o1, i0:i1] = s B[o0:o1, :] A[:, i0:i1].

Local pieces (`combine` is "none"). A row of A (a column of B) contributes only if it is not zero there, so a block-diagonal
factor leaves the rank only the rows of the blocks that overlap its span:

    column-parallel, B of nb blocks, T ranks: rows of A held = r * (overlapped blocks) / nb = r / min(nb, T) for even splits
    row-parallel,    A of nb blocks, T ranks: the same, by the overlap of inputs

Nothing here depends on the rank's number or on T: spans come from the host layer, so kv-head replication, nb < T, nb = T and
nb > T are the same case. Column-parallel outputs of the ranks are disjoint; row-parallel partial sums are added by the host's
own all-reduce. Hence no collective. Source: arXiv 2510.23346, section 3; packed layout: PEFT 0.21 `use_bdlora`. A plain module
in the replicated sharding is the same with one block.

S-LoRA pieces (arXiv 2311.03285, section 6) of a plain module cut every factor T ways and put the shrink together again:

    column-parallel ("gather"): A split on rank; all-gather of the shrink; B split on out
    row-parallel    ("reduce"): A split on in; all-reduce of the shrink; B split on out, added to this rank's slice of the partial
                                sum, which the base model's all-reduce then also gathers

The embedding and lm_head, whose large factor has the vocabulary as its other side, are split on the vocabulary as their layers are,
and nothing else, under both shardings: the factor that stays whole is (rank, width), as small as any layer's, and nothing has to be
put together.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from sgl_bdlora.adapters.check import check_features
from sgl_bdlora.adapters.errors import AdapterError
from sgl_bdlora.adapters.format import Factor, LoRAModule
from sgl_bdlora.sharding.host import HostLayer, HostSlice, Parallelism, Span

Sharding = Literal["replicated", "s-lora"]
Combine = Literal["none", "gather", "reduce"]


@dataclass(frozen=True)
class PieceLayout:
    """Shapes of a local piece, before any weight is read.

    combine: what stands between shrink and expand.
    ranks_a: the span of the adapter's rank rows in the local A; its length is the local rank.
    ranks_b: the span of rank columns in the local B; longer than ranks_a only where a gather stands between.
    inputs, outputs: columns of A and rows of B. Rank spans may end beyond the module's rank: those rows are zero.
    blocks_a, blocks_b: diagonal blocks left in the local factors. A factor with n > 1 blocks is stored packed:
        A (local rank, inputs / n), B (outputs, local rank / n), blocks stacked on dim 0.
    """

    combine: Combine
    ranks_a: Span
    ranks_b: Span
    inputs: Span
    outputs: Span
    blocks_a: int = 1
    blocks_b: int = 1

    @property
    def local_rank(self) -> int:
        return len(self.ranks_a)

    @property
    def shape_a(self) -> tuple[int, int]:
        return self.local_rank, len(self.inputs) // self.blocks_a

    @property
    def shape_b(self) -> tuple[int, int]:
        return len(self.outputs), len(self.ranks_b) // self.blocks_b

    @property
    def numel(self) -> int:
        (ra, ka), (nb, rb) = self.shape_a, self.shape_b
        return ra * ka + nb * rb


def layout_for(adapter: str, module: LoRAModule, layer: HostLayer, host: HostSlice, sharding: Sharding) -> PieceLayout:
    """The local layout of `module` in `host`, a slice of `layer`. `sharding` is for plain modules; block-diagonal ones are local.

    Raises AdapterError when the module's shape is not the host's, or when a block-diagonal factor is on the side that the host
    layer does not split (the rank would need the whole factor, and nothing would be saved).
    """
    check_features(adapter, module, host.inputs.size, host.outputs.size)
    _check_side(adapter, module, layer.parallelism)
    if module.b.blocks > 1:
        ranks, blocks = _overlap(module.rank, module.b.blocks, host.outputs)
        return PieceLayout("none", ranks, ranks, host.inputs, host.outputs, blocks_b=blocks)
    if module.a.blocks > 1:
        ranks, blocks = _overlap(module.rank, module.a.blocks, host.inputs)
        return PieceLayout("none", ranks, ranks, host.inputs, host.outputs, blocks_a=blocks)
    whole = Span.whole(module.rank)
    if sharding == "s-lora" and layer.tp_size > 1 and layer.parallelism == "column":
        share = -(-module.rank // layer.tp_size)
        padded = Span.whole(share * layer.tp_size)
        mine = Span.shard(share, layer.tp_rank, padded.size)
        return PieceLayout("gather", mine, padded, host.inputs, host.outputs)
    if sharding == "s-lora" and layer.tp_size > 1 and layer.parallelism == "row":
        return PieceLayout(
            "reduce", whole, whole, host.inputs, Span.part(layer.tp_rank, layer.tp_size, host.outputs.size)
        )
    return PieceLayout("none", whole, whole, host.inputs, host.outputs)


def read_piece(module: LoRAModule, layout: PieceLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Read from storage just the local (A, B) that `layout` names: shapes layout.shape_a and layout.shape_b, stored dtype."""
    a = _read_factor(module.a, layout.ranks_a, layout.inputs, layout.blocks_a)
    b = _read_factor(module.b, layout.outputs, layout.ranks_b, layout.blocks_b)
    return a, b


def _overlap(rank: int, nblocks: int, span: Span) -> tuple[Span, int]:
    """Rank rows of the blocks that `span` touches, and how many equal diagonal blocks they form there.

    A span that cuts several blocks unevenly (nblocks and T with no common grid) is kept as one zero-padded block.
    """
    width, rank_block = span.size // nblocks, rank // nblocks
    first, last = span.start // width, -(-span.stop // width)
    whole_blocks = span.start % width == 0 and span.stop % width == 0
    return Span(first * rank_block, last * rank_block, rank), (last - first if whole_blocks else 1)


def _read_factor(factor: Factor, rows: Span, cols: Span, local_blocks: int) -> torch.Tensor:
    """Rows x cols of the dense factor, zero beyond its end; packed again if `local_blocks` > 1."""
    total_rows, total_cols = factor.shape
    row_width, col_width = total_rows // factor.blocks, total_cols // factor.blocks
    if local_blocks > 1:
        return factor.tensor[rows.start : rows.stop, 0:col_width]
    if factor.blocks == 1 and rows.stop <= total_rows and cols.stop <= total_cols:
        return factor.tensor[rows.start : rows.stop, cols.start : cols.stop]
    local = torch.zeros(len(rows), len(cols), dtype=factor.tensor.dtype)
    for block in range(factor.blocks):
        r0, r1 = max(rows.start, block * row_width), min(rows.stop, (block + 1) * row_width)
        c0, c1 = max(cols.start, block * col_width), min(cols.stop, (block + 1) * col_width)
        if r0 < r1 and c0 < c1:
            part = factor.tensor[r0:r1, c0 - block * col_width : c1 - block * col_width]
            local[r0 - rows.start : r1 - rows.start, c0 - cols.start : c1 - cols.start] = part
    return local


def _check_side(adapter: str, module: LoRAModule, parallelism: Parallelism) -> None:
    sides = {"column": ("A", module.a, "target_modules_bd_b"), "row": ("B", module.b, "target_modules_bd_a")}
    side, factor, field = sides.get(parallelism, ("", None, ""))
    if factor is None or factor.blocks == 1:
        return
    raise AdapterError(
        adapter,
        f"module {module.path!r} has a block-diagonal lora_{side} (nblocks = {factor.blocks}), but its layer is "
        f"{parallelism}-parallel, where the other factor has to be block-diagonal",
        f"list the module in use_bdlora.{field} and train again, or convert the adapter to plain LoRA",
    )
