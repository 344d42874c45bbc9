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


# Where one layer in one direction by our kernels is faster than by cuDNN, alone and with backward,
# both replayed from CUDA graphs: up to a hidden size (from the one before on), up to so many rows.
# Measured by benchmarks/bench_cuda.py --grid on an H200 (docs/gpu.md).
_MEASURED_CAPABILITY = (9, 0)
_LEAST_HIDDEN = 192
_MOST_ROWS = {256: 128, 512: 64, 1024: 16}
_MOST_ROWS_FLOAT32 = {256: 128, 512: 16, 1024: 16}


def _measured_faster(input: Tensor, N: int, H: int, packed: bool) -> bool:
    properties = torch.cuda.get_device_properties(input.device)
    if (properties.major, properties.minor) != _MEASURED_CAPABILITY:
        return False
    if input.dtype == torch.float16 and not packed and H % 128 == 0 and N % 8 == 0:
        return False  # cuDNN's own persistent kernel
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if H < _LEAST_HIDDEN or H % 8 != 0:
        return False
    most_rows = _MOST_ROWS_FLOAT32 if input.dtype == torch.float32 else _MOST_ROWS
    rows = next((rows for hidden, rows in most_rows.items() if hidden >= H), 0)
    return rows >= N


_mode = _from_environment()
_ops._C.set_gpu_cells_by_torch(_mode == "torch")


def cuda_backend() -> str:
    """Return which kernels run on a CUDA device: see :func:`set_cuda_backend`."""
    return _mode


def set_cuda_backend(mode: str) -> str:
    """Choose the kernels that lstm_ext's modules and functions run on a CUDA device.

    The choice holds for the whole process and all its threads, as torch's own switches do
    (``torch.backends``). At import it is the environment variable ``LSTM_EXT_CUDA``, or "auto".
    It concerns no other device, and no operator that is called by its name in ``torch.ops``.

    Args:
        mode: "auto": a cell runs in our kernels. So does a layer with ``reset`` or
            ``checkpoint_every``, which cuDNN does not have, and one of a size and dtype where ours
            is measured to be faster (docs/gpu.md); any other in torch's (cuDNN). "fused": our
            kernels wherever there is one. "torch": torch's own kernels and operations, everywhere.

    Returns:
        The choice before.

    Raises:
        ValueError: mode is none of these.

    Example::

        before = lstm_ext.set_cuda_backend("fused")
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


class LayerCall(NamedTuple):
    """What the choice of a layer's kernels looks at, beside its input."""

    N: int
    H: int
    single: bool  # one layer, one direction
    packed: bool
    projects: bool  # h is projected, which our kernels do not do
    needs_ours: bool  # an option is used that torch's kernels do not have


def why_layer_by_torch(input: Tensor, call: LayerCall) -> str | None:
    """Say why a layer goes to torch's own kernels; None if it runs in ours."""
    if call.projects:
        return "projections have no kernel"
    if input.is_cpu:
        return None
    if not input.is_cuda:
        return None if call.needs_ours else f"no kernel for {input.device.type}"
    if _mode == "torch":
        return "LSTM_EXT_CUDA=torch"
    if _mode == "fused" or call.needs_ours:
        return None
    if call.single and _measured_faster(input, call.N, call.H, call.packed):
        return None
    return "LSTM_EXT_CUDA=auto, and ours is not measured to be faster here"


def log_path(operation: str, input: Tensor, path: str) -> None:
    """With LSTM_EXT_VERBOSE=1, say on stderr which path a call takes, and why."""
    if _VERBOSE and not torch.compiler.is_compiling():
        kind = str(input.dtype).removeprefix("torch.")
        print(
            f"lstm_ext: {operation}, {kind} input {list(input.shape)}, {input.device}: {path}",
            file=sys.stderr,
        )
