"""Checks that subjects of commits are under 72 characters; part of make lint.

    python tests/commit_subjects.py [RANGE]

RANGE is what `git log` takes; by default every commit since the rule began. In a clone that is too
shallow to reach so far back, those that it has.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 71
BEGAN_AFTER = "3f3d19e26af1167421ca14d7cdb1b0b6667784b0"


def git(*arguments: str, folder: Path = ROOT) -> str | None:
    """Run git; None if it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else None


def too_long(commits: str, folder: Path = ROOT) -> list[str] | None:
    """List the subjects in a range that are too long; None if there is no such range."""
    subjects = git("log", "--no-merges", "--format=%s", commits, folder=folder)
    return None if subjects is None else [s for s in subjects.splitlines() if len(s) > MOST]


def main() -> int:
    """Check a range; the exit status is 1 if one is too long, 2 if there is no such range."""
    if len(sys.argv) > 1:
        found = too_long(sys.argv[1])
    elif git("cat-file", "-e", BEGAN_AFTER) is None:
        shallow = (git("rev-parse", "--is-shallow-repository") or "").strip() == "true"
        found = too_long("HEAD") if shallow else []  # or not from this history: an archive
    else:
        found = too_long(f"{BEGAN_AFTER}..HEAD")
    if found is None:
        print(f"no such commits: {' '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    for subject in found:
        print(f"{len(subject)} characters, at most {MOST}: {subject}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
