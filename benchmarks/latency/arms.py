"""Arms, and the servers that they run on: arms that differ only in what is asked for share a server."""

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.files import MODULES

ARMS = {
    "no-lora": "SGLang without LoRA",
    "stock": "SGLang's own LoRA (csgmv), plain adapters",
    "stock-base-only": "the same server, requests for the base model only",
    "replicated": "ours, plain adapters whole where a layer does not split them",
    "s-lora": "ours, plain adapters fully sharded as in S-LoRA",
    "block-diagonal": "ours, block-diagonal adapters",
    "loaded-base-only": "ours with adapters loaded, requests for the base model only",
}
# Adapters that an arm's server has: plain ones, or block-diagonal ones.
PLAIN = ("stock", "stock-base-only", "replicated", "s-lora")
BLOCK_DIAGONAL = ("block-diagonal", "loaded-base-only")
BASE_ONLY = ("no-lora", "stock-base-only", "loaded-base-only")
AGAIN = "no-lora again"
# Server -> its arms.
SERVERS = {
    "no-lora": ("no-lora",),
    "stock": ("stock", "stock-base-only"),
    "ours": ("replicated", "block-diagonal", "loaded-base-only"),
    "s-lora": ("s-lora",),
    # The first server once more: what the machine's own drift is.
    AGAIN: ("no-lora",),
}


@dataclass(frozen=True)
class Setup:
    """What all servers share.

    max_tokens: of prompts that are computed at once. pool_bytes: of our servers, per rank. modules: that adapters change. kv_tokens: of the
    largest batch. together: other servers are on the same GPUs. extra: further arguments.
    """

    model: Path
    dtype: str
    tp: int
    device: str
    max_batch: int
    max_adapters: int
    max_rank: int
    max_tokens: int
    pool_bytes: int
    modules: tuple[str, ...] = MODULES
    kv_tokens: int = 0
    together: bool = False
    extra: tuple[str, ...] = ()


def command(server: str, setup: Setup, adapters: dict[str, Path], port: int) -> tuple[list[str], dict[str, str]]:
    """Command line and environment. adapters: name -> directory, loaded at start."""
    words = [
        *("--model-path", str(setup.model), "--skip-tokenizer-init", "--dtype", setup.dtype, "--tp-size", str(setup.tp)),
        *("--host", "127.0.0.1", "--port", str(port), "--max-running-requests", str(setup.max_batch)),
        *("--chunked-prefill-size", str(setup.max_tokens), "--max-prefill-tokens", str(setup.max_tokens)),
        "--disable-radix-cache",
    ]  # fmt: skip
    if setup.device == "cpu":
        words += ["--max-total-tokens", "32768"]
    else:
        words += ["--grammar-backend", "none", "--cuda-graph-max-bs-decode", str(setup.max_batch)]
        # Capturing up to 65,536 tokens took three minutes and 9 GB.
        words += ["--cuda-graph-max-bs-prefill", "4096"]
        if setup.together:
            # Others take memory while this one measures what there is.
            words += ["--mem-fraction-static", "0.8", "--max-total-tokens", str(max(32768, setup.kv_tokens + 4096))]
    if adapters or setup.device == "cpu":
        words += ["--max-loras-per-batch", str(setup.max_adapters), "--max-lora-rank", str(setup.max_rank)]
        words += ["--lora-target-modules", *setup.modules]
    if adapters:
        words += ["--lora-paths", *(f"{name}={folder}" for name, folder in adapters.items())]
    words += setup.extra
    # Memory differs between GPUs while other servers start there.
    environment = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"} if setup.together else {}
    if server in ("ours", "s-lora"):
        sharding = "s-lora" if server == "s-lora" else "replicated"
        ours = ["--lora-pool-gb", repr(setup.pool_bytes / 2**30), "--lora-sharding", sharding]
        return [sys.executable, "-m", "sgl_bdlora.launch_server", *words, *ours], environment
    if setup.device == "cpu":
        # Our launcher brings what SGLang needs on a CPU, and leaves its LoRA alone. It always enables LoRA: this only tries the benchmark.
        return [sys.executable, "-m", "sgl_bdlora.launch_server", "--lora-backend", "torch_native", *words], {}
    lora = ["--enable-lora", "--lora-backend", "csgmv"] if adapters else []
    return [sys.executable, "-m", "sglang.launch_server", *lora, *words], {**environment, "SGLANG_PLUGINS": "none"}
