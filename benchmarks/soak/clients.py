"""Clients of a soak: threads that keep asking in several ways and compare every answer with its reference."""

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from harness import Answer, Ask, request_body

from .names import Names
from .references import References, difference

TIMEOUT_S = 60
BASE_SHARE = 0.15
# How a request is sent -> its share. abandoned: a stream that the client leaves after a few tokens.
WAYS = {"whole": 0.45, "streamed": 0.4, "batch": 0.1, "abandoned": 0.05}
MOST_FAILURES_KEPT = 20


@dataclass
class Tally:
    """Counts of everything that happened, from all threads."""

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    worst: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def answered(self, reference: Answer, answer: Answer) -> None:
        apart = (abs(a - b) for a, b in zip(reference.generated, answer.generated, strict=True))
        with self._lock:
            self.worst = max(self.worst, *apart)
            self.counts["answers_compared"] += 1
            self.counts["tokens"] += len(answer.tokens)

    def took(self, seconds: float) -> None:
        with self._lock:
            self.seconds.append(seconds)

    def fail(self, message: str) -> None:
        """Say it at once; the first few are kept for the summary."""
        with self._lock:
            print(f"FAILURE {message}", flush=True)
            self.counts["failures"] += 1
            if len(self.failures) < MOST_FAILURES_KEPT:
                self.failures.append(message)


class Client(threading.Thread):
    """Asks until `end` is set."""

    def __init__(self, url: str, names: Names, references: References, tally: Tally, end: threading.Event, seed: str):
        super().__init__(daemon=True)
        self._url, self._names, self._references, self._tally, self._end = url, names, references, tally, end
        self._rng = random.Random(seed)

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S) as http:
            while not self._end.is_set():
                way = self._rng.choices(list(WAYS), list(WAYS.values()))[0]
                with self._names.choose(self._rng, self._rng.randint(2, 5) if way == "batch" else 1) as picked:
                    self._ask(http, way, [self._request(name, folder) for name, folder in picked])

    def _request(self, name: str, folder: Path) -> Ask:
        ask = self._rng.choice(self._references.asks)
        if self._rng.random() < BASE_SHARE:
            return ask
        return Ask(ask.prompt, name, folder, ask.new_tokens, prompt_logprobs=False)

    def _ask(self, http: httpx.Client, way: str, asks: list[Ask]) -> None:
        begin = time.monotonic()
        who = ", ".join(f"{ask.adapter or 'base'} ({ask.folder and ask.folder.name})" for ask in asks)
        try:
            answers = send(http, way, asks)
        except Refused as answer:
            names = [ask.adapter for ask in asks if ask.adapter]
            refusal(self._tally, self._names, names, f"{way} request for {who} was refused: {answer}")
            return
        except Exception as error:
            self._tally.fail(f"{way} request for {who} failed: {error!r}")
            return
        self._tally.add("requests", len(asks))
        self._tally.add(f"requests_{way}", len(asks))
        if way == "abandoned":
            return
        self._tally.took(time.monotonic() - begin)
        for ask, answer in zip(asks, answers, strict=True):
            reference = self._references.of(ask.folder, ask)
            wrong = difference(reference, answer)
            if wrong:
                self._tally.add("unequal")
                self._tally.fail(f"{way} answer of {ask.adapter or 'base'} ({ask.folder}) is wrong: {wrong}")
            else:
                self._tally.answered(reference, answer)


def refusal(tally: Tally, names: Names, asked: list[str], message: str) -> None:
    """Count a refused request: right only where its adapter was unloaded between two steps of SGLang's admission, else a failure."""
    if "not loaded" in message and not all(names.is_open(name) for name in asked):
        tally.add("refused_while_unloading", max(1, len(asked)))
    else:
        tally.fail(message)


class Refused(Exception):
    """The server said no, with this message."""


def send(http: httpx.Client, way: str, asks: list[Ask]) -> list[Answer]:
    """Answers to `asks`; none if abandoned. Raises Refused with the server's words for any status but 200."""
    body = request_body(asks)
    if way in ("whole", "batch"):
        response = http.post("/generate", json=body)
        if response.status_code != 200:
            raise Refused(f"{response.status_code} {response.text}")
        return [Answer.parse(part) for part in response.json()]
    single = {key: value[0] if isinstance(value, list) else value for key, value in body.items()}
    pieces, last = 0, None
    with http.stream("POST", "/generate", json={**single, "stream": True}) as response:
        if response.status_code != 200:
            raise Refused(f"{response.status_code} {response.read().decode(errors='replace')}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces, last = pieces + 1, json.loads(line.removeprefix("data: "))
                if "error" in last:
                    raise Refused(json.dumps(last["error"]))
                if way == "abandoned" and pieces == 2:
                    return []
    if last is None:
        raise Refused("the stream had no piece")
    return [Answer.parse(last)]
