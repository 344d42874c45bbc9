"""nvcc on the kernels, without a GPU: no warning, no spill, and as many registers as before.

python tests/test_cuda_compile.py        prints what each kernel needs, and pins it anew
"""

import functools
import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_tools import KERNELS, ROOT, headers
from limits import slow

ARCHITECTURES = ["sm_80", "sm_90"]
PINS = Path(__file__).parent / "cuda_registers.json"
# As torch builds extensions.
TORCH_FLAGS = [
    f"-D__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]
REGISTERS, WARPS = 64 * 1024, 64  # of a multiprocessor, on both architectures


def readable(kernel):
    """Demangle, less what every name has in common."""
    name = subprocess.run(["c++filt", kernel], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(.*", "", re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", name))
    return re.sub(r"lstm_ext::cuda::|void |\((int|bool)\)", "", name).strip()


def compile_kernels(source, architecture, folder):
    command = ["nvcc", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch={architecture}", "-cubin"]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    target = Path(folder) / f"{source.stem}.{architecture}.cubin"
    command += [*TORCH_FLAGS, str(source), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def registers(said):
    found = re.findall(r"entry function '(\w+)' for.*?Used (\d+) registers", said, re.DOTALL)
    return {readable(name): int(count) for name, count in found}


def resident_warps(count):
    """How many warps of a kernel with so many registers a thread fit on a multiprocessor."""
    a_warp = -(-count * 32 // 256) * 256
    return min(WARPS, REGISTERS // a_warp)


@functools.cache
def compile_all(architecture, sources=tuple(KERNELS)):
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda s: compile_kernels(s, architecture, folder), sources))
    for source, result in zip(sources, results, strict=True):
        assert result.returncode == 0, f"{source.name}: {result.stderr[-3000:]}"
    return {k: v for result in results for k, v in registers(result.stderr).items()}


def version():
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release ([\d.]+)", said.stdout).group(1)


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [("sm_90", "few"), *slow(("sm_80", "few"), *((name, "all") for name in ARCHITECTURES))],
)
def test_kernels_compile_as_before(architecture, kernels):
    headers()
    small = ("cell_finish", "copy_numbers")
    found = compile_all(
        architecture, tuple(s for s in KERNELS if kernels == "all" or s.stem in small)
    )
    assert found
    # Two blocks of eight warps on every multiprocessor; of the layer, which keeps the weights, one.
    few = {k for k, n in found.items() if resident_warps(n) < (8 if "layer" in k else 16)}
    assert few == set()
    pins = json.loads(PINS.read_text())
    if pins["nvcc"] != version():
        pytest.skip(f"registers are pinned for nvcc {pins['nvcc']}")
    # On purpose? python tests/test_cuda_compile.py
    pinned = pins[architecture].items()
    assert found == {k: n for k, n in pinned if kernels == "all" or k in found}


@pytest.mark.slow
def test_a_spill_is_an_error(tmp_path):
    """The gate bites: with too few registers the same source does not pass."""
    headers()
    text = (ROOT / "csrc" / "cuda" / "cell_forward.cu").read_text()
    assert "__launch_bounds__(kThreads, 2)" in text
    source = tmp_path / "cell_forward.cu"
    source.write_text(
        text.replace("__launch_bounds__(kThreads, 2)", "__launch_bounds__(kThreads, 8)")
    )
    result = compile_kernels(source, "sm_90", tmp_path)
    assert result.returncode != 0
    assert "spill" in result.stderr


def main():
    pins = {"nvcc": version()}
    for architecture in ARCHITECTURES:
        pins[architecture] = compile_all(architecture)
        print(f"{architecture}: registers a thread, warps on a multiprocessor of {WARPS}")
        for kernel, count in sorted(pins[architecture].items()):
            print(f"  {count:4} {resident_warps(count):3}  {kernel}")
    PINS.write_text(json.dumps(pins, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    if shutil.which("nvcc") is None:
        raise SystemExit("no nvcc on the path")
    main()
