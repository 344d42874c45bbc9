"""The reference against torch, and its hand-written backward against autograd."""

import pytest
import torch
from measure import case, torchs
from torch import nn

from lstm_ext import reference


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(1, 3, 2), (9, 6, 5)])
def test_cell_is_torchs(device, shape, bias):
    values, _ = case(*shape, torch.float64, device, bias)
    x, h, c, *weights = values.values()
    expected = torchs(x, h, c, *weights)
    torch.testing.assert_close(reference.lstm_cell(x, (h, c), *weights), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_backward_by_hand_is_autograds(device, bias):
    values, grads = case(9, 6, 5, torch.float64, device, bias)
    leaves = [None if v is None else v.requires_grad_() for v in values.values()]
    x, h, c, *weights = leaves
    by_hand = reference.lstm_cell_backward(*grads, x, (h, c), *weights)
    wanted = [leaf for leaf in leaves if leaf is not None]
    by_autograd = torch.autograd.grad(reference.lstm_cell(x, (h, c), *weights), wanted, grads)
    for a, b in zip(by_hand, by_autograd, strict=False):
        torch.testing.assert_close(a, b)
    assert len(by_hand) == 7


@pytest.mark.parametrize("length", [0, 1, 11])
def test_sequence_is_nn_lstms(device, length):
    layer = nn.LSTM(3, 2, device=device, dtype=torch.float64)
    x = torch.randn(length, 4, 3, device=device, dtype=torch.float64)
    hx = torch.randn(2, 4, 2, device=device, dtype=torch.float64).unbind()
    output, (h, c) = reference.lstm(x, hx, *layer.parameters())
    if length == 0:  # nn.LSTM refuses it
        assert output.shape == (0, 4, 2)
        assert torch.equal(h, hx[0])
        return
    expected, (h_n, c_n) = layer(x, tuple(s[None] for s in hx))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close((h, c), (h_n[0], c_n[0]))
