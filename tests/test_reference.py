"""The reference against torch, and its hand-written backward against autograd."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure import case, torchs
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

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


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_both_directions_are_nn_lstms(packed):
    layer = nn.LSTM(3, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    hx = torch.randn(2, 2, 4, 2, dtype=torch.float64).unbind()
    value = pack_padded_sequence(x, [5, 3, 3, 1]) if packed else x
    output, (h, c) = layer(value, hx)
    sizes = output.batch_sizes if packed else None
    output, data = (output.data, value.data) if packed else (output, x)
    weights = list(layer.parameters())
    for d in range(2):
        found, states = reference.lstm(
            data, (hx[0][d], hx[1][d]), *weights[4 * d : 4 * d + 4], sizes, reverse=d == 1
        )
        torch.testing.assert_close(found, output[..., 2 * d : 2 * d + 2])
        torch.testing.assert_close(states, (h[d], c[d]))


@pytest.mark.parametrize("reverse", [False, True])
def test_reset_begins_a_sequence_anew(reverse):
    """As if what comes before had never been: one row, reset before the third step it takes."""
    weights = [torch.randn(s, dtype=torch.float64) for s in ((8, 3), (8, 2), (8,), (8,))]
    x, h, c = (torch.randn(s, dtype=torch.float64) for s in ((6, 1, 3), (1, 2), (1, 2)))
    step = 3 if reverse else 2
    reset = torch.arange(6).unsqueeze(1) == step
    output, states = reference.lstm(x, (h, c), *weights, reset=reset, reverse=reverse)
    zero = torch.zeros_like(h), torch.zeros_like(c)
    after = slice(0, step + 1) if reverse else slice(step, None)
    before = slice(step + 1, None) if reverse else slice(0, step)
    expected, last = reference.lstm(x[after], zero, *weights, reverse=reverse)
    torch.testing.assert_close(output[after], expected)
    torch.testing.assert_close(states, last)
    first, _ = reference.lstm(x[before], (h, c), *weights, reverse=reverse)
    torch.testing.assert_close(output[before], first)


def test_second_derivative_of_the_documents():
    """The lines of docs/maths.md, "Second derivatives", against autograd."""
    i, f, o = (torch.rand(4, 3, dtype=torch.float64) for _ in range(3))
    g, c, dh, dc_next = (torch.randn(4, 3, dtype=torch.float64) for _ in range(4))
    g = g.tanh()
    inputs = [t.requires_grad_() for t in (i, f, g, o, c, dh, dc_next)]
    p, dc = reference.gate_gradients((i, f, g, o), c, dh, dc_next)
    outputs = [*p.chunk(4, 1), dc]
    grads = [torch.randn(4, 3, dtype=torch.float64) for _ in outputs]
    expected = torch.autograd.grad(outputs, inputs, grads)
    with torch.no_grad():
        pi, pf, pg, po, pc = grads
        t = torch.tanh(f * c + i * g)
        s = dc_next + dh * o * (1 - t**2)
        to_s = pi * g * i * (1 - i) + pf * c * f * (1 - f) + pg * i * (1 - g**2) + pc * f
        to_t = po * dh * o * (1 - o) - 2 * to_s * dh * o * t
        to_c_next = to_t * (1 - t**2)
        found = [
            pi * s * g * (1 - 2 * i) + pg * s * (1 - g**2) + to_c_next * g,
            pf * s * c * (1 - 2 * f) + pc * s + to_c_next * c,
            pi * s * i * (1 - i) - 2 * pg * s * i * g + to_c_next * i,
            po * dh * t * (1 - 2 * o) + to_s * dh * (1 - t**2),
            pf * s * f * (1 - f) + to_c_next * f,
            to_s * o * (1 - t**2) + po * t * o * (1 - o),
            to_s,
        ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_documents_picture_is_its_scripts(tmp_path):
    """docs/cell.svg is what docs/draw_cell.py draws: the same words in the same order."""
    docs = Path(__file__).parent.parent / "docs"
    drawn = tmp_path / "cell.svg"
    subprocess.run([sys.executable, docs / "draw_cell.py", drawn], check=True)

    def comments(file):
        return re.findall("<!-- (.*?) -->", file.read_text())

    assert len(comments(drawn)) > 15
    assert comments(drawn) == comments(docs / "cell.svg")
