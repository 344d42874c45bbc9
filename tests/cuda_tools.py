"""The CUDA toolkit of this machine, without a GPU: its compiler and its headers."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@functools.cache
def _headers():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # Not the folder above nvcc, which may be a wrapper script.
    command = [nvcc, "--dryrun", str(KERNELS[0])]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(\S+)", said, re.MULTILINE)
    folder = Path(top.group(1)) / "include" if top else None
    return folder if folder and (folder / "cuda_runtime.h").exists() else None


def headers():
    """The folder of cuda_runtime.h; the test is skipped where there is none."""
    folder = _headers()
    if folder is None:
        pytest.skip("no CUDA toolkit")
    return folder
