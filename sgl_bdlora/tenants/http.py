"""Keys and routes: an ASGI middleware that stands before SGLang's routes on a server with tenants.

It takes the place of SGLang's own check of keys (utils/auth.py): the administrator's key opens every route; a tenant's key those below,
and nothing that is not named here. What a tenant may ask of these routes is checked where all of them meet (requests.py).
"""

from __future__ import annotations

import re
from collections import Counter

from sgl_bdlora.tenants import ADMIN, Tenant, Tenants, limits_met, principal
from sgl_bdlora.tenants.limits import Limited

OPEN = {("GET", "/health"), ("GET", "/health_generate"), ("GET", "/ping"), ("GET", "/"), ("HEAD", "/")}
GENERATING = {
    ("POST", "/generate"),
    ("PUT", "/generate"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/invocations"),
    ("POST", "/vertex_generate"),
    ("POST", "/api/chat"),
    ("POST", "/api/generate"),
}
TOKENIZING = {
    ("POST", "/tokenize"),
    ("POST", "/v1/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/detokenize"),
    ("POST", "/v1/messages/count_tokens"),
}
READING = {
    ("GET", "/v1/models"),
    ("GET", "/model_info"),
    ("GET", "/get_model_info"),
    ("GET", "/bdlora/info"),
    ("GET", "/api/tags"),
}
LOADING = {("POST", "/load_lora_adapter"), ("POST", "/unload_lora_adapter")}
METRICS = {("GET", "/metrics")}


def allowed(tenant: Tenant, method: str, path: str) -> bool:
    """Whether the tenant's key opens this route."""
    route = (method, path)
    return (
        route in GENERATING | TOKENIZING | READING
        or (method == "GET" and path.startswith("/v1/models/"))
        or (tenant.may_load and route in LOADING)
        or (tenant.metrics and route in METRICS)
    )


class TenantMiddleware:
    """Args: app: what comes after. tenants: whose keys it knows. models: gives a tenant's answer to GET /v1/models."""

    def __init__(self, app, tenants: Tenants, models):
        self._app, self._tenants, self._models = app, tenants, models

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            principal.set(ADMIN)
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._websocket(scope, receive, send)

    async def _websocket(self, scope, receive, send) -> None:
        if self._holder(scope) != ADMIN:
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        principal.set(ADMIN)
        await self._app(scope, receive, send)

    async def _http(self, scope, receive, send) -> None:
        method, path = scope["method"], _path(scope)
        if (method, path) in OPEN or (
            method == "OPTIONS" and {b"origin", b"access-control-request-method"} <= {*dict(scope["headers"])}
        ):
            # A browser asks beforehand what it may ask; starlette's CORSMiddleware answers, and no route is reached.
            principal.set(ADMIN)
            await self._app(scope, receive, send)
            return
        holder = self._holder(scope)
        if holder is None:
            await _refuse(send, path, 401, "a valid API key is needed", {"www-authenticate": "Bearer"})
            return
        principal.set(holder)
        if holder == ADMIN:
            await self._app(scope, receive, send)
            return
        if not allowed(holder, method, path):
            counts[holder.name, "refused"] += 1
            await _refuse(send, path, 403, "this API key does not open this route")
            return
        try:
            if (method, path) in GENERATING | TOKENIZING:
                holder.limits.admit()
        except Limited as limited:
            counts[holder.name, "limited"] += 1
            await _refuse(send, path, 429, str(limited), {"retry-after": str(limited.retry_after)})
            return
        counts[holder.name, "admitted"] += 1
        if (method, path) == ("GET", "/v1/models"):
            await _answer(send, 200, self._models(holder))
            return
        await _Bounded(self._app, holder, path)(scope, receive, send)

    def _holder(self, scope) -> Tenant | str | None:
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            # As clients of /v1/messages send it.
            key = headers.get(b"x-api-key", b"")
        return self._tenants.holder(key.strip())


class _Bounded:
    """One request of a tenant: its body has a largest size, and an answer 429 says when to come again."""

    def __init__(self, app, tenant: Tenant, path: str):
        self._app, self._tenant, self._path = app, tenant, path
        self._received, self._started, self._too_large = 0, False, False
        self._limits_met: list[Limited] = []

    async def __call__(self, scope, receive, send) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not re.fullmatch(rb"\d{1,18}", length) or int(length) > self._tenant.max_body_bytes:
            await self._refuse(send)
            return

        async def bounded_receive():
            message = await receive()
            self._received += len(message.get("body", b""))
            if self._received > self._tenant.max_body_bytes:
                self._too_large = True
                return {"type": "http.disconnect"}
            return message

        async def marked_send(message):
            if self._too_large:
                if not self._started:
                    self._started = True
                    await self._refuse(send)
                return
            if message["type"] == "http.response.start":
                self._started = True
                if message["status"] == 429 and b"retry-after" not in dict(message["headers"]):
                    wait = max([1, *(limited.retry_after for limited in self._limits_met)])
                    message = {**message, "headers": [*message["headers"], (b"retry-after", b"%d" % wait)]}
            await send(message)

        limits_met.set(self._limits_met)
        try:
            await self._app(scope, bounded_receive, marked_send)
        except Exception:
            if not self._too_large:
                raise
        if self._too_large and not self._started:
            await self._refuse(send)

    async def _refuse(self, send) -> None:
        await _refuse(send, self._path, 413, f"the request has more than {self._tenant.max_body_bytes >> 20} MiB")


# Tenant, outcome -> requests. Outcomes: admitted, limited (429), refused (403).
counts: Counter[tuple[str, str]] = Counter()


class TenantMetrics:
    """Collector of prometheus_client."""

    def describe(self) -> list:
        return []

    def collect(self):
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(
            "bdlora_tenant_requests", "Requests with a tenant's key.", labels=("tenant", "outcome")
        )
        for labels, count in counts.items():
            family.add_metric(labels, count)
        yield family


_TYPES = {401: "authentication_error", 403: "permission_error", 413: "request_too_large", 429: "rate_limit_error"}


async def _refuse(send, path: str, status: int, problem: str, headers: dict[str, str] | None = None) -> None:
    """In the shape of OpenAI's errors; on Anthropic's routes in theirs."""
    if path.startswith("/v1/messages"):
        body = {"type": "error", "error": {"type": _TYPES[status], "message": problem}}
    else:
        code = "rate_limit_exceeded" if status == 429 else None
        body = {"error": {"message": problem, "type": _TYPES[status], "param": None, "code": code}}
    await _answer(send, status, body, headers)


async def _answer(send, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
    import orjson

    data = orjson.dumps(body)
    head = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
    encoded = [(name.encode(), value.encode()) for name, value in head.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": data})


def _path(scope) -> str:
    """The path that the application's routes see (starlette/_utils.py:get_route_path)."""
    path, root = scope["path"], scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path
