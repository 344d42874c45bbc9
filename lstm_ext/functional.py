"""The functional forms of the LSTM cell and of the LSTM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lstm_ext import _backend, _onnx, _ops
from lstm_ext.reference import gates, states

Kept = TypeVar("Kept")


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
    """The weights of one layer in one direction.

    w_ih (4H, I) and w_hh (4H, P); b_ih and b_hh (4H) or None; the projection w_hr (P, H) or None,
    in which case P = H.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one or more layers of an LSTM over a whole sequence.

    The formula is :func:`lstm_cell`'s, step by step; each layer and direction is one fused
    operation. Layers K, directions D (2 if bidirectional, else 1).

    Args:
        input: (L, N, I), or the data (S, I) of a packed sequence.
        hx: h (K D, N, P) and c (K D, N, H) before the first step.
        weights: K D of them, ordered as in :class:`torch.nn.LSTM`: layer by layer, in each forward
            first.
        bidirectional: whether every second of them reads the sequence from its end.
        dropout: probability of dropout after each layer but the last; 0 for none, as in evaluation.
        batch_sizes: those of a packed sequence, int64 (L), on the CPU.
        reset: bool (L, N): where it is true, h and c are zero before that step.
        checkpoint_every: keep the states of every so many steps alone, and compute the gates anew
            in backward: less memory for more time (for every 16th step, 1.5 times a training step
            of 200 x 16 x 128 -> 128, 2.7 times one of 100 x 1 x 256 -> 256).

    Returns:
        output (L, N, D P) or (S, D P), h_n and c_n, shaped like hx.

    float32, float64, bfloat16 and float16 run fused on the CPU (the halves are summed in float32).
    Kept for backward, per layer and direction: 5 S H numbers, the gates and the c of each step.
    On a CUDA device, :func:`lstm_ext.set_cuda_backend` chooses between our kernels and torch's own
    LSTM. What our kernels do not take (another device, projections) goes to torch's, or with
    ``reset``, ``checkpoint_every`` or a transform of ``torch.func`` is computed in tensor
    operations.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit.
        ValueError: checkpoint_every is not positive.
    """
    h, c = hx
    if checkpoint_every is not None and checkpoint_every <= 0:
        raise ValueError(f"checkpoint_every should be positive, got {checkpoint_every}")
    if checkpoint_every is not None and (not torch.is_grad_enabled() or _onnx.exporting()):
        checkpoint_every = None
    first = weights[0]
    if first.w_hr is not None and _onnx.exporting():
        return _onnx.projected_lstm(input, hx, weights, bidirectional, dropout, batch_sizes, reset)
    call = _backend.LayerCall(
        rows=h.shape[1],
        hidden=first.w_hh.shape[0] // 4,
        single=len(weights) == 1,
        packed=batch_sizes is not None,
        projects=first.w_hr is not None,
        needs_ours=reset is not None or checkpoint_every is not None or _is_transformed(),
    )
    reason = _backend.why_layer_by_torch(input, call)
    if reason is not None and _onnx.exporting():
        reason = None  # one translation for all devices
    empty = reset is None and 0 in input.shape
    if empty or (reason is not None and not call.needs_ours):
        reason = "the input is empty" if empty else reason
        _backend.log_path("lstm", input, f"torch's own LSTM: {reason}")
        return _torch_lstm(input, hx, weights, bidirectional, dropout, batch_sizes)
    if reason is None and checkpoint_every is None:
        flat = [tensor for w in weights for tensor in w[:4]]
        out: tuple[Tensor, Tensor, Tensor] = _ops.lstm(
            input, h, c, flat, bidirectional, dropout, batch_sizes, reset
        )
        return out

    def run(
        input: Tensor, h: Tensor, c: Tensor, w: LayerWeights, reverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, h_n, c_n = _layer(
            input, h, c, w, batch_sizes, reset, reverse, checkpoint_every, reason
        )
        return output, (h_n, c_n)

    output, last = run_layers(input, hx, weights, bidirectional, dropout, run)
    h_n, c_n = zip(*last, strict=True)
    return output, torch.stack(h_n), torch.stack(c_n)


def run_layers(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[LayerWeights],
    bidirectional: bool,
    dropout: float,
    run: Callable[[Tensor, Tensor, Tensor, LayerWeights, bool], tuple[Tensor, Kept]],
) -> tuple[Tensor, list[Kept]]:
    """Run layers and directions one after the other (csrc/ops/lstm.cpp does the same).

    ``run(input, h, c, weights, reverse)`` runs one, and returns its output and whatever else is to
    be kept of it. Returns the last output, and what was kept of each.
    """
    (h, c), directions = hx, 2 if bidirectional else 1
    kept: list[Kept] = []
    for k in range(0, len(weights), directions):
        if k > 0 and dropout > 0:
            input = torch.dropout(input, dropout, True)
        outputs = []
        for d in range(directions):
            output, of_this = run(input, h[k + d], c[k + d], weights[k + d], d == 1)
            outputs.append(output)
            kept.append(of_this)
        input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    return input, kept


def _is_transformed() -> bool:
    """Whether torch.func is at work: torch's own LSTM has no rule for vmap."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _layer(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w: LayerWeights,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    checkpoint_every: int | None,
    not_fused: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer in one direction; in tensor operations if not_fused says why."""
    if checkpoint_every is not None:
        return _checkpointed_layer(
            input, h, c, w, batch_sizes, reset, reverse, checkpoint_every, not_fused
        )
    if not_fused is not None:
        _backend.log_path("lstm_layer", input, f"plain tensor operations: {not_fused}")
        return layer_in_steps(input, h, c, w, batch_sizes, reset, reverse)
    output, h_n, c_n = _ops.lstm_layer(
        input, h, c, w.w_ih, w.w_hh, w.b_ih, w.b_hh, batch_sizes, reset, reverse
    )
    return output, h_n, c_n


def _checkpointed_layer(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w: LayerWeights,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    every: int,
    not_fused: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in pieces of some steps each, whose insides are made anew in backward."""
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
    outputs: list[Tensor] = []
    for first, last, n, part, sizes in reversed(pieces) if reverse else pieces:
        part_reset = None if reset is None else reset[first:last, :n]
        output, h_n, c_n = checkpoint(
            _layer, part, h[:n], c[:n], w, sizes, part_reset, reverse, None, not_fused,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        outputs.append(output)
        h, c = torch.cat([h_n, h[n:]]), torch.cat([c_n, c[n:]])
    return torch.cat(outputs[::-1] if reverse else outputs), h, c


def layer_in_steps(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w: LayerWeights,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    keep: Callable[[int, tuple[Tensor, ...]], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer in tensor operations, projections included: h' = W_hr (o * tanh(c')).

    (Sak, Senior & Beaufays 2014.) What a step makes, ``keep`` is told: t and (i, f, g, o, c', h').
    """
    L = input.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    sizes = [h.shape[0]] * L if batch_sizes is None else batch_sizes.tolist()
    if reset is not None and reset.shape != (L, h.shape[0]):
        raise RuntimeError(
            f"reset must be a bool tensor of shape (L, N) = ({L}, {h.shape[0]}), "
            f"got shape {list(reset.shape)}"
        )
    steps = list(torch.split(input.reshape(-1, input.shape[-1]), sizes))
    for t in reversed(range(L)) if reverse else range(L):
        n = sizes[t]
        h_t, c_t = h[:n], c[:n]
        if reset is not None:
            zero = reset[t, :n].unsqueeze(1)
            h_t, c_t = h_t.masked_fill(zero, 0), c_t.masked_fill(zero, 0)
        activated = gates(steps[t], h_t, w.w_ih, w.w_hh, w.b_ih, w.b_hh)
        h_t, c_t = states(activated, c_t)
        if w.w_hr is not None:
            h_t = torch.nn.functional.linear(h_t, w.w_hr)
        if keep is not None:
            keep(t, (*activated, c_t, h_t))
        steps[t] = h_t
        # Sequences that have ended, or in reverse not begun, keep their states.
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    return torch.cat(steps).reshape(*input.shape[:-1], h.shape[1]), h, c


def _torch_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[LayerWeights],
    bidirectional: bool,
    dropout: float,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    flat = [tensor for layer in weights for tensor in layer if tensor is not None]
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
