"""Best of n over adapters: several samples of each, all in one batch; the base model says which it finds likeliest as an answer.

python examples/programs/best_of_n.py --adapters pirate-bd pirate-lora --samples 4
"""

import sys

import sglang as sgl
from common import answer, endpoint, parser, show

from sgl_bdlora.frontend import fork, on, result


@sgl.function
def best_of(s, system, question, adapters, tokens):
    """Branch i answers as adapters[i]; then the base model, asked the same, chooses among their answers."""
    if system:
        s += sgl.system(system)
    s += sgl.user(question)
    branches = fork(s, adapters)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=tokens, return_logprob=True))
    answers = [answer(branch, adapter) for branch, adapter in zip(branches, adapters, strict=True)]
    candidates = list(dict.fromkeys(a.text for a in answers if a.text))
    s += sgl.assistant(on(None, sgl.select("best", candidates)))
    return answers, result(s, "best")


def main(argv: list[str]) -> int:
    p = parser(__doc__, "How do I make tea?")
    p.add_argument("--adapters", nargs="+", default=["pirate-bd"], help="default: %(default)s")
    p.add_argument("--samples", type=int, default=4, help="of each adapter (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.8, help="default: %(default)s")
    args = p.parse_args(argv)
    adapters = [adapter for adapter in args.adapters for _ in range(args.samples)]
    state = best_of.run(args.system, args.question, adapters, 40, temperature=args.temperature, backend=endpoint(args))
    answers, best = state.ret_value
    show(answers)
    print(f"best: {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
