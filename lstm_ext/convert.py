"""Swap torch's LSTM modules inside a model for ours, and back."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from lstm_ext.cell import LSTMCell
from lstm_ext.frozen import FrozenLSTM, FrozenLSTMCell, plain_kind
from lstm_ext.layer import LSTM

Model = TypeVar("Model", bound=nn.Module)
Kind = type[nn.Module]
_OURS: dict[Kind, Kind] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_TORCHS: dict[Kind, Kind] = {ours: torchs for torchs, ours in _OURS.items()}


def convert(model: Model) -> Model:
    """Make every ``nn.LSTM`` and ``nn.LSTMCell`` of a model one of ours, in place.

    The modules stay the same objects, and so do their parameters: a running optimizer goes on,
    hooks, parametrizations, training mode, dtype and device stay. Afterwards
    ``isinstance(module, nn.LSTM)`` is False for what was one (see :class:`lstm_ext.LSTM`).

    Args:
        model: any module, itself an LSTM or not.

    Returns:
        The model.

    Warns:
        UserWarning: for each module that was left as it is, with the reason: a subclass of
            ``nn.LSTM`` or ``nn.LSTMCell``, whose forward may do something else, or what
            ``torch.jit`` has compiled.

    Example::

        model = lstm_ext.convert(model)
    """
    for name, module in model.named_modules():
        kind = plain_kind(module)
        if kind in _OURS:
            _become(module, _OURS[kind])
        elif isinstance(module, torch.jit.ScriptModule):
            if module.original_name in ("LSTM", "LSTMCell"):
                _left("convert", name, module, "it was compiled by torch.jit")
        elif isinstance(module, (nn.LSTM, nn.LSTMCell)) and not _is_ours(module):
            base = "nn.LSTM" if isinstance(module, nn.LSTM) else "nn.LSTMCell"
            _left("convert", name, module, f"its forward may differ from that of {base}")
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`: make every ``lstm_ext.LSTM`` and ``LSTMCell`` one of torch's, in place.

    Everything stays as in convert. For tools that know torch's modules alone, ``torch.jit.script``
    for instance.

    Args:
        model: any module, itself an LSTM or not.

    Returns:
        The model.

    Warns:
        UserWarning: for each of our modules that was left as it is, with the reason: a subclass, or
            frozen (:func:`lstm_ext.unfreeze` comes first); and for ``checkpoint_every``, which
            torch's module does not have.
    """
    for name, module in model.named_modules():
        kind = plain_kind(module)
        if kind in _TORCHS:
            if isinstance(module, LSTM):
                if module.checkpoint_every is not None:
                    where = name or type(module).__name__
                    warnings.warn(
                        f"lstm_ext.revert: {where} loses checkpoint_every="
                        f"{module.checkpoint_every}, which torch.nn.LSTM does not have",
                        stacklevel=2,
                    )
                vars(module).pop("checkpoint_every", None)
            _become(module, _TORCHS[kind])
        elif isinstance(module, (FrozenLSTM, FrozenLSTMCell)):
            _left("revert", name, module, "it is frozen; call lstm_ext.unfreeze first")
        elif _is_ours(module):
            _left("revert", name, module, "its forward may differ from that of its base class")
    return model


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (LSTM, LSTMCell))


def _become(module: nn.Module, kind: Kind) -> None:
    old = type(module)
    if parametrize.is_parametrized(module):
        # The class that torch made for this module alone, over the other base.
        members = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), members)
    module.__class__ = kind


def _left(function: str, name: str, module: nn.Module, reason: str) -> None:
    where = f"{name} ({type(module).__name__})" if name else type(module).__name__
    warnings.warn(f"lstm_ext.{function} left {where} as it is: {reason}", stacklevel=3)
