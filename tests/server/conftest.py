"""One server at a time, shared by all tests that ask for the same one (an idle server still uses a core)."""

import random
from collections.abc import Callable

import pytest
from harness import Ask, Served, Server

# Slots for mixed batches of many adapters, rank 32, and all modules, without any adapter at start.
LORA = ("--enable-lora", "--max-lora-rank", "32", "--lora-target-modules", "all", "--max-loras-per-batch", "16")


class Live:
    """A running server with the zoo's view of it: adapters are loaded by recipe on first use."""

    def __init__(self, served: Served, server: Server, zoo):
        self.served, self.server, self.zoo = served, server, zoo
        self.oracle = zoo.oracle(served.family)
        self._loaded: set[str] = set()
        self._random = random.Random(0)

    def ensure(self, recipe: str) -> None:
        if recipe not in self._loaded:
            response = self.server.load(recipe, self.zoo.adapter(self.served.family, recipe))
            assert response.status_code == 200, f"{recipe}: {response.text}\n{self.server.tail()}"
            assert response.json()["success"]
            self._loaded.add(recipe)

    def prompt(self, tokens: int) -> tuple[int, ...]:
        """Random token ids that no earlier prompt shares a prefix with, but by accident."""
        return tuple(self._random.randrange(3, 512) for _ in range(tokens))

    def ask(self, recipe: str | None, tokens: int = 20, **more) -> Ask:
        """A request with a fresh prompt for a recipe's adapter (None: the base model)."""
        more.setdefault("prompt", self.prompt(tokens))
        if recipe is None:
            return Ask(**more)
        self.ensure(recipe)
        return Ask(adapter=recipe, folder=self.zoo.adapter(self.served.family, recipe), **more)


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest, zoo, tmp_path_factory: pytest.TempPathFactory):
    served: Served = request.param
    log = tmp_path_factory.mktemp("server") / f"{served}.log"
    with Server(zoo.model(served.family), served.tp, log, (*LORA, *served.arguments)) as server:
        yield Live(served, server, zoo)


@pytest.fixture(scope="session")
def start(zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Server]:
    """Build a server that the test itself starts and stops."""

    def build(served: Served, **more) -> Server:
        log = tmp_path_factory.mktemp("server") / f"{served}.log"
        return Server(zoo.model(served.family), served.tp, log, served.arguments, **more)

    return build
