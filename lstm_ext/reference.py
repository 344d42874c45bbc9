r"""The LSTM in plain torch operations: what the fused kernels compute, to read and to check with.

The cell (Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000;
notation and gate order of torch.nn.LSTMCell)::

    i, f, g, o = the four quarters of   x W_ih^T + b_ih + h W_hh^T + b_hh
    i, f, o    = sigmoid(i), sigmoid(f), sigmoid(o)         how much to write, keep, show
    g          = tanh(g)                                    what to write
    c'         = f * c + i * g
    h'         = o * tanh(c')

The lecture that this project grew from prints the last line once as ``tanh(o * c')``. Its code and
its numbers use ``o * tanh(c')``, which is right.

Shapes: N batch, L time, I input, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gates(
    input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the activated gates i, f, g, o, each (N, H), as in the module's docstring."""
    ifgo = input @ w_ih.mT + h @ w_hh.mT
    if b_ih is not None:
        ifgo = ifgo + b_ih
    if b_hh is not None:
        ifgo = ifgo + b_hh
    i, f, g, o = ifgo.chunk(4, dim=-1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def states(gates: tuple[Tensor, ...], c: Tensor) -> tuple[Tensor, Tensor]:
    """Compute h' and c', each (N, H), from the activated gates and c."""
    i, f, g, o = gates
    c_next = f * c + i * g
    return o * torch.tanh(c_next), c_next


def gate_gradients(
    gates: tuple[Tensor, ...], c: Tensor, grad_h_next: Tensor, grad_c_next: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the pre-activations (N, 4H) and of c (N, H), from the gates."""
    i, f, g, o = gates
    tanh_c = torch.tanh(f * c + i * g)

    # h' = o * tanh(c'): one part of its gradient goes to o, the other joins that of c'.
    grad_o = grad_h_next * tanh_c
    grad_c_next = grad_c_next + grad_h_next * o * (1 - tanh_c**2)

    # c' = f * c + i * g
    grad_f = grad_c_next * c
    grad_i = grad_c_next * g
    grad_g = grad_c_next * i

    # Through the activations: sigmoid' = s (1 - s), tanh' = 1 - t^2.
    grad_ifgo = torch.cat(
        [grad_i * i * (1 - i), grad_f * f * (1 - f), grad_g * (1 - g**2), grad_o * o * (1 - o)],
        dim=-1,
    )
    return grad_ifgo, grad_c_next * f


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute one step of an LSTM cell, (N, I) and twice (N, H) -> h', c', each (N, H).

    Arguments as for :func:`lstm_ext.lstm_cell`. Differentiable by autograd.
    """
    h, c = hx
    return states(gates(input, h, w_ih, w_hh, b_ih, b_hh), c)


def lstm_cell_backward(
    grad_h_next: Tensor,
    grad_c_next: Tensor,
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`lstm_cell` by hand.

    Args:
        grad_h_next: (N, H), the loss's gradient with respect to h'.
        grad_c_next: (N, H), the one with respect to c' from elsewhere than h' (the next step).
        input: as in the forward.
        hx: as in the forward.
        w_ih: as in the forward.
        w_hh: as in the forward.
        b_ih: as in the forward.
        b_hh: as in the forward.

    Returns:
        The gradients of input, h, c, w_ih, w_hh, b_ih and b_hh, shaped like them.
    """
    h, c = hx
    activated = gates(input, h, w_ih, w_hh, b_ih, b_hh)
    grad_ifgo, grad_c = gate_gradients(activated, c, grad_h_next, grad_c_next)

    # ifgo = x W_ih^T + b_ih + h W_hh^T + b_hh: the two biases share one gradient.
    grad_b = grad_ifgo.sum(0)
    return (
        grad_ifgo @ w_ih,
        grad_ifgo @ w_hh,
        grad_c,
        grad_ifgo.T @ input,
        grad_ifgo.T @ h,
        grad_b,
        grad_b.clone(),
    )


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run :func:`lstm_cell` over a sequence: one layer, one direction.

    Args:
        input: (L, N, I); or packed (S, I), S the sum of batch_sizes.
        hx: h and c before the first step, each (N, H).
        w_ih: (4H, I).
        w_hh: (4H, H).
        b_ih: (4H) or None.
        b_hh: (4H) or None.
        batch_sizes: of a packed input, int64 (L), falling: the rows of each step.
        reset: bool (L, N): before these steps, h and c are zero. Or None.
        reverse: from the last step to the first.

    Returns:
        The h of every step, (L, N, H) or (S, H), and the last (h, c), each (N, H).
    """
    h, c = hx
    sizes = [len(h)] * len(input) if batch_sizes is None else batch_sizes.tolist()
    steps = list(input.unbind()) if batch_sizes is None else list(torch.split(input, sizes))
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = sizes[t]  # the first sequences; the others have ended, or in reverse not begun
        h_t, c_t = h[:n], c[:n]
        if reset is not None:
            zero = reset[t, :n].unsqueeze(1)
            h_t, c_t = h_t.masked_fill(zero, 0), c_t.masked_fill(zero, 0)
        h_t, c_t = lstm_cell(steps[t], (h_t, c_t), w_ih, w_hh, b_ih, b_hh)
        steps[t] = h_t
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    if batch_sizes is not None:
        return torch.cat(steps), (h, c)
    return torch.stack(steps) if steps else h.new_empty(0, *h.shape), (h, c)
