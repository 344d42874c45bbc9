"""torch.compile, torch.export and AOTInductor over cell, layer and models that use them."""

import contextlib

import pytest
import torch
import torch._dynamo.backends.common
import torch._dynamo.compiled_autograd
import torch._dynamo.testing
from limits import slow
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_ext


class Stepper(nn.Module):
    """A cell stepped by hand, from the same tensor as h and c, as decoders do."""

    def __init__(self):
        super().__init__()
        self.cell = lstm_ext.LSTMCell(3, 4)
        self.start = nn.Linear(3, 4)

    def forward(self, x):
        h = self.start(x[0])
        state = (h, h)
        outputs = []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


MODELS = {"stepper": Stepper, "tagger": Tagger}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def gradients(call, model, x):
    return torch.autograd.grad(call(x).square().sum(), [x, *model.parameters()])


@pytest.mark.parametrize(
    ("model", "dynamic"),
    [("tagger", False), *slow(("stepper", False), ("stepper", True), ("tagger", True))],
    indirect=["model"],
)
@pytest.mark.usefixtures("allow_rnn")
def test_compile_forward_and_backward(model, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    # The stepper's loop is unrolled: its length is a constant.
    lengths = (5, 7) if isinstance(model, Tagger) else (5, 5)
    for L, N in zip(lengths, (2, 3), strict=True):
        x = torch.randn(L, N, 3, requires_grad=True)
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x))


@pytest.mark.parametrize("model", ["tagger", *slow("stepper")], indirect=True)
@pytest.mark.usefixtures("allow_rnn")
def test_compile_for_less_overhead(model, device):
    """mode="reduce-overhead": CUDA graphs on a GPU, which are replayed from the third call on."""
    torch._dynamo.reset()
    model = model.to(device)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(5, 2, 3, device=device, requires_grad=True)
        expected = model(x), gradients(model, model, x)
        torch.testing.assert_close((compiled(x), gradients(compiled, model, x)), expected)


@pytest.mark.parametrize("features", [8, 180])  # the operator's products, and products apart
def test_compiled_backward_of_small_and_large_cells(features):
    torch._dynamo.reset()
    cell = lstm_ext.LSTMCell(features, features)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code))
        return graph

    def two_steps(x):
        return cell(x, cell(x))[0]

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    compiled = torch.compile(two_steps, fullgraph=True, backend=backend)
    x = torch.randn(3, features, requires_grad=True)
    found, expected = (gradients(call, cell, x) for call in (compiled, two_steps))
    torch.testing.assert_close(found, expected)
    assert "lstm_cell_backward" in graphs[-1]
    assert ("aten.mm" in graphs[-1]) == (features == 180)


def test_second_derivative_of_a_large_cell_inside_a_dispatch_mode():
    cell = lstm_ext.LSTMCell(180, 180, dtype=torch.float64)
    x = torch.randn(2, 180, dtype=torch.float64, requires_grad=True)

    def second():
        leaves = [x, *cell.parameters()]
        first = torch.autograd.grad(cell(x)[0].square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    expected = second()
    with Watch():
        torch.testing.assert_close(second(), expected)


@pytest.mark.slow
def test_compiled_autograd(model):
    """An eager forward whose backward is compiled: recorded in the dispatcher's operators."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code))
        return graph

    def backward(x, compiled):
        model.zero_grad()
        loss = model(x).square().sum()
        if compiled:
            compiler = torch.compile(
                backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
            )
            with torch._dynamo.compiled_autograd._enable(compiler):
                loss.backward()
        else:
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for N in (2, 3):
        x = torch.randn(5, N, 3, requires_grad=True)
        expected, wanted = backward(x, False), x.grad.clone()
        x.grad = None
        torch.testing.assert_close(backward(x, True), expected)
        torch.testing.assert_close(x.grad, wanted)
    assert any("lstm_ext.lstm" in code and "_backward" in code for code in graphs)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)  # another mask of gradients, in a graph of its own
    x = torch.randn(5, 2, 3)
    others = [p for p in model.parameters() if p is not frozen]
    expected = torch.autograd.grad(model(x).square().sum(), others)
    model.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            loss = model(x).square().sum()
        loss.backward()
    torch.testing.assert_close([p.grad for p in others], list(expected))


def test_compiled_autograd_tells_directions_apart():
    torch._dynamo.reset()
    shapes = ((5, 2, 3), (2, 4), (2, 4), (16, 3), (16, 4), (16,), (16,))
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    for reverse in (False, True):
        found = {}
        for compiled in (False, True):
            output, _, _ = torch.ops.lstm_ext.lstm_layer(*leaves, None, None, reverse)
            compiler = torch.compile(backend="aot_eager")
            enable = torch._dynamo.compiled_autograd._enable(compiler)
            with enable if compiled else contextlib.nullcontext():
                output.square().sum().backward()
            found[compiled] = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
        torch.testing.assert_close(found[True], found[False])


@pytest.mark.usefixtures("allow_rnn")
def test_compile_does_not_recompile_for_every_size():
    model = Tagger()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(5, 2, 3))
    at_first = counter.frame_count
    for L, N in ((6, 3), (9, 4), (2, 8)):
        compiled(torch.randn(L, N, 3))
    assert counter.frame_count == at_first


def test_export(model):
    x = torch.randn(5, 2, 3)
    L, N = torch.export.Dim("L", min=2, max=64), torch.export.Dim("N", min=2, max=64)
    dims = {0: L, 1: N} if isinstance(model, Tagger) else {1: N}
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,))
    for size in ((5, 2), (9, 4) if isinstance(model, Tagger) else (5, 4)):
        x = torch.randn(*size, 3)
        torch.testing.assert_close(program.module()(x), model(x))
    operators = {str(node.target) for node in program.graph.nodes}
    assert any("lstm_ext" in name for name in operators)


def test_export_round_trip(model, tmp_path):
    x = torch.randn(5, 2, 3)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    torch.testing.assert_close(torch.export.load(path).module()(x), model(x))


@pytest.mark.slow
def test_aot_inductor_package(model, tmp_path):
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        program = torch.export.export(model.eval(), (x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(x), model(x))


def test_make_fx_and_fake_tensors():
    """Shapes, strides and dtypes of fake results are those of real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float32, torch.bfloat16):
        module = lstm_ext.LSTM(3, 4, num_layers=2, batch_first=True, dtype=dtype)
        x = torch.randn(2, 5, 3).to(dtype)
        real = module(x)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = module(torch.empty(2, 5, 3, dtype=dtype))
        for a, b in ((real[0], fake[0]), (real[1][0], fake[1][0]), (real[1][1], fake[1][1])):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


class CellAndLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.lstm = lstm_ext.LSTMCell(3, 4), lstm_ext.LSTM(3, 4)

    def forward(self, x):
        return self.lstm(x)[0][-1] + self.cell(x[0])[0]


@pytest.mark.parametrize("dynamic", [False, *slow(True)])
@pytest.mark.usefixtures("allow_rnn")
def test_compile_in_continuous_integration(dynamic, monkeypatch):
    """Where CI is set, inductor refuses operators that have decompositions, once a process."""
    from torch._inductor import graph, lowering, utils

    ours = [op for op in lowering.lowerings if "lstm_ext" in str(op)]
    for op in ours:
        monkeypatch.delitem(lowering.lowerings, op)
    allowed = [name for name in lowering.FALLBACK_ALLOW_LIST if "lstm_ext" not in name]
    monkeypatch.setattr(
        lowering, "FALLBACK_ALLOW_LIST", type(lowering.FALLBACK_ALLOW_LIST)(allowed)
    )
    monkeypatch.setattr(graph, "FALLBACK_ALLOW_LIST", lowering.FALLBACK_ALLOW_LIST)
    monkeypatch.setenv("CI", "1")
    model = CellAndLayer().eval()
    x = torch.randn(5, 2, 3)
    with torch.no_grad(), utils.fresh_cache():
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(compiled(x), model(x))
