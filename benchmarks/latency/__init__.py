"""How long a decode step and a first token take under each way to serve LoRA."""
