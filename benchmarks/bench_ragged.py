"""Sequences of different lengths: lists and nested tensors, against packing and padding by hand.

    python benchmarks/bench_ragged.py [--shapes LxNxIxH ..] [--threads 1 2] [--rounds 15]

One lstm_ext.LSTM, lengths drawn from 1 to L, of which one is L. By hand, with torch's helpers:

- padded: pack_padded_sequence (not sorted), the packed call, pad_packed_sequence, for a model that
  has its batch padded already;
- list: pack_sequence, the packed call, unpack_sequence;
- nested: to_padded_tensor, the same as padded, and a nested tensor of all rows but the padding.

Prints microseconds a call (medians, taken in turn), and by hand over ours, from and to the same
kind of batch: inference, then a training step with the gradients of weights and input. Writes the
rows to benchmarks/results/ragged.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol
import torch
from torch import Tensor
from torch.nn.utils.rnn import (
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpack_sequence,
)

import lstm_ext

SHAPES = ["10x8x16x16", "100x1x64x64", "50x16x128x128", "50x32x256x256", "200x64x64x64"]


def calls(module: lstm_ext.LSTM, batch: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Return the ways there are, each to its outputs in one tensor."""
    lengths = torch.tensor([len(s) for s in batch])
    trains = torch.is_grad_enabled()
    padded = pad_sequence(batch, batch_first=True).requires_grad_(trains)
    nested = torch.nested.nested_tensor(batch, layout=torch.jagged, requires_grad=trains)
    leaves = [s.clone().requires_grad_(trains) for s in batch]

    def by_hand(padded: Tensor) -> Tensor:
        packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(module(packed)[0], batch_first=True)[0]

    def list_by_hand() -> Tensor:
        return torch.cat(unpack_sequence(module(pack_sequence(leaves, enforce_sorted=False))[0]))

    def list_ours() -> Tensor:
        return torch.cat(lstm_ext.run_sequences(module, leaves)[0])

    def nested_by_hand() -> Tensor:
        nested.grad = None  # torch cannot add to it
        output = by_hand(nested.to_padded_tensor(0.0))
        rows = output[torch.arange(output.shape[1]) < lengths.unsqueeze(1)]
        return torch.nested.nested_tensor_from_jagged(rows, nested.offsets()).values()

    def nested_ours() -> Tensor:
        nested.grad = None
        return module(nested)[0].values()

    return {
        "padded": lambda: by_hand(padded),
        "list by hand": list_by_hand,
        "list": list_ours,
        "nested by hand": nested_by_hand,
        "nested": nested_ours,
    }


def compare(ways: dict[str, Callable[[], Tensor]], batch: list[Tensor]) -> None:
    """Raise an error unless all ways give the same numbers."""
    padded, *others = (way() for way in ways.values())
    expected = torch.cat([padded[k, : len(s)] for k, s in enumerate(batch)])
    for output in others:
        torch.testing.assert_close(output, expected)


def training(forward: Callable[[], Tensor]) -> Callable[[], None]:
    ones = torch.ones_like(forward())
    return lambda: forward().backward(ones)


def measure(shape: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time the modes of a shape and print them."""
    L, N, I, H = map(int, shape.split("x"))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = lstm_ext.LSTM(I, H, batch_first=True)
    batch = [torch.randn(n, I) for n in [L, *torch.randint(1, L + 1, (N - 1,)).tolist()]]
    rows = []
    for mode in ("inference", "training"):
        with torch.set_grad_enabled(mode == "training"):
            ways = calls(module, batch)
            compare(ways, batch)
            timed: dict[str, Callable[[], object]] = dict(ways)
            if mode == "training":
                timed = {name: training(way) for name, way in ways.items()}
            times = protocol.interleaved(timed, rounds)
        ratios = {name: times[f"{name} by hand"] / times[name] for name in ("list", "nested")}
        print(
            f"{shape:16} {mode:9} {threads:2}",
            *(f"{time:14.1f}" for time in times.values()),
            *(f"{ratio:8.2f}" for ratio in ratios.values()),
            flush=True,
        )
        rows.append({"shape": shape, "mode": mode, "threads": threads,
                     "us": times, "ratios": ratios})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=None, help="default: 1 and all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "ragged.json")
    options = parser.parse_args()
    names = "padded", "list by hand", "list", "nested by hand", "nested"
    print(f"{'L x N x I x H':29}", *(f"{name:>14}" for name in names), "    list   nested")
    rows = [
        row
        for threads in options.threads or sorted({1, torch.get_num_threads()})
        for shape in options.shapes
        for row in measure(shape, threads, options.rounds)
    ]
    protocol.save(options.out, rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
