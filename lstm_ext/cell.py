"""The drop-in for :class:`torch.nn.LSTMCell`."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lstm_ext import _backend, _fx, _ops, _recurrence, _step_options, _variants
from lstm_ext._step_options import Option
from lstm_ext.functional import lstm_cell


class LSTMCell(nn.LSTMCell):
    r"""A fused LSTM cell: a drop-in for :class:`torch.nn.LSTMCell`.

    It computes the same numbers as the base class, and is faster. Everything else is the base
    class's: the parameters with their names, shapes, order and initial values, the state dict,
    ``repr`` and the errors. Checkpoints load in both directions. The same seed gives the same
    weights. The formula is in :func:`lstm_ext.lstm_cell`.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the states.
        bias: whether to add ``bias_ih`` and ``bias_hh``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        peephole: by keyword: whether i and f see c, and o sees c', through ``weight_ci``,
            ``weight_cf`` and ``weight_co`` (H) (:class:`lstm_ext.reference.PeepholeCell`).
            torch.nn.LSTMCell has no such option.
        zoneout_h: by keyword, as all that follow: see :class:`lstm_ext.LSTM`. Masks are drawn at
            each call.
        zoneout_c: the same of c.
        recurrent_dropout: probability of dropout on h before the product.
        recurrent_dropout_per_gate: whether to draw a mask for each of the four gates.
        weight_dropout: probability of dropout on the elements of ``weight_hh``.
        weight_dropout_rows: whether it drops rows instead.
        coupled_gates: whether f = 1 - i.
        cell_clip: what c is clamped to; None for no clamp.

    Inputs: ``input``, ``(h, c)``
        - input: (N, I), or (I) for a single sample. float32, float64, bfloat16 and float16 run in
          the fused kernels; torch's own cell computes the other dtypes.
        - h, c: each (N, H), or (H); zeros when left out.

    Outputs: ``(h', c')``, each shaped like h.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: whatever ``torch.nn.LSTMCell`` raises
            for the same wrong input, in its words.

    Example:
        >>> cell = lstm_ext.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h, c = cell(torch.randn(3, 10), (h, c))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _step_options: dict[str, Any] | None = None
    _layer_norm: tuple[bool, bool, float] | None = None  # of LayerNormLSTMCell
    zoneout_h = Option()
    zoneout_c = Option()
    recurrent_dropout = Option()
    recurrent_dropout_per_gate = Option()
    weight_dropout = Option()
    weight_dropout_rows = Option()
    coupled_gates = Option()
    cell_clip = Option()

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        peephole: bool = False,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_per_gate: bool = False,
        weight_dropout: float = 0.0,
        weight_dropout_rows: bool = False,
        coupled_gates: bool = False,
        cell_clip: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        if peephole:
            _variants.add_parameters(self, _variants.PEEPHOLE, [""])
        self.zoneout_h = zoneout_h
        self.zoneout_c = zoneout_c
        self.recurrent_dropout = recurrent_dropout
        self.recurrent_dropout_per_gate = recurrent_dropout_per_gate
        self.weight_dropout = weight_dropout
        self.weight_dropout_rows = weight_dropout_rows
        self.coupled_gates = coupled_gates
        self.cell_clip = cell_clip
        if peephole and self._step_options:
            names = ", ".join(_step_options.names(self))
            raise ValueError(f"peephole is not for an LSTMCell with {names}")

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute (h', c') from the input and the states."""
        if self._step_options is not None and _step_options.counts(self):
            return self._own_step(input, hx)
        if not torch.compiler.is_compiling():
            out = _ops.fast_cell_module(self.__dict__, input, hx)
            if out is not None:
                return out
            self._log_refusal(input, hx)
            if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
                self._check_torchs_cell("torch.jit is tracing")
                # For tools that know torch's own cell alone.
                why = "torch.nn.LSTMCell.forward: torch.jit is tracing"
                _backend.log_path("LSTMCell", input, why)
                return super().forward(input, hx)
            recorded: tuple[Tensor, Tensor] | None = _fx.record_call(self, input, hx)
            if recorded is not None:
                return recorded
        if isinstance(input, Tensor) and input.dim() in (1, 2):
            if hx is None:
                hx = self._zero_state(input)
            if _is_state_pair(hx):
                return lstm_cell(
                    input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh,
                    unit_weights=_variants.unit_weights(self),
                    variant=_variants.of_module(self).name,
                )  # fmt: skip
        return self._torch_forward(input, hx)

    def _own_step(self, input: Tensor, hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Compute a step that is not torch's."""
        if not torch.compiler.is_compiling():
            out = _ops.fast_cell_with_steps(self.__dict__, input, hx)
            if out is not None:
                return out
            self._log_refusal(input, hx)
            if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
                self._check_torchs_cell("torch.jit is tracing")
            recorded: tuple[Tensor, Tensor] | None = _fx.record_call(self, input, hx)
            if recorded is not None:
                return recorded
        right = isinstance(input, Tensor) and input.dim() in (1, 2)
        if not (right and (hx is None or _is_state_pair(hx))):
            return self._torch_forward(input, hx)
        return _recurrence.run_cell(self, input, hx, _step_options.of_module(self))

    def _check_torchs_cell(self, reason: str) -> None:
        cell = _variants.of_module(self)
        own = _step_options.names(self, in_evaluation=not self.training)
        names = own + [cell.name] * (cell is not _variants.PLAIN)
        if names:
            raise RuntimeError(
                f"{', '.join(names)} is not for torch.nn.LSTMCell, which has to compute this: "
                f"{reason}"
            )

    def _log_refusal(self, input: object, hx: object) -> None:
        """In the verbose mode, say why the direct call left a call to Python."""
        if _backend.is_verbose() and isinstance(input, Tensor):
            reason = self._why_not_direct(input, hx)
            _backend.log_path("LSTMCell", input, f"not the direct call: {reason}")

    def _why_not_direct(self, input: Tensor, hx: object) -> str:
        """Go through what csrc/python/direct_calls.cpp and module_options.cpp ask for."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        reasons = {
            "the cell is not torch's": _variants.of_module(self) is not _variants.PLAIN,
            **_step_options.why_not_direct(self),
            "a single sample": input.dim() == 1,
            "a weight is no parameter": any(n not in self._parameters for n in names),
            "no tuple of two states": hx is not None and not (type(hx) is tuple and len(hx) == 2),
            "torch.func or a mode of torch's is at work": _backend.is_transformed(),
            f"the device is {input.device}": not input.is_cpu,
        }
        return next(
            (reason for reason, holds in reasons.items() if holds),
            "a rank or a type is not the usual one, or something is to be differentiated through "
            "frozen weights",
        )

    def _zero_state(self, input: Tensor) -> tuple[Tensor, Tensor]:
        # Two tensors: one that fills two inputs would stop torch.compile.
        size = (*input.shape[:-1], self.hidden_size)
        h = torch.zeros(size, dtype=input.dtype, device=input.device)
        return h, torch.zeros_like(h)

    def extra_repr(self) -> str:
        """Describe the options as torch.nn.LSTMCell does."""
        return super().extra_repr() + _variants.repr_of(self) + _step_options.repr_of(self)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot compile lstm_ext.LSTMCell; lstm_ext.revert(model) makes its "
            "modules torch.nn's, which it can"
        )

    def _torch_forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Let torch raise its own error; a note is added where that would be obscure."""
        try:
            out = super().forward(input, hx)
            self._check_torchs_cell("the arguments are not those of a cell")
            return out
        except AttributeError as error:
            if sys.version_info >= (3, 11):
                states = hx if isinstance(hx, (tuple, list)) else (hx,)
                kinds = [type(x).__name__ for x in (input, *states)]
                error.add_note(
                    "lstm_ext.LSTMCell takes a Tensor and a pair of Tensors (h, c) or None, "
                    f"got: {', '.join(kinds)}"
                )
            raise


def _is_state_pair(hx: object) -> bool:
    return (
        isinstance(hx, (tuple, list))
        and len(hx) == 2
        and all(isinstance(state, Tensor) and state.dim() in (1, 2) for state in hx)
    )
