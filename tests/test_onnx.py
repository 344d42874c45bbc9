"""ONNX by way of revert: torch.onnx.export, and the file in onnxruntime against our modules."""

import copy
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.multiprocessing
from limits import slow
from torch import nn

import lstm_ext

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x, h, c):
        output, (h, c) = self.lstm(x, (h, c))
        return self.head(output), h, c


class Cell(nn.Module):
    """Three steps of a cell."""

    def __init__(self):
        super().__init__()
        self.cell = lstm_ext.LSTMCell(3, 4, bias=False)

    def forward(self, x, h, c):
        for t in range(3):
            h, c = self.cell(x[:, t], (h, c))
        return h, c


def states(model, N):
    return [torch.randn((4, N, 4) if isinstance(model, Layer) else (N, 4)) for _ in range(2)]


def export(kind, path):
    """Write the reverted model to an ONNX file; return the weights of the original, still ours."""
    torch.manual_seed(0)
    model = kind().eval()
    N, L = torch.export.Dim("N", min=1, max=64), torch.export.Dim("L", min=1, max=64)
    batch = 1 if kind is Layer else 0
    shapes = ({0: N, 1: L} if kind is Layer else {0: N}, {batch: N}, {batch: N})
    torch.onnx.export(
        lstm_ext.revert(copy.deepcopy(model)),
        (torch.randn(2, 3, 3), *states(model, 2)),
        path,
        dynamo=True,
        dynamic_shapes=shapes,
    )
    assert isinstance(next(model.children()), (lstm_ext.LSTM, lstm_ext.LSTMCell))
    return model.state_dict()


@pytest.mark.parametrize("kind", [Layer, *slow(Cell)])
def test_onnxruntime_computes_the_same(kind, tmp_path):
    path = tmp_path / "model.onnx"
    # A process of its own: after any torch.export of an nn.LSTM, torch 2.13's exporter makes the
    # length a constant.
    spawn = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        weights = pool.submit(export, kind, path).result()
    model = kind().eval()
    model.load_state_dict(weights)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((2, 3), (5, 9 if kind is Layer else 3)):
        inputs = [torch.randn(*size, 3), *states(model, size[0])]
        names = [i.name for i in session.get_inputs()]
        found = session.run(None, {k: v.numpy() for k, v in zip(names, inputs, strict=True)})
        expected = [t.detach() for t in model(*inputs)]
        torch.testing.assert_close([torch.from_numpy(a) for a in found], expected)


def test_our_own_operators_are_no_onnx():
    """Without revert, the exporter names the operator that it does not know."""
    x = torch.randn(2, 3, 3)
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        torch.onnx.export(lstm_ext.LSTM(3, 4), (x,), dynamo=True)
    text, error = "", caught.value
    while error is not None:
        text, error = text + str(error), error.__cause__
    assert "lstm_ext.lstm" in text
