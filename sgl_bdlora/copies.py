"""Copies from pinned host memory beside the running batch.

On a GPU they go through a stream of their own. A copy starts when the work queued before it is done, because that may still read
the place it overwrites, and then runs beside the next batch. Work that needs the copy waits for it on the device, never on the
host, so that all ranks take the same decisions whatever their copies' speed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Arrival:
    """The end of one copy."""

    def __init__(self, event: torch.cuda.Event | None = None):
        self._event = event

    def wait(self) -> None:
        """Let the current stream wait for it; free once that stream has waited."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
            self._event = None


class Copies:
    """Runs copies onto one device. On a CPU they are done when `run` returns."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reader: torch.cuda.Stream | None = None

    def read_by_current_stream(self) -> None:
        """Say that the current stream reads what was copied: later copies wait for what it has queued by then."""
        if self._stream is not None:
            self._reader = torch.cuda.current_stream()

    def run(self, copy: Callable[[], None]) -> Arrival:
        """Queue `copy`, which may overwrite anything that work queued from now on does not read."""
        if self._stream is None:
            copy()
            return Arrival()
        if self._reader is not None:
            self._stream.wait_stream(self._reader)
        with torch.cuda.stream(self._stream):
            copy()
            event = torch.cuda.Event()
            event.record()
        return Arrival(event)

    def finish(self) -> None:
        """Wait on the host, in any thread, until the copies that were queued before are done."""
        if self._stream is not None:
            self._stream.synchronize()
