"""Training and held-out data of the four demo skills.

It is written by the templates and word lists beside this file: nothing is downloaded, and the same seed gives the same
data. A prompt is one user message; no held-out prompt, whatever its case and punctuation, is in the training set.

    python examples/skills/data.py --out DIR      # to look at it: one JSON-lines file a skill and split
"""

import argparse
import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import json_answers
import pirate
import sentiment
import sql

# Each module has `pairs(rng) -> (training pairs, held-out pairs)`, where a pair is (prompt, answer), and
# `check(text, answer) -> bool`, which judges what a model said; ABOUT and SAMPLE are a sentence and a prompt to show.
SKILLS: dict[str, ModuleType] = {"json": json_answers, "pirate": pirate, "sentiment": sentiment, "sql": sql}


@dataclass(frozen=True)
class Example:
    """One user message and the answer the skill should give."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Split:
    """The examples of one skill: those to train on and those kept back to score it."""

    train: list[Example]
    held_out: list[Example]


def normalise(prompt: str) -> str:
    """A prompt without case, punctuation and repeated spaces: two prompts equal under it count as the same.

    Signs of arithmetic stay: "7 + 3" and "7 - 3" are different questions.
    """
    return " ".join(re.sub(r"[^\w\s+*-]", "", prompt.casefold()).split())


def load(skill: str, seed: int = 0) -> Split:
    """Both splits of a skill, shuffled and without duplicates. Raises KeyError for an unknown skill."""
    # A string seeds the generator the same way in every process, which hash() would not.
    rng = random.Random(f"{skill} {seed}")
    train, held_out = (list(pairs) for pairs in SKILLS[skill].pairs(rng))
    seen = {normalise(SKILLS[skill].SAMPLE)}  # shown to readers as something the adapter was not trained on

    def unseen(pairs: list[tuple[str, str]]) -> list[Example]:
        rng.shuffle(pairs)
        kept = []
        for prompt, answer in pairs:
            if (key := normalise(prompt)) not in seen:
                seen.add(key)
                kept.append(Example(prompt, answer))
        return kept

    kept_back = unseen(held_out)
    return Split(train=unseen(train), held_out=kept_back)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for <skill>.train.jsonl and <skill>.held_out.jsonl"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for skill in SKILLS:
        for name, examples in asdict(load(skill, args.seed)).items():
            path = args.out / f"{skill}.{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in examples))
            print(f"{path}: {len(examples)} examples")


if __name__ == "__main__":
    main()
