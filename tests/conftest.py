"""What all tests share: the device, a fixed seed, and how long to fuzz."""

import os

# Before torch brings OpenMP: with as many workers as cores, threads that spin while they wait take
# the core from those that compute (docs/performance.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# On a GPU torch's own layer rounds float32 to TF32 by default. Tests that compare float32 want it
# as it is on the CPU; those of TF32 switch it on.
torch.backends.cudnn.rnn.fp32_precision = "ieee"


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=None, help="cases for tests/test_fuzz.py to draw")


# They take minutes each: begun first, so that with two workers neither waits for them in the end.
LONG = ["test_cuda_emu", "test_native", "test_cpu_paths", "test_cuda_compile", "test_build"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Every test that takes it runs on the CPU, and on a GPU or is shown as skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
