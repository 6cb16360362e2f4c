"""Is a block-diagonal adapter as good as the LoRA that it replaces? docs/training.md has the commands."""
