"""The collectives that S-LoRA needs, over SGLang's tensor-parallel group (its custom all-reduce included)."""

import torch
from sglang.srt.distributed import get_tp_group, tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce


class TensorParallelCollectives:
    """kernels.torch_ops.Collectives over the ranks of the served model; counts the calls that it makes."""

    def __init__(self):
        self.calls = 0

    def all_gather(self, h_TR: torch.Tensor) -> torch.Tensor:
        """(tokens, R) of every rank -> (ranks, tokens, R)."""
        self.calls += 1
        return tensor_model_parallel_all_gather(h_TR, dim=0).unflatten(0, (get_tp_group().world_size, -1))

    def all_reduce(self, h_TR: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's (tokens, R)."""
        self.calls += 1
        return tensor_model_parallel_all_reduce(h_TR)
