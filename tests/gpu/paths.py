"""Every kernel path in a process that may hang or crash: a stage of check.py.

    python paths.py --device cuda --out RESULTS.jsonl [--only NAME ...] [--again RESULTS.json]

A process a group of paths, several at once, since its start takes longer than a path. Each path has
a watchdog; after a hang, a crash or an error of CUDA a new process goes on with the path after it.
A line is written for each path when it is done, and one at the end for each that was not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import path_list
import process

HERE = Path(__file__).resolve().parent
START_SECONDS = 60.0  # import of torch and the first call of CUDA, several at once
BAD = ("wrong", "error", "hung", "crashed", "cut off", "not reached")


@dataclass
class Group:
    """A process's cases: those that are left, and what has been heard of them."""

    name: str
    cases: list[dict[str, Any]]
    child: process.Child | None = None
    lines: Path = Path()
    read: int = 0
    ready: bool = False
    current: str | None = None
    since: float = 0.0
    starts: int = 0
    results: dict[str, dict[str, Any]] = field(default_factory=dict)


class Driver:
    """Runs groups; see the module."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.stopped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        process.adopt_orphans()

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def run(self, groups: list[Group]) -> int:
        """Go through all groups; return how many paths are not right."""
        begin = time.monotonic()
        waiting, running = list(groups), []
        while (waiting or running) and not self.stopped:
            if time.monotonic() - begin > self.options.seconds:
                break
            while waiting and len(running) < self.options.at_once:
                group = waiting.pop(0)
                self._start(group)
                running.append(group)
            time.sleep(0.02)
            for group in list(running):
                if not self._look_after(group):
                    running.remove(group)
        process.end([g.child for g in running if g.child], grace=0.5)
        for group in groups:
            if group in running and group.current is not None:
                self._done(group, group.current, status="cut off", worst="the stage's time is over")
            for case in list(group.cases):  # those that nothing was heard of
                self._done(group, case["name"], status="not reached")
        process.end_strays()
        results = [r for group in groups for r in group.results.values()]
        bad = sum(r["status"] in BAD for r in results)
        print(
            f"{len(results) - bad} of {len(results)} paths agree, {time.monotonic() - begin:.0f} s"
        )
        return bad

    def _start(self, group: Group) -> None:
        group.starts += 1
        stem = self.folder / f"{''.join(c for c in group.name if c.isalnum())}{group.starts}"
        group.lines, group.read, group.ready = stem.with_suffix(".jsonl"), 0, False
        group.current, group.since = None, time.monotonic()
        cases = stem.with_suffix(".json")
        cases.write_text(json.dumps(group.cases))
        command = [*self.options.worker, "--device", self.options.device,
                   "--out", str(group.lines), "--cases", str(cases)]  # fmt: skip
        # Of the operators there is one kind; modules choose as they do for a user.
        fused = any("fused" in case.get("options", ()) for case in group.cases)
        env = {**os.environ, **({"LSTM_EXT_CUDA": "fused"} if fused else {})}
        env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # here: no processes beside this one
        group.child = process.Child(command, stem.with_suffix(".log"), env, Path.cwd())

    def _look_after(self, group: Group) -> bool:
        """Hear what the process has to say; False when the group is done."""
        assert group.child is not None
        code = group.child.poll()
        self._read(group)
        if code is not None:
            self._after_exit(group, code)
        elif (late := self._is_late(group)) is not None:
            group.child.signal(signal.SIGKILL)
            process.end([group.child], grace=0)
            self._done(group, group.current or group.cases[0]["name"], status="hung", worst=late)
            if group.child.poll() is None:
                return False  # it cannot be ended: another beside it would wait for the same
        else:
            return True
        if group.cases:
            self._start(group)
        return bool(group.cases)

    def _is_late(self, group: Group) -> str | None:
        """Say what a process has not done in its time; None if it has time left."""
        waited = time.monotonic() - group.since
        if group.current is None:
            limit, what = START_SECONDS, "begin a path" if group.ready else "start"
        else:
            case = next((c for c in group.cases if c["name"] == group.current), {})
            limit, what = case.get("watchdog", path_list.WATCHDOG_SECONDS), "end it"
        if waited <= limit * self.options.patience:
            return None
        return f"the process did not {what} in {waited:.0f} s"

    def _after_exit(self, group: Group, code: int) -> None:
        """Account for the path at which a process ended early."""
        assert group.child is not None
        if not group.cases:
            return
        name = group.current or group.cases[0]["name"]
        said = [line.strip() for line in group.child.log.read_text(errors="replace").splitlines()]
        last = next((line for line in reversed(said) if line), "it said nothing")
        if name in group.results:  # an error that it has reported, or a crash after the result
            if group.results[name]["status"] == "ok":
                group.results[name].update(status="crashed", worst=f"then exit status {code}")
            self._done(group, name)
            return
        self._done(group, name, status="crashed", worst=f"exit status {code}: {last[:150]}")
        if (
            not group.ready and group.starts > 1
        ):  # twice at the start: the others would be no better
            for case in list(group.cases):
                self._done(group, case["name"], status="not reached",
                           worst="the process does not start")  # fmt: skip

    def _read(self, group: Group) -> None:
        if not group.lines.exists():
            return
        with group.lines.open() as stream:
            stream.seek(group.read)
            while (line := stream.readline()).endswith("\n"):
                group.read = stream.tell()
                self._hear(group, json.loads(line))

    def _hear(self, group: Group, line: dict[str, Any]) -> None:
        event, name = line.pop("event"), line.pop("path", None)
        group.since = time.monotonic()
        if event == "ready":
            group.ready = True
        elif event == "begin":
            group.current = name
        elif event == "result":
            group.results.setdefault(name, {"path": name, "group": group.name}).update(line)
        elif event == "end":
            self._done(group, name, **line)
            group.current = None

    def _done(self, group: Group, name: str, **more: Any) -> None:
        """Write a path's line, and strike it from the list."""
        result = group.results.setdefault(name, {"path": name, "group": group.name})
        if result.get("status") == "ok" and more.get("status") == "hung":
            more = {"other_way": "unknown, the profiler hangs"}
        for key, value in more.items():
            result[key] = value
        result.setdefault("status", "not reached")
        case = next((c for c in group.cases if c["name"] == name), None)
        if case is not None:
            result.update(op=case["op"], way=case["way"], dtype=case["dtype"])
            group.cases = [c for c in group.cases if c["name"] != name]
        with self.options.out.open("a") as stream:
            stream.write(json.dumps(result) + "\n")
        mark = f" !! {result.get('worst', '')}" if result["status"] != "ok" else ""
        print(f"{result['status']:11} {name}{mark}", flush=True)
        if result["status"] in ("error", "hung", "crashed") and group.child is not None:
            said = group.child.log.read_text(errors="replace").splitlines()
            print("\n".join(f"    {line}" for line in said[-40:]), flush=True)


def were_right(results: Path) -> set[str]:
    """Names of the paths that need no second run."""
    content = json.loads(results.read_text())
    lines = [line for stage in content["stages"] if stage["name"] == "kernel paths"
             for job in stage["jobs"] for line in job.get("lines", [])]  # fmt: skip
    return {line["path"] for line in lines
            if line.get("status") == "ok" and not line.get("other_way")}  # fmt: skip


def main() -> int:
    """Go through the paths; exit status 0 if all agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=os.environ.get("GPU_CHECK_LINES"))
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--patience", type=float, default=1.0, help="times the watchdogs' seconds")
    parser.add_argument("--only", nargs="*", default=[], help="paths whose name has this in it")
    parser.add_argument("--again", type=Path, help="those that a results.json does not call right")
    parser.add_argument("--worker", nargs="+", help="what is run in place of path_worker.py",
                        default=[sys.executable, str(HERE / "path_worker.py")])  # fmt: skip
    parser.add_argument("--cases", type=Path, help="groups of cases, in place of path_list's")
    options = parser.parse_args()
    if options.out is None:
        parser.error("--out, or GPU_CHECK_LINES")
    options.out = Path(options.out)
    if options.cases:
        groups = json.loads(options.cases.read_text())
    else:
        groups = {name: [case.as_dict() for case in cases]
                  for name, cases in path_list.groups(options.device).items()}  # fmt: skip
    known = were_right(options.again) if options.again else set()

    def wanted(name: str) -> bool:
        if name in known:
            return False
        return not options.only or any(part in name for part in options.only)

    chosen = [Group(name, [c for c in cases if wanted(c["name"])])
              for name, cases in groups.items()]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return int(Driver(options, Path(folder)).run([g for g in chosen if g.cases]) > 0)


if __name__ == "__main__":
    sys.exit(main())
