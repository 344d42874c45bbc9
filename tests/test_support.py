"""docs/support.md and the packaging agree with the sources: headers, versions, the matrix."""

import re
from pathlib import Path

import matrix
import pytest

import lstm_ext

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "support.md").read_text()
# Documented for extensions, or the operators' own.
PUBLIC = (
    "torch/library.h", "torch/version.h", "ATen/ops/", "ATen/core/Tensor.h", "ATen/Parallel.h",
    "ATen/Context.h", "ATen/TensorOperators.h", "ATen/core/grad_mode.h", "c10/cuda/",
    "c10/util/intrusive_ptr.h",
)  # fmt: skip


def test_every_private_header_is_listed():
    section = PAGE.split("\n## Private headers of torch\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    listed = {row[0].strip() for row in rows[2:]}
    assert all(cell.strip() for row in rows for cell in row)
    used = set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            used |= set(re.findall(r"#include <((?:torch|ATen|c10)/[^>]*)>", path.read_text()))
    assert listed == {header for header in used if not header.startswith(PUBLIC)}


def text(name):
    return (ROOT / name).read_text()


def test_one_version():
    """What is released is called alike everywhere."""
    version = re.search(r'^version = "(.*)"$', text("pyproject.toml"), re.M).group(1)
    assert re.search(r"^version: (.*)$", text("CITATION.cff"), re.M).group(1) == version
    released = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", text("CHANGELOG.md"), re.M)
    assert released[0] == version
    assert lstm_ext.__version__.split("+")[0] == version


def test_what_is_supported_is_what_is_tested():
    assert f'requires-python = ">={matrix.PYTHONS[0]}"' in text("pyproject.toml")
    oldest = f"torch>={matrix.TORCHES[0]}"
    assert oldest in text("pyproject.toml")
    assert oldest in text("build_backend.py")
    for workflow in ("ci.yml", "release.yml"):
        said = text(f".github/workflows/{workflow}")
        for name, wanted in (("torch", matrix.TORCHES), ("python", matrix.PYTHONS)):
            lists = re.findall(rf"^ *{name}: \[(.*)\]$", said, re.M)
            found = [tuple(re.findall(r'"(.*?)"', entry)) for entry in lists]
            assert wanted in found, (workflow, name)


def test_a_wheel_is_named_for_its_torch(tmp_path, monkeypatch):
    """Version and requirement, in a wheel that has nothing else."""
    pytest.importorskip("wheel")
    monkeypatch.setattr(matrix, "tools", lambda: Path(matrix.sys.executable))
    plain = tmp_path / "in"
    info = plain / "lstm_ext-1.2.3.dist-info"
    info.mkdir(parents=True)
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp311-cp311-any\n")
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: lstm_ext\nVersion: 1.2.3\nRequires-Dist: torch>=2.11\n"
        "Requires-Dist: numpy; extra == 'test'\n\nRequires-Dist: torch>=1 says the text\n"
    )
    (info / "RECORD").write_text("")
    matrix.run(matrix.sys.executable, "-m", "wheel", "pack", "-d", tmp_path, plain)
    (wheel,) = tmp_path.glob("*.whl")
    named = matrix.name_for_torch(wheel, "2.13.0+cpu", tmp_path / "out")
    assert named.name == "lstm_ext-1.2.3+torch2.13.cpu-cp311-cp311-any.whl"
    found = matrix.contents(named)
    assert found["version"] == "1.2.3+torch2.13.cpu"
    assert found["requires"] == ["torch==2.13.*"]


def test_a_pair_without_its_python_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    row = matrix.do(matrix.Pair("2.13", "2.6"), True, tmp_path, [])
    assert row["result"] == "failed"
    assert "no Python 2.6" in row["error"]
    assert "no Python 2.6" in matrix.line(row)
