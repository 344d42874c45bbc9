"""What this copy of lstm_ext is and was built with."""

from __future__ import annotations

from importlib import metadata

import torch

from lstm_ext._backend import cuda_backend
from lstm_ext._ops import _C

__version__ = metadata.version("lstm_ext")


def build_info() -> dict[str, str | bool | None]:
    """Describe the build and what of it is in use.

    Returns:
        A dict with: ``version`` of lstm_ext; ``torch`` it was built against and ``torch_running``;
        ``cuda``, the toolkit it was built with or None, and ``cuda_backend``, which kernels run on
        a GPU (see :func:`lstm_ext.set_cuda_backend`); ``openmp``; ``compiler``;
        ``cpu_instruction_sets`` compiled in (comma-separated) and ``cpu_instruction_set`` in use
        (torch's choice, see ``ATEN_CPU_CAPABILITY``).

    Example:
        >>> sorted(lstm_ext.build_info())[:3]
        ['compiler', 'cpu_instruction_set', 'cpu_instruction_sets']
    """
    from lstm_ext import _built_with

    return {
        "version": __version__,
        **_C.build_info(),
        "torch": _built_with.TORCH_VERSION,
        "torch_running": str(torch.__version__),
        "cuda": _built_with.CUDA_VERSION,
        "cuda_backend": cuda_backend(),
    }
