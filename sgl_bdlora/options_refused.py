"""Options and variables that do not work with LoRA here: one line and the way out, before a model is loaded."""

import os

from sgl_bdlora import config


def refuse_environment() -> None:
    """End the process when a variable would replace what is patched."""
    if os.environ.get("SGLANG_EXPERIMENTAL_LORA_OPTI", "").lower() in ("1", "true", "yes"):
        raise SystemExit(
            "sgl-bdlora: SGLANG_EXPERIMENTAL_LORA_OPTI replaces the layers that this plugin extends; unset it."
        )


def refuse_unconfined(server_args) -> None:
    """SGLang's own back ends read any path: with one of them --adapter-root would promise what nothing keeps."""
    if config.options().adapter_root is not None and server_args.lora_backend != config.BACKEND:
        raise SystemExit(
            f"sgl-bdlora: --adapter-root works with --lora-backend {config.BACKEND} only, not {server_args.lora_backend}; "
            "leave it out, or change the back end."
        )


def refuse_unsupported(server_args) -> None:
    """End the process when an option would make LoRA wrong, or the start endless; names the option and the way out."""
    # SGLang takes adapters at start for LoRA unless told otherwise.
    lora = server_args.enable_lora or (server_args.enable_lora is None and server_args.lora_paths)
    if server_args.lora_backend != config.BACKEND or not lora:
        return
    for option, given in (
        ("--pp-size above 1", server_args.pp_size > 1),
        ("--enable-dp-attention", server_args.enable_dp_attention),
        # SGLang itself refuses every other algorithm together with LoRA.
        ("--speculative-algorithm", server_args.speculative_algorithm not in (None, "NGRAM")),
        ("--enable-lora-overlap-loading", server_args.enable_lora_overlap_loading),
        # It asks lm_head for rows of its own choice (logits_processor.py:compute_logprobs_for_multi_item_scoring).
        ("--enable-mis", server_args.enable_mis),
        # It cannot tell what kernels with inline assembly write, takes every input for written, and compiles each batch size for minutes.
        ("--enable-torch-compile", server_args.enable_torch_compile),
    ):
        if given:
            raise SystemExit(
                f"sgl-bdlora: {option} does not work with --lora-backend {config.BACKEND} yet. Change it, or serve with "
                "--lora-backend csgmv."
            )
