"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of the operators: their matrix products.

As of torch's own LSTM, where it is counted: nn.LSTMCell, and nn.LSTM but for what goes to oneDNN or
cuDNN, each of which is one operator without a formula. S rows of the batch in all steps (N of a
cell), I input, H hidden; a product of (S, 4H) and (4H, I) is 2 * 4 S H I operations.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    ],
    get_raw=True,
)
def _forward(input: Tensor, hx: Tensor, *_: Any, **__: Any) -> int:
    I, H = input.shape[-1], hx.shape[-1]
    return _product(_rows(input), H, I) + _product(_rows(input), H, H)


def _backward(rows: int, first_rows: int, I: int, H: int, mask: Sequence[bool]) -> int:
    """Of those gradients that are wanted; mask: input, hx, cx, w_ih, w_hh, ...

    The gradient of h goes on from each step but the first of all, where it is that of hx.
    """
    want_input, want_hx, _, want_w_ih, want_w_hh = mask[:5]
    flops = (want_input + want_w_ih) * _product(rows, H, I)
    flops += _product(rows if want_hx else rows - first_rows, H, H)
    return flops + want_w_hh * _product(rows, H, H)


@register_flop_formula(ops.lstm_cell_backward, get_raw=True)
def _cell_backward(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gates: Tensor,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    (N, I), H = input.shape, hx.shape[1]
    return _backward(N, N, I, H, output_mask)


@register_flop_formula(ops.lstm_cell_backward_accumulate, get_raw=True)
def _cell_backward_accumulate(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gates: Tensor,
    grad_w_ih: Tensor | None,
    grad_w_hh: Tensor | None,
    grad_b_ih: Tensor | None,
    grad_b_hh: Tensor | None,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    (N, I), H = input.shape, hx.shape[1]
    return _backward(N, N, I, H, [*output_mask, grad_w_ih is not None, grad_w_hh is not None])


@register_flop_formula(ops.lstm_layer_backward, get_raw=True)
def _layer_backward(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    output: Tensor,
    gates: Tensor,
    c_before: Tensor,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    N, H = hx.shape
    # Of a packed sequence in reverse, the last step comes first. (A fake tensor has no numbers.)
    if reverse and batch_sizes is not None and type(batch_sizes) is Tensor:
        N = int(batch_sizes[-1])
    return _backward(_rows(input), N, input.shape[-1], H, output_mask)
