"""The Triton kernels compile for GPUs with less shared memory than a Hopper has, take no more of it than there is, and wait for the kernel
ahead of them where they may begin before it has ended."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "l40s", "rtx5090"])
def test_kernels_fit(gpu):
    """In a process of its own: other tests have chosen Triton's interpreter in this one."""
    words = [sys.executable, "-m", "benchmarks.kernels.fit", "--gpus", gpu, "--models", "8b", "--tp", "2"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    kernels, dependent = map(int, re.search(rf"{gpu}: (\d+) kernels.*; (\d+) may begin before", ended.stdout).groups())
    assert dependent == (kernels if gpu == "rtx5090" else 0)
