"""Keep a small server busy while adapters come and go, and check every answer; uses the tests' tiny models and server harness."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_TESTS = Path(__file__).parents[2] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "server")]
