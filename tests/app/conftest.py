"""What the page's tests need: the server harness, a page in this process, and a headless browser."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
