"""One server at a time, shared by all tests that ask for the same one (an idle server still uses a core)."""

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Ask, Served, Server

# Mixed batches of up to 15 adapters and the base, rank 32, all modules, no adapter at start.
LORA = ("--enable-lora", "--max-lora-rank", "32", "--lora-target-modules", "all", "--max-loras-per-batch", "16")
COUNTER = Path(__file__).parent / "counting"


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
        """A list that has, after the block, a record of each forward pass in it (counting/collective_counter.py)."""
        switch, records = self._counts.with_suffix(".on"), []
        self._counts.unlink(missing_ok=True)
        switch.touch()
        try:
            yield records
        finally:
            switch.unlink()
            records += [json.loads(line) for line in self._counts.read_text().splitlines()]


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest, zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server that the test's indirect parameter describes."""
    served: Served = request.param
    folder = tmp_path_factory.mktemp("server")
    environment = {
        "COLLECTIVE_COUNTER_FILE": str(folder / "collectives.jsonl"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(COUNTER), os.environ.get("PYTHONPATH")))),
        **dict(served.environment),
    }
    adapters = zoo.adapter(served.family, "bd4-r16").parent
    arguments = (*LORA, *(str(adapters) if word == "ADAPTERS" else word for word in served.arguments))
    log = folder / f"{served}.log"
    with Server(zoo.model(served.family), served.tp, log, arguments, environment) as server:
        yield Live(served, server, zoo, folder / "collectives.jsonl")
