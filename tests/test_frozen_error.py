"""The report of what freezing costs: against errors computed by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext


def share(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}], ids=str
)
def test_layer(options, weights):
    lstm = lstm_ext.LSTM(9, 40, **options).eval()
    frozen = lstm_ext.freeze(lstm, weights=weights)
    x = torch.randn(7, 5, 9)
    with torch.no_grad():
        (a, (h, c)), (b, (h_exact, c_exact)) = frozen(x), lstm(x)
    (error,) = lstm_ext.frozen_error(frozen, x).values()
    assert error.output == pytest.approx(share(a, b))
    assert (error.output == 0) == (weights is None)
    assert error.h_n == pytest.approx(share(h, h_exact))
    assert error.c_n == pytest.approx(share(c, c_exact))
    time, rows = (1, 0) if options.get("batch_first") else (0, 1)
    steps = [share(s, t) for s, t in zip(a.unbind(time), b.unbind(time), strict=True)]
    torch.testing.assert_close(error.over_time, torch.tensor(steps, dtype=torch.float64))
    of_rows = [share(s, t) for s, t in zip(a.unbind(rows), b.unbind(rows), strict=True)]
    assert error.worst_row_error == pytest.approx(max(of_rows))
    assert of_rows[error.worst_row] == pytest.approx(max(of_rows))
    plain = sum(w.nbytes for layer in lstm.all_weights for w in layer[:2])
    assert error.bytes_before == plain
    if weights != "int8":  # whose scales are much, of so few weights
        ratio = {None: 1, "bfloat16": 2}[weights]
        assert plain / error.bytes_after == pytest.approx(ratio, rel=0.1)


def test_packed_rows_are_the_users():
    lstm = lstm_ext.LSTM(3, 30).eval()
    frozen = lstm_ext.freeze(lstm, weights="int8")
    lengths = torch.tensor([2, 7, 4])
    x = torch.randn(7, 3, 3)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    (error,) = lstm_ext.frozen_error(frozen, packed).values()
    with torch.no_grad():
        alone = [share(frozen(x[:k, n])[0], lstm(x[:k, n])[0]) for n, k in enumerate(lengths)]
    assert error.worst_row_error == pytest.approx(max(alone))
    assert alone[error.worst_row] == max(alone)
    assert len(error.over_time) == 7
    assert error.over_time.isfinite().all()


class Decoder(nn.Module):
    """A cell over steps, behind a layer; its states come back to it."""

    def __init__(self):
        super().__init__()
        self.layer = lstm_ext.LSTM(4, 6)
        self.cell = lstm_ext.LSTMCell(6, 5)
        self.unused = lstm_ext.LSTM(2, 2)

    def forward(self, x, *, steps):
        output, _ = self.layer(x)
        states, collected = None, []
        for t in range(steps):
            states = self.cell(output[t], states)
            collected.append(states[0])
        return torch.stack(collected)


def test_model_with_a_loop():
    model = Decoder().eval()
    frozen = lstm_ext.freeze(copy.deepcopy(model), weights="int8")
    before = copy.deepcopy(frozen.state_dict())
    x = torch.randn(6, 3, 4)
    errors = lstm_ext.frozen_error(frozen, x, steps=6)
    assert set(errors) == {"layer", "cell"}
    with torch.no_grad():
        exact, found = model(x, steps=6), frozen(x, steps=6)
    # End to end: the states and what comes before are those of the frozen model too.
    assert errors["cell"].output == pytest.approx(share(found, exact))
    assert errors["cell"].h_n == pytest.approx(share(found[-1], exact[-1]))
    steps = [share(a, b) for a, b in zip(found, exact, strict=True)]
    torch.testing.assert_close(errors["cell"].over_time, torch.tensor(steps, dtype=torch.float64))
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name])
    assert not frozen.cell._forward_hooks


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="LSTM has no frozen LSTM or LSTMCell"):
        lstm_ext.frozen_error(lstm_ext.LSTM(2, 3).eval(), torch.randn(4, 1, 2))

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = lstm_ext.LSTMCell(3, 4)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="Idle called none of its frozen modules"):
        lstm_ext.frozen_error(lstm_ext.freeze(Idle().eval()), torch.randn(1, 3))

    class Stops(Idle):
        """Calls its cell as long as something holds that rounding changes."""

        def forward(self, x):
            for _ in range(2 if type(self.cell) is lstm_ext.LSTMCell else 1):
                self.cell(x)

    with pytest.raises(RuntimeError, match="cell was called 1 times, and 2 times when it was not"):
        lstm_ext.frozen_error(lstm_ext.freeze(Stops().eval()), torch.randn(1, 3))


def test_nothing_of_nothing():
    lstm = lstm_ext.LSTM(2, 3, bias=False).eval()
    frozen = lstm_ext.freeze(lstm, weights="int8")
    (error,) = lstm_ext.frozen_error(frozen, torch.zeros(4, 2, 2)).values()
    assert (error.output, error.h_n, error.c_n, error.worst_row_error) == (0, 0, 0, 0)
    assert torch.equal(error.over_time, torch.zeros(4, dtype=torch.float64))


def test_picture():
    frozen = lstm_ext.freeze(lstm_ext.LSTM(9, 40).eval(), weights="int8")
    (error,) = lstm_ext.frozen_error(frozen, torch.randn(80, 5, 9)).values()
    (axis,) = error.plot().axes
    (line,) = axis.get_lines()
    assert line.get_ydata().tolist() == (100 * error.over_time).tolist()
    assert f"{error.output:.2%}" in line.get_label()
