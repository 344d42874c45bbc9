"""LSTMs with peepholes, the variant that is not torch's: every way in, against the reference."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from limits import slow, slow_where
from measure import DTYPES, Pool, uniform
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
from lstm_ext import reference

OPS = torch.ops.lstm_ext
PEEPHOLE = 1  # csrc/core/cells.h
NAMES = ["weight_ci", "weight_cf", "weight_co"]


def draw(N, I, H, dtype=torch.float64, bias=True):
    """input, h, c, w_ih, w_hh, b_ih, b_hh, unit_weights."""
    shapes = ((N, I), (N, H), (N, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,), (3, H))
    tensors = [uniform(s) * (1 if k < 3 else max(H, 1) ** -0.5) for k, s in enumerate(shapes)]
    tensors[7] = uniform(shapes[7])
    tensors = [t.to(dtype) for t in tensors]
    if not bias:
        tensors[5:7] = None, None
    return tensors


def by_onnx_formula(x, h, c, w_ih, w_hh, b_ih, b_hh, p):
    """The equations of the ONNX standard's LSTM, apart from the package."""
    i, f, g, o = (x @ w_ih.T + h @ w_hh.T + b_ih + b_hh).chunk(4, 1)
    i, f = torch.sigmoid(i + p[0] * c), torch.sigmoid(f + p[1] * c)
    c = f * c + i * torch.tanh(g)
    return torch.sigmoid(o + p[2] * c) * torch.tanh(c), c


def test_reference_is_the_formula():
    leaves = [t.requires_grad_() for t in draw(5, 3, 4)]
    x, h, c, *weights = leaves
    expected = by_onnx_formula(*leaves)
    found = reference.lstm_cell(x, (h, c), *weights, PEEPHOLE)
    torch.testing.assert_close(found, expected)
    grads = [uniform((5, 4)), uniform((5, 4))]
    by_hand = reference.lstm_cell_backward(*grads, x, (h, c), *weights, PEEPHOLE)
    torch.testing.assert_close(list(by_hand), list(torch.autograd.grad(expected, leaves, grads)))


def run(cell, tensors, grads, dtype):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    out = cell(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(out, wanted, [g.to(dtype) for g in grads])
    return [t.detach() for t in (*out, *found)]


def ours(x, h, c, *weights):
    *weights, p = weights
    return lstm_ext.lstm_cell(x, (h, c), *weights, unit_weights=p, variant="peephole")


def plain_operations(x, h, c, *weights):
    return reference.lstm_cell(x, (h, c), *weights, PEEPHOLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_worse_than_plain_operations(dtype):
    """Outputs and all eight gradients, against float64 (or, of it, an agreement to rounding)."""
    pools = {}
    sizes = [(1, 3, 2), (1, 64, 65), (3, 5, 16), (17, 20, 33), (40, 16, 64), (130, 8, 9)]
    for (N, I, H), bias in itertools.product(sizes, (True, False)):
        tensors = draw(N, I, H, dtype, bias)
        grads = [uniform((N, H)).to(dtype) for _ in range(2)]
        truth = run(plain_operations, tensors, grads, torch.float64)
        mine = run(ours, tensors, grads, dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)
            continue
        theirs = run(plain_operations, tensors, grads, dtype)
        for k, results in enumerate(zip(truth, mine, theirs, strict=True)):
            exact, *two = results
            pools.setdefault(k, Pool()).add(exact.numpy(), *two)
    for k, pool in pools.items():
        pool.assert_no_worse(f"result {k}", dtype)


def test_no_peepholes_is_the_plain_cell():
    """With weights of zero, to the bit."""
    x, h, c, *weights, p = draw(7, 5, 9, torch.float32)
    plain = lstm_ext.lstm_cell(x, (h, c), *weights)
    found = ours(x, h, c, *weights, torch.zeros_like(p))
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["", "peepholes"])
def test_unknown_variant(variant):
    x, h, c, *weights, p = draw(2, 3, 4)
    with pytest.raises(ValueError, match="variant should be one of plain, peephole"):
        lstm_ext.lstm_cell(x, (h, c), *weights, unit_weights=p, variant=variant)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:2], r"unit_weights of shape \(3, 4\)"),
        (lambda p: p[:, :3], r"unit_weights of shape \(3, 4\)"),
        (lambda _: None, r"unit_weights of shape \(3, 4\), got none"),
        (lambda p: p.float(), "dtype"),
        (lambda p: p.to("meta"), "same device"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_weights_are_an_error(change, message, grad):
    x, h, c, *weights, p = draw(2, 3, 4)
    wrong = change(p)
    if wrong is not None:
        wrong.requires_grad_(grad)
    with pytest.raises(RuntimeError, match=message):
        ours(x, h, c, *weights, wrong)
    with pytest.raises(RuntimeError, match=message):
        OPS.lstm_layer(x[None], h, c, *weights, None, None, False, wrong, PEEPHOLE)
    with pytest.raises(RuntimeError, match=r"has no unit_weights"):
        lstm_ext.lstm_cell(x, (h, c), *weights, unit_weights=p)


def test_gradcheck_of_the_cell():
    leaves = [t.requires_grad_() for t in draw(3, 3, 2)]
    assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, leaves)


OPTIONS = [*itertools.product([False, True], repeat=3)]


def sequence(L, N, packed, with_reset):
    lengths = torch.randint(1, L + 1, (N,)).sort(descending=True).values
    lengths[0] = L
    sizes = pack_padded_sequence(torch.zeros(L, N, 1), lengths).batch_sizes if packed else None
    return sizes, torch.rand(L, N) < 0.4 if with_reset else None


@pytest.mark.parametrize(
    ("packed", "reverse", "with_reset"),
    slow_where(lambda *options: len({*options}) > 1, OPTIONS),
)
def test_gradcheck_of_the_layer(packed, reverse, with_reset):
    sizes, reset = sequence(4, 3, packed, with_reset)
    leaves = draw(3, 3, 2)
    leaves[0] = uniform((int(sizes.sum()), 3)) if packed else uniform((4, 3, 3))
    leaves = [t.requires_grad_() for t in leaves]

    def layer(*tensors):
        *tensors, p = tensors
        return OPS.lstm_layer(*tensors, sizes, reset, reverse, p, PEEPHOLE)

    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize(("packed", "reverse", "with_reset"), OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_is_the_reference(dtype, packed, reverse, with_reset):
    for L, N, I, H in ((5, 4, 3, 8), (2, 1, 3, 40), (9, 20, 7, 17)):
        sizes, reset = sequence(L, N, packed, with_reset)
        leaves = draw(N, I, H, dtype)
        leaves[0] = uniform((int(sizes.sum()), I) if packed else (L, N, I)).to(dtype)
        exact = [t.double().requires_grad_() for t in leaves]
        leaves = [t.requires_grad_() for t in leaves]
        x, h, c, *weights = exact
        output, last = reference.lstm(
            x, (h, c), *weights[:4], sizes, reset, reverse, weights[4], PEEPHOLE
        )
        truth = (output, *last)
        found = OPS.lstm_layer(*leaves[:7], sizes, reset, reverse, leaves[7], PEEPHOLE)
        grads = [uniform(t.shape) for t in truth]
        truth += torch.autograd.grad(truth, exact, grads)
        found += torch.autograd.grad(found, leaves, [g.to(dtype) for g in grads])
        # In root mean square, of what is there: a step of a half rounds each number by 2^-9 or so.
        limit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}.get(dtype, 2e-3)
        for a, b in zip(found, truth, strict=True):
            assert (a - b).norm() <= limit * b.norm()
        with torch.no_grad():
            tensors = [t.detach() for t in leaves]
            again = OPS.lstm_layer(*tensors[:7], sizes, reset, reverse, tensors[7], PEEPHOLE)
        for a, b in zip(again, found[:3], strict=True):
            assert torch.equal(a, b)


# Modules.


def test_parameters():
    """Named, shaped and drawn as the issue of it says: like the others, after them."""
    torch.manual_seed(3)
    plain = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    torch.manual_seed(3)
    lstm = lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=True, peephole=True)
    names = [n for n, _ in lstm.named_parameters()]
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    own = [name + suffix for suffix in suffixes for name in NAMES]
    assert names == [n for n, _ in plain.named_parameters()] + own
    for name, p in plain.named_parameters():
        assert torch.equal(p, getattr(lstm, name))
    drawn = torch.cat([getattr(lstm, name) for name in own])
    assert drawn.shape == (48,)
    assert drawn.abs().max() <= 4**-0.5
    assert drawn.unique().numel() == 48
    torch.manual_seed(3)
    lstm.reset_parameters()
    assert torch.equal(drawn, torch.cat([getattr(lstm, name) for name in own]))
    assert len(lstm.all_weights) == 4
    assert [id(p) for ws in lstm.all_weights for p in ws[4:]] == [
        id(getattr(lstm, name)) for name in own
    ]
    cell = lstm_ext.LSTMCell(3, 4, bias=False, peephole=True, dtype=torch.float64)
    assert [n for n, _ in cell.named_parameters()] == ["weight_ih", "weight_hh", *NAMES]
    assert all(p.dtype == torch.float64 for p in cell.parameters())
    assert "peephole=True" in repr(cell)
    assert "peephole=True" in repr(lstm)
    assert "peephole" not in repr(lstm_ext.LSTM(3, 4)) + repr(lstm_ext.LSTMCell(3, 4))


def oracle(lstm, x, hx, batch_sizes=None, reset=None):
    """The layers of a module one after the other, by the reference."""
    directions = 2 if lstm.bidirectional else 1
    h_n, c_n = [], []
    for k in range(lstm.num_layers):
        outputs = []
        for d in range(directions):
            suffix = f"_l{k}" + ("_reverse" if d else "")
            names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if lstm.bias else [])]
            weights = [getattr(lstm, name + suffix).double() for name in names] + [None, None]
            p = torch.stack([getattr(lstm, name + suffix) for name in NAMES]).double()
            states = tuple(s[k * directions + d].double() for s in hx)
            output, (h, c) = reference.lstm(
                x, states, *weights[:4], batch_sizes, reset, d == 1, p, PEEPHOLE
            )
            outputs.append(output)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outputs, -1)
    return x, torch.stack(h_n), torch.stack(c_n)


MODULES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "bidirectional": True, "checkpoint_every": 2},
]


@pytest.mark.parametrize("options", MODULES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_module(options, packed, with_reset):
    L, N, I, H = 6, 5, 3, 4
    lstm = lstm_ext.LSTM(I, H, dtype=torch.float64, peephole=True, **options)
    layers = lstm.num_layers * (2 if lstm.bidirectional else 1)
    hx = uniform((layers, N, H)), uniform((layers, N, H))
    sizes, reset = sequence(L, N, packed, with_reset)
    x = uniform((int(sizes.sum()), I) if packed else (L, N, I)).requires_grad_()
    given = PackedSequence(x, sizes) if packed else x
    output, (h, c) = lstm(given, hx, reset=reset)
    output = output.data if packed else output
    expected = oracle(lstm, x, hx, sizes, reset)
    torch.testing.assert_close((output, h, c), expected)
    grads = [uniform(t.shape) for t in expected]
    wanted = [x, *lstm.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((output, h, c), wanted, grads),
        torch.autograd.grad(expected, wanted, grads),
    )


def test_ways_to_call_a_module():
    """batch_first, a single sequence, zeros for states, dropout, projections, float32."""
    torch.manual_seed(0)
    lstm = lstm_ext.LSTM(3, 4, batch_first=True, peephole=True).double()
    x = uniform((2, 5, 3))
    output, (h, c) = lstm(x)
    zeros = torch.zeros(1, 2, 4, dtype=torch.float64)
    expected = oracle(lstm, x.transpose(0, 1), (zeros, zeros))
    torch.testing.assert_close((output.transpose(0, 1), h, c), expected)
    single, (h1, _) = lstm(x[0])
    torch.testing.assert_close((single, h1), (output[0], h[:, 0]))
    cell = lstm_ext.LSTMCell(3, 4, peephole=True).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
    h = c = zeros[0]
    for t in range(5):
        h, c = cell(x[:, t], (h, c))
        torch.testing.assert_close(h, output[:, t])
    torch.testing.assert_close(cell(x[0, 0])[0], output[0, 0])
    deep = lstm_ext.LSTM(3, 4, num_layers=2, dropout=0.5, peephole=True)
    x = torch.randn(7, 2, 3)
    assert not torch.equal(deep(x)[0], deep(x)[0])
    deep.eval()
    assert torch.equal(deep(x)[0], deep(x)[0])
    projected = lstm_ext.LSTM(3, 4, proj_size=2, peephole=True).double()
    output, (h, c) = projected(x.double())
    state = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    p = torch.stack([getattr(projected, f"{name}_l0") for name in NAMES])
    w_ih, w_hh, b_ih, b_hh, w_hr = projected._flat_weights
    for step in x.double():
        r, c1 = by_onnx_formula(step, state[0], state[1], w_ih, w_hh, b_ih, b_hh, p)
        state = r @ w_hr.T, c1
    torch.testing.assert_close((output[-1], h[0], c[0]), (state[0], *state))


def test_copies_and_state_dicts():
    lstm = lstm_ext.LSTM(3, 4, num_layers=2, peephole=True)
    x = torch.randn(5, 2, 3)
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(other(x)[0], lstm(x)[0])
    fresh = lstm_ext.LSTM(3, 4, num_layers=2, peephole=True)
    fresh.load_state_dict(lstm.state_dict())
    assert torch.equal(fresh(x)[0], lstm(x)[0])
    with pytest.raises(RuntimeError, match="weight_ci_l0"):
        lstm_ext.LSTM(3, 4, num_layers=2).load_state_dict(lstm.state_dict())
    # The weights are read at each call.
    with torch.no_grad():
        fresh.weight_co_l1.zero_()
    assert not torch.equal(fresh(x)[0], lstm(x)[0])
    changed = {"weight_co_l1": lstm.weight_co_l1}
    assert torch.equal(torch.func.functional_call(fresh, changed, (x,))[0], lstm(x)[0])


def test_training_learns_the_peepholes():
    """A target that only they can tell apart; and .grad is accumulated over calls."""
    torch.manual_seed(0)
    cell = lstm_ext.LSTMCell(3, 4, peephole=True)
    x, hx = torch.randn(6, 3), (torch.randn(6, 4), torch.randn(6, 4))
    cell(x, hx)[0].sum().backward()
    once = [p.grad.clone() for p in cell.parameters()]
    cell(x, hx)[0].sum().backward()
    for p, grad in zip(cell.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
    leaf = torch.randn(3, 4, requires_grad=True)
    weights = [p.detach().requires_grad_() for p in list(cell.parameters())[:4]]
    for k in range(1, 3):  # a leaf, whose .grad is written in the same pass
        ours(x, *hx, *weights, leaf)[0].sum().backward()
        if k == 1:
            first = leaf.grad.clone()
    torch.testing.assert_close(leaf.grad, 2 * first)


def test_vmap():
    """An ensemble, per-sample gradients, states alone."""
    tensors = draw(4, 3, 5)
    ensemble = [torch.stack([t, t * 0.5, t - 0.1]) for t in tensors]
    expected = [ours(*(t[k] for t in ensemble)) for k in range(3)]
    for dims in (0, (0, 0, 0, None, None, None, None, 0), (0, 0, 0, *[None] * 5)):
        given = ensemble if dims == 0 else [
            e if d == 0 else t for e, t, d in zip(ensemble, tensors, dims, strict=True)
        ]  # fmt: skip
        found = torch.vmap(ours, dims)(*given)
        expected = [
            ours(*(t[k] if dims == 0 or d == 0 else t for t, d in
                   zip(given, dims or [0] * 8, strict=True)))
            for k in range(3)
        ]  # fmt: skip
        for a, b in zip(found, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b))

    def loss(p, x):
        h, c = ours(x[None], tensors[1][:1], tensors[2][:1], *tensors[3:7], p)
        return (h * c).sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(tensors[7], tensors[0])
    expected = [torch.func.grad(loss)(tensors[7], x) for x in tensors[0]]
    torch.testing.assert_close(found, torch.stack(expected))
    torch.func.jacrev(torch.func.jacfwd(loss))(tensors[7], tensors[0][0])

    lstm = lstm_ext.LSTM(3, 5, dtype=torch.float64, bidirectional=True, peephole=True)
    x = uniform((3, 4, 2, 3))
    torch.testing.assert_close(
        torch.vmap(lambda x: lstm(x)[0])(x), torch.stack([lstm(one)[0] for one in x])
    )


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_frozen(options):
    lstm = lstm_ext.LSTM(9, 40, peephole=True, **options).eval()
    frozen = lstm_ext.freeze(lstm)
    assert repr(frozen) == "Frozen" + repr(lstm).replace("peephole=True", "peephole=True, frozen")
    reset = torch.rand(7, 3) < 0.3
    packed = pack_padded_sequence(torch.randn(7, 3, 9), torch.tensor([7, 4, 4]))
    for x in (torch.randn(1, 1, 9), torch.randn(4, 9)):  # too short for an ordinary call to pack
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), lstm(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(frozen(packed)[0].data, lstm(packed)[0].data)
        x = torch.randn(7, 3, 9)
        assert torch.equal(frozen(x, reset=reset)[0], lstm(x, reset=reset)[0])
    assert lstm_ext.unfreeze(frozen) is lstm
    cell = lstm_ext.LSTMCell(200, 300, peephole=True).eval()
    frozen = lstm_ext.freeze(cell)
    for N in (1, 3, 50):
        x = torch.randn(N, 200)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), cell(x), rtol=1e-5, atol=1e-6)
    frozen = pickle.loads(pickle.dumps(frozen))
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), cell(x), rtol=1e-5, atol=1e-6)
    del cell.weight_ci
    cell.weight_ci = torch.zeros(300)
    with pytest.raises(ValueError, match="weight_ci is not a parameter"):
        lstm_ext.freeze(cell)


@pytest.mark.parametrize("differentiable", [False, True])
def test_trace(differentiable):
    lstm = lstm_ext.LSTM(3, 4, bidirectional=True, dtype=torch.float64, peephole=True)
    x, reset = uniform((6, 2, 3)), torch.rand(6, 2) < 0.3
    trace = lstm_ext.trace_gates(lstm, x, reset=reset, differentiable=differentiable)
    output, (_, c_n) = lstm(x, reset=reset)
    torch.testing.assert_close(torch.cat(tuple(trace.h), -1), output)
    torch.testing.assert_close(trace.c[0, -1], c_n[0])
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    h = c = zeros
    for t in range(6):
        h, c = (s.masked_fill(reset[t].unsqueeze(1), 0) for s in (h, c))
        weights = [
            getattr(lstm, f"{n}_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        p = torch.stack([getattr(lstm, f"{n}_l0") for n in NAMES])
        pre = reference.pre_activations(x[t], h, *weights)
        gates, h, c = reference.PeepholeCell.forward(pre, c, p)
        for name, value in zip("ifgoch", (*gates, c, h), strict=True):
            torch.testing.assert_close(getattr(trace, name)[0, t], value)
    cell = lstm_ext.LSTMCell(3, 4, dtype=torch.float64, peephole=True)
    trace = lstm_ext.trace_gates(cell, x[0])
    torch.testing.assert_close((trace.h[0, 0], trace.c[0, 0]), cell(x[0]))


def test_compile_and_export():
    torch._dynamo.reset()
    cell = lstm_ext.LSTMCell(3, 4, peephole=True)
    compiled = torch.compile(cell, fullgraph=True)
    x = torch.randn(2, 3)
    for a, b in ((compiled, cell),):
        found, expected = a(x)[0].sum(), b(x)[0].sum()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, list(cell.parameters())),
            torch.autograd.grad(expected, list(cell.parameters())),
        )
    lstm = lstm_ext.LSTM(3, 4, peephole=True).eval()
    program = torch.export.export(lstm, (torch.randn(5, 2, 3),))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(program.module()(x)[0], lstm(x)[0])


def test_what_torch_has_not_is_not_computed_without():
    """Never another cell's numbers in silence."""
    lstm, cell = lstm_ext.LSTM(3, 4, peephole=True), lstm_ext.LSTMCell(3, 4, peephole=True)
    model = nn.ModuleList([lstm, cell])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lstm_ext.revert(model)
    assert sum("have no peephole" in str(w.message) for w in caught) == 2
    assert type(model[0]) is lstm_ext.LSTM
    with pytest.raises(RuntimeError, match=r"peephole is not for torch\.nn\.LSTM,"):
        torch.jit.trace(lstm, torch.randn(5, 2, 3))
    with pytest.raises(RuntimeError, match=r"peephole is not for torch\.nn\.LSTMCell,"):
        torch.jit.trace(cell, torch.randn(2, 3))
    lstm.bidirectional = 1
    with pytest.raises(TypeError):
        lstm(torch.randn(5, 2, 3))
    with pytest.raises(AttributeError):
        cell("input")
    for module, x in ((lstm_ext.LSTM(3, 4, peephole=True), torch.randn(5, 2, 3).double()),
                      (cell, torch.randn(2, 3).double())):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError), match="dtype"):
            module(x)


def test_autocast():
    """As the plain module: bfloat16 in the layer, float32 kept in a cell on the CPU."""
    for plain, ours in (
        (lstm_ext.LSTM(3, 4), lstm_ext.LSTM(3, 4, peephole=True)),
        (lstm_ext.LSTMCell(3, 4), lstm_ext.LSTMCell(3, 4, peephole=True)),
    ):
        x = torch.randn(5, 2, 3) if isinstance(plain, nn.LSTM) else torch.randn(2, 3)
        exact = ours(x)[0]
        with torch.autocast("cpu"):
            a, b = plain(x)[0], ours(x)[0]
        assert a.dtype == b.dtype
        assert (b.float() - exact).abs().max() < 2e-2


@pytest.mark.parametrize(
    ("bidirectional", "table"), [(False, True), *slow((False, False), (True, False), (True, True))]
)
def test_onnx(tmp_path, table, bidirectional):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=bidirectional,
                                      peephole=True)  # fmt: skip
            self.cell = lstm_ext.LSTMCell(3, 4, peephole=True)

        def forward(self, x):
            output, (h, c) = self.lstm(x)
            return output, h, c, *self.cell(x[0])

    model, x = Model().eval(), torch.randn(5, 2, 3)
    translations = lstm_ext.onnx_translations() if table else None
    program = torch.onnx.export(
        model, (x,), dynamo=True, custom_translation_table=translations, verbose=False
    )
    path = tmp_path / "model.onnx"
    program.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for a, b in zip(found, model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-5, atol=1e-5)
