"""What a cluster refuses before it starts anything, or answers instead of hanging; and adapters as bodies."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from sgl_bdlora.adapters import AdapterError, read_adapter
from sgl_bdlora.cluster.base import PlacementError
from sgl_bdlora.cluster.config import ConfigError, from_dict
from sgl_bdlora.cluster.serving.catalog import describe, read_body, read_catalog, write_body

pytest.importorskip("ray", reason="needs the extra: pip install 'sgl-bdlora[cluster]'")

from sgl_bdlora.cluster.serving.launch import KEY_ENV, check, check_address, check_resources
from sgl_bdlora.cluster.serving.server import ReplicaServer, environment, server_arguments


@pytest.fixture(scope="module")
def folder(zoo, tmp_path_factory):
    """A model and two adapters."""
    root = tmp_path_factory.mktemp("refused")
    (root / "adapters").mkdir()
    for name in ("plain-r32", "bd4-r16"):
        (root / "adapters" / name).symlink_to(zoo.adapter("llama", name))
    return root


@pytest.fixture(scope="module")
def copied(folder):
    """The same without links that lead out of the root, which are refused."""
    import shutil

    shutil.copytree(folder / "adapters", folder / "copied", symlinks=False)
    return folder / "copied"


def config(zoo, root, serve=(), **sections):
    given = {"model": str(zoo.model("llama")), "adapter_root": str(root), "name": "base", "port": 20999, **dict(serve)}
    return from_dict({"serve": given, **sections})


def test_a_catalog_knows_ranks_and_bytes(zoo, copied):
    found = read_catalog(str(copied))
    assert set(found) == {"plain-r32", "bd4-r16"}
    plain = found["plain-r32"]
    assert (plain.adapter.rank, plain.limit) == (32, 32)
    # A block-diagonal adapter of the same rank has fewer parameters.
    assert found["bd4-r16"].adapter.rank < found["bd4-r16"].limit == 16
    stored = (copied / "plain-r32" / "adapter_model.safetensors").stat().st_size
    assert plain.adapter.size == pytest.approx(stored, rel=0.05)


def test_bodies_come_back_as_they_went(copied, tmp_path):
    import torch
    from safetensors.torch import load_file

    for name in ("plain-r32", "bd4-r16"):
        (tmp_path / name).mkdir()
        write_body(read_body(name, str(copied)), tmp_path / name)
        back, stored = (load_file(root / name / "adapter_model.safetensors") for root in (tmp_path, copied))
        assert set(back) == set(stored)
        assert all(torch.equal(back[key], stored[key]) for key in stored)
        said, there = (json.loads((root / name / "adapter_config.json").read_text()) for root in (tmp_path, copied))
        assert said == there
        assert {file.stat().st_mode & 0o777 for file in (tmp_path / name).iterdir()} == {0o600}
        assert read_adapter(tmp_path / name).rank == read_adapter(copied / name).rank


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x" * 100,
        b"\x80\x04K\x01.",
        (2**62).to_bytes(8, "little"),
        b"\x02" + bytes(7) + b"{}",
        bytes(8),
        b"\x0a" + bytes(7) + b"[" * 10,
    ],
)
def test_what_is_no_body_is_refused(body, tmp_path):
    with pytest.raises(ValueError, match="not a safetensors body"):
        write_body(np.frombuffer(body, np.uint8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_bodies_of_truncated_tensors_are_refused_by_the_reader(copied, tmp_path):
    body = read_body("bd4-r16", str(copied))
    for i, cut in enumerate((len(body) - 1, len(body) // 2)):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_body(body[:cut], folder)
        with pytest.raises(AdapterError, match="not a complete safetensors file"):
            read_adapter(folder)


@pytest.mark.parametrize("fault", [None, "refused", "gone", "damaged"])
def test_a_body_is_in_a_file_only_while_it_is_loaded(copied, tmp_path, fault):
    seen = []

    def server(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        assert request.url.path == "/load_lora_adapter"
        seen.append((asked["lora_name"], read_adapter(asked["lora_path"]).rank))
        if fault == "gone":
            raise httpx.ConnectError("gone")
        return httpx.Response(400 if fault else 200, json={"error_message": "too large"})

    process = object.__new__(ReplicaServer)
    process._adapters = tmp_path
    process.http = httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(server))
    body = read_body("bd4-r16", str(copied))
    load = process.load_body("bd4-r16", body[:9] if fault == "damaged" else body)
    if fault == "gone":
        with pytest.raises(httpx.ConnectError):
            asyncio.run(load)
    else:
        words = asyncio.run(load)
        assert {
            None: words is None,
            "refused": words == "too large",
            "damaged": "not a safetensors body" in str(words),
        }[fault]
    assert seen == ([] if fault == "damaged" else [("bd4-r16", 16)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("serve", "sections", "error", "words"), [
    ({"model": ""}, {}, ConfigError, r"serve.model is empty"),
    ({"model": "/nowhere"}, {}, ConfigError, r"serve.model = '/nowhere' is no directory"),
    ({"adapter_root": "/nowhere"}, {}, ConfigError, r"serve.adapter_root = '/nowhere' is no directory"),
    ({"name": "a:b"}, {}, ConfigError, r"serve.name = 'a:b' has a colon"),
    ({"name": "bd4-r16"}, {}, ConfigError, r"serve.name = 'bd4-r16' is an adapter's name too"),
    ({"host": "0.0.0.0"}, {}, ConfigError, rf"serve.host = '0.0.0.0' can be reached from other machines; set {KEY_ENV}"),
    ({}, {"replicas": {"max_rank": 16}}, PlacementError, r"'plain-r32' has rank 32 and fits no replica: replicas.max_rank = 16"),
    ({}, {"replicas": {"pool_gib": 0.0001}}, PlacementError, r"adapter '.*' .*fits no replica.*replicas.pool_gib"),
    ({}, {"slo": {"tpot_ms": 0.001}}, ValueError, r"slo.tpot_ms = 0.001 cannot be held"),
    ({"device": "tpu"}, {}, ConfigError, r"serve.device = 'tpu' is not one of"),
    ({"max_replicas": 3}, {}, ConfigError, r"serve.max_replicas = 3 has to be at least replicas.count = 8"),
    ({"port": 70000}, {}, ConfigError, r"serve.port = 70000 has to be at most 65535"),
    ({"arguments": "x"}, {}, ConfigError, r"serve.arguments = 'x' has to be a list"),
    ({"queue": 0}, {}, ConfigError, r"serve.queue = 0 has to be at least 1"),
])  # fmt: skip
def test_bad_configurations_are_named(zoo, copied, monkeypatch, serve, sections, error, words):
    monkeypatch.delenv(KEY_ENV, raising=False)
    with pytest.raises(error, match=words):
        check(config(zoo, copied, serve, **sections))


def test_a_link_out_of_the_root_and_a_bad_name_are_refused(zoo, folder, tmp_path):
    with pytest.raises(ConfigError, match="leads out of it"):
        check(config(zoo, folder / "adapters"))
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="'a b' cannot be an adapter's name"):
        check(config(zoo, tmp_path))
    (tmp_path / "a b" / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="has no subdirectory with"):
        check(config(zoo, tmp_path))


def test_a_taken_port_is_named(zoo, copied):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve.port = {port}: cannot listen on 127.0.0.1"):
            check(config(zoo, copied, {"port": port}))


def test_more_gpus_or_cpus_than_there_are():
    four = from_dict({"replicas": {"count": 4, "gpus": 2}})
    with pytest.raises(
        ConfigError,
        match=r"replicas.count = 4 with replicas.gpus = 2 needs 8 GPUs; Ray has 4 on 1 .*2 replicas; lower",
    ):
        check_resources(four, [{"GPU": 4, "CPU": 64}])
    # Two halves of a replica on two machines are none.
    with pytest.raises(ConfigError, match="enough for 3 replicas"):
        check_resources(four, [{"GPU": 7, "CPU": 64}, {"GPU": 1, "CPU": 64}])
    assert check_resources(four, [{"GPU": 4, "CPU": 64}, {"GPU": 4, "CPU": 64}]) == "gpu"
    on_cpu = from_dict({"replicas": {"count": 3, "gpus": 1}, "serve": {"cpus": 2}})
    assert check_resources(on_cpu, [{"CPU": 6}]) == "cpu"
    with pytest.raises(
        ConfigError, match=r"serve.cpus = 2 needs 6 CPUs; Ray has 5 on 1 machines, enough for 2 replicas; lower"
    ):
        check_resources(on_cpu, [{"CPU": 5}])
    with pytest.raises(ConfigError, match="needs 8 GPUs; Ray has 0"):
        check_resources(from_dict({"replicas": {"count": 4, "gpus": 2}, "serve": {"device": "gpu"}}), [{"CPU": 99}])


@pytest.mark.parametrize(("address", "words"), [
    ("head", "has to be HOST:PORT"), (":6379", "has to be HOST:PORT"), ("127.0.0.1:1", "nothing answers there.*ray start --head"),
    ("127.0.0.1:99999", "nothing answers there"),
])  # fmt: skip
def test_an_unreachable_head_is_named_at_once(address, words):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"serve.address = '{address}'.*{words}"):
        check_address(address)
    assert time.monotonic() - began < 10


def test_the_command_line_names_the_error_and_ends(zoo, copied, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        json.dumps({"serve": {"model": str(zoo.model("llama")), "adapter_root": str(copied), "name": "base"}})
    )
    command = [
        sys.executable,
        "-m",
        "sgl_bdlora.cluster",
        "serve",
        "--config",
        str(file),
        "--port",
        "20998",
        "--address",
        "127.0.0.1:1",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ})
    assert run.returncode == 2
    assert run.stderr.startswith("error: serve.address = '127.0.0.1:1': nothing answers there")
    assert "Traceback" not in run.stderr


def test_a_replicas_server_gets_its_part_of_the_machine(zoo, copied, monkeypatch):
    made = config(zoo, copied, {"arguments": ["--dtype", "float32"]}, replicas={"gpus": 2, "pool_gib": 1.0})
    words = server_arguments(made, 1234)
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--lora-pool-gb") + 1] == "0.5"
    assert words[-2:] == ["--dtype", "float32"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    four = config(zoo, copied, {"cpus": 4}, replicas={"gpus": 2})
    assert [environment(four, "cpu", n)["SGLANG_CPU_OMP_THREADS_BIND"] for n in (0, 1, 2)] == [
        "0,1|2,3",
        "4,5|6,7",
        "0,1|2,3",
    ]
    assert environment(four, "gpu", 0) == {}


def test_ranks_of_parts_are_of_the_modules_they_adapt(zoo):
    from sgl_bdlora.adapters import read_adapter

    assert describe(read_adapter(zoo.adapter("llama", "plain-r8-attention"))).rank == 8
