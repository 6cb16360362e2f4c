"""An adapter can be unloaded whatever became of the requests for it, and not while one of them runs.

SGLang 0.5.17 miscounts each of these requests (sgl_bdlora/unloading.py), so that the unload and every load after it hang.
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from harness import Ask, check, request_body
from servers import LLAMA, on

pytestmark = on(LLAMA)


def body(live, tokens: int = 10, new_tokens: int = 4, **sampling) -> dict:
    parameters = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, **sampling}
    return {"input_ids": list(live.prompt(tokens)), "lora_path": "leaving", "sampling_params": parameters}


def complete(live) -> None:
    assert live.server.post("/generate", body(live)).status_code == 200


def prompt_above_the_context(live) -> None:
    assert live.server.post("/generate", body(live, tokens=4000)).status_code == 400


def refused_parameters(live) -> None:
    assert live.server.post("/generate", body(live, temperature=-1)).status_code == 400


def two_samples(live) -> None:
    assert len(live.server.post("/generate", body(live, n=2)).json()) == 2


def client_leaves_a_stream(live) -> None:
    url = live.server.base_url + "/generate"
    with httpx.stream("POST", url, json={**body(live, new_tokens=400), "stream": True}, timeout=60) as response:
        next(response.iter_lines())


def clients_leave_the_queue(live) -> None:
    """More than run at a time (32), so that some are aborted while they wait."""
    with ThreadPoolExecutor(48) as pool:
        for left in [pool.submit(client_gives_up, live) for _ in range(48)]:
            left.result()


def client_gives_up(live) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(live.server.base_url + "/generate", json=body(live, new_tokens=400), timeout=1)


@pytest.mark.parametrize(
    "request_for",
    [
        complete,
        prompt_above_the_context,
        refused_parameters,
        two_samples,
        client_leaves_a_stream,
        clients_leave_the_queue,
    ],
)
def test_unloading_ends(live, request_for):
    live.load("leaving", live.folder("bd2-r8"))
    request_for(live)
    response = httpx.post(live.server.base_url + "/unload_lora_adapter", json={"lora_name": "leaving"}, timeout=60)
    assert response.status_code == 200, response.text
    live.load("leaving", live.folder("bd4-r16"))
    ask = Ask(live.prompt(12), "leaving", live.folder("bd4-r16"))
    check(live.oracle, [ask], live.server.generate([ask]))
    live.unload("leaving")


def test_unloading_waits_for_all_of_several_samples(live):
    """The second sample outlives SGLang's count of the two."""
    live.load("leaving", live.folder("bd2-r8"))
    ask = Ask(live.prompt(10), "leaving", live.folder("bd2-r8"), new_tokens=100, prompt_logprobs=False)
    single = {key: value[0] if isinstance(value, list) else value for key, value in request_body([ask]).items()}
    single["sampling_params"] = {**single["sampling_params"], "n": 2}
    with httpx.stream(
        "POST", live.server.base_url + "/generate", json={**single, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            unloading = pool.submit(live.unload, "leaving")
            for line in lines:
                assert "error" not in line[:20], line
            unloading.result(60)
    probes = [live.server.generate([probe])[0] for probe in live.probes]
    check(live.oracle, live.probes, probes)


def test_many_requests_for_an_unloaded_adapter_are_served(live):
    """SGLang reads it again for the first; the others find it there (managers/tokenizer_manager.py: _resolve_lora_path)."""
    live.load("returning-to-many", live.folder("bd2-r8"))
    live.unload("returning-to-many")
    asks = [Ask(live.prompt(12), "returning-to-many", live.folder("bd2-r8")) for _ in range(4)]
    check(live.oracle, asks, live.server.generate_each(asks))
    live.unload("returning-to-many")
