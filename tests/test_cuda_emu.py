"""The CUDA kernels' own sources, run on the CPU (tests/cuda_emu), with and without sanitizers.

python tests/test_cuda_emu.py        pins anew what the launchers ask for at some sizes
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import built
import pytest
import torch
import torch.utils.cpp_extension
from cuda_tools import KERNELS, ROOT, headers, load
from limits import HUNG, slow, slow_but

CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "cuda_emu"
CHECKS = [EMULATOR / f"check_{name}.cpp" for name in ("cell", "layer", "layer_ways", "recurrence")]
NATIVE_BUILD = load("build")
LAUNCHES = ROOT / "tests" / "cuda_launches.txt"
SANITIZERS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


class Builder:
    """Compile with g++, kernels as plain C++: each source once for all who use it."""

    def __init__(self, folder):
        self.folder = folder
        self.objects = {}

    @staticmethod
    def options(sanitizer):
        flags = ["-std=c++20", "-Og", "-g1", "-pthread", *SANITIZERS[sanitizer]]
        return [*flags, "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DLSTM_EXT_CUDA_EMU"]

    def compile_one(self, source, sanitizer):
        csrc = source.parent.parent if source.suffix == ".cu" else CSRC
        result = Path(tempfile.mkdtemp(dir=self.folder)) / f"{source.stem}.o"
        command = ["g++", *self.options(sanitizer), f"-I{csrc}", f"-I{EMULATOR}"]
        command += ["-isystem", str(headers()), "-x", "c++", "-c", str(source), "-o", str(result)]
        subprocess.run(command, check=True)
        self.objects[source, sanitizer] = str(result)

    def __call__(self, sources, sanitizer):
        headers()
        missing = [source for source in sources if (source, sanitizer) not in self.objects]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source: self.compile_one(source, sanitizer), missing))
        result = Path(tempfile.mkdtemp(dir=self.folder)) / "program"
        used = [self.objects[source, sanitizer] for source in sources]
        subprocess.run(["g++", *self.options(sanitizer), *used, "-o", str(result)], check=True)
        return result


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("build"))


def run(program, *arguments):
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HUNG,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )


def kernels_of(check):
    """The kernels that a check calls."""
    return [k for k in NATIVE_BUILD.programs()[check.stem].sources if k.suffix == ".cu"]


AMOUNTS = [("none", "fewest"), ("none", "all"), ("address", "few"), ("thread", "few")]
FIRST, *OTHERS = [(check, *amount) for check in CHECKS for amount in AMOUNTS]


@pytest.mark.parametrize(
    ("check", "sanitizer", "amount"),
    [FIRST, *slow(*OTHERS)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_kernels(check, sanitizer, amount, build):
    program = build([*kernels_of(check), check], sanitizer)
    result = run(program, *([] if amount == "all" else [amount]))
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    comparisons, failures = result.stdout.split()[-4], result.stdout.split()[-2]
    assert int(comparisons) > 300
    assert int(failures) == 0


def launches(build):
    result = run(build([*KERNELS, EMULATOR / "launches.cpp"], "none"))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_launches_are_as_before(build):
    # On purpose? python tests/test_cuda_emu.py
    found, pinned = launches(build).splitlines(), LAUNCHES.read_text().splitlines()
    assert not [line for line in found if "error" in line]
    assert found == pinned


@pytest.fixture(scope="module")
def operators(build, tmp_path_factory):
    """A library of the operators in which the CPU's tensors go to the emulated CUDA kernels."""
    common = built.operators()  # as they were built for the package
    folder = tmp_path_factory.mktemp("operators")
    library = folder / "operators.so"
    options = ["-std=c++20", "-O1", "-fPIC", "-fopenmp", "-DLSTM_EXT_CUDA_EMU"]
    options += ["-Wno-unknown-pragmas"]
    options += [f"-I{CSRC}", f"-I{EMULATOR}", "-isystem", str(headers())]
    for path in torch.utils.cpp_extension.include_paths():
        options += ["-isystem", path]

    def compile_one(source):
        result = folder / f"{source.name}.o"
        command = ["g++", *options, "-x", "c++", "-c", str(source), "-o", str(result)]
        subprocess.run(command, check=True)
        return str(result)

    # As one: most of the time goes to torch's headers.
    joined = folder / "operators.cpp"
    parts = sorted((CSRC / "cuda").glob("*.cpp"))
    joined.write_text("".join(f'#include "cuda/{part.name}"\n' for part in parts))
    sources = [*KERNELS, joined]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compile_one, sources))
    libraries = [f"-L{p}" for p in torch.utils.cpp_extension.library_paths()]
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10"]
    linked = [*made, *map(str, common), *libraries]
    subprocess.run(["g++", "-shared", "-fopenmp", *linked, "-o", str(library)], check=True)
    return library


def run_operators(script, library, shared, multiprocessors, *more):
    sizes = {"LSTM_EXT_EMU_SHARED": shared, "LSTM_EXT_EMU_MULTIPROCESSORS": multiprocessors}
    result = subprocess.run(
        [sys.executable, EMULATOR / script, library, *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=HUNG,
        env={**os.environ, **{name: str(size) for name, size in sizes.items()}},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return int(result.stdout.split()[0])


# Shared memory: all of w_hh on the chip; some units a block; none, and step by step. And blocks
# that would wait for each other, or make up a cluster, but may not all run at once.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared", "multiprocessors"),
    [(227 * 1024, 132), (2048, 132), (64, 132), (2048, 1), (227 * 1024, 1)],
)
def test_operators(shared, multiprocessors, operators):
    assert run_operators("check_ops.py", operators, shared, multiprocessors) > 300


# With room for the sums of a row that is normalised, and without.
@pytest.mark.slow
@pytest.mark.parametrize(("shared", "cases"), [(227 * 1024, 24), (64, 8)])
def test_recurrence_operators(shared, cases, operators):
    more = ("cpu", str(cases))
    assert run_operators("check_recurrence_ops.py", operators, shared, 132, *more) > 10 * cases


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
    "nothing, the grid's barrier in two parts": (12, "none", None),
    "stored after arriving": (13, "thread", "data race"),
    "read before waiting": (14, "none", "totals off by"),
    "read before waiting, named": (14, "thread", "data race"),
    "waited without arriving": (15, "none", "without having arrived"),
    "arrived twice": (16, "none", "arrived twice"),
    "left without waiting": (17, "none", "left before it waited"),
    "nothing, with AddressSanitizer": (0, "address", None),
    "nothing, with ThreadSanitizer": (0, "thread", None),
    "two parts, with ThreadSanitizer": (12, "thread", None),
}


@pytest.mark.parametrize(
    "bug",
    slow_but([bug for bug in PLANTED if PLANTED[bug][1] == "none"], PLANTED),
    ids=lambda bug: f"{bug}: {PLANTED[bug][1]}",
)
def test_planted_bugs_are_found(bug, build):
    number, sanitizer, says = PLANTED[bug]
    result = run(build([EMULATOR / "planted.cpp"], sanitizer), number)
    said = result.stdout + result.stderr
    if says is None:
        assert result.returncode == 0, said[-3000:]
    else:
        assert result.returncode != 0
        assert says in said, said[-3000:]


# In the kernels themselves: file, what stands there, what is put in its place (or several of each),
# and what finds it: wrong numbers, a sanitizer, or the emulator, by what it says.
BARRIER = "  __syncthreads();\n"
MUTATIONS = {
    "no barrier before the sums": ("cell_forward.cu", BARRIER, "", "thread"),
    "a share of the sum left out": (
        "gate_tiles.cuh",
        "slice < split;",
        "slice < split - 1;",
        "none",
    ),
    "the last of eight shares left out": (
        "gate_tiles.cuh",
        "slice < kWarps;",
        "slice < kWarps - 1;",
        "none",
    ),
    "rows beyond the last are read": (
        "gate_tiles.cuh",
        "min(place.first_row + 8 * column + row, place.rows - 1)",
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
        "sum_of(static_cast<int>(blockDim.y),",
        "sum_of(static_cast<int>(blockDim.y) - 1,",
        "none",
    ),
    "no barrier before the biases' sums": ("cell_backward.cu", BARRIER, "", "thread"),
    "one copy of h": (
        "layer_forward.cu",
        "h_next = h_of(step + 1)",
        "h_next = h_of(step)",
        "none",
    ),
    "blocks that do not wait": (
        "layer_forward.cu",
        "    if (meets) meeting.wait();\n",
        "    __syncthreads();\n",
        "arrived twice",
    ),
    "arrived before h is stored": (
        "layer_forward.cu",
        (
            "    Element<S> late = {};\n",
            "    if (kPublishFirst && meets) meeting.arrive();\n",
        ),
        (
            "    if (goes_on) meeting.arrive();\n    Element<S> late = {};\n",
            "",
        ),
        "thread",
    ),
    "what was not stored before arriving is lost": (
        "layer_forward.cu",
        "    if (is_late) store(late, now, next.count);\n",
        "",
        "none",
    ),
    "products of a wrong step": (
        "layer_forward.cu",
        "ahead = read(step + 1, next, 0, spots.first())",
        "ahead = read(step, now, 0, spots.first())",
        "none",
    ),
    "products of a wrong row tile": (
        "layer_forward.cu",
        "read(step, now, group + plan.group, spots.first())",
        "read(step, now, group, spots.first())",
        "none",
    ),
    "products of a wrong element": (
        "layer_forward.cu",
        "read(step, now, group, spot)",
        "read(step, now, group, spots.first())",
        "none",
    ),
    "no barrier between row tiles": (
        "layer_forward.cu",
        "      if (kPublishFirst && last_group) break;\n      __syncthreads();\n",
        "      if (kPublishFirst && last_group) break;\n",
        "thread",
    ),
    "weights that are not all copied": (
        "layer_forward.cu",
        "at < own_units * in_row;",
        "at < own_units * in_row - 1;",
        "none",
    ),
    "the last chunk left out": (
        "gate_tiles.cuh",
        "if (k >= K) return;",
        "if (k + stride >= K) return;",
        "none",
    ),
    "a chunk loaded twice": ("gate_tiles.cuh", "k + kAhead * stride)", "k)", "none"),
    "row tiles in one place": (
        "layer_blocks.cuh",
        "partial.from_row(in_group)",
        "partial",
        "none",
    ),
    "resets of c left out": (
        "layer_forward.cu",
        "reset ? S(0) : widen(narrow<T>(done.c))",
        "widen(narrow<T>(done.c))",
        "none",
    ),
    "blocks that do not wait, in backward": (
        "layer_backward.cu",
        "    meeting.wait();\n",
        "    __syncthreads();\n",
        "arrived twice",
    ),
    "arrived before the gradients are stored": (
        "layer_backward.cu",
        (
            "    const StepRows next = rows_of(sequence, step - 1, part);\n",
            "    if constexpr (kPublishFirst) meeting.arrive();\n",
        ),
        (
            "    const StepRows next = rows_of(sequence, step - 1, part);\n"
            "    if (step > 0 || layer.grad_hx != nullptr) meeting.arrive();\n",
            "",
        ),
        "thread",
    ),
    "gates of a wrong step": (
        "layer_backward.cu",
        "ahead = read(step - 1, next, spots.first())",
        "ahead = read(step, now, spots.first())",
        "none",
    ),
    "gates of a wrong element": (
        "layer_backward.cu",
        "ahead = read(step, now, spot)",
        "ahead = read(step, now, spots.first())",
        "none",
    ),
    "columns that are not all copied": (
        "layer_backward.cu",
        "hidden < kInUnit * units; hidden += kCount",
        "hidden + kCount < kInUnit * units; hidden += kCount",
        "none",
    ),
    "hidden units out of their places": (
        "layer_backward.cu",
        "quarter, in_group, hidden - quarter * units",
        "0 * quarter + hidden % kInUnit, in_group, hidden / kInUnit",
        "none",
    ),
    "gradients through resets": (
        "layer_backward.cu",
        "known.reset ? S(0) : grad_c",
        "grad_c",
        "none",
    ),
}

MUTATIONS |= {
    "no barrier between a small layer's steps": (
        "layer_small_mma.cu",
        "    __syncthreads();\n  });",
        "  });",
        "none",
    ),
    "the same by multiply-adds": (
        "layer_small_fma.cu",
        "    __syncthreads();\n  });",
        "  });",
        "none",
    ),
    "one copy of a small layer's h": (
        "layer_small_mma.cu",
        "h_own + (1 - kSet) * kRows",
        "h_own + kSet * kRows",
        "none",
    ),
    "rows that change places": (
        "register_weights.cuh",
        "upper ? low : high, kBit",
        "upper ? high : low, kBit",
        "none",
    ),
    "a row beyond the last": (
        "layer_small.cuh",
        "own && unit < H_ && first_row + row < sequence.N",
        "own && unit < H_",
        "address",
    ),
    "a unit beyond the last": (
        "layer_small.cuh",
        "own && unit < H_ && first_row + row < sequence.N",
        "own && first_row + row < sequence.N",
        "address",
    ),
    "the last products not read": (
        "layer_small_mma.cu",
        "step + 2 < L",
        "step + 3 < L",
        "none",
    ),
    "weights beyond a row": (
        "register_weights.cuh",
        "(K % aligned != 0 || ",
        "(",
        "none",
    ),
    "one thread that waits for messages": (
        "layer_cluster.cu",
        "      cluster::wait(&barriers[set]",
        "      if (thread == 0) cluster::wait(&barriers[set]",
        "none",
    ),
    "more bytes expected than come": (
        "layer_cluster.cu",
        "static_cast<unsigned>(kBlocks * kUnits * kRows * sizeof(T))",
        "static_cast<unsigned>((kBlocks + 1) * kUnits * kRows * sizeof(T))",
        "bytes that never come",
    ),
    "expected once only": (
        "layer_cluster.cu",
        "    if (L > 2) cluster::expect(&barriers[0], kBytes);\n",
        "",
        "bytes that never come",
    ),
    "no barrier before a cluster's sums": (
        "layer_cluster.cu",
        "    __syncthreads();\n\n#if",
        "\n#if",
        "none",
    ),
    "a cluster's row beyond the last": (
        "layer_cluster.cu",
        "there(e) && first_row + row < sequence.N && first_unit + unit < H",
        "there(e) && first_unit + unit < H",
        "address",
    ),
    "a cluster's unit beyond the last": (
        "layer_cluster.cu",
        "there(e) && first_row + row < sequence.N && first_unit + unit < H",
        "there(e) && first_row + row < sequence.N",
        "address",
    ),
    "sent to the wrong copy": (
        "layer_cluster.cu",
        "(((1 - set) * kRows + place.row)",
        "((set * kRows + place.row)",
        "none",
    ),
    "no barrier between a small layer's steps back": (
        "layer_backward_small_mma.cu",
        "    __syncthreads();\n    float sums",
        "    float sums",
        "none",
    ),
    "the same back by multiply-adds": (
        "layer_backward_small_fma.cu",
        "    __syncthreads();\n    const float* const read_grads",
        "    const float* const read_grads",
        "none",
    ),
    "gradients of the step before": (
        "layer_backward_small_mma.cu",
        "read_grads + kSet * kRows * kStride",
        "read_grads + (1 - kSet) * kRows * kStride",
        "none",
    ),
    "the last gates not read": (
        "backward_elements.cuh",
        "step + kSets < layer_.sequence.L",
        "step + kSets + 1 < layer_.sequence.L",
        "none",
    ),
    "a row beyond the last, backward": (
        "backward_elements.cuh",
        "own && unit < H_ && first_row + row < sequence.N",
        "own && unit < H_",
        "address",
    ),
    "a bias without its last rows": (
        "backward_elements.cuh",
        "part < kBlockRows / kRows;",
        "part < kBlockRows / kRows - 1;",
        "none",
    ),
    "parts of one block left out": (
        "layer_backward_cluster.cu",
        "for (int block = 0; block < kBlocks;",
        "for (int block = 1; block < kBlocks;",
        "none",
    ),
    "parts in the wrong copy": (
        "layer_backward_cluster.cu",
        "static_cast<unsigned>(kSet * kBlocks * kPart +",
        "static_cast<unsigned>((1 - kSet) * kBlocks * kPart +",
        "none",
    ),
    "one thread that waits for parts": (
        "layer_backward_cluster.cu",
        "    cluster::wait(&barriers[set]",
        "    if (thread == 0) cluster::wait(&barriers[set]",
        "none",
    ),
    "more parts expected than come": (
        "layer_backward_cluster.cu",
        "static_cast<unsigned>(kBlocks * kPart)",
        "static_cast<unsigned>((kBlocks + 1) * kPart)",
        "bytes that never come",
    ),
    "no barrier before a cluster's products": (
        "layer_backward_cluster.cu",
        "    __syncthreads();\n    if (step >= sends)",
        "    if (step >= sends)",
        "none",
    ),
}

MUTATIONS |= {
    "one set of places for a row's sums": (
        "recurrence.cuh",
        "    places_ += second_ ? -kSumPlaces / 2 : kSumPlaces / 2;\n",
        "",
        "thread",
    ),
    "h before a reset": (
        "recurrence_forward.cu",
        "is_set(call.reset, row) ? Sum<T>(0) : widen(call.h[at])",
        "widen(call.h[at])",
        "none",
    ),
    "gradients past the step's h left out": (
        "recurrence_backward.cu",
        "    past = (1 - u) * grad;\n    grad *= u;\n",
        "    grad *= u;\n",
        "none",
    ),
}


IN_REGISTERS = (
    "layer_small", "layer_cluster", "layer_backward_small", "layer_backward_cluster",
    "backward_elements", "register_weights",
)  # fmt: skip
FEW = ("gates in another order",)


@pytest.mark.parametrize(
    "mutation", slow_but(FEW, MUTATIONS), ids=lambda m: f"{'few' if m in FEW else 'all'}: {m}"
)
def test_broken_kernels_are_found(mutation, build, tmp_path):
    file, old, new, finder = MUTATIONS[mutation]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / "cuda" / file
    text = source.read_text()
    for before, after in [(old, new)] if isinstance(old, str) else zip(old, new, strict=True):
        assert text.count(before) == 1
        text = text.replace(before, after)
    source.write_text(text)
    cell, layer, ways, recurrence = CHECKS
    # The layer's kernels stage what they multiply, the cell's do not.
    check = layer if "layer" in file or "chunk" in mutation else cell
    if file.startswith(IN_REGISTERS):
        check = ways
    if file.startswith("recurrence"):
        check = recurrence
    kernels = kernels_of(check)
    # Those that read the broken file.
    broken = [k for k in kernels if CSRC / "cuda" / file in NATIVE_BUILD.texts(k, {})]
    assert broken
    kernels = [csrc / "cuda" / k.name if k in broken else k for k in kernels]
    program = build([*kernels, check], finder if finder in SANITIZERS else "none")
    result = run(program, "broken")
    assert result.returncode != 0
    wanted = {"none": "off by", "address": "AddressSanitizer", "thread": "data race"}
    assert wanted.get(finder, finder) in result.stdout + result.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        LAUNCHES.write_text(launches(Builder(scratch)))
