"""The PEP 517 build backend: setuptools, compiling against the torch that is already there.

An extension must be built against the very torch that will load it. pip's build isolation hides
the target environment, so this wrapper appends its site-packages to ``sys.path``; only when no
torch is found there does the build ask for one. Other front ends (uv, ``python -m build``) run the
backend with another interpreter: the active ``VIRTUAL_ENV`` or ``CONDA_PREFIX`` is searched too,
when its Python version is the running one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH_REQUIREMENT = "torch>=2.11"


def _site_packages() -> list[str]:
    """Site-packages folders that may hold the torch to build against, nearest first."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            folders.append(str(Path(prefix) / "lib" / version / "site-packages"))
    return folders


# Appended, so that what the isolated environment itself holds comes first.
sys.path += [f for f in dict.fromkeys(_site_packages()) if f not in sys.path and Path(f).is_dir()]


# setuptools' own hooks would run setup.py to ask for its setup_requires. It has none, and it
# imports torch, which is what may be missing.
def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return what a build needs beyond pyproject.toml's list: a torch when none is installed."""
    return [] if importlib.util.find_spec("torch") else [TORCH_REQUIREMENT]


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel
