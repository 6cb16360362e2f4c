"""Our options: added to SGLang's command line, and carried to every process of the server by one environment variable."""

import argparse
import dataclasses
import json
import os
from dataclasses import dataclass

ENV = "BDLORA_OPTIONS"
BACKEND = "bdlora"

SHARDINGS = ("replicated", "s-lora")

# Without --max-lora-rank and without adapters at start nothing bounds the rank but the pool's bytes; SGLang wants a number.
DEFAULT_MAX_RANK = 1024


@dataclass(frozen=True)
class Options:
    """Options of the bdlora back end.

    lora_pool_gb: device memory per rank for adapter weights, in GiB.
    lora_sharding: how plain adapters are split over the ranks; block-diagonal ones are always local.
    adapter_root: the directory that adapters are read from; None for any.
    metrics_max_adapters: adapters with metrics of their own.
    tenants: the file that says who may use which adapters (tenants/); None if every client may use all.
    """

    lora_pool_gb: float = 1.0
    lora_sharding: str = "replicated"
    adapter_root: str | None = None
    metrics_max_adapters: int = 100
    tenants: str | None = None

    def __post_init__(self):
        if self.lora_sharding not in SHARDINGS:
            raise ValueError(f"--lora-sharding has to be one of {', '.join(SHARDINGS)}, got {self.lora_sharding!r}")
        if not self.lora_pool_gb > 0:
            raise ValueError(f"--lora-pool-gb has to be positive, got {self.lora_pool_gb}")
        if self.metrics_max_adapters < 0:
            raise ValueError(f"--metrics-max-adapters must not be negative, got {self.metrics_max_adapters}")
        if self.tenants is not None:
            object.__setattr__(self, "tenants", os.path.abspath(self.tenants))
        if self.adapter_root is not None:
            # Relative to where the server was started, whatever directory a process of it changes to.
            object.__setattr__(self, "adapter_root", os.path.abspath(self.adapter_root))
            if not os.path.isdir(self.adapter_root):
                raise ValueError(f"--adapter-root has to be a directory, got {self.adapter_root!r}")

    @property
    def lora_pool_bytes(self) -> int:
        return int(self.lora_pool_gb * 2**30)

    def publish(self) -> None:
        """Hand these options to this process and to those it starts."""
        os.environ[ENV] = json.dumps(dataclasses.asdict(self))


def options() -> Options:
    """The options in force in this process."""
    return Options(**json.loads(os.environ.get(ENV, "{}")))


# ENV as an Engine of this process published it, and as it was before: what the user said.
_published: str | None = None
_before: str | None = None


def publish_for_engine(**given) -> None:
    """Publish an Engine's options: those given, and the user's for the others, whatever earlier Engines of this process were given."""
    global _published
    Options(**{**_of_user(), **given}).publish()
    _published = os.environ[ENV]


def _of_user() -> dict[str, object]:
    """The options that the environment or a command line gave, none of an Engine's."""
    global _before
    if os.environ.get(ENV) != _published:
        _before = os.environ.get(ENV)
    return json.loads(_before or "{}")


def names() -> set[str]:
    return {field.name for field in dataclasses.fields(Options)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("block-diagonal LoRA (sgl-bdlora), with --lora-backend bdlora")
    group.add_argument(
        "--lora-pool-gb",
        type=_positive,
        default=None,
        metavar="GIB",
        help="Device memory per tensor-parallel rank for adapter weights, in GiB. Adapters take only what the rank's pieces "
        f"weigh; the least recently used ones are evicted when it is full. Default: {Options.lora_pool_gb}.",
    )

    group.add_argument(
        "--lora-sharding",
        choices=SHARDINGS,
        default=None,
        help="How plain (not block-diagonal) adapters are split over the tensor-parallel ranks. replicated: A of column-parallel "
        "and B of row-parallel layers whole on every rank, no collective. s-lora: everything split, with an all-gather or all-reduce "
        f"between shrink and expand, 4 a decoder layer. Block-diagonal adapters are local under both. Default: {Options.lora_sharding}.",
    )
    group.add_argument(
        "--adapter-root",
        type=_directory,
        default=None,
        metavar="DIR",
        help="Read adapters from below this directory only: paths in --lora-paths and /load_lora_adapter that lead out of it, also by "
        "symbolic links, are refused; relative paths start here. Default: any path that the server can read.",
    )
    group.add_argument(
        "--tenants",
        type=_file,
        default=None,
        metavar="FILE",
        help="YAML or JSON file of API keys, each with the adapters that it sees and uses and its limits. Needs --admin-api-key. "
        "Default: every client uses every adapter.",
    )
    group.add_argument(
        "--metrics-max-adapters",
        type=_count,
        default=None,
        metavar="N",
        help='With --enable-metrics: adapters that have series of their own; requests for others count as adapter="other". '
        f"Default: {Options.metrics_max_adapters}.",
    )


def _positive(word: str) -> float:
    value = float(word)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"has to be a positive number of GiB, got {word}")
    return value


def _count(word: str) -> int:
    value = int(word)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {word}")
    return value


def _file(word: str) -> str:
    if not os.path.isfile(word):
        raise argparse.ArgumentTypeError(f"has to be a file, got {word!r}")
    return word


def _directory(word: str) -> str:
    if not os.path.isdir(word):
        raise argparse.ArgumentTypeError(f"has to be a directory, got {word!r}")
    return word


def capture(args: argparse.Namespace) -> None:
    """Publish the options that were given on the command line; others keep their value."""
    given = {name: getattr(args, name) for name in names() if getattr(args, name, None) is not None}
    if given:
        Options(**{**_of_user(), **given}).publish()
