"""Starts client processes with several open requests and kills them (SIGKILL) at a random moment."""

import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
from harness import request_body

from .clients import Tally, refusal
from .names import Names
from .references import References

PAUSE_S = (1.0, 5.0)
LIFE_S = (0.1, 2.5)
REQUESTS = (2, 6)
NEW_TOKENS = 64
STREAMED_SHARE = 0.75
# What a dead client had sent may still be in the server's socket: until it was read nobody changes what its names stand for.
GRACE_S = 1.0


class Killer(threading.Thread):
    """Kills one process after another until `end` is set. Nobody reads the answers: what counts is what the server keeps of them."""

    def __init__(self, url: str, names: Names, references: References, tally: Tally, end: threading.Event, seed: str):
        super().__init__(daemon=True)
        address = httpx.URL(url)
        self._address = [address.host, address.port]
        self._names, self._references, self._tally, self._end = names, references, tally, end
        self._rng = random.Random(seed)

    def run(self) -> None:
        while not self._end.wait(self._rng.uniform(*PAUSE_S)):
            with self._names.choose(self._rng, self._rng.randint(*REQUESTS)) as picked:
                try:
                    self._report(self._kill_one(picked), picked)
                except Exception as error:
                    self._tally.fail(f"a client that was to be killed failed: {error!r}")

    def _kill_one(self, picked: list[tuple[str, Path]]) -> list[str]:
        """What the process said before it died."""
        bodies = [self._body(name, folder) for name, folder in picked]
        process = subprocess.Popen(
            [sys.executable, "-S", str(Path(__file__).with_name("doomed.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        process.stdin.write(json.dumps({"address": self._address, "bodies": bodies}))
        process.stdin.close()
        time.sleep(self._rng.uniform(*LIFE_S))
        process.kill()
        said = process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        time.sleep(GRACE_S)
        return said

    def _body(self, name: str, folder: Path) -> dict:
        ask = replace(self._rng.choice(self._references.asks), adapter=name, folder=folder, new_tokens=NEW_TOKENS)
        body = {key: value[0] if isinstance(value, list) else value for key, value in request_body([ask]).items()}
        return {**body, "stream": self._rng.random() < STREAMED_SHARE}

    def _report(self, said: list[str], picked: list[tuple[str, Path]]) -> None:
        words = [line.split(maxsplit=2) for line in said]
        begun = {number for kind, number, *_ in words if kind == "piece"}
        done = {number for kind, number, *_ in words if kind == "done"}
        for kind, number, *text in words:
            if kind == "refused":
                done.add(number)
                refusal(self._tally, self._names, [picked[int(number)][0]], f"killed client's request: {text}")
        self._tally.add("clients_killed")
        self._tally.add("clients_killed_requests", len(picked))
        self._tally.add("clients_killed_streams_open", len(begun - done))
        self._tally.add("clients_killed_unanswered", len(picked) - len(begun | done))
