"""`validate`: every check of a server by its name, every adapter reported, exit codes for CI."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import RECIPES, Recipe
from zoo.adapters import COLUMN, ROW

from sgl_bdlora.adapters.__main__ import main

FAMILY = "llama"
HEAD = "base_model.model.lm_head.base_layer.weight"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(zoo, tmp_path):
    """A copy of a recipe's adapter, to be spoilt."""

    def copy(recipe, name="odd"):
        return shutil.copytree(zoo.adapter(FAMILY, recipe), tmp_path / name)

    return copy


@pytest.fixture
def run(capsys):
    def run(*words) -> tuple[int, dict, str]:
        code = main(["validate", *map(str, words), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return run


def edit_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensor(folder, key, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_good_adapter_is_good(zoo, run, tp):
    folders = [zoo.adapter(FAMILY, recipe) for recipe in RECIPES]
    code, found, err = run(*folders, "--model", zoo.model(FAMILY), "--tp", tp)
    assert (code, found["ok"], err) == (0, True, "")
    assert [a["name"] for a in found["adapters"]] == list(RECIPES)
    for a in found["adapters"]:
        assert a["problems"] == a["notes"] == []
        assert a["rank"] == max([RECIPES[a["name"]].rank, *RECIPES[a["name"]].more.get("rank_pattern", {}).values()])


def test_bytes_a_rank(zoo, run):
    """Plain rank 32 at TP 2, 4 bytes a number: column layers keep A and half of B, row layers half of A and B."""
    code, found, _ = run(
        zoo.adapter(FAMILY, "plain-r32"), "--model", zoo.model(FAMILY), "--tp", 2, "--dtype", "float32"
    )
    # q, k, v, gate, up; o, down of the zoo's llama: hidden 128, 64 for k and v, 256 in the MLP.
    column = sum(128 + outputs // 2 for outputs in (128, 64, 64, 256, 256))
    row = sum(inputs // 2 + 128 for inputs in (128, 256))
    assert (code, found["adapters"][0]["bytes_per_rank"]) == (0, 4 * 2 * 32 * (column + row))


def test_every_adapter_is_reported_and_the_worst_decides(zoo, run, adapter):
    good = zoo.adapter(FAMILY, "bd4-r16")
    large = zoo.adapter(FAMILY, "plain-r32")
    odd = adapter("plain-r2")
    edit_config(odd, r="2")
    model = ("--model", zoo.model(FAMILY), "--tp", 2, "--max-lora-rank", 16)
    code, found, err = run(odd, large, good, odd.parent / "nowhere", *model)
    assert code == 2
    assert [a["ok"] for a in found["adapters"]] == [False, False, True, False]
    assert [[p["check"] for p in a["problems"]] for a in found["adapters"]] == [["format"], ["rank"], [], ["format"]]
    assert [line.partition(":")[0] for line in err.splitlines()] == [
        "LoRA adapter 'odd'", "LoRA adapter 'plain-r32'", "LoRA adapter 'nowhere'",
    ]  # fmt: skip
    assert err.count("Fix: ") == 3
    code, found, _ = run(good, large, *model)
    assert (code, found["ok"]) == (1, False)
    assert run(good, *model)[0] == 0


def test_all_that_is_wrong_with_one_adapter(zoo, run, adapter):
    folder = adapter("plain-head")
    edit_tensor(folder, HEAD, lambda w: w + 1)
    edit_tensor(folder, "base_model.model.lm_head.lora_A.weight", lambda a: a * float("nan"))
    code, found, _ = run(folder, "--model", zoo.model(FAMILY), "--max-lora-rank", 4, "--lora-pool-gb", 1e-6)
    assert code == 2
    assert [p["check"] for p in found["adapters"][0]["problems"]] == ["values", "rank", "bytes", "base weights"]


# Recipe, what spoils it, options besides --model and --tp 2, exit code, check, words of the message.
CASES = {
    "not JSON": ("bd4-r16", lambda f: (f / "adapter_config.json").write_text("{"), (), 2, "format", ("not valid JSON",)),
    "field": ("bd4-r16", lambda f: edit_config(f, r=0), (), 2, "format", ("r = 0",)),
    "DoRA": ("plain-r2", lambda f: edit_config(f, use_dora=True), (), 2, "format", ("use_dora",)),
    "no weights": (
        "plain-r2", lambda f: os.remove(f / "adapter_model.safetensors"), (), 2, "format", ("adapter_model.safetensors",),
    ),
    "infinite": ("plain-r2", lambda f: edit_tensor(f, Q_A, lambda a: a / 0), (), 2, "values", (Q_A, "infinite")),
    "rank": ("plain-r32", None, ("--max-lora-rank", 31), 1, "rank", ("r = 32", "31", "--max-lora-rank")),
    "bytes": ("plain-r32", None, ("--lora-pool-gb", 1e-5), 1, "bytes", ("10737", "--lora-pool-gb")),
    "wrong side": (
        Recipe("wrong-sided-r16", 16, 4, bd_a=COLUMN, bd_b=ROW, seed=20), None, (), 1, "layers", ("target_modules_bd_a",),
    ),
    "another model's layer": (
        "plain-q-only", lambda f: edit_tensor(f, Q_A, lambda a: a[:, :60]), (), 1, "layers", ("q_proj", "60 inputs"),
    ),
    "another model's vocabulary": (
        "plain-head",
        lambda f: (
            edit_tensor(f, HEAD, lambda w: w[:400]),
            edit_tensor(f, "base_model.model.lm_head.lora_B.weight", lambda b: b[:400]),
        ),
        (), 1, "layers", ("lm_head", "400", "512"),
    ),
    "another model's lm_head": (
        "plain-head", lambda f: edit_tensor(f, HEAD, lambda w: w + 1e-6), (), 1, "base weights", (HEAD, "differs"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(zoo, run, adapter, case):
    recipe, spoil, options, code, check, words = CASES[case]
    folder = adapter(recipe)
    if spoil:
        spoil(folder)
    got, found, err = run(folder, "--model", zoo.model(FAMILY), "--tp", 2, *options)
    assert got == code
    (problem,) = found["adapters"][0]["problems"]
    assert problem["check"] == check
    for word in ("LoRA adapter 'odd': ", "Fix: ", *words):
        assert word in err
    assert problem["problem"] in err


def test_copies_in_the_type_of_training(zoo, run, adapter):
    """A copy saved in bfloat16 of float32 weights is the same model, served in bfloat16."""
    folder = adapter("plain-head")
    edit_tensor(folder, HEAD, lambda w: w.to(torch.bfloat16))
    assert run(folder, "--model", zoo.model(FAMILY))[0] == 0


def test_without_weights_copies_are_noted(zoo, run):
    code, found, _ = run(zoo.adapter(FAMILY, "plain-head"), "--model", zoo.model(FAMILY) / "config.json")
    assert code == 0
    assert found["adapters"][0]["notes"] == [
        f"{HEAD} was not compared with a model's weights (give --model with their directory)"
    ]


def test_without_a_model(zoo, run):
    code, found, err = run(zoo.adapter(FAMILY, "bd4-r16"), "--tp", 8)
    assert code == 0
    assert "--model" in found["adapters"][0]["notes"][0]
    code, _, err = run(zoo.adapter(FAMILY, "bd4-r16"), "--tp", 3)
    assert code == 1
    assert "not divisible by --tp 3" in err


def test_sharding_of_plain_adapters_counts(zoo, run):
    model = ("--model", zoo.model(FAMILY), "--tp", 4)
    replicated, s_lora = (
        run(zoo.adapter(FAMILY, "plain-r32"), *model, "--lora-sharding", name)[1]["adapters"][0]["bytes_per_rank"]
        for name in ("replicated", "s-lora")
    )
    assert s_lora < replicated / 1.5


def test_repeated_kv_heads(zoo, run):
    """2 kv heads on 8 ranks: 4 neighbours hold the same one, and k and v of a rank their whole head's rows."""
    code, found, _ = run(
        zoo.adapter("qwen3", "bd4-r16"), "--model", zoo.model("qwen3"), "--tp", 8, "--dtype", "float32"
    )
    size = found["adapters"][0]["bytes_per_rank"]
    # hidden 128, 8 heads of 32, 2 kv heads; rank 16 in 4 blocks: 4 rows a block, 8 for a kv head, packed in its 2 blocks.
    q, o = 4 * (128 + 32), 4 * (32 + 128)
    kv = 2 * (8 * 128 + 32 * 4)
    mlp = 2 * 4 * (128 + 32) + 4 * (32 + 128)
    assert (code, size) == (0, 4 * 2 * (q + o + kv + mlp))


def test_table(capsys, zoo, adapter):
    folder = adapter("plain-r2")
    edit_config(folder, r=-1)
    assert main(["validate", str(zoo.adapter(FAMILY, "bd4-r16")), str(folder), "--tp", "4"]) == 2
    said = capsys.readouterr()
    assert "block-diagonal" in said.out
    assert "malformed" in said.out
    assert "r = -1" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tp", "0"), "--tp"),
        (("--tp", "3"), "num_attention_heads = 8"),
        (("--max-lora-rank", "x"), "--max-lora-rank"),
        (("--lora-pool-gb", "-1"), "--lora-pool-gb"),
        (("--model", "/no/where"), "/no/where"),
    ],
)
def test_malformed_options(capsys, zoo, words, said):
    try:
        code = main(["validate", str(zoo.adapter(FAMILY, "plain-r2")), "--model", str(zoo.model(FAMILY)), *words])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err
