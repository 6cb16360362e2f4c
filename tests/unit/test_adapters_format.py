"""Reading parts of stored tensors, and what importing the package costs."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from sgl_bdlora.adapters import adapter_from_tensors, dense_form, read_adapter

PATH = "model.layers.0.mlp.down_proj"
CONFIG = """{"peft_type": "LORA", "r": 8, "lora_alpha": 4, "target_modules": ["down_proj"],
"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["down_proj"]}}"""


@pytest.fixture(params=["file", "memory"])
def stored(request, tmp_path):
    """A module with a packed A, and its two tensors."""
    tensors = {
        f"base_model.model.{PATH}.lora_A.weight": torch.randn(8, 16, dtype=torch.bfloat16),
        f"base_model.model.{PATH}.lora_B.weight": torch.randn(24, 8, dtype=torch.float16),
    }
    (tmp_path / "adapter_config.json").write_text(CONFIG)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path, "a")
    if request.param == "memory":
        adapter = adapter_from_tensors("a", tensors, adapter.config.__dict__ | CONFIG_FIELDS)
    return adapter.modules[PATH], *tensors.values()


CONFIG_FIELDS = {
    "peft_type": "LORA",
    "layers_pattern": None,
    "layers_to_transform": None,
    "use_bdlora": {"nblocks": 2, "target_modules_bd_a": {"down_proj"}, "target_modules_bd_b": None},
}


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        (slice(None), slice(None)),
        (slice(2, 6), slice(None)),
        (slice(None), slice(3, 8)),
        (slice(4, 8), slice(0, 4)),
        (slice(7, 99), slice(1, None)),
        (slice(3, 3), slice(None)),
    ],
)
def test_part_of_a_tensor(stored, rows, cols):
    module, a, b = stored
    for factor, whole in ((module.a, a), (module.b, b)):
        part = factor.tensor[rows, cols]
        assert torch.equal(part, whole[rows, cols])
        assert part.dtype == factor.tensor.dtype == whole.dtype
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes


def test_a_part_is_a_copy(stored):
    module, a, _ = stored
    before = a.clone()
    module.a.tensor[0:2, :].zero_()
    assert torch.equal(a, before)
    assert torch.equal(module.a.tensor.read(), before)


def test_shapes_and_dense_form(stored):
    module, a, b = stored
    assert (module.in_features, module.out_features, module.rank, module.scale) == (32, 24, 8, 0.5)
    assert (module.a.shape, module.b.shape, module.a.blocks, module.b.blocks) == ((8, 32), (24, 8), 2, 1)
    dense_a, dense_b = dense_form(module)
    assert dense_a.dtype == dense_b.dtype == torch.float32
    assert torch.equal(dense_a[:4, :16], a[:4].float())
    assert torch.equal(dense_a[4:, 16:], a[4:].float())
    assert not dense_a[:4, 16:].any()
    assert not dense_a[4:, :16].any()
    assert torch.equal(dense_b, b.float())


def test_the_file_stays_readable_after_it_is_replaced(tmp_path):
    tensors = {f"base_model.model.{PATH}.lora_{x}.weight": torch.randn(8, 8) for x in "AB"}
    (tmp_path / "adapter_config.json").write_text(CONFIG)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path)
    assert (adapter.name, adapter.source) == (tmp_path.name, str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    save_file({key: torch.zeros(8, 8) for key in tensors}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(adapter.modules[PATH].a.tensor.read(), next(iter(tensors.values())))


def test_the_package_imports_neither_torch_nor_sglang():
    program = (
        "import sys, sgl_bdlora.adapters as a; print({'torch', 'sglang', 'safetensors'} & set(sys.modules), dir(a))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("set()")
