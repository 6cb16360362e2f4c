"""Which rows of a forward pass belong to which adapter, and those adapters' weights side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sgl_bdlora.kernels.stack import StackedLayer, stack_layer
from sgl_bdlora.memory_pool import Resident


class AdapterSet:
    """The adapters of a batch, in a fixed order. Stacks a host layer's weights when it is first asked for them.

    Decode steps keep the same adapters for many tokens, so one set serves many batches.
    """

    def __init__(self, adapters: Sequence[Resident]):
        self.adapters = tuple(adapters)
        self._layers: dict[str, StackedLayer | None] = {}

    def layer(self, path: str, outputs: int) -> StackedLayer | None:
        """The stacked weights of a host layer with `outputs` local outputs; None if no adapter of the set has any there."""
        if path not in self._layers:
            self._layers[path] = stack_layer([adapter.layers.get(path) for adapter in self.adapters], outputs)
        return self._layers[path]


@dataclass(frozen=True)
class Batch:
    """One forward pass. owner: (rows,) int64, each row's adapter as an index into the set, -1 for the base model."""

    adapters: AdapterSet
    owner: torch.Tensor

    def rows(self, start: int, stop: int) -> "Batch":
        """The same adapters, and only these rows."""
        if (start, stop) == (0, len(self.owner)):
            return self
        return replace(self, owner=self.owner[start:stop])


def distinct_adapters(adapters: Sequence[Resident | None]) -> list[Resident]:
    """Every adapter once, in the order of their loads."""
    return sorted({id(a): a for a in adapters if a is not None}.values(), key=lambda a: a.number)


def make_batch(
    adapters: Sequence[Resident | None], lengths: Sequence[int], device: torch.device, last: AdapterSet | None = None
) -> Batch | None:
    """The batch of these requests; None when all are for the base model.

    adapters: per request, None for the base model. lengths: rows of each request. last: the set of the batch before, taken
    again when the adapters are the same.
    """
    distinct = distinct_adapters(adapters)
    if not distinct:
        return None
    if last is None or last.adapters != tuple(distinct):
        last = AdapterSet(distinct)
    index = {id(a): i for i, a in enumerate(distinct)}
    owners = torch.tensor([-1 if a is None else index[id(a)] for a in adapters])
    owner = owners.repeat_interleave(torch.tensor(lengths))
    return Batch(last, owner.to(device, non_blocking=True))
