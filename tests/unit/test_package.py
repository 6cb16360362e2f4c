"""Importing the package stays cheap, and the host check speaks up."""

import subprocess
import sys

import pytest

from sgl_bdlora import compat, cpu, options_refused, plugin


def test_importing_needs_neither_torch_nor_sglang():
    code = "import sys, sgl_bdlora, sgl_bdlora.config; print([m for m in ('torch', 'sglang') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_changed_host_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(
        compat,
        "NAMES",
        {"json.loads": ("s",), "json.dumps": ("obj", "indent"), "json.gone": None},
    )
    monkeypatch.setattr(compat, "SGLANG_VERSION", "9.9")
    with pytest.raises(SystemExit) as refusal:
        compat.require(launcher=True)
    said = str(refusal.value)
    assert "json.loads" not in said
    assert "json.dumps: takes (obj, " in said
    assert "json.gone: not found" in said
    assert "needs sglang==9.9" in said


@pytest.mark.parametrize("gpu", [True, False])
def test_what_is_patched_only_without_a_gpu_is_checked_only_there(monkeypatch, gpu):
    """With a GPU there may be a stand-in for a grammar back end that is not used."""
    name = "xgrammar.apply_token_bitmask_inplace"
    monkeypatch.setattr(name, lambda: None)
    monkeypatch.setattr(compat, "NAMES", {name: compat.NAMES[name]})
    monkeypatch.setattr(cpu, "applies", lambda: not gpu)
    assert [name for name, problem in compat.check() if problem] == ([] if gpu else [name])


def test_hooks_that_did_not_land_are_refused(monkeypatch):
    monkeypatch.setattr(plugin, "_targets", ["sglang.nowhere.at_all"])
    with pytest.raises(SystemExit, match=r"sglang\.nowhere\.at_all"):
        plugin.verify_hooks()


def test_experimental_layers_are_refused(monkeypatch):
    monkeypatch.setenv("SGLANG_EXPERIMENTAL_LORA_OPTI", "1")
    with pytest.raises(SystemExit, match="SGLANG_EXPERIMENTAL_LORA_OPTI"):
        options_refused.refuse_environment()
