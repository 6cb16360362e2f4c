"""A real server in a process of its own, asked over HTTP, and the comparison of its answers with the oracle."""

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from zoo.oracle import TOLERANCE, Oracle

from sgl_bdlora.server_process import ServerProcess, free_port

START_TIMEOUT_S = 240
TOP = 5


@dataclass(frozen=True)
class Served:
    """What to start: a model of the zoo, a TP size, further command-line arguments and environment variables."""

    family: str
    tp: int
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "-".join((self.family, f"tp{self.tp}", *(a.strip("-") for a in self.arguments)))


@dataclass(frozen=True)
class Ask:
    """One request: prompt token ids, the adapter's served name and directory (None: the base), tokens to generate."""

    prompt: tuple[int, ...]
    adapter: str | None = None
    folder: Path | None = None
    new_tokens: int = 8
    prompt_logprobs: bool = True


@dataclass(frozen=True)
class Answer:
    """Log-probabilities by position; ``prompt[0]`` is None, as nothing predicts the first token."""

    tokens: list[int]
    prompt: list[float | None]
    generated: list[float]
    top: list[dict[int, float]]
    cached_tokens: int

    @classmethod
    def parse(cls, body: dict[str, Any]) -> "Answer":
        meta = body["meta_info"]
        return cls(
            tokens=[entry[1] for entry in meta["output_token_logprobs"]],
            prompt=[entry[0] for entry in meta.get("input_token_logprobs") or []],
            generated=[entry[0] for entry in meta["output_token_logprobs"]],
            top=[{entry[1]: entry[0] for entry in position} for position in meta["output_top_logprobs"]],
            cached_tokens=meta["cached_tokens"],
        )


@dataclass
class Server:
    """Start with ``with Server(...) as server``; leaving kills the whole process group."""

    model: Path
    tp: int
    log: Path
    arguments: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    module: str = "sgl_bdlora.launch_server"
    key: str = ""
    base_url: str = ""
    process: ServerProcess | None = None

    def __enter__(self) -> "Server":
        port = free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable, "-m", self.module, "--model-path", str(self.model), "--served-model-name", "base",
            "--tp-size", str(self.tp), "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port),
            "--max-total-tokens", "8192", "--max-running-requests", "32", *self.arguments,
            *shlex.split(os.environ.get("BDLORA_TEST_ARGUMENTS", "")),
        ]  # fmt: skip
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = ServerProcess(command, self.environment, self.base_url, self.log, START_TIMEOUT_S)
        self.process.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """At once: after SIGTERM SGLang waits up to 5 s before it does the same (tokenizer_manager.py:sigterm_watchdog)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stop()

    def tail(self) -> str:
        return self.process.tail(60)

    def post(self, route: str, body: dict[str, Any], timeout: float = 120, key: str | None = None) -> httpx.Response:
        """key: instead of the server's own, which is the administrator's where there is one."""
        try:
            return httpx.post(self.base_url + route, json=body, timeout=timeout, headers=self.headers(key))
        except httpx.TransportError as error:
            raise RuntimeError(f"POST {route} got no answer: {error!r}\n{self.tail()}") from error

    def get(self, route: str, timeout: float = 60, key: str | None = None) -> httpx.Response:
        return httpx.get(self.base_url + route, timeout=timeout, headers=self.headers(key))

    def headers(self, key: str | None = None) -> dict[str, str]:
        key = self.key if key is None else key
        return {"Authorization": f"Bearer {key}"} if key else {}

    def load(self, name: str, folder: Path | str) -> httpx.Response:
        return self.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> httpx.Response:
        return self.post("/unload_lora_adapter", {"lora_name": name})

    def flush_cache(self) -> None:
        """Forget all cached prefixes, once the server is idle."""
        for _ in range(50):
            if self.post("/flush_cache", {}).status_code == 200:
                return
            time.sleep(0.1)
        raise RuntimeError(f"the prefix cache could not be flushed\n{self.tail()}")

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send all of ``asks`` as one POST, which the scheduler batches together."""
        response = self.post("/generate", request_body(asks))
        assert response.status_code == 200, f"{response.text}\n{self.tail()}"
        return [Answer.parse(body) for body in response.json()]

    def generate_each(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send every one of ``asks`` as its own POST, all at the same time."""
        with ThreadPoolExecutor(len(asks)) as pool:
            return [answers[0] for answers in pool.map(lambda ask: self.generate([ask]), asks)]


def request_body(asks: Sequence[Ask], **more: Any) -> dict[str, Any]:
    """Body of a greedy /generate request that ignores the end-of-sequence token."""
    adapters = [ask.adapter for ask in asks]
    return {
        "input_ids": [list(ask.prompt) for ask in asks],
        # A server without LoRA refuses the field even when it names none.
        "lora_path": adapters if any(adapters) else None,
        "sampling_params": [{"temperature": 0, "max_new_tokens": ask.new_tokens, "ignore_eos": True} for ask in asks],
        "return_logprob": True,
        "logprob_start_len": [0 if ask.prompt_logprobs else -1 for ask in asks],
        "top_logprobs_num": TOP,
        **more,
    }


def check(oracle: Oracle, asks: Iterable[Ask], answers: Iterable[Answer], tolerance: float = TOLERANCE) -> float:
    """Assert that every answer is the oracle's; returns the largest difference of log-probabilities seen.

    The oracle scores the server's own tokens: one forward pass checks the prompt, every generated token, the runners-up
    and, as no token may be likelier than the one chosen, that decoding was greedy.
    """
    worst, complaints = 0.0, []
    for ask, answer in zip(asks, answers, strict=True):
        prompt = list(ask.prompt)
        score = oracle.score(prompt + answer.tokens, ask.folder)
        assert len(answer.tokens) == ask.new_tokens, f"{ask.adapter}: {len(answer.tokens)} of {ask.new_tokens} tokens"
        pairs = []
        if ask.prompt_logprobs:
            assert len(answer.prompt) == len(prompt), f"{ask.adapter}: {len(answer.prompt)} prompt log-probabilities"
            pairs += [("prompt", i, answer.prompt[i], score.of(i, prompt[i])) for i in range(1, len(prompt))]
        for i, (token, logprob, top) in enumerate(zip(answer.tokens, answer.generated, answer.top, strict=True)):
            at = len(prompt) + i
            pairs.append(("generated", at, logprob, score.of(at, token)))
            pairs.append(("likeliest", at, logprob, score.all[at - 1].max().item()))
            assert len(top) == TOP, f"{ask.adapter}: {len(top)} top log-probabilities"
            pairs += [("top", at, value, score.of(at, other)) for other, value in top.items()]
        kind, at, served, expected = max(pairs, key=lambda pair: abs(pair[2] - pair[3]))
        worst = max(worst, abs(served - expected))
        wrong = sum(abs(served - expected) > tolerance for _, _, served, expected in pairs)
        if wrong:
            complaints.append(
                f"adapter {ask.adapter}, prompt of {len(prompt)}: {wrong} of {len(pairs)} log-probabilities off; "
                f"worst is {kind} at position {at}: served {served:.6f}, oracle {expected:.6f}"
            )
    assert not complaints, "\n".join(complaints)
    return worst
