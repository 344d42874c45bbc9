"""Layers whose steps are not torch's: normalised, with zoneout, dropout of h, or clips.

The product of the input is torch's own, with its gradient; the steps are the operator
``lstm_recurrence`` (csrc/ops/recurrence.h has the formula). Masks are drawn here, from torch's
generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lstm_ext import _backend, _ops, reference
from lstm_ext._step_options import StepOptions, of_module
from lstm_ext._steps import Steps, layer_suffixes

if TYPE_CHECKING:
    from lstm_ext.functional import LayerWeights

# The operator's arguments beyond gates_x, the states and w_hh: reference.recurrence has them too.
_OPTIONS = _ops.arguments_of("lstm_recurrence")._fields[4:]


class LayerNorm(NamedTuple):
    """How the sums of a step and its cell state are normalised; None is what there is not.

    norm_ih (4H) and norm_hh (4H) for the products of input and h apart, or norm_hh alone for their
    sum (``joint``); norm_c and bias_c (H) for the cell state.
    """

    joint: bool
    carry: bool
    eps: float
    norm_ih: Tensor | None
    norm_hh: Tensor
    norm_c: Tensor
    bias_c: Tensor | None


class Masks(NamedTuple):
    """Of one layer and direction, as the operator takes them."""

    update_h: Tensor | None = None
    update_c: Tensor | None = None
    dropout_h: Tensor | None = None


def keep_mask(size: tuple[int, ...], p: float, like: Tensor) -> Tensor:
    """Draw 1 with probability 1 - p, else 0, in the dtype and on the device of ``like``.

    On the CPU from 16 random bits an element, in a third of the time that ``bernoulli_`` takes: p
    is rounded to a multiple of 2^-16.
    """
    limit = round((1 - p) * 2**16) - 2**15  # of numbers from -2^15 on
    plain = like.is_cpu and not torch.compiler.is_compiling()
    if not plain or limit >= 2**15 or torch._C._are_functorch_transforms_active():
        # Not in place, which torch.func.vmap refuses where each sample draws its own.
        return torch.bernoulli(torch.full(size, 1 - p, dtype=like.dtype, device=like.device))
    count = math.prod(size)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None)
    return (words.view(torch.int16)[:count].view(size) < limit).to(like.dtype)


def draw_masks(o: StepOptions, training: bool, x: Tensor, h: Tensor, c: Tensor) -> Masks:
    """Draw what zoneout and recurrent dropout want of a layer; their means in evaluation.

    Args:
        o: the options.
        training: whether to draw.
        x: the layer's input, (L, N, I) or packed (S, I).
        h: (N, P).
        c: (N, H).
    """

    def update(p: float, state: Tensor) -> Tensor | None:
        if p == 0:
            return None
        if not training:
            return x.new_full((state.shape[1],), 1 - p)
        return keep_mask((*x.shape[:-1], state.shape[1]), p, x)

    p, dropout = o.recurrent_dropout, None
    if training and p > 0:
        rows = x.shape[:-1] if o.recurrent_dropout_per_step else h.shape[:1]
        columns = h.shape[1] * (4 if o.recurrent_dropout_per_gate else 1)
        dropout = keep_mask((*rows, columns), p, x)
        dropout = dropout / (1 - p) if p < 1 else dropout
    return Masks(update(o.zoneout_h, h), update(o.zoneout_c, c), dropout)


def couple_gates(w: LayerWeights, o: StepOptions) -> LayerWeights:
    """Make f = 1 - i, if the options say so: sigmoid(-v) is 1 - sigmoid(v)."""
    if not o.coupled_gates:
        return w

    def coupled(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        i, _, g, output = t.chunk(4)
        return torch.cat([i, -i, g, output])

    w_ih, w_hh, b_ih, b_hh = map(coupled, w[:4])
    assert w_ih is not None
    assert w_hh is not None
    return w._replace(w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh)


def drop_weights(w: LayerWeights, o: StepOptions, training: bool) -> LayerWeights:
    """Drop elements of w_hh, or whole rows, and scale what is left."""
    if not training or o.weight_dropout == 0:
        return w
    w_hh, p = w.w_hh, o.weight_dropout
    mask = keep_mask((w_hh.shape[0], 1 if o.weight_dropout_rows else w_hh.shape[1]), p, w_hh)
    return w._replace(w_hh=w_hh * (mask / (1 - p) if p < 1 else mask))


def drop_features(x: Tensor, p: float, batch_sizes: Tensor | None) -> Tensor:
    """Drop the same features of a sequence at every step: (L, N, F) or packed (S, F)."""
    if batch_sizes is None:
        return x * torch.dropout(torch.ones_like(x[:1]), p, True)
    # Row k of a step is that of sequence k.
    N = int(batch_sizes[0])
    mask = torch.dropout(x.new_ones(N, x.shape[1]), p, True)
    rows = torch.cat([torch.arange(n) for n in batch_sizes.tolist()]).to(x.device)
    return x * mask.index_select(0, rows)


def layer(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w: LayerWeights,
    o: StepOptions,
    norm: LayerNorm | None,
    masks: Masks,
    order: Steps,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer in one direction.

    Args:
        x: (L, N, I) or packed (S, I).
        h: (N, P).
        c: (N, H).
        w: the weights.
        o: the options; of these, the clips count here.
        norm: the normalisation, or None.
        masks: what was drawn, or given.
        order: batch_sizes, reset and reverse.

    Returns:
        The h of every step, and the last h and c.
    """
    call = arguments(x, h, c, w, o, norm, masks, order)
    if _backend.recurrence_by_torch(x):
        _backend.log_path(
            "lstm_recurrence", x, "tensor operations, step by step: LSTM_EXT_CUDA=torch"
        )
        return in_tensor_operations(call)
    # Where there are kernels, they say themselves what they do.
    if not _ops.has_recurrence_kernel(x):
        _backend.log_path("lstm_recurrence", x, "tensor operations, step by step")
    out: tuple[Tensor, Tensor, Tensor] = _ops.lstm_recurrence(*call)
    return out


def in_tensor_operations(
    call: tuple[Any, ...], keep: Callable[[int, tuple[Tensor, ...]], None] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the operator does by torch's own operations.

    Args:
        call: what :func:`arguments` returns.
        keep: as :func:`reference.recurrence` takes it.

    Returns:
        The h of every step, and the last h and c.
    """
    kind = call[0].device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        call = tuple(_cast(value, dtype) for value in call)
    gates_x, h, c, w_hh, *others = call
    options = dict(zip(_OPTIONS, others, strict=True))
    with torch.autocast(kind, enabled=False):
        output, states = reference.recurrence(gates_x, (h, c), w_hh, **options, keep=keep)
    return output, *states


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return what autocast makes of an operator's argument."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floats and value.dtype != torch.float64 else value


def arguments(
    x: Tensor, h: Tensor, c: Tensor, w: LayerWeights, o: StepOptions, norm: LayerNorm | None,
    masks: Masks, order: Steps,
) -> tuple[Any, ...]:  # fmt: skip
    """Return what the operator takes, for the arguments of :func:`layer`."""
    bias = w.b_ih
    if w.b_hh is not None:
        bias = w.b_hh if bias is None else bias + w.b_hh
    if norm is None:
        gates_x, bias = F.linear(x, w.w_ih, bias), None
    elif norm.joint:
        gates_x = F.linear(x, w.w_ih)
    else:
        product = F.linear(x, w.w_ih)
        gates_x = F.layer_norm(product, product.shape[-1:], norm.norm_ih, bias, norm.eps)
        bias = None
    none = (None, None, None) if norm is None else (norm.norm_hh, norm.norm_c, norm.bias_c)
    return (
        gates_x, h, c, w.w_hh, bias, *none, w.w_hr, *masks, order.batch_sizes, order.reset,
        order.reverse, norm is not None and norm.joint, norm is not None and norm.carry,
        1e-5 if norm is None else norm.eps, o.cell_clip, o.projection_clip,
    )  # fmt: skip


def run(module: Any, ready: Any, o: StepOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Run a module's layers.

    Args:
        module: the LSTM, for its mode and its normalisation.
        ready: what :func:`lstm_ext._call.prepare` made of the call.
        o: the options that count for it.
    """
    from lstm_ext.functional import lstm

    options, training, D = ready.options, module.training, ready.options.directions
    x, (h, c) = ready.input, ready.hx
    weights = [drop_weights(couple_gates(w, o), o, training) for w in options.layers()]
    norms = layer_norms(module)
    by_steps = o.needs_steps or norms is not None
    if training and o.input_dropout > 0:
        x = drop_features(x, o.input_dropout, ready.batch_sizes)
    last_h, last_c = [], []
    for k in range(0, len(weights), D):
        if k > 0 and options.dropout != 0:
            if o.variational_dropout:
                x = drop_features(x, options.dropout, ready.batch_sizes)
            else:
                x = torch.dropout(x, options.dropout, True)
        if by_steps:
            outputs = []
            for d in range(k, k + D):
                order = Steps(ready.batch_sizes, ready.reset, d > k)
                masks = draw_masks(o, training, x, h[d], c[d])
                norm = None if norms is None else norms[d]
                output, h_n, c_n = layer(x, h[d], c[d], weights[d], o, norm, masks, order)
                outputs.append(output)
                last_h.append(h_n)
                # Of layers with projections, autocast leaves c with its own dtype.
                last_c.append(c_n.to(c.dtype) if options.proj_size else c_n)
            x = outputs[0] if D == 1 else torch.cat(outputs, -1)
        else:
            x, h_n, c_n = lstm(
                x, (h[k : k + D], c[k : k + D]), weights[k : k + D],
                bidirectional=options.bidirectional, batch_sizes=ready.batch_sizes,
                reset=ready.reset, variant=options.cell.name,
            )  # fmt: skip
            last_h += h_n.unbind()
            last_c += c_n.unbind()
    return x, torch.stack(last_h), torch.stack(last_c)


def has_norm(module: Any) -> bool:
    """Whether a module normalises its layers."""
    return getattr(module, "_layer_norm", None) is not None


def layer_norms(module: Any) -> list[LayerNorm] | None:
    """Return the normalisation of each layer and direction of a module, or None."""
    if not has_norm(module):
        return None
    joint, carry, eps = module._layer_norm
    ends = [""] if not isinstance(module, nn.LSTM) else layer_suffixes(module)
    return [
        LayerNorm(
            joint, carry, eps, None if joint else getattr(module, f"norm_ih{end}"),
            getattr(module, f"norm_gates{end}" if joint else f"norm_hh{end}"),
            getattr(module, f"norm_c{end}"), getattr(module, f"bias_c{end}", None),
        )
        for end in ends
    ]  # fmt: skip


def run_cell(
    cell: Any, input: Tensor, hx: tuple[Tensor, Tensor] | None, o: StepOptions
) -> tuple[Tensor, Tensor]:
    """Run one step of a cell, (N, I) or (I)."""
    x = input if input.dim() == 2 else input.unsqueeze(0)
    if x.shape[1] != cell.input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {x.shape[1]} expected {cell.input_size}"
        )
    if hx is None:
        h = c = x.new_zeros(x.shape[0], cell.hidden_size)
    else:
        h, c = hx if input.dim() == 2 else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    for k, state in enumerate((h, c)):
        if state.shape != (x.shape[0], cell.hidden_size):
            raise RuntimeError(
                f"hidden{k} has inconsistent shape: got {list(state.shape)} expected "
                f"{[x.shape[0], cell.hidden_size]}"
            )
    from lstm_ext.functional import LayerWeights

    w = LayerWeights(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    w, x = drop_weights(couple_gates(w, o), o, cell.training), x.unsqueeze(0)
    norms = layer_norms(cell)
    masks = draw_masks(o, cell.training, x, h, c)
    by_gate = masks.dropout_h is not None and o.recurrent_dropout_per_gate
    if norms is None and o.cell_clip == 0 and not by_gate:
        h, c = _torchs_step(x.squeeze(0), h, c, w, masks)
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))
    dtype = c.dtype
    _, h, c = layer(
        x, h, c, w, o, None if norms is None else norms[0], masks, Steps(None, None, False)
    )
    h, c = h.to(dtype), c.to(dtype)  # as torch's cell, which autocast leaves with the states' own
    return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))


def _torchs_step(
    x: Tensor, h: Tensor, c: Tensor, w: LayerWeights, masks: Masks
) -> tuple[Tensor, Tensor]:
    """Run torch's step, with masks: the operator of layers would lay w_hh out anew for it."""
    from lstm_ext.functional import lstm_cell

    seen = h if masks.dropout_h is None else h * masks.dropout_h
    h_new, c_new = lstm_cell(x, (seen, c), w.w_ih, w.w_hh, w.b_ih, w.b_hh)

    def updated(old: Tensor, new: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return new
        mask = mask[0] if mask.dim() == 3 else mask  # (1, N, H), or (H)
        return torch.lerp(old.to(new.dtype), new, mask.to(new.dtype))

    return updated(h, h_new, masks.update_h), updated(c, c_new, masks.update_c)


def trace(
    module: Any, x: Tensor, h: Tensor, c: Tensor, w: LayerWeights, k: int, order: Steps
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Run a layer of a module in evaluation mode step by step.

    Returns:
        The output, and of every time i, f, g, o, c and h, of the rows that it has.
    """
    o, norms = of_module(module), layer_norms(module)
    norm = None if norms is None else norms[k]
    sizes = order.batch_sizes
    L = len(x) if sizes is None else len(sizes)
    n_of = [h.shape[0]] * L if sizes is None else sizes.tolist()
    steps = list(torch.split(x.reshape(-1, x.shape[-1]), n_of))
    masks = draw_masks(o, False, x, h, c)
    kept: list[tuple[Tensor, ...]] = [()] * L
    for t in reversed(range(L)) if order.reverse else range(L):
        n = n_of[t]
        reset = None if order.reset is None else order.reset[t : t + 1, :n]
        one = Steps(None, reset, False)
        call = arguments(steps[t].unsqueeze(0), h[:n], c[:n], w, o, norm, masks, one)
        if _backend.recurrence_by_torch(x):
            made: dict[int, tuple[Tensor, ...]] = {}
            output, h_t, c_t = in_tensor_operations(call, made.__setitem__)
            kept[t] = made[0]
        else:
            output, h_t, c_t, gates, *_ = _ops.lstm_recurrence_forward(*call)
            kept[t] = (*gates.chunk(4, -1), c_t, h_t)
        steps[t] = output.squeeze(0)
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    return torch.cat(steps).reshape(*x.shape[:-1], h.shape[1]), kept
