"""A server in a process of its own: start, wait until it answers, stop with everything it started."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx


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


class ServerProcess:
    """``with ServerProcess(command, environment, url, log, patience)``: healthy inside the block, gone after it.

    environment: added to this process's own. patience: seconds until it has to answer GET /health.
    """

    def __init__(self, command: list[str], environment: dict[str, str], url: str, log: Path, patience: float):
        self.url = url
        self._command, self._environment, self._log, self._patience = command, environment, log, patience
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ServerProcess":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self, patience: float) -> int:
        """Once it has ended by itself. Raises subprocess.TimeoutExpired after `patience` seconds."""
        return self._process.wait(patience)

    def stop(self) -> None:
        """SIGTERM to the whole process group, SIGKILL to what is left of it after 10 s."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._process.wait()

    def tail(self, lines: int = 30) -> str:
        text = self._log.read_text(errors="replace").splitlines()
        return "\n".join([f"--- end of {self._log}", *text[-lines:]])

    def _wait(self) -> None:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise StartFailed(f"the server ended with code {self._process.returncode}\n{self.tail()}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        raise StartFailed(f"the server did not answer within {self._patience:.0f} s\n{self.tail()}")
