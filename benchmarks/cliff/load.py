"""Open-loop load on a server: requests go out when they are due, whatever has come back."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import orjson

from benchmarks.workload import arrivals, percentile, zipf_weights


@dataclass
class Outcome:
    """One request's measurements in seconds since its point began; tokens: when each token's message arrived, and how many by then."""

    due: float
    tokens: list[tuple[float, int]] = field(default_factory=list)
    end: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Requests:
    """What is asked for. adapters: names, most popular first, drawn with Zipf exponent s."""

    url: str
    adapters: list[str]
    s: float
    prompt: int
    output: int
    vocab: int

    def body(self, rng: random.Random) -> bytes:
        return orjson.dumps(
            {
                "input_ids": [rng.randrange(3, self.vocab) for _ in range(self.prompt)],
                "lora_path": rng.choices(self.adapters, zipf_weights(len(self.adapters), self.s))[0],
                "sampling_params": {"temperature": 0, "max_new_tokens": self.output, "ignore_eos": True},
                "stream": True,
            }
        )


async def run_point(
    requests: Requests, rate: float, seconds: float, drain: float, cv: float, seed: str, tick: Callable[[], object]
) -> list[Outcome]:
    """Offer `rate` requests a second for `seconds`; then wait up to `drain` seconds for those that have not ended.

    tick: called for each request that ends.
    """
    rng = random.Random(seed)
    plan = [(due, requests.body(rng)) for due in arrivals(rate, seconds, cv, rng)]
    async with _session() as session:
        begin = time.perf_counter()
        tasks, outcomes = [], []
        for due, body in plan:
            await asyncio.sleep(due - (time.perf_counter() - begin))
            outcomes.append(Outcome(due))
            tasks.append(asyncio.create_task(_one(session, requests.url, body, outcomes[-1], begin, tick)))
        left = begin + seconds + drain - time.perf_counter()
        _, pending = await asyncio.wait(tasks, timeout=max(0.0, left)) if tasks else ((), ())
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return outcomes


async def capacity(requests: Requests, concurrency: int, seconds: float, seed: str) -> float:
    """Requests a second that end when `concurrency` clients ask one request after another; the first quarter is not counted."""
    rng = random.Random(seed)
    ends: list[float] = []
    async with _session() as session:
        begin = time.perf_counter()

        async def client() -> None:
            while (now := time.perf_counter() - begin) < seconds:
                outcome = Outcome(now)
                await _one(session, requests.url, requests.body(rng), outcome, begin, lambda: None)
                if outcome.error:
                    raise RuntimeError(f"a request failed while measuring the capacity: {outcome.error}")
                ends.append(outcome.end)

        await asyncio.gather(*(client() for _ in range(concurrency)))
    counted = [end for end in ends if seconds / 4 <= end]
    return len(counted) / (max(counted) - seconds / 4)


async def settle(url: str, patience: float = 60) -> None:
    """Abort what is still running and wait until the server is idle, with its prefix cache empty."""
    async with _session() as session:
        await session.post(f"{url}/abort_request", json={"rid": "", "abort_all": True})
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            async with session.post(f"{url}/flush_cache") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.2)
    raise TimeoutError(f"the server is still busy {patience:.0f} s after the last request was aborted")


async def _one(session, url: str, body: bytes, outcome: Outcome, begin: float, tick: Callable[[], object]) -> None:
    try:
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{url}/generate", data=body, headers=headers) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status} {(await response.text())[:300]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                message = orjson.loads(line[6:])
                if "error" in message:
                    raise RuntimeError(str(message["error"])[:300])
                outcome.tokens.append((time.perf_counter() - begin, message["meta_info"]["completion_tokens"]))
        outcome.end = time.perf_counter() - begin
    except (aiohttp.ClientError, RuntimeError) as error:
        outcome.error = repr(error)
    tick()


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**20
    )


def summarize(outcomes: list[Outcome], seconds: float, drain: float) -> dict:
    """Figures of a point; times in milliseconds, throughput of what arrived within its `seconds`.

    Requests without a first token when waiting ended count with the time they had waited, a lower bound: leaving them out would
    make an overloaded server look quick.
    """
    firsts, gaps = [], []
    tokens_in_time = 0
    for outcome in outcomes:
        if outcome.error:
            continue
        first = outcome.tokens[0][0] if outcome.tokens else seconds + drain
        firsts.append(1000 * (first - outcome.due))
        if outcome.end is not None and outcome.tokens[-1][1] > outcome.tokens[0][1]:
            (begin, had), (end, has) = outcome.tokens[0], outcome.tokens[-1]
            gaps.append(1000 * (end - begin) / (has - had))
        tokens_in_time += max((count for at, count in outcome.tokens if at <= seconds), default=0)
    ended = sum(o.end is not None and o.end <= seconds for o in outcomes)
    return {
        "requests": len(outcomes),
        "throughput_tok_s": tokens_in_time / seconds,
        "throughput_req_s": ended / seconds,
        **{f"ttft_p{p}_ms": percentile(firsts, p) for p in (50, 95, 99)},
        **{f"tpot_p{p}_ms": percentile(gaps, p) for p in (50, 99)},
        "failed": sum(o.error is not None for o in outcomes),
        "unfinished": sum(o.end is None and o.error is None for o in outcomes),
        "first_error": next((o.error for o in outcomes if o.error), None),
    }
