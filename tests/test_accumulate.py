"""How .backward() adds parameter gradients into .grad: in one pass, where nothing forbids it."""

import threading

import pytest
import torch
from measure import DTYPES, case

import lstm_ext


def test_gradients_accumulate(device):
    cell = lstm_ext.LSTMCell(4, 2, device=device)
    x = torch.randn(3, 4, device=device)
    for _ in range(2):
        h, c = cell(x)
        (h + c).sum().backward()
    twice = [p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    h, c = cell(x)
    (h + c).sum().backward()
    for a, p in zip(twice, cell.parameters(), strict=True):
        torch.testing.assert_close(a, 2 * p.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 2), (3, 70, 40), (9, 6, 5), (40, 33, 65)])
def test_accumulating_in_the_same_pass(device, dtype, shape):
    """.backward() adds the parameters' gradients straight into .grad: the same sum."""
    N, I, H = shape
    cell = lstm_ext.LSTMCell(I, H, device=device, dtype=dtype)
    x = torch.randn(N, I, device=device, dtype=dtype, requires_grad=True)
    grads = torch.randn(2, N, H, device=device, dtype=dtype).unbind()
    added = torch.autograd.grad(cell(x), [x, *cell.parameters()], grads)
    for p in cell.parameters():
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in cell.parameters()]
    where = [p.grad.data_ptr() for p in cell.parameters()]
    versions = [p.grad._version for p in cell.parameters()]
    torch.autograd.backward(cell(x), grads)
    assert torch.equal(x.grad, added[0])
    eps = torch.finfo(dtype).eps
    for p, old, new in zip(cell.parameters(), before, added[1:], strict=True):
        torch.testing.assert_close(p.grad, old + new, rtol=2 * eps, atol=4 * eps)
    assert where == [p.grad.data_ptr() for p in cell.parameters()]
    assert all(p.grad._version > v for p, v in zip(cell.parameters(), versions, strict=True))


def accumulated(prepare, backward=None):
    """Parameter gradients after a second backward over a cell that prepare() has been at."""
    torch.manual_seed(3)
    cell = lstm_ext.LSTMCell(4, 2)
    x = torch.randn(3, 4)
    for p in cell.parameters():
        p.grad = torch.ones_like(p)
    log = prepare(cell)
    loss = sum(out.square().sum() for out in cell(x))
    (backward or (lambda loss, cell: loss.backward()))(loss, cell)
    return [p.grad for p in cell.parameters()], log, cell


def test_hooks_still_see_gradients_that_accumulate():
    """A hook on a parameter, on its accumulation, or after it, is called with what it expects."""
    plain, _, _ = accumulated(lambda cell: None)

    def tensor_hook(cell):
        cell.weight_ih.register_hook(lambda g: 2 * g)

    doubled, _, _ = accumulated(tensor_hook)
    torch.testing.assert_close(doubled[0] - 1, 2 * (plain[0] - 1))
    for a, b in zip(doubled[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, b)

    def after_hook(cell):
        seen = []
        cell.bias_hh.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        return seen

    grads, seen, _ = accumulated(after_hook)
    assert len(seen) == 1
    assert torch.equal(seen[0], grads[3])

    def node_hook(cell):
        node = cell.weight_hh.view_as(cell.weight_hh).grad_fn.next_functions[0][0]
        seen = [node]
        node.register_hook(lambda *_: seen.append(1))
        return seen

    grads, seen, _ = accumulated(node_hook)
    assert seen[1:] == [1]
    torch.testing.assert_close(grads, plain)


def test_accumulating_only_where_asked():
    """autograd.grad leaves .grad alone; backward(inputs=...) touches only those."""

    def by_name(loss, cell):
        loss.backward(inputs=[cell.weight_ih])

    grads, _, _ = accumulated(lambda cell: None, by_name)
    changed = [not torch.equal(g, torch.ones_like(g)) for g in grads]
    assert changed == [True, False, False, False]

    def functional(loss, cell):
        torch.autograd.grad(loss, tuple(cell.parameters()))

    grads, _, _ = accumulated(lambda cell: None, functional)
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads)


def test_accumulating_with_a_graph():
    """create_graph=True: .grad becomes part of the graph, as with torch's cell."""
    grads, _, cell = accumulated(
        lambda cell: None, lambda loss, cell: loss.backward(create_graph=True)
    )
    assert all(g.requires_grad for g in grads)
    assert torch.autograd.grad(grads[0].sum(), cell.weight_ih)[0].abs().sum() > 0


def test_accumulating_into_a_parameter_in_two_places():
    """input_size == hidden_size and one weight for both products."""

    def loss(kind):
        torch.manual_seed(3)
        cell = kind(4, 4)
        cell.weight_hh = cell.weight_ih
        cell.weight_ih.grad = torch.ones_like(cell.weight_ih)
        cell.bias_ih.grad = torch.ones_like(cell.bias_ih)
        cell.bias_hh.grad = torch.ones_like(cell.bias_hh)
        x, h, c = torch.randn(3, 3, 4).unbind()
        sum(out.square().sum() for out in cell(x, (h, c))).backward()
        return [p.grad for p in cell.parameters()]

    torch.testing.assert_close(loss(lstm_ext.LSTMCell), loss(torch.nn.LSTMCell))


def test_accumulating_into_gradients_that_share_memory():
    """A .grad that the cell also reads, or that two parameters share: torch's own result."""

    def grads(kind, shared):
        torch.manual_seed(3)
        cell = kind(4, 1).double()
        for p in cell.parameters():
            p.grad = torch.ones_like(p)
        x = torch.randn(4, 4, dtype=torch.double)
        if shared == "input":
            x = cell.weight_ih.grad.detach()
        elif shared == "input, through NumPy":  # the same memory in another storage
            x = torch.from_numpy(cell.weight_ih.grad.numpy())
        elif shared == "another's bias":  # which backward does not read
            cell.bias_hh.grad = cell.bias_ih.detach()
        elif shared == "biases":
            cell.bias_hh.grad = cell.bias_ih.grad
        elif shared == "flat":
            flat = torch.ones(sum(p.numel() for p in cell.parameters()), dtype=torch.double)
            pieces = flat.split([p.numel() for p in cell.parameters()])
            for p, piece in zip(cell.parameters(), pieces, strict=True):
                p.grad = piece.view_as(p)
        sum(out.square().sum() for out in cell(x)).backward()
        return [p.grad for p in cell.parameters()]

    for shared in ("input", "input, through NumPy", "another's bias", "biases", "flat"):
        torch.testing.assert_close(
            grads(lstm_ext.LSTMCell, shared), grads(torch.nn.LSTMCell, shared)
        )


def test_accumulating_over_steps_and_other_uses():
    """Several steps and a weight decay term in one backward."""

    def grads(kind):
        torch.manual_seed(3)
        cell = kind(4, 2).double()
        for p in cell.parameters():
            p.grad = torch.ones_like(p)
        h, c = None, None
        for x in torch.randn(5, 3, 4, dtype=torch.double):
            h, c = cell(x, None if h is None else (h, c))
        (h.sum() + c.square().sum() + cell.weight_hh.square().sum()).backward()
        return [p.grad for p in cell.parameters()]

    torch.testing.assert_close(grads(lstm_ext.LSTMCell), grads(torch.nn.LSTMCell))


def test_accumulating_from_many_threads():
    """Two threads back through one cell's graphs at a time: no addition is lost."""
    cell = lstm_ext.LSTMCell(32, 64).double()
    for p in cell.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(16, 32, dtype=torch.double)
    cell(x)[0].sum().backward()
    once = [p.grad.clone() for p in cell.parameters()]

    def work():
        for _ in range(50):
            cell(x)[0].sum().backward()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for p, one in zip(cell.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 101 * one)


def test_accumulate_operator_checks_its_arguments():
    values, (grad_h, grad_c) = case(3, 4, 2, torch.float32)
    *_, gates = torch.ops.lstm_ext.lstm_cell_forward(*values.values())
    with pytest.raises(RuntimeError, match=r"dense, with its parameter's shape \[8, 4\]"):
        torch.ops.lstm_ext.lstm_cell_backward_accumulate(
            grad_h, grad_c, *values.values(), None, 0, gates, torch.zeros(4, 8).t(),
            None, None, None, None, [False] * 3,
        )  # fmt: skip
