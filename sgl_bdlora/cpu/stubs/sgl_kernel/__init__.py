"""Stand-in for SGLang's kernel package on a machine where it cannot be imported.

SGLang imports these names at start-up on a CPU. Served with PyTorch's operators it calls none of them; one that is
called says so.
"""

__version__ = "0+sgl_bdlora.stub"

_NAMES = (
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "causal_conv1d_fwd",
    "causal_conv1d_update",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "gptq_gemm",
    "gptq_shuffle",
    "rmsnorm",
    "verify_tree_greedy_cpu",
)


def _missing(name):
    def kernel(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} is not available on this CPU-only machine: this feature needs a GPU, or SGLang's CPU "
            "build of sgl_kernel (see https://docs.sglang.ai/platforms/cpu_server.html)"
        )

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


for _name in _NAMES:
    globals()[_name] = _missing(_name)

__all__ = list(_NAMES)
