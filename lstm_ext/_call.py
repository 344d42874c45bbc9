"""One way from a module into the layer's operators.

What a module is called with is read once, here, as :class:`torch.nn.LSTM` reads it: what it is
built with (_options.py), the input and the states. The module, the frozen module and the trace use
nothing else; csrc/python/direct_calls.cpp reads the same for the most usual calls, and hands over
the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_ext import _backend, _ops, _recurrence, _step_options, _variants
from lstm_ext._options import FEWER_LAYERS, Options, TorchAnswersError, read
from lstm_ext._steps import expand_reset_states
from lstm_ext.functional import lstm

States = tuple[Tensor, Tensor]


class Prepared(NamedTuple):
    """What a module was called with, checked, the time first, and how to give results back."""

    options: Options
    input: Tensor  # (L, N, I), or the data (S, I) of a packed sequence
    hx: States  # (K, N, P) and (K, N, H)
    batch_sizes: Tensor | None
    reset: Tensor | None  # (L, N)
    is_batched: bool
    packed: PackedSequence | None
    reset_hx: States | None = None  # like hx

    def as_asked(self, output: Tensor) -> Any:
        """Lay out an output as the module's own is."""
        if self.packed is not None:
            _, batch_sizes, sorted_indices, unsorted_indices = self.packed
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        if self.options.batch_first:
            output = output.transpose(0, 1)
        return output if self.is_batched else output.squeeze(0 if self.options.batch_first else 1)

    def states_as_asked(self, states: States) -> States:
        """Lay out the last states as the module's own are."""
        h, c = states
        if self.packed is not None:
            order = self.packed.unsorted_indices
            return states if order is None else (h.index_select(1, order), c.index_select(1, order))
        return states if self.is_batched else (h.squeeze(1), c.squeeze(1))


def prepare(
    module: Any,
    options: Options,
    input: Tensor | PackedSequence,
    hx: States | None,
    reset: Tensor | None,
    reset_hx: Any = None,
) -> Prepared:
    """Check what an LSTM, ours or torch's, is called with, in torch's words."""
    if isinstance(input, PackedSequence):
        return _prepare_packed(module, options, input, hx, reset, reset_hx)
    if input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    if input.is_nested:
        raise ValueError(
            "LSTM: a nested input is for a call of lstm_ext.LSTM, and for nothing else"
        )
    is_batched = input.dim() == 3
    batch_dim = 0 if options.batch_first else 1
    if not is_batched:
        input = input.unsqueeze(batch_dim)
        reset = None if reset is None else reset.unsqueeze(batch_dim)
        if isinstance(reset_hx, (tuple, list)):
            reset_hx = tuple(s.unsqueeze(-2) if isinstance(s, Tensor) else s for s in reset_hx)
    if hx is None:
        hx = _zero_states(options, input, input.size(batch_dim))
    else:
        _check_rank(hx, is_batched)
        _check_tuple(hx)
        if not is_batched:
            hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
    _check_arguments(module, options, input, hx, None)
    _check_pair(hx)
    if options.batch_first:
        input = input.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    input, hx = _as_kept(input, hx)
    reset_hx = expand_reset_states(reset_hx, reset, hx)
    return Prepared(options, input, hx, None, reset, is_batched, None, reset_hx)


def _as_kept(input: Tensor, hx: States) -> tuple[Tensor, States]:
    """Copy what is not contiguous, as torch does: a user may then change it before backward.

    (csrc/python/direct_calls.cpp does the same.)
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return input, hx
    input, h, c = (t.contiguous() if t.layout == torch.strided else t for t in (input, *hx))
    return input, (h, c)


def _prepare_packed(
    module: Any,
    options: Options,
    packed: PackedSequence,
    hx: States | None,
    reset: Tensor | None,
    reset_hx: States | None,
) -> Prepared:
    data, batch_sizes, order, _ = packed
    # torch does not look at the module's own input_size here.
    options = options._replace(input_size=options.weights[0].shape[-1])
    if hx is None:
        # A trace would keep a number.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        N: Any = batch_sizes[0] if tracing else int(batch_sizes[0])
        hx = _zero_states(options, data, N)
    else:
        hx = module.permute_hidden(hx, order)
        _check_tuple(hx)
        if not all(isinstance(state, Tensor) for state in hx):
            kinds = ", ".join(type(state).__name__ for state in hx)
            raise TypeError(f"lstm expects tensors as hidden states, got: {kinds}")
        _check_pair(hx)
    if torch.compiler.is_compiling():
        # A size is read from batch_sizes once at most: two could not be compared. The operator
        # compares when it runs.
        options.check_input(data, batch_sizes)
    else:
        try:
            _check_arguments(module, options, data, hx, batch_sizes)
        except ValueError as error:  # what torch, which calls no check here, raises in the end
            raise RuntimeError(str(error)) from None
    reset_hx = expand_reset_states(reset_hx, reset, hx)
    if reset is not None and order is not None:
        reset = reset.index_select(1, order)
        if reset_hx is not None:
            reset_hx = reset_hx[0].index_select(-2, order), reset_hx[1].index_select(-2, order)
    return Prepared(options, data, hx, batch_sizes, reset, True, packed, reset_hx)


def _check_arguments(
    module: Any, options: Options, input: Tensor, hx: States, batch_sizes: Tensor | None
) -> None:
    if not getattr(module, "_has_own_checks", False):
        options.check_forward_args(input, hx, batch_sizes)
        return
    module.check_forward_args(input, hx, batch_sizes)


def _zero_states(options: Options, input: Tensor, N: int) -> States:
    layers = options.num_layers * options.directions
    h = input.new_zeros(layers, N, options.proj_size or options.hidden_size)
    return h, input.new_zeros(layers, N, options.hidden_size)


def _check_tuple(hx: object) -> None:
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"lstm expects a tuple of two hidden states, got {type(hx).__name__}")


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


def run(
    module: Any,
    input: Tensor | PackedSequence,
    hx: States | None,
    reset: Tensor | None,
    reset_hx: States | None,
    return_cell_states: bool,
) -> tuple[Any, ...]:
    """Call a module that is not frozen."""
    given = {"reset": reset, "reset_hx": reset_hx, "return_cell_states": return_cell_states or None}
    _log_refusal(module, input, hx, reset)
    reason = _tool_is_looking(module)
    if reason is None and not (hx is None or isinstance(hx, (tuple, list))):
        reason = f"the states are a {type(hx).__name__}"
    if reason is not None:
        return by_torch(module, input, hx, given, reason)
    try:
        options = read(module, isinstance(input, PackedSequence))
    except TorchAnswersError as error:
        return by_torch(module, input, hx, given, str(error))
    ready = prepare(module, options, input, hx, reset, reset_hx)
    if _step_options.counts(module):
        _check_steps(module, options, given)
        if 0 in ready.input.shape:
            nn.LSTM.forward(module, input, hx)  # raises torch's own error, if that is one
        output, h, c = _recurrence.run(module, ready, _step_options.of_module(module))
        return ready.as_asked(output), ready.states_as_asked((h, c))
    torchs = options.cell is _variants.PLAIN and reset is None and module.checkpoint_every is None
    if torchs and _is_mixed(ready):
        return by_torch(module, input, hx, given, "dtypes, devices or layouts differ")
    output, h, c, *cells = lstm(
        ready.input,
        ready.hx,
        options.layers(),
        bidirectional=options.bidirectional,
        dropout=options.dropout,
        batch_sizes=ready.batch_sizes,
        reset=ready.reset,
        checkpoint_every=module.checkpoint_every,
        variant=options.cell.name,
        reset_hx=ready.reset_hx,
        return_cell_states=return_cell_states,
    )
    return ready.as_asked(output), ready.states_as_asked((h, c)), *map(ready.as_asked, cells)


def _check_steps(module: Any, options: Options, given: dict[str, Any]) -> None:
    """Raise an error for what layers whose steps are not torch's do not have."""
    refused = {
        **{name: name != "reset" and value is not None for name, value in given.items()},
        "checkpoint_every": module.checkpoint_every is not None,
    }
    by_steps = _step_options.of_module(module).needs_steps or _recurrence.has_norm(module)
    if by_steps and options.cell is not _variants.PLAIN:
        refused[options.cell.name] = True
    names = ", ".join(_step_options.names(module))
    for name in (name for name, used in refused.items() if used):
        raise RuntimeError(f"{name} is not for an LSTM with {names}")


def _is_mixed(ready: Prepared) -> bool:
    """Whether input, states and weights are not of one kind, which torch takes or refuses."""
    if torch.compiler.is_compiling():
        return False
    input = ready.input
    autocast = torch._C._is_any_autocast_enabled()
    return any(
        t.device != input.device
        or t.layout != torch.strided
        or (t.dtype != input.dtype and not autocast)
        for t in (input, *ready.hx, *ready.options.weights)
    )


def run_frozen(
    module: Any,
    packed: Sequence[Tensor | None],
    input: Tensor | PackedSequence,
    hx: States | None,
    reset: Tensor | None,
) -> tuple[Any, States]:
    """Call a frozen module, with the weights that were packed."""
    _log_refusal(module, input, hx, reset)
    options = _read_frozen(module, packed, input, hx)
    ready = prepare(module, options, input, hx, reset)
    wanted = packed[: _packed_tensors(options)]
    arguments = (
        list(wanted), options.bidirectional, ready.batch_sizes, ready.reset, options.cell.number
    )  # fmt: skip
    projects = options.proj_size > 0
    as_given = ready.batch_sizes is not None and not projects
    low = None if as_given else _autocast_dtype(ready.input)
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    run: Any = _packed_by_layers if tracing else _ops.lstm_packed
    if low is None:
        output, h, c = run(ready.input, *ready.hx, *arguments)
    else:
        # The weights are of one precision: only the results have the dtype of an unfrozen layer's.
        own = options.weights[0].dtype
        # Those of float64 autocast leaves as they are, and they fit nothing then.
        double = torch.float64
        cast = [t if double in (t.dtype, own) else t.to(own) for t in (ready.input, *ready.hx)]
        with torch.autocast("cpu", enabled=False):
            output, h, c = run(*cast, *arguments)
        output, h = output.to(low), h.to(low)
        c = c.to(ready.hx[1].dtype if projects else low)
    return ready.as_asked(output), ready.states_as_asked((h, c))


def _packed_by_layers(
    input: Tensor, hx: Tensor, cx: Tensor, weights: Sequence[Tensor | None], bidirectional: bool,
    batch_sizes: Tensor | None, reset: Tensor | None, variant: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call the operators of which lstm_packed is made: torch.jit traces no list with None in it."""
    directions = 2 if bidirectional else 1
    per_layer = 3 if variant == _variants.PLAIN.number else 4
    states = []
    for k in range(0, len(weights) // per_layer, directions):
        outputs = []
        for d in range(directions):
            w, b_ih, b_hh, *units = weights[(k + d) * per_layer : (k + d + 1) * per_layer]
            output, *state = _ops.lstm_layer_packed(
                input, hx[k + d], cx[k + d], w, b_ih, b_hh, batch_sizes, reset, d == 1,
                units[0] if units else None, variant,
            )  # fmt: skip
            outputs.append(output)
            states.append(state)
        input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    h, c = zip(*states, strict=True)
    return input, torch.stack(h), torch.stack(c)


def _packed_tensors(options: Options) -> int:
    per_layer = len(("packed", "b_ih", "b_hh")) + bool(options.cell.unit_weights)
    return options.num_layers * options.directions * per_layer


def _read_frozen(module: Any, packed: Sequence[Tensor | None], input: Any, hx: Any) -> Options:
    """Read the options of a frozen module, or raise torch's error for them."""
    try:
        options = read(module, isinstance(input, PackedSequence), (module.like_weights,))
        if len(packed) < _packed_tensors(options) or (packed[1] is not None) != options.bias:
            raise RuntimeError("got an incorrect number of RNN parameters")
        if len(packed) > _packed_tensors(options):
            raise TorchAnswersError(FEWER_LAYERS, options)
        return options
    except TorchAnswersError as error:
        if module._freed is None:
            nn.LSTM.forward(module, input, hx)
        # What torch would raise, without the weights that it would be called with.
        if error.options is None:
            raise TypeError(f"a frozen module cannot be called like this: {error}") from None
        of_onednn = module.like_weights.dtype == torch.float32 and error.options.proj_size == 0
        if isinstance(input, PackedSequence) or not of_onednn:
            raise RuntimeError(f"got an incorrect number of RNN parameters: {error}") from None
        return error.options


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Return what autocast casts this input to; None for not at all."""
    if not torch.is_autocast_enabled("cpu") or input.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype("cpu")


def _log_refusal(module: Any, input: Any, hx: Any, reset: Tensor | None) -> None:
    """In the verbose mode, say why the direct call left a module's call to Python."""
    data = input.data if isinstance(input, PackedSequence) else input
    if _backend.is_verbose() and isinstance(data, Tensor):
        reason = _why_not_direct(module, data, hx, reset)
        _backend.log_path("LSTM", data, f"not the direct call: {reason}")


def _why_not_direct(module: Any, data: Tensor, hx: Any, reset: Tensor | None) -> str:
    """Go through what csrc/python/direct_calls.cpp and module_options.cpp ask for."""
    parameters = module._parameters
    weights = [parameters.get(name) for name in module._flat_weights_names]
    reasons = {
        "the cell is not torch's": _variants.of_module(module) is not _variants.PLAIN,
        **_step_options.why_not_direct(module),
        "reset": reset is not None,
        "checkpoint_every": module.checkpoint_every is not None,
        "dropout is to be drawn": bool(module.training and module.dropout),
        "the class has checks of its own": module._has_own_checks,
        "torch.func or a mode of torch's is at work": _backend.is_transformed(),
        "a weight is no parameter, or not what _flat_weights has": (
            not hasattr(module, "like_weights")
            and [id(w) for w in weights] != [id(w) for w in module._flat_weights]
        ),
        "no tuple of two states": hx is not None and not (type(hx) is tuple and len(hx) == 2),
        f"the device is {data.device}": not data.is_cpu,
        "autocast of a frozen module": torch.is_autocast_enabled("cpu"),
        "a single sequence": data.dim() == 2,
        "the input is empty": data.numel() == 0,
    }
    return next(
        (reason for reason, holds in reasons.items() if holds),
        "an option, a size or a dtype is not as when the module was built",
    )


def _tool_is_looking(module: Any) -> str | None:
    """Say which tool of torch's, that knows torch's own LSTM alone, is looking at the call."""
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return "torch.jit is tracing"
    for weight in module._parameters.values():
        # torch.nn.utils' expanded weights: a tensor with a table of what it can differentiate.
        if hasattr(type(weight), "handled_functions"):
            return f"the weights are of type {type(weight).__name__}"
    return None


def by_torch(
    module: Any, input: Any, hx: Any, given: dict[str, Any], reason: str
) -> tuple[Any, ...]:
    """Let torch.nn.LSTM compute, or raise its own error.

    ``given`` are the options of the call that it has not, None where they were not given.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    _backend.log_path("LSTM", data, f"torch.nn.LSTM.forward: {reason}")
    out: tuple[Any, ...] = nn.LSTM.forward(module, input, hx)
    cell = _variants.of_module(module)
    options = {
        **dict.fromkeys(_step_options.names(module, in_evaluation=not module.training), True),
        cell.name: cell is not _variants.PLAIN,
        **{name: value is not None for name, value in given.items()},
        "checkpoint_every": module.checkpoint_every is not None,
    }
    for option in (option for option, used in options.items() if used):
        raise RuntimeError(
            f"{option} is not for torch.nn.LSTM, which has to compute this: {reason}"
        )
    return out
