"""Which kernels run on a CUDA device, ours or torch's, and the log of the paths that calls take."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from lstm_ext import _ops

MODES = ("auto", "fused", "torch")
# setup.py reads the same variable, with values of its own: they say nothing here.
_AT_BUILD_TIME = ("", "0", "1")
_VERBOSE = os.environ.get("LSTM_EXT_VERBOSE", "") not in ("", "0")


def _from_environment() -> str:
    value = os.environ.get("LSTM_EXT_CUDA", "").strip().lower()
    if value in _AT_BUILD_TIME:
        return "auto"
    if value not in MODES:
        raise ImportError(f"LSTM_EXT_CUDA must be one of {', '.join(MODES)}, got {value!r}")
    return value


class LayerCall(NamedTuple):
    """What the choice of a layer's kernels looks at, beside its input."""

    rows: int  # of the batch
    hidden: int
    layers: int
    directions: int
    packed: bool
    projects: bool  # h is projected, which our kernels do on the CPU alone
    needs_ours: bool  # an option is used that torch's kernels do not have
    trains: bool = True  # something requires a gradient


# Where a layer by our kernels is faster than by cuDNN's, both replayed from CUDA graphs: measured
# by benchmarks/bench_cuda.py --grid on an H100 (docs/gpu.md). "trains": with backward.
_MEASURED_CAPABILITY = (9, 0)


class _Sizes(NamedTuple):
    """From which hidden size on, and up to which, how many rows at most."""

    least_hidden: int
    most_rows: dict[int, int]

    def have(self, call: LayerCall) -> bool:
        """Whether a layer is among them."""
        most = next((n for hidden, n in self.most_rows.items() if call.hidden <= hidden), 0)
        return call.hidden >= self.least_hidden and call.rows <= most


_PACKED = {
    torch.float32: _Sizes(192, {256: 128, 512: 64, 1024: 16}),
    torch.bfloat16: _Sizes(64, {256: 128, 512: 64, 1024: 32}),
    torch.float16: _Sizes(192, {256: 128, 512: 64, 1024: 32}),
}
_ONE_DIRECTION = {  # by dtype and whether it trains
    (torch.float32, False): _Sizes(100, {128: 256, 256: 128, 512: 64, 1024: 16}),
    (torch.float32, True): _Sizes(100, {128: 256, 256: 128, 512: 64, 1024: 16}),
    (torch.bfloat16, False): _Sizes(33, {128: 256, 512: 128, 1024: 64}),
    (torch.bfloat16, True): _Sizes(33, {128: 256, 512: 128, 1024: 64}),
    (torch.float16, False): _Sizes(33, {128: 256, 256: 128, 512: 64, 1024: 32}),
    (torch.float16, True): _Sizes(33, {128: 256, 256: 128, 512: 64, 1024: 32}),
}
# float16 where cuDNN keeps the weights on the chip too (H a multiple of 128, N of 8): of each
# hidden size up to these, from how many rows on, and up to how many.
_HALF_ON_CHIP = {
    False: {128: (1, 256), 256: (1, 128), 512: (32, 128), 768: (64, 128)},
    True: {128: (16, 256), 512: (16, 128), 768: (32, 128), 1024: (64, 128)},
}
# Both directions of one layer, or two layers in one direction, which cuDNN runs at once: from which
# hidden size on, and up to which, for so many rows.
_TWO_AT_ONCE = {
    (torch.float32, False): (128, 256),
    (torch.float32, True): (128, 256),
    (torch.bfloat16, False): (64, 512),
    (torch.bfloat16, True): (64, 512),
    (torch.float16, False): (64, 512),
    (torch.float16, True): (64, 512),
}
_ROWS_OF_TWO = (16, 64)


def _is_measured_faster(input: Tensor, call: LayerCall) -> bool:
    card = torch.cuda.get_device_properties(input.device)
    if (card.major, card.minor) != _MEASURED_CAPABILITY or input.dtype not in _PACKED:
        return False
    if call.hidden > 128 and call.hidden % 8 != 0:
        return False
    key = input.dtype, call.trains
    if call.layers * call.directions > 1:
        if call.layers * call.directions > 2 or call.packed:
            return False
        least, most = _TWO_AT_ONCE[key]
        fewest, many = _ROWS_OF_TWO
        return least <= call.hidden <= most and fewest <= call.rows <= many
    if call.packed:
        return call.hidden % 8 == 0 and _PACKED[input.dtype].have(call)
    if input.dtype == torch.float16 and call.hidden % 128 == 0 and call.rows % 8 == 0:
        sizes = _HALF_ON_CHIP[call.trains]
        least, most = next(
            (rows for hidden, rows in sizes.items() if call.hidden <= hidden), (1, 0)
        )
        return least <= call.rows <= most
    return _ONE_DIRECTION[key].have(call)


_mode = _from_environment()
_ops._C.set_gpu_cells_by_torch(_mode == "torch")


def cuda_backend() -> str:
    """Return which kernels run on a CUDA device: "auto", "fused" or "torch".

    :func:`set_cuda_backend` explains the three.

    Example:
        >>> lstm_ext.cuda_backend() in ("auto", "fused", "torch")
        True
    """
    return _mode


def set_cuda_backend(mode: str) -> str:
    """Choose the kernels that lstm_ext's modules and functions run on a CUDA device.

    The choice holds for the whole process and all its threads, like torch's own switches
    (``torch.backends``). At import it is taken from the environment variable ``LSTM_EXT_CUDA``, or
    is "auto". It does not affect other devices, nor operators that are called through
    ``torch.ops``.

    Args:
        mode: one of three words. "auto": a cell runs in our kernels. A layer runs in our kernels
            if it has ``reset`` or ``checkpoint_every``, which cuDNN does not have, or if its size
            and dtype are ones for which ours was measured to be faster (docs/gpu.md). Any other
            layer runs in torch's kernels (cuDNN). Layers whose steps torch's have not
            (normalisation, zoneout, recurrent dropout, clips) run in ours, which for them was not
            measured; a mask for each gate has no kernel, and gets tensor operations. "fused": our
            kernels wherever there is one. "torch": torch's own kernels and operations everywhere.

    Returns:
        The choice before.

    Raises:
        ValueError: mode is none of these.

    Example:
        >>> before = lstm_ext.set_cuda_backend("fused")
        >>> lstm_ext.set_cuda_backend(before)
        'fused'
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    before, _mode = _mode, mode
    _ops._C.set_gpu_cells_by_torch(mode == "torch")
    return before


def cell_by_torch(input: Tensor) -> bool:
    """Whether the mode leaves a cell on this tensor's device to torch's kernels."""
    return _mode == "torch" and input.is_cuda


def recurrence_by_torch(input: Tensor) -> bool:
    """Whether the mode leaves the steps of a layer that are not torch's to tensor operations."""
    return _mode == "torch" and input.is_cuda


def why_layer_by_torch(input: Tensor, call: LayerCall) -> str | None:
    """Say why a layer goes to torch's own kernels; None if it runs in ours."""
    if input.is_cpu:
        return None
    if call.projects:
        return f"projections have no kernel for {input.device.type}"
    if not input.is_cuda:
        return None if call.needs_ours else f"no kernel for {input.device.type}"
    if _mode == "torch":
        return "LSTM_EXT_CUDA=torch"
    if _mode == "fused" or call.needs_ours:
        return None
    if _is_measured_faster(input, call):
        return None
    return "LSTM_EXT_CUDA=auto, and ours is not measured to be faster here"


def is_verbose() -> bool:
    """Whether :func:`log_path` prints."""
    return _VERBOSE and not torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether torch.func, a trace or a __torch_function__ mode is at work."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._len_torch_function_stack()
    )


def log_path(operation: str, input: Tensor, path: str) -> None:
    """With LSTM_EXT_VERBOSE=1, say on stderr which path a call takes, and why."""
    if is_verbose():
        kind = str(input.dtype).removeprefix("torch.")
        print(
            f"lstm_ext: {operation}, {kind} input {list(input.shape)}, {input.device}: {path}",
            file=sys.stderr,
        )
