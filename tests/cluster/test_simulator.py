"""The simulator against closed forms, and what has to hold whatever the workload."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgl_bdlora.cluster.base import PlacementError
from sgl_bdlora.cluster.config import Failure, from_dict
from sgl_bdlora.cluster.costs import load_costs
from sgl_bdlora.cluster.policies import NAMES
from sgl_bdlora.cluster.report import row_of
from sgl_bdlora.cluster.simulate import Simulation, simulate
from sgl_bdlora.cluster.sizing import highest_rate, keeps_slo, needed_replicas
from sgl_bdlora.cluster.trace import Trace

FIXED = {"prompt_sigma": 0.0, "output_sigma": 0.0, "prompt_median": 512.0, "output_median": 32.0}


def config(**sections):
    return from_dict(sections)


def one_server(rate, **workload):
    return config(
        replicas={"count": 1, "max_running": 1, "max_rank": 16}, adapters={"count": 1, "ranks": {16: 1.0}},
        workload={"rate": rate, **FIXED, **workload},
    )  # fmt: skip


def service(costs, rank=16, prompt=512, output=32):
    prefill = costs.prefill(prompt, prompt * rank, rank) / 1000
    return prefill, prefill + (output - 1) * costs.decode(1, rank, rank) / 1000


def test_one_request_takes_exactly_its_prefill_and_decode_steps():
    c = one_server(1.0)
    trace = Trace(np.array([1.0]), np.array([0]), np.array([512]), np.array([32]))
    result = simulate(c, trace=trace)
    prefill, whole = service(load_costs("bdlora"))
    assert result.first[0] == pytest.approx(1 + prefill)
    assert result.finish[0] == pytest.approx(1 + whole)


@pytest.mark.parametrize("use", [0.3, 0.7])
def test_mean_wait_of_an_m_d_1_queue(use):
    prefill, whole = service(load_costs("bdlora"))
    result = simulate(one_server(use / whole, duration_s=6000.0, warmup_s=100.0))
    expected = use * whole / (2 * (1 - use))
    wait = result.ttft_ms().mean() / 1000 - prefill
    assert wait == pytest.approx(expected, rel=0.08)


def test_busy_time_is_the_work_done():
    _, whole = service(load_costs("bdlora"))
    result = simulate(one_server(1.0))
    assert result.busy_s.sum() == pytest.approx(len(result.trace) * whole)


def test_a_full_batch_shares_its_steps():
    c = config(
        replicas={"count": 1, "max_running": 8, "prefill_tokens": 8192}, adapters={"count": 1, "ranks": {16: 1.0}},
    )  # fmt: skip
    trace = Trace(np.zeros(8), np.zeros(8, dtype=int), np.full(8, 100), np.full(8, 51))
    result = simulate(c, trace=trace)
    costs = load_costs("bdlora")
    # The first request finds an idle replica and is prefilled alone, the others together after it.
    alone, rest = costs.prefill(100, 1600, 16) / 1000, costs.prefill(700, 7 * 1600, 16) / 1000
    assert np.sort(result.first)[[0, 1]] == pytest.approx([alone, alone + rest])
    assert result.finish.max() == pytest.approx(alone + rest + 50 * costs.decode(8, 16, 16) / 1000)


def test_little_s_law():
    """Requests in the system, counted at moments that do not depend on them, are the rate times the mean time in it."""
    c = config(
        replicas={"count": 4, "pool_gib": 2.0}, adapters={"count": 40},
        workload={"rate": 30.0, "duration_s": 400.0}, policy={"period_s": 0.5},
    )  # fmt: skip
    seen = []
    sim = Simulation(c, lambda now: seen.append(int(sim._view.requests.sum())))
    result = sim.run()
    time_in = (result.finish - result.trace.arrival).mean()
    assert np.mean(seen) == pytest.approx(len(result.trace) / 400 * time_in, rel=0.05)


CASES = st.fixed_dictionaries({
    "policy": st.fixed_dictionaries({
        "name": st.sampled_from(NAMES), "period_s": st.sampled_from([1.0, 5.0]), "shed": st.booleans(), "max_moves": st.integers(0, 10),
    }),
    "replicas": st.fixed_dictionaries({
        "count": st.integers(1, 4), "pool_gib": st.sampled_from([0.625, 1.3, 8.0]), "host_gib": st.sampled_from([10.0, 100.0]),
        "max_running": st.sampled_from([1, 3, 64]), "prefill_tokens": st.sampled_from([1, 8192]), "ahead": st.booleans(),
        "install_s_per_gb": st.sampled_from([0.0, 2.0]),
    }),
    "adapters": st.fixed_dictionaries({"count": st.integers(1, 30)}),
    "workload": st.fixed_dictionaries({
        "rate": st.sampled_from([2.0, 30.0, 120.0]), "duration_s": st.just(10.0), "warmup_s": st.just(0.0),
        "cv": st.sampled_from([0.5, 4.0]), "rotate_s": st.sampled_from([0.0, 3.0]), "flash_x": st.sampled_from([0.0, 10.0]),
        "flash_s": st.just(4.0), "seed": st.integers(0, 100),
    }),
    "failures": st.lists(st.fixed_dictionaries({
        "replica": st.just(0), "at_s": st.floats(0, 12), "back_s": st.floats(0.1, 5),
    }), max_size=2),
})  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=CASES)
def test_requests_are_conserved(case):
    try:
        c = from_dict(case)
        pools = []
        sim = Simulation(c, lambda now: pools.extend((r._pool_used, r.pool_bytes) for r in sim._replicas))
        result = sim.run()
    except PlacementError:
        assert case["replicas"]["host_gib"] == 10.0
        return
    finished = result.finished
    assert len(result.trace) == finished.sum() + result.shed + result.failed + result.unfinished
    assert result.unfinished >= 0
    assert (result.first[finished] > result.trace.arrival[finished]).all()
    assert (result.finish[finished] >= result.first[finished]).all()
    assert all(0 <= used <= room for used, room in pools)
    # One token more takes at least one step.
    steps = (result.trace.output - 1)[finished] * load_costs("bdlora").decode_ms / 1000
    assert (result.finish[finished] - result.first[finished] >= steps - 1e-9).all()
    assert result.most_moves <= c.policy.max_moves or (c.failures and c.policy.name in ("random", "contiguous"))
    if result.unfinished == 0:
        assert sim._view.requests.sum() == 0
        assert sim._view.rows.sum() == 0
    if not c.failures and not c.policy.shed:
        assert result.shed == result.failed == 0


def test_the_same_seed_gives_the_same_result():
    c = config(workload={"rate": 40.0, "duration_s": 30.0, "cv": 4.0, "rotate_s": 10.0})
    a, b = simulate(c), simulate(c)
    assert np.array_equal(a.finish, b.finish)
    assert not np.array_equal(a.finish[:50], simulate(c.with_(workload={"seed": 1})).finish[:50])


def test_more_adapters_than_the_pool_takes_take_turns_and_all_finish():
    c = config(
        replicas={"count": 1, "pool_gib": 0.65}, adapters={"count": 4, "ranks": {128: 1.0}},
        workload={"rate": 4.0, "duration_s": 60.0, "zipf": 0.0, "cv": 1.0},
    )  # fmt: skip
    result = simulate(c)
    assert result.unfinished == 0
    assert result.loads["host"] > 10
    roomy = simulate(c.with_(replicas={"pool_gib": 4.0}))
    assert roomy.loads == {"host": 0, "peer": 0, "disk": 0}
    assert np.median(roomy.ttft_ms()) < np.median(result.ttft_ms())


@pytest.mark.parametrize(("ahead", "waits"), [(False, 3), (True, 4)])
def test_a_request_joins_at_the_end_of_the_step_that_runs_or_of_the_one_that_is_ready_to(ahead, waits):
    costs = load_costs("bdlora")
    step = costs.decode(1, 16, 16) / 1000
    alone = costs.prefill(100, 1600, 16) / 1000
    trace = Trace(np.array([0.0, alone + 2.5 * step]), np.zeros(2, dtype=int), np.full(2, 100), np.full(2, 20))
    c = config(replicas={"count": 1, "ahead": ahead}, adapters={"count": 1, "ranks": {16: 1.0}})
    assert simulate(c, trace=trace).first == pytest.approx([alone, 2 * alone + waits * step])


def test_what_comes_during_a_prefill_waits_for_the_batch_that_was_put_together_before_it():
    costs = load_costs("bdlora")
    step, alone = costs.decode(1, 16, 16) / 1000, costs.prefill(100, 1600, 16) / 1000
    arrival = np.array([0.0, alone + 0.5 * step, 2 * alone + 1.5 * step])
    trace = Trace(arrival, np.zeros(3, dtype=int), np.full(3, 100), np.array([20, 20, 20]))
    one, two = (
        simulate(config(replicas={"count": 1, "ahead": ahead}, adapters={"count": 1, "ranks": {16: 1.0}}), trace=trace).first
        for ahead in (False, True)
    )  # fmt: skip
    # The third comes while two decode, or while the second is prefilled: then a step of both comes before it.
    both = costs.decode(2, 16, 16) / 1000
    assert one == pytest.approx([alone, 2 * alone + step, 3 * alone + step + both])
    assert two == pytest.approx([alone, 2 * alone + 2 * step, 3 * alone + 2 * step + both])


def test_an_adapter_is_installed_between_two_steps_while_all_wait():
    costs = load_costs("bdlora")
    replicas = {"count": 1, "pcie_gb_s": 1e9, "disk_gb_s": 1e9}
    c = config(replicas=replicas, adapters={"count": 2, "ranks": {16: 1.0}, "mib_per_rank": 1.0})
    trace = Trace(np.array([1.0, 1.5]), np.array([0, 1]), np.full(2, 100), np.array([201, 1]))
    quick = simulate(c, trace=trace, anew=True)
    slow = simulate(c.with_(replicas={"install_s": 0.2, "install_s_per_gb": 3.0}), trace=trace, anew=True)
    install, prefill = 0.2 + 3.0 * 16 * 2**20 / 1e9, costs.prefill(100, 1600, 16) / 1000
    assert slow.loads == quick.loads == {"host": 0, "peer": 0, "disk": 2}
    assert slow.first[0] - quick.first[0] == pytest.approx(install)
    # The second adapter comes while the first request decodes.
    assert quick.finish[0] == pytest.approx(1 + 2 * prefill + 200 * costs.decode(1, 16, 16) / 1000)
    assert slow.finish[0] == pytest.approx(quick.finish[0] + 2 * install)
    assert slow.busy_s[0] == pytest.approx(quick.busy_s[0] + 2 * install)


def test_context_lengthens_steps_and_what_is_outside_delays_answers_and_holds_up_nobody(tmp_path):
    costs = replace(load_costs("bdlora"), context_ms=0.01, outside_ms=40.0)
    (tmp_path / "costs.json").write_text(json.dumps(asdict(costs)))
    c = config(replicas={"count": 1}, adapters={"count": 1, "ranks": {16: 1.0}}, costs=str(tmp_path / "costs.json"))
    trace = Trace(np.array([1.0, 30.0]), np.zeros(2, dtype=int), np.full(2, 500), np.array([33, 1]))
    result = simulate(c, trace=trace)
    prefill = costs.prefill(500, 8000, 16) / 1000
    assert result.first == pytest.approx([1.04 + prefill, 30.04 + prefill])
    steps = sum(costs.decode(1, 16, 16, context) for context in range(501, 533)) / 1000
    assert result.finish[0] - result.first[0] == pytest.approx(steps, rel=1e-3)
    assert result.busy_s.sum() == pytest.approx(2 * prefill + steps, rel=1e-3)


def test_a_hash_of_other_names_puts_adapters_elsewhere():
    c = config(policy={"name": "hrw-ema"}, replicas={"count": 2}, adapters={"count": 12}, workload={"duration_s": 21.0})
    served = {names: tuple(simulate(c, names=names, anew=True).served) for names in (("r0", "r1"), ("x", "y"))}
    assert len(set(served.values())) == 2
    assert served["r0", "r1"] == tuple(simulate(c, anew=True).served)


def test_an_adapter_always_in_use_does_not_starve_another():
    c = config(
        replicas={"count": 1, "pool_gib": 0.65}, adapters={"count": 2, "ranks": {128: 1.0}},
        workload={"rate": 6.0, "duration_s": 60.0, "zipf": 0.0, "output_median": 400.0, "output_sigma": 0.1},
    )  # fmt: skip
    result = simulate(c)
    assert result.unfinished == 0
    # A turn lasts about as long as a request (3 s); without turns the wait would be as long as the load (60 s).
    assert result.ttft_ms().max() < 12_000


def test_a_dead_replica_loses_only_what_had_begun_to_answer():
    c = config(
        replicas={"count": 3}, workload={"rate": 24.0, "duration_s": 40.0}, failures=[{"replica": 1, "at_s": 20.0}]
    )
    result = simulate(c)
    begun = (result.first >= 0) & ~result.finished
    assert result.failed == begun.sum() > 0
    assert result.unfinished == 0
    # Nothing is sent to it afterwards: it comes back after the end.
    assert c.failures == (Failure(1, 20.0, 60.0),)
    whole = simulate(c.with_(failures=()))
    assert result.served[1] < whole.served[1]


def test_demand_beyond_capacity_is_shed_and_the_rest_keeps_the_slo():
    over = config(replicas={"count": 4}, workload={"rate": 90.0, "duration_s": 60.0}, policy={"name": "rank-spill"})
    shed = simulate(over.with_(policy={"shed": True}))
    open_door = simulate(over)
    assert shed.shed > 0 == open_door.shed
    served = shed.ttft_ms()[np.isfinite(shed.ttft_ms())]
    assert np.percentile(served, 95) < 1000 < np.percentile(open_door.ttft_ms(), 95, method="higher")


def test_sizing_finds_the_fewest_replicas():
    c = config(workload={"rate": 20.0, "duration_s": 30.0, "warmup_s": 5.0}, policy={"name": "rank-spill"})
    count, results = needed_replicas(c, 16)
    assert keeps_slo(results[count])
    assert not keeps_slo(results[count - 1])
    assert needed_replicas(c.with_(workload={"rate": 100.0}), 2)[0] is None
    # A failure of a replica that a try does not have is none.
    assert needed_replicas(c.with_(replicas={"count": 8}, failures=(Failure(7, 1.0, 1.0),)), 8)[0] == count
    # What a deployment may grow to does not bound the search.
    c = c.with_(replicas={"count": 1}, serve={"max_replicas": 1})
    assert needed_replicas(c, 16)[0] == count


def test_highest_rate_keeps_the_slo_and_a_little_more_does_not():
    c = config(replicas={"count": 2}, adapters={"count": 20}, workload={"duration_s": 30.0, "warmup_s": 5.0})
    rate, results = highest_rate(c, 4.0, 60.0, 7)
    tried = {r.config.workload.rate: keeps_slo(r) for r in results}
    assert tried[rate]
    assert min(r for r, kept in tried.items() if not kept) - rate <= 2.0


def test_a_row_is_flat_json_without_infinity():
    result = simulate(config(replicas={"count": 1}, workload={"rate": 200.0, "duration_s": 21.0, "warmup_s": 20.0}))
    row = row_of(result)
    assert row["ttft_p99_ms"] is None or row["ttft_p99_ms"] < float("inf")
    assert row["provisional"] is False
    assert (
        row_of(simulate(config(costs="padded", workload={"duration_s": 21.0, "warmup_s": 20.0})))["provisional"] is True
    )
    assert row["arrived"] == row["finished"] + row["shed"] + row["failed"] + row["unfinished"]
