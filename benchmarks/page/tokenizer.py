"""A tokenizer for random models: the page sends words."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

# Ids 0 to 2. Special tokens are found inside words, so that none may be the beginning of another.
UNKNOWN, BEGIN, END = SPECIAL = ("<unk>", "<s>", "</s>")


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Into a model's folder: token i is the word that text_of writes for it, so that a prompt has exactly as many tokens as wanted."""
    tokenizer = Tokenizer(models.WordLevel({_word(i): i for i in range(vocab)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNKNOWN, "bos_token": BEGIN, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def text_of(ids: Sequence[int]) -> str:
    """The prompt of these tokens."""
    return " ".join(_word(i) for i in ids)


def _word(token: int) -> str:
    return SPECIAL[token] if token < len(SPECIAL) else f"w{token}"
