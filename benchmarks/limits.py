"""What this machine can do at most, measured: the ceiling that a benchmark row is held against.

python benchmarks/limits.py            float32 FMA peak and read bandwidth, 1 and all threads
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("limits.cpp")


@dataclass
class Limits:
    """GFLOP/s of float32 fused multiply-adds; GB/s of reading by KiB of data a thread."""

    threads: int
    gflops: float
    bandwidth: dict[int, float]

    def seconds(self, flops: float, weight_bytes: float) -> float:
        """Least time for a product: its arithmetic, or reading its weights from where they lie.

        The rate is that of the largest amount measured that is no larger than the weights' share
        of a thread: the fastest that they can be read at.
        """
        per_thread = weight_bytes / self.threads / 1024
        below = [size for size in sorted(self.bandwidth) if size <= per_thread]
        rate = self.bandwidth[below[-1] if below else min(self.bandwidth)]
        return max(flops / self.gflops, weight_bytes / rate) / 1e9


def measure(thread_counts: list[int]) -> dict[int, Limits]:
    """Build limits.cpp for this machine and run it for each number of threads."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        compiler = os.environ.get("CXX", "c++")
        options = ["-O3", "-march=native", "-std=c++17", "-Wno-psabi", "-pthread"]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(program)], check=True)
        for threads in thread_counts:
            output = subprocess.run(
                [str(program), str(threads)], check=True, capture_output=True, text=True
            ).stdout
            values = dict(line.split() for line in output.splitlines())
            gflops = float(values.pop("gflops"))
            bandwidth = {int(size): float(rate) for size, rate in values.items()}
            result[threads] = Limits(threads, gflops, bandwidth)
    return result


def main() -> None:
    for threads, limits in measure(sorted({1, torch.get_num_threads()})).items():
        print(f"{threads} thread(s): {limits.gflops:.0f} GFLOP/s float32")
        for size, rate in limits.bandwidth.items():
            print(f"  reading {size:>7} KiB a thread: {rate:6.1f} GB/s")


if __name__ == "__main__":
    main()
