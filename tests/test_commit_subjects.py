"""tests/commit_subjects.py: what it lets through, and what not."""

import subprocess
import sys

import commit_subjects
import pytest


@pytest.fixture
def history(tmp_path):
    """A repository, to commit to."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "-q")

    def commit(subject):
        git("commit", "-q", "--allow-empty", "-m", subject, "-m", "body " * 40)

    return tmp_path, commit


def test_length(history):
    folder, commit = history
    commit("first")
    commit("a" * 71)
    assert commit_subjects.too_long("HEAD", folder) == []
    commit("b" * 72)
    commit("last")
    assert commit_subjects.too_long("HEAD", folder) == ["b" * 72]
    assert commit_subjects.too_long("HEAD~1..HEAD", folder) == []
    assert commit_subjects.too_long("nowhere..HEAD", folder) is None


def test_this_history():
    """The command, as make lint calls it; and a range that there is not."""
    command = [sys.executable, commit_subjects.__file__]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    result = subprocess.run([*command, "nowhere..HEAD"], capture_output=True, check=False)
    assert result.returncode == 2
