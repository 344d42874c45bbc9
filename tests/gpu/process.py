"""Processes that can be ended for good: each in a group of its own, its output in a log.

The groups are signalled as a whole. What left its group, as the workers of compilers do, becomes a
child of this process when its parent ends, and is found there. If this process is killed, so are
those that it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)
GRACE_SECONDS = 2.0  # after SIGINT, and half of it after SIGTERM
KILL_SECONDS = 3.0  # after SIGKILL: a process that waits in a driver may never end
MOST_LOG_BYTES = 64 * 2**20


def adopt_orphans() -> None:
    """Make this process the parent of all that its descendants leave behind."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _in_child() -> None:
    os.setpgrp()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # a shell's background jobs ignore SIGINT


class Child:
    """A process that was started. Only from a program's one thread (see ``_in_child``)."""

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path
    ) -> None:
        self.log = log
        self.begin = time.monotonic()
        self.ended_at: float | None = None
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                cwd=cwd, env=dict(env), preexec_fn=_in_child,
            )  # fmt: skip

    def poll(self) -> int | None:
        """Return the exit status, None while it runs; ends what an ended process left behind."""
        code = self.process.poll()
        if code is not None and self.ended_at is None:
            self.ended_at = time.monotonic()
            self.signal(signal.SIGKILL)
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    @property
    def seconds(self) -> float:
        """How long it has run, or ran."""
        return (self.ended_at or time.monotonic()) - self.begin

    def writes_too_much(self) -> bool:
        """Whether its log is longer than any that can be of use."""
        try:
            return self.log.stat().st_size > MOST_LOG_BYTES
        except OSError:
            return False


def end(children: Iterable[Child], grace: float = GRACE_SECONDS) -> None:
    """Ask, then force the processes to end; return when they have, or cannot."""
    left = [child for child in children if child.poll() is None]
    steps = ((signal.SIGINT, grace), (signal.SIGTERM, grace / 2), (signal.SIGKILL, KILL_SECONDS))
    for number, seconds in steps:
        for child in left:
            child.signal(number)
        until = time.monotonic() + seconds
        while (left := [c for c in left if c.poll() is None]) and time.monotonic() < until:
            time.sleep(0.02)


def descendants() -> list[int]:
    """Return the ids of all processes below this one that still run."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name, in brackets, may hold anything.
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.name))
    found: list[int] = []
    below = [os.getpid()]
    while below:
        below = [child for parent in below for child in children.get(parent, [])]
        found += below
    return found


def end_strays(seconds: float = KILL_SECONDS) -> list[int]:
    """Kill every process below this one; return those that do not end. No Child may run."""
    until = time.monotonic() + seconds
    while left := descendants():
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _reap()
        if time.monotonic() > until:
            return left
        time.sleep(0.02)
    _reap()
    return []


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
