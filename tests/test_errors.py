"""Wrong input: the error, its type and its words are torch.nn.LSTMCell's."""

import sys

import pytest
import torch
from torch import nn

import lstm_ext

X, H, C = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)

# What a call of an LSTMCell(3, 2) gets.
CALLS = {
    "input 3-D": (X[None],),
    "input 0-D": (torch.tensor(1.0),),
    "input size": (torch.randn(4, 5),),
    "input size, unbatched": (torch.randn(5),),
    "h 3-D": (X, (H[None], C)),
    "c 3-D": (X, (H, C[None])),
    "c 0-D": (X, (H, C[0, 0])),
    "h size": (X, (torch.randn(4, 5), C)),
    "c size": (X, (H, torch.randn(4, 5))),
    "h batch": (X, (H[:3], C)),
    "c batch": (X, (H, C[:3])),
    "states of one row": (X, (H[:1], C[:1])),
    "input unbatched, states batched": (X[0], (H, C)),
    "input batched, states unbatched": (X, (H[0], C[0])),
    "input and h unbatched, c batched": (X[0], (H[0], C)),
    "input double": (X.double(),),
    "h double": (X, (H.double(), C)),
    "all double": (X.double(), (H.double(), C.double())),
    "input long": (X.long(),),
    "input bool": (X > 0,),
    "input half": (X.half(),),
    "input complex": (X.to(torch.complex64),),
    "input on meta": (X.to("meta"),),
    "h on meta": (X, (H.to("meta"), C)),
    "c on meta": (X, (H, C.to("meta"))),
    "states a tensor": (X, H),
    "states stacked": (X, torch.stack([H, C])),
    "one state": (X, (H,)),
    "three states": (X, (H, C, C)),
    "no states in the pair": (X, (None, None)),
    "no c": (X, (H, None)),
    "states a string": (X, "hc"),
    "states a number": (X, 1),
    "states numbers": (X, (1.0, 2.0)),
    "states a dict": (X, {"h": H, "c": C}),
    "input None": (None,),
    "input a list": ([[1.0, 2.0, 3.0]],),
    "input an array": (X.numpy(),),
    "input a number": (1.0,),
    "sparse c": (X, (H, C.to_sparse())),
    "mkldnn input": (X.to_mkldnn(),),
    "neither": (1.0, 1),
    "input None, states a tensor": (None, H),
    "no input": (),
    "too many": (X, (H, C), C),
}

# What a cell's parameters are replaced by.
PARAMETERS = {
    "weight_ih rows": {"weight_ih": torch.randn(6, 3)},
    "weight_ih columns": {"weight_ih": torch.randn(8, 4)},
    "weight_ih 3-D": {"weight_ih": torch.randn(1, 8, 3)},
    "weight_hh rows": {"weight_hh": torch.randn(6, 2)},
    "weight_hh columns": {"weight_hh": torch.randn(8, 3)},
    "bias_ih size": {"bias_ih": torch.randn(7)},
    "bias_hh size": {"bias_hh": torch.randn(7)},
    "weight_ih double": {"weight_ih": torch.randn(8, 3).double()},
    "weight_hh double": {"weight_hh": torch.randn(8, 2).double()},
    "bias_ih double": {"bias_ih": torch.randn(8).double()},
    "bias_hh double": {"bias_hh": torch.randn(8).double()},
    "bias_ih on meta": {"bias_ih": torch.randn(8, device="meta")},
    "three gates": {"weight_ih": torch.randn(6, 3), "weight_hh": torch.randn(6, 2)},
}

CONSTRUCTIONS = {
    "negative input": (-1, 2),
    "negative hidden": (3, -2),
    "float input": (3.0, 2),
    "string": ("3", 2),
    "integer dtype": (3, 2, True, None, torch.int32),
    "unknown device": (3, 2, True, "nowhere"),
    "too few": (3,),
}


def outcome(function):
    """What a call comes to: an exception, or None."""
    try:
        function()
    except Exception as error:
        return error
    return None


def assert_same_error(a, b):
    assert b is not None, "torch raises nothing here: the case belongs elsewhere"
    assert type(a) is type(b)
    assert str(a).replace("lstm_ext.cell.", "") == str(b).replace("torch.nn.modules.rnn.", "")


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls(name, mode):
    cells = [kind(3, 2) for kind in (lstm_ext.LSTMCell, nn.LSTMCell)]
    modes = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    with modes[mode]():
        a, b = (outcome(lambda cell=cell: cell(*CALLS[name])) for cell in cells)
    assert_same_error(a, b)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", PARAMETERS)
def test_wrong_parameters(name, grad):
    outcomes = []
    for kind in (lstm_ext.LSTMCell, nn.LSTMCell):
        cell = kind(3, 2)
        for parameter, value in PARAMETERS[name].items():
            setattr(cell, parameter, nn.Parameter(value, requires_grad=grad))
        with torch.set_grad_enabled(grad):
            outcomes.append(outcome(lambda cell=cell: cell(X, (H, C))))
    assert_same_error(*outcomes)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_wrong_constructions(name):
    a, b = (
        outcome(lambda kind=kind: kind(*CONSTRUCTIONS[name]))
        for kind in (lstm_ext.LSTMCell, nn.LSTMCell)
    )
    assert_same_error(a, b)


@pytest.mark.parametrize("position", range(7))
def test_functional_form_names_what_is_no_tensor(position):
    args = [X, H, C, torch.randn(8, 3), torch.randn(8, 2), torch.randn(8), torch.randn(8)]
    args[position] = "a string"
    x, h, c, *weights = args
    a = outcome(lambda: lstm_ext.lstm_cell(x, (h, c), *weights))
    b = outcome(lambda: torch.lstm_cell(x, (h, c), *weights))
    assert type(a) in (type(b), RuntimeError)
    assert "Tensor" in str(a)


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
def test_weights_of_one_dimension(name):
    """torch speaks of a dimension out of range; the type is the same, the words are clearer."""
    weights = {"weight_ih": torch.randn(8, 3), "weight_hh": torch.randn(8, 2)}
    weights[name] = torch.randn(8)
    with pytest.raises(IndexError, match=rf"{name} must be 2-D \(4 \* hidden_size, .*got 1-D"):
        lstm_ext.lstm_cell(X, (H, C), *weights.values())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on")
@pytest.mark.parametrize("name", ["input None", "no c", "input a list", "states numbers"])
def test_obscure_errors_get_a_note(name):
    error = outcome(lambda: lstm_ext.LSTMCell(3, 2)(*CALLS[name]))
    (note,) = error.__notes__
    assert "takes a Tensor and a pair of Tensors (h, c) or None, got: " in note


def test_a_failed_call_changes_nothing():
    cell = lstm_ext.LSTMCell(3, 2)
    before = [p.detach().clone() for p in cell.parameters()]
    for args in CALLS.values():
        assert outcome(lambda args=args: cell(*args)) is not None
    for p, old in zip(cell.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None
    assert cell(X, (H, C))[0].shape == (4, 2)
