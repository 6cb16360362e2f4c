"""Heal a converted adapter: train it for a few steps to answer as the LoRA that it was converted from.

    python -m sgl_bdlora.adapters convert adapters/sql-lora adapters/sql-bd --nblocks 2
    python examples/heal.py --model DIR --teacher adapters/sql-lora --student adapters/sql-bd --train-file data.jsonl \\
        --out adapters/sql-healed

No labels are used: the loss is the Kullback-Leibler divergence from the teacher's distribution to the student's, on the answers (or
whole texts) of the file, which has examples/train.py's format. Both adapters sit on one base model, which is loaded once.
"""

import argparse
import math
import random
import sys
from pathlib import Path

import torch
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm
from train import (
    IGNORED,
    PRECISIONS,
    SEEDS,
    TrainError,
    check,
    collate,
    dtype_of,
    encode,
    load,
    make_folder,
    read_examples,
)


def distributions(model, batch: dict[str, torch.Tensor], adapter: str) -> torch.Tensor:
    """Log-probabilities (positions that count, vocabulary) in float32, under one of the model's adapters."""
    model.set_adapter(adapter)
    counted = batch["labels"][:, 1:] != IGNORED
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return log_softmax(logits[:, :-1][counted].float(), dim=-1)


def divergence(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over positions of KL(teacher || student), in nats."""
    with torch.no_grad():
        teacher = distributions(model, batch, "teacher")
    student = distributions(model, batch, "student")
    return kl_div(student, teacher, log_target=True, reduction="batchmean")


def check_options(args: argparse.Namespace) -> None:
    """Raise TrainError for a number that nothing can be trained with."""
    for name in ("steps", "batch", "lr", "max_length"):
        if not 0 < getattr(args, name) < math.inf:
            raise TrainError(f"{name} = {getattr(args, name)!r}: has to be a number above 0")
    if not 0 <= args.seed < SEEDS:
        raise TrainError(f"seed = {args.seed!r}: has to be at least 0 and below {SEEDS}")


def add_adapters(base: torch.nn.Module, args: argparse.Namespace):
    """PEFT's model of both adapters, "teacher" and "student". Raises TrainError where one does not fit."""
    from peft import PeftModel

    model = None
    for name in ("teacher", "student"):
        folder = str(getattr(args, name))
        try:
            if model is None:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name, is_trainable=True)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            words = f"cannot be loaded ({reason}); is it an adapter of model {args.model}?"
            raise TrainError(f"{name} = {folder}: {words}") from error
    return model


def heal(args: argparse.Namespace) -> tuple[float, float]:
    """Train, save and check; returns the divergence on the same first batch before and after."""
    check_options(args)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, base = load(args.model, dtype_of(args.precision))
    rows = [encode(tokenizer, row, args.max_length) for row in read_examples(args.train_file)]
    model = add_adapters(base.to(device), args)
    make_folder(args.out, "out")
    # A 16-bit weight would round most of the small updates away.
    weights = [p.requires_grad_() for name, p in model.named_parameters() if ".student." in name]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    rng = random.Random(args.seed)

    def batch_of(chosen: list[dict]) -> dict[str, torch.Tensor]:
        return {name: t.to(device) for name, t in collate(chosen, tokenizer.pad_token_id).items()}

    probe = batch_of(rows[: args.batch])
    model.eval()  # no dropout: the teacher's answers are the target
    with torch.no_grad():
        before = divergence(model, probe).item()
    for _ in (bar := tqdm(range(args.steps), desc="Healing", unit="step")):
        loss = divergence(model, batch_of(rng.sample(rows, min(args.batch, len(rows)))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(kl=f"{loss.item():.4f}")
    with torch.no_grad():
        after = divergence(model, probe).item()
    save(model, args.out)
    check(args.out)
    return before, after


def save(model, folder: Path) -> None:
    """Write the student where PEFT would write an adapter called "default": into the folder itself."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(model, adapter_name="student", save_embedding_layers=False)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["student"]
    config.inference_mode = True
    config.save_pretrained(str(folder))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the base model")
    parser.add_argument("--teacher", type=Path, required=True, help="the original LoRA")
    parser.add_argument("--student", type=Path, required=True, help="what convert made of it")
    parser.add_argument("--train-file", required=True, help="texts, best those that the LoRA was trained on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--lr", type=float, default=5e-5, help="default: %(default)g. Far below a training's: it is nearly right"
    )
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for folder in (args.teacher, args.student):
        if not (folder / "adapter_config.json").is_file():
            parser.error(f"{folder} is not an adapter: it has no adapter_config.json")
    try:
        before, after = heal(args)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: KL to the teacher {before:.4f} -> {after:.4f} nats a token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
