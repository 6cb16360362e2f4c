"""Converted adapters are served: equal to their own dense form, and to the last byte as large as `validate` says."""

import json

import httpx
from harness import Ask, check
from safetensors.torch import load_file, save_file
from servers import LLAMA, QWEN3, S_LORA, on
from zoo import RECIPES

from sgl_bdlora.adapters.__main__ import main
from sgl_bdlora.adapters.convert import re_block, to_block_diagonal, to_dense


@on(LLAMA)
def test_a_converted_adapter_equals_its_dense_form(live, tmp_path):
    """Plain to 4 blocks by a fit, that to 2 blocks exactly and to 8 by another fit; each beside its dense form and the source."""
    source = live.folder("plain-patterns")
    assert not to_block_diagonal(source, tmp_path / "four", 4, 8).exact
    assert re_block(tmp_path / "four", tmp_path / "two", 2).exact
    assert not re_block(tmp_path / "four", tmp_path / "eight", 8, 8).exact
    asks = [live.ask("plain-patterns", 20), live.ask(None)]
    for name in ("four", "two", "eight"):
        to_dense(tmp_path / name, tmp_path / f"{name}-dense")
        for served in (name, f"{name}-dense"):
            live.load(f"converted-{served}", tmp_path / served)
            # The oracle is the dense form for both.
            asks.append(Ask(live.prompt(20), f"converted-{served}", tmp_path / f"{name}-dense"))
    check(live.oracle, asks, live.server.generate(asks))
    for ask in asks[2:]:
        live.unload(ask.adapter)


@on(LLAMA, QWEN3, S_LORA)
def test_validate_says_what_the_server_holds(live, capsys):
    recipes = [name for name in RECIPES if name != "bd8-r32"][:16]
    sharding = "s-lora" if live.served == S_LORA else "replicated"
    live.server.generate([live.ask(recipe) for recipe in recipes])
    folders = [str(live.folder(recipe)) for recipe in recipes]
    options = ["--tp", str(live.served.tp), "--lora-sharding", sharding, "--dtype", "float32", "--json"]
    assert main(["validate", *folders, "--model", str(live.zoo.model(live.served.family)), *options]) == 0
    said = {a["name"]: a["bytes_per_rank"] for a in json.loads(capsys.readouterr().out)["adapters"]}
    response = httpx.get(f"{live.server.base_url}/bdlora/info", timeout=60)
    held = {a["name"]: a["host_bytes"] for a in response.json()["adapters"]}
    assert {name: [size] * live.served.tp for name, size in said.items()} == {name: held[name] for name in recipes}


@on(LLAMA)
def test_validate_refuses_what_the_server_refuses(live, tmp_path, capsys):
    """With the same words."""
    to_block_diagonal(live.folder("plain-q-only"), tmp_path / "high", 8, 64)
    to_block_diagonal(live.folder("plain-q-only"), tmp_path / "nan", 4, 8)
    weights = tmp_path / "nan" / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(weights).items()}, weights)
    for name, code in (("high", 1), ("nan", 2)):
        response = live.server.load(name, tmp_path / name)
        assert response.status_code == 400
        options = ["--tp", str(live.served.tp), "--max-lora-rank", "32"]
        assert main(["validate", str(tmp_path / name), *options]) == code
        assert response.json()["error_message"].strip() in capsys.readouterr().err
