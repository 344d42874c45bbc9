"""What ``torch.vmap`` does with the operators: per-sample gradients, ensembles, jacobians.

Where only inputs and states are batched, the new dimension joins the batch of one fused call. With
weights batched as well (an ensemble), or their gradients, the cell is computed in batched tensor
operations by :mod:`lstm_ext.reference`'s formulas, and the layer, a large operation, by one fused
call for each. Gradients of ``torch.func.grad``, which can be differentiated again, come from tensor
operations in any case (csrc/ops/composite_cell.cpp), and those need no rule.

B is the size of the dimension that vmap adds, and comes first in every tensor here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lstm_ext import _ops, reference

_STATES = ("input", "hx", "cx")
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


def _named(name: str, args: tuple[Any, ...], dims: Dims) -> tuple[Any, Any]:
    """Return arguments and their dimensions by name; a missing one is None, its default."""
    make = _ops.arguments_of(name)
    return make(*args), make(*dims, *[None] * (len(make._fields) - len(dims)))


def _any_weight(a: Any) -> bool:
    """Whether weights or biases have a dimension of vmap's."""
    return any(
        x is not None
        for x in (a.w_ih, a.w_hh, a.b_ih, a.b_hh, a.unit_weights, getattr(a, "w_hr", None))
    )


def _unit_weights(a: Any, d: Any) -> Tensor | None:
    """Return the weights of the units for :data:`reference.CELLS`: (P, H), or (P, B, 1, H)."""
    if a.unit_weights is None or d.unit_weights is None:
        weights: Tensor | None = a.unit_weights
        return weights
    return _front(a.unit_weights, d.unit_weights).transpose(0, 1).unsqueeze(2)


def _cell(name: str, B: int, dims: Dims, args: tuple[Any, ...]) -> Results:
    a, d = _named(name, args, dims)
    if not _any_weight(d):
        joined = {key: _join(getattr(a, key), getattr(d, key), B, 0) for key in _STATES}
        results = getattr(torch.ops.lstm_ext, name)(*a._replace(**joined))
        return tuple(_split(result, B, 0) for result in results)
    x, h, c = (_expand(getattr(a, key), getattr(d, key), B) for key in _STATES)
    biases = [
        b if dim is None else _front(b, dim).unsqueeze(1)
        for b, dim in ((a.b_ih, d.b_ih), (a.b_hh, d.b_hh))
    ]
    weights = _front(a.w_ih, d.w_ih), _front(a.w_hh, d.w_hh), *biases
    cell = reference.CELLS[a.variant]
    pre = reference.pre_activations(x, h, *weights)
    gates, hy, cy = cell.forward(pre, c, _unit_weights(a, d))
    return hy, cy, torch.cat(gates, -1)


@torch.library.register_vmap("lstm_ext::lstm_cell")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _cell("lstm_cell", info.batch_size, in_dims, args)[:2], (0, 0)


@torch.library.register_vmap("lstm_ext::lstm_cell_forward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _cell("lstm_cell_forward", info.batch_size, in_dims, args), (0, 0, 0)


@torch.library.register_vmap("lstm_ext::lstm_cell_backward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    B, (a, d) = info.batch_size, _named("lstm_cell_backward", args, in_dims)
    wanted_parameters = a.output_mask[len(_STATES) :]
    if not _any_weight(d) and not any(wanted_parameters):
        batched = ("grad_hy", "grad_cy", *_STATES, "gates")
        joined = {key: _join(getattr(a, key), getattr(d, key), B, 0) for key in batched}
        found = torch.ops.lstm_ext.lstm_cell_backward(*a._replace(**joined))
        results = tuple(None if r is None else _split(r, B, 0) for r in found)
        return results, _dims(results)
    grad_h, grad_c = (
        a.input.new_zeros(()) if grad is None else _front(grad, dim)
        for grad, dim in ((a.grad_hy, d.grad_hy), (a.grad_cy, d.grad_cy))
    )
    x, h, c = (_expand(getattr(a, key), getattr(d, key), B) for key in _STATES)
    w_ih, w_hh = _front(a.w_ih, d.w_ih), _front(a.w_hh, d.w_hh)
    activated = _expand(a.gates, d.gates, B).chunk(4, -1)
    grads, grad_c, of_units = reference.CELLS[a.variant].backward(
        activated, c, _unit_weights(a, d), grad_h, grad_c
    )
    grad_ifgo = torch.cat(grads, -1)
    wanted: tuple[Callable[[], Tensor], ...] = (
        lambda: grad_ifgo @ w_ih,
        lambda: grad_ifgo @ w_hh,
        lambda: grad_c,
        lambda: grad_ifgo.mT @ x,
        lambda: grad_ifgo.mT @ h,
        lambda: grad_ifgo.sum(1),
        lambda: grad_ifgo.sum(1),
        lambda: torch.stack(of_units, 1).sum(2),
    )
    results = tuple(
        value() if asked else None for asked, value in zip(a.output_mask, wanted, strict=True)
    )
    return results, _dims(results)


@torch.library.register_vmap("lstm_ext::lstm_layer")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _layer("lstm_layer", info.batch_size, in_dims, args), (0, 0, 0)


@torch.library.register_vmap("lstm_ext::lstm_layer_forward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _layer("lstm_layer_forward", info.batch_size, in_dims, args), (0, 0, 0, 0, 0)


@torch.library.register_vmap("lstm_ext::lstm_layer_states")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _layer("lstm_layer_states", info.batch_size, in_dims, args), (0,) * 4


@torch.library.register_vmap("lstm_ext::lstm_layer_states_forward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _layer("lstm_layer_states_forward", info.batch_size, in_dims, args), (0,) * 6


@torch.library.register_vmap("lstm_ext::lstm_layer_projected")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _layer("lstm_layer_projected", info.batch_size, in_dims, args), (0,) * 3


@torch.library.register_vmap("lstm_ext::lstm_layer_projected_forward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _layer("lstm_layer_projected_forward", info.batch_size, in_dims, args), (0,) * 6


def _layer(name: str, B: int, dims: Dims, args: tuple[Any, ...]) -> Results:
    op, (a, d) = getattr(torch.ops.lstm_ext, name), _named(name, args, dims)
    if _any_weight(d) or a.batch_sizes is not None:
        return _each(op, B, dims, args)
    # Where the batch is.
    batch = {"input": 1, "hx": 0, "cx": 0, "reset": 1}
    for key in ("reset_hx", "reset_cx"):
        state, dim = getattr(a, key, None), getattr(d, key, None)
        if state is not None:  # (N, H) or (L, N, H)
            batch[key] = state.dim() - (dim is not None) - 2
    joined = {key: _join(getattr(a, key), getattr(d, key), B, at) for key, at in batch.items()}
    output, h, c, *kept = op(*a._replace(**joined))
    states = (_split(output, B, 1), _split(h, B, 0), _split(c, B, 0))
    # What backward needs of each step has rows (L B N), and shall have (B, L N); the c of all steps
    # is shaped like the output.
    L, rows = output.shape[0], h.shape[0]
    return *states, *(
        _split(k, B, 1)
        if k.dim() == 3
        else _split(k.reshape(L, rows, k.shape[1]), B, 1).flatten(1, 2)
        for k in kept
    )


@torch.library.register_vmap("lstm_ext::lstm_layer_backward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    results = _each(torch.ops.lstm_ext.lstm_layer_backward, info.batch_size, in_dims, args)
    return results, _dims(results)


@torch.library.register_vmap("lstm_ext::lstm_layer_states_backward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    results = _each(torch.ops.lstm_ext.lstm_layer_states_backward, info.batch_size, in_dims, args)
    return results, _dims(results)


@torch.library.register_vmap("lstm_ext::lstm_layer_projected_backward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    op = torch.ops.lstm_ext.lstm_layer_projected_backward
    results = _each(op, info.batch_size, in_dims, args)
    return results, _dims(results)


_MASKS = ("update_h", "update_c", "dropout_h")
_PARAMETERS = ("w_hh", "bias", "norm", "norm_c", "bias_c", "w_hr")


@torch.library.register_vmap("lstm_ext::lstm_recurrence")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _recurrence("lstm_recurrence", info.batch_size, in_dims, args), (0,) * 3


@torch.library.register_vmap("lstm_ext::lstm_recurrence_forward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    return _recurrence("lstm_recurrence_forward", info.batch_size, in_dims, args), (0,) * 10


def _recurrence(name: str, B: int, dims: Dims, args: tuple[Any, ...]) -> Results:
    op, (a, d) = getattr(torch.ops.lstm_ext, name), _named(name, args, dims)
    if a.batch_sizes is not None or any(getattr(d, key) is not None for key in _PARAMETERS):
        return _each(op, B, dims, args)
    # Where the batch is; a mask of all sequences has none.
    batch = {"gates_x": 1, "hx": 0, "cx": 0, "reset": 1}
    for key in _MASKS:
        mask, dim = getattr(a, key), getattr(d, key)
        rank = 0 if mask is None else mask.dim() - (dim is not None)
        if rank == 1 and dim is not None:
            return _each(op, B, dims, args)
        if rank > 1:
            batch[key] = rank - 2
    joined = {key: _join(getattr(a, key), getattr(d, key), B, at) for key, at in batch.items()}
    output, h, c, *kept = op(*a._replace(**joined))
    L, rows = output.shape[0], h.shape[0]

    def of_steps(k: Tensor) -> Tensor:
        if k.shape[0] == 0:  # not kept
            return k.new_empty(B, *k.shape)
        return _split(k.reshape(L, rows, *k.shape[1:]), B, 1).flatten(1, 2)

    return _split(output, B, 1), _split(h, B, 0), _split(c, B, 0), *map(of_steps, kept)


@torch.library.register_vmap("lstm_ext::lstm_recurrence_backward")
def _(info: Any, in_dims: Dims, *args: Any) -> tuple[Results, Dims]:
    op = torch.ops.lstm_ext.lstm_recurrence_backward
    results = _each(op, info.batch_size, in_dims, args)
    return results, _dims(results)
