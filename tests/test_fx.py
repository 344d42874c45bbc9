"""torch.fx and the tools on it, over models with our modules: each is one node, as torch's are."""

import operator

import pytest
import torch
from torch import nn

import lstm_ext


class Model(nn.Module):
    """A layer, cells with the states of one for the other, and a layer that gets states."""

    def __init__(self, package=lstm_ext):
        super().__init__()
        self.encoder = package.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.cells = nn.ModuleList([package.LSTMCell(8, 8), package.LSTMCell(8, 8, bias=False)])
        self.decoder = package.LSTM(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        output, _ = self.encoder(x)
        state = self.cells[0](output[:, -1])
        h, c = self.cells[1](output[:, 0], state)
        out, _ = self.decoder(output.transpose(0, 1), (h.unsqueeze(0), c.unsqueeze(0)))
        return self.head(out)


def calls(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("frozen", [False, True])
def test_symbolic_trace(frozen):
    model = Model().eval()
    if frozen:
        lstm_ext.freeze(model)
    traced = torch.fx.symbolic_trace(model)
    assert calls(traced) == calls(torch.fx.symbolic_trace(Model(nn)))
    assert traced.encoder is model.encoder
    with torch.no_grad():
        for N, L in ((2, 5), (3, 7)):
            x = torch.randn(N, L, 3)
            assert torch.equal(traced(x), model(x))


def test_reset_and_a_state_by_itself():
    class WithReset(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm_ext.LSTM(3, 4)

        def forward(self, x, reset):
            _, state = self.lstm(x, reset=reset)
            return self.lstm(x, state)[0]

    model = WithReset()
    args = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.5
    traced = torch.fx.symbolic_trace(model)
    assert calls(traced) == ["lstm", "lstm"]
    assert torch.equal(traced(*args), model(*args))


def test_a_module_by_itself_is_refused_as_torchs_is():
    for package in (nn, lstm_ext):
        for kind in ("LSTM", "LSTMCell"):
            with pytest.raises((torch.fx.proxy.TraceError, TypeError, ValueError, RuntimeError)):
                torch.fx.symbolic_trace(getattr(package, kind)(3, 4))


def test_hooks():
    """What would be recorded and run again is refused; weights that a hook writes are not."""
    x = torch.randn(2, 5, 3)
    model = Model()
    nn.utils.weight_norm(model.encoder, "weight_hh_l0")
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        model.encoder.weight_hh_l0_g.mul_(2)
    assert torch.equal(traced(x), model(x))
    model.cells[0].register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    with pytest.raises(RuntimeError, match=r"torch\.fx cannot trace a LSTMCell .* with hooks"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, lstm_ext.LSTMCell) or super().is_leaf_module(module, name)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_prepare_fx():
    """Quantization of what is around our modules; theirs is torch's, after revert."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    model, x = Model().eval(), torch.randn(2, 5, 3)
    expected = model(x)
    prepared = prepare_fx(model, get_default_qconfig_mapping(), (x,))
    assert type(prepared.encoder) is lstm_ext.LSTM
    assert type(prepared.get_submodule("cells.0")) is lstm_ext.LSTMCell
    torch.testing.assert_close(prepared(x), expected)


class Tagger(nn.Module):
    def __init__(self, package):
        super().__init__()
        self.lstm = package.LSTM(3, 8, num_layers=2)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def pruned(package):
    """Every weight of an LSTM to half; the pruner's own patterns name nn.LSTM itself."""
    from torch.ao.pruning._experimental.pruner import LSTMSaliencyPruner, prune_functions

    torch.manual_seed(0)
    model = Tagger(package)
    patterns = {
        (package.LSTM, operator.getitem, nn.Linear): prune_functions.prune_lstm_output_linear
    }
    pruner = LSTMSaliencyPruner({"sparsity_level": 0.5}, patterns=patterns)
    names = [f"lstm.weight_{which}_l{k}" for k in range(2) for which in ("ih", "hh")]
    pruner.prepare(model, [{"tensor_fqn": name} for name in names])
    pruner.enable_mask_update = True
    pruner.step()
    return pruner.prune()


def test_structured_pruning():
    theirs, ours = pruned(nn), pruned(lstm_ext)
    assert type(ours.lstm) is lstm_ext.LSTM
    assert ours.lstm.hidden_size == 4
    for name, p in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), p)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x), theirs(x))
