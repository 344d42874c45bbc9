"""Options of an LSTM that are set to anything, on every path: torch's result, or torch's error."""

import functools
import itertools

import numpy as np
import pytest
import torch
from limits import slow
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

L, N, I, H = 5, 3, 4, 4

# What is set after construction. A hidden_size or bias that the weights do not fit makes torch's
# fused float32 LSTM read memory that is not theirs; there ours raises what torch raises in float64.
CHANGES = {
    "nothing": {},
    "batch_first": {"batch_first": True},
    "batch_first 1": {"batch_first": 1},
    "batch_first of numpy": {"batch_first": np.True_},
    "bidirectional": {"bidirectional": True},
    "bidirectional 1": {"bidirectional": 1},
    "bidirectional 0": {"bidirectional": 0},
    "bidirectional of numpy": {"bidirectional": np.False_},
    "bidirectional None": {"bidirectional": None},
    "one layer of two": {"num_layers": 1},
    "three layers of two": {"num_layers": 3},
    "layers of numpy": {"num_layers": np.int64(2)},
    "layers True": {"num_layers": True},
    "layers 2.0": {"num_layers": 2.0},
    "bias 1": {"bias": 1},
    "bias False": {"bias": False},
    "dropout True": {"dropout": True},
    "dropout 0": {"dropout": 0},
    "dropout too large": {"dropout": 2.0},
    "dropout below 0": {"dropout": -0.5},
    "dropout no number": {"dropout": float("nan")},
    "dropout a word": {"dropout": "half"},
    "dropout None": {"dropout": None},
    "training 1": {"training": 1},
    "hidden_size": {"hidden_size": 5},
    "input_size": {"input_size": 5},
    "proj_size": {"proj_size": 2},
    "two at once": {"batch_first": True, "num_layers": np.int32(2)},
}
BEYOND_MEMORY = ("bias False", "hidden_size")
BUILT = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "no bias": {"bias": False},
    "projected": {"proj_size": 2},
    "bidirectional=1": {"bidirectional": 1},
    "bidirectional of numpy": {"bidirectional": np.True_},
}


def states(module):
    layers = int(module.num_layers) * (2 if module.bidirectional else 1)
    generator = torch.Generator().manual_seed(3)
    dtype = module._flat_weights[0].dtype
    sizes = module.proj_size or module.hidden_size, module.hidden_size
    return tuple(torch.randn(layers, N, s, generator=generator, dtype=dtype) for s in sizes)


def packed(x):
    return pack_padded_sequence(x, torch.tensor([5, 2, 4][: x.shape[1]]), enforce_sorted=False)


def in_a_call(module, x):
    return functional_call(module, dict(module.named_parameters()), (x,))


def evaluated(module, x):
    with torch.no_grad():
        return module.eval()(x)


# How torch's module is called; how ours is, if otherwise; whether ours is frozen.
PATHS = {
    "plain": (lambda m, x: m(x), None),
    "no gradient": (lambda m, x: torch.no_grad()(m)(x), None),
    "states": (lambda m, x: m(x, states(m)), None),
    "one sequence": (lambda m, x: m(x[:, 0]), None),
    "packed": (lambda m, x: m(packed(x)), None),
    "functional_call": (in_a_call, None),
    "evaluation": (evaluated, None),
    "reset": (lambda m, x: m(x), lambda m, x: m(x, reset=no_reset(x))),
    "checkpoint_every": (lambda m, x: m(x), lambda m, x: every(m, 2)(x)),
    "frozen": (evaluated, lambda m, x: m(x)),
    "frozen, packed": (lambda m, x: evaluated(m, packed(x)), lambda m, x: m(packed(x))),
    "frozen, freed": (evaluated, lambda m, x: m(x)),
    "frozen, freed, packed": (lambda m, x: evaluated(m, packed(x)), lambda m, x: m(packed(x))),
    "frozen, reset": (evaluated, lambda m, x: m(x, reset=no_reset(x))),
    "trace": (lambda m, x: m(x), lambda m, x: traced(m, x)),
    "differentiable trace": (lambda m, x: m(x), lambda m, x: traced(m, x, differentiable=True)),
}


def no_reset(x):
    return torch.zeros(x.shape[:2], dtype=torch.bool)


def every(module, steps):
    module.checkpoint_every = steps
    return module


def traced(module, x, **options):
    trace = lstm_ext.trace_gates(module, x, **options)
    directions = 2 if trace.bidirectional else 1
    output = torch.cat(tuple(trace.h[-directions:]), -1)
    return output.transpose(0, 1) if module.batch_first else output


def outcome(call):
    torch.manual_seed(1)
    try:
        out = call()
    except Exception as error:
        return type(error), None
    tensors = (out,) if isinstance(out, torch.Tensor) else (out[0], *out[1])
    return None, [t.data if isinstance(t, PackedSequence) else t for t in tensors]


def modules(path, converted, dtype, built, changes):
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H, num_layers=2, dropout=0.5, dtype=dtype, **built)
    if converted:
        ours = nn.LSTM(I, H, num_layers=2, dropout=0.5, dtype=dtype, **built)
        lstm_ext.convert(ours)
    else:
        ours = lstm_ext.LSTM(I, H, num_layers=2, dropout=0.5, dtype=dtype, **built)
    ours.load_state_dict(theirs.state_dict())
    if path.startswith("frozen"):
        theirs.eval()
        ours = lstm_ext.freeze(ours.eval(), keep_weights="freed" not in path)
    for name, value in changes.items():
        for module in (theirs, ours):
            setattr(module, name, value)
    return theirs, ours


def compare(path, converted, dtype, built, changes, beyond_memory):
    their_call, our_call = PATHS[path]
    theirs, ours = modules(path, converted, dtype, built, changes)
    x = torch.randn(L, N, I, dtype=dtype, generator=torch.Generator().manual_seed(2))
    with torch.set_grad_enabled(not path.startswith("frozen")):
        error, tensors = outcome(functools.partial(their_call, theirs, x))
        our_error, our_tensors = outcome(functools.partial(our_call or their_call, ours, x))
    if beyond_memory and dtype == torch.float32:
        assert our_error in (RuntimeError, error)
        return
    if our_error is not None and error is None:
        # torch's result, from weights for more layers than it uses, has no reset and no trace.
        assert changes.get("num_layers") == 1
        assert "reset" in path or "checkpoint" in path or "trace" in path
        return
    assert our_error is error
    if error is None:
        for found, expected in zip(our_tensors, tensors, strict=False):  # a trace has one
            torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:dropout option", "ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.float64)], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_construction(change, path, dtype):
    if change == "training 1" and path.startswith(("frozen", "evaluation")):
        pytest.skip("these paths set training themselves")
    beyond_memory = change in BEYOND_MEMORY
    dtypes = {dtype, torch.float64} if beyond_memory else {dtype}
    for kind, converted in itertools.product(dtypes, (False, True)):
        compare(path, converted, kind, {}, CHANGES[change], beyond_memory)


@pytest.mark.filterwarnings("ignore:dropout option", "ignore:LSTM with projections")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("built", BUILT)
def test_given_at_construction(built, path):
    if path.startswith("frozen") and type(BUILT[built].get("bidirectional", True)) is not bool:
        with pytest.raises(TypeError):
            modules(path, False, torch.float32, BUILT[built], {})
        return
    compare(path, False, torch.float32, BUILT[built], {}, False)
