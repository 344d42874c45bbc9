"""A layer step by step in tensor operations, and layers one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
        if k > 0 and dropout != 0:  # not > 0: torch refuses what is no probability
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
            # Under autocast that has the lower precision, and c has its own, as torch's layer.
            c_t = c_t.to(c.dtype)
        if keep is not None:
            keep(t, (*activated, c_t, h_t))
        steps[t] = h_t
        # Sequences that have ended, or in reverse not begun, keep their states.
        h = torch.cat([h_t, h[n:].to(h_t.dtype)])
        c = torch.cat([c_t, c[n:].to(c_t.dtype)])
    return torch.cat(steps).reshape(*input.shape[:-1], h.shape[1]), h, c


def expand_reset_states(
    reset_hx: tuple[Tensor, Tensor] | None, reset: Tensor | None, hx: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return the states of resets for each sequence, or an error in torch's words.

    Args:
        reset_hx: h (K, N, P) and c (K, N, H), for N also 1 or nothing; or (K, L, N, P) and
            (K, L, N, H), for N also 1; or None.
        reset: the mask of the same call, (L, N).
        hx: h (K, N, P) and c (K, N, H).

    Returns:
        h and c, each with N in full, and with L if it was given.
    """
    if reset_hx is None:
        return None
    if reset is None:
        raise ValueError("reset_hx is for a call with reset, which says where")
    are_two = isinstance(reset_hx, (tuple, list)) and len(reset_hx) == 2
    if not (are_two and all(isinstance(state, Tensor) for state in reset_hx)):
        raise RuntimeError("lstm expects two hidden states in reset_hx")
    L = reset.shape[0]
    h, c = (_expand_states(k, *pair, L) for k, pair in enumerate(zip(reset_hx, hx, strict=True)))
    return h, c


def _expand_states(k: int, state: Tensor, like: Tensor, L: int) -> Tensor:
    layers, N, features = like.shape
    whole = state.unsqueeze(1) if state.dim() == 2 else state
    steps = (L,) if whole.dim() == 4 else ()
    if whole.shape not in [(layers, *steps, n, features) for n in (1, N)]:
        raise RuntimeError(
            f"Expected reset_hx[{k}] size {(layers, N, features)}, or for each step "
            f"{(layers, L, N, features)}, or with one for all sequences in place of {N}, "
            f"got {list(state.shape)}"
        )
    autocast = torch._C._is_any_autocast_enabled()
    if state.device != like.device or (state.dtype != like.dtype and not autocast):
        raise RuntimeError(
            f"Expected reset_hx[{k}] to have the states' dtype {like.dtype} and device "
            f"{like.device}, got {state.dtype} and {state.device}"
        )
    return whole.expand(layers, *steps, N, features)


def layer_suffixes(options: Any) -> list[str]:
    """Return what the parameters' names end in, for each layer and direction of an LSTM."""
    ends = ("", "_reverse") if options.bidirectional else ("",)
    return [f"_l{k}{end}" for k in range(options.num_layers) for end in ends]
