"""Random LoRA and BD-LoRA adapters, made and saved by PEFT itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = ATTENTION + MLP
ROW = ("o_proj", "down_proj")
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Recipe:
    """What to pass to PEFT: ``nblocks`` None makes plain LoRA; ``more`` holds further ``LoraConfig`` fields."""

    name: str
    rank: int
    nblocks: int | None = None
    targets: tuple[str, ...] | str = ALL
    bd_a: tuple[str, ...] = ROW
    bd_b: tuple[str, ...] = COLUMN
    match_strict: bool = True
    more: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def config(self):
        from peft import BdLoraConfig, LoraConfig

        block_diagonal = self.nblocks and BdLoraConfig(
            target_modules_bd_a=list(self.bd_a),
            target_modules_bd_b=list(self.bd_b),
            nblocks=self.nblocks,
            match_strict=self.match_strict,
        )
        fields = {"lora_alpha": 2 * self.rank, "task_type": "CAUSAL_LM", **self.more}
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return LoraConfig(r=self.rank, target_modules=targets, use_bdlora=block_diagonal or None, **fields)


def write_adapter(model_dir: Path, recipe: Recipe, folder: Path, gain: float = 0.15) -> Path:
    """Write the adapter of ``recipe`` for the model in ``model_dir`` to ``folder`` and return it.

    Every factor is drawn by hand (PEFT starts a block-diagonal B at zero), and scaled so that, whatever the rank, alpha
    and structure, the update moves a layer's output by about ``gain`` times its size; an embedding's by twice that, because
    what the layers add to it hides it.
    """
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(base, recipe.config())
    random = torch.Generator().manual_seed(1000 + recipe.seed)
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        if "default" in module.lora_embedding_A:
            a, b = module.lora_embedding_A["default"].data, module.lora_embedding_B["default"].data
            size, std = 2 * module.get_base_layer().weight.std().item(), 1.0
        else:
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            size, std = 1.0, a.shape[1] ** -0.5
        a.normal_(std=std, generator=random)
        b.normal_(std=gain * size / (module.scaling["default"] * b.shape[1] ** 0.5), generator=random)
    model.save_pretrained(folder)
    return folder


# rank_pattern and alpha_pattern name modules as PEFT does, by the end of the module path or by a regular expression.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("plain-r2", 2, seed=1),
        Recipe("plain-r8-attention", 8, targets=ATTENTION, seed=2),
        Recipe("plain-r16-mlp", 16, targets=MLP, more={"use_rslora": True}, seed=3),
        Recipe("plain-r32", 32, more={"lora_alpha": 7}, seed=4),
        Recipe("bd1-r4", 4, 1, seed=5),
        Recipe("bd2-r8", 8, 2, seed=6),
        Recipe("bd4-r16", 16, 4, seed=7),
        Recipe("bd8-r32", 32, 8, seed=8),
        Recipe("bd2-attention", 6, 2, targets=ATTENTION, seed=9),
        Recipe("bd4-mlp", 12, 4, targets=MLP, seed=10),
        Recipe("bd8-r8-rslora", 8, 8, more={"use_rslora": True, "lora_alpha": 12}, seed=11),
        Recipe(
            "bd4-patterns",
            8,
            4,
            more={
                "rank_pattern": {"q_proj": 16, "down_proj": 4, r".*layers\.1\.self_attn\.o_proj": 32},
                "alpha_pattern": {"v_proj": 3, r".*layers\.0\.mlp\.up_proj": 40},
            },
            seed=12,
        ),
        Recipe(
            "plain-patterns",
            4,
            more={"rank_pattern": {"k_proj": 10, "gate_proj": 3}, "alpha_pattern": {"o_proj": 1}, "use_rslora": True},
            seed=13,
        ),
        # o_proj and up_proj are in neither list: plain modules inside a block-diagonal adapter.
        Recipe("bd4-mixed", 16, 4, bd_a=("down_proj",), bd_b=("q_proj", "k_proj", "v_proj", "gate_proj"),
               match_strict=False, seed=14),
        # The lists match substrings of the whole module path: layer 0's MLP is plain, layer 1's block-diagonal.
        Recipe("bd2-mixed-by-layer", 8, 2, bd_a=("layers.1.mlp.down_proj",), bd_b=("layers.1.mlp.up_proj",),
               match_strict=False, seed=15),
        Recipe("bd4-layer1", 8, 4, more={"layers_to_transform": [1], "layers_pattern": "layers"}, seed=16),
        Recipe("bd2-regex", 4, 2, targets=r".*layers\.0\.(self_attn\.[qv]_proj|mlp\.down_proj)", seed=17),
        Recipe("plain-q-only", 8, targets=("q_proj",), seed=18),
        Recipe("bd4-kv-only", 8, 4, targets=("k_proj", "v_proj"), bd_a=(), seed=19),
        Recipe("plain-vocabulary", 6, targets=(*ALL, *VOCABULARY), more={"use_rslora": True, "lora_alpha": 9}, seed=20),
        Recipe("plain-head", 8, targets=("lm_head",), seed=21),
        Recipe("plain-embedding", 3, targets=("embed_tokens",), seed=22),
        # lm_head is plain beside block-diagonal layers; PEFT has no embedding in such an adapter.
        Recipe("bd4-head", 8, 4, targets=(*ALL, "lm_head"), match_strict=False, seed=23),
    )
}  # fmt: skip
