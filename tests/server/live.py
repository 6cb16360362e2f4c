"""One server at a time, shared by all tests that ask for the same one (an idle server still uses a core)."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Answer, Ask, Served, Server

# Mixed batches of up to 15 adapters and the base, rank 32, all modules, no adapter at start.
LORA = ("--enable-lora", "--max-lora-rank", "32", "--lora-target-modules", "all", "--max-loras-per-batch", "16")
PLUGINS = Path(__file__).parent / "plugins"
TENANTS = Path(__file__).parent / "tenants.yaml"


class Live:
    """A running server with the zoo's view of it: adapters are loaded by recipe on first use."""

    def __init__(self, served: Served, server: Server, zoo, counts: Path):
        self.served, self.server, self.zoo = served, server, zoo
        self.oracle = zoo.oracle(served.family)
        self._counts = counts
        self._loaded: set[str] = set()
        self._random = random.Random(0)
        # What the server says without any adapter, one request at a time, so that batches are the same everywhere.
        self.probes = [self.ask(None, tokens) for tokens in (5, 40, 100)]
        self.untouched = [server.generate([probe])[0] for probe in self.probes]

    def folder(self, recipe: str) -> Path:
        return self.zoo.adapter(self.served.family, recipe)

    def ensure(self, recipe: str) -> None:
        if recipe not in self._loaded:
            self.load(recipe, self.folder(recipe))
            self._loaded.add(recipe)

    def clear(self) -> None:
        """Unload the recipes that tests have asked for; the next one that asks loads its own again."""
        while self._loaded:
            self.unload(self._loaded.pop())

    answer = staticmethod(Answer.parse)

    def load(self, name: str, folder: Path) -> None:
        response = self.server.load(name, folder)
        assert response.status_code == 200, f"{name}: {response.text}\n{self.server.tail()}"
        assert response.json()["success"]

    def unload(self, name: str) -> None:
        response = self.server.unload(name)
        assert response.status_code == 200, f"{name}: {response.text}\n{self.server.tail()}"
        assert response.json()["success"]

    def prompt(self, tokens: int) -> tuple[int, ...]:
        """Random token ids, other ones at every call."""
        return tuple(self._random.randrange(3, self.oracle.vocabulary) for _ in range(tokens))

    def ask(self, recipe: str | None, tokens: int = 20, **more) -> Ask:
        """A request with a fresh prompt for a recipe's adapter (None: the base model)."""
        more.setdefault("prompt", self.prompt(tokens))
        if recipe is None:
            return Ask(**more)
        self.ensure(recipe)
        return Ask(adapter=recipe, folder=self.folder(recipe), **more)

    @contextmanager
    def counting_collectives(self) -> Iterator[list[dict]]:
        """A list that has, after the block, a record of each forward pass in it (plugins/collective_counter.py)."""
        switch, records = self._counts.with_suffix(".on"), []
        self._counts.unlink(missing_ok=True)
        switch.touch()
        try:
            yield records
        finally:
            switch.unlink()
            records += [json.loads(line) for line in self._counts.read_text().splitlines()]

    @property
    def kernel_calls(self) -> Counter:
        """So far, of a server that computes with the GPU's kernels (plugins/kernel_interpreter.py)."""
        return Counter(json.loads(self._counts.with_name("kernels.json").read_text()))

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return json.loads((self.zoo.model(self.served.family) / "config.json").read_text())["num_hidden_layers"]

    @contextmanager
    def failing(self, **fault) -> Iterator[None]:
        """In the block one rank fails while it loads (plugins/fault_injector.py)."""
        file = self._counts.with_name("fault.json")
        file.write_text(json.dumps(fault))
        try:
            yield
        finally:
            file.unlink()


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest, zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server that the test's indirect parameter describes."""
    served: Served = request.param
    folder = tmp_path_factory.mktemp("server")
    environment = {
        "COLLECTIVE_COUNTER_FILE": str(folder / "collectives.jsonl"),
        "FAULT_FILE": str(folder / "fault.json"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(PLUGINS), os.environ.get("PYTHONPATH")))),
        **dict(served.environment),
    }
    if "TRITON_INTERPRET" in environment:
        environment["KERNEL_CALLS_FILE"] = str(folder / "kernels.json")
    adapters = zoo.adapter(served.family, "bd4-r16").parent
    words = {"ADAPTERS": str(adapters), "TENANTS": str(TENANTS)}
    arguments = (*LORA, *(words.get(word, word) for word in served.arguments))
    log = folder / f"{served.family}-{served.tp}.log"
    key = dict(zip(served.arguments, served.arguments[1:], strict=False)).get("--admin-api-key", "")
    with Server(zoo.model(served.family), served.tp, log, arguments, environment, key=key) as server:
        yield Live(served, server, zoo, folder / "collectives.jsonl")
