"""LayerNormLSTM and its cell against the formulas of the published forms, written out here."""

import copy
import io
import pickle

import pytest
import torch
from measure import uniform
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstm_ext
from lstm_ext import LayerNormLSTM, LayerNormLSTMCell

# The published forms, as options: haste and Ba et al., fastrnns, TensorFlow Addons, torchaudio.
FORMS = {
    "haste": {},
    "fastrnns": {"carry_norm": True},
    "addons": {"carry_norm": True, "eps": 1e-3},
    "torchaudio": {"normalize": "sum", "carry_norm": True},
    "sum, raw": {"normalize": "sum"},
}


def norm(v, weight, bias, eps):
    mean, square = v.mean(-1, keepdim=True), (v * v).mean(-1, keepdim=True)
    out = weight * (v - mean) / (square - mean**2 + eps).sqrt()
    return out if bias is None else out + bias


def step(p, form, x, h, c):
    """One step; p has the parameters by their names without layer."""
    eps = form.get("eps", 1e-5)
    bias = p["bias_ih"] + p["bias_hh"] if "bias_ih" in p else 0
    if form.get("normalize") == "sum":
        gates = norm(x @ p["weight_ih"].T + h @ p["weight_hh"].T, p["norm_gates"], None, eps) + bias
    else:
        gates = norm(x @ p["weight_ih"].T, p["norm_ih"], None, eps)
        gates = gates + norm(h @ p["weight_hh"].T, p["norm_hh"], None, eps) + bias
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    n = norm(c, p["norm_c"], p.get("bias_c"), eps)
    h = o.sigmoid() * n.tanh()
    if "weight_hr" in p:
        h = h @ p["weight_hr"].T
    return h, n if form.get("carry_norm") else c


def parameters_of(module, end, dtype=torch.float64):
    found = dict(module.named_parameters())
    return {n.removesuffix(end): t.to(dtype) for n, t in found.items() if n.endswith(end)}


def by_hand(module, form, x, hx, lengths=None, reset=None):
    """Layers over (L, N, I); of a shorter sequence, zeros beyond its length."""
    L, N, D = *x.shape[:2], 2 if module.bidirectional else 1
    lengths = torch.full((N,), L) if lengths is None else lengths
    last = []
    for k in range(module.num_layers):
        outputs = []
        for d in range(D):
            p = parameters_of(module, f"_l{k}" + "_reverse" * d)
            p = {n: t for n, t in p.items() if not n.endswith(("_l0", "_l1"))}
            h, c = hx[0][k * D + d], hx[1][k * D + d]
            steps = [None] * L
            for t in reversed(range(L)) if d else range(L):
                here = (t < lengths).unsqueeze(1)
                if reset is not None:
                    start = (~reset[t]).unsqueeze(1) | ~here
                    h, c = h * start, c * start
                new_h, new_c = step(p, form, x[t], h, c)
                h, c = torch.where(here, new_h, h), torch.where(here, new_c, c)
                steps[t] = h * here
            outputs.append(torch.stack(steps))
            last.append((h, c))
        x = torch.cat(outputs, -1)
    return x, *(torch.stack(s) for s in zip(*last, strict=True))


def randomize(module):
    """Parameters that are not at their initial values, of which many are one or zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(uniform(parameter.shape) * 0.4)
        for name, parameter in module.named_parameters():
            if name.startswith("norm"):
                parameter += 1
    return module


def states_for(module, N, dtype=torch.float64):
    K = module.num_layers * (2 if module.bidirectional else 1)
    P = module.proj_size or module.hidden_size
    return uniform((K, N, P)).to(dtype), uniform((K, N, module.hidden_size)).to(dtype)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}


def close(found, expected, dtype):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_formula(form, dtype, bias):
    form = FORMS[form]
    lstm = randomize(LayerNormLSTM(5, 18, dtype=dtype, bias=bias, **form))
    x, hx = uniform((7, 3, 5)).to(dtype), states_for(lstm, 3, dtype)
    expected = by_hand(lstm, form, x.double(), [s.double() for s in hx])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output, states = lstm(x, hx)
        close((output, *states), expected, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_formulas(form):
    form = FORMS[form]
    lstm = randomize(LayerNormLSTM(3, 5, 2, bidirectional=True, dtype=torch.float64, **form))
    x, hx = uniform((4, 2, 3)).requires_grad_(), states_for(lstm, 2)
    wanted = [x, *(s.requires_grad_() for s in hx), *lstm.parameters()]
    output, states = lstm(x, hx)
    grads = [uniform(t.shape) for t in (output, *states)]
    found = torch.autograd.grad((output, *states), wanted, grads)
    expected = torch.autograd.grad(by_hand(lstm, form, x, hx), wanted, grads)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert all(g.abs().max() > 0 for g in found)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_cell_is_the_formula(form, dtype):
    form = FORMS[form]
    cell = randomize(LayerNormLSTMCell(5, 18, dtype=dtype, **form))
    x, h, c = (uniform((3, n)).to(dtype) for n in (5, 18, 18))
    expected = step(parameters_of(cell, ""), form, x.double(), h.double(), c.double())
    close(cell(x, (h, c)), expected, dtype)
    close(cell(x[0], (h[0], c[0])), [t[0] for t in expected], dtype)
    zeros = torch.zeros(3, 18, dtype=torch.float64)
    close(cell(x), step(parameters_of(cell, ""), form, x.double(), zeros, zeros), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_layer_is_the_cell_step_by_step(form):
    lstm = randomize(LayerNormLSTM(3, 6, **FORMS[form]))
    cell = LayerNormLSTMCell(3, 6, **FORMS[form])
    cell.load_state_dict({n.removesuffix("_l0"): t for n, t in lstm.state_dict().items()})
    x = torch.randn(5, 2, 3)
    output, (h_n, c_n) = lstm(x)
    state = None
    for t in range(5):
        state = cell(x[t], state)
        torch.testing.assert_close(output[t], state[0], rtol=0, atol=1e-6)
    torch.testing.assert_close((h_n[0], c_n[0]), state, rtol=0, atol=1e-6)


OPTIONS = [
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bidirectional": True},
    {"proj_size": 3, "num_layers": 2},
    {"proj_size": 2, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("form", ["haste", "torchaudio"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(form, options):
    """Padded, with resets and given states; packed; nested; a single sequence."""
    form, dtype = FORMS[form], torch.float64
    lstm = randomize(LayerNormLSTM(4, 6, dtype=dtype, **form, **options))
    first = lstm.batch_first
    x, hx, reset = uniform((5, 3, 4)), states_for(lstm, 3), torch.rand(5, 3) < 0.3

    def turn(t):
        return t.transpose(0, 1) if first else t

    output, states = lstm(turn(x), hx, reset=turn(reset))
    close((turn(output), *states), by_hand(lstm, form, x, hx, reset=reset), dtype)
    zeros = [torch.zeros_like(s) for s in hx]
    output, states = lstm(turn(x))
    whole = by_hand(lstm, form, x, zeros)
    close((turn(output), *states), whole, dtype)
    output, states = lstm(x[:, 1])
    close((output, *states), (whole[0][:, 1], *(s[:, 1] for s in whole[1:])), dtype)

    for lengths in (torch.tensor([5, 4, 2]), torch.tensor([2, 5, 3])):
        ordered = bool((lengths.diff() <= 0).all())
        packed = pack_padded_sequence(turn(x), lengths, first, ordered)
        for mask in (None, reset):
            output, states = lstm(packed, hx, reset=mask)
            assert isinstance(output, PackedSequence)
            padded = pad_packed_sequence(output)[0]
            close((padded, *states), by_hand(lstm, form, x, hx, lengths, mask), dtype)

    lengths = [2, 5, 0]
    nested = torch.nested.nested_tensor(
        [x[:n, k] for k, n in enumerate(lengths)], layout=torch.jagged
    )
    output, (h, c) = lstm(nested)
    for k, n in enumerate(lengths[:2]):
        one = by_hand(lstm, form, x[:n, k : k + 1], [s[:, :1] for s in zeros])
        close((output[k], h[:, k], c[:, k]), (one[0][:, 0], one[1][:, 0], one[2][:, 0]), dtype)
    assert not h[:, 2].any()
    assert not c[:, 2].any()


def test_dropout_between_layers():
    lstm = randomize(LayerNormLSTM(4, 6, 2, dropout=0.5))
    x = torch.randn(5, 3, 4)
    torch.manual_seed(3)
    output = lstm(x)[0]
    one, two = (LayerNormLSTM(n, 6) for n in (4, 6))
    for k, layer in enumerate((one, two)):
        own = {n: t for n, t in lstm.state_dict().items() if n.endswith(f"_l{k}")}
        layer.load_state_dict({n.replace(f"_l{k}", "_l0"): t for n, t in own.items()})
    torch.manual_seed(3)
    expected = two(torch.dropout(one(x)[0], 0.5, True))[0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert torch.equal(lstm.eval()(x)[0], lstm(x)[0])


def test_options_of_a_step_too():
    """Zoneout's mean and the clip of c, before its normalisation."""
    form = {"zoneout_h": 0.2, "zoneout_c": 0.4, "cell_clip": 0.3}
    lstm = randomize(LayerNormLSTM(3, 5, dtype=torch.float64, carry_norm=True, **form)).eval()
    p = {n.removesuffix("_l0"): t for n, t in parameters_of(lstm, "").items()}
    x = uniform((6, 2, 3))
    h = c = torch.zeros(2, 5, dtype=torch.float64)
    output, (h_n, c_n) = lstm(x)
    clipped = 0
    for t in range(6):
        gates = norm(x[t] @ p["weight_ih"].T, p["norm_ih"], None, 1e-5)
        gates = gates + norm(h @ p["weight_hh"].T, p["norm_hh"], p["bias_ih"] + p["bias_hh"], 1e-5)
        i, f, g, o = gates.chunk(4, -1)
        new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        clipped += int((new.abs() > 0.3).sum())
        n = norm(new.clamp(-0.3, 0.3), p["norm_c"], p["bias_c"], 1e-5)
        h, c = 0.8 * o.sigmoid() * n.tanh() + 0.2 * h, 0.6 * n + 0.4 * c
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-12)
    assert clipped > 5
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c), rtol=0, atol=1e-12)


# Weights from elsewhere.


def test_from_torchaudio():
    """torchaudio.models.rnnt._CustomLSTM, its forward as it is there."""
    I, H, prefix = 4, 6, "predictor.lstm_layers.0."
    shapes = {"x2g.weight": (4 * H, I), "p2g.weight": (4 * H, H), "g_norm.weight": (4 * H,)}
    shapes |= {"g_norm.bias": (4 * H,), "c_norm.weight": (H,), "c_norm.bias": (H,)}
    w = {name: uniform(shape) for name, shape in shapes.items()}
    lstm = LayerNormLSTM.from_torchaudio({prefix + n: t for n, t in w.items()}, prefix, eps=1e-3)
    assert lstm.weight_ih_l0.dtype == torch.float64
    x, (h, c) = uniform((5, 2, I)), states_for(lstm, 2)
    output, (h_n, c_n) = lstm(x, (h, c))
    h, c = h[0], c[0]
    g_norm, c_norm = nn.LayerNorm(4 * H, 1e-3).double(), nn.LayerNorm(H, 1e-3).double()
    g_norm.load_state_dict({"weight": w["g_norm.weight"], "bias": w["g_norm.bias"]})
    c_norm.load_state_dict({"weight": w["c_norm.weight"], "bias": w["c_norm.bias"]})
    for t in range(5):
        gates = g_norm(x[t] @ w["x2g.weight"].T + h @ w["p2g.weight"].T)
        input_gate, forget_gate, cell_gate, output_gate = gates.chunk(4, 1)
        c = forget_gate.sigmoid() * c + input_gate.sigmoid() * cell_gate.tanh()
        c = c_norm(c)
        h = output_gate.sigmoid() * c.tanh()
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-12)
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c), rtol=0, atol=1e-12)
    for name in w:
        left = {n: t for n, t in w.items() if n != name}
        with pytest.raises(KeyError, match=name):
            LayerNormLSTM.from_torchaudio(left)
    with pytest.raises(KeyError, match=r"other\.x2g"):
        LayerNormLSTM.from_torchaudio(w, "other.")


def test_from_haste():
    """haste_pytorch's LayerNormLSTM: gates in the order i, g, f, o."""
    I, H, prefix = 4, 6, "rnn."
    shapes = {"kernel": (I, 4 * H), "recurrent_kernel": (H, 4 * H), "bias": (4 * H,)}
    shapes |= {"gamma": (2, 4 * H), "gamma_h": (H,), "beta_h": (H,)}
    w = {name: uniform(shape) for name, shape in shapes.items()}
    lstm = LayerNormLSTM.from_haste({prefix + n: t for n, t in w.items()}, prefix, zoneout=0.1)
    assert (lstm.zoneout_h, lstm.zoneout_c) == (0.1, 0)
    x, (h, c) = uniform((5, 2, I)), states_for(lstm, 2)
    output, (h_n, c_n) = lstm.eval()(x, (h, c))
    h, c = h[0], c[0]
    for t in range(5):
        Wx = nn.functional.layer_norm(x[t] @ w["kernel"], [4 * H], w["gamma"][0])
        Rh = nn.functional.layer_norm(h @ w["recurrent_kernel"], [4 * H], w["gamma"][1])
        i, g, f, o = (Wx + Rh + w["bias"]).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new = o.sigmoid() * nn.functional.layer_norm(c, [H], w["gamma_h"], w["beta_h"]).tanh()
        h = 0.1 * h + 0.9 * new
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-12)
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c), rtol=0, atol=1e-12)
    for name in w:
        left = {n: t for n, t in w.items() if n != name}
        with pytest.raises(KeyError, match=name):
            LayerNormLSTM.from_haste(left)


# As a module.

KINDS = {
    "layer": (LayerNormLSTM, nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "cell": (LayerNormLSTMCell, nn.LSTMCell, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["apart", "sum"])
def test_parameters(kind, normalize):
    """Weights as torch draws them; biases zero, norms one; also by reset_parameters."""
    ours, torchs, options = KINDS[kind]
    torch.manual_seed(1)
    theirs = dict(torchs(3, 5, **options).named_parameters())
    torch.manual_seed(1)
    module = ours(3, 5, normalize=normalize, **options)
    norms = {"norm_gates", "norm_c"} if normalize == "sum" else {"norm_ih", "norm_hh", "norm_c"}
    for again in (False, True):
        if again:
            randomize(module)
            torch.manual_seed(1)
            module.reset_parameters()
        for name, parameter in module.named_parameters():
            base = name.split("_l")[0]
            if base.startswith("weight"):
                assert torch.equal(parameter, theirs[name])
            else:
                assert base in norms | {"bias_ih", "bias_hh", "bias_c"}
                assert (parameter == (1 if base in norms else 0)).all()
    names = [n for n, _ in module.named_parameters()]
    assert set(theirs) < set(names)
    assert {n.split("_l")[0] for n in set(names) - set(theirs)} == norms | {"bias_c"}
    if kind == "layer":
        grouped = [id(p) for group in module.all_weights for p in group]
        assert sorted(grouped) == sorted(id(p) for p in module.parameters())
    without = ours(3, 5, bias=False, normalize=normalize, **options)
    assert not [n for n, _ in without.named_parameters() if n.startswith("bias")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"normalize": "both"}, ValueError, "normalize should be 'apart' or 'sum', got 'both'"),
        ({"carry_norm": 1}, TypeError, "carry_norm should be of type bool, got: int"),
        ({"eps": 0}, ValueError, "eps should be positive, got 0"),
        ({"eps": float("nan")}, ValueError, "eps should be positive, got nan"),
        ({"peephole": True}, ValueError, "peephole is not for"),
        ({"zoneout_h": 2}, ValueError, "zoneout_h should be a number"),
    ],
    ids=str,
)
def test_wrong_options(kind, wrong, error, message):
    ours, _, options = KINDS[kind]
    with pytest.raises(error, match=message):
        ours(3, 4, **options, **wrong)
    if kind == "layer":
        with pytest.raises(ValueError, match="checkpoint_every is not for"):
            ours(3, 4, checkpoint_every=2)


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    ours, _, options = KINDS[kind]
    module = randomize(ours(3, 4, carry_norm=True, eps=1e-3, zoneout_c=0.1, **options)).eval()
    assert repr(module).endswith("zoneout_c=0.1, normalize=apart, carry_norm=True, eps=0.001)")
    x = torch.randn(5, 2, 3) if kind == "layer" else torch.randn(2, 3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
        ours(3, 4, carry_norm=True, eps=1e-3, zoneout_c=0.1, **options).eval(),
    ]
    copies[-1].load_state_dict(module.state_dict())
    for other in copies:
        assert repr(other) == repr(module)
        assert torch.equal(other(x)[0], module(x)[0])
    doubled = {n: 2 * t for n, t in module.state_dict().items()}
    by_call = torch.func.functional_call(module, doubled, x)[0]
    copies[0].load_state_dict(doubled)
    assert torch.equal(by_call, copies[0](x)[0])
    assert not torch.equal(by_call, module(x)[0])


@pytest.mark.parametrize("form", ["haste", "fastrnns", "torchaudio"])
def test_derivatives_of_both_orders(form):
    lstm = randomize(LayerNormLSTM(2, 3, dtype=torch.float64, **FORMS[form]))
    names = [n for n, _ in lstm.named_parameters()]
    x, hx = uniform((2, 2, 2)).requires_grad_(), states_for(lstm, 2)

    def call(x, h, c, *weights):
        output, states = torch.func.functional_call(
            lstm, dict(zip(names, weights, strict=True)), (x, (h, c))
        )
        return output, *states

    leaves = [x, *(s.requires_grad_() for s in hx), *lstm.parameters()]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("form", ["haste", "torchaudio"])
def test_ensemble_by_vmap(form):
    modules = [randomize(LayerNormLSTM(3, 4, 2, **FORMS[form])) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(modules)
    base, x = copy.deepcopy(modules[0]).to("meta"), torch.randn(5, 2, 3)

    def call(params, x):
        return torch.func.functional_call(base, (params, buffers), (x,))[0]

    found = torch.func.vmap(call, in_dims=(0, None))(params, x)
    expected = torch.stack([m(x)[0] for m in modules])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind, allow_rnn):
    ours, _, _ = KINDS[kind]
    module = randomize(ours(3, 4, carry_norm=True))
    x = torch.randn(*([5] if kind == "layer" else []), 2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    wanted = list(module.parameters())
    grads = [torch.autograd.grad(m(x)[0].square().sum(), wanted) for m in (compiled, module)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """dtypes as of the plain modules; numbers near those without."""
    ours, _, options = KINDS[kind]
    plain = {"layer": lstm_ext.LSTM, "cell": lstm_ext.LSTMCell}[kind](3, 4, **options)
    module = randomize(ours(3, 4, **options))
    x = torch.randn(*([5] if kind == "layer" else []), 2, 3)

    def flat(out):
        return [out[0], *out[1]] if kind == "layer" else list(out)

    expected = flat(module(x))
    with torch.autocast("cpu", torch.bfloat16):
        found, types = flat(module(x)), [t.dtype for t in flat(plain(x))]
    assert [t.dtype for t in found] == types
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=6e-2)
        assert not torch.equal(a.float(), b)
    torch.autograd.grad(found[0].float().sum(), list(module.parameters()), allow_unused=True)


def test_initial_weights():
    """lstm_ext.init says what it wrote: torch's own names, and no norms."""
    model = nn.Sequential(LayerNormLSTM(3, 4, bidirectional=True), LayerNormLSTMCell(3, 4))
    randomize(model)
    norms = {n: t.clone() for n, t in model.named_parameters() if "norm" in n or "bias_c" in n}
    ends = ["0.{}_l0", "0.{}_l0_reverse", "1.{}"]
    assert lstm_ext.init.forget_bias_(model) == [
        end.format(b) for end in ends for b in ("bias_ih", "bias_hh")
    ]
    assert lstm_ext.init.orthogonal_(model) == [end.format("weight_hh") for end in ends]
    now = dict(model.named_parameters())
    for end in ends:
        forget = (now[end.format("bias_ih")] + now[end.format("bias_hh")])[4:8]
        assert torch.equal(forget, torch.ones(4))
        w = now[end.format("weight_hh")][:4]
        torch.testing.assert_close(w @ w.T, torch.eye(4))
    for name, before in norms.items():
        assert torch.equal(now[name], before)
