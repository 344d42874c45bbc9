"""Which kernels a CUDA device gets, ours or torch's, and the log that says so. Needs no GPU."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from limits import slow
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_ext
from lstm_ext import _backend, _ops

L, N, I, H = 5, 2, 4, 3


@pytest.fixture(autouse=True)
def _mode():
    before = lstm_ext.cuda_backend()
    yield
    lstm_ext.set_cuda_backend(before)


class Operators(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func).rsplit(".", 1)[0])
        return func(*args, **(kwargs or {}))


def cuda_input(dtype=torch.float32):
    """As much of an input on a CUDA device as the choice looks at."""
    device = torch.device("cuda")
    return types.SimpleNamespace(is_cpu=False, is_cuda=True, device=device, dtype=dtype)


def pretend_card(monkeypatch, major, minor):
    card = types.SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    """The CPU's tensors go the ways of a CUDA device's."""
    there = cuda_input()
    for name in ("why_layer_by_torch", "cell_by_torch", "recurrence_by_torch"):
        real = getattr(_backend, name)
        monkeypatch.setattr(_backend, name, lambda _, *more, real=real: real(there, *more))
    pretend_card(monkeypatch, 9, 0)
    # These take nothing but the CPU's, and here hand over to what looks at the mode.
    with_steps = "fast_lstm_with_steps", "fast_cell_with_steps"
    for name in ("fast_lstm_cell", "fast_cell_module", *with_steps):
        monkeypatch.setattr(_ops, name, lambda *_: None)
    monkeypatch.setattr(lstm_ext.LSTM, "_direct", staticmethod(lambda *_: None))


def zero_reset():
    return torch.zeros(L, N, dtype=torch.bool)


# Of each call, and in each mode: whether our kernels run.
FUSED_ALONE = {"auto": False, "fused": True, "torch": False}
UNLESS_TORCH = {"auto": True, "fused": True, "torch": False}
CALLS = {
    "layer": ("LSTM", {}, {}, FUSED_ALONE),
    "packed": ("LSTM", {}, {"packed": True}, FUSED_ALONE),
    "deep": ("LSTM", {"num_layers": 2, "bidirectional": True}, {}, FUSED_ALONE),
    "reset": ("LSTM", {"num_layers": 2}, {"reset": True}, UNLESS_TORCH),
    "packed, reset": ("LSTM", {"bidirectional": True}, {"packed": True, "reset": True},
                      UNLESS_TORCH),
    "checkpointed": ("LSTM", {"checkpoint_every": 2}, {}, UNLESS_TORCH),
    "packed, checkpointed": ("LSTM", {"checkpoint_every": 2}, {"packed": True}, UNLESS_TORCH),
    "projections": ("LSTM", {"proj_size": 2}, {}, dict.fromkeys(_backend.MODES, False)),
    "cell": ("LSTMCell", {}, {}, UNLESS_TORCH),
    "cell without bias": ("LSTMCell", {"bias": False}, {}, UNLESS_TORCH),
}  # fmt: skip


def run(module, packed=False, reset=False):
    """Return outputs and gradients of a call."""
    x = torch.linspace(-1, 1, L * N * I).reshape(L, N, I)
    if isinstance(module, nn.LSTMCell):
        outputs = module(x[0])
    else:
        if packed:
            x = pack_padded_sequence(x, torch.tensor([5, 3]))
        options = {"reset": zero_reset()} if reset else {}
        output, states = module(x, **options)
        outputs = (output.data if packed else output, *states)
    gradients = torch.autograd.grad([t.sum() for t in outputs], module.parameters())
    return [*outputs, *gradients]


@pytest.mark.parametrize("mode", _backend.MODES)
@pytest.mark.parametrize("name", CALLS)
def test_whose_kernels_run(name, mode, as_if_on_cuda):
    """And that all compute the same."""
    kind, options, called_with, ours = CALLS[name]
    module = getattr(lstm_ext, kind)(I, H, **options)
    theirs = getattr(nn, kind)(I, H, **{k: v for k, v in options.items() if "every" not in k})
    theirs.load_state_dict(module.state_dict())
    lstm_ext.set_cuda_backend(mode)
    with Operators() as seen:
        found = run(module, **called_with)
    assert any(op.startswith("lstm_ext.") for op in seen.names) == ours[mode], seen.names
    for a, b in zip(found, run(theirs, packed=called_with.get("packed", False)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", _backend.MODES)
def test_a_trace_goes_the_same_ways(mode, as_if_on_cuda):
    module = nn.LSTM(I, H)
    lstm_ext.set_cuda_backend(mode)
    with Operators() as seen:
        trace = lstm_ext.trace_gates(module, torch.ones(L, N, I))
    assert any(op.startswith("lstm_ext.") for op in seen.names) == (mode != "torch")
    torch.testing.assert_close(trace.h[0], module(torch.ones(L, N, I))[0])


STEPPED = {
    "clipped": ("LSTM", {"cell_clip": 0.1}, {"packed": True, "reset": True}),
    "normalised": ("LayerNormLSTM", {"bidirectional": True, "proj_size": 2, "zoneout_h": 0.3}, {}),
    "normalised cell": ("LayerNormLSTMCell", {"normalize": "sum"}, {}),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", STEPPED)
def test_layers_whose_steps_torchs_have_not(name, autocast, as_if_on_cuda, monkeypatch, capsys):
    """In ours unless the mode says torch; then in tensor operations, which compute the same."""
    kind, options, called_with = STEPPED[name]
    module = getattr(lstm_ext, kind)(I, H, **options).eval()
    found = {}
    monkeypatch.setattr(_backend, "_VERBOSE", True)
    for mode in _backend.MODES:
        lstm_ext.set_cuda_backend(mode)
        with Operators() as seen, torch.autocast("cpu", enabled=autocast):
            found[mode] = run(module, **called_with)
        ours = any(op.startswith("lstm_ext.lstm_recurrence") for op in seen.names)
        assert ours == (mode != "torch"), seen.names
        says = "tensor operations, step by step: LSTM_EXT_CUDA=torch"
        assert (says in capsys.readouterr().err) == (not ours)
    for a, b in zip(found["torch"], found["fused"], strict=True):
        assert a.dtype == b.dtype
        tolerance = 0.15 if autocast else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_trace_of_such_a_layer(as_if_on_cuda):
    module, traces = lstm_ext.LayerNormLSTM(I, H, zoneout_c=0.2).eval(), []
    for mode in ("fused", "torch"):
        lstm_ext.set_cuda_backend(mode)
        with Operators() as seen:
            traces.append(lstm_ext.trace_gates(module, torch.ones(L, N, I)))
        assert any(op.startswith("lstm_ext.") for op in seen.names) == (mode != "torch")
    for name in ("i", "f", "g", "o", "c", "h"):
        for a, b in zip(*(getattr(trace, name) for trace in traces), strict=True):
            torch.testing.assert_close(a, b)


def chosen(dtype, N, H, layers=1, directions=1, packed=False, trains=True):
    call = _backend.LayerCall(N, H, layers, directions, packed, False, False, trains)
    return _backend.why_layer_by_torch(cuda_input(dtype), call) is None


GRID = Path(__file__).parent.parent / "benchmarks" / "results" / "cuda_h100_80gb_hbm3_grid.json"


def test_auto_takes_ours_where_it_was_measured_to_be_faster(monkeypatch):
    """In no row of the measurement the slower one, and in most the faster one."""
    pretend_card(monkeypatch, 9, 0)
    dtypes = {"default": torch.float32, "float32": torch.float32}
    dtypes |= {name: getattr(torch, name) for name in ("bfloat16", "float16")}
    taken = left = 0
    for row in json.loads(GRID.read_text())["rows"]:
        kind, how = row["mode"].split(", ")
        if how != "graph":
            continue
        directions = 2 if kind.startswith("bidirectional") else 1
        layers = 2 if kind.startswith("two layers") else 1
        _, N, _, H = row["shape"]
        trains = kind.endswith("training")
        ours = chosen(dtypes[row["dtype"]], N, H, layers, directions, trains=trains)
        assert row["ratio"] >= 1 or not ours, row
        taken += ours
        left += row["ratio"] > 1.1 and not ours
    assert taken > 200
    assert left < 0.15 * taken


def test_auto_leaves_to_cudnn_what_was_not_measured(monkeypatch):
    pretend_card(monkeypatch, 9, 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen(dtype, 24, 256, trains=False)
        assert chosen(dtype, 24, 256, layers=2)
        assert not chosen(dtype, 24, 256, layers=3)
        assert not chosen(dtype, 8, 256, layers=2)
        assert not chosen(dtype, 24, 256, layers=2, directions=2)
        assert not chosen(dtype, 24, 256, layers=2, packed=True)
        assert not chosen(dtype, 24, 250)  # beyond 128, no multiple of 8
        assert not chosen(dtype, 16, 2048)
        assert not chosen(dtype, 512, 128)
        assert not chosen(dtype, 1, 256, directions=2)
        assert not chosen(dtype, 32, 256, directions=2, packed=True)
    assert chosen(torch.float16, 16, 256, packed=True)  # cuDNN's own kernel takes no packed ones
    assert not chosen(torch.float32, 16, 128, packed=True)  # ours of small layers neither
    assert chosen(torch.float32, 16, 128, trains=False)
    assert chosen(torch.float32, 16, 128, trains=True)
    assert not chosen(torch.float32, 16, 64, trains=True)
    assert not chosen(torch.float64, 16, 256)
    lstm_ext.set_cuda_backend("fused")
    assert chosen(torch.float64, 16, 128, layers=2)
    lstm_ext.set_cuda_backend("torch")
    assert not chosen(torch.bfloat16, 16, 256)


def test_auto_leaves_cards_that_were_not_measured_to_cudnn(monkeypatch):
    pretend_card(monkeypatch, 8, 0)
    assert not chosen(torch.bfloat16, 16, 256)


def test_a_device_without_kernels_gets_torchs():
    """Tensors without memory stand for it."""
    with Operators() as seen:
        lstm_ext.LSTM(I, H, device="meta")(torch.empty(L, N, I, device="meta"))
    assert not any(op.startswith("lstm_ext.") for op in seen.names)


def test_the_mode_before_is_returned_and_wrong_ones_are_refused():
    assert lstm_ext.set_cuda_backend("fused") == "auto"
    assert lstm_ext.cuda_backend() == "fused"
    with pytest.raises(ValueError, match="mode must be one of auto, fused, torch, got 'cudnn'"):
        lstm_ext.set_cuda_backend("cudnn")
    assert lstm_ext.set_cuda_backend("torch") == "fused"
    assert lstm_ext.build_info()["cuda_backend"] == "torch"


def test_compiled_code_follows_the_mode():
    @torch.compile(backend="eager", fullgraph=True)
    def f(x):
        return x + 1 if lstm_ext.cuda_backend() == "fused" else x - 1

    assert f(torch.zeros(())) == -1
    lstm_ext.set_cuda_backend("fused")
    assert f(torch.zeros(())) == 1


def python(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **variables},
    )


@pytest.mark.parametrize(
    ("value", "mode"),
    [("Torch", "torch"), *slow(("", "auto"), ("1", "auto"))],
)
def test_the_environment_variable(value, mode):
    """0 and 1 are for the build, and say nothing here; letters are of any case."""
    done = python("import lstm_ext; print(lstm_ext.cuda_backend())", LSTM_EXT_CUDA=value)
    assert done.stdout.split() == [mode], done.stderr


def test_a_wrong_environment_variable_is_an_error():
    done = python("import lstm_ext", LSTM_EXT_CUDA="cudnn")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said == "ImportError: LSTM_EXT_CUDA must be one of auto, fused, torch, got 'cudnn'"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("training", "grad", "train"),
    [(True, True, True), (False, True, True), (True, False, False), (False, False, False)],
)
def test_torchs_layer_is_told_to_train_wherever_a_backward_may_follow(
    training, grad, train, packed, monkeypatch
):
    """CuDNN's backward needs it; seen on tensors without memory, which go the same way."""
    told = []
    real = torch._VF.lstm

    def spy(*arguments):
        told.append(arguments[7] if packed else arguments[6])
        return real(*arguments)

    monkeypatch.setattr(torch._VF, "lstm", spy)
    module = lstm_ext.LSTM(I, H, device="meta").train(training)
    x = torch.empty(L, N, I, device="meta")
    with torch.set_grad_enabled(grad):
        if packed:
            sizes = torch.tensor([2, 2, 1, 1, 1])
            x = torch.nn.utils.rnn.PackedSequence(torch.empty(7, I, device="meta"), sizes)
        module(x)
    assert told == [train]


PATHS = """
import torch, lstm_ext
x = torch.randn(5, 2, 4)
lstm_ext.LSTMCell(4, 3)(x[0])[0].sum().backward()
lstm_ext.LSTM(4, 3)(x)[0].sum().backward()
lstm_ext.LSTM(4, 3, proj_size=2)(x)
lstm_ext.LSTM(4, 3, proj_size=2)(x, reset=torch.zeros(5, 2, dtype=torch.bool))
w_ih, w_hh, *_ = [p.detach() for p in lstm_ext.LSTMCell(4, 3).parameters()]
lstm_ext.lstm_cell(x[0].to_sparse(), (x[0, :, :3], x[0, :, :3]), w_ih, w_hh)
with torch.inference_mode():
    lstm_ext.freeze(lstm_ext.LSTM(4, 3).eval())(x)
"""


def test_the_log_of_paths():
    done = python(PATHS, LSTM_EXT_VERBOSE="1", ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("lstm_ext: ") for line in done.stderr.splitlines()]
    cpu = "cpu: the CPU's kernels, DEFAULT"
    assert said == [
        f"lstm_cell_forward, Float input [2, 4], hidden 3, {cpu}",
        f"lstm_cell_backward, Float input [2, 4], hidden 3, {cpu}",
        f"lstm_layer_forward, Float input [5, 2, 4], hidden 3, {cpu}",
        f"lstm_layer_backward, Float input [5, 2, 4], hidden 3, {cpu}",
        f"lstm_layer_projected_forward, Float input [5, 2, 4], hidden 3, {cpu}",
        "LSTM, float32 input [5, 2, 4], cpu: not the direct call: reset",
        f"lstm_layer_projected_forward, Float input [5, 2, 4], hidden 3, {cpu}",
        "lstm_cell, Float input [2, 4], hidden 3, cpu: torch's own cell, for what the kernels do "
        "not take: a dtype, layout, size or device",
        f"lstm_layer_packed, Float input [5, 2, 4], hidden 3, {cpu}",
    ]


def test_no_log_unless_asked():
    assert python(PATHS, LSTM_EXT_VERBOSE="0").stderr == ""
