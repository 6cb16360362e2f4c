"""`--lora-backend bdlora`: the back end that SGLang's LoRA registry knows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_lora_variant

from sgl_bdlora import plugin
from sgl_bdlora.kernels.batch import AdapterSet, Batch, distinct_adapters, make_batch
from sgl_bdlora.kernels.torch_ops import add_embedding_lora, add_lora
from sgl_bdlora.layers.collectives import TensorParallelCollectives
from sgl_bdlora.memory_pool import Resident
from sgl_bdlora.sharding import AdapterShard, HostLayer

if TYPE_CHECKING:
    from sgl_bdlora.kernels.decode import Decode

# SGLang's name of the graph with adapters, where each size is captured with and without (decode_cuda_graph_runner.py).
LORA_GRAPH = "lora"


class BDLoRABackend(BaseLoRABackend):
    """Holds the current batch and applies it to a layer.

    It reads the pool of BDLoRAManager, not the fixed slots of SGLang's own manager, so it refuses to be built where the hooks
    that put that manager in place did not land.
    """

    name = "bdlora"

    def __init__(self, max_loras_per_batch: int, device: torch.device, server_args):
        plugin.verify_hooks()
        super().__init__(max_loras_per_batch, device)
        self._batch: Batch | None = None
        self._head: Batch | None = None
        self._head_done = 0
        self._set: AdapterSet | None = None
        self._decode: Decode | None = None
        self._decoding = False
        self.collectives = TensorParallelCollectives()

    def attach(self, arena: torch.Tensor, hosts: Sequence[HostLayer]) -> None:
        """The pool's weights and the model's linear layers in the order of the forward pass; on a GPU Triton kernels compute them."""
        if arena.device.type == "cuda":
            from sgl_bdlora.kernels.decode import Decode

            self._decode = Decode(arena, hosts, max_tokens=1)

    def init_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        """Before graphs are captured: buffers as large as the largest graph's batch."""
        if self._decode is not None:
            self._decode = self._decode.resized(max_bs_in_cuda_graph * num_tokens_per_req)

    def prepare(self, shard: AdapterShard) -> None:
        """Work out, when an adapter is loaded, what its first batch would have to wait for."""
        if self._decode is not None:
            self._decode.rows(shard)

    @property
    def replayable(self) -> bool:
        """Whether a captured graph computes the current batch."""
        return self._batch is None

    def set_batch(self, adapters: list[Resident | None], lengths: list[int], head_lengths: list[int]) -> None:
        """The requests of the next forward pass: each one's adapter (None: the base model) and its number of rows.

        head_lengths: how many rows of each request reach lm_head. Where all do, as in decode steps, both are the same batch.
        """
        self._batch = self._head = None
        self._decoding = False
        captured = get_capture_lora_variant()
        distinct = distinct_adapters(adapters)
        if not distinct and captured != LORA_GRAPH:
            return
        if self._decode is not None and self._decode.takes(distinct):
            place = {id(adapter): i for i, adapter in enumerate(distinct)}
            owners = np.array([-1 if a is None else place[id(a)] for a in adapters], dtype=np.int32)
            self._decode.set_batch(distinct, np.repeat(owners, lengths), capturing=captured == LORA_GRAPH)
            self._decoding = True
            return
        self._batch = self._head = make_batch(adapters, lengths, self.device, self._set)
        self._head_done = 0
        if self._batch is not None:
            self._set = self._batch.adapters
            if head_lengths != lengths:
                self._head = make_batch(adapters, head_lengths, self.device, self._set)

    def reset_batch_state(self) -> None:
        super().reset_batch_state()
        self._batch = self._head = None
        self._decoding = False

    def fuses(self, path: str, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> bool:
        """Whether `linear` can compute host layer `path` for the current batch, base product and updates together."""
        return self._decoding and self._decode.fuses(path, x_TK, weight_NK)

    def linear(self, x_TK: torch.Tensor, w_NK: torch.Tensor, bias_N: torch.Tensor | None, path: str) -> torch.Tensor:
        """x W^T + bias with the current batch's updates: (tokens, local outputs)."""
        return self._decode.linear(x_TK, w_NK, bias_N, path)

    def add_lora(self, y_TN: torch.Tensor, x_TK: torch.Tensor, path: str) -> None:
        """Add the current batch's updates of host layer `path` to y in place; shapes as kernels.torch_ops.add_lora."""
        if self._decoding:
            self._decode.add_lora(y_TN, x_TK, path)
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
