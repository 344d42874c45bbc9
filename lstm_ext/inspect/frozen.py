"""What freezing costs in accuracy, on data of one's own: :func:`frozen_error`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lstm_ext import frozen
from lstm_ext.layer import LSTM

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FrozenError:
    """How far a frozen module is from the one that was frozen: what :func:`frozen_error` returns.

    An error is the norm of the difference divided by the norm of what the original computes: 0.01
    is one percent.

    Attributes:
        output: the error of all outputs; for a cell, of the h' of all calls.
        h_n: the error of the hidden states after the last step of the last call.
        c_n: the error of the cell states after that step.
        worst_row: the row of the batch whose outputs have the largest error.
        worst_row_error: that error.
        over_time: (L,), the error of the outputs of each step, of all calls one after the other.
        bytes_before: bytes of the plain matrices.
        bytes_after: bytes of the packed matrices.

    Example:
        >>> model = lstm_ext.freeze(lstm_ext.LSTM(10, 20).eval(), weights="bfloat16")
        >>> error = lstm_ext.frozen_error(model, torch.randn(50, 8, 10))[""]
        >>> error.output < 0.01, error.over_time.shape
        (True, torch.Size([50]))
    """

    output: float
    h_n: float
    c_n: float
    worst_row: int
    worst_row_error: float
    over_time: Tensor
    bytes_before: int
    bytes_after: int

    def plot(self) -> Figure:
        """Draw the error over time: :func:`lstm_ext.plot.frozen_error`."""
        from lstm_ext.inspect import plot

        return plot.frozen_error({"": self})


def frozen_error(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, FrozenError]:
    """Call a frozen model and the unfrozen one on the same data, and compare their LSTMs.

    Errors add up as they do in use: the input of a module, and the states that one call passes to
    the next, have errors of their own. The model is not changed; the unfrozen one is a copy.

    Args:
        model: what :func:`lstm_ext.freeze` returned: a frozen module, or a model with some in it.
        *args: the arguments of the model's call.
        **kwargs: its named arguments.

    Returns:
        For each frozen module that was called, by its name in the model ("" for the model itself):
        its error.

    Raises:
        ValueError: nothing in the model is frozen, or no frozen module was called.
        RuntimeError: a module was frozen with ``keep_weights=False``, and there is nothing to
            compare with; or the two models call a module a different number of times, and the calls
            cannot be compared.

    Example:
        >>> model = lstm_ext.freeze(lstm_ext.LSTM(10, 20).eval(), weights="int8")
        >>> errors = lstm_ext.frozen_error(model, torch.randn(50, 8, 10))
        >>> errors[""].output < 0.05  # "" is the model itself
        True
    """
    names = {n: m for n, m in model.named_modules() if isinstance(m, frozen._Frozen)}
    if not names:
        raise ValueError(f"frozen_error: {type(model).__name__} has no frozen LSTM or LSTMCell")
    for n, m in names.items():
        m.find_original(f"frozen_error: {n or type(m).__name__}")
    plain_model = frozen.unfreeze(copy.deepcopy(model))
    plain = {n: m for n, m in plain_model.named_modules() if n in names}
    with torch.no_grad(), _recorded(names) as found, _recorded(plain) as expected:
        model(*args, **kwargs)
        plain_model(*args, **kwargs)
    errors = {}
    for name, module in names.items():
        if len(found[name]) != len(expected[name]):
            raise RuntimeError(
                f"frozen_error: {name or type(module).__name__} was called {len(found[name])} "
                f"times, and {len(expected[name])} times when it was not frozen"
            )
        if found[name]:
            errors[name] = _compare(module, found[name], expected[name])
    if not errors:
        raise ValueError(f"frozen_error: {type(model).__name__} called none of its frozen modules")
    return errors


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Collect the outputs of modules, before their own hooks change them."""
    outputs: dict[str, list[Any]] = {name: [] for name in modules}
    handles = [
        m.register_forward_hook(
            lambda _m, _args, output, name=name: outputs[name].append(output), prepend=True
        )
        for name, m in modules.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _steps(module: nn.Module, result: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a call as (L, N, H), zero where a sequence has ended; and its states."""
    if not isinstance(module, LSTM):
        h, c = result
        return h.reshape(1, -1, h.shape[-1]).double(), h.double(), c.double()
    output, (h_n, c_n) = result
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output)
    elif output.dim() == 2:
        output = output.unsqueeze(1)
    elif module.batch_first:
        output = output.transpose(0, 1)
    return output.double(), h_n.double(), c_n.double()


def _share(difference: Tensor, size: Tensor) -> Tensor:
    """Norm over norm; nothing of nothing is no error."""
    return torch.where(difference > 0, difference / size, torch.zeros_like(difference))


def _compare(module: nn.Module, found: list[Any], expected: list[Any]) -> FrozenError:
    over_time, of_rows, totals = [], [], []
    for got, wanted in zip(found, expected, strict=True):
        (a, h, c), (b, h_exact, c_exact) = _steps(module, got), _steps(module, wanted)
        over_time.append(_share((a - b).norm(dim=(1, 2)), b.norm(dim=(1, 2))))
        totals.append(((a - b).square().sum(), b.square().sum()))
        of_rows.append(((a - b).square().sum((0, 2)), b.square().sum((0, 2))))
    difference, size = (torch.stack(parts).sum().sqrt() for parts in zip(*totals, strict=True))
    # Of calls with as many rows as the last one: theirs are the same sequences, if any are.
    alike = [pair for pair in of_rows if pair[0].shape == of_rows[-1][0].shape]
    rows = _share(*(torch.stack(parts).sum(0).sqrt() for parts in zip(*alike, strict=True)))
    original: Any = module.original
    matrices = [
        p for n, p in original.named_parameters() if n.startswith(("weight_ih", "weight_hh"))
    ]
    packed = [b for b in module._packed() if b is not None and b.dtype == torch.uint8]  # type: ignore[operator]
    worst = int(rows.argmax()) if len(rows) else 0
    return FrozenError(
        output=float(_share(difference, size)),
        h_n=float(_share((h - h_exact).norm(), h_exact.norm())),
        c_n=float(_share((c - c_exact).norm(), c_exact.norm())),
        worst_row=worst,
        worst_row_error=float(rows[worst]) if len(rows) else 0.0,
        over_time=torch.cat(over_time),
        bytes_before=sum(p.nbytes for p in matrices),
        bytes_after=sum(b.nbytes for b in packed),
    )
