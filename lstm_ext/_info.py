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
        A dict with these keys.

        - ``version``: of lstm_ext.
        - ``torch``, ``torch_running``: the torch that it was built against, and the running one.
        - ``cuda``: the CUDA toolkit that it was built with, or None.
        - ``cuda_backend``: which kernels run on a GPU (see :func:`lstm_ext.set_cuda_backend`).
        - ``openmp``, ``compiler``: how it was compiled.
        - ``cpu_instruction_sets``: those compiled in, with commas between them.
        - ``cpu_instruction_set``: the one in use (torch's choice, see ``ATEN_CPU_CAPABILITY``).

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
