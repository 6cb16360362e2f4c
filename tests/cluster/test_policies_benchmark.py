"""The policies' benchmark against a cluster that answers at once: what it asks for, in which order, and what it writes."""

import asyncio
import concurrent.futures
import json

import httpx
import pytest

from benchmarks.cluster import policies
from benchmarks.files import TINY
from benchmarks.record import read_rows
from sgl_bdlora.cluster.config import from_dict


class Cluster:
    """Front and controller in one. Its replica still has an adapter when it is asked for the first time after a change of policy."""

    def __init__(self):
        self.policy, self.asked, self.loaded, self.stuck = "rank-packing", [], [], []
        self.use_policy = self

    def remote(self, policy: str):
        self.policy, self.loaded = policy, [["a"], []]
        done = concurrent.futures.Future()
        done.set_result(None)
        done.future = lambda: done
        return done

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/cluster/status":
            loaded = self.loaded.pop(0) if len(self.loaded) > 1 else []
            counts = {"disk": len(self.asked), "peer": 0}
            replica = {
                "name": "r0", "id": "x", "loaded": loaded, "loading": self.stuck, "running": 0, "received": len(self.asked),
            }  # fmt: skip
            return httpx.Response(200, json={
                "policy": self.policy, "replicas": [replica], "cold_loads": counts, "bytes_moved": counts, "moves": 0,
            })  # fmt: skip
        body = json.loads(request.content)
        tokens = body["sampling_params"]["max_new_tokens"]
        self.asked.append((self.policy, body["lora_path"], tokens))
        counts = (1, tokens) if tokens > 1 else (1,)
        lines = [json.dumps({"meta_info": {"completion_tokens": count}}) for count in counts]
        return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]))


@pytest.fixture
def cluster(monkeypatch):
    follower = pytest.importorskip("sgl_bdlora.cluster.serving.follower")
    cluster = Cluster()
    monkeypatch.setattr(follower, "controller", lambda: cluster)
    monkeypatch.setattr(policies, "REPORTED_S", 0)
    monkeypatch.setattr(
        policies, "client", lambda url: httpx.AsyncClient(base_url=url, transport=httpx.MockTransport(cluster))
    )
    return cluster


def run(folder, *more: str) -> tuple[list[dict], policies.Run]:
    output = folder / "rows.jsonl"
    words = f"--device cpu --tiny --seconds 0.4 --rates 20 40 --policies random toppings --output {output}".split()
    args = policies.arguments([*words, *more])
    policies.write_files(TINY, policies.TINY_ADAPTERS, folder)
    settings = policies.settings_of(args, TINY, folder)
    made = policies.Run(args, from_dict(settings), settings, TINY)
    asyncio.run(made._points("http://cluster"))
    return [row for row in read_rows(output) if row["kind"] == "point"], made


def test_every_policy_gets_the_same_trace_after_every_adapter_was_asked_once(tmp_path, cluster):
    rows, _ = run(tmp_path)
    assert [(row["policy"], row["rate"]) for row in rows] == [
        ("random", 20), ("toppings", 20), ("random", 40), ("toppings", 40)
    ]  # fmt: skip
    assert all(row["lost"] == 0 and row["attainment"] == 1 for row in rows)
    names = {f"r{rank}-{i}" for rank, count in policies.TINY_ADAPTERS.items() for i in range(count)}
    by_policy = {name: [ask[1:] for ask in cluster.asked if ask[0] == name] for name in ("random", "toppings")}
    assert {adapter for adapter, _ in by_policy["random"][: len(names)]} == names
    assert by_policy["random"] == by_policy["toppings"]
    assert rows[0]["cold_loads"]["disk"] == rows[0]["sent"] + len(names)
    assert (rows[0]["replicas"], rows[0]["received"]) == (["x"], [rows[0]["sent"] + len(names)])
    assert len(run(tmp_path, "--resume")[0]) == len(rows)


def test_a_cluster_that_does_not_come_to_rest_costs_its_points_and_not_the_run(tmp_path, cluster, monkeypatch, capsys):
    monkeypatch.setattr(policies, "CLEAR_S", 0.0)
    cluster.stuck = ["r64-0"]
    rows, made = run(tmp_path)
    assert not rows
    assert made.failed
    said = capsys.readouterr().out
    assert said.count("left out, not at rest") == 4
    assert "is loading ['r64-0']" in said


def test_no_point_is_begun_after_the_time_is_over(tmp_path, cluster, capsys):
    rows, made = run(tmp_path, "--within", "0")
    assert not rows
    assert not made.failed
    assert capsys.readouterr().out.count("--resume goes on") == 4
