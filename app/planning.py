"""From what the reader chose to a Plan, and to the Record that says what was compared."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.compare import BLOCK, PLAIN, Ask, Plan
from app.context import plain_title
from app.measure import Batch
from app.pairs import BASE, Pair, show_mix
from app.prompts import lengthen, prompt_for
from app.record import Arm, Record
from app.served import Adapter, Served
from app.text import count, size


@dataclass(frozen=True)
class Choices:
    """The form's values. mix: pair name (or BASE) -> requests. own_prompts: used in turn instead of the skills' own."""

    mix: dict[str, int]
    max_tokens: int
    temperature: float
    repeats: int
    same_length: bool
    forget_prompts: bool
    words: int
    own_prompts: tuple[str, ...] = ()


def plan(choices: Choices, pairs: Sequence[Pair], served: Served) -> Plan:
    """The mix's requests, skills taking turns as requests of many clients would come."""
    by_name = {pair.name: pair for pair in pairs}
    left, number, asks = dict(choices.mix), dict.fromkeys(choices.mix, 0), []
    while any(left.values()):
        for name in [name for name, n in left.items() if n]:
            pair = by_name.get(name)
            prompt = prompt_for(name, number[name], list(choices.own_prompts))
            adapters = {PLAIN: pair.plain.name, BLOCK: pair.block.name} if pair else {PLAIN: None, BLOCK: None}
            asks.append(Ask(lengthen(prompt, choices.words), adapters))
            left[name] -= 1
            number[name] += 1
    return Plan(
        tuple(asks),
        choices.max_tokens,
        choices.temperature,
        choices.repeats,
        choices.same_length,
        choices.forget_prompts,
        served.prompt_format,
    )


def arms(
    choices: Choices, pairs: Sequence[Pair], plain: Served, block: Served, urls: dict[str, str]
) -> tuple[Arm, ...]:
    chosen = [pair for pair in pairs if pair.name in choices.mix]
    return (
        _arm(PLAIN, plain_title(plain), urls[PLAIN], [pair.plain for pair in chosen]),
        _arm(BLOCK, "Block-diagonal", urls[BLOCK], [pair.block for pair in chosen]),
    )


def _arm(key: str, title: str, url: str, adapters: Sequence[Adapter]) -> Arm:
    ranks = max((len(a.bytes_per_rank) for a in adapters), default=0)
    return Arm(
        key,
        title,
        url,
        tuple(a.name for a in adapters),
        tuple(a.rank for a in adapters),
        sum(a.parameters for a in adapters),
        max((sum(a.bytes_per_rank[rank] for a in adapters) for rank in range(ranks)), default=0),
        # Adapters of a batch share their collectives.
        max((a.collectives for a in adapters), default=0),
    )


def record(
    choices: Choices,
    sides: Sequence[Arm],
    plain: Served,
    block: Served,
    batches: Sequence[Batch],
    error: str | None,
) -> Record:
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    lines = _note(choices, sides, plain, block)
    on_cpu = "cpu" in (plain.device, block.device)
    return Record(made, tuple(sides), tuple(batches), tuple([("Run", made), *lines]), on_cpu, error)


def _note(choices: Choices, sides: Sequence[Arm], plain: Served, block: Served) -> list[tuple[str, str]]:
    by_key = {arm.key: arm for arm in sides}

    def both(of: Callable[[Served], str]) -> str:
        return of(block) if of(block) == of(plain) else f"{of(block)}; the other server: {of(plain)}"

    one = by_key[PLAIN].server == by_key[BLOCK].server
    lines = [
        ("Model", both(lambda served: f"{served.model}, {served.dtype}")),
        ("Hardware", both(lambda served: served.where)),
        ("Engine", "one, which runs both sides in turns" if one else "two servers, which take turns"),
        ("Tensor parallelism", both(lambda served: str(served.tp))),
        *((arm.title, _adapters(arm)) for arm in sides),
    ]
    if by_key[PLAIN].parameters:
        share = by_key[BLOCK].parameters / by_key[PLAIN].parameters
        lines.append(("Parameters", f"block-diagonal has {share:.2f} times as many as plain"))
    lines += [
        ("Batch", f"{show_mix(choices.mix)}; {sum(choices.mix.values())} requests sent at once"),
        ("Answers", _answers(choices)),
        ("Order", f"{choices.repeats} repeats, the other side first in every second; a short batch of each before, not measured"),
        ("Prompts", "not taken from the cache: the first token includes reading them" if choices.forget_prompts else "may be cached"),
        ("Version", both(_version)),
    ]  # fmt: skip
    if BASE in choices.mix:
        lines.append(("Base model", "its requests run without an adapter on both sides"))
    if block.tp == 1:
        lines.append(("One rank", "with a single rank nothing is put together: there is no collective to save"))
    if plain.sharding != "s-lora":
        words = "this server replicates plain adapters; start it with --lora-sharding s-lora to compare with S-LoRA"
        lines.append(("Sharding", words))
    return lines


def _adapters(arm: Arm) -> str:
    each = (
        ", ".join(f"{name} (rank {rank})" for name, rank in zip(arm.adapters, arm.ranks, strict=True)) or "no adapter"
    )
    return f"{each}; {count(arm.parameters)} parameters, {size(arm.bytes_per_rank)} a rank; {arm.server}"


def _answers(choices: Choices) -> str:
    length = (
        f"exactly {choices.max_tokens} tokens each"
        if choices.same_length
        else f"at most {choices.max_tokens} tokens each"
    )
    return f"{length}, temperature {choices.temperature:g}"


def _version(served: Served) -> str:
    return f"sgl-bdlora {served.version}" + (f", commit {served.commit}" if served.commit else "")
