"""FlopCounterMode: what torch counts of its own modules is what it counts of ours."""

import pytest
import torch
from layers import OPTIONS, identify, pair
from measure import DTYPES
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext


def count(call):
    """Operations of a call, and of the backward through its result."""
    with FlopCounterMode(display=False) as forward:
        out = call()
    if not out.requires_grad:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def same_count(modules, call):
    """Of call(module); whether by inputs and states that want a gradient too, or not."""
    theirs, mine = (count(lambda m=m: call(m)) for m in modules)
    assert mine == theirs
    assert all(mine)
    return mine


@pytest.mark.parametrize("wanted", ["parameters", "input", "states"])
@pytest.mark.parametrize("size", [4, 180])  # within the operator, and as products of their own
@pytest.mark.parametrize("dtype", DTYPES)
def test_cell(dtype, size, wanted):
    modules = [p.LSTMCell(3, size, dtype=dtype) for p in (nn, lstm_ext)]
    x, h, c = (torch.randn(2, k, dtype=dtype) for k in (3, size, size))
    x.requires_grad_(wanted == "input")
    h.requires_grad_(wanted == "states")
    for _ in range(2):  # the second time into gradients that exist
        forward, _ = same_count(modules, lambda m: m(x, (h, c))[0])
    assert forward == 2 * 2 * 4 * size * (3 + size)
    same_count(modules, lambda m: sum(m(x, m(x))))


def test_cell_with_parameters_that_want_no_gradient():
    modules = [p.LSTMCell(3, 4) for p in (nn, lstm_ext)]
    for m in modules:
        m.weight_ih.requires_grad_(False)
    for _ in range(2):
        same_count(modules, lambda m: m(torch.randn(2, 3), m(torch.randn(2, 3)))[0])


def call_layer(x, states, lengths):
    def call(m):
        value = x
        if lengths is not None:
            value = pack_padded_sequence(x, lengths, m.batch_first, enforce_sorted=False)
        out, (h, c) = m(value, states)
        return (out if lengths is None else out.data).sum() + h.sum() + c.sum()

    return call


@pytest.mark.parametrize("wanted", ["parameters", "input", "states"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 2, "num_layers": 2}], ids=identify)
def test_layer(options, packed, wanted):
    modules = pair(3, 4, torch.float64, **options)
    m = modules[0]
    x = torch.randn(5, 3, 3, dtype=torch.float64).transpose(0, int(m.batch_first))
    x.requires_grad_(wanted == "input")
    states = None
    if wanted == "states":
        layers = m.num_layers * (2 if m.bidirectional else 1)
        states = tuple(
            torch.randn(layers, 3, k, dtype=torch.float64).requires_grad_()
            for k in (m.proj_size or 4, 4)
        )
    lengths = torch.tensor([2, 5, 3]) if packed else None
    same_count(modules, call_layer(x, states, lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_of_other_dtypes(dtype):
    """The same as in float64: torch counts nothing of its own, which are oneDNN's."""
    found = []
    for kind in (torch.float64, dtype):
        layer = lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=True, dtype=kind)
        x = torch.randn(5, 3, 3, dtype=kind, requires_grad=True)
        found.append(count(lambda m=layer, x=x: m(x)[0]))
    assert found[0] == found[1]


@pytest.mark.parametrize("packed", [False, True])
def test_frozen(packed):
    layer = lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True).eval()
    call = call_layer(torch.randn(3, 5, 3), None, [5, 3, 2] if packed else None)
    cell, x = lstm_ext.LSTMCell(3, 4).eval(), torch.randn(2, 3)
    with torch.no_grad():
        assert count(lambda: call(lstm_ext.freeze(layer))) == count(lambda: call(layer))
        assert count(lambda: lstm_ext.freeze(cell)(x)[0]) == count(lambda: cell(x)[0])


def test_counted_in_their_module():
    model = nn.Sequential(lstm_ext.LSTM(3, 4))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(5, 2, 3))
    (name,) = (n for n in counter.get_flop_counts() if n.endswith(".0"))
    counts = counter.get_flop_counts()
    assert counts[name] == counts["Global"] == {torch.ops.lstm_ext.lstm_layer_forward: 2240}


def test_of_fake_tensors():
    """A count without the numbers, of a packed sequence in reverse too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        args = [torch.randn(s) for s in ((7, 3), (3, 4), (3, 4), (16, 3), (16, 4))]
        args[3].requires_grad_()
        sizes = torch.tensor([3, 2, 2])
        op = torch.ops.lstm_ext.lstm_layer
        op(*args, None, None, sizes, None, True)[0].sum().backward()
    assert counter.get_total_flops() > 2 * 7 * 16 * (3 + 4)


@pytest.mark.parametrize("wanted", ["parameters", "states"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("P", [None, 2])
def test_recurrence(P, packed, wanted):
    """What its layer counts, less the products of the input."""
    L, N, I, H = 5, 3, 3, 4
    layer = lstm_ext.LSTM(I, H, proj_size=P or 0, bias=False, dtype=torch.float64)
    x = torch.randn(L, N, I, dtype=torch.float64)
    states = [torch.randn(N, K, dtype=torch.float64) for K in (P or H, H)]
    for s in states:
        s.requires_grad_(wanted == "states")
    lengths = torch.tensor([5, 3, 2]) if packed else None
    sizes = pack_padded_sequence(x, lengths).batch_sizes if packed else None
    rows = 10 if packed else L * N
    gates_x = torch.randn(rows, 4 * H, dtype=torch.float64, requires_grad=True)
    gates_x = gates_x if packed else gates_x.view(L, N, 4 * H)
    w_hh, w_hr = layer.weight_hh_l0, layer.weight_hr_l0 if P else None

    def recurrence():
        op = torch.ops.lstm_ext.lstm_recurrence
        tensors = gates_x, *states, w_hh, *[None] * 4, w_hr, *[None] * 3
        return sum(t.sum() for t in op(*tensors, sizes, None, False, False, False, 1e-5, 0.0, 0.0))

    call = call_layer(x, tuple(s.unsqueeze(0) for s in states), lengths)
    of_input = 2 * rows * 4 * H * I
    forward, backward = count(lambda: call(layer))
    assert count(recurrence) == (forward - of_input, backward - of_input)  # of x: w_ih's alone
