"""HTTP to one server. Everything that can go wrong comes out as a ServerProblem whose message a reader can act on."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from app.served import Served, parse

# A batch on a slow CPU may take a while to its first token; silence longer than this is a server that hangs.
SILENCE_S = 180
STATE_AGE_S = 1.0
# A server with an admin key takes no other key here.
ADMIN_ROUTES = ("/bdlora/info", "/load_lora_adapter", "/unload_lora_adapter")


class ServerProblem(Exception):
    """state: "down", "starting", "busy", "other" (not a bdlora server), "refused" (it said no) or "died" (in mid-answer)."""

    def __init__(self, state: str, message: str):
        super().__init__(message)
        self.state = state


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer. at: perf_counter seconds when it arrived; text and tokens: of the answer so far."""

    at: float
    index: int
    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    finished: bool


class Server:
    """A server by its address. Safe to use from several threads.

    api_key: for requests; admin_key: for SGLang's routes of administration (ADMIN_ROUTES), api_key where it is None.
    """

    def __init__(self, url: str, api_key: str | None = None, admin_key: str | None = None):
        self.url = url.rstrip("/")
        self._admin = _bearer(admin_key or api_key)
        headers = {"Accept-Encoding": "identity", **_bearer(api_key)}
        # Without trust_env a proxy of the environment cannot come between.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, trust_env=False, timeout=httpx.Timeout(10, connect=2)
        )
        self._lock = threading.Lock()
        self._state: Served | None = None
        self._asked = 0.0

    def state(self) -> Served:
        """What the server says about itself; asked at most once a second however many readers there are."""
        with self._lock:
            if self._state is None or time.monotonic() - self._asked > STATE_AGE_S:
                self._state = None
                self._state = self._ask()
                self._asked = time.monotonic()
            return self._state

    @property
    def known(self) -> Served | None:
        """The last answer, without asking."""
        return self._state

    def forget(self) -> None:
        """Ask anew at the next state()."""
        self._asked = 0.0

    def load(self, name: str, path: str) -> None:
        self._change("/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        self._change("/unload_lora_adapter", {"lora_name": name})

    def stream(self, body: dict[str, Any]) -> Iterator[Chunk]:
        """Send `body` to /generate and yield what arrives; closing the iterator ends the requests on the server.

        Raises ServerProblem when the server refuses, dies or falls silent.
        """
        try:
            timeout = httpx.Timeout(SILENCE_S, connect=2)
            with self._http.stream("POST", "/generate", json={**body, "stream": True}, timeout=timeout) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                yield from _events(response)
        except httpx.TimeoutException as error:
            raise ServerProblem("busy", f"{self.url} sent nothing for {SILENCE_S} s.") from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _down(self.url) from error
        except httpx.HTTPError as error:
            raise ServerProblem("died", f"{self.url} broke off in the middle of its answer ({error}).") from error

    def _ask(self) -> Served:
        info = self._request("GET", "/bdlora/info")
        if info.status_code == 404:
            raise ServerProblem("other", f"{self.url} answers, but does not run sgl_bdlora with --lora-backend bdlora.")
        if info.status_code != 200:
            raise _refusal(info)
        model = self._request("GET", "/model_info")
        try:
            return parse(info.json(), model.json())
        except (KeyError, TypeError, ValueError) as error:
            raise ServerProblem(
                "other", f"{self.url} answers in a form that this page does not know ({error!r})."
            ) from error

    def _change(self, route: str, body: dict[str, Any]) -> None:
        try:
            response = self._request("POST", route, json=body, timeout=300)
        finally:
            self.forget()
        if response.status_code != 200 or not response.json().get("success", False):
            raise _refusal(response)

    def _request(self, method: str, route: str, **more: Any) -> httpx.Response:
        try:
            return self._http.request(method, route, headers=self._admin if route in ADMIN_ROUTES else None, **more)
        except httpx.ConnectError as error:
            raise _down(self.url) from error
        except httpx.TimeoutException as error:
            raise ServerProblem("busy", f"{self.url} does not answer in time; it is busy or hangs.") from error
        except httpx.HTTPError as error:
            raise ServerProblem("died", f"{self.url} broke off its answer ({error}).") from error


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _down(url: str) -> ServerProblem:
    return ServerProblem("down", f"Nothing answers at {url}: the server is down, or has not opened its port yet.")


def _refusal(response: httpx.Response) -> ServerProblem:
    if response.status_code == 503:
        return ServerProblem("starting", f"{response.url.host}:{response.url.port} is up but not ready yet.")
    return ServerProblem("refused", _message(response))


def _message(response: httpx.Response) -> str:
    """The server's own words, whichever of its forms they come in."""
    try:
        body = response.json()
    except ValueError:
        return response.text or f"HTTP {response.status_code}"
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, dict):
            words = error.get("error_message") or error.get("message") or error.get("detail")
            if words:
                return str(words)
        elif error:
            return str(error)
    return json.dumps(body)


def _events(response: httpx.Response) -> Iterator[Chunk]:
    """Server-sent events, stamped as their bytes arrive."""
    pending = b""
    for data in response.iter_raw():
        now = time.perf_counter()
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            if line.strip() == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield _chunk(now, json.loads(line[6:]))
    raise httpx.RemoteProtocolError("the stream ended early")


def _chunk(at: float, event: dict[str, Any]) -> Chunk:
    if "error" in event:
        error = event["error"]
        raise ServerProblem("refused", error.get("message", str(error)) if isinstance(error, dict) else str(error))
    meta = event["meta_info"]
    reason = meta.get("finish_reason")
    if reason and reason.get("type") == "abort":
        raise ServerProblem("refused", reason.get("message") or "The server gave the request up.")
    return Chunk(
        at,
        event.get("index", 0),
        event.get("text", ""),
        meta["completion_tokens"],
        meta.get("prompt_tokens", 0),
        meta.get("cached_tokens", 0),
        reason is not None,
    )
