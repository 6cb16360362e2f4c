"""A cluster in processes of its own, started as a user starts it, and asked over HTTP."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import yaml

START_S = 280
STOP_S = 60

# Of the tiny model on a CPU, roughly: what the policies plan with has to be in proportion, not exact.
COSTS = """{"name": "tiny-cpu", "decode_ms": 8.0, "request_ms": 0.5, "lora_ms": 1.0, "row_ms": 0.01, "pad_ms": 0.0, "prefill_ms": 10.0,
"token_ms": 0.05, "lora_token_ms": 0.01, "rank_token_ms": 0.0, "pad_token_ms": 0.0}"""


class Cluster:
    """Start with ``with Cluster(...) as cluster``; leaving ends it as Ctrl-C would, and nothing may complain of that."""

    def __init__(self, config: dict, folder: Path, environment: dict[str, str] | None = None):
        self.url = f"http://127.0.0.1:{config['serve']['port']}"
        self._file, self._log = folder / "cluster.yaml", folder / "cluster.log"
        self._file.write_text(yaml.safe_dump(config))
        self._environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **(environment or {})}

    def __enter__(self) -> "Cluster":
        command = [sys.executable, "-m", "sgl_bdlora.cluster", "serve", "--config", str(self._file)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self._environment)
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        deadline = time.monotonic() + START_S
        while "The cluster is ready" not in self.log():
            if self._process.poll() is not None or time.monotonic() > deadline:
                words = self.log()
                self.stop()
                raise RuntimeError(f"the cluster did not start (exit code {self._process.returncode}):\n{words}")
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        code, words = self.stop(), self.log()
        assert code == 0, words
        assert words.endswith("Stopping.\n"), words

    def stop(self) -> int:
        """The exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def status(self) -> dict:
        response = self.http.get("/cluster/status")
        assert response.status_code == 200, response.text
        return response.json()

    def wait(self, what, seconds: float) -> dict:
        """The first status for which what(status) holds."""
        deadline = time.monotonic() + seconds
        while True:
            status = self.status()
            if what(status):
                return status
            assert time.monotonic() < deadline, f"not within {seconds} s; the last status: {status}\n{self.log()}"
            time.sleep(0.5)


def configuration(model: Path, adapters: Path, costs: Path, port: int, **serve) -> dict:
    """Two replicas of one CPU rank each."""
    costs.write_text(COSTS)
    return {
        "replicas": {"count": 2, "gpus": 1, "pool_gib": 0.05, "host_gib": 1, "max_rank": 64, "max_running": 8},
        "slo": {"ttft_ms": 5000, "tpot_ms": 400},
        "policy": {"name": "rank-spill", "period_s": 3, "max_moves": 4},
        "workload": {"prompt_median": 20, "output_median": 8, "prompt_sigma": 0.1, "output_sigma": 0.1},
        "costs": str(costs),
        "serve": {
            "model": str(model), "adapter_root": str(adapters), "name": "base", "device": "cpu", "port": port, "cpus": 1, "store_gib": 0.2,
            "queue": 24, "arguments": ["--dtype", "float32", "--max-total-tokens", "8192"], **serve,
        },
    }  # fmt: skip
