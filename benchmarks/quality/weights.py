"""A base model in few megabytes, to be carried to a machine without a network.

A packaged model comes as quantised GGUF blocks. `pack` keeps those bytes, under the names of the converted model and in its row order, and
checks that `unpack` gives the converted bfloat16 weights back bit for bit: 97 MB instead of 269 for the demo model. Other models travel as
they are. Parts are of about PART bytes, so that each fits into one transfer.
"""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import rms_norm

PART = 50 * 10**6
PLAIN = "plain"
_ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def pack(model: Path, target: Path, gguf: Path | None = None, largest: int = PART) -> None:
    """Write the model in directory `model` to `target`, from the quantised `gguf` that it was converted from if there is one.

    largest: bytes of a part, unless one tensor is larger.
    """
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "config.json", target / "config.json")
    whole = {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    kept = {name: (tensor, PLAIN) for name, tensor in whole.items()}
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
        name: (tensors[name] if kind == PLAIN else decode(tensors[name], kind)).to(dtype)
        for name, kind in index["kinds"].items()
    }


def decode(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """raw (rows, bytes) uint8, kind: GGUF's type of its blocks, "Q4_1" -> (rows, columns) float32."""
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[kind]))


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
    """The quantised matrices of a GGUF file by the names of Transformers: raw rows (rows, bytes) and their type."""
    from gguf import GGUFReader

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for tensor in GGUFReader(gguf).tensors:
        if tensor.tensor_type.name in ("F32", "F16"):
            continue
        raw = torch.from_numpy(tensor.data.copy())
        if tensor.name in _ENDS:
            found[_ENDS[tensor.name]] = (raw, tensor.tensor_type.name)
            continue
        layer, kind = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name).groups()
        if kind in heads and config["model_type"] == "llama":
            # A Llama's GGUF interleaves the two halves of each head's rotary dimensions.
            raw = raw.view(heads[kind], -1, 2, raw.shape[1]).transpose(1, 2).reshape(raw.shape)
        found[f"model.layers.{layer}.{_NAMES[kind]}.weight"] = (raw, tensor.tensor_type.name)
    return found
