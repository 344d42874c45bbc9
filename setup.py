"""Builds the extension ``lstm_ext._C``; everything else about the package is in pyproject.toml.

Environment variables:
    LSTM_EXT_CUDA         1 builds with CUDA or fails, 0 builds without; unset: with CUDA when
                          both torch and the machine have it. (auto, fused and torch choose
                          between kernels at run time, and say nothing here.)
    TORCH_CUDA_ARCH_LIST  the GPU architectures to compile for, as for every PyTorch extension.
    MAX_JOBS              compilers to run at once.
    CFLAGS                with -g in it, debug information is kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError as error:
    raise SystemExit(
        "lstm_ext: building needs torch >= 2.11 and found none "
        f"({error}); install it, or drop --no-build-isolation to have one installed"
    ) from error
from torch.utils import cpp_extension

if sysconfig.get_config_var("Py_GIL_DISABLED"):
    raise SystemExit(
        "lstm_ext: not for a free-threaded Python: it was never tested without the GIL "
        "(docs/support.md); use the ordinary Python of the same version"
    )

ROOT = Path(__file__).parent.resolve()
PACKAGE = "lstm_ext"


def cuda_home() -> str | None:
    """Find the CUDA toolkit: torch's guess, or where nvcc itself says that it lives.

    torch takes the folder above the nvcc on PATH, which is wrong when that is a wrapper script.
    """
    home = cpp_extension.CUDA_HOME
    if home is None or list(Path(home).glob("lib*/libcudart.so*")):
        return home
    nvcc = Path(home) / "bin" / "nvcc"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        command = [str(nvcc), "--dryrun", str(source)]
        said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    top = re.search(r"^#\$ (?:TOP|_HERE_)=(\S+)", said.stderr, re.MULTILINE)
    if top is None:
        return home
    folder_of_nvcc = Path(top.group(1))
    for candidate in (folder_of_nvcc, *folder_of_nvcc.resolve().parents):
        if list(candidate.glob("lib*/libcudart.so*")):
            return str(candidate)
    return home


def cuda_wanted() -> bool:
    """Decide whether to build with CUDA, and say so in one line when it is not."""
    switch = os.environ.get("LSTM_EXT_CUDA", "").strip()
    if switch.lower() in ("auto", "fused", "torch"):
        switch = ""
    if switch not in ("", "0", "1"):
        raise SystemExit(f"lstm_ext: LSTM_EXT_CUDA must be 0, 1 or unset, got {switch!r}")
    # Not torch.cuda.is_available(): a build machine often has no GPU.
    reason = ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif cpp_extension.CUDA_HOME is None:  # as cuda_home() has set it, below
        reason = "no CUDA toolkit found (set CUDA_HOME)"
    if switch == "1" and reason:
        raise SystemExit(f"lstm_ext: LSTM_EXT_CUDA=1, but {reason}")
    if switch == "0":
        reason = "LSTM_EXT_CUDA=0"
    if reason:
        print(f"lstm_ext: building for the CPU only: {reason}", file=sys.stderr)
    return not reason


def sources(*patterns: str) -> list[str]:
    """Return the files that match, relative to the root as setuptools wants them."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def joined(files: list[str]) -> list[str]:
    """Replace the files that one of csrc/joined includes by it.

    Torch's headers take more than half of the time to compile a file that has them, and what
    several files make of their templates is made once. A file that none includes is compiled by
    itself: so are those of csrc/cpu, for joined, steps of a cell on two threads took 15 % longer.
    """
    found = sources("csrc/joined/*.cpp")
    parts = {
        f"csrc/{name}"
        for file in found
        for name in re.findall(r'^#include "(.*\.cpp)"$', (ROOT / file).read_text(), re.MULTILINE)
    }
    return [file for file in files if file not in parts] + found


def extension(with_cuda: bool) -> cpp_extension.CppExtension:
    """Describe ``_C``. No -std: torch adds its own. No -march: one build fits all machines."""
    cxx = ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    # Of torch's operators, a file gets those that it includes, and not all two thousand.
    cxx.append("-DAT_PER_OPERATOR_HEADERS")
    if "-g" not in os.environ.get("CFLAGS", "").split():
        # Python's own flags have -g: nine tenths of the module, and half the time to compile it.
        cxx.append("-g0")
    if sys.platform.startswith("linux"):
        # Without it the header-only at::parallel_for would run serially, and say nothing. For the
        # compiler only: linked with a runtime of its own name, the module could bring a second
        # one into the process. Its symbols are found in the one that libtorch_cpu has loaded.
        cxx.append("-fopenmp")
    folders = ("core", "ops", "autograd", "python", "cpu")
    files = joined(sources(*(f"csrc/{folder}/*.cpp" for folder in folders)))
    kind = cpp_extension.CppExtension
    if with_cuda:
        cxx.append("-DLSTM_EXT_WITH_CUDA")
        files += sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
        kind = cpp_extension.CUDAExtension
    headers = sources("csrc/**/*.h", "csrc/**/*.cuh")
    return kind(
        f"{PACKAGE}._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        depends=headers,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]} if with_cuda else {"cxx": cxx},
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's build command, with rebuilds that are incremental and a note of what was built."""

    def finalize_options(self) -> None:
        """Pin the folder of object files: an editable install gets a fresh one each time."""
        super().finalize_options()
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        kind = "cuda" if WITH_CUDA else "cpu"
        self.build_temp = str(ROOT / "build" / f"{python}-torch{torch.__version__}-{kind}")

    def run(self) -> None:
        """Build, then write ``_built_with.py`` beside the module for ``import`` to check."""
        super().run()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib)) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_built_with.py").write_text(
            '"""What this copy of lstm_ext was compiled against; written by setup.py."""\n\n'
            f"TORCH_VERSION = {str(torch.__version__)!r}\n"
            f"CUDA_VERSION = {torch.version.cuda if WITH_CUDA else None!r}\n"
        )


# cpp_extension reads its own global, whenever it needs a path.
cpp_extension.CUDA_HOME = cuda_home()
WITH_CUDA = cuda_wanted()
setup(ext_modules=[extension(WITH_CUDA)], cmdclass={"build_ext": BuildExtension})
