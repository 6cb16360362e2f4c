"""Train a LoRA or a block-diagonal LoRA with PEFT and Transformers' Trainer.

    python examples/train.py examples/train.yaml
    python examples/train.py examples/train.yaml --kind lora --rank 4 --output adapters/json-lora

Data is JSON lines of {"prompt", "answer"}, {"messages": [{"role", "content"}, ...]} or {"text"}. Prompts go through the tokenizer's chat
template, if it has one, as a server does it; the loss counts answers (of messages: the last one) and whole texts. A run that was stopped
goes on from its last checkpoint. The result is checked as `python -m sgl_bdlora.adapters validate` does it.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")
IGNORED = -100


class TrainError(ValueError):
    """What is wrong with a configuration, a file or a model, and what to do."""


@dataclass(frozen=True)
class Settings:
    """The fields of the configuration file. examples/train.yaml says what each means."""

    model: str
    train_file: str
    output: Path
    eval_file: str | None = None
    kind: str = "bd"
    nblocks: int = 2
    start: str = "lora"
    rank: int = 16
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: [*COLUMN_PARALLEL, *ROW_PARALLEL])
    steps: int = 240
    batch: int = 32
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_length: int = 512
    precision: str = "auto"
    eval_every: int = 0
    save_every: int = 60
    seed: int = 0
    resume: bool = True

    def __post_init__(self):
        def need(ok: bool, name: str, words: str) -> None:
            if not ok:
                raise TrainError(f"{name} = {getattr(self, name)!r}: {words}")

        need(self.kind in ("bd", "lora"), "kind", "has to be bd or lora")
        need(self.start in ("lora", "peft"), "start", "has to be lora or peft")
        need(self.precision in ("auto", *PRECISIONS), "precision", f"has to be auto, {', '.join(PRECISIONS)}")
        for name in ("rank", "steps", "batch", "gradient_accumulation", "lr", "max_length", "save_every"):
            need(getattr(self, name) > 0, name, "has to be above 0")
        for name in ("weight_decay", "eval_every"):
            need(getattr(self, name) >= 0, name, "has to be at least 0")
        need(self.alpha is None or self.alpha > 0, "alpha", "has to be above 0, or null for 4 x rank")
        need(0 <= self.seed < SEEDS, "seed", f"has to be at least 0 and below {SEEDS}")
        need(0 <= self.warmup < 1, "warmup", "is a share of the steps, at least 0 and below 1")
        need(0 <= self.dropout < 1, "dropout", "has to be at least 0 and below 1")
        need(bool(self.target_modules), "target_modules", "names no module")
        if self.kind == "bd":
            need(self.nblocks > 1, "nblocks", "a block-diagonal adapter has at least 2; kind lora has none")
            need(self.rank % self.nblocks == 0, "rank", f"has to be a multiple of nblocks = {self.nblocks}")
            known = (*COLUMN_PARALLEL, *ROW_PARALLEL)
            words = f"block-diagonal adapters are for {', '.join(known)}"
            need(set(self.target_modules) <= set(known), "target_modules", words)


PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SEEDS = 2**32  # NumPy's generator takes no larger one


# Configuration


def settings(argv: list[str]) -> Settings:
    """Of a configuration file and the options that override it. Raises TrainError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML or JSON, for example examples/train.yaml")
    for option in dataclasses.fields(Settings):
        flag = f"--{option.name.replace('_', '-')}"
        if option.type is bool or option.type == "bool":
            parser.add_argument(flag, dest=option.name, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag, dest=option.name, nargs="+" if option.name == "target_modules" else None)
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    try:
        fields = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise TrainError(f"{path} has to be a mapping of names to values")
    fields |= {name: value for name, value in given.items() if value is not None}
    known = {option.name: option for option in dataclasses.fields(Settings)}
    if unknown := sorted(set(fields) - set(known)):
        raise TrainError(f"{path}: unknown field {unknown[0]!r}; known are {', '.join(known)}")
    required = [name for name, option in known.items() if option.default is option.default_factory]
    if missing := [name for name in required if not fields.get(name)]:
        raise TrainError(f"{path}: field {missing[0]!r} is missing")
    return Settings(**{name: _value(name, known[name].type, value) for name, value in fields.items()})


def _value(name: str, kind: object, value: object) -> object:
    """`value`, from YAML or the command line, as its field's type."""
    if value is None or (isinstance(value, str) and value in ("null", "none")):
        if kind in (str | None, float | None):
            return None
        raise TrainError(f"{name} needs a value")
    if kind == list[str]:
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise TrainError(f"{name} = {value!r}: has to be a list of names")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise TrainError(f"{name} = {value!r}: has to be true or false")
        return value
    if kind in (int, float, float | None):
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise TrainError(f"{name} = {value!r}: has to be a {'whole ' if kind is int else ''}number")
        return int(number) if kind is int else number
    return Path(str(value)).expanduser() if kind is Path else str(value)


# Data


def read_examples(source: str, held_out: bool = False) -> list[dict]:
    """Rows of a JSON-lines file, or of `skill:NAME` (examples/skills). Raises TrainError with the line."""
    if source.startswith("skill:"):
        sys.path.insert(0, str(Path(__file__).parent / "skills"))
        import data

        name = source.removeprefix("skill:")
        if name not in data.SKILLS:
            raise TrainError(f"{source}: there is no such skill; there are {', '.join(data.SKILLS)}")
        split = data.load(name)
        return [dataclasses.asdict(example) for example in (split.held_out if held_out else split.train)]
    rows = []
    try:
        lines = Path(source).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{source} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TrainError(f"{source}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not _complete(row):
            raise TrainError(
                f"{source}, line {number}: needs texts named prompt and answer, or text, or messages: two or more of role and "
                "content, the last one's a text"
            )
        rows.append(row)
    if not rows:
        raise TrainError(f"{source} has no examples")
    return rows


def _complete(row: dict) -> bool:
    if messages := row.get("messages"):
        whole = isinstance(messages, list) and all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        )
        return whole and len(messages) > 1 and isinstance(messages[-1]["content"], str)
    texts = [row[name] for name in ("prompt", "answer", "text") if name in row]
    return ("text" in row or {"prompt", "answer"} <= row.keys()) and all(isinstance(text, str) for text in texts)


def encode(tokenizer, row: dict, max_length: int) -> dict[str, list[int]]:
    """input_ids and labels of one example. Prompt and answer are tokenised apart, because a server tokenises the prompt alone."""
    end = tokenizer.eos_token or ""
    if "text" in row:
        prompt, answer = "", row["text"] + end
    else:
        messages = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        *before, last = messages
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        else:
            prompt = "".join(f"{message['content']}\n" for message in before)
        answer = last["content"] + end
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)]
    if len(ids[0]) >= max_length:
        raise TrainError(
            f"the prompt {prompt[:60]!r}... has {len(ids[0])} tokens: raise max_length = {max_length}, or shorten it"
        )
    whole, labels = ids[0] + ids[1], [IGNORED] * len(ids[0]) + ids[1]
    return {"input_ids": whole[:max_length], "labels": labels[:max_length]}


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """int64 tensors (batch, longest) padded on the right: input_ids, attention_mask, labels."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([entry + [filler] * (longest - len(entry)) for entry in lists])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


# Model


def dtype_of(precision: str) -> torch.dtype:
    if precision != "auto":
        return PRECISIONS[precision]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load(path: str, dtype: torch.dtype):
    """Tokenizer and model. The frozen base is held in `dtype`; PEFT keeps the adapter's own weights in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(Path(path).expanduser()) if path.startswith(("~", "/", ".")) else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TrainError(
            f"model {path} cannot be loaded ({reason}); is it a folder in Transformers' format?"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model


def lora_config(chosen: Settings):
    """PEFT's configuration. Which factor is block-diagonal follows from what tensor parallelism splits."""
    from peft import BdLoraConfig, LoraConfig

    sides = {
        "target_modules_bd_a": [name for name in chosen.target_modules if name in ROW_PARALLEL],
        "target_modules_bd_b": [name for name in chosen.target_modules if name in COLUMN_PARALLEL],
    }
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=chosen.rank,
        # The update is alpha / r (rsLoRA: alpha / sqrt(r)) times B A: with alpha in proportion to the rank one learning rate suits all.
        lora_alpha=4 * chosen.rank if chosen.alpha is None else chosen.alpha,
        use_rslora=chosen.use_rslora,
        lora_dropout=chosen.dropout,
        target_modules=chosen.target_modules,
        use_bdlora=BdLoraConfig(nblocks=chosen.nblocks, **sides) if chosen.kind == "bd" else None,
    )


def start_as_lora(model: torch.nn.Module) -> None:
    """Draw block-diagonal A anew, uniform within 1 / sqrt(in), as PEFT draws a dense A. Its own start is sqrt(6 nblocks) times as wide."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in ROW_PARALLEL and hasattr(module, "lora_A"):
            bound = module.in_features**-0.5
            for factor in module.lora_A.values():
                torch.nn.init.uniform_(factor.weight, -bound, bound)


def check_layers(model: torch.nn.Module, chosen: Settings) -> None:
    """Raise TrainError where a layer is missing, its blocks would not be whole, or no layer has a side as long as the rank."""
    longest = 0
    for name in chosen.target_modules:
        layers = [m for path, m in model.named_modules() if path.rpartition(".")[2] == name]
        if not layers:
            raise TrainError(f"target_modules: the model has no layer {name}")
        longest = max(longest, *(side for layer in layers for side in layer.weight.shape))
        if chosen.kind != "bd":
            continue
        side = "in_features" if name in ROW_PARALLEL else "out_features"
        for size in {getattr(layer, side) for layer in layers}:
            if size % chosen.nblocks:
                raise TrainError(
                    f"nblocks = {chosen.nblocks} does not divide {name}'s {side} = {size}; choose a divisor"
                )
    if chosen.rank > longest:
        raise TrainError(f"rank = {chosen.rank}: has to be at most {longest}, the longest side of the model's layers")


def make_folder(folder: Path, name: str) -> None:
    """Make `folder`, the value of the field `name`. Raises TrainError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TrainError(
            f"{name} = {folder}: cannot be written to ({error.strerror}); choose another folder"
        ) from error


# The run


def train(chosen: Settings) -> Path:
    """Train, evaluate, save and check; returns the adapter's folder."""
    from peft import get_peft_model
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed

    class LogAtSaves(TrainerCallback):
        """A checkpoint has the losses of all steps before it."""

        def on_step_end(self, args, state, control, **_):
            control.should_log |= control.should_save
            return control

    first = int(os.environ.get("RANK", 0)) == 0  # of torchrun: the one that writes
    set_seed(chosen.seed)
    dtype = dtype_of(chosen.precision)
    tokenizer, base = load(chosen.model, dtype)
    check_layers(base, chosen)
    rows = [encode(tokenizer, row, chosen.max_length) for row in read_examples(chosen.train_file)]
    held_out = None
    if chosen.eval_file:
        held_out = [encode(tokenizer, row, chosen.max_length) for row in read_examples(chosen.eval_file, held_out=True)]
    if first:
        make_folder(chosen.output, "output")
    try:
        model = get_peft_model(base, lora_config(chosen))
    except ValueError as error:
        raise TrainError(f"target_modules = {chosen.target_modules}: {error}") from error
    if chosen.kind == "bd" and chosen.start == "lora":
        start_as_lora(model)
    if chosen.gradient_checkpointing:
        model.enable_input_require_grads()
    if first:
        model.print_trainable_parameters()

    evaluates = bool(held_out and chosen.eval_every)
    arguments = TrainingArguments(
        output_dir=str(chosen.output / "checkpoints"),
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch,
        per_device_eval_batch_size=chosen.batch,
        gradient_accumulation_steps=chosen.gradient_accumulation,
        gradient_checkpointing=chosen.gradient_checkpointing,
        learning_rate=chosen.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(chosen.warmup * chosen.steps)),
        weight_decay=chosen.weight_decay,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=chosen.eval_every or None,
        save_strategy="steps",
        save_steps=chosen.save_every,
        save_total_limit=2,
        logging_steps=max(1, chosen.steps // 50),
        logging_first_step=True,
        seed=chosen.seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        train_dataset=rows,
        eval_dataset=held_out,
        callbacks=[LogAtSaves()],
    )
    last = last_checkpoint(Path(arguments.output_dir))
    if last and not chosen.resume:
        raise TrainError(f"{chosen.output} has checkpoints of another run: remove them, or leave out --no-resume")
    fingerprint = _fingerprint(chosen) | {"processes": arguments.world_size}
    record = chosen.output / "training.json"
    before = read_record(record) if last and record.exists() else {}
    if before and before["settings"] != fingerprint:
        changed = sorted(name for name in fingerprint if fingerprint[name] != before["settings"].get(name))
        raise TrainError(
            f"{chosen.output} holds a run with other settings ({', '.join(changed)}): choose another output, or remove it"
        )
    state = TrainerState.load_from_json(str(last / STATE)) if last else None
    finished = state is not None and state.global_step >= chosen.steps
    if finished and first:
        print(f"{chosen.output}: all {chosen.steps} steps are done, nothing is trained", file=sys.stderr)
    scores = before.get("scores") if finished and (chosen.output / "adapter_model.safetensors").exists() else None
    trainer.accelerator.wait_for_everyone()  # until all have read the record
    if scores is None:
        if first:
            record.write_text(json.dumps({"settings": fingerprint}, indent=1) + "\n")
        if finished:
            model.load_adapter(str(last), "default", is_trainable=True)
        else:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            state = trainer.state
        scores = {"train_loss": mean_loss(state.log_history)}
        if held_out:
            loss = trainer.evaluate()["eval_loss"]
            scores |= {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 50))}
        if first:
            model.save_pretrained(chosen.output)
            record.write_text(json.dumps({"settings": fingerprint, "scores": scores}, indent=1) + "\n")
    if first:
        check(chosen.output)
        print(json.dumps(scores))
    return chosen.output


STATE = "trainer_state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole one: Trainer writes its state last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name[11:].isdecimal()]
    return max(whole, key=lambda path: int(path.name[11:]), default=None)


def mean_loss(history: list[dict]) -> float:
    """Over all steps. Each entry of Trainer's log has the mean over the steps since the entry before."""
    total, done = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - done)
            done = entry["step"]
    return total / max(done, 1)


def read_record(path: Path) -> dict:
    """Settings and scores, as an earlier run wrote them. Raises TrainError."""
    try:
        record = json.loads(path.read_text())
        record["settings"].keys()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainError(f"{path} is not what a run of this script wrote: remove {path.parent}") from error
    return record


def _fingerprint(chosen: Settings) -> dict:
    """The settings that a resumed run has to share with the one it goes on from."""
    free = ("output", "resume", "eval_every", "save_every")
    return {name: value for name, value in dataclasses.asdict(chosen).items() if name not in free}


def check(folder: Path) -> None:
    """What a server checks when it loads the adapter, its limits aside. Raises TrainError."""
    from sgl_bdlora.adapters import validate

    server = validate.Server(None, 1, 2**30, "replicated", 2**62, 2)
    verdict = validate.validate(folder, server)
    if verdict.problems:
        raise TrainError("\n".join(str(problem.error) for problem in verdict.problems))
    print(f"{folder}: {verdict.adapter.kind}, accepted by sgl_bdlora's checks", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    try:
        train(settings(sys.argv[1:] if argv is None else argv))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: {error}\nFix: lower batch and raise gradient_accumulation.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
