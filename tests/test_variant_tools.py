"""LSTMs with options of a step, and with layer normalisation: as modules, and in torch's tools."""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from limits import slow
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext

OPTIONS = {
    "zoneout_h": 0.1,
    "zoneout_c": 0.2,
    "recurrent_dropout": 0.3,
    "recurrent_dropout_per_step": True,
    "input_dropout": 0.4,
    "variational_dropout": True,
    "weight_dropout": 0.5,
    "weight_dropout_rows": True,
    "cell_clip": 3.0,
    "projection_clip": 2.0,
}
OF_CELL = [n for n in OPTIONS if hasattr(lstm_ext.LSTMCell, n)]
OFF = {n: None if n.endswith("clip") else type(v)(0) for n, v in OPTIONS.items()}
DROPOUTS = [n for n in OPTIONS if "dropout" in n]


def build(name, options=OPTIONS):
    kind = getattr(lstm_ext, name)
    if issubclass(kind, nn.LSTMCell):
        return kind(3, 4, **{n: v for n, v in options.items() if n in OF_CELL})
    return kind(3, 4, 2, proj_size=2, bidirectional=True, **options)


def same_state(a, b):
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[n], b[n]) for n in a)


def attributes(module):
    """What an instance has beside its tensors."""
    return {n: repr(v) for n, v in vars(module).items() if "weight" not in n and n[0:4] != "_par"}


# The options as attributes.


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_nothing_shows_when_off(name):
    torch.manual_seed(0)
    plain = build(name, {})
    torch.manual_seed(0)
    off = build(name, OFF)
    torch.manual_seed(0)
    later = build(name)
    assert repr(later) != repr(plain)
    for option in OFF:
        if hasattr(later, option):
            setattr(later, option, OFF[option])
    torchs = {"LSTM": nn.LSTM, "LSTMCell": nn.LSTMCell}[name]
    theirs = (
        torchs(3, 4) if name == "LSTMCell" else torchs(3, 4, 2, proj_size=2, bidirectional=True)
    )
    for module in (off, later):
        assert repr(module) == repr(plain) == repr(theirs)
        assert vars(module).keys() == vars(plain).keys() == vars(theirs).keys()
        assert attributes(module) == attributes(plain)
        assert same_state(module.state_dict(), plain.state_dict())
        assert b"_step_options" not in pickle.dumps(module)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell", "LayerNormLSTM", "LayerNormLSTMCell"])
def test_set_and_unset(name):
    module = build(name, {})
    before = repr(module), set(vars(module))
    own = [n for n in OPTIONS if hasattr(module, n)]
    assert own == (OF_CELL if name.endswith("Cell") else list(OPTIONS))
    for option in own:
        off = getattr(module, option)
        assert not off
        setattr(module, option, OPTIONS[option])
        assert getattr(module, option) == OPTIONS[option]
        assert f", {option}={OPTIONS[option]}" in repr(module)
        assert not getattr(build(name, {}), option)  # of this one alone
        setattr(module, option, OFF[option])
        assert getattr(module, option) == off
        assert (repr(module), set(vars(module))) == before
    full = build(name)
    for option in own:
        assert getattr(full, option) == OPTIONS[option]
        assert f", {option}={OPTIONS[option]}" in repr(full)


def test_set_later_is_as_given():
    x = torch.randn(5, 2, 3)
    given, later = (lstm_ext.LSTM(3, 4, **o) for o in ({"zoneout_h": 0.5, "cell_clip": 0.1}, {}))
    later.load_state_dict(given.state_dict())
    plain = later(x)[0]
    later.cell_clip, later.zoneout_h = 0.1, 0.5
    outputs = []
    for module in (given, later):
        torch.manual_seed(1)
        outputs.append(module(x)[0])
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], plain)
    later.cell_clip, later.zoneout_h = None, 0
    assert torch.equal(later(x)[0], plain)


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_values(option):
    if isinstance(OPTIONS[option], bool):
        wrong, error, message = [1, None, "yes"], TypeError, f"{option} should be of type bool"
    else:
        wrong, error, message = [-0.1, float("nan"), True, "0.1"], ValueError, f"{option} should be"
        wrong += [float("inf")] if option.endswith("clip") else [1.1, None]
    for name in ("LSTM", "LSTMCell", "LayerNormLSTM"):
        if name == "LSTMCell" and option not in OF_CELL:
            with pytest.raises(TypeError, match=option):
                lstm_ext.LSTMCell(3, 4, **{option: OPTIONS[option]})
            continue
        for value in wrong:
            with pytest.raises(error, match=message):
                build(name, {option: value})
            module = build(name, {option: OPTIONS[option]})
            with pytest.raises(error, match=message):
                setattr(module, option, value)
            assert getattr(module, option) == OPTIONS[option]


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="projection_clip is for an LSTM with proj_size"):
        lstm_ext.LSTM(3, 4, projection_clip=1.0)
    later = lstm_ext.LSTM(3, 4)
    later.projection_clip = 1.0
    with pytest.raises(RuntimeError, match="projection_clip"):
        later(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match="peephole is not for an LSTMCell with zoneout_h"):
        lstm_ext.LSTMCell(3, 4, peephole=True, zoneout_h=0.1)
    x, lstm = torch.randn(5, 2, 3), lstm_ext.LSTM(3, 4, peephole=True, zoneout_h=0.1)
    with pytest.raises(RuntimeError, match="peephole is not for an LSTM with zoneout_h"):
        lstm(x)
    # What drops weights and features goes with peepholes.
    lstm.zoneout_h, lstm.weight_dropout, lstm.input_dropout = 0, 0.5, 0.5
    assert lstm(x)[0].shape == (5, 2, 4)


REFUSED = {
    "reset_hx": lambda m, x: m(x, reset=x[..., 0] > 0, reset_hx=(torch.zeros(1, 4),) * 2),
    "return_cell_states": lambda m, x: m(x, return_cell_states=True),
    "checkpoint_every": lambda m, x: (setattr(m, "checkpoint_every", 2), m(x)),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "layer normalization"),
        ({"zoneout_h": 0.1, "cell_clip": 1.0}, "zoneout_h, cell_clip"),
        ({"weight_dropout": 0.1}, "weight_dropout"),
    ],
)
def test_refused_calls(what, options, name):
    lstm = lstm_ext.LSTM(3, 4, **options) if options else lstm_ext.LayerNormLSTM(3, 4)
    with pytest.raises(RuntimeError, match=f"^{what} is not for an LSTM with {name}$"):
        REFUSED[what](lstm, torch.randn(5, 2, 3))


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell", "LayerNormLSTM", "LayerNormLSTMCell"])
def test_wrong_input(name):
    """In torch's words, as of plain modules."""
    module = build(name)
    torchs = nn.LSTMCell(3, 4) if name.endswith("Cell") else nn.LSTM(3, 4, 2, True, proj_size=2)
    for x in (
        torch.randn(2, 2, 2, 3),
        torch.randn(5, 2, 7)[0 if name.endswith("Cell") else slice(5)],
    ):
        messages = []
        for m in (torchs, module):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                m(x)
            messages.append((type(caught.value), str(caught.value)))
        assert messages[0] == messages[1]
    if name.endswith("Cell"):
        for hx in (torch.zeros(2, 4), (torch.zeros(2, 4),), (torch.zeros(2, 5),) * 2):
            with pytest.raises((RuntimeError, TypeError)):
                module(torch.randn(2, 3), hx)


def test_probabilities_of_one():
    x, hx = torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    plain = lstm_ext.LSTM(3, 4)

    def run(x=x, change=(), **options):
        lstm = lstm_ext.LSTM(3, 4, **options)
        lstm.load_state_dict({**plain.state_dict(), **dict(change)})
        output, (_, c) = lstm(x, hx)
        assert torch.autograd.grad(output.sum(), lstm.weight_hh_l0)[0].isfinite().all()
        return output, c

    output, _ = run(zoneout_h=1)
    assert torch.equal(output, hx[0].expand(5, 2, 4))
    assert torch.equal(run(zoneout_c=1)[1], hx[1])
    none = [("weight_hh_l0", torch.zeros(16, 4))]
    for options in ({"recurrent_dropout": 1}, {"weight_dropout": 1}):
        torch.testing.assert_close(run(**options), run(change=none))
    torch.testing.assert_close(run(input_dropout=1.0), run(torch.zeros_like(x)))
    two = lstm_ext.LSTM(3, 4, 2, dropout=1.0, variational_dropout=True)
    below = two(x)[0]
    assert torch.equal(below[:, 0], below[:, 1])  # nothing of x


# Copies, and torch's tools.


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_copies(name):
    module = build(name)
    x = torch.randn(2, 3) if name == "LSTMCell" else torch.randn(5, 2, 3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
        build(name),
    ]
    copies[-1].load_state_dict(module.state_dict())
    torch.manual_seed(1)
    expected = module(x)[0]
    for other in copies:
        assert repr(other) == repr(module)
        torch.manual_seed(1)
        assert torch.equal(other(x)[0], expected)
    torch.manual_seed(1)
    doubled = {n: 2 * t for n, t in module.state_dict().items()}
    by_call = torch.func.functional_call(module, doubled, x)[0]
    copies[0].load_state_dict(doubled)
    torch.manual_seed(1)
    assert torch.equal(copies[0](x)[0], by_call)
    assert not torch.equal(by_call, expected)
    for other in copies[:4]:
        other.cell_clip = None
    assert module.cell_clip == 3.0
    plain = build(name, {})
    plain.load_state_dict(module.state_dict())
    assert same_state(plain.state_dict(), module.state_dict())


COMPILED = {
    "zoneout": {"zoneout_h": 0.5, "zoneout_c": 0.2, "cell_clip": 0.5},
    "dropouts": {"recurrent_dropout": 0.3, "input_dropout": 0.3, "weight_dropout": 0.3},
    "variational": {"dropout": 0.4, "variational_dropout": True, "weight_dropout_rows": True},
}


@pytest.mark.parametrize("options", COMPILED)
def test_compile(options, allow_rnn):
    """The numbers in evaluation; training draws, from torch's generators, and has gradients."""
    lstm, x = lstm_ext.LSTM(3, 4, 2, **COMPILED[options]), torch.randn(5, 2, 3)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(compiled(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert all(g.any() for g in torch.autograd.grad(outputs[0].sum(), list(lstm.parameters())))
    lstm.eval()
    torch.testing.assert_close(compiled(x), lstm(x))


def test_vmap():
    lstm = lstm_ext.LSTM(3, 4, zoneout_h=0.5, recurrent_dropout=0.5, weight_dropout=0.5)
    x = torch.randn(5, 2, 3).expand(6, 5, 2, 3)
    found = {}
    for randomness in ("same", "different"):
        found[randomness] = torch.func.vmap(lstm, randomness=randomness)(x)[0]
    assert torch.equal(found["same"], found["same"][:1].expand(6, -1, -1, -1))
    assert len({tuple(t.flatten().tolist()) for t in found["different"]}) > 1
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lstm)(x)
    lstm.eval()
    found = torch.func.vmap(lstm)(torch.stack([x[0], -x[0]]))[0]
    expected = torch.stack([lstm(x[0])[0], lstm(-x[0])[0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_ensemble():
    modules = [lstm_ext.LSTM(3, 4, 2, zoneout_h=0.2, cell_clip=0.1).eval() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(modules)
    base, x = copy.deepcopy(modules[0]).to("meta"), torch.randn(5, 2, 3)

    def call(params):
        return torch.func.functional_call(base, (params, buffers), (x,))[0]

    found = torch.func.vmap(call)(params)
    torch.testing.assert_close(found, torch.stack([m(x)[0] for m in modules]), rtol=0, atol=1e-6)


def test_derivatives_of_both_orders():
    options = {"zoneout_h": 0.3, "zoneout_c": 0.2, "recurrent_dropout": 0.3, "cell_clip": 0.4}
    lstm = lstm_ext.LSTM(2, 3, proj_size=2, projection_clip=0.2, dtype=torch.float64, **options)
    names = [n for n, _ in lstm.named_parameters()]

    def call(x, *weights):
        torch.manual_seed(1)
        output, states = torch.func.functional_call(lstm, dict(zip(names, weights, strict=True)), x)
        return output, *states

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *lstm.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *lstm.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_autocast(name):
    options = {n: v for n, v in OPTIONS.items() if n not in DROPOUTS}
    module, plain = build(name, options).eval(), build(name, {})
    x = torch.randn(2, 3) if name == "LSTMCell" else torch.randn(5, 2, 3)

    def flat(out):
        return list(out) if name == "LSTMCell" else [out[0], *out[1]]

    expected = flat(module(x))
    with torch.autocast("cpu", torch.bfloat16):
        found, types = flat(module(x)), [t.dtype for t in flat(plain(x))]
        trained = flat(module.train()(x))
    assert [t.dtype for t in found] == [t.dtype for t in trained] == types
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=2e-2)


EVERY = {
    "layer norm": ("LayerNormLSTM", {}, "layer normalization"),
    "layer norm cell": ("LayerNormLSTMCell", {}, "layer normalization"),
    "zoneout": ("LSTM", {"zoneout_h": 0.1, "weight_dropout": 0.1}, "zoneout_h"),
    "clip": ("LSTMCell", {"cell_clip": 0.1}, "cell_clip"),
}


def input_of(module):
    return torch.randn(2, 3) if isinstance(module, nn.LSTMCell) else torch.randn(5, 2, 3)


@pytest.mark.parametrize("kind", EVERY)
def test_freeze_and_revert_name_it(kind):
    name, options, said = EVERY[kind]
    model = nn.Sequential(getattr(lstm_ext, name)(3, 4, **options)).eval()
    before = repr(model)
    with pytest.raises(ValueError, match=f"freeze: 0 has {said}, of which there is no frozen"):
        lstm_ext.freeze(model)
    with pytest.warns(UserWarning, match=f"left 0 .*torch's modules have no {said}"):
        lstm_ext.revert(model)
    assert repr(model) == before
    assert lstm_ext.convert(model) is model
    assert repr(model) == before


@pytest.mark.parametrize("kind", EVERY)
def test_torchscript_names_it(kind):
    name, options, said = EVERY[kind]
    module = getattr(lstm_ext, name)(3, 4, **options).eval()
    with pytest.raises(RuntimeError, match=f"{said}.* is not for torch.nn.LSTM"):
        torch.jit.trace(module, (input_of(module),))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile lstm_ext"):
        torch.jit.script(module)


@pytest.mark.parametrize("table", [False, *slow(True)])
@pytest.mark.parametrize("kind", ["clip", *slow("layer norm", "layer norm cell", "zoneout")])
def test_onnx(kind, table, tmp_path):
    """In evaluation mode, run by onnxruntime; of a layer with another length and batch."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    name, options, _ = EVERY[kind]
    model = nn.Sequential(getattr(lstm_ext, name)(3, 4, **options)).eval()
    x = input_of(model[0])
    more = {"custom_translation_table": lstm_ext.onnx_translations()} if table else {}
    if x.dim() == 3:
        more["dynamic_shapes"] = ({0: torch.export.Dim("L"), 1: torch.export.Dim("N")},)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False, **more)
    session = onnxruntime.InferenceSession(file)
    inputs = [x, torch.randn(9, 5, 3)] if x.dim() == 3 else [x]
    for x in inputs:
        output, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(x)[0], rtol=1e-4, atol=1e-5)


def test_onnx_of_masks_says_so():
    """Masks of single steps belong to training."""
    pytest.importorskip("onnxscript")
    model = nn.Sequential(lstm_ext.LSTM(3, 4, zoneout_h=0.1)).train()
    with pytest.raises(Exception, match=r"call .eval\(\) first"):
        torch.onnx.export(model, (torch.randn(5, 2, 3),), dynamo=True, verbose=False)


def test_dropouts_alone_are_plain_in_evaluation():
    """freeze, trace, trace_gates, checkpoints and resets to states as without them."""
    lstm = lstm_ext.LSTM(3, 4, 2, dropout=0.1, **{n: OPTIONS[n] for n in DROPOUTS}).eval()
    x = torch.randn(5, 2, 3)
    expected = lstm(x)[0]
    frozen = lstm_ext.freeze(copy.deepcopy(lstm))
    torch.testing.assert_close(frozen(x)[0], expected)
    assert lstm_ext.unfreeze(frozen).weight_dropout == 0.5
    traced = torch.jit.trace(lstm, (x,))
    torch.testing.assert_close(traced(x)[0], expected)
    assert torch.equal(lstm_ext.trace_gates(lstm, x).select(-1).h[0], expected)
    with pytest.raises(RuntimeError, match="recurrent_dropout"):
        torch.jit.trace(copy.deepcopy(lstm).train(), (x,))
    lstm.checkpoint_every = 2
    torch.testing.assert_close(lstm(x)[0], expected)
    with pytest.warns(UserWarning, match="torch's modules have no recurrent_dropout"):
        lstm_ext.revert(lstm)


def test_replacing_leaves_them():
    with lstm_ext.replacing(), warnings.catch_warnings():
        warnings.simplefilter("error")
        modules = [build(name) for name in ("LSTM", "LSTMCell", "LayerNormLSTM")]
        plain = nn.LSTM(3, 4)
    assert isinstance(plain, lstm_ext.LSTM)
    assert [type(m).__name__ for m in modules] == ["LSTM", "LSTMCell", "LayerNormLSTM"]
    assert [repr(m) for m in modules] == [
        repr(build(name)) for name in ("LSTM", "LSTMCell", "LayerNormLSTM")
    ]


def test_fx():
    model = nn.Sequential(build("LayerNormLSTM", {"zoneout_h": 0.1})).eval()
    graph = torch.fx.symbolic_trace(model)
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    x = torch.randn(5, 2, 3)
    assert torch.equal(graph(x)[0], model(x)[0])
    graph = torch.fx.symbolic_trace(nn.Sequential(build("LSTMCell")))
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]


# Gates.


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "LayerNormLSTM"])
def test_trace_gates(name, packed):
    module, reset = build(name).eval().double(), torch.rand(5, 3) < 0.3
    x, *hx = (torch.randn(*size, dtype=torch.float64) for size in ((5, 3, 3), (4, 3, 2), (4, 3, 4)))
    lengths = torch.tensor([2, 5, 3]) if packed else torch.full((3,), 5)
    value = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
    trace = lstm_ext.trace_gates(module, value, hx, reset=reset)
    output, (h_n, c_n) = module(value, hx, reset=reset)
    if packed:
        output = nn.utils.rnn.pad_packed_sequence(output)[0]
    # torch multiplies single steps, of which this trace is made: equal to rounding.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-14)
    close(torch.cat([trace.h[2], trace.h[3]], -1), output)
    last = lengths - 1
    for k in range(4):
        at = torch.zeros(3, dtype=torch.int64) if k % 2 else last
        close(trace.h[k][at, torch.arange(3)], h_n[k])
        close(trace.c[k][at, torch.arange(3)], c_n[k])
    for gate in (trace.i, trace.f, trace.o):
        assert gate[:, trace.valid()].min() > 0
        assert gate.max() < 1


def test_trace_gates_are_those_of_the_formula():
    """Of the first step, by the cell state: c' = f c + i g, clipped, and the mean with c."""
    cell = lstm_ext.LSTMCell(3, 4, zoneout_c=0.25, cell_clip=0.5).eval()
    x, h, c = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    trace = lstm_ext.trace_gates(cell, x, (h, c))
    i, f, g, o = (x @ cell.weight_ih.T + h @ cell.weight_hh.T + cell.bias_ih + cell.bias_hh).chunk(
        4, 1
    )
    for found, expected in zip(
        (trace.i, trace.f, trace.g, trace.o), (i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found[0, 0], expected)
    new = (trace.f * c + trace.i * trace.g).clamp(-0.5, 0.5)
    torch.testing.assert_close(trace.c, 0.75 * new + 0.25 * c)
    assert torch.equal(trace.h[0, 0], cell(x, (h, c))[0])
    norm = lstm_ext.LayerNormLSTMCell(3, 4).eval()
    trace = lstm_ext.trace_gates(norm, x, (h, c))
    assert torch.equal(trace.c[0, 0], norm(x, (h, c))[1])


def test_trace_gates_refuses():
    x = torch.randn(5, 2, 3)
    for module, name in (
        (lstm_ext.LayerNormLSTM(3, 4), "layer normalization"),
        (lstm_ext.LSTM(3, 4, zoneout_h=0.1), "zoneout_h"),
        (lstm_ext.LSTMCell(3, 4, zoneout_h=0.1), "zoneout_h"),
    ):
        with pytest.raises(RuntimeError, match=f"training mode is not for a module with {name}"):
            lstm_ext.trace_gates(module, x)
        module.eval()
        with pytest.raises(RuntimeError, match=f"differentiable=True is not .* with {name}"):
            lstm_ext.trace_gates(module, x, differentiable=True)
        reset, to = x[..., 0] > 0, (torch.zeros(1, 4),) * 2
        with pytest.raises(RuntimeError, match=f"reset_hx is not for a module with {name}"):
            lstm_ext.trace_gates(module, x, reset=reset, reset_hx=to)


@pytest.mark.parametrize("options", [{"zoneout_h": 0.1}, {"coupled_gates": True}])
def test_no_steps_are_torchs_error(options):
    lstm = lstm_ext.LSTM(3, 4, **options)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        lstm(torch.zeros(0, 2, 3))
    assert lstm(torch.zeros(5, 0, 3))[0].shape == (5, 0, 4)


@pytest.mark.parametrize(("steps", "said"), [(1, True), (2, False)])
def test_the_log_says_who_multiplies(steps, said):
    """In a process of its own: the variable is read once."""
    code = f"lstm_ext.LSTM(3, 4, cell_clip=1.0)(torch.randn({steps}, 2, 3))"
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, lstm_ext; {code}"],
        env={**os.environ, "LSTM_EXT_VERBOSE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "lstm_recurrence" in line]
    assert len(lines) == 1
    assert ("torch's product, for a single step" in lines[0]) == said
