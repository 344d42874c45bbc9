"""Runs stages one after another within their times, and writes what is known at every moment."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import process

NO_GPU = 77  # the exit status of a program that needs a GPU and finds none
NEEDS_GPU = "needs a GPU"
RESERVE_SECONDS = 6.0  # for the last stage to end in, and for the table
LEAST_SECONDS = 2.0  # less is no use to any stage
WRITE_EVERY = 2.0
LOG_HEAD, LOG_TAIL = 256 * 1024, 512 * 1024  # bytes of a log that come back


def say(text: str) -> None:
    """Print; if nobody reads it any more, the results are written all the same."""
    try:
        print(text, flush=True)
    except OSError:
        # Nor does the interpreter, at its end, try to print what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True)
class Job:
    """A process of a stage.

    In its command ``{seconds}`` stands for the seconds that it has, less ``margin``. It may append
    JSON lines to the file that GPU_CHECK_LINES names; or prints them (``prints_lines``).
    """

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    prints_lines: bool = False
    margin: float = 0
    keep: int = 30  # lines of its output that go to results.json


@dataclass(frozen=True)
class Stage:
    """Jobs that belong together. ``absent`` says why they cannot run here.

    They have ``seconds`` and what earlier stages left over, unless ``inherits`` is False.
    """

    name: str
    seconds: float
    jobs: list[Job]
    at_once: int = 1
    absent: str = ""
    inherits: bool = True


class Runner:
    """Runs stages; see the module."""

    def __init__(
        self,
        out: Path,
        work: Path,
        root: Path,
        seconds: float,
        head: dict[str, Any],
        grace: float = process.GRACE_SECONDS,
    ) -> None:
        self.out, self.work, self.root, self.grace = out, work, root, grace
        self.begin = time.monotonic()
        self.deadline = self.begin + seconds - RESERVE_SECONDS
        self.interrupted = ""
        self.results: dict[str, Any] = {**head, "status": "begun", "stages": []}
        self._written = 0.0
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        process.adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, _frame: object) -> None:
        self.interrupted = f"interrupted by {signal.Signals(number).name}"

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.begin

    def run(self, stages: list[Stage]) -> None:
        """Run the stages in order. What one does not use, those after it may."""
        self.results["plan"] = [stage.name for stage in stages]
        until = self.begin
        for stage in stages:
            own = time.monotonic() + stage.seconds
            until = max(until + stage.seconds, own)
            self._run_stage(stage, min(until if stage.inherits else own, self.deadline))
        self.results["status"] = self.interrupted or "complete"
        self.results["seconds"] = round(self.elapsed(), 1)
        self.write()
        self._pack_logs()

    def _run_stage(self, stage: Stage, until: float) -> None:
        result: dict[str, Any] = {
            "name": stage.name,
            "status": "begun",
            "at": round(self.elapsed(), 1),
            "limit": round(max(0.0, until - time.monotonic()), 1),
            "jobs": [],
        }
        self.results["stages"].append(result)
        begin = time.monotonic()
        if self.interrupted:
            result["status"] = f"not run: {self.interrupted}"
        elif stage.absent:
            result["status"] = stage.absent
        elif until - begin < min(LEAST_SECONDS, stage.seconds - 0.1):
            result["status"] = "not run: no time left"
        else:
            say(f"{self.elapsed():5.0f} s  {stage.name} (at most {until - begin:.0f} s)")
            self.write()
            try:
                self._run_jobs(stage, until, result)
            except Exception as error:  # one stage is lost, and no more
                result["status"] = f"failed: {type(error).__name__}: {error}"
            strays = process.end_strays()
            if strays:
                result["left_behind"] = strays
        result["seconds"] = round(time.monotonic() - begin, 1)
        say(f"{self.elapsed():5.0f} s  {stage.name}: {result['status']}")
        self.write()
        self._pack_logs()

    def _run_jobs(self, stage: Stage, until: float, result: dict[str, Any]) -> None:
        waiting = list(stage.jobs)
        running: list[tuple[process.Child, dict[str, Any], Job]] = []
        while waiting or running:
            while waiting and len(running) < stage.at_once:
                job = waiting.pop(0)
                record: dict[str, Any] = {"name": job.name, "status": "begun"}
                result["jobs"].append(record)
                child = self._start(stage, job, until, record)
                if child is not None:
                    running.append((child, record, job))
            time.sleep(0.02)
            late = time.monotonic() >= until
            if late or self.interrupted:
                process.end([child for child, _, _ in running], self.grace)
            for entry in list(running):
                child, record, job = entry
                code = child.poll()
                if code is None and child.writes_too_much():
                    process.end([child], self.grace)
                    record["status"] = "failed: cut off, its output has no end"
                elif code is None and not (late or self.interrupted):
                    continue
                elif late and code != 0:
                    record["status"] = f"cut off after {child.seconds:.0f} s"
                elif self.interrupted and code != 0:
                    record["status"] = self.interrupted
                else:
                    record["status"] = _status(code)
                self._finish(stage, child, job, record)
                running.remove(entry)
            if late or self.interrupted:
                reason = self.interrupted or "no time left"
                result["jobs"] += [{"name": j.name, "status": f"not run: {reason}"}
                                   for j in waiting]  # fmt: skip
                waiting.clear()
            if time.monotonic() - self._written > WRITE_EVERY:
                for child, record, job in running:
                    self._collect(stage, child, job, record)
                self.write()
        result["status"] = _worst([job["status"] for job in result["jobs"]])

    def _start(
        self, stage: Stage, job: Job, until: float, record: dict[str, Any]
    ) -> process.Child | None:
        seconds = max(1, int(until - time.monotonic() - job.margin))
        command = [part.replace("{seconds}", str(seconds)) for part in job.command]
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        env.update(job.env)
        env["GPU_CHECK_LINES"] = str(self._file(stage, job, ".jsonl"))
        log = self._file(stage, job, ".log")
        record["command"] = " ".join(command)
        try:
            return process.Child(command, log, env, self.root)
        except OSError as error:
            record["status"] = f"failed: {error}"
            return None

    def _finish(self, stage: Stage, child: process.Child, job: Job, record: dict[str, Any]) -> None:
        record["seconds"] = round(child.seconds, 1)
        self._collect(stage, child, job, record)
        if record["status"] == "passed" and not record["said"] and not record["lines"]:
            record["status"] = "failed: it said nothing"
        if record["status"] not in ("passed", NEEDS_GPU):
            said = "\n".join(record["said"][-12:])
            say(f"{job.name}: {record['status']}\n{said}")

    def _collect(
        self, stage: Stage, child: process.Child, job: Job, record: dict[str, Any]
    ) -> None:
        """Take over what a job has said so far."""
        head, tail = _ends(child.log)
        lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
        record["said"] = [line[:600] for line in lines[-job.keep :]]
        if job.prints_lines:
            text = (head + tail).decode(errors="replace")
        else:
            file = self._file(stage, job, ".jsonl")
            text = file.read_text(errors="replace") if file.exists() else ""
        record["lines"] = [value for line in text.splitlines() if (value := _parse(line))]

    def _file(self, stage: Stage, job: Job, suffix: str) -> Path:
        name = f"{stage.name} {job.name}" if job.name != stage.name else stage.name
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        return self.work / f"{safe}{suffix}"

    def write(self) -> None:
        """Write results.json, whole or not at all."""
        self._written = time.monotonic()
        self.results["seconds"] = round(self.elapsed(), 1)
        self.replace("results.json", (json.dumps(self.results, indent=1) + "\n").encode())

    def replace(self, name: str, content: bytes) -> None:
        """Write a file of the results, whole or not at all."""
        new = self.out / f"{name}.new"
        new.write_bytes(content)
        new.replace(self.out / name)

    def _pack_logs(self) -> None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=3) as archive:
            for path in sorted(self.work.iterdir()):
                if not path.is_file():
                    continue
                content = b"".join(_ends(path))
                entry = tarfile.TarInfo(f"logs/{path.name}")
                entry.size, entry.mtime = len(content), int(time.time())
                archive.addfile(entry, io.BytesIO(content))
        self.replace("logs.tar.gz", packed.getvalue())


def _status(code: int | None) -> str:
    if code is None:
        return "failed: it cannot be ended"
    if code == 0:
        return "passed"
    if code == NO_GPU:
        return NEEDS_GPU
    if code < 0:
        try:
            return f"failed (killed by {signal.Signals(-code).name})"
        except ValueError:
            return f"failed (killed by signal {-code})"
    return f"failed ({code})"


def _worst(statuses: list[str]) -> str:
    """Return the status of a stage: the worst of its jobs'."""
    kinds: list[Callable[[str], bool]] = [
        lambda s: s.startswith("failed"),
        lambda s: s.startswith("cut off"),
        lambda s: s.startswith(("interrupted", "not run")),
        lambda s: s != "passed",
    ]
    for kind in kinds:
        for status in statuses:
            if kind(status):
                return status
    return "passed" if statuses else "not run: it has no jobs"


def _ends(path: Path) -> tuple[bytes, bytes]:
    """Return the beginning and the end of a file; what lies between is left out, and said so."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= LOG_HEAD + LOG_TAIL:
            return b"", stream.read()
        head = stream.read(LOG_HEAD)
        stream.seek(-LOG_TAIL, os.SEEK_END)
        return head + b"\n... left out ...\n", stream.read(LOG_TAIL)


def _parse(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
