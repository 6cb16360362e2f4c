"""Model and adapters of the benchmark: real shapes, random weights, no download."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from sgl_bdlora.adapters import read_adapter
from sgl_bdlora.adapters.inspect import report

ROW = ("o_proj", "down_proj")
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
MODULES = (*COLUMN, *ROW)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# A layer's products as SGLang computes them, in the order of the forward pass, and the modules that each one is.
PRODUCTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: torch.dtype
    head_dim: int

    def linear(self, module: str) -> tuple[int, int]:
        """(inputs, outputs) of a layer's module."""
        q, kv = self.head_dim * self.heads, self.head_dim * self.kv_heads
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[module]

    def share(self, tp: int) -> "Shape":
        """What one of `tp` tensor-parallel ranks has of it, as a model of its own: the same layers, with a part of each one's heads,
        intermediate units and vocabulary. Raises ValueError if a size cannot be split so.
        """
        if tp == 1:
            return self
        for size in ("heads", "kv_heads", "intermediate", "vocab"):
            if getattr(self, size) % tp:
                raise ValueError(f"{self.name}: {size} is {getattr(self, size)}, which {tp} ranks cannot share evenly")
        return replace(
            self,
            name=f"{self.name}, one rank of {tp}",
            heads=self.heads // tp,
            kv_heads=self.kv_heads // tp,
            intermediate=self.intermediate // tp,
            vocab=self.vocab // tp,
        )


LLAMA_70B = Shape("Llama-3.1-70B shape", 8192, 28672, 80, 64, 8, 128256, torch.bfloat16, 128)
LLAMA_8B = Shape("Llama-3.1-8B shape", 4096, 14336, 32, 32, 8, 128256, torch.bfloat16, 128)
# By what the benchmarks call them.
MODELS = {"8b": LLAMA_8B, "70b": LLAMA_70B}
TINY = Shape("tiny llama", 128, 256, 2, 8, 4, 512, torch.float32, 16)


def path_of(layer: int, module: str) -> str:
    block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{module}"


def folder_of(shape: Shape, root: Path) -> Path:
    """Where a benchmark keeps this shape's files, so that one --files folder can serve several shapes."""
    return root / f"{shape.name.replace(',', '').replace(' ', '-')}-{shape.layers}"


@contextmanager
def at_once(file: Path) -> Iterator[Path]:
    """A temporary name, which becomes `file` when the block is through: what is there is whole, also after a run that was cut off."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def keep_model(shape: Shape, folder: Path) -> Path:
    """write_model, unless an earlier run left the model there."""
    if not (folder / "pytorch_model.bin").exists():
        print(f"Writing a random model ({shape.name}, {shape.layers} layers) ...", flush=True)
        write_model(shape, folder)
    return folder


def write_model(shape: Shape, folder: Path) -> Path:
    """Configuration and weights in PyTorch's format, where all layers can share one layer's tensors: 3 GB for 8B parameters.

    SGLang's own LoRA cannot load adapters with `--load-format dummy` (model_loader/loader.py:_prepare_weights), so the weights have
    to be a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(shape.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    draw = _Draw(shape.dtype, seed=0)
    layer = {module: draw(outputs, inputs) for module in MODULES for inputs, outputs in [shape.linear(module)]}
    norm = torch.ones(shape.hidden, dtype=shape.dtype)
    weights = {"model.embed_tokens.weight": draw(shape.vocab, shape.hidden), "model.norm.weight": norm}
    weights["lm_head.weight"] = draw(shape.vocab, shape.hidden)
    for i in range(shape.layers):
        weights.update({f"{path_of(i, module)}.weight": weight for module, weight in layer.items()})
        weights[f"model.layers.{i}.input_layernorm.weight"] = norm
        weights[f"model.layers.{i}.post_attention_layernorm.weight"] = norm
    with at_once(folder / "pytorch_model.bin") as file:
        torch.save(weights, file)
    return folder


class _Draw:
    """Normal matrices scaled so that a product keeps its input's size."""

    def __init__(self, dtype: torch.dtype, seed: int, gain: float = 1.0):
        self._dtype, self._gain = dtype, gain
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: int, columns: int) -> torch.Tensor:
        matrix = torch.empty(rows, columns).normal_(std=self._gain * columns**-0.5, generator=self._generator)
        return matrix.to(self._dtype)


def parameters(shape: Shape, rank: int, nblocks: int | None, modules: Sequence[str] = MODULES) -> int:
    """Of one adapter on these modules of every layer; a block-diagonal factor stores only its blocks."""
    total = 0
    for module in modules:
        inputs, outputs = shape.linear(module)
        a, b = rank * inputs, rank * outputs
        if nblocks and module in ROW:
            a //= nblocks
        elif nblocks:
            b //= nblocks
        total += a + b
    return total * shape.layers


def matched_rank(shape: Shape, rank: int, nblocks: int, ratio: float = 1.0, modules: Sequence[str] = MODULES) -> int:
    """Rank of the block-diagonal adapter, a multiple of nblocks, whose parameters come closest to `ratio` times a plain one's of `rank`."""
    target = ratio * parameters(shape, rank, None, modules)
    candidates = range(nblocks, 4 * rank + nblocks, nblocks)
    return min(candidates, key=lambda r: abs(parameters(shape, r, nblocks, modules) - target))


def keep_adapter(
    shape: Shape, folder: Path, rank: int, nblocks: int | None, seed: int, modules: Sequence[str] = MODULES
) -> Path:
    """write_adapter, unless an earlier run left the adapter there."""
    if not (folder / "adapter_model.safetensors").exists():
        write_adapter(shape, folder, rank, nblocks, seed, modules)
    return folder


def write_adapter(
    shape: Shape, folder: Path, rank: int, nblocks: int | None, seed: int, modules: Sequence[str] = MODULES
) -> Path:
    """PEFT's format; updates move a layer's output by about a tenth of its size."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
    }
    if nblocks:
        config["use_bdlora"] = {
            "nblocks": nblocks,
            "target_modules_bd_a": [module for module in modules if module in ROW],
            "target_modules_bd_b": [module for module in modules if module in COLUMN],
            "match_strict": True,
        }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    draw_a, draw_b = _Draw(shape.dtype, 2 * seed), _Draw(shape.dtype, 2 * seed + 1, gain=0.1)
    weights = {}
    for layer in range(shape.layers):
        for module in modules:
            inputs, outputs = shape.linear(module)
            prefix = f"base_model.model.{path_of(layer, module)}"
            weights[f"{prefix}.lora_A.weight"] = draw_a(rank, inputs // (nblocks or 1) if module in ROW else inputs)
            weights[f"{prefix}.lora_B.weight"] = draw_b(outputs, rank if module in ROW else rank // (nblocks or 1))
    with at_once(folder / "adapter_model.safetensors") as file:
        save_file(weights, file)
    return folder


def write_adapters(
    shape: Shape, root: Path, count: int, rank: int, nblocks: int | None, done: Callable[[], object]
) -> list[Path]:
    """`count` adapters in root, those that are there already kept; done is called after each."""

    def write(i: int) -> Path:
        folder = keep_adapter(shape, root / f"r{rank}-nb{nblocks or 0}-{i:02d}", rank, nblocks, seed=i)
        done()
        return folder

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(write, range(count)))


def bytes_per_rank(shape: Shape, folder: Path, tp: int) -> int:
    """What our pool needs for one of these adapters."""
    return report(read_adapter(folder, folder.name), tp).per_rank["as served"] * shape.dtype.itemsize
