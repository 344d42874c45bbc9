"""The table that comes last: what happened, in at most 110 lines and 11,000 characters.

python table.py RESULTS.json        prints it anew
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MOST_LINES, MOST_CHARACTERS, WIDTH = 110, 11_000, 118
Lines = list[str]
Result = dict[str, Any]


def clip(text: str, width: int = WIDTH) -> str:
    """Cut a line off where it is too long, at one line."""
    text = " ".join(text.splitlines()).rstrip()
    return text if len(text) <= width else f"{text[: width - 3]}..."


def first_few(lines: Lines, most: int) -> Lines:
    """Keep some lines, and count the others."""
    return (
        lines if len(lines) <= most else [*lines[: most - 1], f"  and {len(lines) - most + 1} more"]
    )


def json_lines(stage: Result) -> list[Result]:
    """All JSON lines of a stage's jobs."""
    return [line for job in stage["jobs"] for line in job.get("lines", [])]


def environment(stage: Result) -> Lines:
    """The card and the versions."""
    parts = {line.get("part"): line for line in json_lines(stage)}
    lines = []
    for name in ("gpu", "nvidia-smi", "machine", "module"):
        part = parts.get(name)
        if part is None:
            continue
        if "error" in part:
            lines.append(clip(f"  {name}: {part['error']}"))
            continue
        if name == "machine":
            missing = [
                t for group in ("tools", "packages") for t, v in part[group].items() if not v
            ]
            lines.append(clip(f"  python {part['python']}, {part['cores']} cores; "
                              f"missing: {', '.join(missing) or 'nothing'}"))  # fmt: skip
        else:
            shown = {k: v for k, v in part.items() if k not in ("part", "file")}
            lines.append(clip(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in shown.items())))
    return lines


def latest(lines: Iterable[Result], key: str) -> list[Result]:
    """The last line of each name: a test that began and ended has two."""
    found: dict[str, Result] = {}
    for line in lines:
        if key in line:
            found[line[key]] = line
    return list(found.values())


def kernel_paths(stage: Result) -> Lines:
    """A row a kind of path, a column a dtype: right/all, and the largest error/allowed."""
    paths = latest(json_lines(stage), "path")
    good = [p for p in paths if p["status"] == "ok"]
    other = [p for p in good if p.get("other_way")]
    lines = [f"  {len(good)} of {len(paths)} agree, {len(other)} of them went another way"]
    dtypes = ["float32", "tf32", "float64", "bfloat16", "float16"]
    kinds = list(
        dict.fromkeys((p.get("op"), p.get("way")) for p in paths if p.get("op") != "module")
    )
    if kinds:
        lines.append("  right/all, largest error/allowed".ljust(36)
                     + "".join(d.rjust(15) for d in dtypes))  # fmt: skip
    for op, way in kinds:
        cells = []
        for dtype in dtypes:
            here = [
                p for p in paths if (p.get("op"), p.get("way"), p.get("dtype")) == (op, way, dtype)
            ]
            right = [p for p in here if p["status"] == "ok"]
            shares = [p["error"] / p["allowed"] for p in here if p.get("allowed")]
            share = f" {max(shares):.2g}" if shares else ""
            cells.append(f"{len(right)}/{len(here)}{share}" if here else "-")
        lines.append(f"  {op}, {way}".ljust(36) + "".join(c.rjust(15) for c in cells))
    unreached = [p["path"] for p in paths if p["status"] == "not reached"]
    if unreached:
        lines.append(clip(f"  {len(unreached)} were not reached, from {unreached[0]} on"))
    bad = [p for p in paths if p["status"] not in ("ok", "not reached")]
    order = {"hung": 0, "crashed": 1, "wrong": 2, "error": 3}
    bad.sort(key=lambda p: order.get(p["status"], 9))
    said = []
    for p in bad:
        numbers = f" {p['error']:.2g} (torch {p['torch']:.2g})" if "torch" in p else ""
        said.append(clip(f"  {p['status']}: {p['path']}: {p.get('worst', '')}{numbers}"))
    said += grouped((f"other way: {p['path']}", p["other_way"]) for p in other)
    return lines + first_few(said, 22)


def kernels_seen(stage: Result) -> Lines:
    """Which of our kernels ran at all, with the most blocks that each had."""
    blocks: dict[str, int] = {}
    for path in latest(json_lines(stage), "path"):
        for kernel in path.get("kernels", []):
            name = kernel["name"].split("<")[0]
            if name.startswith(("layer_", "cell_", "copy_")):
                count = 1
                for size in kernel["grid"]:
                    count *= size
                blocks[name] = max(blocks.get(name, 0), count)
    shown = ", ".join(f"{name} (to {most} blocks)" for name, most in sorted(blocks.items()))
    return [clip(f"  ran: {shown}", 2 * WIDTH)] if shown else []


def tests(stage: Result) -> Lines:
    """Counts, and the tests that failed or never ended."""
    found = latest(json_lines(stage), "test")
    counts: dict[str, int] = {}
    for test in found:
        counts[test["status"]] = counts.get(test["status"], 0) + 1
    lines = ["  " + (", ".join(f"{n} {status}" for status, n in counts.items()) or "no test ran")]
    bad = [t for t in found if t["status"] not in ("passed", "skipped")]
    pairs = []
    for test in bad:
        name, _, values = test["test"].removeprefix("tests/").partition("[")
        # Of a test with many values, those that say the same count as one.
        said = test.get("said") or (f"[{values}" if values else "")
        pairs.append((f"{test['status']}: {name}", said))
    return lines + first_few(grouped(pairs), 12)


def last_words(stage: Result) -> Lines:
    """The last line of each job, and where it failed some before it."""
    lines = []
    for job in stage["jobs"]:
        said = job.get("said", [])
        few = 4 if job["status"].startswith("failed") else 1
        tail = said[-few:] or ["it said nothing"]
        lines.append(clip(f"  {job['name']}: {job['status']}: {tail[-1]}"))
        lines += [clip(f"    {line}") for line in tail[:-1]]
    return first_few(lines, 12)


def micro(stage: Result) -> Lines:
    """Names and values, some a line."""
    items = []
    for line in json_lines(stage):
        if "error" in line:
            items.append(f"{line.get('name')}: {line['error']}")
        elif "value" in line:
            value = line["value"]
            number = f"{value:.4g}" if isinstance(value, float) else str(value)
            items.append(f"{line.get('name')} {number} {line.get('unit', '')}".strip())
    lines, text = [], " "
    for item in items:
        item = clip(item, 90)
        if len(text) + len(item) + 3 > WIDTH:
            lines.append(text)
            text = " "
        text += f" {item};"
    return first_few([*lines, text], 16) if items else last_words(stage)


def ncu(stage: Result) -> Lines:
    """A line a kernel with the metrics that matter."""
    wanted = {
        "Duration": "time", "Registers Per Thread": "registers",
        "Dynamic Shared Memory Per Block": "shared", "Achieved Active Warps Per SM": "warps",
        "Compute (SM) Throughput": "SM", "L2 Cache Throughput": "L2", "DRAM Throughput": "DRAM",
        "Warp Cycles Per Issued Instruction": "cycles/issue", "No Eligible": "idle",
    }  # fmt: skip
    said = [line for job in stage["jobs"] for line in job.get("said", [])]
    rows = list(csv.reader(line for line in said if line.startswith('"')))
    head = next((row for row in rows if "Metric Name" in row), None)
    if head is None:
        return last_words(stage)
    kernels: dict[str, Lines] = {}
    for row in rows[rows.index(head) + 1 :]:
        # Rows of metrics end early: the last columns are for advice.
        entry = dict(zip(head, row, strict=False))
        what = wanted.get(entry.get("Metric Name", ""))
        if what and "Metric Value" in entry:
            # As in "void unnamed>::layer_forward_kernel<MmaTile<__half, 32>, 1>(..)".
            found = re.search(r"(\w+)(<.*)?\(", entry["Kernel Name"])
            name = found.group(1) if found else entry["Kernel Name"]
            unit = entry["Metric Unit"] if entry["Metric Unit"] in ("ns", "us", "ms", "%") else ""
            value = f"{what} {entry['Metric Value']}{unit}"
            if value not in kernels.setdefault(name, [f"blocks {entry.get('Grid Size')}"]):
                kernels[name].append(value)
    return [clip(f"  {name}: {', '.join(values)}", 2 * WIDTH) for name, values in kernels.items()]


def grouped(pairs: Iterable[tuple[str, str]]) -> Lines:
    """Join names for which the same is said: the first, how many more, and what it is."""
    names: dict[str, Lines] = {}
    for name, said in pairs:
        names.setdefault(said, []).append(name)
    return [
        clip(f"  {some[0]}{f' and {len(some) - 1} more' if len(some) > 1 else ''}: {said}")
        for said, some in names.items()
    ]


def benchmark(stage: Result) -> Lines:
    """A line a case: microseconds in a CUDA graph, ours and torch's, for inference and training."""
    path = Path(stage.get("file") or "")
    if not path.is_file():
        return last_words(stage)
    cases: dict[str, dict[str, Result]] = {}
    failed = []
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        what, _, way = row["mode"].partition(", ")
        kind, _, mode = what.rpartition(" ")
        name = f"{kind} {row['dtype']} {'x'.join(map(str, row['shape']))}"
        trouble = row.get("error") or "; ".join(
            f"{k}: {v}" for k, v in row.get("failed", {}).items()
        )
        if trouble:
            failed.append((f"{name} {mode}, {way}", trouble))
        # Where one of them cannot be captured, as they are called; the rows come in that order.
        if "ratio" in row:
            cases.setdefault(name, {}).setdefault(mode, row)
    lines = [f"  {len(rows)} rows; us, ours / torch's = ratio (e: not in a graph)".ljust(44)]
    for name, modes in cases.items():
        text = f"  {name:42}"
        for mode in ("inference", "training"):
            if mode in modes:
                row = modes[mode]
                ours, theirs = list(row["microseconds"].values())[:2]
                eager = "" if "graph" in row["mode"] else "e"
                text += f" {mode} {ours:8.1f} /{theirs:8.1f} ={row['ratio']:5.2f}{eager:1}"
        lines.append(text)
    return lines[:1] + first_few(grouped(failed), 8) + first_few(lines[1:], 30)


def variants(stage: Result) -> Lines:
    """A row a case, from variants.json: it is there even where its script was cut off."""
    path = Path(stage.get("file") or "")
    if not path.is_file():
        return last_words(stage)
    content = json.loads(path.read_text())
    rows = content["summary"]
    names = sorted({name for row in rows for name in row["ratio"] if name != content["baseline"]})
    lines = [f"  times longer than {content['baseline']}: " + ", ".join(names)]
    for row in rows:
        case = f"{row['kind']} {row['dtype']} L{row['L']} N{row['N']} H{row['H']}"
        base = row["us_per_step"].get(content["baseline"])
        ratios = [row["ratio"].get(name) for name in names]
        shown = " ".join("    -" if r is None else f"{r:5.2f}" for r in ratios)
        lines.append(clip(f"  {case:34} {base or 0:7.2f} us/step {shown}"))
    wrong = [f"  {failure['variant']}: {failure['what']}" for failure in content["failures"]]
    return first_few(lines, 28) + first_few([clip(line) for line in wrong], 6)


SECTIONS: dict[str, list[Callable[[Result], Lines]]] = {
    "environment": [environment],
    "kernel paths": [kernel_paths, kernels_seen],
    "test_gpu.py": [tests],
    "other tests": [tests],
    "microbenchmarks": [micro],
    "benchmark": [benchmark],
    "ncu": [ncu],
    "variants": [variants],
}


def section(stage: Result) -> Lines:
    """What a stage has to say; never an error of the table's own."""
    lines: Lines = []
    for part in SECTIONS.get(stage["name"], [last_words]):
        try:
            lines += part(stage)
        except Exception as error:
            lines.append(clip(f"  this part of the table fails: {type(error).__name__}: {error}"))
    return lines


def make(results: Result) -> str:
    """Write the table; sections are cut short, from the longest on, where it would be too long."""
    stages = results["stages"]
    sections = {stage["name"]: section(stage) for stage in stages if stage.get("jobs")}
    card = results.get("card") or "no GPU"
    head = f"GPU check on {card}: {results['status']}, {results.get('seconds', 0):.0f} s, "
    head += f"revision {results.get('revision', 'unknown')}, module {results.get('module', '')}"
    overview = ["", "stage                 status                                     s"]
    for stage in stages:
        overview.append(f"{stage['name']:21} {clip(stage['status'], 40):40} "
                        f"{stage.get('seconds', 0):5.0f}")  # fmt: skip
    reached = {stage["name"] for stage in stages}
    overview += [
        f"{name:21} not reached" for name in results.get("plan", []) if name not in reached
    ]

    def whole() -> Lines:
        lines = [clip(head, WIDTH)]
        for name, body in sections.items():
            lines += [f"-- {name}", *body]
        return lines + overview

    while True:
        lines = whole()
        longest = max(sections, key=lambda name: len(sections[name]), default=None)
        fits = len(lines) <= MOST_LINES and len("\n".join(lines)) <= MOST_CHARACTERS
        if fits or longest is None or len(sections[longest]) <= 1:
            return "\n".join(lines)[-MOST_CHARACTERS:] + "\n"
        body = sections[longest]
        sections[longest] = [*body[:-2], "  ... more in results.json"]


if __name__ == "__main__":
    print(make(json.loads(Path(sys.argv[1]).read_text())), end="")
