"""The kernels' own sigmoid and tanh, seen through the gates that the training operator returns."""

import numpy as np
import pytest
import torch
from measure import DTYPES

import lstm_ext  # noqa: F401 (registers the operators)


def gates_at(x):
    """sigmoid(x) and tanh(x) as the kernels compute them: weight 1, no state, no bias."""
    N = x.numel()
    zero = torch.zeros(N, 1, dtype=x.dtype)
    w_ih = torch.ones(4, 1, dtype=x.dtype)
    w_hh = torch.zeros(4, 1, dtype=x.dtype)
    _, _, gates = torch.ops.lstm_ext.lstm_cell_forward(x[:, None], zero, zero, w_ih, w_hh)
    return gates[:, 0], gates[:, 2]


def ulps(result, truth, dtype):
    """Error in units in the last place of the truth."""
    info = np.finfo(np.float32 if dtype == torch.float32 else np.float64)
    spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(truth), info.tiny)))) * info.eps
    return np.abs(result.numpy().astype(np.longdouble) - truth) / spacing


# The stated bounds: csrc/cpu/activations.h quotes them.
SIGMOID_ULPS = 2.5
TANH_ULPS = 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_error_bounds(dtype):
    smallest = -37 if dtype == torch.float32 else -300
    magnitude = torch.cat(
        [
            torch.logspace(smallest, 1.9, 200_000, dtype=torch.float64),
            torch.linspace(0, 20, 400_001, dtype=torch.float64),
        ]
    )
    x = torch.cat([magnitude, -magnitude]).to(dtype)
    sigmoid, tanh = gates_at(x)
    wide = x.numpy().astype(np.longdouble)
    assert ulps(tanh, np.tanh(wide), dtype).max() <= TANH_ULPS
    # e^-x is a normal number as far as 87; below, sigmoid stays at the smallest such value.
    normal = wide > (-87 if dtype == torch.float32 else -700)
    truth = 1 / (1 + np.exp(-wide))
    assert ulps(sigmoid, truth, dtype)[normal].max() <= SIGMOID_ULPS


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits(dtype):
    big = torch.finfo(dtype).max
    x = torch.tensor([float("inf"), big, 800, 0, -800, -big, -float("inf")], dtype=dtype)
    sigmoid, tanh = gates_at(x)
    assert torch.equal(tanh, torch.tensor([1, 1, 1, 0, -1, -1, -1], dtype=dtype))
    assert torch.equal(sigmoid[:4], torch.tensor([1, 1, 1, 0.5], dtype=dtype))
    assert sigmoid[4:].double().max() < 1e-37
    assert sigmoid[4:].min() >= 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_and_stays_in_its_row(dtype):
    x = torch.zeros(20, dtype=dtype)
    x[7] = float("nan")
    for gate in gates_at(x):
        assert torch.equal(gate.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_monotonic_within_rounding(dtype):
    x = torch.linspace(-12, 12, 100_001, dtype=dtype)
    for gate in gates_at(x):
        step = gate[1:] - gate[:-1]
        assert step.min() >= -4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_converts_exactly(dtype):
    """Every bit pattern passes through the kernels' load and store unchanged: c' = 1 * c.

    But for bfloat16's denormals, which are float32's, and count as zero.
    """
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    c = bits.view(dtype)
    c = c[~c.isnan()]
    # f = sigmoid(large) = 1, i = sigmoid(-large) = 0 and g = 0, so c' is c itself.
    n = c.numel()
    bias = torch.tensor([-200.0, 200, 0, 0], dtype=dtype)
    zero = torch.zeros(n, 1, dtype=dtype)
    weight = torch.zeros(4, 1, dtype=dtype)
    _, c_next = torch.ops.lstm_ext.lstm_cell(zero, zero, c[:, None], weight, weight, bias)
    if dtype == torch.bfloat16:
        c = torch.where(c.abs() < torch.finfo(torch.float32).tiny, 0, c)
    assert torch.equal(c_next[:, 0], c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_denormals_count_as_zero_in_the_kernels_only(dtype):
    tiny = torch.finfo(dtype).tiny / 8
    assert tiny > 0
    c = torch.full((40, 70), tiny, dtype=dtype)
    weights = [torch.zeros(n, dtype=dtype) for n in ((280, 3), (280, 70))]
    x, h = torch.zeros(40, 3, dtype=dtype), torch.zeros(40, 70, dtype=dtype)
    out = torch.ops.lstm_ext.lstm_cell(x, h, c, *weights)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in out)
    # The thread's mode is as before: torch's own arithmetic still knows them.
    assert (c / 2).min() > 0
    assert (c + 0).min() == tiny
