"""Random base models in float32: real architectures, small enough that a server answers within milliseconds.

Sizes: hidden 128, 8 query heads of 16, intermediate 256, 2 layers, 512 tokens. Every split dimension divides by
8 blocks x 4 ranks but the k and v projections of models with 2 kv heads, which TP 4 must replicate, and mistral's
vocabulary of 500, which SGLang pads. The Gemmas and qwen2 tie their embeddings.
"""

from pathlib import Path

from .tokenizer import write_tokenizer

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")
_SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(family: str):
    import transformers as tf

    if family == "llama":
        return tf.LlamaConfig(**_SIZES, num_key_value_heads=4)
    if family == "qwen2":
        return tf.Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    if family == "qwen3":
        return tf.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=32)
    if family == "mistral":
        return tf.MistralConfig(**{**_SIZES, "vocab_size": 500}, num_key_value_heads=8, sliding_window=None)
    if family == "gemma2":
        # SGLang's torch_native attention has no logit cap (layers/attention/torch_native_backend.py), so there is none.
        return tf.Gemma2Config(
            **_SIZES, num_key_value_heads=4, head_dim=16, query_pre_attn_scalar=16, sliding_window=24,
            attn_logit_softcapping=None, final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh",
        )  # fmt: skip
    if family == "gemma3":
        return tf.Gemma3TextConfig(
            **_SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
    raise ValueError(f"unknown family {family!r}, known: {', '.join(FAMILIES)}")


def write_model(family: str, folder: Path) -> Path:
    """Write model, configuration and tokenizer of ``family`` to ``folder`` and return it."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(family)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random = torch.Generator().manual_seed(FAMILIES.index(family))
    for name, weight in model.named_parameters():
        mean, std = _spread(family, name, weight)
        weight.data.normal_(mean, std, generator=random)
    model.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder


def _spread(family: str, name: str, weight) -> tuple[float, float]:
    """Mean and standard deviation that keep activations near 1 and give logits a spread of about 2.

    Norms and biases get values far from the ones and zeros of a fresh model, which would hide a missing term.
    Gemma ties its embeddings and scales them by sqrt(hidden): small ones keep it from repeating the token it has read,
    and the last norm brings the logits back up. Its norms scale by 1 + weight, the others by weight.
    """
    gemma = family.startswith("gemma")
    if "embed_tokens" in name or "lm_head" in name:
        return 0.0, 0.03 if gemma else 0.2
    if weight.dim() > 1:
        return 0.0, weight.shape[1] ** -0.5
    if name == "model.norm.weight" and gemma:
        return 5.0, 0.3
    return float("norm" in name and not gemma), 0.3
