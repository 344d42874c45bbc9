"""Fixtures shared by all tests: the device, and a fixed seed."""

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Every test that takes it runs on the CPU, and on a GPU or is shown as skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
