"""Is a block-diagonal adapter as good as the LoRA that it replaces? docs/quality.md has the answer, docs/training.md the commands."""
