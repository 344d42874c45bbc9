"""Build for the GPU machine on one without a GPU: make gpu-prebuild.

    python tests/gpu/prebuild.py [--venv .venv-gpu] [--python python3.12]

Makes build/gpu: the module for Python 3.12 and torch 2.11.0+cu130, the programs without torch
(tests/gpu/native), and manifest.json, by which tests/gpu/check.py decides whether they fit. Carry
the folder to the GPU machine with the checkout. The environment, 5 GB, is made if it is not there.
Exit status 1 if the programs did not build; the module is there all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import prebuilt
from prebuilt import FOLDER, PACKAGE, ROOT

PYTHON, TORCH, CUDA, ARCHITECTURE = "3.12", "2.11.0+cu130", "13.0", "9.0"
NEEDED = ["torch==2.11.0", "setuptools", "wheel", "ninja", "packaging", "numpy"]
MOST_MIB = 40
SELF_CHECK = """
import json, sys
import torch
import lstm_ext
torch.manual_seed(0)
theirs, ours = torch.nn.LSTM(5, 7), lstm_ext.LSTM(5, 7)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(4, 3, 5)
torch.testing.assert_close(ours(x)[0], theirs(x)[0])
ours(x)[0].sum().backward()
print(json.dumps({**lstm_ext.build_info(), "file": lstm_ext._ops._C.__file__}))
"""


def versions(python: Path) -> dict[str, Any] | None:
    """Ask an environment for its versions; None if it cannot answer."""
    ask = "import json, prebuilt; print(json.dumps(prebuilt.this_python()))"
    try:
        done = subprocess.run(
            [python, "-c", ask], capture_output=True, text=True, check=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return answer


def environment(venv: Path, base: str) -> Path:
    """Return the Python of an environment that has what is needed, which is made if need be."""
    python = (venv / "bin" / "python").absolute()
    wanted = {"python": PYTHON, "torch": TORCH, "cuda": CUDA}
    if versions(python) != wanted:
        if not python.exists():
            subprocess.run([base, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", *NEEDED], check=True)
    found = versions(python)
    if found != wanted:
        raise SystemExit(f"{venv} has {found}, wanted is {wanted}")
    return python


def compile_module(python: Path, folder: Path) -> None:
    """Compile what has changed, for one architecture, and strip the result."""
    env = {**os.environ, "LSTM_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    env.setdefault("MAX_JOBS", "2")
    for variable in ("PYTHONPATH", "VIRTUAL_ENV"):
        env.pop(variable, None)
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"  # ninja
    setup = [str(python), "setup.py", "-q"]
    subprocess.run([*setup, "build_ext", "--build-lib", str(folder)], cwd=ROOT, env=env, check=True)
    subprocess.run([*setup, "egg_info", "--egg-base", str(folder)], cwd=ROOT, env=env, check=True)
    for module in (folder / PACKAGE).glob("_C.*.so"):
        subprocess.run(["strip", "--strip-unneeded", str(module)], check=True)


def check_module(python: Path, folder: Path) -> dict[str, Any]:
    """Load the module with the package's Python files, away from the checkout, and compute."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / PACKAGE
        built = shutil.ignore_patterns("_C*", "_built_with.py", "__pycache__")
        shutil.copytree(ROOT / PACKAGE, package, ignore=built)
        shutil.copytree(folder / PACKAGE, package, dirs_exist_ok=True)
        egg_info = f"{PACKAGE}.egg-info"
        shutil.copytree(folder / egg_info, Path(scratch) / egg_info)
        done = subprocess.run(
            [python, "-c", SELF_CHECK], cwd=scratch, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": scratch},
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"the module does not work:\n{done.stdout}{done.stderr}")
        info: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if info["cuda"] != CUDA or not info["file"].startswith(scratch):
            raise SystemExit(f"another module was loaded: {info}")
    return info


def build_native(folder: Path) -> str:
    """Build the programs without torch, where they are; say how that went."""
    script = Path(__file__).parent / "native" / "build.py"
    if not script.exists():
        return "none"
    command = [sys.executable, str(script), "--out", str(folder / "native")]
    done = subprocess.run(command, cwd=ROOT, check=False)
    return "built" if done.returncode == 0 else f"failed ({done.returncode})"


def size_mib(folder: Path) -> float:
    """Add up the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> int:
    """Build all there is to build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-gpu")
    parser.add_argument("--python", default=f"python{PYTHON}", help="to make the environment with")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    folder = options.out.absolute()
    python = environment(options.venv, options.python)
    sources = prebuilt.sources_hash()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # of what is no longer there
    compile_module(python, folder)
    info = check_module(python, folder)
    manifest = {
        "python": PYTHON,
        "torch": TORCH,
        "cuda": CUDA,
        "arch": ARCHITECTURE,
        "compiler": info["compiler"],
        "sources": sources,
        "revision": prebuilt.revision() or "unknown",
        "native": "not yet built",
    }
    if sources != prebuilt.sources_hash():
        raise SystemExit("the sources changed while they were compiled; once more, please")

    def write() -> None:
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")

    write()
    manifest["native"] = build_native(folder)
    write()
    size = size_mib(folder)
    print(f"{folder}: {size:.1f} MiB, revision {manifest['revision']}, "
          f"native programs: {manifest['native']}")  # fmt: skip
    if size > MOST_MIB:
        raise SystemExit(f"more than {MOST_MIB} MiB: too much to carry")
    return int(manifest["native"].startswith("failed"))


if __name__ == "__main__":
    sys.exit(main())
