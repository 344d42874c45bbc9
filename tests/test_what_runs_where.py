"""docs/testing.md says what runs where: it names every slow test, and no other."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import COLLECTED

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "testing.md"

# In a process of its own, where this one was not asked for everything.
COLLECT = """
import pytest
from limits import COLLECTED

class Listed:
    def pytest_collection_finish(self, session):
        for name, slow in session.config.stash[COLLECTED]:
            print("LISTED", int(slow), name)

raise SystemExit(pytest.main(["--collect-only", "-qq", "-p", "no:xdist", "-m", ""], [Listed()]))
"""


@pytest.fixture(scope="module")
def collected(pytestconfig):
    """Names of tests, as file.py::name[parameters], by whether they are slow."""
    here = pytestconfig.stash[COLLECTED]
    files = {name.split("::")[0] for name, _ in here}
    if files == {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}:
        names = [(name.removeprefix("tests/"), slow) for name, slow in here]
        return {kind: [name for name, slow in names if slow == kind] for kind in (0, 1)}
    result = subprocess.run(
        [sys.executable, "-c", COLLECT],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # The tests' own modules first: benchmarks/ has one of the same name, and may be there too.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)]),
        },
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.findall(r"^LISTED (\d) tests/(.*)", result.stdout, re.M)
    return {kind: [name for digit, name in found if int(digit) == kind] for kind in (0, 1)}


def patterns(cell):
    """What is between backticks in a cell of the table; a * stands for anything."""
    return re.findall(r"`(test_[^`]*)`", cell)


def rows():
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| `test_")]
    return [line.strip("| ").split(" | ") for line in table]


@functools.cache  # for thousands of names each
def expression(pattern):
    return re.compile(".*".join(map(re.escape, pattern.split("*"))) + r"(\[.*\])?")


def matches(pattern, name):
    """A pattern without parameters is that of all of them."""
    return expression(pattern).fullmatch(name) is not None


def test_the_page_names_every_slow_test_and_no_other(collected):
    fast, slow = collected[0], collected[1]
    assert len(fast) > 2000
    listed = [pattern for row in rows() for pattern in patterns(row[0])]
    assert listed
    for name in slow:
        assert any(matches(pattern, name) for pattern in listed), f"not in {PAGE.name}: {name}"
    for pattern in listed:
        assert any(matches(pattern, name) for name in slow), f"no slow test: {pattern}"
        assert not any(matches(pattern, name) for name in fast), f"in make test: {pattern}"


def test_what_stays_in_make_test_is_there(collected):
    for row in rows():
        for pattern in patterns(row[-1]):
            assert any(matches(pattern, name) for name in collected[0]), pattern


def test_the_commands_select_by_the_marker():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^SLOW \?= slow$", makefile, re.M)
    assert re.search(r'^test-slow: .*\n\t\$\(PYTEST\) .*-m "\$\(SLOW\)"$', makefile, re.M)
    assert re.search(r"^test-all:\n\t\$\(MAKE\) test\n\t\$\(MAKE\) test-slow$", makefile, re.M)
    assert "make test-all" in (ROOT / ".ci" / "run").read_text()
    assert "-m 'not slow'" in (ROOT / "pyproject.toml").read_text()
