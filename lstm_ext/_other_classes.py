"""LSTMs that other packages write by themselves, and that convert knows by the class's name.

A package is not imported for that. Such a module keeps its parameters, submodules and state dict.
Its class becomes one derived from its own, with a forward that computes in the fused operators, or
in the package's way where a call is not the usual one.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lstm_ext import _backend, _onnx, _recurrence, _step_options
from lstm_ext._steps import Steps
from lstm_ext.functional import LayerWeights, lstm

Kind = type[nn.Module]


class _Known(NamedTuple):
    """What is known of a class.

    run is its forward in fused operators, None for a call that is the package's to compute.
    why_not says what of a module, or of its submodules, run does not compute; None if nothing.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Any], str | None]


def find(kind: Kind) -> _Known | None:
    """Return what is known of exactly this class."""
    return _KNOWN.get((kind.__module__, kind.__qualname__))


def is_ours(module: nn.Module) -> bool:
    """Whether convert has been there."""
    return "_lstm_ext_known" in vars(type(module))


def why_left(module: nn.Module) -> str | None:
    """Say why a module is not to be converted; None if it is to be, "" if its class is unknown."""
    known = find(type(module))
    if known is not None:
        return known.why_not(module)
    for base in type(module).__mro__[1:]:
        known = find(base)
        if known is not None:
            return (
                f"its class derives from {known.name}, of which convert takes the class itself "
                "alone; if it computes the same, lstm_ext.LayerNormLSTM can take its place by hand"
            )
    return ""


_derived_classes: weakref.WeakKeyDictionary[Kind, Kind] = weakref.WeakKeyDictionary()
_deriving = threading.Lock()


def derived(theirs: Kind) -> Kind:
    """Return the class that computes in our operators, derived from the package's."""
    with _deriving:
        if theirs not in _derived_classes:
            known = find(theirs)
            assert known is not None
            _derived_classes[theirs] = _derive(theirs, known)
        return _derived_classes[theirs]


def pairs() -> list[tuple[Kind, Kind]]:
    """Return the packages' classes met so far, each with ours."""
    with _deriving:
        return list(_derived_classes.items())


def _derive(theirs: Kind, known: _Known) -> Kind:
    run = known.run

    @functools.wraps(theirs.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        out = run(self, *args, **options)
        return theirs.forward(self, *args, **options) if out is None else out

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # By the package's class: pickle finds none that was made here.
        _, _, *rest = super(made, self).__reduce_ex__(protocol)
        return _new_derived, (theirs,), *rest

    def prepare_scriptable(self: Any) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile what lstm_ext.convert made of a {known.name}; "
            "lstm_ext.revert(model) gives it its own class again, which it can"
        )

    members = {
        "__doc__": theirs.__doc__,
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__reduce_ex__": reduce,
        "__prepare_scriptable__": prepare_scriptable,
        "forward": forward,
        "_lstm_ext_joined_to": theirs,
        "_lstm_ext_known": known,
    }
    metaclass: Any = type(theirs)
    made: Kind = metaclass(theirs.__name__, (theirs,), members)
    return made


def _new_derived(theirs: Kind) -> nn.Module:
    # Where the package has changed since, its class is taken as it is.
    kind = theirs if find(theirs) is None else derived(theirs)
    return kind.__new__(kind)


def _is_plain(module: Any, kind: Kind) -> bool:
    """Whether a submodule is of torch's class, and nothing hangs on its calls."""
    own = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return own is kind and not any(hooks) and "forward" not in vars(module)


def _is_usual(input: Any, state: Any, weight: Tensor) -> bool:
    """Whether a call is (L, N, I) from two (N, H) or None, all of one dtype and device."""
    if not isinstance(input, Tensor) or input.dim() != 3 or 0 in input.shape[:2]:
        return False
    tensors = [input]
    if state is not None:
        if not isinstance(state, (list, tuple)) or len(state) != 2:
            return False
        tensors += state
        size = (input.shape[1], weight.shape[0] // 4)
        if any(not isinstance(s, Tensor) or s.shape != size for s in state):
            return False
    autocast = torch._C._is_any_autocast_enabled()
    return all(t.device == weight.device and (autocast or t.dtype == weight.dtype) for t in tensors)


# torchaudio.models.rnnt._CustomLSTM: of the predictor of its RNN-T models.


def _torchaudio_why_not(module: Any) -> str | None:
    parts = module.x2g, module.p2g, module.g_norm, module.c_norm
    normed = type(module.g_norm) is not nn.Identity
    norm = nn.LayerNorm if normed else nn.Identity
    kinds = nn.Linear, nn.Linear, norm, norm
    if not all(map(_is_plain, parts, kinds)):
        return (
            "x2g, p2g, g_norm or c_norm is not what torchaudio builds, or has hooks or a forward "
            "of its own, which the fused operator would not call"
        )
    if module.p2g.bias is not None or (normed and module.x2g.bias is not None):
        return "x2g or p2g has a bias that torchaudio's has not"
    if normed:
        H = module.hidden_dim
        sizes = (module.g_norm.normalized_shape, 4 * H), (module.c_norm.normalized_shape, H)
        plain = module.g_norm.eps == module.c_norm.eps and all(
            n.weight is not None and n.bias is not None for n in (module.g_norm, module.c_norm)
        )
        if not plain or any(tuple(shape) != (size,) for shape, size in sizes):
            return "its layer normalisation is not what torchaudio builds"
    return None


def _torchaudio_run(module: Any, input: Any, state: Any) -> tuple[Tensor, list[Tensor]] | None:
    compiling = torch.compiler.is_compiling()
    tracing = not compiling and torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if tracing or _onnx.exporting():
        if isinstance(input, Tensor):
            _backend.log_path("_CustomLSTM", input, "torchaudio's own forward: a tool is tracing")
        return None
    if isinstance(input, Tensor) and input.is_cpu and len(input) == 1:
        # The operator lays weight_hh out anew at each call, which one step does not pay for.
        _backend.log_path("_CustomLSTM", input, "torchaudio's own forward: one step")
        return None
    # What is put in the place of a submodule, or on it, after convert (quantization) is called.
    if _torchaudio_why_not(module) is not None:
        return None
    w = LayerWeights(module.x2g.weight, module.p2g.weight, module.x2g.bias)
    if not _is_usual(input, state, w.w_hh) or input.shape[2] != w.w_ih.shape[1]:
        return None
    if state is None:
        h = input.new_zeros(input.shape[1], w.w_hh.shape[1])
        c = torch.zeros_like(h)
    else:
        h, c = state
    if type(module.g_norm) is nn.Identity:
        output, h_n, c_n = lstm(input, (h.unsqueeze(0), c.unsqueeze(0)), [w])
        h_n, c_n = h_n.squeeze(0), c_n.squeeze(0)
    else:
        g, n = module.g_norm, module.c_norm
        w = w._replace(b_ih=g.bias)
        norm = _recurrence.LayerNorm(True, True, g.eps, None, g.weight, n.weight, n.bias)
        masks, order = _recurrence.Masks(), Steps(None, None, False)
        output, h_n, c_n = _recurrence.layer(input, h, c, w, _step_options.NONE, norm, masks, order)
    # Under autocast, states stay in their dtype there.
    return output.to(h.dtype), [h_n.to(h.dtype), c_n.to(c.dtype)]


# By module and name of the class. tests/test_other_classes.py and tests/test_published.py try them.
_KNOWN = {
    ("torchaudio.models.rnnt", "_CustomLSTM"): _Known(
        "torchaudio.models.rnnt._CustomLSTM", _torchaudio_run, _torchaudio_why_not
    ),
}
