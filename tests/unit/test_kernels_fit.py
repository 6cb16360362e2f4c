"""The Triton kernels compile for GPUs with less shared memory than a Hopper has, take no more of it than there is, and wait for the kernel
ahead of them where they may begin before it has ended."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "l40s", "rtx5090"])
def test_kernels_fit(gpu):
    """In a process of its own: other tests have chosen Triton's interpreter in this one."""
    words = [sys.executable, "-m", "benchmarks.kernels.fit", "--gpus", gpu, "--models", "8b", "--tp", "2"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    kernels, dependent = map(int, re.search(rf"{gpu}: (\d+) kernels.*; (\d+) may begin before", ended.stdout).groups())
    # All but those for long prompts: a shrink and two expands, with the product and by itself, in each of four layers.
    assert kernels - 12 <= dependent < kernels if gpu == "rtx5090" else dependent == 0


@pytest.mark.parametrize("gpu", ["a100", "h200"])
def test_kernels_begin_early_but_for_long_prompts(monkeypatch, gpu):
    from benchmarks.kernels import fit
    from benchmarks.kernels.shapes import hosts
    from sgl_bdlora.kernels import triton_ops

    begun = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, DEPENDENT, launch_pdl, **__: begun.append((DEPENDENT, launch_pdl))

    for name in fit.KERNELS:
        monkeypatch.setattr(triton_ops, name, Kernel())
    monkeypatch.setattr(triton_ops, "_device", lambda _: fit.GPUS[gpu][1])
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda y, *_: y)
    layers = hosts("8b", 8, 1)
    ops = triton_ops.TritonOps(torch.zeros(64, dtype=torch.bfloat16), layers, 8, None).reserve(2048, combines=False)
    for rows in (1, 64, 256, 1024, 1025, 2048):
        begun.clear()
        ops.batch.fill([], np.full(rows, -1, dtype=np.int32), static=True)
        for host in layers:
            plan = ops.plans[host.path]
            x, w = torch.zeros(rows, plan.inputs), torch.zeros(plan.outputs, plan.inputs)
            ops.linear(x, w, None, host.path)
        early = gpu == "h200" and rows <= 1024
        assert begun == [(early, early)] * len(layers) * (1 if rows <= 64 else 2)


PTX = """
.visible .entry kernel(.param .u64 .ptr .global .align 16 kernel_param_0)
{
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %ctaid.x;
    BEFORE
    griddepcontrol.wait;
    BEHIND
    griddepcontrol.launch_dependents;
    ret;
}
"""


@pytest.mark.parametrize(
    "line",
    [
        "ld.global.b32 %r2, [%rd1];",
        "st.global.b32 [%rd1], %r2;",
        "atom.global.acq_rel.gpu.add.u32 %r2, [%rd1], 1;",
        "cp.async.cg.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;",
        "@%p1 bra $L__BB0_2;",
        "ret;",
        "griddepcontrol.launch_dependents;",
    ],
)
def test_nothing_stands_before_the_wait(line):
    from benchmarks.kernels.fit import waits_first

    assert waits_first(PTX.replace("BEFORE", "").replace("BEHIND", line))
    assert not waits_first(PTX.replace("BEFORE", line).replace("BEHIND", ""))
    assert not waits_first(PTX.replace("griddepcontrol.wait;", "").replace("BEFORE", "").replace("BEHIND", line))
