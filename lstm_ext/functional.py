"""The functional forms of the LSTM cell and of the LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lstm_ext import _backend, _onnx, _ops, _variants
from lstm_ext._steps import Steps, expand_reset_states, layer_in_steps, run_layers


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    unit_weights: Tensor | None = None,
    variant: str = "plain",
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
        unit_weights: (P, H): P weights for each hidden unit, for a cell that has such weights.
        variant: which cell: "plain" is the one above.

    Returns:
        h' and c', each shaped like h.

    All tensors share one device and one dtype. float32, float64, bfloat16 and float16 run in the
    fused kernels; the two 16-bit types are summed in float32. Whatever else ``torch.lstm_cell``
    accepts is passed on to it. Backward keeps references to the arguments and the four activated
    gates, 4 N H numbers.

    Raises:
        RuntimeError, IndexError, TypeError: as ``torch.lstm_cell``, for sizes, dtypes, devices or
            types that do not fit.
        ValueError: there is no such variant.

    Example:
        >>> x, h, c = torch.randn(3, 10), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> w_ih, w_hh = torch.randn(80, 10), torch.randn(80, 20)
        >>> h, c = lstm_ext.lstm_cell(x, (h, c), w_ih, w_hh)
        >>> h.shape
        torch.Size([3, 20])
    """
    if variant != "plain" or unit_weights is not None:
        number = _variants.find(variant).number
        arguments = w_ih, w_hh, b_ih, b_hh, unit_weights, number
        if input.dim() == 1:
            hy, cy = _ops.lstm_cell(*(t.unsqueeze(0) for t in (input, *hx)), *arguments)
            return hy.squeeze(0), cy.squeeze(0)
        hy, cy = _ops.lstm_cell(input, *hx, *arguments)
        return hy, cy
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
    if _backend.cell_by_torch(input):
        _backend.log_path("lstm_cell", input, "torch's own cell: LSTM_EXT_CUDA=torch")
        return torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
    if input.dim() == 1:
        hy, cy = _ops.lstm_cell(
            input.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0), w_ih, w_hh, b_ih, b_hh
        )
        return hy.squeeze(0), cy.squeeze(0)
    hy, cy = _ops.lstm_cell(input, h, c, w_ih, w_hh, b_ih, b_hh)
    return hy, cy


class LayerWeights(NamedTuple):
    """The weights of one layer in one direction: an argument of :func:`lstm`.

    Shapes: ``w_ih`` (4H, I); ``w_hh`` (4H, P); ``b_ih`` and ``b_hh`` (4H) or None; ``w_hr`` (P, H),
    the projection, or None, and then P = H. ``unit_weights`` is that of :func:`lstm_cell`.

    Example:
        >>> weights = lstm_ext.LayerWeights(torch.randn(80, 10), torch.randn(80, 20))
        >>> weights.b_ih is None
        True
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    unit_weights: Tensor | None = None


@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[LayerWeights],
    *,
    bidirectional: bool = ...,
    dropout: float = ...,
    batch_sizes: Tensor | None = ...,
    reset: Tensor | None = ...,
    checkpoint_every: int | None = ...,
    variant: str = ...,
    reset_hx: tuple[Tensor, Tensor] | None = ...,
    return_cell_states: Literal[False] = False,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[LayerWeights],
    *,
    bidirectional: bool = ...,
    dropout: float = ...,
    batch_sizes: Tensor | None = ...,
    reset: Tensor | None = ...,
    checkpoint_every: int | None = ...,
    variant: str = ...,
    reset_hx: tuple[Tensor, Tensor] | None = ...,
    return_cell_states: bool,
) -> tuple[Tensor, ...]: ...


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[LayerWeights],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    checkpoint_every: int | None = None,
    variant: str = "plain",
    reset_hx: tuple[Tensor, Tensor] | None = None,
    return_cell_states: bool = False,
) -> tuple[Tensor, ...]:
    """Run one or more layers of an LSTM over a whole sequence.

    The formula is that of :func:`lstm_cell`, applied step by step. Each layer and direction is one
    fused operation. K is the number of layers, D the number of directions (2 if bidirectional,
    else 1).

    Args:
        input: (L, N, I), or the data (S, I) of a packed sequence.
        hx: h (K D, N, P) and c (K D, N, H) before the first step.
        weights: K D of them, ordered as in :class:`torch.nn.LSTM`: layer by layer, in each forward
            first.
        bidirectional: whether every second of them reads the sequence from its end.
        dropout: probability of dropout after each layer but the last; 0 for none, as in evaluation.
        batch_sizes: those of a packed sequence, int64 (L), on the CPU.
        reset: bool (L, N): where it is true, h and c are zero before that step, or what reset_hx
            has.
        checkpoint_every: a number k: keep only the states of every k-th step, and compute the gates
            again in backward. This saves memory and costs time: with k = 16, a training step of
            200 x 16 x 128 -> 128 takes 1.5 times as long, one of 100 x 1 x 256 -> 256 2.7 times.
        variant: which cell, as in :func:`lstm_cell`.
        reset_hx: h and c before the steps of ``reset``, shaped like hx; without N or with N = 1,
            the same for all sequences; (K D, L, N, P) and (K D, L, N, H), those of each step's own.
            They have gradients.
        return_cell_states: whether to return the c after every step too.

    Returns:
        output (L, N, D P) or (S, D P), h_n and c_n, shaped like hx; with return_cell_states, also
        the c of the last layer after every step, (L, N, D H) or (S, D H).

    float32, float64, bfloat16 and float16 run in the fused kernels on the CPU; the two 16-bit types
    are summed in float32. Backward keeps 5 S H numbers per layer and direction: the gates, and the
    c of each step; with a projection S H more. On a CUDA device,
    :func:`lstm_ext.set_cuda_backend` chooses between our kernels and torch's own LSTM. What our
    kernels do not take (another device; projections, but for the CPU) goes to torch's own LSTM.
    With ``reset``, ``checkpoint_every`` or a transform of ``torch.func``, which torch's LSTM does
    not have, it is computed in tensor operations. So are ``reset_hx`` and ``return_cell_states`` on
    a CUDA device, and with projections on any device.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit; or ``reset_hx`` or
            ``return_cell_states`` is exported to ONNX, whose LSTM has neither.
        ValueError: checkpoint_every is not positive, there is no such variant, or reset_hx comes
            without reset.

    Example:
        >>> weights = [lstm_ext.LayerWeights(torch.randn(80, 10), torch.randn(80, 20))]
        >>> x, h, c = torch.randn(5, 3, 10), torch.zeros(1, 3, 20), torch.zeros(1, 3, 20)
        >>> output, h_n, c_n = lstm_ext.lstm(x, (h, c), weights)
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """
    h, c = hx
    own_states = return_cell_states or reset_hx is not None
    if own_states:
        reset_hx = expand_reset_states(reset_hx, reset, hx)
        if _onnx.exporting():
            _onnx.refuse_states()
    cell = _variants.find(variant)
    if checkpoint_every is not None and checkpoint_every <= 0:
        raise ValueError(f"checkpoint_every should be positive, got {checkpoint_every}")
    if checkpoint_every is not None and (not torch.is_grad_enabled() or _onnx.exporting()):
        checkpoint_every = None
    first = weights[0]
    if first.w_hr is not None and cell is _variants.PLAIN and _onnx.exporting():
        return _onnx.projected_lstm(input, hx, weights, bidirectional, dropout, batch_sizes, reset)
    call = _backend.LayerCall(
        rows=h.shape[1],
        hidden=first.w_hh.shape[0] // 4,
        layers=len(weights) // (2 if bidirectional else 1),
        directions=2 if bidirectional else 1,
        packed=batch_sizes is not None,
        projects=first.w_hr is not None,
        needs_ours=(
            reset is not None
            or own_states
            or checkpoint_every is not None
            or cell is not _variants.PLAIN
            or _is_transformed()
        ),
        trains=input.is_cuda and _requires_grad(input, h, c, *(t for w in weights for t in w)),
    )
    reason = _backend.why_layer_by_torch(input, call)
    if reason is not None and _onnx.exporting():
        reason = None  # one translation for all devices
    empty = reset is None and cell is _variants.PLAIN and 0 in input.shape
    if empty and own_states:
        _torch_lstm(input, hx, weights, bidirectional, dropout, batch_sizes)  # for its error
    elif empty or (reason is not None and not call.needs_ours):
        reason = "the input is empty" if empty else reason
        _backend.log_path("lstm", input, f"torch's own LSTM: {reason}")
        return _torch_lstm(input, hx, weights, bidirectional, dropout, batch_sizes)
    if reason is None and own_states and call.projects:
        reason = "cell states, or resets to states, of a layer with projections"
    if reason is None and checkpoint_every is None and not own_states:
        flat: list[Tensor | None] = []
        for w in weights:
            flat += w[:4]
            if call.projects:
                flat.append(w.w_hr)
            if cell.unit_weights:
                flat.append(w.unit_weights)
        out: tuple[Tensor, Tensor, Tensor] = _ops.lstm(
            input, h, c, flat, bidirectional, dropout, batch_sizes, reset, cell.number,
            *([True] if call.projects else []),
        )  # fmt: skip
        return out

    first_of_last = len(weights) - call.directions

    def run(
        input: Tensor, h: Tensor, c: Tensor, w: LayerWeights, k: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        to = None if reset_hx is None else (reset_hx[0][k], reset_hx[1][k])
        steps = Steps(batch_sizes, reset, k % call.directions == 1, to)
        cells = return_cell_states and k >= first_of_last
        output, *states = _layer(input, h, c, w, cell, steps, checkpoint_every, reason, cells)
        return output, tuple(states)

    output, last = run_layers(input, hx, weights, bidirectional, dropout, run)
    h_n, c_n = (torch.stack([states[s] for states in last]) for s in range(2))
    if not return_cell_states:
        return output, h_n, c_n
    cells = [states[2] for states in last[first_of_last:]]
    return output, h_n, c_n, cells[0] if len(cells) == 1 else torch.cat(cells, -1)


def _requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_transformed() -> bool:
    """Whether torch.func is at work: torch's own LSTM has no rule for vmap."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _layer(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w: LayerWeights,
    cell: _variants.Variant,
    steps: Steps,
    checkpoint_every: int | None,
    not_fused: str | None,
    with_cells: bool,
) -> tuple[Tensor, ...]:
    """Run one layer in one direction; in tensor operations if not_fused says why.

    Returns the output, h_n and c_n, and with_cells the c after every step.
    """
    if checkpoint_every is not None:
        return _checkpointed_layer(
            input, h, c, w, cell, steps, checkpoint_every, not_fused, with_cells
        )
    if not_fused is not None:
        _backend.log_path("lstm_layer", input, f"plain tensor operations: {not_fused}")
        return _layer_in_steps(input, h, c, w, cell, steps, with_cells)
    *order, reset_hx = steps
    arguments = input, h, c, *w[:4], *order, w.unit_weights, cell.number
    if w.w_hr is not None:
        output, h_n, c_n = _ops.lstm_layer_projected(*arguments, w.w_hr)
        return output, h_n, c_n
    if reset_hx is None and not with_cells:
        output, h_n, c_n = _ops.lstm_layer(*arguments)
        return output, h_n, c_n
    output, h_n, c_n, cells = _ops.lstm_layer_states(*arguments, *(reset_hx or (None, None)))
    return (output, h_n, c_n, cells) if with_cells else (output, h_n, c_n)


def _layer_in_steps(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w: LayerWeights,
    cell: _variants.Variant,
    steps: Steps,
    with_cells: bool,
) -> tuple[Tensor, ...]:
    if not with_cells:
        return layer_in_steps(input, h, c, w, cell, steps)
    cells: dict[int, Tensor] = {}

    def keep(t: int, tensors: tuple[Tensor, ...]) -> None:
        cells[t] = tensors[-2]

    results = layer_in_steps(input, h, c, w, cell, steps, keep)
    joined = torch.cat([cells[t] for t in range(len(cells))])
    return *results, joined.reshape(*input.shape[:-1], c.shape[1])


def _checkpointed_layer(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w: LayerWeights,
    cell: _variants.Variant,
    steps: Steps,
    every: int,
    not_fused: str | None,
    with_cells: bool,
) -> tuple[Tensor, ...]:
    """The layer in pieces of some steps each, whose insides are made anew in backward."""
    batch_sizes, reset, reverse, to = steps
    L = input.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    pieces: list[tuple[int, int, int, Tensor, Tensor | None]] = []
    for first in range(0, L, every):
        last = min(first + every, L)
        if batch_sizes is None:
            pieces.append((first, last, h.shape[0], input[first:last], None))
        else:
            row, end = int(batch_sizes[:first].sum()), int(batch_sizes[:last].sum())
            n = int(batch_sizes[first])
            pieces.append((first, last, n, input[row:end], batch_sizes[first:last]))
    # What backward computes with: the user may change biases before it, as without pieces.
    b_ih, b_hh = (None if b is None else b.clone() for b in (w.b_ih, w.b_hh))
    w = w._replace(b_ih=b_ih, b_hh=b_hh)

    def layer(
        part: Tensor, h: Tensor, c: Tensor, sizes: Tensor | None, reset: Tensor | None,
        reset_h: Tensor | None, reset_c: Tensor | None, *w: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        to = None if reset_h is None or reset_c is None else (reset_h, reset_c)
        of_part, weights = Steps(sizes, reset, reverse, to), LayerWeights(*w)  # type: ignore[arg-type]
        return _layer(part, h, c, weights, cell, of_part, None, not_fused, with_cells)

    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    for first, last, n, part, sizes in reversed(pieces) if reverse else pieces:
        resets = None if reset is None else reset[first:last, :n]
        states = [None] * 2 if to is None else [_part(state, first, last, n) for state in to]
        # Each tensor by itself: of those inside other arguments, a change in place goes unnoticed.
        output, h_n, c_n, *c_of_all = checkpoint(
            layer, part, h[:n], c[:n], sizes, resets, *states, *w,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        outputs.append(output)
        cells += c_of_all
        h, c = torch.cat([h_n, h[n:]]), torch.cat([c_n, c[n:]])
    joined = [torch.cat(p[::-1] if reverse else p) for p in (outputs, cells) if p]
    return joined[0], h, c, *joined[1:]


def _part(state: Tensor, first: int, last: int, n: int) -> Tensor:
    """Of a state to be reset to, (N, H) or (L, N, H): what n rows read from first to last."""
    return state[:n] if state.dim() == 2 else state[first:last, :n]


def _torch_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[LayerWeights],
    bidirectional: bool,
    dropout: float,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    flat = [tensor for layer in weights for tensor in layer[:5] if tensor is not None]
    has_biases = weights[0].b_ih is not None
    layers = len(weights) // (2 if bidirectional else 1)
    # cuDNN keeps what backward needs only if it is told to train.
    train = dropout > 0 or torch.is_grad_enabled()
    options = (has_biases, layers, dropout, train, bidirectional)
    if batch_sizes is None:
        output, h, c = torch._VF.lstm(input, hx, flat, *options, False)
    else:
        output, h, c = torch._VF.lstm(input, batch_sizes, hx, flat, *options)
    return output, h, c
