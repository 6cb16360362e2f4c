"""Our options: added to SGLang's command line, and carried to every process of the server by one environment variable."""

import argparse
import dataclasses
import json
import os
from dataclasses import dataclass

ENV = "SGL_BDLORA_OPTIONS"
BACKEND = "bdlora"

# Without --max-lora-rank and without adapters at start nothing bounds the rank but the pool's bytes; SGLang wants a number.
DEFAULT_MAX_RANK = 1024


@dataclass(frozen=True)
class Options:
    """Options of the bdlora back end.

    lora_pool_gb: device memory per rank for adapter weights, in GiB.
    """

    lora_pool_gb: float = 1.0

    def __post_init__(self):
        if not self.lora_pool_gb > 0:
            raise ValueError(f"--lora-pool-gb has to be positive, got {self.lora_pool_gb}")

    @property
    def lora_pool_bytes(self) -> int:
        return int(self.lora_pool_gb * 2**30)

    def publish(self) -> None:
        """Hand these options to this process and to those it starts."""
        os.environ[ENV] = json.dumps(dataclasses.asdict(self))


def options() -> Options:
    """The options in force in this process."""
    return Options(**json.loads(os.environ.get(ENV, "{}")))


def names() -> set[str]:
    return {field.name for field in dataclasses.fields(Options)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("block-diagonal LoRA (sgl-bdlora), with --lora-backend bdlora")
    group.add_argument(
        "--lora-pool-gb",
        type=float,
        default=None,
        metavar="GIB",
        help="Device memory per tensor-parallel rank for adapter weights, in GiB. Adapters take only what the rank's pieces "
        f"weigh; the least recently used ones are evicted when it is full. Default: {Options.lora_pool_gb}.",
    )


def capture(args: argparse.Namespace) -> None:
    """Publish the options that were given on the command line; others keep their value."""
    given = {name: getattr(args, name) for name in names() if getattr(args, name, None) is not None}
    if given:
        dataclasses.replace(options(), **given).publish()
