"""The front without Ray: what it sends on, what it answers when replicas break, are full or are silent."""

import asyncio
import json
import threading

import pytest

pytest.importorskip("ray", reason="needs the extra: pip install 'sgl-bdlora[cluster]'")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request

from sgl_bdlora.cluster.config import from_dict
from sgl_bdlora.cluster.routing import RoutingTable
from sgl_bdlora.cluster.serving import follower
from sgl_bdlora.cluster.serving.control import FrontReport
from sgl_bdlora.cluster.serving.errors import ReplicaBroken
from sgl_bdlora.cluster.serving.front import MAX_BODY, Front

EVENTS = "text/event-stream"
DONE = [(200, EVENTS, b"data: 1\n\n"), b'data: {"prompt_tokens": 5, "completion_tokens": 7}\n\n', b"data: [DONE]\n\n"]
WHOLE = [(200, "application/json", b'{"meta_info": {"prompt_tokens": 5, "completion_tokens": 2}}')]


class Backends:
    """A handle whose n-th request gets the n-th script: items to give, exceptions to raise, seconds to wait."""

    def __init__(self, *scripts):
        self.scripts, self.sent, self.cancelled = list(scripts), [], 0

    def options(self, **options):
        self._options = options
        return self

    def remote(self, route, body, adapter, **more):
        self.sent.append({"route": route, "body": json.loads(body), "adapter": adapter, **self._options, **more})
        outer, script = self, self.scripts.pop(0)

        class Pieces:
            def __init__(self):
                self._script = iter(script)

            async def __anext__(self):
                for item in self._script:
                    if isinstance(item, float):
                        await asyncio.sleep(item)
                    elif isinstance(item, Exception):
                        raise item
                    else:
                        return item
                raise StopAsyncIteration

            def cancel(self):
                outer.cancelled += 1

        return Pieces()


def make(*scripts, key=None, **policy) -> Front:
    front = object.__new__(Front)
    front._config = from_dict(
        {"policy": policy, "serve": {"model": "/m/base", "first_byte_s": 0.2, "silence_s": 0.2, "name": "base"}}
    )
    front._backends, front._adapters, front._key, front._base = Backends(*scripts), frozenset({"a0", "a1"}), key, "base"
    front._lock, front._report, front._began = threading.Lock(), FrontReport(), 0
    return front


def ask(front: Front, body, route="/generate", headers=()):
    """(status, headers, body) of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def receive():
        return {"type": "http.request", "body": data, "more_body": False}

    async def run():
        scope = {"type": "http", "method": "POST", "headers": list(headers)}
        response = await front._serve(Request(scope, receive), route)
        if hasattr(response, "body"):
            return response.status_code, response.headers, response.body
        return response.status_code, response.headers, b"".join([piece async for piece in response.body_iterator])

    return asyncio.run(run())


def outcomes(front: Front) -> dict:
    return dict(front._report.outcomes)


def test_a_stream_passes_through_and_is_counted():
    front = make(DONE)
    status, headers, body = ask(front, {"text": "x", "lora_path": "a0", "stream": True})
    assert status == 200
    assert headers["content-type"].startswith(EVENTS)
    assert body == b"".join(p if isinstance(p, bytes) else p[2] for p in DONE)
    assert outcomes(front) == {"done": 1}
    assert front._report.arrived == {"a0": 1}
    assert (front._report.answered, front._report.tokens) == (1, 12)
    assert sum(front._report.ttft) == 1
    assert front._backends.sent[0]["multiplexed_model_id"] == "a0"


def test_lengths_are_of_adapters_answers_and_of_all_their_prompts():
    """They turn an adapter's requests into its demand."""
    two = b'[{"meta_info": {"prompt_tokens": 5, "completion_tokens": 2}}, {"meta_info": {"prompt_tokens": 6, "completion_tokens": 3}}]'
    front = make([(200, "application/json", two)], WHOLE, DONE, [(200, "application/json", b"{}")])
    assert ask(front, {"text": ["x", "y"], "lora_path": "a0"})[0] == 200
    assert (front._report.answered, front._report.tokens) == (1, 16)
    ask(front, {"text": "x"})
    ask(front, {"text": "x", "stream": True})
    ask(front, {"text": "x", "lora_path": "a0"})
    assert (front._report.answered, front._report.tokens) == (1, 16)
    assert outcomes(front) == {"done": 4}


@pytest.mark.parametrize(("model", "adapter", "sent"), [
    ("a1", "a1", "base:a1"), ("base:a1", "a1", "base:a1"), ("base", None, "base"),
])  # fmt: skip
def test_models_become_adapters(model, adapter, sent):
    front = make(WHOLE)
    assert ask(front, {"model": model, "prompt": "x"}, "/v1/completions")[0] == 200
    assert (front._backends.sent[0]["adapter"], front._backends.sent[0]["body"]["model"]) == (adapter, sent)


@pytest.mark.parametrize("broken", [ReplicaBroken("r1", "it broke"), ActorDiedError()])
def test_what_breaks_before_its_first_byte_is_sent_again_once(broken):
    front = make([broken], WHOLE)
    assert ask(front, {"text": "x", "lora_path": "a0"})[0] == 200
    assert outcomes(front) == {"retried": 1, "done": 1}
    assert front._backends.sent[1]["avoid"] == (("r1",) if isinstance(broken, ReplicaBroken) else ())
    front = make([broken], [broken])
    status, headers, body = ask(front, {"text": "x", "lora_path": "a0"})
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    assert b"two replicas broke" in body
    assert outcomes(front) == {"retried": 1, "failed": 1}


@pytest.mark.parametrize("end", [ReplicaBroken("r1", "it broke"), ActorDiedError(), 5.0])
def test_a_stream_that_breaks_says_so_and_is_not_sent_again(end):
    """Silence is a break too."""
    front = make([DONE[0], end])
    status, _, body = ask(front, {"text": "x", "stream": True})
    assert status == 200
    assert body.startswith(DONE[0][2])
    assert "broke off" in json.loads(body.rpartition(b"data: ")[2])["error"]["message"]
    assert outcomes(front) == {"broken": 1}
    assert front._backends.cancelled == 1


def test_full_replicas_and_silent_ones_are_no_hang():
    front = make([BackPressureError(5, 5)])
    status, headers, body = ask(front, {"text": "x"})
    assert (status, headers["retry-after"]) == (429, "10")
    assert b"serve.queue" in body
    front = make([5.0])
    status, headers, body = ask(front, {"text": "x"})
    assert (status, headers["retry-after"]) == (503, "10")
    assert b"the whole answer within serve.first_byte_s = 0.2; a request with stream: true" in body
    assert front._backends.cancelled == 1
    front = make([5.0])
    assert b'a first token within serve.first_byte_s = 0.2"' in ask(front, {"text": "x", "stream": True})[2]


def test_a_demand_beyond_capacity_is_shed_where_asked_for(monkeypatch):
    table = RoutingTable(1, ("x",), {"a0": (("x", 1.0),)}, admitted=0.0)
    monkeypatch.setattr(follower.live, "table", table)
    status, headers, body = ask(make(shed=True), {"text": "x", "lora_path": "a0"})
    assert (status, headers["retry-after"]) == (429, "10")
    assert b"0 % of requests are admitted" in body
    assert ask(make(WHOLE, shed=False), {"text": "x", "lora_path": "a0"})[0] == 200


@pytest.mark.parametrize(("body", "route", "status", "words"), [
    (b"{", "/generate", 400, b"not JSON"), (b"[" * 100_000, "/generate", 400, b"not JSON"), (b"1", "/generate", 400, b"not a JSON object"),
    ({"lora_path": ["a0", "a1"]}, "/generate", 400, b"send several requests"), ({"lora_path": []}, "/generate", 400, b"send several"),
    ({"lora_path": {"x": 1}}, "/generate", 404, b"there is no adapter"), ({"lora_id": "x"}, "/generate", 400, b"lora_id"),
    ({"model": 5}, "/v1/completions", 400, b"name one of"), ({"model": "a9"}, "/v1/completions", 404, b"there is no adapter 'a9'"),
    ({"model": "a0", "lora_path": "a1"}, "/v1/completions", 400, b"name the adapter in model"),
])  # fmt: skip
def test_bad_requests_reach_no_replica(body, route, status, words):
    front = make()
    answer = ask(front, body, route)
    assert answer[0] == status
    assert words in answer[2]
    assert "error" in json.loads(answer[2])
    assert not front._backends.sent


def test_a_request_too_large_is_refused():
    assert ask(make(), bytes(MAX_BODY + 1))[0] == 413


def test_a_key_is_asked_for_where_there_is_one():
    assert ask(make(key="k"), {"text": "x"})[0] == 401
    assert ask(make(key="k"), {"text": "x"}, headers=[(b"authorization", b"Bearer wrong")])[0] == 401
    assert ask(make(WHOLE, key="k"), {"text": "x"}, headers=[(b"authorization", b"Bearer k")])[0] == 200


def test_the_servers_own_refusals_pass_through():
    front = make([(400, "application/json", b'{"error": "too long"}')])
    status, _, body = ask(front, {"text": "x"})
    assert (status, body) == (400, b'{"error": "too long"}')
    assert outcomes(front) == {"refused": 1}
