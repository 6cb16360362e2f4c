"""What the page's tests need: the server harness, a page in this process, and a headless browser."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))


@pytest.fixture(scope="session")
def browser() -> Iterator:
    from browser import chromium

    with chromium() as found:
        yield found
