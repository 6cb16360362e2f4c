"""What a CPU-only host needs: detection, defaults, thread binding, stand-ins, shared-memory all-reduce."""

import importlib.util
import os
import sys
import threading

import pytest
import torch

from sgl_bdlora import cpu
from sgl_bdlora.cpu import arguments, detect, environment
from sgl_bdlora.cpu.shared_memory import SLOT_BYTES, SUPPORTED, SharedMemoryGroup
from sgl_bdlora.cpu.unpinned import Unpinned


@pytest.fixture(autouse=True)
def _fresh_detection():
    detect.applies.cache_clear()
    yield
    detect.applies.cache_clear()


def _host(monkeypatch, cuda: bool, kernels: bool):
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.setattr(detect, "OTHER_ACCELERATORS", ())
    monkeypatch.setattr(detect, "has_cuda_device", lambda: cuda)
    monkeypatch.setattr(detect, "has_cpu_kernels", lambda: kernels)


def _cores(binding: str) -> list[set[int]]:
    groups = []
    for group in binding.split("|"):
        cores = set()
        for run in group.split(","):
            first, _, last = run.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
        groups.append(cores)
    return groups


@pytest.mark.parametrize("tp_size", range(1, 9))
@pytest.mark.parametrize("n_cores", range(1, 65))
def test_every_rank_gets_an_equal_share_of_the_cores(tp_size, n_cores):
    available = list(range(0, 2 * n_cores, 2))
    groups = _cores(environment.thread_binding(tp_size, available))
    assert len(groups) == tp_size
    assert set().union(*groups) <= set(available)
    assert {len(group) for group in groups} == {max(1, n_cores // tp_size)}
    if tp_size <= n_cores:
        assert sum(map(len, groups)) == len(set().union(*groups)), "two ranks share a core although there are enough"
    else:
        load = [sum(core in group for group in groups) for core in available]
        assert max(load) - min(load) <= 1


def test_thread_binding_is_written_as_sglang_reads_it():
    assert environment.thread_binding(2, list(range(8))) == "0-3|4-7"
    assert environment.thread_binding(3, [0, 1]) == "0|1|0"
    assert environment.thread_binding(1, [0, 1, 4, 7, 8]) == "0-1,4,7-8"
    with pytest.raises(ValueError, match="0 cores"):
        environment.thread_binding(1, [])


def test_a_second_engine_may_have_another_size_but_the_users_binding_stays(monkeypatch):
    monkeypatch.setattr(environment, "_chosen", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for tp_size, binding, threads in ((2, "0-1|2-3", "2"), (1, "0-3", "4")):
        environment.bind_threads(tp_size)
        assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == binding
        assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "3")
    environment.bind_threads(1)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "3"


@pytest.mark.parametrize(("cuda", "kernels", "expected"), [(0, 0, True), (1, 0, False), (0, 1, False), (1, 1, False)])
def test_applies_only_without_gpu_and_without_cpu_kernels(monkeypatch, cuda, kernels, expected):
    _host(monkeypatch, bool(cuda), bool(kernels))
    assert detect.applies() is (expected and sys.platform.startswith("linux"))


def test_nothing_is_done_with_a_gpu(monkeypatch):
    _host(monkeypatch, cuda=True, kernels=False)
    before, path, hooks = dict(os.environ), list(sys.path), []
    cpu.prepare_environment()
    cpu.register_hooks(lambda *hook: hooks.append(hook))
    assert (dict(os.environ), sys.path, hooks) == (before, path, [])
    assert cpu.default_fields({}) == {}


def test_hidden_devices_count_as_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not detect.has_cuda_device()


@pytest.mark.parametrize(
    ("files", "expected"),
    [(["common_ops.abi3.so"], True), (["sm90/common_ops.abi3.so", "sm100/common_ops.abi3.so"], False), ([], False)],
)
def test_cpu_build_of_the_kernels_is_told_from_the_cuda_wheel(monkeypatch, tmp_path, files, expected):
    for name in ["__init__.py", *files]:
        path = tmp_path / "sgl_kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(sys, "path", [str(detect.STUBS), str(tmp_path)])
    assert detect.has_cpu_kernels() is expected


def test_default_fields_leave_out_the_users(monkeypatch):
    _host(monkeypatch, cuda=False, kernels=False)
    assert set(cpu.default_fields({"device": "cpu"})) == set(arguments.DEFAULTS) - {"device"}


def test_environment_keeps_the_users_values(monkeypatch):
    _host(monkeypatch, cuda=False, kernels=False)
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])  # restored afterwards
    for name in ("SGLANG_USE_CPU_ENGINE", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setenv("SGLANG_NCCL_SO_PATH", "/mine.so")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    monkeypatch.setenv("PYTHONPATH", "/first")
    cpu.prepare_environment()
    cpu.prepare_environment()
    assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    assert os.environ["SGLANG_NCCL_SO_PATH"] == "/mine.so"
    assert os.environ["TORCH_COMPILE_DISABLE"] == "0"
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(detect.STUBS), "/first"]
    assert sys.path.count(str(detect.STUBS)) == 1
    for name in ("SGLANG_USE_CPU_ENGINE", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name)


def test_a_called_stand_in_says_what_is_missing():
    spec = importlib.util.spec_from_file_location("stub", detect.STUBS / "sgl_kernel" / "__init__.py")
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    assert stub.__all__
    for name in stub.__all__:
        with pytest.raises(NotImplementedError, match=rf"sgl_kernel\.{name} .* CPU-only"):
            getattr(stub, name)(1, key=2)
    assert not hasattr(stub, "no_such_kernel")


def test_pinned_memory_is_ordinary_memory_without_a_device():
    with Unpinned():
        x = torch.zeros(3, pin_memory=True)
        assert torch.equal(x.pin_memory(), x)
        assert torch.tensor([1.0], pin_memory=True).item() == 1.0


@pytest.mark.skipif(not SUPPORTED, reason="needs Linux on x86-64")
@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_memory_all_reduce(tmp_path, world_size, dtype):
    """Many operations of changing size: each equals the sum, and all ranks get the same bits."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(SharedMemoryGroup.size(world_size)))
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 576), (8, 576), (3,), (7, 5, 2), (SLOT_BYTES // dtype.itemsize,)] * 5
    inputs = [[torch.randn(s, generator=generator).to(dtype) for _ in range(world_size)] for s in shapes]
    outputs = [[None] * world_size for _ in shapes]

    def rank_main(rank):
        group = SharedMemoryGroup(str(path), rank, world_size)
        for i, tensors in enumerate(inputs):
            outputs[i][rank] = group.all_reduce(tensors[rank].clone())

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank waits for ever"
    for tensors, results in zip(inputs, outputs, strict=True):
        expected = torch.stack(tensors).float().sum(0).to(dtype)
        torch.testing.assert_close(results[0], expected)
        assert all(torch.equal(result, results[0]) for result in results)


def test_shared_memory_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(SharedMemoryGroup.size(1)))
    group = SharedMemoryGroup(str(path), 0, 1)
    assert group.fits(torch.zeros(4, 4))
    assert not group.fits(torch.zeros(4, 4).t()[1:])
    assert not group.fits(torch.zeros(SLOT_BYTES + 1, dtype=torch.uint8))
    assert not group.fits(torch.zeros(0))
