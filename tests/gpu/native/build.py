"""Compiles the torch-free GPU programs of this folder with nvcc; no GPU is needed for that.

python tests/gpu/native/build.py --out build/gpu/native

check_*                   the kernels against double precision (tests/cuda_emu/check_*.cpp)
micro                     microbenchmarks of what a faster design depends on
bench_layer-VARIANT       times of the layer's kernels, one program a variant

Static runtime: the programs need a driver and nothing else. What has not changed is not compiled
again. The exit status is 0 if all asked for are there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
CHECKS = ROOT / "tests" / "cuda_emu"
INCLUDES = [CSRC, HERE, CHECKS]
# Parts of the layer's kernels that can be turned off (1 unless defined as 0).
SWITCHES = [
    "LOADS_FIRST", "STAGE_NEXT", "PUBLISH_FIRST", "SKIP_LAST_MEETING", "WIDE_FILL", "SMALL_TILES",
    "SPREAD_BACKWARD", "REGISTER_WAYS",
]  # fmt: skip
# Measured, and settled (docs/gpu.md): no program of their own, for its size.
SETTLED = ("PUBLISH_FIRST", "SKIP_LAST_MEETING", "SMALL_TILES")
ALL_ON = "all_on"
# Kernels as torch compiles extensions; the programs themselves use the half types' conversions.
FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings"]
KERNEL_FLAGS = [
    f"-D__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]


def variants() -> dict[str, dict[str, int]]:
    """Return the switches that each variant sets: none, each by itself, all."""
    alone = {f"no_{switch.lower()}": {switch: 0} for switch in SWITCHES if switch not in SETTLED}
    all_off = dict.fromkeys(SWITCHES, 0)
    return {ALL_ON: {}, **alone, "all_off": all_off}


@dataclass
class Program:
    """An executable: its sources, and what each of them is compiled with."""

    name: str
    sources: list[Path]
    macros: list[str] = field(default_factory=list)
    lines: bool = False  # whether sanitizers are to name the kernels' lines


def programs() -> dict[str, Program]:
    """Return all programs by name."""
    cell = sorted((CSRC / "cuda").glob("cell_*.cu"))
    layer = sorted((CSRC / "cuda").glob("layer_*.cu"))
    recurrence = sorted((CSRC / "cuda").glob("recurrence_*.cu"))
    copy = CSRC / "cuda" / "copy_numbers.cu"
    found = [
        Program("check_cell", [CHECKS / "check_cell.cpp", *cell], lines=True),
        Program("check_layer", [CHECKS / "check_layer.cpp", *layer, copy], lines=True),
        Program("check_layer_ways", [CHECKS / "check_layer_ways.cpp", *layer], lines=True),
        Program("check_recurrence", [CHECKS / "check_recurrence.cpp", *recurrence], lines=True),
        Program("micro", [HERE / "micro.cu"]),
    ]
    for variant, switches in variants().items():
        macros = [f"LSTM_EXT_{switch}={value}" for switch, value in switches.items()]
        macros.append(f'VARIANT="{variant}"')
        sources = [HERE / "bench_layer.cu", HERE / "variant.cpp", *layer]
        found.append(Program(f"bench_layer-{variant}", sources, macros))
    return {program.name: program for program in found}


def texts(source: Path, seen: dict[Path, str]) -> dict[Path, str]:
    """Return the text of a source and of all its own headers, by path."""
    if source in seen:
        return seen
    seen[source] = source.read_text()
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[source], re.MULTILINE):
        for folder in (source.parent, *INCLUDES):
            if (folder / name).is_file():
                texts((folder / name).resolve(), seen)
                break
    return seen


class Builder:
    """Compiles each source once for all programs that want it with the same macros."""

    def __init__(self, out: Path, arch: str, jobs: int, log=print) -> None:
        self.out = out
        self.arch = arch
        self.log = log
        self.objects = out / "objects"
        self.pool = ThreadPoolExecutor(jobs)

    def command(self, source: Path, program: Program) -> list[str]:
        """Return how a source is compiled, but for its output."""
        flags = list(FLAGS)
        if source.suffix == ".cu":
            # The `a` of 90a: instructions of this architecture alone, which micro.cu measures.
            arch = f"{self.arch}a" if source.parent == HERE and self.arch == "90" else self.arch
            flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "--compress-mode=size"]
            flags += KERNEL_FLAGS if source.parent != HERE else []
            flags += ["-lineinfo"] if program.lines else []
        flags += [f"-I{folder}" for folder in INCLUDES]
        # Those that the source knows nothing of would only have it compiled again.
        every = "".join(texts(source, {}).values())
        used = [
            macro for macro in program.macros if re.search(rf"\b{macro.split('=')[0]}\b", every)
        ]
        return ["nvcc", *flags, *(f"-D{macro}" for macro in used), "-c", str(source)]

    def compile(self, source: Path, program: Program) -> Path:
        """Return the object file of a source, made anew only if something in it has changed."""
        command = self.command(source, program)
        key = hashlib.sha256("\0".join(command).encode())
        for path, text in sorted(texts(source, {}).items()):
            key.update(f"{path.name}\0{text}\0".encode())
        target = self.objects / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            self.run([*command, "-o", str(target)], target)
        return target

    def run(self, command: list[str], target: Path) -> None:
        """Run a compiler, whose output appears when it is whole."""
        self.log(f"{Path(command[-3]).name} -> {target.name}")
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        command = [*command[:-1], str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
        partial.replace(target)

    def link(self, program: Program, objects: list[Path]) -> Path:
        """Return the program, linked anew only if one of its objects has changed."""
        names = "\n".join(path.name for path in objects)
        target = self.out / program.name
        stamp = self.objects / f"{program.name}.linked"
        if target.exists() and stamp.exists() and stamp.read_text() == names:
            return target
        # Not libstdc++: the static one asks for a newer libc than the shared one does.
        command = ["nvcc", "-cudart", "static", "-Xlinker", "-s", *map(str, objects)]
        self.run([*command, "-o", str(target)], target)
        stamp.write_text(names)
        return target

    def build(self, wanted: list[Program]) -> dict[str, str]:
        """Build the programs; return what went wrong, by name."""
        self.objects.mkdir(parents=True, exist_ok=True)
        units: dict[tuple[str, ...], tuple[Path, Program]] = {}
        for program in wanted:
            for source in program.sources:
                units.setdefault(tuple(self.command(source, program)), (source, program))
        made = {key: self.pool.submit(self.compile, *unit) for key, unit in units.items()}
        wrong: dict[str, str] = {}
        for program in wanted:
            keys = [tuple(self.command(source, program)) for source in program.sources]
            try:
                self.link(program, [made[key].result() for key in keys])
            except (RuntimeError, OSError) as error:
                wrong[program.name] = str(error)
        return wrong

    def clean(self, wanted: list[Program]) -> None:
        """Remove objects of sources as they were before."""
        kept = set()
        for stamp in self.objects.glob("*.linked"):
            kept.update(stamp.read_text().split("\n"))
        for path in self.objects.glob("*.o"):
            if path.name not in kept:
                path.unlink()


def main() -> int:
    """Build what is asked for, and say what there is."""
    known = programs()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu" / "native")
    parser.add_argument("--arch", default="90", help="compute capability without its point")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these: " + ", ".join(known))
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    options = parser.parse_args()
    unknown = set(options.only or []) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if shutil.which("nvcc") is None:
        parser.error("no nvcc on the path")
    wanted = [known[name] for name in options.only or known]
    builder = Builder(options.out.resolve(), options.arch, options.jobs)
    wrong = builder.build(wanted)
    builder.clean(wanted)
    for name, said in wrong.items():
        print(f"{name}: not built\n{said}", file=sys.stderr)
    total = 0
    for program in wanted:
        path = options.out / program.name
        if program.name not in wrong:
            total += os.path.getsize(path)
            print(f"{os.path.getsize(path) / 1e6:6.2f} MB  {path}")
    print(f"{total / 1e6:6.2f} MB in all")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
