"""The pages' requests and programs against a server that was started with the README's own command, on a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from blocks import Block, Command, blocks
from harness import Server

from sgl_bdlora import cpu, defaults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# What the pages' names stand for here; the demo's adapters were trained on another model.
SKILLS = ("json", "pirate", "sentiment", "sql")
ADAPTERS = {
    "sql": "bd4-r16",
    "chat": "plain-r2",
    **{f"{skill}-bd": "bd4-r16" for skill in SKILLS},
    **{f"{skill}-lora": "plain-r8-attention" for skill in SKILLS},
}
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
BLOCKS = blocks()


def launch_command(page: str) -> Command:
    """The page's first command that starts a server."""
    for block in BLOCKS:
        if block.page == page and block.kind == "bash":
            for command in block.commands():
                if command.words[1:3] == ["-m", "sgl_bdlora.launch_server"]:
                    return command
    raise LookupError(page)


@pytest.fixture(scope="module")
def server(zoo, tmp_path_factory):
    """README's launch command: its options, with another model, two ranks, and adapters of these names."""
    words = launch_command("README.md").words
    names = [word.partition("=")[0] for word in words if "=" in word]
    assert set(names) <= set(ADAPTERS), names
    folder = tmp_path_factory.mktemp("served")
    (folder / "fr").symlink_to(zoo.adapter("llama", "bd2-attention"))
    paths = [f"{name}={zoo.adapter('llama', recipe)}" for name, recipe in ADAPTERS.items()]
    arguments = ("--lora-paths", *paths, "--served-model-name", MODEL)
    with Server(zoo.model("llama"), 2, folder / "log", arguments) as server:
        server.fr = folder / "fr"
        yield server


def curls() -> list[Block]:
    return [b for b in BLOCKS if b.kind == "bash" and all(command.words[0] == "curl" for command in b.commands())]


@pytest.mark.parametrize("block", curls(), ids=str)
def test_requests(server, block):
    """One after another, as a reader would send them, by curl itself; each is answered with 200."""
    for command in block.commands():
        line = [word.replace("/adapters/fr", str(server.fr)) for word in command.words]
        line = [re.sub(r"^(http://)?(localhost|127\.0\.0\.1):\d+", server.base_url, word) for word in line]
        done = subprocess.run([*line, "-w", "\n%{http_code}"], capture_output=True, text=True, timeout=120, check=True)
        body, _, status = done.stdout.rpartition("\n")
        assert status == "200", f"{command}: {status} {body}"
        json.loads(body)
    loaded = {a["name"] for a in httpx.get(f"{server.base_url}/bdlora/info", timeout=60).json()["adapters"]}
    assert "fr" not in loaded, "the page loads an adapter and does not unload it"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "python" and "Endpoint(" in b.text], ids=str)
def test_programs(server, block, tmp_path):
    """A page's program, as a file."""
    script = tmp_path / "program.py"
    script.write_text(block.text.replace("http://127.0.0.1:30000", server.base_url))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["router", "best_of_n", "choose"])
def test_example_programs(server, name):
    """As docs/frontend.md runs them, with the address of this server."""
    commands = [c for b in BLOCKS if b.page == "docs/frontend.md" and b.kind == "bash" for c in b.commands()]
    (command,) = [c for c in commands if c.words[1].endswith(f"{name}.py")]
    root = Path(__file__).parents[2]
    line = [sys.executable, str(root / command.words[1]), *command.words[2:], "--server", server.base_url]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "python" and "Engine(" in b.text], ids=str)
def test_engine(zoo, tmp_path, block):
    """README's offline engine, with another model."""
    text = block.text.replace(f'"{MODEL}"', repr(str(zoo.model("llama"))))
    text = text.replace("/adapters/sql-bd", str(zoo.adapter("llama", "bd4-r16")))
    assert str(zoo.model("llama")) in text
    assert "bd4-r16" in text
    script = tmp_path / "engine.py"
    script.write_text(text.replace("tp_size=2", "tp_size=2, dtype='float32', max_total_tokens=2048"))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'text'" in done.stdout


def test_sglangs_launcher_with_the_arguments_of_the_page(zoo, tmp_path):
    """docs/serving.md's second command; on a CPU it wants the flags that our launcher adds."""
    (words,) = [
        c.words for b in BLOCKS if b.page == "docs/serving.md" and b.kind == "bash" for c in b.commands()
        if c.words[1:3] == ["-m", "sglang.launch_server"]
    ]  # fmt: skip
    flags = [word for word in words if word.startswith("--") and word not in ("--model-path", "--tp", "--lora-paths")]
    values = [words[words.index(flag) + 1] for flag in flags]
    given = [
        word
        for flag, value in zip(flags, values, strict=True)
        for word in (flag, value)
        if word == flag or word[:2] != "--"
    ]
    adapter = f"sql={zoo.adapter('llama', 'bd4-r16')}"
    arguments = (*given, "--lora-paths", adapter, *defaults.as_flags(cpu.default_fields({})))
    with Server(zoo.model("llama"), 2, tmp_path / "log", arguments, module="sglang.launch_server") as server:
        answer = server.post("/generate", {"text": "a", "lora_path": "sql", "sampling_params": {"max_new_tokens": 2}})
        assert answer.status_code == 200, answer.text
