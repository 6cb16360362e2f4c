"""What a served request must answer: Transformers + PEFT in float32, one sequence at a time, no cache, no batching."""

from dataclasses import dataclass
from pathlib import Path

# Largest difference of a token's log-probability from the oracle's, in float32. Never widened to make a test pass.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a sequence: ``all[i]`` is the distribution of token ``i + 1``; shape (tokens - 1, vocab)."""

    ids: tuple[int, ...]
    all: "torch.Tensor"  # noqa: F821

    def of(self, position: int, token: int) -> float:
        """Log-probability of ``token`` at ``position`` (1-based in the sequence: position 0 has no prediction)."""
        return self.all[position - 1, token].item()


class Oracle:
    """Answers of one base model with any of its adapters; adapters are loaded once by directory."""

    def __init__(self, model_dir: Path):
        import torch
        from transformers import AutoModelForCausalLM

        self.model_dir = model_dir
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        self.vocabulary: int = self._model.config.vocab_size
        self._peft = None
        self._names: dict[str, str] = {}
        self._scores: dict[tuple, Score] = {}

    def score(self, ids: list[int], adapter: Path | None = None) -> Score:
        """Score ``ids`` with the adapter in directory ``adapter`` (None: the base model alone)."""
        key = (tuple(ids), adapter and str(adapter))
        if key not in self._scores:
            self._scores[key] = Score(key[0], self._logprobs(ids, adapter))
        return self._scores[key]

    def greedy(self, prompt: list[int], new_tokens: int, adapter: Path | None = None) -> list[int]:
        """The ``new_tokens`` most likely tokens after ``prompt``, taken one after another."""
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(self._logprobs([*ids, 0], adapter)[-1].argmax()))
        return ids[len(prompt) :]

    def _logprobs(self, ids: list[int], adapter: Path | None):
        import torch

        with torch.inference_mode():
            model = self._select(adapter)
            tokens = torch.tensor([ids])
            if adapter is None and self._peft is not None:
                with self._peft.disable_adapter():
                    logits = model(tokens, use_cache=False).logits
            else:
                logits = model(tokens, use_cache=False).logits
            return logits[0, :-1].float().log_softmax(-1)

    def _select(self, adapter: Path | None):
        from peft import PeftModel

        if adapter is None:
            return self._peft or self._model
        if str(adapter) not in self._names:
            name = f"a{len(self._names)}"
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._model, adapter, adapter_name=name)
            else:
                self._peft.load_adapter(adapter, adapter_name=name)
            self._names[str(adapter)] = name
        self._peft.set_adapter(self._names[str(adapter)])
        return self._peft
