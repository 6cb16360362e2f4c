"""A replica's server process: start it, wait for it, end it."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np

from sgl_bdlora.cluster.config import ClusterConfig
from sgl_bdlora.cluster.serving.catalog import write_body
from sgl_bdlora.cluster.serving.child import FOLDER_ENV
from sgl_bdlora.server_process import HEALTH_S, ServerProcess, free_port

# A load waits for those before it.
LOAD_S = 300.0
# What has to be free in shared memory for adapters from peers to go there, and not to a disk.
SHARED, SHARED_BYTES = Path("/dev/shm"), 2**32


class ReplicaServer:
    """One `python -m sgl_bdlora.cluster.serving.child` on a free port of 127.0.0.1, with a key that only this process knows.

    number: the replica's among those of its machine; on CPUs it decides which cores are its own.
    """

    def __init__(self, config: ClusterConfig, device: str, number: int):
        self._folder = Path(tempfile.mkdtemp(prefix="bdlora-replica-"))
        self._adapters = Path(tempfile.mkdtemp(prefix="bdlora-replica-", dir=shared_memory()))
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        key = secrets.token_urlsafe(32)
        # In a file that only this user can read: a command line can be read by all.
        handle, self._secret = tempfile.mkstemp(suffix=".yaml", dir=self._folder)
        with os.fdopen(handle, "w") as file:
            file.write(f"api-key: {key}\n")
        command = [
            sys.executable,
            "-m",
            "sgl_bdlora.cluster.serving.child",
            "--config",
            self._secret,
            *server_arguments(config, port),
        ]
        added = {**environment(config, device, number), FOLDER_ENV: str(self._adapters)}
        self._process = ServerProcess(
            command, added, url, self._folder / "server.log", config.serve.start_s, stdin=subprocess.PIPE
        )
        self._process.start()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # Without trust_env a proxy of the environment cannot come between.
        self.http = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, limits=limits,
            # How long an answer may take is the front's to say, which cancels it then.
            timeout=httpx.Timeout(None, connect=10),
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        """Wait until it answers. Raises StartFailed."""
        try:
            await asyncio.to_thread(self._process.wait)
        finally:
            os.unlink(self._secret)

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.ended()

    async def ended_or_silent(self) -> str | None:
        """What is wrong with it, if anything."""
        if self.ended() is not None:
            return f"the server ended with code {self.ended()}\n{self.tail()}"
        try:
            status = (await self.http.get("/health", timeout=HEALTH_S)).status_code
        except httpx.HTTPError as error:
            return f"the server does not answer: {error!r}"
        return None if status == 200 else f"the server says that it is not well (HTTP {status})"

    async def load(self, name: str, folder: str | Path) -> str | None:
        """Load the adapter in a directory of this machine; why it was refused, if it was."""
        body = {"lora_name": name, "lora_path": str(folder)}
        response = await self.http.post("/load_lora_adapter", json=body, timeout=LOAD_S)
        return None if response.status_code == 200 else _words(response)

    async def load_body(self, name: str, body: np.ndarray) -> str | None:
        """Load an adapter from its body (catalog.py), which is in a file for as long as that takes. Raises OSError without room for it."""
        folder = Path(tempfile.mkdtemp(dir=self._adapters))
        try:
            await asyncio.to_thread(write_body, body, folder)
            return await self.load(name, folder)
        except ValueError as error:
            return f"adapter {name!r}: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def unload(self, name: str) -> None:
        await self.http.post("/unload_lora_adapter", json={"lora_name": name}, timeout=LOAD_S)

    def stop(self) -> None:
        """End it and what it started, and forget its log. The closed pipe ends it where nobody calls this."""
        self._process.stop()
        for folder in (self._folder, self._adapters):
            shutil.rmtree(folder, ignore_errors=True)

    def tail(self) -> str:
        return self._process.tail()


def server_arguments(config: ClusterConfig, port: int) -> list[str]:
    """The server's command line; serve.arguments come last and win."""
    replicas = config.replicas
    return [
        "--model-path", config.serve.model, "--served-model-name", base_name(config), "--tp-size", str(replicas.gpus),
        "--host", "127.0.0.1", "--port", str(port), "--max-lora-rank", str(replicas.max_rank), "--lora-target-modules", "all",
        "--max-running-requests", str(replicas.max_running), "--max-loras-per-batch", str(replicas.max_running),
        "--lora-pool-gb", f"{replicas.pool_gib / replicas.gpus:g}", *config.serve.arguments,
    ]  # fmt: skip


def shared_memory() -> Path | None:
    """Where files stay in memory; None where there is no such place, or a small one as in containers."""
    if SHARED.is_dir() and os.access(SHARED, os.W_OK) and shutil.disk_usage(SHARED).free >= SHARED_BYTES:
        return SHARED
    return None


def base_name(config: ClusterConfig) -> str:
    return config.serve.name or Path(config.serve.model).name


def environment(config: ClusterConfig, device: str, number: int) -> dict[str, str]:
    """On CPUs replicas of one machine take turns in its cores, whole ones each; GPUs are Ray's to give."""
    if device != "cpu":
        return {}
    cores = sorted(os.sched_getaffinity(0))
    share = min(len(cores), max(1, int(config.serve.cpus)) // config.replicas.gpus or 1)
    ranks = []
    for rank in range(config.replicas.gpus):
        first = (number * config.replicas.gpus + rank) * share % len(cores)
        ranks.append(",".join(str(cores[(first + i) % len(cores)]) for i in range(share)))
    return {
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(share),
        "SGLANG_CPU_OMP_THREADS_BIND": os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "|".join(ranks)),
    }  # fmt: skip


def _words(response: httpx.Response) -> str:
    try:
        return str(response.json()["error_message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500] or f"HTTP {response.status_code}"
