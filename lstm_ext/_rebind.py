"""Bound methods that were kept somewhere in a model, replaced by those of the new class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

Methods = Mapping[Callable[..., Any], Callable[..., Any]]


def contents(function: FunctionType) -> list[Any]:
    """Return what a function holds: in its closure, its defaults, and as what it wraps."""
    cells = [_content(cell) for cell in function.__closure__ or ()]
    return [*cells, *(function.__defaults__ or ()), getattr(function, "__wrapped__", None)]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def rebind(model: nn.Module, modules: Collection[nn.Module], methods: Methods) -> set[nn.Module]:
    """Replace bound methods of some modules, wherever the model's modules keep them.

    Args:
        model: whose modules' attributes are looked through: bound methods, ``functools.partial``,
            functions with their closures, and what they hold in turn.
        modules: the modules to which the methods are bound.
        methods: from each function to the one that takes its place.

    Returns:
        The modules for which something was replaced.
    """
    search = _Search(set(modules), methods)
    if modules:
        for holder in model.modules():
            attributes = vars(holder)
            for name, value in list(attributes.items()):
                new = search.replace(value)
                if new is not value:
                    attributes[name] = new
    return search.found


class _Search:
    def __init__(self, modules: set[nn.Module], methods: Methods) -> None:
        self.modules = modules
        self.methods = methods
        self.found: set[nn.Module] = set()
        self.seen: dict[int, Any] = {}  # by identity; kept, so that no address is used again

    def replace(self, value: Any) -> Any:
        """Return what takes the place of a value; functions are changed in place."""
        if isinstance(value, MethodType):
            return self._method(value)
        if not isinstance(value, (functools.partial, FunctionType)) or id(value) in self.seen:
            return value
        self.seen[id(value)] = value
        if isinstance(value, FunctionType):
            self._function(value)
            return value
        return self._partial(value)

    def _method(self, method: MethodType) -> Any:
        owner = method.__self__
        if isinstance(owner, nn.Module) and owner in self.modules:
            new = self.methods.get(method.__func__)
            if new is not None:
                self.found.add(owner)
                return MethodType(new, owner)
            if isinstance(method.__func__, FunctionType):
                self.replace(method.__func__)
        return method

    def _function(self, function: FunctionType) -> None:
        for cell in function.__closure__ or ():
            value = _content(cell)
            new = self.replace(value)
            if new is not value:
                cell.cell_contents = new
        if function.__defaults__:
            function.__defaults__ = tuple(map(self.replace, function.__defaults__))
        self._wrapped(function)

    def _partial(self, partial: functools.partial[Any]) -> Any:
        function, arguments = self.replace(partial.func), list(map(self.replace, partial.args))
        keywords = {name: self.replace(value) for name, value in partial.keywords.items()}
        self._wrapped(partial)
        before = (partial.func, *partial.args, *partial.keywords.values())
        after = (function, *arguments, *keywords.values())
        if all(a is b for a, b in zip(before, after, strict=True)):
            return partial
        new = functools.partial(function, *arguments, **keywords)
        new.__dict__.update(partial.__dict__)
        return new

    def _wrapped(self, wrapper: Any) -> None:
        if "__wrapped__" in vars(wrapper):
            wrapper.__wrapped__ = self.replace(wrapper.__wrapped__)
