"""Look inside an LSTM: the gates and states of every step, layer and direction."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lstm_ext import _backend, _call, _ops, _options, _recurrence, _step_options, _variants
from lstm_ext._call import States
from lstm_ext._steps import Steps, expand_reset_states, layer_in_steps, run_layers
from lstm_ext.cell import LSTMCell
from lstm_ext.frozen import FrozenLSTM, FrozenLSTMCell
from lstm_ext.functional import LayerWeights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("i", "f", "g", "o", "c", "h")


@dataclass(frozen=True, eq=False, repr=False)
class GateTrace:
    """The gates and states of an LSTM at every step: what :func:`trace_gates` returns.

    Sizes: K is layers times directions (the forward direction of each layer first), L time, N
    batch, H hidden.

    Attributes:
        i: (K, L, N, H), the input gate: how much of g is written. In (0, 1), like f and o.
        f: (K, L, N, H), the forget gate: how much of c is kept.
        g: (K, L, N, H), what is written. In (-1, 1).
        o: (K, L, N, H), the output gate: how much of tanh(c) is shown.
        c: (K, L, N, H), the cell state after the step.
        h: (K, L, N, P), the hidden state after the step, the layer's output. P = H unless the LSTM
            projects.
        lengths: int64 (N), for a packed sequence: beyond them everything is zero. Otherwise None.
        bidirectional: whether every second of K reads the sequence from its end.

    Example:
        >>> trace = lstm_ext.trace_gates(lstm_ext.LSTM(10, 20), torch.randn(30, 4, 10))
        >>> trace
        GateTrace(layers=1, directions=1, L=30, N=4, H=20, float32, cpu)
        >>> trace.half_life().shape
        torch.Size([1, 20])
    """

    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c: Tensor
    h: Tensor
    lengths: Tensor | None = None
    bidirectional: bool = False

    def __repr__(self) -> str:
        K, L, N, H = self.i.shape
        directions = 2 if self.bidirectional else 1
        return (
            f"GateTrace(layers={K // directions}, directions={directions}, L={L}, N={N}, H={H}, "
            f"{str(self.i.dtype).removeprefix('torch.')}, {self.i.device})"
        )

    def select(self, layer: int = 0, direction: int = 0) -> GateTrace:
        """Return the trace of one layer in one direction, K = 1, without a copy.

        Args:
            layer: 0 for the first; -1 for the last.
            direction: 0 for forward, 1 for backward.

        Raises:
            IndexError: there is no such layer or direction.
        """
        directions = 2 if self.bidirectional else 1
        layers = self.i.shape[0] // directions
        if not -layers <= layer < layers:
            raise IndexError(f"layer {layer} of {layers}")
        if not 0 <= direction < directions:
            raise IndexError(f"direction {direction} of {directions}")
        k = layer % layers * directions + direction
        return replace(self._map(lambda t: t[k : k + 1]), bidirectional=False)

    def valid(self) -> Tensor:
        """Return which steps are not padding, bool (L, N)."""
        L, N = self.i.shape[1:3]
        if self.lengths is None:
            return torch.ones(L, N, dtype=torch.bool, device=self.i.device)
        steps = torch.arange(L, device=self.i.device)
        return steps.unsqueeze(1) < self.lengths.to(self.i.device)

    def saturation(self, margin: float = 0.1) -> dict[str, float]:
        """Return which share of i, f, o is near 0 or near 1, and of g and h near -1 or 1.

        Args:
            margin: what counts as near.

        Returns:
            Shares in [0, 1], of all layers, steps and samples together: ``"i < 0.1"``,
            ``"i > 0.9"``, the same of f and o; ``"|g| > 0.9"``, ``"|h| > 0.9"``.
        """
        valid = self.valid()
        near, far = f"{margin:g}", f"{1 - margin:g}"
        shares = {}
        for name in ("i", "f", "o"):
            gate = getattr(self, name)[:, valid]
            shares[f"{name} < {near}"] = (gate < margin).double().mean().item()
            shares[f"{name} > {far}"] = (gate > 1 - margin).double().mean().item()
        for name in ("g", "h"):
            state = getattr(self, name)[:, valid]
            shares[f"|{name}| > {far}"] = (state.abs() > 1 - margin).double().mean().item()
        return shares

    def half_life(self) -> Tensor:
        """Return the number of steps in which a unit forgets half of its c, float64 (K, H).

        At each step a unit keeps the share f of c. With ln f averaged over all steps and samples,
        half is left after ln(1/2) / mean(ln f) steps. Infinite where f is 1.
        """
        logs = self.f[:, self.valid()].detach().double().log().mean(1)
        return math.log(2) / logs.abs()

    def numpy(self) -> dict[str, Any]:
        """Return all fields as NumPy arrays by name; bfloat16, which NumPy lacks, as float32."""
        arrays = {name: _array(tensor) for name, tensor in self._tensors()}
        return {**arrays, "bidirectional": self.bidirectional}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all fields to a compressed .npz file.

        If writing fails, there is no file, or the one that was there before.

        Args:
            path: the file; nothing is appended to its name.
        """
        import numpy as np

        target = Path(path)
        beside = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        try:
            with beside.open("xb") as file:
                np.savez_compressed(file, **self.numpy())
            os.replace(beside, target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GateTrace:
        """Read what :meth:`save` wrote. Nothing in the file is run.

        Args:
            path: the file.

        Raises:
            ValueError: it lacks a field of a trace.
        """
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in (*NAMES, "bidirectional") if name not in arrays]
            if missing:
                raise ValueError(f"{path} is no gate trace: it lacks {', '.join(missing)}")
            tensors = {
                field.name: torch.from_numpy(arrays[field.name])
                for field in fields(cls)
                if field.name in arrays and field.name != "bidirectional"
            }
            return cls(**tensors, bidirectional=bool(arrays["bidirectional"]))

    def plot(self, **options: Any) -> Figure:
        """Draw the two heat maps of :func:`lstm_ext.plot.gates`, whose options these are."""
        from lstm_ext.inspect import plot

        return plot.gates(self, **options)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in (*NAMES, "lengths"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def _map(self, function: Any) -> GateTrace:
        return replace(self, **{name: function(getattr(self, name)) for name in NAMES})


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def trace_gates(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: States | None = None,
    *,
    reset: Tensor | None = None,
    reset_hx: States | None = None,
    differentiable: bool = False,
) -> GateTrace:
    """Run an LSTM and return its gates and states at every step.

    The fused operation computes the gates for backward anyway, so a trace costs little more than
    the forward of a training step. The last layer's ``h`` is the module's own output. Modules whose
    steps are not torch's (docs/variants.md) are traced step by step, in evaluation mode, and there
    it is that output up to rounding.

    Args:
        module: :class:`lstm_ext.LSTM`, ``torch.nn.LSTM``, :class:`lstm_ext.LSTMCell` or
            ``torch.nn.LSTMCell``. Of a frozen module, the original is traced. Hooks are not run,
            but for those of torch.nn.utils that write a weight (weight_norm, spectral_norm, prune).
            A subclass is treated as the class that it derives from. In training mode, dropout
            between layers is drawn again.
        input: as the module takes it: (L, N, I), (N, L, I) with ``batch_first``, (L, I), or packed.
            For a cell: (N, I) or (I) for one step, or (L, N, I) for a sequence.
        hx: h and c before the first step, as the module takes them. Zeros when left out.
        reset: bool, shaped like input without I ((L, N) for packed input). Where it is true, the
            states are zero before that step, or what ``reset_hx`` has. With all true, every step is
            as if it were the first.
        reset_hx: h and c to reset to, as :class:`lstm_ext.LSTM` takes them. For a cell: shaped like
            ``hx``, (H) for all samples, or (L, N, H).
        differentiable: keep the graph, so that a loss of the trace has gradients. The trace is then
            computed in tensor operations, step by step.

    Returns:
        The trace. Time comes first, whatever ``batch_first`` says. A single sequence is a batch of
        one. A packed sequence is padded, and in the order of its lengths.

    Raises:
        TypeError: the module is no LSTM.
        RuntimeError: it was frozen with ``keep_weights=False``.
        ValueError, RuntimeError: what the module raises for the same wrong input.

    Example:
        >>> lstm = torch.nn.LSTM(10, 20, num_layers=2, bidirectional=True)
        >>> trace = lstm_ext.trace_gates(lstm, torch.randn(30, 4, 10))
        >>> trace.f.shape  # layers x directions, time, batch, hidden
        torch.Size([4, 30, 4, 20])
        >>> trace.select(layer=1, direction=0).saturation()["f > 0.9"] <= 1
        True
    """
    if isinstance(module, (FrozenLSTM, FrozenLSTMCell)):
        module = module.find_original("trace_gates: the frozen module")
    own_steps = _has_own_steps(module, reset_hx, differentiable)
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            _options.write_weights(module)
    if isinstance(module, nn.LSTMCell):
        return _trace_cell(module, input, hx, reset, reset_hx, differentiable)
    if not isinstance(module, nn.LSTM):
        raise TypeError(
            f"trace_gates: expected an LSTM or LSTMCell, of torch.nn or lstm_ext, "
            f"got {type(module).__name__}"
        )
    try:
        options = _options.read(module, isinstance(input, PackedSequence))
    except _options.TorchAnswersError as error:
        module(input, hx)  # raises torch's own error, if that is one
        raise ValueError(f"trace_gates: {error}") from None
    ready = _call.prepare(module, options, input, hx, reset, reset_hx)
    if 0 in ready.input.shape:
        module(input, hx)  # raises torch's own error, if that is one
    step_options = _step_options.of_module(module)
    data, sizes = ready.input, ready.batch_sizes
    weights = [_recurrence.couple_gates(w, step_options) for w in options.layers()]

    def run(
        input: Tensor, h: Tensor, c: Tensor, w: LayerWeights, k: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        to = None if ready.reset_hx is None else (ready.reset_hx[0][k], ready.reset_hx[1][k])
        reverse = k % options.directions == 1
        layer = _Run(w, options.cell, sizes, ready.reset, reverse, to)
        if own_steps:
            return layer.in_own_steps(module, k, input, h, c)
        return layer.in_steps(input, h, c) if differentiable else layer(input, h, c)

    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        data, layers = run_layers(
            data, ready.hx, weights, options.bidirectional, options.dropout, run
        )
    lengths = None
    if ready.packed is not None:
        order = ready.packed.unsorted_indices
        _, lengths = pad_packed_sequence(PackedSequence(data, sizes, None, order))
        if order is not None:
            layers = [tuple(t.index_select(1, order) for t in tensors) for tensors in layers]
    i, f, g, o, c, h = (
        parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
        for parts in zip(*layers, strict=True)
    )
    return GateTrace(i, f, g, o, c, h, lengths, options.bidirectional)


def _has_own_steps(module: Any, reset_hx: Any, differentiable: bool) -> bool:
    """Whether a module's steps are not torch's; an error for what is not traced of such."""
    names = _step_options.names(module)
    if not names:
        return False
    given = {
        "differentiable=True": differentiable,
        "reset_hx": reset_hx is not None,
        "the training mode": module.training,
    }
    for name in (name for name, used in given.items() if used):
        raise RuntimeError(f"trace_gates: {name} is not for a module with {', '.join(names)}")
    return _step_options.of_module(module).needs_steps or _recurrence.has_norm(module)


def _trace_cell(
    cell: nn.LSTMCell,
    input: Any,
    hx: Any,
    reset: Tensor | None,
    reset_hx: States | None,
    differentiable: bool,
) -> GateTrace:
    sequence = isinstance(input, Tensor) and input.dim() == 3
    if not sequence or len(input):
        # For its checks, and torch's own words.
        kind: Any = LSTMCell if isinstance(cell, LSTMCell) else nn.LSTMCell
        kind.forward(cell, input[0] if sequence else input, hx)
    if not sequence:
        input = input.unsqueeze(0)
        reset = None if reset is None else reset.unsqueeze(0)
    if input.dim() == 2:
        input = input.unsqueeze(1)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        reset = None if reset is None else reset.unsqueeze(-1)
    if hx is None:
        hx = (input.new_zeros(input.shape[1], cell.hidden_size),) * 2
    if reset_hx is not None:
        h, c = (state.unsqueeze(0) for state in reset_hx)  # of the one layer
        to = expand_reset_states((h, c), reset, (hx[0].unsqueeze(0), hx[1].unsqueeze(0)))
        reset_hx = None if to is None else (to[0][0], to[1][0])
    weights = LayerWeights(
        cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh,
        unit_weights=_variants.unit_weights(cell),
    )  # fmt: skip
    weights = _recurrence.couple_gates(weights, _step_options.of_module(cell))
    run = _Run(weights, _variants.of_module(cell), None, reset, False, reset_hx)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        if _step_options.names(cell):
            _, tensors = run.in_own_steps(cell, 0, input, *hx)
        else:
            _, tensors = run.in_steps(input, *hx) if differentiable else run(input, *hx)
    i, f, g, o, c, h = (t.unsqueeze(0) for t in tensors)
    return GateTrace(i, f, g, o, c, h)


@dataclass
class _Run:
    """One layer in one direction: called, it returns the output, and (i, f, g, o, c, h)."""

    w: LayerWeights
    cell: _variants.Variant
    batch_sizes: Tensor | None
    reset: Tensor | None
    reverse: bool
    reset_hx: States | None = None

    def __call__(self, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run fused."""
        call = _backend.LayerCall(
            rows=h.shape[0],
            hidden=c.shape[1],
            layers=1,
            directions=1,
            packed=self.batch_sizes is not None,
            projects=self.w.w_hr is not None,
            needs_ours=True,
        )
        both = self.w.w_hr is not None and self.reset_hx is not None  # which no kernel has
        if both or _backend.why_layer_by_torch(input, call):
            return self.in_steps(input, h, c)
        arguments = (
            input, h, c, *self.w[:4], self.batch_sizes, self.reset, self.reverse,
            self.w.unit_weights, self.cell.number,
        )  # fmt: skip
        if self.w.w_hr is not None:
            forward = _ops.lstm_layer_projected_forward
            output, _, c_n, gates, c_before, _ = forward(*arguments, self.w.w_hr)
        elif self.reset_hx is None:
            output, _, c_n, gates, c_before = _ops.lstm_layer_forward(*arguments)
        else:
            output, _, c_n, _, gates, c_before = _ops.lstm_layer_states_forward(
                *arguments, *self.reset_hx
            )
        L = len(input) if self.batch_sizes is None else len(self.batch_sizes)
        padded_gates, c_before, padded_h = (
            self._pad(t.reshape(L, -1, t.shape[-1]) if self.batch_sizes is None else t)
            for t in (gates, c_before, output)
        )
        i, f, g, o = padded_gates.chunk(4, -1)
        return output, (i, f, g, o, self._c_after(c_before, c_n, i, f, g), padded_h)

    def _steps(self) -> Steps:
        return Steps(self.batch_sizes, self.reset, self.reverse, self.reset_hx)

    def _c_after(self, before: Tensor, last: Tensor, i: Tensor, f: Tensor, g: Tensor) -> Tensor:
        """Return the c after each step, (L, N, H): what the next one starts from."""
        if len(before) == 0:
            return before
        if self.reverse:
            after = torch.cat([last.unsqueeze(0), before[:-1]])
        else:
            after = torch.cat([before[1:], last.unsqueeze(0)])
        if self.batch_sizes is not None:
            N = last.shape[0]
            lengths = torch.tensor([int((self.batch_sizes > n).sum()) for n in range(N)])
            if not self.reverse:
                after[lengths - 1, torch.arange(N)] = last
            steps = torch.arange(len(after)).unsqueeze(1)
            after[(steps >= lengths).to(after.device)] = 0
        if self.reset is not None:
            # There the next step starts from another.
            none = torch.zeros_like(self.reset[:1])
            parts = [none, self.reset[:-1]] if self.reverse else [self.reset[1:], none]
            after = torch.where(torch.cat(parts).unsqueeze(-1), f * before + i * g, after)
        return after

    def in_steps(self, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run in tensor operations, differentiable any number of times."""
        kept: list[tuple[Tensor, ...]] = [()] * (
            len(input) if self.batch_sizes is None else len(self.batch_sizes)
        )

        def keep(t: int, tensors: tuple[Tensor, ...]) -> None:
            kept[t] = tensors

        output, _, _ = layer_in_steps(input, h, c, self.w, self.cell, self._steps(), keep)
        return output, _stack(kept, h.shape[0])

    def in_own_steps(
        self, module: nn.Module, k: int, input: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the k'th layer of a module whose steps are not torch's, one step after the other."""
        output, kept = _recurrence.trace(module, input, h, c, self.w, k, self._steps())
        return output, _stack(kept, h.shape[0])

    def _pad(self, rows: Tensor) -> Tensor:
        if self.batch_sizes is None:
            return rows
        return pad_packed_sequence(PackedSequence(rows, self.batch_sizes))[0]


def _stack(kept: list[tuple[Tensor, ...]], N: int) -> tuple[Tensor, ...]:
    """Stack the tensors of every step, each of at most N rows, with zeros below them."""
    padded = [tuple(nn.functional.pad(x, (0, 0, 0, N - x.shape[0])) for x in step) for step in kept]
    return tuple(torch.stack(parts) for parts in zip(*padded, strict=True))
