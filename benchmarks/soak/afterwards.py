"""What a server must have given back when nobody asks any more: adapters, pool, requests, tokens, file handles."""

import time

from harness import Server

from . import memory
from .churn import Operator
from .clients import Tally

# For requests of killed clients to be abandoned, and for idle connections to be closed (uvicorn: 5 s).
PATIENCE_S = 30
# Sockets that SGLang opens at the first use of something and keeps.
MOST_HANDLES_MORE = 8


def check_empty(server: Server, operator: Operator, handles_before: int, tally: Tally) -> int:
    """Unload everything, wait until the server is idle, and count as a failure whatever is left; returns the open handles then."""
    try:
        operator.close_all()
        deadline = time.monotonic() + PATIENCE_S
        while (left := _left(server, handles_before)) and time.monotonic() < deadline:
            time.sleep(1)
    except Exception as error:
        left = [f"asking for the state failed: {error!r}"]
    for what in left:
        tally.fail(f"with everything unloaded and nobody asking: {what}")
    return memory.sample(server.process.pid)["handles"]


def _left(server: Server, handles_before: int) -> list[str]:
    state = server.get("/bdlora/info").json()
    left = []
    if state["adapters"]:
        left.append(f"{[adapter['name'] for adapter in state['adapters']]} are loaded")
    if any(state["pool"]["used_bytes"]) or state["pool"]["resident_adapters"]:
        left.append(f"the pool has {state['pool']['used_bytes']} bytes taken")
    # It refuses while requests wait or run, and forgets cached prefixes, so that a used token is one that nobody can free any more.
    if server.post("/flush_cache", {}).status_code != 200:
        left.append("the prefix cache cannot be flushed, so requests run or wait")
    for load in server.get("/v1/loads").json()["loads"]:
        busy = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens") if load[name]}
        if busy:
            left.append(f"the scheduler counts {busy}")
    handles = memory.sample(server.process.pid)["handles"]
    if handles > handles_before + MOST_HANDLES_MORE:
        left.append(f"{handles} file handles are open, {handles_before} were before the first client")
    return left
