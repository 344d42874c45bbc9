"""The LSTM cell as a ``torch.autograd.Function`` over the fused operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lstm_ext.functional import lstm_cell


class LSTMCellFunction(torch.autograd.Function):
    """One LSTM cell step: ``apply(input, hx, cx, w_ih, w_hh, b_ih, b_hh) -> (h', c')``.

    An example of an autograd Function over C++ operators: one operator for forward, one for
    backward. Both can be called as ``torch.ops.lstm_ext.lstm_cell_forward`` and
    ``lstm_cell_backward``. :func:`lstm_ext.lstm_cell` computes the same. Its graph is built in C++,
    which costs less per call, and it has forward-mode AD. This class is for code that composes or
    subclasses Functions.

    Shapes (N batch, I input, H hidden): ``input`` (N, I); ``hx``, ``cx`` and both results (N, H);
    ``w_ih`` (4H, I); ``w_hh`` (4H, H); ``b_ih``, ``b_hh`` (4H) or None; gates ordered i, f, g, o.
    All of one device and one dtype: float32, float64, bfloat16 or float16.

    Differentiable any number of times. Backward keeps the inputs and the four activated gates,
    4 N H numbers.

    Raises:
        RuntimeError: as ``torch.nn.LSTMCell``, for sizes, dtypes or devices that do not fit.

    Example:
        >>> x, h, c = torch.randn(3, 10), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> w_ih = torch.randn(80, 10, requires_grad=True)
        >>> h, c = lstm_ext.LSTMCellFunction.apply(x, h, c, w_ih, torch.randn(80, 20))
        >>> h.sum().backward()
        >>> w_ih.grad.shape
        torch.Size([80, 10])
    """

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
        if torch._C._are_functorch_transforms_active():
            # torch.func lets a Function save its inputs and outputs only, and the gates are
            # neither; the operator's own graph works under every transform.
            return lstm_cell(input, (hx, cx), w_ih, w_hh, b_ih, b_hh)
        hy, cy = super().apply(  # type: ignore[no-untyped-call]
            input, hx, cx, w_ih, w_hh, b_ih, b_hh
        )
        return hy, cy

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hx: Tensor,
        cx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute h' and c', and keep the inputs and the gates."""
        inputs = (input, hx, cx, w_ih, w_hh, b_ih, b_hh)
        hy, cy, gates = torch.ops.lstm_ext.lstm_cell_forward(*inputs)
        ctx.save_for_backward(*inputs, gates)
        ctx.set_materialize_grads(False)
        return hy, cy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute every gradient that is asked for, and no other, in one call."""
        if all(grad is None for grad in grads):
            return (None,) * 7
        *inputs, gates = ctx.saved_tensors
        gradients: tuple[Tensor | None, ...] = torch.ops.lstm_ext.lstm_cell_backward(
            *grads, *inputs, None, 0, gates, [*ctx.needs_input_grad, False]
        )
        return gradients[:-1]
