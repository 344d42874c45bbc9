"""Everything that only a GPU can show, in six minutes at most: make gpu-check.

    python tests/gpu/check.py --out DIR                        the whole plan
    python tests/gpu/check.py --out DIR --again RESULTS.json   what failed, and variants of kernels
    python tests/gpu/check.py --only "kernel paths" ncu        some stages
    python tests/gpu/check.py --device cpu                     what can be tried without a GPU
    python tests/gpu/check.py --dry-run                        stages that go wrong, on no device
    python tests/gpu/check.py --commit-results DIR             into benchmarks/results

Nothing here imports torch. What comes of it, at most eight files in DIR: results.json, written at
every moment; cuda.json, the benchmark's rows; logs.tar.gz; table.txt, which is printed last. See
docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import fakes
import prebuilt
import process
import table
from prebuilt import ROOT
from runner import NEEDS_GPU, Runner, Stage, say
from stages import Stages

SECONDS = 360
RESULTS = ROOT / "benchmarks" / "results"
FILES = {"benchmark": "cuda.json", "variants": "variants.json"}


def commit_results(folder: Path) -> None:
    """Copy a run's results to where they are kept, named after the card."""
    results = json.loads((folder / "results.json").read_text())
    card = results.get("card")
    if not card:
        raise SystemExit(f"{folder}/results.json names no card: nothing ran on a GPU")
    name = re.sub(r"[^a-z0-9]+", "_", card.lower().removeprefix("nvidia ")).strip("_")
    for source, target in (
        ("cuda.json", f"cuda_{name}.json"),
        ("table.txt", f"gpu_check_{name}.txt"),
        ("variants.json", f"cuda_{name}_variants.json"),
    ):
        if (folder / source).exists():
            shutil.copyfile(folder / source, RESULTS / target)
            print(RESULTS / target)


def place_module(device: str, root: Path = ROOT) -> str:
    """Put the prebuilt module in place if it fits; say which module is used."""
    if device == "cpu" and prebuilt.module_path(root).exists():
        return "as installed"
    reason = prebuilt.why_not(root=root)
    if reason:
        say(f"no prebuilt module: {reason}")
        return f"built here: {reason}" if device == "cuda" else reason
    try:
        prebuilt.place(root=root)
    except OSError as error:
        return f"not placed: {error}"
    return "prebuilt"


def card_of(results: dict[str, Any]) -> str | None:
    """Name the GPU that torch or the driver saw."""
    for stage in results["stages"]:
        for line in table.json_lines(stage):
            name = line.get("gpu") if line.get("part") == "gpu" else line.get("name")
            if line.get("part") in ("gpu", "nvidia-smi") and name:
                return str(name)
    return None


def choose(plan: list[Stage], only: list[str], skip: list[str]) -> list[Stage]:
    """Keep the stages that are asked for."""
    known = [stage.name for stage in plan]
    for name in (*only, *skip):
        if name not in known:
            raise SystemExit(f"there is no stage {name!r} here: {', '.join(known)}")
    return [s for s in plan if (not only or s.name in only) and s.name not in skip]


def failed(results: dict[str, Any]) -> bool:
    """Whether anything did not pass; on the CPU a stage may need a GPU."""
    allowed = ("passed", NEEDS_GPU) if results["device"] == "cpu" else ("passed",)
    statuses = [stage["status"] for stage in results["stages"]]
    return results["status"] != "complete" or any(s not in allowed for s in statuses)


def main() -> int:
    """Run the plan; exit status 0 if all of it passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--seconds", type=float, help="for all stages together: 360, or without a "
                        "GPU as long as it takes")  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--again", type=Path, help="results.json of an earlier run")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE")
    parser.add_argument("--dry-run", action="store_true", help="stages that go wrong")
    parser.add_argument("--seconds-each", type=float, default=1, help="for those that never end")
    parser.add_argument("--commit-results", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.commit_results:
        commit_results(options.commit_results)
        return 0
    if options.seconds is None:
        options.seconds = SECONDS if options.device == "cuda" or options.dry_run else 7200
    # Read before anything is written: it may lie in the same folder.
    again = None
    out = options.out.absolute()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        if options.again:
            again = Path(folder) / "before.json"
            shutil.copy(options.again, again)
        manifest = prebuilt.read_manifest() or {}
        module = "none" if options.dry_run else place_module(options.device)
        # Where the checkout was carried to, a repository may know less than the manifest.
        known = manifest.get("revision") if module == "prebuilt" else None
        head = {
            "device": "none" if options.dry_run else options.device,
            "call": 2 if again else 1,
            "revision": known or prebuilt.revision() or "unknown",
            "checkout": prebuilt.revision(),
            "module": module,
        }
        for name in ("results.json", "cuda.json", "table.txt", "logs.tar.gz", "variants.json"):
            (out / name).unlink(missing_ok=True)  # of an earlier run
        grace = 0.5 if options.dry_run else process.GRACE_SECONDS
        runner = Runner(out, Path(folder) / "work", ROOT, options.seconds, head, grace)
        try:
            if options.dry_run:
                plan = fakes.stages(options.seconds_each)
            else:
                plan = Stages(options.device, out, again).plan()
            runner.run(choose(plan, options.only, options.skip))
        finally:
            report(runner)
    return int(failed(runner.results))


def report(runner: Runner) -> None:
    """Write the table, and print it last."""
    results = runner.results
    results["card"] = card_of(results)
    for stage in results["stages"]:
        if stage["name"] in FILES:
            stage["file"] = str(runner.out / FILES[stage["name"]])
    runner.write()
    text = table.make(results)
    runner.replace("table.txt", text.encode())
    say(f"\n{text.rstrip()}")


if __name__ == "__main__":
    sys.exit(main())
