"""Random planning problems and small helpers."""

import numpy as np
from hypothesis import strategies as st

from sgl_bdlora.cluster.base import Adapter, Problem, Replica

RANKS = (8, 16, 32, 64, 128)
POINTS = {8: 20000.0, 16: 19000.0, 32: 17000.0, 64: 15000.0, 128: 11000.0}
MIB = 2**20


def problem(seed, adapters, replicas, moves=8, slack=0.1, cold=0.0, sigma=1.0, ranks=RANKS, host=None, load=0.7):
    """A random problem; host: room of a replica as a multiple of an even part of all adapters' bytes (default: plenty)."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(ranks, adapters)
    made = tuple(Adapter(f"a{i}", int(r), int(r) * MIB) for i, r in enumerate(chosen))
    demand = np.exp(sigma * rng.standard_normal(adapters))
    demand[rng.random(adapters) < cold] = 0
    use = (demand / [POINTS[r] for r in chosen]).sum()
    demand = demand * (load * replicas / use) if use else demand
    total = sum(a.size for a in made)
    room = int(total * host / replicas) + max(RANKS) * MIB if host else 10 * total
    servers = tuple(Replica(f"r{i}", 16 * 128 * MIB, room, 128) for i in range(replicas))
    return Problem(made, servers, demand, POINTS, moves, slack, seed)


problems = st.builds(
    problem,
    seed=st.integers(0, 2**32 - 1),
    adapters=st.integers(1, 40),
    replicas=st.integers(1, 8),
    moves=st.integers(0, 12),
    slack=st.sampled_from([0.02, 0.1, 0.3]),
    cold=st.sampled_from([0.0, 0.3, 1.0]),
    sigma=st.sampled_from([0.0, 1.0, 3.0]),
    ranks=st.sampled_from([RANKS, (8, 128), (16,)]),
    # An even part and the largest adapter: as tight as it can be with whole adapters always finding room.
    host=st.sampled_from([None, 1.0, 1.5]),
    load=st.sampled_from([0.2, 0.9, 3.0]),
)


def loads(p, table):
    """(replicas,) utilisation that the table gives each replica."""
    index = {r.name: i for i, r in enumerate(p.replicas)}
    out = np.zeros(len(index))
    for adapter, use in zip(p.adapters, p.utilisation(), strict=True):
        for replica, part in table.shares[adapter.name]:
            out[index[replica]] += part * use
    return out
