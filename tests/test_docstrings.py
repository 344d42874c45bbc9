"""Docstrings of public names: each has an example, and the examples give what they say.

`public` is also what tests/test_site.py looks for in the site.
"""

import doctest
import importlib
import inspect
import pkgutil
import types

import pytest
import torch

import lstm_ext

# Made by freeze, and not by their names; what plot asks of its arguments.
WITHOUT_EXAMPLE = {
    "lstm_ext.frozen.FrozenLSTM",
    "lstm_ext.frozen.FrozenLSTMCell",
    "lstm_ext.inspect.plot.Trace",
    "lstm_ext.inspect.plot.Errors",
}


def modules():
    """Public modules: no underscore in their names, and not the command line."""
    yield lstm_ext
    for found in pkgutil.walk_packages(lstm_ext.__path__, "lstm_ext."):
        parts = found.name.split(".")[1:]
        if parts[0] != "cli" and not any(part.startswith("_") for part in parts):
            yield importlib.import_module(found.name)


def public():
    """Yield public names: of __all__, and of what a public module defines without underscore."""
    for module in modules():
        listed = getattr(module, "__all__", None)
        for name, value in vars(module).items():
            if isinstance(value, types.ModuleType) or name.startswith("_"):
                continue
            if not inspect.isclass(value) and not inspect.isfunction(value):
                continue
            if name in listed if listed is not None else value.__module__ == module.__name__:
                yield f"{module.__name__}.{name}", value


PUBLIC = dict(public())


def test_everything_public_is_found():
    assert len(PUBLIC) > 35
    values = [getattr(lstm_ext, name) for name in lstm_ext.__all__ if name != "__version__"]
    assert [v for v in values if not inspect.ismodule(v) and v not in PUBLIC.values()] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, needed in (("plot", "matplotlib"), ("onnx", "onnxscript")):
        if part in name:
            pytest.importorskip(needed)
    value = PUBLIC[name]
    assert value.__doc__
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(value, name, globs={"torch": torch, "lstm_ext": lstm_ext})
    assert test.examples or name in WITHOUT_EXAMPLE
    said = []
    torch.manual_seed(0)
    results = doctest.DocTestRunner().run(test, out=said.append)
    assert results.failed == 0, "".join(said)
