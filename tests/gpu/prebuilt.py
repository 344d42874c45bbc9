"""The module built elsewhere (build/gpu): what it was made from, whether it fits, where it goes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "gpu"
PACKAGE = "lstm_ext"


def sources_hash(root: Path = ROOT) -> str:
    """Hash the names and contents of all that the module is compiled from."""
    digest = hashlib.sha256()
    files = [path for path in (root / "csrc").rglob("*") if path.is_file()]
    for path in sorted([*files, root / "setup.py"]):
        digest.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def revision(root: Path = ROOT) -> str | None:
    """Name the commit, and whether files differ from it; None where there is no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def read_manifest(folder: Path = FOLDER) -> dict[str, Any] | None:
    """Return the manifest; None where there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return content


def this_python() -> dict[str, str | None]:
    """Versions of the running Python and its torch, which is not imported: that takes seconds."""
    found: dict[str, str | None] = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": None,
        "cuda": None,
    }
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return found
    version = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    if version.exists():
        text = version.read_text()
        for key, name in (("torch", "__version__"), ("cuda", "cuda")):
            match = re.search(rf"^{name}\b[^=]*=\s*'([^']+)'", text, re.MULTILINE)
            found[key] = match.group(1) if match else None
    return found


def why_not(folder: Path = FOLDER, root: Path = ROOT) -> str | None:
    """Say why the prebuilt module cannot be used by this Python; None if it can."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "there is no prebuilt module (make gpu-prebuild)"
    here = this_python()
    for key in ("python", "torch", "cuda"):
        if manifest.get(key) != here[key]:
            return f"the prebuilt module is for {key} {manifest.get(key)}, here is {here[key]}"
    if manifest.get("sources") != sources_hash(root):
        return "the prebuilt module was made from other sources"
    if not module_path(folder).exists():
        return f"{module_path(folder).name} is missing"
    return None


def module_path(folder: Path) -> Path:
    """Where the module for the running Python lies."""
    return folder / PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def place(folder: Path = FOLDER, root: Path = ROOT) -> None:
    """Copy the module, its note and the package's metadata to where Python looks for them."""
    for source in (module_path(folder), folder / PACKAGE / "_built_with.py"):
        # Under another name first: a module that is in use is not written over.
        beside = root / PACKAGE / f"{source.name}.new"
        shutil.copy2(source, beside)
        beside.replace(root / PACKAGE / source.name)
    shutil.copytree(
        folder / f"{PACKAGE}.egg-info", root / f"{PACKAGE}.egg-info", dirs_exist_ok=True
    )
