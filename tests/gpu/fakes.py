"""Stages that go wrong in every way known, on no device: python check.py --dry-run.

python fakes.py NAME        what one of them does
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runner import NO_GPU, Job, Stage

FOREVER = 600.0
PLENTY = 120.0


def good() -> None:
    """Pass, with a result."""
    with open(os.environ["GPU_CHECK_LINES"], "a") as stream:
        stream.write(json.dumps({"test": "good", "status": "passed"}) + "\n")
    print("all right")


def crash() -> None:
    """End by a signal."""
    print("about to crash")
    os.abort()


def fails() -> None:
    """Fail, with a reason."""
    raise SystemExit("this is why")


def import_fails() -> None:
    """Need a module that is not there."""
    import no_such_module  # type: ignore[import-not-found]  # noqa: F401


def stubborn() -> None:
    """Hang, and end for no signal that can be ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with open(os.environ["GPU_CHECK_LINES"], "a") as stream:
        stream.write(json.dumps({"test": "stubborn", "status": "begun"}) + "\n")
    print("hanging", flush=True)
    time.sleep(FOREVER)


def polite() -> None:
    """Work for longer than there is time, and end with a word when asked to."""
    try:
        time.sleep(FOREVER)
    except KeyboardInterrupt:
        print("interrupted, and this was saved")
        sys.exit(1)


def silent() -> None:
    """Say nothing at all."""


def endless() -> None:
    """Write without end."""
    while True:
        sys.stdout.write("x" * 1023 + "\n")
        time.sleep(0.001)


def long() -> None:
    """Write megabytes, then what matters."""
    for k in range(6000):
        print(f"{k:8} {'y' * 1000}")
    print("the last line")


def leaves_children() -> None:
    """Leave one process in the group, and one that has left it."""
    sleep = [sys.executable, "-c", f"import time; time.sleep({FOREVER})", "left by the dry run"]
    subprocess.Popen(sleep)
    subprocess.Popen(sleep, start_new_session=True)
    print("two are left")


def needs_gpu() -> None:
    """Find no GPU."""
    sys.exit(NO_GPU)


FAKES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (good, crash, fails, import_fails, stubborn, polite, silent, endless, long,
              leaves_children, needs_gpu)
}  # fmt: skip


def _job(name: str) -> Job:
    return Job(name, [sys.executable, str(Path(__file__).resolve()), name])


def stages(seconds: float) -> list[Stage]:
    """Return a stage of each; then some together, one that is not there, and one without a program.

    What never ends has so many seconds; what does has plenty, so that a busy machine changes
    nothing.
    """
    endless_ones = (stubborn, polite, endless)
    plan = [
        Stage(name, seconds if f in endless_ones else PLENTY, [_job(name)], inherits=False)
        for name, f in FAKES.items()
    ]
    plan += [
        Stage("together", PLENTY, [_job(n) for n in ("good", "needs_gpu", "fails")], 2),
        Stage("no program", PLENTY, [Job("missing", ["/no/such/program"])]),
        Stage("absent", PLENTY, [_job("good")], absent="failed: no such tool"),
        Stage("last", PLENTY, [_job("good")]),
    ]
    return plan


if __name__ == "__main__":
    FAKES[sys.argv[1]]()
