"""docs/support.md and the packaging agree with the sources: headers, versions, the matrix."""

import base64
import hashlib
import re
import zipfile
from pathlib import Path

import matrix
import pytest

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


METADATA = (
    "Metadata-Version: 2.1\nName: lstm_ext\nVersion: 1.2.3\nRequires-Dist: torch>=2.11\n"
    "Requires-Dist: torch-geometric; extra == 'published'\n\nRequires-Dist: torch>=1 in the text\n"
)


def test_a_wheel_is_named_for_its_torch(tmp_path):
    """Version and requirement; what pip checks of it agrees."""
    plain = tmp_path / "lstm_ext-1.2.3-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(plain, "w") as file:
        file.writestr("lstm_ext/__init__.py", "")
        file.writestr("lstm_ext-1.2.3.dist-info/METADATA", METADATA)
        file.writestr("lstm_ext-1.2.3.dist-info/RECORD", "")
    named = matrix.name_for_torch(plain, "2.13.0+cpu", tmp_path / "out")
    assert named.name == "lstm_ext-1.2.3+torch2.13.cpu-cp311-cp311-linux_x86_64.whl"
    found = matrix.contents(named)
    assert found["version"] == "1.2.3+torch2.13.cpu"
    assert found["requires"] == ["torch==2.13.*"]
    with zipfile.ZipFile(named) as file:
        (info,) = {name.split("/")[0] for name in file.namelist()} - {"lstm_ext"}
        assert info == "lstm_ext-1.2.3+torch2.13.cpu.dist-info"
        assert file.read(f"{info}/METADATA").decode().endswith("torch>=1 in the text\n")
        record = file.read(f"{info}/RECORD").decode().splitlines()
        assert [line.split(",")[0] for line in record] == file.namelist()
        for line in record[:-1]:
            name, digest, size = line.split(",")
            content = file.read(name)
            right = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={right}", len(content))


def test_a_wheel_that_does_not_require_torch(tmp_path):
    plain = tmp_path / "lstm_ext-1.2.3-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(plain, "w") as file:
        bare = METADATA.replace("Requires-Dist: torch>=2.11\n", "")
        file.writestr("lstm_ext-1.2.3.dist-info/METADATA", bare)
    with pytest.raises(matrix.FailedError, match="0 lines match"):
        matrix.name_for_torch(plain, "2.13.0", tmp_path / "out")


def test_a_pair_without_its_python_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    row = matrix.do(matrix.Pair("2.13", "2.6"), True, tmp_path, [])
    assert row["result"] == "failed"
    assert "no Python 2.6" in row["error"]
    assert "no Python 2.6" in matrix.line(row)
