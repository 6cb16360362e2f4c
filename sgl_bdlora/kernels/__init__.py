"""LoRA arithmetic: a batch's segments, the operations on them, and the back end that SGLang sees."""
