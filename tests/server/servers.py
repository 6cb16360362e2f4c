"""Which servers the tests run on. The default suite starts the ones in DEFAULT; the rest of the matrix is slow."""

import pytest
from harness import Served
from zoo import FAMILIES

# Prompts longer than 32 tokens are prefilled in chunks.
LLAMA = Served("llama", 2, ("--chunked-prefill-size", "32"))
# Fewer kv heads (2) than ranks, and a pool of half a MiB a rank that holds only some of the adapters at a time.
# ADAPTERS stands for the directory that the zoo's adapters are in.
QWEN3 = Served("qwen3", 4, ("--lora-pool-gb", "0.0005", "--adapter-root", "ADAPTERS"))
# TENANTS stands for the file of tenants.yaml; the harness sends the administrator's key.
ADMIN_KEY = "administrator"
QWEN2 = Served(
    "qwen2",
    1,
    (
        *("--tenants", "TENANTS", "--admin-api-key", ADMIN_KEY, "--adapter-root", "ADAPTERS"),
        *("--enable-metrics", "--log-requests", "--log-requests-level", "0"),
    ),
)
# Prompt log-probabilities are computed for at most 7 rows of lm_head at a time.
S_LORA = Served(
    "gemma3",
    2,
    ("--lora-sharding", "s-lora"),
    (("SGLANG_ENABLE_LOGPROB_CHUNK", "1"), ("SGLANG_LOGPROB_CHUNK_SIZE", "7")),
)
DEFAULT = (LLAMA, QWEN3, QWEN2, S_LORA)

# Computes with the GPU's kernels, on a machine that has one too without it: seconds a step.
_INTERPRETED = (("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", ""))
KERNELS = (Served("llama", 2, (), _INTERPRETED),)
KERNELS_S_LORA = tuple(Served(family, 2, S_LORA.arguments, _INTERPRETED) for family in ("llama", "qwen3"))

_RUN = {(served.family, served.tp) for served in DEFAULT if served != S_LORA}
# Ranks that do not divide by TP, repeated kv heads, and a single rank, where there is nothing to gather.
SLOW_S_LORA = tuple(
    Served(family, tp, S_LORA.arguments) for family, tp in (("qwen3", 4), ("mistral", 4), ("llama", 2), ("llama", 1))
)
SLOW = (
    *(Served(family, tp) for family in FAMILIES for tp in (1, 2, 4) if (family, tp) not in _RUN),
    *SLOW_S_LORA,
    *KERNELS_S_LORA,
)


def on(*servers: Served):
    """Run the test on each of these servers."""
    parameters = [pytest.param(s, id=str(s), marks=[pytest.mark.slow] if s in SLOW else []) for s in servers]
    return pytest.mark.parametrize("live", parameters, indirect=True, scope="session")
