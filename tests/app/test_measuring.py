"""From stream to numbers to drawings and files, and back."""

import csv
import io
import re

import pytest

from app import drawing, plots, results, text
from app.client import Chunk
from app.compare import BLOCK, PLAIN, extend
from app.measure import BY_KEY, Answer, Batch, ratio, values
from app.record import Arm, NotARecord, Record, from_json, to_csv, to_json
from app.served import Layer, Slice


def answer(first: float, last: float, tokens: int = 5, **more) -> Answer:
    return Answer("a", "why?", "so", tokens, 3, 0, first, last, 1, **{"finished": True, **more})


def batch(arm: str, repeat: int, *answers: Answer, error: str | None = None) -> Batch:
    return Batch(arm, repeat, answers, error)


BATCHES = [
    batch(PLAIN, 0, answer(1, 5), answer(2, 10)),
    batch(BLOCK, 0, answer(1, 3), answer(1, 5)),
    batch(BLOCK, 1, answer(0.5, 2.5), answer(0.5, 4)),
    batch(PLAIN, 1, answer(1, 5), answer(1, 8)),
]
ARMS = (
    Arm(PLAIN, "S-LoRA sharding", "http://a", ("x-lora",), (4,), 100, 3 * 2**20, 8),
    Arm(BLOCK, "Block-diagonal", "http://a", ("x-bd",), (6,), 90, 2**20, 0),
)
RECORD = Record("2030-01-01 00:00 UTC", ARMS, tuple(BATCHES), (("Model", "m"),), True)


def test_an_answer_is_timed_by_when_its_tokens_arrived():
    grown = Answer("a", "why?")
    for at, tokens, finished in ((10.5, 1, False), (11.0, 2, False), (12.5, 5, False), (12.9, 5, True)):
        grown = extend(grown, Chunk(at, 0, "x" * tokens, tokens, 7, 2, finished), begin=10.0)
    assert (grown.first_s, grown.last_s, grown.tokens, grown.cached_tokens, grown.finished) == (0.5, 2.5, 5, 2, True)
    assert grown.per_token_s == 0.5
    assert extend(Answer(None, ""), Chunk(1, 0, "", 3, 1, 0, True), 0).per_token_s is None


def test_metrics_are_medians_of_a_batch_and_totals():
    expected = {"first_s": 1.5, "per_token_s": 1.5, "end_to_end_s": 7.5, "tokens_per_s": 1.0}
    assert {key: metric.of(BATCHES[0]) for key, metric in BY_KEY.items()} == expected


def test_repeats_are_compared_pair_by_pair_and_broken_batches_count_for_nothing():
    broken = [
        batch(PLAIN, 2, answer(1, 9, finished=False), error="died"),
        batch(BLOCK, 3, answer(1, 9, finished=False)),
    ]
    found = ratio(BY_KEY["tokens_per_s"], BATCHES + broken, BLOCK, PLAIN)
    assert (found.low, found.middle, found.high, found.repeats) == (2.0, 2.0, 2.0, 2)
    first = ratio(BY_KEY["first_s"], BATCHES, BLOCK, PLAIN)
    assert (first.low, first.high) == (1.5, 2.0)
    assert values(BY_KEY["end_to_end_s"], BATCHES + broken, PLAIN) == [7.5, 6.5]
    assert ratio(BY_KEY["first_s"], BATCHES[:1], BLOCK, PLAIN) is None


@pytest.mark.parametrize("largest", [0.00037, 0.9, 1.0, 4.0, 7.3, 99.9, 100, 123456])
def test_axes_hold_the_largest_value_in_a_few_round_steps(largest):
    end, step = plots.nice_scale(largest)
    assert largest <= end < largest * 2
    assert 2 <= round(end / step) <= 6
    assert f"{step:e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


def test_bars_start_at_zero_carry_units_and_say_everything_in_words():
    svg = plots.bars("Time", "s", [plots.Bar("One", "plain", [0.2, 0.4, 0.3]), plots.Bar("Two", "block", [])])
    assert "(ms)" in svg
    assert ">0</text>" in svg
    assert re.search(r"<rect class='bar plain' x='0' [^>]*width='75.000%'", svg)
    assert svg.count("<circle") == 3
    assert "One: 300 ms (200 to 400 over 3 repeats); Two: not measured yet" in svg
    assert plots.scaled("bytes", 3 * 2**20) == ("MiB", 2**-20)


def test_a_run_is_shown_with_its_speed_up_and_what_a_reader_wrote_is_escaped():
    page = results.headline(RECORD)
    assert ">2.00×<" in page
    assert "not GPU speed" in page
    assert "appears when both" in results.headline(Record("", ARMS, (), (), False))
    evil = [Answer("<b>", "<script>", "</div><img src=x>", 1, finished=True)]
    shown = results.column(ARMS[0], evil, "done")
    assert "<script>" not in shown
    assert "<img" not in shown
    assert "<b>" not in shown
    figures = results.figures(RECORD)
    assert figures.count("<svg") == 6
    assert "data-value='8'" in figures


def test_a_saved_run_is_the_same_when_opened():
    assert from_json(to_json(RECORD)) == RECORD
    broken = Record("", ARMS, (batch(PLAIN, 0, Answer(None, "why?"), error="died"),), (), False, "died")
    assert from_json(to_json(broken)) == broken


@pytest.mark.parametrize(
    ("content", "words"),
    [("nonsense", "not JSON"), ("[1]", "not a comparison"), ('{"a": 1}', "not a comparison"),
     ('{"format": "sgl-bdlora comparison", "version": 9}', "version 9"),
     ('{"format": "sgl-bdlora comparison", "version": 1}', "damaged"),
     (to_json(RECORD).replace('"repeat"', '"repeal"'), "damaged")],
)  # fmt: skip
def test_other_files_are_refused(content, words):
    with pytest.raises(NotARecord, match=words):
        from_json(content)


def test_csv_has_a_line_for_each_request_and_no_formulas():
    changed = Record("", ARMS, (batch(PLAIN, 0, answer(0.25, 1.25), Answer(None, "=1+1")),), (), False)
    rows = list(csv.DictReader(io.StringIO(to_csv(changed))))
    assert [(r["arm"], r["adapter"], r["first_token_ms"], r["per_token_ms"], r["end_to_end_ms"]) for r in rows] == [
        (PLAIN, "a", "250.000", "250.000", "1250.000"),
        (PLAIN, "", "", "", ""),
    ]
    assert rows[1]["prompt"] == "'=1+1"


def test_words():
    assert text.until_end("Rome<|im_end|>\nmore") == ("Rome", True)
    assert text.until_end("Rome<|im_start|>") == ("Rome<|im_start|>", False)
    assert text.until_end("a</s>b") == ("a", True)
    assert [text.seconds(s) for s in (None, 1.234, 0.9999, 0.0456)] == ["–", "1.23 s", "1.00 s", "45.6 ms"]
    assert [text.size(n) for n in (12, 2048, 3 * 2**20, 2**31)] == ["12 B", "2 KiB", "3 MiB", "2 GiB"]


QKV = Layer(
    "qkv_proj",
    "column",
    3,
    (Slice("q_proj", 64, 64, 64, 32), Slice("k_proj", 64, 32, 64, 16), Slice("v_proj", 64, 32, 64, 16)),
)
DOWN = Layer("down_proj", "row", 3, (Slice("down_proj", 128, 64, 64, 64),))


def test_drawn_shapes_are_those_of_the_sharding():
    gather, reduce = drawing.s_lora_stage(QKV, 5, 2), drawing.s_lora_stage(DOWN, 5, 2)
    assert (gather.a, gather.b, gather.collective, gather.numbers) == ((9, 64), (64, 6), "all-gather", 18)
    assert (reduce.a, reduce.b, reduce.collective, reduce.numbers) == ((5, 64), (32, 5), "all-reduce", 5)
    column, row = drawing.block_stage(QKV, 8, 4, 2), drawing.block_stage(DOWN, 8, 4, 2)
    assert (column.a, column.b, column.collective) == ((12, 64), (64, 4), None)
    assert (row.a, row.b, row.collective) == ((4, 64), (64, 4), None)
    assert drawing.s_lora_stage(QKV, 5, 1).collective is None
    plain, block = drawing.decoder([gather, reduce], 2, "plain"), drawing.decoder([column, row], 2, "block")
    assert plain.count("class='collective'") == 2
    assert block.count("class='collective'") == 0
    assert block.count("own all-reduce") == plain.count("own all-reduce") == 1
    assert "ranks 0 to 2 of 8" in drawing.decoder([gather], 8, "plain")
    assert drawing.matrices(64, 64, 8, 4, 2).count("class='zero'") == 2
    assert drawing.matrices(64, 64, 8, 1, 2).count("class='zero'") == 0
