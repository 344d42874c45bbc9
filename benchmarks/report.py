"""Tables and charts of the result files that the benchmarks write.

python benchmarks/report.py benchmarks/results/cell.json            prints the table
python benchmarks/report.py benchmarks/results/cell.json --png      and draws cell.png beside it
python benchmarks/report.py benchmarks/results/cell.json --markdown the table for a document
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from protocol import geometric_mean

Rows = list[dict[str, Any]]
RATES = {
    "gflops": ("GFLOP/s", "{:.1f}"),
    "share_of_limit": ("of limit", "{:.0%}"),
    "times_float32": ("times float32", "{:.2f}"),
}
RIVALS = "nn.LSTMCell and torch.compile"


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def groups(rows: Rows) -> dict[tuple[str, int], Rows]:
    """Split the rows by mode and number of threads."""
    result: dict[tuple[str, int], Rows] = defaultdict(list)
    for row in rows:
        result[row["mode"], row["threads"]].append(row)
    return dict(result)


def name(row: dict[str, Any]) -> str:
    model = f"{row['model']} " if "model" in row else ""
    return model + " x ".join(str(size) for size in row["shape"][:-1]) + f" -> {row['shape'][-1]}"


def machine(where: dict[str, Any]) -> str:
    """Name the GPU where there was one, else the CPU and its instructions."""
    cpu = f"{where['cpu']} ({where['lstm_ext']['cpu_instruction_set']})"
    return where.get("gpu") or cpu


def summary(rows: Rows) -> str:
    """Geometric mean, worst and losing shapes of one group."""
    rated = [row for row in rows if "ratio" in row]
    if not rated:
        return "no rival measured"
    worst = min(rated, key=lambda row: row["ratio"])
    losing = [name(row) for row in rated if row["ratio"] < 1]
    text = (
        f"geometric mean {geometric_mean(row['ratio'] for row in rated):.2f}, "
        f"least {worst['ratio']:.2f} at {name(worst)}"
    )
    return f"{text}; slower at: {', '.join(losing) if losing else 'none'}"


def table(rows: Rows, markdown: bool) -> list[str]:
    """One line a shape: microseconds of each, the ratio to the best rival, and its rates."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["microseconds"]))
    rates = [rate for rate in RATES if any(rate in row for row in rows)]
    head = ["shape", *(f"{peer} µs" for peer in peers), "ratio", *(RATES[r][0] for r in rates)]
    cells = [
        [
            name(row),
            *(f"{row['microseconds'][p]:.1f}" if p in row["microseconds"] else "-" for p in peers),
            f"{row['ratio']:.2f}" if "ratio" in row else "-",
            *(RATES[rate][1].format(row[rate]) if rate in row else "-" for rate in rates),
        ]
        for row in rows
    ]
    if markdown:
        lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
        for cell, row in zip(cells, rows, strict=True):
            if row.get("ratio", 1) < 1:
                cell[len(peers) + 1] = f"**{cell[len(peers) + 1]}**"
            lines.append("| " + " | ".join(cell) + " |")
        return lines
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in (head, *cells)
    ]


def print_table(path: Path, markdown: bool = False, short: bool = False) -> None:
    content = load(path)
    where = content["environment"]
    print(
        f"{content['title']} on {machine(where)}, torch {where['torch']}, revision {where['git']}"
    )
    for (mode, threads), rows in groups(content["rows"]).items():
        head = f"{mode}, {threads} thread(s): {summary(rows)}"
        if short:
            print(head)
            continue
        print(f"\n{'### ' if markdown else ''}{head}\n")
        print("\n".join(table(rows, markdown)))


def draw(path: Path) -> Path:
    """Draw the ratio to the best rival, one panel a mode, one bar a shape and thread count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    content = load(path)
    split = groups(content["rows"])
    modes = list(dict.fromkeys(mode for mode, _ in split))
    # One axis of shapes below all panels, or where they differ, one below each.
    shared = len({tuple(name(row) for row in rows) for rows in split.values()}) == 1
    across = 1 if shared else 2
    down = -(-len(modes) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(11, (2.9 if shared else 3.6) * down),
        sharex=shared,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(modes) :]:
        axis.set_axis_off()
    for axis, mode in zip(axes.flat, modes, strict=False):
        counts = [threads for m, threads in split if m == mode]
        width = 0.8 / len(counts)
        for k, threads in enumerate(counts):
            rows = [row for row in split[mode, threads] if "ratio" in row]
            positions = [i + (k - (len(counts) - 1) / 2) * width for i in range(len(rows))]
            label = f"{threads} thread{'s' if threads > 1 else ''}, geometric mean " + (
                f"{geometric_mean(row['ratio'] for row in rows):.1f}"
            )
            axis.bar(positions, [row["ratio"] for row in rows], width, label=label)
            axis.set_xticks(range(len(rows)), [name(row) for row in rows], rotation=60, ha="right")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.margins(y=0.25 if shared else 0.5)  # room for the legend
        axis.set(title=mode.replace("_", ", "), ylabel="times as fast", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if x in (2, 3, 5) else "")
        axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.legend(loc="upper center", ncols=len(counts), fontsize="small")
    where = content["environment"]
    figure.suptitle(
        f"{content['title']}: speed against the faster of {content.get('rivals', RIVALS)}\n"
        f"{machine(where)}, torch {where['torch']}"
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--png", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--short", action="store_true", help="a line a mode")
    options = parser.parse_args()
    print_table(options.results, options.markdown, options.short)
    if options.png:
        print(f"\nchart: {draw(options.results)}")


if __name__ == "__main__":
    main()
