"""Everything that only a GPU can show, in one run of at most nine minutes: make gpu-check.

Builds the package for the GPU at hand, runs the tests, compute-sanitizer on small shapes, and the
benchmark; a short table comes last. Needs torch built for CUDA, nvcc, ninja and pytest, and no
network. The folder --out gets a log of each part, and the benchmark's cuda.json and cuda.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
# These run the kernels' sources without a GPU, and did so before.
WITHOUT_GPU = ["test_cuda_emu.py", "test_cuda_compile.py"]


@dataclass
class Part:
    """What was run, how it ended, and the last line it said."""

    name: str
    seconds: float
    status: str
    said: str

    @property
    def failed(self) -> bool:
        """Whether it ended in any way but well."""
        return self.status != "passed"


class Check:
    """Runs parts one after another, each in a time of its own, and keeps their logs."""

    def __init__(self, out: Path, device: str, seconds: float = 520) -> None:
        self.out = out
        self.device = device
        self.seconds = seconds
        self.parts: list[Part] = []
        self.begin = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.begin

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.seconds - self.elapsed()

    def run(
        self, name: str, command: list[str], limit: float, env: dict[str, str] | None = None
    ) -> Part:
        """Run a command with its output in a log; what outlasts its limit is cut off and failed."""
        print(f"{self.elapsed():5.0f} s  {name}", flush=True)
        log = self.out / f"{name.replace(' ', '_')}.log"
        begin = time.monotonic()
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False,
                    timeout=max(limit, 1), env={**os.environ, **(env or {})},
                ).returncode  # fmt: skip
                status = "passed" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                status = f"cut off after {limit:.0f} s"
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line]
        part = Part(name, time.monotonic() - begin, status, lines[-1] if lines else "")
        if part.failed:
            print("\n".join(lines[-40:]), flush=True)
        self.parts.append(part)
        return part

    def build(self) -> Part:
        """Install in place, for this GPU's architecture."""
        env = {"LSTM_EXT_CUDA": "1" if self.device == "cuda" else "0"}
        if self.device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            env["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        return self.run("build", [*command, "-e", "."], 270, env)

    def tests(self, which: str | None, limit: float) -> None:
        """Those with a GPU first; then the rest, as far as time allows."""
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        pytest += [f"--ignore=tests/{file}" for file in WITHOUT_GPU]
        if importlib.util.find_spec("xdist"):
            pytest += ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "worksteal"]
        env = {"OMP_NUM_THREADS": "2"}
        end = self.elapsed() + limit
        wanted = which or self.device
        self.run(f"tests with {wanted}", [*pytest, "-k", wanted], limit, env)
        if which is None:
            rest = [*pytest, "-k", f"not {wanted}"]
            self.run("other tests", rest, end - self.elapsed(), env)

    def sanitize(self, limit: float) -> None:
        """Run the operators at small shapes under compute-sanitizer, its tools side by side."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.device != "cuda" or not Path(tool).exists():
            self.parts.append(Part("compute-sanitizer", 0, "not run", "there is none"))
            return
        library = subprocess.run(
            [sys.executable, "-c", "import lstm_ext._C as c; print(c.__file__)"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        script = [sys.executable, str(ROOT / "tests" / "cuda_emu" / "check_ops.py")]

        def one(name: str) -> None:
            command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "5"]
            # Those that know each kernel by itself leave out the libraries' own.
            if name in ("racecheck", "synccheck"):
                command += ["--kernel-name", "kernel_substring=lstm_ext"]
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that strays leave their allocation
            self.run(name, [*command, *script, library, "cuda"], limit, env)

        with ThreadPoolExecutor(len(SANITIZERS)) as pool:
            list(pool.map(one, SANITIZERS))

    def benchmark(self, limit: float, quick: bool) -> str:
        """Run benchmarks/bench_cuda.py, draw its chart, and return its summary."""
        results = self.out / "cuda.json"
        script = [sys.executable, str(ROOT / "benchmarks" / "bench_cuda.py")]
        # A case more may begin just before the time is over.
        script += ["--device", self.device, "--seconds", str(max(10.0, limit - 30))]
        script += ["--out", str(results), *(["--quick"] if quick else [])]
        self.run("benchmark", script, limit)
        if not results.exists():
            return "no results"
        report = [
            sys.executable,
            str(ROOT / "benchmarks" / "report.py"),
            str(results),
            "--png",
            "--short",
        ]
        done = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout


def main() -> int:
    """Run all parts; exit status 0 if all passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--seconds", type=float, default=520, help="for all parts together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="cpu tries this script itself")  # fmt: skip
    parser.add_argument("-k", dest="which", default=None, help="only tests of such names")
    parser.add_argument("--quick", action="store_true", help="the benchmark's smallest shapes only")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    print(f"on {name}, torch {torch.__version__}")

    check = Check(options.out, options.device, options.seconds)
    table = ""
    if not check.build().failed:
        check.tests(options.which, 0.45 * check.left())
        check.sanitize(0.4 * check.left())
        table = check.benchmark(check.left(), options.quick)
    print(f"\n{table}\non {name}, torch {torch.__version__}, {check.elapsed():.0f} s\n")
    for part in check.parts:
        print(f"{part.name:24} {part.seconds:5.0f} s  {part.status:20} {part.said[:100]}")
    return int(any(part.failed for part in check.parts))


if __name__ == "__main__":
    sys.exit(main())
