"""Frozen modules whose packed weights are stored in fewer bits."""

import copy
import pickle

import pytest
import torch
from layers import OPTIONS, identify
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext

SIZES = [
    (1, 1, 1, 1),
    (7, 1, 9, 40),
    (5, 3, 17, 8),
    (3, 20, 64, 65),
    (2, 200, 5, 16),
    (50, 2, 3, 7),
]


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


@pytest.mark.parametrize("N", [1, 3, 50])
@pytest.mark.parametrize("peephole", [False, True])
def test_cell(N, peephole):
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


def test_error_and_memory():
    """Half the bytes, and less than a percent of the output."""
    torch.manual_seed(0)
    lstm = lstm_ext.LSTM(256, 256).eval()
    frozen, whole = lstm_ext.freeze(lstm, weights="bfloat16"), lstm_ext.freeze(lstm)
    sizes = [m.packed_0.numel() for m in (frozen, whole)]
    assert sizes[0] < 0.51 * sizes[1]
    x = torch.randn(100, 4, 256)
    exact = copy.deepcopy(lstm).double()(x.double())[0]
    with torch.no_grad():
        error = (frozen(x)[0] - exact).norm() / exact.norm()
        assert 1e-4 < error < 5e-3
    with torch.no_grad(), torch.autocast("cpu"):
        assert frozen(x)[0].dtype == whole(x)[0].dtype


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
def test_for_float32_alone(dtype):
    model = nn.ModuleList([lstm_ext.LSTM(3, 4), lstm_ext.LSTM(3, 4, dtype=dtype)]).eval()
    with pytest.raises(ValueError, match=r"weights='bfloat16' is for modules in float32"):
        lstm_ext.freeze(model, weights="bfloat16")
    assert type(model[0]) is lstm_ext.LSTM  # whole or not at all
    w = torch.randn(16, 3, dtype=dtype), torch.randn(16, 4, dtype=dtype)
    for weights in (1, 2, -1):
        with pytest.raises(RuntimeError, match="no weights of type"):
            torch.ops.lstm_ext.lstm_layer_pack(*w, weights)


def test_unknown_type():
    with pytest.raises(ValueError, match="weights should be None or 'bfloat16', got 'int3'"):
        lstm_ext.freeze(lstm_ext.LSTM(3, 4).eval(), weights="int3")


def test_weights_of_another_type_are_refused():
    """By the header: their bytes would be read as something else."""
    op = torch.ops.lstm_ext
    w, h = (torch.randn(16, 3), torch.randn(16, 4)), torch.zeros(2, 4)
    x = torch.randn(5, 2, 3)
    whole, half = (op.lstm_layer_pack(*w, weights) for weights in (0, 1))
    for cut in (whole[: half.numel()], torch.cat([half[:64], whole[64:]])):
        with pytest.raises(RuntimeError, match="pack"):
            op.lstm_layer_packed(x, h, h, cut, None, None, None, None, False)
    for wrong in (7, -1, 2**40):
        header = half.clone()
        header[32:40] = torch.tensor([wrong]).view(torch.uint8)
        with pytest.raises(RuntimeError, match="packed for"):
            op.lstm_layer_packed(x, h, h, header, None, None, None, None, False)
