"""Tools that look at each call: torch.jit.trace, TensorBoard, expanded weights, the profiler."""

import pytest
import torch
from layers import pair
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_ext
from lstm_ext import _backend

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"
)


class Layer(nn.Module):
    def __init__(self, package=lstm_ext):
        super().__init__()
        self.lstm = package.LSTM(3, 4, num_layers=2, bidirectional=True)

    def forward(self, x):
        return self.lstm(x)


class Packed(Layer):
    def forward(self, x):
        lengths = torch.tensor([3, 5])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, states = self.lstm(packed)
        return pad_packed_sequence(output)[0], states


class Cell(nn.Module):
    def __init__(self, package=lstm_ext):
        super().__init__()
        self.cell = package.LSTMCell(3, 4)

    def forward(self, x):
        state = self.cell(x[0])
        for step in x[1:]:
            state = self.cell(step, state)
        return state


MODELS = pytest.mark.parametrize("kind", [Layer, Packed, Cell])


@MODELS
def test_jit_trace(kind, tmp_path):
    """The trace is one of torch.nn's operators, and so needs nothing of ours where it is loaded."""
    model = kind().eval()
    traced = torch.jit.trace(model, torch.randn(5, 2, 3))
    assert "lstm_ext::" not in str(traced.inlined_graph)
    traced.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(loaded(x), model(x))


def test_jit_trace_of_another_size():
    traced = torch.jit.trace(model := Layer().eval(), torch.randn(5, 2, 3))
    x = torch.randn(7, 3, 3)
    torch.testing.assert_close(traced(x), model(x))


@MODELS
def test_tensorboard_graph(kind):
    graph = pytest.importorskip("torch.utils.tensorboard._pytorch_graph").graph
    x = torch.randn(5, 2, 3)
    nodes = [[node.op for node in graph(kind(package), x)[0].node] for package in (nn, lstm_ext)]
    assert nodes[0] == nodes[1]
    assert len(nodes[0]) > 5


@MODELS
def test_verbose_line_of_a_trace(kind, monkeypatch, capsys):
    monkeypatch.setattr(_backend, "_VERBOSE", True)
    x = torch.randn(5, 2, 3)
    model = kind()
    model(x)
    assert "is tracing" not in capsys.readouterr().err
    torch.jit.trace(model, x)
    name = "LSTMCell" if kind is Cell else "LSTM"
    said = capsys.readouterr().err
    assert f"lstm_ext: {name}, float32 input" in said
    assert f"torch.nn.{name}.forward: torch.jit is tracing" in said


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"num_layers": 2},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False, "batch_first": True},
    ],
    ids=str,
)
def test_expanded_weights(options, monkeypatch, capsys):
    """Gradients of each sample: what torch computes for its own layer, in the dtype it can."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    monkeypatch.setattr(_backend, "_VERBOSE", True)
    modules = pair(3, 4, torch.float64, **options)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    dim = 0 if options.get("batch_first") else 1
    for module in modules:
        call = call_for_per_sample_grads(
            module, batch_size=x.shape[dim], batch_first=bool(options.get("batch_first"))
        )
        call(x)[0].square().sum().backward()
    assert "the weights are of type ExpandedWeight" in capsys.readouterr().err
    for k in range(x.shape[dim]):
        one = modules[1](x.narrow(dim, k, 1))[0].square().sum()
        expected = torch.autograd.grad(one, list(modules[1].parameters()))
        for gradient, theirs, mine in zip(
            expected, *(m.parameters() for m in modules), strict=True
        ):
            torch.testing.assert_close(mine.grad_sample[k], theirs.grad_sample[k])
            torch.testing.assert_close(mine.grad_sample[k], gradient)


def test_expanded_weights_of_a_cell_are_refused_as_torchs_are():
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    for package in (nn, lstm_ext):
        with pytest.raises(RuntimeError, match="Expanded Weights encountered but cannot handle"):
            call_for_per_sample_grads(package.LSTMCell(3, 4), batch_size=2)(torch.randn(2, 3))


def names(call, tool):
    with tool() as profile:
        call()
    return {event.key for event in profile.key_averages()}


PROFILERS = {
    "torch.profiler": lambda: torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ),
    "torch.autograd.profiler": torch.autograd.profiler.profile,
}
RANGES = {
    Layer: ("lstm_ext::lstm_layer", "LSTMLayerBackward", "lstm_ext::lstm_layer_backward"),
    Packed: ("lstm_ext::lstm_layer", "LSTMLayerBackward", "lstm_ext::lstm_layer_backward"),
    Cell: ("lstm_ext::lstm_cell", "LSTMCellBackward", "lstm_ext::lstm_cell_backward"),
}


@pytest.mark.parametrize("tool", PROFILERS)
@MODELS
def test_profiler(kind, tool):
    """Ranges of forward and backward have the operators' names."""
    model = kind()
    x = torch.randn(5, 2, 3)
    found = names(lambda: model(x)[0].square().sum().backward(), PROFILERS[tool])
    for name in RANGES[kind]:
        assert name in found
    frozen = lstm_ext.freeze(kind().eval())
    with torch.no_grad():
        found = names(lambda: frozen(x), PROFILERS[tool])
    # A small frozen cell computes from plain weights.
    assert ("lstm_ext::lstm_cell" if kind is Cell else "lstm_ext::lstm_layer_packed") in found
