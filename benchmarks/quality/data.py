"""Prepared rows: token ids on disk, batches in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """One part of a task. ids (rows, longest) int64, padded on the right; text, length (rows,): where the text and the row end.

    A row is: a start token, the text, the question, and one token for the class. Text tokens count for perplexity, the question for
    nothing, the class token for accuracy. classes: the tokens of the task's classes.
    """

    ids: torch.Tensor
    text: torch.Tensor
    length: torch.Tensor
    label: torch.Tensor
    classes: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: torch.Tensor) -> Rows:
        """Those rows, without the columns that none of them uses."""
        longest = int(self.length[rows].max())
        return Rows(self.ids[rows, :longest], self.text[rows], self.length[rows], self.label[rows], self.classes)

    def counted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (rows, longest): positions whose NEXT token is a text token, and those whose next token is the class."""
        after = torch.arange(1, self.ids.shape[1] + 1)
        return after < self.text[:, None], after == self.length[:, None] - 1


def encode(tokenizer, texts: list[tuple[str, int]], question: str, classes: tuple[str, ...], max_tokens: int) -> Rows:
    """Tokenise. Raises ValueError where two classes begin with the same token or one has several."""
    answers = [tokenizer(f" {name}", add_special_tokens=False).input_ids for name in classes]
    if any(len(ids) != 1 for ids in answers) or len({ids[0] for ids in answers}) < len(classes):
        raise ValueError(f"classes {classes} are not single, different tokens: {answers}")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    asked = tokenizer(question, add_special_tokens=False).input_ids
    rows, ends = [], []
    for text, label in texts:
        ids = [start, *tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_tokens).input_ids]
        ends.append(len(ids))
        rows.append(ids + asked + answers[label])
    longest = max(map(len, rows))
    return Rows(
        torch.tensor([row + [start] * (longest - len(row)) for row in rows]),
        torch.tensor(ends),
        torch.tensor([len(row) for row in rows]),
        torch.tensor([label for _, label in texts]),
        torch.tensor([ids[0] for ids in answers]),
    )


def save(folder: Path, task: str, parts: dict[str, Rows]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    narrow = torch.uint16 if all(int(rows.ids.max()) < 2**16 for rows in parts.values()) else torch.int32
    tensors = {}
    for name, rows in parts.items():
        tensors |= {f"{name}.ids": rows.ids.to(narrow), f"{name}.classes": rows.classes.int()}
        tensors |= {f"{name}.{key}": getattr(rows, key).short() for key in ("text", "length", "label")}
    save_file(tensors, folder / f"{task}.safetensors")


def load(folder: Path, task: str) -> dict[str, Rows]:
    with safe_open(folder / f"{task}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key).long() for key in file.keys()}  # noqa: SIM118 - not a dictionary
    names = dict.fromkeys(key.partition(".")[0] for key in tensors)
    return {
        name: Rows(*(tensors[f"{name}.{key}"] for key in ("ids", "text", "length", "label", "classes")))
        for name in names
    }


def tasks_in(folder: Path) -> list[str]:
    """The tasks that `prepare` wrote, in its order."""
    return json.loads((folder / "prepared.json").read_text())["tasks"]


def batches(rows: Rows, steps: int, size: int, seed: int) -> Iterator[Rows]:
    """`steps` batches of `size` rows, epoch after epoch in orders that only the seed decides."""
    random, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(rows), generator=random)])
        yield rows.take(order[:size])
        order = order[size:]
