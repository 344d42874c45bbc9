"""What this machine has, in JSON lines: the first stage of check.py. Each is lost by itself."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

TOOLS = ["nvcc", "ncu", "compute-sanitizer", "cuobjdump", "ninja", "g++"]
PACKAGES = ["torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis"]


def nvidia_smi() -> dict[str, Any]:
    """Ask the driver."""
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(fields.split(","), values, strict=True))


def machine() -> dict[str, Any]:
    """Describe the computer, its tools and packages."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "packages": packages,
    }


def torchs_gpu() -> dict[str, Any]:
    """Describe the GPU as torch sees it, and use it."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    torch.ones(3, device="cuda").sum().item()
    found = torch.cuda.get_device_properties(0)
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
    }


def module(device: str) -> dict[str, Any]:
    """Load the module and compute with it."""
    import torch

    import lstm_ext

    x = torch.randn(4, 3, 5, device=device)
    ours, theirs = lstm_ext.LSTM(5, 7).to(device), torch.nn.LSTM(5, 7).to(device)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-3, atol=1e-3)
    cell = lstm_ext.LSTMCell(5, 7).to(device)
    h, _ = cell(x[0])
    assert h.isfinite().all()
    return {"file": lstm_ext._ops._C.__file__, **lstm_ext.build_info()}


def main() -> int:
    """Say all; exit status 0 if all could be said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    parts: dict[str, Callable[[], dict[str, Any]]] = {"machine": machine}
    if device == "cuda":
        parts |= {"nvidia-smi": nvidia_smi, "gpu": torchs_gpu}
    parts["module"] = lambda: module(device)
    failed = False
    for name, ask in parts.items():
        try:
            answer = ask()
        except Exception as error:
            failed = True
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps({"part": name, **answer}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
