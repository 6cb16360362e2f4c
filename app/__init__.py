"""A Gradio page that shows block-diagonal LoRA live: it talks HTTP to one or two running servers and to nothing else."""
