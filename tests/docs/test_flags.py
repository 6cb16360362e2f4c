"""Every flag that the pages name is one of a program here or of SGLang's server."""

import argparse
import re
from functools import cache

import pytest
from blocks import ROOT, pages

# Flags of other programs: vLLM's in docs/migration.md, and those of pip, uv, Docker, Ray and curl.
OTHERS = {
    "--lora-modules", "--max-loras", "--max-cpu-loras", "--fully-sharded-loras", "--tensor-parallel-size", "--profile", "--wait", "--build",
    "--head", "--address", "--nproc-per-node", "--format", "--extra-index-url", "--gpus", "--volumes", "--shm-size",
}  # fmt: skip


@cache
def known() -> set[str]:
    from sgl_bdlora import cpu

    cpu.prepare_environment()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for folder in ("sgl_bdlora", "app", "benchmarks", "examples", "docker"):
        for file in (ROOT / folder).rglob("*.py"):
            flags |= set(re.findall(r"--[a-z][a-z0-9-]+", file.read_text()))
    return flags


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_flags_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text()))
    unknown = named - known() - OTHERS
    # A field of a training file is an option of the same name.
    train = (ROOT / "examples" / "train.py").read_text()
    unknown = {flag for flag in unknown if flag.removeprefix("--no-").removeprefix("--").replace("-", "_") not in train}
    assert not unknown, f"{page.name} names {sorted(unknown)}"
