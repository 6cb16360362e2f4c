"""GET /bdlora/info says what is loaded, and its bytes are those of the sharding formulas."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from servers import LLAMA, QWEN3, S_LORA, on

import sgl_bdlora
from sgl_bdlora.adapters import read_adapter


def info(live) -> dict:
    response = httpx.get(f"{live.server.base_url}/bdlora/info", timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


@on(LLAMA, QWEN3)
@pytest.mark.parametrize("recipe", ["bd4-r16", "plain-r32", "bd4-mixed"])
def test_a_loaded_adapter_is_described(live, recipe):
    live.server.generate([live.ask(recipe)])
    state = info(live)
    adapter = read_adapter(live.folder(recipe), recipe)
    entry = next(a for a in state["adapters"] if a["name"] == recipe)
    assert state["tp_size"] == live.served.tp
    assert state["lora_sharding"] == "replicated"
    assert (entry["kind"], entry["rank"], entry["nblocks"]) == (adapter.kind, adapter.rank, adapter.nblocks)
    assert entry["resident"]
    assert entry["pool_bytes"] == entry["host_bytes"]
    assert len(entry["local_ranks"]) == live.served.tp
    assert entry["collectives_per_step"] == state["collectives_per_step"] == 0
    assert 0 <= state["time"] - entry["last_used"] < 60
    assert entry["requests_running"] == 0


@on(LLAMA)
def test_bytes_per_rank_are_the_formulas(live):
    """4 bytes a parameter; per rank at TP 2: a plain column layer r k + r n / 2, a block-diagonal one of 2 blocks half of that.

    The input embedding is split like a row layer whose inputs are the vocabulary, lm_head like a column layer.
    """
    for recipe, share in (("plain-r32", None), ("plain-vocabulary", None), ("bd2-r8", 2)):
        live.ensure(recipe)
        adapter = read_adapter(live.folder(recipe), recipe)
        entry = next(a for a in info(live)["adapters"] if a["name"] == recipe)
        expected = 0
        for path, m in adapter.modules.items():
            row = path.endswith(("o_proj", "down_proj", "embed_tokens"))
            a, b = m.rank * m.in_features, m.rank * m.out_features
            if share:
                expected += (a // 4 + b // 2) if row else (a // 2 + b // 4)
            else:
                expected += (a // 2 + b) if row else (a + b // 2)
        assert entry["host_bytes"] == [4 * expected] * 2
        leaves = {path.rpartition(".")[2] for path in adapter.modules}
        assert all(ranks.keys() == leaves for ranks in entry["local_ranks"])


@on(LLAMA, S_LORA)
def test_other_shardings_are_costed_for_plain_adapters_of_the_same_rank(live):
    """Per rank at TP 2, 4 bytes a parameter: S-LoRA halves everything, replicated only one factor of each module."""
    for recipe in ("plain-r32", "bd2-r8"):
        live.ensure(recipe)
        adapter = read_adapter(live.folder(recipe), recipe)
        entry = next(a for a in info(live)["adapters"] if a["name"] == recipe)
        replicated = s_lora = 0
        for path, m in adapter.modules.items():
            a, b = m.rank * m.in_features, m.rank * m.out_features
            s_lora += (a + b) // 2
            replicated += (a // 2 + b) if path.endswith(("o_proj", "down_proj")) else (a + b // 2)
        assert entry["plain_bytes"] == {"replicated": [4 * replicated] * 2, "s-lora": [4 * s_lora] * 2}
        stored = [f.tensor.shape for m in adapter.modules.values() for f in (m.a, m.b)]
        assert entry["parameters"] == sum(rows * columns for rows, columns in stored)
        if recipe == "plain-r32":
            assert (
                entry["host_bytes"]
                == entry["plain_bytes"][live.served.arguments[1] if live.served == S_LORA else "replicated"]
            )


@on(LLAMA)
def test_the_model_and_the_machine_are_described(live):
    state = info(live)
    model = json.loads((live.oracle.model_dir / "config.json").read_text())
    layers = {layer["name"]: layer for layer in state["model_layers"]}
    assert {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} <= layers.keys()
    for name, parallelism in (
        ("qkv_proj", "column"),
        ("o_proj", "row"),
        ("gate_up_proj", "column"),
        ("down_proj", "row"),
    ):
        assert (layers[name]["parallelism"], layers[name]["count"]) == (parallelism, model["num_hidden_layers"])
    down = {"name": "down_proj", "inputs": model["intermediate_size"], "outputs": model["hidden_size"]}
    assert layers["down_proj"]["slices"] == [
        {**down, "local_inputs": model["intermediate_size"] // 2, "local_outputs": model["hidden_size"]}
    ]
    assert [s["name"] for s in layers["qkv_proj"]["slices"]] == ["q_proj", "k_proj", "v_proj"]
    assert state["dtype"] == "float32"
    assert state["origin"]["version"] == sgl_bdlora.__version__
    assert state["origin"]["name"]
    assert state["origin"]["cores"] > 0
    assert state["prompt_format"] == "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@on(LLAMA)
def test_unloaded_adapters_are_gone(live):
    live.load("passing", live.folder("bd2-r8"))
    assert "passing" in {a["name"] for a in info(live)["adapters"]}
    live.unload("passing")
    assert "passing" not in {a["name"] for a in info(live)["adapters"]}


@on(S_LORA)
def test_s_lora_splits_plain_adapters_evenly(live):
    live.server.generate([live.ask("plain-r32"), live.ask("bd2-r8")])
    state = info(live)
    entries = {a["name"]: a for a in state["adapters"]}
    adapter = read_adapter(live.folder("plain-r32"), "plain-r32")
    total = sum(m.rank * (m.in_features + m.out_features) for m in adapter.modules.values())
    assert entries["plain-r32"]["host_bytes"] == [4 * total // 2] * 2
    assert entries["plain-r32"]["collectives_per_step"] == state["collectives_per_step"] == 8
    assert entries["bd2-r8"]["collectives_per_step"] == 0


@on(LLAMA)
def test_requests_are_counted_while_they_run(live):
    asks = [live.ask("bd4-r16", new_tokens=200, prompt_logprobs=False) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(live.server.generate, asks)
        seen = 0
        while not answers.done():
            entry = next(a for a in info(live)["adapters"] if a["name"] == "bd4-r16")
            seen = max(seen, entry["requests_running"])
        answers.result()
    assert seen == 2
    entry = next(a for a in info(live)["adapters"] if a["name"] == "bd4-r16")
    assert entry["requests_running"] == entry["requests_waiting"] == 0
