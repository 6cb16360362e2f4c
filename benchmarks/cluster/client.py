"""Requests to a running cluster, streamed, and a trace of them in real time."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from sgl_bdlora.cluster.trace import Trace


@dataclass(frozen=True)
class Sent:
    """One streamed request, in seconds as the client saw it.

    Without a whole answer ttft is infinite and tpot None; tpot is None of a single token too.
    """

    ttft: float
    tpot: float | None
    ok: bool


NOT_ANSWERED = Sent(float("inf"), None, False)


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url, timeout=120, trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=256)
    )  # fmt: skip


async def send(http: httpx.AsyncClient, adapter: str, prompt: int, output: int, vocab: int, interval: int = 1) -> Sent:
    """A request for `output` tokens. interval: the server sends the first token, then a message every so many, and the last one."""
    sampling = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True, "stream_interval": interval}
    body = {
        "input_ids": [random.randrange(3, vocab) for _ in range(prompt)], "lora_path": adapter, "stream": True, "sampling_params": sampling,
    }  # fmt: skip
    began, first, tokens, ok = time.perf_counter(), None, 0, False
    try:
        async with http.stream("POST", "/generate", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    last = time.perf_counter()
                    tokens = json.loads(line[6:]).get("meta_info", {}).get("completion_tokens", tokens)
                    first = first or last
                ok = ok or line == "data: [DONE]"
    except httpx.HTTPError:
        ok = False
    if not ok or response.status_code != 200 or tokens != output:
        return NOT_ANSWERED
    return Sent(first - began, (last - first) / (output - 1) if output > 1 else None, True)


async def replay(
    http: httpx.AsyncClient, trace: Trace, names: Sequence[str], vocab: int, interval: int = 1, drain_s: float = 120.0
) -> list[Sent]:
    """Every request when it is due, whatever has come back; drain_s after the last one those without a whole answer are given up."""
    began = time.perf_counter()
    end = asyncio.get_running_loop().time() + trace.arrival[-1] + drain_s

    async def one(i: int) -> Sent:
        await asyncio.sleep(trace.arrival[i] - (time.perf_counter() - began))
        prompt, output = int(trace.prompt[i]), int(trace.output[i])
        try:
            async with asyncio.timeout_at(end):
                return await send(http, names[trace.adapter[i]], prompt, output, vocab, interval)
        except TimeoutError:
            return NOT_ANSWERED

    return await asyncio.gather(*(one(i) for i in range(len(trace))))
