"""torch.vmap and torch.func over the operators: batched inputs, states and weights; gradients."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import lstm_ext
from lstm_ext import reference

pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")
B, N, L, I, H = 4, 3, 5, 2, 6
CELL = {
    "x": (N, I),
    "h": (N, H),
    "c": (N, H),
    "w_ih": (4 * H, I),
    "w_hh": (4 * H, H),
    "b": (4 * H,),
}
LAYER = {**CELL, "x": (L, N, I)}


def values(shapes, batched=(), dims=None):
    """Random tensors, those batched with B in front or where dims says."""
    made = {}
    for name, shape in shapes.items():
        value = torch.randn(B, *shape, dtype=torch.float64)
        dim = (dims or {}).get(name, 0)
        made[name] = value.movedim(0, dim) if name in batched else value[0]
    return made


def cell(x, h, c, w_ih, w_hh, b):
    return lstm_ext.lstm_cell(x, (h, c), w_ih, w_hh, b, None)


def cell_reference(x, h, c, w_ih, w_hh, b):
    return reference.lstm_cell(x, (h, c), w_ih, w_hh, b, None)


def layer(x, h, c, w_ih, w_hh, b):
    weights = [lstm_ext.LayerWeights(w_ih, w_hh, b, None)]
    output, h_n, c_n = lstm_ext.lstm(x, (h.unsqueeze(0), c.unsqueeze(0)), weights)
    return output, h_n.squeeze(0), c_n.squeeze(0)


def layer_reference(x, h, c, w_ih, w_hh, b):
    output, states = reference.lstm(x, (h, c), w_ih, w_hh, b, None)
    return output, *states


PAIRS = {"cell": (cell, cell_reference, CELL), "layer": (layer, layer_reference, LAYER)}
BATCHED = [
    "x", "h", "c", "x h c", "w_ih", "w_hh", "b", "x w_hh", "w_ih w_hh b", "x h c w_ih w_hh b",
]  # fmt: skip


def loss(f):
    return lambda *args: sum((k + 1) * out.square().sum() for k, out in enumerate(f(*args)))


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


@pytest.mark.parametrize("batched", BATCHED)
def test_batched(pair, batched):
    ours, expected, shapes = pair
    names = batched.split()
    args = values(shapes, names)
    in_dims = tuple(0 if name in names else None for name in shapes)
    torch.testing.assert_close(
        vmap(ours, in_dims)(*args.values()), vmap(expected, in_dims)(*args.values())
    )


def test_other_dimensions(pair):
    ours, expected, shapes = pair
    dims = {"x": 1, "h": 1, "c": 2, "w_hh": 1}
    args = values(shapes, dims, dims)
    in_dims = tuple(dims.get(name) for name in shapes)
    for out_dims in (0, 1):
        torch.testing.assert_close(
            vmap(ours, in_dims, out_dims)(*args.values()),
            vmap(expected, in_dims, out_dims)(*args.values()),
        )


@pytest.mark.parametrize("batched", BATCHED)
@pytest.mark.parametrize("of", [(0,), (3, 4, 5), (0, 1, 2, 3, 4, 5)], ids=str)
def test_gradients(pair, batched, of):
    """vmap over grad: gradients of each sample, with respect to states and weights."""
    ours, expected, shapes = pair
    names = batched.split()
    args = values(shapes, names)
    in_dims = tuple(0 if name in names else None for name in shapes)
    found, wanted = (
        vmap(grad(loss(f), argnums=of), in_dims)(*args.values()) for f in (ours, expected)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("batched", ["x", "w_hh", "x h c w_ih w_hh b"])
def test_gradient_of_a_vmap(pair, batched):
    """grad over vmap: the graph is outside."""
    ours, expected, shapes = pair
    names = batched.split()
    args = values(shapes, names)
    in_dims = tuple(0 if name in names else None for name in shapes)

    def total(f):
        return lambda *args: sum(out.square().sum() for out in vmap(f, in_dims)(*args))

    found, wanted = (
        grad(total(f), argnums=(0, 1, 3, 4, 5))(*args.values()) for f in (ours, expected)
    )
    torch.testing.assert_close(found, wanted)


def test_nested(pair):
    """An ensemble of weights outside, samples inside."""
    ours, expected, shapes = pair
    args = values(shapes, ["w_ih", "w_hh", "b"])
    args["x"] = torch.randn(2, *shapes["x"], dtype=torch.float64)
    inner, outer = (0, None, None, None, None, None), (None, None, None, 0, 0, 0)
    for wrap in (lambda f: f, lambda f: grad(loss(f), argnums=(0, 4))):
        found, wanted = (
            vmap(vmap(wrap(f), inner), outer)(*args.values()) for f in (ours, expected)
        )
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda f: f.__name__)
def test_jacobians(pair, transform):
    ours, expected, shapes = pair
    args = list(values(shapes).values())
    for argnum in (0, 2, 4):
        found, wanted = (transform(loss(f), argnum)(*args) for f in (ours, expected))
        torch.testing.assert_close(found, wanted)


def test_forward_mode(pair):
    ours, expected, shapes = pair
    args = tuple(values(shapes).values())
    tangents = tuple(values(shapes).values())
    found, wanted = (jvp(f, args, tangents) for f in (ours, expected))
    torch.testing.assert_close(found, wanted)
    # over a batch of tangents
    batches = tuple(torch.stack([t, 2 * t, -t]) for t in tangents)
    found, wanted = (vmap(lambda *ts, f=f: jvp(f, args, ts)[1])(*batches) for f in (ours, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_ensembles_of_modules(kind):
    """The recipe of PyTorch's model ensembling tutorial."""
    models = [getattr(lstm_ext, kind)(I, H) for _ in range(B)]
    parameters, buffers = stack_module_state(models)
    base = getattr(lstm_ext, kind)(I, H)
    x = torch.randn(N, I) if kind == "LSTMCell" else torch.randn(L, N, I)

    def call(p, b, x):
        out = functional_call(base, (p, b), (x,))
        return out if kind == "LSTMCell" else out[0]

    found = vmap(call, (0, 0, None))(parameters, buffers, x)
    for k, model in enumerate(models):
        expected = model(x) if kind == "LSTMCell" else model(x)[0]
        got = [out[k] for out in found] if kind == "LSTMCell" else found[k]
        torch.testing.assert_close(tuple(got) if kind == "LSTMCell" else got, expected)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_per_sample_gradients_of_a_model(options):
    """The recipe of PyTorch's per-sample gradients tutorial, against one sample at a time."""
    model = lstm_ext.LSTM(I, H, batch_first=True, **options)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    xs, ys = torch.randn(B, L, I), torch.randn(B, L, H * (2 if options else 1))

    def sample_loss(p, x, y):
        output, _ = functional_call(model, p, (x.unsqueeze(0),))
        return nn.functional.mse_loss(output[0], y)

    found = vmap(grad(sample_loss), (None, 0, 0))(parameters, xs, ys)
    for k in range(B):
        output, _ = model(xs[k : k + 1])
        expected = torch.autograd.grad(
            nn.functional.mse_loss(output[0], ys[k]), list(model.parameters())
        )
        for (name, _), e in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name][k], e)


@pytest.mark.parametrize("what", ["packed", "reset", "packed reset"])
def test_packed_and_reset(what):
    args = values(LAYER, ["x", "c"])
    sizes = torch.tensor([3, 3, 2, 1])
    resets = torch.rand(B, L, N) < 0.4

    def call(x, h, c, w_ih, w_hh, b, reset):
        op = torch.ops.lstm_ext.lstm_layer
        reset = reset if "reset" in what else None
        if "packed" in what:
            short = None if reset is None else reset[: len(sizes)]
            return op(x.flatten(0, 1)[:9], h, c, w_ih, w_hh, b, None, sizes, short, True)
        return op(x, h, c, w_ih, w_hh, b, None, None, reset, False)

    def by_reference(x, h, c, w_ih, w_hh, b, reset):
        reset = reset if "reset" in what else None
        packed = "packed" in what
        data, of = (x.flatten(0, 1)[:9], sizes) if packed else (x, None)
        output, states = reference.lstm(data, (h, c), w_ih, w_hh, b, None, of, reset, packed)
        return output, *states

    in_dims = (0, None, 0, None, None, None, 0)
    found = vmap(call, in_dims)(*args.values(), resets)
    for k in range(B):
        one = [
            a[k] if d == 0 else a for a, d in zip((*args.values(), resets), in_dims, strict=True)
        ]
        torch.testing.assert_close(tuple(out[k] for out in found), by_reference(*one))
    # Gradients of each sample.
    grads = (
        vmap(grad(loss(f), argnums=(0, 2, 3)), in_dims)(*args.values(), resets)
        for f in (call, by_reference)
    )
    torch.testing.assert_close(*grads)
