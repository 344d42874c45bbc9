"""The lecture's numbers that need no layer, to its four printed decimals, and its training."""

import pytest
import torch
from torch import nn

import lstm_ext
from lstm_ext import lecture, reference


def close(tensor, values):
    """Equal to four printed decimals."""
    torch.testing.assert_close(
        tensor.flatten(), torch.tensor(values, dtype=tensor.dtype), atol=5.01e-5, rtol=0
    )


def by_hand(cell):
    weights = tuple(cell.parameters())
    return lambda x, hx: reference.lstm_cell(x, hx, *weights)


@pytest.fixture(params=["lstm_ext.LSTMCell", "torch.nn.LSTMCell", "by hand"])
def cell(request):
    kind = nn.LSTMCell if request.param == "torch.nn.LSTMCell" else lstm_ext.LSTMCell
    cell = lecture.seeded_model(kind).cell
    return by_hand(cell) if request.param == "by hand" else cell


def test_data():
    x, y = lecture.data()
    assert x.shape == y.shape == (399, 3)
    assert lecture.next_characters(lambda x: x, "abaB") == "abaB"
    assert torch.equal(x[1:], y[:-1])


@torch.no_grad()
def test_first_step(cell):
    x, _ = lecture.data()
    h, c = cell(x[:1], (torch.zeros(1, 2), torch.zeros(1, 2)))
    close(h, [-0.0541, 0.0892])
    close(c, [-0.1347, 0.2339])


@torch.no_grad()
def test_after_all_steps(cell):
    x, _ = lecture.data()
    h, c = torch.zeros(1, 2), torch.zeros(1, 2)
    for row in x.unsqueeze(1):
        h, c = cell(row, (h, c))
    close(h, [-0.0406, 0.2505])
    close(c, [-0.0975, 0.7134])


@torch.no_grad()
def test_sequence_by_hand():
    x, _ = lecture.data()
    model = lecture.seeded_model(lstm_ext.LSTMCell)
    zero = torch.zeros(1, 2)
    _, (h, c) = reference.lstm(x[:, None], (zero, zero), *model.cell.parameters())
    close(h, [-0.0406, 0.2505])
    close(c, [-0.0975, 0.7134])


def test_training_follows_torchs_curve():
    curves = [
        torch.tensor(lecture.train(lecture.seeded_model(kind), range(30)))
        for kind in (lstm_ext.LSTMCell, nn.LSTMCell)
    ]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)
    assert curves[0][-1] < 0.5 * curves[0][0]


def test_model_learns_the_text():
    model = lecture.seeded_model(lstm_ext.LSTMCell)
    lecture.train(model, range(100))
    # What follows the first letter is a guess; from then on the memory tells.
    assert lecture.next_characters(model, "abaBabaB")[1:] == "aBabaBa"
