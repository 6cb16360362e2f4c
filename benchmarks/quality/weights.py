"""A base model in few megabytes, to be carried to a machine without a network.

The demo model comes as 4-bit GGUF blocks. `pack` keeps those bytes, under the names of the converted model and in its row order, and checks
that `unpack` gives the converted bfloat16 weights back bit for bit: 96 MB instead of 269. Other models travel as they are. Parts are of
about PART bytes, so that each fits into one transfer.
"""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import rms_norm

PART = 50 * 10**6
_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def decode_q4_1(raw: torch.Tensor) -> torch.Tensor:
    """raw (rows, 20 n) uint8 -> (rows, 32 n) float32. A block: scale and minimum in float16, then 32 4-bit numbers, low halves first."""
    blocks = raw.view(raw.shape[0], -1, 20)
    scale, least = blocks[..., :4].contiguous().view(torch.float16).float().split(1, dim=-1)
    halves = torch.cat([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], dim=-1)
    return (halves * scale + least).flatten(1)


def decode_q8_0(raw: torch.Tensor) -> torch.Tensor:
    """raw (rows, 34 n) uint8 -> (rows, 32 n) float32. A block: scale in float16, then 32 signed bytes."""
    blocks = raw.view(raw.shape[0], -1, 34)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].contiguous().view(torch.int8) * scale).flatten(1)


_DECODERS = {"Q4_1": decode_q4_1, "Q8_0": decode_q8_0}


def pack(model: Path, target: Path, gguf: Path | None = None, largest: int = PART) -> None:
    """Write the model in directory `model` to `target`, from the 4-bit `gguf` that it was converted from if there is one.

    largest: bytes of a part, unless one tensor is larger.
    """
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "config.json", target / "config.json")
    with safe_open(model / "model.safetensors", framework="pt") as file:
        whole = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    kept = {name: (tensor, "plain") for name, tensor in whole.items()}
    if gguf is not None:
        kept |= _blocks(gguf, json.loads((model / "config.json").read_text()))
    part, size, parts = {}, 0, []
    for name, (tensor, _) in kept.items():
        if part and size + tensor.nbytes > largest:
            parts.append(part)
            part, size = {}, 0
        part[name], size = tensor.contiguous(), size + tensor.nbytes
    for number, tensors in enumerate([*parts, part]):
        save_file(tensors, target / f"weights-{number:02d}.safetensors")
    kinds = {name: kind for name, (_, kind) in kept.items()}
    (target / "weights.json").write_text(json.dumps({"parts": len(parts) + 1, "kinds": kinds}))
    for name, tensor in unpack(target, whole["model.norm.weight"].dtype).items():
        if not torch.equal(tensor, whole[name]):
            raise SystemExit(f"{name} does not come out of {gguf} as it is in {model}")


def unpack(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The weights that `pack` wrote. Raises SystemExit if a part is missing."""
    index = json.loads((folder / "weights.json").read_text())
    tensors = {}
    for number in range(index["parts"]):
        part = folder / f"weights-{number:02d}.safetensors"
        if not part.exists():
            raise SystemExit(f"{part} is missing: copy all {index['parts']} parts of the prepared folder")
        tensors |= load_file(part)
    return {
        name: _DECODERS[kind](tensors[name]).to(dtype) if kind in _DECODERS else tensors[name].to(dtype)
        for name, kind in index["kinds"].items()
    }


def load_model(folder: Path, device: torch.device, dtype: torch.dtype):
    """The frozen model of a prepared folder, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(unpack(folder), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise SystemExit(f"{folder} does not hold this model: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return fuse_norms(model.to(device, dtype).requires_grad_(False).eval())


def fuse_norms(model):
    """PyTorch's own RMSNorm in place of Transformers', which starts about 20 operations on float32 copies, forward and back.

    In 16 bits it rounds once where Transformers rounds before the weight, too.
    """
    for norm in model.modules():
        if hasattr(norm, "variance_epsilon"):  # Llama's and its like; Gemma's, which multiplies by 1 + weight, has none
            norm.forward = partial(
                rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon
            )
    return model


def _blocks(gguf: Path, config: dict) -> dict[str, tuple[torch.Tensor, str]]:
    """The quantised matrices of a Llama's GGUF by the names of Transformers: raw rows (rows, bytes) and their type."""
    from gguf import GGUFReader

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    found = {}
    for tensor in GGUFReader(gguf).tensors:
        if tensor.tensor_type.name not in _DECODERS:
            continue
        raw = torch.from_numpy(tensor.data.copy())
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match is None:
            found["model.embed_tokens.weight"] = (raw, tensor.tensor_type.name)
            continue
        layer, kind = match.groups()
        if kind in ("attn_q", "attn_k"):
            # GGUF interleaves the two halves of each head's rotary dimensions.
            n = heads if kind == "attn_q" else kv_heads
            raw = raw.view(n, -1, 2, raw.shape[1]).transpose(1, 2).reshape(raw.shape)
        found[f"model.layers.{layer}.{_NAMES[kind]}.weight"] = (raw, tensor.tensor_type.name)
    return found
