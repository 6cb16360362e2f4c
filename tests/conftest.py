"""Models, adapters and servers shared by all tests, made once a session."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

sys.path.insert(0, str(Path(__file__).parent / "server"))

import pytest
from live import live  # noqa: F401
from zoo import RECIPES, Oracle, Recipe, write_adapter, write_model


class Zoo:
    """Tiny models and their adapters by name, written on first use."""

    def __init__(self, root: Path):
        self._root = root
        self._oracles: dict[str, Oracle] = {}

    def model(self, family: str) -> Path:
        folder = self._root / family
        return folder if folder.exists() else write_model(family, folder)

    def adapter(self, family: str, recipe: str | Recipe) -> Path:
        if isinstance(recipe, str):
            recipe = RECIPES[recipe]
        folder = self._root / "adapters" / family / recipe.name
        return folder if folder.exists() else write_adapter(self.model(family), recipe, folder)

    def oracle(self, family: str) -> Oracle:
        if family not in self._oracles:
            self._oracles[family] = Oracle(self.model(family))
        return self._oracles[family]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))
