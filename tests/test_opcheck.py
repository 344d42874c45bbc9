"""torch.library.opcheck for every operator: schema, registration, fake kernels, tracing."""

import pytest
import torch
from limits import slow
from measure import uniform
from torch.library import opcheck

OPS = torch.ops.lstm_ext
L, N, I, H = 4, 3, 5, 2
SHAPES = ((N, I), (N, H), (N, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
PACKED = torch.tensor([3, 3, 2, 1])
ALL = [True] * 7 + [False]


def draw(shapes, device, requires_grad=False):
    return [uniform(s).float().to(device).requires_grad_(requires_grad) for s in shapes]


def cells(device, requires_grad):
    grads, args = draw([(N, H), (N, H)], device), draw(SHAPES, device, requires_grad)
    yield OPS.lstm_cell, args
    yield OPS.lstm_cell, [*args[:5], None, None]
    yield OPS.lstm_cell_forward, args
    args = draw(SHAPES, device)
    gates = OPS.lstm_cell_forward(*args)[2]
    yield OPS.lstm_cell_backward, (*grads, *args, None, 0, gates, ALL)
    some = [True, False, True, False, True, True, True, False]
    yield OPS.lstm_cell_backward, (None, grads[1], *args, None, 0, gates, some)
    if device != "cpu":
        return  # adding into .grad in the same pass is for the CPU
    into = [t.clone() for t in args[3:]]
    yield OPS.lstm_cell_backward_accumulate, (*grads, *args, None, 0, gates, *into, None, ALL[:3])
    into[1:3] = None, None
    yield (
        OPS.lstm_cell_backward_accumulate,
        (*grads, *args, None, 0, gates, *into, None, [True, False, True]),
    )


def layers(device, requires_grad):
    for sizes, reverse in ((None, False), (None, True), (PACKED, False), (PACKED, True)):
        shapes = ((9, I) if sizes is not None else (L, N, I), *SHAPES[1:])
        args, rest = draw(shapes, device, requires_grad), (sizes, None, reverse)
        yield OPS.lstm_layer, (*args, *rest)
        yield OPS.lstm_layer_forward, (*args, *rest)
        x, h, c, *weights = args
        states = h.detach().unsqueeze(0), c.detach().unsqueeze(0)
        yield OPS.lstm, (x, *states, weights, False, 0.0, sizes, None)
        args = draw(shapes, device)
        output, hy, cy, gates, c_before = OPS.lstm_layer_forward(*args, *rest)
        for grads in ((output, hy, cy), (output, None, None), (None, hy, None)):
            kept = (output, gates, c_before)
            yield OPS.lstm_layer_backward, (*(g if g is None else g.clone() for g in grads),
                                            *args, *rest, None, 0, *kept, ALL)  # fmt: skip


def states(device, requires_grad):
    """Layers with the c of every step, reset to nothing, zero, states and states of each step."""
    for sizes, to in ((None, None), (PACKED, None), (PACKED, (N, H)), (None, (L, N, H))):
        shapes = ((9, I) if sizes is not None else (L, N, I), *SHAPES[1:])
        resets = () if to is None else (to, to)
        tensors = draw((*shapes, *resets), device, requires_grad)
        args, resets = tensors[:7], tensors[7:] or [None, None]
        reset = None if sizes is None and to is None else (torch.rand(L, N) < 0.5).to(device)
        rest = (sizes, reset, sizes is not None, None, 0)
        yield OPS.lstm_layer_states, (*args, *rest, *resets)
        yield OPS.lstm_layer_states_forward, (*args, *rest, *resets)
        args, resets = ([t if t is None else t.detach() for t in ts] for ts in (args, resets))
        output, hy, cy, cells, *kept = OPS.lstm_layer_states_forward(*args, *rest, *resets)
        mask = [*ALL, to is not None, to is not None]
        for grads in ((output, hy, cy, cells), (None, None, None, cells)):
            grads = [g if g is None else g.clone() for g in grads]
            yield (OPS.lstm_layer_states_backward,
                   (*grads, *args, *rest, *resets, output, *kept, mask))  # fmt: skip


def packed_weights(device, _):
    x, h, c, w_ih, w_hh, b, _ = draw(((L, N, I), *SHAPES[1:]), device)
    yield OPS.lstm_layer_pack, (w_ih, w_hh)
    packed = OPS.lstm_layer_pack(w_ih, w_hh)
    yield OPS.lstm_layer_packed, (x, h, c, packed, b, None, None, None, False)
    states = h.unsqueeze(0), c.unsqueeze(0)
    yield OPS.lstm_packed, (x, *states, [packed, b, None], False, None, None)


def peepholes(device, requires_grad):
    """The operators with the other cell of csrc/core/cells.h."""
    args = draw((*SHAPES, (3, H)), device, requires_grad)
    yield OPS.lstm_cell, (*args, 1)
    yield OPS.lstm_cell_forward, (*args, 1)
    x, *weights, p = args
    x = x.detach().expand(L, N, I).clone().requires_grad_(requires_grad)
    yield OPS.lstm_layer, (x, *weights, None, None, True, p, 1)
    yield OPS.lstm_layer_forward, (x, *weights, None, None, False, p, 1)
    h, c = (t.detach().unsqueeze(0) for t in args[1:3])
    yield OPS.lstm, (x, h, c, [*args[3:]], False, 0.0, None, None, 1)
    args = draw((*SHAPES, (3, H)), device)
    hy, cy, gates = OPS.lstm_cell_forward(*args, 1)
    yield OPS.lstm_cell_backward, (hy.clone(), cy.clone(), *args, 1, gates, [True] * 8)
    if device != "cpu":
        return
    into = [t.clone() for t in args[3:]]
    yield (OPS.lstm_cell_backward_accumulate,
           (hy.clone(), cy.clone(), *args, 1, gates, *into, [True] * 3))  # fmt: skip
    packed = OPS.lstm_layer_pack(args[3], args[4])
    rest = (None, None, False, args[7], 1)
    yield OPS.lstm_layer_packed, (x.detach(), *args[1:3], packed, *args[5:7], *rest)
    yield OPS.lstm_packed, (x.detach(), h, c, [packed, *args[5:]], False, None, None, 1)


def projections(device, requires_grad):
    P = 3
    shapes = ((L, N, I), (N, P), (N, H), (4 * H, I), (4 * H, P), (4 * H,), (4 * H,), (P, H))
    for sizes, reverse in ((None, False), (PACKED, True)):
        shapes = ((9, I) if sizes is not None else (L, N, I), *shapes[1:])
        *args, w_hr = draw(shapes, device, requires_grad)
        rest = sizes, None, reverse, None, 0
        yield OPS.lstm_layer_projected, (*args, *rest, w_hr)
        yield OPS.lstm_layer_projected_forward, (*args, *rest, w_hr)
        x, h, c, *weights = args
        states = h.detach().unsqueeze(0), c.detach().unsqueeze(0)
        yield OPS.lstm, (x, *states, [*weights, w_hr], False, 0.0, sizes, None, 0, True)
        *args, w_hr = draw(shapes, device)
        output, hy, cy, *kept = OPS.lstm_layer_projected_forward(*args, *rest, w_hr)
        for grads in ((output, hy, cy), (output, None, None), (None, hy, None)):
            grads = [g if g is None else g.clone() for g in grads]
            kept_all = output, *kept
            yield (OPS.lstm_layer_projected_backward,
                   (*grads, *args, *rest, w_hr, *kept_all, [*ALL, True]))  # fmt: skip
    if device == "cpu":
        yield OPS.lstm_layer_pack, (args[3], args[4], 0, w_hr)
        packed = OPS.lstm_layer_pack(args[3], args[4], 0, w_hr)
        x, h, c, _, _, *biases = args
        yield OPS.lstm_layer_packed, (x, h, c, packed, *biases, *rest[:3])


def recurrences(device, requires_grad):
    """The steps of a layer alone; with a norm of each kind, masks, clips and a projection."""
    P = 3
    for sizes, full in ((None, False), (PACKED, True)):
        lead = (L, N) if sizes is None else (9,)
        K = P if full else H
        shapes = ((*lead, 4 * H), (N, K), (N, H), (4 * H, K), (4 * H,))
        shapes += ((4 * H,), (H,), (H,), (K, H)) if full else ()
        masks = draw(((K,), (N, H), (*lead, K)), device) if full else [None] * 3
        reset = (torch.rand(L, N) < 0.5).to(device) if full else None
        rest = (*masks, sizes, reset, full, full, full, 1e-5, 0.5 * full, 0.5 * full)
        args = [*draw(shapes, device, requires_grad), *([None] * 4 if not full else [])]
        yield OPS.lstm_recurrence, (*args, *rest)
        yield OPS.lstm_recurrence_forward, (*args, *rest)
        args = [t if t is None else t.detach() for t in args]
        output, hy, cy, *kept = OPS.lstm_recurrence_forward(*args, *rest)
        wanted = [t is not None for t in args]
        for grads in ((output, hy, cy), (output, None, None), (None, hy, None)):
            grads = [g if g is None else g.clone() for g in grads]
            yield OPS.lstm_recurrence_backward, (*grads, *args, *rest, *kept, wanted)


CALLS = (cells, layers, states, packed_weights, peepholes, projections, recurrences)


@pytest.mark.parametrize(
    ("calls", "requires_grad"),
    [
        *[(cells, True), (layers, False), (packed_weights, False), (recurrences, False)],
        *slow((cells, False), (states, False), (projections, False), (peepholes, False)),
        *slow((packed_weights, True)),
        *slow((layers, True), (states, True), (peepholes, True), (projections, True)),
        *slow((recurrences, True)),
    ],
)
def test_opcheck(device, calls, requires_grad):
    if calls is packed_weights and device == "cuda":
        pytest.skip("weights are packed for the CPU's kernels alone")
    for op, args in calls(device, requires_grad):
        opcheck(op, tuple(args))


def test_no_operator_is_left_out():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("lstm_ext::")}  # fmt: skip
    called = {op.__name__ for calls in CALLS for op, _ in calls("cpu", False)}
    assert called == names
