"""Route a question to the skill that is surest of its answer: ask all four at once, keep one, or count votes.

    python examples/programs/router.py --question "How many customers live in Oslo?"

The question is a fork of one program over four adapters, which the server runs as one batch, so that asking four costs little more
than asking one. With --vote each skill is asked with both of its adapters, block-diagonal and plain, and a skill gets a vote for
each of them among the surest half.
"""

import sys
from collections import Counter

from common import SKILLS, ask_each, endpoint, parser, show


def route(answers):
    """The surest answer."""
    return max(answers, key=lambda a: a.confidence)


def vote(answers):
    """The surest answer of the skill with most adapters in the surest half; a skill is the part of the name before "-"."""
    ranked = sorted(answers, key=lambda a: -a.confidence)
    votes = Counter(a.adapter.partition("-")[0] for a in ranked[: (len(ranked) + 1) // 2])
    skill, _ = votes.most_common(1)[0]
    return next(a for a in ranked if a.adapter.partition("-")[0] == skill)


def main(argv: list[str]) -> int:
    p = parser(__doc__, "How many customers live in Oslo?")
    p.add_argument("--adapters", nargs="+", default=list(SKILLS), help="default: %(default)s")
    p.add_argument("--vote", action="store_true", help="let the plain adapters of the same skills vote too")
    args = p.parse_args(argv)
    adapters = [*args.adapters, *(a.replace("-bd", "-lora") for a in args.adapters)] if args.vote else args.adapters
    state = ask_each.run(args.system, args.question, adapters, 40, temperature=0, backend=endpoint(args))
    answers = state.ret_value
    show(answers)
    chosen = (vote if args.vote else route)(answers)
    print(f"{chosen.adapter}: {chosen.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
