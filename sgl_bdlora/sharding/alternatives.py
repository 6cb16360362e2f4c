"""What else a rank could hold: the same adapter with every module written out plain, under each sharding of plain modules."""

from dataclasses import replace
from typing import get_args

from sgl_bdlora.adapters.format import Adapter, Factor, LoRAModule, StoredTensor
from sgl_bdlora.sharding.piece import Sharding, layout_for


def as_plain(module: LoRAModule) -> LoRAModule:
    """The module with dense factors of the same rank. Its weights cannot be read, only laid out."""

    def dense(factor: Factor) -> Factor:
        return Factor(StoredTensor(factor.tensor.key, factor.shape, factor.tensor.dtype, None))

    return replace(module, a=dense(module.a), b=dense(module.b))


def plain_numel(adapter: Adapter, host) -> dict[Sharding, int]:
    """Sharding -> elements on this rank (without alignment) of `adapter` as plain LoRA of the same ranks.

    host: a HostModel that has found all of the adapter's modules before.
    """
    numel: dict[Sharding, int] = dict.fromkeys(get_args(Sharding), 0)
    for module in adapter.modules.values():
        layer, piece = host.find(adapter.name, module)
        plain = as_plain(module)
        for sharding in numel:
            numel[sharding] += layout_for(adapter.name, plain, layer, piece, sharding).numel
    return numel


def stored_numel(adapter: Adapter) -> int:
    """Numbers in the adapter's low-rank factors, block-diagonal ones packed: its trained parameters."""
    tensors = [factor.tensor for module in adapter.modules.values() for factor in (module.a, module.b)]
    return sum(rows * columns for rows, columns in (tensor.shape for tensor in tensors))
