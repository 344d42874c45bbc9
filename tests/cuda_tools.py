"""The CUDA toolkit of this machine, without a GPU: its compiler and its headers.

python tests/cuda_tools.py        clang-tidy on the kernels (part of make lint)
"""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NATIVE = ROOT / "tests" / "gpu" / "native"


def load(name):
    """Import a script of that folder; `build` alone is the name of a package that others know."""
    spec = importlib.util.spec_from_file_location(f"native_{name}", NATIVE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
    import pytest  # `make lint` runs this file without the tests' packages

    folder = _headers()
    if folder is None:
        pytest.skip("no CUDA toolkit")
    return folder


def tidy(source):
    """Run clang-tidy on a kernel as plain C++; return its exit status and what it says."""
    command = [Path(sys.executable).parent / "clang-tidy", "--quiet", source, "--", "-xc++"]
    command += ["-std=c++20", "-DLSTM_EXT_CUDA_EMU", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{ROOT / 'tests' / 'cuda_emu'}", "-isystem", _headers()]
    # The analyzer goes so deep into each of many instances, and no deeper.
    command += ["-Xclang", "-analyzer-config", "-Xclang", "max-nodes=5000"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


if __name__ == "__main__":
    if _headers() is None:
        print("no CUDA toolkit: the kernels are not looked at")
        raise SystemExit(0)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(tidy, KERNELS))
    print("".join(said for _, said in results), end="")
    raise SystemExit(max(status for status, _ in results))
