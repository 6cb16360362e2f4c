"""Adapter directories as bytes, good ones and what random damage makes of them."""

import json
import struct
from functools import cache

import torch
from hypothesis import strategies as st
from safetensors.torch import save

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"]}
BLOCKS = {"nblocks": 4, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]}


def pair(path: str, a: tuple[int, int] = (8, 64), b: tuple[int, int] = (64, 8)) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{path}"
    return {f"{prefix}.lora_A.weight": torch.ones(a), f"{prefix}.lora_B.weight": torch.ones(b)}


@cache
def good() -> list[tuple[dict, bytes]]:
    """Configuration and weights file of adapters that are accepted: plain, block-diagonal, mixed, and of the vocabulary."""
    packed = {**pair(Q, b=(64, 2)), **pair(O, a=(8, 16))}
    mixed = {**pair(Q), **pair(O, a=(8, 16))}
    vocabulary = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(8, 96),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(64, 8),
        **pair("lm_head", b=(96, 8)),
    }
    loose = {**BLOCKS, "target_modules_bd_b": [], "match_strict": False}
    return [
        (PLAIN, save({**pair(Q), **pair(O)})),
        (PLAIN | {"use_bdlora": BLOCKS}, save(packed)),
        (PLAIN | {"use_bdlora": loose}, save(mixed)),
        (PLAIN | {"target_modules": ["embed_tokens", "lm_head"]}, save(vocabulary)),
    ]


NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 4, 6, 8, 16, 64, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, 1e308])
# The words that mean something in a configuration, and the characters of regular expressions.
WORDS = st.sampled_from(
    ["q_proj", "o_proj", "lm_head", "embed_tokens", "layers", "all-linear", Q, "LORA", "none", "", "."]
)
EXPRESSIONS = st.lists(
    st.sampled_from(
        [*"().*+?|{}[]^$-,09a_", "\\d", "\\.", "(?:", "(?!", "(?P<n>", "(?P=n)", ".*", "q_proj", "{2,}", "layers"]
    ),
    max_size=12,
).map("".join)
TEXTS = WORDS | EXPRESSIONS | st.text(max_size=8)
ATOMS = st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS
JSON = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
     "alpha_pattern", "use_rslora", "use_bdlora", "fan_in_fan_out", "init_lora_weights", "base_model_name_or_path",
     "ensure_weight_tying", "bias", "modules_to_save", "runtime_config", "peft_type", "use_dora", "other"]
)  # fmt: skip
BLOCK_FIELDS = st.sampled_from([*BLOCKS, "match_strict", "other"])


@st.composite
def configurations(draw) -> tuple[bytes, bytes]:
    """adapter_config.json with some fields changed or gone, or no longer JSON; and good weights."""
    fields, weights = draw(st.sampled_from(good()))
    fields = json.loads(json.dumps(fields))
    for _ in range(draw(st.integers(0, 3))):
        change = draw(st.sampled_from(["set", "set", "remove", "block", "list"]))
        name = draw(FIELDS)
        if change == "remove":
            fields.pop(name, None)
        elif change == "block" and isinstance(fields.get("use_bdlora"), dict):
            fields["use_bdlora"][draw(BLOCK_FIELDS)] = draw(JSON | st.lists(TEXTS, max_size=3))
        elif change == "list":
            fields[name] = draw(st.lists(TEXTS, max_size=3) | st.dictionaries(TEXTS, NUMBERS, max_size=3))
        else:
            fields[name] = draw(JSON)
    text = json.dumps(fields).encode()
    return draw(st.just(text) | damaged(text)), weights


@st.composite
def headers(draw) -> tuple[bytes, bytes]:
    """A good configuration; a safetensors file whose header, or whose length of it, or whose data are not what they should be."""
    fields, weights = draw(st.sampled_from(good()))
    length = struct.unpack("<Q", weights[:8])[0]
    header, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(header)))
        entry = header[key]
        change = draw(st.sampled_from(["shape", "dtype", "offsets", "entry", "name", "remove", "copy"]))
        if change == "shape":
            entry["shape"] = draw(st.lists(NUMBERS | st.integers(0, 200), max_size=4) | JSON)
        elif change == "dtype":
            entry["dtype"] = draw(st.sampled_from(["F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "F4", "U64"]) | JSON)
        elif change == "offsets":
            near = st.integers(0, len(data) + 16)
            entry["data_offsets"] = draw(st.lists(NUMBERS | near, max_size=3) | JSON)
        elif change == "entry":
            header[key] = draw(JSON)
        elif change == "name":
            header[draw(TENSOR_NAMES)] = header.pop(key)
        elif change == "remove":
            del header[key]
        elif change == "copy":
            header[draw(TENSOR_NAMES)] = entry
        if not header or not all(isinstance(entry, dict) for entry in header.values()):
            break
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2) | JSON)
    text = json.dumps(header).encode()
    told = draw(st.just(len(text)) | st.integers(0, len(text) + 64) | st.sampled_from([2**31, 2**63, 2**64 - 1]))
    file = struct.pack("<Q", told) + text + data
    return json.dumps(fields).encode(), draw(st.just(file) | damaged(file))


TENSOR_NAMES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["lora_A", "lora_B", "lora_embedding_A", "base_layer", "lora_magnitude_vector"]).map(
        lambda name: f"base_model.model.{Q}.{name}.weight"
    ),
    st.sampled_from([
        "base_model.model.lm_head.base_layer.weight", "base_model.model.a..lora_A.weight", "__metadata__", "x" * 600,
        "base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight", "base_model.model.\0.lora_B.weight",
    ]),
)  # fmt: skip


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Some bytes of `content` overwritten, taken out or put in, or its end cut off."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        change = draw(st.sampled_from(["overwrite", "insert", "remove", "cut"]))
        new = draw(
            st.binary(min_size=1, max_size=8) | st.sampled_from([b"[" * 3000, b"\xff\xfe", b'"', b"9" * 5000, b"{}"])
        )
        if change == "overwrite":
            content = content[:at] + new + content[at + len(new) :]
        elif change == "insert":
            content = content[:at] + new + content[at:]
        elif change == "remove":
            content = content[:at] + content[at + len(new) :]
        else:
            content = content[:at]
    return content


INDEXES = JSON | st.fixed_dictionaries(
    {
        "weight_map": JSON
        | st.dictionaries(TENSOR_NAMES | TEXTS, TEXTS | st.just("adapter_model-1.safetensors"), max_size=4)
    }
)
