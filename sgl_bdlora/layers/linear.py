"""LoRA in a linear layer: a linear method around the layer's own.

SGLang's linear layers (layers/linear.py: ColumnParallelLinear.forward, RowParallelLinear.forward, ...) all compute their local
product through `quant_method.apply(layer, x, bias)` and do everything else (splitting, bias, gathering, the all-reduce, fused or
skipped reductions) around it. Adding the local update right there serves every kind of layer, quantised or not, with one class:
a column-parallel layer's outputs are complete, a row-parallel layer's partial sums go through the host's own all-reduce.
"""

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sgl_bdlora.kernels.backend import BDLoRABackend


class LoRALinearMethod(LinearMethodBase):
    """y = base.apply(layer, x, bias), then the batch's LoRA updates added in place; or both in one, where the back end can.

    x is (tokens, local inputs) or has more leading dimensions; y alike with local outputs.
    """

    def __init__(self, base: LinearMethodBase, backend: BDLoRABackend, path: str):
        self.base = base
        self.backend = backend
        self.path = path

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        if type(self.base) is UnquantizedLinearMethod and self.backend.fuses(self.path, x_TK, layer.weight):
            return self.backend.linear(x_TK, layer.weight, bias, self.path).view(*x.shape[:-1], -1)
        y = self.base.apply(layer, x, bias)
        self.backend.add_lora(y.view(-1, y.shape[-1]), x_TK, self.path)
        return y

    def create_weights(self, *args, **kwargs):
        return self.base.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def __getattr__(self, name: str):
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)
