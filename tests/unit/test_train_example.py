"""examples/train.py and heal.py on a tiny model: what they write loads in PEFT and passes the server's checks."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sgl_bdlora.adapters import read_adapter
from sgl_bdlora.adapters.__main__ import main as adapters_command

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = [{"prompt": f"Add {i} and {i}.", "answer": f"{2 * i}"} for i in range(12)]


@pytest.fixture(scope="module")
def train():
    sys.path.insert(0, str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for each other's threads
    try:
        yield importlib.import_module("train")
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(EXAMPLES))
        for name in ("train", "heal"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def heal(train):
    return importlib.import_module("heal")


@pytest.fixture
def config(zoo, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields = {
        "model": str(zoo.model("llama")), "train_file": str(data), "eval_file": str(data), "output": str(tmp_path / "out"),
        "kind": "bd", "nblocks": 4, "rank": 8, "steps": 4, "batch": 4, "lr": 5e-3, "save_every": 2, "max_length": 64,
        "precision": "float32",
    }  # fmt: skip
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(fields))
    return path


def test_block_diagonal_a_starts_as_small_as_a_loras(train, zoo):
    from peft import get_peft_model

    largest = {}
    for start in ("peft", "lora"):
        chosen = train.Settings(model="", train_file="", output=Path(), nblocks=4, rank=8)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(zoo.model("llama")), train.lora_config(chosen))
        if start == "lora":
            train.start_as_lora(model)
        for name, layer in model.named_modules():
            if name.endswith(("q_proj", "down_proj")):
                # Of 1: the bound of a LoRA's start.
                largest[start, name[-6:]] = layer.lora_A["default"].weight.abs().max().item() * layer.in_features**0.5
    assert largest["peft", "q_proj"] == pytest.approx(1, abs=0.05)
    assert largest["peft", "n_proj"] == pytest.approx((6 * 4) ** 0.5, rel=0.05)
    assert largest["lora", "q_proj"] == pytest.approx(1, abs=0.05)
    assert largest["lora", "n_proj"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["bd", "lora"])
def test_result_loads_in_peft_and_validates(train, config, zoo, tmp_path, kind, capsys):
    assert train.main([str(config), "--kind", kind]) == 0
    out = tmp_path / "out"
    assert read_adapter(out).kind == {"bd": "block-diagonal", "lora": "plain"}[kind]
    assert adapters_command(["validate", str(out), "--model", str(zoo.model("llama")), "--tp", "2"]) == 0
    scores = json.loads((out / "training.json").read_text())["scores"]
    tokenizer, base = train.load(str(zoo.model("llama")), torch.float32)
    rows = [train.encode(tokenizer, row, 64) for row in ROWS]
    batches = [train.collate(rows[i : i + 4], tokenizer.pad_token_id) for i in (0, 4, 8)]  # as the Trainer means them
    with torch.no_grad():
        untrained = sum(base(**batch).loss.item() for batch in batches) / 3
        model = PeftModel.from_pretrained(base, str(out))
        loss = sum(model(**batch).loss.item() for batch in batches) / 3
    assert loss == pytest.approx(scores["eval_loss"], abs=1e-4)
    assert loss < untrained - 0.1


def test_resumed_run_equals_an_uninterrupted_one(train, config, tmp_path):
    assert train.main([str(config), "--output", str(tmp_path / "whole")]) == 0

    # Stopped after the checkpoint of step 2: what comes later is lost.
    assert train.main([str(config)]) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    assert train.main([str(config)]) == 0
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(config, tmp_path):
    command = [str(EXAMPLES / "train.py"), str(config), "--eval-file", "null"]
    runs = {
        "one": [sys.executable, *command, "--batch", "4"],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command, "--batch", "2"],
    }  # fmt: skip
    printed = {}
    for name, words in runs.items():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*words, "--output", str(tmp_path / name)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in runs)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
    assert printed["two"].count("train_loss") == printed["one"].count("train_loss")


def test_only_answers_count(train, zoo):
    tokenizer, _ = train.load(str(zoo.model("llama")), torch.float32)
    row = train.encode(tokenizer, {"prompt": "Hello", "answer": "Paris"}, 64)
    counted = [token for token in row["labels"] if token != train.IGNORED]
    assert tokenizer.decode(counted) == "Paris<|im_end|>"
    assert row["input_ids"][-len(counted) :] == counted
    whole = train.encode(tokenizer, {"text": "Paris"}, 64)
    assert whole["labels"] == whole["input_ids"] == counted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "6"], "rank = 6: has to be a multiple of nblocks = 4"),
        (["--rank", "x"], "rank = 'x': has to be a whole number"),
        (["--nblocks", "3", "--rank", "6"], "nblocks = 3 does not divide"),
        (["--target-modules", "wq"], "block-diagonal adapters are for q_proj"),
        (["--kind", "lora", "--target-modules", "wq"], "the model has no layer wq"),
        (["--model", "/nowhere"], "cannot be loaded"),
        (["--train-file", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["--train-file", "skill:chess"], "no such skill"),
        (["--max-length", "3"], "raise max_length = 3"),
    ],
)
def test_mistakes_are_named(train, config, capsys, options, words):
    assert train.main([str(config), *options]) == 2
    assert words in capsys.readouterr().err


def test_unknown_field_and_bad_line(train, config, tmp_path, capsys):
    config.write_text(json.dumps({**json.loads(config.read_text()), "learning_rate": 1}))
    assert train.main([str(config)]) == 2
    assert "unknown field 'learning_rate'" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(train.TrainError, match="line 2"):
        train.read_examples(str(bad))


def test_shipped_configuration_is_valid(train):
    chosen = train.settings([str(EXAMPLES / "train.yaml")])
    assert chosen.kind == "bd"
    assert train.read_examples(chosen.eval_file, held_out=True)


def test_healing_brings_a_converted_adapter_closer(heal, train, config, zoo, tmp_path, capsys):
    assert train.main([str(config), "--kind", "lora", "--rank", "4", "--steps", "6"]) == 0
    lora, fitted = tmp_path / "out", tmp_path / "fitted"
    assert adapters_command(["convert", str(lora), str(fitted), "--nblocks", "4", "--rank", "4"]) == 0
    healed = tmp_path / "healed"
    words = ["--model", str(zoo.model("llama")), "--teacher", str(lora), "--student", str(fitted), "--out", str(healed)]
    capsys.readouterr()
    assert (
        heal.main(
            [*words, "--train-file", str(tmp_path / "rows.jsonl"), "--steps", "8", "--batch", "12", "--lr", "1e-3"]
        )
        == 0
    )
    before, after = (float(word) for word in capsys.readouterr().out.replace("->", "").split() if word[0].isdigit())
    assert after < 0.8 * before
    assert read_adapter(healed).kind == "block-diagonal"
    base = AutoModelForCausalLM.from_pretrained(zoo.model("llama"), dtype=torch.float32)
    PeftModel.from_pretrained(base, str(healed))
    # As on a GPU: a 16-bit base under 32-bit adapters.
    words[-1] = str(tmp_path / "healed-16")
    options = ["--train-file", str(tmp_path / "rows.jsonl"), "--steps", "2", "--precision", "bfloat16"]
    assert heal.main([*words, *options]) == 0
    assert load_file(tmp_path / "healed-16" / "adapter_model.safetensors").popitem()[1].dtype == torch.float32
