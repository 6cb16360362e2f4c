"""docs/troubleshooting.md quotes messages that the package has, and leaves out none that a user can meet."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from blocks import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# The cluster's messages are about its configuration file, and name the field (docs/cluster.md).
FILES = [
    file
    for folder in ("sgl_bdlora", "app")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "cluster" not in file.parts
]
# What refuses something a user gave; other exceptions are faults of ours, or are caught on the way.
REFUSALS = {
    "AdapterError": 1, "ModelError": 1, "SystemExit": 0, "DemoModelError": 0, "DemoError": 0, "PoolFull": 0, "ArgumentTypeError": 0,
}  # fmt: skip
# These print what another command said.
ECHOES = ("sgl_bdlora/demo.py", "sgl_bdlora/tenants/start.py")


@cache
def quoted() -> list[str]:
    """The messages in the tables' first column."""
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert len(rows) > 80
    return rows


@cache
def constants() -> str:
    """Every string of the package, the parts of formatted ones each on a line."""
    nodes = (node for file in FILES for node in ast.walk(ast.parse(file.read_text())))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def parts_of(node: ast.AST) -> list[str]:
    """The constant parts of an expression that makes a message."""
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def raised() -> list[tuple[str, list[str]]]:
    """(where, constant parts of the message) of every refusal."""
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSALS):
                continue
            place = REFUSALS[node.func.id]
            parts = (
                [part for part in parts_of(node.args[place]) if len(part.strip(" ,;.=")) >= 5]
                if node.args[place:]
                else []
            )
            if parts:
                found.append((f"{file.relative_to(ROOT)}:{node.lineno}", parts))
    return found


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_code(message):
    pieces = [piece.strip(" ()") for piece in message.split("…")]
    pieces = [piece for piece in pieces if len(piece) >= 4]
    assert pieces
    for piece in pieces:
        assert piece in constants(), f"{piece!r} is in no message any more"


def test_every_refusal_is_on_the_page():
    said = "\n".join(quoted())
    missing = []
    for where, parts in raised():
        pieces = [piece.strip(" ()") for row in quoted() for piece in row.split("…")]
        covered = any(part.strip() in said or any(len(p) >= 8 and p in part for p in pieces) for part in parts)
        if not covered and not where.startswith(ECHOES):
            missing.append(f"{where}: {' … '.join(parts)}")
    assert not missing, "docs/troubleshooting.md lacks\n" + "\n".join(missing)


@pytest.mark.parametrize(
    "page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path):
    """To files of the repository, and to headings of its pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}"
