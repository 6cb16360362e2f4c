"""The servers that are compared: SGLang's own LoRA, and ours with the same adapters or with block-diagonal ones."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.files import MODULES

ARMS = {
    "stock": "SGLang's own LoRA (csgmv), plain adapters",
    "plain": "ours, the same plain adapters",
    "block-diagonal": "ours, block-diagonal adapters of as many parameters",
}


@dataclass(frozen=True)
class Setup:
    """What all arms share. slots: adapters that the device holds. extra: further arguments for every server."""

    model: Path
    tp: int
    dtype: str
    slots: int
    rank: int
    max_running: int
    device: str
    extra: str = ""
    extra_stock: str = ""
    extra_ours: str = ""


def command(
    arm: str, setup: Setup, adapters: list[Path], pool_bytes: int, port: int
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of an arm's server; every adapter is registered at its start."""
    words = [
        *("--model-path", str(setup.model), "--skip-tokenizer-init", "--dtype", setup.dtype, "--tp-size", str(setup.tp)),
        *("--host", "127.0.0.1", "--port", str(port), "--max-running-requests", str(setup.max_running)),
        *("--max-loras-per-batch", str(setup.slots)),
        "--lora-paths", *(f"{name(i)}={folder}" for i, folder in enumerate(adapters)),
    ]  # fmt: skip
    if setup.device == "cpu":
        words += ["--max-total-tokens", "32768"]
    else:
        words += ["--grammar-backend", "none", "--attention-backend", "triton"]
    stock = arm == "stock"
    if stock:
        words += ["--max-lora-rank", str(setup.rank), "--lora-target-modules", *MODULES]
    else:
        words += ["--lora-pool-gb", repr(pool_bytes / 2**30)]
    # What comes later wins.
    words += shlex.split(setup.extra) + shlex.split(setup.extra_stock if stock else setup.extra_ours)
    if not stock:
        return [sys.executable, "-m", "sgl_bdlora.launch_server", *words], {}
    if setup.device == "cpu":
        # SGLang's LoRA asks for pinned memory, which needs a GPU; our launcher takes that out and leaves its LoRA alone.
        return [sys.executable, "-m", "sgl_bdlora.launch_server", "--lora-backend", "torch_native", *words], {}
    words = ["--enable-lora", "--lora-backend", "csgmv", *words]
    return [sys.executable, "-m", "sglang.launch_server", *words], {"SGLANG_PLUGINS": "none"}


def name(i: int) -> str:
    return f"adapter-{i:02d}"
