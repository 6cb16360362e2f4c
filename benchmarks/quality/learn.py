"""Training, healing and scoring of a bank's adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from benchmarks.quality.bank import Bank, Tensors
from benchmarks.quality.data import Rows
from sgl_bdlora.adapters.fit import fit_blocks

# Logits that are held at once: one such float32 tensor is 0.8 or 3.2 GB, and about four are alive.
LOGITS = {"cpu": 2 * 10**8, "cuda": 8 * 10**8}
# Sequences of a pass that only scores, over all adapters.
SEQUENCES = {"cpu": 128, "cuda": 1024}


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


def train(model, bank: Bank, batches: Iterator[Rows], steps: int, teacher: Bank | None = None) -> torch.Tensor:
    """Every adapter on the same batches; returns their last batch's losses (adapters,).

    With a teacher, its one adapter is distilled into every adapter of `bank`, from the same texts and without their labels.
    """
    losses = torch.zeros(len(bank.arms))
    for step, rows in enumerate(batches):
        with torch.no_grad():
            target = None if teacher is None else hidden_states(model, teacher, rows)
        hidden = hidden_states(model, bank, rows)
        losses, slope = loss(model, hidden, rows, target)
        hidden.backward(slope)
        bank.step(schedule(step, steps))
    return losses.cpu()


def hidden_states(model, bank: Bank | None, rows: Rows) -> torch.Tensor:
    """(adapters, rows, longest, width) before the head. Padding stands behind what counts, so causal attention never sees it."""
    times = len(bank.arms) if bank else 1
    ids = _send(rows.ids, model.lm_head.weight).repeat(times, 1)
    with bank.on() if bank else nullcontext():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.view(times, *rows.ids.shape, -1)


@torch.enable_grad()
def loss(
    model, hidden: torch.Tensor, rows: Rows, teacher: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(adapters,) and the gradient of their sum by `hidden` (adapters, rows, longest, width).

    The mean over the batch's text tokens plus the mean over its class tokens, so that one class weighs as much as a text: of the negative
    log-likelihood, or with teacher (1, rows, longest, width) of the divergence from what the teacher says. Each chunk's gradient is taken
    at once, so that no more than one chunk's logits are held.
    """
    weight = sum(mask / mask.sum() for mask in rows.counted()).flatten()
    places = weight.nonzero().squeeze(1)
    targets, weight = (_send(t[places], hidden) for t in (rows.ids.roll(-1, dims=1).flatten(), weight))
    places, inputs = _send(places, hidden), hidden.detach().flatten(1, 2)
    losses, slope = torch.zeros(len(hidden), device=hidden.device), torch.zeros_like(inputs)
    for part in _chunks(model.lm_head, inputs, len(places)):
        chunk = inputs[:, places[part]].requires_grad_()
        if teacher is None:
            each = _likelihood(model.lm_head, chunk, targets[part])
        else:
            each = _divergence(model.lm_head, chunk, teacher.flatten(1, 2)[:, places[part]])
        each = (each * weight[part]).sum(dim=1)
        (slope[:, places[part]],) = torch.autograd.grad(each.sum(), chunk)
        losses += each.detach()
    return losses, slope.view_as(hidden)


def _chunks(head, inputs: torch.Tensor, places: int) -> Iterator[slice]:
    """Slices of `places` positions, so many that all adapters' logits of them fit."""
    step = max(1, LOGITS[inputs.device.type] // (len(inputs) * len(head.weight)))
    return (slice(at, at + step) for at in range(0, places, step))


def _send(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """From the CPU to the device of `like`, without waiting for what runs there."""
    return (tensor.pin_memory() if like.is_cuda else tensor).to(like.device, non_blocking=True)


def _likelihood(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden (adapters, positions, width), targets (positions,) -> negative log-likelihoods (adapters, positions)."""
    logits = head(hidden).float()
    return cross_entropy(logits.flatten(0, 1), targets.repeat(len(hidden)), reduction="none").view(len(hidden), -1)


def _divergence(head, hidden: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """hidden (adapters, positions, width), teacher (1, positions, width) -> divergences (adapters, positions)."""
    with torch.no_grad():
        target = log_softmax(head(teacher).float(), dim=-1)
    said = log_softmax(head(hidden).float(), dim=-1)
    return kl_div(said, target.expand_as(said), log_target=True, reduction="none").sum(dim=-1)


@torch.inference_mode()
def score(model, bank: Bank | None, rows: Rows, sequences: int | None = None) -> list[Score]:
    """Of every adapter of the bank, or of the base model alone, over all `rows`. sequences: of a pass, over all adapters."""
    count, device = len(bank.arms) if bank else 1, model.lm_head.weight.device
    size = max(1, (sequences or SEQUENCES[device.type]) // count)
    text, label = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(2))
    tokens, correct = 0, []
    # Rows of like length together; the order of `correct` is the rows' own.
    order = rows.length.argsort(stable=True)
    for at in range(0, len(rows), size):
        part = rows.take(order[at : at + size])
        inputs = hidden_states(model, bank, part).flatten(1, 2)
        following = part.ids.roll(-1, dims=1).flatten()
        of_text, of_class = (mask.flatten().nonzero().squeeze(1) for mask in part.counted())
        places, targets = _send(of_text, inputs), _send(following[of_text], inputs)
        for chunk in _chunks(model.lm_head, inputs, len(of_text)):
            text += _likelihood(model.lm_head, inputs[:, places[chunk]], targets[chunk]).double().sum(dim=1)
        tokens += len(of_text)
        logits = model.lm_head(inputs[:, _send(of_class, inputs)]).float()
        right = _send(following[of_class], inputs)
        label += (
            cross_entropy(logits.flatten(0, 1), right.repeat(count), reduction="none")
            .view(count, -1)
            .double()
            .sum(dim=1)
        )
        classes = _send(rows.classes, inputs)
        correct.append(classes[logits[..., classes].argmax(dim=-1)] == right)
    hits = torch.cat(correct, dim=1).cpu()[:, order.argsort()]
    text, label = text.cpu() / tokens, label.cpu() / len(rows)
    return [
        Score(math.exp(text[i]), float(hits[i].double().mean()), float(label[i]), hits[i].tolist())
        for i in range(count)
    ]


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
