"""What a module does in a step beyond torch's LSTM: its options, all off unless they are given.

They are kept in one dict of the instance, which a module without any does not have: its repr, its
state dict and its pickle are torch's.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple


class StepOptions(NamedTuple):
    """The options; see :class:`lstm_ext.LSTM`."""

    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    recurrent_dropout_per_step: bool = False
    recurrent_dropout_per_gate: bool = False
    input_dropout: float = 0.0
    variational_dropout: bool = False
    weight_dropout: float = 0.0
    weight_dropout_rows: bool = False
    coupled_gates: bool = False
    cell_clip: float = 0.0
    projection_clip: float = 0.0

    @property
    def needs_steps(self) -> bool:
        """Whether a step is another one than torch's."""
        return (
            max(self.zoneout_h, self.zoneout_c, self.recurrent_dropout) > 0
            or max(self.cell_clip, self.projection_clip) > 0
        )


NONE = StepOptions()
# What is of no effect in evaluation.
_IN_TRAINING = {
    "recurrent_dropout",
    "recurrent_dropout_per_step",
    "recurrent_dropout_per_gate",
    "input_dropout",
    "variational_dropout",
    "weight_dropout",
    "weight_dropout_rows",
}


def _check(name: str, value: Any) -> Any:
    """Return an option's value, or raise an error in the words of torch.nn where it has some."""
    if isinstance(getattr(NONE, name), bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        return value
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if name.endswith("clip"):
        if value is None:
            return 0.0
        if not is_number or not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} should be a positive number, or None, got {value!r}")
    elif not is_number or not 0 <= value <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of an element "
            f"being zeroed or kept from its update, got {value!r}"
        )
    return float(value)


class Option:
    """One of them, as an attribute of a module."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        default = getattr(NONE, self._name)
        return default if module is None else (module._step_options or {}).get(self._name, default)

    def __set__(self, module: Any, value: Any) -> None:
        value = _check(self._name, value)
        options = {k: v for k, v in (module._step_options or {}).items() if k != self._name}
        if value != getattr(NONE, self._name):
            options[self._name] = value
        # A module without any has no such attribute.
        if options:
            vars(module)["_step_options"] = options
        else:
            vars(module).pop("_step_options", None)


def of_module(module: Any) -> StepOptions:
    """Return the options that count for the next call; all off for torch's modules."""
    given: dict[str, Any] | None = getattr(module, "_step_options", None)
    if not given:
        return NONE
    if not module.training:
        given = {name: value for name, value in given.items() if name not in _IN_TRAINING}
    return NONE._replace(**given) if given else NONE


def counts(module: Any) -> bool:
    """Whether a module's next call is another one than torch's: not with dropouts, evaluating."""
    return getattr(module, "_layer_norm", None) is not None or of_module(module) is not NONE


def why_not_direct(module: Any) -> dict[str, bool]:
    """Return what csrc/python/module_options.cpp leaves to Python, and whether a call has it."""
    return {"input_dropout is computed in Python": of_module(module).input_dropout > 0}


def names(module: Any, *, in_evaluation: bool = False) -> list[str]:
    """Return the names of what a module does that torch's does not, for messages.

    Args:
        module: any LSTM or cell.
        in_evaluation: leave out what is of no effect there.
    """
    given = list(getattr(module, "_step_options", None) or {})
    if in_evaluation:
        given = [name for name in given if name not in _IN_TRAINING]
    if getattr(module, "_layer_norm", None) is not None:
        given.insert(0, "layer normalization")
    return given


def repr_of(module: Any) -> str:
    """Return what a module's repr says of them: nothing where there are none."""
    given: dict[str, Any] = getattr(module, "_step_options", None) or {}
    return "".join(f", {name}={value}" for name, value in given.items())
