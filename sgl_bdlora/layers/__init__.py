"""Where LoRA enters the served model."""
