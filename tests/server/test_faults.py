"""Faults of ranks, files and processes: the server goes on as if nothing had been asked, or ends and says why."""

import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from harness import Ask, Server, check, request_body
from servers import LLAMA, on


@pytest.fixture
def folder(live, tmp_path):
    """A copy of an adapter that a test may spoil."""
    return shutil.copytree(live.folder("bd4-r16"), tmp_path / "adapter")


def goes_on(live, name: str) -> None:
    """No rank has kept anything of a failed load: the same name can be loaded, and all answers are exact."""
    assert name not in {adapter["name"] for adapter in live.server.get("/bdlora/info").json()["adapters"]}
    live.load(name, live.folder("bd4-r16"))
    asks = [live.ask(None, 12), live.ask("plain-r2", 12), Ask(live.prompt(12), name, live.folder("bd4-r16"))]
    check(live.oracle, asks, live.server.generate(asks))
    live.unload(name)


@on(LLAMA)
@pytest.mark.parametrize(("rank", "at"), [(0, "open"), (1, "open"), (1, "prepare")])
def test_a_load_that_fails_on_one_rank_is_undone_on_all(live, folder, rank, at):
    with live.failing(rank=rank, at=at, do="raise"):
        response = live.server.load("half-loaded", folder)
    assert response.status_code == 400, response.text
    for word in ("'half-loaded'", "No space left", "Fix: "):
        assert word in response.json()["error_message"]
    goes_on(live, "half-loaded")


@on(LLAMA)
@pytest.mark.parametrize("change", ["truncate", "write", "replace", "delete"])
def test_an_adapter_that_changes_while_it_is_loaded_is_refused(live, folder, change):
    """By the rank that saw it change, and so by all."""
    with live.failing(rank=0, at="opened", do=change, path=str(folder / "adapter_model.safetensors")):
        response = live.server.load("changing", folder)
    assert response.status_code == 400, response.text
    assert "changed, replaced or removed" in response.json()["error_message"]
    goes_on(live, "changing")


@on(LLAMA)
def test_an_expression_that_runs_away_is_refused(live, folder):
    config = folder / "adapter_config.json"
    text = config.read_text()
    runs_away = text.replace('"target_modules": [', '"exclude_modules": "(([a-z_.0-9]+)+)+!", "target_modules": [')
    assert runs_away != text
    config.write_text(runs_away)
    response = live.server.load("runaway", folder)
    assert response.status_code == 400, response.text
    assert "takes more than" in response.json()["error_message"]
    goes_on(live, "runaway")


class Ending:
    """A server of one's own, to end."""

    def __init__(self, server: Server):
        self.server = server
        self.launcher = psutil.Process(server.process.pid)

    def ranks(self) -> list[psutil.Process]:
        """Started before everything else that runs the model's code (cpu/processes.py)."""
        family = self.launcher.children(recursive=True)
        (forks,) = (p for p in family if "forkserver" in " ".join(p.cmdline()) and p.ppid() == self.launcher.pid)
        return sorted(forks.children(), key=psutil.Process.create_time)[:2]

    def code(self, patience: float) -> int:
        return self.server.process.exit_code(patience)


@pytest.fixture
def ending(zoo, tmp_path):
    with Server(zoo.model("llama"), 2, tmp_path / "log") as server:
        yield Ending(server)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_server_and_says_so(ending):
    everyone = [ending.launcher, *ending.launcher.children(recursive=True)]
    with ThreadPoolExecutor(1) as pool:
        asks = [Ask((5, 6, 7), new_tokens=500, prompt_logprobs=False)]
        running = pool.submit(httpx.post, ending.server.base_url + "/generate", json=request_body(asks), timeout=120)
        time.sleep(1)
        ending.ranks()[1].send_signal(signal.SIGKILL)
        assert ending.code(30) == 1
        with pytest.raises(httpx.TransportError):
            running.result(10)
    log = ending.server.log.read_text()
    # Who notices first: the launcher, or the other rank.
    assert "crashed with exit code -9" in log or re.search(r"Connection (reset|closed) by peer", log)
    assert "sgl-bdlora: a process of this server has ended" in log
    _, alive = psutil.wait_procs(everyone, timeout=10)
    assert not alive


@pytest.mark.slow
def test_sigterm_answers_what_was_asked_and_takes_nothing_new(ending, zoo):
    everyone = [ending.launcher, *ending.launcher.children(recursive=True)]
    asks = [Ask((5, 6, 7), new_tokens=400, prompt_logprobs=False) for _ in range(3)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ending.server.generate, asks)
        time.sleep(1)
        os.kill(ending.launcher.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert not running.done()
        assert httpx.get(ending.server.base_url + "/health", timeout=10).status_code == 503
        refused = ending.server.post("/generate", request_body(asks[:1]))
        assert (refused.status_code, "shutting down" in refused.text) == (503, True)
        check(zoo.oracle("llama"), asks, running.result(120))
    assert ending.code(60) == 0
    _, alive = psutil.wait_procs(everyone, timeout=10)
    assert not alive


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_adapters(zoo, tmp_path):
    """All given at start, all listed and served; a tenant sees its own. How long it takes: benchmarks/registered.py."""
    adapter = zoo.adapter("llama", "bd2-r8")
    names = [f"a{i:04}" for i in range(1000)]
    key, admin = "the key of a tenant", "administrator"
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants: {{one: {{key: {key}, adapters: [a0999]}}}}")
    arguments = (
        *("--tenants", str(tenants), "--admin-api-key", admin, "--enable-metrics", "--lora-pool-gb", "0.01"),
        *("--lora-paths", *(f"{name}={adapter}" for name in names)),
    )
    with Server(zoo.model("llama"), 1, tmp_path / "log", arguments, key=admin) as server:

        def listed(route: str, key: str) -> list[str]:
            return [adapter["name"] for adapter in server.get(route, key=key).json()["adapters"]]

        assert {model["id"] for model in server.get("/v1/models").json()["data"]} == {"base", *names}
        assert listed("/bdlora/info", admin) == names
        assert listed("/bdlora/info?limit=20&offset=990", admin) == names[990:]
        assert server.get("/bdlora/info").json()["adapters_loaded"] == 1000
        assert "bdlora_adapters_registered 1000" in server.get("/metrics").text
        assert listed("/bdlora/info", key) == ["a0999"]
        assert "a0000" not in server.get("/v1/models", key=key).text
        asks = [Ask(tuple(range(5, 15)), name, adapter) for name in (names[0], names[500], names[999])]
        check(zoo.oracle("llama"), asks, server.generate(asks))
