"""A server in a process of its own: start it, wait until it answers, stop it with everything it started."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import httpx

# /health generates a token and waits for it in steps of a second.
HEALTH_S = 30


class StartFailed(RuntimeError):
    """The server ended, or did not answer in time; the message has the end of its log."""


def free_port() -> int:
    """A free port below the ephemeral range, whose ports may be taken again before the server binds."""
    # Not the shared generator: tests seed it, and two runs at once would choose alike.
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("none of 100 ports between 20000 and 32000 is free")


def end_group(process: subprocess.Popen) -> None:
    """SIGTERM to the process group that `process` leads, SIGKILL to what is left of it after 10 s."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


class ServerProcess:
    """``with ServerProcess(command, environment, url, log, patience)``: healthy inside the block, gone after it.

    environment: added to this process's own. patience: seconds from its start until it has to answer GET /health.
    stdin: subprocess.PIPE for a server that ends when the process that started it does.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], url: str, log: Path, patience: float,
        stdin: int = subprocess.DEVNULL,
    ):  # fmt: skip
        self.url = url
        self._command, self._environment, self._log, self._patience = command, environment, log, patience
        self._stdin = stdin
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ServerProcess":
        try:
            self.start()
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._begin = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment},
                stdin=self._stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, show: Callable[[float, str], None] = lambda seconds, line: None) -> None:
        """Until it answers; meanwhile `show` is given the seconds since its start and the last line of the log. Raises StartFailed.

        Who comes when patience is over, having waited for another server, asks once.
        """
        while True:
            waited = time.monotonic() - self._begin
            if self.ended() is not None:
                raise StartFailed(
                    f"The server ended with code {self.ended()} while it started. The end of its log:\n{self.tail()}\n"
                    "--- change what it complains of, and start again"
                )
            show(waited, "".join(self._lines()[-1:]))
            # A proxy of the environment must not come between.
            with contextlib.suppress(httpx.TransportError):
                # What was asked before the server was warm may hang; a slow machine takes its time.
                seconds = min(max(2, waited / 5), HEALTH_S, max(5, self._patience - waited))
                if httpx.get(f"{self.url}/health", timeout=seconds, trust_env=False).status_code == 200:
                    return
            if time.monotonic() - self._begin >= self._patience:
                break
            time.sleep(0.5)
        raise StartFailed(
            f"The server was not ready after {self._patience:.0f} s. The end of its log:\n{self.tail()}\n"
            "--- if it was still at work, give it more time or a smaller model"
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def exit_code(self, patience: float) -> int:
        """Once it has ended by itself. Raises subprocess.TimeoutExpired after `patience` seconds."""
        return self._process.wait(patience)

    def stop(self) -> None:
        """Also of one that was not started, or is stopped."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        end_group(self._process)

    def tail(self, lines: int = 30) -> str:
        return "\n".join([f"--- end of {self._log}", *self._lines()[-lines:]])

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").rstrip().splitlines()


@contextlib.contextmanager
def started(servers: Iterable[ServerProcess]) -> Iterator[None]:
    """All of them start at once; to be waited for in the block, and gone after it."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start()
        yield
