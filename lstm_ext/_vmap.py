"""What ``torch.vmap`` does with the operators: per-sample gradients, ensembles, jacobians.

Where only inputs and states are batched, the new dimension joins the batch of one fused call. With
weights batched as well (an ensemble), or their gradients, the cell is computed in batched tensor
operations by :mod:`lstm_ext.reference`'s formulas, and the layer, a large operation, by one fused
call for each. Gradients of ``torch.func.grad``, which can be differentiated again, come from tensor
operations in any case (csrc/composite.cpp), and those need no rule.

B is the size of the dimension that vmap adds, and comes first in every tensor here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lstm_ext import _ops, reference

_WEIGHTS = slice(3, 7)  # w_ih, w_hh, b_ih, b_hh among the seven tensors
Results = tuple[Tensor | None, ...]
Dims = tuple[int | None, ...]


def _front(tensor: Tensor, dim: int | None) -> Tensor:
    return tensor if dim is None else tensor.movedim(dim, 0)


def _expand(tensor: Tensor, dim: int | None, B: int) -> Tensor:
    return tensor.expand(B, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _dims(results: Results) -> Dims:
    return tuple(None if result is None else 0 for result in results)


def _each(op: Callable[..., Any], B: int, in_dims: Dims, args: tuple[Any, ...]) -> Results:
    """Call op B times."""
    pairs = list(zip(args, in_dims, strict=True))
    calls = [op(*(a.select(d, b) if isinstance(d, int) else a for a, d in pairs)) for b in range(B)]
    return tuple(
        None if results[0] is None else torch.stack(results) for results in zip(*calls, strict=True)
    )


def _join(tensor: Tensor | None, dim: int | None, B: int, batch: int) -> Tensor | None:
    """Let the new dimension become the slower part of dimension `batch`."""
    if tensor is None:
        return None
    return _expand(tensor, dim, B).movedim(0, batch).flatten(batch, batch + 1)


def _split(tensor: Tensor, B: int, batch: int) -> Tensor:
    """Undo _join, the new dimension in front."""
    sizes = (*tensor.shape[:batch], B, tensor.shape[batch] // B, *tensor.shape[batch + 1 :])
    return tensor.reshape(sizes).movedim(batch, 0)


def _batched_weights(in_dims: Dims) -> bool:
    return any(dim is not None for dim in in_dims[_WEIGHTS])


def _cell(op: Callable[..., Any], B: int, in_dims: Dims, args: tuple[Any, ...]) -> Results:
    # The dispatcher leaves out biases that are None, their default.
    missing = (None,) * (7 - len(args))
    in_dims, args = in_dims + missing, args + missing
    if not _batched_weights(in_dims):
        joined = (_join(a, d, B, 0) for a, d in zip(args[:3], in_dims[:3], strict=True))
        return tuple(_split(result, B, 0) for result in op(*joined, *args[3:]))
    x, h, c = (_expand(a, d, B) for a, d in zip(args[:3], in_dims[:3], strict=True))
    w_ih, w_hh = (_front(a, d) for a, d in zip(args[3:5], in_dims[3:5], strict=True))
    biases = [
        None if b is None else b if d is None else _front(b, d).unsqueeze(1)
        for b, d in zip(args[5:], in_dims[5:], strict=True)
    ]
    gates = reference.gates(x, h, w_ih, w_hh, *biases)
    return *reference.states(gates, c), torch.cat(gates, -1)


@torch.library.register_vmap("lstm_ext::lstm_cell")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _cell(_ops.lstm_cell, info.batch_size, in_dims, args)[:2], (0, 0)


@torch.library.register_vmap("lstm_ext::lstm_cell_forward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    op = torch.ops.lstm_ext.lstm_cell_forward
    return _cell(op, info.batch_size, in_dims, args), (0, 0, 0)


@torch.library.register_vmap("lstm_ext::lstm_cell_backward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    B, mask = info.batch_size, args[10]
    op = torch.ops.lstm_ext.lstm_cell_backward
    if not _batched_weights(in_dims[2:]) and not any(mask[_WEIGHTS]):
        grads_and_states = zip(args[:5], in_dims[:5], strict=True)
        joined = [_join(a, d, B, 0) for a, d in grads_and_states]
        gates = _join(args[9], in_dims[9], B, 0)
        found = op(*joined, *args[5:9], gates, mask)
        results = tuple(None if r is None else _split(r, B, 0) for r in found)
        return results, _dims(results)
    grad_h, grad_c = (
        torch.zeros((), dtype=args[2].dtype, device=args[2].device) if g is None else _front(g, d)
        for g, d in zip(args[:2], in_dims[:2], strict=True)
    )
    x, h, c = (_expand(a, d, B) for a, d in zip(args[2:5], in_dims[2:5], strict=True))
    w_ih, w_hh = (_front(a, d) for a, d in zip(args[5:7], in_dims[5:7], strict=True))
    activated = _expand(args[9], in_dims[9], B).chunk(4, -1)
    grad_ifgo, grad_c = reference.gate_gradients(activated, c, grad_h, grad_c)
    wanted: tuple[Callable[[], Tensor], ...] = (
        lambda: grad_ifgo @ w_ih,
        lambda: grad_ifgo @ w_hh,
        lambda: grad_c,
        lambda: grad_ifgo.mT @ x,
        lambda: grad_ifgo.mT @ h,
        lambda: grad_ifgo.sum(1),
        lambda: grad_ifgo.sum(1),
    )
    results = tuple(value() if asked else None for asked, value in zip(mask, wanted, strict=True))
    return results, _dims(results)


@torch.library.register_vmap("lstm_ext::lstm_layer")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _layer(_ops.lstm_layer, info.batch_size, in_dims, args), (0, 0, 0)


@torch.library.register_vmap("lstm_ext::lstm_layer_forward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    op = torch.ops.lstm_ext.lstm_layer_forward
    return _layer(op, info.batch_size, in_dims, args), (0, 0, 0, 0, 0)


def _layer(op: Callable[..., Any], B: int, in_dims: Dims, args: tuple[Any, ...]) -> Results:
    input, hx, cx, *weights, batch_sizes, reset, reverse = args
    if _batched_weights(in_dims) or batch_sizes is not None:
        return _each(op, B, in_dims, args)
    output, h, c, *kept = op(
        _join(input, in_dims[0], B, 1),
        _join(hx, in_dims[1], B, 0),
        _join(cx, in_dims[2], B, 0),
        *weights,
        None,
        _join(reset, in_dims[8], B, 1),
        reverse,
    )
    states = (_split(output, B, 1), _split(h, B, 0), _split(c, B, 0))
    # Gates and c before each step have rows (L B N), and shall have (B, L N).
    L, rows = output.shape[0], h.shape[0]
    return (*states, *(_split(k.reshape(L, rows, k.shape[1]), B, 1).flatten(1, 2) for k in kept))


@torch.library.register_vmap("lstm_ext::lstm_layer_backward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    results = _each(torch.ops.lstm_ext.lstm_layer_backward, info.batch_size, in_dims, args)
    return results, _dims(results)
