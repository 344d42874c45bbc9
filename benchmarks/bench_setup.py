"""What happens before training: initial weights by lstm_ext.init, modules built as ours.

    python benchmarks/bench_setup.py [--shapes IxHxKxD ..] [--tables init replacing] [--threads 1]

Two tables, of medians in microseconds, taken in turn. A shape is that of an LSTM with K layers in D
directions. The rows are written to benchmarks/results/setup.json as well.

- init: forget_bias_ and orthogonal_, and the same by hand, in a loop over named_parameters(). By
  hand over ours.
- replacing: to build an nn.LSTM outside of a block of lstm_ext.replacing(); inside of one; and with
  the block's own begin and end. Beside them, the two other ways to a module of ours: by its own
  class, and by convert. On the CPU, where torch draws weights, and on the meta device, where
  from_pretrained() and similar functions build a model.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import protocol
import torch
from torch import nn
from torch.utils.benchmark import Measurement, Timer

import lstm_ext

Shape = tuple[int, ...]
Ways = dict[str, Callable[[], object]]
SHAPES = ["16x16x1x1", "128x128x1x1", "256x256x2x2"]


@torch.no_grad()
def forget_bias_by_hand(model: nn.Module) -> list[str]:
    names = []
    for name, p in model.named_parameters():
        if "bias_ih" in name or "bias_hh" in name:
            H = p.shape[0] // 4
            nn.init.constant_(p[H : 2 * H], 1.0 if "bias_ih" in name else 0.0)
            names.append(name)
    return names


@torch.no_grad()
def orthogonal_by_hand(model: nn.Module) -> list[str]:
    names = []
    for name, p in model.named_parameters():
        if "weight_hh" in name:
            for of_gate in p.chunk(4):
                nn.init.orthogonal_(of_gate)
            names.append(name)
    return names


INIT: dict[str, tuple[Callable[[nn.Module], list[str]], Callable[[nn.Module], list[str]]]] = {
    "forget_bias_": (forget_bias_by_hand, lstm_ext.init.forget_bias_),
    "orthogonal_": (orthogonal_by_hand, lstm_ext.init.orthogonal_),
}


def build(shape: Shape, device: str = "cpu", kind: type[nn.LSTM] = nn.LSTM) -> nn.LSTM:
    I, H, K, D = shape
    return kind(I, H, num_layers=K, bidirectional=D == 2, device=device)


def compare_init(
    by_hand: Callable[[nn.Module], list[str]],
    ours: Callable[[nn.Module], list[str]],
    model: nn.Module,
) -> None:
    """Raise an error unless both write the same numbers, from the same seed."""
    models = copy.deepcopy(model), copy.deepcopy(model)
    names = []
    for write, of in zip((by_hand, ours), models, strict=True):
        torch.manual_seed(0)
        names.append(write(of))
    if sorted(names[0]) != sorted(names[1]):
        raise AssertionError(f"by hand {names[0]} were written, by ours {names[1]}")
    expected, found = (dict(of.named_parameters()) for of in models)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def building_ways(shape: Shape, device: str) -> Ways:
    """Return the ways to a module, all but the first to one of ours."""

    def inside() -> nn.LSTM:
        with lstm_ext.replacing():
            return build(shape, device)

    return {
        "outside": lambda: build(shape, device),
        "inside": lambda: build(shape, device),  # measure_replacing opens a block around it
        "block and all": inside,
        "lstm_ext.LSTM": lambda: build(shape, device, lstm_ext.LSTM),
        "convert": lambda: lstm_ext.convert(build(shape, device)),
    }


class InABlock:
    """Times a call inside of one block, whose begin and end are not timed."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())

    def timeit(self, repeats: int) -> Measurement:
        """Time some calls, as Timer does."""
        with lstm_ext.replacing():
            return self._timer.timeit(repeats)


def compare_built(ways: Ways) -> None:
    """Raise an error unless all but the first give a module of ours, the first one of torch's."""
    kinds = {}
    for name, way in ways.items():
        if name == "inside":
            with lstm_ext.replacing():
                kinds[name] = type(way())
        else:
            kinds[name] = type(way())
    expected = {name: nn.LSTM if "outside" in name else lstm_ext.LSTM for name in ways}
    if kinds != expected:
        raise AssertionError(f"built {kinds}, wanted {expected}")


def row(
    table: str, what: str, shape: Shape, times: dict[str, float], pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    """Print a row and return it."""
    name = "x".join(map(str, shape))
    ratios = {f"{a} / {b}": times[a] / times[b] for a, b in pairs}
    print(
        f"{table:9} {name:14} {what:12}",
        *(f"{label} {time:.1f};" for label, time in times.items()),
        *(f"{label} {ratio:.2f};" for label, ratio in ratios.items()),
        flush=True,
    )
    return {"table": table, "shape": name, "what": what,
            "threads": torch.get_num_threads(), "us": times, "ratios": ratios}  # fmt: skip


def measure_init(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for what, (by_hand, ours) in INIT.items():
        torch.manual_seed(0)
        model = nn.Sequential(build(shape))
        compare_init(by_hand, ours, model)

        calls: Ways = {"by hand": partial(by_hand, model), "ours": partial(ours, model)}
        times = protocol.interleaved(calls, rounds)
        rows.append(row("init", what, shape, times, [("by hand", "ours")]))
    return rows


def measure_replacing(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for device in ("cpu", "meta"):
        ways = building_ways(shape, device)
        compare_built(ways)
        times = protocol.interleaved({**ways, "inside": InABlock(ways["inside"])}, rounds)
        pairs = [("inside", "outside"), ("block and all", "outside")]
        rows.append(row("replacing", device, shape, times, pairs))
    return rows


TABLES = {"init": measure_init, "replacing": measure_replacing}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tables", nargs="+", choices=[*TABLES], default=[*TABLES])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "setup.json")
    options = parser.parse_args()
    rows = []
    for table in options.tables:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for shape in options.shapes:
                rows += TABLES[table](tuple(map(int, shape.split("x"))), options.rounds)
    protocol.save(options.out, rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
