"""The figures in the tables of docs/serving.md and docs/sharding.md are what `adapters plan` computes."""

import json
import re

import pytest
from blocks import ROOT
from how import LLAMA_8B, LLAMA_70B

from sgl_bdlora.adapters.budget import total_parameters
from sgl_bdlora.adapters.model import LINEAR, BaseModel, read_model
from sgl_bdlora.adapters.plan import plan

SIZES = re.findall(
    r"^\| (Llama-3\.1-\w+) \| (\d) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \(rank (\d+), ([\d.]+)x\) \|$",
    (ROOT / "docs" / "serving.md").read_text(),
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, BaseModel]:
    folder = tmp_path_factory.mktemp("sizes")
    found = {}
    for name, sizes in (("Llama-3.1-8B", LLAMA_8B), ("Llama-3.1-70B", LLAMA_70B)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(sizes))
        found[name] = read_model(folder / name)
    return found


def test_the_table_is_there():
    assert len(SIZES) == 12


@pytest.mark.parametrize("row", SIZES, ids=lambda row: "-".join(row[:3]))
def test_bytes_of_a_rank(models, row):
    name, tp, rank, replicated, s_lora, block, block_rank, ratio = row
    made = plan(models[name], int(tp), int(rank), int(tp), LINEAR).as_json()
    costs = {(c["adapter"], c["sharding"], c["rank"]): f"{c['bytes_16_bit'] / 2**20:.1f}" for c in made["costs"]}
    nearest = next(c for c in made["candidates"] if c["goal"] == 1.0)
    assert (nearest["rank"], f"{nearest['ratio']:.2f}") == (int(block_rank), ratio)
    expected = [
        ("plain", "replicated", int(rank)),
        ("plain", "s-lora", int(rank)),
        ("block-diagonal", "local", int(block_rank)),
    ]
    assert [costs[key] for key in expected] == [replicated, s_lora, block]


def test_parameter_ratios(models):
    """r, 2 r and 4 r in 8 blocks, over all seven modules."""
    page = (ROOT / "docs" / "sharding.md").read_text()
    for name in models:
        layers = models[name].linear_layers()
        plain = total_parameters(layers, 64)
        ratios = [total_parameters(layers, 64 * times, 8) / plain for times in (1, 2, 4)]
        row = " | ".join(f"{ratio:.3f}x" for ratio in ratios)
        assert f"| {name.rpartition('-')[2]} | {row} |" in page, row
