"""A model with a frozen part refuses as a whole what that part refuses.

``train()``, ``half()``, ``to()``, ``to_empty()`` and ``load_state_dict()`` change one module after
the other, and torch has no hook that runs before the first. So the methods of ``torch.nn.Module``
ask the frozen modules inside first, from the first ``freeze`` of a process on. Nothing else about
them changes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_installing = threading.Lock()
_MARK = "_lstm_ext_asks_frozen_modules"


def install(frozen_class: type[Any]) -> None:
    """Let nn.Module's methods ask every module of a class before they change anything."""

    def frozen_in(module: nn.Module) -> Iterator[Any]:
        return (m for m in module.modules() if isinstance(m, frozen_class))

    def asks(name: str, ask: Callable[..., None]) -> None:
        method = getattr(nn.Module, name)

        @functools.wraps(method)
        def asking(self: nn.Module, *arguments: Any, **options: Any) -> Any:
            for frozen in frozen_in(self):
                ask(frozen, *arguments, **options)
            return method(self, *arguments, **options)

        setattr(nn.Module, name, asking)

    with _installing:
        if _MARK in vars(nn.Module):
            return
        setattr(nn.Module, _MARK, True)
        asks("train", lambda frozen, mode=True: frozen._check_train(mode))
        asks("_apply", lambda frozen, fn, recurse=True: frozen._check_apply(fn))
        asks("load_state_dict", lambda frozen, *_, **__: frozen._check_load_state_dict())
        asks("to_empty", lambda frozen, **_: frozen._check_to_empty())
