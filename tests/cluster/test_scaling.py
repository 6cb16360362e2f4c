"""Ray Serve adds a replica when the demand needs it and takes it away later."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from running import Cluster, configuration
from zoo import Recipe, write_adapter

from sgl_bdlora.server_process import free_port

pytest.importorskip("ray", reason="needs the extra: pip install 'sgl-bdlora[cluster]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_replicas_follow_the_demand(zoo, tmp_path):
    """By its costs a replica is good for a third of a request a second; 8 clients keep asking, then stop."""
    for i in range(2):
        write_adapter(zoo.model("llama"), Recipe(f"a{i}", 8, seed=i), tmp_path / "adapters" / f"a{i}")
    config = configuration(
        zoo.model("llama"), tmp_path / "adapters", tmp_path / "costs.json", free_port(), max_replicas=2, downscale_s=15
    )
    config["replicas"]["count"] = 1
    config["slo"]["tpot_ms"] = 4000
    slow = {**json.loads((tmp_path / "costs.json").read_text()), "request_ms": 300.0}
    (tmp_path / "costs.json").write_text(json.dumps(slow))
    with Cluster(config, tmp_path) as cluster:
        assert len(cluster.status()["replicas"]) == 1
        stop, failed = threading.Event(), []

        def client(seed: int) -> None:
            body = {
                "input_ids": [5 + seed] * 20,
                "lora_path": f"a{seed % 2}",
                "sampling_params": {"max_new_tokens": 8, "ignore_eos": True},
            }
            with httpx.Client(base_url=cluster.url, timeout=100, trust_env=False) as http:
                while not stop.is_set():
                    response = http.post("/generate", json=body)
                    if response.status_code != 200:
                        failed.append(response.text)
                    time.sleep(0.2)

        with ThreadPoolExecutor(8) as pool:
            try:
                pool.map(client, range(8))
                cluster.wait(lambda s: s["required_replicas"] == 2, 60)
                up = cluster.wait(lambda s: len(s["replicas"]) == 2, 150)
            finally:
                stop.set()
        assert not failed, failed[:3]
        assert up["max_replicas"] == 2
        down = cluster.wait(lambda s: len(s["replicas"]) == 1, 150)
        assert down["required_replicas"] == 1
        assert cluster.http.post("/generate", json={"input_ids": [5] * 9, "lora_path": "a0"}).status_code == 200
