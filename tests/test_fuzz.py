"""Cell and layer against torch.nn's on drawn cases: forward, backward and second derivative.

python -m pytest tests/test_fuzz.py --fuzz 20000        longer, on cases drawn anew
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import slow
from measure import DTYPES
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

LAYOUTS = ["dense", "strided", "offset", "transposed", "expanded"]
EXAMPLES = 150


@dataclass
class Case:
    kind: str
    L: int
    N: int
    I: int
    H: int
    dtype: torch.dtype
    bias: bool
    layers: int
    projection: int
    bidirectional: bool
    batch_first: bool
    single: bool  # one sequence or row, without a batch
    lengths: list | None
    states: bool
    layouts: list
    wanted: list  # gradients: of input, h, c, and every parameter
    outputs: list  # which outputs the loss has
    second: bool
    seed: int


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(["cell", "layer"]))
    L, N = draw(st.integers(0, 7)), draw(st.integers(0, 6))
    I, H = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    if draw(st.integers(0, 9)) == 0:  # now and then wide
        H = draw(st.integers(13, 80))
    single = draw(st.integers(0, 5)) == 0
    lengths = None
    if kind == "layer" and not single and L and N and draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, L), min_size=N, max_size=N))
    second = draw(st.integers(0, 2)) == 0
    dtype = torch.float64 if second else draw(st.sampled_from(DTYPES))
    return Case(
        kind, L, N, I, H, dtype,
        bias=draw(st.booleans()),
        layers=draw(st.integers(1, 3)),
        projection=draw(st.integers(0, 4)) if draw(st.integers(0, 4)) == 0 else 0,
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        single=single,
        lengths=lengths,
        states=draw(st.booleans()),
        layouts=draw(st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3)),
        wanted=draw(st.lists(st.booleans(), min_size=3 + 30, max_size=3 + 30)),
        outputs=draw(st.lists(st.booleans(), min_size=3, max_size=3)),
        second=second,
        seed=draw(st.integers(0, 1000)),
    )  # fmt: skip


def laid_out(values, layout):
    """The same numbers, in memory of another kind."""
    if layout == "strided" and values.dim():
        wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1] + 1, dtype=values.dtype)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "offset":
        flat = torch.zeros(values.numel() + 3, dtype=values.dtype)
        flat[3:] = values.flatten()
        return flat[3:].view(values.shape)
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


def drawn(case):
    """Input and states in float64, rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    D = 2 if case.bidirectional else 1
    if case.kind == "cell":
        shape, state = (case.N, case.I), (case.N, case.H)
    else:
        shape = (case.N, case.L) if case.batch_first else (case.L, case.N)
        shape, state = (*shape, case.I), (case.layers * D, case.N, case.H)
        if case.single:
            shape, state = (case.L, case.I), (case.layers * D, case.H)
    if case.kind == "cell" and case.single:
        shape, state = shape[1:], state[1:]
    of_h = (*state[:-1], case.projection) if case.projection and case.kind == "layer" else state
    values = []
    for size, layout in zip((shape, of_h, state), case.layouts, strict=True):
        value = torch.randn(size, generator=generator, dtype=torch.float64).to(case.dtype)
        if layout == "expanded" and value.dim() > 1 and len(value):
            value = value[:1].expand_as(value)
        values.append(value)
    return values


def build(case, package, dtype):
    torch.manual_seed(case.seed)
    if case.kind == "cell":
        module = package.LSTMCell(case.I, case.H, bias=case.bias)
    else:
        module = package.LSTM(
            case.I, case.H, num_layers=case.layers, bias=case.bias, proj_size=case.projection,
            bidirectional=case.bidirectional, batch_first=case.batch_first,
        )  # fmt: skip
    # The weights as the case's dtype rounds them.
    return module.to(case.dtype).to(dtype)


def results(case, package, dtype, device):
    """Outputs and gradients, and second derivatives; or the exception."""
    try:
        module = build(case, package, dtype).to(device)
        leaves = [
            laid_out(value.to(dtype), layout).to(device).detach().requires_grad_(wanted)
            for value, layout, wanted in zip(drawn(case), case.layouts, case.wanted, strict=False)
        ]
        for parameter, wanted in zip(module.parameters(), case.wanted[3:], strict=False):
            parameter.requires_grad_(wanted)
        x = leaves[0]
        if case.lengths is not None:
            x = pack_padded_sequence(
                x, torch.tensor(case.lengths), batch_first=case.batch_first, enforce_sorted=False
            )
        out = module(x, tuple(leaves[1:])) if case.states else module(x)
        if case.kind == "cell":
            outputs = list(out)
        else:
            first = out[0].data if isinstance(out[0], PackedSequence) else out[0]
            outputs = [first, *out[1]]
        generator = torch.Generator().manual_seed(case.seed + 1)
        grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
        used = [
            (t, g.to(case.dtype).to(device, dtype))
            for t, g, wanted in zip(outputs, grads, case.outputs, strict=False)
            if wanted and t.requires_grad
        ]
        found, second = list(outputs), []
        wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
        if used and wanted:
            first = torch.autograd.grad(
                [t for t, _ in used], wanted, [g for _, g in used],
                create_graph=case.second, allow_unused=True,
            )  # fmt: skip
            found += first
            if case.second:
                squares = [g.square().sum() for g in first if g is not None and g.requires_grad]
                if squares:
                    second = torch.autograd.grad(sum(squares), wanted, allow_unused=True)
        return [[t if t is None else t.detach().cpu() for t in part] for part in (found, second)]
    except Exception as error:
        return error


def rms(error):
    return error.square().mean().sqrt().item() if error.numel() else 0.0


def check(case, device="cpu"):
    theirs, ours = (results(case, package, case.dtype, device) for package in (nn, lstm_ext))
    if isinstance(theirs, Exception):
        assert isinstance(ours, Exception), f"torch says {theirs!r}, we nothing"
        assert type(ours) is type(theirs), (ours, theirs)
        assert str(ours).splitlines()[0] == str(theirs).splitlines()[0]
        return
    if isinstance(ours, Exception):
        raise ours
    truth = results(case, nn, torch.float64, "cpu")
    if not theirs[1]:
        # torch's composite sees that a gradient (of c', by c alone) needs no graph, where one fused
        # operation says that nothing moves it.
        assert all(t is None or not t.any() for t in ours[1])
        ours, theirs, truth = ours[:1], theirs[:1], truth[:1]
    ours, theirs, truth = ([t for part in parts for t in part] for parts in (ours, theirs, truth))
    largest = max((t.abs().max().item() for t in truth if t is not None and t.numel()), default=0.0)
    eps = torch.finfo(case.dtype).eps
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert (mine is None) == (other is None)
        if mine is None:
            continue
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
        assert mine.isfinite().all()
        scale = exact.abs().max().item() if exact.numel() else 0.0
        if case.dtype == torch.float64 or exact.numel() < 16:
            # torch's error is no measure: in float64 the truth is its own result, and of a few
            # numbers it may be none by luck. Sums round as their terms do, which are around one.
            scale = max(1.0, largest)
        allowed = 3 * rms(other.double() - exact) + 4 * eps * scale
        if case.second:
            allowed += 1e-11 * max(1.0, scale)
        error = rms(mine.double() - exact)
        assert error <= allowed or math.isclose(error, 0, abs_tol=1e-300), (error, allowed)


def test_against_torch(device, request):
    count = request.config.getoption("--fuzz")

    @settings(
        max_examples=count or EXAMPLES,
        deadline=None,
        derandomize=count is None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(case=cases())
    def run(case):
        check(case, device)

    run()


@pytest.mark.parametrize("which", ["c'", *slow("gradient", "second")])
def test_the_fuzzer_sees_small_mistakes(which, monkeypatch):
    """One part in a thousand, planted: it must be found within the ordinary number of cases."""
    right = lstm_ext.functional.lstm_cell

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if which == "gradient":
                return grad * 1.001
            (x,) = ctx.saved_tensors
            return grad + 0.01 * (x - x.detach())  # right, but for its derivative

    def wrong(*arguments, **named):
        h, c = right(*arguments, **named)
        if which == "c'":
            return h, c * 1.001
        return h, Wrong.apply(c)

    monkeypatch.setattr(lstm_ext.cell, "lstm_cell", wrong)
    for direct in ("fast_lstm_cell", "fast_cell_module"):
        monkeypatch.setattr(lstm_ext.cell._ops, direct, lambda *_: None)

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck), report_multiple_bugs=False)  # fmt: skip
    @given(case=cases())
    def run(case):
        check(case)

    with pytest.raises(AssertionError):
        run()
