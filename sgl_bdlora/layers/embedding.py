"""LoRA in the layers that are as wide as the vocabulary: the input embedding and lm_head.

Neither is a linear layer that SGLang runs as a module. The logits are a product with the weight of the module that
LogitsProcessor._compute_lm_head is given, which in a model with tied embeddings is the embedding itself. So the two are told apart by
who asks, not by the module: a lookup gets the update of `embed_tokens`, logits get that of `lm_head`, as in Transformers + PEFT, where
an adapter on one of two tied layers leaves the other alone.

Under both shardings a rank holds the vocabulary's part that its layer holds, and adds no collective:

    embedding: A (rank, vocabulary) split on vocabulary, B (width, rank) whole; a rank adds B A[:, id] for its own ids, before the
               layer's all-reduce
    lm_head:   A (rank, width) whole, B (vocabulary, rank) split on vocabulary; the logits are gathered by the host
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sgl_bdlora.kernels.backend import BDLoRABackend
from sgl_bdlora.sharding import HostLayer


class _Place(NamedTuple):
    """first: token id of the first row that this rank holds."""

    backend: BDLoRABackend
    path: str
    first: int


_embeddings: WeakKeyDictionary[torch.nn.Module, _Place] = WeakKeyDictionary()
_heads: WeakKeyDictionary[torch.nn.Module, _Place] = WeakKeyDictionary()


def wrap(module: torch.nn.Module, host: HostLayer, backend: BDLoRABackend) -> None:
    """Serve adapters of `host`, an "embedding" or a "head", in `module`, which may be both."""
    place = _Place(backend, host.path, host.slices[0].inputs.start)
    if host.parallelism == "head":
        _heads[module] = place
    elif isinstance(module, VocabParallelEmbedding):
        _embeddings[module] = place
    else:
        # A plain torch.nn.Embedding, whole on every rank (gemma3_causal.py: Gemma3TextScaledWordEmbedding).
        gain = float(getattr(module, "embed_scale", 1.0))
        module.register_forward_hook(lambda _, inputs, output: _add(place, output, inputs[0], gain))


def add_to_embedding(layer: VocabParallelEmbedding, y: torch.Tensor, ids: torch.Tensor) -> None:
    """Add the batch's updates to y (..., width), what this rank's part of the vocabulary gave for token ids (...), in place."""
    place = _embeddings.get(layer)
    if place is not None:
        _add(place, y, ids)


def add_to_logits(lm_head: torch.nn.Module, y_SN: torch.Tensor, x_SK: torch.Tensor) -> None:
    """Add the batch's updates to local logits y (rows, local vocabulary and its padding) of hidden states x, in place."""
    place = _heads.get(lm_head)
    if place is None:
        return
    if y_SN.dtype == x_SK.dtype:
        place.backend.add_head_lora(y_SN, x_SK, place.path)
        return
    # --enable-fp32-lm-head: PEFT computes the update in the model's own type there too.
    update_SN = torch.zeros_like(y_SN, dtype=x_SK.dtype)
    place.backend.add_head_lora(update_SN, x_SK, place.path)
    y_SN += update_SN


def _add(place: _Place, y: torch.Tensor, ids: torch.Tensor, gain: float = 1.0) -> None:
    place.backend.add_embedding_lora(y.view(-1, y.shape[-1]), ids.reshape(-1), place.path, place.first, gain)
