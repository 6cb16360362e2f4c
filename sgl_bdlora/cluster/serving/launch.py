"""Start the cluster: check what can be known before, start or join Ray, deploy, wait until it is told to end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import httpx

from sgl_bdlora.cluster.config import ClusterConfig, ConfigError
from sgl_bdlora.cluster.serving.catalog import Entry, check_limits, read_catalog
from sgl_bdlora.cluster.serving.control import Control
from sgl_bdlora.cluster.serving.server import base_name

APP = "bdlora-cluster"
KEY_ENV = "BDLORA_API_KEY"
CONNECT_S = 5.0
# What Serve, its proxy, the front and the controller may take beside the replicas.
SMALL_CPUS = 0.01
DEPLOYS = 3


class ClusterFailed(RuntimeError):
    """The cluster did not start; the message says which part and why."""


def check(config: ClusterConfig) -> dict[str, Entry]:
    """Everything that can be wrong before Ray is there; the adapters. Raises ConfigError, PlacementError or ValueError."""
    serve = config.serve
    if not serve.model:
        raise ConfigError("serve.model is empty; give the base model's directory")
    if not os.path.isdir(serve.model):
        raise ConfigError(f"serve.model = {serve.model!r} is no directory; give the base model's")
    if ":" in base_name(config):
        raise ConfigError(
            f"serve.name = {base_name(config)!r} has a colon, which parts a model from its adapter; choose another"
        )
    if serve.host not in ("127.0.0.1", "::1", "localhost") and not os.environ.get(KEY_ENV):
        raise ConfigError(
            f"serve.host = {serve.host!r} can be reached from other machines; set {KEY_ENV} to the key that clients have to send"
        )
    with socket.socket(socket.AF_INET6 if ":" in serve.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            raise ConfigError(
                f"serve.port = {serve.port}: cannot listen on {serve.host} ({error.strerror}); choose another"
            ) from None
    catalog = read_catalog(serve.adapter_root)
    if base_name(config) in catalog:
        raise ConfigError(
            f"serve.name = {base_name(config)!r} is an adapter's name too, so that requests for one would go to the other; choose another"
        )
    check_limits(catalog, config)
    Control(config, tuple(entry.adapter for entry in catalog.values()))
    return catalog


def check_resources(config: ClusterConfig, nodes: list[dict[str, float]]) -> str:
    """nodes: Ray's resources of each machine. Returns "gpu" or "cpu". Raises ConfigError where the replicas do not fit."""
    replicas, serve = config.replicas, config.serve
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    device = serve.device if serve.device != "auto" else "gpu" if gpus else "cpu"
    if device == "gpu":
        fit = sum(int(node.get("GPU", 0)) // replicas.gpus for node in nodes)
        if fit < replicas.count:
            wanted = f"replicas.count = {replicas.count} with replicas.gpus = {replicas.gpus}"
            raise ConfigError(
                f"{wanted} needs {replicas.count * replicas.gpus} GPUs; Ray has {gpus} on {len(nodes)} machines, enough for {fit} "
                "replicas; lower replicas.count or replicas.gpus, add machines, or set "
                "serve.device to cpu"
            )
    fit = sum(int(node.get("CPU", 0) / serve.cpus + 1e-9) for node in nodes)
    if fit < replicas.count:
        cpus = sum(node.get("CPU", 0) for node in nodes)
        wanted = f"replicas.count = {replicas.count} with serve.cpus = {serve.cpus:g}"
        raise ConfigError(
            f"{wanted} needs {replicas.count * serve.cpus:g} CPUs; Ray has {cpus:g} on {len(nodes)} machines, enough for {fit} "
            "replicas; lower replicas.count or serve.cpus, or add machines"
        )
    return device


def check_address(address: str) -> None:
    """Raises ConfigError where nothing listens; Ray itself would try for a long time."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise ConfigError(
            f"serve.address = {address!r} has to be HOST:PORT of a Ray cluster's head, or empty to start Ray here"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"serve.address = {address!r}: nothing answers there ({error}); start the head with `ray start --head`, check the address, or "
            "leave it empty to start Ray here"
        ) from None


def serve_cluster(config: ClusterConfig, say: Callable[[str], None], ended: threading.Event) -> None:
    """Start the cluster, say when it is ready, and run it until `ended` is set.

    Raises ConfigError, PlacementError, ValueError or ClusterFailed; whatever was started is ended then.
    """
    catalog = check(config)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.serve.address:
        check_address(config.serve.address)
    import ray

    own = not config.serve.address
    try:
        if own:
            store = int(max(0.1, config.serve.store_gib * 1.25) * 2**30)
            # More slots than cores: replicas reserve whole ones, and Serve's own parts a little each.
            ray.init(
                include_dashboard=False, object_store_memory=store, log_to_driver=False, configure_logging=False,
                num_cpus=os.cpu_count() + 1,
            )  # fmt: skip
        else:
            ray.init(address=config.serve.address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if own:
            raise ClusterFailed(f"Ray did not start: {error}") from None
        raise ConfigError(
            f"serve.address = {config.serve.address!r}: no Ray cluster can be joined there ({error}); check that `ray status` works"
        ) from None
    # Ray has its own handlers, which end the process at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    controller = None
    try:
        nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        if own:
            nodes = [{**node, "CPU": node.get("CPU", 0) - 1} for node in nodes]
        device = check_resources(config, nodes)
        say(
            f"Ray is up; starting {config.replicas.count} replicas of {config.replicas.gpus} {device} each for {len(catalog)} adapters"
        )
        controller = deploy(config, device, catalog)
        wait_until_running(config, ended)
        if not ended.is_set():
            say(f"The cluster is ready at {url(config)} (Ctrl-C stops it)")
        ended.wait()
        say("Stopping.")
    finally:
        try:
            _end(controller, say)
        finally:
            ray.shutdown()


def deploy(config: ClusterConfig, device: str, catalog: dict[str, Entry]):
    """The controller, which it returns, and the two deployments, without waiting for them."""
    import ray
    from ray import serve

    from sgl_bdlora.cluster.serving.backend import Backend
    from sgl_bdlora.cluster.serving.controller import NAME, NAMESPACE, Controller
    from sgl_bdlora.cluster.serving.front import Front
    from sgl_bdlora.cluster.serving.router import TableRouter

    # Serve's import has set it to INFO.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    adapters = tuple(entry.adapter for entry in catalog.values())
    options = {
        "name": NAME,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": 1000,
    }
    controller = ray.remote(Controller).options(**options).remote(config, adapters)
    replicas, most = config.replicas, max(config.serve.max_replicas, config.replicas.count)
    bundle = {"CPU": config.serve.cpus, **({"GPU": replicas.gpus} if device == "gpu" else {})}
    scaling = {"num_replicas": replicas.count}
    if most > replicas.count:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.count, "initial_replicas": replicas.count, "max_replicas": most,
                # The controller's number has waited already (control.py); Serve would add its own 30 and 600 s.
                "upscale_delay_s": 0, "downscale_delay_s": 0, "look_back_period_s": 10,
                "policy": {"policy_function": "sgl_bdlora.cluster.serving.scaling:required"},
            }
        }  # fmt: skip
    backends = serve.deployment(
        Backend, name="replicas", ray_actor_options={"num_cpus": config.serve.cpus, "num_gpus": bundle.get("GPU", 0)},
        placement_group_bundles=[bundle], placement_group_strategy="STRICT_PACK", max_ongoing_requests=2 * replicas.max_running,
        max_queued_requests=config.serve.queue, health_check_period_s=10, health_check_timeout_s=60, graceful_shutdown_timeout_s=30,
        max_constructor_retry_count=DEPLOYS,
        request_router_config={"request_router_class": TableRouter, "request_routing_stats_period_s": 2.0}, **scaling,
    )  # fmt: skip
    front = serve.deployment(
        Front, name="front", ray_actor_options={"num_cpus": SMALL_CPUS}, max_ongoing_requests=10_000
    )
    sizes = {name: entry.adapter.size for name, entry in catalog.items()}
    app = front.bind(backends.bind(config, device, sizes), config, tuple(catalog), os.environ.get(KEY_ENV) or None)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.serve.host, "port": config.serve.port},
        logging_config={"log_level": "WARNING"},
    )
    serve.run_many(
        [
            serve.RunTarget(
                app, name=APP, route_prefix="/", logging_config={"log_level": "WARNING", "enable_access_log": False}
            )
        ],
        wait_for_applications_running=False,
    )
    return controller


def _end(controller, say: Callable[[str], None]) -> None:
    """End the front and the replicas, then the controller they report to; Serve's own parts go with the Ray started here.

    serve.shutdown() would wait for a task of an actor that it kills meanwhile, which Ray reports as a failure.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.delete(APP)
    except RayServeException:
        pass  # Serve had not started.
    except (TimeoutError, ray.exceptions.RayError) as error:
        say(f"The replicas did not end as they should: {error}")
    if controller is not None:
        ray.kill(controller)


def wait_until_running(config: ClusterConfig, ended: threading.Event) -> None:
    """Raises ClusterFailed with what Serve says of the part that failed."""
    from ray import serve

    deadline = time.monotonic() + config.serve.start_s
    while not ended.wait(0.5):
        found = serve.status().applications.get(APP)
        state = str(found.status.value) if found else "NOT_STARTED"
        if state == "RUNNING" and _healthy(config):
            return
        words = "; ".join(f"{name}: {d.message}" for name, d in found.deployments.items() if d.message) if found else ""
        if state in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ClusterFailed(f"the cluster did not start: {found.message} {words}")
        if time.monotonic() > deadline:
            raise ClusterFailed(
                f"the cluster was not ready within serve.start_s = {config.serve.start_s:g}: {words or state}"
            )


def _healthy(config: ClusterConfig) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url(config)}/health", timeout=5, trust_env=False).status_code == 200
    return False


def url(config: ClusterConfig) -> str:
    host = f"[{config.serve.host}]" if ":" in config.serve.host else config.serve.host
    return f"http://{host}:{config.serve.port}"


def run(config: ClusterConfig) -> int:
    """Until Ctrl-C or SIGTERM. Returns the exit code."""
    serve_cluster(config, lambda words: print(words, flush=True), threading.Event())
    return 0
