r"""The LSTM in plain torch operations: what the fused kernels compute, written to be read.

The tests compare the kernels with these functions.

The cell (Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000;
notation and gate order of torch.nn.LSTMCell)::

    i, f, g, o = the four quarters of   x W_ih^T + b_ih + h W_hh^T + b_hh
    i, f, o    = sigmoid(i), sigmoid(f), sigmoid(o)         how much to write, keep, show
    g          = tanh(g)                                    what to write
    c'         = f * c + i * g
    h'         = o * tanh(c')

The lecture that this project grew from prints the last line once as ``tanh(o * c')``. Its code and
its numbers use ``o * tanh(c')``, which is right.

Shapes: N batch, L time, I input, H hidden, P projected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Quarters = tuple[Tensor, Tensor, Tensor, Tensor]  # of i, f, g, o, each (N, H)


def pre_activations(
    input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute i, f, g and o before their activations, each (N, H).

    This is the first line of the formula above.

    Example:
        >>> x, h = torch.randn(3, 10), torch.zeros(3, 20)
        >>> weights = torch.randn(80, 10), torch.randn(80, 20), None, None
        >>> i, f, g, o = lstm_ext.reference.pre_activations(x, h, *weights)
        >>> f.shape
        torch.Size([3, 20])
    """
    ifgo = input @ w_ih.mT + h @ w_hh.mT
    if b_ih is not None:
        ifgo = ifgo + b_ih
    if b_hh is not None:
        ifgo = ifgo + b_hh
    i, f, g, o = ifgo.chunk(4, dim=-1)
    return i, f, g, o


def gates(
    input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the activated gates i, f, g, o, each (N, H).

    Example:
        >>> x, h = torch.randn(3, 10), torch.zeros(3, 20)
        >>> weights = torch.randn(80, 10), torch.randn(80, 20), None, None
        >>> i, f, g, o = lstm_ext.reference.gates(x, h, *weights)
        >>> bool(((f >= 0) & (f <= 1)).all())
        True
    """
    i, f, g, o = pre_activations(input, h, w_ih, w_hh, b_ih, b_hh)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def states(gates: tuple[Tensor, ...], c: Tensor) -> tuple[Tensor, Tensor]:
    """Compute h' and c', each (N, H), from the activated gates and c.

    Example:
        >>> gates = tuple(torch.rand(4, 3, 20))
        >>> h, c = lstm_ext.reference.states(gates, torch.zeros(3, 20))
        >>> torch.equal(c, gates[0] * gates[2])
        True
    """
    i, f, g, o = gates
    c_next = f * c + i * g
    return o * torch.tanh(c_next), c_next


class PlainCell:
    """The cell of torch.nn.LSTMCell: the formula at the top of this page.

    Example:
        >>> pre, c = tuple(torch.randn(4, 3, 20)), torch.zeros(3, 20)
        >>> gates, h, c = lstm_ext.reference.PlainCell.forward(pre, c, None)
        >>> h.shape
        torch.Size([3, 20])
    """

    @staticmethod
    def forward(pre: Quarters, c: Tensor, _: Tensor | None) -> tuple[Quarters, Tensor, Tensor]:
        """Compute the activated gates, h' and c' from the pre-activations."""
        i, f, g, o = pre
        gates = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        return (gates, *states(gates, c))

    @staticmethod
    def backward(
        gates: Quarters, c: Tensor, _: Tensor | None, grad_h_next: Tensor, grad_c_next: Tensor
    ) -> tuple[Quarters, Tensor, list[Tensor]]:
        """Compute the gradients of the pre-activations, of c, and of no weights of units."""
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
        grads = (
            grad_i * i * (1 - i),
            grad_f * f * (1 - f),
            grad_g * (1 - g**2),
            grad_o * o * (1 - o),
        )
        return grads, grad_c_next * f, []


class PeepholeCell:
    """The cell with peepholes: i and f see c, o sees c' (Gers & Schmidhuber 2000, as in ONNX).

    weights (3, H) are w_ci, w_cf and w_co::

        i, f = sigmoid(i + w_ci * c), sigmoid(f + w_cf * c)
        o    = sigmoid(o + w_co * c')

    Example:
        >>> pre, c = tuple(torch.randn(4, 3, 20)), torch.zeros(3, 20)
        >>> gates, h, c = lstm_ext.reference.PeepholeCell.forward(pre, c, torch.randn(3, 20))
        >>> h.shape
        torch.Size([3, 20])
    """

    @staticmethod
    def forward(pre: Quarters, c: Tensor, weights: Tensor) -> tuple[Quarters, Tensor, Tensor]:
        """Compute the activated gates, h' and c' from the pre-activations."""
        i, f, g, o = pre
        i, f = torch.sigmoid(i + weights[0] * c), torch.sigmoid(f + weights[1] * c)
        g = torch.tanh(g)
        c_next = f * c + i * g
        o = torch.sigmoid(o + weights[2] * c_next)
        return (i, f, g, o), o * torch.tanh(c_next), c_next

    @staticmethod
    def backward(
        gates: Quarters, c: Tensor, weights: Tensor, grad_h_next: Tensor, grad_c_next: Tensor
    ) -> tuple[Quarters, Tensor, list[Tensor]]:
        """Compute the gradients of the pre-activations, of c, and of w_ci, w_cf and w_co."""
        i, f, g, _ = gates
        c_next = f * c + i * g
        # As if o did not see c'; then what it saw of it.
        (_, _, _, grad_o), _, _ = PlainCell.backward(gates, c, None, grad_h_next, grad_c_next)
        grads, grad_c, _ = PlainCell.backward(
            gates, c, None, grad_h_next, grad_c_next + grad_o * weights[2]
        )
        grad_i, grad_f, _, _ = grads
        grad_c = grad_c + grad_i * weights[0] + grad_f * weights[1]
        return grads, grad_c, [grad_i * c, grad_f * c, grad_o * c_next]


# By the operators' argument `variant`. Each has forward, and backward by hand, as PlainCell has
# them; the gradients of the units' weights are for each row of the batch, (N, H).
CELLS: tuple[Any, ...] = (PlainCell, PeepholeCell)


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    unit_weights: Tensor | None = None,
    variant: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute one step of an LSTM cell, (N, I) and twice (N, H) -> h', c', each (N, H).

    The arguments are those of :func:`lstm_ext.lstm_cell`, except that ``variant`` is a number, the
    place of the cell in ``CELLS``. Differentiable by autograd.

    Example:
        >>> x, h, c = torch.randn(3, 10), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> weights = torch.randn(80, 10), torch.randn(80, 20)
        >>> expected = lstm_ext.reference.lstm_cell(x, (h, c), *weights)
        >>> torch.testing.assert_close(lstm_ext.lstm_cell(x, (h, c), *weights), expected)
    """
    h, c = hx
    pre = pre_activations(input, h, w_ih, w_hh, b_ih, b_hh)
    _, h_next, c_next = CELLS[variant].forward(pre, c, unit_weights)
    return h_next, c_next


def lstm_cell_backward(
    grad_h_next: Tensor,
    grad_c_next: Tensor,
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    unit_weights: Tensor | None = None,
    variant: int = 0,
) -> tuple[Tensor, ...]:
    """Compute the gradients of :func:`lstm_cell` by hand.

    Args:
        grad_h_next: (N, H), the loss's gradient with respect to h'.
        grad_c_next: (N, H), the part of its gradient with respect to c' that does not come through
            h' (it comes from the next step).
        input: as in the forward.
        hx: as in the forward.
        w_ih: as in the forward.
        w_hh: as in the forward.
        b_ih: as in the forward.
        b_hh: as in the forward.
        unit_weights: as in the forward.
        variant: as in the forward.

    Returns:
        The gradients of input, h, c, w_ih, w_hh, b_ih and b_hh, and of unit_weights where there
        are some; shaped like them.

    Example:
        >>> x, h, c = torch.randn(3, 10), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> w_ih, w_hh = torch.randn(80, 10), torch.randn(80, 20)
        >>> ones, zeros = torch.ones(3, 20), torch.zeros(3, 20)
        >>> grads = lstm_ext.reference.lstm_cell_backward(ones, zeros, x, (h, c), w_ih, w_hh)
        >>> grads[0].shape, grads[3].shape  # of x and of w_ih
        (torch.Size([3, 10]), torch.Size([80, 10]))
    """
    h, c = hx
    cell = CELLS[variant]
    pre = pre_activations(input, h, w_ih, w_hh, b_ih, b_hh)
    activated, _, _ = cell.forward(pre, c, unit_weights)
    grads, grad_c, of_units = cell.backward(activated, c, unit_weights, grad_h_next, grad_c_next)
    grad_ifgo = torch.cat(grads, dim=-1)

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
        *([torch.stack(of_units).sum(1)] if of_units else []),
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
    unit_weights: Tensor | None = None,
    variant: int = 0,
    reset_hx: tuple[Tensor, Tensor] | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run :func:`lstm_cell` over a sequence: one layer, one direction.

    With w_hr, the h of a step is projected before it is used (Sak, Senior & Beaufays 2014)::

        r  = o * tanh(c')
        h' = r W_hr^T

    Args:
        input: (L, N, I); or packed (S, I), S the sum of batch_sizes.
        hx: h (N, P) and c (N, H) before the first step. P is H without w_hr.
        w_ih: (4H, I).
        w_hh: (4H, P).
        b_ih: (4H) or None.
        b_hh: (4H) or None.
        batch_sizes: int64 (L) for a packed input: the rows of each step, never more than before.
        reset: bool (L, N): where it is true, h and c are zero before that step, or those of
            reset_hx. Or None.
        reverse: whether to go from the last step to the first.
        unit_weights: as in :func:`lstm_cell`.
        variant: as in :func:`lstm_cell`.
        reset_hx: what h and c are before the steps of reset, (N, P) and (N, H), or (L, N, P) and
            (L, N, H), those of each step's own. Or None, for zeros.
        w_hr: (P, H), which projects h; or None, and P = H.

    Returns:
        The h of every step, (L, N, P) or (S, P), and the last h (N, P) and c (N, H).

    Example:
        >>> x, h, c = torch.randn(5, 3, 10), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> weights = torch.randn(80, 10), torch.randn(80, 20)
        >>> output, (h, c) = lstm_ext.reference.lstm(x, (h, c), *weights)
        >>> output.shape
        torch.Size([5, 3, 20])
    """
    output, _, last = lstm_with_cells(
        input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse, unit_weights, variant,
        reset_hx, w_hr,
    )  # fmt: skip
    return output, last


def lstm_with_cells(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    unit_weights: Tensor | None = None,
    variant: int = 0,
    reset_hx: tuple[Tensor, Tensor] | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Do what :func:`lstm` does, and return the c of every step too.

    Arguments as for :func:`lstm`.

    Returns:
        The h of every step, (L, N, P) or (S, P); the c of every step, (L, N, H) or (S, H); and the
        last h (N, P) and c (N, H).

    Example:
        >>> x, h, c = torch.randn(5, 3, 10), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> weights = torch.randn(80, 10), torch.randn(80, 20)
        >>> output, cells, last = lstm_ext.reference.lstm_with_cells(x, (h, c), *weights)
        >>> cells.shape
        torch.Size([5, 3, 20])
    """
    h, c = hx
    sizes = [len(h)] * len(input) if batch_sizes is None else batch_sizes.tolist()
    steps = list(input.unbind()) if batch_sizes is None else list(torch.split(input, sizes))
    cells = list(steps)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = sizes[t]  # the first sequences; the others have ended, or in reverse not begun
        h_t, c_t = h[:n], c[:n]
        if reset is not None:
            anew = reset[t, :n].unsqueeze(1)
            to = [torch.zeros_like(s) for s in hx] if reset_hx is None else reset_hx
            to = [s[t] if s.dim() == 3 else s for s in to]
            h_t, c_t = (torch.where(anew, r[:n], s) for r, s in zip(to, (h_t, c_t), strict=True))
        weights = w_ih, w_hh, b_ih, b_hh, unit_weights
        h_t, c_t = lstm_cell(steps[t], (h_t, c_t), *weights, variant)
        if w_hr is not None:
            h_t = h_t @ w_hr.mT
        steps[t], cells[t] = h_t, c_t
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    if batch_sizes is not None:
        return torch.cat(steps), torch.cat(cells), (h, c)
    if not steps:
        return h.new_empty(0, *h.shape), c.new_empty(0, *c.shape), (h, c)
    return torch.stack(steps), torch.stack(cells), (h, c)


def _normalize(rows: Tensor, eps: float) -> Tensor:
    """Each row less its mean, over its deviation (Ba, Kiros & Hinton 2016)."""
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)


def _clip(value: Tensor, limit: float) -> Tensor:
    return value.clamp(-limit, limit) if limit > 0 else value


def _of_each_step(mask: Tensor | None, N: int, sizes: list[int]) -> list[Tensor | None]:
    """Return a mask's rows of each step: of each unit, of each sequence, or of all steps."""
    if mask is None or mask.dim() == 1:
        return [mask] * len(sizes)
    if mask.dim() == 2 and len(mask) == N:
        return [mask[:n] for n in sizes]
    return [*torch.split(mask.flatten(0, -2), sizes)]


def recurrence(
    gates_x: Tensor,
    hx: tuple[Tensor, Tensor],
    w_hh: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    norm_c: Tensor | None = None,
    bias_c: Tensor | None = None,
    w_hr: Tensor | None = None,
    update_h: Tensor | None = None,
    update_c: Tensor | None = None,
    dropout_h: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    norm_joint: bool = False,
    carry_norm: bool = False,
    eps: float = 1e-5,
    cell_clip: float = 0.0,
    projection_clip: float = 0.0,
    keep: Callable[[int, tuple[Tensor, ...]], None] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run the steps of one layer in one direction, from the product of its input on.

    Each part of a step is optional, but for the gates::

        z    = (dropout_h * h) W_hh^T
        pre  = gates_x + norm * LN(z) + bias, or norm * LN(gates_x + z) + bias with norm_joint
        i, f, g, o = the activated quarters of pre
        c~   = clip(f * c + i * g)
        n    = norm_c * LN(c~) + bias_c
        h~   = o * tanh(n), or clip(W_hr of that)
        h'   = update_h * h~ + (1 - update_h) * h
        c'   = update_c * c~ + (1 - update_c) * c           with carry_norm, n in place of c~

    LN(v) is (v - mean) / sqrt(variance + eps), of each row (Ba, Kiros & Hinton 2016). A mask of
    zeros and ones in update_h or update_c is zoneout in training, its mean that in evaluation
    (Krueger et al. 2017). W_hr projects h (Sak, Senior & Beaufays 2014).

    A mask has a row for each unit, (K); for each sequence, (N, K), the same at every step; or for
    every step, (L, N, K), or (S, K) where gates_x is packed. K is H for update_c, else P; or for
    dropout_h 4P, and then the rows of i, f, g and o in w_hh see a mask of their own each.

    Args:
        gates_x: x W_ih^T, normalised or not: (L, N, 4H), or packed (S, 4H), S the sum of
            batch_sizes.
        hx: h (N, P) and c (N, H) before the first step. P is H without w_hr.
        w_hh: (4H, P).
        bias: (4H) or None, added after any normalisation.
        norm: (4H), what the normalised gates are multiplied by; or None, and they are not
            normalised.
        norm_c: (H), the same of c; or None.
        bias_c: (H), which goes with norm_c; or None.
        w_hr: (P, H), which projects h; or None.
        update_h: a mask: how much of the new h counts. Or None, for all.
        update_c: the same of c.
        dropout_h: a mask that h is multiplied by before W_hh; or None.
        batch_sizes: int64 (L) for packed gates_x: the rows of each step, never more than before.
        reset: bool (L, N): where it is true, h and c are zero before that step. Or None.
        reverse: whether to go from the last step to the first.
        norm_joint: whether gates_x and z are normalised as one sum, rather than z alone.
        carry_norm: whether the next step starts from the normalised c.
        eps: added to variances.
        cell_clip: the largest absolute value of c; 0 for none.
        projection_clip: the same of what w_hr gives.
        keep: is told of each step: t and (i, f, g, o, c', h'). Or None.

    Returns:
        The h of every step, (L, N, P) or (S, P), and the last h (N, P) and c (N, H).

    Example:
        >>> gates_x, h, c = torch.randn(5, 3, 80), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> w_hh, norm = torch.randn(80, 20), torch.ones(80)
        >>> output, (h, c) = lstm_ext.reference.recurrence(gates_x, (h, c), w_hh, norm=norm)
        >>> output.shape
        torch.Size([5, 3, 20])
    """
    h, c = hx
    N = len(h)
    sizes = [N] * len(gates_x) if batch_sizes is None else batch_sizes.tolist()
    steps = [*torch.split(gates_x.flatten(0, -2), sizes)] if sizes else []
    updates_h, updates_c, dropouts_h = (
        _of_each_step(mask, N, sizes) if sizes else [] for mask in (update_h, update_c, dropout_h)
    )
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = sizes[t]  # the first sequences; the others have ended, or in reverse not begun
        h_t, c_t = h[:n], c[:n]
        if reset is not None:
            h_t, c_t = (s.masked_fill(reset[t, :n, None], 0) for s in (h_t, c_t))

        dropout = dropouts_h[t]
        of_h = h.shape[1]
        masks: Any = [1.0] if dropout is None else torch.split(dropout, of_h, dim=-1)
        of_gates = zip(masks, w_hh.chunk(len(masks)), strict=True)
        z = torch.cat([(h_t * mask) @ w.mT for mask, w in of_gates], -1)
        if norm is None:
            pre = steps[t] + z
        elif norm_joint:
            pre = norm * _normalize(steps[t] + z, eps)
        else:
            pre = steps[t] + norm * _normalize(z, eps)
        i, f, g, o = (pre if bias is None else pre + bias).chunk(4, dim=-1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)

        c_new = _clip(f * c_t + i * g, cell_clip)
        shown = c_new
        if norm_c is not None:
            shown = norm_c * _normalize(c_new, eps)
            if bias_c is not None:
                shown = shown + bias_c
        h_new = o * torch.tanh(shown)
        if w_hr is not None:
            h_new = _clip(h_new @ w_hr.mT, projection_clip)
        if carry_norm:
            c_new = shown

        update = updates_h[t]
        if update is not None:
            h_new = update * h_new + (1 - update) * h_t
        update = updates_c[t]
        if update is not None:
            c_new = update * c_new + (1 - update) * c_t
        if keep is not None:
            keep(t, (i, f, g, o, c_new, h_new))
        steps[t] = h_new
        h, c = torch.cat([h_new, h[n:]]), torch.cat([c_new, c[n:]])
    if batch_sizes is not None:
        return torch.cat(steps) if steps else h[:0], (h, c)
    return torch.stack(steps) if steps else h.new_empty(0, *h.shape), (h, c)
