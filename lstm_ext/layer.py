"""The drop-in for :class:`torch.nn.LSTM`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_ext import _ops
from lstm_ext.functional import LayerWeights, lstm

States = tuple[Tensor, Tensor]


class LSTM(nn.RNNBase):
    r"""A multi-layer LSTM whose time loop runs inside one fused operation a layer and direction.

    :class:`torch.nn.LSTM` in every respect but speed: the options, the parameters, their names,
    shapes, order and initialisation, the state dict, ``repr`` and errors are the same; checkpoints
    load both ways, and the same seed gives the same weights. The weights are read anew at every
    call: what is written through ``.data``, by a parametrization or by ``functional_call`` counts.

    It derives from :class:`torch.nn.RNNBase` but not from :class:`torch.nn.LSTM`, at which
    ``torch.compile`` breaks the graph: ``isinstance(module, torch.nn.LSTM)`` is False.

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

    Inputs: ``input``, ``(h_0, c_0)``, ``reset``
        - input: (L, N, I), (N, L, I) if ``batch_first``, (L, I) for a single sequence, or a
          :class:`~torch.nn.utils.rnn.PackedSequence`, sorted or not.
        - h_0, c_0: (D num_layers, N, P) and (D num_layers, N, H), no N for a single sequence;
          zeros when left out.
        - reset: bool, (L, N), or (N, L) if ``batch_first``, or (L): where it is true, h and c are
          zero before that step (before it in the order of computation, in the reverse direction).
          For a packed input: (L, N) in the order of the batch. torch.nn.LSTM has no such option.

    Outputs: ``output, (h_n, c_n)``
        - output: (L, N, D P), (N, L, D P), (L, D P), or a PackedSequence, as the input.
        - h_n, c_n: shaped like h_0 and c_0.

    Raises:
        ValueError, RuntimeError, TypeError: whatever ``torch.nn.LSTM`` raises for the same wrong
            input, in its words.

    Example::

        lstm = lstm_ext.LSTM(10, 20, num_layers=2)
        output, (h, c) = lstm(torch.randn(5, 3, 10))
    """

    def __init__(self, *args: Any, checkpoint_every: int | None = None, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)
        self.checkpoint_every = checkpoint_every

    # torch.nn.LSTM's own checks, and with them its words.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, States]:
        """Run the sequence; see the class."""
        packed = isinstance(input, PackedSequence)
        if reset is None and not torch.compiler.is_compiling():
            out = self._run_packed_directly(input, hx) if packed else self._run_directly(input, hx)
            if out is not None:
                output, h, c = out
                return output, (h, c)
        ready = prepare(self, input, hx, reset)
        output, h, c = self._run(ready.input, ready.hx, ready.batch_sizes, ready.reset)
        return ready.as_asked(output), ready.states_as_asked((h, c))

    def _run_packed_directly(
        self, packed: Any, hx: Any
    ) -> tuple[PackedSequence, Tensor, Tensor] | None:
        input, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        out = self._run_directly(input, hx, batch_sizes)
        if out is None:
            return None
        output, h, c = out
        h, c = self.permute_hidden((h, c), unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h, c

    def _run_directly(
        self, input: Any, hx: Any, batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Run what needs no other check than the direct call's own; None for all else."""
        if (self.training and self.dropout) or self.proj_size or self.checkpoint_every is not None:
            return None
        p = self._parameters
        try:
            weights: tuple[Tensor | None, ...]
            weights = tuple([p[name] for names in self._all_weights for name in names])
        except KeyError:
            return None
        if not self.bias:
            pairs = zip(weights[::2], weights[1::2], strict=True)
            weights = tuple([w for pair in pairs for w in (*pair, None, None)])
        return self._call_directly(_ops.fast_lstm, input, hx, weights, batch_sizes)

    def _call_directly(
        self,
        call: Callable[..., Any],
        input: Any,
        hx: Any,
        weights: tuple[Tensor | None, ...],
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if hx is None:
            h = c = None
        elif type(hx) is tuple and len(hx) == 2:
            h, c = hx
        else:
            return None
        out: tuple[Tensor, Tensor, Tensor] | None = call(
            input, h, c, weights, self.input_size, self.hidden_size, self.bidirectional,
            self.batch_first, batch_sizes,
        )  # fmt: skip
        return out

    def _run(
        self, input: Tensor, hx: States, batch_sizes: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return lstm(
            input,
            hx,
            layer_weights(self),
            bidirectional=self.bidirectional,
            dropout=self.dropout if self.training else 0.0,
            batch_sizes=batch_sizes,
            reset=reset,
            checkpoint_every=self.checkpoint_every,
        )


class Prepared(NamedTuple):
    """What a module was called with, checked, the time first, and how to give results back."""

    module: nn.RNNBase
    input: Tensor  # (L, N, I), or the data (S, I) of a packed sequence
    hx: States  # (K, N, P) and (K, N, H)
    batch_sizes: Tensor | None
    reset: Tensor | None  # (L, N)
    is_batched: bool
    packed: PackedSequence | None

    def as_asked(self, output: Tensor) -> Any:
        """Lay out an output as the module's own is."""
        if self.packed is not None:
            _, batch_sizes, sorted_indices, unsorted_indices = self.packed
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        if self.module.batch_first:
            output = output.transpose(0, 1)
        return output if self.is_batched else output.squeeze(0 if self.module.batch_first else 1)

    def states_as_asked(self, states: States) -> States:
        """Lay out the last states as the module's own are."""
        h, c = states
        if self.packed is not None:
            order = self.packed.unsorted_indices
            return states if order is None else (h.index_select(1, order), c.index_select(1, order))
        return states if self.is_batched else (h.squeeze(1), c.squeeze(1))


def prepare(
    module: Any, input: Tensor | PackedSequence, hx: States | None, reset: Tensor | None
) -> Prepared:
    """Check what an LSTM, ours or torch's, is called with, in torch's words."""
    if isinstance(input, PackedSequence):
        data, batch_sizes, order, _ = input
        if hx is not None:
            hx = module.permute_hidden(hx, order)
            _check_pair(hx)
        else:
            hx = _zero_states(module, data, int(batch_sizes[0]))
        try:
            module.check_forward_args(data, hx, batch_sizes)
        except ValueError as error:  # what torch, which calls no check here, raises in the end
            raise RuntimeError(str(error)) from None
        if reset is not None and order is not None:
            reset = reset.index_select(1, order)
        return Prepared(module, data, hx, batch_sizes, reset, True, input)
    if input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    is_batched = input.dim() == 3
    batch_dim = 0 if module.batch_first else 1
    if not is_batched:
        input = input.unsqueeze(batch_dim)
        reset = None if reset is None else reset.unsqueeze(batch_dim)
    if hx is None:
        hx = _zero_states(module, input, input.size(batch_dim))
    else:
        _check_rank(hx, is_batched)
        if not is_batched:
            hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
    module.check_forward_args(input, hx, None)
    _check_pair(hx)
    if module.batch_first:
        input = input.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    return Prepared(module, input, hx, None, reset, is_batched, None)


def _zero_states(module: nn.RNNBase, input: Tensor, N: int) -> States:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h = input.new_zeros(layers, N, module.proj_size or module.hidden_size)
    return h, input.new_zeros(layers, N, module.hidden_size)


def layer_weights(module: nn.RNNBase) -> list[LayerWeights]:
    """Return an LSTM's weights, layer by layer, in each forward first; nn.LSTM's too."""
    # In the order of _all_weights: w_ih, w_hh, then b_ih and b_hh, then w_hr, where they exist.
    p = module._parameters
    weights = []
    for names in module._all_weights:
        found: list[Any] = [p[name] if name in p else getattr(module, name) for name in names]
        b_ih, b_hh = (found[2], found[3]) if module.bias else (None, None)
        w_hr = found[-1] if module.proj_size else None
        weights.append(LayerWeights(found[0], found[1], b_ih, b_hh, w_hr))
    return weights


def _check_pair(hx: States) -> None:
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")


def _check_rank(hx: States, is_batched: bool) -> None:
    rank, kind = (3, "batched 3-D") if is_batched else (2, "unbatched 2-D")
    if hx[0].dim() != rank or hx[1].dim() != rank:
        raise RuntimeError(
            f"For {kind} input, hx and cx should "
            f"also be {rank}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )
