"""Projections (proj_size): lstm_ext.LSTM against torch.nn.LSTM, with the same weights.

    python benchmarks/bench_projection.py [--shapes LxNxIxHxP ..] [--quick] [--threads 1 2]

Prints microseconds a call (medians, taken in turn) and torch's over ours: inference, a training
step with the gradients of all weights, and both of a packed batch whose lengths fall from L to
L / 4. Writes the rows to benchmarks/results/projection.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import protocol
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

Shape = tuple[int, ...]
SHAPES = [
    (50, 16, 128, 128, 64),
    (50, 1, 128, 128, 64),
    (50, 64, 128, 128, 64),
    (10, 1, 64, 64, 32),
    (100, 8, 32, 32, 16),
    (100, 32, 64, 256, 128),
    (20, 4, 512, 1024, 256),
    (20, 64, 512, 1024, 512),
]
QUICK = SHAPES[:2]
MODES = ["inference", "training", "packed inference", "packed training"]


def parse_shape(text: str) -> Shape:
    """Read LxNxIxHxP."""
    L, N, I, H, P = map(int, text.split("x"))
    return L, N, I, H, P


def data(shape: Shape, packed: bool, dtype: torch.dtype) -> torch.Tensor | PackedSequence:
    """Return an input, packed or padded."""
    L, N, I, _, _ = shape
    x = torch.randn(L, N, I, dtype=dtype)
    if not packed:
        return x
    return pack_padded_sequence(x, torch.linspace(L, max(L / 4, 1), N).round().long())


def calls(
    shape: Shape, mode: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], dict[str, nn.LSTM]]:
    """Return a call of each, and the modules."""
    _, _, I, H, P = shape
    theirs = nn.LSTM(I, H, proj_size=P, dtype=dtype)
    ours = lstm_ext.LSTM(I, H, proj_size=P, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    modules: dict[str, nn.LSTM] = {"torch": theirs, "lstm_ext": ours}
    x = data(shape, mode.startswith("packed"), dtype)

    def output(module: nn.LSTM) -> torch.Tensor:
        out = module(x)[0]
        return out.data if isinstance(out, PackedSequence) else out

    def train(module: nn.LSTM) -> None:
        out = output(module)
        module.zero_grad(set_to_none=True)
        out.backward(torch.ones_like(out))

    def infer(module: nn.LSTM) -> torch.Tensor:
        with torch.no_grad():
            return output(module)

    run: Callable[[nn.LSTM], object] = train if mode.endswith("training") else infer
    return {name: (lambda m=m: run(m)) for name, m in modules.items()}, modules


def compare(modules: dict[str, nn.LSTM], shape: Shape, dtype: torch.dtype) -> None:
    """Raise an error unless both compute the same."""
    x = data(shape, False, dtype)
    with torch.no_grad():
        torch.testing.assert_close(modules["lstm_ext"](x), modules["torch"](x))


def measure(
    shape: Shape, mode: str, threads: int, rounds: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Time a row and print it."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    timed, modules = calls(shape, mode, dtype)
    if dtype in (torch.float32, torch.float64):
        compare(modules, shape, dtype)
    times = protocol.interleaved(timed, rounds)
    ratio = times["torch"] / times["lstm_ext"]
    name = "x".join(map(str, shape))
    print(
        f"{name:22} {mode:17} {threads:2}",
        *(f"{time:12.1f}" for time in times.values()),
        f"{ratio:7.2f}",
        flush=True,
    )
    return {"shape": name, "mode": mode, "threads": threads, "us": times, "ratio": ratio}


def main() -> None:
    parser = protocol.options(__doc__, parse_shape, MODES, [], [], "projection.json")
    options = parser.parse_args()
    shapes = options.shapes or (QUICK if options.quick else SHAPES)
    rounds = options.rounds or (5 if options.quick else 15)
    threads = options.threads or sorted({1, torch.get_num_threads()})
    dtype = getattr(torch, options.dtype)
    print(f"{'L x N x I x H x P':22} {'':17}   {'torch':>12} {'lstm_ext':>12}   ratio")
    rows = [
        measure(shape, mode, count, rounds, dtype)
        for count in threads
        for shape in shapes
        for mode in options.modes
    ]
    for mode in options.modes:
        ratios = [row["ratio"] for row in rows if row["mode"] == mode]
        print(f"{mode:17} {protocol.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    protocol.save(options.out, rows, dtype=options.dtype, rounds=rounds)


if __name__ == "__main__":
    main()
