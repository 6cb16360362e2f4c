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
        self.policy, self.asked, self.loaded = "rank-packing", [], []
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
            return httpx.Response(200, json={
                "policy": self.policy, "replicas": [{"loaded": loaded, "running": 0}], "cold_loads": counts, "bytes_moved": counts,
                "moves": 0,
            })  # fmt: skip
        body = json.loads(request.content)
        tokens = body["sampling_params"]["max_new_tokens"]
        self.asked.append((self.policy, body["lora_path"], tokens))
        counts = (1, tokens) if tokens > 1 else (1,)
        lines = [json.dumps({"meta_info": {"completion_tokens": count}}) for count in counts]
        return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]))


def test_every_policy_gets_the_same_trace_after_every_adapter_was_asked_once(tmp_path, monkeypatch):
    follower = pytest.importorskip("sgl_bdlora.cluster.serving.follower")
    cluster = Cluster()
    monkeypatch.setattr(follower, "controller", lambda: cluster)
    monkeypatch.setattr(policies, "REPORTED_S", 0)
    monkeypatch.setattr(
        policies, "client", lambda url: httpx.AsyncClient(base_url=url, transport=httpx.MockTransport(cluster))
    )
    output = tmp_path / "rows.jsonl"
    words = f"--device cpu --tiny --seconds 0.4 --rates 20 40 --policies random toppings --output {output}".split()

    def run(*more: str) -> list[dict]:
        args = policies.arguments([*words, *more])
        policies.write_files(TINY, policies.TINY_ADAPTERS, tmp_path)
        settings = policies.settings_of(args, TINY, tmp_path)
        made = policies.Run(args, from_dict(settings), settings, TINY)
        asyncio.run(made._points("http://cluster"))
        return [row for row in read_rows(output) if row["kind"] == "point"]

    rows = run()
    assert [(row["policy"], row["rate"]) for row in rows] == [
        ("random", 20), ("toppings", 20), ("random", 40), ("toppings", 40)
    ]  # fmt: skip
    assert all(row["lost"] == 0 and row["attainment"] == 1 for row in rows)
    names = {f"r{rank}-{i}" for rank, count in policies.TINY_ADAPTERS.items() for i in range(count)}
    by_policy = {name: [ask[1:] for ask in cluster.asked if ask[0] == name] for name in ("random", "toppings")}
    assert {adapter for adapter, _ in by_policy["random"][: len(names)]} == names
    assert by_policy["random"] == by_policy["toppings"]
    assert rows[0]["cold_loads"]["disk"] == rows[0]["sent"] + len(names)
    assert len(run("--resume")) == len(rows)
