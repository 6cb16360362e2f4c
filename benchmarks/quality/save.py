"""A bank's adapter as PEFT's directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.quality.arms import Arm
from benchmarks.quality.bank import SCALE, Bank
from sgl_bdlora.adapters.hosts import ROW_PARALLEL


def save(bank: Bank, index: int, folder: Path, base: str = "") -> None:
    """Write adapter `index` of the bank, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for path, (a, b) in bank.get(index).items():
        tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = configuration(bank.arms[index], sorted({layer.leaf for layer in bank.layers.values()}), base)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def configuration(arm: Arm, modules: list[str], base: str) -> dict:
    sides = {
        "target_modules_bd_a": [name for name in modules if name in ROW_PARALLEL],
        "target_modules_bd_b": [name for name in modules if name not in ROW_PARALLEL],
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": arm.rank,
        "lora_alpha": SCALE * arm.rank,
        "target_modules": modules,
        "use_bdlora": {"nblocks": arm.nblocks, "match_strict": True, **sides} if arm.nblocks > 1 else None,
    }
