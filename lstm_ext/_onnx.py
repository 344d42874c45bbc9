"""The operators in ONNX: what ``torch.onnx.export(dynamo=True)`` makes of them.

The exporter first decomposes what it cannot translate, by torch's table of decompositions: the ones
registered here write the ONNX operator into the graph themselves. With :func:`onnx_translations` it
can translate our operators, and leaves them whole until then. Either way, a layer in one direction
becomes one ONNX LSTM, which leaves length and batch open.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from lstm_ext import _ops, _variants, reference

if TYPE_CHECKING:
    from lstm_ext.functional import LayerWeights

Translation = Callable[..., Any]


def _refuse(what: str, instead: str) -> NoReturn:
    raise RuntimeError(f"ONNX's LSTM has no {what}: {instead}")


def _check(variant: int, batch_sizes: object, reset: object) -> None:
    if variant not in _PEEPHOLES:
        _refuse("such cell", "export a model with torch's cell")
    if batch_sizes is not None:
        _refuse("packed sequences", "export the model with a padded tensor as its input")
    if reset is not None:
        _refuse("reset", "export a loop over an lstm_ext.LSTMCell, which zeroes the states itself")


def refuse_states() -> NoReturn:
    """Raise the error for reset_hx and return_cell_states."""
    _refuse(
        "reset_hx and no cell states of every step",
        "export a loop over an lstm_ext.LSTMCell, which has both",
    )


# Which cells it has, by the operators' variant: of their weights of units, in which order ONNX has
# them (its P: of the gates i, o, f).
_PEEPHOLES: dict[int, tuple[int, ...]] = {
    _variants.PLAIN.number: (),
    _variants.PEEPHOLE.number: (0, 2, 1),
}


def _refuse_packed_weights(*_: Any, **__: Any) -> NoReturn:
    _refuse("packed weights", "call lstm_ext.unfreeze(model) before the export")


# Without a table of translations.


def _decomposition(
    name: str, rule: Callable[[Any], Any]
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register what the ONNX exporter does with an operator.

    Where a decomposition stands, fake tensors use it in place of the operator's fake rule, unless
    they find a rule in the table "meta".
    """
    op, make = getattr(torch.ops.lstm_ext, name).default, _ops.arguments_of(name)

    def fake(*arguments: Any) -> Any:
        _ops.keep_whole(f"lstm_ext::{name}")
        return rule(make(*arguments))

    def register(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        register_decomposition(op, type="meta")(fake)
        register_decomposition(op)(lambda *arguments: function(make(*arguments)))
        return function

    return register


@_decomposition("lstm_cell", _ops.cell_states)
def _decompose_cell(a: Any) -> tuple[Tensor, Tensor]:
    weights = a.w_ih, a.w_hh, a.b_ih, a.b_hh, a.unit_weights
    return reference.lstm_cell(a.input, (a.hx, a.cx), *weights, a.variant)


@_decomposition("lstm_layer", _ops.layer_states)
def _decompose_layer(a: Any) -> Any:
    if not torch.onnx.is_in_onnx_export():
        return NotImplemented  # which leaves the operator as it is
    _check(a.variant, a.batch_sizes, a.reset)
    (L, N), H = a.input.shape[:2], a.w_hh.shape[1]
    biases = [_onnx_order(b) for b in (a.b_ih, a.b_hh) if b is not None]
    if len(biases) == 1:
        biases.append(torch.zeros_like(biases[0]))  # ONNX adds two, or none
    bias = torch.cat(biases, 1) if biases else None
    weights = _onnx_order(a.w_ih), _onnx_order(a.w_hh)
    rows = [a.unit_weights[k] for k in _PEEPHOLES[a.variant]]
    peepholes = [torch.cat(rows).unsqueeze(0)] if rows else []
    output, h, c = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (a.input, *weights, bias, None, a.hx[None], a.cx[None], *peepholes),
        {"hidden_size": H, "direction": "reverse" if a.reverse else "forward"},
        dtypes=[a.input.dtype] * 3,
        shapes=[(L, 1, N, H), (1, N, H), (1, N, H)],
    )
    # torch's stand-in for an ONNX operator gives tensors on the CPU.
    return tuple(t.to(a.input.device) for t in (output.squeeze(1), h.squeeze(0), c.squeeze(0)))


def _onnx_order(weight: Tensor) -> Tensor:
    """From gates i, f, g, o to i, o, f, g, with a dimension in front for the direction."""
    H = weight.shape[0] // 4
    # Slices, not chunks: those the exporter computes once, in the file.
    return torch.cat([weight[:H], weight[3 * H :], weight[H : 3 * H]]).unsqueeze(0)


@_decomposition("lstm_layer_projected", _ops.layer_states)
def _decompose_projected_layer(a: Any) -> Any:
    if not torch.onnx.is_in_onnx_export():
        return NotImplemented
    _check(a.variant, a.batch_sizes, a.reset)
    h, c, w_ih, w_hh, b_ih, b_hh = _without_projection(
        a.hx, a.cx, a.w_ih, a.w_hh, a.b_ih, a.b_hh, a.w_hr
    )
    units, P = a.unit_weights, a.hx.shape[1]
    units = None if units is None else torch.nn.functional.pad(units, (0, P))
    make = _ops.arguments_of("lstm_layer")
    r, r_n, c_n = _decompose_layer(
        make(a.input, h, c, w_ih, w_hh, b_ih, b_hh, None, None, a.reverse, units, a.variant)
    )
    H = a.cx.shape[1]
    return r[..., :H] @ a.w_hr.mT, r_n[:, :H] @ a.w_hr.mT, c_n[:, :H]


@_decomposition("lstm_layer_packed", _ops.layer_states)
def _decompose_packed_layer(_: Any) -> Any:
    return _refuse_packed_weights() if torch.onnx.is_in_onnx_export() else NotImplemented


@_decomposition("lstm_layer_states", _ops.states_of_all_steps)
def _decompose_layer_states(_: Any) -> Any:
    # Where it was captured by the compiler, after lstm() itself had refused.
    return refuse_states() if torch.onnx.is_in_onnx_export() else NotImplemented


@_decomposition("lstm_recurrence", _ops.recurrence_states)
def _decompose_recurrence(a: Any) -> Any:
    """Make it ONNX's Scan, with length and batch open."""
    if not torch.onnx.is_in_onnx_export():
        return NotImplemented
    _check(_variants.PLAIN.number, a.batch_sizes, a.reset)
    if any(mask is not None and mask.dim() > 1 for mask in (a.update_h, a.update_c, a.dropout_h)):
        raise RuntimeError(
            "an LSTM with zoneout or recurrent dropout goes to ONNX in evaluation mode: "
            "call .eval() first"
        )

    scan: Any = importlib.import_module("torch._higher_order_ops.scan").scan
    (h, c), output = scan(_recurrence_step(a), (a.hx, a.cx), a.gates_x, reverse=a.reverse)
    return output, h, c


def _recurrence_step(a: Any) -> Callable[[tuple[Tensor, Tensor], Tensor], Any]:
    """Return a step (csrc/ops/recurrence.h), of operations that leave the batch open in ONNX."""
    # Each by itself: of a tuple that holds them, the exporter would fix the sizes.
    w_hh, bias, norm, norm_c, bias_c, w_hr = a.w_hh, a.bias, a.norm, a.norm_c, a.bias_c, a.w_hr
    dropout_h, eps, joint, carry = a.dropout_h, a.eps, a.norm_joint, a.carry_norm

    # Nor has a step room for constants: these come from outside.
    def both(update: Tensor | None) -> tuple[Tensor, Tensor] | None:
        return None if update is None else (update, 1 - update)

    def limits(clip: float) -> tuple[Tensor, Tensor] | None:
        return (a.cx.new_full((1,), -clip), a.cx.new_full((1,), clip)) if clip > 0 else None

    update_h, update_c = both(a.update_h), both(a.update_c)
    limits_c, limits_h = limits(a.cell_clip), limits(a.projection_clip)

    # A mask of h, or one for each gate.
    by_gate = dropout_h is not None and dropout_h.shape[0] != a.hx.shape[1]

    def product(h: Tensor) -> Tensor:
        if dropout_h is None or not by_gate:
            return torch.mm(h if dropout_h is None else h * dropout_h, w_hh.t())
        of_gate = zip(dropout_h.chunk(4), w_hh.chunk(4), strict=True)
        return torch.cat([torch.mm(h * mask, w.t()) for mask, w in of_gate], -1)

    def normalized(v: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        return torch.nn.functional.layer_norm(v, v.shape[-1:], weight, shift, eps)

    def clipped(v: Tensor, limits: tuple[Tensor, Tensor] | None) -> Tensor:
        return v if limits is None else torch.minimum(torch.maximum(v, limits[0]), limits[1])

    def updated(update: tuple[Tensor, Tensor] | None, new: Tensor, old: Tensor) -> Tensor:
        return new if update is None else update[0] * new + update[1] * old

    def step(states: tuple[Tensor, Tensor], gates_x: Tensor) -> Any:
        h, c = states
        z = product(h)
        if norm is None:
            pre = gates_x + z
        elif joint:
            pre = normalized(gates_x + z, norm)
        else:
            pre = gates_x + normalized(z, norm)
        if bias is not None:
            pre = pre + bias
        i, f, g, o = pre.chunk(4, -1)
        c_next = clipped(f.sigmoid() * c + i.sigmoid() * g.tanh(), limits_c)
        shown = c_next if norm_c is None else normalized(c_next, norm_c, bias_c)
        h_next = o.sigmoid() * shown.tanh()
        if w_hr is not None:
            h_next = clipped(torch.mm(h_next, w_hr.t()), limits_h)
        h_next = updated(update_h, h_next, h)
        c_next = updated(update_c, shown if carry else c_next, c)
        return (h_next, c_next), h_next + 0  # no result twice

    return step


# While the model is captured.


def exporting() -> bool:
    """Whether ``torch.onnx.export`` is capturing the model that asks."""
    return (
        torch.compiler.is_exporting()
        and not torch.compiler.is_dynamo_compiling()
        and torch.onnx.is_in_onnx_export()
    )


def projected_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[LayerWeights],
    bidirectional: bool,
    dropout: float,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM with projections in the operator without, for ONNX has none.

    As :func:`_without_projection` says; the projection comes after.
    """
    (h, c), directions = hx, 2 if bidirectional else 1
    H = c.shape[2]
    h_n, c_n = [], []
    wide: list[tuple[Tensor | None, ...]] = []
    for k, w in enumerate(weights):
        assert w.w_hr is not None
        wide.append(_without_projection(h[k], c[k], *w[:4], w.w_hr))
    h, c = (torch.stack([states[k] for states in wide]) for k in (0, 1))  # type: ignore[misc]
    for k in range(0, len(weights), directions):
        flat: list[Tensor | None] = []
        pair = weights[k : k + directions]
        for of_layer in wide[k : k + directions]:
            flat += of_layer[2:]
        if k > 0 and dropout != 0:
            input = torch.dropout(input, dropout, True)
        states = h[k : k + directions], c[k : k + directions]
        r, r_n, c_k = _ops.lstm(input, *states, flat, bidirectional, 0.0, batch_sizes, reset)
        parts = r.chunk(directions, -1)
        projections = [w.w_hr.mT for w in pair if w.w_hr is not None]
        input = torch.cat([x[..., :H] @ p for x, p in zip(parts, projections, strict=True)], -1)
        h_n += [x[:, :H] @ p for x, p in zip(r_n, projections, strict=True)]
        c_n.append(c_k[..., :H])
    return input, torch.stack(h_n), torch.cat(c_n)


def _without_projection(
    h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return states (N, H + P) and weights of a layer without a projection that does the same.

    With r = o * tanh(c), of which h = W_hr r, the recurrent product is (W_hh W_hr) r at every step
    but the first, which has W_hh h_0. For that one there are P more units: their first state is
    h_0, and with no weights towards them they are zero from then on.
    """
    H, P = c.shape[1], h.shape[1]

    def wider(weight: Tensor) -> Tensor:
        rows = weight.reshape(4, H, -1)
        return torch.nn.functional.pad(rows, (0, 0, 0, P)).flatten(0, 1)

    biases = [None if b is None else wider(b).flatten() for b in (b_ih, b_hh)]
    return (
        torch.cat([torch.zeros_like(c), h], 1),
        torch.cat([c, torch.zeros_like(h)], 1),
        wider(w_ih),
        wider(torch.cat([w_hh @ w_hr, w_hh], 1)),
        biases[0],
        biases[1],
    )


# With a table.


def onnx_translations() -> dict[Any, Translation]:
    """Return translations of lstm_ext's operators for ``torch.onnx.export(dynamo=True)``.

    The exporter needs them only when it is called with ``verify=True``. Without them, the program
    that it keeps beside the ONNX model (``ONNXProgram.exported_program``) contains ONNX operators,
    which torch cannot compute. Each layer and direction becomes one ONNX LSTM. A cell becomes an
    ONNX LSTM of a single step. Length and batch stay open where ``dynamic_shapes`` says so.

    Returns:
        The argument ``custom_translation_table`` of ``torch.onnx.export``: an onnxscript function
        for each operator. For what ONNX's LSTM lacks (packed sequences, ``reset``, packed weights)
        the function raises an error that says so.

    Raises:
        ImportError: onnxscript is not installed.

    Example:
        >>> torch.ops.lstm_ext.lstm_layer.default in lstm_ext.onnx_translations()
        True
        >>> program = torch.onnx.export(  # doctest: +SKIP
        ...     lstm_ext.LSTM(10, 20).eval(),
        ...     (torch.randn(6, 3, 10),),
        ...     dynamo=True,
        ...     dynamic_shapes=({0: "length", 1: "batch"},),
        ...     custom_translation_table=lstm_ext.onnx_translations(),
        ... )
    """
    try:
        op: Any = importlib.import_module("onnxscript").opset18
    except ImportError as error:
        raise ImportError(
            "lstm_ext.onnx_translations needs onnxscript, as torch.onnx.export does: "
            "pip install onnxscript"
        ) from error

    def onnx_order(weight: Any) -> Any:
        H = weight.shape[0] // 4
        i, o, fg = (
            op.Slice(weight, [a], [b], [0]) for a, b in ((0, H), (3 * H, 4 * H), (H, 3 * H))
        )
        return op.Unsqueeze(op.Concat(i, o, fg, axis=0), [0])

    def peepholes(unit_weights: Any, variant: int) -> list[Any]:
        rows = [op.Slice(unit_weights, [k], [k + 1], [0]) for k in _PEEPHOLES[variant]]
        return [op.Concat(*rows, axis=1)] if rows else []

    # The exporter reads these functions' signatures.
    def lstm_layer(
        input: Any, hx: Any, cx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any,
        batch_sizes: Any, reset: Any, reverse: Any, unit_weights: Any = None, variant: Any = 0,
    ) -> Any:  # fmt: skip
        _check(variant, batch_sizes, reset)
        biases = [onnx_order(b) for b in (b_ih, b_hh) if b is not None]
        if len(biases) == 1:
            biases.append(op.Sub(biases[0], biases[0]))
        output, h, c = op.LSTM(
            input,
            onnx_order(w_ih),
            onnx_order(w_hh),
            op.Concat(*biases, axis=1) if biases else None,
            None,  # lengths
            op.Unsqueeze(hx, [0]),
            op.Unsqueeze(cx, [0]),
            *peepholes(unit_weights, variant),
            direction="reverse" if reverse else "forward",
            hidden_size=w_hh.shape[1],
        )
        return op.Squeeze(output, [1]), op.Squeeze(h, [0]), op.Squeeze(c, [0])

    def lstm_cell(
        input: Any, hx: Any, cx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None,
        unit_weights: Any = None, variant: Any = 0,
    ) -> Any:  # fmt: skip
        step, weights = op.Unsqueeze(input, [0]), (w_ih, w_hh, b_ih, b_hh)
        cell = unit_weights, variant
        return lstm_layer(step, hx, cx, *weights, None, None, False, *cell)[1:]

    # lstm and lstm_packed are made of the operators of one layer, into which they are decomposed.
    return {
        _ops.lstm_cell.default: lstm_cell,
        _ops.lstm_layer.default: lstm_layer,
        _ops.lstm_layer_packed.default: _refuse_packed_weights,
    }
