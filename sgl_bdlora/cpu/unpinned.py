"""Page-locked host memory speeds copies to a device; without one, PyTorch refuses to allocate it."""

import torch
from torch.overrides import TorchFunctionMode


class Unpinned(TorchFunctionMode):
    """Inside this context `pin_memory=True` and `Tensor.pin_memory()` give ordinary memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs and "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))
