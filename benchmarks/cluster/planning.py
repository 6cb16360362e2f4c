"""How long planning takes: a first plan, one after drift, and one after a replica died.

python -m benchmarks.cluster.planning [--adapters 2000] [--replicas 64]
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, Rows
from sgl_bdlora.cluster.base import Problem
from sgl_bdlora.cluster.config import from_dict
from sgl_bdlora.cluster.costs import load_costs
from sgl_bdlora.cluster.policies import NAMES
from sgl_bdlora.cluster.routing import moves
from sgl_bdlora.cluster.simulate import cluster_of, points_of, policy_of
from sgl_bdlora.cluster.trace import make_adapters, zipf


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster.planning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "cluster-planning.jsonl")
    args = parser.parse_args()
    config = from_dict({"replicas": {"count": args.replicas}, "adapters": {"count": args.adapters}})
    costs = load_costs(config.costs)
    points, adapters = points_of(config, costs), make_adapters(config.adapters)
    args.output.unlink(missing_ok=True)
    rows = Rows(args.output, benchmark="cluster-planning")
    for name in NAMES:
        policy = policy_of(config.with_(policy={"name": name}), costs)
        times = {"first": [], "after drift": [], "after a death": []}
        moved = []
        for seed in range(args.repeats):
            rng = np.random.default_rng(seed)
            demand = rng.permutation(zipf(args.adapters, 0.8))
            demand *= 0.7 * args.replicas * np.mean(list(points.values()))
            problem = Problem(adapters, cluster_of(config), demand, points)
            drifted = dataclasses.replace(problem, demand=np.roll(demand, args.adapters // 5))
            table = None
            for step, given in (
                ("first", problem), ("after drift", drifted),
                ("after a death", dataclasses.replace(drifted, replicas=drifted.replicas[1:])),
            ):  # fmt: skip
                began = time.perf_counter()
                new = policy.plan(given, table)
                times[step].append(time.perf_counter() - began)
                if step == "after drift":
                    moved.append(len(moves(table, new)))
                table = new
        measured = {}
        for step, values in times.items():
            key = step.replace(" ", "_")
            measured |= {f"{key}_s_median": float(np.median(values)), f"{key}_s_most": max(values)}
        row = rows.write(
            policy=name, adapters=args.adapters, replicas=args.replicas, moves_after_drift=max(moved), **measured
        )
        print(
            f"{name:13s}",
            ", ".join(f"{step} {np.median(v):.3f} s (most {max(v):.3f})" for step, v in times.items()),
            f"moves {row['moves_after_drift']}",
        )


if __name__ == "__main__":
    main()
