"""Tables of the documents are what the result files of the benchmarks give."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_up_to_date(document):
    # Not? python benchmarks/tables.py
    assert document.read_text() == tables.with_tables(document.read_text())


def test_every_table_is_in_a_document():
    texts = [document.read_text() for document in tables.DOCUMENTS]
    used = {name for text in texts for _, name, _, _ in tables.BLOCK.findall(text)}
    assert used == set(tables.TABLES)
    for text in texts:
        comments = re.findall("^<!-- (?:end of )?table", text, re.M)
        assert len(comments) == 2 * len(tables.BLOCK.findall(text))


def test_a_changed_result_changes_the_table(tmp_path, monkeypatch):
    found = json.loads((tables.RESULTS / "cell.json").read_text())
    row = next(r for r in found["rows"] if r["shape"] == [1, 3, 2] and r["mode"] == "inference")
    row["microseconds"]["lstm_ext"], row["ratio"] = 12345.6, 0.25
    (tmp_path / "cell.json").write_text(json.dumps(found))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert any("12,346" in line and "0.25" in line for line in tables.cell_in_short())


def test_what_loses_is_in_bold():
    row = {"shape": "4x3x2x5", "mode": "training", "threads": 1, "us": {"nn.LSTM": 1.0, "on": 2.0}}
    row["ratios"] = {"nn.LSTM / on": 0.5, "on / off": 0.75}
    line = tables.with_ratios([row])[-1]
    assert line == "| 4 x 3 x 2 -> 5 | training | 1 | 1.0 | 2.0 | **0.50** | 0.75 |"


def test_what_a_way_of_ours_costs_is_not_in_bold():
    row = {"shape": "2x3x1x1", "threads": 1, "us": {"outside": 1.0, "inside": 0.9}}
    row["ratios"] = {"inside / outside": 0.9}
    line = tables.with_ratios([row], named=lambda row: [row["shape"]], heads=("",))[-1]
    assert line == "| 2x3x1x1 | 1 | 1.0 | 0.9 | 0.90 |"


def test_a_projection_below_its_target_is_in_bold():
    found = json.loads((tables.RESULTS / "projection.json").read_text())["rows"]
    text = "\n".join(tables.projection_rows())
    assert text.count("**") == 2 * sum(row["ratio"] < tables.PROJECTION_TARGET for row in found)


def test_figures_of_the_readme():
    """Those that stand in sentences."""
    text = " ".join((ROOT / "README.md").read_text().split())
    int8 = tables.frozen_means()[2].split("|")[2].strip()
    assert f"with AVX2 {int8} times as fast as frozen float32" in text
    slowest = min(tables.least(tables.rows_of("sequence.json", "inference", n)) for n in (1, 2))
    assert f"up to {1 - slowest:.0%} slower".replace("%", " %") in text


@pytest.mark.slow
def test_check_sees_a_table_by_hand(tmp_path):
    for name in ("benchmarks", "docs"):
        (tmp_path / name).mkdir()
    for source in ("tables.py", "report.py", "protocol.py"):
        (tmp_path / "benchmarks" / source).symlink_to(ROOT / "benchmarks" / source)
    (tmp_path / "benchmarks" / "results").symlink_to(tables.RESULTS)
    (tmp_path / "README.md").write_text("<!-- table: cell-dtypes -->\n<!-- end of table -->\n")
    code = (
        "import pathlib, tables; tables.ROOT = pathlib.Path('.').resolve();"
        "tables.DOCUMENTS = [tables.ROOT / 'README.md']; tables.main()"
    )

    def run(*arguments):
        return subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:0] = ['benchmarks']; {code}",
                *arguments,
            ],
            cwd=tmp_path,
            check=False,
        ).returncode

    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
