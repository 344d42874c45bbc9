"""Frozen modules whose packed weights are stored in fewer bits."""

import copy
import pickle

import pytest
import torch
from layers import OPTIONS, identify
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_ext
from lstm_ext import reference

SIZES = [
    (1, 1, 1, 1),
    (7, 1, 9, 40),
    (5, 3, 17, 8),
    (3, 20, 64, 65),
    (2, 200, 5, 16),
    (50, 2, 3, 7),
]


WEIGHTS = {
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int8-int16": {"weights": "int8", "activations": "int16"},
}
INTEGERS = {name: kind for name, kind in WEIGHTS.items() if name != "bfloat16"}


def rounded(module):
    """The module with its matrices rounded to bfloat16, all else in float32."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith(("weight_ih", "weight_hh")):
                p.copy_(p.bfloat16())
    return module


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", [*OPTIONS, {"peephole": True}], ids=identify)
def test_bfloat16_is_the_rounded_module(size, options):
    """To the bit: a weight is rounded when it is packed, and is then a float32 like any other."""
    L, N, I, H = size
    lstm = lstm_ext.LSTM(I, H, **options).eval()
    x = torch.randn((N, L, I) if lstm.batch_first else (L, N, I))
    lengths = torch.randint(1, L + 1, (N,))
    packed = pack_padded_sequence(x, lengths, lstm.batch_first, enforce_sorted=False)
    mask = torch.rand(x.shape[:2]) < 0.3
    expected = lstm_ext.freeze(rounded(lstm))
    frozen = lstm_ext.freeze(lstm, weights="bfloat16")
    with torch.no_grad():
        for given, reset in ((x, None), (x, mask), (packed, None)):
            a, b = frozen(given, reset=reset), expected(given, reset=reset)
            first = [t.data if given is packed else t for t in (a[0], b[0])]
            assert torch.equal(*first)
            assert torch.equal(a[1][0], b[1][0])
            assert torch.equal(a[1][1], b[1][1])
    assert lstm_ext.unfreeze(frozen) is lstm


def levels_of(kind, K):
    """How many positive integers a row of K is rounded to."""
    return min(32767, (2**31 - 1) // (127 * K)) if "activations" in kind else 127


def integers(rows, levels):
    """The last dimension as integers and their scale, in float32 as csrc/cpu/integer_weights.h."""
    most = rows.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(float(levels)) / most  # (levels / most would be a reciprocal's multiple)
    whole = torch.where(most > 0, torch.round(rows * inverse), torch.zeros(()))
    return whole.double(), (most / levels).double()


def products(x, w, kind):
    """x w^T by the formula of that file, exact but for the scales."""
    (x, x_scale), (w, w_scale) = integers(x, levels_of(kind, x.shape[-1])), integers(w, 127)
    return (x @ w.mT) * x_scale * w_scale.mT


def by_hand(cell, x, h, c, kind):
    pre = products(x, cell.weight_ih, kind) + products(h, cell.weight_hh, kind)
    if cell.bias:
        pre = pre + cell.bias_ih.double() + cell.bias_hh.double()
    units = None
    peephole = hasattr(cell, "weight_ci")
    if peephole:
        units = torch.stack([cell.weight_ci, cell.weight_cf, cell.weight_co]).double()
    kind_of_cell = reference.CELLS[int(peephole)]
    return kind_of_cell.forward(pre.chunk(4, -1), c.double(), units)[1:]


@pytest.mark.parametrize("N", [1, 2, 3, 7, 50, 300])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (30, 44), (5, 16), (130, 65)], ids=str)
@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_are_the_formula(kind, sizes, N):
    """One step is what the formula says, whatever the size; a row of zeros and an outlier too."""
    kind = INTEGERS[kind]
    cell = lstm_ext.LSTMCell(*sizes, bias=N != 7, peephole=N == 3).eval()
    with torch.no_grad():
        cell.weight_ih[1] = 0
        cell.weight_hh[-1] = -0.25
        x, h, c = (torch.randn(N, size) for size in (*sizes, sizes[1]))
        x[0] = 0
        x[-1, 0] = 1e4
        expected = by_hand(cell, x, h, c, kind)
        found = lstm_ext.freeze(cell, **kind)(x, (h, c))
    for got, exact in zip(found, expected, strict=True):
        # The outlier's products have the rounding of numbers of their size.
        error = (got - exact).abs().amax(-1)
        assert error[:-1].le(2e-6).all()
        assert error[-1] < 5e-3


@pytest.mark.parametrize("options", [*OPTIONS, {"peephole": True}], ids=identify)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_same_bits_in_any_company(kind, size, options):
    """A row alone, in a batch, padded, packed, on one thread and on two; steps one by one."""
    L, N, I, H = size
    lstm = lstm_ext.LSTM(I, H, **{**options, "batch_first": False}).eval()
    frozen = lstm_ext.freeze(lstm, **WEIGHTS[kind])
    x = torch.randn(L, N, I)
    lengths = torch.randint(1, L + 1, (N,))
    with torch.no_grad():
        output, (h, c) = frozen(x)
        rows = [frozen(x[:, n]) for n in range(min(N, 4))]
        for n, (row, (row_h, row_c)) in enumerate(rows):
            assert torch.equal(row, output[:, n])
            assert torch.equal(row_h, h[:, n])
            assert torch.equal(row_c, c[:, n])
        packed, _ = frozen(pack_padded_sequence(x, lengths, enforce_sorted=False))
        padded, _ = pad_packed_sequence(packed, total_length=L)
        for n in range(min(N, 4)):
            length = int(lengths[n])
            assert torch.equal(padded[:length, n], frozen(x[:length, n])[0])
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            assert torch.equal(frozen(x)[0], output)
        finally:
            torch.set_num_threads(threads)
        if not lstm.bidirectional:
            states = None
            for t in range(L):
                step, states = frozen(x[t : t + 1], states)
                assert torch.equal(step[0], output[t])


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_pass_on_what_is_no_number(kind):
    """Nothing that came of an infinity or NaN is a number, and other rows know nothing of it."""
    lstm = lstm_ext.LSTM(5, 20).eval()
    x = torch.randn(6, 4, 5)
    spoilt = x.clone()
    spoilt[2, 1, 3], spoilt[3, 2, 0] = float("nan"), -float("inf")
    frozen = lstm_ext.freeze(lstm, **INTEGERS[kind])
    with torch.no_grad():
        good, bad = frozen(x)[0], frozen(spoilt)[0]
        for row, step in ((1, 2), (2, 3)):
            assert torch.equal(bad[:step, row], good[:step, row])
            assert bad[step:, row].isnan().all()
        assert torch.equal(bad[:, ::3], good[:, ::3])
        lstm.weight_hh_l0[7, 2] = float("inf")  # the input gate of unit 7
        lstm.weight_ih_l0[45, 2] = float("nan")  # gate g of unit 5
        states = lstm_ext.freeze(lstm, **INTEGERS[kind])(x[:1])[0][0]
        assert states.isnan().any(0).nonzero().flatten().tolist() == [5, 7]


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_extreme_size(kind):
    """Numbers near the ends of float32: right or zero, never something else."""
    kind = INTEGERS[kind]
    cell = lstm_ext.LSTMCell(4, 3).eval()
    h = torch.zeros(1, 3)
    with torch.no_grad():
        alone = lstm_ext.freeze(cell, **kind)(torch.zeros(1, 4), (h, h))
        for size in (1e-45, 1e-38, 1e-31, 1e-20):
            tiny = lstm_ext.freeze(cell, **kind)(torch.full((1, 4), size), (h, h))
            torch.testing.assert_close(tiny, alone, rtol=0, atol=1e-7)
        huge = lstm_ext.freeze(cell, **kind)(torch.full((1, 4), 3e38), (h, h))
        torch.testing.assert_close(huge, cell(torch.full((1, 4), 3e38), (h, h)))
        cell.weight_ih.mul_(1e-28)
        large = torch.full((1, 4), 1e28)
        frozen = lstm_ext.freeze(cell, **kind)(large, (h, h))
        torch.testing.assert_close(frozen, cell(large, (h, h)), rtol=0.02, atol=0.02)


def test_sums_that_might_not_fit():
    w = torch.zeros(4, 2**17 + 1), torch.zeros(4, 1)
    for weights in (2, 3):
        with pytest.raises(RuntimeError, match="may not fit into 32 bits"):
            torch.ops.lstm_ext.lstm_layer_pack(*w, weights)
    # The greatest sum that can be, of so many as may be.
    cell = lstm_ext.LSTMCell(2**17, 1, bias=False).eval()
    with torch.no_grad():
        cell.weight_ih.fill_(2.0**-17)
        for kind in INTEGERS.values():
            h, c = lstm_ext.freeze(cell, **kind)(torch.ones(1, 2**17))
            torch.testing.assert_close((h, c), cell(torch.ones(1, 2**17)))


@pytest.mark.parametrize("N", [1, 3, 50])
@pytest.mark.parametrize("peephole", [False, True])
def test_cell_in_bfloat16(N, peephole):
    cell = lstm_ext.LSTMCell(30, 44, peephole=peephole).eval()
    frozen = lstm_ext.freeze(cell, weights="bfloat16")
    x, hx = torch.randn(N, 30), (torch.randn(N, 44), torch.randn(N, 44))
    with torch.no_grad():
        expected = rounded(cell)(x, hx)
        torch.testing.assert_close(frozen(x, hx), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(frozen(x), rounded(cell)(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(frozen(x[0])[0], rounded(cell)(x[0])[0], rtol=1e-5, atol=1e-6)
        with pytest.raises(RuntimeError, match=r"hidden|expected an input"):
            frozen(x, (hx[0][:, :3], hx[1]))
    with pytest.raises(RuntimeError, match="for inference"):
        frozen(x, (hx[0].requires_grad_(), hx[1]))
    again = pickle.loads(pickle.dumps(frozen))
    with torch.no_grad():
        assert torch.equal(again(x)[0], frozen(x)[0])
    assert "frozen in bfloat16" in repr(frozen)


# In percent of the output, of weights as torch draws them: twice what a simulation found.
ERRORS = {"bfloat16": 0.4, "int8": 1.7, "int8-int16": 0.9}
SHARES = {"bfloat16": 0.5, "int8": 0.25, "int8-int16": 0.25}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_error_and_memory(kind):
    torch.manual_seed(0)
    lstm = lstm_ext.LSTM(256, 256).eval()
    frozen, whole = lstm_ext.freeze(lstm, **WEIGHTS[kind]), lstm_ext.freeze(lstm)
    sizes = [m.packed_0.numel() for m in (frozen, whole)]
    assert sizes[0] < (SHARES[kind] + 0.01) * sizes[1]
    x = torch.randn(100, 4, 256)
    exact = copy.deepcopy(lstm).double()(x.double())[0]
    with torch.no_grad():
        error = 100 * (frozen(x)[0] - exact).norm() / exact.norm()
        assert ERRORS[kind] / 10 < error < ERRORS[kind]
    with torch.no_grad(), torch.autocast("cpu"):
        assert frozen(x)[0].dtype == whole(x)[0].dtype


@pytest.mark.parametrize("kind", WEIGHTS)
def test_pickled_and_copied(kind):
    lstm = lstm_ext.LSTM(9, 40, num_layers=2).eval()
    frozen, x = lstm_ext.freeze(lstm, **WEIGHTS[kind]), torch.randn(3, 2, 9)
    with torch.no_grad():
        for again in (pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen)):
            assert torch.equal(again(x)[0], frozen(x)[0])
            assert repr(again) == repr(frozen)
    assert f"frozen in {WEIGHTS[kind]['weights']}" in repr(frozen)
    assert ("activations in int16" in repr(frozen)) == (kind == "int8-int16")
    assert lstm_ext.unfreeze(frozen) is lstm


def test_not_numbers():
    """What is no number stays none, and goes no further than in a plain module."""
    lstm = lstm_ext.LSTM(3, 4).eval()
    with torch.no_grad():
        lstm.weight_ih_l0[0, 0] = float("nan")
        lstm.weight_hh_l0[5, 1] = float("inf")
    frozen = lstm_ext.freeze(lstm, weights="bfloat16")
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        assert torch.equal(frozen(x)[0].isnan(), lstm(x)[0].isnan())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_for_float32_alone(kind, dtype):
    model = nn.ModuleList([lstm_ext.LSTM(3, 4), lstm_ext.LSTM(3, 4, dtype=dtype)]).eval()
    with pytest.raises(ValueError, match=r"weights='(bfloat16|int8)' is for modules in float32"):
        lstm_ext.freeze(model, **WEIGHTS[kind])
    assert type(model[0]) is lstm_ext.LSTM  # whole or not at all
    w = torch.randn(16, 3, dtype=dtype), torch.randn(16, 4, dtype=dtype)
    for weights in (1, 2, 3, 4, -1):
        with pytest.raises(RuntimeError, match="no weights of type"):
            torch.ops.lstm_ext.lstm_layer_pack(*w, weights)


def test_unknown_types():
    lstm = lstm_ext.LSTM(3, 4).eval()
    for wrong in ("int3", ["int8"], 8):
        with pytest.raises(ValueError, match="weights should be None, 'bfloat16' or 'int8', got"):
            lstm_ext.freeze(lstm, weights=wrong)
    with pytest.raises(ValueError, match="activations should be None or 'int16', got 'int8'"):
        lstm_ext.freeze(lstm, weights="int8", activations="int8")
    for weights in (None, "bfloat16"):
        with pytest.raises(ValueError, match="activations='int16' is for weights='int8', got"):
            lstm_ext.freeze(lstm, weights=weights, activations="int16")


def test_weights_of_another_type_are_refused():
    """By the header: their bytes would be read as something else."""
    op = torch.ops.lstm_ext
    w, h = (torch.randn(16, 3), torch.randn(16, 4)), torch.zeros(2, 4)
    x = torch.randn(5, 2, 3)
    whole, half, integers, _ = (op.lstm_layer_pack(*w, weights) for weights in range(4))
    for cut in (
        whole[: half.numel()],
        torch.cat([half[:64], whole[64:]]),
        torch.cat([integers[:64], half[64:]]),
    ):
        with pytest.raises(RuntimeError, match="pack"):
            op.lstm_layer_packed(x, h, h, cut, None, None, None, None, False)
    for wrong in (7, -1, 2**40):
        header = half.clone()
        header[32:40] = torch.tensor([wrong]).view(torch.uint8)
        with pytest.raises(RuntimeError, match="packed for"):
            op.lstm_layer_packed(x, h, h, header, None, None, None, None, False)
