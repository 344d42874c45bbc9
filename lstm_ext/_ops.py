"""Loads the compiled operators ``torch.ops.lstm_ext.*`` and tells PyTorch their output shapes.

The fake rules below serve ``meta`` tensors, ``torch.compile`` and ``torch.export``. Shapes:
N batch, I input, H hidden.
"""

from __future__ import annotations

import functools
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, NoReturn

import torch
from torch import Tensor


def _refuse(reason: str, built: str | None = None, error: BaseException | None = None) -> NoReturn:
    raise ImportError(
        f"lstm_ext {reason}; torch {torch.__version__} is installed; {_remedy(built)}"
    ) from error


def _remedy(built: str | None) -> str:
    """Say what to install: another wheel where this came as one, else a new build."""
    try:
        release, _, wheel = metadata.version("lstm_ext").partition("+torch")
    except metadata.PackageNotFoundError:
        release, wheel = "", ""
    rebuild = (
        "pip install --no-build-isolation --no-deps --force-reinstall lstm_ext "
        "(or, in a checkout, pip install --no-build-isolation -e .)"
    )
    if not wheel:
        return f"rebuild it in this environment: {rebuild}"
    if built is None or _release(built) == _release(torch.__version__):
        again = f"'lstm_ext=={release}+torch{wheel}'"
        return f"install it again: pip install --no-deps --force-reinstall {again}"
    wanted, came_with = (".".join(_release(version)) for version in (torch.__version__, built))
    return (
        "a wheel is for one release of torch: install that of yours, from where this one came: "
        f"pip install --no-deps 'lstm_ext=={release}+torch{wanted}.cpu', "
        f"or the torch of this one: pip install 'torch=={came_with}.*'; "
        f"where there is no such wheel, build it: {rebuild}"
    )


def _release(version: str) -> tuple[str, ...]:
    """Major and minor version, between which PyTorch's C++ interface changes."""
    return tuple(version.split("+")[0].split(".")[:2])


def load() -> Any:
    """Import ``_C``.

    Returns:
        The module ``lstm_ext._C``.

    Raises:
        ImportError: it was not built, or was built against another torch; one line says against
            which, and what to install. Or Python is a free-threaded one.
    """
    if "t" in getattr(sys, "abiflags", ""):
        raise ImportError(
            "lstm_ext is not for a free-threaded Python: it was never tested without the GIL; "
            "use the ordinary Python of the same version"
        )
    try:
        from lstm_ext import _built_with
    except ImportError as error:
        _refuse("was not built", error=error)
    version = _built_with.TORCH_VERSION
    if _release(version) != _release(torch.__version__):
        _refuse(f"was built against torch {version}", version)
    try:
        from lstm_ext import _C
    except ImportError as error:
        _refuse(f"was built against torch {version} and does not load ({error})", version, error)
    return _C


_C = load()


# The operators themselves, and the short way to some, which returns None for what it leaves to
# the operator: see csrc/python/direct_calls.h.
lstm_cell = torch.ops.lstm_ext.lstm_cell
lstm = torch.ops.lstm_ext.lstm
lstm_layer = torch.ops.lstm_ext.lstm_layer
lstm_layer_forward = torch.ops.lstm_ext.lstm_layer_forward
lstm_layer_states = torch.ops.lstm_ext.lstm_layer_states
lstm_layer_states_forward = torch.ops.lstm_ext.lstm_layer_states_forward
lstm_layer_projected = torch.ops.lstm_ext.lstm_layer_projected
lstm_layer_projected_forward = torch.ops.lstm_ext.lstm_layer_projected_forward
lstm_recurrence = torch.ops.lstm_ext.lstm_recurrence
lstm_recurrence_forward = torch.ops.lstm_ext.lstm_recurrence_forward
lstm_packed = torch.ops.lstm_ext.lstm_packed
lstm_layer_pack = torch.ops.lstm_ext.lstm_layer_pack
lstm_layer_packed = torch.ops.lstm_ext.lstm_layer_packed
fast_lstm_cell: Callable[..., tuple[Tensor, Tensor] | None] = _C.lstm_cell
# Of a module: see lstm_ext/_call.py.
fast_cell_module: Callable[..., tuple[Tensor, Tensor] | None] = _C.lstm_cell_module
fast_cell_with_steps: Callable[..., tuple[Tensor, Tensor] | None] = _C.lstm_cell_module_with_steps
fast_frozen_cell: Callable[..., tuple[Tensor, Tensor] | None] = _C.frozen_lstm_cell_module
fast_lstm_module: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]] | None] = _C.lstm_module
fast_lstm_with_steps: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]] | None] = (
    _C.lstm_module_with_steps
)
fast_frozen_lstm: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]] | None] = _C.frozen_lstm_module


def keep_whole(operator: str) -> None:
    """Let inductor, where it is compiling, call an operator instead of asking for its parts.

    Where the environment has CI set, inductor refuses an operator that it generates no code for and
    that has a decomposition; ours have one for ONNX. It knows no other way to be told, and is
    loaded long after this package: the rules of shapes, which it runs first, tell it.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None:
        lowering.FALLBACK_ALLOW_LIST.add(operator)


@functools.cache
def arguments_of(name: str) -> Any:
    """Return a class of named tuples: the arguments of ``lstm_ext::name``, by its schema."""
    arguments = getattr(torch.ops.lstm_ext, name).default._schema.arguments
    defaults = [a.default_value for a in arguments if a.has_default_value()]  # the last ones
    return namedtuple(name, [a.name for a in arguments], defaults=defaults)


_HAS_CUDA_RECURRENCE = torch._C._dispatch_has_kernel_for_dispatch_key(
    "lstm_ext::lstm_recurrence", "CUDA"
)


def has_recurrence_kernel(tensor: Tensor) -> bool:
    """Whether ``lstm_recurrence`` has kernels for a tensor's device, which log what they do."""
    return tensor.is_cpu or (tensor.is_cuda and _HAS_CUDA_RECURRENCE)


def _fake(name: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a rule of the shapes of ``lstm_ext::name``, for tensors of one device.

    The rule takes the arguments as :func:`arguments_of` has them.
    """

    def register(rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
        make = arguments_of(name)

        def checked(*given: Any, **named: Any) -> Any:
            keep_whole(f"lstm_ext::{name}")
            arguments = make(*given, **named)
            result = rule(arguments)  # with torch's own error, where it has one
            devices = {str(t.device) for t in _tensors(arguments)}
            if len(devices) > 1:
                # Memory that nobody has written to is no answer.
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, {' and '.join(sorted(devices))}!"
                )
            return result

        torch.library.register_fake(f"lstm_ext::{name}", checked)
        return rule

    return register


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
        # Batch sizes are int64, and on the CPU whatever the others are on.
        elif isinstance(argument, Tensor) and not (
            argument.dtype == torch.int64 and argument.device.type == "cpu"
        ):
            yield argument


@_fake("lstm_cell")
def cell_states(a: Any) -> tuple[Tensor, Tensor]:
    """Return h' and c' as torch's own cell does: with its checks, its errors, its shapes."""
    biases = a.b_ih, a.b_hh
    if not all(t.is_cuda for t in _tensors(a)):
        hy, cy = torch.lstm_cell(a.input, (a.hx, a.cx), a.w_ih, a.w_hh, *biases)
        return hy, cy
    # torch's rule for a CUDA device (2.11) knows no cell without biases: the rule without a device.
    x, h, c, *weights = (t.to("meta") for t in (a.input, a.hx, a.cx, a.w_ih, a.w_hh))
    hy, cy = torch.lstm_cell(
        x, (h, c), *weights, *(b if b is None else b.to("meta") for b in biases)
    )
    return a.hx.new_empty(hy.shape, dtype=hy.dtype), a.hx.new_empty(cy.shape, dtype=cy.dtype)


@_fake("lstm_cell_forward")
def _(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    hy, cy = cell_states(a)
    return hy, cy, hy.new_empty(hy.shape[0], 4 * hy.shape[1])


@_fake("lstm_cell_backward")
@_fake("lstm_layer_backward")
@_fake("lstm_layer_states_backward")
@_fake("lstm_layer_projected_backward")
def _(a: Any) -> tuple[Tensor | None, ...]:
    bias = a.w_hh.shape[:1]
    units = None if a.unit_weights is None else a.unit_weights.shape
    states = a.hx.shape, a.cx.shape
    shapes = [a.input.shape, *states, a.w_ih.shape, a.w_hh.shape, bias, bias, units]
    if hasattr(a, "reset_hx"):
        resets = zip((a.reset_hx, a.reset_cx), states, strict=True)
        shapes += [s if r is None else r.shape for r, s in resets]
    if hasattr(a, "w_hr"):
        shapes.append(a.w_hr.shape)
    return tuple(
        a.gates.new_empty(shape) if wanted else None
        for shape, wanted in zip(shapes, a.output_mask, strict=True)
    )


@_fake("lstm_cell_backward_accumulate")
def _(a: Any) -> tuple[Tensor | None, ...]:
    return tuple(
        a.gates.new_empty(like.shape) if wanted else None
        for like, wanted in zip((a.input, a.hx, a.cx), a.output_mask, strict=True)
    )


@_fake("lstm_layer")
@_fake("lstm_layer_packed")
@_fake("lstm_layer_projected")
def layer_states(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, h_n and c_n of a layer."""
    output = a.input.new_empty(*a.input.shape[:-1], a.hx.shape[1])
    return output, a.hx.new_empty(a.hx.shape), a.cx.new_empty(a.cx.shape)


@_fake("lstm_layer_forward")
def _(a: Any) -> tuple[Tensor, ...]:
    output, *states = layer_states(a)
    (rows, H) = output.flatten(0, -2).shape
    return output, *states, output.new_empty(rows, 4 * H), output.new_empty(rows, H)


@_fake("lstm_layer_states")
def states_of_all_steps(a: Any) -> tuple[Tensor, ...]:
    """Return output, h_n, c_n and the c of each step."""
    output, *states = layer_states(a)
    return output, *states, torch.empty_like(output)


@_fake("lstm_layer_states_forward")
def _(a: Any) -> tuple[Tensor, ...]:
    output, *states = layer_states(a)
    (rows, H) = output.flatten(0, -2).shape
    kept = output.new_empty(rows, 4 * H), output.new_empty(rows, H)
    return output, *states, torch.empty_like(output), *kept


@_fake("lstm_layer_projected_forward")
def _(a: Any) -> tuple[Tensor, ...]:
    output, *states = layer_states(a)
    rows, H = output.flatten(0, -2).shape[0], a.cx.shape[1]
    return output, *states, *(output.new_empty(rows, k) for k in (4 * H, H, H))


@_fake("lstm_recurrence")
def recurrence_states(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, h_n and c_n of a recurrence."""
    output = a.gates_x.new_empty(*a.gates_x.shape[:-1], a.hx.shape[1])
    return output, a.hx.new_empty(a.hx.shape), a.cx.new_empty(a.cx.shape)


@_fake("lstm_recurrence_forward")
def _(a: Any) -> tuple[Tensor, ...]:
    output, *states = recurrence_states(a)
    (S, P), H = output.flatten(0, -2).shape, a.cx.shape[1]
    normed, projected = 0 if a.norm is None else S, 0 if a.w_hr is None else S
    sums = torch.float64 if output.dtype == torch.float64 else torch.float32
    fed = P if a.dropout_h is None else a.dropout_h.shape[-1]  # a mask of h, or one for each gate
    sizes = (S, 4 * H), (S, H), (S, fed), (normed, 4 * H), (normed,), (projected, H), (projected, P)
    kept = [output.new_empty(size) for size in sizes]
    kept[4] = kept[4].to(sums)
    return output, *states, *kept


@_fake("lstm_recurrence_backward")
def _(a: Any) -> tuple[Tensor | None, ...]:
    of = a.gates_x, a.hx, a.cx, a.w_hh, a.bias, a.norm, a.norm_c, a.bias_c, a.w_hr
    return tuple(
        a.gates.new_empty(t.shape) if wanted and t is not None else None
        for t, wanted in zip(of, a.output_mask, strict=True)
    )
