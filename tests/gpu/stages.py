"""The stages of check.py: what is run, in which order, and how long each may take."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import prebuilt
from prebuilt import ROOT
from runner import NEEDS_GPU, Job, Stage

HERE = Path(__file__).resolve().parent
NATIVE = ROOT / "build" / "gpu" / "native"
CHECKS = ["check_cell", "check_layer", "check_layer_ways", "check_recurrence"]
SANITIZERS = ["memcheck", "racecheck", "synccheck"]
KERNELS = "layer_forward_kernel|layer_cluster_kernel|layer_backward|cell_forward_kernel"
# They run the kernels' sources, builds and documents without a GPU, and did so before.
WITHOUT_GPU = ["test_cuda_emu", "test_cuda_compile", "test_native", "test_build", "test_gpu_check",
               "test_gpu_native", "test_published", "test_notebook", "test_cpu_paths"]  # fmt: skip
CPU_TESTS = ["test_layer"]


def _tool(name: str) -> str | None:
    beside = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


class Stages:
    """Makes the stages for a device, and for a second call from the results of the first."""

    def __init__(self, device: str, out: Path, again: Path | None = None) -> None:
        self.device, self.out = device, out
        self.again = again
        self.before: dict[str, dict[str, Any]] = {}
        if again is not None:
            content = json.loads(again.read_text())
            self.before = {stage["name"]: stage for stage in content["stages"]}
        self.env = {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE / 'plugin'}",
            "PYTHONUNBUFFERED": "1",
        }
        manifest = prebuilt.read_manifest()
        if manifest:  # the checkout may have been carried without its history
            self.env["LSTM_EXT_REVISION"] = manifest["revision"]

    def plan(self) -> list[Stage]:
        """Return the stages in the order in which they tell most."""
        # The limits are for the GPU machine; without a GPU they would say how busy a machine is.
        patience = 20 if self.device == "cpu" else 1
        return [replace(stage, seconds=stage.seconds * patience) for stage in self._stages()]

    def _stages(self) -> list[Stage]:
        if self.again is not None:
            return [*self.build(), self.environment(), *self._repeated(), self.variants(),
                    self.benchmark(75), self.rest()]  # fmt: skip
        return [
            *self.build(), self.environment(), self.paths(), self.native(), self.gpu_tests(),
            self.benchmark(100), self.micro(), self.sanitizers(), self.profiler(), self.rest(),
        ]  # fmt: skip

    def _repeated(self) -> list[Stage]:
        """Stages that did not pass before, or were not run."""
        first = [self.paths(), self.native(), self.gpu_tests(), self.micro(), self.sanitizers(),
                 self.profiler()]  # fmt: skip
        return [stage for stage in first
                if self.before.get(stage.name, {}).get("status") != "passed"]  # fmt: skip

    def _python(self, script: Path, *arguments: object) -> list[str]:
        return [sys.executable, str(script), *map(str, arguments)]

    def build(self) -> list[Stage]:
        """What has to be built here, for nothing that fits was brought along."""
        if self.device == "cpu":
            return []
        jobs = []
        if prebuilt.why_not():
            install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
            jobs.append(Job("module", [*install, "-e", "."],
                            {"LSTM_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}))  # fmt: skip
        native = HERE / "native" / "build.py"
        missing = not all((NATIVE / name).exists() for name in [*CHECKS, "micro"])
        if missing and native.exists():
            jobs.append(Job("native", self._python(native, "--out", NATIVE, "--jobs", 8)))
        return [Stage("build", 150, jobs, at_once=2)] if jobs else []

    def environment(self) -> Stage:
        """Versions, the card, and whether the module loads."""
        command = self._python(HERE / "environment.py", "--device", self.device)
        return Stage("environment", 15, [Job("environment", command, self.env, prints_lines=True)])

    def paths(self) -> Stage:
        """Every kernel path against float64."""
        arguments: list[object] = ["--device", self.device, "--seconds", "{seconds}"]
        if self.device == "cpu":
            arguments += ["--at-once", 2, "--patience", 20]
        else:  # all processes at the same time: most of it is their start
            arguments += ["--at-once", max(2, (os.cpu_count() or 1) * 3 // 4)]
        if self.again is not None:
            arguments += ["--again", self.again]
        command = self._python(HERE / "paths.py", *arguments)
        return Stage("kernel paths", 70, [Job("kernel paths", command, self.env, margin=2)])

    def _programs(self) -> str:
        """Why the programs without torch cannot run."""
        if any((NATIVE / name).exists() for name in [*CHECKS, "micro"]):
            return ""
        return NEEDS_GPU if self.device == "cpu" else "failed: build/gpu/native is empty"

    def native(self) -> Stage:
        """Check the kernels without torch, cooperative launches of tiny shapes among them."""
        jobs = [Job(name, [str(NATIVE / name)]) for name in CHECKS]
        return Stage("native checks", 15, jobs, at_once=2, absent=self._programs())

    def _pytest(self, *arguments: str, workers: int, timeout: int) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-p", "pytest_lines", "-p", "no:cacheprovider"]
        command += ["-v", *arguments]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(workers), "--dist", "load"]
        if importlib.util.find_spec("pytest_timeout"):
            command += [f"--timeout={timeout}", "--timeout-method=thread"]
        return command

    def _failed_before(self, stage: str) -> list[str]:
        """The tests that failed in the first call, if it reached all; else none."""
        before = self.before.get(stage, {})
        lines = [line for job in before.get("jobs", []) for line in job.get("lines", [])]
        latest = {line["test"]: line["status"] for line in lines if "test" in line}
        failed = [test for test, status in latest.items() if status not in ("passed", "skipped")]
        return failed if before.get("status") == "failed (1)" else []

    def gpu_tests(self) -> Stage:
        """tests/test_gpu.py, or of it what failed before."""
        names = self._failed_before("test_gpu.py") or ["tests/test_gpu.py"]
        env = {**self.env, "OMP_NUM_THREADS": "2"}
        workers = 4 if self.device == "cuda" else 1
        command = self._pytest(*names, workers=workers, timeout=35)
        return Stage("test_gpu.py", 40, [Job("test_gpu.py", command, env)])

    def benchmark(self, seconds: float) -> Stage:
        """Times, ours against torch's."""
        script = ROOT / "benchmarks" / "bench_cuda.py"
        arguments: list[object] = ["--device", self.device, "--out", self.out / "cuda.json"]
        arguments += ["--seconds", "{seconds}"]
        if self.device == "cpu":
            arguments += ["--quick"]
        command = self._python(script, *arguments)
        return Stage("benchmark", seconds, [Job("benchmark", command, self.env, margin=8)])

    def micro(self) -> Stage:
        """Times of the things that a faster design depends on."""
        job = Job("microbenchmarks", [str(NATIVE / "micro")], prints_lines=True)
        return Stage("microbenchmarks", 10, [job], absent=self._programs())

    def sanitizers(self) -> Stage:
        """Every tool of compute-sanitizer on the native checks, side by side."""
        tool = _tool("compute-sanitizer")
        absent = self._programs()
        if not absent and tool is None:
            absent = NEEDS_GPU if self.device == "cpu" else "failed: no compute-sanitizer"
        jobs = [
            Job(f"{name} {check}",
                [str(tool), "--tool", name, "--error-exitcode", "9", "--print-limit", "5",
                 str(NATIVE / check), "few"])
            for check in reversed(CHECKS) for name in SANITIZERS
            # racecheck knows nothing of bytes that other blocks send
            if (name, check) != ("racecheck", "check_layer_ways")
        ]  # fmt: skip
        return Stage("compute-sanitizer", 60, jobs, at_once=len(jobs), absent=absent)

    def profiler(self) -> Stage:
        """Ask ncu what three kernels wait for."""
        tool = _tool("ncu")
        absent = "" if tool else "failed: no ncu"
        if self.device == "cpu":
            absent = NEEDS_GPU
        command = [str(tool), "--clock-control", "none", "--csv", "--page", "details"]
        for section in ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats"):
            command += ["--section", section]
        command += ["--kernel-name", f"regex:{KERNELS}", "--launch-count", "3"]
        command += self._python(HERE / "profiled.py")
        return Stage("ncu", 20, [Job("ncu", command, self.env, keep=400)], absent=absent)

    def variants(self) -> Stage:
        """Variants of the layer's kernels, in turn."""
        script = HERE / "native" / "run_variants.py"
        absent = self._programs() if script.exists() else f"failed: no {script.name}"
        if self.device == "cpu":
            absent = NEEDS_GPU
        command = self._python(script, "--programs", NATIVE, "--out", self.out / "variants.json")
        command += ["--seconds", "{seconds}"]
        return Stage("variants", 60, [Job("variants", command, margin=5, keep=60)], absent=absent)

    def rest(self) -> Stage:
        """The other tests, the GPU's first."""
        ignored = [f"--ignore=tests/{name}.py" for name in [*WITHOUT_GPU, "test_gpu"]]
        names = self._failed_before("other tests") or ignored
        workers = 12
        if self.device == "cpu":
            names, workers = [f"tests/{name}.py" for name in CPU_TESTS], 2
        env = {**self.env, "OMP_NUM_THREADS": "2"}
        command = self._pytest(*names, workers=workers, timeout=60)
        return Stage("other tests", 600, [Job("other tests", command, env)])
