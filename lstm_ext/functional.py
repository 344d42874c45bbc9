"""The functional form of the LSTM cell."""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_ext import _ops


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Compute one step of an LSTM cell in one fused operation.

    .. math::
        (i, f, g, o) &= x W_{ih}^T + b_{ih} + h W_{hh}^T + b_{hh} \\
        c' &= \sigma(f) \, c + \sigma(i) \tanh(g) \\
        h' &= \sigma(o) \tanh(c')

    The formula and the gate order are those of :class:`torch.nn.LSTMCell`; the arguments are those
    of ``torch.lstm_cell``, which this replaces.

    Args:
        input: (N, I), or (I) for a single sample.
        hx: the states h and c, each (N, H), or (H) for a single sample.
        w_ih: (4H, I), gates ordered i, f, g, o.
        w_hh: (4H, H).
        b_ih: (4H), or None for no bias.
        b_hh: (4H), or None for no bias.

    Returns:
        h' and c', each shaped like h.

    All tensors share one device and one dtype: float32, float64, bfloat16 or float16 run fused
    (the halves accumulate in float32); what else ``torch.lstm_cell`` accepts is passed on to it.
    Kept for backward: references to the arguments, and the four activated gates, 4 N H numbers.

    Raises:
        RuntimeError, IndexError, TypeError: as ``torch.lstm_cell``, for sizes, dtypes, devices or
            types that do not fit.
    """
    if not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        # torch's own words for a hidden state that is no pair.
        return torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
    h, c = hx
    if not torch.compiler.is_compiling():
        out = _ops.fast_lstm_cell(input, h, c, w_ih, w_hh, b_ih, b_hh)
        if out is not None:
            return out
    if not all(isinstance(value, Tensor) for value in (input, h, c, w_ih, w_hh)):
        # torch's own words again: they name the argument that is no tensor.
        return torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
    if input.dim() == 1:
        hy, cy = _ops.lstm_cell(
            input.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0), w_ih, w_hh, b_ih, b_hh
        )
        return hy.squeeze(0), cy.squeeze(0)
    hy, cy = _ops.lstm_cell(input, h, c, w_ih, w_hh, b_ih, b_hh)
    return hy, cy
