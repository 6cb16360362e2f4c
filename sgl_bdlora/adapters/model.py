"""A base model's adaptable layers, from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_bdlora.adapters.errors import ModelError, show
from sgl_bdlora.adapters.hosts import BaseLayer, leaf_of, parallelism_of

if TYPE_CHECKING:
    import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = (*ATTENTION, *MLP)

# What transformers' configuration classes take where a published config.json leaves a field out (Gemma 3's do).
_FAMILIES: dict[str, dict[str, int | bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
    },
}
_LARGEST_CONFIG = 2**20
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseModel:
    """A dense decoder's sizes. directory: where its weights may be; None if only a config.json was given."""

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    directory: Path | None

    def linear_layers(self, targets: tuple[str, ...] = LINEAR) -> list[BaseLayer]:
        """The decoder's linear layers of these names."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
        return [
            BaseLayer(
                f"model.layers.{i}.{'self_attn' if leaf in ATTENTION else 'mlp'}.{leaf}",
                *shapes[leaf],
                parallelism_of(leaf),
                self.kv_heads if leaf in ("k_proj", "v_proj") else None,
            )
            for i in range(self.layers)
            for leaf in LINEAR
            if leaf in targets
        ]

    def vocabulary_layers(self) -> list[BaseLayer]:
        return [
            BaseLayer("model.embed_tokens", self.vocabulary, self.hidden, "embedding"),
            BaseLayer("lm_head", self.hidden, self.vocabulary, "head"),
        ]

    def check_tp(self, tp: int) -> None:
        """Raise ModelError unless SGLang can split the model over `tp` ranks."""
        fix = "choose a tensor-parallel size that divides the model"
        for field, size in (("num_attention_heads", self.heads), ("intermediate_size", self.intermediate)):
            if size % tp:
                raise ModelError(self.name, f"{field} = {size} is not divisible by --tp {tp}", fix)
        if self.kv_heads % tp and tp % self.kv_heads:
            raise ModelError(
                self.name,
                f"num_key_value_heads = {self.kv_heads} can neither be split over nor repeated on --tp {tp} ranks",
                fix,
            )

    def vocabulary_weights(self) -> dict[str, torch.Tensor]:
        """The weights (vocabulary, hidden) of embedding and lm_head by path, memory-mapped; empty where safetensors files lack them."""
        if self.directory is None:
            return {}
        from safetensors import SafetensorError, safe_open

        weights = {}
        try:
            for key, file in self._tensors().items():
                if key.endswith(("embed_tokens.weight", "lm_head.weight")):
                    with safe_open(file, framework="pt") as opened:
                        weights[leaf_of(key.removesuffix(".weight"))] = opened.get_tensor(key)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
            raise ModelError(
                self.name, f"the weights in {self.directory} cannot be read ({error})", "download the model again"
            ) from error
        if self.tied and "embed_tokens" in weights:
            weights["lm_head"] = weights["embed_tokens"]
        paths = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
        return {paths[leaf]: weight for leaf, weight in weights.items()}

    def _tensors(self) -> dict[str, Path]:
        """Tensor names -> safetensors file."""
        from safetensors import safe_open

        if (self.directory / _INDEX).is_file():
            listed = json.loads((self.directory / _INDEX).read_bytes())["weight_map"]
            return {key: self.directory / file for key, file in listed.items()}
        if not (self.directory / _WEIGHTS).is_file():
            return {}
        with safe_open(self.directory / _WEIGHTS, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), self.directory / _WEIGHTS)


def read_model(path: str | Path) -> BaseModel:
    """Read a config.json, or the one in a model directory. Raises ModelError."""
    path = Path(path)
    name = path.absolute().parent.name if path.name == "config.json" else path.absolute().name
    file = path / "config.json" if path.is_dir() else path
    raw = _load(name, file)
    # A multimodal model's decoder; some families only say there what they are.
    text = raw.get("text_config")
    fields = {**raw, **text} if isinstance(text, Mapping) else raw
    family = fields.get("model_type")
    if family == "gemma3":
        family = "gemma3_text"
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ModelError(
            name,
            f"model_type = {show(family)} in {file} is not one of {', '.join(_FAMILIES)}",
            "give the config.json of a dense decoder of these families",
        )
    known = {**_FAMILIES[family], **{key: value for key, value in fields.items() if value is not None}}

    def positive(key: str, default: int | None = None) -> int:
        value = known.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            said = f"= {show(value)}" if key in known else "is missing"
            raise ModelError(
                name, f"{key} {said} in {file}, not a positive integer", "give the model's own config.json"
            )
        return value

    hidden, heads = positive("hidden_size"), positive("num_attention_heads")
    return BaseModel(
        name=name,
        family=family,
        hidden=hidden,
        intermediate=positive("intermediate_size"),
        layers=positive("num_hidden_layers"),
        heads=heads,
        kv_heads=positive("num_key_value_heads", heads),
        head_dim=positive("head_dim", hidden // heads),
        vocabulary=positive("vocab_size"),
        tied=known.get("tie_word_embeddings", False) is True,
        directory=path if path.is_dir() else None,
    )


def _load(name: str, file: Path) -> dict[str, Any]:
    fix = "give a model's config.json, or the directory that holds it"
    try:
        with file.open("rb") as stream:
            data = stream.read(_LARGEST_CONFIG + 1)
    except OSError as error:
        raise ModelError(name, f"{file} cannot be read ({error.strerror})", fix) from error
    try:
        raw = json.loads(data) if len(data) <= _LARGEST_CONFIG else None
    except (ValueError, RecursionError) as error:
        raise ModelError(name, f"{file} is not valid JSON ({error})", fix) from error
    if not isinstance(raw, dict):
        raise ModelError(name, f"{file} holds {show(raw)}, not an object of at most {_LARGEST_CONFIG} bytes", fix)
    return raw
