"""Two builds of lstm_ext side by side: whether a change made any call slower.

    python benchmarks/bench_builds.py PATH        this checkout against a built one at PATH
    python benchmarks/bench_builds.py PATH --quick --out ratios.json

The rows are our own of bench_cell.py and bench_sequence.py, frozen modules, and module calls of one
step. Each build runs in a process of its own; a row is timed in turns, some milliseconds each, and
the ratio is that of the fastest turns. Rows beyond the limit are timed once more, with more turns:
on a machine with other work, one in many is beyond it by chance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TURN = 0.03  # seconds
# Of one step: module calls that cost little but the way to the kernel.
STEPS = [
    {"kind": kind, "shape": shape, "mode": mode, "threads": 1}
    for kind in ("cell", "cell, zero states", "layer", "layer, zero states", "packed")
    for shape in ([1, 3, 2], [1, 32, 32])
    for mode in ("inference", "forward")
]


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return what is timed, as it is sent to the workers."""
    import bench_cell
    import bench_sequence

    found: list[dict[str, Any]] = list(STEPS)
    threads = [1] if quick else [1, os.cpu_count() or 1]
    for count in threads:
        for text in bench_cell.QUICK if quick else bench_cell.GRID:
            for mode in (*bench_cell.MODES, "frozen"):
                shape = list(bench_cell.parse_shape(text))
                found.append({"kind": "cell", "shape": shape, "mode": mode, "threads": count})
        for mode in (*bench_sequence.MODES, "frozen"):
            grid = bench_sequence.GRID
            if " " in mode:
                grid = bench_sequence.RAGGED if "packed" in mode else bench_sequence.VARIED
            for text in bench_sequence.QUICK if quick else grid:
                shape = list(bench_sequence.parse_shape(text))
                found.append({"kind": "sequence", "shape": shape, "mode": mode, "threads": count})
    return found


class Worker:
    """A process with one of the builds."""

    def __init__(self, checkout: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env={**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT / 'benchmarks'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        where = Path(self.ask({"where": True}))
        if where.parent != checkout.resolve() / "lstm_ext":
            raise SystemExit(f"the build at {checkout} was not imported, but {where}")

    def ask(self, question: Any) -> Any:
        """Send a question and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def closure(row: dict[str, Any]) -> Callable[[], Any]:
    """Return one call of a row."""
    import bench_sequence
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence

    import lstm_ext

    torch.set_num_threads(row["threads"])
    torch.manual_seed(0)
    kind, mode = row["kind"], row["mode"]
    torch.set_grad_enabled(mode not in ("inference", "frozen") and "inference" not in mode)
    if kind == "sequence":
        return sequence(row, bench_sequence.OPTIONS, bench_sequence.INPUT_GRADIENT)
    N, I, H = row["shape"]
    if kind.startswith("cell"):
        cell: Any = lstm_ext.LSTMCell(I, H)
        if mode == "frozen":
            cell = lstm_ext.freeze(cell.eval())
        every = mode == "training_all"
        x, h, c = (torch.randn(N, size).requires_grad_(every) for size in (I, H, H))
        if mode.startswith("training"):
            grads = tuple(torch.randn(N, H) for _ in range(2))
            return lambda: torch.autograd.backward(cell(x, (h, c)), grads)
        return (lambda: cell(x)) if "zero" in kind else (lambda: cell(x, (h, c)))
    layer = lstm_ext.LSTM(I, H)
    value: Any = torch.randn(1, N, I)
    if kind == "packed":
        value = pack_padded_sequence(value, torch.ones(N, dtype=torch.int64))
    states = torch.zeros(1, N, H), torch.zeros(1, N, H)
    return (
        (lambda: layer(value))
        if "layer" not in kind or "zero" in kind
        else (lambda: layer(value, states))
    )


def sequence(
    row: dict[str, Any], every_option: dict[str, dict[str, Any]], input_gradient: str
) -> Callable[[], Any]:
    """Return one call of a row of bench_sequence.py."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence

    import lstm_ext

    L, N, I, H = row["shape"]
    mode = row["mode"]
    kind = mode.removesuffix("inference").removesuffix("training")
    options = every_option.get(kind, {})
    count = (1 + options.get("bidirectional", False)) * options.get("num_layers", 1)
    layer: Any = lstm_ext.LSTM(I, H, **options)
    if mode == "frozen":
        layer = lstm_ext.freeze(layer.eval())
    padded = torch.randn(L, N, I).requires_grad_(mode == input_gradient)
    states = tuple(torch.randn(count, N, H) for _ in range(2))
    x: Any = padded
    if kind == "packed ":
        x = pack_padded_sequence(padded, torch.linspace(L, max(1, L // 4), N).long())

    def output() -> torch.Tensor:
        found = layer(x, states)[0]
        return found.data if kind == "packed " else found

    if "training" not in mode:
        return output
    grad = torch.randn_like(output())

    def train() -> None:
        padded.grad = None
        output().backward(grad)

    return train


def work() -> None:
    """Answer the questions on stdin."""
    call: Callable[[], Any] = lambda: None  # noqa: E731
    count = 1
    for line in sys.stdin:
        question = json.loads(line)
        answer: Any = None
        if "where" in question:
            import lstm_ext

            answer = lstm_ext.__file__
        elif "row" in question:
            call = closure(question["row"])
            call()
            begin = time.perf_counter()
            call()
            count = max(1, min(5000, int(TURN / max(time.perf_counter() - begin, 1e-7))))
        else:
            begin = time.perf_counter()
            for _ in range(count):
                call()
            answer = (time.perf_counter() - begin) / count * 1e6
        print(json.dumps(answer), flush=True)


def compare(workers: list[Worker], row: dict[str, Any], turns: int) -> dict[str, Any]:
    """Time a row by both."""
    best = []
    for worker in workers:
        worker.ask({"row": row})
        best.append(float("inf"))
    for turn in range(turns):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        for k in order:
            best[k] = min(best[k], workers[k].ask({"time": True}))
    return {**row, "old": best[0], "new": best[1], "new_over_old": best[1] / best[0]}


def main() -> None:
    """Compare, and print the rows that are beyond the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, nargs="?", help="a checkout with its own build")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--limit", type=float, default=1.03, help="new over old")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work()
    if options.old is None:
        parser.error("which build to compare with?")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from tqdm import tqdm

    workers = [Worker(options.old.resolve()), Worker(ROOT)]
    found = [compare(workers, row, options.turns) for row in tqdm(rows(options.quick), desc="rows")]
    again: Iterator[int] = (k for k, r in enumerate(found) if r["new_over_old"] > options.limit)
    for k in list(again):
        row = {name: found[k][name] for name in ("kind", "shape", "mode", "threads")}
        more = compare(workers, row, 5 * options.turns)
        found[k] = {**more, "first_new_over_old": found[k]["new_over_old"]}
    found.sort(key=lambda row: -row["new_over_old"])
    beyond = [row for row in found if row["new_over_old"] > options.limit]
    ratios = sorted(row["new_over_old"] for row in found)
    print(
        f"{len(found)} rows, new over old: median {ratios[len(ratios) // 2]:.3f}, "
        f"{len(beyond)} beyond {options.limit}"
    )
    for row in beyond or found[:5]:
        sizes = "x".join(map(str, row["shape"]))
        print(
            f"  {row['kind']} {sizes} {row['mode']}, {row['threads']} thread(s): "
            f"{row['old']:.2f} -> {row['new']:.2f} us, {row['new_over_old']:.3f}"
        )
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
