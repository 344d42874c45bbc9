"""Derivatives of the cell: first, second, forward-mode, under torch.func; what is kept for them."""

import itertools

import pytest
import torch
from limits import slow
from measure import DTYPES, case, ours, run

import lstm_ext
from lstm_ext import LSTMCellFunction, reference

NAMES = ["input", "hx", "cx", "w_ih", "w_hh", "b_ih", "b_hh"]


def through_reference(x, h, c, *weights):
    return reference.lstm_cell(x, (h, c), *weights)


ROUTES = {"lstm_cell": ours, "LSTMCellFunction": LSTMCellFunction.apply}


@pytest.fixture(params=ROUTES)
def route(request):
    return ROUTES[request.param]


def leaves(N=3, I=4, H=2, device="cpu", bias=True):
    values, _ = case(N, I, H, torch.float64, device, bias)
    return [None if v is None else v.requires_grad_() for v in values.values()]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 2), (10, 2, 3)])
def test_gradcheck(device, route, shape, bias):
    args = leaves(*shape, device, bias)
    assert torch.autograd.gradcheck(route, args, fast_mode=False)
    if shape != (10, 2, 3):
        assert torch.autograd.gradgradcheck(route, args)


def test_forward_mode_and_batched_gradients(device):
    args = leaves(device=device)
    assert torch.autograd.gradcheck(
        ours, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("grads", ["h", "c", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_hand_written_backward(device, dtype, grads):
    values, (grad_h, grad_c) = case(9, 6, 5, dtype, device)
    tensors = [v.detach().requires_grad_() for v in values.values()]
    h, c = ours(*tensors)
    if grads == "h":
        h.backward(grad_h)
        grad_c = torch.zeros_like(grad_c)
    elif grads == "c":
        c.backward(grad_c)
        grad_h = torch.zeros_like(grad_h)
    else:
        torch.autograd.backward((h, c), (grad_h, grad_c))
    x, hx, cx, *weights = (v.double() for v in values.values())
    expected = reference.lstm_cell_backward(grad_h.double(), grad_c.double(), x, (hx, cx), *weights)
    eps = torch.finfo(dtype).eps
    for leaf, gradient in zip(tensors, expected, strict=True):
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=8 * eps, atol=8 * eps)


def test_no_gradient_when_none_arrives(device, route):
    args = leaves(device=device)
    h, _ = route(*args)
    other = torch.ones(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    gradients = torch.autograd.grad((other * h.detach()).sum(), [other, *args], allow_unused=True)
    assert all(g is None for g in gradients[1:])


@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=7)])
def test_only_what_is_asked_for(device, wanted):
    """Every subset of the seven gradients: those asked for unchanged, the others not computed."""
    values, grads = case(3, 4, 2, torch.float32, device)
    tensors = list(values.values())
    _, _, gates = torch.ops.lstm_ext.lstm_cell_forward(*tensors)
    backward = torch.ops.lstm_ext.lstm_cell_backward
    everything = backward(*grads, *tensors, None, 0, gates, [True] * 7 + [False])
    some = backward(*grads, *tensors, None, 0, gates, [*wanted, False])
    for want, a, b in zip((*wanted, False), everything, some, strict=True):
        assert (b is not None) == want
        if want:
            assert torch.equal(a, b)
    if any(wanted):
        inputs = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        asked = [t for t in inputs if t.requires_grad]
        result = torch.autograd.grad(ours(*inputs), asked, grads)
        for a, b in zip(result, [g for g in some if g is not None], strict=True):
            assert torch.equal(a, b)


def test_gradients_are_distinct_tensors(device, route):
    args = [t.float().detach().requires_grad_() for t in leaves(device=device)]
    gradients = torch.autograd.grad(route(*args)[0].sum(), args)
    assert len({g.data_ptr() for g in gradients}) == 7


def test_state_given_twice(device):
    x, h, _, *weights = leaves(device=device)
    a = torch.autograd.grad(ours(x, h, h, *weights)[0].sum(), h)[0]
    b = torch.autograd.grad(through_reference(x, h, h, *weights)[0].sum(), h)[0]
    torch.testing.assert_close(a, b)


def test_second_derivative_of_a_loss(device, route):
    """A gradient penalty, as it is used: the gradient of a gradient's norm."""

    def penalty(cell, args):
        h, c = cell(*args)
        (grad_x,) = torch.autograd.grad((h.square() + c).sum(), args[0], create_graph=True)
        return torch.autograd.grad(grad_x.square().sum(), args)

    args = leaves(device=device)
    for a, b in zip(penalty(route, args), penalty(through_reference, args), strict=True):
        torch.testing.assert_close(a, b)


def test_third_derivative(device):
    x, *rest = leaves(device=device)

    def third(cell):
        y = cell(x, *rest)[0].sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.square().sum()
        return g

    torch.testing.assert_close(third(ours), third(through_reference))


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f, argnums=(0, 3, 5)),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(1, 4)),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(2, 6)),
    "hessian": lambda f: torch.func.hessian(f, argnums=0),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ROUTES)
def test_torch_func(device, name, transform):
    args = [a.detach() for a in leaves(device=device)]

    def loss(cell):
        return lambda *a: sum(out.square().sum() for out in cell(*a))

    result = TRANSFORMS[transform](loss(ROUTES[name]))(*args)
    expected = TRANSFORMS[transform](loss(through_reference))(*args)
    torch.testing.assert_close(result, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients(device, route):
    x, h, c, *weights = (a.detach() for a in leaves(device=device))
    xs = torch.randn(5, *x.shape, dtype=x.dtype, device=device)

    def loss(cell):
        def f(x, w_ih):
            return cell(x, h, c, w_ih, *weights[1:])[0].square().sum()

        return torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(0, None))

    torch.testing.assert_close(loss(route)(xs, weights[0]), loss(through_reference)(xs, weights[0]))


def test_states_may_be_changed_in_place_after_the_call(device):
    """As with torch's cell: h' and c' are not kept, so that masking them in place is allowed."""
    cell = lstm_ext.LSTMCell(4, 2, device=device)
    x = torch.randn(3, 4, device=device)
    mask = torch.tensor([[1.0], [0.0], [1.0]], device=device)

    def loss(in_place):
        h, c = cell(x)
        h, c = cell(x, (h.mul_(mask), c.mul_(mask)) if in_place else (h * mask, c * mask))
        return torch.autograd.grad((h + c).sum(), tuple(cell.parameters()))

    for a, b in zip(loss(True), loss(False), strict=True):
        assert torch.equal(a, b)


def test_input_changed_in_place_is_noticed(device):
    cell = lstm_ext.LSTMCell(4, 2, device=device)
    x = torch.randn(3, 4, device=device)
    h, _ = cell(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_backward_twice(device):
    args = leaves(device=device)
    h, _ = ours(*args)
    h.sum().backward(retain_graph=True)
    h.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        h.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_for_backward(device, dtype):
    """The arguments themselves and the four gates: 4 N H numbers, within the budget of 5."""
    N, H = 7, 5
    cell = lstm_ext.LSTMCell(4, H, device=device, dtype=dtype)
    x = torch.randn(N, 4, device=device, dtype=dtype)
    hx = torch.randn(2, N, H, device=device, dtype=dtype).unbind()
    known = {t.data_ptr() for t in (x, *hx, *cell.parameters())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cell(x, hx)
    extra = [t for t in kept if t.data_ptr() not in known]
    assert sum(t.numel() for t in extra) == 4 * N * H
    assert all(t.dtype == dtype for t in extra)


def test_graph_is_freed(device):
    """The states hold no reference cycle: dropping them frees what was kept."""
    import gc
    import weakref

    cell = lstm_ext.LSTMCell(4, 2, device=device)
    x = torch.randn(3, 4, device=device)
    alive = weakref.ref(x)
    gc.disable()
    try:
        out = cell(x)
        del x
        assert alive() is not None
        del out
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("grad", ["shape", "dtype"])
def test_backward_operator_checks_its_arguments(grad):
    values, (grad_h, grad_c) = case(3, 4, 2, torch.float32)
    _, _, gates = torch.ops.lstm_ext.lstm_cell_forward(*values.values())
    backward, cell = torch.ops.lstm_ext.lstm_cell_backward, [*values.values(), None, 0]
    wrong = grad_h[:2] if grad == "shape" else grad_h.double()
    said = r"state's shape \[3, 2\]" if grad == "shape" else "state's dtype Float and device cpu"
    with pytest.raises(RuntimeError, match=f"gradient must .*{said}"):
        backward(wrong, grad_c, *cell, gates, [True] * 7 + [False])
    with pytest.raises(RuntimeError, match="third result of lstm_cell_forward"):
        backward(grad_h, grad_c, *cell, gates[:, 1:], [True] * 7 + [False])


OPS = torch.ops.lstm_ext


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", True), *slow(("inductor", False), ("inductor", True))]
)
def test_compile_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()
    cell = lstm_ext.LSTMCell(4, 2)
    compiled = torch.compile(cell, fullgraph=True, dynamic=dynamic, backend=backend)
    for N in (3, 5):
        x = torch.randn(N, 4, requires_grad=True)
        h = torch.randn(N, 2)
        for hx in (None, (h, h)):
            a, b = compiled(x, hx), cell(x, hx)
            torch.testing.assert_close(a, b)
            inputs = (x, *cell.parameters())
            torch.testing.assert_close(
                torch.autograd.grad(a[0].sum(), inputs), torch.autograd.grad(b[0].sum(), inputs)
            )


def test_routes_agree_to_the_bit(device):
    values, grads = case(9, 6, 5, torch.float32, device)
    for a, b in zip(
        run(ours, values, grads), run(LSTMCellFunction.apply, values, grads), strict=True
    ):
        assert torch.equal(a, b)
