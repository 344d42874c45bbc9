"""The CPU kernels: alone, under sanitizers, with clang and on 64-bit Arm; and their threads."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import built
import pytest
import torch.utils.cpp_extension
from limits import HUNG

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc" / "cpu").glob("kernels_*.cpp"))
NATIVE = ROOT / "tests" / "native"
CHECK = [NATIVE / "check_kernels.cpp", NATIVE / "vnni_by_hand.cpp"]
WARNINGS = ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
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


def check_kernels(folder, sources, objects=(), compiler="g++", options=("-O1",), emulator=()):
    """Build the check of all tables of kernels and run it."""
    for tool in (compiler, *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")

    def compile_one(source):
        result = folder / f"{source.stem}.o"
        command = [compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", *WARNINGS, *options, "-c"]
        subprocess.run([*command, str(source), "-o", str(result)], check=True)
        return str(result)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        linked = [*pool.map(compile_one, sources), *map(str, objects)]
    program = folder / "check_kernels"
    subprocess.run([compiler, *options, *linked, "-o", str(program)], check=True)
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout


def test_kernels_as_built(tmp_path):
    """The object files of the package itself: every instruction set that this machine can run."""
    check_kernels(tmp_path, CHECK, built.objects("csrc/cpu/kernels_*.o"))


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_kernels(build, tmp_path):
    compiler, options, emulator = BUILDS[build]
    check_kernels(tmp_path, [*KERNELS, *CHECK], (), compiler, options, emulator)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Build a library of the CPU's operators whose threads ThreadSanitizer follows.

    Returns a function: of a header and what to replace in it, if anything, to the library.
    """
    unwatched = built.operators()
    runtime = subprocess.run(
        ["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("no ThreadSanitizer")
    folder = tmp_path_factory.mktemp("threads")

    def compile_one(source, csrc, to):
        options = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fsanitize=thread", "-Wno-unknown-pragmas"]
        options += [f"-I{csrc}", f"-I{ROOT / 'tests' / 'native' / 'threads'}"]
        for path in torch.utils.cpp_extension.include_paths():
            options += ["-isystem", path]
        result = to / f"{source.stem}.o"
        subprocess.run(["g++", *options, "-c", str(source), "-o", str(result)], check=True)
        return result

    made = {}

    def build(header=None, old="", new=""):
        csrc, to = ROOT / "csrc", folder / (header or "right").replace("/", "_")
        to.mkdir()
        sources = sorted((csrc / "cpu").glob("*.cpp"))
        if header is not None:
            csrc = to / "csrc"
            shutil.copytree(ROOT / "csrc", csrc)
            text = (csrc / header).read_text()
            assert text.count(old) == 1
            (csrc / header).write_text(text.replace(old, new))
            sources = [csrc / "cpu" / name for name in ("layer_forward.cpp", "layer_backward.cpp")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda source: compile_one(source, csrc, to), sources)
            found = made | {o.name: o for o in results}
        if header is None:
            made.update(found)
        library = to / "operators.so"
        paths = [f"-L{p}" for p in torch.utils.cpp_extension.library_paths()]
        linked = [
            *map(str, (*found.values(), *unwatched)),
            *paths,
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ]
        command = ["g++", "-shared", "-fsanitize=thread", "-fopenmp", *linked, "-o", str(library)]
        subprocess.run(command, check=True)
        return library

    def run(library):
        return subprocess.run(
            [sys.executable, ROOT / "tests" / "native" / "check_threads.py", library],
            capture_output=True,
            text=True,
            check=False,
            timeout=HUNG,
            env={
                **os.environ,
                "LD_PRELOAD": runtime,
                "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1",
            },
        )

    build()
    return build, run, folder / "right" / "operators.so"


@pytest.mark.slow
def test_threads(watched):
    """The time loops themselves, by four threads, forward and backward: right, and no race."""
    _, run, library = watched
    result = run(library)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert int(result.stdout.split()[0]) > 200


@pytest.mark.slow
def test_a_barrier_left_out_is_seen(watched):
    build, run, _ = watched
    result = run(build("cpu/team.h", "    if (shares == shares_) return;\n", "    return;\n"))
    assert result.returncode != 0
    assert "data race" in result.stderr
