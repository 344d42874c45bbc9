"""The drop-in for :class:`torch.nn.LSTM`."""

from __future__ import annotations

from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_ext import _call, _fx, _ops, _ragged, _step_options, _steps, _variants
from lstm_ext._call import States
from lstm_ext._step_options import Option

# What torch.nn.LSTM.forward asks its class for, beside options and parameters.
_CHECKS = (
    "_update_flat_weights",
    "_init_flat_weights",
    "_weights_have_changed",
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
)


class LSTM(nn.LSTM):
    r"""A multi-layer LSTM: a drop-in for :class:`torch.nn.LSTM`.

    The time loop of each layer and direction is one fused operation. It computes the same numbers
    as the base class. Everything else is the base class's: the options, the parameters with their
    names, shapes, order and initial values, the state dict, ``repr`` and the errors. Checkpoints
    load in both directions. The same seed gives the same weights.

    The weights are read at every call. A call therefore sees what was written through ``.data``,
    into ``_flat_weights``, by a parametrization or by ``functional_call``. float32, float64,
    bfloat16 and float16 run in the fused kernels on the CPU (the 16-bit types are summed in
    float32); input, states and weights have one dtype and one device, as for torch.nn.LSTM.

    ``torch.compile`` breaks the graph at every ``torch.nn.LSTM``, and at this class too. The layer
    then runs as it does without the compiler. ``torch._dynamo.config.allow_rnn = True`` makes the
    compiler take both into the graph.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the states.
        num_layers: layers one above the other.
        bias: whether to add ``bias_ih`` and ``bias_hh``.
        batch_first: whether input and output are (N, L, ..) instead of (L, N, ..).
        dropout: probability of dropout after each layer but the last, in training.
        bidirectional: whether a second LSTM reads the sequence from its end (D = 2, else D = 1).
        proj_size: if positive, h is projected to that many features P (else P = H).
        device: device of the parameters.
        dtype: dtype of the parameters.
        checkpoint_every: by keyword: see :func:`lstm_ext.lstm`. torch.nn.LSTM has no such option.
        peephole: by keyword: whether i and f see c, and o sees c', through ``weight_ci_l0``,
            ``weight_cf_l0`` and ``weight_co_l0`` (H), and so on for each layer and direction
            (:class:`lstm_ext.reference.PeepholeCell`). torch.nn.LSTM has no such option.
        zoneout_h: by keyword, as all that follow; torch.nn.LSTM has none of them, and
            docs/variants.md says which is for what. Probability that a unit keeps its h instead of
            the new one (Krueger et al. 2017). Drawn for each unit and step in training. In
            evaluation, h is the mean of both.
        zoneout_c: the same of c.
        recurrent_dropout: probability of dropout on h before the product with ``weight_hh``, in
            training; one mask for all steps of a sequence (Gal & Ghahramani 2016).
        recurrent_dropout_per_step: whether to draw that mask for each step.
        recurrent_dropout_per_gate: whether to draw a mask for each of the four gates.
        input_dropout: probability of dropout on the input's features, in training; one mask for
            all steps of a sequence.
        variational_dropout: whether ``dropout`` between the layers has one mask for all steps too.
        weight_dropout: probability of dropout on the elements of ``weight_hh``, in training; one
            mask for each call (Wan et al. 2013, Merity et al. 2018).
        weight_dropout_rows: whether it drops rows of ``weight_hh`` instead.
        coupled_gates: whether the forget gate is f = 1 - i (Greff et al. 2017). The parameters keep
            torch's shapes, as in ONNX; the rows of f in them are not used.
        cell_clip: c is clamped to [-cell_clip, cell_clip] at each step; None for no clamp.
        projection_clip: the same of h after its projection; needs ``proj_size``.

    Inputs: ``input``, ``(h_0, c_0)``, ``reset``, ``reset_hx``, ``return_cell_states``
        - input: (L, N, I), (N, L, I) if ``batch_first``, (L, I) for a single sequence, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, sorted or not. Or a nested tensor of the
          layout ``torch.jagged``, (N, j, I), whatever ``batch_first`` says. Its sequences need no
          padding and no sorting, and may have length 0. torch.nn.LSTM takes no nested tensor.
        - h_0, c_0: (D num_layers, N, P) and (D num_layers, N, H), no N for a single sequence;
          zeros when left out.
        - reset: bool, (L, N), or (N, L) if ``batch_first``, or (L). Where it is true, h and c are
          set to zero before that step. "Before" means in the order of computation, also in the
          reverse direction. For a packed input it is (L, N) in the order of the batch. For a nested
          input it is nested, (N, j). torch.nn.LSTM has no such option.
        - reset_hx: h and c to reset to in place of zero, shaped like h_0 and c_0. Without N or with
          N = 1, they are the same for all sequences, as a learned initial state is. Or one for each
          step, (D num_layers, L, N, P) and (D num_layers, L, N, H), of which those of the steps of
          ``reset`` are read. They have gradients. torch.nn.LSTM has no such option.
        - return_cell_states: bool; whether to return the c after every step. torch.nn.LSTM has no
          such option.

    Outputs: ``output, (h_n, c_n)``; with ``return_cell_states``, ``output, (h_n, c_n), cells``
        - output: (L, N, D P), (N, L, D P), (L, D P), a PackedSequence, or nested, (N, j, D P), as
          the input.
        - h_n, c_n: shaped like h_0 and c_0. Those of a sequence of length 0 are its h_0 and c_0.
        - cells: the c of the last layer after every step, as output has its h; laid out like it,
          with D H features.

    Raises:
        ValueError, RuntimeError, TypeError: whatever ``torch.nn.LSTM`` raises for the same wrong
            input, in its words. ValueError for a nested one of another layout or shape, or with
            a reset mask that does not fit it; and for ``reset_hx`` without ``reset``. RuntimeError
            for a nested input, or a frozen module, with ``reset_hx`` or ``return_cell_states``.

    Example:
        >>> lstm = lstm_ext.LSTM(10, 20, num_layers=2)
        >>> x = torch.randn(5, 3, 10)  # time, batch, features
        >>> output, (h, c) = lstm(x)
        >>> output.shape, h.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))

        A mask says where the states start from zero again:

        >>> reset = torch.zeros(5, 3, dtype=torch.bool)
        >>> reset[2, 1] = True  # the second sequence, before its third step
        >>> output, (h, c) = lstm(x, reset=reset)
    """

    # A default of the class: modules that were pickled, or converted, before have it too.
    checkpoint_every: int | None = None
    _has_own_checks = False
    _step_options: dict[str, Any] | None = None
    _layer_norm: tuple[bool, bool, float] | None = None  # of LayerNormLSTM
    zoneout_h = Option()
    zoneout_c = Option()
    recurrent_dropout = Option()
    recurrent_dropout_per_step = Option()
    recurrent_dropout_per_gate = Option()
    input_dropout = Option()
    variational_dropout = Option()
    weight_dropout = Option()
    weight_dropout_rows = Option()
    coupled_gates = Option()
    cell_clip = Option()
    projection_clip = Option()
    _direct = staticmethod(_ops.fast_lstm_module)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        checkpoint_every: int | None = None,
        peephole: bool = False,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_per_step: bool = False,
        recurrent_dropout_per_gate: bool = False,
        input_dropout: float = 0.0,
        variational_dropout: bool = False,
        weight_dropout: float = 0.0,
        weight_dropout_rows: bool = False,
        coupled_gates: bool = False,
        cell_clip: float | None = None,
        projection_clip: float | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype,
        )  # fmt: skip
        if checkpoint_every is not None:
            self.checkpoint_every = checkpoint_every
        if peephole:
            _variants.add_parameters(self, _variants.PEEPHOLE, _steps.layer_suffixes(self))
        self.zoneout_h = zoneout_h
        self.zoneout_c = zoneout_c
        self.recurrent_dropout = recurrent_dropout
        self.recurrent_dropout_per_step = recurrent_dropout_per_step
        self.recurrent_dropout_per_gate = recurrent_dropout_per_gate
        self.input_dropout = input_dropout
        self.variational_dropout = variational_dropout
        self.weight_dropout = weight_dropout
        self.weight_dropout_rows = weight_dropout_rows
        self.coupled_gates = coupled_gates
        self.cell_clip = cell_clip
        self.projection_clip = projection_clip
        if projection_clip and proj_size == 0:
            raise ValueError("projection_clip is for an LSTM with proj_size")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._has_own_checks = any(
            getattr(cls, name) is not getattr(nn.LSTM, name) for name in _CHECKS
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, States]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: States | None = None,
        *,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[PackedSequence, States]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[Tensor, States, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: States | None = None,
        *,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[PackedSequence, States, PackedSequence]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        return_cell_states: bool,
    ) -> tuple[Any, ...]: ...

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Run the sequence; see the class."""
        own_states = return_cell_states or reset_hx is not None
        if (
            reset is None
            and not own_states
            and not self._has_own_checks
            and not torch.compiler.is_compiling()
        ):
            torchs_steps = self._step_options is None or not _step_options.counts(self)
            direct = self._direct if torchs_steps else _ops.fast_lstm_with_steps
            # Here, and not in a method: TorchDynamo, which leaves this function alone, would look
            # into the method at every call.
            out: Any
            if type(input) is not PackedSequence:
                try:
                    out = direct(self.__dict__, input, hx, None)
                except RuntimeError:  # of torch's older nested tensors, which have no sizes
                    if not (isinstance(input, Tensor) and input.is_nested):
                        raise
                    out = None
            else:
                out = self._run_packed_directly(direct, input, hx)
            if out is not None:
                return out
        if not torch.compiler.is_compiling():
            recorded = _fx.record_call(
                self, input, hx, reset=reset, reset_hx=reset_hx,
                return_cell_states=return_cell_states,
            )  # fmt: skip
            if recorded is not None:
                return recorded
        if isinstance(input, Tensor) and input.is_nested:
            if own_states:
                raise RuntimeError(
                    "LSTM: reset_hx and return_cell_states are not for a nested input; "
                    "pack_sequence makes a packed one of its sequences"
                )
            return _ragged.run_nested(self, input, hx, reset, self._run_packed)
        return self._run(input, hx, reset, reset_hx, return_cell_states)

    def _run_packed_directly(
        self, direct: Any, input: PackedSequence, hx: Any
    ) -> tuple[PackedSequence, States] | None:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        out = direct(self.__dict__, data, hx, batch_sizes)
        if out is None:
            return None
        output, states = out
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(states, unsorted_indices)

    def _run_packed(
        self, input: PackedSequence, hx: States | None, reset: Tensor | None
    ) -> tuple[PackedSequence, States]:
        # Not by self.forward, which may be a subclass's, that has called this one.
        return LSTM.forward(self, input, hx, reset=reset)

    def _run(
        self,
        input: Any,
        hx: Any,
        reset: Tensor | None,
        reset_hx: States | None,
        return_cell_states: bool,
    ) -> tuple[Any, ...]:
        return _call.run(self, input, hx, reset, reset_hx, return_cell_states)

    def extra_repr(self) -> str:
        """Describe the options as torch.nn.LSTM does."""
        return super().extra_repr() + _variants.repr_of(self) + _step_options.repr_of(self)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot compile lstm_ext.LSTM; lstm_ext.revert(model) makes its "
            "modules torch.nn's, which it can"
        )
