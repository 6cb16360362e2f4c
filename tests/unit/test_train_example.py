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
import transformers
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


@pytest.fixture
def rare_log(monkeypatch):
    """Trainer by itself logs the first of four steps only."""
    prepare = transformers.TrainingArguments.__post_init__

    def rarely(arguments):
        arguments.logging_steps = 5
        prepare(arguments)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", rarely)


@pytest.fixture
def whole(train, config, rare_log, tmp_path):
    """A run that nothing stopped."""
    folder = tmp_path / "whole"
    assert train.main([str(config), "--output", str(folder)]) == 0
    return folder


def scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "training.json").read_text())["scores"]


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
def test_result_loads_in_peft_and_validates(train, config, zoo, tmp_path, rare_log, kind, monkeypatch):
    done, train_plainly = [], transformers.Trainer.train
    monkeypatch.setattr(transformers.Trainer, "train", lambda *a, **words: done.append(train_plainly(*a, **words)))
    assert train.main([str(config), "--kind", kind]) == 0
    out = tmp_path / "out"
    assert read_adapter(out).kind == {"bd": "block-diagonal", "lora": "plain"}[kind]
    assert adapters_command(["validate", str(out), "--model", str(zoo.model("llama")), "--tp", "2"]) == 0
    assert scores(out)["train_loss"] == pytest.approx(done[0].training_loss, rel=1e-6)
    tokenizer, base = train.load(str(zoo.model("llama")), torch.float32)
    rows = [train.encode(tokenizer, row, 64) for row in ROWS]
    batches = [train.collate(rows[i : i + 4], tokenizer.pad_token_id) for i in (0, 4, 8)]  # as the Trainer means them
    with torch.no_grad():
        untrained = sum(base(**batch).loss.item() for batch in batches) / 3
        model = PeftModel.from_pretrained(base, str(out))
        loss = sum(model(**batch).loss.item() for batch in batches) / 3
    assert loss == pytest.approx(scores(out)["eval_loss"], abs=1e-4)
    assert loss < untrained - 0.1


@pytest.mark.parametrize("stopped", ["after step 2", "in step 4's checkpoint", "after step 4"])
def test_resumed_run_equals_an_uninterrupted_one(train, config, whole, tmp_path, stopped):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    # What comes later is lost.
    if stopped == "after step 2":
        shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    elif stopped == "in step 4's checkpoint":
        for name in ("trainer_state.json", "optimizer.pt"):
            (out / "checkpoints" / "checkpoint-4" / name).unlink()
    (out / "adapter_model.safetensors").unlink()
    record = json.loads((out / "training.json").read_text())
    (out / "training.json").write_text(json.dumps({"settings": record["settings"]}))

    assert train.main([str(config)]) == 0
    assert scores(out) == pytest.approx(record["scores"], rel=1e-6)
    once, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (whole, out))
    assert once.keys() == resumed.keys()
    for name in once:
        torch.testing.assert_close(once[name], resumed[name], rtol=0, atol=1e-6)


def test_finished_run_is_not_trained_again(train, config, whole, capsys):
    record = json.loads((whole / "training.json").read_text()) | {"scores": {"train_loss": 7.0}}
    (whole / "training.json").write_text(json.dumps(record))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    capsys.readouterr()
    assert train.main([str(config), "--output", str(whole)]) == 0
    printed = capsys.readouterr()
    assert "all 4 steps are done, nothing is trained" in printed.err
    assert json.loads(printed.out.splitlines()[-1]) == {"train_loss": 7.0}
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_unreadable_record_is_named(train, config, whole, capsys):
    (whole / "training.json").write_text("{")
    assert train.main([str(config), "--output", str(whole)]) == 2
    assert "training.json is not what a run of this script wrote" in capsys.readouterr().err


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
        (["--kind", "lora", "--target-modules", "norm"], "target_modules = ['norm']: Target module LlamaRMSNorm"),
        (["--model", "/nowhere"], "cannot be loaded"),
        (["--train-file", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["--train-file", "skill:chess"], "no such skill"),
        (["--max-length", "3"], "raise max_length = 3"),
        (["--rank", "999999999996"], "rank = 999999999996: has to be at most"),
        (["--seed", "-1"], "seed = -1: has to be at least 0"),
        (["--seed", "4294967296"], "seed = 4294967296: has to be at least 0 and below"),
        (["--weight-decay", "-3"], "weight_decay = -3.0: has to be at least 0"),
        (["--alpha", "0"], "alpha = 0.0: has to be above 0"),
        (["--eval-every", "-1"], "eval_every = -1: has to be at least 0"),
        (["--save-every", "-1"], "save_every = -1: has to be above 0"),
        (["--output", "/dev/null/x"], "output = /dev/null/x: cannot be written to (Not a directory)"),
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
    good = {"role": "user", "content": "a"}
    for row in (
        {"prompt": "a"}, {"prompt": "a", "answer": 1}, ["text"], {"messages": "abc"}, {"messages": [good]},
        {"messages": [good, {"role": "assistant"}]}, {"messages": [good, {"role": "assistant", "content": None}]},
    ):  # fmt: skip
        bad.write_text(json.dumps({"messages": [good, good]}) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(train.TrainError, match="line 2: needs texts"):
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
    options = ["--train-file", str(tmp_path / "rows.jsonl")]
    assert heal.main([*words, *options, "--out", "/dev/null/x"]) == 2
    assert "out = /dev/null/x: cannot be written to (Not a directory)" in capsys.readouterr().err
    assert heal.main([*words, *options, "--steps", "8", "--batch", "12", "--lr", "1e-3"]) == 0
    before, after = (float(word) for word in capsys.readouterr().out.replace("->", "").split() if word[0].isdigit())
    assert after < 0.8 * before
    assert read_adapter(healed).kind == "block-diagonal"
    base = AutoModelForCausalLM.from_pretrained(zoo.model("llama"), dtype=torch.float32)
    PeftModel.from_pretrained(base, str(healed))
    # As on a GPU: a 16-bit base under 32-bit adapters.
    words[-1] = str(tmp_path / "healed-16")
    assert heal.main([*words, *options, "--steps", "2", "--precision", "bfloat16"]) == 0
    assert load_file(tmp_path / "healed-16" / "adapter_model.safetensors").popitem()[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "-1"], "lr = -1.0: has to be a number above 0"),
        (["--lr", "nan"], "lr = nan: has to be a number above 0"),
        (["--batch", "0"], "batch = 0: has to be a number above 0"),
        (["--steps", "-1"], "steps = -1: has to be a number above 0"),
        (["--max-length", "0"], "max_length = 0: has to be a number above 0"),
        (["--seed", "-1"], "seed = -1: has to be at least 0"),
        ([], "teacher = {}: cannot be loaded"),
    ],
)
def test_mistakes_in_healing_are_named(heal, zoo, tmp_path, config, capsys, options, words):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    paths = [
        "--teacher",
        tmp_path,
        "--student",
        tmp_path,
        "--train-file",
        tmp_path / "rows.jsonl",
        "--out",
        tmp_path / "out",
    ]
    assert heal.main(["--model", str(zoo.model("llama")), *map(str, paths), *options]) == 2
    assert words.format(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
