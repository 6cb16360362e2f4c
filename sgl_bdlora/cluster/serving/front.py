"""The ingress: OpenAI's routes and /generate, sent to the replica that the router picks; status and metrics of the cluster."""

import asyncio
import hmac
import json
import logging
import math
import random
import re
import threading
import time
from bisect import bisect_left
from collections.abc import AsyncIterator
from dataclasses import dataclass

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from sgl_bdlora.cluster.config import ClusterConfig
from sgl_bdlora.cluster.serving import follower
from sgl_bdlora.cluster.serving.control import TTFT_BUCKETS, FrontReport
from sgl_bdlora.cluster.serving.errors import ReplicaBroken, error_body
from sgl_bdlora.cluster.serving.metrics import render
from sgl_bdlora.cluster.serving.server import base_name

logger = logging.getLogger("ray.serve")

REPORT_S = 1.0
MAX_BODY = 64 * 2**20
STATUS_S = 10.0
# A token is about so many bytes of a request; only policies that weigh prompts look.
BYTES_PER_TOKEN = 4
PROMPT_TOKENS, OUTPUT_TOKENS = (
    re.compile(rb'"%s":\s*(\d+)' % name) for name in (b"prompt_tokens", b"completion_tokens")
)

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


class Refusal(Exception):
    """An answer that is no model's: status, message, and seconds after which to try again."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s

    def response(self) -> Response:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        headers = (
            {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))} if self.retry_after_s is not None else None
        )
        return Response(error_body(str(self), kind), self.status, headers, "application/json")


@dataclass
class Asked:
    """One request. stream: the client wants server-sent events."""

    route: str
    body: bytes
    adapter: str | None
    stream: bool
    began: float


def tokens_of(answer: bytes, last: bool = False) -> int:
    """Prompt and output tokens that an answer says it has, of all its prompts; last: of a stream's piece, whose last word counts."""
    found = [[int(word) for word in pattern.findall(answer)] for pattern in (PROMPT_TOKENS, OUTPUT_TOKENS)]
    return sum(sum(words[-1:] if last else words) for words in found) if all(found) else 0


@serve.ingress(app)
class Front:
    """config: the cluster's; adapters: their names; key: what clients have to send as bearer token, None for nothing."""

    def __init__(self, backends: DeploymentHandle, config: ClusterConfig, adapters: tuple[str, ...], key: str | None):
        self._backends, self._config, self._adapters, self._key = backends, config, frozenset(adapters), key
        self._base = base_name(config)
        self._lock = threading.Lock()
        self._report = FrontReport()
        self._began = int(time.time())
        follower.follow()
        threading.Thread(target=self._report_for_ever, daemon=True).start()

    @app.get("/health")
    async def health(self) -> Response:
        """200 once there are replicas and a table that knows them."""
        live = follower.live
        return Response(status_code=200 if live.members and live.table else 503)

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        try:
            self._check_key(request)
        except Refusal as refusal:
            return refusal.response()
        known = [(self._base, None), *((name, self._base) for name in sorted(self._adapters))]
        data = [
            {
                "id": name,
                "object": "model",
                "created": self._began,
                "owned_by": "sgl-bdlora",
                "root": name,
                "parent": parent,
            }
            for name, parent in known
        ]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/cluster/status")
    async def status(self, request: Request) -> Response:
        try:
            self._check_key(request)
            return JSONResponse(await self._status())
        except Refusal as refusal:
            return refusal.response()

    @app.get("/metrics")
    async def metrics(self, request: Request) -> Response:
        try:
            self._check_key(request)
            return PlainTextResponse(render(await self._status()), media_type="text/plain; version=0.0.4")
        except Refusal as refusal:
            return refusal.response()

    @app.post("/generate")
    async def generate(self, request: Request) -> Response:
        return await self._serve(request, "/generate")

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._serve(request, "/v1/completions")

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._serve(request, "/v1/chat/completions")

    async def _status(self) -> dict:
        try:
            actor = follower.controller()
            return await asyncio.wait_for(asyncio.wrap_future(actor.status.remote().future()), STATUS_S)
        except (ValueError, ray.exceptions.RayError, asyncio.TimeoutError):
            raise Refusal(503, "the controller does not answer; Ray starts it again", 5) from None

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            raise Refusal(401, "send the cluster's key as 'Authorization: Bearer KEY'")

    async def _serve(self, request: Request, route: str) -> Response:
        try:
            self._check_key(request)
            asked = await self._read(request, route)
            self._note(arrived=asked.adapter)
            table = follower.live.table
            if self._config.policy.shed and table is not None and table.sheds(random.random()):
                self._note(outcome="shed")
                admitted = f"{100 * table.admitted:.0f} %"
                raise Refusal(
                    429,
                    f"the demand is beyond what the replicas can serve; {admitted} of requests are admitted",
                    self._config.policy.period_s,
                )
            return await self._answer(asked)
        except Refusal as refusal:
            return refusal.response()

    async def _read(self, request: Request, route: str) -> Asked:
        began = time.perf_counter()
        pieces, size = [], 0
        async for piece in request.stream():
            size += len(piece)
            if size > MAX_BODY:
                raise Refusal(413, f"the request has more than {MAX_BODY} bytes")
            pieces.append(piece)
        try:
            data = json.loads(b"".join(pieces))
        except (ValueError, RecursionError):
            raise Refusal(400, "the request's body is not JSON") from None
        if not isinstance(data, dict):
            raise Refusal(400, "the request's body is not a JSON object")
        adapter = self._adapter_of(route, data)
        return Asked(route, json.dumps(data).encode(), adapter, data.get("stream") is True, began)

    def _adapter_of(self, route: str, data: dict) -> str | None:
        """The adapter that a request names, None for the base; data then names it as the server wants it."""
        if route == "/generate":
            named = data.get("lora_path")
            if isinstance(named, list):
                if len({*map(str, named)}) != 1:
                    raise Refusal(
                        400,
                        "lora_path: all prompts of a request to a cluster have to be for one adapter; send several requests",
                    )
                named = named[0]
            for field in ("lora_id", "input_embeds"):
                if data.get(field) is not None:
                    raise Refusal(400, f"{field}: a cluster does not take it; name the adapter in lora_path")
        else:
            named = data.get("model")
            if not isinstance(named, str) or not named:
                raise Refusal(400, f"model: name one of GET /v1/models, such as {self._base!r}")
            named = named.removeprefix(f"{self._base}:")
            named = None if named == self._base else named
        if named is not None and (not isinstance(named, str) or named not in self._adapters):
            raise Refusal(404, f"there is no adapter {str(named)[:200]!r}; GET /v1/models lists all")
        if route == "/generate":
            if "lora_path" in data:
                data["lora_path"] = named
        else:
            data["model"] = f"{self._base}:{named}" if named else self._base
            if data.get("lora_path") is not None:
                raise Refusal(400, "lora_path: name the adapter in model")
        return named

    async def _answer(self, asked: Asked) -> Response:
        """Send the request to a replica, and once more to another one if that breaks before its first byte."""
        avoid: tuple[str, ...] = ()
        for attempt in (1, 2):
            handle = self._backends.options(stream=True, method_name="answer", multiplexed_model_id=asked.adapter or "")
            pieces = handle.remote(
                asked.route, asked.body, asked.adapter, avoid=avoid, prompt=len(asked.body) // BYTES_PER_TOKEN
            )
            try:
                status, kind, first = await asyncio.wait_for(anext(pieces), self._config.serve.first_byte_s)
            except BackPressureError:
                self._note(outcome="shed")
                raise Refusal(
                    429, "all replicas are full and serve.queue requests wait already", self._config.policy.period_s
                ) from None
            except asyncio.TimeoutError:
                pieces.cancel()
                self._note(outcome="failed")
                seconds = self._config.serve.first_byte_s
                raise Refusal(
                    503,
                    f"no replica had {'a first token' if asked.stream else 'the whole answer'} within serve.first_byte_s = {seconds:g}"
                    + ("" if asked.stream else "; a request with stream: true has that long for its first token alone"),
                    self._config.policy.period_s,
                ) from None
            except asyncio.CancelledError:
                pieces.cancel()
                self._note(outcome="left")
                raise
            except (ray.exceptions.RayError, RayServeException, ReplicaBroken, StopAsyncIteration) as error:
                logger.warning(
                    "cluster: attempt %d of a request for %s broke: %s",
                    attempt,
                    asked.adapter,
                    str(error).splitlines()[-1:],
                )
                if attempt == 2:
                    self._note(outcome="failed")
                    raise Refusal(
                        503, "two replicas broke while they had this request", self._config.policy.period_s
                    ) from None
                self._note(outcome="retried")
                cause = getattr(error, "cause", error)
                avoid = (cause.args[0],) if isinstance(cause, ReplicaBroken) else ()
                continue
            seconds = time.perf_counter() - asked.began
            if status >= 400:
                self._note(outcome="refused" if status < 500 else "failed")
                return Response(first, status, media_type=kind)
            if not kind.startswith("text/event-stream"):
                self._note(outcome="done", ttft=seconds, tokens=tokens_of(first) if asked.adapter else 0)
                return Response(first, status, media_type=kind)
            return StreamingResponse(self._stream(asked, pieces, first, seconds), status, media_type=kind)
        raise AssertionError

    async def _stream(self, asked: Asked, pieces, first: bytes, ttft: float) -> AsyncIterator[bytes]:
        """The rest of a stream. What breaks it is said in it: its status is sent already."""
        tail, outcome = first, "left"
        try:
            yield first
            while True:
                piece = await asyncio.wait_for(anext(pieces), self._config.serve.silence_s)
                if b"_tokens" in piece:
                    tail = piece
                yield piece
        except StopAsyncIteration:
            outcome = "done"
        except (ray.exceptions.RayError, RayServeException, ReplicaBroken, asyncio.TimeoutError) as error:
            outcome = "broken"
            logger.warning("cluster: a stream broke: %s", str(error).splitlines()[-1:])
            yield b"data: " + error_body("the replica broke off in the middle of its answer", "server_error") + b"\n\n"
        finally:
            if outcome != "done":
                pieces.cancel()
            counted = asked.adapter is not None and outcome == "done"
            self._note(outcome=outcome, ttft=ttft, tokens=tokens_of(tail, last=True) if counted else 0)

    def _note(
        self,
        arrived: str | bool | None = False,
        outcome: str | None = None,
        ttft: float | None = None,
        tokens: int = 0,
    ) -> None:
        """Count for the next report. tokens: of an adapter's answer and its prompt, 0 where they are not known."""
        with self._lock:
            report = self._report
            if arrived is not False:
                report.arrived[arrived] += 1
            if outcome is not None:
                report.outcomes[outcome] += 1
            if ttft is not None:
                report.ttft[bisect_left(TTFT_BUCKETS, ttft)] += 1
                report.ttft_seconds += ttft
            if tokens:
                report.answered += 1
                report.tokens += tokens

    def _report_for_ever(self) -> None:
        actor = None
        while True:
            time.sleep(REPORT_S)
            try:
                if follower.live.members is None:
                    # A handle asks Serve for replicas, and makes its router, when it is used first.
                    self._backends.options(method_name="record_routing_stats").remote()
                actor = actor or follower.controller()
                with self._lock:
                    report, self._report = self._report, FrontReport()
                report.members = follower.live.members
                ray.get(actor.front_says.remote(report), timeout=30)
            except Exception as error:
                logger.warning("cluster: no report to the controller (%s)", error)
                actor = None
