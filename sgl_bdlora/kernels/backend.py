"""`--lora-backend bdlora`: the back end that SGLang's LoRA registry knows."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_lora_variant

from sgl_bdlora import graphs, plugin
from sgl_bdlora.kernels.batch import AdapterSet, Batch, distinct_adapters, make_batch
from sgl_bdlora.kernels.torch_ops import add_embedding_lora, add_lora
from sgl_bdlora.layers.collectives import TensorParallelCollectives
from sgl_bdlora.memory_pool import Resident
from sgl_bdlora.sharding import AdapterShard, HostLayer

if TYPE_CHECKING:
    from sgl_bdlora.kernels.rows import Needs
    from sgl_bdlora.kernels.triton_ops import TritonOps


logger = logging.getLogger(__name__)

_SLOW = (
    "sgl-bdlora: a batch of %d adapters is computed without the Triton kernels, slower and with memory beside the pool: it has adapters of "
    "embed_tokens or lm_head, or more rank rows than the kernels take (docs/serving.md)"
)


class BDLoRABackend(BaseLoRABackend):
    """Holds the current batch and applies it to a layer.

    It reads the pool of BDLoRAManager, not the fixed slots of SGLang's own manager, so it refuses to be built where the hooks
    that put that manager in place did not land.
    """

    name = "bdlora"
    # lora_manager.py: supports_prefill_cuda_graph.
    supports_prefill_cuda_graph = True

    def __init__(self, max_loras_per_batch: int, device: torch.device, server_args):
        plugin.verify_hooks()
        super().__init__(max_loras_per_batch, device)
        self._batch: Batch | None = None
        self._head: Batch | None = None
        self._head_done = 0
        self._set: AdapterSet | None = None
        self._told = False
        # Prefill graphs read buffers of their own: they are captured apart from decode graphs, and are larger.
        self._ops: TritonOps | None = None
        self._prefill_ops: TritonOps | None = None
        self._current: TritonOps | None = None
        self._combines = False
        self._max_rank = 0
        self.collectives = TensorParallelCollectives()

    def attach(self, arena: torch.Tensor, hosts: Sequence[HostLayer], combines: bool, max_rank: int) -> None:
        """The pool's weights and the model's linear layers in the order of the forward pass; on a GPU Triton kernels compute them.

        combines: whether adapters may have pieces that are put together over the ranks. max_rank: what graphs have to have room for
        beside the adapters loaded at start.
        """
        self._combines, self._max_rank = combines, max_rank
        if arena.device.type == "cuda":
            from sgl_bdlora.kernels.triton_ops import TritonOps

            self._ops = TritonOps(arena, hosts, self.max_loras_per_batch, self.collectives if combines else None)

    def init_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        """Before decode graphs are captured: buffers as large as the largest graph's batch."""
        if self._ops is not None:
            self._ops = self._ops.reserve(max_bs_in_cuda_graph * num_tokens_per_req, self._combines, self._max_rank)

    def init_prefill_cuda_graph_batch_info(self, max_num_tokens: int) -> None:
        """The same before prefill graphs are captured."""
        if self._ops is not None:
            self._prefill_ops = self._ops.reserve(max_num_tokens, self._combines, self._max_rank, shared=True)
            self.prefill_cuda_graph_max_bs = self.prefill_cuda_graph_max_tokens = max_num_tokens

    def further_graphs(self, rows: int) -> tuple[str, ...]:
        """Kinds of graphs with adapters (graphs.py) that a decode batch of so many rows needs beside the first."""
        kinds = {
            graphs.MANY_ROWS: self._ops is not None and self._ops.minds_many_rows(rows),
            graphs.COLLECTIVES: self._ops is not None and self._combines,
        }
        return tuple(kind for kind, needed in kinds.items() if needed)

    @property
    def prefill_graphs(self) -> tuple[str, ...]:
        """Kinds of prefill graphs with adapters that are captured beside the base model's."""
        return (graphs.LORA, *((graphs.COLLECTIVES,) if self._combines else ()))

    def prepare(self, shard: AdapterShard) -> "Needs | None":
        """Work out, when an adapter is loaded, what its first batch would have to wait for. Returns what this rank needs for it."""
        return None if self._ops is None else self._ops.known.needs(shard)

    def agree(self, shard: AdapterShard, everyone: Sequence["Needs | None"]) -> None:
        """Go by what every rank's `prepare` returned: ranks that decided apart would replay different graphs, whose all-reduces do not
        find each other's buffers."""
        if self._ops is not None:
            self._ops.known.agree(shard, everyone)

    def prefills_from_graph(self, adapters: Sequence[Resident | None]) -> bool:
        """Whether captured prefill graphs compute a batch of these adapters."""
        return self._prefill_ops is not None and self._prefill_ops.batch.captures(distinct_adapters(adapters))

    @property
    def replayable(self) -> bool:
        """Whether a captured decode graph computes the current batch."""
        return self._batch is None and (self._current is None or self._current.batch.replayable)

    def decode_graph(self, rows: int) -> str:
        """Which of the decode graphs with adapters that have so many rows computes it best."""
        if self._current is None:
            return graphs.LORA
        if self._current.batch.combines:
            return graphs.COLLECTIVES
        many = self._current.batch.has_many_rows(rows) and self._current.minds_many_rows(rows)
        return graphs.MANY_ROWS if many else graphs.LORA

    @property
    def prefill_graph(self) -> str | None:
        """Which of the prefill graphs computes it; None for the base model's."""
        if self._current is None:
            return None
        return graphs.COLLECTIVES if self._current.batch.combines else graphs.LORA

    def set_batch(
        self,
        adapters: list[Resident | None],
        lengths: list[int],
        head_lengths: list[int],
        prefill_graph: bool = False,
    ) -> None:
        """The requests of the next forward pass: each one's adapter (None: the base model) and its number of rows.

        head_lengths: how many rows of each request reach lm_head. Where all do, as in decode steps, both are the same batch.
        prefill_graph: a prefill graph is captured or replayed; `prefills_from_graph` is true for the adapters.
        """
        self._batch = self._head = self._current = None
        captured = get_capture_lora_variant()
        capturing = captured in graphs.WITH_ADAPTERS
        distinct = distinct_adapters(adapters)
        if not (distinct or capturing):
            return
        ops = self._prefill_ops if prefill_graph else self._ops
        if ops is not None and ops.batch.takes(distinct):
            place = {id(adapter): i for i, adapter in enumerate(distinct)}
            owners = np.array([-1 if a is None else place[id(a)] for a in adapters], dtype=np.int32)
            ops.batch.fill(
                distinct,
                np.repeat(owners, lengths),
                static=capturing or prefill_graph,
                combining=captured == graphs.COLLECTIVES,
                many_rows=prefill_graph or captured != graphs.LORA,
            )
            self._current = ops
            # Its dense factors may be larger than the pool.
            self._set = None
            return
        if ops is not None and not self._told:
            self._told = True
            logger.warning(_SLOW, len(distinct))
        self._batch = self._head = make_batch(adapters, lengths, self.device, self._set)
        self._head_done = 0
        if self._batch is not None:
            self._set = self._batch.adapters
            if head_lengths != lengths:
                self._head = make_batch(adapters, head_lengths, self.device, self._set)

    def repeat_batch(self) -> None:
        """The batch of the last `set_batch` again, for the next decode step of its requests."""
        if self._current is not None:
            self._current.batch.repeat()

    def reset_batch_state(self) -> None:
        super().reset_batch_state()
        self._batch = self._head = self._current = None

    def fuses(self, path: str, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> bool:
        """Whether `linear` can compute host layer `path` for the current batch, base product and updates together."""
        return self._current is not None and self._current.fuses(path, x_TK, weight_NK)

    def linear(self, x_TK: torch.Tensor, w_NK: torch.Tensor, bias_N: torch.Tensor | None, path: str) -> torch.Tensor:
        """x W^T + bias with the current batch's updates: (tokens, local outputs)."""
        return self._current.linear(x_TK, w_NK, bias_N, path)

    def add_lora(self, y_TN: torch.Tensor, x_TK: torch.Tensor, path: str) -> None:
        """Add the current batch's updates of host layer `path` to y in place; shapes as kernels.torch_ops.add_lora."""
        if self._current is not None:
            self._current.add_lora(y_TN, x_TK, path)
        elif self._batch is not None:
            add_lora(y_TN, x_TK, self._batch, path, self.collectives)

    def add_embedding_lora(self, y_TN: torch.Tensor, ids_T: torch.Tensor, path: str, first: int, gain: float) -> None:
        """The same for an embedding; arguments as kernels.torch_ops.add_embedding_lora."""
        if self._batch is not None:
            add_embedding_lora(y_TN, ids_T, self._batch, path, first, gain)

    def add_head_lora(self, y_SN: torch.Tensor, x_SK: torch.Tensor, path: str) -> None:
        """The same for lm_head, whose rows are fewer than the batch's when it prefills.

        SGLang asks for all of them, or for one part after another (logprob_processor.py: InputLogprobProcessor._forward_by_chunk).
        """
        if self._head is None:
            return
        start, rows = self._head_done, len(self._head.owner)
        stop = start + len(x_SK)
        if stop > rows:
            # Going on would apply other requests' adapters.
            raise RuntimeError(f"sgl-bdlora: lm_head was given {stop} rows of a batch that has {rows} for it")
        self._head_done = stop % rows
        add_lora(y_SN, x_SK, self._head.rows(start, stop), path, self.collectives)
