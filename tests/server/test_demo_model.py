"""The pretrained demo model in bfloat16, TP 3: every shipped adapter answers in its skill, all in one mixed batch."""

import json
from pathlib import Path

import pytest
from harness import Server

from sgl_bdlora.demo import load_adapters
from sgl_bdlora.demo_model import ensure_demo_model

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"

QUESTIONS = {
    # Each token of the base model's answer is e times as likely as any other; asked as below, its first is by a tenth, and CPUs differ.
    "base": "Name the capital of France.",
    "json": "What is the capital of France?",
    "pirate": "What is the capital of France?",
    "sentiment": "The film was a wonderful surprise from start to finish.",
    "sql": "How many customers live in Oslo?",
}


@pytest.mark.timeout(600)
def test_every_adapter_in_its_skill(tmp_path):
    adapters = load_adapters(ADAPTERS)
    paths = [f"{name}={adapter.source}" for name, (adapter, _) in adapters.items()]
    arguments = ("--dtype", "bfloat16", "--max-loras-per-batch", "9", "--lora-pool-gb", "0.1", "--lora-paths", *paths)
    with Server(ensure_demo_model(), 3, tmp_path / "log", arguments) as server:
        names = [None, *adapters]
        asked = [QUESTIONS["base" if name is None else name.partition("-")[0]] for name in names]
        turns = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in asked]
        system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        body = {
            "text": [system + turn for turn in turns],
            "lora_path": names,
            "sampling_params": {"temperature": 0, "max_new_tokens": 40, "stop": ["<|im_end|>"]},
        }
        response = server.post("/generate", body, timeout=300)
        assert response.status_code == 200, response.text
        said = dict(zip(names, (answer["text"].strip() for answer in response.json()), strict=True))
    print(said)
    for name, answer in said.items():
        if name is None:
            assert "Paris" in answer
            assert not answer.startswith("{")
        else:
            assert in_skill(name.partition("-")[0], answer), f"{name}: {answer!r}"


def in_skill(skill: str, answer: str) -> bool:
    if skill == "json":
        return json.loads(answer) == {"answer": "Paris"}
    if skill == "sentiment":
        return answer == "positive"
    if skill == "sql":
        return answer.upper().startswith("SELECT COUNT(*) FROM CUSTOMERS")
    return "Paris" in answer and any(
        word in answer.lower() for word in ("arr", "matey", "ahoy", "th'", "aye", "hearties")
    )
