"""convert of classes of other packages that derive from none of torch's (_other_classes.py).

torchaudio's LSTM is written here by its formula, under its name; tests/test_published.py takes
torchaudio's own.
"""

import contextlib
import copy
import functools
import io
import pickle
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import lstm_ext

L, N, I, H = 5, 3, 4, 6


class Formula(nn.Module):
    """Gates i, f, g, o from one normalised sum; the normalised c goes on."""

    def __init__(self, inputs, hidden, normed=True, eps=1e-5):
        super().__init__()
        self.x2g = nn.Linear(inputs, 4 * hidden, bias=not normed)
        self.p2g = nn.Linear(hidden, 4 * hidden, bias=False)
        self.c_norm = nn.LayerNorm(hidden, eps=eps) if normed else nn.Identity()
        self.g_norm = nn.LayerNorm(4 * hidden, eps=eps) if normed else nn.Identity()
        self.hidden_dim = hidden

    def forward(self, input, state):
        h, c = input.new_zeros(2, input.shape[1], self.hidden_dim) if state is None else state
        output = []
        for x in input:
            i, f, g, o = self.g_norm(self.x2g(x) + self.p2g(h)).chunk(4, -1)
            c = self.c_norm(f.sigmoid() * c + i.sigmoid() * g.tanh())
            h = o.sigmoid() * c.tanh()
            output.append(h)
        return torch.stack(output), [h, c]


@pytest.fixture
def rnnt(monkeypatch):
    """A module of torchaudio's name with a class of its name."""
    module = types.ModuleType("torchaudio.models.rnnt")
    members = {k: v for k, v in vars(Formula).items() if k not in ("__dict__", "__weakref__")}
    del members["__init__"]
    kind = type("_CustomLSTM", (Formula,), {**members, "__module__": module.__name__})
    kind.__qualname__ = "_CustomLSTM"
    module._CustomLSTM = kind
    for name in ("torchaudio", "torchaudio.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def drawn(module):
    """Weights that are not the first ones of a normalisation."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) / 4)
    return module


@contextlib.contextmanager
def nothing_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def operators(module, *arguments):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(*arguments)
    return {e.key for e in profile.key_averages() if e.key.startswith("lstm_ext::")}


def called(module, x, state):
    output, (h, c) = module(x, state)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    loss = (output * weights).sum() + h.square().sum() + (c * weights[0]).sum()
    inputs = [t for t in (x, *(state or ())) if t.requires_grad]
    return [output, h, c, *torch.autograd.grad(loss, [*module.parameters(), *inputs])]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers(rnnt, normed, eps, given, dtype):
    torch.manual_seed(0)
    theirs = drawn(rnnt._CustomLSTM(I, H, normed, eps)).to(dtype)
    ours = copy.deepcopy(theirs)
    before = dict(ours.named_parameters())
    with nothing_said():
        assert lstm_ext.convert(ours) is ours
    assert isinstance(ours, rnnt._CustomLSTM)
    assert type(ours).__name__ == "_CustomLSTM"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(p is before[name] for name, p in ours.named_parameters())
    x = torch.randn(L, N, I, dtype=dtype, requires_grad=True)
    state = [torch.randn(N, H, dtype=dtype, requires_grad=True) for _ in range(2)]
    state = state if given else None
    for mode in (True, False):
        theirs.train(mode), ours.train(mode)
        expected, found = called(theirs, x, state), called(ours, x, state)
        bound = 1e-5 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(found[:3], expected[:3], rtol=bound, atol=bound)
        # Normalising six numbers makes more of an error: torch's own gradients have that of ours.
        torch.testing.assert_close(found[3:], expected[3:], rtol=10 * bound, atol=10 * bound)
    assert type(ours(x, state)[1]) is list
    operator = "lstm_ext::lstm_recurrence" if normed else "lstm_ext::lstm"
    assert operator in operators(ours, x, state)
    assert lstm_ext.revert(ours) is ours
    assert type(ours) is rnnt._CustomLSTM
    torch.testing.assert_close(called(ours, x, state), called(theirs, x, state), rtol=0, atol=0)


@pytest.mark.parametrize("normed", [True, False])
def test_streaming(rnnt, normed):
    module = lstm_ext.convert(drawn(rnnt._CustomLSTM(I, H, normed)))
    x, state, outputs = torch.randn(L, N, I), None, []
    expected, last = module(x, None)
    for piece in x.split(2):
        output, state = module(piece, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.testing.assert_close(state, last)
    # One step is no faster in the operator, and runs as the package has it.
    assert operators(module, x, None)
    assert not operators(module, x[:1], None)


def test_copies_and_pickles(rnnt):
    module = lstm_ext.convert(drawn(rnnt._CustomLSTM(I, H)))
    x = torch.randn(L, N, I)
    file = io.BytesIO()
    torch.save(module, file)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for copied in copies:
        assert type(copied) is type(module)
        assert operators(copied, x, None)
        torch.testing.assert_close(copied(x, None), module(x, None))
        assert type(lstm_ext.revert(copied)) is rnnt._CustomLSTM


def test_report_and_twice(rnnt, capsys):
    model = nn.ModuleDict({"a": rnnt._CustomLSTM(I, H), "b": nn.Linear(2, 2)})
    with nothing_said():
        lstm_ext.convert(model, report=True)
        kind = type(model["a"])
        lstm_ext.convert(model, report=True)
        assert type(model["a"]) is kind
        lstm_ext.revert(model, report=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "lstm_ext.convert:", "  a: _CustomLSTM: converted",
        "lstm_ext.convert:", "  a: _CustomLSTM: is one of lstm_ext's already",
        "lstm_ext.revert:", "  a: _CustomLSTM: reverted",
    ]  # fmt: skip


def test_a_subclass_is_left(rnnt):
    kind = type("Decoder", (rnnt._CustomLSTM,), {})
    model = nn.Sequential(kind(I, H))
    with pytest.warns(UserWarning, match=r"convert left 0 \(Decoder\).*derives from torchaudio"):
        lstm_ext.convert(model)
    assert type(model[0]) is kind


def pruned(module):
    prune.l1_unstructured(module.p2g, "weight", amount=0.5)


def replaced(module):
    module.x2g = nn.Sequential(module.x2g)


def two_eps(module):
    module.g_norm.eps = 0.1


def biased(module):
    module.p2g = nn.Linear(H, 4 * H)


def without_bias(module):
    module.c_norm = nn.LayerNorm(H, bias=False)


@pytest.mark.parametrize("change", [pruned, replaced, two_eps, biased, without_bias])
def test_changed_modules_compute_as_the_package_has_it(rnnt, change):
    """Left if they were changed before; changed afterwards, they go their own way at each call."""
    torch.manual_seed(0)
    x = torch.randn(L, N, I)
    before, after = (drawn(rnnt._CustomLSTM(I, H)) for _ in range(2))
    lstm_ext.convert(after)
    for module in (before, after):
        change(module)
    with pytest.warns(UserWarning, match="convert left _CustomLSTM as it is"):
        lstm_ext.convert(before)
    assert type(before) is rnnt._CustomLSTM
    assert not operators(after, x, None)
    expected = rnnt._CustomLSTM.forward(after, x, None)
    torch.testing.assert_close(after(x, None), expected, rtol=0, atol=0)


def test_parametrized_weights(rnnt):
    theirs = drawn(rnnt._CustomLSTM(I, H))
    weight_norm(theirs.p2g)
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    x = torch.randn(L, N, I)
    assert operators(ours, x, None)
    expected, found = (called(m, x, None) for m in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_unusual_calls(rnnt):
    """What torch broadcasts, and torch's errors."""
    module = lstm_ext.convert(drawn(rnnt._CustomLSTM(I, H)))
    x, state = torch.randn(L, N, I), [torch.randn(1, H), torch.randn(1, H)]
    expected, _ = rnnt._CustomLSTM.forward(module, x, state)
    torch.testing.assert_close(module(x, state)[0], expected)
    for wrong in (x.double(), x[..., 1:]):
        with pytest.raises(RuntimeError, match=r"mat1 and mat2|same dtype"):
            module(wrong, None)


@pytest.mark.parametrize("normed", [True, False])
def test_tools(rnnt, normed):
    theirs = drawn(rnnt._CustomLSTM(I, H, normed))
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    x, state = torch.randn(L, N, I), [torch.randn(N, H) for _ in range(2)]
    expected, _ = theirs(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        for kept in (None, state):
            found, there = (m(x, kept) for m in (ours, theirs))
            dtypes = [[out.dtype, *(s.dtype for s in last)] for out, last in (found, there)]
            assert dtypes[0] == dtypes[1]
            torch.testing.assert_close(found, there, rtol=0.05, atol=0.05)
    program = torch.export.export(ours, (x, state))
    assert any("lstm_ext" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, state)[0], expected)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script.*lstm_ext\.revert"):
        torch.jit.script(ours)


def test_forwards_kept_elsewhere(rnnt):
    """As hooks of libraries keep them: replaced, and put back."""
    module = rnnt._CustomLSTM(I, H)
    module.forward = functools.partial(module.forward)
    x = torch.randn(L, N, I)
    with nothing_said():
        lstm_ext.convert(module)
    assert operators(module, x, None)
    lstm_ext.revert(module)
    assert not operators(module, x, None)
