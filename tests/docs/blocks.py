"""The code blocks of README.md and docs/*.md, fenced or indented, and the commands in them."""

import ast
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What a line of a shell begins with in these pages. A block that begins so is a block of commands, whatever its fence says.
_PROGRAMS = (
    "python", "python3", "make", "pip", "uv", "curl", "docker", "podman", "torchrun", "ray", "echo", "export", "git", "cp", "mkdir",
    "cat", "cd", "sglang", "openssl", "chmod", "kill", "nvidia-smi", "pytest",
)  # fmt: skip
_COMMAND = re.compile(rf"(\$ |[A-Z_]+=\$\(|([A-Z_]+=\S* )*({'|'.join(_PROGRAMS)})( |$))")


@dataclass
class Command:
    """One command as words of a shell, and the output that the page shows below it."""

    words: list[str]
    output: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass
class Block:
    """kind: "bash", "python" or "text". line: of the block's first line."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[Command]:
        """In a block with prompts the lines behind them; else every line."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        prompts = any(line.startswith("$ ") for line in lines)
        commands: list[Command] = []
        for line in lines:
            if prompts and not line.startswith("$ "):
                commands[-1].output.append(line)
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                commands.append(Command(words))
        return commands


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list[Block]:
    return [block for page in pages() for block in _blocks_of(str(page.relative_to(ROOT)), page.read_text())]


def _blocks_of(page: str, text: str) -> list[Block]:
    found: list[Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        fence = re.match(r" *```(\w*)$", lines[at])
        if fence:
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            content = _outdented(lines[at + 1 : end])
            found.append(Block(page, at + 2, _kind(content, fence[1]), content))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            content = _outdented(lines[at:end])
            found.append(Block(page, at + 1, _kind(content, ""), content))
            at = end
        else:
            at += 1
    return found


def _outdented(lines: list[str]) -> str:
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:] for line in lines).strip("\n")


def _kind(content: str, language: str) -> str:
    if language in ("bash", "sh", "shell", "console") or _COMMAND.match(content):
        return "bash"
    if language in ("python", "py"):
        return "python"
    if not language and re.search(r"^(import|from|def|class|@)\b|^\w+ \+?= ", content, re.MULTILINE):
        try:
            ast.parse(content)
        except SyntaxError:
            return "text"
        return "python"
    return "text"
