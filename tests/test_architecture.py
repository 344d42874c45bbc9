"""docs/architecture.md is true: it names every source file, and for every operator its places."""

import re
from pathlib import Path

import pytest
import torch

import lstm_ext  # noqa: F401 (registers the operators)

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_source_file_has_its_line():
    named, folder = set(), ""
    for first, files, job in rows(section("Files of csrc")):
        folder = first or folder
        assert job
        named |= {f"{folder}/{file.strip()}" for file in files.split(",")}
    there = {
        str(path.relative_to(ROOT / "csrc"))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    }
    assert named == there


OPERATORS = {row[0].strip("`"): row[1:] for row in rows(section("One name, four places"))}


def test_every_operator_has_its_line():
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lstm_ext::")
    }
    assert set(OPERATORS) == names


@pytest.mark.parametrize("name", OPERATORS)
def test_places_of_an_operator(name):
    schema, kernels, test, benchmark = (ROOT / path for path in OPERATORS[name])
    assert re.search(rf'"{name}\(Tensor\?? ', schema.read_text())
    assert f"ops::{name}::implement<" in kernels.read_text()
    assert test.exists()
    assert benchmark.exists()


def test_files_that_a_cell_touches():
    """docs/extending.md: those of csrc and lstm_ext that know of peepholes, eight at most."""
    listed = {
        row[0]
        for row in rows((ROOT / "docs" / "extending.md").read_text().split("\n## A cell\n")[1])
        if row[0].startswith(("csrc/", "lstm_ext/"))
    }
    knows = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "lstm_ext")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")
        and re.search("peephole|weight_c[ifo]", path.read_text(), re.IGNORECASE)
    }
    assert listed == knows
    assert len(knows) <= 8
