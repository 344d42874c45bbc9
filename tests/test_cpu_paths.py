"""Every instruction set that is compiled in and that this machine can run."""

import functools
import os
import subprocess
import sys

import pytest
from limits import slow

import lstm_ext

SETS = lstm_ext.build_info()["cpu_instruction_sets"].split(",")
FEW = "tests/test_frozen_weights.py"
SUBSET = [
    FEW,
    "tests/test_activations.py",
    "tests/test_cell.py::test_one_set_of_bits",
    "tests/test_cell.py::test_error_is_no_worse_than_torchs",
    "tests/test_frozen.py::test_same_bits",
    "tests/test_layer.py::test_any_size",
    "tests/test_layer.py::test_error_is_no_worse_than_torchs",
    "tests/test_peephole.py::test_error_is_no_worse_than_plain_operations",
    "tests/test_peephole.py::test_layer_is_the_reference",
    "tests/test_recurrence.py::test_is_as_exact_as_the_reference",
    "tests/test_recurrence.py::test_numbers_are_the_references",
    "tests/test_recurrence.py::test_training_has_the_bits_of_inference",
]
SHAPES = "1x3x2-bias or 3x50x200-bias or 17x257x129-bias or 400x7x3-bias or plain or not test_error"


@functools.cache
def instruction_set(**variables):
    """The one that a new process uses."""
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    code = "import lstm_ext; print(lstm_ext.build_info()['cpu_instruction_set'])"
    command = [sys.executable, "-c", code]
    used = subprocess.run(
        command, env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return used.stdout.strip()


@pytest.mark.parametrize("subset", ["few", *slow("all")])
@pytest.mark.parametrize("name", SETS)
def test_instruction_set(name, subset):
    if subset == "few" and name == instruction_set() and "ATEN_CPU_CAPABILITY" not in os.environ:
        pytest.skip("all other tests run with it")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": name.lower()}
    # torch believes what it is told: the machine's own best says what it can run.
    if SETS.index(instruction_set()) < SETS.index(name):
        pytest.skip(f"this machine has no {name}")
    if instruction_set(ATEN_CPU_CAPABILITY=name.lower()) != name:
        pytest.skip(f"this machine has no {name}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        *(SUBSET if subset == "all" else [FEW]),
        "-k",
        f"not cuda and ({SHAPES})",
    ]
    root = os.path.dirname(os.path.dirname(__file__))
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=root, check=False
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
