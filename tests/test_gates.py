"""Gate traces against the modules' own outputs, against the cell by hand, and the lecture's."""

import itertools

import numpy as np
import pytest
import torch
from limits import slow
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import lstm_ext
from lstm_ext import reference
from lstm_ext.inspect.gates import NAMES

L, N, I, H = 6, 4, 3, 5
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def by_hand(module, k, x, h, c, sizes=None, reset=None):
    """One layer and direction step by step, one sequence after the other: dict of (L, N, H)."""
    suffix = f"_l{k // (1 + module.bidirectional)}"
    suffix += "_reverse" if module.bidirectional and k % 2 else ""
    weights = [
        getattr(module, name + suffix) if module.bias or "weight" in name else None
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    steps, batch = x.shape[:2]
    P = module.proj_size or module.hidden_size
    widths = {**dict.fromkeys("ifgoc", module.hidden_size), "h": P}
    out = {name: torch.zeros(steps, batch, width, dtype=x.dtype) for name, width in widths.items()}
    for n in range(batch):
        length = steps if sizes is None else sizes[n]
        h_t, c_t = h[n : n + 1], c[n : n + 1]
        for t in reversed(range(length)) if "reverse" in suffix else range(length):
            if reset is not None and reset[t, n]:
                h_t, c_t = torch.zeros_like(h_t), torch.zeros_like(c_t)
            gates = reference.gates(x[t, n : n + 1], h_t, *weights)
            h_t, c_t = reference.states(gates, c_t)
            if module.proj_size:
                h_t = h_t @ getattr(module, "weight_hr" + suffix).T
            for name, value in zip("ifgoch", (*gates, c_t, h_t), strict=True):
                out[name][t, n] = value[0]
    return out


def expected(module, x, hx, sizes=None, reset=None):
    """Every layer by hand, x (L, N, I): dict of (K, L, N, H)."""
    directions = 1 + module.bidirectional
    found = []
    for layer in range(module.num_layers):
        parts = [
            by_hand(module, k, x, hx[0][k], hx[1][k], sizes, reset)
            for k in range(layer * directions, (layer + 1) * directions)
        ]
        x = torch.cat([part["h"] for part in parts], -1)
        found += parts
    return {name: torch.stack([part[name] for part in found]) for name in NAMES}


def states(module, batch, dtype=torch.float32):
    K = module.num_layers * (1 + module.bidirectional)
    P = module.proj_size or module.hidden_size
    return torch.randn(K, batch, P, dtype=dtype), torch.randn(K, batch, H, dtype=dtype)


def compare(trace, wanted):
    for name in NAMES:
        torch.testing.assert_close(getattr(trace, name), wanted[name], **TOLERANCE)


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "projected": {"num_layers": 2, "proj_size": 2, "bidirectional": True},
}


@pytest.fixture(params=["torch.nn", "lstm_ext"])
def kind(request):
    return nn.LSTM if request.param == "torch.nn" else lstm_ext.LSTM


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_padded(options, kind, differentiable):
    module = kind(I, H, **OPTIONS[options])
    x, hx = torch.randn(L, N, I), states(module, N)
    trace = lstm_ext.trace_gates(module, x, hx, differentiable=differentiable)
    with torch.no_grad():
        compare(trace, expected(module, x, hx))
        output, (h, c) = module(x, hx)
    directions = 1 + module.bidirectional
    torch.testing.assert_close(torch.cat(tuple(trace.h[-directions:]), -1), output, **TOLERANCE)
    for k in range(len(h)):
        end = 0 if module.bidirectional and k % 2 else -1
        torch.testing.assert_close(trace.h[k, end], h[k], **TOLERANCE)
        torch.testing.assert_close(trace.c[k, end], c[k], **TOLERANCE)
    assert trace.i.requires_grad == differentiable
    assert trace.lengths is None


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_packed(options, kind, differentiable):
    """In the order of the lengths given, not of the packed batch; zero beyond them."""
    module = kind(I, H, **OPTIONS[options])
    lengths, hx = [2, 6, 1, 4], states(module, N)
    x = torch.randn(L, N, I)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    trace = lstm_ext.trace_gates(module, packed, hx, differentiable=differentiable)
    with torch.no_grad():
        compare(trace, expected(module, x, hx, lengths))
        output, _ = pad_packed_sequence(module(packed, hx)[0])
    directions = 1 + module.bidirectional
    torch.testing.assert_close(torch.cat(tuple(trace.h[-directions:]), -1), output, **TOLERANCE)
    assert trace.lengths.tolist() == lengths
    assert trace.valid().sum(0).tolist() == lengths


def test_sorted_packed_without_states(kind):
    module = kind(I, H)
    packed = pack_sequence([torch.randn(length, I) for length in (5, 3, 3)])
    trace = lstm_ext.trace_gates(module, packed)
    output, lengths = pad_packed_sequence(module(packed)[0])
    torch.testing.assert_close(trace.h[0], output, **TOLERANCE)
    assert torch.equal(trace.lengths, lengths)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_reset(packed, bidirectional, differentiable, kind):
    module = kind(I, H, bidirectional=bidirectional)
    x, hx, reset = torch.randn(L, N, I), states(module, N), torch.rand(L, N) < 0.4
    lengths = [6, 4, 4, 1] if packed else None
    input = pack_padded_sequence(x, torch.tensor(lengths)) if packed else x
    trace = lstm_ext.trace_gates(module, input, hx, reset=reset, differentiable=differentiable)
    with torch.no_grad():
        compare(trace, expected(module, x, hx, lengths, reset))


def test_batch_first_and_single(kind):
    module = kind(I, H, num_layers=2, batch_first=True)
    x = torch.randn(N, L, I)
    trace = lstm_ext.trace_gates(module, x)
    torch.testing.assert_close(trace.h[-1].transpose(0, 1), module(x)[0], **TOLERANCE)
    one = lstm_ext.trace_gates(module, x[1])
    assert one.i.shape == (2, L, 1, H)
    torch.testing.assert_close(one.f[:, :, 0], trace.f[:, :, 1], **TOLERANCE)


@pytest.mark.parametrize("cell_kind", [nn.LSTMCell, lstm_ext.LSTMCell])
@pytest.mark.parametrize("differentiable", [False, True])
def test_cell(cell_kind, differentiable):
    cell = cell_kind(I, H)
    x, h, c = torch.randn(L, N, I), torch.randn(N, H), torch.randn(N, H)

    def trace(*arguments, **options):
        return lstm_ext.trace_gates(cell, *arguments, differentiable=differentiable, **options)

    whole = trace(x, (h, c))
    state = (h, c)
    for t in range(L):
        gates = reference.gates(x[t], state[0], *cell.parameters())
        for name, value in zip("ifgo", gates, strict=True):
            torch.testing.assert_close(getattr(whole, name)[0, t], value, **TOLERANCE)
        state = cell(x[t], state)
        torch.testing.assert_close(whole.h[0, t], state[0], **TOLERANCE)
        torch.testing.assert_close(whole.c[0, t], state[1], **TOLERANCE)
    step = trace(x[0], (h, c))
    assert step.i.shape == (1, 1, N, H)
    torch.testing.assert_close(step.c[0, 0], cell(x[0], (h, c))[1], **TOLERANCE)
    single = trace(x[0, 2], (h[2], c[2]))
    torch.testing.assert_close(single.o[:, :, 0], step.o[:, :, 2], **TOLERANCE)
    torch.testing.assert_close(trace(x[0]).h[0, 0], cell(x[0])[0], **TOLERANCE)
    anew = trace(x, (h, c), reset=torch.ones(L, N, dtype=torch.bool))
    torch.testing.assert_close(anew.h[0].flatten(0, 1), cell(x.flatten(0, 1))[0], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, kind):
    module = kind(I, H, dtype=dtype)
    x = torch.randn(L, N, I).to(dtype)
    trace = lstm_ext.trace_gates(module, x)
    output = module(x)[0]
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(trace.h[0], output, **tolerance)
    assert all(getattr(trace, name).dtype == dtype for name in NAMES)
    wanted = expected(module.double(), x.double(), (torch.zeros(1, N, H, dtype=torch.float64),) * 2)
    for name in NAMES:
        torch.testing.assert_close(getattr(trace, name).double(), wanted[name], **tolerance)


def test_device(device, kind):
    module = kind(I, H, num_layers=2, bidirectional=True).to(device)
    x = torch.randn(L, N, I, device=device)
    trace = lstm_ext.trace_gates(module, x)
    output = module(x)[0]
    torch.testing.assert_close(
        torch.cat(tuple(trace.h[-2:]), -1),
        output,
        rtol=1e-3 if device == "cuda" else 1e-5,
        atol=1e-4,
    )
    assert trace.half_life().device == x.device
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 4, 1]))
    assert lstm_ext.trace_gates(module, packed).c.device == x.device


@pytest.mark.parametrize("kind", ["lstm_ext", *slow("torch.nn")], indirect=True)
def test_gradients_of_a_trace(kind):
    """Of the gates with respect to weights, input and states; twice too."""
    module = kind(I, H, num_layers=2, dtype=torch.float64)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    hx = tuple(t.requires_grad_() for t in states(module, 2, torch.float64))

    def loss(x, h, c, *weights):
        trace = lstm_ext.trace_gates(module, x, (h, c), differentiable=True)
        return trace.f.sum() + (trace.i * trace.c).sum() + trace.h.square().sum()

    inputs = (x, *hx, *module.parameters())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs[:3])


def test_in_training_and_under_no_grad(kind):
    module = kind(I, H, num_layers=2, dropout=0.5)
    x = torch.randn(L, N, I)
    torch.manual_seed(3)
    output = module(x)[0]
    torch.manual_seed(3)
    trace = lstm_ext.trace_gates(module, x)
    torch.testing.assert_close(trace.h[-1], output, **TOLERANCE)  # the same drop-outs
    module.eval()
    trace = lstm_ext.trace_gates(module, x)
    torch.testing.assert_close(trace.h[-1], module(x)[0], **TOLERANCE)
    with torch.no_grad():
        assert not lstm_ext.trace_gates(module, x, differentiable=True).h.requires_grad


WRITERS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda m, name: nn.utils.prune.random_unstructured(m, name, 0.4),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_weights_that_a_call_would_write(write, cell, differentiable, kind):
    """A step of an optimizer is in the trace before the next call."""
    package = lstm_ext if kind is lstm_ext.LSTM else nn
    module = package.LSTMCell(I, H) if cell else kind(I, H, num_layers=2)
    write(module, "weight_hh" if cell else "weight_hh_l0").eval()
    x = torch.randn(N, I) if cell else torch.randn(L, N, I)
    module(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    trace = lstm_ext.trace_gates(module, x, differentiable=differentiable)
    output = module(x)[0]
    torch.testing.assert_close(trace.h[-1, 0] if cell else trace.h[-1], output, **TOLERANCE)
    if differentiable:
        found, expected = (
            torch.autograd.grad(h.square().sum(), list(module.parameters()))
            for h in (trace.h[-1], output)
        )
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_other_holders_of_weights():
    """Parametrized, frozen, a subclass."""
    x = torch.randn(L, N, I)
    module = parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0")
    torch.testing.assert_close(lstm_ext.trace_gates(module, x).h[0], module(x)[0], **TOLERANCE)
    ours = lstm_ext.LSTM(I, H).eval()
    frozen = lstm_ext.freeze(ours)
    torch.testing.assert_close(lstm_ext.trace_gates(frozen, x).h[0], frozen(x)[0], **TOLERANCE)
    cell = lstm_ext.freeze(lstm_ext.LSTMCell(I, H).eval())
    torch.testing.assert_close(lstm_ext.trace_gates(cell, x[0]).h[0, 0], cell(x[0])[0], **TOLERANCE)

    class Mine(nn.LSTM):
        pass

    mine = Mine(I, H)
    torch.testing.assert_close(lstm_ext.trace_gates(mine, x).h[0], mine(x)[0], **TOLERANCE)


def test_module_is_left_alone(kind):
    module = kind(I, H, num_layers=2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(L, N, I)
    kept = x.clone()
    lstm_ext.trace_gates(module, x)
    assert torch.equal(x, kept)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_wrong_input_as_the_module_has_it(kind):
    module = kind(I, H)
    x = torch.randn(L, N, I)
    cases = [
        (x[0, 0],), (x[None],), (torch.randn(L, N, I + 1),), (x, (torch.zeros(1, N, H),) * 3),
        (x, (torch.zeros(1, N, H + 1), torch.zeros(1, N, H))), (x, (torch.zeros(N, H),) * 2),
        (torch.zeros(0, N, I),), (x.double(),),
    ]  # fmt: skip
    for arguments in cases:
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            module(*arguments)
        with pytest.raises(type(theirs.value)) as ours:
            lstm_ext.trace_gates(module, *arguments)
        assert str(ours.value).split("\n")[0] == str(theirs.value).split("\n")[0]
    with pytest.raises(TypeError, match="expected an LSTM or LSTMCell"):
        lstm_ext.trace_gates(nn.GRU(I, H), x)
    with pytest.raises(RuntimeError, match="reset must be a bool tensor"):
        lstm_ext.trace_gates(module, x, reset=torch.zeros(L, N + 1, dtype=torch.bool))
    cell = nn.LSTMCell(I, H)
    with pytest.raises(RuntimeError, match=r"input has inconsistent input_size|size"):
        lstm_ext.trace_gates(cell, torch.randn(N, I + 1))
    with pytest.raises(Exception, match="Expected input to be 1D or 2D"):
        lstm_ext.trace_gates(cell, x[None])


def test_empty_batch(kind):
    trace = lstm_ext.trace_gates(kind(I, H), torch.zeros(L, 0, I))
    assert trace.c.shape == (1, L, 0, H)


def test_select():
    module = nn.LSTM(I, H, num_layers=3, bidirectional=True)
    trace = lstm_ext.trace_gates(module, torch.randn(L, N, I))
    for layer, direction in itertools.product(range(3), range(2)):
        part = trace.select(layer, direction)
        assert torch.equal(part.g, trace.g[2 * layer + direction][None])
        assert part.g.data_ptr() == trace.g[2 * layer + direction].data_ptr()
    assert torch.equal(trace.select(-1).c, trace.c[4:5])
    for wrong in ((3, 0), (-4, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            trace.select(*wrong)
    assert repr(trace) == (f"GateTrace(layers=3, directions=2, L={L}, N={N}, H={H}, float32, cpu)")


def test_summaries_leave_padding_out():
    ones = torch.ones(1, 3, 2, 2)
    f = torch.tensor([[0.5, 0.25], [0.5, 0.25], [0.9, 0.01]]).view(1, 3, 1, 2).repeat(1, 1, 2, 1)
    f[:, 2:, 1] = 0  # padding
    trace = lstm_ext.GateTrace(
        ones * 0.95, f, ones * 0.5, ones * 0.05, ones, ones * -0.95, torch.tensor([3, 2])
    )
    shares = trace.saturation()
    assert shares["i > 0.9"] == 1
    assert shares["o < 0.1"] == 1
    assert shares["|h| > 0.9"] == 1
    assert shares["|g| > 0.9"] == 0
    assert shares["f < 0.1"] == pytest.approx(1 / 10)  # not the padding's four
    assert set(trace.saturation(0.2)) >= {"i < 0.2", "i > 0.8"}
    logs = torch.tensor([[0.5, 0.5, 0.9, 0.5, 0.5], [0.25, 0.25, 0.01, 0.25, 0.25]]).double().log()
    wanted = torch.tensor(0.5).double().log() / logs.mean(1)
    torch.testing.assert_close(trace.half_life()[0], wanted, rtol=1e-6, atol=0)
    half = lstm_ext.GateTrace(ones, ones * 0.5, ones, ones, ones, ones)
    assert half.half_life().tolist() == [[1, 1]]
    assert lstm_ext.GateTrace(*[ones] * 6).half_life().tolist() == [[float("inf")] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(dtype, tmp_path):
    module = nn.LSTM(I, H, bidirectional=True, dtype=dtype)
    packed = pack_padded_sequence(torch.randn(L, N, I).to(dtype), torch.tensor([6, 5, 2, 2]))
    trace = lstm_ext.trace_gates(module, packed)
    file = tmp_path / "a trace"
    trace.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["a trace"]
    again = lstm_ext.GateTrace.load(file)
    for name in (*NAMES, "lengths"):
        before = getattr(trace, name)
        assert torch.equal(
            getattr(again, name), before.float() if before.is_floating_point() else before
        )
    assert again.bidirectional
    arrays = np.load(file)
    np.testing.assert_array_equal(arrays["f"], trace.f.float().numpy())
    assert trace.numpy()["h"].shape == (2, L, N, H)


def test_saving_loses_nothing(tmp_path, monkeypatch):
    trace = lstm_ext.trace_gates(nn.LSTM(I, H), torch.randn(L, N, I))
    file = tmp_path / "trace.npz"
    trace.save(file)
    before = file.read_bytes()

    def full(stream, **_):
        stream.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        trace.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "other.npz").write_bytes(before[:0])
    monkeypatch.undo()
    np.savez(tmp_path / "other.npz", i=np.zeros(3))
    with pytest.raises(ValueError, match="lacks f, g, o, c, h, bidirectional"):
        lstm_ext.GateTrace.load(tmp_path / "other.npz")


def test_a_saved_file_is_as_readable_as_others(tmp_path):
    lstm_ext.trace_gates(nn.LSTM(I, H), torch.randn(L, N, I)).save(tmp_path / "trace.npz")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "trace.npz").stat().st_mode == (tmp_path / "other").stat().st_mode
