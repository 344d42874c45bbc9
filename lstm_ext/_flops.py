"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of the operators: their matrix products.

As of torch's own LSTM, where it is counted: nn.LSTMCell, and nn.LSTM but for what goes to oneDNN or
cuDNN, each of which is one operator without a formula. S rows of the batch in all steps (N of a
cell), I input, H hidden, P projected (else H); a product of (S, 4H) and (4H, I) is 2 * 4 S H I
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lstm_ext import _ops as _ops  # which loads them

ops = torch.ops.lstm_ext


def _product(rows: int, hidden: int, columns: int) -> int:
    return 2 * rows * 4 * hidden * columns


def _rows(input: Tensor) -> int:
    return input.shape[:-1].numel()


@register_flop_formula(
    [
        ops.lstm_cell,
        ops.lstm_cell_forward,
        ops.lstm_layer,
        ops.lstm_layer_forward,
        ops.lstm_layer_packed,
        ops.lstm_layer_states,
        ops.lstm_layer_states_forward,
        ops.lstm_layer_projected,
        ops.lstm_layer_projected_forward,
    ],
    get_raw=True,
)
def _forward(input: Tensor, hx: Tensor, cx: Tensor, *_: Any, **__: Any) -> int:
    rows, I, H, P = _rows(input), input.shape[-1], cx.shape[-1], hx.shape[-1]
    flops = _product(rows, H, I) + _product(rows, H, P)
    return flops + (2 * rows * H * P if P != H else 0)


def _backward(rows: int, first_rows: int, I: int, H: int, P: int, mask: Sequence[bool]) -> int:
    """Of those gradients that are wanted; mask: input, hx, cx, w_ih, w_hh, ...

    The gradient of h goes on from each step but the first of all, where it is that of hx.
    """
    want_input, want_hx, _, want_w_ih, want_w_hh = mask[:5]
    flops = (want_input + want_w_ih) * _product(rows, H, I)
    flops += _product(rows if want_hx else rows - first_rows, H, P)
    return flops + want_w_hh * _product(rows, H, P)


def _backward_formula(op: Any) -> Callable[..., int]:
    """Return the formula of a backward operator, from its arguments by name."""
    names = [argument.name for argument in op.default._schema.arguments]

    def formula(*arguments: Any, **options: Any) -> int:
        given = {**dict(zip(names, arguments, strict=False)), **options}
        input, (N, P), mask = given["input"], given["hx"].shape, [*given["output_mask"]]
        H = given["cx"].shape[1]
        # lstm_cell_backward_accumulate has no mask of the weights, but tensors or None.
        mask += [given[name] is not None for name in ("grad_w_ih", "grad_w_hh") if name in given]
        sizes = given.get("batch_sizes")
        # A packed sequence in reverse begins with its last step. (A fake tensor has no numbers.)
        if given.get("reverse") and type(sizes) is Tensor:
            N = int(sizes[-1])
        flops = _backward(_rows(input), N, input.shape[-1], H, P, mask)
        if "w_hr" in given:  # whose gradient is the mask's last
            flops += (1 + mask[-1]) * 2 * _rows(input) * P * H
        return flops

    return formula


for _op in (
    ops.lstm_cell_backward,
    ops.lstm_cell_backward_accumulate,
    ops.lstm_layer_backward,
    ops.lstm_layer_states_backward,
    ops.lstm_layer_projected_backward,
):
    register_flop_formula(_op, get_raw=True)(_backward_formula(_op))


def _projection(rows: int, H: int, P: int) -> int:
    return 2 * rows * H * P


@register_flop_formula([ops.lstm_recurrence, ops.lstm_recurrence_forward], get_raw=True)
def _recurrence(gates_x: Tensor, hx: Tensor, cx: Tensor, *given: Any, **named: Any) -> int:
    """Of a recurrence: the product with W_hh, and the projection of h."""
    rows, H, P = _rows(gates_x), cx.shape[-1], hx.shape[-1]
    w_hr = named["w_hr"] if "w_hr" in named else given[5]
    return _product(rows, H, P) + (0 if w_hr is None else _projection(rows, H, P))


_RECURRENCE = [a.name for a in ops.lstm_recurrence_backward.default._schema.arguments]


@register_flop_formula(ops.lstm_recurrence_backward, get_raw=True)
def _recurrence_backward(*arguments: Any, **options: Any) -> int:
    """Of those gradients that are wanted; of h from each step, but from the first only for hx."""
    given = {**dict(zip(_RECURRENCE, arguments, strict=False)), **options}
    rows, (N, P), H = _rows(given["gates_x"]), given["hx"].shape, given["cx"].shape[1]
    want_hx, want_w_hh, want_w_hr = (given["output_mask"][k] for k in (1, 3, 8))
    sizes = given["batch_sizes"]
    if given["reverse"] and type(sizes) is Tensor:
        N = int(sizes[-1])
    flops = _product(rows if want_hx else rows - N, H, P)
    flops += _product(rows, H, P) if want_w_hh else 0
    if given["w_hr"] is not None:
        flops += _projection(rows, H, P) * (2 if want_w_hr else 1)
    return flops
