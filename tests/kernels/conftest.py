"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen when they are imported and when they run."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import sgl_bdlora.kernels.triton_ops  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    """Only while these tests run: servers that other tests start would inherit it."""
    if torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
