"""Speed of one LSTM cell step against nn.LSTMCell, torch.compile of it, and the reference.

    python benchmarks/bench_cell.py                      the whole grid, 1 and all threads
    python benchmarks/bench_cell.py --shapes 1x3x2 --threads 1 --peers nn.LSTMCell
    python benchmarks/report.py benchmarks/results/cell.json       table and chart of a result file

A shape is batch x input size x hidden size. Modes: ``inference`` under no_grad; ``forward`` with
gradients enabled; ``training``, a forward and a backward that accumulates into the parameters'
.grad; ``training_all``, the same with gradients of input and states too, as inside a sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import limits
import peers
import protocol
import report
import torch
from tqdm import tqdm

GRID = [
    "1x3x2",
    "1x32x32",
    "8x16x32",
    "1x128x128",
    "1x256x256",
    "16x128x128",
    "32x64x64",
    "32x256x256",
    "512x64x64",
    "4096x16x16",
    "64x512x512",
    "128x512x512",
    "256x1024x1024",
    "4096x64x64",
    "1x512x512",
    "1x1024x1024",
    "7x100x33",
    "3x50x200",
    "17x257x129",
]
QUICK = ["1x3x2", "7x100x33", "32x64x64"]
MODES = ["inference", "forward", "training", "training_all"]
PEERS = [peers.TORCH, peers.COMPILED, peers.REFERENCE]


def parse_shape(text: str) -> tuple[int, int, int]:
    try:
        batch, inputs, hidden = (int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not batch x input x hidden") from None
    return batch, inputs, hidden


def calls(
    cells: dict[str, peers.Peer], shape: tuple[int, int, int], mode: str, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """One closure a peer that runs the mode once, on inputs that all peers share."""
    N, I, H = shape
    wants_grad = mode == "training_all"
    x, h, c = (torch.randn(N, size).to(dtype).requires_grad_(wants_grad) for size in (I, H, H))
    grads = tuple(torch.randn(N, H).to(dtype) for _ in range(2))

    def forward(cell: peers.Cell) -> Callable[[], Any]:
        return lambda: cell(x, (h, c))

    def training(cell: peers.Cell) -> Callable[[], Any]:
        return lambda: torch.autograd.backward(cell(x, (h, c)), grads)

    make = training if mode.startswith("training") else forward
    check_correct(cells, (x, h, c), grads, mode)
    return {name: make(peer.call) for name, peer in cells.items()}


def check_correct(
    cells: dict[str, peers.Peer], inputs: tuple[torch.Tensor, ...], grads: Any, mode: str
) -> None:
    """Fail before a row is timed unless every peer computes what the first one does."""
    results = []
    for peer in cells.values():
        out = peer.call(inputs[0], inputs[1:])
        if mode.startswith("training"):
            wanted = [*peer.module.parameters(), *(t for t in inputs if t.requires_grad)]
            out = (*out, *torch.autograd.grad(out, wanted, grads))
        results.append([t.detach().double() for t in out])
    eps = torch.finfo(inputs[0].dtype).eps
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            error = (a - b).norm() / b.norm().clamp_min(1e-30)
            assert error < 32 * eps, f"a peer's result is off by {error:.2g}"


def bench_row(
    shape: tuple[int, int, int],
    mode: str,
    dtype: torch.dtype,
    names: list[str],
    rounds: int,
    machine: limits.Limits,
) -> dict[str, Any]:
    N, I, H = shape
    cells = peers.cells(I, H, dtype, [peers.OURS, *names])
    with torch.set_grad_enabled(mode != "inference"):
        closures = calls(cells, shape, mode, dtype)
        times = protocol.interleaved(closures, rounds)
    products = 3 if mode == "training_all" else 2 if mode == "training" else 1
    flops = products * 2 * N * 4 * H * (I + H)
    row: dict[str, Any] = {
        "shape": list(shape),
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "microseconds": times,
        "gflops": flops / times[peers.OURS] / 1e3,
    }
    if dtype == torch.float32:
        # Every product reads the weights once, or writes as much: one at a time.
        least = products * machine.seconds(flops / products, 4.0 * 4 * H * (I + H))
        row["share_of_limit"] = least * 1e6 / times[peers.OURS]
    rivals = [times[name] for name in (peers.TORCH, peers.COMPILED) if name in times]
    if rivals:
        row["ratio"] = min(rivals) / times[peers.OURS]
    if mode == "forward":
        x, h, c = (torch.randn(N, size).to(dtype) for size in (I, H, H))
        row["kept_bytes"] = {
            name: protocol.kept_bytes(
                lambda cell=peer.call: cell(x, (h, c)), [x, h, c, *peer.module.parameters()]
            )
            for name, peer in cells.items()
            if name != peers.COMPILED  # its graph keeps views the hooks cannot tell apart
        }
    return row


def main() -> None:
    parser = protocol.options(
        __doc__, parse_shape, MODES, PEERS, [*PEERS, peers.FUNCTION], "cell.json"
    )
    options = parser.parse_args()
    shapes = options.shapes or [parse_shape(s) for s in (QUICK if options.quick else GRID)]
    threads = options.threads or sorted({1, torch.get_num_threads()})
    rounds = options.rounds or (3 if options.quick else 9)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)

    protocol.environment()
    machine = limits.measure(threads)
    plan = [(t, shape, mode) for t in threads for shape in shapes for mode in options.modes]
    rows = []
    for count, shape, mode in tqdm(plan, desc="rows"):
        torch.set_num_threads(count)
        rows.append(bench_row(shape, mode, dtype, options.peers, rounds, machine[count]))
        protocol.save(
            options.out,
            rows,
            title=f"LSTM cell, {options.dtype}",
            limits=[asdict(machine[t]) for t in threads],
        )
    report.print_table(options.out)


if __name__ == "__main__":
    main()
