"""``python -m lstm_ext doctor``: is this installation right, and if not, what is to be done?

Each check gives a :class:`Finding`. Nothing is imported at the top that could be what is broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

OK, NOTE, WRONG = "ok", "note", "wrong"

# Switches that change what runs, by the start of their names.
_SWITCHES = (
    "LSTM_EXT_", "ATEN_CPU_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES", "PYTORCH_NO_CUDA",
)  # fmt: skip
_OURS = ("LSTM_EXT_CUDA", "LSTM_EXT_VERBOSE")
# Beside torch's own; what is slower than the first is no noise.
_MUCH_SLOWER = 0.5
_SLOWER = 0.9
_ROUNDS = 9
# A load of so many times the processors makes timings doubtful.
_BUSY = 0.8
# A float32 result may be so many times as far from float64 as torch's own is.
_AS_FAR = 8.0
_ROUNDING = 1e-6


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        name: of the check.
        status: "ok"; "note": it works, and you may want to know; "wrong".
        says: what was found.
        do: what to do about it, or "".
    """

    name: str
    status: str
    says: str
    do: str = ""


def exit_if_asked(error: ImportError) -> None:
    """End the process with the doctor's answer, where the package does not load and it was asked.

    Args:
        error: what importing the package raised.
    """
    called = sys.argv[0] if sys.argv else ""
    if "doctor" in sys.argv[1:2] and (called == "-m" or Path(called).name == "lstm_ext"):
        found = report(without_package(error), {})
        if "--json" in sys.argv[2:]:
            print(json.dumps(found, indent=1))
        else:
            show(found)
        sys.exit(1)


def without_package(error: ImportError) -> list[Finding]:
    """Look at what there is to see when the package does not load."""
    return [python(), torch_alone(), broken_import(error), compiler(), switches()]


def run() -> tuple[list[Finding], dict[str, Any]]:
    """Make every check.

    Returns:
        The findings; and ``build``, what was built, ``speed``, the rows of :func:`timings`.
    """
    from lstm_ext import build_info

    findings = [python(), versions(), instruction_sets(), threads(), switches(), gpu()]
    findings += [numbers(device) for device in _devices()]
    rows = timings()
    findings.append(speed(rows))
    # Last: a runtime of OpenMP is loaded when something first needs it.
    findings.append(openmp())
    return findings, {"build": build_info(), "speed": rows}


def report(findings: list[Finding], more: dict[str, Any]) -> dict[str, Any]:
    """Put findings into the form that --json prints: ``fine`` and ``checks``, and more."""
    fine = all(finding.status != WRONG for finding in findings)
    return {"fine": fine, "checks": [finding._asdict() for finding in findings], **more}


def show(found: dict[str, Any]) -> None:
    """Print a report for people."""
    for check in found["checks"]:
        status = check["status"].upper() if check["status"] == WRONG else check["status"]
        print(f"{status:6} {check['name']:17} {check['says']}")
        if check["do"]:
            print(f"{'':24} -> {check['do']}")
    wrong = [check["name"] for check in found["checks"] if check["status"] == WRONG]
    print(f"\nWrong: {', '.join(wrong)}." if wrong else "\nNothing is wrong.")


def python() -> Finding:
    """Which Python, and that it has a GIL."""
    says = f"{platform.python_version()} ({sys.executable}), {platform.platform()}"
    if "t" in getattr(sys, "abiflags", ""):
        return Finding("python", WRONG, f"{says}, free-threaded", "use the ordinary Python")
    return Finding("python", OK, says)


def torch_alone() -> Finding:
    """Whether torch itself can be imported."""
    try:
        import torch
    except Exception as error:
        return Finding(
            "torch", WRONG, f"does not load: {_first_line(error)}", "pip install 'torch>=2.11'"
        )
    return Finding("torch", OK, f"{torch.__version__} ({Path(torch.__file__).parent})")


def broken_import(error: ImportError) -> Finding:
    """Why the package does not load, in the words of its own error."""
    package = Path(__file__).parent.parent
    says, do = _first_line(error), ""
    if "; torch " in says:
        says, _, rest = says.partition("; ")
        do = rest.partition("; ")[2]
    if not any(package.glob("_C.*so")) and (package.parent / "setup.py").exists():
        says += f". {package.parent} is a checkout that was not built, and Python looks there first"
        do = f"build it there, or start Python in another folder; {do}"
    elif "LSTM_EXT_CUDA" in says:
        do = "unset LSTM_EXT_CUDA, or set it to auto, fused or torch"
    return Finding("lstm_ext", WRONG, f"{says} ({package})", do)


def compiler() -> Finding:
    """Whether the package could be built here: only of interest where it must be."""
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name.split()[-1])
    if path is None:
        return Finding(
            "compiler", NOTE, f"no C++ compiler ({name})",
            "install a wheel; or, to build, a compiler first (Debian: apt install g++)",
        )  # fmt: skip
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    first = (said.stdout.splitlines() or ["says nothing of its version"])[0]
    return Finding("compiler", OK, f"{first} ({path}), should a build be needed")


def versions() -> Finding:
    """Which lstm_ext was built against which torch, and which are here."""
    import torch

    import lstm_ext

    info = lstm_ext.build_info()
    says = f"{info['version']}, built against torch {info['torch']}, torch {torch.__version__} runs"
    distributions = {
        str(d.locate_file("")) for d in metadata.distributions() if d.metadata["Name"] == "lstm_ext"
    }
    if len(distributions) > 1:
        places, used = ", ".join(sorted(distributions)), Path(lstm_ext.__file__).parent
        return Finding(
            "lstm_ext", NOTE, f"{says}; installed more than once ({places}), in use: {used}",
            "pip uninstall lstm_ext until none is left, and install it once",
        )  # fmt: skip
    if str(info["torch"]).split("+")[0] != str(torch.__version__).split("+")[0]:
        return Finding("lstm_ext", NOTE, f"{says}: another patch of the same release, which fits")
    return Finding("lstm_ext", OK, says)


def instruction_sets() -> Finding:
    """Which kernels of the CPU run, and whether something keeps better ones from it."""
    import torch

    from lstm_ext import build_info

    info = build_info()
    used, compiled = str(info["cpu_instruction_set"]), str(info["cpu_instruction_sets"])
    says = f"uses {used}, of {compiled}; torch sees {torch.backends.cpu.get_cpu_capability()}"
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    if asked is not None:
        return Finding(
            "instruction sets", NOTE, f"{says}, because ATEN_CPU_CAPABILITY={asked} says so",
            "unset ATEN_CPU_CAPABILITY for the fastest that this machine has",
        )  # fmt: skip
    if used == "DEFAULT" and "AVX2" in compiled and "avx2" in _processor_flags():
        return Finding(
            "instruction sets", WRONG, f"{says}; yet the processor has AVX2",
            "report this, with the output of: python -m lstm_ext info --json",
        )  # fmt: skip
    return Finding("instruction sets", OK, says)


def threads() -> Finding:
    """How many threads torch uses, and for how many there is room."""
    import torch

    count, room = torch.get_num_threads(), processors()
    says = f"{count} for {room} processor(s)"
    if count > room:
        return Finding(
            "threads", NOTE, f"{says}: they wait for each other",
            f"OMP_NUM_THREADS={max(1, int(room))}, or torch.set_num_threads",
        )  # fmt: skip
    return Finding("threads", OK, says)


def processors() -> float:
    """Count the processors that this process may use, a container's quota included."""
    if hasattr(os, "sched_getaffinity"):
        room = float(len(os.sched_getaffinity(0)))
    else:
        room = float(os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        room = min(room, float(quota) / float(period))  # "max" is no number: no quota
    return round(room, 2)


def openmp_runtimes() -> list[str]:
    """Name the OpenMP runtimes that this process has loaded; empty where that cannot be seen."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[5:]
            if path and re.match(r"lib(g|i)?omp[0-9]?[-.]", Path(path[0]).name):
                found.add(os.path.realpath(path[0]))
    return sorted(found)


def openmp() -> Finding:
    """That the module was built with OpenMP, and that the process has one runtime of it."""
    from lstm_ext import build_info

    if not build_info()["openmp"] and sys.platform.startswith("linux"):
        return Finding(
            "openmp", WRONG, "built without OpenMP: everything runs on one thread",
            "build again, with a compiler that knows -fopenmp",
        )  # fmt: skip
    found = openmp_runtimes()
    if len(found) > 1:
        return Finding(
            "openmp", WRONG,
            f"{len(found)} runtimes in one process, each with threads of its own that wait on the "
            f"same processors: {', '.join(found)}",
            "find who brings the second: LD_PRELOAD, or a package of another source (conda beside "
            "pip) that is imported at start",
        )  # fmt: skip
    return Finding("openmp", OK, f"one runtime: {found[0]}" if found else "no runtime seen")


def switches() -> Finding:
    """What the environment sets, and that its names and values are known."""
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_SWITCHES)}
    says = ", ".join(f"{name}={value}" for name, value in found.items()) or "none"
    unknown = [name for name in found if name.startswith("LSTM_EXT_") and name not in _OURS]
    if unknown:
        return Finding(
            "switches", NOTE, f"{says}; nothing reads {', '.join(unknown)}",
            f"of ours there are {', '.join(_OURS)}",
        )  # fmt: skip
    return Finding("switches", OK, says)


def gpu() -> Finding:
    """Whether there is a GPU, and whether this build has kernels for it."""
    import torch

    from lstm_ext import build_info

    ours = build_info()["cuda"]
    built = f"built for CUDA {ours}" if ours else "built for the CPU only"
    if not torch.cuda.is_available():
        return Finding("gpu", OK, f"none that torch can use; {built}")
    says = f"{torch.cuda.get_device_name()}, torch has CUDA {torch.version.cuda}; {built}"
    if not ours:
        return Finding(
            "gpu", NOTE, f"{says}: on it, torch's own kernels run",
            "for ours, build where the CUDA toolkit is: LSTM_EXT_CUDA=1 pip install "
            "--no-build-isolation --no-deps --force-reinstall lstm_ext",
        )  # fmt: skip
    if ours != torch.version.cuda:
        return Finding(
            "gpu", WRONG, says, "build again, with the CUDA toolkit of torch's own version"
        )
    return Finding("gpu", OK, says)


def numbers(device: str = "cpu") -> Finding:
    """Cell, layer, packed input and their gradients in float32, beside nn's in float64."""
    name = "numbers" if device == "cpu" else f"numbers, {device}"
    far = []
    for what, error, allowed in _errors(device):
        if not error <= allowed:  # NaN is not
            far.append(f"{what} is off by {error:.1e} (at most {allowed:.1e})")
    if far:
        return Finding(
            name, WRONG, "; ".join(far),
            "do not use it; report this, with the output of: python -m lstm_ext info --json",
        )  # fmt: skip
    return Finding(name, OK, "cell, layer, packed input and gradients are nn.LSTM's in float64")


def _errors(device: str) -> Iterator[tuple[str, float, float]]:
    """Largest relative errors in float32, ours and what is allowed."""
    import torch
    from torch import nn

    import lstm_ext

    L, N, I, H = 11, 5, 13, 19
    lengths = [11, 9, 4, 4, 1]
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(L, N, I, dtype=torch.float64)
        pairs = [
            (nn.LSTMCell(I, H, dtype=torch.float64), lstm_ext.LSTMCell(I, H)),
            (nn.LSTM(I, H, dtype=torch.float64, **options), lstm_ext.LSTM(I, H, **options)),
        ]

    def results(module: nn.Module, given: Any, dtype: torch.dtype) -> list[Any]:
        given = given.to(device, dtype).requires_grad_()
        found = []
        if isinstance(module, nn.LSTMCell):
            h, c = module(given[0])
            h, c = module(given[1], (h, c))
            found += [h, c]
        else:
            padded, states = module(given)
            packed, ends = module(nn.utils.rnn.pack_padded_sequence(given, lengths))
            found += [padded, *states, packed.data, *ends]
        loss = torch.stack([f.square().sum() for f in found]).sum()
        gradients = torch.autograd.grad(loss, [given, *module.parameters()])
        return [f.detach().cpu().double() for f in (*found, *gradients)]

    for plain, mine in pairs:
        is_cell = isinstance(plain, nn.LSTMCell)
        what = "the cell" if is_cell else "the layer"
        mine.load_state_dict(plain.state_dict())
        exact = results(plain.to(device), x, torch.float64)
        got = results(mine.to(device), x, torch.float32)
        single = results(plain.to(device, torch.float32), x, torch.float32)
        states = 2 if is_cell else 6
        for k, (right, theirs, found) in enumerate(zip(exact, single, got, strict=True)):
            scale = float(right.abs().max())
            error, torchs = (float((r - right).abs().max()) / scale for r in (found, theirs))
            part = what if is_cell or k < 3 else "packed input"
            yield (
                part if k < states else f"a gradient of {what}",
                error,
                max(_AS_FAR * torchs, _ROUNDING),
            )


def timings() -> list[dict[str, Any]]:
    """Time a cell and a layer beside torch's own, on one thread; microseconds a call.

    The best of several rounds in turn: what other work on the machine disturbs, it makes slower.

    Returns:
        A dict a row: module, mode, shape, ours, torchs, and ratio, torch's time over ours.
    """
    import torch
    from torch import nn

    import lstm_ext

    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shape, kinds, calls in (
            ((16, 128, 128), (lstm_ext.LSTMCell, nn.LSTMCell), 20),
            ((50, 16, 128, 128), (lstm_ext.LSTM, nn.LSTM), 1),
        ):
            *ahead, I, H = shape
            x = torch.zeros(*ahead, I)
            modules = [kind(I, H) for kind in kinds]
            for mode in ("inference", "training step"):
                training = mode == "training step"
                best = [float("inf")] * 2
                with torch.set_grad_enabled(training):
                    for _ in range(_ROUNDS):
                        for k, module in enumerate(modules):
                            start = time.perf_counter()
                            for _ in range(calls):
                                out = module(x)[0]
                                if training:
                                    out.sum().backward()
                            best[k] = min(best[k], (time.perf_counter() - start) / calls * 1e6)
                rows.append(
                    {
                        "module": kinds[1].__name__,
                        "mode": mode,
                        "shape": list(shape),
                        "ours": best[0],
                        "torchs": best[1],
                        "ratio": best[1] / best[0],
                    }
                )
    finally:
        torch.set_num_threads(before)
    return rows


def busy() -> str:
    """Say how busy the machine is, if that makes timings doubtful; else ""."""
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
        if load > _BUSY * processors():
            return f"the machine is busy (load {load:.1f}), so that says little"
    return ""


def speed(rows: list[dict[str, Any]]) -> Finding:
    """Judge timings: a build that is far too slow shows, unless the machine is busy."""
    slowest = min(rows, key=lambda row: float(row["ratio"]))
    says = "; ".join(f"{row['module']} {row['mode']} {row['ratio']:.2f}" for row in rows)
    says = f"times as fast as torch.nn's, on one thread: {says}"
    if slowest["ratio"] >= _SLOWER:
        return Finding("speed", OK, says)
    says += (
        f". {slowest['module']}, {slowest['mode']}: {slowest['ours']:.0f} microseconds, "
        f"torch's own {slowest['torchs']:.0f}"
    )
    disturbed = busy()
    if disturbed or slowest["ratio"] >= _MUCH_SLOWER:
        says += f"; {disturbed}" if disturbed else ""
        return Finding("speed", NOTE, says, "try again with nothing else running on the machine")
    return Finding(
        "speed", WRONG, says,
        "look at instruction sets and switches here; if these are right, report it",
    )  # fmt: skip


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _processor_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
