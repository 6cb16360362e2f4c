"""What the programs share: the command line, and answers with how sure the model was of them."""

import argparse
from dataclasses import dataclass

import sglang as sgl

from sgl_bdlora.frontend import Endpoint, fork, result

# What examples/adapters were trained with; another model wants its own (--system "" for none).
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SKILLS = ("json-bd", "pirate-bd", "sentiment-bd", "sql-bd")


@dataclass(frozen=True)
class Answer:
    """confidence: the mean probability, on a log scale, that the adapter gave to the tokens it chose."""

    adapter: str | None
    text: str
    confidence: float


@sgl.function
def ask_each(s, system, question, adapters, tokens):
    """Ask the same question of several adapters; the branches run as one batch on the server."""
    if system:
        s += sgl.system(system)
    s += sgl.user(question)
    branches = fork(s, adapters)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=tokens, return_logprob=True))
    return [answer(branch, adapter) for branch, adapter in zip(branches, adapters, strict=True)]


def answer(s, adapter: str | None) -> Answer:
    text = result(s, "answer").strip()
    scores = [entry[0] for entry in s.get_meta_info("answer")["output_token_logprobs"]]
    return Answer(adapter, text, sum(scores) / max(len(scores), 1))


def parser(description: str, question: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--server", default="http://127.0.0.1:30000", help="default: %(default)s, as make demo has it")
    p.add_argument("--chat-template", default="chatml", help="name of SGLang's chat template (default: %(default)s)")
    p.add_argument("--system", default=SYSTEM, help="system prompt (default: the demo model's)")
    p.add_argument("--question", default=question, help="default: %(default)s")
    return p


def endpoint(args: argparse.Namespace) -> Endpoint:
    return Endpoint(args.server, chat_template_name=args.chat_template)


def show(answers: list[Answer]) -> None:
    for a in answers:
        print(f"  {a.adapter or '(base)':<16} {a.confidence:8.3f}  {a.text!r}")
