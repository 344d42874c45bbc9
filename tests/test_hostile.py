"""Thousands of calls that no one should make: no crash, no hang, no wrong number (hostile.py)."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HUNG, slow

import lstm_ext

OPS = torch.ops.lstm_ext
ALL = [True] * 7 + [False]  # all gradients, there being no weights of units


@pytest.mark.parametrize("calls", [2_000, *slow(10_000)])
def test_hostile_calls(calls):
    script = Path(__file__).with_name("hostile.py")
    result = subprocess.run(
        [sys.executable, script, str(calls)],
        capture_output=True, text=True, check=False, timeout=HUNG,
    )  # fmt: skip
    said = "\n".join(result.stderr.replace("\r", "\n").splitlines()[-30:])
    assert result.returncode == 0, f"exit status {result.returncode}: {said}"
    found = json.loads(result.stdout)
    assert found["calls"] == calls
    assert len(found["functions"]) == 22  # every operator, and every function of _C
    assert min(found["functions"].values()) > calls / 40
    ends = found["ends"]
    assert set(ends) == {"error", "result", "declined"}
    assert min(ends["error"], ends["result"]) > calls / 10


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("backward", [None, "once", "with a graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_gone(share, backward, dtype):
    """A storage made smaller behind a tensor's back, before the forward or the backward."""
    shapes = [(5, 3), (5, 4), (5, 4), (16, 3), (16, 4), (16,), (16,)]
    for k, kind in [(k, kind) for k in range(7) for kind in ("cell", "layer")]:
        shapes[0] = (5, 3) if kind == "cell" else (1, 5, 3)
        leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        rest = () if kind == "cell" else (None, None, False)
        function = OPS.lstm_cell if kind == "cell" else OPS.lstm_layer
        out = function(*leaves, *rest) if backward else None
        storage = leaves[k].untyped_storage()
        storage.resize_(int(share * storage.nbytes()))
        error = None
        try:
            if backward:
                graph = backward == "with a graph"
                torch.autograd.grad([t.sum() for t in out], leaves, create_graph=graph)
            else:
                function(*leaves, *rest)
        except RuntimeError as raised:  # no pytest.raises: torch dies where it prints such a tensor
            error = str(raised)
        if backward == "once" and k >= 5:  # nothing of a bias is read again
            assert error is None
        else:
            assert error is not None
            # The latter torch's, of a view.
            assert "its data is not allocated" in error or "out of bounds for storage" in error


def test_changed_in_place_between_forward_and_backward():
    """What backward needs may not be changed; torch's own error says so."""
    for k in range(5):
        leaves = [torch.randn(s) for s in ((5, 3), (5, 4), (5, 4), (16, 3), (16, 4), (16,), (16,))]
        for t in leaves:
            t.requires_grad_()
        inputs = [t * 1 for t in leaves]
        h, c = OPS.lstm_cell(*inputs)
        inputs[k].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (h.sum() + c.sum()).backward()


def test_meta_beside_the_cpu_is_an_error():
    """Not numbers out of memory that nobody wrote to."""
    tensors = [torch.randn(s) for s in ((5, 3), (5, 4), (5, 4), (16, 3), (16, 4), (16,), (16,))]
    for k in range(7):
        mixed = [t.to("meta") if j == k else t for j, t in enumerate(tensors)]
        for call in (
            lambda t: OPS.lstm_cell(*t),
            lambda t: OPS.lstm_cell_forward(*t),
            lambda t: OPS.lstm_layer(t[0].unsqueeze(0), *t[1:], None, None, False),
            lambda t: lstm_ext.lstm_cell(t[0], (t[1], t[2]), *t[3:]),
        ):
            for grad in (False, True):
                with (
                    torch.set_grad_enabled(grad),
                    pytest.raises(RuntimeError, match=r"same device|expected device"),
                ):
                    call(mixed)


def test_states_of_three_dimensions_are_an_error():
    """torch.lstm_cell itself (2.13) dies of a single row of them."""
    weights = [torch.randn(s) for s in ((4, 3), (4, 1), (4,), (4,))]
    x, h, c = torch.randn(1, 3), torch.randn(1, 1), torch.randn(1, 1)
    for args in ((x, h[None], c), (x, h, c[None]), (x[None], h, c)):
        with pytest.raises((RuntimeError, IndexError)):
            OPS.lstm_cell(*args, *weights)


def test_gradients_to_add_to_lie_apart():
    x, h, c = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4)
    weights = [torch.randn(16, 4), torch.randn(16, 4), torch.randn(16), torch.randn(16)]
    h1, c1, gates = OPS.lstm_cell_forward(x, h, c, *weights)
    sums = [torch.zeros_like(w) for w in weights]
    everything = (h1, c1, x, h, c, *weights, None, 0, gates)
    OPS.lstm_cell_backward_accumulate(*everything, *sums, None, [True] * 3)
    for k, other in ((1, sums[0]), (0, weights[1]), (3, sums[2]), (2, sums[3].numpy())):
        other = torch.from_numpy(other) if not isinstance(other, torch.Tensor) else other
        shared = [other if j == k else s for j, s in enumerate(sums)]
        with pytest.raises(RuntimeError, match="share memory with no"):
            OPS.lstm_cell_backward_accumulate(*everything, *shared, None, [True] * 3)


def test_nothing_is_broadcast_or_left_unread():
    """One row, one column or one more of anything is an error, not a result of some other size."""
    x, h, c = torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 4)
    right = [x, h, c, torch.randn(16, 3), torch.randn(16, 4), torch.randn(16), torch.randn(16)]
    grads = [torch.randn(5, 4), torch.randn(5, 4)]
    gates = OPS.lstm_cell_forward(*right)[2]
    rest = (None, None, False)
    kept = OPS.lstm_layer_forward(x[None], *right[1:], *rest)
    kept = (kept[0], *kept[3:])
    calls = [
        (OPS.lstm_cell_forward, lambda t: t),
        (OPS.lstm_layer, lambda t: [t[0][None], *t[1:], *rest]),
        (OPS.lstm_layer, lambda t: [t[0][None][:0], *t[1:], *rest]),  # no step
        (OPS.lstm_layer_forward, lambda t: [t[0][None], *t[1:], *rest]),
        (OPS.lstm_cell_backward, lambda t: [*grads, *t, None, 0, gates, ALL]),
        (OPS.lstm_layer_backward, lambda t: [
            grads[0][None], *grads, t[0][None], *t[1:], *rest, None, 0, *kept, ALL,
        ]),
    ]  # fmt: skip
    others = [lambda t: t[:1], lambda t: torch.cat([t, t[:1]]), lambda t: t[..., :1]]
    for (call, arguments), k, other, grad in itertools.product(
        calls, range(7), others, (False, True)
    ):
        wrong = [other(t) if j == k else t.clone() for j, t in enumerate(right)]
        for t in wrong:
            t.requires_grad_(grad)
        with pytest.raises(RuntimeError):
            call(*arguments(wrong))
    call, tensors = OPS.lstm_cell_backward, (*right, None, 0, gates)
    for k, other in itertools.product((0, 1), others):
        wrong = [other(g) if j == k else g for j, g in enumerate(grads)]
        with pytest.raises(RuntimeError, match="gradient must have"):
            call(*wrong, *tensors, ALL)
    # As many numbers, but in another order.
    for leaf in (right[1], right[1].clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="gradient must have"):
            OPS.lstm_layer_backward(
                grads[0][:, None], *grads, x[None], leaf, *right[2:], *rest, None, 0, *kept, ALL
            )


def test_sizes_are_looked_at_before_memory_is_taken():
    """Tensors of one number, as large as no memory: told from right ones without a copy."""
    right = [torch.randn(s) for s in ((5, 3), (2, 4), (2, 4), (16, 3), (16, 4), (16,), (16,))]
    many = torch.ones(1, dtype=torch.int64).expand(2**40)
    with pytest.raises(RuntimeError, match="rows as batch_sizes adds up to"):
        OPS.lstm_layer(*right, many, None, False)
    right[0] = right[0][:2]
    for k in range(7):
        wrong = list(right)
        wrong[k] = right[k].flatten()[:1].expand(*[2**31 for _ in right[k].shape])
        for call in (OPS.lstm_cell, OPS.lstm_cell_forward):
            with pytest.raises(RuntimeError, match=r"^(?!.*allocate)"):
                call(*wrong)
        wrong[0] = wrong[0][None]
        for call in (OPS.lstm_layer, OPS.lstm_layer_forward):
            with pytest.raises(RuntimeError, match=r"^(?!.*allocate)"):
                call(*wrong, None, None, False)
