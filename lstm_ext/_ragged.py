"""Sequences of different lengths, one after the other in one tensor, through the packed path.

Nested tensors lie like that, and so do the sequences of a list when they are put together. Their
rows are brought into the order of a packed sequence (step by step, the longest sequence first) by
one gather, and the outputs back by another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_ext._call import States

Run = Callable[[PackedSequence, States | None, Tensor | None], tuple[PackedSequence, States]]

_NO_GRAPH = "lstm_ext: how sequences are packed depends on their lengths"


class _Order(NamedTuple):
    """How N sequences of together S rows are packed; those of length 0 are not.

    sequences (N): which sequence is the k'th longest, and to_batch the inverse; batch_sizes (L);
    rows (S): which row is the k'th packed one, and back the inverse; there (L, N): which of the
    longest sequences are there at each step. All on the CPU.
    """

    sequences: Tensor
    to_batch: Tensor
    batch_sizes: Tensor
    rows: Tensor
    back: Tensor
    there: Tensor


def _order(lengths: Tensor | list[int]) -> _Order:
    """Order sequences by their lengths (N), as pack_padded_sequence does."""
    with _no_transforms():
        lengths = torch.as_tensor(lengths)
        descending, sequences = torch.sort(lengths, descending=True)
        L = int(descending[0]) if lengths.shape[0] else 0
        time = torch.arange(L).unsqueeze(1)
        there = descending > time
        begins = (lengths.cumsum(0) - lengths).index_select(0, sequences)
        rows = (begins + time).masked_select(there)
        return _Order(
            sequences, _inverse(sequences), there.sum(1), rows, _inverse(rows), there
        )  # fmt: skip


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))


@contextmanager
def _no_transforms() -> Iterator[None]:
    """Leave the transforms of torch.func, which would wrap what is only to be counted with."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


class _Reorder(torch.autograd.Function):
    """Rows in another order; its backward is the gather that brings them back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, order: Tensor, back: Tensor) -> Tensor:
        return values.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _reorder(grad, back, order), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        order, back = ctx.saved_tensors
        return _reorder(tangent, order, back)


def _reorder(values: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Return rows in an order, of which ``back`` is the inverse."""
    if not (values.requires_grad and torch.is_grad_enabled()):
        return values.index_select(0, order)
    reordered: Tensor = _Reorder.apply(values, order, back)  # type: ignore[no-untyped-call]
    return reordered


def _run_values(
    module: Any,
    values: Tensor,
    lengths: Tensor | list[int],
    hx: States | None,
    reset: Tensor | None,
    run: Run,
) -> tuple[Tensor, States]:
    """Run an LSTM over sequences that lie one after the other.

    Args:
        module: the LSTM, ours or torch's, whose checks are asked.
        values: the rows of all sequences, (S, I).
        lengths: of each sequence (N), int64 on the CPU; they add up to S.
        hx: h (K, N, P) and c (K, N, H) in the order of the sequences, or None.
        reset: bool (S), or None.
        run: calls the LSTM with a packed sequence, states and reset mask.

    Returns:
        The rows of the outputs (S, D P), and the last states in the order of the sequences; those
        of a sequence of length 0 are the first.
    """
    N = len(lengths)
    if hx is not None:
        _check_states(module, values, hx, N)
    order = _order(lengths)
    sequences = order.sequences.to(values.device)
    running = int(order.batch_sizes[0]) if order.batch_sizes.shape[0] else 0
    if hx is not None:
        hx = hx[0].index_select(1, sequences), hx[1].index_select(1, sequences)
    rows, back, to_batch = (
        index.to(values.device) for index in (order.rows, order.back, order.to_batch)
    )
    if reset is not None:
        there = order.there[:, :running].to(reset.device)
        reset = there.masked_scatter(there, reset.index_select(0, rows))
    first = hx
    if hx is not None and running < N:
        first = hx[0][:, :running], hx[1][:, :running]
    packed = PackedSequence(_reorder(values, rows, back), order.batch_sizes, None, None)
    output, last = run(packed, first, reset) if running else _none_run(module, packed)
    if running < N:
        last = _with_others(last, hx, running, N)
    h, c = last
    states = h.index_select(1, to_batch), c.index_select(1, to_batch)
    return _reorder(output.data, back, rows), states


def _check_states(module: Any, values: Tensor, hx: States, N: int) -> None:
    """Raise torch's errors for states that do not fit."""
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    batch = torch.tensor([N])
    h, c = (
        module.get_expected_hidden_size(values, batch),
        module.get_expected_cell_size(values, batch),
    )
    module.check_hidden_size(hx[0], h, "Expected hidden[0] size {}, got {}")
    module.check_hidden_size(hx[1], c, "Expected hidden[1] size {}, got {}")


def _none_run(module: Any, packed: PackedSequence) -> tuple[PackedSequence, States]:
    """Return what no sequence at all gives, which torch's call does not take."""
    data, batch_sizes, _, _ = packed
    module.check_input(data, batch_sizes)
    none = torch.tensor([0])
    h = data.new_zeros(module.get_expected_hidden_size(data, none))
    c = data.new_zeros(module.get_expected_cell_size(data, none))
    features = h.shape[2] * (2 if module.bidirectional else 1)
    return packed._replace(data=data.new_zeros(0, features)), (h, c)


def _with_others(last: States, hx: States | None, running: int, N: int) -> States:
    """Put the first states of the sequences of length 0 behind the others' last states."""
    both = []
    for k, state in enumerate(last):
        if hx is None:
            rest = state.new_zeros(state.shape[0], N - running, state.shape[2])
        else:
            rest = hx[k][:, running:].to(state.dtype)
        both.append(torch.cat([state, rest], 1))
    return both[0], both[1]


def run_nested(
    module: Any, input: Any, hx: States | None, reset: Tensor | None, run: Run
) -> tuple[Tensor, States]:
    """Call an LSTM with a nested tensor (N, j, I) of the jagged layout; see :class:`LSTM`."""
    return _eager(_run_nested)(module, input, hx, reset, run)


def _eager(function: Callable[..., tuple[Tensor, States]]) -> Callable[..., tuple[Tensor, States]]:
    """Have TorchDynamo leave a function alone, which it would break into many small graphs."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=_NO_GRAPH)
    if "torch._dynamo" not in sys.modules:
        return function
    if function not in _disabled:
        _disabled[function] = torch.compiler.disable(  # type: ignore[no-untyped-call]
            function, reason=_NO_GRAPH
        )
    return _disabled[function]


# By the function. No functools.cache, of which TorchDynamo warns the user.
_disabled: dict[Callable[..., tuple[Tensor, States]], Callable[..., tuple[Tensor, States]]] = {}


def _run_nested(
    module: Any, input: Any, hx: States | None, reset: Tensor | None, run: Run
) -> tuple[Tensor, States]:
    _check_not_exporting()
    input = _jagged("input", input)
    if input.dim() != 3 or input._ragged_idx != 1:
        raise ValueError(
            "LSTM: a nested input should have the shape (batch, ragged length, features), "
            f"got {tuple(input.shape)}"
        )
    lengths = _lengths(input)
    mask = None if reset is None else _mask_of_nested(reset, lengths)
    output, states = _run_values(module, _values(input), lengths, hx, mask, run)
    # By the same offsets: torch takes the lengths of input and output for the same. (Its own
    # longest and shortest are kept with the input, or found when they are asked for.)
    return torch.nested.nested_tensor_from_jagged(output, input.offsets()), states


def _jagged(name: str, nested: Any) -> Any:
    if getattr(nested, "_ragged_idx", None) is None:
        raise ValueError(
            f"LSTM: a nested {name} should have the layout torch.jagged, got {nested.layout}; "
            "torch.nested.as_nested_tensor(list, layout=torch.jagged) makes one"
        )
    # What torch.nested.narrow made has gaps between its sequences.
    return nested if nested.lengths() is None else nested.contiguous()


def _values(nested: Any) -> Tensor:
    """Return the rows of all sequences; without torch's slow way to them, if that may be."""
    recorded = nested.requires_grad and torch.is_grad_enabled()
    values: Tensor = nested.values() if recorded else nested._values
    return values


def _lengths(nested: Any) -> Tensor:
    offsets: Tensor = nested.offsets().to("cpu", torch.int64)
    lengths, S = offsets.diff(), nested._values.shape[0]
    if int(offsets[0]) != 0 or int(offsets[-1]) != S or bool((lengths < 0).any()):
        raise ValueError(
            "LSTM: the offsets of a nested input should ascend from 0 to the number of its rows, "
            f"{S}, got {offsets.tolist()}"
        )
    return lengths


def _mask_of_nested(reset: Any, lengths: Tensor) -> Tensor:
    if not (isinstance(reset, Tensor) and reset.is_nested):
        raise ValueError("LSTM: with a nested input, reset should be nested as well")
    reset = _jagged("reset", reset)
    if reset.dtype != torch.bool or reset.dim() != 2 or not torch.equal(_lengths(reset), lengths):
        raise ValueError(
            "LSTM: reset should be a bool nested tensor (batch, ragged length) with the lengths "
            f"of the input, got {reset.dtype} of lengths {_lengths(reset).tolist()}"
        )
    return _values(reset)


def run_sequences(
    module: nn.LSTM,
    sequences: Sequence[Tensor],
    hx: States | None = None,
    *,
    reset: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], States]:
    r"""Run an LSTM over a list of sequences of different lengths, without padding or sorting.

    The results are those of each sequence by itself. All sequences together are one packed call, so
    nothing is computed for padding.

    Args:
        module: the LSTM, ours or torch's; ``batch_first`` does not matter.
        sequences: N of them, each (L_k, I); a length of 0 is allowed.
        hx: h (K D, N, P) and c (K D, N, H), for K layers and D directions; zeros when left out.
        reset: for each sequence a bool tensor (L_k), as in :class:`LSTM`; for our modules only.

    Returns:
        The outputs, a list of tensors (L_k, D P), and ``(h_n, c_n)``, shaped like ``hx``. The last
        states of a sequence of length 0 are its first states.

    The outputs are views of one tensor (:meth:`torch.Tensor.split`). Hooks of the module see a
    :class:`~torch.nn.utils.rnn.PackedSequence`.

    Raises:
        TypeError: the module is no LSTM, or a sequence no tensor.
        ValueError: there is no sequence; one is nested or not (L_k, I); the masks do not fit.
        RuntimeError: as ``torch.nn.LSTM``, for sizes, dtypes or devices that do not fit.

    Example:
        >>> lstm = lstm_ext.LSTM(10, 20)
        >>> sequences = [torch.randn(n, 10) for n in (3, 0, 7)]
        >>> outputs, (h, c) = lstm_ext.run_sequences(lstm, sequences)
        >>> [tuple(output.shape) for output in outputs]
        [(3, 20), (0, 20), (7, 20)]
    """
    if not isinstance(module, nn.LSTM):
        raise TypeError(f"run_sequences: module should be an LSTM, got {type(module).__name__}")
    _check_not_exporting()
    _check_sequences(sequences)
    lengths = [s.shape[0] for s in sequences]
    mask = None
    if reset is not None:
        if [(m.dtype, tuple(m.shape)) for m in reset] != [(torch.bool, (n,)) for n in lengths]:
            raise ValueError(
                "run_sequences: reset should be a bool tensor of its length for each sequence"
            )
        mask = torch.cat(list(reset))

    def run(
        packed: PackedSequence, states: States | None, mask: Tensor | None
    ) -> tuple[PackedSequence, States]:
        options = {} if mask is None else {"reset": mask}
        out: tuple[PackedSequence, States] = module(packed, states, **options)
        return out

    values = torch.cat(list(sequences))
    output, states = _eager(_run_values)(module, values, lengths, hx, mask, run)
    return list(torch.split(output, lengths)), states


def _check_not_exporting() -> None:
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "torch.export cannot take sequences of different lengths through an LSTM: how they "
            "are packed depends on the lengths. Export the module with a padded or a packed input"
        )


def _check_sequences(sequences: Sequence[Tensor]) -> None:
    if len(sequences) == 0:
        raise ValueError("run_sequences: expected at least one sequence")
    for k, sequence in enumerate(sequences):
        if not isinstance(sequence, Tensor):
            raise TypeError(
                f"run_sequences: sequence {k} should be a Tensor, got {type(sequence).__name__}"
            )
        if sequence.is_nested or sequence.dim() != 2 or sequence.shape[1] != sequences[0].shape[1]:
            shape = "a nested tensor" if sequence.is_nested else tuple(sequence.shape)
            raise ValueError(
                "run_sequences: sequences should have the shape (length, features), with the same "
                f"features, got {shape} for sequence {k}"
            )
