"""What an adapter is once it has been read: modules, each a pair of low-rank factors with a structure.

PEFT's layout: the update of a linear layer is ``scale * B @ A`` with A (r, in) and B (out, r). In a block-diagonal
adapter (PEFT's ``use_bdlora``; arXiv 2510.23346) one of the two is block-diagonal and stored packed, its blocks
stacked on dim 0: A as (r, in / blocks) or B as (out, r / blocks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from sgl_bdlora.adapters.config import AdapterConfig
    from sgl_bdlora.adapters.tensor_file import OpenFile

_ALL = slice(None)


@dataclass(frozen=True)
class StoredTensor:
    """A 2-D tensor that stays where it is (an open file or a tensor in memory) until a part of it is indexed.

    key: its name in the file. shape: (rows, columns). dtype: float16, bfloat16 or float32.
    """

    key: str
    shape: tuple[int, int]
    dtype: torch.dtype
    source: Any  # a torch.Tensor, or a FileTensor (tensor_file.py)

    def __getitem__(self, index: tuple[slice, slice]) -> torch.Tensor:
        """``tensor[rows, cols]`` with two slices of step 1: a contiguous copy of that part, in the stored dtype."""
        rows, cols = index
        part = self.source[rows, cols]
        # What comes from a file is a copy already.
        return part if hasattr(self.source, "file") else part.clone().contiguous()

    def read(self) -> torch.Tensor:
        """The whole tensor, as a copy."""
        return self[_ALL, _ALL]


@dataclass(frozen=True)
class Factor:
    """One low-rank factor as stored. blocks: diagonal blocks packed on dim 0 of the tensor; 1 means dense."""

    tensor: StoredTensor
    blocks: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """The factor's dense shape: the packed columns once for each block."""
        rows, cols = self.tensor.shape
        return rows, cols * self.blocks


@dataclass(frozen=True)
class LoRAModule:
    """One adapted layer of the base model.

    path: the base model's module path, e.g. ``model.layers.0.self_attn.q_proj``.
    a: dense (rank, in_features), packed (rank, in_features / blocks). b: dense (out_features, rank), packed
    (out_features, rank / blocks). At most one of the two is packed.
    scale: what ``B @ A`` is multiplied with; it comes from the full rank, also when a factor is packed.
    embedding: the layer is as wide as the vocabulary (the input embedding or lm_head). On the input embedding A is
    (rank, vocabulary) and is looked up by token id: the update of its (vocabulary, width) weight is
    ``scale * (B @ A).T``.
    base_weight: the copy of the layer's own weight that PEFT saves beside an adapted embedding. Whoever serves the
    module compares it with the loaded model: PEFT would overwrite the model's weight with it.
    """

    path: str
    a: Factor
    b: Factor
    rank: int
    scale: float
    embedding: bool = False
    base_weight: StoredTensor | None = None

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @property
    def block_diagonal(self) -> bool:
        return self.a.blocks > 1 or self.b.blocks > 1


@dataclass(frozen=True)
class Adapter:
    """An adapter that has passed every check that needs no base model. Its weights are read when they are indexed.

    name: the name it is loaded under. source: its directory, or ``<tensors>``. modules: by module path, sorted.
    files: what the directory's files were when they were opened.
    """

    name: str
    source: str
    config: AdapterConfig
    modules: Mapping[str, LoRAModule]
    files: tuple[OpenFile, ...] = ()

    def check_unchanged(self) -> None:
        """Raise ChangedFileError unless all of its files are still what they were, so that what was read belongs together."""
        for file in self.files:
            file.check_unchanged()

    @property
    def kind(self) -> Literal["block-diagonal", "plain", "mixed"]:
        kinds = {module.block_diagonal for module in self.modules.values()}
        if len(kinds) == 2:
            return "mixed"
        return "block-diagonal" if True in kinds else "plain"

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules.values())

    @property
    def nblocks(self) -> int:
        """The number of blocks of the block-diagonal modules; 1 for a plain adapter."""
        return max(max(module.a.blocks, module.b.blocks) for module in self.modules.values())
