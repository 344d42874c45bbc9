"""LSTMs that somebody else's code builds, built as ours."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lstm_ext.cell import LSTMCell
from lstm_ext.convert import _become_ours, _why_left
from lstm_ext.layer import LSTM


class _Block:
    """What was built in one ``with`` block."""

    def __init__(self) -> None:
        self.lines: list[str] = []  # of the report
        self.left: set[type] = set()  # classes that stay as they are


class _BlocksOfThread(threading.local):
    def __init__(self) -> None:
        self.blocks: list[_Block] = []


_here = _BlocksOfThread()


@contextmanager
def replacing(*, report: bool = False) -> Iterator[None]:
    """Make every ``nn.LSTM`` and ``nn.LSTMCell`` that is built inside the block one of ours.

    For models that other people's code constructs. torch's own constructor runs, and the module
    that it has built is then given our class. So arguments, errors, initial weights from a seed,
    the state dict and ``isinstance`` are torch's, however the code got hold of ``nn.LSTM``.

    The block counts for the thread that is in it. Other threads build torch's modules. Blocks may
    be nested. What is copied or unpickled inside a block keeps its class.

    While any thread is in a block, ``nn.LSTM`` and ``nn.LSTMCell`` have another ``__init__``, which
    asks which thread calls it. The last thread to leave puts the old one back.

    Args:
        report: print a line for each LSTM that was built, when the block has ended.

    Warns:
        UserWarning: for each class that derives from torch's LSTM or LSTMCell and not from ours,
            when the first instance of it is built. It stays as it is; the warning says why and what
            can be done. Also at the end of a block that has built no LSTM.

    Example:
        >>> with lstm_ext.replacing():
        ...     model = torch.nn.Sequential(torch.nn.LSTM(10, 20))
        >>> type(model[0])
        <class 'lstm_ext.layer.LSTM'>
    """
    block, blocks = _Block(), _here.blocks
    _constructors.install()
    blocks.append(block)
    try:
        yield
    finally:
        # Of the thread that entered, whichever ends a generator with a block in it.
        blocks.remove(block)
        _constructors.uninstall()
    if report:
        print("lstm_ext.replacing:")
        for line in block.lines:
            print(f"  {line}")
    if not block.lines:
        warnings.warn(
            "lstm_ext.replacing: no torch.nn.LSTM or torch.nn.LSTMCell was built in the block",
            stacklevel=3,
        )


def _after_init(module: nn.Module, base: type[nn.Module]) -> None:
    """Make what torch has built ours, or say why not."""
    blocks = _here.blocks
    kind = type(module)
    if not blocks:
        return
    if kind is base:
        reason = _become_ours(module)
    elif isinstance(module, (LSTM, LSTMCell)):
        reason = None
    else:
        reason = _why_left(module) or (
            f"its class derives from nn.{base.__name__}; lstm_ext.convert(model) takes it"
        )
    # Not the class's own: it may tell of what its constructor has yet to set.
    options = base.extra_repr(module)
    result = "one of lstm_ext's" if reason is None else f"left as it is: {reason}"
    for block in blocks:
        block.lines.append(f"{kind.__name__}({options}): {result}")
    if reason is not None:
        is_new = not any(kind in block.left for block in blocks)
        for block in blocks:
            block.left.add(kind)
        if is_new:
            # At the call of nn.LSTM.__init__.
            warnings.warn(
                f"lstm_ext.replacing left {kind.__name__} as it is: {reason}", stacklevel=3
            )


class _Constructors:
    """The ``__init__`` of torch's modules, ours while any thread is in a block."""

    def __init__(self, *classes: Any) -> None:
        self._classes = classes
        self._lock = threading.Lock()
        self._open = 0
        self._put: dict[Any, tuple[Callable[..., None], Callable[..., None]]] = {}

    def install(self) -> None:
        with self._lock:
            if self._open == 0:
                for cls in self._classes:
                    old = vars(cls)["__init__"]
                    self._put[cls] = old, _replacing_init(cls, old)
                    cls.__init__ = self._put[cls][1]
            self._open += 1

    def uninstall(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                for cls, (old, new) in self._put.items():
                    # What another library put over ours is its own to take away; below it, ours
                    # does nothing outside of blocks.
                    if vars(cls)["__init__"] is new:
                        cls.__init__ = old
                self._put.clear()


_constructors = _Constructors(nn.LSTM, nn.LSTMCell)


def _replacing_init(base: Any, old: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(old)
    def replacing_init(self: Any, *arguments: Any, **options: Any) -> None:
        old(self, *arguments, **options)
        _after_init(self, base)

    return replacing_init
