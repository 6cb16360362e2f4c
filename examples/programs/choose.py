"""A choice among given words, scored by each adapter and by the base model side by side.

python examples/programs/choose.py --question "The soup was cold." --choices positive negative
"""

import sys

import sglang as sgl
from common import endpoint, parser

from sgl_bdlora.frontend import fork, result


@sgl.function
def choose(s, system, question, choices, adapters):
    """Nothing is generated: every adapter scores every choice as its answer, and the best of them is taken."""
    if system:
        s += sgl.system(system)
    s += sgl.user(question)
    branches = fork(s, adapters)
    branches += sgl.assistant(sgl.select("choice", choices))
    return [(result(b, "choice"), b.get_meta_info("choice")["normalized_prompt_logprobs"]) for b in branches]


def main(argv: list[str]) -> int:
    p = parser(__doc__, "The waiter was rude and the soup was cold.")
    p.add_argument("--choices", nargs="+", default=["positive", "negative"], help="default: %(default)s")
    p.add_argument("--adapters", nargs="+", default=["sentiment-bd", "sentiment-lora"], help="default: %(default)s")
    args = p.parse_args(argv)
    adapters = [None, *args.adapters]
    state = choose.run(args.system, args.question, args.choices, adapters, backend=endpoint(args))
    for adapter, (choice, scores) in zip(adapters, state.ret_value, strict=True):
        each = ", ".join(f"{c} {score:.3f}" for c, score in zip(args.choices, scores, strict=True))
        print(f"  {adapter or '(base)':<16} {choice:<12} ({each})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
