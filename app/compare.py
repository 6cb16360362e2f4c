"""Run a comparison: the same prompts under two arms, batch by batch in turns, one comparison at a time."""

import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from app.client import Server, ServerProblem
from app.measure import Answer, Batch

BLOCK, PLAIN = "block-diagonal", "plain"
WARM_UP_TOKENS = 2
# A run that nobody has looked at for this long ends: its reader has left.
UNWATCHED_S = 30
# How often a run is drawn while it goes on.
REFRESH_S = 0.2


@dataclass(frozen=True)
class Ask:
    """One prompt, and the adapter that each arm answers it with (None: the base model)."""

    prompt: str
    adapters: dict[str, str | None]


@dataclass(frozen=True)
class Plan:
    """What to run. same_length: every answer has exactly max_tokens, so that both arms do the same work.

    forget_prompts: no batch finds prompts that another one left in the server's cache.
    """

    asks: tuple[Ask, ...]
    max_tokens: int
    temperature: float
    repeats: int
    same_length: bool = True
    forget_prompts: bool = True
    prompt_format: str = "{prompt}"

    def body(self, arm: str, max_tokens: int | None = None) -> dict:
        """The arm's batch as one /generate request, anew for every batch."""
        adapters = [ask.adapters[arm] for ask in self.asks]
        return {
            "text": [self.prompt_format.replace("{prompt}", ask.prompt) for ask in self.asks],
            # A server without LoRA refuses the field even when it names none.
            **({"lora_path": adapters} if any(adapters) else {}),
            # A new key hides what is cached. Emptying the cache instead slows the next batch: SGLang frees device memory with it.
            **({"extra_key": uuid.uuid4().hex} if self.forget_prompts else {}),
            "sampling_params": {
                "temperature": self.temperature,
                "max_new_tokens": max_tokens or self.max_tokens,
                "ignore_eos": self.same_length,
                # Shown answers are cut at their own end mark, which has to be there to be seen.
                "skip_special_tokens": not self.same_length,
            },
        }


def turns(arms: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """(repeat, arm) in order; every second repeat starts with the other arm, so that neither is always first."""
    return [(r, arm) for r in range(repeats) for arm in (arms if r % 2 == 0 else list(reversed(arms)))]


@dataclass
class Comparison:
    """A run in its own thread. Everything public can be read at any time; `changes` counts up whenever something is new."""

    plan: Plan
    servers: dict[str, Server]
    titles: dict[str, str]
    current: str | None = None
    status: str = "Waiting"
    error: str | None = None
    done: bool = False
    changes: int = 0
    batches: list[Batch] = field(default_factory=list)
    live: dict[str, tuple[Answer, ...]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _seen: float = 0.0

    # One comparison at a time: two at once would measure each other.
    _turn = threading.Lock()

    def start(self) -> "Comparison":
        self.look()
        threading.Thread(target=self._run, daemon=True, name="comparison").start()
        return self

    def look(self) -> None:
        """Whoever shows the run says so now and then."""
        self._seen = time.monotonic()

    def stop(self) -> None:
        self._stop.set()

    @classmethod
    def running(cls) -> bool:
        return cls._turn.locked()

    def _run(self) -> None:
        try:
            self._say("Another comparison is running; this one starts when it has ended.")
            while not self._turn.acquire(timeout=0.2):
                if self._stopped():
                    return self._say("Stopped before it began.")
            try:
                self._measure()
            finally:
                self._turn.release()
        except Exception as problem:
            self.error = f"{type(problem).__name__}: {problem}"
        finally:
            self.done = True
            self.changes += 1

    def _measure(self) -> None:
        arms = list(self.servers)
        for arm in arms:
            self._say(f"Warming up: {self.titles[arm]} ({WARM_UP_TOKENS} tokens, not measured)")
            warm = self._batch(arm, -1, WARM_UP_TOKENS, keep=False)
            if warm.error or self._stopped():
                return self._end(warm)
        for repeat, arm in turns(arms, self.plan.repeats):
            self._say(
                f"Repeat {repeat + 1} of {self.plan.repeats}: {self.titles[arm]}, batch of {len(self.plan.asks)} requests"
            )
            batch = self._batch(arm, repeat, self.plan.max_tokens)
            if batch.error or self._stopped():
                return self._end(batch)
        self._say(f"Done: {len(self.batches)} batches")

    def _end(self, batch: Batch) -> None:
        finished = sum(b.complete for b in self.batches)
        kept = f"{finished} finished batch{'' if finished == 1 else 'es'} and what had arrived are kept."
        if self._stopped():
            self._say(f"Stopped. {kept}")
        else:
            self.error = f"{batch.error} {kept}"
            self._say("Broken off")

    def _batch(self, arm: str, repeat: int, max_tokens: int, keep: bool = True) -> Batch:
        answers = [Answer(ask.adapters[arm], ask.prompt) for ask in self.plan.asks]
        error, self.current = None, arm if keep else None
        begin = time.perf_counter()
        stream = self.servers[arm].stream(self.plan.body(arm, max_tokens))
        try:
            for chunk in stream:
                answers[chunk.index] = extend(answers[chunk.index], chunk, begin)
                if keep:
                    self.live[arm] = tuple(answers)
                    self.changes += 1
                if self._stopped():
                    error = "Stopped."
                    break
        except ServerProblem as problem:
            error = str(problem)
        finally:
            stream.close()
        batch = Batch(arm, repeat, tuple(answers), error)
        if keep:
            self.batches.append(batch)
        return batch

    def _stopped(self) -> bool:
        return self._stop.is_set() or time.monotonic() - self._seen > UNWATCHED_S

    def _say(self, status: str) -> None:
        self.status = status
        self.changes += 1


def extend(answer: Answer, chunk, begin: float) -> Answer:
    """The answer with what a chunk of its stream brought. begin: perf_counter seconds when the batch was sent."""
    at = chunk.at - begin
    news = chunk.tokens > answer.tokens
    first = answer.first_s is None and news
    return replace(
        answer,
        text=chunk.text,
        tokens=chunk.tokens,
        prompt_tokens=chunk.prompt_tokens,
        cached_tokens=chunk.cached_tokens,
        first_s=at if first else answer.first_s,
        first_tokens=chunk.tokens if first else answer.first_tokens,
        last_s=at if news else answer.last_s,
        finished=chunk.finished,
    )
