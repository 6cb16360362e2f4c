"""Whether the Triton kernels fit a GPU that need not be there: compiled for it, with the tile sizes that it would get.

    python -m benchmarks.kernels.fit [--gpus a100 l40s h200 rtx5090 b200] [--models 8b 70b] [--tp 1 2 8]

For every GPU: how many variants there are, the most shared memory that one takes of what a block may have, how many keep registers in
memory (spills), and how many may begin before the kernel ahead of them has ended. Exit status 1 where one takes too much (Triton would
refuse to launch it), or does anything with memory before it has waited for that kernel. About four minutes a GPU; no GPU needed.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.files import MODELS
from benchmarks.kernels.shapes import hosts
from sgl_bdlora.kernels import triton_ops
from sgl_bdlora.kernels.tiles import H200, Device


def _gpu(capability: int, multiprocessors: int, shared: int) -> tuple[int, Device]:
    return capability, Device(multiprocessors, shared, dependent=capability >= 90)


# Name -> compute capability, and what kernels depend on (NVIDIA's data sheets; CUDA's programming guide, "Compute Capabilities").
GPUS = {
    "a100": _gpu(80, 108, 166_912),
    "l40s": _gpu(89, 142, 101_376),
    "h200": (90, H200),
    "b200": _gpu(100, 148, 232_448),
    "rtx5090": _gpu(120, 170, 101_376),
}
KERNELS = ("linear_kernel", "shrink_kernel", "expand_kernel")
ROWS = (16, 32, 64, 128, 256, 4096)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


class Launches:
    """Stands in for a kernel and keeps what it is launched with; each set of constants, types and options once."""

    def __init__(self, kernel: triton.JITFunction, found: dict):
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]):
        return self._keep

    def _keep(self, *args, num_warps: int, num_stages: int = 3, launch_pdl: bool = False, **constants) -> None:
        named = dict(zip(self._kernel.arg_names, args, strict=False))
        for parameter in self._kernel.params:
            if parameter.is_constexpr and parameter.name in named:
                constants[parameter.name] = named.pop(parameter.name)
        types = {name: _type(value) for name, value in named.items()}
        aligned = tuple(name for name, value in named.items() if _aligned(value))
        key = (
            self._kernel,
            *(tuple(sorted(part.items())) for part in (constants, types)),
            aligned,
            num_warps,
            num_stages,
            launch_pdl,
        )
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
        self._found[key] = (self._kernel, constants, types, aligned, options)


def _type(value) -> str:
    if isinstance(value, int):
        return "i32"
    return TYPES[value.dtype]


def _aligned(value) -> bool:
    return value % 16 == 0 if isinstance(value, int) else isinstance(value, torch.Tensor) and value.data_ptr() % 16 == 0


@contextmanager
def _recorded(device: Device) -> Iterator[dict]:
    """Inside, kernels are not launched but kept, with tiles for `device`."""
    found: dict = {}
    patches = [mock.patch.object(triton_ops, name, Launches(getattr(triton_ops, name), found)) for name in KERNELS]
    patches.append(mock.patch.object(triton_ops, "_device", return_value=device))
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in patches:
            patch.stop()


def variants(device: Device, models: list[str], sizes: list[int]) -> list[tuple]:
    """What the linear layers of these models launch at these tensor-parallel sizes, from 16 rows to a prompt of 4,096."""
    with _recorded(device) as found:
        for model, tp in itertools.product(models, sizes):
            layers = hosts(model, tp, 1)
            arena = torch.zeros(64, dtype=torch.bfloat16)
            ops = triton_ops.TritonOps(arena, layers, 8, None).reserve(max(ROWS), combines=False)
            for rows, many in itertools.product(ROWS, (False, True)):
                ops.batch.fill([], np.full(rows, -1, dtype=np.int32), static=True, many_rows=many)
                for host in layers:
                    plan = ops.plans[host.path]
                    x = torch.empty(rows, plan.inputs, dtype=torch.bfloat16)
                    w = torch.empty(plan.outputs, plan.inputs, dtype=torch.bfloat16)
                    with mock.patch.object(torch.Tensor, "addmm_", lambda y, *_: y):
                        ops.linear(x, w, None, host.path)
                    ops.add_lora(x.new_empty(rows, plan.outputs), x, host.path)
    return list(found.values())


class Compiled(NamedTuple):
    """shared: bytes of shared memory. registers: of a thread. spilled: bytes of them that are kept in memory. early: whether it may begin
    before the kernel ahead of it has ended, and does not wait for that first (waits_first)."""

    shared: int
    registers: int
    spilled: int
    early: bool


def waits_first(ptx: str) -> bool:
    """Whether every thread waits for the kernel ahead before it reads or writes global memory and before it lets the next begin."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    # Also in cp.async and red; parameters are declared as `.ptr .global .align`.
    return bool(wait) and not re.search(r"\.global(\.| \[)|\b(bra|ret|exit|launch_dependents)\b", before)


def compiled(variant: tuple, capability: int) -> Compiled:
    kernel, constants, types, aligned, options = variant
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        # Triton's own choice, which SGLang may have changed: another one may not know the PTX version.
        tool = get_ptxas(capability).path
        words = [tool, "-v", f"-arch=sm_{capability}{'a' if capability >= 90 else ''}", file.name, "-o", os.devnull]
        run = subprocess.run(words, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(
            f"{tool} -arch=sm_{capability} of {kernel.__name__} {constants}: {run.stderr or run.returncode}"
        )
    told = run.stderr
    registers, spilled = (
        int(re.search(text, told)[1]) for text in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    early = options["launch_pdl"] and not waits_first(made.asm["ptx"])
    return Compiled(made.metadata.shared, registers, spilled, early)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpus", nargs="+", choices=list(GPUS), default=list(GPUS))
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="their layers (default: both)")
    add("--tp", nargs="+", type=int, default=[1, 2, 8])
    args = parser.parse_args(argv)
    faults = 0
    for name in args.gpus:
        capability, device = GPUS[name]
        found = variants(device, args.models, args.tp)
        most, spilling = 0, 0
        for variant in tqdm(found, desc=name, unit="kernel", leave=False):
            made = compiled(variant, capability)
            most, spilling = max(most, made.shared), spilling + (made.spilled > 0)
            if made.shared > device.shared or made.early:
                faults += 1
                fault = (
                    "does not wait for the kernel ahead of it"
                    if made.early
                    else f"{made.shared} bytes of shared memory"
                )
                print(f"{name}: {fault}, {made.registers} registers: {variant[0].__name__} {variant[1]}")
        dependent = sum(options["launch_pdl"] for *_, options in found)
        print(
            f"{name}: {len(found)} kernels, at most {most} of {device.shared} bytes of shared memory; {spilling} spill; "
            f"{dependent} may begin before the kernel ahead of them has ended",
            flush=True,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
