"""adapter_config.json: the fields that change what an adapter computes, and PEFT's rules for matching modules.

The rules are those of PEFT 0.21.2 and name their function there. A field that this module does not know is refused
unless it is null, false or empty: it may change the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sgl_bdlora.adapters.errors import AdapterError, show

# Fields of LoraConfig that change neither the forward pass of a trained adapter nor the base model.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

# Initialisations that leave the base weights alone: the saved factors are the whole update. The others (pissa, olora,
# corda, loftq, lora_ga) subtract or quantise in the base weights, and PEFT sets init_lora_weights to true when it
# converts such an adapter on saving (PeftModel.save_pretrained, path_initial_model_for_weight_conversion).
_EXACT_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica"})

_RETRAIN = "train and save the adapter without it"
_MERGE = "merge the adapter into the model and serve the merged model, or train it without this field"
_REFUSED = {
    "alora_invocation_tokens": ("activated LoRA applies only after an invocation sequence", _RETRAIN),
    "arrow_config": ("Arrow routes each token between adapters", "serve the routed adapters one by one"),
    "bias": ("it trains biases of the base model", "train with bias = 'none'"),
    "kasa_config": ("KaSA changes the base weights and adds a diagonal between the factors", _RETRAIN),
    "layer_replication": (
        "it changes the layers of the base model",
        "serve the replicated model as a model of its own",
    ),
    "lora_bias": ("it adds a bias to lora_B", "train with lora_bias = false"),
    "megatron_config": ("Megatron layers have their own sharding", "export the adapter for the transformers model"),
    "modules_to_save": ("it replaces whole modules of the base model", _MERGE),
    "monteclora_config": ("MonteCLoRA adds sampled perturbations", _RETRAIN),
    "target_parameters": ("it adapts bare parameters such as fused experts", "target linear modules instead"),
    "trainable_token_indices": ("it replaces rows of the embedding", _MERGE),
    "use_dora": ("DoRA rescales the merged weight column by column", _MERGE),
    "use_qalora": ("QALoRA pools the input before lora_A", _RETRAIN),
    "velora_config": ("VeLoRA stores projections beside the factors", _RETRAIN),
}


@dataclass(frozen=True)
class BlockDiagonalConfig:
    """``use_bdlora`` (peft.BdLoraConfig): which factor of which module is block-diagonal, with how many blocks."""

    nblocks: int
    target_modules_bd_a: tuple[str, ...]
    target_modules_bd_b: tuple[str, ...]
    match_strict: bool


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that decide what is computed, under PEFT's names.

    target_modules, exclude_modules: names (a tuple) or one regular expression (a string). fan_in_fan_out is kept for
    the record: it says how the base weight is stored and changes neither A, B nor their product.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    use_bdlora: BlockDiagonalConfig | None
    fan_in_fan_out: bool
    ensure_weight_tying: bool
    base_model_name_or_path: str | None

    @classmethod
    def from_dict(cls, adapter: str, raw: object) -> AdapterConfig:
        """Parse the JSON object of adapter_config.json. adapter: the name for messages. Raises AdapterError."""
        fields = _Fields(adapter, raw)
        if fields.raw.get("peft_type") != "LORA":
            raise AdapterError(
                adapter,
                f"peft_type = {show(fields.raw.get('peft_type'))} in adapter_config.json is not 'LORA'",
                "give an adapter that PEFT saved from a LoraConfig",
            )
        for key, (reason, fix) in _REFUSED.items():
            value = fields.take(key)
            if not (_inactive(value) or (key == "bias" and value == "none")):
                raise AdapterError(adapter, f"{key} = {show(value)} is not supported: {reason}", fix)
        config = cls(
            r=fields.positive("r"),
            lora_alpha=fields.typed("lora_alpha", _is_number, "a finite number"),
            target_modules=fields.names_or_regex("target_modules"),
            use_rslora=fields.flag("use_rslora", False),
            rank_pattern=fields.pattern("rank_pattern", _is_positive, "positive integers"),
            alpha_pattern=fields.pattern("alpha_pattern", _is_number, "finite numbers"),
            exclude_modules=fields.names_or_regex("exclude_modules", ()),
            layers_to_transform=fields.layers("layers_to_transform"),
            layers_pattern=fields.layer_names("layers_pattern"),
            use_bdlora=fields.block_diagonal("use_bdlora"),
            fan_in_fan_out=fields.flag("fan_in_fan_out", False),
            ensure_weight_tying=fields.flag("ensure_weight_tying", False),
            base_model_name_or_path=fields.typed(
                "base_model_name_or_path", lambda v: v is None or isinstance(v, str), "a string or null", None
            ),
        )
        config._check_initialisation(adapter, fields.take("init_lora_weights", True))
        config._check_layers(adapter, fields.raw)
        fields.refuse_unknown()
        return config

    def selects(self, path: str, *, embedding: bool = False) -> bool:
        """Whether PEFT would adapt the module (check_target_module_exists in peft/tuners/tuners_utils.py).

        embedding: the module is the input embedding or the output head, which ``all-linear`` leaves out.
        """
        if _matches(self.exclude_modules, path):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return not embedding
            return re.fullmatch(self.target_modules, path) is not None
        if path in self.target_modules:
            return True  # a full path is taken before layers_to_transform is asked
        if not _matches(self.target_modules, path):
            return False
        return not self.layers_to_transform or self._layer_of(path) in self.layers_to_transform

    def rank_of(self, path: str) -> tuple[int, str]:
        """The module's rank and the field it comes from."""
        key = _pattern_key(self.rank_pattern, path)
        return (self.r, "r") if key is None else (self.rank_pattern[key], f"rank_pattern[{show(key)}]")

    def scale_of(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv 2312.03732), r being the full rank."""
        rank, _ = self.rank_of(path)
        key = _pattern_key(self.alpha_pattern, path)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def block_side(self, adapter: str, path: str) -> str | None:
        """Which factor of the module is block-diagonal: "a", "b" or None (BdLoraLinearVariant.init in PEFT)."""
        bd = self.use_bdlora
        if bd is None:
            return None
        in_a = any(pattern in path for pattern in bd.target_modules_bd_a)
        in_b = any(pattern in path for pattern in bd.target_modules_bd_b)
        if in_a and in_b:
            raise AdapterError(
                adapter,
                f"module {path!r} matches both use_bdlora.target_modules_bd_a = {show(bd.target_modules_bd_a)} and "
                f"target_modules_bd_b = {show(bd.target_modules_bd_b)}",
                "list it in one of them only; the entries are matched as substrings of the module path",
            )
        if bd.match_strict and not (in_a or in_b):
            raise AdapterError(
                adapter,
                f"module {path!r} is in neither use_bdlora.target_modules_bd_a = {show(bd.target_modules_bd_a)} nor "
                f"target_modules_bd_b = {show(bd.target_modules_bd_b)}, and match_strict is true",
                "add it to the list it was trained with, or set use_bdlora.match_strict to false if it is plain LoRA",
            )
        return "a" if in_a else "b" if in_b else None

    def _layer_of(self, path: str) -> int | None:
        # Lazy, so that the first numbered segment counts: the layer, not an expert inside it.
        patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            match = re.match(pattern, path)
            if match:
                return int(match["idx"])
        return None

    def _check_layers(self, adapter: str, raw: Mapping[str, Any]) -> None:
        # The same three checks as LoraConfig.__post_init__.
        for key in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and raw.get(key) is not None:
                raise AdapterError(
                    adapter,
                    f"{key} = {show(raw[key])} cannot be combined with target_modules = {show(self.target_modules)}, "
                    "a regular expression",
                    "put the layers into the expression, or list the target modules by name",
                )
        if self.layers_pattern and raw.get("layers_to_transform") is None:
            raise AdapterError(
                adapter,
                f"layers_pattern = {show(raw['layers_pattern'])} has no layers_to_transform",
                "set layers_to_transform, or remove layers_pattern",
            )

    def _check_initialisation(self, adapter: str, value: object) -> None:
        if isinstance(value, bool):
            return
        if not isinstance(value, str) or value not in _EXACT_INITIALISATIONS:
            raise AdapterError(
                adapter,
                f"init_lora_weights = {show(value)} is not supported: it changes the base weights, so that the saved "
                "factors are not the whole update",
                "save the adapter with save_pretrained(..., path_initial_model_for_weight_conversion=<directory of the "
                "initial adapter>), which converts it to plain LoRA",
            )
        if value == "mica" and self.use_bdlora is not None:
            raise AdapterError(
                adapter,
                "init_lora_weights = 'mica' cannot be combined with use_bdlora in PEFT",
                "set init_lora_weights to true if the adapter was trained without MiCA",
            )


class _Fields:
    """Takes fields out of a raw configuration, checks their types and remembers which it has seen."""

    def __init__(self, adapter: str, raw: object, prefix: str = "") -> None:
        if not isinstance(raw, Mapping):
            where = prefix.rstrip(".") or "adapter_config.json"
            raise AdapterError(adapter, f"{where} holds {show(raw)}, not an object", f"make {where} a JSON object")
        self.adapter, self.raw, self.prefix = adapter, raw, prefix
        self.seen = {"peft_type"}

    def take(self, key: str, default: object = None) -> Any:
        self.seen.add(key)
        return self.raw.get(key, default)

    def refuse(self, key: str, expected: str) -> AdapterError:
        got = f"= {show(self.raw[key])} in adapter_config.json" if key in self.raw else "missing in adapter_config.json"
        name = f"{self.prefix}{key}"
        problem = f"{name} {got} is not {expected}" if key in self.raw else f"{name} is {got}"
        return AdapterError(self.adapter, problem, f"set {name} to {expected}, as in training")

    def typed(self, key: str, valid: Callable[[Any], bool], expected: str, default: object = ...) -> Any:
        value = self.take(key, default)
        if value is ... or not valid(value):
            raise self.refuse(key, expected)
        return value

    def positive(self, key: str, default: object = ...) -> int:
        return self.typed(key, _is_positive, "a positive integer", default)

    def flag(self, key: str, default: bool) -> bool:
        return self.typed(key, lambda value: isinstance(value, bool), "true or false", default)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.typed(key, lambda v: v is None or _is_names(v), "a list of strings", None)
        return _ordered(value or ())

    def names_or_regex(self, key: str, default: object = ...) -> tuple[str, ...] | str:
        expected = "a list of module names or a regular expression"
        optional = default is not ...
        value = self.typed(
            key, lambda v: isinstance(v, str) or _is_names(v) or (optional and v is None), expected, default
        )
        if isinstance(value, str):
            if value.lower() != "all-linear":
                self.compile(key, value, value)
            return value
        return _ordered(value or ())

    def pattern(self, key: str, valid: Callable[[Any], bool], expected: str) -> dict[str, Any]:
        value = self.take(key) or {}
        if not isinstance(value, Mapping) or not all(isinstance(k, str) and valid(v) for k, v in value.items()):
            raise self.refuse(key, f"an object from module names or expressions to {expected}")
        for name in value:
            self.compile(key, name, rf"(.*\.)?({name})$")
        return dict(value)

    def layers(self, key: str) -> tuple[int, ...]:
        value = self.take(key)
        values = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise self.refuse(key, "a layer number or a list of them")
        return tuple(values)

    def layer_names(self, key: str) -> tuple[str, ...]:
        value = self.take(key)
        if isinstance(value, str):
            value = [value] if value else []
        if not (value is None or _is_names(value)):
            raise self.refuse(key, "a name or a list of names")
        for name in value or ():
            self.compile(key, name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.")
        return _ordered(value or ())

    def compile(self, key: str, shown: str, expression: str) -> None:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(
                self.adapter,
                f"{self.prefix}{key} holds {show(shown)}, which is not a valid regular expression ({error})",
                f"correct the expression in {self.prefix}{key}",
            ) from error

    def block_diagonal(self, key: str) -> BlockDiagonalConfig | None:
        value = self.take(key)
        if value is None:
            return None
        inner = _Fields(self.adapter, value, f"{key}.")
        config = BlockDiagonalConfig(
            nblocks=inner.positive("nblocks", 1),
            target_modules_bd_a=inner.names("target_modules_bd_a"),
            target_modules_bd_b=inner.names("target_modules_bd_b"),
            match_strict=inner.flag("match_strict", True),
        )
        both = sorted(set(config.target_modules_bd_a) & set(config.target_modules_bd_b))
        if both:
            raise AdapterError(
                self.adapter,
                f"{show(both)} is in both use_bdlora.target_modules_bd_a and use_bdlora.target_modules_bd_b",
                "list each module in one of them only",
            )
        inner.refuse_unknown()
        return config

    def refuse_unknown(self) -> None:
        known = self.seen if self.prefix else self.seen | _WITHOUT_EFFECT
        for key, value in self.raw.items():
            if key not in known and not _inactive(value):
                raise AdapterError(
                    self.adapter,
                    f"{self.prefix}{show(key)} = {show(value)} in adapter_config.json is not known here and may change "
                    "the result",
                    "remove the field if it has no effect on inference, or update sgl-bdlora",
                )


@lru_cache(maxsize=8192)
def _pattern(key: str) -> re.Pattern[str]:
    # More than re keeps itself: an adapter may have a pattern for every module.
    return re.compile(rf"(.*\.)?({key})$")


def _pattern_key(patterns: Mapping[str, Any], path: str) -> str | None:
    # get_pattern_key in peft/utils/other.py: the first match in the order of the file wins.
    for key in patterns:
        if _pattern(key).match(path):
            return key
    return path if path in patterns else None


def _matches(names_or_regex: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(names_or_regex, str):
        return bool(names_or_regex) and re.fullmatch(names_or_regex, path) is not None
    return path in names_or_regex or any(path.endswith(f".{name}") for name in names_or_regex)


def _inactive(value: object) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, tuple, set, Mapping)) and not value)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_number(value: object) -> bool:
    # The bounds also keep out inf and NaN, and integers that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)


def _ordered(names: Any) -> tuple[str, ...]:
    return tuple(sorted(names)) if isinstance(names, (set, frozenset)) else tuple(names)
