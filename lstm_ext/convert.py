"""Swap torch's LSTM modules inside a model for ours, and back."""

from __future__ import annotations

import dis
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from lstm_ext import _other_classes, _rebind, _step_options, _variants
from lstm_ext.cell import LSTMCell
from lstm_ext.frozen import FrozenLSTM, FrozenLSTMCell
from lstm_ext.layer import LSTM

Model = TypeVar("Model", bound=nn.Module)
Kind = type[nn.Module]
_OURS: dict[Kind, Kind] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_TORCHS: dict[Kind, Kind] = {ours: torchs for torchs, ours in _OURS.items()}
_FORWARDS = {torchs.forward: ours.forward for torchs, ours in _OURS.items()}


class _Line(NamedTuple):
    """What became of a module: of the report."""

    name: str
    kind: str
    result: str


def convert(model: Model, *, report: bool = False) -> Model:
    """Make every ``nn.LSTM`` and ``nn.LSTMCell`` of a model one of ours, in place.

    The modules stay the same objects, and so do their parameters. An optimizer that is already
    running goes on. Hooks, parametrizations, training mode, dtype and device stay.

    A subclass is converted too if it does not override ``forward``, or if its ``forward`` calls
    ``super().forward``. Its class becomes one of the same name, derived from it and from ours.
    Libraries sometimes keep a module's old ``forward`` (in an attribute, a list, a
    ``functools.partial`` or a closure). It is replaced by the new one.

    One class that does not derive from torch's is known too: the LSTM of torchaudio's RNN-T models,
    ``torchaudio.models.rnnt._CustomLSTM``, with layer normalization or without. Its class becomes
    one of the same name, derived from it.

    Args:
        model: any module, itself an LSTM or not.
        report: print a line for each LSTM: what became of it, and why.

    Returns:
        The model.

    Warns:
        UserWarning: for each module that was left as it is, with the reason and what can be done:
            a subclass with a ``forward`` of its own, what ``torch.jit`` has compiled or torch has
            quantized, another class that is named like an LSTM, one in a list or another attribute
            of the model that is none of its modules. Also for a ``forward`` of the instance that
            may not call ours, and if there is nothing to convert.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(96, 32), torch.nn.LSTM(32, 64))
        >>> model = lstm_ext.convert(model)
        >>> type(model[1])
        <class 'lstm_ext.layer.LSTM'>
    """
    lines = _convert_and_tell(model)
    if report:
        _print("convert", lines)
    return model


def _convert_and_tell(model: nn.Module) -> list[_Line]:
    """Convert a model, and return a line for each LSTM in it; :func:`convert` is this."""
    lines, converted = [], []
    for name, module in list(model.named_modules()):
        if isinstance(module, (LSTM, LSTMCell)) or _other_classes.is_ours(module):
            lines.append(_Line(name, type(module).__name__, "is one of lstm_ext's already"))
            continue
        reason = _why_left(module)
        if reason is None:
            reason = _become_ours(module)
        if reason is not None:
            if reason:
                lines.append(_Line(name, type(module).__name__, f"left as it is: {reason}"))
                _warn(f"convert left {_where(name, module)} as it is: {reason}")
            continue
        converted.append((name, module))
        lines.append(_Line(name, type(module).__name__, "converted"))
    lines += _rebind_forwards(model, converted)
    if not lines:
        _warn(
            f"convert found no torch.nn.LSTM or torch.nn.LSTMCell in {type(model).__name__}: "
            "nothing was converted"
        )
    return lines


def revert(model: Model, *, report: bool = False) -> Model:
    """Undo :func:`convert`: make every ``lstm_ext.LSTM`` and ``LSTMCell`` one of torch's, in place.

    Modules and parameters stay the same objects, as in convert. What was of torchaudio's class is
    so again. Some tools look at a module's exact class or compile its source, and need this first:
    ``torch.jit.script``, ``torch.ao.quantization.quantize_dynamic``.

    Args:
        model: any module, itself an LSTM or not.
        report: print a line for each LSTM: what became of it, and why.

    Returns:
        The model.

    Warns:
        UserWarning: for each of our modules that was left as it is, with the reason: a class that
            derives from ours, a cell that torch does not have, or a frozen module (call
            :func:`lstm_ext.unfreeze` first). Also for ``checkpoint_every``, which torch's module
            does not have.

    Example:
        >>> model = lstm_ext.revert(torch.nn.Sequential(lstm_ext.LSTM(32, 64)))
        >>> type(model[0])
        <class 'torch.nn.modules.rnn.LSTM'>
    """
    lines, reverted = [], []
    for name, module in list(model.named_modules()):
        kind = _plain_kind(module)
        theirs = _TORCHS.get(kind) or vars(kind).get("_lstm_ext_joined_to")
        beyond = _step_options.names(module)
        plain = _variants.of_module(module) is _variants.PLAIN and not beyond
        if theirs is not None and plain:
            if isinstance(module, LSTM):
                if module.checkpoint_every is not None:
                    _warn(
                        f"revert: {_where(name, module)} loses checkpoint_every="
                        f"{module.checkpoint_every}, which torch.nn.LSTM does not have"
                    )
                vars(module).pop("checkpoint_every", None)
            _set_class(module, theirs)
            reverted.append(module)
            lines.append(_Line(name, type(module).__name__, "reverted"))
        elif isinstance(module, (LSTM, LSTMCell)):
            frozen = isinstance(module, (FrozenLSTM, FrozenLSTMCell))
            cell = _variants.of_module(module)
            if frozen:
                reason = "it is frozen; call lstm_ext.unfreeze first"
            elif theirs is not None or beyond:
                names = beyond or [cell.name]
                reason = f"torch's modules have no {', '.join(names)}"
            else:
                reason = "its class derives from lstm_ext's"
            lines.append(_Line(name, type(module).__name__, f"left as it is: {reason}"))
            _warn(f"revert left {_where(name, module)} as it is: {reason}")
    forwards = {ours: theirs for theirs, ours in _forwards().items()}
    _rebind.rebind(model, reverted, forwards)
    if report:
        _print("revert", lines)
    return model


def _plain_kind(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, or the one that a parametrization was put over."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _why_left(module: nn.Module) -> str | None:
    """Say why a module is not to be converted; "" for no LSTM at all, None if it is to be."""
    if isinstance(module, torch.jit.ScriptModule):
        named = "LSTM" in str(module.original_name).upper()
        compiled = "it was compiled by torch.jit; convert the model before that"
        return compiled if named and not _holds_lstm(module) else ""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        base = nn.LSTM if isinstance(module, nn.LSTM) else nn.LSTMCell
        if any(not _calls_super(forward) for forward in _own_forwards(type(module), base)):
            return (
                f"its forward is its own and does not call that of nn.{base.__name__}; call "
                f"super().forward in it, or derive it from lstm_ext.{base.__name__}"
            )
        return None
    reason = _other_classes.why_left(module)
    if reason != "":
        return reason
    if "quantiz" in type(module).__module__ and "LSTM" in type(module).__name__.upper():
        return "it is quantized; convert the model before that, or revert to use torch's"
    if "LSTM" in type(module).__name__.upper() and not _holds_lstm(module):
        return (
            "its class is named like an LSTM but does not derive from torch.nn's; if it computes "
            "one, lstm_ext.LSTM or lstm_ext.LSTMCell can take its place by hand"
        )
    return ""


def _holds_lstm(module: nn.Module) -> bool:
    """Whether an LSTM is somewhere inside, which is then judged by itself."""
    return any(
        m is not module
        and (isinstance(m, (nn.LSTM, nn.LSTMCell)) or "LSTM" in _class_name(m).upper())
        for m in module.modules()
    )


def _class_name(module: nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))


def _own_forwards(kind: type, base: type) -> Iterator[Any]:
    """Yield what the classes between kind and base define as forward."""
    for cls in kind.__mro__:
        if cls is base:
            return
        if "forward" in vars(cls):
            yield vars(cls)["forward"]


def _calls_super(function: Any) -> bool:
    """Whether a forward calls super().forward somewhere."""
    return any("forward" in _attributes_of_super(code) for code in _codes(function))


def _attributes_of_super(code: CodeType) -> Iterator[str]:
    """Yield what is looked up in the result of super(), as the bytecode has it."""
    called: bool | None = None  # None outside; then whether super has been called
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_SUPER_"):  # from Python 3.12 on: both in one
            yield step.argval
            called = None
        elif step.opname == "LOAD_GLOBAL" and step.argval == "super":
            called = False
        elif called is False and step.opname.startswith("CALL"):
            called = True
        elif called and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield step.argval
            called = None


def _codes(function: Any) -> Iterator[CodeType]:
    """Yield the code of a function, of those inside it, and of those that it wraps."""
    functions, seen = [function], set()
    while functions:
        function = functions.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        codes: list[Any] = [function.__code__]
        while codes:
            code = codes.pop()
            if isinstance(code, CodeType):
                yield code
                codes += code.co_consts
        functions += _rebind.contents(function)


def _become_ours(module: nn.Module) -> str | None:
    """Give a module one of our classes; say why if that cannot be."""
    kind = _plain_kind(module)
    base = nn.LSTM if isinstance(module, nn.LSTM) else nn.LSTMCell
    try:
        if _other_classes.find(kind) is not None:
            _set_class(module, _other_classes.derived(kind))
        else:
            _set_class(module, _OURS[base] if kind is base else _joined(kind, _OURS[base]))
    except TypeError as error:
        return f"its class cannot be changed ({error})"
    return None


def _set_class(module: nn.Module, kind: Kind) -> None:
    old = type(module)
    if parametrize.is_parametrized(module):
        # The class that torch made for this module alone, over the other base.
        members = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), members)
    module.__class__ = kind


_joined_classes: weakref.WeakKeyDictionary[Kind, Kind] = weakref.WeakKeyDictionary()
_joining = threading.Lock()


def _joined(theirs: Kind, ours: Kind) -> Kind:
    """Return the class that derives from a subclass of torch's module, and then from ours."""
    with _joining:
        if theirs not in _joined_classes:

            def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
                # By the class that it was made from: pickle finds no class that was made here.
                _, _, *rest = super(joined, self).__reduce_ex__(protocol)
                return _new_joined, (theirs, ours), *rest

            members = {
                "__doc__": theirs.__doc__,
                "__module__": theirs.__module__,
                "__qualname__": theirs.__qualname__,
                "__reduce_ex__": reduce,
                "_lstm_ext_joined_to": theirs,
            }
            metaclass: Any = type(theirs)
            joined: Kind = metaclass(theirs.__name__, (theirs, ours), members)
            _joined_classes[theirs] = joined
        return _joined_classes[theirs]


def _new_joined(theirs: Kind, ours: Kind) -> nn.Module:
    kind = _joined(theirs, ours)
    return kind.__new__(kind)


def _forwards() -> dict[Any, Any]:
    """Return what takes the place of which forward."""
    others = {theirs.forward: ours.forward for theirs, ours in _other_classes.pairs()}
    return {**_FORWARDS, **others}


def _rebind_forwards(model: nn.Module, converted: list[tuple[str, nn.Module]]) -> Iterable[_Line]:
    """Put our forward where torch's was kept; warn of one on an instance that keeps none."""
    lines = []
    found = _rebind.rebind(model, [module for _, module in converted], _forwards())
    for name, module in converted:
        if "forward" in vars(module) and module not in found.rebound:
            reason = (
                "it has a forward of its own as an attribute, which may not call that of its "
                "class; convert the model before that is put there"
            )
            lines.append(_Line(name, type(module).__name__, f"may not run: {reason}"))
            _warn(f"convert: {_where(name, module)} may not run lstm_ext's forward: {reason}")
    for name, module in found.hidden:
        if any(_is_torchs(inner) for inner in module.modules()):
            reason = (
                "it is in an attribute of the model, but none of its modules; convert it by "
                "itself, or make it one (torch.nn.ModuleList)"
            )
            lines.append(_Line(name, type(module).__name__, f"left as it is: {reason}"))
            _warn(f"convert left {_where(name, module)} as it is: {reason}")
    return lines


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module is a torch.nn.LSTM or LSTMCell that is none of ours."""
    return isinstance(module, (nn.LSTM, nn.LSTMCell)) and not isinstance(module, (LSTM, LSTMCell))


def _where(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _warn(message: str) -> None:
    # At the caller of convert or revert, however deep this was called.
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(f"lstm_ext.{message}", stacklevel=depth)


def _print(function: str, lines: Iterable[_Line]) -> None:
    print(f"lstm_ext.{function}:")
    for line in lines:
        print(f"  {line.name or '(the model itself)'}: {line.kind}: {line.result}")
