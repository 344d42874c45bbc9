"""Bound methods that were kept somewhere in a model, replaced by those of the new class."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

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


class Found(NamedTuple):
    """What was met in a model's attributes."""

    rebound: set[nn.Module]  # the modules for which something was replaced
    hidden: list[tuple[str, nn.Module]]  # modules that are none of the model's, and where


def rebind(model: nn.Module, modules: Collection[nn.Module], methods: Methods) -> Found:
    """Replace bound methods of some modules, wherever the model's modules keep them.

    Args:
        model: whose modules' attributes are looked through: bound methods, ``functools.partial``,
            functions with their closures, lists, tuples, dicts, objects that can be called, and
            what they hold in turn.
        modules: the modules to which the methods are bound.
        methods: from each function to the one that takes its place.
    """
    search = _Search(set(modules), methods)
    own = set(model.modules())
    hidden: dict[nn.Module, str] = {}
    for prefix, holder in model.named_modules():
        attributes = vars(holder)
        for name, value in list(attributes.items()):
            if name in _TABLES:
                continue
            new = search.replace(value)
            if new is not value:
                attributes[name] = new
            for module in search.met - own - hidden.keys():
                hidden[module] = f"{prefix}.{name}" if prefix else name
    return Found(search.found, [(name, module) for module, name in hidden.items()])


# Of a vocabulary or the like: not for methods.
_LARGE = 1000
# torch's own, of parameters, buffers, submodules and the like.
_TABLES = frozenset(vars(nn.Module()))


class _Search:
    def __init__(self, modules: set[nn.Module], methods: Methods) -> None:
        self.modules = modules
        self.methods = methods
        self.found: set[nn.Module] = set()
        self.met: set[nn.Module] = set()
        self.seen: dict[int, Any] = {}  # by identity; kept, so that no address is used again

    def replace(self, value: Any) -> Any:
        """Return what takes the place of a value; functions are changed in place."""
        if isinstance(value, nn.Module):
            self.met.add(value)
            return value
        if isinstance(value, MethodType):
            return self._method(value)
        if not self._may_hold(value) or id(value) in self.seen:
            return value
        self.seen[id(value)] = value
        if isinstance(value, functools.partial):
            return self._partial(value)
        if type(value) is tuple:
            items = tuple(map(self.replace, value))
            return value if all(map(operator.is_, items, value)) else items
        if isinstance(value, FunctionType):
            self._function(value)
        elif type(value) is list:
            self._items(value, enumerate(value))
        else:
            attributes: dict[Any, Any] = value if type(value) is dict else vars(value)
            # What a functools.lru_cache calls, for one, is not its __wrapped__.
            of_effect = ((k, v) for k, v in attributes.items() if k != "__wrapped__")
            self._items(attributes, of_effect)
        return value

    @staticmethod
    def _may_hold(value: Any) -> bool:
        """Whether something is looked into: what is called, and what keeps several of that."""
        if isinstance(value, (functools.partial, FunctionType)):
            return True
        if type(value) in (list, tuple, dict):
            return len(value) <= _LARGE
        is_object = callable(value) and not isinstance(value, type) and hasattr(value, "__dict__")
        # Not into the compiler's, for one.
        return is_object and not type(value).__module__.startswith("torch.")

    def _items(self, into: Any, items: Iterable[tuple[Any, Any]]) -> None:
        for key, value in list(items):
            new = self.replace(value)
            if new is not value:
                into[key] = new

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
        before = function.__defaults__
        if before:
            after = tuple(map(self.replace, before))
            if not all(map(operator.is_, after, before)):
                function.__defaults__ = after
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
