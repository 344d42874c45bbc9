"""Initial weights that people give their LSTMs by hand: forget biases, orthogonal matrices."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lstm_ext import _options, _steps
from lstm_ext.frozen import FrozenLSTM, FrozenLSTMCell

_HALVES = (torch.float16, torch.bfloat16)


class _Write(NamedTuple):
    """What a parameter is to become; kind is its name without layer and direction."""

    name: str
    kind: str
    parameter: Tensor
    values: Tensor


def forget_bias_(module: nn.Module, value: float = 1.0) -> list[str]:
    r"""Give the forget gate of every LSTM and LSTMCell a bias, in place.

    A new LSTM then remembers longer. With a bias of 1, a unit keeps :math:`\sigma(1) = 73\%` of its
    cell state at each step, instead of about one half (Gers, Schmidhuber & Cummins 2000;
    Jozefowicz, Zaremba & Sutskever 2015). The gate adds two biases, :math:`b_{ih} + b_{hh}`. Their
    sum becomes the value: rows H to 2H of ``bias_ih`` are set to it, and those of ``bias_hh`` to
    zero. The other gates' biases stay.

    Args:
        module: an LSTM or LSTMCell, ours or torch's or of a class that derives from them, or a
            model that has them somewhere; every layer and direction counts.
        value: the bias.

    Returns:
        The names of the parameters that were written, as ``module.named_parameters()`` has them.

    Raises:
        TypeError: the module is no ``torch.nn.Module``, or the value no number.
        ValueError: there is no LSTM, or one whose forget gate has no bias (``bias=False``,
            ``coupled_gates=True``); a bias is computed by something else (a parametrization, a
            hook), is on the meta device, or is one tensor with a bias that should become another
            number.
        RuntimeError: an LSTM is frozen.

    Whatever is raised, nothing has been written.

    Example:
        >>> model = torch.nn.Sequential(lstm_ext.LSTM(10, 20))
        >>> lstm_ext.init.forget_bias_(model)
        ['0.bias_ih_l0', '0.bias_hh_l0']
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"forget_bias_: value should be a number, got {type(value).__name__}")
    writes = _Writes("forget_bias_")
    for name, lstm in writes.lstms(module):
        if not lstm.bias:
            raise ValueError(
                f"forget_bias_: {name or type(lstm).__name__} has no biases (it was built with "
                "bias=False), so that its forget gate has none"
            )
        if getattr(lstm, "coupled_gates", False):
            raise ValueError(
                f"forget_bias_: {name or type(lstm).__name__} has coupled gates: its forget gate "
                "is 1 - i, and has no bias of its own"
            )
        for suffix in _suffixes(lstm):
            for kind, number in (("bias_ih", float(value)), ("bias_hh", 0.0)):
                writes.add(name, lstm, kind, suffix, partial(_with_forget_rows, number))
    return writes.write()


def orthogonal_(
    module: nn.Module, gain: float = 1.0, *, generator: torch.Generator | None = None
) -> list[str]:
    r"""Draw the recurrent weights of every LSTM and LSTMCell as orthogonal matrices, in place.

    ``weight_hh`` (4H, H) holds one (H, H) matrix for each gate. Each of the four is drawn alone, by
    :func:`torch.nn.init.orthogonal_` (Saxe, McClelland & Ganguli 2014), in the order i, f, g, o,
    layer by layer, the forward direction first. (Applied to the whole of ``weight_hh``, that
    function makes the columns of the whole orthogonal, but none of the four matrices.)

    With projections (``proj_size``) a gate's matrix is (H, P) and gets orthonormal columns times
    the gain. ``weight_hr`` (P, H) gets orthonormal rows without the gain. The product of both
    neither lengthens nor shortens a vector in the space that ``weight_hr``'s rows span.

    Args:
        module: an LSTM or LSTMCell, ours or torch's or of a class that derives from them, or a
            model that has them somewhere; every layer and direction counts.
        gain: a factor for the matrices of ``weight_hh``.
        generator: the generator to draw from; when left out, torch's own of the parameters' device.

    Returns:
        The names of the parameters that were written, as ``module.named_parameters()`` has them.

    float16 and bfloat16 weights are drawn in float32 and rounded.

    Raises:
        TypeError: the module is no ``torch.nn.Module``.
        ValueError: there is no LSTM; a weight is computed by something else (a parametrization, a
            hook), or is on the meta device.
        RuntimeError: an LSTM is frozen; the generator is of another device.

    Whatever is raised, nothing has been written.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> lstm_ext.init.orthogonal_(lstm_ext.LSTM(10, 20), generator=generator)
        ['weight_hh_l0']
    """
    writes = _Writes("orthogonal_")

    def draw(like: Tensor, gain: float) -> Tensor:
        dtype = torch.float32 if like.dtype in _HALVES else like.dtype
        return nn.init.orthogonal_(torch.empty_like(like, dtype=dtype), gain, generator)

    for name, lstm in writes.lstms(module):
        for suffix in _suffixes(lstm):
            writes.add(
                name, lstm, "weight_hh", suffix,
                lambda w: torch.cat([draw(of_gate, gain) for of_gate in w.chunk(4)]),
            )  # fmt: skip
            if getattr(lstm, "proj_size", 0):
                writes.add(name, lstm, "weight_hr", suffix, lambda w: draw(w, 1.0))
    return writes.write()


def _with_forget_rows(number: float, bias: Tensor) -> Tensor:
    new, H = bias.clone(), bias.shape[0] // 4
    new[H : 2 * H] = number
    return new


def _suffixes(lstm: Any) -> list[str]:
    """Return what the parameters' names end in, for each layer and direction."""
    return _steps.layer_suffixes(lstm) if isinstance(lstm, nn.LSTM) else [""]


class _Writes:
    """What is to be written: made in full before the first parameter changes."""

    def __init__(self, function: str) -> None:
        self._function = function
        self._planned: dict[int, _Write] = {}  # by the parameter's identity

    def lstms(self, model: object) -> Iterator[tuple[str, Any]]:
        """Yield the model's LSTMs and LSTMCells, with their names."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{self._function}: module should be a torch.nn.Module, got {type(model).__name__}"
            )
        found = False
        for name, module in model.named_modules():
            if isinstance(module, (FrozenLSTM, FrozenLSTMCell)):
                raise RuntimeError(
                    f"{self._function}: {name or type(module).__name__} is frozen, and computes "
                    "with the weights that it was frozen with; call lstm_ext.unfreeze first"
                )
            if isinstance(module, (nn.LSTM, nn.LSTMCell)):
                found = True
                yield name, module
        if not found:
            raise ValueError(
                f"{self._function} found no torch.nn.LSTM or torch.nn.LSTMCell in "
                f"{type(model).__name__}"
            )

    def add(
        self, module_name: str, lstm: Any, kind: str, suffix: str, make: Callable[[Tensor], Tensor]
    ) -> None:
        """Make what a parameter is to become; once, where several names stand for one."""
        own = kind + suffix
        name = f"{module_name}.{own}" if module_name else own
        parameter = self._parameter(lstm, own, name)
        before = self._planned.get(id(parameter))
        if before is None:
            with torch.no_grad():
                self._planned[id(parameter)] = _Write(name, kind, parameter, make(parameter))
        elif before.kind != kind:
            raise ValueError(
                f"{self._function}: {name} is one tensor with {before.name}, which should become "
                "another"
            )

    def _parameter(self, lstm: Any, own: str, name: str) -> Tensor:
        """Return a parameter that the LSTM computes with, or raise an error for another tensor."""
        parameter: Tensor | None = lstm._parameters.get(own)
        used = getattr(lstm, own, None)
        if isinstance(lstm, nn.LSTM) and own in lstm._flat_weights_names:
            used = _options.flat_weights(lstm)[lstm._flat_weights_names.index(own)]
        is_used = used is parameter
        if parameter is None or not is_used:
            raise ValueError(
                f"{self._function}: {name} is not the parameter that the module computes with: "
                "something else writes it (a parametrization, weight_norm, pruning, a hook), and "
                "would undo this. Initialise before that is put there, or remove it first"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{self._function}: {name} is on the meta device, where there is nothing to write; "
                "call to_empty() first"
            )
        return parameter

    def write(self) -> list[str]:
        """Write everything, or nothing and raise the error; return the names."""
        writes = list(self._planned.values())
        with torch.no_grad():
            old = [write.parameter.clone() for write in writes]
            written = 0
            try:
                for write in writes:
                    write.parameter.copy_(write.values)
                    written += 1
            except BaseException:
                for write, values in zip(writes[:written], old, strict=False):
                    write.parameter.copy_(values)
                raise
        return [write.name for write in writes]
