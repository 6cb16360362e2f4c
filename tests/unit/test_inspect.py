"""`python -m sgl_bdlora.adapters inspect`: the numbers of the sharding formulas, and clear refusals."""

import json
from pathlib import Path

import pytest
from zoo import Recipe

from sgl_bdlora.adapters.__main__ import main

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
LAYERS = 30
COLUMNS, ROWS = ((576, 576), (576, 192), (576, 192), (576, 1536), (576, 1536)), ((576, 576), (1536, 576))


def inspect(capsys, name: str, tp: int) -> dict:
    assert main(["inspect", str(ADAPTERS / name), "--tp", str(tp), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_block_diagonal_at_its_own_size(capsys):
    found = inspect(capsys, "json-bd", 3)
    assert (found["kind"], found["nblocks"], found["rank"]) == ("block-diagonal", 3, 3)
    assert {family["local_rank"] for family in found["families"]} == {1}
    a_rank = LAYERS * (sum(k + n // 3 for k, n in COLUMNS) + sum(k // 3 + n for k, n in ROWS))
    dense_s_lora = LAYERS * sum(3 * (k + n) for k, n in COLUMNS + ROWS) // 3
    assert found["parameters"] == 3 * a_rank == 547_200
    assert found["parameters_per_rank"]["as served"] == a_rank
    assert found["parameters_per_rank"]["dense, s-lora"] == dense_s_lora
    assert found["collectives_per_step"] == {"as served": 0, "dense, replicated": 0, "dense, s-lora": 4 * LAYERS}


def test_plain(capsys):
    found = inspect(capsys, "json-lora", 3)
    assert {family["local_rank"] for family in found["families"]} == {2}
    replicated = LAYERS * 2 * (sum(k + n // 3 for k, n in COLUMNS) + sum(k // 3 + n for k, n in ROWS))
    assert found["parameters_per_rank"]["as served"] == found["parameters_per_rank"]["dense, replicated"] == replicated


def test_embedding_and_lm_head_are_split_on_the_vocabulary(capsys, zoo):
    """500 tokens, padded to 512: a rank of four holds 128 of them under every sharding, and no collective."""
    recipe = Recipe("vocabulary-only", 6, targets=("embed_tokens", "lm_head"), seed=30)
    assert main(["inspect", str(zoo.adapter("mistral", recipe)), "--tp", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {family["name"]: family["parameters"] for family in found["families"]} == {
        "embed_tokens": 6 * (500 + 128),
        "lm_head": 6 * (500 + 128),
    }
    assert set(found["parameters_per_rank"].values()) == {2 * 6 * (128 + 128)}
    assert set(found["collectives_per_step"].values()) == {0}


def test_tables(capsys):
    assert main(["inspect", str(ADAPTERS / "sql-bd"), "--tp", "3"]) == 0
    out = capsys.readouterr().out
    assert "547,200 parameters" in out
    assert "dense, s-lora" in out


def test_bad_input_is_said_on_stderr_with_code_2(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr()
    assert "nowhere" in said.err
    assert said.out == ""
    with pytest.raises(SystemExit):
        main(["inspect", str(ADAPTERS / "sql-bd"), "--tp", "0"])
