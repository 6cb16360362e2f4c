"""What the page's tests need: the server harness, a page in this process, and a headless browser."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """While it is open, Playwright's event loop runs in this thread, and no other can."""
    from browser import chromium

    with chromium() as found:
        yield found
