"""The controller's decisions and what routers make of them, without Ray."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest

from sgl_bdlora.cluster.base import Adapter, PlacementError
from sgl_bdlora.cluster.config import ConfigError, from_dict
from sgl_bdlora.cluster.costs import load_costs
from sgl_bdlora.cluster.policies import NAMES
from sgl_bdlora.cluster.serving.control import TTFT_BUCKETS, Control, FrontReport, ReplicaReport
from sgl_bdlora.cluster.serving.scaling import required

MIB = 2**20
ADAPTERS = tuple(Adapter(f"a{i}", (8, 16, 32, 64)[i % 4], (8, 16, 32, 64)[i % 4] * MIB) for i in range(24))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def control(clock=None, **changes) -> Control:
    data = {"replicas": {"count": 2}, "policy": {"name": "rank-spill", "period_s": 10, "max_moves": 4}, **changes}
    return Control(from_dict(data), ADAPTERS, clock or Clock())


def front(arrived=None, members=None, **more) -> FrontReport:
    report = FrontReport(members=members, **more)
    report.arrived.update(arrived or {})
    return report


def replica(loaded=(), peer=0, disk=0) -> ReplicaReport:
    return ReplicaReport(
        "127.0.0.1",
        1,
        2,
        0,
        tuple(loaded),
        (),
        0,
        {"peer": peer, "disk": disk},
        {"peer": 10 * peer, "disk": 10 * disk},
        0,
    )


def test_the_first_plan_waits_for_all_replicas_and_is_even():
    clock = Clock()
    made = control(clock)
    made.front_says(front(members=("x",)))
    assert made.table is None
    made.front_says(front(members=("x", "y")))
    assert made.table.version == 1
    assert set(made.table.shares) == {a.name for a in ADAPTERS}
    placed = [r["placed"] for r in made.status()["replicas"]]
    assert min(placed) >= 3
    assert made.moved == 0


def test_a_replica_that_never_comes_is_not_waited_for():
    clock = Clock()
    made = control(clock)
    made.front_says(front(members=("x",)))
    clock.now = 61
    made.tick()
    assert made.table.replicas == ("x",)


def test_another_policy_starts_as_if_the_cluster_had_just_started():
    clock = Clock()
    made = control(clock)
    made.front_says(front({"a1": 500}, ("x", "y"), answered=100_000, tokens=100_000 * 40))
    clock.now = 10
    made.tick()
    version, stamp = made.table.version, made.stamp
    made.use_policy("contiguous")
    assert made.stamp > stamp
    assert made.table.version > version
    assert made.forgotten == 1
    # Blocks in order, which no plan from the other table would have.
    assert {a: made.table.holders(a) for a in ("a0", "a11", "a12", "a23")} == {
        "a0": ("x",), "a11": ("x",), "a12": ("y",), "a23": ("y",),
    }  # fmt: skip
    status = made.status()
    assert status["policy"] == "contiguous"
    assert not any(a["demand"] for a in status["adapters"])
    assert status["mean_tokens"] > 1000
    with pytest.raises(ConfigError, match=r"policy\.name = 'best'"):
        made.use_policy("best")
    assert made.status()["policy"] == "contiguous"


def test_routers_take_a_policy_that_the_controller_changed():
    follower = pytest.importorskip("sgl_bdlora.cluster.serving.follower")
    made = control()
    made.front_says(front(members=("x", "y")))
    news = {"table": made.table.to_json(), "required": 2, "policy": "toppings"}
    kept = dataclasses.replace(follower.live)
    try:
        follower.take(news, made.config, load_costs(made.config.costs))
        assert follower.live.policy.name == "toppings"
        assert follower.live.table == made.table
        # A controller that has just started has no table yet.
        none = {**news, "table": None, "policy": "affinity"}
        follower.take(none, made.config, load_costs(made.config.costs))
        assert (follower.live.policy.name, follower.live.table) == ("affinity", made.table)
        follower.take(none, made.config, load_costs(made.config.costs), anew=True)
        assert follower.live.table is None
    finally:
        vars(follower.live).update(vars(kept))


@pytest.mark.parametrize("name", NAMES)
def test_drift_moves_at_most_the_bound(name):
    clock, rng = Clock(), random.Random(0)
    made = control(clock, policy={"name": name, "max_moves": 3})
    made.front_says(front(members=("x", "y")))
    for step in range(30):
        hot = [(step // 5 * 7 + i) % 24 for i in range(5)]
        made.front_says(front({f"a{i}": rng.randrange(20, 60) for i in hot}))
        clock.now += 10
        before = made.stamp
        made.tick()
        assert made.stamp > before
    assert made.table.version == 31
    if name != "hrw-ema":  # its holders follow the hash
        assert made.most_moved <= 3
    assert {a for pairs in made.prefetch.values() for a in pairs} <= {a.name for a in ADAPTERS}
    assert all(sum(p for _, p in parts) == pytest.approx(1) for parts in made.table.shares.values())


def test_a_death_heals_at_once_and_the_next_replica_gets_a_plan():
    made = control()
    made.front_says(front(members=("x", "y")))
    version, stamp = made.table.version, made.stamp
    made.replica_says("x", replica(["a0"], peer=2, disk=3))
    made.front_says(front(members=("y",)))
    assert made.table.replicas == ("y",)
    assert made.table.version == version + 1
    assert made.stamp > stamp
    assert made.healed == 1
    made.front_says(front(members=("y", "z")))
    assert set(made.table.replicas) == {"y", "z"}
    assert made.most_moved <= 4
    status = made.status()
    assert [r["name"] for r in status["replicas"]] == ["r0", "r1"]
    # What the dead one loaded still counts.
    assert status["cold_loads"] == {"peer": 2, "disk": 3}
    assert status["bytes_moved"] == {"peer": 20, "disk": 30}


def test_what_replicas_did_counts_once_however_late_they_say_it():
    clock = Clock()
    made = control(clock)
    made.front_says(front(members=("x", "y")))
    made.replica_says("x", replica(disk=3))
    made.replica_says("y", replica(disk=4))
    made.front_says(front(members=("y",)))
    made.replica_says("x", replica(disk=4))  # it ends, and says so
    assert made.status()["cold_loads"]["disk"] == 8
    # A front that has just started knows no replica.
    made.front_says(front(members=()))
    made.front_says(front(members=("y",)))
    assert made.status()["cold_loads"]["disk"] == 8
    clock.now += 100
    made.replica_says("y", replica(disk=5))
    made.tick()
    assert set(made._reports) == {"y"}
    assert made.status()["cold_loads"]["disk"] == 9


@pytest.mark.parametrize("name", ["affinity", "toppings"])
def test_policies_that_place_nothing_have_nothing_copied(name):
    made = control(policy={"name": name, "max_moves": 3})
    made.front_says(front({f"a{i}": 10 for i in range(24)}, members=("x", "y")))
    made.front_says(front(members=("y",)))
    made.front_says(front(members=("y", "z")))
    made.tick()
    assert set(made.table.replicas) == {"y", "z"}
    assert (made.moved, made.prefetch) == (0, {})


def test_the_death_of_all_is_survived():
    made = control()
    made.front_says(front(members=("x", "y")))
    version = made.table.version
    made.front_says(front(members=()))
    made.tick()
    made.front_says(front(members=("u", "v")))
    assert set(made.table.replicas) == {"u", "v"}
    assert made.table.version > version


def test_too_little_memory_after_a_death_keeps_the_healed_table_and_says_so():
    total = sum(a.size for a in ADAPTERS) / 2**30
    made = control(replicas={"count": 2, "host_gib": 0.7 * total})
    made.front_says(front(members=("x", "y")))
    made.front_says(front(members=("y",)))
    made.tick()
    assert "host memory" in made.problem
    assert made.table.replicas == ("y",)
    assert len(made.table.shares) == 24


def test_an_adapter_that_no_replica_can_hold_is_named():
    with pytest.raises(PlacementError, match=r"'a3'.*replicas.max_rank or replicas.pool_gib"):
        control(replicas={"count": 2, "pool_gib": 0.05})


def test_required_replicas_rise_at_once_and_fall_late():
    clock = Clock()
    made = control(clock, serve={"max_replicas": 5, "downscale_s": 60})
    made.front_says(front(members=("x", "y")))
    assert made.required == 2
    made.front_says(front({"a0": 100_000}))
    clock.now = 10
    made.tick()
    assert made.required == 5
    assert made.table.admitted < 1
    for clock.now in (20, 30, 69):
        made.tick()
        assert made.required == 5
    for clock.now in range(80, 1000, 10):
        made.tick()
    assert made.required == 2


def test_tokens_of_answers_become_the_demand():
    made = control()
    made.front_says(front({"a1": 50}, ("x", "y"), answered=100_000, tokens=100_000 * 40))
    made._clock.now = 10
    made.tick()
    demand = {a["name"]: a["demand"] for a in made.status()["adapters"]}
    assert demand["a1"] == pytest.approx(50 * 40 / 10, rel=0.05)


def test_status_adds_up_and_is_json():
    import json

    made = control()
    made.front_says(front({"a1": 3, None: 2}, ("x", "y"), ttft=[1] * (len(TTFT_BUCKETS) + 1)))
    made.front_says(front({"a1": 1}))
    status = json.loads(json.dumps(made.status()))
    assert status["requests"]["arrived"] == 6
    assert sum(status["ttft"]["counts"]) == len(TTFT_BUCKETS) + 1
    assert sum(sum(r["bins"].values()) for r in status["replicas"]) == sum(r["placed"] for r in status["replicas"])


def test_metrics_are_prometheus_text():
    from prometheus_client.parser import text_string_to_metric_families

    from sgl_bdlora.cluster.serving.metrics import render

    made = control()
    made.front_says(front({"a1": 3}, ("x", "y"), outcomes=FrontReport().outcomes, ttft=[2] + [0] * len(TTFT_BUCKETS)))
    found = {f.name: f for f in text_string_to_metric_families(render({**made.status(), "store_bytes": 5}))}
    samples = {(s.name, tuple(s.labels.items())): s.value for f in found.values() for s in f.samples}
    assert samples["bdlora_cluster_table_version", ()] == 1
    assert samples["bdlora_cluster_adapter_requests_total", (("adapter", "a1"),)] == 3
    assert samples["bdlora_cluster_ttft_seconds_bucket", (("le", "+Inf"),)] == 2
    assert samples["bdlora_cluster_cold_loads_total", (("source", "peer"),)] == 0


def test_the_autoscaling_policy_takes_the_replicas_word():
    @dataclasses.dataclass
    class Context:
        aggregated_metrics: dict | None
        target_num_replicas: int = 3

    assert required(Context({"required": {"x": 4.0, "y": 4.0}}))[0] == 4
    assert required(Context({"required": {"x": 0.0}}))[0] == 3
    assert required(Context(None))[0] == 3


def test_routers_try_the_pick_then_holders_then_the_rest():
    pytest.importorskip("ray", reason="needs the extra: pip install 'sgl-bdlora[cluster]'")
    from sgl_bdlora.cluster.serving.router import make_view, ranked

    made = control(replicas={"count": 3})
    made.front_says(front(members=("x", "y", "z")))
    adapters = {a.name: a for a in ADAPTERS}
    view = make_view(
        ("x", "y", "z"), [("x", "a0"), ("x", "a0"), ("x", "a3"), ("gone", "a1")], {"y": 7}, {"z": ["a1"]}, adapters
    )
    assert view.requests.tolist() == [3, 7, 0]
    assert view.rows.tolist() == [8 + 64, 0, 0]
    assert view.width.tolist() == [64, 0, 0]
    assert view.holders == {"a1": {2}}
    for name in adapters:
        holders = made.table.holders(name)
        groups = ranked(made.table, made._policy, adapters[name], 10, view, 0.3)
        assert groups[0][0] in holders
        assert sorted(r for group in groups for r in group) == ["x", "y", "z"]
        assert set(groups[0] + groups[1]) == set(holders)


def test_the_router_that_serve_copies_shares_the_table_of_its_process():
    pytest.importorskip("ray", reason="needs the extra: pip install 'sgl-bdlora[cluster]'")
    from ray.serve.config import RequestRouterConfig

    from sgl_bdlora.cluster.serving import follower
    from sgl_bdlora.cluster.serving.router import TableRouter

    copied = RequestRouterConfig(request_router_class=TableRouter).get_request_router_class()
    assert copied._tell.__globals__["follower"].live is follower.live


def test_every_policy_routes_by_its_own_table():
    pytest.importorskip("ray", reason="needs the extra: pip install 'sgl-bdlora[cluster]'")
    from sgl_bdlora.cluster.serving.router import make_view, ranked

    adapters = {a.name: a for a in ADAPTERS}
    for name in NAMES:
        made = control(policy={"name": name})
        made.front_says(front(members=("x", "y")))
        view = make_view(("x", "y"), [], {}, {}, adapters)
        picked = {
            ranked(made.table, made._policy, a, 10, view, d)[0][0] for a in ADAPTERS for d in np.linspace(0, 0.99, 5)
        }
        assert picked == {"x", "y"} or name in ("toppings", "affinity"), name


class Sent:
    """What Serve gives for a request: tells when it has ended, at once where it has ended already."""

    def __init__(self, ended: bool = False):
        self._ended, self._tell = ended, []

    def add_done_callback(self, tell) -> None:
        tell(self) if self._ended else self._tell.append(tell)

    def end(self) -> None:
        for tell in self._tell:
            tell(self)


def test_a_router_knows_its_requests_until_they_end_however_short_they_are():
    pytest.importorskip("ray")
    from sgl_bdlora.cluster.serving.router import TableRouter

    router = object.__new__(TableRouter)
    router._sent = {}
    x, y = (SimpleNamespace(unique_id=name) for name in "xy")
    metadata = SimpleNamespace(internal_request_id="1", multiplexed_model_id="a0")
    request = SimpleNamespace(metadata=metadata)
    sent = Sent()
    router.on_request_routed(request, y, sent)
    # A full replica's refusal, told late, and Serve's own word of a request's end are of no account.
    router.on_request_completed(x, "1")
    router.on_request_completed(y, "1")
    assert router._sent == {("1", "y"): "a0"}
    sent.end()
    assert not router._sent
    router.on_request_routed(request, x, Sent(ended=True))
    assert not router._sent
