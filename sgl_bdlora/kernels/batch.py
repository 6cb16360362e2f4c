"""Which rows of a batch belong to which adapter."""

from dataclasses import dataclass

import torch

from sgl_bdlora.memory_pool import Resident


@dataclass(frozen=True)
class Segment:
    """All rows of one adapter. rows: a slice when they are consecutive (no copy is needed), else an int64 index tensor."""

    adapter: Resident
    rows: slice | torch.Tensor


@dataclass(frozen=True)
class Batch:
    """The adapted rows of one forward pass; base-only rows are in no segment and cost nothing."""

    segments: tuple[Segment, ...]
    tokens: int


def group_rows(adapters: list[Resident | None], lengths: list[int], device: torch.device) -> Batch:
    """Group a batch's rows by adapter.

    adapters: per request, None for the base model. lengths: rows of each request, in the same order.
    """
    spans: dict[int, tuple[Resident, list[tuple[int, int]]]] = {}
    start = 0
    for adapter, length in zip(adapters, lengths, strict=True):
        if adapter is not None and length:
            runs = spans.setdefault(id(adapter), (adapter, []))[1]
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], start + length)
            else:
                runs.append((start, start + length))
        start += length
    return Batch(tuple(Segment(adapter, _rows(runs, device)) for adapter, runs in spans.values()), start)


def _rows(runs: list[tuple[int, int]], device: torch.device) -> slice | torch.Tensor:
    if len(runs) == 1:
        return slice(*runs[0])
    return torch.cat([torch.arange(*run) for run in runs]).to(device, non_blocking=True)
