"""Adapters that cannot be served exactly are refused by name, and the server goes on answering everyone else.

Each builder turns a good adapter directory into a bad one. The words next to it have to be in the message, besides the
adapter's name and a fix: the field, file or tensor at fault.
"""

import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import check
from safetensors.torch import load_file, save_file
from servers import LLAMA, on
from zoo import RECIPES, Recipe, write_adapter
from zoo.adapters import COLUMN, ROW

pytestmark = on(LLAMA)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
O_A = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens."
HEAD = "base_model.model.lm_head."


@dataclass(frozen=True)
class Bad:
    """Spoil the adapter of ``recipe``; each of ``words`` has to be in the message."""

    spoil: Callable[[Path], None]
    words: tuple[str, ...]
    recipe: str | Recipe = "bd4-r16"


def change(**fields) -> Callable[[Path], None]:
    """Set fields of the configuration."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **fields}))

    return spoil


def change_blocks(**fields) -> Callable[[Path], None]:
    """Set fields of ``use_bdlora``."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(use_bdlora={**config["use_bdlora"], **fields})(folder)

    return spoil


def tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Edit the tensors by name."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        edit(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)

    return spoil


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Replace one tensor by what ``make`` does to it."""
    return tensors(lambda weights: weights.update({name: make(weights[name])}))


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the last element, which the last rank holds, ``value``."""

    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[-1, -1] = value
        return tensor

    return make


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) * 2 // 3])


def truncate_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:20])


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def drop_layer_0(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if ".layers.0." in name]:
        del weights[name]


def rename_projection(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "q_proj" in name]:
        weights[name.replace("q_proj", "foo_proj")] = weights.pop(name)


def add_layer_7(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        weights[name.replace(".layers.1.", ".layers.7.")] = weights[name].clone()


def three_blocks(weights: dict[str, torch.Tensor]) -> None:
    """Rank 15 in 3 blocks of a lora_B with 128 rows."""
    for name in weights:
        weights[name] = torch.zeros(15, 128) if "lora_A" in name else torch.zeros(128, 5)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*packed.chunk(4, dim=0))


def add_magnitudes(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.endswith("lora_A.weight")]:
        weights[name.replace("lora_A.weight", "lora_magnitude_vector.weight")] = torch.ones(128)


def add_tokens(weights: dict[str, torch.Tensor]) -> None:
    """Four more tokens, as PEFT saves an adapted embedding that was resized."""
    weights[f"{EMBEDDING}lora_embedding_A"] = torch.ones(3, 516)
    weights[f"{EMBEDDING}base_layer.weight"] = torch.ones(516, 128)


def add_bias(weights: dict[str, torch.Tensor]) -> None:
    weights[Q_B.replace(".weight", ".bias")] = torch.ones(128)


BAD = {
    "missing-safetensors": Bad(lambda folder: (folder / WEIGHTS).unlink(), ("safetensors",)),
    "truncated-safetensors": Bad(truncate, (WEIGHTS,)),
    "truncated-safetensors-header": Bad(truncate_header, (WEIGHTS,)),
    "empty-safetensors-file": Bad(lambda folder: (folder / WEIGHTS).write_bytes(b""), (WEIGHTS,)),
    "not-safetensors": Bad(lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 4096), (WEIGHTS,)),
    "pickle-weights": Bad(pickle_weights, ("adapter_model.bin", "safetensors")),
    "missing-config": Bad(lambda folder: (folder / CONFIG).unlink(), (CONFIG,)),
    "invalid-json": Bad(lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 16,'), (CONFIG,)),
    "config-is-a-list": Bad(lambda folder: (folder / CONFIG).write_text("[1, 2]"), (CONFIG,)),
    "config-is-not-text": Bad(lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00\x81"), (CONFIG,)),
    "not-lora": Bad(change(peft_type="IA3"), ("peft_type", "IA3")),
    "inputs-of-another-model": Bad(put(Q_A, lambda a: torch.zeros(a.shape[0], 64)), ("q_proj", "64"), "plain-r2"),
    "outputs-of-another-model": Bad(put(Q_B, lambda b: torch.zeros(256, b.shape[1])), ("q_proj", "256"), "plain-r2"),
    "packed-outputs-of-another-model": Bad(put(Q_B, lambda b: torch.zeros(256, b.shape[1])), ("q_proj", "256")),
    "layers-of-another-model": Bad(tensors(add_layer_7), ("layers.7",), "plain-r2"),
    "rank-not-divisible": Bad(
        both(
            change(r=18),
            tensors(lambda w: w.update({n: torch.zeros(18, t.shape[1]) for n, t in w.items() if "lora_A" in n})),
        ),
        ("18", "nblocks"),
    ),
    "pattern-rank-not-divisible": Bad(change(rank_pattern={"q_proj": 6}), ("q_proj", "6", "nblocks")),
    "dimension-not-divisible": Bad(
        both(change(r=15), change_blocks(nblocks=3), tensors(three_blocks)),
        ("128", "nblocks = 3"),
        Recipe("q-only", 16, 4, targets=("q_proj",), seed=22),
    ),
    "nblocks-zero": Bad(change_blocks(nblocks=0), ("nblocks",)),
    "wrong-sided": Bad(
        lambda folder: None,
        ("_proj", "target_modules_bd"),
        Recipe("wrong-sided", 16, 4, bd_a=COLUMN, bd_b=ROW, seed=20),
    ),
    "lists-swapped-over-right-tensors": Bad(
        change_blocks(target_modules_bd_a=list(COLUMN), target_modules_bd_b=list(ROW)), ("_proj",)
    ),
    "in-both-lists": Bad(change_blocks(target_modules_bd_a=["proj"]), ("target_modules_bd_a", "target_modules_bd_b")),
    "strict-but-in-no-list": Bad(change_blocks(target_modules_bd_a=["down_proj"]), ("o_proj", "match_strict")),
    "dense-shape-where-b-is-packed": Bad(put(Q_B, unpack), (Q_B, "nblocks")),
    "dense-shape-where-a-is-packed": Bad(put(O_A, unpack), (O_A, "nblocks")),
    "packed-shape-where-b-is-dense": Bad(change(use_bdlora=None), ("_proj",)),
    "nan": Bad(put(Q_A, poke(math.nan)), (Q_A, "NaN")),
    "infinite": Bad(put(O_A, poke(math.inf)), (O_A, "infinite")),
    "nan-in-a-plain-factor": Bad(put(Q_B, poke(math.nan)), (Q_B, "NaN"), "plain-r2"),
    "unknown-target-module": Bad(
        both(change(target_modules=["foo_proj"], use_bdlora=None), tensors(rename_projection)),
        ("foo_proj",),
        "plain-q-only",
    ),
    "tensor-outside-the-targets": Bad(change(target_modules=["q_proj", "v_proj"]), ("_proj",), "plain-r2"),
    "targets-nothing": Bad(both(change(target_modules=["no_such"]), tensors(dict.clear)), ("target",), "plain-r2"),
    "no-tensors": Bad(tensors(dict.clear), ("targets nothing",), "plain-r2"),
    "factor-without-partner": Bad(tensors(lambda weights: weights.pop(Q_B)), ("q_proj", "lora_B"), "plain-r2"),
    "rank-above-the-limit": Bad(lambda folder: None, ("64", "32", "--max-lora-rank"), Recipe("r64", 64, 4, seed=21)),
    "rank-of-the-configuration-differs": Bad(change(r=3), ("3",), "plain-r2"),
    "rank-zero": Bad(change(r=0), ("r = 0",), "plain-r2"),
    "rank-not-a-number": Bad(change(r="16"), ("r = '16'",)),
    "alpha-not-a-number": Bad(change(lora_alpha=None), ("lora_alpha",)),
    "dora": Bad(both(change(use_dora=True), tensors(add_magnitudes)), ("use_dora",), "plain-r2"),
    "dora-weights-only": Bad(tensors(add_magnitudes), ("lora_magnitude_vector",), "plain-r2"),
    "bias-all": Bad(change(bias="all"), ("bias = 'all'",)),
    "lora-bias": Bad(both(change(lora_bias=True), tensors(add_bias)), ("lora_bias",), "plain-r2"),
    "bias-tensor-only": Bad(tensors(add_bias), ("bias",), "plain-r2"),
    "embedding-of-another-model": Bad(
        put(f"{EMBEDDING}base_layer.weight", poke(1.0)),
        ("embed_tokens.base_layer.weight", "differs"),
        "plain-embedding",
    ),
    "lm-head-of-another-model": Bad(
        put(f"{HEAD}base_layer.weight", poke(1.0)), ("lm_head.base_layer.weight", "differs"), "plain-head"
    ),
    "added-tokens": Bad(tensors(add_tokens), ("embed_tokens", "516", "512"), "plain-embedding"),
    "nan-in-the-embedding": Bad(
        put(f"{EMBEDDING}lora_embedding_A", poke(math.nan)), ("lora_embedding_A", "NaN"), "plain-embedding"
    ),
    "block-diagonal-lm-head": Bad(
        change_blocks(target_modules_bd_b=[*COLUMN, "lm_head"]), ("lm_head", "target_modules_bd_b"), "bd4-head"
    ),
    "modules-to-save": Bad(change(modules_to_save=["lm_head"]), ("modules_to_save",)),
    "integer-weights": Bad(put(Q_A, lambda a: (a * 100).to(torch.int8)), (Q_A,), "plain-r2"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_adapter_is_refused_and_others_are_served(live, tmp_path, case):
    bad = BAD[case]
    source = live.folder(bad.recipe) if isinstance(bad.recipe, str) else None
    folder = tmp_path / "adapter"
    if source:
        shutil.copytree(source, folder)
    else:
        write_adapter(live.zoo.model(live.served.family), bad.recipe, folder)
    bad.spoil(folder)
    _refused(live, f"bad-{case}", folder, bad.words)


def test_path_that_does_not_exist(live, tmp_path):
    _refused(live, "bad-path", tmp_path / "nowhere", ("nowhere",))


def test_path_of_a_file(live, tmp_path):
    (tmp_path / "file").write_text("x")
    _refused(live, "bad-file", tmp_path / "file", ("file",))


def test_empty_directory(live, tmp_path):
    _refused(live, "bad-empty", tmp_path, (CONFIG,))


def test_name_that_is_taken(live):
    live.ensure("bd4-r16")
    _refused(live, "bd4-r16", live.folder("plain-r2"), ("bd4-r16",))


def test_unloading_and_asking_for_a_name_that_is_not_loaded(live):
    response = live.server.unload("bad-unknown")
    assert response.status_code == 400
    assert "bad-unknown" in response.text
    ask = live.ask(None)
    body = {"input_ids": list(ask.prompt), "lora_path": "bad-unknown", "sampling_params": {"max_new_tokens": 1}}
    response = live.server.post("/generate", body)
    assert response.status_code == 400
    assert "bad-unknown" in response.text
    check(live.oracle, [ask], live.server.generate([ask]))


def test_a_refused_name_can_be_used_again(live, tmp_path):
    """A refusal leaves nothing behind, on any rank."""
    folder = tmp_path / "adapter"
    shutil.copytree(live.folder("bd4-r16"), folder)
    put(Q_A, poke(math.nan))(folder)
    _refused(live, "second-try", folder, ("NaN",))
    live.load("second-try", live.folder("bd4-r16"))
    ask = live.ask(None, 20)
    ask = type(ask)(ask.prompt, "second-try", live.folder("bd4-r16"))
    check(live.oracle, [ask], live.server.generate([ask]))
    live.unload("second-try")


def _refused(live, name: str, folder: Path, words: tuple[str, ...]) -> None:
    """Load ``folder`` while good requests run; the answer names adapter, fault and fix, and the requests are exact."""
    asks = [live.ask(recipe, 12, new_tokens=6) for recipe in (None, "bd4-r16", "plain-r2")]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(live.server.generate, asks)
        response = live.server.load(name, folder)
        check(live.oracle, asks, answers.result())
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["success"] is False
    message = body["error_message"]
    for word in (name, *words):
        assert word in message, message
    assert "\n" not in message.strip(), message
    assert "Traceback" not in message
    if name not in RECIPES:
        assert "Fix: " in message, message
    check(live.oracle, asks, live.server.generate(asks))
