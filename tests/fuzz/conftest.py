"""What the fuzz tests need: a tiny server on two ranks, and a look whether it is as it was."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))

import pytest
from harness import Ask, Server, check


@pytest.fixture(scope="module")
def server(zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routes")
    root = zoo.adapter("llama", "bd4-r16").parent
    zoo.adapter("llama", "plain-r2")
    arguments = (
        "--enable-lora", "--max-lora-rank", "32", "--lora-target-modules", "all", "--max-loras-per-batch", "8",
        "--adapter-root", str(root), "--lora-paths", f"good={root / 'bd4-r16'}",
    )  # fmt: skip
    with Server(zoo.model("llama"), 2, folder / "server.log", arguments) as server:
        yield server


@pytest.fixture(scope="module")
def probe(server, zoo):
    """Checks that the server lives and answers exactly, the adapter's requests and the base model's."""
    oracle, folder = zoo.oracle("llama"), zoo.adapter("llama", "bd4-r16")

    def run() -> None:
        prompt = tuple(range(10, 30))
        if "good" not in {adapter["name"] for adapter in server.get("/bdlora/info").json()["adapters"]}:
            assert server.load("good", folder).status_code == 200
        asks = [Ask(prompt), Ask(prompt, "good", folder)]
        check(oracle, asks, server.generate(asks))

    return run
