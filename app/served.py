"""What a server says about itself: `GET /bdlora/info` and `GET /model_info` as plain values."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter. Lists are by tensor-parallel rank; plain_bytes: sharding -> bytes, were it plain of the same rank."""

    name: str
    path: str
    kind: str
    rank: int
    nblocks: int
    parameters: int
    local_rank: int
    bytes_per_rank: tuple[int, ...]
    plain_bytes: dict[str, tuple[int, ...]]
    collectives: int
    resident: bool
    running: int
    waiting: int

    @property
    def plain(self) -> bool:
        return self.kind == "plain"

    @property
    def describe(self) -> str:
        """E.g. "block-diagonal, rank 3"."""
        return f"{self.kind}, rank {self.rank}"


@dataclass(frozen=True)
class Slice:
    """One adapter module of a layer: whole sizes, and those of rank 0."""

    name: str
    inputs: int
    outputs: int
    local_inputs: int
    local_outputs: int


@dataclass(frozen=True)
class Layer:
    """Linear layers of one name and shape. parallelism: "column", "row", "replicated", "embedding" or "head"."""

    name: str
    parallelism: str
    count: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Served:
    """One engine. sharding: of its plain adapters. device: "cpu" or "cuda"."""

    model: str
    tp: int
    sharding: str
    dtype: str
    device: str
    hardware: str
    cores: int
    version: str
    commit: str | None
    prompt_format: str
    adapters: tuple[Adapter, ...]
    layers: tuple[Layer, ...]
    pool_bytes: int
    pool_used_bytes: int

    def adapter(self, name: str) -> Adapter | None:
        return next((a for a in self.adapters if a.name == name), None)

    @property
    def running(self) -> int:
        return sum(a.running + a.waiting for a in self.adapters)

    @property
    def where(self) -> str:
        """The machine, e.g. "2 ranks on NVIDIA H200"."""
        ranks = "1 rank" if self.tp == 1 else f"{self.tp} ranks"
        cores = f" ({self.cores} cores)" if self.device == "cpu" else ""
        return f"{ranks} on {self.hardware}{cores}"


def parse(info: dict[str, Any], model_info: dict[str, Any]) -> Served:
    """Raises KeyError, TypeError or ValueError where the answers are not what a server of this version sends."""
    origin = info["origin"]
    return Served(
        model=str(model_info["model_path"]).rstrip("/").rpartition("/")[2],
        tp=info["tp_size"],
        sharding=info["lora_sharding"],
        dtype=info["dtype"],
        device=origin["device"],
        hardware=origin["name"],
        cores=origin["cores"],
        version=origin["version"],
        commit=origin["commit"],
        prompt_format=info["prompt_format"],
        adapters=tuple(sorted((_adapter(a) for a in info["adapters"]), key=lambda a: a.name)),
        layers=tuple(
            Layer(entry["name"], entry["parallelism"], entry["count"], tuple(Slice(**s) for s in entry["slices"]))
            for entry in info["model_layers"]
        ),
        pool_bytes=max(info["pool"]["bytes"]),
        pool_used_bytes=max(info["pool"]["used_bytes"]),
    )


def _adapter(entry: dict[str, Any]) -> Adapter:
    return Adapter(
        name=entry["name"],
        path=entry["path"],
        kind=entry["kind"],
        rank=entry["rank"],
        nblocks=entry["nblocks"],
        parameters=entry["parameters"],
        local_rank=max((rank for ranks in entry["local_ranks"] for rank in ranks.values()), default=0),
        bytes_per_rank=tuple(entry["host_bytes"]),
        plain_bytes={name: tuple(ranks) for name, ranks in entry["plain_bytes"].items()},
        collectives=entry["collectives_per_step"],
        resident=entry["resident"],
        running=entry["requests_running"],
        waiting=entry["requests_waiting"],
    )
