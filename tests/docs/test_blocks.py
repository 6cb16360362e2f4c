"""Every code block of the pages: commands are run or parsed, Python compiles and imports what there is."""

import ast
import importlib

import pytest
from blocks import ROOT, Block, Command, blocks
from how import LISTED, Shell, sandbox

BLOCKS = blocks()
COMMANDS = [block for block in BLOCKS if block.kind == "bash"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    sandbox(folder)
    return folder


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands(block: Block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    shell = Shell(monkeypatch)
    commands = block.commands()
    assert commands
    for command in commands:
        shell.check(command, block.page)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind == "python"], ids=str)
def test_python(block: Block):
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert name.name in getattr(module, "__all__", ()) or hasattr(module, name.name), (
                    f"{node.module} has no {name.name}"
                )
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


def test_the_pages_have_blocks_of_every_kind():
    assert len(COMMANDS) > 15
    assert {block.kind for block in BLOCKS} == {"bash", "python", "text"}
    assert {"README.md", "docs/adapters.md", "docs/serving.md"} <= {block.page for block in COMMANDS}


def test_each_listed_reason_is_needed():
    lines = [(block.page, " ".join(command.words)) for block in COMMANDS for command in block.commands()]
    for start, (where, _) in LISTED.items():
        used = any(page == where and line.startswith(start) for page, line in lines)
        assert used or not (ROOT / where).exists(), f"{where} has no command that begins with {start!r}"


def test_a_block_that_nothing_knows_fails(folder, monkeypatch):
    monkeypatch.chdir(folder)
    shell = Shell(monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="neither run nor parsed"):
        shell.check(Command(["rm", "-rf", "cache"]))
    with pytest.raises(pytest.fail.Exception, match="is refused"):
        shell.check(Command(["python", "-m", "sgl_bdlora.cluster", "simulate", "--no-such-flag"]))
    with pytest.raises(pytest.fail.Exception, match="is refused"):
        shell.check(
            Command(["python", "-m", "sgl_bdlora.launch_server", "--model-path", "m", "--lora-sharding", "none"])
        )
    words = ["python", "-m", "sgl_bdlora.adapters", "inspect", "examples/adapters/json-bd"]
    with pytest.raises(AssertionError, match="no longer says"):
        shell.check(Command(words, ["json-bd: plain"]))
