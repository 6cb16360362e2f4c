"""Train the demo's eight adapters: four skills, each as a block-diagonal LoRA and as a plain LoRA of about that size.

    python examples/skills/train.py --model DIR --out examples/adapters [--skills json sql] [--kinds bd] [--steps N]

DIR holds SmolLM2-135M-Instruct in the Transformers format. Each adapter becomes a folder `<skill>-<kind>` with
`adapter_config.json`, `adapter_model.safetensors` and a card; `index.json` beside them lists all of them for programs.

A prompt goes through the tokenizer's chat template as one user message without a system prompt, as a server does it for
`/v1/chat/completions`. The loss counts the answer's tokens and the end-of-turn token only.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import data
import torch
from peft import BdLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"
# What tensor parallelism splits decides which factor is block-diagonal: B where the output is split, A where the input.
COLUMN_PARALLEL = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW_PARALLEL = ["o_proj", "down_proj"]
# Update = SCALE * B A for every rank, so that one learning rate suits both kinds.
SCALE = 4
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: the templated prompt and the answer with its end-of-turn token."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Score:
    """How a model does on held-out prompts, and what it says to the skill's sample prompt."""

    loss: float  # nats per answer token
    passed: float  # share of its answers that the checker accepts
    sample: str


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[data.Example]) -> list[Encoded]:
    """Tokenise prompt and answer apart from each other, because a server tokenises the prompt alone."""
    encoded = []
    for example in examples:
        messages = [{"role": "user", "content": example.prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = [tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, example.answer + END_OF_TURN)]
        encoded.append(Encoded(*ids))
    return encoded


def collate(rows: list[Encoded], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded int64 tensors (batch, longest): input_ids, attention_mask, labels that ignore prompt and padding."""
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    ids, mask, labels = [], [], []
    for row in rows:
        padding = longest - len(row.prompt) - len(row.answer)
        ids.append(row.prompt + row.answer + [pad] * padding)
        mask.append([1] * (longest - padding) + [0] * padding)
        labels.append([IGNORED] * len(row.prompt) + row.answer + [IGNORED] * padding)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "labels": torch.tensor(labels, device=device),
    }


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def load_model(path: str, device: torch.device) -> torch.nn.Module:
    # bfloat16 where it will be served so; a CPU is faster and exact in float32.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)


@torch.inference_mode()
def generate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], limit: int
) -> list[str]:
    """Greedy answers of at most `limit` tokens to all prompts, as one left-padded batch."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    longest = max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    # The clean-up that some tokenizer files ask for would drop spaces before punctuation.
    said = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in said]


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, skill: str, held_out: list[data.Example], batch: int
) -> Score:
    """Score a model on held-out examples of a skill."""
    model.eval()
    rows = encode(tokenizer, held_out)
    pad = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    total, tokens = 0.0, 0
    with autocast(model.device):
        for i in range(0, len(rows), batch):
            inputs = collate(rows[i : i + batch], pad, model.device)
            # The loss is a mean over the labels that are predicted, and the first position predicts none.
            count = int((inputs["labels"][:, 1:] != IGNORED).sum())
            total += model(**inputs).loss.item() * count
            tokens += count
        limit = max(48, max(len(row.answer) for row in rows) + 8)
        sample = encode(tokenizer, [data.Example(data.SKILLS[skill].SAMPLE, "")])
        *answers, said = generate(model, tokenizer, [row.prompt for row in rows + sample], limit)
    check = data.SKILLS[skill].check
    passed = sum(check(text, example.answer) for text, example in zip(answers, held_out, strict=True))
    return Score(total / tokens, passed / len(held_out), said)


def lora_config(kind: str, args: argparse.Namespace) -> LoraConfig:
    """PEFT's configuration of one kind, "bd" or "lora"."""
    rank = args.bd_rank if kind == "bd" else args.lora_rank
    bd = BdLoraConfig(target_modules_bd_a=ROW_PARALLEL, target_modules_bd_b=COLUMN_PARALLEL, nblocks=args.nblocks)
    return LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules=COLUMN_PARALLEL + ROW_PARALLEL,
        task_type="CAUSAL_LM",
        use_bdlora=bd if kind == "bd" else None,
    )


def train(model: PeftModel, rows: list[Encoded], pad: int, args: argparse.Namespace, title: str) -> list[float]:
    """Train the adapter in place for `args.steps` steps of AdamW; return the loss of each step."""
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()  # a bfloat16 weight would round most of the small updates away
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, args.steps // 20), args.steps)
    rng = random.Random(args.seed)
    order: list[Encoded] = []
    losses = []
    model.train()
    for _ in (bar := tqdm(range(args.steps), desc=title, unit="step")):
        if len(order) < args.batch:  # the next epoch, in a new order
            order += rng.sample(rows, len(rows))
        chosen, order = order[: args.batch], order[args.batch :]
        with autocast(model.device):
            loss = model(**collate(chosen, pad, model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def save(model: PeftModel, folder: Path) -> int:
    """Write the adapter in bfloat16; return the size of its tensor file in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL  # PEFT put the local folder here
    config.inference_mode = True
    config.save_pretrained(str(folder))
    # PEFT keeps the module names in a set and writes them in an order that changes with every run.
    config_path = folder / "adapter_config.json"
    fields = json.loads(config_path.read_text())
    fields["target_modules"] = sorted(fields["target_modules"])
    config_path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    return path.stat().st_size


def card(row: dict, about: str, base: Score, args: argparse.Namespace, examples: int) -> str:
    """The adapter's README: what it does, how it was made, how well it does."""
    kind = f"block-diagonal LoRA (BD-LoRA), {row['nblocks']} blocks" if row["kind"] == "bd" else "plain LoRA"

    def quote(text: str) -> str:
        return "\n".join(f"> {line}" for line in text.splitlines() or [""])

    schema = f"\n```sql\n{data.sql.SCHEMA}```\n" if row["skill"] == "sql" else ""
    return f"""---
base_model: {BASE_MODEL}
library_name: peft
license: apache-2.0
tags: [lora{", bd-lora" if row["kind"] == "bd" else ""}]
---
# {row["name"]}

{about}
{schema}
| | |
|---|---|
| kind | {kind} |
| rank, alpha | {row["rank"]}, {SCALE * row["rank"]} |
| modules | {", ".join(COLUMN_PARALLEL + ROW_PARALLEL)} |
| parameters | {row["parameters"]:,} |
| file | {row["bytes"] / 1e6:.2f} MB, bfloat16 |
| data | {examples} examples made by `examples/skills/{data.SKILLS[row["skill"]].__name__}.py`, seed {args.seed} |
| training | {args.steps} steps of {args.batch}, AdamW, peak learning rate {args.lr:g}, cosine |
| training loss | {row["train_loss"]:.3f} (mean of the last steps) |

On {row["held_out"]} prompts that training never saw, decoded greedily. The base model gets the same prompts and
is not told the format:

| | loss | accepted by the checker |
|---|---|---|
| base model | {base.loss:.3f} | {base.passed:.0%} |
| this adapter | {row["loss"]:.3f} | {row["score"]:.0%} |

## A sample (not a training prompt)
{quote(row["sample_prompt"])}

This adapter:

{quote(row["sample_answer"])}

The base model:

{quote(row["base_answer"])}
"""


def update_index(path: Path, row: dict) -> None:
    """Put a row into the index, in place of the row of that name."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = sorted([r for r in rows if r["name"] != row["name"]] + [row], key=lambda r: r["name"])
    path.write_text(json.dumps(rows, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, required=True, help="folder that the adapters' folders go into")
    parser.add_argument("--skills", nargs="+", choices=list(data.SKILLS), default=list(data.SKILLS))
    parser.add_argument("--kinds", nargs="+", choices=["bd", "lora"], default=["bd", "lora"])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=32, help="examples a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument(
        "--bd-rank", type=int, default=3, help="rank of block-diagonal adapters, a multiple of --nblocks"
    )
    parser.add_argument("--lora-rank", type=int, default=2, help="rank of plain adapters")
    parser.add_argument(
        "--nblocks", type=int, default=3, help="blocks, and the largest tensor-parallel size they split over"
    )
    parser.add_argument("--held-out", type=int, help="score on this many held-out prompts only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.bd_rank % args.nblocks:
        parser.error(f"--bd-rank {args.bd_rank} is not a multiple of --nblocks {args.nblocks}")

    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pad = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for skill in args.skills:
        split = data.load(skill, args.seed)
        module = data.SKILLS[skill]
        held_out = split.held_out[: args.held_out]
        rows = encode(tokenizer, split.train)
        base = evaluate(load_model(args.model, device), tokenizer, skill, held_out, args.batch)
        print(f"{skill}: base model's held-out loss {base.loss:.3f}, accepted {base.passed:.0%}")
        for kind in args.kinds:
            name = f"{skill}-{kind}"
            torch.manual_seed(args.seed)
            model = get_peft_model(load_model(args.model, device), lora_config(kind, args))
            losses = train(model, rows, pad, args, name)
            for weight in (p for p in model.parameters() if p.requires_grad):
                weight.data = weight.data.to(torch.bfloat16).float()  # score what is saved
            score = evaluate(model, tokenizer, skill, held_out, args.batch)
            last = losses[-10:]
            config = model.peft_config["default"]
            row = {
                "name": name,
                "skill": skill,
                "kind": kind,
                "rank": config.r,
                "nblocks": args.nblocks if kind == "bd" else None,
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "bytes": save(model, args.out / name),
                "score": round(score.passed, 4),
                "base_score": round(base.passed, 4),
                "loss": round(score.loss, 4),
                "train_loss": round(sum(last) / len(last), 4),
                "held_out": len(held_out),
                "steps": args.steps,
                "sample_prompt": module.SAMPLE,
                "sample_answer": score.sample,
                "base_answer": base.sample,
            }
            text = card(row, module.ABOUT, base, args, len(split.train))
            (args.out / name / "README.md").write_text(text)
            update_index(args.out / "index.json", row)
            print(
                f"{name}: {row['parameters']:,} parameters, {row['bytes'] / 1e6:.2f} MB, loss {losses[0]:.3f} -> "
                f"{row['train_loss']:.3f}, held-out loss {score.loss:.3f}, accepted {score.passed:.0%}, "
                f"says {score.sample!r}"
            )
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
