"""The cluster's configuration: a YAML file into one frozen dataclass; errors name the field, its value and the fix."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgl_bdlora.cluster.policies import NAMES

DEVICES = ("auto", "gpu", "cpu")


class ConfigError(ValueError):
    """The message names the field, its value and the fix."""


@dataclass(frozen=True)
class Replicas:
    """count replicas of gpus GPUs each. Bandwidths in GB/s: pcie from a replica's host memory to its GPUs, peer from another's host memory,
    disk from storage. install_s and install_s_per_gb: how long a replica answers nobody because it reads, checks and lays out an adapter
    that is new to it. ahead: a batch is put together while the one before it runs, as in SGLang, so that a request waits for one more."""

    count: int = 8
    gpus: int = 2
    pool_gib: float = 16.0
    host_gib: float = 128.0
    max_rank: int = 128
    max_running: int = 64
    prefill_tokens: int = 8192
    pcie_gb_s: float = 40.0
    peer_gb_s: float = 10.0
    disk_gb_s: float = 2.0
    install_s: float = 0.0
    install_s_per_gb: float = 0.0
    ahead: bool = False


@dataclass(frozen=True)
class Adapters:
    """ranks: rank to its part of the adapters; mib_per_rank: weights of one rank row through the model, 5.0 for Llama-3.1-8B in 16 bits."""

    count: int = 200
    ranks: dict[int, float] = field(default_factory=lambda: dict.fromkeys((8, 16, 32, 64, 128), 1.0))
    mib_per_rank: float = 5.0


@dataclass(frozen=True)
class Slo:
    """attainment: the part of all requests that has to have its first token in ttft_ms and a mean time per further token of tpot_ms."""

    ttft_ms: float = 1000.0
    tpot_ms: float = 30.0
    attainment: float = 0.99


@dataclass(frozen=True)
class PolicyConfig:
    """A plan every period_s with at most max_moves new (adapter, replica) pairs; ema and windows: see demand.py; slack: how far a replica
    may be above the mean load; headroom: part of a replica to keep free; shed: refuse what the replicas cannot serve within the SLO."""

    name: str = "rank-packing"
    period_s: float = 10.0
    max_moves: int = 64
    ema: float = 0.3
    windows: int = 5
    slack: float = 0.1
    headroom: float = 0.0
    shed: bool = False


@dataclass(frozen=True)
class Workload:
    """rate: requests a second over the whole cluster, arrivals gamma with coefficient of variation cv; popularity Zipf with exponent zipf,
    its order rotated by rotate_by of the adapters every rotate_s (0: never). flash_x: one cold adapter gets so many times the mean
    adapter's rate from flash_s for flash_for_s. diurnal: the rate swings by this part of it, once every
    diurnal_s. Lengths are log-normal."""

    rate: float = 80.0
    duration_s: float = 120.0
    warmup_s: float = 20.0
    zipf: float = 0.8
    cv: float = 1.0
    rotate_s: float = 0.0
    rotate_by: float = 0.1
    flash_x: float = 0.0
    flash_s: float = 60.0
    flash_for_s: float = 30.0
    diurnal: float = 0.0
    diurnal_s: float = 600.0
    prompt_median: float = 1020.0
    prompt_sigma: float = 0.5
    output_median: float = 129.0
    output_sigma: float = 1.0
    max_prompt: int = 8192
    max_output: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Failure:
    """A replica, by number, that dies at at_s and is replaced back_s later."""

    replica: int
    at_s: float
    back_s: float = 60.0


@dataclass(frozen=True)
class Serve:
    """The real cluster; the simulation does not read it.

    model, adapter_root: the base model's directory, and the one whose subdirectories are the adapters, at the same place on every
    machine. name: of the base model to clients, by default its directory's. address: of a running Ray cluster; empty starts one here.
    device: gpu, cpu or auto. cpus: what Ray reserves for a replica. arguments: more words for each server's command line.
    max_replicas: replicas are added up to this, and taken away down to replicas.count when the demand has not needed them for
    downscale_s (0: never). queue: requests that may wait for a place in a replica; more get 429. first_byte_s: a request without a
    first token, or one that is not streamed without its answer, by then gets 503. silence_s: a stream that says nothing for so long is
    ended. start_s: for all replicas to start. store_gib: host memory for adapters in Ray's object store.
    """

    model: str = ""
    adapter_root: str = ""
    name: str = ""
    address: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    cpus: float = 1.0
    arguments: tuple[str, ...] = ()
    max_replicas: int = 0
    downscale_s: float = 300.0
    queue: int = 256
    first_byte_s: float = 120.0
    silence_s: float = 120.0
    start_s: float = 900.0
    store_gib: float = 4.0


@dataclass(frozen=True)
class ClusterConfig:
    """costs: a model of default_costs.json (bdlora, bdlora-served, csgmv, padded, no-lora) or the path of a JSON file."""

    replicas: Replicas = field(default_factory=Replicas)
    adapters: Adapters = field(default_factory=Adapters)
    slo: Slo = field(default_factory=Slo)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    workload: Workload = field(default_factory=Workload)
    failures: tuple[Failure, ...] = ()
    costs: str = "bdlora"
    serve: Serve = field(default_factory=Serve)

    def __post_init__(self):
        _check(self)

    def with_(self, **changes: Any) -> ClusterConfig:
        """A copy with fields replaced: with_(replicas={"count": 4}, costs="padded")."""
        new = {
            k: dataclasses.replace(getattr(self, k), **v) if isinstance(v, dict) else v for k, v in changes.items()
        }  # fmt: skip
        return dataclasses.replace(self, **new)


def load_config(path: str | Path) -> ClusterConfig:
    """Raises ConfigError."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; --config names a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    return from_dict({} if data is None else data)


def from_dict(data: Any) -> ClusterConfig:
    """Raises ConfigError for a field that is unknown, has a value of another type, or one out of range."""
    return _build(ClusterConfig, data, "")


def _build(kind: type, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{path or 'the file'} has to be a mapping of fields, got {data!r}")
    hints = typing.get_type_hints(kind)
    given = {}
    for key, value in data.items():
        here = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(f"{here} = {value!r}: there is no such field; known ones: {', '.join(hints)}")
        given[key] = _value(hints[key], value, here)
    missing = [
        f.name for f in dataclasses.fields(kind)
        if f.name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is missing; give it a value")
    return kind(**given)


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path} = {value!r} has to be a list")
        return tuple(_value(typing.get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not value:
            raise ConfigError(f"{path} = {value!r} has to map each rank to its part, such as {{8: 0.9, 128: 0.1}}")
        keys, values = typing.get_args(hint)
        return {_value(keys, k, f"{path} key"): _value(values, v, f"{path}[{k}]") for k, v in value.items()}
    wanted = {int: int, float: (int, float), str: str, bool: bool}[hint]
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
        raise ConfigError(f"{path} = {value!r} has to be {words[hint]}")
    return float(value) if hint is float else value


# Least value of a field and whether it may be equal to it; all others are at least 0.
_ABOVE_ZERO = {
    "replicas.pool_gib", "replicas.host_gib", "replicas.pcie_gb_s", "replicas.peer_gb_s", "replicas.disk_gb_s",
    "adapters.mib_per_rank", "slo.ttft_ms", "slo.tpot_ms", "policy.period_s", "policy.ema", "workload.rate",
    "workload.duration_s", "workload.cv", "workload.diurnal_s", "workload.prompt_median", "workload.output_median",
    "serve.cpus", "serve.first_byte_s", "serve.silence_s", "serve.start_s", "serve.store_gib",
}  # fmt: skip
_AT_LEAST_ONE = {
    "replicas.count", "replicas.gpus", "replicas.max_rank", "replicas.max_running", "replicas.prefill_tokens",
    "adapters.count", "workload.max_prompt", "workload.max_output", "serve.port", "serve.queue",
}  # fmt: skip
_AT_MOST = {
    "slo.attainment": 1, "policy.ema": 1, "workload.rotate_by": 1, "workload.diurnal": 1, "policy.headroom": 0.99,
    "replicas.count": 1024, "adapters.count": 100_000, "serve.port": 65535, "serve.max_replicas": 1024,
}  # fmt: skip


def _check(config: ClusterConfig) -> None:
    for section in ("replicas", "adapters", "slo", "policy", "workload", "serve"):
        part = getattr(config, section)
        for f in dataclasses.fields(part):
            value, name = getattr(part, f.name), f"{section}.{f.name}"
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not value < float("inf"):
                raise ConfigError(f"{name} = {value} has to be a finite number")
            if name in _ABOVE_ZERO and not value > 0:
                raise ConfigError(f"{name} = {value} has to be above 0")
            if name in _AT_LEAST_ONE and value < 1:
                raise ConfigError(f"{name} = {value} has to be at least 1")
            if value < 0:
                raise ConfigError(f"{name} = {value} has to be at least 0")
            if value > _AT_MOST.get(name, value):
                raise ConfigError(f"{name} = {value} has to be at most {_AT_MOST[name]}")
    if config.serve.device not in DEVICES:
        raise ConfigError(f"serve.device = {config.serve.device!r} is not one of {', '.join(DEVICES)}")
    if 0 < config.serve.max_replicas < config.replicas.count:
        raise ConfigError(
            f"serve.max_replicas = {config.serve.max_replicas} has to be at least replicas.count = {config.replicas.count}, or 0"
        )
    if config.policy.name not in NAMES:
        raise ConfigError(f"policy.name = {config.policy.name!r} is not one of {', '.join(NAMES)}")
    if config.policy.windows < 2:
        raise ConfigError(f"policy.windows = {config.policy.windows} has to be at least 2, for a trend")
    if config.workload.warmup_s >= config.workload.duration_s:
        raise ConfigError(
            f"workload.warmup_s = {config.workload.warmup_s:g} has to be below workload.duration_s = {config.workload.duration_s:g}"
        )
    for rank, part in config.adapters.ranks.items():
        if rank < 1 or not 0 <= part < float("inf"):
            raise ConfigError(f"adapters.ranks[{rank}] = {part}: ranks are at least 1 and parts at least 0")
    if not sum(config.adapters.ranks.values()) > 0:
        raise ConfigError(f"adapters.ranks = {config.adapters.ranks}: at least one part has to be above 0")
    for i, failure in enumerate(config.failures):
        if not 0 <= failure.replica < config.replicas.count:
            raise ConfigError(
                f"failures[{i}].replica = {failure.replica}: there are replicas 0 to {config.replicas.count - 1}"
            )  # fmt: skip
        if failure.at_s < 0 or failure.back_s < 0:
            raise ConfigError(f"failures[{i}]: at_s and back_s have to be at least 0")
