"""What all tests share: the device, a fixed seed, how long to fuzz, and what runs where."""

import os
import subprocess
import sys

# Before torch brings OpenMP: with as many workers as cores, threads that spin while they wait take
# the core from those that compute (docs/performance.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from limits import COLLECTED

if torch.cuda.is_available():
    # torch's own layer rounds float32 to TF32 there by default. Tests that compare float32 want it
    # as it is on the CPU; those of TF32 switch it on. (By the older switch: torch.export reads it,
    # and throws once the newer says something else.)
    torch.backends.cudnn.allow_tf32 = False

# No limit on time: how fast cases are drawn says how busy the machine is.
hypothesis.settings.register_profile(
    "lstm_ext", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("lstm_ext")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=None, help="cases for tests/test_fuzz.py to draw")


# They take longest: begun first, so that with two workers neither waits for them in the end.
LONG = ["test_cuda_emu", "test_native", "test_cpu_paths", "test_cuda_compile", "test_build"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.get_closest_marker("packaging") or item.get_closest_marker("published"):
            item.add_marker(pytest.mark.slow)
    config.stash[COLLECTED] = [
        (item.nodeid, item.get_closest_marker("slow") is not None) for item in items
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test marked `alone` in a process that no other test has used."""
    inside = "LSTM_EXT_TEST_ALONE"
    if pyfuncitem.get_closest_marker("alone") is None or inside in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", ""]
    result = subprocess.run(
        [*command, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, inside: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        pytest.fail(f"in a process of its own:\n{result.stdout}{result.stderr}", pytrace=False)
    if " passed" not in result.stdout:
        pytest.skip(f"in a process of its own: {result.stdout.splitlines()[-1]}")
    return True


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Every test that takes it runs on the CPU, and on a GPU or is shown as skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def allow_rnn():
    """torch's switch, without which torch.compile takes no nn.LSTM into a graph."""
    import torch._dynamo  # which takes seconds: not for every process

    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled():
    """What a test has compiled, or had skipped, counts for no other: torch has limits for both."""
    yield
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.FRAME_COUNTER > 0:
        torch._dynamo.reset()
