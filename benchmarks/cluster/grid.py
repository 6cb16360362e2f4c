"""Policies over rank mixes, popularity, drift and pools, simulated: highest rate at the SLO, times at one rate, replicas needed.

    python -m benchmarks.cluster.grid              # about 8 minutes on 2 cores; no GPU
    python -m benchmarks.cluster.grid --quick      # two cases, about a minute
    python -m benchmarks.cluster.grid --served     # three cases with what the real cluster showed, about 2 minutes

Each row says with which cost model it was made and whether that is provisional. Writes rows and a plot to benchmarks/results/.
"""

import argparse
import itertools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from benchmarks.cluster.compared import SERVER
from benchmarks.cluster.plot import draw, tables
from benchmarks.record import RESULTS, Rows, read_rows
from sgl_bdlora.cluster.config import ClusterConfig, from_dict
from sgl_bdlora.cluster.policies import NAMES
from sgl_bdlora.cluster.report import row_of
from sgl_bdlora.cluster.simulate import simulate
from sgl_bdlora.cluster.sizing import highest_rate, needed_replicas

RANKS = {"equal": dict.fromkeys((8, 16, 32, 64, 128), 1.0), "90% r8": {8: 0.9, 128: 0.1}}
DRIFT = {
    "none": {}, "rotate": {"rotate_s": 60.0, "rotate_by": 0.2}, "flash": {"flash_x": 10.0, "flash_s": 60.0, "flash_for_s": 30.0},
}  # fmt: skip
# One thing changed in the case of equal ranks with rotation.
VARIANTS = {
    "zipf 1.2": {"workload": {"zipf": 1.2}}, "cv 4": {"workload": {"cv": 4.0}},
    "small pool": {"replicas": {"pool_gib": 3.0}},
}  # fmt: skip
COSTS = ("bdlora", "padded")
BASE = {
    "replicas": {"count": 8, "gpus": 1, "pool_gib": 8.0}, "adapters": {"count": 200},
    "workload": {"duration_s": 100.0, "warmup_s": 20.0, "zipf": 0.8},
}  # fmt: skip


def cases(quick: bool) -> list[tuple[dict, ClusterConfig]]:
    """(labels, configuration) of each."""
    base = from_dict(BASE)
    made = []
    for costs, ranks, drift in itertools.product(COSTS, RANKS, DRIFT):
        config = base.with_(costs=costs, adapters={"ranks": RANKS[ranks]}, workload=DRIFT[drift])
        made.append(({"ranks_label": ranks, "drift": drift, "variant": "base"}, config))
    for variant in VARIANTS:
        config = base.with_(adapters={"ranks": RANKS["equal"]}, workload=DRIFT["rotate"])
        made.append(
            ({"ranks_label": "equal", "drift": "rotate", "variant": variant}, config.with_(**VARIANTS[variant]))
        )
    return [made[1], made[7]] if quick else made


def served(made: list[tuple[dict, ClusterConfig]]) -> list[tuple[dict, ClusterConfig]]:
    """The cases without drift and with rotation, with the costs and replicas that were compared with a real cluster."""
    chosen = [made[0], made[1], made[4]]
    return [(labels, config.with_(costs="bdlora-served", replicas=SERVER)) for labels, config in chosen]


def measure(labels: dict, config: ClusterConfig, rate: float, sizing_rate: float | None) -> dict:
    """One row: the highest rate, then a run at `rate`, and for some cases the replicas that sizing_rate needs."""
    best, runs = highest_rate(config, 20.0, 160.0, 6)
    row = {**row_of(simulate(config.with_(workload={"rate": rate}))), **labels, "highest_rate": best, "runs": len(runs)}
    if sizing_rate is not None:
        row["sizing_rate"] = sizing_rate
        row["needed_replicas"] = needed_replicas(config.with_(workload={"rate": sizing_rate}), 64)[0]
    return row


def _measure(job: tuple) -> dict:
    return measure(*job)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster.grid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two cases only")
    parser.add_argument("--served", action="store_true", help="three cases with cost model bdlora-served; no plot")
    parser.add_argument("--policies", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--rate", type=float, default=64.0, help="requests/s of the runs compared by time (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, help="rows (default: cluster-grid.jsonl, served: policies-grid-served.jsonl)"
    )
    args = parser.parse_args()
    args.output = args.output or RESULTS / ("policies-grid-served.jsonl" if args.served else "cluster-grid.jsonl")
    args.output.unlink(missing_ok=True)
    rows = Rows(args.output, benchmark="cluster-grid")
    jobs = []
    for labels, config in served(cases(False)) if args.served else cases(args.quick):
        sized = not args.served and labels["drift"] == "rotate" and labels["variant"] == "base"
        for name in args.policies:
            jobs.append((labels, config.with_(policy={"name": name}), args.rate, args.rate if sized else None))
    with ProcessPoolExecutor(args.processes) as pool:
        for row in tqdm(pool.map(_measure, jobs), total=len(jobs), unit="point"):
            rows.write(**row)
    if args.served:
        print(tables(read_rows(args.output)))
    else:
        draw(read_rows(args.output), args.output.with_suffix(".png"))
    print(args.output)


if __name__ == "__main__":
    main()
