"""Which adapters are compared, how many requests each gets, and what is asked."""

import pytest

from app.compare import BLOCK, PLAIN, turns
from app.pairs import BASE, pair_adapters, read_mix, show_mix, spread
from app.planning import Choices, arms, plan, record
from app.prompts import lengthen
from app.served import Adapter, Served


def adapter(name: str, kind: str, parameters: int = 100, collectives: int = 0, size: int = 10) -> Adapter:
    nblocks = 1 if kind == "plain" else 2
    plain = {"s-lora": (size, size), "replicated": (2 * size, 2 * size)}
    return Adapter(name, "/", kind, 4, nblocks, parameters, 2, (size, size + 1), plain, collectives, True, 0, 0)


def served(*adapters: Adapter, **more) -> Served:
    fields = {
        "model": "m", "tp": 2, "sharding": "s-lora", "dtype": "float32", "device": "cpu", "hardware": "chip", "cores": 2,
        "version": "1", "commit": "abc", "prompt_format": "<{prompt}>", "adapters": adapters, "layers": (),
        "pool_bytes": 100, "pool_used_bytes": 0, **more,
    }  # fmt: skip
    return Served(**fields)


BLOCKS = [
    adapter("json-bd", "block-diagonal", 90),
    adapter("odd", "mixed", 500),
    adapter("sql.block", "block-diagonal", 90),
]
PLAINS = [
    adapter("far", "plain", 9000, 8),
    adapter("json-lora", "plain", 100, 8),
    adapter("near", "plain", 600, 8),
    adapter("sql", "plain", 100, 8),
]


def test_pairs_are_by_skill_and_then_by_size():
    pairs = pair_adapters(BLOCKS, PLAINS)
    assert [(p.block.name, p.plain.name, p.same_skill) for p in pairs] == [
        ("json-bd", "json-lora", True),
        ("sql.block", "sql", True),
        ("odd", "near", False),
    ]
    assert "paired by size" in pairs[2].label
    assert "paired by size" not in pairs[0].label
    assert pairs[0].parameter_ratio == 0.9


def test_requests_are_spread_evenly_or_skewed_and_none_is_lost():
    assert spread(["a", "b", "c"], 8, skewed=False) == {"a": 3, "b": 3, "c": 2}
    assert spread(["a", "b", "c"], 11, skewed=True) == {"a": 6, "b": 3, "c": 2}
    assert spread(["a", "b", "c"], 2, skewed=False) == {"a": 1, "b": 1}
    assert spread([], 5, skewed=False) == {}
    for requests in range(1, 65):
        for skewed in (False, True):
            assert sum(spread(["a", "b", "c", "d", "e"], requests, skewed).values()) == requests


def test_a_mix_can_be_written_by_hand():
    mix = {"json": 3, "far + odd": 1, BASE: 2}
    assert read_mix(show_mix(mix), list(mix)) == mix
    assert read_mix("json 0, far + odd 1,", list(mix)) == {"far + odd": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [("sql 3", "no adapter pair"), ("json", "no adapter pair"), ("json x", "whole number"), ("json -1", "whole number"),
     ("", "at least one"), ("json 0", "at least one"), ("json 257", "256")],
)  # fmt: skip
def test_a_wrong_mix_is_explained(text, words):
    with pytest.raises(ValueError, match=words):
        read_mix(text, ["json"])


def test_every_second_repeat_begins_with_the_other_arm():
    assert turns(["a", "b"], 3) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def choices(mix: dict[str, int], **more) -> Choices:
    return Choices(mix, 8, 0.5, 2, more.pop("same", True), True, 0, **more)


def test_both_arms_ask_the_same_prompts_of_their_own_adapters():
    pairs = pair_adapters(BLOCKS, PLAINS)
    made = plan(choices({"json": 2, BASE: 1}, own_prompts=("one?", "two?")), pairs, served())
    plain, block = made.body(PLAIN), made.body(BLOCK)
    assert plain["text"] == block["text"] == ["<one?>", "<one?>", "<two?>"]
    assert plain["lora_path"] == ["json-lora", None, "json-lora"]
    assert block["lora_path"] == ["json-bd", None, "json-bd"]
    assert plain["sampling_params"] == block["sampling_params"]
    assert plain["sampling_params"] == {
        "temperature": 0.5, "max_new_tokens": 8, "ignore_eos": True, "skip_special_tokens": False,
    }  # fmt: skip
    assert "lora_path" not in plan(choices({BASE: 1}), pairs, served()).body(PLAIN)
    assert plan(choices({BASE: 1}, same=False), pairs, served()).body(PLAIN)["sampling_params"]["ignore_eos"] is False


def test_prompts_can_be_lengthened():
    assert lengthen("Why is it so?", 0) == lengthen("Why is it so?", 4) == "Why is it so?"
    long = lengthen("Why is it so?", 50)
    assert len(long.split()) == 50
    assert long.endswith(" Why is it so?")


def test_the_note_says_what_was_compared():
    pairs = pair_adapters(BLOCKS, PLAINS)
    chosen = choices({"json": 2, "sql": 1, BASE: 1})
    state = served(*BLOCKS, *PLAINS)
    sides = arms(chosen, pairs, state, state, {PLAIN: "http://a", BLOCK: "http://a"})
    assert [(a.title, a.adapters, a.parameters, a.bytes_per_rank, a.collectives) for a in sides] == [
        ("S-LoRA sharding", ("json-lora", "sql"), 200, 22, 8),
        ("Block-diagonal", ("json-bd", "sql.block"), 180, 22, 0),
    ]
    made = record(chosen, sides, state, state, [], None)
    note = dict(made.note)
    assert made.on_cpu
    assert note["Hardware"] == "2 ranks on chip (2 cores)"
    assert note["Tensor parallelism"] == "2"
    assert note["Version"] == "sgl-bdlora 1, commit abc"
    assert note["Batch"] == "json 2, sql 1, base model 1; 4 requests sent at once"
    assert "0.90 times" in note["Parameters"]
    assert "json-lora (rank 4)" in note["S-LoRA sharding"]
    assert note["Prompts"].startswith("not taken from the cache")
    assert "Sharding" not in note
    one = served(*BLOCKS, *PLAINS, tp=1, sharding="replicated", device="cuda")
    other = record(chosen, arms(chosen, pairs, one, one, {PLAIN: "a", BLOCK: "b"}), one, one, [], None)
    assert {"One rank", "Sharding"} <= dict(other.note).keys()
    assert dict(other.note)["Engine"].startswith("two servers")
    assert not other.on_cpu
