"""A layer step by step in tensor operations, and layers one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from lstm_ext._variants import Variant
from lstm_ext.reference import CELLS, pre_activations

if TYPE_CHECKING:
    from lstm_ext.functional import LayerWeights

Kept = TypeVar("Kept")


class Steps(NamedTuple):
    """Which steps a layer goes through, and in which order: as in :func:`lstm`.

    reset_hx are h (N, P) and c (N, H) of the resets, or (L, N, P) and (L, N, H), each step's own;
    or None for zeros.
    """

    batch_sizes: Tensor | None
    reset: Tensor | None
    reverse: bool
    reset_hx: tuple[Tensor, Tensor] | None = None


def run_layers(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[LayerWeights],
    bidirectional: bool,
    dropout: float,
    run: Callable[[Tensor, Tensor, Tensor, LayerWeights, int], tuple[Tensor, Kept]],
) -> tuple[Tensor, list[Kept]]:
    """Run layers and directions one after the other (csrc/ops/lstm.cpp does the same).

    ``run(input, h, c, weights, k)`` runs the k'th, and returns its output and whatever else is to
    be kept of it. Returns the last output, and what was kept of each.
    """
    (h, c), directions = hx, 2 if bidirectional else 1
    kept: list[Kept] = []
    for k in range(0, len(weights), directions):
        if k > 0 and dropout > 0:
            input = torch.dropout(input, dropout, True)
        outputs = []
        for d in range(directions):
            output, of_this = run(input, h[k + d], c[k + d], weights[k + d], k + d)
            outputs.append(output)
            kept.append(of_this)
        input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    return input, kept


def layer_in_steps(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w: LayerWeights,
    cell: Variant,
    order: Steps,
    keep: Callable[[int, tuple[Tensor, ...]], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer in tensor operations, projections included: h' = W_hr (o * tanh(c')).

    (Sak, Senior & Beaufays 2014.) What a step makes, ``keep`` is told: t and (i, f, g, o, c', h').
    """
    batch_sizes, reset, reverse, reset_hx = order
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
            anew = reset[t, :n].unsqueeze(1)
            if reset_hx is None:
                h_t, c_t = h_t.masked_fill(anew, 0), c_t.masked_fill(anew, 0)
            else:
                to = [s if s.dim() == 2 else s[t] for s in reset_hx]
                h_t, c_t = (
                    torch.where(anew, r[:n], s) for r, s in zip(to, (h_t, c_t), strict=True)
                )
        pre = pre_activations(steps[t], h_t, *w[:4])
        activated, h_t, c_t = CELLS[cell.number].forward(pre, c_t, w.unit_weights)
        if w.w_hr is not None:
            h_t = torch.nn.functional.linear(h_t, w.w_hr)
        if keep is not None:
            keep(t, (*activated, c_t, h_t))
        steps[t] = h_t
        # Sequences that have ended, or in reverse not begun, keep their states.
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    return torch.cat(steps).reshape(*input.shape[:-1], h.shape[1]), h, c
