"""How times are taken: interleaved, warmed up, medians; and what is written down beside them."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

import lstm_ext

RESULTS = Path(__file__).parent / "results"
ROUND_SECONDS = 0.02  # least time of one timing, so that the clock's grain does not matter


def options(
    description: str | None,
    parse_shape: Callable[[str], Any],
    modes: list[str],
    peers: list[str],
    all_peers: list[str],
    out: str,
) -> argparse.ArgumentParser:
    """Build the command line that the benchmarks have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=None)
    parser.add_argument("--quick", action="store_true", help="a few small shapes, few rounds")
    parser.add_argument("--threads", nargs="+", type=int, default=None, help="default: 1 and all")
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"]
    )
    parser.add_argument("--peers", nargs="*", default=peers, choices=all_peers)
    parser.add_argument("--rounds", type=int, default=None, help="timings of each peer per row")
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def interleaved(calls: dict[str, Any], rounds: int) -> dict[str, float]:
    """Time the calls in turn, A B C A B C ..., and return each one's median in microseconds.

    A call is a function, or something that times itself: timeit(repeats) with the mean seconds.
    """
    timers = {
        name: call
        if hasattr(call, "timeit")
        else Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in calls.items()
    }
    repeats = {}
    for name, timer in timers.items():
        timer.timeit(2)  # warm-up: compilers compile, allocators fill
        once = min(timer.timeit(1).mean for _ in range(3))
        repeats[name] = max(1, math.ceil(ROUND_SECONDS / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(repeats[name]).mean * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def kept_bytes(forward: Callable[[], object], known: Iterable[torch.Tensor]) -> int:
    """Count the bytes that a forward keeps for backward beyond its inputs and outputs."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    for tensor in (*known, *outputs):  # type: ignore[misc]
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean, NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


@functools.cache  # as the run began: the files it writes would make the revision "dirty"
def environment() -> dict[str, Any]:
    """Describe machine, versions and revision, for the head of a result file."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lstm_ext": lstm_ext.build_info(),
        "git": _revision(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _revision() -> str:
    if "LSTM_EXT_REVISION" in os.environ:  # of a checkout that was carried without its history
        return os.environ["LSTM_EXT_REVISION"]
    root = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def save(path: Path, rows: list[dict[str, Any]], **head: Any) -> None:
    """Write a result file: the environment, what was run, and one dict per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), **head, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
