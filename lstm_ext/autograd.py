"""The LSTM cell as a ``torch.autograd.Function`` over the fused operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lstm_ext import _ops as _ops  # registers torch.ops.lstm_ext


class LSTMCellFunction(torch.autograd.Function):
    """One LSTM cell step, ``apply(input, hx, cx, w_ih, w_hh, b_ih, b_hh) -> (h', c')``.

    The model of an autograd Function over a C++ operator: one operator forward, one backward,
    both also reachable as ``torch.ops.lstm_ext.lstm_cell_forward`` and ``lstm_cell_backward``.
    :func:`lstm_ext.lstm_cell` computes the same with the graph built in C++, at less cost per
    call; this class is for those who compose or subclass Functions.

    Shapes (N batch, I input, H hidden): ``input`` (N, I); ``hx``, ``cx`` and both results (N, H);
    ``w_ih`` (4H, I); ``w_hh`` (4H, H); ``b_ih``, ``b_hh`` (4H) or None; gates ordered i, f, g, o.
    All of one device and one dtype: float32, float64, bfloat16 or float16.

    Differentiable twice and more, and usable under ``torch.func``. Kept for backward: the inputs
    and the four activated gates (N, 4H).

    Raises:
        RuntimeError: as ``torch.nn.LSTMCell`` for sizes, dtypes or devices that do not fit.
    """

    generate_vmap_rule = True

    @classmethod
    def apply(
        cls,
        input: Tensor,
        hx: Tensor,
        cx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute h' and c'."""
        # The gates are an output of forward, since torch.func lets a Function save nothing else.
        hy, cy, _ = super().apply(input, hx, cx, w_ih, w_hh, b_ih, b_hh)
        return hy, cy

    @staticmethod
    def forward(
        input: Tensor,
        hx: Tensor,
        cx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute h', c' and the activated gates; :meth:`apply` returns the first two."""
        hy, cy, gates = torch.ops.lstm_ext.lstm_cell_forward(
            input, hx, cx, w_ih, w_hh, b_ih, b_hh
        )
        return hy, cy, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs and the gates."""
        *tensors, b_ih, b_hh = inputs
        gates = output[2]
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, b_ih, b_hh, gates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute every gradient that is asked for in one call."""
        grad_hy, grad_cy = grads[:2]
        if grad_hy is None and grad_cy is None:
            return (None,) * 7
        *inputs, gates = ctx.saved_tensors
        gradients: tuple[Tensor | None, ...] = torch.ops.lstm_ext.lstm_cell_backward(
            grad_hy, grad_cy, *inputs, gates, list(ctx.needs_input_grad)
        )
        return gradients
