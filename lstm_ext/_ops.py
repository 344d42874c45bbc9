"""Loads the compiled operators ``torch.ops.lstm_ext.*`` and tells PyTorch their output shapes.

The fake rules below serve ``meta`` tensors, ``torch.compile`` and ``torch.export``. Shapes:
N batch, I input, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor


def _refuse(reason: str, error: BaseException | None = None) -> NoReturn:
    raise ImportError(
        f"lstm_ext {reason}; torch {torch.__version__} is installed; "
        "rebuild it in this environment: pip install --no-build-isolation --no-deps "
        "--force-reinstall lstm_ext (or, in a checkout, pip install --no-build-isolation -e .)"
    ) from error


def _release(version: str) -> tuple[str, ...]:
    """Major and minor version, between which PyTorch's C++ interface changes."""
    return tuple(version.split("+")[0].split(".")[:2])


def load() -> Any:
    """Import ``_C``.

    Returns:
        The module ``lstm_ext._C``.

    Raises:
        ImportError: it was not built, or was built against another torch; one line says against
            which, and how to rebuild.
    """
    try:
        from lstm_ext import _built_with
    except ImportError as error:
        _refuse("was not built", error)
    built = f"was built against torch {_built_with.TORCH_VERSION}"
    if _release(_built_with.TORCH_VERSION) != _release(torch.__version__):
        _refuse(built)
    try:
        from lstm_ext import _C
    except ImportError as error:
        _refuse(f"{built} and does not load ({error})", error)
    return _C


_C = load()


# The operators themselves, and the short way to some, which returns None for what it leaves to
# the operator: see csrc/direct_calls.h.
lstm_cell = torch.ops.lstm_ext.lstm_cell
lstm = torch.ops.lstm_ext.lstm
lstm_layer = torch.ops.lstm_ext.lstm_layer
lstm_layer_forward = torch.ops.lstm_ext.lstm_layer_forward
lstm_packed = torch.ops.lstm_ext.lstm_packed
lstm_layer_pack = torch.ops.lstm_ext.lstm_layer_pack
lstm_layer_packed = torch.ops.lstm_ext.lstm_layer_packed
fast_lstm_cell: Callable[..., tuple[Tensor, Tensor] | None] = _C.lstm_cell
fast_lstm: Callable[..., tuple[Tensor, Tensor, Tensor] | None] = _C.lstm
fast_lstm_cell_packed: Callable[..., tuple[Tensor, Tensor] | None] = _C.lstm_cell_packed
fast_lstm_packed: Callable[..., tuple[Tensor, Tensor, Tensor] | None] = _C.lstm_packed


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule of the shapes of ``lstm_ext::name``, for tensors of one device."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **named: Any) -> Any:
            result = rule(*arguments, **named)  # with torch's own error, where it has one
            devices = {str(t.device) for t in _tensors((*arguments, *named.values()))}
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
def _cell_states(
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # torch's own cell on the same tensors: its checks, its errors, its shapes.
    if not all(t.is_cuda for t in _tensors((input, hx, cx, w_ih, w_hh, b_ih, b_hh))):
        hy, cy = torch.lstm_cell(input, (hx, cx), w_ih, w_hh, b_ih, b_hh)
        return hy, cy
    # torch's rule for a CUDA device (2.11) knows no cell without biases: the rule without a device.
    x, h, c, *weights = (t.to("meta") for t in (input, hx, cx, w_ih, w_hh))
    biases = (b if b is None else b.to("meta") for b in (b_ih, b_hh))
    hy, cy = torch.lstm_cell(x, (h, c), *weights, *biases)
    return hx.new_empty(hy.shape, dtype=hy.dtype), hx.new_empty(cy.shape, dtype=cy.dtype)


@_fake("lstm_cell_forward")
def _(
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    hy, cy = _cell_states(input, hx, cx, w_ih, w_hh, b_ih, b_hh)
    return hy, cy, hy.new_empty(hy.shape[0], 4 * hy.shape[1])


@_fake("lstm_cell_backward")
def _(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gates: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    bias = w_hh.shape[:1]
    shapes = (input.shape, hx.shape, cx.shape, w_ih.shape, w_hh.shape, bias, bias)
    return tuple(
        gates.new_empty(shape) if wanted else None
        for shape, wanted in zip(shapes, output_mask, strict=True)
    )


@_fake("lstm_cell_backward_accumulate")
def _(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gates: Tensor,
    grad_w_ih: Tensor | None,
    grad_w_hh: Tensor | None,
    grad_b_ih: Tensor | None,
    grad_b_hh: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    return tuple(
        gates.new_empty(like.shape) if wanted else None
        for like, wanted in zip((input, hx, cx), output_mask, strict=True)
    )


def _layer_results(
    input: Tensor, hx: Tensor, cx: Tensor, w_ih: Tensor, w_hh: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    H = w_hh.shape[1]
    output = input.new_empty(*input.shape[:-1], H)
    rows = output.flatten(0, -2).shape[0]
    states = hx.new_empty(hx.shape), cx.new_empty(cx.shape)
    return output, *states, input.new_empty(rows, 4 * H), input.new_empty(rows, H)


_fake("lstm_layer_forward")(_layer_results)


@_fake("lstm_layer")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _layer_results(*arguments)[:3]


@_fake("lstm_layer_backward")
def _(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    output: Tensor,
    gates: Tensor,
    c_before: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    bias = w_hh.shape[:1]
    shapes = (input.shape, hx.shape, cx.shape, w_ih.shape, w_hh.shape, bias, bias)
    return tuple(
        gates.new_empty(shape) if wanted else None
        for shape, wanted in zip(shapes, output_mask, strict=True)
    )


@_fake("lstm_layer_packed")
def _(
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    packed: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output = input.new_empty(*input.shape[:-1], hx.shape[1])
    return output, hx.new_empty(hx.shape), cx.new_empty(cx.shape)
