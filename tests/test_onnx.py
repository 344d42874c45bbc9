"""torch.onnx.export of models with our modules; the files in onnxruntime against the modules."""

import re
import sys
from pathlib import Path

import pytest
import torch
from limits import slow, slow_but
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import lstm_ext

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
OPEN = torch.export.Dim.DYNAMIC
# Without and with our translations.
table = pytest.mark.parametrize("table", [False, True], ids=["plain", "table"])


class Cells(nn.Module):
    """Three steps of two cells."""

    def __init__(self):
        super().__init__()
        self.first, self.second = lstm_ext.LSTMCell(3, 4, bias=False), lstm_ext.LSTMCell(4, 4)

    def forward(self, x, h, c):
        for t in range(3):
            h, c = self.first(x[:, t], (h, c))
        return self.second(h, (h, c))


def states(N, layers=1, H=4, P=None):
    return torch.randn(layers, N, P or H), torch.randn(layers, N, H)


def export(model, args, path, shapes=None, table=False, **options):
    if table:
        options["custom_translation_table"] = lstm_ext.onnx_translations()
    program = torch.onnx.export(
        model, args, dynamo=True, dynamic_shapes=shapes, verbose=False, **options
    )
    program.save(path)
    return program


def assert_same(model, path, *all_args):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for args in all_args:
        found = session.run(
            None, {k: v.numpy() for k, v in zip(names, tree_leaves(args), strict=True)}
        )
        with torch.no_grad():
            expected = tree_leaves(model(*args))
        torch.testing.assert_close([torch.from_numpy(a) for a in found], expected)


LAYERS = {
    "batch_first": {"bidirectional": True, "batch_first": True},
    "no_bias": {"bias": False, "num_layers": 2},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "projected_no_bias": {"proj_size": 2, "bias": False, "batch_first": True},
    "checkpointed": {"checkpoint_every": 2},
}


def assert_layer_is_open(options, table, path):
    """Of another length and batch than it was exported with."""
    model = lstm_ext.LSTM(3, 4, **options).eval()
    export(model, (torch.randn(5, 2, 3),), path, ({0: OPEN, 1: OPEN},), table)
    assert_same(model, path, *[(torch.randn(*size, 3),) for size in ((5, 2), (7, 3), (1, 1))])


@pytest.mark.parametrize("table", [False, *slow(True)], ids=["plain", "table"])
def test_layer(table, tmp_path):
    assert_layer_is_open({"num_layers": 2, "bidirectional": True}, table, tmp_path / "x.onnx")


@pytest.mark.slow
@table
@pytest.mark.parametrize("name", LAYERS)
def test_options(name, table, tmp_path):
    assert_layer_is_open(LAYERS[name], table, tmp_path / "x.onnx")


@pytest.mark.slow
@table
def test_given_states(table, tmp_path):
    model = lstm_ext.LSTM(3, 4, num_layers=2, proj_size=2, batch_first=True).eval()
    calls = [(torch.randn(N, L, 3), states(N, 2, 4, 2)) for N, L in ((2, 5), (3, 7))]
    shapes = ({0: OPEN, 1: OPEN}, ({1: OPEN}, {1: OPEN}))
    export(model, calls[0], tmp_path / "x.onnx", shapes, table)
    assert_same(model, tmp_path / "x.onnx", *calls)


@pytest.mark.slow
@table
def test_one_sequence(table, tmp_path):
    model = lstm_ext.LSTM(3, 4, bidirectional=True).eval()
    export(model, (torch.randn(5, 3),), tmp_path / "x.onnx", ({0: OPEN},), table)
    assert_same(model, tmp_path / "x.onnx", (torch.randn(8, 3),))


@pytest.mark.slow
@table
def test_cells(table, tmp_path):
    model = Cells().eval()
    calls = [(torch.randn(N, 3, 3), *torch.randn(2, N, 4)) for N in (2, 5)]
    export(model, calls[0], tmp_path / "x.onnx", ({0: OPEN},) * 3, table)
    assert_same(model, tmp_path / "x.onnx", *calls)


@pytest.mark.slow
def test_one_bias_of_two(tmp_path):
    """The operators take b_ih and b_hh apart."""

    class Operators(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm_ext.LSTM(3, 4)

        def forward(self, x, h, c):
            w_ih, w_hh, b_ih, b_hh = self.lstm._flat_weights
            op = torch.ops.lstm_ext
            out, h, c = op.lstm_layer(x, h, c, w_ih, w_hh, None, b_hh, None, None, True)
            return out, op.lstm_cell(x[0], h, c, w_ih, w_hh, b_ih, None)

    model = Operators().eval()
    args = torch.randn(5, 2, 3), *torch.randn(2, 2, 4)
    for k, table in enumerate((False, True)):
        export(model, args, tmp_path / f"{k}.onnx", table=table)
        assert_same(model, tmp_path / f"{k}.onnx", args)


@pytest.mark.slow
def test_after_a_program_of_its_own(tmp_path):
    """torch.export first; the ONNX program checked by torch's own comparison."""
    model = nn.Sequential(lstm_ext.LSTM(3, 4, bidirectional=True)).eval()
    x = torch.randn(5, 2, 3)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: OPEN, 1: OPEN},))
    for k, table in enumerate((False, True)):
        program = export(exported, (), tmp_path / f"{k}.onnx", table=table)
        assert_same(model, tmp_path / f"{k}.onnx", (torch.randn(7, 3, 3),))
    # With translations, the program that the ONNX one was made of computes.
    torch.testing.assert_close(program.exported_program.module()(x), model(x))


@pytest.mark.slow
def test_one_onnx_lstm_of_a_layer_and_direction(tmp_path):
    """And the weights' order of gates is changed once, in the file."""
    model = lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=True).eval()
    for table in (False, True):
        program = export(model, (torch.randn(5, 2, 3),), tmp_path / "x.onnx", table=table)
        kinds = [node.op_type for node in program.model.graph]
        assert kinds.count("LSTM") == 4
        assert not {"Slice", "Split"} & set(kinds)


def test_of_a_device_without_kernels():
    """Where our layer goes to torch's, as on a GPU: the file is the same."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm_ext.LSTM(3, 3, batch_first=True, device="meta")

        def forward(self, x):
            return x + self.lstm(x)[0]

    x = torch.empty(2, 5, 3, device="meta")
    program = torch.onnx.export(
        Residual().eval(),
        (x,),
        dynamo=True,
        dynamic_shapes=({0: "N", 1: "L"},),
        verbose=False,
        optimize=False,
    )
    assert [str(size) for size in program.model.graph.outputs[0].shape] == ["N", "L", "3"]
    assert [node.op_type for node in program.model.graph].count("LSTM") == 1


@pytest.mark.parametrize("kind", ["layer", *slow("cells")])
def test_exporter_by_trace(kind, tmp_path):
    """dynamo=False: by torch.nn's forward."""
    if kind == "layer":
        model = nn.Sequential(lstm_ext.LSTM(3, 4, num_layers=2, batch_first=True))
        args = (torch.randn(2, 5, 3),)
    else:
        model, args = Cells(), (torch.randn(2, 3, 3), *torch.randn(2, 2, 4))
    path = str(tmp_path / "x.onnx")
    torch.onnx.export(model.eval(), args, path, dynamo=False, opset_version=17)
    assert_same(model, path, args)


def said(error):
    """Everything that an exporter's error and its causes say."""
    text = ""
    while error is not None:
        text, error = text + str(error), error.__cause__
    return text


class Reset(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, 4)

    def forward(self, x):
        return self.lstm(x, reset=x[..., 0] > 0)


class Packed(Reset):
    def forward(self, data):
        return self.lstm(PackedSequence(data, torch.tensor([2, 1])))[0].data


WITHOUT_ONNX = {
    "reset": (Reset, (5, 2, 3), "has no reset"),
    "packed": (Packed, (3, 3), "has no packed sequences"),
    "frozen": (lambda: lstm_ext.freeze(lstm_ext.LSTM(3, 4).eval()), (5, 2, 3), "unfreeze"),
    "frozen_cell": (lambda: lstm_ext.freeze(lstm_ext.LSTMCell(3, 4).eval()), (2, 3), "unfreeze"),
}


@table
@pytest.mark.parametrize("name", slow_but(["reset"], WITHOUT_ONNX))
def test_what_onnx_lacks(name, table, tmp_path):
    make, shape, words = WITHOUT_ONNX[name]
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        export(make(), (torch.randn(shape),), tmp_path / "x.onnx", table=table)
    assert words in said(caught.value)


def test_translations_need_onnxscript(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        lstm_ext.onnx_translations()


def test_other_uses_of_the_decompositions():
    """Fake tensors of open sizes keep to the fake rules; other tools see the operators."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.randn(5, 2, 3))
    w = [mode.from_tensor(torch.randn(shape), static_shapes=True) for shape in ((16, 3), (16, 4))]
    h, c = (x.new_zeros(x.shape[1], 4) for _ in range(2))
    out = torch.ops.lstm_ext.lstm_layer(x, h, c, *w, None, None, None, None, False)[0]
    assert out.shape[0] is x.shape[0] or out.shape[0].node.expr == x.shape[0].node.expr
    with pytest.raises(RuntimeError, match=r"is not on the expected device|on the same device"):
        torch.ops.lstm_ext.lstm_cell(x[0], h, c.to("meta"), *w)

    layer, cell = lstm_ext.LSTM(3, 4), lstm_ext.LSTMCell(3, 4)
    decompositions = torch._decomp.decomposition_table
    args = torch.randn(5, 2, 3), *torch.randn(2, 2, 4), *layer._flat_weights
    graph = make_fx(
        lambda *a: torch.ops.lstm_ext.lstm_layer(*a, None, None, False),
        decomposition_table=decompositions,
    )(*args)
    assert "lstm_ext.lstm_layer" in graph.code
    cell_args = args[0][0], *args[1:3], *(p.detach() for p in cell.parameters())
    graph = make_fx(torch.ops.lstm_ext.lstm_cell, decomposition_table=decompositions)(*cell_args)
    assert "lstm_ext" not in graph.code
    torch.testing.assert_close(graph(*cell_args), cell(cell_args[0], cell_args[1:3]))


def test_documented_example(tmp_path):
    """The snippet of docs/compatibility.md, with another length and batch than its own."""
    page = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
    (snippet,) = re.findall(r"```python\n((?:(?!```).)*torch\.onnx\.export.*?)```", page, re.S)
    names = {}
    exec(snippet, names)
    names["program"].save(tmp_path / "x.onnx")
    assert_same(names["model"], tmp_path / "x.onnx", (torch.randn(9, 4, 10),))
