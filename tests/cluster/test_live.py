"""Two replicas on Ray Serve: answers are a single server's, through drift, re-planning, spikes and the death of a replica."""

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from harness import Answer, Ask, Server, request_body
from prometheus_client.parser import text_string_to_metric_families
from running import Cluster, configuration
from zoo import Recipe, write_adapter

from sgl_bdlora.cluster.trace import zipf
from sgl_bdlora.server_process import free_port

pytest.importorskip("ray", reason="needs the extra: pip install 'sgl-bdlora[cluster]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RANKS, BLOCKS = (2, 4, 8, 16, 32), (None, 1, 2, 4)
ADAPTERS = 24
PROMPTS = 2
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def adapters(zoo, tmp_path_factory) -> Path:
    """24 adapters of five ranks, plain and block-diagonal."""
    root = tmp_path_factory.mktemp("adapters")
    for i in range(ADAPTERS):
        rank, blocks = RANKS[i % 5], BLOCKS[i % 4]
        blocks = None if blocks and rank % blocks else blocks
        write_adapter(zoo.model("llama"), Recipe(f"a{i}", rank, blocks, seed=100 + i), root / f"a{i}")
    return root


@pytest.fixture(scope="module")
def asks() -> dict[str | None, list[Ask]]:
    """Prompts for each adapter and for the base."""
    rng = random.Random(7)
    names = [None, *(f"a{i}" for i in range(ADAPTERS))]
    prompts = [tuple(rng.randrange(3, 500) for _ in range(20)) for _ in range(PROMPTS)]
    return {name: [Ask(p, name, new_tokens=8, prompt_logprobs=False) for p in prompts] for name in names}


@pytest.fixture(scope="module")
def expected(zoo, adapters, asks, tmp_path_factory) -> dict[tuple[str | None, int], Answer]:
    """What one server answers, with adapters loaded from their files."""
    arguments = ("--max-lora-rank", "64", "--lora-target-modules", "all", "--max-loras-per-batch", "8")
    found = {}
    with Server(zoo.model("llama"), 1, tmp_path_factory.mktemp("single") / "server.log", arguments) as server:
        for name, several in asks.items():
            if name is not None:
                assert server.load(name, adapters / name).status_code == 200
            for i, answer in enumerate(server.generate(several)):
                found[name, i] = answer
    return found


@pytest.fixture(scope="module")
def cluster(zoo, adapters, expected, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(configuration(zoo.model("llama"), adapters, folder / "costs.json", free_port()), folder) as running:
        yield running


def ask_once(cluster: Cluster, ask: Ask, expected: Answer, http: httpx.Client | None = None) -> None:
    """The answer's tokens and log-probabilities are the single server's."""
    response = (http or cluster.http).post("/generate", json=request_body([ask]))
    assert response.status_code == 200, f"{ask.adapter}: {response.status_code} {response.text}\n{cluster.log()}"
    answer = Answer.parse(response.json()[0])
    assert answer.tokens == expected.tokens, ask.adapter
    assert np.abs(np.array(answer.generated) - np.array(expected.generated)).max() < TOLERANCE, ask.adapter


class Traffic:
    """Zipf requests from several clients at once, whose popularity order is turned by a third on drift()."""

    def __init__(self, cluster, asks, expected, clients=6, pause_s=0.25):
        self._given = (cluster, asks, expected, pause_s)
        self._names = [f"a{i}" for i in range(ADAPTERS)]
        self._part = np.cumsum(zipf(ADAPTERS, 1.2))
        self._turn, self._stop = 0, threading.Event()
        self.sent, self.problems = 0, []
        self._threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(clients)]

    def _client(self, seed: int) -> None:
        cluster, asks, expected, pause_s = self._given
        rng = random.Random(seed)
        with httpx.Client(base_url=cluster.url, timeout=120, trust_env=False) as http:
            while not self._stop.is_set():
                place = min(int(np.searchsorted(self._part, rng.random())), ADAPTERS - 1)
                name, i = self._names[(place + self._turn) % ADAPTERS], rng.randrange(PROMPTS)
                self.sent += 1
                try:
                    ask_once(cluster, asks[name][i], expected[name, i], http)
                except (AssertionError, httpx.HTTPError) as problem:
                    self.problems.append(repr(problem))
                time.sleep(rng.expovariate(1 / pause_s))

    def drift(self) -> None:
        self._turn += ADAPTERS // 3

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(150)


def test_every_adapter_answers_as_on_one_server(cluster, asks, expected):
    pairs = [(ask, expected[name, i]) for name, several in asks.items() for i, ask in enumerate(several)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda pair: ask_once(cluster, *pair), pairs))
    status = cluster.wait(lambda s: s["requests"]["done"] >= len(pairs), 20)
    assert status["requests"]["failed"] == status["requests"]["broken"] == 0
    assert len(status["replicas"]) == 2
    assert sum(status["cold_loads"].values()) >= ADAPTERS


def test_openai_routes_and_streams(cluster, asks, expected):
    listed = cluster.http.get("/v1/models").json()["data"]
    assert {m["id"] for m in listed} == {"base", *(f"a{i}" for i in range(ADAPTERS))}
    ask = asks["a3"][0]
    body = {"prompt": list(ask.prompt), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    texts = []
    for model in ("a3", "base:a3"):
        response = cluster.http.post("/v1/completions", json={"model": model, **body})
        assert response.status_code == 200, response.text
        texts.append(response.json()["choices"][0]["text"])
    with cluster.http.stream("POST", "/v1/completions", json={"model": "a3", "stream": True, **body}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    texts.append("".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]))
    assert texts[0]
    assert len(set(texts)) == 1
    chat = {"model": "a5", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    response = cluster.http.post("/v1/chat/completions", json=chat)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("route", "body", "status", "words"), [
    ("/generate", {"text": "x", "lora_path": "nothing"}, 404, "there is no adapter 'nothing'"),
    ("/generate", {"text": "x", "lora_path": "../a0"}, 404, "there is no adapter"),
    ("/generate", {"text": ["x", "y"], "lora_path": ["a0", "a1"]}, 400, "send several requests"),
    ("/v1/completions", {"model": "a0:x", "prompt": "x"}, 404, "there is no adapter 'a0:x'"),
    ("/v1/completions", {"prompt": "x"}, 400, "model: name one of"),
    ("/v1/completions", [], 400, "not a JSON object"),
    ("/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 404, ""),
])  # fmt: skip
def test_bad_requests_are_answered(cluster, route, body, status, words):
    response = cluster.http.post(route, json=body)
    assert response.status_code == status, response.text
    assert words in response.text


def test_drift_moves_no_more_than_the_bound(cluster, asks, expected):
    before = cluster.status()
    with Traffic(cluster, asks, expected) as traffic:
        for _ in range(3):
            time.sleep(8)
            traffic.drift()
        time.sleep(8)
    assert not traffic.problems, traffic.problems[:3]
    assert traffic.sent > 50
    after = cluster.status()
    assert after["version"] > before["version"]
    assert after["moves"] > 0
    assert after["most_moves"] <= after["max_moves"] == 4
    assert all(plan["moves"] <= 4 for plan in after["history"])
    assert after["cold_loads"]["peer"] > 0
    assert after["bytes_moved"]["peer"] > 0
    families = {f.name: f for f in text_string_to_metric_families(cluster.http.get("/metrics").text)}
    assert families["bdlora_cluster_moves"].samples[0].value >= after["moves"]
    peers = next(s for s in families["bdlora_cluster_cold_loads"].samples if s.labels == {"source": "peer"})
    assert peers.value >= after["cold_loads"]["peer"]


@pytest.mark.parametrize("which", ["server_pid", "pid"])
def test_a_replica_that_dies_loses_no_request(cluster, asks, expected, which):
    """Once its server is killed, once Ray's own process of the replica."""
    before = cluster.wait(lambda s: len(s["replicas"]) == 2 and all(r["pid"] for r in s["replicas"]), 120)
    victim = before["replicas"][0]
    with Traffic(cluster, asks, expected, pause_s=0.1) as traffic:
        time.sleep(5)
        os.kill(victim[which], signal.SIGKILL)
        healed = cluster.wait(lambda s: victim["id"] not in {r["id"] for r in s["replicas"]}, 30)
        assert healed["version"] > before["version"]
        assert all(victim["name"] not in a["shares"] or len(healed["replicas"]) == 2 for a in healed["adapters"])
        back = cluster.wait(lambda s: len(s["replicas"]) == 2, 400)
        assert victim["id"] not in {r["id"] for r in back["replicas"]}
        time.sleep(5)
    assert not traffic.problems, traffic.problems[:3]
    after = cluster.wait(lambda s: all(r["loaded"] for r in s["replicas"]), 60)
    assert after["requests"]["failed"] == 0
    assert after["most_moves"] <= 4
    assert not Path(f"/proc/{victim['server_pid']}").exists()


def test_a_spike_is_shed_and_told_when_to_come_again(cluster, asks, expected):
    """16 requests have a place in each replica and 24 may wait; all are answered or refused within the timeout."""
    body = request_body([Ask(asks["a1"][0].prompt, "a1", new_tokens=160, prompt_logprobs=False)])
    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=cluster.url, timeout=150, trust_env=False, limits=limits) as http,
        ThreadPoolExecutor(120) as pool,
    ):
        answers = list(pool.map(lambda _: http.post("/generate", json=body), range(120)))
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429}, {a.text for a in answers if a.status_code not in (200, 429)}
    assert codes.count(200) >= 32
    refused = next(a for a in answers if a.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert "queue" in refused.json()["error"]["message"]
    ask_once(cluster, asks["a1"][0], expected["a1", 0])
