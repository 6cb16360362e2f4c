"""Which adapter directory each served name stands for now, and who is asking for it."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.workload import zipf_weights


class Names:
    """Names in order of popularity. A closed name is not chosen, so that what it stands for can be changed."""

    def __init__(self, s: float):
        self._s = s
        self._order: list[str] = []
        self._folders: dict[str, Path] = {}
        self._asking: Counter[str] = Counter()
        self._changed = threading.Condition()

    def open(self, name: str, folder: Path, rank: int | None = None) -> None:
        """rank: place of a new name in the order of popularity; the last one by default."""
        with self._changed:
            if name not in self._order:
                self._order.insert(len(self._order) if rank is None else rank, name)
            self._folders[name] = folder

    def close(self, name: str, forget: bool = False) -> None:
        with self._changed:
            del self._folders[name]
            if forget:
                self._order.remove(name)

    def is_open(self, name: str) -> bool:
        with self._changed:
            return name in self._folders

    def folders(self) -> dict[str, Path]:
        with self._changed:
            return dict(self._folders)

    @contextmanager
    def choose(self, rng: random.Random, count: int = 1) -> Iterator[list[tuple[str, Path]]]:
        """Names by Zipf popularity; until the block ends they count as asked for."""
        with self._changed:
            names = [name for name in self._order if name in self._folders]
            picked = [
                (name, self._folders[name]) for name in rng.choices(names, zipf_weights(len(names), self._s), k=count)
            ]
            self._asking.update(name for name, _ in picked)
        try:
            yield picked
        finally:
            with self._changed:
                self._asking.subtract(name for name, _ in picked)
                self._changed.notify_all()

    def wait_until_idle(self, name: str, timeout: float) -> bool:
        """Wait until nobody asks for a name; False if somebody still does after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._asking[name], timeout)
