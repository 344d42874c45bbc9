"""lstm_ext.init: what it writes, where it refuses, and that a refusal leaves everything alone."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import lstm_ext
from lstm_ext.init import forget_bias_, orthogonal_

H = 5
GATES = {"i": slice(0, H), "f": slice(H, 2 * H), "g": slice(2 * H, 3 * H), "o": slice(3 * H, None)}
KINDS = {
    "torch's layer": lambda: nn.LSTM(3, H, num_layers=2, bidirectional=True),
    "our layer": lambda: lstm_ext.LSTM(3, H, num_layers=2, bidirectional=True),
    "torch's cell": lambda: nn.LSTMCell(3, H),
    "our cell": lambda: lstm_ext.LSTMCell(3, H),
}


class Model(nn.Module):
    """LSTMs in it, and what only looks like one."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.LSTM(3, H, num_layers=2, bidirectional=True, **options)
        self.cells = nn.ModuleList([lstm_ext.LSTMCell(2 * H, H), nn.LSTMCell(H, H)])
        self.gru = nn.GRU(H, H)
        self.head = nn.Linear(H, 2)


def numbers(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_untouched(module, before):
    for name, p in module.named_parameters():
        assert p.is_meta or torch.equal(p, before[name]), name


def assert_orthonormal_columns(matrix, gain=1.0):
    tolerance = {"rtol": 0, "atol": 1e-5 if matrix.dtype == torch.float32 else 1e-12}
    expected = gain**2 * torch.eye(matrix.shape[1], dtype=matrix.dtype)
    torch.testing.assert_close(matrix.mT @ matrix, expected, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_forget_bias(kind):
    module = KINDS[kind]()
    before = numbers(module)
    touched = forget_bias_(module, 1.5)
    assert touched == [name for name in before if "bias" in name]
    for name, p in module.named_parameters():
        assert p.requires_grad
        for gate, rows in GATES.items():
            if "bias" in name and gate == "f":
                assert (p[rows] == (1.5 if "bias_ih" in name else 0)).all(), name
            else:
                assert torch.equal(p[rows], before[name][rows]), (name, gate)


def test_the_default_is_one_and_the_gate_sees_it():
    lstm = lstm_ext.LSTM(3, H)
    forget_bias_(lstm)
    x, zeros = torch.zeros(1, 1, 3), torch.zeros(1, 1, H)
    trace = lstm_ext.trace_gates(lstm, x, (zeros, zeros))
    torch.testing.assert_close(trace.f.flatten(), torch.full((H,), 1.0).sigmoid())


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal(kind):
    module = KINDS[kind]().double()
    before = numbers(module)
    touched = orthogonal_(module, 1.1)
    assert touched == [name for name in before if "weight_hh" in name]
    for name, p in module.named_parameters():
        assert p.requires_grad
        if name in touched:
            for rows in GATES.values():
                assert_orthonormal_columns(p[rows].detach(), 1.1)
            assert not torch.equal(p[GATES["i"]], p[GATES["f"]])
        else:
            assert torch.equal(p, before[name]), name


def test_orthogonal_with_projections():
    P = 2
    lstm = nn.LSTM(3, H, num_layers=2, proj_size=P, dtype=torch.float64)
    assert orthogonal_(lstm, 2.0) == [
        "weight_hh_l0",
        "weight_hr_l0",
        "weight_hh_l1",
        "weight_hr_l1",
    ]
    for layer in (0, 1):
        w_hh, w_hr = (getattr(lstm, f"weight_{k}_l{layer}").detach() for k in ("hh", "hr"))
        assert_orthonormal_columns(w_hr.mT)
        for rows in GATES.values():
            assert_orthonormal_columns(w_hh[rows], 2.0)
            steps = w_hh[rows] @ w_hr  # from one h before the projection to the next
            sizes = torch.linalg.svdvals(steps)
            torch.testing.assert_close(sizes[:P], torch.full((P,), 2.0, dtype=torch.float64))


def test_orthogonal_draws_from_the_generator():
    modules = [KINDS[kind]() for kind in ("torch's layer", "our layer")]
    for module in modules:
        state = torch.get_rng_state()
        orthogonal_(module, generator=torch.Generator().manual_seed(3))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(modules[0].weight_hh_l1_reverse, modules[1].weight_hh_l1_reverse)
    torch.manual_seed(3)
    orthogonal_(modules[1])
    assert torch.equal(modules[0].weight_hh_l1_reverse, modules[1].weight_hh_l1_reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_orthogonal_in_sixteen_bits(dtype):
    half, full = (lstm_ext.LSTM(3, H, dtype=d) for d in (dtype, torch.float32))
    for lstm in (half, full):
        orthogonal_(lstm, generator=torch.Generator().manual_seed(0))
    assert torch.equal(half.weight_hh_l0, full.weight_hh_l0.to(dtype))


def test_a_whole_model():
    model = Model()
    before = numbers(model)
    names = [n for n in before if "bias" in n and n.split(".")[0] in ("encoder", "cells")]
    assert forget_bias_(model, -2) == names
    weights = [n for n in before if "weight_hh" in n and n.split(".")[0] in ("encoder", "cells")]
    assert orthogonal_(model) == weights
    touched = {*names, *weights}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == touched


def test_a_subclass_and_a_converted_model():
    class Encoder(nn.LSTM):
        pass

    model = lstm_ext.convert(nn.Sequential(Encoder(3, H)))
    assert forget_bias_(model) == ["0.bias_ih_l0", "0.bias_hh_l0"]


def test_shared_parameters_are_written_once():
    one, two = nn.LSTMCell(3, H), nn.LSTMCell(3, H)
    two.weight_hh, two.bias_ih = one.weight_hh, one.bias_ih
    model = nn.Sequential(one, two)
    state = torch.Generator().manual_seed(0)
    assert orthogonal_(model, generator=state) == ["0.weight_hh"]
    expected = nn.LSTMCell(3, H)
    orthogonal_(expected, generator=torch.Generator().manual_seed(0))
    assert torch.equal(two.weight_hh, expected.weight_hh)
    assert forget_bias_(model) == ["0.bias_ih", "0.bias_hh", "1.bias_hh"]


def without_bias():
    return Model(bias=False), "encoder has no biases"


def coupled():
    model = Model()
    model.cells[0] = lstm_ext.LSTMCell(2 * H, H, coupled_gates=True)
    return model, r"cells\.0 has coupled gates"


def frozen():
    model = Model().eval()
    lstm_ext.freeze(lstm_ext.convert(model).cells)
    return model, r"cells\.0 is frozen"


def meta():
    model = Model()
    model.cells[1] = nn.LSTMCell(H, H, device="meta")
    return model, r"cells\.1\.\w+ is on the meta device"


def parametrized():
    model = Model()
    parametrize.register_parametrization(model.cells[1], "bias_hh", nn.Identity())
    parametrize.register_parametrization(model.cells[1], "weight_hh", nn.Identity())
    return model, r"cells\.1\.\w+ is not the parameter"


def normalised():
    model = Model()
    weight_norm(model.encoder, "weight_hh_l1")
    weight_norm(model.cells[1], "bias_ih", dim=None)
    return model, r"encoder\.weight_hh_l1 is not the parameter|cells\.1\.bias_ih is not"


def normalised_by_hook():
    model = Model()
    for name in ("weight_hh", "bias_ih"):
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model.cells[1], name, dim=None)
    return model, r"cells\.1\.\w+ is not the parameter"


def pruned():
    model = Model()
    for name in ("weight_hh_l0", "bias_hh_l0"):
        prune.random_unstructured(model.encoder, name, 0.5)
    return model, r"encoder\.\w+ is not the parameter"


def other_flat_weights():
    model = Model()
    lstm = model.encoder
    for k, name in enumerate(lstm._flat_weights_names):
        if name in ("weight_hh_l0", "bias_hh_l0"):
            lstm._flat_weights[k] = torch.zeros_like(lstm._flat_weights[k])
    return model, r"encoder\.\w+_l0 is not the parameter"


def no_lstm():
    return nn.Sequential(nn.GRU(3, H), nn.Linear(3, H)), "found no torch.nn.LSTM"


REFUSED = [frozen, meta, parametrized, normalised, normalised_by_hook, pruned, other_flat_weights]


@pytest.mark.parametrize(
    ("function", "make"),
    [(f, make) for f in (forget_bias_, orthogonal_) for make in (*REFUSED, no_lstm)]
    + [(forget_bias_, without_bias), (forget_bias_, coupled)],
    ids=lambda value: value.__name__,
)
def test_refused_as_a_whole(function, make):
    model, reason = make()
    before = numbers(model)
    error = RuntimeError if make is frozen else ValueError
    with pytest.raises(error, match=rf"^{function.__name__}:? .*({reason})"):
        function(model)
    assert_untouched(model, before)


def test_only_what_is_to_be_written_has_to_be_a_parameter():
    lstm = nn.LSTM(3, H)
    weight_norm(lstm, "weight_hh_l0")
    assert forget_bias_(lstm) == ["bias_ih_l0", "bias_hh_l0"]
    assert (lstm.bias_ih_l0[GATES["f"]] == 1).all()


def test_one_tensor_for_both_biases():
    cell = nn.LSTMCell(3, H)
    cell.bias_hh = cell.bias_ih
    before = numbers(cell)
    with pytest.raises(ValueError, match="bias_hh is one tensor with bias_ih"):
        forget_bias_(cell)
    assert_untouched(cell, before)


def test_wrong_arguments():
    lstm = nn.LSTM(3, H)
    before = numbers(lstm)
    with pytest.raises(TypeError, match="value should be a number, got str"):
        forget_bias_(lstm, "1")
    for function in (forget_bias_, orthogonal_):
        with pytest.raises(TypeError, match=r"should be a torch\.nn\.Module, got Tensor"):
            function(torch.zeros(2))
    with pytest.raises(TypeError):
        orthogonal_(lstm, "1")
    assert_untouched(lstm, before)


def test_a_number_of_numpy_is_a_number():
    """float32 of NumPy is no Python float, as float64 is."""
    numpy = pytest.importorskip("numpy")
    lstm = lstm_ext.LSTM(3, H, cell_clip=numpy.float32(0.5))
    assert lstm.cell_clip == 0.5
    forget_bias_(lstm, numpy.float32(2))
    assert (lstm.bias_ih_l0[GATES["f"]] == 2).all()


@pytest.mark.parametrize("function", [forget_bias_, orthogonal_])
def test_what_cannot_be_written_undoes_the_rest(function):
    model = Model()
    name = "bias_hh" if function is forget_bias_ else "weight_hh"
    first = getattr(model.cells[1], name).detach()[:1]
    row = nn.Parameter(first.expand_as(getattr(model.cells[1], name)))  # one number for many
    setattr(model.cells[1], name, row)
    before = numbers(model)
    with pytest.raises(RuntimeError, match="more than one element"):
        function(model)
    assert_untouched(model, before)


def test_backward_notices():
    """A write is one as any other: a graph that kept the old weights raises torch's error."""
    lstm = lstm_ext.LSTM(3, H)
    output, _ = lstm(torch.randn(4, 2, 3))
    orthogonal_(lstm)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_compiled_and_exported():
    """Both compute with the module's own parameters, and see what is written later."""
    cell = lstm_ext.LSTMCell(3, H)
    inputs = torch.randn(2, 3), (torch.zeros(2, H), torch.ones(2, H))
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(cell, inputs).module()
    before = compiled(*inputs)
    assert forget_bias_(compiled) == ["_orig_mod.bias_ih", "_orig_mod.bias_hh"]
    assert not torch.allclose(cell(*inputs)[1], before[1])
    torch.testing.assert_close(compiled(*inputs), cell(*inputs))
    torch.testing.assert_close(exported(*inputs), cell(*inputs))
    with pytest.raises(ValueError, match="found no"):
        forget_bias_(exported)
