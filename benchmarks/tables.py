"""Writes the tables of the documents from the result files of the benchmarks.

python benchmarks/tables.py            writes README.md and docs/*.md
python benchmarks/tables.py --check    changes nothing; exit status 1 if a table is not up to date

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``. NAME is
one of TABLES below. What is outside of the comments is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from protocol import geometric_mean
from report import RIVALS, Rows, groups, load, machine, name, summary, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODES = ("inference", "training")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def rows_of(file: str, mode: str, threads: int = 1) -> Rows:
    """Return the rows of a result file with a mode and a number of threads."""
    found = groups(load(RESULTS / file)["rows"])[mode, threads]
    return [row for row in found if "ratio" in row]


def mean(rows: Rows) -> float:
    return geometric_mean(row["ratio"] for row in rows)


def least(rows: Rows) -> float:
    return float(min(row["ratio"] for row in rows))


def number(value: float) -> str:
    """Three digits, or whole numbers with a comma for each thousand."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def bold_below_one(value: float, text: str | None = None) -> str:
    text = text or f"{value:.2f}"
    return f"**{text}**" if value < 1 else text


def lines(head: list[str], body: Iterable[list[str]], left: int = 1) -> list[str]:
    """Lay out a table, of which the first columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    first = ["| " + " | ".join(head) + " |", "|" + "|".join(rule) + "|"]
    return first + ["| " + " | ".join(row) + " |" for row in body]


def in_short() -> list[str]:
    """Geometric means over all shapes, and the slowest one."""
    kinds = [
        ("cell", "cell.json", "", RIVALS),
        ("layer", "sequence.json", "", "nn.LSTM and onnxruntime"),
        ("layer, packed sequences", "sequence.json", "packed ", "nn.LSTM"),
        ("whole models, converted", "models.json", "", "the same, eager and compiled"),
    ]
    body = []
    for kind, file, prefix, rivals in kinds:
        cells = []
        for threads in (1, 2):
            for mode in MODES:
                rows = rows_of(file, prefix + mode, threads)
                cells.append(f"{mean(rows):.2f} ({least(rows):.2f})")
        count = len(rows_of(file, f"{prefix}inference"))
        body.append([kind, rivals, str(count), *cells])
    head = ["", "against the faster of", "shapes"]
    head += [f"{mode}, {threads}" for threads in ("1 thread", "2 threads") for mode in MODES]
    return lines(head, body, 2)


CELLS_IN_SHORT = (
    (1, 3, 2), (1, 256, 256), (16, 128, 128), (32, 64, 64), (64, 512, 512), (256, 1024, 1024),
    (4096, 64, 64),
)  # fmt: skip


def cell_in_short() -> list[str]:
    peers = ["lstm_ext", "nn.LSTMCell", "torch.compile"]
    by_mode = {
        mode: {tuple(row["shape"]): row for row in rows_of("cell.json", mode)} for mode in MODES
    }
    body = []
    for shape in CELLS_IN_SHORT:
        cells = [name({"shape": shape})]
        for rows in by_mode.values():
            row = rows[shape]
            cells += [number(row["microseconds"][peer]) for peer in peers]
            cells.append(f"{row['ratio']:.2f}")
        body.append(cells)
    head = ["batch x input -> hidden"]
    for mode in by_mode:
        head += [f"{mode}: ours", *peers[1:], "ratio"]
    return lines(head, body)


LAYERS_IN_SHORT = (
    (399, 1, 3, 2), (1, 1, 256, 256), (100, 1, 64, 64), (100, 1, 256, 256), (50, 16, 128, 128),
    (50, 64, 512, 512), (100, 256, 64, 64),
)  # fmt: skip


def layer_in_short() -> list[str]:
    peers = ["lstm_ext", "lstm_ext, frozen", "nn.LSTM", "onnxruntime"]
    body = []
    for prefix, shapes in (("", LAYERS_IN_SHORT), ("packed ", ((50, 16, 128, 128),))):
        inference, training = (
            {tuple(row["shape"]): row for row in rows_of("sequence.json", prefix + mode)}
            for mode in MODES
        )
        for shape in shapes:
            row, trained = inference[shape], training[shape]
            times, times_trained = row["microseconds"], trained["microseconds"]
            body.append(
                [
                    name({"shape": shape}) + (", packed" if prefix else ""),
                    *(number(times[peer]) if peer in times else "-" for peer in peers),
                    bold_below_one(row["ratio"]),
                    *(number(times_trained[peer]) for peer in ("lstm_ext", "nn.LSTM")),
                    bold_below_one(trained["ratio"]),
                ]
            )
    head = ["time x batch x input -> hidden", "inference: ours", "frozen", *peers[2:], "ratio"]
    return lines([*head, "training: ours", "nn.LSTM", "ratio"], body)


def against(target: float, value: float, text: str | None = None) -> str:
    """A value, in bold where it misses its target."""
    text = text or f"{value:.2f}"
    return text if value >= target else f"**{text}**"


def of_shape(file: str, mode: str, threads: int, shape: tuple[int, ...]) -> dict[str, Any]:
    return next(r for r in rows_of(file, mode, threads) if tuple(r["shape"]) == shape)


def cell_targets() -> list[str]:
    body = []
    for mode, of_all, of_small in (("inference", 3.0, 8.0), ("training", 3.0, 5.0)):
        every, means, small = [], [], []
        for threads in (1, 2):
            rows = rows_of("cell.json", mode, threads)
            ratios = [r["ratio"] for r in rows if r["shape"][0] == 1 and r["shape"][2] <= 32]
            low, high = min(ratios), max(ratios)
            ends = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
            every.append(against(1, least(rows)))
            means.append(against(of_all, mean(rows)))
            small.append(against(of_small, low, ends))
        body += [
            [f"{mode}, slowest shape", "1.0", *every],
            [f"{mode}, geometric mean", f"{of_all:.0f}", *means],
            [f"{mode}, batch 1 and H <= 32", f"{of_small:.0f}", *small],
        ]
    shares = [
        ", ".join(
            against(0.7, share, f"{share:.0%}")
            for H in (256, 512, 1024)
            for share in [of_shape("cell.json", "inference", k, (1, H, H))["share_of_limit"]]
        )
        for k in (1, 2)
    ]
    body.append(["share of the bandwidth limit at batch 1, H 256, 512, 1024", "70%", *shares])
    return lines(["", "target", "1 thread", "2 threads"], body)


def layer_targets() -> list[str]:
    def both(mode: str, value: Callable[[Rows], float], target: float) -> list[str]:
        return [
            against(target, value(rows_of("sequence.json", mode, threads))) for threads in (1, 2)
        ]

    def at(shape: tuple[int, ...]) -> Callable[[Rows], float]:
        return lambda rows: next(r["ratio"] for r in rows if tuple(r["shape"]) == shape)

    small = (399, 1, 3, 2)
    wanted: list[tuple[str, str, Callable[[Rows], float], float]] = [
        ("inference, slowest shape", "inference", least, 1),
        ("inference, geometric mean", "inference", mean, 1.5),
        ("inference, 399 x 1 x 3 -> 2", "inference", at(small), 2),
        ("training, slowest shape", "training", least, 1),
        ("training, geometric mean", "training", mean, 2),
        ("training, 399 x 1 x 3 -> 2", "training", at(small), 2.5),
        ("packed inference, slowest shape", "packed inference", least, 3),
        ("packed inference, geometric mean", "packed inference", mean, 5),
        ("packed training, slowest shape", "packed training", least, 3),
        ("packed training, geometric mean", "packed training", mean, 5),
        ("training with the gradient of the input, slowest shape", "input gradient training",
         least, 1),
    ]  # fmt: skip
    body = [[text, f"{t:g}", *both(mode, value, t)] for text, mode, value, t in wanted]
    for mode in MODES:
        shares = [
            of_shape("sequence.json", mode, k, (50, 64, 512, 512))["share_of_limit"] for k in (1, 2)
        ]
        text = f"share of the peak of multiply-adds at 50 x 64 x 512 -> 512, {mode}"
        body.append([text, "80%", *(against(0.8, share, f"{share:.0%}") for share in shares)])
    kept = of_shape("sequence.json", "training", 1, (50, 16, 128, 128))["kept_bytes"]
    ours, theirs = (kept[who] / (4 * 50 * 16 * 128) for who in ("lstm_ext", "nn.LSTM"))
    text = "kept for backward at 50 x 16 x 128 -> 128, numbers per S H"
    body.append([text, "5", f"{ours:.1f} (nn.LSTM: {theirs:.1f})", ""])
    return lines(["", "target", "1 thread", "2 threads"], body)


def cell_dtypes() -> list[str]:
    columns = {
        (dtype, mode): {tuple(r["shape"]): r for r in rows_of(f"cell_{dtype}.json", mode)}
        for dtype in ("bfloat16", "float16", "float64")
        for mode in MODES
    }
    body = [
        [name({"shape": shape}), *(bold_below_one(c[shape]["ratio"]) for c in columns.values())]
        for shape in next(iter(columns.values()))
    ]
    return lines(["ratio to nn.LSTMCell", *(f"{d}, {mode}" for d, mode in columns)], body)


def frozen_means() -> list[str]:
    def of(mode: str, what: str) -> list[str]:
        found = [rows_of("frozen.json", mode, threads) for threads in (1, 2)]
        if what == "onnxruntime int8":
            rates = [
                [r["microseconds"][what] / r["microseconds"]["lstm_ext"] for r in rows]
                for rows in found
            ]
        else:
            rates = [[r[what] for r in rows] for rows in found]
        return [bold_below_one(geometric_mean(rate)) for rate in rates]

    plain, int16 = "times_float32", "int8, int16 activations"
    body = [
        ["int8 against our frozen float32", *of("int8", plain)],
        ["int8 against onnxruntime's int8", *of("int8", "onnxruntime int8")],
        ["int8 with 16-bit activations against our frozen float32", *of(int16, plain)],
        ["bfloat16 against our frozen float32", *of("bfloat16", plain)],
    ]
    return lines(["times as fast, geometric mean", "1 thread", "2 threads"], body)


def frozen_rows() -> list[str]:
    body = []
    for threads in (1, 2):
        found = {
            mode: rows_of("frozen.json", mode, threads)
            for mode in ("float32", "bfloat16", "int8", "int8, int16 activations")
        }
        for f32, b16, i8, i16 in zip(*found.values(), strict=True):
            theirs = i8["microseconds"]
            ints = [theirs[rival] for rival in ("onnxruntime int8", "torch.ao int8")]
            ratio = min(ints) / theirs["lstm_ext"]
            times = [row["microseconds"]["lstm_ext"] for row in (f32, b16, i8, i16)]
            errors = [i8["error_percent"]["lstm_ext"], i16["error_percent"]["lstm_ext"]]
            errors += [i8["error_percent"][r] for r in ("onnxruntime int8", "torch.ao int8")]
            body.append(
                [
                    name(i8),
                    str(threads),
                    *(f"{t:,.0f}" for t in (*times, theirs["onnxruntime"], *ints)),
                    bold_below_one(ratio),
                    ", ".join(f"{error:.2f}" for error in errors),
                ]
            )
    head = ["shape", "threads", "float32 µs", "bfloat16", "int8", "int8, int16"]
    head += ["onnxruntime float32", "onnxruntime int8", "torch.ao int8", "ratio", "errors in %"]
    return lines(head, body)


def accuracy(first: str, second: str, digits: tuple[str, str]) -> list[str]:
    """Two of the measured models side by side: errors of the outputs, and what they lead to."""
    tables = load(RESULTS / "accuracy_frozen.json")["tables"]
    left, right = (next(t for n, t in tables.items() if n.startswith(k)) for k in (first, second))
    kinds = {
        "character model": ("bits per character", "{:.2f}%"),
        "speaker encoder": ("error of the embeddings", "{:.1f}%"),
        "tagger": ("F1", "{:.2f}%"),
        "silero-vad": ("error of the probability of speech, percentage points", "{:.1f}%"),
    }
    body = []
    for kind in left:
        cells = [kind]
        for model, found, digit in ((first, left, digits[0]), (second, right, digits[1])):
            cells += [
                kinds[model][1].format(found[kind]["error_percent"]),
                digit.format(found[kind]["measure"]),
            ]
        body.append(cells)
    head = [""]
    for model in (first, second):
        head += [f"{model}: error of the outputs", kinds[model][0]]
    return lines(head, body)


def gpu(kind: str) -> list[str]:
    """Rows of the H100, replayed from a CUDA graph."""
    content = load(RESULTS / "cuda_h100_80gb_hbm3.json")
    kinds = {"layer": ("", "packed ", "bidirectional "), "cell": ("",)}[kind]
    body = []
    for extra in kinds:
        what = f"{extra}{kind}"
        by_mode = [
            {(r["model"], *r["shape"]): r for r in content["rows"] if r["mode"] == mode}
            for mode in (f"{what} inference, graph", f"{what} training, graph")
        ]
        for key, row in by_mode[0].items():
            cells = []
            for r in (row, by_mode[1][key]):
                ours, theirs = r["microseconds"].values()
                ratio = bold_below_one(r["ratio"])
                cells.append(f"{ours:,.0f} / {theirs:,.0f} = {ratio}")
            shape = name({"shape": row["shape"]}) + (f", {extra.strip()}" if extra else "")
            body.append([shape, row["model"], *cells])
    sizes = "time x batch x input -> hidden" if kind == "layer" else "batch x input -> hidden"
    return lines([f"{kind}, {sizes}", "dtype", "inference", "training"], body, 2)


FEW = 10  # timings: the medians of fewer are not to be relied on


def measured(file: str) -> list[str]:
    """Say on what machine a result file was made, and of how many timings the medians are."""
    content = load(RESULTS / file)
    where = content["environment"]
    rounds = f", medians of {content['rounds']} timings" if "rounds" in content else ""
    text = f"On {machine(where)}, torch {where['torch']}, revision {where['git']}{rounds}."
    if content.get("rounds", FEW) < FEW:
        text += " Provisional: so few timings, on a machine with other work."
    return [*textwrap.wrap(text, 100), ""]


PROJECTION_TARGET = 2.0
VARIANT_TARGET = 1.15


def projection_means() -> list[str]:
    """Geometric means over all shapes, and the shape that gains least."""
    rows = load(RESULTS / "projection.json")["rows"]
    body = []
    for (mode, threads), found in groups(rows).items():
        worst = min(found, key=lambda row: row["ratio"])
        text = f"{worst['ratio']:.2f} at {projection_name(worst)}"
        body.append([mode, str(threads), f"{mean(found):.2f}", text])
    return lines(["nn.LSTM's time over ours", "threads", "geometric mean", "least"], body)


def projection_name(row: dict[str, Any]) -> str:
    *sizes, H, P = row["shape"].split("x")
    return f"{' x '.join(sizes)} -> {H} -> {P}"


def projection_rows() -> list[str]:
    found = groups(load(RESULTS / "projection.json")["rows"])
    modes = list(dict.fromkeys(mode for mode, _ in found))
    body = []
    for threads in dict.fromkeys(threads for _, threads in found):
        for rows in zip(*(found[mode, threads] for mode in modes), strict=True):
            cells = []
            for row in rows:
                theirs, ours = row["us"]["torch"], row["us"]["lstm_ext"]
                ratio = against(PROJECTION_TARGET, row["ratio"])
                cells.append(f"{number(theirs)} / {number(ours)} = {ratio}")
            body.append([projection_name(rows[0]), str(threads), *cells])
    return measured("projection.json") + lines(
        ["length x batch x input -> H -> P", "threads", *modes], body
    )


def sized(row: dict[str, Any]) -> str:
    *sizes, H = row["shape"].split("x")
    return f"{' x '.join(sizes)} -> {H}"


def states_rows(which: str) -> list[str]:
    """Every row of one of the tables of bench_states.py, microseconds and ratios."""
    rows = [row for row in load(RESULTS / "states.json")["rows"] if row["table"] == which]
    return measured("states.json") + with_ratios(rows)


def variants() -> list[str]:
    """Time of each variant over the plain layer's, by shape and mode; over 1.15 in bold."""
    rows = [r for r in load(RESULTS / "variants.json")["rows"] if r["table"] == "cost"]
    columns = list(dict.fromkeys((row["shape"], row["mode"]) for row in rows))
    of = {(row["variant"], row["shape"], row["mode"]): row["over_plain"] for row in rows}
    body = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        ratios = [of[variant, shape, mode] for shape, mode in columns]
        texts = [f"**{r:.2f}**" if round(r, 2) > VARIANT_TARGET else f"{r:.2f}" for r in ratios]
        body.append([variant, *texts])
    heads = [f"{sized({'shape': shape})}, {mode}" for shape, mode in columns]
    return measured("variants.json") + lines(["", *heads], body)


def variants_loops() -> list[str]:
    """Time of loops by hand over ours."""
    rows = [r for r in load(RESULTS / "variants.json")["rows"] if r["table"] == "loops"]
    peers = list(dict.fromkeys(name for row in rows for name in row["over_ours"]))
    peers.remove("lstm_ext")
    body = [
        [
            row["variant"],
            sized(row),
            row["mode"],
            f"{row['us']['lstm_ext']:,.0f}",
            *(f"{row['over_ours'][p]:.2f}" if p in row["over_ours"] else "" for p in peers),
        ]
        for row in rows
    ]
    heads = ["", "length x batch x input -> H", "", "ours, microseconds", *peers]
    return lines(heads, body, left=3)


def variant_models() -> list[str]:
    """Time of whole models as their packages have them over ours."""
    rows = load(RESULTS / "variant_models.json")["rows"]
    body = []
    for row in rows:
        ratio = f"{row['over_ours']:.2f}"
        ours = f"{row['us']['lstm_ext'] / 1e3:,.1f}"
        body.append([
            row["model"], row["size"], row["mode"], ours,
            ratio if row["over_ours"] >= 1 else f"**{ratio}**",
        ])  # fmt: skip
    heads = ["", "size", "", "ours, milliseconds", "theirs / ours"]
    return measured("variant_models.json") + lines(heads, body, left=3)


def ragged_rows() -> list[str]:
    return measured("ragged.json") + with_ratios(
        load(RESULTS / "ragged.json")["rows"], " by hand / ours"
    )


# What an option or a way of ours costs, where 1 is the best.
OVERHEADS = "on / off", "learned / to zero", "both clips / no clip", " / outside"
SIZES = "length x batch x input -> hidden"


def with_ratios(
    rows: Rows,
    suffix: str = "",
    named: Callable[[dict[str, Any]], list[str]] = lambda row: [sized(row), row["mode"]],
    heads: tuple[str, ...] = (SIZES, ""),
) -> list[str]:
    """Lay out rows with times in microseconds and with several ratios, a rival's bold below 1."""
    body = [
        [
            *named(row), str(row["threads"]),
            *(number(time) for time in row["us"].values()),
            *(
                f"{ratio:.2f}" if name.endswith(OVERHEADS) else bold_below_one(ratio)
                for name, ratio in row["ratios"].items()
            ),
        ]
        for row in rows
    ]  # fmt: skip
    head = [*heads, "threads", *rows[0]["us"]]
    return lines([*head, *(f"{name}{suffix}" for name in rows[0]["ratios"])], body, len(heads))


def projection_clips() -> list[str]:
    return measured("projection_clips.json") + with_ratios(
        load(RESULTS / "projection_clips.json")["rows"],
        named=lambda row: [projection_name(row), row["mode"]],
        heads=("length x batch x input -> H -> P", ""),
    )


def setup_rows(which: str) -> list[str]:
    """Every row of one of the tables of bench_setup.py."""

    def named(row: dict[str, Any]) -> list[str]:
        I, H, K, D = row["shape"].split("x")
        return [f"{I} -> {H}, {K} x {D}", row["what"]]

    rows = [row for row in load(RESULTS / "setup.json")["rows"] if row["table"] == which]
    heads = "input -> hidden, layers x directions", {"init": "", "replacing": "device"}[which]
    return measured("setup.json") + with_ratios(rows, named=named, heads=heads)


def all_rows(file: str, modes: Iterable[str] = ()) -> list[str]:
    """Every row of a result file, a heading for each mode and number of threads."""
    content = load(RESULTS / file)
    where = content["environment"]
    found = [
        f"{content['title']} on {machine(where)}, torch {where['torch']}, revision {where['git']}."
    ]
    for (mode, threads), rows in groups(content["rows"]).items():
        if not modes or mode in modes:
            threaded = f"{threads} thread{'s' if threads > 1 else ''}"
            found += ["", f"### {content['title'].split(',')[0]}: {mode}, {threaded}", ""]
            text = summary(rows)
            text = text[0].upper() + text[1:] + "."
            found += [*textwrap.wrap(text, 100), "", *table(rows, markdown=True)]
    return found


TABLES: dict[str, Callable[[], list[str]]] = {
    "in-short": in_short,
    "cell-in-short": cell_in_short,
    "layer-in-short": layer_in_short,
    "cell-targets": cell_targets,
    "layer-targets": layer_targets,
    "cell-dtypes": cell_dtypes,
    "cell-rows": lambda: all_rows("cell.json"),
    "layer-rows": lambda: all_rows("sequence.json"),
    "model-rows": lambda: all_rows("models.json"),
    "frozen-means": frozen_means,
    "frozen-rows": frozen_rows,
    "accuracy-texts": lambda: accuracy("character model", "speaker encoder", ("{:.4f}", "{:.1f}%")),
    "accuracy-tags": lambda: accuracy("tagger", "silero-vad", ("{:.2f}%", "{:.2f}")),
    "projection-means": projection_means,
    "projection-rows": projection_rows,
    "projection-clips": projection_clips,
    "setup-init": lambda: setup_rows("init"),
    "setup-replacing": lambda: setup_rows("replacing"),
    "states-cells": lambda: states_rows("cells"),
    "states-resets": lambda: states_rows("resets"),
    "states-torchrl": lambda: states_rows("torchrl"),
    "ragged-rows": ragged_rows,
    "variants": variants,
    "variants-loops": variants_loops,
    "variants-models": variant_models,
    "gpu-layers": lambda: gpu("layer"),
    "gpu-cells": lambda: gpu("cell"),
}


def with_tables(text: str) -> str:
    """Return a document with its tables made anew."""

    def fill(block: re.Match[str]) -> str:
        return block[1] + "\n" + "\n".join(TABLES[block[2]]()) + "\n\n" + block[4]

    return BLOCK.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for document in DOCUMENTS:
        old = document.read_text()
        new = with_tables(old)
        if new != old:
            stale.append(str(document.relative_to(ROOT)))
            if not check:
                document.write_text(new)
    if stale:
        print(f"{'not up to date' if check else 'written'}: {', '.join(stale)}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
