"""What the cluster's benchmarks make of their rows, without servers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cluster.client import NOT_ANSWERED, Sent
from benchmarks.cluster.compared import against_simulator, point, table
from benchmarks.cluster.plot import draw_policies
from benchmarks.cluster.points import ADAPTERS, DECODE, PAIRS, PREFILL
from benchmarks.cluster.profile import PREFILL_TOKENS, RUNNING
from benchmarks.cluster.profiled import FRONT_MS, PROFILE_CONTEXT, report, write_defaults
from benchmarks.latency.mixes import mix
from sgl_bdlora.cluster.config import from_dict
from sgl_bdlora.cluster.costs import DEFAULTS, Costs, load_costs
from sgl_bdlora.cluster.trace import make_trace

TRUE = Costs("bdlora", 5.0, 0.02, 0.4, 0.005, 0.0, 20.0, 0.014, 0.003, 1e-5, 0.0)


def test_points_fit_the_server_that_measures_them():
    for at in (*DECODE, *PREFILL):
        named = {rank: at.chosen.ranks.count(rank) for rank in set(at.chosen.ranks)}
        assert all(count <= ADAPTERS[rank] for rank, count in named.items()), at
        assert len(at.chosen.ranks) <= at.batch <= RUNNING
        assert at.batch * at.prompt <= PREFILL_TOKENS
    assert len({(at.chosen, at.batch) for at in DECODE}) == len(DECODE)
    for pair in PAIRS:
        assert sum(mix(pair.mixed[0]).ranks) == sum(mix(pair.uniform[0]).ranks)


def rows_of(costs: Costs, arm: str) -> list[dict]:
    made = []
    for kind, points in (("decode", DECODE), ("prefill", PREFILL)):
        for at in points:
            ranks = [at.chosen.ranks[i % len(at.chosen.ranks)] for i in range(at.batch)] if at.chosen.ranks else [0]
            row = {
                "kind": kind, "arm": arm, "mix": at.chosen.text, "batch": at.batch, "rows": sum(at.chosen.ranks), "width": max(ranks),
                "tokens": at.batch * at.prompt, "token_ranks": at.prompt * sum(ranks), "gpu": None, "tp": 1, "model": "m", "layers": 2,
                "run": "now", "commit": "abc",
            }  # fmt: skip
            if kind == "decode":
                ms = costs.decode(row["batch"], row["rows"], row["width"])
            else:
                ms = costs.prefill(row["tokens"], row["token_ranks"], row["width"])
            made.append({**row, "ms": float(ms)})
    return made


def test_a_profile_gives_back_the_costs_that_made_it(tmp_path, capsys):
    padded = Costs("csgmv", 5.0, 0.02, 0.4, 0.0, 0.0007, 20.0, 0.014, 0.0, 0.0, 2e-5)
    report(rows_of(TRUE, "ours") + rows_of(padded, "stock"), tmp_path / "rows.jsonl")
    said = capsys.readouterr().out
    for arm, true in (("ours", TRUE), ("stock", padded)):
        found = load_costs(str(tmp_path / f"rows-{arm}-costs.json"))
        assert found.name == true.name
        assert not found.provisional
        for row in rows_of(true, arm):
            if row["kind"] == "decode":
                assert found.decode(row["batch"], row["rows"], row["width"]) == pytest.approx(row["ms"], rel=1e-3)
            else:
                assert found.prefill(row["tokens"], row["token_ranks"], row["width"]) == pytest.approx(
                    row["ms"], rel=1e-3
                )
    ours, stock = said.split("stock: ")
    assert "8x8+128x1 at batch 24 6.840 ms, 8x24 at batch 24 6.840 ms: 1.000x, within 1.05x" in ours
    assert "beyond 1.05x" in stock


def test_measured_models_become_the_defaults(tmp_path, monkeypatch):
    file = tmp_path / "default_costs.json"
    file.write_text(DEFAULTS.read_text())
    write_defaults([TRUE, replace(TRUE, name="csgmv", provisional=False)], file)
    monkeypatch.setattr("sgl_bdlora.cluster.costs.DEFAULTS", file)
    ours, padded, without, served = (load_costs(name) for name in ("bdlora", "padded", "no-lora", "bdlora-served"))
    assert ours == TRUE
    assert load_costs("csgmv").decode_ms == TRUE.decode_ms
    assert padded.provisional
    assert padded.decode(32, 64, 16) == pytest.approx(ours.decode(32, 64, 16))
    assert padded.prefill(1000, 16000, 16) == pytest.approx(ours.prefill(1000, 16000, 16))
    assert without.decode(32, 64, 16) == pytest.approx(ours.decode(32, 0, 0))
    # One short request through a server takes what it took in the profile, and the front.
    assert served.decode(1, 16, 16, PROFILE_CONTEXT) == pytest.approx(ours.decode(1, 16, 16))
    assert served.prefill(128, 2048, 16) + served.outside_ms == pytest.approx(ours.prefill(128, 2048, 16) + FRONT_MS)


def test_a_point_counts_what_was_not_answered(tmp_path):
    workload = {"rate": 12, "duration_s": 5, "warmup_s": 1, "prompt_median": 50, "output_median": 8}
    config = from_dict({"slo": {"ttft_ms": 100, "tpot_ms": 20}, "workload": workload})
    trace = make_trace(config.workload, 4)
    sent = [Sent(0.05, 0.01, True) for _ in range(len(trace))]
    late = int(np.searchsorted(trace.arrival, 1.0))
    sent[0], sent[late], sent[late + 1], sent[late + 2] = (
        NOT_ANSWERED,
        NOT_ANSWERED,
        Sent(0.2, 0.01, True),
        Sent(0.05, 0.03, True),
    )
    row = point(sent, config, 4)
    counted = len(trace) - late
    assert (row["requests"], row["sent"], row["lost"]) == (counted, len(trace), 2)
    assert row["attainment"] == pytest.approx(1 - 3 / counted)
    assert row["goodput_req_s"] == pytest.approx((counted - 3) / 4)
    assert row["ttft_p50_ms"] == pytest.approx(50)
    assert row["ttft_p99_ms"] == pytest.approx(200)

    adapters = [{"name": f"a{i}", "rank": 8, "size": 2**20} for i in range(4)]
    more = {"kind": "point", "rate": 12.0, "cold_loads": {"disk": 1, "peer": 2}, "bytes_moved": 2**31, **row}
    rows = [
        {"kind": "setup", "settings": {"workload": workload}, "adapters": adapters},
        {**more, "policy": "random"},
        {**more, "policy": "toppings"},
    ]
    lines = against_simulator(json.loads(json.dumps(rows)), "bdlora").splitlines()
    assert [line.split("|")[2].strip() for line in lines[-2:]] == ["random", "toppings"]
    assert "1, 2 | 2.0 | 2 of" in table(rows[1:]).splitlines()[-1]

    pytest.importorskip("matplotlib")
    settings = {"slo": {"ttft_ms": 100}, "replicas": {"count": 2}}
    setup = {**rows[0], "settings": settings, "model": "m", "gpu": None}
    draw_policies([setup, *rows[1:], {**rows[1], "rate": 24.0, "ttft_p99_ms": None}], tmp_path / "policies.png")
    assert (tmp_path / "policies.png").read_bytes().startswith(b"\x89PNG")
