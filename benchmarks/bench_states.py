"""Cell states of every step, resets to states, and TorchRL's recurrent mode.

    python benchmarks/bench_states.py [--shapes LxNxIxH ..] [--threads 1 2] [--rounds 15]

Three tables, of medians in microseconds, taken in turn; inference, then a training step with the
gradients of all weights (and of the states to reset to, where there are some). The rows are written
to benchmarks/results/states.json as well.

- cells: one lstm_ext.LSTM without and with return_cell_states; torch.nn.LSTM, which has none; and
  what people write instead, a loop of torch.nn.LSTMCell that keeps every c. The last two over ours.
- resets: none, to zero, to one learned state, and to a state for each step; 3 % of the steps.
- torchrl: torchrl's LSTMModule in its recurrent mode, which cuts, pads and packs, and the module
  of examples/torchrl_lstm.py in its place; over it, their ratio. Shape 64x128x128x128 unless told;
  left out where torchrl is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import protocol
import torch
from torch import Tensor, nn

import lstm_ext

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

SHAPES = ["20x1x64x64", "50x16x128x128", "100x32x256x256", "64x128x128x128"]
TORCHRL_SHAPES = ["64x128x128x128"]
RESETS = 0.03
Ways = dict[str, Callable[[], Sequence[Tensor]]]


def cell_ways(L: int, N: int, I: int, H: int) -> Ways:
    """Return the ways to the outputs and, but for torch.nn.LSTM's, the c of every step."""
    lstm, torchs, cell = lstm_ext.LSTM(I, H), nn.LSTM(I, H), nn.LSTMCell(I, H)
    torchs.load_state_dict(lstm.state_dict())
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in lstm.state_dict().items()})
    x, zeros = torch.randn(L, N, I), torch.zeros(N, H)

    def loop() -> list[Tensor]:
        h = c = zeros
        outputs, cells = [], []
        for step in x:
            h, c = cell(step, (h, c))
            outputs.append(h)
            cells.append(c)
        return [torch.stack(outputs), torch.stack(cells)]

    return {
        "off": lambda: [lstm(x)[0]],
        "on": lambda: lstm(x, return_cell_states=True)[::2],
        "nn.LSTM": lambda: [torchs(x)[0]],
        "loop of cells": loop,
    }


def reset_ways(L: int, N: int, I: int, H: int) -> Ways:
    """Return calls with each kind of reset."""
    lstm, x = lstm_ext.LSTM(I, H), torch.randn(L, N, I)
    mask, trains = torch.rand(L, N) < RESETS, torch.is_grad_enabled()
    learned = tuple(torch.zeros(1, H, requires_grad=trains) for _ in range(2))
    stored = torch.zeros(1, L, N, H), torch.zeros(1, L, N, H)
    return {
        "none": lambda: [lstm(x)[0]],
        "to zero": lambda: [lstm(x, reset=mask)[0]],
        "learned": lambda: [lstm(x, reset=mask, reset_hx=learned)[0]],
        "of each step": lambda: [lstm(x, reset=mask, reset_hx=stored)[0]],
    }


def torchrl_ways(L: int, N: int, I: int, H: int) -> Ways:
    """Return torchrl's module in its recurrent mode, and the one of our example."""
    import torchrl_lstm
    from tensordict import TensorDict
    from torchrl import modules

    keys: dict[str, Any] = {"in_key": "x", "out_key": "y", "default_recurrent_mode": True}
    torchs = modules.LSTMModule(I, H, **keys)
    ours = torchrl_lstm.LSTMModule(I, H, **keys)
    ours.load_state_dict(torchs.state_dict())
    data = TensorDict(
        {"x": torch.randn(N, L, I), "is_init": torch.rand(N, L, 1) < RESETS}, batch_size=[N, L]
    )

    def call(module: nn.Module) -> list[Tensor]:
        out = module(data.copy())
        states = [out["next", f"recurrent_state_{s}"] for s in "hc"]
        return [out["y"], *states]

    return {"torchrl": lambda: call(torchs), "ours": lambda: call(ours)}


def compare(ways: Ways, alike: Sequence[str]) -> None:
    """Raise an error unless these ways give the same numbers, as far as each goes."""
    with torch.no_grad():
        expected = ways[alike[0]]()
        for name in alike[1:]:
            for a, b in zip(ways[name](), expected, strict=False):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def training(forward: Callable[[], Sequence[Tensor]]) -> Callable[[], None]:
    ones = [torch.ones_like(t) for t in forward()]

    def step() -> None:
        torch.autograd.backward(list(forward()), ones)

    return step


TABLES: dict[str, tuple[Callable[..., Ways], list[str], list[tuple[str, str]]]] = {
    "cells": (
        cell_ways,
        ["on", "off", "nn.LSTM", "loop of cells"],
        [("on", "off"), ("nn.LSTM", "on"), ("loop of cells", "on")],
    ),
    "resets": (reset_ways, ["to zero", "learned", "of each step"], [("learned", "to zero")]),
    "torchrl": (torchrl_ways, ["torchrl", "ours"], [("torchrl", "ours")]),
}


def measure(table: str, shape: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time the modes of a shape and print them."""
    make, alike, pairs = TABLES[table]
    torch.set_num_threads(threads)
    rows = []
    for mode in ("inference", "training"):
        torch.manual_seed(0)
        with torch.set_grad_enabled(mode == "training"):
            ways = make(*map(int, shape.split("x")))
            compare(ways, alike)
            timed: dict[str, Callable[[], object]] = dict(ways)
            if mode == "training":
                timed = {name: training(way) for name, way in ways.items()}
            times = protocol.interleaved(timed, rounds)
        ratios = {f"{a} / {b}": times[a] / times[b] for a, b in pairs}
        print(
            f"{table:8} {shape:16} {mode:9} {threads:2}",
            *(f"{name} {time:.1f};" for name, time in times.items()),
            *(f"{name} {ratio:.2f};" for name, ratio in ratios.items()),
            flush=True,
        )
        rows.append({"table": table, "shape": shape, "mode": mode, "threads": threads,
                     "us": times, "ratios": ratios})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=None)
    parser.add_argument("--tables", nargs="+", choices=[*TABLES], default=[*TABLES])
    parser.add_argument("--threads", nargs="+", type=int, default=None, help="default: 1 and all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "states.json")
    options = parser.parse_args()
    tables = options.tables
    if "torchrl" in tables and importlib.util.find_spec("torchrl") is None:
        print("torchrl is not installed: its table is left out")
        tables = [table for table in tables if table != "torchrl"]
    rows = [
        row
        for table in tables
        for threads in options.threads or sorted({1, torch.get_num_threads()})
        for shape in options.shapes or (TORCHRL_SHAPES if table == "torchrl" else SHAPES)
        for row in measure(table, shape, threads, options.rounds)
    ]
    protocol.save(options.out, rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
