"""Training, healing and scoring of a bank's adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from benchmarks.quality.bank import Bank, Tensors
from benchmarks.quality.data import Rows
from sgl_bdlora.adapters.fit import fit_blocks

# Positions whose logits are held at once: 4096 x 49152 x 4 bytes = 0.8 GB.
CHUNK = 4096


@dataclass(frozen=True)
class Score:
    """perplexity: of the texts, a token. accuracy: share of right classes. label_loss: nats of the class token among all tokens.

    correct: for every row whether its class was right.
    """

    perplexity: float
    accuracy: float
    label_loss: float
    correct: list[bool]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then half a cosine down to zero."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(model, bank: Bank, batches: Iterator[Rows], steps: int) -> torch.Tensor:
    """Every adapter on the same batches; returns their last batch's losses (adapters,)."""
    last = torch.zeros(len(bank.arms))
    for step, rows in enumerate(batches):
        hidden = _hidden(model, bank, rows)
        losses = _losses(model, hidden, rows)
        losses.sum().backward()
        bank.step(schedule(step, steps))
        last = losses.detach()
    return last.cpu()


def heal(model, bank: Bank, teacher: Bank, batches: Iterator[Rows], steps: int) -> torch.Tensor:
    """Distil the teacher bank's one adapter into every adapter of `bank`, from the same texts and without their labels."""
    last = torch.zeros(len(bank.arms))
    for step, rows in enumerate(batches):
        with torch.no_grad():
            target = _hidden(model, teacher, rows)
        losses = _losses(model, _hidden(model, bank, rows), rows, target)
        losses.sum().backward()
        bank.step(schedule(step, steps))
        last = losses.detach()
    return last.cpu()


def _hidden(model, bank: Bank | None, rows: Rows) -> torch.Tensor:
    """(adapters, rows, longest, hidden) before the head. Padding stands behind what counts, so causal attention never sees it."""
    times = len(bank.arms) if bank else 1
    ids = rows.ids.repeat(times, 1)
    if bank is None:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    else:
        with bank.on():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.view(times, *rows.ids.shape, -1)


def _losses(model, hidden: torch.Tensor, rows: Rows, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """(adapters,): the mean over the batch's text tokens plus the mean over its class tokens, so that one class weighs as much as a text.

    Of the negative log-likelihood, or with teacher (1, rows, longest, hidden) of the divergence from what the teacher says.
    """
    masks = rows.counted()
    weight = sum(mask / mask.sum() for mask in masks)
    where = weight.nonzero(as_tuple=True)
    inputs, weight, targets = hidden[:, :, :-1][(slice(None), *where)], weight[where], rows.ids[:, 1:][where]
    total = []
    for at in range(0, inputs.shape[1], step := max(1, CHUNK // len(inputs))):
        part = slice(at, at + step)
        if teacher is None:
            each = checkpoint(_likelihood, model.lm_head, inputs[:, part], targets[part], use_reentrant=False)
        else:
            said = teacher[:, :, :-1][(slice(None), *where)][:, part]
            each = checkpoint(_divergence, model.lm_head, inputs[:, part], said, use_reentrant=False)
        total.append((each * weight[part]).sum(dim=1))
    return torch.stack(total).sum(dim=0)


def _likelihood(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden (adapters, positions, width), targets (positions,) -> negative log-likelihoods (adapters, positions)."""
    logits = head(hidden).float()
    return cross_entropy(logits.flatten(0, 1), targets.repeat(len(hidden)), reduction="none").view(len(hidden), -1)


def _divergence(head, hidden: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        target = log_softmax(head(teacher).float(), dim=-1)
    said = log_softmax(head(hidden).float(), dim=-1)
    return kl_div(said, target.expand_as(said), log_target=True, reduction="none").sum(dim=-1)


@torch.inference_mode()
def score(model, bank: Bank | None, rows: Rows, size: int) -> list[Score]:
    """Of every adapter of the bank, or of the base model alone, over all `rows`, `size` a batch."""
    count = len(bank.arms) if bank else 1
    text, label = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    tokens, correct = 0, [[] for _ in range(count)]
    # Rows of like length together; the order of `correct` is the rows' own.
    order = rows.length.argsort(stable=True)
    for at in range(0, len(rows), size):
        part = rows.take(order[at : at + size])
        hidden = _hidden(model, bank, part)
        masks = part.counted()
        where = masks[0].nonzero(as_tuple=True)
        inputs, targets = hidden[:, :, :-1][(slice(None), *where)], part.ids[:, 1:][where]
        for begin in range(0, inputs.shape[1], step := max(1, CHUNK // count)):
            chunk = slice(begin, begin + step)
            text += _likelihood(model.lm_head, inputs[:, chunk], targets[chunk]).double().sum(dim=1).cpu()
        tokens += len(targets)
        last = hidden[:, torch.arange(len(part), device=hidden.device), part.length - 2]
        logits = model.lm_head(last).float()
        right = part.classes[part.label]
        label -= log_softmax(logits, dim=-1)[:, torch.arange(len(part)), right].double().sum(dim=1).cpu()
        chosen = logits[..., part.classes].argmax(dim=-1)
        for i, hits in enumerate((chosen == part.label).tolist()):
            correct[i] += hits
    back = order.argsort().tolist()
    scores = []
    for i in range(count):
        hits = [correct[i][place] for place in back]
        scores.append(Score(math.exp(text[i] / tokens), sum(hits) / len(hits), float(label[i]) / len(hits), hits))
    return scores


@contextmanager
def one_thread() -> Iterator[None]:
    """Decompositions this small only wait for each other's threads: on two shared cores a conversion took 0.6 s in one and 7 in two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def convert(bank: Bank, tensors: Tensors, nblocks: int, rank: int) -> tuple[Tensors, float]:
    """The best block-diagonal fit of a plain adapter, and the relative error of its updates: `sgl_bdlora.adapters convert` in memory."""
    fitted, energy, kept = {}, 0.0, 0.0
    for path, (a, b) in tensors.items():
        row = bank.layers[path].parallelism == "row"
        left, right = (a.T, b.T) if row else (b, a)
        fit = fit_blocks(left.contiguous(), right.contiguous(), nblocks, rank)
        packed, other = fit.left, fit.right
        if row:
            fitted[path] = (torch.cat([block.T for block in packed.chunk(nblocks)]), other.T.contiguous())
        else:
            fitted[path] = (other, packed)
        energy, kept = energy + fit.energy, kept + fit.kept
    return fitted, math.sqrt(max(0.0, 1 - kept / energy)) if energy else 0.0
