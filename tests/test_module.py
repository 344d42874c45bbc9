"""LSTMCell as a module: everything that a user of torch.nn.LSTMCell does with one."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from measure import DTYPES
from torch import nn
from torch.nn.utils import parametrizations, prune

import lstm_ext


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def bias(request):
    return request.param


def pair(bias=True, **kwargs):
    torch.manual_seed(7)
    ours = lstm_ext.LSTMCell(3, 2, bias, **kwargs)
    torch.manual_seed(7)
    return ours, nn.LSTMCell(3, 2, bias, **kwargs)


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name])
        assert value.dtype == b[name].dtype


def test_is_a_torch_lstm_cell():
    assert isinstance(lstm_ext.LSTMCell(3, 2), nn.LSTMCell)


def test_signature_and_attributes(bias):
    ours, torchs = pair(bias)
    mine, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(kind).parameters.values()]
        for kind in (lstm_ext.LSTMCell, nn.LSTMCell)
    )
    assert mine[: len(theirs)] == theirs
    own = mine[len(theirs) :]
    assert "peephole" in [name for name, *_ in own]
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in own)
    assert not any(default for *_, default in own)
    assert (ours.input_size, ours.hidden_size, ours.bias) == (3, 2, bias)
    assert repr(ours) == repr(torchs)


def test_same_seed_same_weights(bias):
    ours, torchs = pair(bias)
    assert_same_state(ours, torchs)
    # and the generator stands where torch's would
    torch.manual_seed(7)
    lstm_ext.LSTMCell(3, 2, bias)
    after = torch.rand(1)
    torch.manual_seed(7)
    nn.LSTMCell(3, 2, bias)
    assert torch.equal(after, torch.rand(1))


def test_state_dict_both_ways(bias):
    ours, torchs = lstm_ext.LSTMCell(3, 2, bias), nn.LSTMCell(3, 2, bias)
    ours.load_state_dict(torchs.state_dict())
    assert_same_state(ours, torchs)
    other = nn.LSTMCell(3, 2, bias)
    other.load_state_dict(ours.state_dict())
    assert_same_state(other, ours)


def test_save_and_load(bias):
    ours = lstm_ext.LSTMCell(3, 2, bias)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    torchs = nn.LSTMCell(3, 2, bias)
    torchs.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_state(ours, torchs)


@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_pickle_and_deepcopy(duplicate, bias):
    ours = lstm_ext.LSTMCell(3, 2, bias).eval()
    other = duplicate(ours)
    assert type(other) is lstm_ext.LSTMCell
    assert not other.training
    assert_same_state(ours, other)
    x = torch.randn(4, 3)
    assert torch.equal(ours(x)[0], other(x)[0])
    with torch.no_grad():
        other.weight_ih.add_(1)
    assert not torch.equal(ours.weight_ih, other.weight_ih)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    ],
)
def test_conversion(device, convert, dtype):
    ours, torchs = pair(device=device)
    ours, torchs = convert(ours), convert(torchs)
    assert_same_state(ours, torchs)
    x = torch.randn(4, 3, dtype=dtype, device=device)
    eps = torch.finfo(dtype).eps
    for a, b in zip(ours(x), torchs(x), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_state_is_zero(device, dtype):
    ours, _ = pair(device=device, dtype=dtype)
    for x in (
        torch.randn(4, 3, device=device, dtype=dtype),
        torch.randn(3, device=device).to(dtype),
    ):
        zero = torch.zeros(*x.shape[:-1], 2, device=device, dtype=dtype)
        for a, b in zip(ours(x), ours(x, (zero, zero.clone())), strict=True):
            assert a.shape == zero.shape
            assert torch.equal(a, b)


def test_states_as_list_or_tuple(device):
    ours, _ = pair(device=device)
    x, h, c = (torch.randn(4, n, device=device) for n in (3, 2, 2))
    for a, b in zip(ours(x, [h, c]), ours(x, (h, c)), strict=True):
        assert torch.equal(a, b)
    out = ours(x, hx=(h, c))
    assert type(out) is tuple
    assert torch.equal(out[0], ours(input=x, hx=(h, c))[0])


def test_writes_through_data_are_seen(device):
    ours, torchs = pair(device=device)
    x = torch.randn(4, 3, device=device)
    ours(x)
    for cell in (ours, torchs):
        cell.weight_hh.data = torch.ones_like(cell.weight_hh)
        cell.bias_ih.data.fill_(0.5)
    torch.testing.assert_close(ours(x), torchs(x))


def test_hooks_run(device):
    ours, _ = pair(device=device)
    seen = []
    ours.register_forward_pre_hook(lambda m, args: seen.append("before"))
    ours.register_forward_hook(lambda m, args, out: seen.append("after"))
    ours.weight_ih.register_hook(lambda g: seen.append("gradient"))
    ours(torch.randn(4, 3, device=device))[0].sum().backward()
    assert seen == ["before", "after", "gradient"]


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
def test_parametrization(device, name):
    ours, torchs = (parametrizations.weight_norm(m, name) for m in pair(device=device))
    x = torch.randn(4, 3, device=device)
    out = ours(x)
    torch.testing.assert_close(out, torchs(x))
    gradients = [
        torch.autograd.grad(sum(o.sum() for o in m(x)), tuple(m.parameters()))
        for m in (ours, torchs)
    ]
    torch.testing.assert_close(*gradients)


def test_pruning(device):
    ours, torchs = pair(device=device)
    for m in (ours, torchs):
        prune.l1_unstructured(m, "weight_hh", amount=0.5)
        prune.l1_unstructured(m, "bias_ih", amount=0.5)
    x, h, c = (torch.randn(4, n, device=device) for n in (3, 2, 2))
    torch.testing.assert_close(ours(x, (h, c)), torchs(x, (h, c)))


def test_functional_call(device):
    ours, torchs = pair(device=device)
    weights = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    x = torch.randn(4, 3, device=device)
    torch.testing.assert_close(
        torch.func.functional_call(ours, weights, (x,)),
        torch.func.functional_call(torchs, weights, (x,)),
    )


def test_replaced_parameters(device):
    ours, torchs = pair(device=device)
    weight = nn.Parameter(torch.randn(8, 2, device=device))
    ours.weight_hh = torchs.weight_hh = weight
    x, h, c = (torch.randn(4, n, device=device) for n in (3, 2, 2))
    torch.testing.assert_close(ours(x, (h, c)), torchs(x, (h, c)))


class Counting(torch.Tensor):
    """A subclass that counts the operations it sees."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "lstm_cell" in str(func):
            cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_see_the_call():
    cell = lstm_ext.LSTMCell(3, 2)
    x = torch.randn(4, 3)
    before = Counting.calls
    h, _ = cell(x.as_subclass(Counting), (torch.zeros(4, 2), torch.zeros(4, 2)))
    assert Counting.calls == before + 1
    assert type(h) is Counting
    assert torch.equal(h.as_subclass(torch.Tensor), cell(x)[0])


def test_function_modes_see_the_call():
    class Mode(torch.overrides.TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += "lstm_cell" in str(func)
            return func(*args, **(kwargs or {}))

    cell = lstm_ext.LSTMCell(3, 2)
    with Mode() as mode:
        cell(torch.randn(4, 3), (torch.zeros(4, 2), torch.zeros(4, 2)))
    assert mode.seen == 1


def test_trains_like_torchs(device):
    """Twenty steps of a recurrent loss with Adam from the same start: the same curve."""
    losses = []
    for cell in pair(device=device, dtype=torch.float64):
        optimizer = torch.optim.Adam(cell.parameters(), lr=0.1)
        torch.manual_seed(1)
        x = torch.randn(6, 4, 3, dtype=torch.float64, device=device)
        curve = []
        for _ in range(20):
            h = c = torch.zeros(4, 2, dtype=torch.float64, device=device)
            for step in x:
                h, c = cell(step, (h, c))
            loss = (h - 0.3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(torch.tensor(curve))
    torch.testing.assert_close(*losses)
    assert losses[0][-1] < losses[0][0] / 2
