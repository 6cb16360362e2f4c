"""The experiment's kernel gives what the served one gives."""

import pytest
import torch
from test_triton_ops import PATHS, K, N, case, engine  # noqa: F401


@pytest.mark.parametrize(("place", "splits", "early_b"), [("first", 2, True), ("wave", 4, False), ("last", 2, True)])
def test_one_launch_gives_what_two_give(engine, device, place, splits, early_b):  # noqa: F811
    from benchmarks.kernels.one_launch import OneLaunch

    if device.type == "cpu" and place != "first":
        pytest.skip("where programs run one after another, tiles wait in vain for those behind them")
    ops, _, x = case(engine, device, "skewed", 3, static=True)
    weight = (torch.randn(sum(N), K, generator=torch.Generator().manual_seed(4)) * 0.1).to(x)
    one = OneLaunch(ops, 5, place, splits, early_b, prefetch=device.type == "cuda")
    got, wanted = one.linear(x, weight, PATHS[0]), ops.linear(x, weight, None, PATHS[0])
    assert (got - wanted).abs().max() / wanted.abs().max() < (2**-10 if device.type == "cpu" else 2**-7)
