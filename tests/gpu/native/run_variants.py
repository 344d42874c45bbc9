"""Compares the variants of the layer's kernels: runs bench_layer-* in turns, A B C A B C.

python tests/gpu/native/run_variants.py --programs build/gpu/native --out variants.json

The file has every line that the programs printed, with its round, and is written anew after each
of them. The table says how many times longer a variant takes than the one with all switches on:
the median over the rounds, each against the same round. A program that fails, hangs or says
nothing is named, and the others go on. Exit status: 0, 1 where a program failed, 77 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

PREFIX = "bench_layer-"
ALL_ON = "all_on"
NO_GPU = 77
CASE = ("kind", "dtype", "L", "N", "H")


def run(program: Path, limit: float) -> tuple[str, str | None]:
    """Run a program; return what it printed, and what went wrong. Its children end with it."""
    command = [str(program)]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return "", f"did not start: {error}"
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return said, f"cut off after {limit:g} s"
    if process.returncode == NO_GPU:
        return said, "no GPU"
    if process.returncode < 0:
        return said, f"ended by {signal.Signals(-process.returncode).name}"
    if process.returncode > 0:
        return said, f"failed with exit status {process.returncode}"
    return said, None


def lines_of(said: str) -> tuple[list[dict], list[str]]:
    """Return the lines of JSON that a program printed, and the other lines."""
    found, others = [], []
    for line in said.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            found.append(parsed)
        elif line.strip():
            others.append(line.strip())
    return found, others


class Comparison:
    """Results of all variants so far, and what went wrong."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.results: list[dict] = []
        self.failures: list[dict] = []

    def add(self, variant: str, turn: int, said: str, wrong: str | None) -> None:
        """Take in what a program printed, and how it ended."""
        found, others = lines_of(said)
        for line in found:
            self.results.append({**line, "variant": variant, "round": turn})
            if "error" in line:
                self.fail(variant, turn, f"{case_name(line)}: {line['error']}")
        if wrong is None and not found:
            wrong = "printed no result"
        if wrong is not None:
            self.fail(variant, turn, "; ".join([wrong, *others[-1:]]))
        self.write()

    def fail(self, variant: str, turn: int, what: str) -> None:
        """Note a failure; the same of another round is one."""
        known = [(failure["variant"], failure["what"]) for failure in self.failures]
        if (variant, what) not in known:
            self.failures.append({"variant": variant, "round": turn, "what": what})

    def summary(self) -> list[dict]:
        """Return a row a case: microseconds a step with all on, and each variant's ratio to it."""
        times: dict[tuple, dict[str, dict[int, float]]] = {}
        for line in self.results:
            if "us_per_step" in line:
                case = tuple(line.get(key) for key in CASE)
                variant = times.setdefault(case, {}).setdefault(line["variant"], {})
                variant[line["round"]] = float(line["us_per_step"])
        rows = []
        for case, of_variants in times.items():
            base = of_variants.get(ALL_ON, {})
            ratios = {}
            for variant, rounds in of_variants.items():
                both = [rounds[turn] / base[turn] for turn in rounds if base.get(turn)]
                ratios[variant] = statistics.median(both) if both else None
            medians = {
                name: statistics.median(found.values()) for name, found in of_variants.items()
            }
            rows.append({**dict(zip(CASE, case, strict=True)), "us_per_step": medians,
                         "ratio": ratios})  # fmt: skip
        return rows

    def write(self) -> None:
        """Write the file, whole at every moment."""
        text = json.dumps({"baseline": ALL_ON, "results": self.results,
                           "failures": self.failures, "summary": self.summary()})  # fmt: skip
        partial = self.out.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.out)

    def table(self, variants: list[str]) -> str:
        """Return the summary as text: a line a case, a column a variant, then the failures."""
        others = [variant for variant in variants if variant != ALL_ON]
        heads = [short_name(variant) for variant in others]
        lines = [f"{'times longer than ' + ALL_ON:32} {'us/step':>8} "
                 + " ".join(f"{head:>9}" for head in heads)]  # fmt: skip
        for row in self.summary():
            base = row["us_per_step"].get(ALL_ON)
            cells = [row["ratio"].get(variant) for variant in others]
            shown = [f"{cell:9.3f}" if cell is not None else f"{'-':>9}" for cell in cells]
            first = f"{base:8.3f}" if base is not None else f"{'-':>8}"
            lines.append(f"{case_name(row):32} {first} {' '.join(shown)}")
        lines += [f"{fail['variant']}: {fail['what']}" for fail in self.failures]
        return "\n".join(lines)


def short_name(variant: str) -> str:
    """Return what heads a column: no_stage_next is -stg_next."""
    if not variant.startswith("no_"):
        return variant[:9]
    words = variant.removeprefix("no_").split("_")
    return "-" + "_".join(word[: max(2, 7 // len(words))] for word in words)[:8]


def case_name(line: dict) -> str:
    """Return a case in words, as in a row of the table."""
    return (
        f"{line.get('kind', '?')} {line.get('dtype', '?')} L{line.get('L', '?')}"
        f" N{line.get('N', '?')} H{line.get('H', '?')}"
    )


def main() -> int:
    """Run the rounds, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=Path, required=True, help="the folder of bench_layer-*")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20, help="seconds a program may take")
    parser.add_argument(
        "--seconds", type=float, default=120, help="no program begins after so many"
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of all that there are")
    options = parser.parse_args()
    there = [path.name.removeprefix(PREFIX) for path in sorted(options.programs.glob(PREFIX + "*"))]
    variants = [name for name in there if options.only is None or name in options.only]
    variants.sort(key=lambda name: name != ALL_ON)
    if not variants:
        parser.error(f"no {PREFIX}* of that name in {options.programs}")
    options.out.parent.mkdir(parents=True, exist_ok=True)

    comparison = Comparison(options.out)
    end = time.monotonic() + options.seconds
    dropped: set[str] = set()
    over = False
    for turn in range(options.rounds):
        for variant in variants:
            over = over or time.monotonic() >= end
            if over or variant in dropped:
                continue
            said, wrong = run(options.programs / f"{PREFIX}{variant}", options.limit)
            if wrong == "no GPU":
                print(said.strip() or wrong)
                return NO_GPU
            if wrong is not None:
                dropped.add(variant)
            comparison.add(variant, turn, said, wrong)
    print(comparison.table(variants))
    if over:
        print(f"time was over after {options.seconds:g} s, before all {options.rounds} rounds")
    return int(bool(comparison.failures))


if __name__ == "__main__":
    sys.exit(main())
