import sys
from pathlib import Path

# For `instances`, whatever folder pytest was started in.
sys.path.insert(0, str(Path(__file__).parent))
