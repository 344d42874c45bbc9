"""A pytest plugin for check.py: a JSON line for each test at once, and nobody waits for the end.

Loaded by ``-p pytest_lines``; lines go to the file that GPU_CHECK_LINES names. Tests whose name has
"cuda" in it come first. After an error of CUDA, which breaks every later call of a process, a
worker of xdist ends, so that a new one takes its place. If all tests are skipped, the exit status
is 77: a GPU is needed.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

NO_GPU = 77
STICKY = ("CUDA error", "AcceleratorError")
_counts = {"passed": 0, "failed": 0}
_broken = False
_worker = False


def _write(**line: Any) -> None:
    path = os.environ.get("GPU_CHECK_LINES")
    if path:
        with open(path, "a") as stream:
            stream.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Tell a worker of xdist from who starts it; the environment also names those further up."""
    global _worker
    _worker = hasattr(config, "workerinput")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the GPU's tests first."""
    items.sort(key=lambda item: "cuda" not in item.nodeid.lower())


def pytest_runtest_logstart(nodeid: str) -> None:
    """Say what begins, so that a test that never ends has a name."""
    if not _worker:
        _write(test=nodeid, status="begun")


def pytest_runtest_setup() -> None:
    """End a worker whose CUDA is broken, before its next test."""
    if _broken and _worker:
        os._exit(3)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say how each test ended, with the end of its error."""
    global _broken
    if report.failed and any(word in report.longreprtext for word in STICKY):
        _broken = True
    if _worker or (report.when != "call" and report.passed):
        return
    said = [line for line in report.longreprtext.splitlines() if line.strip()]
    if report.failed:
        errors = [line[1:].strip() for line in said if line.startswith("E ")]
        # What was raised, and where that quotes another process, how it ends.
        said = [" .. ".join(dict.fromkeys((errors or said)[:1] + (errors or said)[-1:]))]
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-3000:]}", flush=True)
    if report.outcome in _counts:
        _counts[report.outcome] += 1
    reason = said[0][:300] if said and report.outcome != "passed" else ""
    _write(
        test=report.nodeid, status=report.outcome, seconds=round(report.duration, 2), said=reason
    )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Say which file could not be read."""
    if report.failed and not _worker:
        _counts["failed"] += 1
        last = report.longreprtext.strip().splitlines()[-1:]
        _write(test=report.nodeid, status="failed", said="".join(last)[:300])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell apart all skipped from all passed."""
    if not _worker and session.exitstatus == 0 and not any(_counts.values()):
        session.exitstatus = NO_GPU
