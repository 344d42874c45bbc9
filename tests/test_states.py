"""Cell states of every step, and resets to given states: every way in, against the reference."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.compiled_autograd
from limits import slow
from measure import DTYPES, uniform
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext import reference

OPS = torch.ops.lstm_ext
NONE, ZERO, ONE, EACH = "no reset", "to zero", "to states", "to states of each step"
RESETS = [NONE, ZERO, ONE, EACH]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(L, N, I, H, packed=False, resets=ONE, peephole=False, dtype=torch.float64):
    """The arguments of a layer's operator; those that have gradients, by name, are its tensors."""
    sizes = None
    if packed:
        lengths = torch.randint(1, L + 1, (N,)).sort(descending=True).values
        lengths[0] = L
        sizes = pack_padded_sequence(torch.zeros(L, N, 1), lengths).batch_sizes
    to = {NONE: None, ZERO: None, ONE: (N, H), EACH: (L, N, H)}[resets]
    scale = H**-0.5
    return {
        "input": uniform((int(sizes.sum()), I) if packed else (L, N, I)).to(dtype),
        "hx": uniform((N, H)).to(dtype),
        "cx": uniform((N, H)).to(dtype),
        "w_ih": (uniform((4 * H, I)) * scale).to(dtype),
        "w_hh": (uniform((4 * H, H)) * scale).to(dtype),
        "b_ih": uniform((4 * H,)).to(dtype),
        "b_hh": uniform((4 * H,)).to(dtype),
        "batch_sizes": sizes,
        "reset": None if resets == NONE else torch.rand(L, N) < 0.4,
        "reverse": False,
        "unit_weights": uniform((3, H)).to(dtype) if peephole else None,
        "variant": int(peephole),
        "reset_hx": None if to is None else uniform(to).to(dtype),
        "reset_cx": None if to is None else uniform(to).to(dtype),
    }


def leaves_of(arguments):
    return [
        t.requires_grad_()
        for t in arguments.values()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]


def by_reference(a):
    """output, h_n, c_n and the c of every step."""
    to = None if a["reset_hx"] is None else (a["reset_hx"], a["reset_cx"])
    output, cells, (h, c) = reference.lstm_with_cells(
        a["input"], (a["hx"], a["cx"]), *[a[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh")],
        a["batch_sizes"], a["reset"], a["reverse"], a["unit_weights"], a["variant"], to,
    )  # fmt: skip
    return output, h, c, cells


def test_reference_is_a_loop_of_torchs_cell():
    a = draw(7, 3, 2, 4, resets=EACH)
    cell = nn.LSTMCell(2, 4, dtype=torch.float64)
    with torch.no_grad():
        for p, name in zip(cell.parameters(), ("w_ih", "w_hh", "b_ih", "b_hh"), strict=True):
            p.copy_(a[name])
        output, h_n, c_n, cells = by_reference(a)
        h, c = a["hx"], a["cx"]
        for t in range(7):
            for n in range(3):
                if a["reset"][t, n]:
                    h[n], c[n] = a["reset_hx"][t, n], a["reset_cx"][t, n]
            h, c = cell(a["input"][t], (h, c))
            torch.testing.assert_close((output[t], cells[t]), (h, c))
    torch.testing.assert_close((h_n, c_n), (h, c))
    assert a["reset"].any()


# Few rows or one, whose steps threads share by units, and many, which they share by rows; one unit
# more than vectors have.
SIZES = [(5, 4, 3, 8), (3, 1, 3, 40), (9, 20, 7, 17), (4, 60, 5, 33)]


@pytest.mark.parametrize(
    ("packed", "reverse", "peephole"), [*itertools.product([False, True], repeat=3)]
)
@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_is_the_reference(dtype, resets, packed, reverse, peephole):
    limit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}.get(dtype, 2e-3)
    for L, N, I, H in SIZES:
        a = draw(L, N, I, H, packed, resets, peephole, dtype)
        a["reverse"] = reverse
        exact = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in a.items()
        }
        leaves, of_exact = leaves_of(a), leaves_of(exact)
        truth, found = by_reference(exact), OPS.lstm_layer_states(*a.values())
        grads = [uniform(t.shape) for t in truth]
        truth += torch.autograd.grad(truth, of_exact, grads)
        found += torch.autograd.grad(found, leaves, [g.to(dtype) for g in grads])
        for x, y in zip(found, truth, strict=True):
            assert x.dtype == dtype
            assert x.shape == y.shape
            assert (x - y).norm() <= limit * y.norm()
        with torch.no_grad():
            again = OPS.lstm_layer_states(*a.values())
        for x, y in zip(again, found[:4], strict=True):
            assert torch.equal(x, y)
        if resets in (NONE, ZERO):  # the same numbers as without them, to the bit
            plain = OPS.lstm_layer(*[*a.values()][:12])
            for x, y in zip(plain, found[:3], strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("wanted", ["output", "h_n", "c_n", "cells"])
def test_gradients_of_one_output_alone(wanted):
    a = draw(6, 3, 2, 5)
    leaves = leaves_of(a)
    k = ["output", "h_n", "c_n", "cells"].index(wanted)
    truth, found = by_reference(a)[k], OPS.lstm_layer_states(*a.values())[k]
    grad, options = uniform(truth.shape), {"allow_unused": True, "materialize_grads": True}
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, grad, **options),
        torch.autograd.grad(truth, leaves, grad, **options),
    )
    for leaf in leaves:  # and one input alone
        (one,) = torch.autograd.grad(OPS.lstm_layer_states(*a.values())[k], leaf, grad)
        (exact,) = torch.autograd.grad(by_reference(a)[k], leaf, grad, **options)
        torch.testing.assert_close(one, exact)


@pytest.mark.parametrize("peephole", [False, *slow(True)])
@pytest.mark.parametrize(
    ("packed", "reverse", "resets"),
    [(True, True, EACH), *slow((False, False, ONE), (True, False, ONE), (False, True, EACH))],
)
def test_gradcheck(packed, reverse, resets, peephole):
    a = draw(3, 2, 2, 2, packed, resets, peephole)
    a["reverse"] = reverse
    leaves = leaves_of(a)
    names = [k for k, v in a.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]

    def layer(*tensors):
        return OPS.lstm_layer_states(*{**a, **dict(zip(names, tensors, strict=True))}.values())

    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reset": None}, "reset_hx is for a call with reset"),
        ({"reset_hx": torch.zeros(4, 5).double()}, r"reset_hx must be .*\(N, H\) = \[3, 5\]"),
        ({"reset_cx": torch.zeros(7, 3, 5).double()}, r"reset_cx must be .*or \(L, N, H\)"),
        ({"reset_cx": torch.zeros(3, 5)}, "reset_cx must be .* Double .* got Float"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_arguments_of_the_operator(change, message, grad):
    a = {**draw(6, 3, 2, 5), **change}
    a["input"].requires_grad_(grad)
    with pytest.raises(RuntimeError, match=message):
        OPS.lstm_layer_states(*a.values())


# Modules.


def by_layers(lstm, x, hx, batch_sizes, reset, reset_hx):
    """A module by the reference: time first, or packed."""
    directions = 2 if lstm.bidirectional else 1
    h_n, c_n = [], []
    for k in range(lstm.num_layers):
        outputs, cells = [], []
        for d in range(directions):
            suffix, n = f"_l{k}" + ("_reverse" if d else ""), k * directions + d
            names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if lstm.bias else [])]
            weights = [getattr(lstm, name + suffix) for name in names] + [None, None]
            own = [f"weight_c{gate}{suffix}" for gate in "ifo"]
            p = torch.stack([getattr(lstm, w) for w in own]) if hasattr(lstm, own[0]) else None
            output, c, last = reference.lstm_with_cells(
                x, (hx[0][n], hx[1][n]), *weights[:4], batch_sizes, reset, d == 1, p,
                0 if p is None else 1, None if reset_hx is None else tuple(s[n] for s in reset_hx),
            )  # fmt: skip
            outputs.append(output)
            cells.append(c)
            h_n.append(last[0])
            c_n.append(last[1])
        x = torch.cat(outputs, -1)
    return x, torch.stack(h_n), torch.stack(c_n), torch.cat(cells, -1)


MODULES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False, "checkpoint_every": 2},
    {"num_layers": 3, "peephole": True},
    {"bidirectional": True, "peephole": True, "checkpoint_every": 4},
]


@pytest.mark.parametrize("options", MODULES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("resets", RESETS)
def test_module_is_the_reference(options, packed, resets):
    L, N, I, H = 6, 5, 3, 4
    lstm = lstm_ext.LSTM(I, H, dtype=torch.float64, **options)
    layers = lstm.num_layers * (2 if lstm.bidirectional else 1)
    hx = uniform((layers, N, H)).requires_grad_(), uniform((layers, N, H)).requires_grad_()
    a = draw(L, N, I, H, packed, resets)
    x, sizes, reset = a["input"].requires_grad_(), a["batch_sizes"], a["reset"]
    to = None
    if resets in (ONE, EACH):
        shape = (layers, N, H) if resets == ONE else (layers, L, N, H)
        to = uniform(shape).requires_grad_(), uniform(shape).requires_grad_()
    given = PackedSequence(x, sizes) if packed else x
    output, (h, c), cells = lstm(given, hx, reset=reset, reset_hx=to, return_cell_states=True)
    assert type(output) is type(cells) is (PackedSequence if packed else torch.Tensor)
    found = [t.data if packed else t for t in (output, cells)]
    found[1:1] = h, c
    expected = by_layers(lstm, x, hx, sizes, reset, to)
    torch.testing.assert_close(found, list(expected))
    grads = [uniform(t.shape) for t in expected]
    wanted = [x, *hx, *(to or ()), *lstm.parameters()]
    once = torch.autograd.grad(found, wanted, grads, create_graph=True)
    exact = torch.autograd.grad(expected, wanted, grads, create_graph=True)
    torch.testing.assert_close(once, exact)
    if resets == EACH:  # and a second time
        square = [sum(g.square().sum() for g in of) for of in (once, exact)]
        torch.testing.assert_close(*(torch.autograd.grad(s, wanted) for s in square))
    plain = lstm(given, hx, reset=reset, reset_hx=to)  # without the cells
    assert len(plain) == 2
    assert torch.equal(plain[0].data if packed else plain[0], found[0])


def step_by_step(lstm, x, hx, reset, reset_hx):
    """Calls of one step, with the states changed by hand between them; any LSTM of torch's kind."""
    h, c = hx
    outputs, cells = [], []
    for t in range(len(x)):
        anew = reset[t].reshape(1, -1, 1)
        h, c = torch.where(anew, reset_hx[0], h), torch.where(anew, reset_hx[1], c)
        output, (h, c) = nn.LSTM.forward(lstm, x[t : t + 1], (h, c))
        outputs.append(output)
        cells.append(c[-1:])
    return torch.cat(outputs), h, c, torch.cat(cells)


@pytest.mark.parametrize("options", [{"proj_size": 2, "num_layers": 2}, {"num_layers": 2}], ids=str)
def test_module_is_torchs_step_by_step(options):
    lstm = lstm_ext.LSTM(3, 4, dtype=torch.float64, **options)
    P, x, reset = lstm.proj_size or 4, uniform((6, 5, 3)), torch.rand(6, 5) < 0.4
    hx, to = ((uniform((2, 5, P)), uniform((2, 5, 4))) for _ in range(2))
    for t in to:
        t.requires_grad_()
    expected = step_by_step(lstm, x, hx, reset, to)
    output, (h, c), cells = lstm(x, hx, reset=reset, reset_hx=to, return_cell_states=True)
    found = output, h, c, cells
    torch.testing.assert_close(found, expected)
    grads = [uniform(t.shape) for t in expected]
    wanted = [*to, *lstm.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, grads), torch.autograd.grad(expected, wanted, grads)
    )


@pytest.mark.parametrize("by_step", [False, True])
def test_layouts(by_step):
    """batch_first, a single sequence, packed in another order, one state for all sequences."""
    L, N, I, H, K = 6, 4, 3, 5, 4
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    lstm = lstm_ext.LSTM(I, H, **options)
    first = lstm_ext.LSTM(I, H, batch_first=True, **options)
    first.load_state_dict(lstm.state_dict())
    x, reset = uniform((L, N, I)), torch.rand(L, N) < 0.4
    steps = (L,) if by_step else ()
    to = uniform((K, *steps, N, H)), uniform((K, *steps, N, H))
    call = {"reset": reset, "reset_hx": to, "return_cell_states": True}
    output, last, cells = lstm(x, **call)
    assert cells.shape == (L, N, 2 * H)
    of_first = first(x.transpose(0, 1), **{**call, "reset": reset.T})
    torch.testing.assert_close(
        of_first, (output.transpose(0, 1), last, cells.transpose(0, 1)), rtol=0, atol=1e-13
    )
    for n in range(N):
        call_n = {**call, "reset": reset[:, n], "reset_hx": [s[..., n, :] for s in to]}
        for module in (lstm, first):
            found = module(x[:, n], **call_n)
            expected = output[:, n], tuple(s[:, n] for s in last), cells[:, n]
            torch.testing.assert_close(found, expected)
    lengths = torch.tensor([3, 6, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, last, cells = lstm(packed, **call)
    (padded, _), (of_cells, _) = (pad_packed_sequence(p) for p in (output, cells))
    for n in range(N):
        m = int(lengths[n])
        call_n = {
            **call,
            "reset": reset[:m, n],
            "reset_hx": [s[:, :m, n] if by_step else s[:, n] for s in to],
        }
        found = lstm(x[:m, n], **call_n)
        torch.testing.assert_close(
            found, (padded[:m, n], tuple(s[:, n] for s in last), of_cells[:m, n])
        )
    # One for all: its gradient is the sum.
    shapes = [(K, L, 1, H)] if by_step else [(K, H), (K, 1, H)]
    for shape, data in itertools.product(shapes, (x, packed)):
        one = [uniform(shape).requires_grad_() for _ in range(2)]
        full = [s.detach().unsqueeze(1) if s.dim() == 2 else s.detach() for s in one]
        full = [s.expand(*s.shape[:-2], N, H).clone().requires_grad_() for s in full]
        a = lstm(data, **{**call, "reset_hx": one})
        b = lstm(data, **{**call, "reset_hx": full})
        values = [[out[0].data, *out[1], out[2].data] for out in (a, b)]
        torch.testing.assert_close(*values)
        sums = [sum(v.square().sum() for v in of) for of in values]
        found, exact = torch.autograd.grad(sums[0], one), torch.autograd.grad(sums[1], full)
        for f, e in zip(found, exact, strict=True):
            torch.testing.assert_close(f, e.sum(-2).reshape(shape))


def test_dropout_between_layers():
    """The same masks with and without cell states; none after the last layer."""
    lstm = lstm_ext.LSTM(3, 4, num_layers=2, dropout=0.5)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    plain, _ = lstm(x)
    torch.manual_seed(1)
    output, (_, c), cells = lstm(x, return_cell_states=True)
    assert torch.equal(output, plain)
    assert torch.equal(cells[-1], c[-1])


def test_learned_initial_state_learns():
    """Truncated episodes whose first target only a state can have told."""
    lstm = lstm_ext.LSTM(1, 8)
    states = nn.ParameterList([nn.Parameter(torch.zeros(1, 8)) for _ in range(2)])
    x, reset = torch.zeros(12, 5, 1), torch.zeros(12, 5, dtype=torch.bool)
    reset[::4] = True
    optimizer = torch.optim.Adam(states, lr=0.1)
    target = torch.linspace(-0.3, 0.3, 8)
    losses = []
    for _ in range(100):
        output, _ = lstm(x, reset=reset, reset_hx=tuple(states))
        loss = (output[::4] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_costs_nothing_where_it_is_off():
    """Neither the operators nor anything that is kept for backward are others than before."""
    lstm = lstm_ext.LSTM(3, 4, num_layers=2)
    x, reset = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.3

    def kept(**options):
        sizes = []
        with (
            torch.profiler.profile() as profiler,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.append(t.numel()) or t, lambda t: t
            ),
        ):
            lstm(x, **options)
        names = {e.name for e in profiler.events() if e.name.startswith("lstm_ext::")}
        return names, sum(sizes)

    plain = {"lstm_ext::lstm_layer", "lstm_ext::lstm_layer_forward"}
    off, numbers = kept(reset=reset)
    assert off == plain | {"lstm_ext::lstm"}
    on, with_cells = kept(reset=reset, return_cell_states=True)
    states = {"lstm_ext::lstm_layer_states", "lstm_ext::lstm_layer_states_forward"}
    assert on == plain | states  # the first layer's are not asked for
    assert with_cells == numbers  # as c before each step was kept anyway
    assert kept(reset_hx=(torch.zeros(2, 4),) * 2, reset=reset)[0] == states


def test_results_may_be_changed_in_place():
    """Before backward, as the last c may: nothing that is kept is what the user has."""
    lstm = lstm_ext.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    out = lstm(x, return_cell_states=True)
    expected = torch.autograd.grad(out[2].sum(), list(lstm.parameters()))
    _, (_, c), cells = lstm(x, return_cell_states=True)
    loss = cells.sum()
    with torch.no_grad():
        cells.zero_(), c.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, list(lstm.parameters())), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"reset": None}, ValueError, "reset_hx is for a call with reset"),
        ({"reset_hx": torch.zeros(2, 4)}, RuntimeError, "lstm expects two hidden states"),
        ({"reset_hx": (torch.zeros(2, 4),) * 3}, RuntimeError, "lstm expects two hidden states"),
        ({"reset_hx": (torch.zeros(2, 4), None)}, RuntimeError, "lstm expects two hidden states"),
        (
            {"reset_hx": (torch.zeros(2, 4), torch.zeros(2, 3, 4))},
            RuntimeError,
            r"Expected reset_hx\[1\] size \(2, 2, 4\), .*\(2, 5, 2, 4\), .*got \[2, 3, 4\]",
        ),
        ({"reset_hx": (torch.zeros(2, 4, 2, 4),) * 2}, RuntimeError, r"got \[2, 4, 2, 4\]"),
        ({"reset_hx": (torch.zeros(4),) * 2}, RuntimeError, r"got \[4\]"),
        (
            {"reset_hx": (torch.zeros(2, 4), torch.zeros(2, 4).double())},
            RuntimeError,
            r"Expected reset_hx\[1\] to have the states' dtype torch.float32",
        ),
        (
            {"reset_hx": (torch.zeros(2, 4), torch.zeros(2, 4, device="meta"))},
            RuntimeError,
            "and device cpu, got torch.float32 and meta",
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_errors(call, error, message, packed):
    lstm = lstm_ext.LSTM(3, 4, num_layers=2)
    x = torch.randn(5, 2, 3)
    data = pack_padded_sequence(x, torch.tensor([2, 5]), enforce_sorted=False) if packed else x
    to = torch.zeros(2, 4), torch.zeros(2, 4)
    with pytest.raises(error, match=message):
        lstm(data, **{"reset": torch.rand(5, 2) < 0.4, "reset_hx": to, **call})


def test_what_has_no_such_states_says_so():
    """Never other numbers in silence."""
    lstm, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    reset, to = torch.rand(5, 2) < 0.4, (torch.zeros(1, 4),) * 2
    frozen = lstm_ext.freeze(copy.deepcopy(lstm).eval())
    for call in ({"return_cell_states": True}, {"reset": reset, "reset_hx": to}):
        with torch.no_grad(), pytest.raises(RuntimeError, match="a frozen module has neither"):
            frozen(x, **call)
        nested = torch.nested.nested_tensor([x[:2, 0], x[:, 1]], layout=torch.jagged)
        with pytest.raises(RuntimeError, match="not for a nested input"):
            lstm(nested, **call)
        name = "reset" if "reset" in call else "return_cell_states"
        changed = lstm_ext.LSTM(3, 4, num_layers=2)
        changed.num_layers = 1  # torch's to judge, which computes one layer
        with pytest.raises(RuntimeError, match=rf"{name} is not for torch\.nn\.LSTM"):
            changed(x, **call)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return self.lstm(x, return_cell_states=True)[2]

    with pytest.raises(RuntimeError, match=r"return_cell_states is not for torch\.nn\.LSTM"):
        torch.jit.trace(Model(), x)
    with pytest.raises(TypeError, match="return_cell_states"):
        nn.LSTM(3, 4)(x, return_cell_states=True)


@pytest.mark.parametrize("call", ["cells", *slow("reset_hx")])
def test_onnx_says_so(call):
    pytest.importorskip("onnxscript")
    lstm = lstm_ext.LSTM(3, 4)

    class Model(nn.Module):
        def forward(self, x, reset, h):
            if call == "cells":
                return lstm(x, return_cell_states=True)[2]
            return lstm(x, reset=reset, reset_hx=(h, h))[0]

    lstm.eval()
    arguments = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.4, torch.zeros(1, 4)
    with pytest.raises(Exception, match=r"ONNX|export") as caught:
        torch.onnx.export(Model().eval(), arguments, dynamo=True, verbose=False)
    said, error = [], caught.value
    while error is not None:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    assert any("ONNX's LSTM has no reset_hx and no cell states" in text for text in said), said


def test_empty():
    lstm = lstm_ext.LSTM(3, 4)
    output, (h, _), cells = lstm(torch.randn(5, 0, 3), return_cell_states=True)
    assert output.shape == cells.shape == (5, 0, 4)
    assert h.shape == (1, 0, 4)
    for torchs in (nn.LSTM(3, 4), lstm):  # torch's words for no step
        options = {} if type(torchs) is nn.LSTM else {"return_cell_states": True}
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            torchs(torch.randn(0, 2, 3), **options)
    a = draw(1, 2, 3, 4)
    a["input"], a["reset"] = a["input"][:0], a["reset"][:0]
    leaves = leaves_of(a)
    output, h, _, cells = OPS.lstm_layer_states(*a.values())
    assert output.shape == cells.shape == (0, 2, 4)
    assert torch.equal(h, a["hx"])
    grads = torch.autograd.grad((output.sum() + cells.sum() + h.sum()), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert torch.equal(grads[1], torch.ones(2, 4))
    assert not grads[-1].any()


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(packed):
    """The dtypes of the plain call; resets to parameters that stay float32."""
    lstm = lstm_ext.LSTM(3, 4)
    x, reset = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.4
    data = pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x
    to = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    exact = lstm(data, reset=reset, reset_hx=to, return_cell_states=True)
    with torch.autocast("cpu"):
        plain = lstm(data, reset=reset)[0]
        output, _, cells = lstm(data, reset=reset, reset_hx=to, return_cell_states=True)
    found, expected = ([t.data for t in pair] for pair in ((output, cells), (exact[0], exact[2])))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == plain.data.dtype
        assert (a.float() - b).abs().max() < 3e-2
    cells = cells.data if packed else cells
    grads = torch.autograd.grad(cells.sum(), to)
    assert [g.dtype for g in grads] == [torch.float32] * 2


@pytest.mark.parametrize("given", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_autocast_with_projections(packed, given):
    """The dtypes of the plain call: h has the lower precision, c that of c_0."""
    lstm = lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    x, reset = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.4
    data = pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False) if packed else x
    hx = None if given is None else tuple(torch.randn(4, 2, n).to(given) for n in (2, 4))
    to = tuple(torch.randn(4, n).to(given or torch.float32) for n in (2, 4))
    with torch.autocast("cpu"):
        plain, (h_plain, c_plain) = lstm(data, hx, reset=reset)
        output, (h, c), cells = lstm(
            data,
            hx,
            reset=reset,
            reset_hx=tuple(map(torch.zeros_like, to)),
            return_cell_states=True,
        )
        other = lstm(data, hx, reset=reset, reset_hx=to)
    data_of = [t.data if packed else t for t in (plain, output, cells, other[0])]
    expected = [data_of[0].dtype, h_plain.dtype, c_plain.dtype]
    assert [t.dtype for t in (data_of[1], h, c)] == expected
    assert [t.dtype for t in (data_of[3], *other[1])] == expected
    assert data_of[2].dtype == c_plain.dtype
    for found, wanted in zip((data_of[1], h, c), (data_of[0], h_plain, c_plain), strict=True):
        assert (found.float() - wanted.float()).abs().max() < 3e-2


@pytest.mark.parametrize("by_step", [False, True])
def test_vmap_and_func(by_step):
    B, L, N, I, H = 3, 5, 2, 3, 4
    lstm = lstm_ext.LSTM(I, H, dtype=torch.float64, bidirectional=True)
    x, reset = uniform((B, L, N, I)), torch.rand(B, L, N) < 0.4
    to = tuple(uniform((B, 2, *([L] if by_step else []), N, H)) for _ in range(2))

    def call(x, reset, h, c):
        output, _, cells = lstm(x, reset=reset, reset_hx=(h, c), return_cell_states=True)
        return output, cells

    for dims in ((0, 0, 0, 0), (0, None, None, 0), (None, 0, 0, None)):
        given = [t if d == 0 else t[0] for t, d in zip((x, reset, *to), dims, strict=True)]
        found = torch.vmap(call, dims)(*given)
        for k in range(B):
            one = [t if d is None else t[k] for t, d in zip(given, dims, strict=True)]
            torch.testing.assert_close(tuple(t[k] for t in found), call(*one))

    def loss(to, x, reset):
        return sum(t.square().sum() for t in call(x, reset, *to))

    found = torch.vmap(torch.func.grad(loss))(to, x, reset)
    for k in range(B):
        one = tuple(s[k].clone().requires_grad_() for s in to)
        expected = torch.autograd.grad(loss(one, x[k], reset[k]), one)
        torch.testing.assert_close(tuple(g[k] for g in found), expected)

    def ensemble(weights, x):
        out = torch.func.functional_call(
            lstm, weights, (x,), {"reset": reset[0], "return_cell_states": True}
        )
        return out[2]

    weights = {n: torch.stack([p.detach() * k for k in range(1, 3)]) for n, p in
               lstm.named_parameters()}  # fmt: skip
    found = torch.vmap(ensemble, (0, None))(weights, x[0])
    for k in range(2):
        torch.testing.assert_close(found[k], ensemble({n: w[k] for n, w in weights.items()}, x[0]))


@pytest.mark.parametrize(
    ("resets", "backend"),
    [(ONE, "aot_eager"), *slow((ONE, "inductor"), (NONE, "inductor"), (EACH, "inductor"))],
)
def test_compile(resets, backend):
    torch._dynamo.reset()
    lstm = lstm_ext.LSTM(3, 4, num_layers=2)
    x, reset = torch.randn(5, 2, 3), None if resets == NONE else torch.rand(5, 2) < 0.4
    shape = {ONE: (2, 4), EACH: (2, 5, 2, 4)}.get(resets)
    to = None if shape is None else tuple(torch.randn(shape, requires_grad=True) for _ in range(2))

    def run(x, reset, to):
        output, (h, c), cells = lstm(x, reset=reset, reset_hx=to, return_cell_states=True)
        return output.sin().sum() + (cells * 2).sum() + h.sum() + c.sum()

    wanted = [*lstm.parameters(), *(to or ())]
    expected = torch.autograd.grad(run(x, reset, to), wanted)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        torch.testing.assert_close(torch.autograd.grad(compiled(x, reset, to), wanted), expected)


def test_compiled_autograd():
    a = draw(4, 3, 2, 2, packed=True, resets=EACH, peephole=True, dtype=torch.float32)
    leaves = leaves_of(a)

    def loss():
        output, _, _, cells = OPS.lstm_layer_states(*a.values())
        return output.sum() + cells.square().sum()

    expected = torch.autograd.grad(loss(), leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss().backward()
    torch.testing.assert_close([t.grad for t in leaves], list(expected))


def test_flops():
    lstm, x, counts = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3), []
    for options in ({}, {"return_cell_states": True}):
        with FlopCounterMode(display=False) as counter:
            lstm(x, **options)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_export():
    lstm = lstm_ext.LSTM(3, 4).eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm
            self.states = nn.ParameterList([nn.Parameter(torch.randn(1, 4)) for _ in range(2)])

        def forward(self, x, reset):
            out = self.lstm(x, reset=reset, reset_hx=tuple(self.states), return_cell_states=True)
            return out[0], out[2]

    model, L, N = Model(), torch.export.Dim("L", min=2), torch.export.Dim("N", min=2)
    example = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.4
    program = torch.export.export(model, example, dynamic_shapes=({0: L, 1: N}, {0: L, 1: N}))
    for L, N in ((5, 2), (8, 3)):
        x, reset = torch.randn(L, N, 3), torch.rand(L, N) < 0.4
        torch.testing.assert_close(program.module()(x, reset), model(x, reset))


def test_fx():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm_ext.LSTM(3, 4)

        def forward(self, x, reset, h):
            return self.lstm(x, reset=reset, reset_hx=(h, h), return_cell_states=True)[2]

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [set(node.kwargs) for node in calls] == [{"reset", "reset_hx", "return_cell_states"}]
    x, reset, h = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.4, torch.randn(1, 4)
    torch.testing.assert_close(traced(x, reset, h), model(x, reset, h))


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("resets", [NONE, ZERO, ONE, EACH])
def test_trace(differentiable, packed, resets):
    L, N = 6, 3
    lstm = lstm_ext.LSTM(3, 4, bidirectional=True, dtype=torch.float64, peephole=True)
    x, reset = uniform((L, N, 3)), None if resets == NONE else torch.rand(L, N) < 0.4
    shape = {ONE: (2, N, 4), EACH: (2, L, N, 4)}.get(resets)
    to = None if shape is None else tuple(uniform(shape).requires_grad_() for _ in range(2))
    data = pack_padded_sequence(x, torch.tensor([3, 6, 4]), enforce_sorted=False) if packed else x
    call = {"reset": reset, "reset_hx": to}
    trace = lstm_ext.trace_gates(lstm, data, **call, differentiable=differentiable)
    output, _, cells = lstm(data, **call, return_cell_states=True)
    if packed:
        output, cells = pad_packed_sequence(output)[0], pad_packed_sequence(cells)[0]
    torch.testing.assert_close(torch.cat(tuple(trace.h), -1), output)
    torch.testing.assert_close(torch.cat(tuple(trace.c), -1), cells)
    if differentiable and to is not None:
        found, expected = (torch.autograd.grad(c.square().sum(), to) for c in (trace.c, cells))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("differentiable", [False, True])
def test_trace_of_a_cell(differentiable):
    cell = lstm_ext.LSTMCell(3, 4)
    x, reset = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.4
    for shape in ((4,), (2, 4), (5, 2, 4)):
        to = torch.randn(shape), torch.randn(shape)
        trace = lstm_ext.trace_gates(
            cell, x, reset=reset, reset_hx=to, differentiable=differentiable
        )
        h = c = torch.zeros(2, 4)
        for t in range(5):
            anew = reset[t].unsqueeze(1)
            of_step = [s[t] if s.dim() == 3 else s for s in to]
            h, c = torch.where(anew, of_step[0], h), torch.where(anew, of_step[1], c)
            h, c = cell(x[t], (h, c))
            torch.testing.assert_close((trace.h[0, t], trace.c[0, t]), (h, c))


def test_functional_is_the_module():
    lstm = lstm_ext.LSTM(3, 4, bidirectional=True)
    x, hx, reset = torch.randn(5, 2, 3), (torch.randn(2, 2, 4),) * 2, torch.rand(5, 2) < 0.4
    flat = lstm._flat_weights
    weights = [lstm_ext.LayerWeights(*flat[k : k + 4]) for k in (0, 4)]
    call = {"reset": reset, "reset_hx": (torch.randn(2, 4),) * 2, "return_cell_states": True}
    output, (h, c), cells = lstm(x, hx, **call)
    found = lstm_ext.lstm(x, hx, weights, bidirectional=True, **call)
    for a, b in zip(found, (output, h, c, cells), strict=True):
        assert torch.equal(a, b)


def test_packed_sequence_can_be_padded():
    """The cells are a PackedSequence like the output, in the same order."""
    lstm = lstm_ext.LSTM(3, 4)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
    output, (_, c), cells = lstm(packed, return_cell_states=True)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(cells, name), getattr(output, name))
    padded, lengths = pad_packed_sequence(cells)
    for n, length in enumerate(lengths):
        assert torch.equal(padded[length - 1, n], c[0, n])
        assert not padded[length:, n].any()
