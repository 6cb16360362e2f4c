"""Demand, costs, traces, live policies, configuration and command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from instances import POINTS, loads, problem

from sgl_bdlora.cluster.__main__ import main
from sgl_bdlora.cluster.base import Adapter, PlacementError, Problem, Replica, View
from sgl_bdlora.cluster.config import Adapters, ConfigError, Workload, from_dict, load_config
from sgl_bdlora.cluster.costs import Costs, Load, fit, load_costs, operating_point, operating_points
from sgl_bdlora.cluster.demand import Demand
from sgl_bdlora.cluster.placement import required_replicas
from sgl_bdlora.cluster.policies import make_policy
from sgl_bdlora.cluster.routing import RoutingTable, moves
from sgl_bdlora.cluster.trace import make_adapters, make_trace, mean_lengths, zipf


def test_importing_the_cluster_imports_no_torch_sglang_or_ray():
    code = (
        "import pkgutil, importlib, sys, sgl_bdlora.cluster as c\n"
        "for m in pkgutil.iter_modules(c.__path__):\n"
        "    importlib.import_module('sgl_bdlora.cluster.' + m.name)\n"
        "print([m for m in ('torch', 'sglang', 'ray', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_demand_is_the_average_plus_the_trend():
    demand = Demand(alpha=0.3, windows=5)
    assert demand.forecast(["a"]).tolist() == [0.0]
    demand.observe({"a": 100.0}, 10)
    assert demand.forecast(["a", "b"]).tolist() == [10.0, 0.0]
    demand.observe({"a": 200.0, "b": 50.0}, 10)
    # EMA 0.7 * 10 + 0.3 * 20 = 13, slope 10; b: EMA 1.5, slope 5.
    assert demand.forecast(["a", "b"]).tolist() == pytest.approx([23.0, 6.5])
    for _ in range(200):
        demand.observe({}, 10)
    assert demand.forecast(["a", "b"]).tolist() == [0.0, 0.0]
    assert not demand._ema


def test_demand_never_falls_below_zero():
    demand = Demand(alpha=0.9)
    for tokens in (1000.0, 500.0, 0.0, 0.0):
        demand.observe({"a": tokens}, 1)
    assert demand.forecast(["a"])[0] == 0.0


def test_fit_finds_the_costs_that_made_the_rows():
    true = Costs("t", 3.0, 0.02, 0.4, 0.006, 0.0, 20.0, 0.014, 0.003, 5e-6, 0.0)
    decode = [
        {"batch": b, "rows": n * r, "width": r if n else 0, "ms": true.decode(b, n * r, r)}
        for b in (1, 4, 16, 64) for n in (0, 1, 4) for r in (8, 128)
    ]  # fmt: skip
    prefill = [
        {"tokens": t, "token_ranks": t * r, "width": r, "ms": true.prefill(t, t * r, r)}
        for t in (128, 1024, 8192) for r in (0, 8, 64)
    ]  # fmt: skip
    found = fit("t", decode, prefill, "made up")
    for row in decode:
        assert found.decode(row["batch"], row["rows"], row["width"]) == pytest.approx(row["ms"], rel=1e-6)
    assert found.prefill(2000, 2000 * 16, 16) == pytest.approx(true.prefill(2000, 2000 * 16, 16), rel=1e-4)
    assert not found.provisional
    with pytest.raises(ValueError, match="no decode rows"):
        fit("t", [], prefill, "")


def test_default_costs_give_the_measured_times_back():
    """Ten coefficients for the 30 points of benchmarks.cluster.profile: the typical point is close, one alone may be off."""
    from benchmarks.cluster.profiled import estimate
    from benchmarks.record import RESULTS, read_rows

    costs, rows = load_costs("bdlora"), read_rows(RESULTS / "profile-h200-ours.jsonl")
    for kind, typical, most in (("decode", 0.05, 0.2), ("prefill", 0.1, 0.35)):
        off = [abs(estimate(costs, row) / row["ms"] - 1) for row in rows if row["kind"] == kind]
        assert np.median(off) < typical
        assert max(off) < most
    assert not costs.provisional
    assert rows[0]["run"] in costs.provenance


def test_operating_points_fall_with_rank_and_with_the_slo():
    costs = load_costs("bdlora")
    points = operating_points(costs, (8, 64, 128), 30.0)
    assert points[8] > points[64] > points[128] > 0
    assert operating_point(costs, 128, 6.5, Load()) <= points[128]
    with pytest.raises(ValueError, match=r"slo.tpot_ms = 3.0 cannot be held"):
        operating_point(costs, 8, 3.0, Load())


def test_costs_are_checked(tmp_path):
    with pytest.raises(ValueError, match="neither one of"):
        load_costs("nothing")
    path = tmp_path / "costs.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="has to be an object with"):
        load_costs(str(path))
    with pytest.raises(ValueError, match="row_ms"):
        Costs("x", 1, 0, 0, -1, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("s", [0.0, 0.8, 1.2])
def test_popularity_is_zipf(s):
    spec = Workload(rate=2000.0, duration_s=100.0, zipf=s)
    counts = np.sort(np.bincount(make_trace(spec, 50).adapter, minlength=50))[::-1]
    expected = zipf(50, s) * counts.sum()
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected.max())
    assert counts[0] / counts[9] == pytest.approx(10**s, rel=0.12)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_arrivals_are_gamma(cv):
    gaps = np.diff(make_trace(Workload(rate=100.0, duration_s=2000.0, cv=cv), 5).arrival)
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_drift_rotates_and_a_crowd_comes_and_goes():
    spec = Workload(rate=1000.0, duration_s=90.0, zipf=1.2, rotate_s=30.0, rotate_by=0.1)
    trace = make_trace(spec, 100)
    top = [np.bincount(trace.adapter[(trace.arrival // 30) == k]).argmax() for k in range(3)]
    assert len(set(top)) == 3
    crowd = make_trace(
        Workload(rate=1000.0, duration_s=90.0, zipf=1.2, flash_x=10.0, flash_s=30.0, flash_for_s=30.0), 100
    )
    share = [np.bincount(crowd.adapter[(crowd.arrival // 30) == k], minlength=100) / 30_000 for k in range(3)]
    cold = (share[1] - share[0]).argmax()
    assert share[0][cold] < 0.005
    assert share[1][cold] == pytest.approx(10 / 110, rel=0.1)
    assert share[2][cold] < 0.005


def test_diurnal_rate_rises_and_falls_around_its_mean():
    spec = Workload(rate=500.0, duration_s=600.0, diurnal=0.5, diurnal_s=600.0)
    times = make_trace(spec, 3).arrival
    assert len(times) == pytest.approx(300_000, rel=0.02)
    up, down = ((times >= t) & (times < t + 60) for t in (120, 420))
    assert up.sum() / down.sum() == pytest.approx(1.48 / 0.52, rel=0.05)


def test_lengths_have_the_medians_asked_for():
    trace = make_trace(Workload(rate=1000.0, duration_s=50.0), 3)
    assert np.median(trace.prompt) == pytest.approx(1020, rel=0.02)
    assert np.median(trace.output) == pytest.approx(129, rel=0.04)
    assert mean_lengths(Workload())[0] == pytest.approx(trace.prompt.mean(), rel=0.03)
    assert trace.output.min() >= 1


def test_rank_mix_is_as_asked_for():
    made = make_adapters(Adapters(200, {8: 0.9, 128: 0.1}))
    assert [sum(a.rank == r for a in made) for r in (8, 128)] == [180, 20]
    assert made[0].size == made[0].rank * 5 * 2**20


def view(requests, holders=None, alive=None):
    n = len(requests)
    made = View.empty(tuple(f"r{i}" for i in range(n)))
    made.requests[:] = requests
    made.holders.update(holders or {})
    if alive is not None:
        made.alive[:] = alive
    return made


def test_affinity_prefers_who_has_it_and_passes_over_the_full_and_the_dead():
    p = problem(0, 3, 4)
    policy = make_policy("affinity", load_costs("bdlora"), 30.0, 200.0, 8)
    table, a = policy.plan(p, None), p.adapters[0]
    pick = lambda v: {policy.pick(a, 100, table, v, d / 20) for d in range(20)}  # noqa: E731
    assert pick(view([5, 9, 0, 0], {"a0": {0, 1}})) == {"r0"}
    assert pick(view([16, 9, 0, 0], {"a0": {0, 1}})) == {"r1"}
    assert pick(view([5, 9, 3, 3], {"a0": {0, 1}}, [False, False, True, False])) == {"r2"}
    everywhere = view([0, 0, 0, 0])
    everywhere.loaded[:] = [2, 1, 2, 2]
    assert pick(everywhere) == {"r1"}


def test_toppings_takes_the_least_cost_and_none_beyond_the_slo():
    p = problem(0, 3, 3)
    costs = Costs("t", 10.0, 1.0, 0.0, 0.1, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0)
    policy = make_policy("toppings", costs, 30.0, 100.0, 64)
    table, a = policy.plan(p, None), Adapter("a0", 64, 1)
    # Equal queues: who has the adapter adds no rank rows.
    assert policy.pick(a, 100, table, view([4, 4, 4], {"a0": {1}}), 0.9) == "r1"
    # 6.4 + 1 ms more for 2 requests is more than 1 ms more for 5, by 14.9 to 5.25.
    assert policy.pick(a, 100, table, view([2, 5, 9], {"a0": {1}}), 0.0) == "r1"
    # 10 + 25 ms would exceed 30.
    assert policy.pick(a, 100, table, view([24, 5, 24], {"a0": {0, 2}}), 0.5) == "r1"
    assert policy.pick(a, 100, table, view([0, 5, 0], None, [False, True, False]), 0.0) == "r1"


def test_spilling_leaves_a_long_queue_for_a_much_shorter_one():
    p = problem(0, 1, 3)
    policy = make_policy("rank-spill", load_costs("bdlora"), 30.0, 200.0, 64)
    table, a = policy.plan(p, None), p.adapters[0]
    table = type(table)(1, table.replicas, {"a0": (("r0", 1.0),)})
    assert policy.pick(a, 100, table, view([15, 0, 0]), 0.5) == "r0"
    assert policy.pick(a, 100, table, view([40, 30, 25]), 0.5) == "r0"
    assert policy.pick(a, 100, table, view([40, 19, 3], {"a0": {0, 1}}), 0.5) == "r1"
    assert policy.pick(a, 100, table, view([40, 30, 3], {"a0": {0, 1}}), 0.5) == "r2"
    assert policy.pick(a, 100, table, view([0, 30, 3], None, [False, True, True]), 0.5) == "r2"


def test_a_table_is_healed():
    """What is admitted stays, parts go to the other holders in proportion, and each orphan to whoever has the fewest then."""
    shares = {
        "split": (("r0", 0.5), ("r1", 0.3), ("r2", 0.2)),
        "other": (("r1", 1.0),),
        "y": (("r0", 1.0),),
        "x": (("r0", 1.0),),
    }
    table = RoutingTable(7, ("r0", "r1", "r2", "r3"), shares, admitted=0.5)
    healed = table.without(["r0"])
    assert (healed.version, healed.replicas, healed.admitted) == (8, ("r1", "r2", "r3"), 0.5)
    assert [name for name, _ in healed.shares["split"]] == ["r1", "r2"]
    assert [part for _, part in healed.shares["split"]] == pytest.approx([0.6, 0.4])
    # r1 has two, r2 one, r3 none: x goes to r3, y to the first of two that have one.
    assert (healed.shares["x"], healed.shares["y"]) == ((("r3", 1.0),), (("r2", 1.0),))
    assert healed.sheds(0.5)
    assert not healed.sheds(0.49)


def test_other_holders_are_tried_by_their_parts():
    table = RoutingTable(1, ("r0", "r1", "r2", "r3"), {"a": (("r0", 0.5), ("r1", 0.1), ("r2", 0.4))})
    assert table.ranked("a", 0.2) == [["r0"], ["r2", "r1"], ["r3"]]
    assert table.ranked("a", 0.55) == [["r1"], ["r0", "r2"], ["r3"]]


def test_new_pairs_are_moves_but_not_those_of_new_adapters():
    before = RoutingTable(1, ("r0", "r1"), {"a": (("r0", 1.0),)})
    after = RoutingTable(2, ("r0", "r1"), {"a": (("r0", 0.5), ("r1", 0.5)), "new": (("r1", 1.0),)})
    assert moves(before, after) == {("a", "r1")}
    assert moves(None, after) == set()


@pytest.mark.parametrize("seed", range(3))
def test_balanced_spreads_load_and_bytes(seed):
    """Their sum within a few percent; what one of them is off by, the other makes up for."""
    p = problem(seed, 60, 4, cold=0.5)
    table = make_policy("balanced", load_costs("bdlora"), 30.0, 200.0, 64).plan(p, None)
    load = loads(p, table)
    size = np.array([sum(a.size for a in p.adapters if r.name in table.holders(a.name)) for r in p.replicas])
    load, size = load / load.mean(), size / size.mean()
    assert (load + size).max() / 2 < 1.05
    assert size.max() < 1.4
    assert load.max() < 1.4


def test_an_adapter_that_no_replica_can_hold_is_named():
    servers = (Replica("r0", 2**30, 2**33, 64),)
    for adapter, words in ((Adapter("wide", 128, 2**20), "rank 128"), (Adapter("fat", 8, 2**31), "2048 MiB")):
        p = Problem((adapter,), servers, np.ones(1), POINTS)
        for name in ("rank-packing", "balanced", "random", "contiguous", "affinity", "hrw-ema", "toppings"):
            with pytest.raises(
                PlacementError, match=f"'{adapter.name}'.*{words}.*replicas.max_rank or replicas.pool_gib"
            ):
                make_policy(name, load_costs("bdlora"), 30.0, 200.0, 64).plan(p, None)
    crowd = tuple(Adapter(f"a{i}", 8, 2**30) for i in range(9))
    with pytest.raises(PlacementError, match=r"no room in host memory.*replicas.host_gib or replicas.count"):
        make_policy("rank-packing", load_costs("bdlora"), 30.0, 200.0, 64).plan(
            Problem(crowd, servers, np.ones(9), POINTS), None
        )
    with pytest.raises(PlacementError, match="no replica"):
        Problem((), (), np.zeros(0), POINTS)


def test_required_replicas_for_load_and_for_memory():
    p = problem(1, 30, 4, load=0.7)
    assert required_replicas(p) == 3
    assert required_replicas(p, headroom=0.3) == 4
    assert required_replicas(problem(1, 30, 4, cold=1.0)) == 1
    tight = Problem(p.adapters, (Replica("r0", 2**30, 2**30, 128),), np.zeros(30), POINTS)
    assert required_replicas(tight) == np.ceil(sum(a.size for a in p.adapters) / 2**30)


@pytest.mark.parametrize(("data", "words"), [
    ({"replicas": {"count": 0}}, r"replicas.count = 0 has to be at least 1"),
    ({"replicas": {"count": 2.5}}, r"replicas.count = 2.5 has to be a whole number"),
    ({"replicas": {"count": True}}, r"replicas.count = True has to be a whole number"),
    ({"replicas": {"size": 3}}, r"replicas.size = 3: there is no such field; known ones: count"),
    ({"replicas": [1]}, r"replicas has to be a mapping"),
    ({"slo": {"ttft_ms": -1}}, r"slo.ttft_ms = -1.0 has to be above 0"),
    ({"slo": {"attainment": 99}}, r"slo.attainment = 99.0 has to be at most 1"),
    ({"workload": {"rate": float("nan")}}, r"workload.rate = nan has to be a finite number"),
    ({"workload": {"warmup_s": 120}}, r"workload.warmup_s = 120 has to be below workload.duration_s = 120"),
    ({"policy": {"name": "best"}}, r"policy.name = 'best' is not one of rank-packing"),
    ({"adapters": {"ranks": {0: 1}}}, r"adapters.ranks\[0\] = 1.0: ranks are at least 1"),
    ({"adapters": {"ranks": {8: 0}}}, r"at least one part"),
    ({"adapters": {"ranks": []}}, r"adapters.ranks = \[\] has to map"),
    ({"failures": [{"replica": 9, "at_s": 1}]}, r"failures\[0\].replica = 9: there are replicas 0 to 7"),
    ({"failures": [{"replica": 1}]}, r"failures\[0\].at_s is missing"),
    ([], r"the file has to be a mapping"),
])  # fmt: skip
def test_a_bad_configuration_is_named(data, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(data)


def test_configuration_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("adapters: {ranks: {8: 0.9, 128: 0.1}}\nfailures: [{replica: 1, at_s: 3}]\ncosts: padded\n")
    config = load_config(path)
    assert (config.adapters.ranks, config.failures[0].at_s, config.costs) == ({8: 0.9, 128: 0.1}, 3.0, "padded")
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_command_line(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    settings = "replicas: {count: 2}\nadapters: {count: 10}\nworkload: {rate: 10, duration_s: 10, warmup_s: 2}\n"
    path.write_text(settings + "costs: padded\n")
    rows = tmp_path / "rows.jsonl"
    assert main(["simulate", "--config", str(path), "--json", "--output", str(rows)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(rows.read_text())
    assert (
        main(["simulate", "--config", str(path), "--policy", "random", "toppings", "--plot", str(tmp_path / "p.png")])
        == 0
    )
    out = capsys.readouterr().out
    assert "toppings" in out
    assert "provisional" in out
    assert (tmp_path / "p.png").stat().st_size > 10_000
    path.write_text(settings + "slo: {tpot_ms: 60}\n")
    assert main(["plan", "--config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == 2
    path.write_text("replicas: {count: 2}\nworkload: {rate: 200, duration_s: 10, warmup_s: 2}\n")
    assert main(["plan", "--config", str(path), "--max-replicas", "2"]) == 1
    path.write_text("replicas: {max_rank: 64}\n")
    assert main(["simulate", "--config", str(path)]) == 2
    assert "rank 128" in capsys.readouterr().err
