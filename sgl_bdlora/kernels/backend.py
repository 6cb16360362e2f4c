"""`--lora-backend bdlora`: the back end that SGLang's LoRA registry knows."""

import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend

from sgl_bdlora import plugin
from sgl_bdlora.kernels.batch import AdapterSet, Batch, make_batch
from sgl_bdlora.kernels.torch_ops import add_lora
from sgl_bdlora.layers.collectives import TensorParallelCollectives
from sgl_bdlora.memory_pool import Resident


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
        self._set: AdapterSet | None = None
        self.collectives = TensorParallelCollectives()

    def set_batch(self, adapters: list[Resident | None], lengths: list[int]) -> None:
        """The requests of the next forward pass: each one's adapter (None: the base model) and its number of rows."""
        self._batch = make_batch(adapters, lengths, self.device, self._set)
        if self._batch is not None:
            self._set = self._batch.adapters

    def reset_batch_state(self) -> None:
        super().reset_batch_state()
        self._batch = None

    def add_lora(self, y_TN: torch.Tensor, x_TK: torch.Tensor, path: str) -> None:
        """Add the current batch's updates of host layer `path` to y in place; shapes as kernels.torch_ops.add_lora."""
        if self._batch is not None:
            add_lora(y_TN, x_TK, self._batch, path, self.collectives)
