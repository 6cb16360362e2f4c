"""Block-diagonal LoRA serving for SGLang."""
