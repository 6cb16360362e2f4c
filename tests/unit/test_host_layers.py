"""Which layers of a served model take LoRA: the decoder's, also where the model reads pictures with layers of the same names."""

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear

from sgl_bdlora.layers.host import host_layers, vocabulary_layers

PATHS = (
    "language_model.model.layers.0.self_attn.q_proj",
    "vision_tower.encoder.layers.0.self_attn.q_proj",
    "visual.layers.0.mlp.down_proj",
)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for path in PATHS:
            self._put(path, ReplicatedLinear(8, 8, bias=False, params_dtype=torch.float32))
        for path in ("language_model.model.embed_tokens", "vision_tower.embeddings.embed_tokens"):
            self._put(path, torch.nn.Embedding(16, 8))

    def _put(self, path: str, leaf: torch.nn.Module) -> None:
        place = self
        *parents, name = path.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        place.add_module(name, leaf)


class Selective(Model):
    """Says of its layers which take LoRA, as SGLang's gemma3_mm.py does."""

    def should_apply_lora(self, path: str) -> bool:
        return path.startswith("language_model.model.layers.") and "q_proj" not in path


@pytest.mark.parametrize(("kind", "taken"), [(Model, [PATHS[0]]), (Selective, [])])
def test_linear_layers_of_the_decoder_alone(kind, taken):
    assert [host.path for host, _ in host_layers(kind(), None)] == taken


def test_embeddings_of_the_decoder_alone():
    assert [host.path for host, _ in vocabulary_layers(Model(), False, None)] == ["language_model.model.embed_tokens"]
