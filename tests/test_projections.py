"""Projections (proj_size) in the fused layer: against torch.nn.LSTM and the reference."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from layers import identify, pair, run, sequence
from limits import slow, slow_where
from measure import DTYPES, Pool, uniform
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
from lstm_ext import reference

OPS = torch.ops.lstm_ext
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
]
# L, N, I, H, P: one row, few, many (which threads share), and more than a panel of each size.
SIZES = [
    (5, 4, 3, 8, 3),
    (3, 1, 3, 40, 33),
    (9, 20, 7, 17, 16),
    (4, 1, 9, 300, 150),
    (6, 50, 20, 150, 70),
]
CASES = [*itertools.product([False, True], repeat=3)]


def draw(N, I, H, P, dtype=torch.float64, bias=True):
    """input, h, c, w_ih, w_hh, b_ih, b_hh, w_hr."""
    shapes = ((N, I), (N, P), (N, H), (4 * H, I), (4 * H, P), (4 * H,), (4 * H,), (P, H))
    tensors = [uniform(s) * (1 if k < 3 else H**-0.5) for k, s in enumerate(shapes)]
    tensors = [t.to(dtype) for t in tensors]
    if not bias:
        tensors[5:7] = None, None
    return tensors


def steps(L, N, packed, with_reset):
    lengths = torch.randint(1, L + 1, (N,)).sort(descending=True).values
    lengths[0] = L
    sizes = pack_padded_sequence(torch.zeros(L, N, 1), lengths).batch_sizes if packed else None
    return sizes, torch.rand(L, N) < 0.3 if with_reset else None


def rows_of(L, N, I, sizes):
    return uniform((L, N, I) if sizes is None else (int(sizes.sum()), I))


def fused(x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr, sizes, reset, reverse, p=None):
    variant = 0 if p is None else 1
    return OPS.lstm_layer_projected(
        x, h, c, w_ih, w_hh, b_ih, b_hh, sizes, reset, reverse, p, variant, w_hr
    )


def by_reference(x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr, sizes, reset, reverse, p=None):
    variant = 0 if p is None else 1
    output, states = reference.lstm(
        x, (h, c), w_ih, w_hh, b_ih, b_hh, sizes, reset, reverse, p, variant, w_hr=w_hr
    )
    return output, *states


def results(layer, tensors, dtype, *order):
    """Outputs and gradients of a random combination of them."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    out = layer(*leaves[:8], *order, *leaves[8:])
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in out]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(out, wanted, [g.to(dtype) for g in grads])
    return [t.detach() for t in (*out, *found)]


@pytest.mark.parametrize(("packed", "reverse", "with_reset"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peephole", [False, True])
def test_layer_is_the_reference(dtype, packed, reverse, with_reset, peephole):
    torch.manual_seed(0)
    for k, (L, N, I, H, P) in enumerate(SIZES):
        sizes, reset = steps(L, N, packed, with_reset)
        tensors = draw(N, I, H, P, dtype, bias=k % 2 == 0)
        tensors[0] = rows_of(L, N, I, sizes).to(dtype)
        tensors += [uniform((3, H)).to(dtype)] if peephole else []
        truth = results(by_reference, tensors, torch.float64, sizes, reset, reverse)
        found = results(fused, tensors, dtype, sizes, reset, reverse)
        limit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}.get(dtype, 3e-3)
        for a, b in zip(found, truth, strict=True):
            assert (a - b).norm() <= limit * b.norm()
        with torch.no_grad():
            again = fused(*tensors[:8], sizes, reset, reverse, *tensors[8:])
        for a, b in zip(again, found[:3], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_no_number_depends_on_threads(threads):
    """By rows, by hidden units, with whole panels and with parts of them."""
    before = torch.get_num_threads()
    try:
        for L, N, I, H, P in SIZES:
            torch.manual_seed(0)
            sizes, reset = steps(L, N, True, True)
            tensors = draw(N, I, H, P, torch.float32)
            tensors[0] = rows_of(L, N, I, sizes).float()
            torch.set_num_threads(1)
            alone = results(fused, tensors, torch.float32, sizes, reset, False)
            torch.set_num_threads(threads)
            together = results(fused, tensors, torch.float32, sizes, reset, False)
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_rows_do_not_depend_on_each_other():
    """A row has the same bits alone, in a batch, padded or packed."""
    torch.manual_seed(0)
    lstm = lstm_ext.LSTM(5, 40, proj_size=17, bidirectional=True)
    x, lengths = torch.randn(9, 50, 5), torch.randint(1, 10, (50,))
    with torch.no_grad():
        packed = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
        for sequence_of, k in zip(nn.utils.rnn.unpack_sequence(packed), range(50), strict=True):
            assert torch.equal(sequence_of, lstm(x[: lengths[k], k : k + 1])[0][:, 0])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS, ids=identify)
@pytest.mark.parametrize("dtype", [*DTYPES[:-1], *slow(DTYPES[-1])], ids=str)
def test_error_is_no_worse_than_torchs(dtype, options, packed):
    torch.manual_seed(0)
    pools = {}
    for L, N, I, H, P in [
        (7, 3, 5, 4, 2),
        (3, 9, 17, 33, 20),
        (40, 2, 6, 20, 9),
        (4, 30, 9, 40, 30),
    ]:
        for _ in range(2):
            theirs, mine = pair(I, H, dtype, proj_size=P, **options)
            exact = copy.deepcopy(theirs).double()
            x, states, lengths = sequence(mine, L, N)
            x, states = x.to(dtype), tuple(s.to(dtype) for s in states)
            lengths = lengths if packed else None
            if dtype == torch.float64:
                torch.testing.assert_close(
                    run(mine, x, states, lengths), run(theirs, x, states, lengths),
                    rtol=1e-9, atol=1e-11,
                )  # fmt: skip
                continue
            found = (run(module, x, states, lengths) for module in (exact, mine, theirs))
            for k, (truth, a, b) in enumerate(zip(*found, strict=True)):
                name = ["output", "h_n", "c_n", "input", "h_0", "c_0"][k] if k < 6 else "weights"
                scale = truth.abs().max().clamp(min=1e-30)
                pools.setdefault(name, Pool()).add(
                    (truth / scale).numpy(), a.double() / scale, b.double() / scale
                )
    for name, pool in pools.items():
        pool.assert_no_worse(name, dtype)


@pytest.mark.parametrize(
    ("packed", "reverse", "with_reset"), slow_where(lambda *options: len({*options}) > 1, CASES)
)
@pytest.mark.parametrize("peephole", [False, *slow(True)])
def test_gradcheck(packed, reverse, with_reset, peephole):
    """Both orders, and forward mode."""
    sizes, reset = steps(3, 2, packed, with_reset)
    tensors = draw(2, 3, 3, 2)
    tensors[0] = rows_of(3, 2, 3, sizes)
    tensors += [uniform((3, 3))] if peephole else []
    leaves = [t.requires_grad_() for t in tensors]

    def layer(*tensors):
        return fused(*tensors[:8], sizes, reset, reverse, *tensors[8:])

    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize("with_reset", [False, True])
def test_differentiable_gradients_are_the_references(with_reset):
    """Of both orders: gradgradcheck compares the second with a first of its own kind."""
    tensors = draw(3, 3, 5, 2)
    tensors[0] = uniform((4, 3, 3))
    reset = torch.rand(4, 3) < 0.4 if with_reset else None
    found = []
    for layer in (fused, by_reference):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = layer(*leaves, None, reset, False)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in out]
        first = torch.autograd.grad(out, leaves, grads, create_graph=True)
        grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in first]
        found.append([*first, *torch.autograd.grad(first, leaves, grads)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wanted", range(8))
def test_gradients_that_are_asked_for_alone(wanted):
    tensors = draw(3, 4, 20, 9)
    tensors[0] = uniform((5, 3, 4))
    order = None, None, False
    expected = results(by_reference, tensors, torch.float64, *order)[3 + wanted]
    leaves = [t.requires_grad_(k == wanted) for k, t in enumerate(tensors)]
    out = fused(*leaves, *order)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in out]
    torch.testing.assert_close(torch.autograd.grad(out, leaves[wanted], grads)[0], expected)
    (found,) = torch.autograd.grad(fused(*leaves, *order)[1].sum(), leaves[wanted])
    (expected,) = torch.autograd.grad(by_reference(*leaves, *order)[1].sum(), leaves[wanted])
    torch.testing.assert_close(found, expected)


def test_the_output_may_be_changed_in_place():
    """As torch's, whose projection keeps no output."""
    theirs, mine = pair(3, 5, proj_size=2, dtype=torch.float64)
    x = uniform((4, 2, 3))
    for module in (theirs, mine):
        output, _ = module(x)
        output.mul_(2)
        output.sum().backward()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, None], ids=str)
def test_autocast_has_torchs_dtypes(low, packed, given):
    given = given or low
    theirs, mine = pair(4, 6, proj_size=3, num_layers=2, bidirectional=True)
    if given == torch.float64:
        theirs, mine = theirs.double(), mine.double()
    exact = copy.deepcopy(theirs).double()
    x, states, lengths = sequence(mine, 5, 3)
    others = [] if given == torch.float64 else [tuple(s.float() for s in states)]
    for hx in (None, states, *others):
        found = []
        for module, dtype in ((theirs, given), (mine, given), (exact, torch.float64)):
            module.zero_grad()
            value = x.to(dtype)
            if packed:
                value = pack_padded_sequence(value, lengths, enforce_sorted=False)
            of_dtype = None if hx is None else tuple(
                s.to(dtype if hx is states or module is exact else s.dtype) for s in hx
            )  # fmt: skip
            with torch.autocast("cpu", low, enabled=module is not exact):
                output, last = module(value, of_dtype)
            outputs = [output.data if packed else output, *last]
            sum(t.double().square().sum() for t in outputs).backward()
            found.append([*outputs, *(p.grad for p in module.parameters())])
        for other, own, truth in zip(*found, strict=True):
            assert own.dtype == other.dtype
            off, allowed = ((t.double() - truth).norm() for t in (own, other))
            assert off <= 1.2 * allowed + 1e-12 * truth.norm()


def oracle(lstm, x, hx, batch_sizes=None, reset=None):
    """The layers of a module one after the other, by the reference."""
    directions = 2 if lstm.bidirectional else 1
    h_n, c_n = [], []
    for k in range(lstm.num_layers):
        outputs = []
        for d in range(directions):
            suffix = f"_l{k}" + ("_reverse" if d else "")
            biases = ["bias_ih", "bias_hh"] if lstm.bias else []
            w = {
                n: getattr(lstm, n + suffix)
                for n in ("weight_ih", "weight_hh", "weight_hr", *biases)
            }
            states = tuple(s[k * directions + d] for s in hx)
            output, (h, c) = reference.lstm(
                x, states, w["weight_ih"], w["weight_hh"], w.get("bias_ih"), w.get("bias_hh"),
                batch_sizes, reset, d == 1, w_hr=w["weight_hr"],
            )  # fmt: skip
            outputs.append(output)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outputs, -1)
    return x, torch.stack(h_n), torch.stack(c_n)


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "bidirectional": True},
        {"bias": False, "checkpoint_every": 2, "bidirectional": True},
    ],
    ids=identify,
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_module(options, packed, with_reset):
    L, N, I, H, P = 7, 5, 3, 6, 4
    lstm = lstm_ext.LSTM(I, H, proj_size=P, dtype=torch.float64, **options)
    layers = lstm.num_layers * 2
    hx = uniform((layers, N, P)), uniform((layers, N, H))
    sizes, reset = steps(L, N, packed, with_reset)
    x = rows_of(L, N, I, sizes).requires_grad_()
    output, (h, c) = lstm(PackedSequence(x, sizes) if packed else x, hx, reset=reset)
    output = output.data if packed else output
    expected = oracle(lstm, x, hx, sizes, reset)
    torch.testing.assert_close((output, h, c), expected)
    grads = [uniform(t.shape) for t in expected]
    wanted = [x, *lstm.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((output, h, c), wanted, grads),
        torch.autograd.grad(expected, wanted, grads),
    )


def test_vmap():
    """States and inputs alone, an ensemble, per-sample gradients, packed."""
    tensors = [t.float() for t in draw(2, 3, 6, 4)]
    tensors[0] = torch.randn(5, 2, 3)
    stacked = [torch.stack([t, t * 0.5, t - 0.1]) for t in tensors]

    def layer(*tensors):
        return fused(*tensors, None, None, False)

    for dims in ((0,) * 8, (0, 0, 0, *[None] * 5), (None, None, None, *[None] * 4, 0)):
        given = [s if d == 0 else t for s, t, d in zip(stacked, tensors, dims, strict=True)]
        found = torch.vmap(layer, dims)(*given)
        each = [
            layer(*(t if d is None else t[k] for t, d in zip(given, dims, strict=True)))
            for k in range(3)
        ]
        for a, b in zip(found, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b))
    lstm = lstm_ext.LSTM(3, 6, proj_size=2, dtype=torch.float64)
    weights = dict(lstm.named_parameters())
    x = uniform((4, 5, 3))

    def loss(weights, x):
        return torch.func.functional_call(lstm, weights, x)[0].square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for k, one in enumerate(x):
        lstm.zero_grad()
        lstm(one)[0].square().sum().backward()
        for name, p in lstm.named_parameters():
            torch.testing.assert_close(found[name][k], p.grad)


def test_forward_mode_of_a_module():
    theirs, mine = pair(3, 6, torch.float64, proj_size=2, num_layers=2, bidirectional=True)
    x, direction = uniform((5, 2, 3)), uniform((5, 2, 3))
    found, expected = (
        torch.func.jvp(lambda x, m=m: m(x)[0], (x,), (direction,)) for m in (mine, theirs)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("allow_rnn")
@pytest.mark.parametrize("packed", [False, True])
def test_compile(packed):
    lstm = lstm_ext.LSTM(3, 6, proj_size=2, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 3)
    given = pack_padded_sequence(x, torch.tensor([5, 4, 2])) if packed else x

    def call(module):
        output, (h, c) = module(given)
        lstm.zero_grad()
        ((output.data if packed else output).sum() + h.sum() + c.square().sum()).backward()
        return [h.detach(), c.detach(), *(p.grad.clone() for p in lstm.parameters())]

    expected = call(lstm)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(compiled), expected)


def test_export():
    lstm = lstm_ext.LSTM(3, 6, proj_size=2, bidirectional=True).eval()
    x = torch.randn(5, 2, 3)
    program = torch.export.export(lstm, (x,), dynamic_shapes=({0: torch.export.Dim("L")},))
    assert "lstm_ext.lstm.default" in {str(node.target) for node in program.graph.nodes}
    longer = torch.randn(8, 2, 3)
    torch.testing.assert_close(program.module()(longer), lstm(longer))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"peephole": True}, {"bidirectional": True, "num_layers": 2}])
def test_onnx_of_an_exported_program(options, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    lstm = lstm_ext.LSTM(3, 6, proj_size=2, **options).eval()
    x = torch.randn(5, 2, 3)
    exported = torch.export.export(lstm, (x,))
    torch.onnx.export(exported, (x,), dynamo=True, verbose=False).save(tmp_path / "lstm.onnx")
    session = runtime.InferenceSession(tmp_path / "lstm.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        output, states = lstm(x)
    for a, b in zip(found, (output, *states), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen(options, dtype):
    lstm = lstm_ext.LSTM(9, 40, proj_size=17, dtype=dtype, **options).eval()
    frozen = lstm_ext.freeze(lstm)
    reset = torch.rand(7, 3) < 0.3
    x = torch.randn(7, 3, 9).to(dtype)
    packed = pack_padded_sequence(x, torch.tensor([7, 4, 4]))
    with torch.no_grad():
        for given in (x, x[:1], x[0], torch.randn(2, 60, 9).to(dtype)):
            assert torch.equal(frozen(given)[0], lstm(given)[0])
        assert torch.equal(frozen(packed)[0].data, lstm(packed)[0].data)
        assert torch.equal(frozen(x, reset=reset)[0], lstm(x, reset=reset)[0])
        states = (
            torch.randn(lstm(x)[1][0].shape).to(dtype),
            torch.randn(lstm(x)[1][1].shape).to(dtype),
        )
        found, expected = frozen(x, states), lstm(x, states)
        for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            assert torch.equal(a, b)
        again = pickle.loads(pickle.dumps(frozen))
        assert torch.equal(again(x)[0], lstm(x)[0])
        traced = torch.jit.trace(frozen, (x,), check_trace=False)
        assert torch.equal(traced(x)[0], lstm(x)[0])
    assert lstm_ext.unfreeze(frozen) is lstm


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_frozen_in_fewer_bits(weights, keep):
    """The matrices of the gates are stored in fewer bits; the projection is as it was."""
    torch.manual_seed(0)
    lstm = lstm_ext.LSTM(30, 64, proj_size=20, num_layers=2).eval()
    rounded = copy.deepcopy(lstm)
    for name, p in rounded.named_parameters():
        if name.startswith(("weight_ih", "weight_hh")):
            if weights == "bfloat16":
                p.data = p.data.bfloat16().float()
            else:
                scale = p.data.abs().amax(1, keepdim=True) / 127
                p.data = (p.data / scale).round() * scale
    x = torch.randn(20, 3, 30)
    activations = "int16" if weights == "int8" else None
    with torch.no_grad():
        expected, states = rounded(x)
        frozen = lstm_ext.freeze(lstm, weights=weights, activations=activations, keep_weights=keep)
        found, last = frozen(x)
        limit = 1e-6 if weights == "bfloat16" else 1e-3
        for a, b in zip((found, *last), (expected, *states), strict=True):
            assert (a - b).norm() <= limit * b.norm()
        again = pickle.loads(pickle.dumps(frozen))
        assert torch.equal(again(x)[0], found)


def test_packed_weights_say_whether_h_is_projected():
    """Same bytes, other sizes: P is in the header."""
    x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr = (t.float() for t in draw(2, 3, 8, 4))
    packed = OPS.lstm_layer_pack(w_ih, w_hh, 0, w_hr)
    rest = packed, b_ih, b_hh, None, None, False
    OPS.lstm_layer_packed(x[None], h, c, *rest)
    with pytest.raises(RuntimeError, match=r"packed for Float 3 -> 8 -> 4 and .*not for .*8 -> 3"):
        OPS.lstm_layer_packed(x[None], h[:, :3], c, *rest)
    plain = OPS.lstm_layer_pack(w_ih, torch.zeros(32, 8))
    with pytest.raises(RuntimeError, match="do not fit each other"):
        OPS.lstm_layer_packed(x[None], h, c, plain, *rest[1:])
    wide = torch.cat([h, h], 1)
    with pytest.raises(RuntimeError, match=r"3 -> 8 -> 4 and .*not for .*8 -> 8"):
        OPS.lstm_layer_packed(x[None], wide, c, *rest)
    for wrong in (w_hr[:3], w_hr[:, :5], w_hr[0], w_hr.double()):
        with pytest.raises(RuntimeError, match="lstm_layer_pack"):
            OPS.lstm_layer_pack(w_ih, w_hh, 0, wrong)


def test_autocast_of_a_frozen_module():
    lstm = lstm_ext.LSTM(3, 6, proj_size=2).eval()
    frozen = lstm_ext.freeze(copy.deepcopy(lstm))
    x = torch.randn(5, 2, 3)
    for given in (x, pack_padded_sequence(x, torch.tensor([5, 3]))):
        with torch.no_grad(), torch.autocast("cpu"):
            (a, states), (b, expected) = frozen(given), lstm(given)
            pairs = [(a.data, b.data), *zip(states, expected, strict=True)]
            for found, wanted in pairs:
                assert torch.equal(found, wanted)
                assert found.dtype == wanted.dtype


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_trace(differentiable, packed):
    lstm = lstm_ext.LSTM(3, 6, proj_size=2, bidirectional=True, dtype=torch.float64)
    x, reset = uniform((6, 2, 3)), torch.rand(6, 2) < 0.3
    given = pack_padded_sequence(x, torch.tensor([6, 4])) if packed else x
    trace = lstm_ext.trace_gates(lstm, given, reset=reset, differentiable=differentiable)
    output, (_, c_n) = lstm(given, reset=reset)
    if packed:
        output, _ = nn.utils.rnn.pad_packed_sequence(output)
    torch.testing.assert_close(torch.cat(tuple(trace.h), -1), output)
    torch.testing.assert_close(trace.c[1, 0], c_n[1])
    o, c = trace.o[0, :4], trace.c[0, :4]
    torch.testing.assert_close(trace.h[0, :4], (o * torch.tanh(c)) @ lstm.weight_hr_l0.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_hr": (3, 6)}, r"w_hr \(P, H\)"),
        ({"w_hr": (2, 5)}, r"w_hr \(P, H\)"),
        ({"w_hh": (24, 6)}, r"expected weights"),
        ({"h": (2, 3)}, r"w_hr \(P, H\)"),
        ({"c": (3, 6)}, r"do not fit"),
        ({"b_ih": (8,)}, r"expected weights"),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_sizes_are_an_error(change, message, grad):
    names = ["x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"]
    tensors = dict(zip(names, draw(2, 3, 6, 2), strict=True))
    tensors["x"] = uniform((4, 2, 3))
    for name, shape in change.items():
        tensors[name] = uniform(shape)
    given = [t.requires_grad_(grad) for t in tensors.values()]
    with pytest.raises(RuntimeError, match=message):
        fused(*given, None, None, False)


WRONG = {
    "features": lambda m: m(torch.randn(5, 3, 7)),
    "dtype": lambda m: m(torch.randn(5, 3, 4).double()),
    "h of size H": lambda m: m(torch.randn(5, 3, 4), (torch.zeros(1, 3, 6),) * 2),
    "c of size P": lambda m: m(torch.randn(5, 3, 4), (torch.zeros(1, 3, 2),) * 2),
    "h of a wrong batch": lambda m: m(
        torch.randn(5, 3, 4), (torch.zeros(1, 2, 2), torch.zeros(1, 3, 6))
    ),
    "2-D states": lambda m: m(torch.randn(5, 3, 4), (torch.zeros(3, 2), torch.zeros(3, 6))),
    "no steps": lambda m: m(torch.randn(0, 3, 4)),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_torchs(name):
    theirs, mine = pair(4, 6, proj_size=2)
    errors = []
    for module in (theirs, mine):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - compared below
            WRONG[name](module)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[1] == errors[0]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64], ids=str)
def test_what_the_kernels_do_not_take_is_torchs(dtype):
    """Complex numbers; and weights of another dtype under autocast."""
    theirs, mine = pair(4, 6, dtype, proj_size=2)
    x = torch.randn(5, 3, 4, dtype=dtype)
    torch.testing.assert_close(mine(x), theirs(x))


def test_meta_tensors():
    lstm = lstm_ext.LSTM(4, 6, proj_size=2, num_layers=2, device="meta")
    output, (h, c) = lstm(torch.empty(5, 3, 4, device="meta"))
    assert (output.shape, h.shape, c.shape) == ((5, 3, 2), (2, 3, 2), (2, 3, 6))


def test_empty_batch():
    theirs, mine = pair(4, 6, proj_size=2)
    x = torch.randn(5, 0, 4)
    torch.testing.assert_close(mine(x), theirs(x))
    tensors = [t.requires_grad_() for t in draw(0, 3, 6, 2)]
    x = uniform((5, 0, 3)).requires_grad_()
    out = fused(x, *tensors[1:], None, None, False)
    assert [t.shape for t in out] == [(5, 0, 2), (0, 2), (0, 6)]
    found = torch.autograd.grad([t.sum() for t in out], tensors[1:])
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(found, tensors[1:], strict=True))


def test_saves_and_loads():
    theirs, mine = pair(4, 6, proj_size=2, num_layers=2)
    buffer = io.BytesIO()
    torch.save(mine.state_dict(), buffer)
    buffer.seek(0)
    fresh = lstm_ext.LSTM(4, 6, proj_size=2, num_layers=2)
    fresh.load_state_dict(torch.load(buffer))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    x = torch.randn(5, 3, 4)
    assert torch.equal(fresh(x)[0], mine(x)[0])
