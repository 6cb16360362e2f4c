"""Adapters that change while they are read, expressions that run away, slow disks, and how a server ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgl_bdlora import loading, preparing
from sgl_bdlora.adapters import AdapterError, read_adapter
from sgl_bdlora.adapters import read as reading
from sgl_bdlora.adapters.runaway import runaway_limit
from sgl_bdlora.adapters.tensor_file import ChangedFileError, DamagedFileError, open_tensors


@pytest.fixture
def adapter(zoo, tmp_path):
    """A copy of a good adapter's directory."""
    source = zoo.adapter("llama", "bd4-r16")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def every_value(read) -> dict:
    return {f.tensor.key: f.tensor.read() for m in read.modules.values() for f in (m.a, m.b)}


def test_a_file_is_read_as_safetensors_reads_it(adapter):
    expected = load_file(adapter / "adapter_model.safetensors")
    found = every_value(read_adapter(adapter))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_parts_are_the_tensors_parts(tmp_path, dtype):
    whole = torch.randn(7, 13).to(dtype)
    save_file({"before": torch.zeros(3, dtype=torch.uint8), "x": whole, "none": torch.zeros(0, 5)}, tmp_path / "f")
    stored = open_tensors(tmp_path / "f")["x"]
    for rows in (slice(None), slice(2, 5), slice(0, 0), slice(6, 9), slice(-3, None)):
        for cols in (slice(None), slice(3, 4), slice(4, 2)):
            assert torch.equal(stored[rows, cols], whole[rows, cols])


def truncate(file):
    os.truncate(file, file.stat().st_size - 8)


def write_over(file):
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\0" * 8)


def put_another_in_its_place(file):
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.replace(file)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("change", [truncate, write_over, put_another_in_its_place, os.unlink])
def test_a_change_while_it_is_read_is_noticed(adapter, change, name):
    """And ends nothing: a mapped file that is truncated would end the process (SIGBUS)."""
    read = read_adapter(adapter)
    read.check_unchanged()
    time.sleep(0.02)
    change(adapter / name)
    if change is truncate and name.endswith(".safetensors"):
        with pytest.raises(ChangedFileError):
            every_value(read)
    with pytest.raises(ChangedFileError, match=name):
        read.check_unchanged()


def test_files_are_closed_with_the_adapter(adapter):
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    read = read_adapter(adapter)
    assert opened() > before
    del read
    assert opened() == before


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        open_tensors(tmp_path / "pipe")


def test_holes_and_overlaps_in_the_header_are_refused(tmp_path):
    for offsets in (((0, 16), (8, 24)), ((0, 16), (24, 40)), ((16, 32), (32, 48))):
        header = ",".join(
            f'"{i}":{{"dtype":"F32","shape":[2,2],"data_offsets":[{a},{b}]}}' for i, (a, b) in enumerate(offsets)
        )
        data = f"{{{header}}}".encode()
        (tmp_path / "f").write_bytes(len(data).to_bytes(8, "little") + data + bytes(max(b for _, b in offsets)))
        with pytest.raises(DamagedFileError, match="begin at"):
            open_tensors(tmp_path / "f")


RUNS_AWAY = r"(([a-z_.0-9]+)+)+!"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": RUNS_AWAY},
        {"rank_pattern": {RUNS_AWAY: 4}},
        {"exclude_modules": RUNS_AWAY},
        {"target_modules": ".*" * 9 + "!"},
    ],
)
def test_an_expression_that_runs_away_is_ended(adapter, fields, monkeypatch):
    monkeypatch.setattr(reading, "runaway_limit", lambda name: runaway_limit(name, 0.2))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    start = time.process_time()
    with pytest.raises(AdapterError, match=r"takes more than 0\.2 s"):
        read_adapter(adapter, "tuned")
    assert time.process_time() - start < 5


def test_the_limit_is_over_with_its_block():
    before = signal.getsignal(signal.SIGVTALRM)
    with runaway_limit("tuned", 0.05):
        pass
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


def test_other_threads_read_without_a_limit(adapter):
    found = []
    thread = threading.Thread(target=lambda: found.append(read_adapter(adapter)))
    thread.start()
    thread.join()
    assert found


def test_weights_are_read_ahead_where_they_may_be_read(adapter, tmp_path):
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert loading.warm("x", str(adapter), None) == size
    assert loading.warm("x", adapter.name, str(adapter.parent)) == size
    assert loading.warm("x", str(adapter), str(adapter / "elsewhere")) == 0
    assert loading.warm("x", str(adapter / "nowhere"), None) == 0
    os.mkfifo(adapter / "pipe.safetensors")
    assert loading.warm("x", str(adapter), None) == size


def launcher(asked: list | None = None, answers: list[list[bool]] | None = None) -> SimpleNamespace:
    """SGLang's tokenizer manager with ranks that answer at once. answers: of each time that they are asked, then true."""
    answers = iter(answers or [])

    async def ask(obj):
        if asked is not None:
            asked.append(obj)
        return [SimpleNamespace(success=success) for success in next(answers, [True])]

    return SimpleNamespace(
        server_args=SimpleNamespace(lora_backend="bdlora", enable_lora=True),
        auto_create_handle_loop=lambda: None,
        update_lora_adapter_communicator=ask,
    )


def test_the_ranks_prepare_before_they_load(monkeypatch):
    """They are asked until all of them (with data parallelism there are several that answer) are ready."""
    asked: list = []
    manager = launcher(asked, [[False, False], [True, False], [True, True]])

    async def load(*_):
        asked.append("load")

    monkeypatch.setattr(loading, "warm", lambda *_: 0)
    request = SimpleNamespace(lora_name="x", lora_path="here", lora_id=None)
    asyncio.run(loading.around_load_lora_adapter(load, manager, request))
    *asks, last = asked
    assert last == "load"
    assert {(ask.lora_name, ask.lora_path) for ask in asks} == {("x", "here")}
    marks = [ask.lora_id.rstrip("0123456789") for ask in asks]
    assert marks == [preparing.BEGIN, preparing.POLL, preparing.POLL]
    assert len({ask.lora_id.rpartition("-")[2] for ask in asks}) == 1


def test_without_lora_the_ranks_are_not_asked(monkeypatch):
    """They have nobody who could prepare; SGLang says what is missing."""
    asked: list = []
    manager = launcher(asked)
    manager.server_args.enable_lora = False

    async def load(*_):
        return "LoRA is not enabled"

    request = SimpleNamespace(lora_name="x", lora_path="here", lora_id=None)
    assert asyncio.run(loading.around_load_lora_adapter(load, manager, request)) == "LoRA is not enabled"
    assert asked == []


def test_no_more_loads_are_under_way_than_the_ranks_keep_prepared(monkeypatch):
    under_way, most, done = set(), 0, []

    async def load(manager, obj, request):
        nonlocal most
        most = max(most, len(under_way))
        await asyncio.sleep(0.01)
        under_way.discard(obj.lora_name)
        done.append(obj.lora_name)

    async def loads():
        manager = launcher()
        requests = [SimpleNamespace(lora_name=str(i), lora_path="here") for i in range(3 * preparing.WAITING)]
        await asyncio.gather(*(loading.around_load_lora_adapter(load, manager, request) for request in requests))

    monkeypatch.setattr(loading, "_turns", asyncio.Semaphore(preparing.WAITING))
    monkeypatch.setattr(loading, "warm", lambda name, *_: under_way.add(name))
    asyncio.run(loads())
    assert most == preparing.WAITING
    assert len(done) == 3 * preparing.WAITING


class Cutter:
    """Preparations whose cutting waits until it is released."""

    def __init__(self):
        self.release, self.read = threading.Event(), []
        self.preparations = preparing.Preparations(self._read, self._cut)

    def _read(self, name: str, path: str) -> str:
        assert threading.current_thread() is threading.main_thread()
        self.read.append(path)
        if path == "wrong":
            raise OSError(path)
        return f"{name} of {path}"

    def _cut(self, adapter: str) -> str:
        assert self.release.wait(10)
        if adapter.startswith("odd"):
            raise ValueError(adapter)
        return f"pieces of {adapter}"


def test_cutting_holds_up_nobody():
    cutter = Cutter()
    ask = cutter.preparations.ask
    assert not ask(f"{preparing.BEGIN}1", "x", "here")
    assert not ask(f"{preparing.POLL}1", "x", "here")
    # Another load of the same begins anew; whoever asks for the old one has nothing to wait for.
    assert not ask(f"{preparing.BEGIN}2", "x", "here")
    assert ask(f"{preparing.POLL}1", "x", "here")
    cutter.release.set()
    prepared = cutter.preparations.take("x", "here")
    assert prepared.shard.result(10) == "pieces of x of here"
    assert prepared.adapter == "x of here"
    assert cutter.preparations.take("x", "here") is None
    assert ask(f"{preparing.POLL}2", "x", "here")


def test_what_is_wrong_is_said_by_the_load():
    cutter = Cutter()
    assert cutter.preparations.ask(f"{preparing.BEGIN}1", "x", "wrong")
    with pytest.raises(OSError, match="wrong"):
        cutter.preparations.take("x", "wrong").shard.result(0)
    cutter.release.set()
    cutter.preparations.ask(f"{preparing.BEGIN}2", "odd", "here")
    with pytest.raises(ValueError, match="odd of here"):
        cutter.preparations.take("odd", "here").shard.result(10)


def test_preparations_without_a_load_are_forgotten():
    cutter = Cutter()
    cutter.release.set()
    for i in range(preparing.WAITING + 1):
        cutter.preparations.ask(f"{preparing.BEGIN}{i}", f"{i}", "here")
    assert cutter.preparations.take("0", "here") is None
    assert cutter.preparations.take("1", "here") is not None


def test_a_slow_disk_holds_up_only_the_load(monkeypatch):
    """Everything else that the launcher does runs in the same loop."""
    order = []

    def slow(*_):
        time.sleep(0.3)
        order.append("read")

    async def load(*_):
        order.append("loaded")

    async def serve():
        manager = launcher()
        request = SimpleNamespace(lora_name="x", lora_path="x")
        loading_ends = asyncio.ensure_future(loading.around_load_lora_adapter(load, manager, request))
        for _ in range(5):
            await asyncio.sleep(0.01)
            order.append("served")
        await loading_ends

    monkeypatch.setattr(loading, "warm", slow)
    asyncio.run(serve())
    assert order == [*["served"] * 5, "read", "loaded"]


def test_a_load_goes_on_when_its_client_leaves(monkeypatch):
    """Else the ranks would have an adapter that the registry does not know."""
    done = []

    async def load(*_):
        await asyncio.sleep(0.05)
        done.append("registered")

    async def serve():
        manager = launcher()
        request = SimpleNamespace(lora_name="x", lora_path="x")
        stream = asyncio.ensure_future(loading.around_load_lora_adapter(load, manager, request))
        await asyncio.sleep(0.02)
        stream.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream
        assert not done
        await asyncio.sleep(0.2)

    monkeypatch.setattr(loading, "warm", lambda *_: 0)
    asyncio.run(serve())
    assert done == ["registered"]


END = """
import logging, os, sys
from sgl_bdlora import ending
logging.basicConfig()
def original(pid, include_parent, skip, wait): assert (pid, include_parent) == (os.getpid(), False)
if "drained" in sys.argv: ending.before_sigterm_handler(None)
if "lost" in sys.argv: ending.before_sigquit_handler(None)
ending.around_kill_process_tree(original, os.getpid())
"""


@pytest.mark.parametrize(("how", "code"), [(["drained"], 0), (["lost"], 1), (["drained", "lost"], 1), ([], 1)])
def test_the_exit_code_says_how_it_ended(how, code):
    run = subprocess.run([sys.executable, "-c", END, *how], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == code, run.stderr
    assert ("a process of this server has ended" in run.stderr) == ("lost" in how)
