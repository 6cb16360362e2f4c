"""How each documented command is checked: run here, parsed by its own parser, or listed with the reason why it is neither.

Commands that need a server are run in test_served.py, which is slow.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import ROOT, Command

# Commands that are neither run nor parsed: what they begin with -> the page that may have them, and why.
LISTED = {
    "docker ": (
        "docs/containers.md",
        "needs a container engine; the files are checked by tests/unit/test_containers.py",
    ),
    "KEY=$(docker ": ("docs/containers.md", "the same; it reads a key out of a container"),
}

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip

# Words that stand for the reader's own: files that the sandbox has.
PLACEHOLDERS = {
    "MODEL": "Llama-3.1-8B/config.json",
    "LORA": "examples/adapters/json-lora",
    "BLOCK_DIAGONAL": "block-diagonal",
}
# Documented examples whose numbers do not fit the small adapters here.
_INSTEAD = {"convert LORA BLOCK_DIAGONAL --nblocks 8": "convert LORA BLOCK_DIAGONAL --nblocks 3"}


def sandbox(folder: Path) -> None:
    """The files that the pages name, in a directory of their own."""
    for name, sizes in (("Llama-3.1-8B", LLAMA_8B), ("Llama-3.1-70B", LLAMA_70B)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(sizes))
    (folder / "examples").symlink_to(ROOT / "examples")
    adapters = folder / "adapters"
    adapters.mkdir()
    for name, source in (("json-bd", "json-bd"), ("sql-lora", "sql-lora"), ("french-bd", "pirate-bd")):
        (adapters / name).symlink_to(ROOT / "examples" / "adapters" / source)


class Shell:
    """What a block's commands leave for those after them: files, and the last exit code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch, self.code = monkeypatch, 0
        monkeypatch.delenv("COLUMNS", raising=False)

    def check(self, command: Command, page: str = "") -> None:
        """Run or parse the command. Fails where it does neither and is not listed."""
        line = " ".join(command.words)
        if any(line.startswith(start) and page == where for start, (where, _) in LISTED.items()):
            return
        words = list(command.words)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:2] == ["echo", "$?"]:
            assert command.output == [str(self.code)]
        elif words[:3] == ["python", "-m", "sgl_bdlora.adapters"]:
            self._run_tool(words[3:], command.output)
        elif words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/"))
        elif words[:2] == ["python", "-m"] and words[2].endswith("launch_server"):
            parse_server(words[3:])
        elif words[:2] == ["python", "-m"]:
            parse(words[2], words[3:], self.monkeypatch)
        elif words[0] == "python":
            parse(str(ROOT / words[1]), words[2:], self.monkeypatch)
        elif words[0] == "make":
            check_target(words[1:])
        elif words[0] == "pip":
            check_extra(words[1:])
        elif words[0] == "curl":
            check_curl(words[1:])
        else:
            pytest.fail(f"{line!r} is neither run nor parsed; add a rule, or a reason to LISTED (tests/docs/how.py)")

    def _run_tool(self, words: list[str], shown: list[str]) -> None:
        """Run `python -m sgl_bdlora.adapters`; what the page shows of its output has to be in it."""
        from sgl_bdlora.adapters.__main__ import main

        line = " ".join(words)
        for documented, instead in _INSTEAD.items():
            line = line.replace(documented, instead)
        words = [PLACEHOLDERS.get(word, word) for word in line.split()]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            self.code = main(words)
        assert self.code == 0 or shown, f"{line}: exit code {self.code}\n{said.getvalue()}"
        have = [" ".join(row.split()) for row in said.getvalue().splitlines()]
        for row in shown:
            row = " ".join(row.split())
            if row and row != "..." and "━" not in row:
                assert row in have, f"{line}: no longer says {row!r}\n{said.getvalue()}"


class ParsedError(BaseException):
    """Ends a program where it has parsed its arguments. No Exception, so that nothing in between catches it."""


def parse(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the module or file with these arguments, up to where it has parsed them."""
    words = [word for word in words if word != "..."]
    original = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        original(self, args, namespace)
        raise ParsedError

    with monkeypatch.context() as patch, _quiet() as said:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [program, *words])
        patch.syspath_prepend(str(ROOT))
        try:
            if program.endswith(".py"):
                patch.syspath_prepend(str(Path(program).parent))
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except ParsedError:
            return
        except SystemExit as end:
            pytest.fail(f"{program} {' '.join(words)} is refused: {end}\n{said.getvalue()}")
    pytest.fail(f"{program} parses no arguments")


def parse_server(words: list[str]) -> None:
    """Parse a server's arguments with SGLang's parser and ours."""
    from sgl_bdlora import config, cpu

    cpu.prepare_environment()
    from sglang.srt.server_args import LORA_BACKEND_CHOICES, ServerArgs

    if config.BACKEND not in LORA_BACKEND_CHOICES:
        LORA_BACKEND_CHOICES.append(config.BACKEND)
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if "--adapter-root" not in parser.format_usage():
        config.add_arguments(parser)
    # Directories and files that only the reader has.
    places = {"--adapter-root": ".", "--tenants": __file__}
    words = [places.get(words[i - 1], word) if i else word for i, word in enumerate(words) if word != "..."]
    with _quiet() as said:
        try:
            parser.parse_args(words)
        except SystemExit:
            pytest.fail(f"launch_server {' '.join(words)} is refused\n{said.getvalue()}")


def check_target(words: list[str]) -> None:
    """make: the targets are there, and variables are ones that the Makefile reads."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        expected = rf"\$\({name}\)" if equals else rf"^{name}:"
        assert re.search(expected, text, re.MULTILINE), f"the Makefile knows no {name}"


def check_extra(words: list[str]) -> None:
    """pip install: this package, with extras that it has."""
    assert words[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    for word in words[1:]:
        found = re.fullmatch(r"(-e|-U|\.|sgl-bdlora|sglang==[\d.]+)(\[(.+)\])?", word)
        assert found, f"pip install {word}: not this package"
        for extra in (found[3] or "").split(","):
            assert not extra or re.search(rf"^{extra} = \[", project, re.MULTILINE), f"there is no extra {extra!r}"


def check_curl(words: list[str]) -> None:
    """curl: to a local server, with a JSON body where there is one. test_served.py sends them."""
    assert any(re.match(r"(http://)?(localhost|127\.0\.0\.1):\d+/", word) for word in words), words
    for flag, word in itertools.pairwise(words):
        if flag in ("-d", "--data"):
            json.loads(word)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said
