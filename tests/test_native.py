"""The CPU kernels alone, without PyTorch: under sanitizers, with clang, and on 64-bit Arm."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    *sorted((ROOT / "csrc" / "cpu").glob("kernels_*.cpp")),
    ROOT / "tests" / "native" / "check_kernels.cpp",
]
WARNINGS = ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
BUILDS = {
    "sanitizers": ("g++", SANITIZERS, []),
    "clang": ("clang++", ["-O2"], []),
    # With NEON, in an emulator. GCC 12 warns there of a bound that its own
    # rewriting of a loop loses (the sanitizers above see the same loop and nothing wrong).
    "aarch64": (
        "aarch64-linux-gnu-g++",
        ["-O2", "-static", "-Wno-array-bounds", "-Wno-stringop-overread"],
        ["qemu-aarch64"],
    ),
}


@pytest.mark.parametrize("build", BUILDS)
def test_kernels(build, tmp_path):
    compiler, options, emulator = BUILDS[build]
    for tool in (compiler, *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")

    def compile_one(source):
        result = tmp_path / f"{source.stem}.o"
        command = [compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", *WARNINGS, *options, "-c"]
        subprocess.run([*command, str(source), "-o", str(result)], check=True)
        return str(result)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    program = tmp_path / "check_kernels"
    subprocess.run([compiler, *options, *objects, "-o", str(program)], check=True)
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout
