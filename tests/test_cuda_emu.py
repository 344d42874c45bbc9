"""The CUDA kernels' own sources, run on the CPU (tests/cuda_emu), with and without sanitizers."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_tools import KERNELS, ROOT, headers

EMULATOR = ROOT / "tests" / "cuda_emu"
SANITIZERS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def build(folder, sources, sanitizer, csrc=ROOT / "csrc"):
    """Compile with g++, kernels as plain C++; return the program."""
    options = ["-std=c++20", "-O1", "-g", "-pthread", *SANITIZERS[sanitizer]]
    options += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-DLSTM_EXT_CUDA_EMU"]
    options += [f"-I{csrc}", f"-I{EMULATOR}", "-isystem", str(headers())]

    def compile_one(source):
        result = folder / f"{source.stem}.o"
        command = ["g++", *options, "-x", "c++", "-c", str(source), "-o", str(result)]
        subprocess.run(command, check=True)
        return str(result)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "program"
    subprocess.run(["g++", *options, *objects, "-o", str(program)], check=True)
    return program


def run(program, *arguments):
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_cell(sanitizer, tmp_path):
    program = build(tmp_path, [*KERNELS, EMULATOR / "check_cell.cpp"], sanitizer)
    result = run(program, *([] if sanitizer == "none" else ["few"]))
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    comparisons, failures = result.stdout.split()[-4], result.stdout.split()[-2]
    assert int(comparisons) > 2000
    assert int(failures) == 0


# In tests/cuda_emu/planted.cpp: number, what finds it, and what it says.
PLANTED = {
    "nothing": (0, "none", None),
    "no barrier": (1, "none", "sums off by"),
    "no barrier, named by its lines": (1, "thread", "data race"),
    "no barrier in a warp": (2, "thread", "data race"),
    "no barrier in the grid": (3, "none", "totals off by"),
    "no barrier in the grid, named": (3, "thread", "data race"),
    "out of shared memory": (4, "address", "AddressSanitizer"),
    "a barrier that some miss": (5, "none", "some threads cannot reach"),
    "two barriers at a time": (6, "none", "two different __syncthreads"),
    "left before a barrier": (7, "none", "have left"),
    "a lane that has left": (8, "none", "never come"),
    "a lane outside the mask": (9, "none", "a lane outside the mask"),
    "unwritten shared memory": (10, "none", "off by nan"),
    "waiting in an ordinary launch": (11, "none", "not cooperative"),
    "nothing, with AddressSanitizer": (0, "address", None),
    "nothing, with ThreadSanitizer": (0, "thread", None),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    programs = {}

    def program(sanitizer):
        if sanitizer not in programs:
            folder = tmp_path_factory.mktemp(sanitizer)
            programs[sanitizer] = build(folder, [EMULATOR / "planted.cpp"], sanitizer)
        return programs[sanitizer]

    return program


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug, planted):
    number, sanitizer, says = PLANTED[bug]
    result = run(planted(sanitizer), number)
    said = result.stdout + result.stderr
    if says is None:
        assert result.returncode == 0, said[-3000:]
    else:
        assert result.returncode != 0
        assert says in said, said[-3000:]


# In the kernels themselves: file, what stands there, what is put in its place, what finds it.
BARRIER = "  __syncthreads();\n"
MUTATIONS = {
    "no barrier before the sums": ("cell_forward.cu", BARRIER, "", "thread"),
    "a share of the sum left out": (
        "cell_forward.cu",
        "slice < split;",
        "slice < split - 1;",
        "none",
    ),
    "rows beyond the last are read": (
        "gate_tiles.cuh",
        "min(place.first_row + 8 * column + row, place.N - 1)",
        "(place.first_row + 8 * column + row)",
        "address",
    ),
    "gates in another order": (
        "cell_finish.cu",
        "pre[1][j], pre[2][j]",
        "pre[2][j], pre[1][j]",
        "none",
    ),
    "one row of threads left out": (
        "cell_backward.cu",
        "y < blockDim.y;",
        "y + 1 < blockDim.y;",
        "none",
    ),
    "no barrier before the biases' sums": ("cell_backward.cu", BARRIER, "", "thread"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_kernels_are_found(mutation, tmp_path):
    file, old, new, sanitizer = MUTATIONS[mutation]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = csrc / "cuda" / file
    assert source.read_text().count(old) == 1
    source.write_text(source.read_text().replace(old, new))
    kernels = sorted((csrc / "cuda").glob("*.cu"))
    program = build(tmp_path, [*kernels, EMULATOR / "check_cell.cpp"], sanitizer, csrc)
    result = run(program, "few")
    assert result.returncode != 0
    wanted = {"none": "off by", "address": "AddressSanitizer", "thread": "data race"}[sanitizer]
    assert wanted in result.stdout + result.stderr
